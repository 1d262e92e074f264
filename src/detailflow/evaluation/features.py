"""The networks whose features images are compared by: Inception, DINOv2, or any other in a safetensors file."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from detailflow import hub
from detailflow.data.transforms import to_tensor
from detailflow.errors import DetailFlowError, missing_package
from detailflow.evaluation.architectures import load_network
from detailflow.files import WEIGHTS_FILE, read_state_dict, read_tensors
from detailflow.models.loading import load_weights
from detailflow.torch_zip import check_torch_zip

DINOV2 = "vit_large_patch14_dinov2.lvd142m"  # timm's name, and on the hub timm/…
SPATIAL_CHANNELS = 7  # of Inception's 17×17 map, as sFID takes them (Nash et al. 2021)
CPU_PIXELS = (
    64 * 32 * 32
)  # of as many images at once on a CPU: more would not stay in its caches, and take twice as long
MAX_GRID = 64  # patches a side of position embeddings that are resized
CPU_IMAGES = 8  # but no fewer
_INSTEAD = "or another network as --features FILE.safetensors"


class Features(NamedTuple):
    """What a network says of B images, float32."""

    pool: Tensor  # (B, D), for Fréchet distances, precision and recall
    spatial: Tensor | None = None  # (B, S), for sFID
    logits: Tensor | None = None  # (B, C) of classes, for the inception score


class Extractor(Protocol):
    """A network of features."""

    name: str  # as it was asked for
    fingerprint: str  # SHA-256 in hex of its weights
    preprocessing: str  # what becomes of images before the network sees them, for reports

    def __call__(self, images: Tensor) -> Features:
        """Bytes (B, H, W, 3) on any device → their features on the network's."""


def _in_parts(
    network: Callable[[Tensor], Features], images: Tensor, device: torch.device, side: int | None = None
) -> Features:
    """The features of bytes (B, H, W, 3): on a CPU of some images after others, on a GPU without rounding to 10 bits (TF32).

    `side`: that the network resizes them to.
    """
    if device.type != "cpu":
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            return network(images)
    count = max(CPU_IMAGES, CPU_PIXELS // (side**2 if side else images.shape[1] * images.shape[2]))
    parts = [network(part) for part in images.split(count)]
    pool, *others = (None if part[0] is None else torch.cat(part) for part in zip(*parts, strict=True))
    assert pool is not None
    return Features(pool, *others)


def load_extractor(features: str, device: torch.device | str = "cpu", weights: str | None = None) -> Extractor:
    """A network by name or file.

    Args:
        features: "inception" (the TensorFlow-compatible Inception-v3 of FID and of ADM's evaluation), "dinov2" (ViT-L/14) or
            FILE.safetensors, see `Stored`.
        device: where it computes.
        weights: a local file of Inception's or DINOv2's weights; `None` downloads them, once.

    Raises:
        DetailFlowError: for another name, a package that is missing, or weights that cannot be had or read.
    """
    if features == "inception":
        return Inception(device, weights)
    if features == "dinov2":
        return DINOv2(device, weights)
    if features.endswith(".pt2"):
        raise DetailFlowError(
            f"{features} is an exported program, which could run any code and is not read: save the network's weights as "
            "FILE.safetensors with its architecture's name, as docs/evaluate.md shows"
        )
    if not features.endswith(".safetensors"):
        raise DetailFlowError(f"features must be inception, dinov2 or the path of a FILE.safetensors, not {features!r}")
    if weights is not None:
        raise DetailFlowError(f"{features} holds its own weights: leave out --weights {weights}")
    return Stored(features, device)


class Inception:
    """Inception-v3 as of 2015-12-05, which FID is defined by, in torch-fidelity's equivalent of the TensorFlow graph.

    As in ADM's evaluation: pool (B, 2048) is `pool_3`; spatial (B, 2023) is the first 7 channels of `mixed_6/conv`, the 1×1
    branch of the 17×17 block Mixed_6d, position by position; logits (B, 1008) are without their bias.
    """

    name = "inception"
    preprocessing = (
        "bytes at their own size, resized to 299×299 by TensorFlow 1's bilinear interpolation inside the network"
    )

    def __init__(self, device: torch.device | str = "cpu", weights: str | None = None) -> None:
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
        except ImportError as error:
            raise missing_package("--features inception", "torch-fidelity", _INSTEAD) from error
        # torch-fidelity unpickles its file without a check: it gets to see what was read as plain tensors, written anew.
        plain = io.BytesIO()
        torch.save(_inception_weights(URL_INCEPTION_V3, weights), plain)
        plain.seek(0)
        try:
            network = FeatureExtractorInceptionV3(
                self.name, ["2048", "logits_unbiased"], feature_extractor_weights_path=plain
            )
        except (RuntimeError, TypeError, AttributeError) as error:  # torch's errors for tensors that don't fit
            raise _no_weights(self.name, f"{weights} does not hold", URL_INCEPTION_V3) from error
        self._network: Any = network.to(device)
        self._device = torch.device(device)
        self._spatial: list[Tensor] = []
        self._network.Mixed_6d.branch1x1.register_forward_hook(
            lambda module, inputs, output: self._spatial.append(output)
        )
        self.fingerprint = hub.fingerprint({}, network.state_dict())

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Features:
        """Bytes (B, H, W, 3) → features."""
        return _in_parts(self._features, images, self._device)

    def _features(self, images: Tensor) -> Features:
        self._spatial.clear()
        pool, logits = self._network(images.to(self._device).movedim(-1, 1).contiguous())
        spatial = self._spatial.pop()[:, :SPATIAL_CHANNELS].movedim(1, -1)  # channels last, as TensorFlow flattens them
        return Features(pool, spatial.flatten(1).float(), logits)


def _existing(path: str) -> Path:
    file = Path(path).expanduser()
    if not file.exists():
        raise DetailFlowError(
            f"{path} does not exist: give a file of the network's weights, or no --weights to download them"
        )
    return file


def _inception_weights(url: str, path: str | None) -> dict[str, Tensor]:
    file = None if path is None else _existing(path)
    try:
        if file is None:
            return torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True, weights_only=True)
        check_torch_zip(file)
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # downloads and damaged files have many kinds
        raise _no_weights("inception", f"{path} cannot be read as" if path else "cannot be downloaded:", url) from error


class DINOv2:
    """DINOv2 ViT-L/14's class token (B, 1024), as Stein et al. (2023, arXiv 2306.04675) compare generative models by."""

    name = "dinov2"
    preprocessing = "resized to 224×224, bicubic with antialiasing; ImageNet's mean and standard deviation"

    def __init__(self, device: torch.device | str = "cpu", weights: str | None = None) -> None:
        try:
            import timm
            from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
        except ImportError as error:
            raise missing_package("--features dinov2", "timm", _INSTEAD) from error
        try:
            tensors = _dinov2_weights(weights)
            network: Any = timm.create_model(DINOV2, num_classes=0, img_size=224)
            tensors["pos_embed"] = _positions_at(tensors["pos_embed"], network.patch_embed.grid_size[0])
            load_weights(network, tensors, weights or DINOV2)
        except (DetailFlowError, KeyError, RuntimeError) as error:
            what = f"{weights} does not hold" if weights else "cannot be downloaded:"
            raise _no_weights(self.name, what, f"model.safetensors of timm/{DINOV2} on the Hugging Face hub") from error
        self._network = network.requires_grad_(False).eval().to(device)
        self._device = torch.device(device)
        self._mean, self._deviation = (
            torch.tensor(values, device=device)[:, None, None]
            for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
        )
        self.fingerprint = hub.fingerprint({}, network.state_dict())

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Features:
        """Bytes (B, H, W, 3) → features."""
        return _in_parts(self._features, images, self._device)

    def _features(self, images: Tensor) -> Features:
        x = images.to(self._device).movedim(-1, 1).float() / 255
        side = self._network.patch_embed.img_size
        x = F.interpolate(x, side, mode="bicubic", align_corners=False, antialias=True)
        return Features(self._network((x - self._mean) / self._deviation).float())


def _dinov2_weights(path: str | None) -> dict[str, Tensor]:
    if path is None:
        return read_tensors(hub.fetch(f"timm/{DINOV2}", [WEIGHTS_FILE]))
    tensors = read_state_dict(_existing(path))
    tensors.pop("mask_token", None)  # in DINOv2's own files, for training
    return tensors


def _positions_at(positions: Tensor, side: int) -> Tensor:
    """Position embeddings (1, 1 + s², D) of a class token and of s×s patches, resized to side×side patches as DINOv2's own code
    does, which timm's differs from: without antialiasing, with an offset of 0.1."""
    if positions.ndim != 3 or not 1 < positions.shape[1] <= 1 + MAX_GRID**2:
        return positions  # which do not fit
    grid = round((positions.shape[1] - 1) ** 0.5)
    if grid == side or 1 + grid**2 != positions.shape[1]:
        return positions
    patches = positions[:, 1:].unflatten(1, (grid, grid)).movedim(-1, 1)
    patches = F.interpolate(patches, scale_factor=(side + 0.1) / grid, mode="bicubic", align_corners=False)
    return torch.cat((positions[:, :1], patches.flatten(2).transpose(1, 2)), 1)


class Stored:
    """A network in a safetensors file that names its architecture; `detailflow.evaluation.architectures` says how."""

    def __init__(self, file: str, device: torch.device | str = "cpu") -> None:
        self.name = Path(file).name
        network = load_network(Path(file).expanduser())
        network.module.to(device)
        self.fingerprint, self._run, self._side = network.fingerprint, network.run, network.settings.size
        self.preprocessing = network.settings.preprocessing
        self._device = torch.device(device)
        mean, std = (
            network.settings.mean,
            network.settings.std,
        )  # of pixels in [0, 1], where `to_tensor` has them in [-1, 1]
        moments = ([2 * x - 1 for x in mean], [2 * x for x in std])
        self._mean, self._deviation = (torch.tensor(x, device=device)[:, None, None] for x in moments)

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Features:
        """Bytes (B, H, W, 3) → features.

        Raises:
            DetailFlowError: if the network does not take images of this size, or does not return features and logits.
        """
        return _in_parts(self._features, images, self._device, self._side)

    def _features(self, images: Tensor) -> Features:
        x = to_tensor(images.to(self._device))
        if self._side:
            x = F.interpolate(x, (self._side, self._side), mode="bicubic", align_corners=False, antialias=True)
        try:
            pool, logits = self._run((x - self._mean) / self._deviation)
        except (RuntimeError, AssertionError, ValueError, TypeError, IndexError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            reason = "".join(str(error).strip().splitlines()[:1])
            raise DetailFlowError(
                f"{self.name} does not take images of {x.shape[3]}×{x.shape[2]} pixels: give size in its metadata, the side that "
                f"the network was trained with ({reason})"
            ) from error
        if any(
            y is not None and (not isinstance(y, Tensor) or y.ndim != 2 or len(y) != len(images))
            for y in (pool, logits)
        ):
            raise DetailFlowError(
                f"{self.name} gives no features (B, D) for a batch of B images: choose another architecture"
            )
        return Features(pool.float(), logits=None if logits is None else logits.float())


def _no_weights(name: str, what: str, source: str) -> DetailFlowError:
    return DetailFlowError(
        f"--features {name} needs its network's weights, which {what} {source}: "
        f"get that file and give its path as --weights FILE, {_INSTEAD}"
    )
