"""Feature networks from one safetensors file: weights, and in the metadata the name of the architecture.

Nothing in such a file is run: the name is looked up among those that timm, torchvision and this project know.
"""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detailflow import hub
from detailflow.errors import DetailFlowError, missing_package
from detailflow.models.loading import load_weights
from detailflow.settings import Must, Settings, checked, field_types, parse_settings
from detailflow.tensors import read_metadata, read_tensors

_EXAMPLES = "timm/resnet50, torchvision/resnet50 or detailflow/residual"
_THREE = Must("like 0.5, 0.5, 0.5", lambda values: len(values) == 3 and all(abs(x) <= 1e6 for x in values))
_POSITIVE = Must("more than 0", lambda values: min(values) > 0)


def _within(least: int, most: int, also: str = "") -> Must:
    return Must(f"from {least} to {most}{also}", lambda value: least <= value <= most)


Run = Callable[[Tensor], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class NetworkSettings(Settings):
    """What a file's metadata says, as text there; all but the architecture may be left out.

    Attributes:
        architecture: `timm/NAME` or `torchvision/NAME`, one of that library's, or `detailflow/residual`.
        num_classes: the outputs of its last layer. timm's networks may have none, 0, and give features alone.
        width: channels of the first layer of `detailflow/residual`.
        size: the side that images are resized to; `None`, in the metadata "own", takes them as they are.
        mean, std: three numbers each, for pixels in [0, 1].
    """

    architecture: str
    num_classes: Annotated[int, _within(0, 10**5)] = 1000
    width: Annotated[int, _within(1, 1024)] = 64
    size: Annotated[int, _within(8, 1024, " or own")] | None = None
    mean: Annotated[tuple[float, ...], _THREE] = (0.5, 0.5, 0.5)
    std: Annotated[tuple[float, ...], _THREE, _POSITIVE] = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_classes == 0 and not self.architecture.startswith("timm/"):
            raise DetailFlowError(f"num_classes in the metadata must be 1 or more for {self.architecture[:60]!r}")

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

    settings: NetworkSettings
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


def read_settings(metadata: Mapping[str, str], path: Path) -> NetworkSettings:
    """Return the settings in a file's metadata."""
    left_out = {("format", metadata.get("format")), ("size", "own")}  # the first is from safetensors' own writers
    texts = {key: text for key, text in metadata.items() if (key, text) not in left_out}
    if "architecture" not in texts:
        raise DetailFlowError(
            f"{path} names no architecture in its metadata, such as {_EXAMPLES}: docs/evaluate.md says how to write it"
        )
    types, values = field_types(NetworkSettings), dict[str, Any]()
    for key, text in texts.items():
        value = f"[{text[:99]}]" if key in ("mean", "std") else text
        values[key] = checked(f"{path}: {key} in the metadata", value, types.get(key, str), text=text.isascii())
    return parse_settings(NetworkSettings, values, path)


def build(settings: NetworkSettings, path: Path) -> tuple[nn.Module, Run]:
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


def _timm(name: str, settings: NetworkSettings) -> tuple[nn.Module, Run]:
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


def _torchvision(name: str, settings: NetworkSettings) -> tuple[nn.Module, Run]:
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


def _detailflow(name: str, settings: NetworkSettings) -> tuple[nn.Module, Run]:
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
