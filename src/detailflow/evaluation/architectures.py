"""Feature networks from one safetensors file: weights, and in the metadata the name of the architecture.

Nothing in such a file is run: the name is looked up among those that timm, torchvision and this project know.
"""

import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detailflow import hub
from detailflow.errors import DetailFlowError, missing_package
from detailflow.models.loading import config_from_dict, load_weights
from detailflow.tensors import read_metadata, read_tensors

LARGEST_MEAN = 1e6
RANGES = {"num_classes": (0, 10**5), "width": (1, 1024), "size": (8, 1024)}
_EXAMPLES = "timm/resnet50, torchvision/resnet50 or detailflow/residual"

Run = Callable[[Tensor], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Settings:
    """What a file's metadata says, as strings there; all but the architecture may be left out.

    Attributes:
        architecture: `timm/NAME` or `torchvision/NAME`, one of that library's, or `detailflow/residual`.
        num_classes: the outputs of its last layer. timm's networks may have none, 0, and give features alone.
        width: channels of the first layer of `detailflow/residual`.
        size: the side that images are resized to; `None`, in the metadata "own", takes them as they are.
        mean, std: three numbers each, for pixels in [0, 1].
    """

    architecture: str
    num_classes: int = 1000
    width: int = 64
    size: int | None = None
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        for key, (least, most) in RANGES.items():
            value = getattr(self, key)
            if value is not None and not least <= value <= most:
                also = " or own" if key == "size" else ""
                raise DetailFlowError(f"{key} must be from {least} to {most}{also}, not {value}")
        for key in ("mean", "std"):
            value = getattr(self, key)
            if len(value) != 3 or not all(isinstance(x, float | int) and abs(x) <= LARGEST_MEAN for x in value):
                raise DetailFlowError(f"{key} must be like 0.5, 0.5, 0.5, not {value}")
        if min(self.std) <= 0:
            raise DetailFlowError(f"std must be more than 0, not {self.std}")
        if self.num_classes == 0 and not self.architecture.startswith("timm/"):
            raise DetailFlowError(f"num_classes must be 1 or more for {self.architecture[:60]!r}")

    @property
    def preprocessing(self) -> str:
        """What is done to images before the network sees them."""
        size = "bytes at their own size"
        if self.size is not None:
            size = f"resized to {self.size}×{self.size}, bicubic with antialiasing"
        if self.mean == self.std == (0.5, 0.5, 0.5):
            return f"{size}, scaled to [-1, 1]"
        mean, std = (", ".join(f"{x:g}" for x in values) for values in (self.mean, self.std))
        return f"{size}, scaled to [0, 1], mean ({mean}) and standard deviation ({std})"


class LoadedNetwork(NamedTuple):
    """A network that was read from a file."""

    settings: Settings
    run: Run  # float32 images (B, 3, H, W), normalized → features (B, D), and logits (B, C) if it has classes
    module: nn.Module  # the same, to move to a device
    fingerprint: str  # SHA-256 in hex of the metadata and the weights


def load_network(path: Path) -> LoadedNetwork:
    """Load a feature network in float32 and evaluation mode."""
    if not path.is_file():
        raise DetailFlowError(f"{path} does not exist or is no file: give a .safetensors file of a feature network")
    metadata = read_metadata(path)
    settings = read_settings(metadata, path)
    tensors = read_tensors(path, torch.float32, integers=True)
    module, run = build(settings, path)
    for name, value in module.state_dict().items():
        if name in tensors and tensors[name].dtype != value.dtype:
            found, wanted = tensors[name].dtype, value.dtype
            raise DetailFlowError(f"{path}: {name} is of type {found}, and {settings.architecture}'s of {wanted}")
    load_weights(module, tensors, f"{path} as {settings.architecture}", assign=True)
    return LoadedNetwork(settings, run, module.eval().requires_grad_(False), hub.fingerprint(metadata, tensors))


def read_settings(metadata: Mapping[str, str], path: Path) -> Settings:
    """Return the settings in a file's metadata."""
    texts = {key: value for key, value in metadata.items() if key != "format"}  # which safetensors' own writers add
    if "architecture" not in texts:
        raise DetailFlowError(
            f"{path} names no architecture in its metadata, such as {_EXAMPLES}: docs/evaluate.md says how to write it"
        )
    return config_from_dict(Settings, {key: _value(key, text) for key, text in texts.items()}, f"{path}: metadata")


def _value(key: str, text: str) -> Any:
    """Return the number or the numbers that a text stands for, or the text itself."""
    if key == "architecture":
        return text
    try:
        return None if (key, text) == ("size", "own") else json.loads(f"[{text}]" if key in ("mean", "std") else text)
    except (ValueError, RecursionError):
        return text[:60]


def build(settings: Settings, path: Path) -> tuple[nn.Module, Run]:
    """Return a network without values of its parameters, so that a small file cannot ask for a large one."""
    library, _, name = settings.architecture.partition("/")
    builders = {"timm": _timm, "torchvision": _torchvision, "detailflow": _detailflow}
    if library not in builders:
        raise DetailFlowError(f"{path}: the architecture must be like {_EXAMPLES}, not {settings.architecture[:60]!r}")
    from accelerate import init_empty_weights

    try:
        with init_empty_weights(include_buffers=False), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about initial values
            return builders[library](name, settings)
    except ImportError as error:
        raise missing_package(str(path), library) from error
    except KeyError:
        raise DetailFlowError(f"{path}: {library} has no classification network {name[:60]!r}") from None
    except Exception as error:  # libraries have many kinds
        reason = "".join(str(error).strip().splitlines()[:1])
        raise DetailFlowError(f"{path}: {settings.architecture} cannot be built ({reason})") from error


def _timm(name: str, settings: Settings) -> tuple[nn.Module, Run]:
    """Take `forward_head(…, pre_logits=True)` as features; the part of the name after a dot is ignored."""
    import timm

    base = name.partition(".")[0]
    if base not in timm.list_models():
        raise KeyError(name)
    network: Any = timm.create_model(base, pretrained=False, num_classes=settings.num_classes)

    def run(images: Tensor) -> tuple[Tensor, Tensor | None]:
        maps = network.forward_features(images)
        features = network.forward_head(maps, pre_logits=True)
        return features, network.forward_head(maps) if settings.num_classes else None

    return network, run


def _torchvision(name: str, settings: Settings) -> tuple[nn.Module, Run]:
    """Take the input of the last linear layer as features."""
    from torchvision import models

    if name not in models.list_models(module=models):
        raise KeyError(name)
    network = models.get_model(name, weights=None, num_classes=settings.num_classes)
    layers = [module for module in network.modules() if isinstance(module, nn.Linear)]
    if not layers:
        raise ValueError("it has no linear layer, whose input the features would be")
    seen: list[Tensor] = []
    layers[-1].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))

    def run(images: Tensor) -> tuple[Tensor, Tensor | None]:
        seen.clear()
        logits = network(images)
        return seen.pop(), logits

    return network, run


def _detailflow(name: str, settings: Settings) -> tuple[nn.Module, Run]:
    if name != "residual":
        raise KeyError(name)
    network = ResidualFeatures(settings.width, settings.num_classes)
    return network, network


class ResidualFeatures(nn.Module):
    """`detailflow/residual`, a small CNN for images of 32×32 pixels: 4·`width` features, and logits."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        widths = (3, width, 2 * width, 4 * width, 4 * width)
        self.enter = nn.ModuleList(_convolution(i, o) for i, o in pairwise(widths))
        self.refine = nn.ModuleList(
            nn.Sequential(_convolution(w, w), _convolution(w, w)) for w in (2 * width, 4 * width)
        )
        self.head = nn.Linear(4 * width, num_classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the features (B, 4·width) and logits (B, classes) of (B, 3, H, W), sides of 8 or more."""
        x = F.max_pool2d(self.enter[1](self.enter[0](images)), 2)
        x = F.max_pool2d(self.enter[2](x + self.refine[0](x)), 2)
        x = F.max_pool2d(self.enter[3](x), 2)
        features = (x + self.refine[1](x)).mean((2, 3))
        return features, self.head(features)


def _convolution(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.GELU())
