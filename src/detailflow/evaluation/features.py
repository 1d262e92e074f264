"""The networks whose features images are compared by: Inception, DINOv2, EfficientNet, or a small one from a file."""

import io
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detailflow import hub
from detailflow.errors import DetailFlowError
from detailflow.models.efficientnet import EFFICIENTNET, EfficientNetLite0
from detailflow.models.layers import convolution
from detailflow.models.loading import load_weights, timm_weights, torch_weights
from detailflow.tensors import read_metadata, read_tensors

INCEPTION = "inception"
DINOV2 = "vit_large_patch14_dinov2.lvd142m"  # timm's name, and on the hub timm/…
SPATIAL_CHANNELS = 7  # of Inception's 17×17 map, as sFID takes them (Nash et al. 2021)
CPU_PIXELS = 64 * 32 * 32  # at once on a CPU: more would not stay in its caches, and take twice as long
CPU_IMAGES = 8  # but no fewer
MAX_GRID = 64  # patches a side of position embeddings that are resized
SIDE = 224  # pixels of the images that DINOv2 and EfficientNet-Lite0 see
HALVES = (0.5, 0.5, 0.5)  # mean and standard deviation of pixels in [0, 1] that bring them to [-1, 1]
ARCHITECTURE = "detailflow/residual"  # in the metadata of a `ResidualFeatures`
METADATA = {"architecture": (ARCHITECTURE,), "size": (None, "own")}  # what a file's metadata may say
METADATA |= dict.fromkeys(("mean", "std"), (None, "0.5, 0.5, 0.5"))
SMALLEST_SIDE = 8  # pixels of the images that it takes
LARGEST = 4096  # its width and classes
_INSTEAD = "or another network as --features FILE.safetensors"


class Features(NamedTuple):
    """What a network returns for B images, float32."""

    pool: Tensor  # (B, D), for Fréchet distances, precision and recall
    spatial: Tensor | None = None  # (B, S), for sFID
    logits: Tensor | None = None  # (B, C) of classes, for the inception score


class Extractor(Protocol):
    """A feature network."""

    name: str  # as the user named it
    fingerprint: str  # SHA-256 in hex of its weights
    preprocessing: str  # what is done to images before the network sees them, for reports

    def __call__(self, images: Tensor) -> Features:
        """Return the features of bytes (B, H, W, 3) on any device, on the network's device."""


def load_extractor(features: str, device: torch.device | str = "cpu", weights: str | None = None) -> Extractor:
    """Load a network by name or file.

    Args:
        features: one of `NETWORKS`, or FILE.safetensors with a `ResidualFeatures`.
        device: where it computes.
        weights: a local file with the weights of a named network; `None` downloads them once.
    """
    if features in NETWORKS:
        return NETWORKS[features](torch.device(device), weights)
    if features.endswith(".pt2"):
        raise DetailFlowError(
            f"{features} is an exported program, which could run any code and is not read: give a FILE.safetensors, "
            "as docs/evaluate.md shows"
        )
    if not features.endswith(".safetensors"):
        names = ", ".join(NETWORKS)
        raise DetailFlowError(f"features must be {names} or the path of a FILE.safetensors, not {features!r}")
    if weights is not None:
        raise DetailFlowError(f"{features} has its own weights: leave out --weights {weights}")
    return _residual(Path(features).expanduser(), torch.device(device))


class _Network:
    """A network that sees bytes (B, H, W, 3) as `_features` wants them: in parts on a CPU, without TF32 on a GPU."""

    def __init__(
        self, name: str, module: nn.Module, fingerprint: str, preprocessing: str, device: torch.device
    ) -> None:
        self.name, self.fingerprint, self.preprocessing = name, fingerprint, preprocessing
        self._network: Any = module.to(device)
        self._device = device
        self._side: int | None = None  # that it resizes images to

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Features:
        """Return the features of bytes (B, H, W, 3)."""
        if self._device.type != "cpu":
            with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                return self._features(images)
        pixels = self._side**2 if self._side else images.shape[1] * images.shape[2]
        parts = [self._features(part) for part in images.split(max(CPU_IMAGES, CPU_PIXELS // pixels))]
        pool, *others = (None if part[0] is None else torch.cat(part) for part in zip(*parts, strict=True))
        assert pool is not None
        return Features(pool, *others)

    def _features(self, images: Tensor) -> Features:
        raise NotImplementedError


class NormalizedNetwork(_Network):
    """A network of normalized images, which are resized to side `size` first, unless it takes them as they are."""

    def __init__(
        self,
        name: str,
        network: nn.Module,
        run: Callable[[Tensor], tuple[Tensor, Tensor | None]],
        fingerprint: str,
        device: torch.device,
        size: int | None = None,
        moments: tuple[tuple[float, ...], tuple[float, ...]] = (HALVES, HALVES),
    ) -> None:
        about = f"resized to {size}×{size}, bicubic with antialiasing" if size else "bytes at their own size"
        mean, std = moments
        if mean == std == HALVES:
            about += ", scaled to [-1, 1]"
        else:
            numbers = (", ".join(f"{x:g}" for x in values) for values in (mean, std))
            about += ", scaled to [0, 1], mean ({}) and standard deviation ({})".format(*numbers)
        super().__init__(name, network.eval().requires_grad_(False), fingerprint, about, device)
        self._run, self._side = run, size
        self._mean, self._std = (torch.tensor(x, device=device)[:, None, None] for x in (mean, std))

    def _features(self, images: Tensor) -> Features:
        x = images.to(self._device).movedim(-1, 1).float() / 255
        if self._side:
            x = F.interpolate(x, (self._side, self._side), mode="bicubic", align_corners=False, antialias=True)
        pool, logits = self._run((x - self._mean) / self._std)
        return Features(pool, logits=logits)


class ResidualFeatures(nn.Module):
    """A small CNN for images of 32×32 pixels: 4·`width` features, and logits."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        widths = (3, width, 2 * width, 4 * width, 4 * width)
        self.enter = nn.ModuleList(convolution(i, o) for i, o in pairwise(widths))
        self.refine = nn.ModuleList(nn.Sequential(convolution(w, w), convolution(w, w)) for w in (2 * width, 4 * width))
        self.head = nn.Linear(4 * width, num_classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the features (B, 4·width) and logits (B, classes) of (B, 3, H, W), sides of 8 or more."""
        if min(images.shape[2:]) < SMALLEST_SIDE:
            height, width = images.shape[2:]
            raise DetailFlowError(
                f"the feature network takes images of {SMALLEST_SIDE} pixels a side or more, not {width}×{height}"
            )
        x = F.max_pool2d(self.enter[1](self.enter[0](images)), 2)
        x = F.max_pool2d(self.enter[2](x + self.refine[0](x)), 2)
        x = F.max_pool2d(self.enter[3](x), 2)
        features = (x + self.refine[1](x)).mean((2, 3))
        return features, self.head(features)


def _residual(path: Path, device: torch.device) -> NormalizedNetwork:
    """Load a `ResidualFeatures` from a safetensors file, whose shapes say its sizes."""
    if not path.is_file():
        raise DetailFlowError(f"{path} does not exist or is not a file: give a .safetensors file of a feature network")
    metadata = read_metadata(path)
    if any(metadata.get(key) not in values for key, values in METADATA.items()):
        raise DetailFlowError(
            f"{path} is not a feature network that is known: its metadata must say architecture {ARCHITECTURE}, and "
            "nothing of how images are prepared"
        )
    tensors = read_tensors(path, torch.float32, integers=True)
    sizes = (tensors[name].numel() if name in tensors else 1 for name in ("enter.0.1.weight", "head.bias"))
    with torch.device("meta"):  # a file of wrong shapes takes no memory
        network = ResidualFeatures(*(min(max(1, size), LARGEST) for size in sizes))
    load_weights(network, {name: tensor.float() for name, tensor in tensors.items()}, path, assign=True)
    return NormalizedNetwork(path.name, network, network, hub.fingerprint(metadata, tensors), device)


class Inception(_Network):
    """Inception-v3 as of 2015-12-05, which FID is defined by, in torch-fidelity's equivalent of the TensorFlow graph.

    As in ADM's evaluation: pool (B, 2048) is `pool_3`; spatial (B, 2023) is the first 7 channels of `mixed_6/conv`,
    the 1×1 branch of the 17×17 block Mixed_6d, position by position; logits (B, 1008) are without their bias.
    """

    def __init__(self, device: torch.device, weights: str | None = None) -> None:
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

        # torch-fidelity unpickles its file without a check, so it gets a copy of what was read as plain tensors.
        plain = io.BytesIO()
        torch.save(_inception_weights(URL_INCEPTION_V3, weights), plain)
        plain.seek(0)
        layers = ["2048", "logits_unbiased"]
        try:
            network = FeatureExtractorInceptionV3(INCEPTION, layers, feature_extractor_weights_path=plain)
        except (RuntimeError, TypeError, AttributeError) as error:  # torch's errors for tensors that don't fit
            what = f"{weights or 'the download'} does not hold"
            raise _no_weights(INCEPTION, what, URL_INCEPTION_V3) from error
        resizing = "bytes at their own size, resized to 299×299 by TensorFlow 1's bilinear interpolation in the network"
        super().__init__(INCEPTION, network, hub.fingerprint({}, network.state_dict()), resizing, device)
        self._spatial: list[Tensor] = []
        self._network.Mixed_6d.branch1x1.register_forward_hook(lambda _, __, output: self._spatial.append(output))

    def _features(self, images: Tensor) -> Features:
        self._spatial.clear()
        pool, logits = self._network(images.to(self._device).movedim(-1, 1).contiguous())
        spatial = self._spatial.pop()[:, :SPATIAL_CHANNELS].movedim(1, -1)  # channels last, as TensorFlow flattens them
        return Features(pool, spatial.flatten(1).float(), logits)


def _inception_weights(url: str, path: str | None) -> dict[str, Tensor]:
    file = None if path is None else _existing(path)
    try:
        return torch_weights(url, file)
    except Exception as error:  # downloads and damaged files have many kinds
        raise _no_weights(INCEPTION, f"{path} cannot be read as" if path else "cannot be downloaded:", url) from error


def _dinov2(device: torch.device, weights: str | None = None) -> NormalizedNetwork:
    """Load DINOv2 ViT-L/14, whose class token (B, 1024) Stein et al. (2023, arXiv 2306.04675) compare models by."""
    import timm
    from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    try:
        tensors = timm_weights(DINOV2, None if weights is None else _existing(weights))
        tensors.pop("mask_token", None)  # in DINOv2's own files, for training
        network: Any = timm.create_model(DINOV2, num_classes=0, img_size=SIDE)
        tensors["pos_embed"] = _positions_at(tensors["pos_embed"], network.patch_embed.grid_size[0])
        load_weights(network, tensors, weights or DINOV2)
    except (DetailFlowError, KeyError, RuntimeError) as error:
        what = f"{weights} does not hold" if weights else "cannot be downloaded:"
        raise _no_weights("dinov2", what, f"model.safetensors of timm/{DINOV2} on the Hugging Face hub") from error
    fingerprint, moments = hub.fingerprint({}, network.state_dict()), (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    return NormalizedNetwork("dinov2", network, lambda x: (network(x), None), fingerprint, device, SIDE, moments)


def _efficientnet(device: torch.device, weights: str | None = None) -> NormalizedNetwork:
    """Load EfficientNet-Lite0, which needs no download: 1,280 pooled features, and logits of ImageNet's classes."""
    if weights is not None:
        raise DetailFlowError(
            f"--features {EFFICIENTNET} has its weights from a package: leave out --weights {weights}"
        )
    network = EfficientNetLite0.from_package(f"--features {EFFICIENTNET}", _INSTEAD)

    def run(images: Tensor) -> tuple[Tensor, Tensor]:
        pool = network.pool(images)
        return pool, network.classifier(pool)

    return NormalizedNetwork(EFFICIENTNET, network, run, hub.fingerprint({}, network.state_dict()), device, SIDE)


def _positions_at(positions: Tensor, side: int) -> Tensor:
    """Resize position embeddings (1, 1 + s², D) of a class token and s×s patches to side×side patches.

    As DINOv2's own code does it, which timm's differs from: without antialiasing, with an offset of 0.1.
    """
    if positions.ndim != 3 or not 1 < positions.shape[1] <= 1 + MAX_GRID**2:
        return positions  # which do not fit
    grid = round((positions.shape[1] - 1) ** 0.5)
    if grid == side or 1 + grid**2 != positions.shape[1]:
        return positions
    patches = positions[:, 1:].unflatten(1, (grid, grid)).movedim(-1, 1)
    patches = F.interpolate(patches, scale_factor=(side + 0.1) / grid, mode="bicubic", align_corners=False)
    return torch.cat((positions[:, :1], patches.flatten(2).transpose(1, 2)), 1)


def _existing(path: str) -> Path:
    file = Path(path).expanduser()
    if not file.exists():
        raise DetailFlowError(
            f"{path} does not exist: give a file of the network's weights, or no --weights to download them"
        )
    return file


def _no_weights(name: str, what: str, source: str) -> DetailFlowError:
    return DetailFlowError(
        f"--features {name} needs its network's weights, which {what} {source}: "
        f"get that file and give its path as --weights FILE, take --features {EFFICIENTNET}, which needs no download, "
        f"{_INSTEAD}"
    )


# Each loads a network on a device, from a local file of weights or, for `None`, by a download.
NETWORKS: dict[str, Callable[[torch.device, str | None], Extractor]] = {
    INCEPTION: Inception,
    "dinov2": _dinov2,
    EFFICIENTNET: _efficientnet,
}
