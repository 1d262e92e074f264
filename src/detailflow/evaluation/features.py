"""The networks whose features images are compared by: Inception, DINOv2, or any other as an exported program."""

import io
import os
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from detailflow import hub
from detailflow.data.transforms import to_tensor
from detailflow.errors import DetailFlowError
from detailflow.models.loading import load_weights
from detailflow.storage import WEIGHTS_FILE, read_tensors

DINOV2 = "vit_large_patch14_dinov2.lvd142m"  # timm's name, and on the hub timm/…
SPATIAL_CHANNELS = 7  # of Inception's 17×17 map, as sFID takes them (Nash et al. 2021)
CPU_PIXELS = 64 * 32 * 32  # of as many images at once on a CPU: more would not stay in its caches, and take twice as long
CPU_IMAGES = 8  # but no fewer
_INSTEAD = "or another network as --features FILE.pt2"


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


def _in_parts(network: Callable[[Tensor], Features], images: Tensor, device: torch.device) -> Features:
    """The features of bytes (B, H, W, 3): on a CPU of some images after others, on a GPU without rounding to 10 bits (TF32)."""
    if device.type != "cpu":
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            return network(images)
    count = max(CPU_IMAGES, CPU_PIXELS // (images.shape[1] * images.shape[2]))
    parts = [network(part) for part in images.split(count)]
    pool, *others = (None if part[0] is None else torch.cat(part) for part in zip(*parts, strict=True))
    assert pool is not None
    return Features(pool, *others)


def load_extractor(features: str, device: torch.device | str = "cpu", weights: str | None = None) -> Extractor:
    """A network by name or file.

    Args:
        features: "inception" (the TensorFlow-compatible Inception-v3 of FID and of ADM's evaluation), "dinov2" (ViT-L/14) or
            FILE.pt2, see `Exported`.
        device: where it computes.
        weights: a local file of Inception's or DINOv2's weights; `None` downloads them, once.

    Raises:
        DetailFlowError: for another name, a package that is missing, or weights that can't be had or read.
    """
    if features == "inception":
        return Inception(device, weights)
    if features == "dinov2":
        return DINOv2(device, weights)
    if not features.endswith(".pt2"):
        raise DetailFlowError(f"features must be inception, dinov2 or the path of an exported program FILE.pt2, not {features!r}")
    if weights is not None:
        raise DetailFlowError(f"{features} holds its own weights: leave out --weights {weights}")
    return Exported(features, device)


class Inception:
    """Inception-v3 as of 2015-12-05, which FID is defined by, in torch-fidelity's equivalent of the TensorFlow graph.

    As in ADM's evaluation: pool (B, 2048) is `pool_3`; spatial (B, 2023) is the first 7 channels of `mixed_6/conv`, the 1×1
    branch of the 17×17 block Mixed_6d, position by position; logits (B, 1008) are without their bias.
    """

    name = "inception"
    preprocessing = "bytes at their own size, resized to 299×299 by TensorFlow 1's bilinear interpolation inside the network"

    def __init__(self, device: torch.device | str = "cpu", weights: str | None = None) -> None:
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
        except ImportError as error:
            raise _missing("torch-fidelity") from error
        # torch-fidelity unpickles its file without a check: it gets to see what was read as plain tensors, written anew.
        plain = io.BytesIO()
        torch.save(_inception_weights(URL_INCEPTION_V3, weights), plain)
        plain.seek(0)
        try:
            network = FeatureExtractorInceptionV3(self.name, ["2048", "logits_unbiased"], feature_extractor_weights_path=plain)
        except (RuntimeError, TypeError, AttributeError) as error:  # torch's errors for tensors that don't fit
            raise _no_weights(self.name, f"{weights} does not hold", URL_INCEPTION_V3) from error
        self._network: Any = network.to(device)
        self._device = torch.device(device)
        self._spatial: list[Tensor] = []
        self._network.Mixed_6d.branch1x1.register_forward_hook(lambda module, inputs, output: self._spatial.append(output))
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
        raise DetailFlowError(f"{path} does not exist: give a file of the network's weights, or no --weights to download them")
    return file


def _inception_weights(url: str, path: str | None) -> dict[str, Tensor]:
    file = None if path is None else _existing(path)
    try:
        if file is None:
            return torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True, weights_only=True)
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # downloads and damaged files have many kinds
        raise _no_weights("inception", f"{path} can't be read as" if path else "can't be downloaded:", url) from error


class DINOv2:
    """DINOv2 ViT-L/14's class token (B, 1024), as Stein et al. (2023, arXiv 2306.04675) compare generative models by."""

    name = "dinov2"
    preprocessing = "resized to 224×224, bicubic with antialiasing; ImageNet's mean and standard deviation"

    def __init__(self, device: torch.device | str = "cpu", weights: str | None = None) -> None:
        try:
            import timm
            from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
        except ImportError as error:
            raise _missing("timm") from error
        try:
            tensors = _dinov2_weights(weights)
            network: Any = timm.create_model(DINOV2, num_classes=0, img_size=224)
            tensors["pos_embed"] = _positions_at(tensors["pos_embed"], network.patch_embed.grid_size[0])
            load_weights(network, tensors, weights or DINOV2)
        except (DetailFlowError, KeyError, RuntimeError) as error:
            what = f"{weights} does not hold" if weights else "can't be downloaded:"
            raise _no_weights(self.name, what, f"model.safetensors of timm/{DINOV2} on the Hugging Face hub") from error
        self._network = network.requires_grad_(False).eval().to(device)
        self._device = torch.device(device)
        self._mean, self._deviation = (
            torch.tensor(values, device=device)[:, None, None] for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
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
    file = _existing(path)
    if file.is_dir() or file.suffix == ".safetensors":
        return read_tensors(file)
    try:
        tensors = dict(torch.load(file, map_location="cpu", weights_only=True))
    except Exception as error:  # torch raises many kinds for a damaged file
        raise DetailFlowError(f"{path} can't be read") from error
    tensors.pop("mask_token", None)  # in DINOv2's own files, for training
    return tensors


def _positions_at(positions: Tensor, side: int) -> Tensor:
    """Position embeddings (1, 1 + s², D) of a class token and of s×s patches, resized to side×side patches as DINOv2's own code
    does, which timm's differs from: without antialiasing, with an offset of 0.1."""
    grid = round((positions.shape[1] - 1) ** 0.5)
    if grid == side:
        return positions
    patches = positions[:, 1:].unflatten(1, (grid, grid)).movedim(-1, 1)
    patches = F.interpolate(patches, scale_factor=(side + 0.1) / grid, mode="bicubic", align_corners=False)
    return torch.cat((positions[:, :1], patches.flatten(2).transpose(1, 2)), 1)


class Exported:
    """A network in a file that `torch.export.save` wrote.

    The program maps images, float32 (B, 3, H, W) in [-1, 1] for any B, to their features (B, D), or to a tuple of these and of
    class logits (B, C); export it with a dynamic first dimension and as it computes in evaluation, after `.eval()`.
    `benchmarks/export_cifar10_features.py` is an example.

    Give only files that you trust: a program is run, and PyTorch evaluates expressions that it finds in it. Pickled objects,
    which such a file may hold as well, are refused.
    """

    preprocessing = "bytes at their own size, scaled to [-1, 1]"

    def __init__(self, file: str, device: torch.device | str = "cpu") -> None:
        from torch.export.passes import move_to_device_pass

        self.name = Path(file).name
        path = Path(file).expanduser()
        _refuse_objects(path)
        try:
            with _no_pickles(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of torch's own inner workings
                program = torch.export.load(path)
                self.fingerprint = hub.fingerprint({}, _tensors(program))
                self._network = move_to_device_pass(program, torch.device(device)).module()
        except Exception as error:  # torch has many kinds
            raise DetailFlowError(
                f"{file} can't be read as an exported program of this PyTorch: write it anew with torch.export.save "
                f"({type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no reason given'})"
            ) from error
        self._device = torch.device(device)

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Features:
        """Bytes (B, H, W, 3) → features.

        Raises:
            DetailFlowError: if the program doesn't take images of this size, or returns anything but features and logits.
        """
        return _in_parts(self._features, images, self._device)

    def _features(self, images: Tensor) -> Features:
        try:
            found = self._network(to_tensor(images.to(self._device)))
        except (RuntimeError, AssertionError, ValueError, TypeError) as error:  # a guard's, or an operation's
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise DetailFlowError(
                f"{self.name} does not take {len(images)} images of {images.shape[2]}×{images.shape[1]} pixels: give images of "
                f"the size that it was exported for, with a dynamic first dimension ({str(error).strip().splitlines()[0]})"
            ) from error
        outputs = (found,) if isinstance(found, Tensor) else found
        if (
            not isinstance(outputs, tuple | list)
            or len(outputs) not in (1, 2)
            or not all(isinstance(x, Tensor) and x.ndim == 2 and len(x) == len(images) for x in outputs)
        ):
            raise DetailFlowError(
                f"{self.name} must map a batch of B images to features (B, D), or to a tuple of these and logits (B, C), "
                f"but gives {_shapes(found)} for {len(images)} images"
            )
        return Features(outputs[0].float(), logits=outputs[1].float() if len(outputs) == 2 else None)


def _shapes(found: Any) -> str:
    if isinstance(found, Tensor):
        return str(tuple(found.shape))
    if isinstance(found, tuple | list):
        return "a tuple of " + ", ".join(map(_shapes, found))
    return f"a {type(found).__name__}"


def _tensors(program: torch.export.ExportedProgram) -> Mapping[str, Tensor]:
    """The weights, whether they were lifted as parameters and buffers or as constants."""
    constants = {name: value for name, value in program.constants.items() if isinstance(value, Tensor)}
    return {**constants, **program.state_dict}


def _refuse_objects(path: Path) -> None:
    """Check that a program is there and has no constants but tensors, as PyTorch would unpickle any others."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name.partition("data/constants/")[2] for name in archive.namelist()]
    except FileNotFoundError:
        raise DetailFlowError(f"{path} does not exist: give the path of a program that torch.export.save wrote") from None
    except (OSError, zipfile.BadZipFile) as error:
        raise DetailFlowError(f"{path} is no exported program: give a file that torch.export.save wrote") from error
    for name in names:
        if name and not name.startswith("tensor_") and not name.endswith(("_config.json", ".pt")):
            raise DetailFlowError(f"{path} holds pickled objects ({name}), which are not read: export a program of tensors alone")


@contextmanager
def _no_pickles() -> Iterator[None]:
    """Has every `torch.load` in the context read plain tensors only, whatever it is told."""
    key = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(key)
    os.environ[key] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[key]
        else:
            os.environ[key] = before


def _no_weights(name: str, what: str, source: str) -> DetailFlowError:
    return DetailFlowError(
        f"--features {name} needs its network's weights, which {what} {source}: "
        f"get that file and give its path as --weights FILE, {_INSTEAD}"
    )


def _missing(package: str) -> DetailFlowError:
    return DetailFlowError(
        f"these features need the package {package}: install it with pip install 'detailflow[train]', {_INSTEAD}"
    )
