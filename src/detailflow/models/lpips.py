"""LPIPS, the perceptual loss and the measure: distances of images to targets by VGG-16 (docs/method.md#losses)."""

from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from detailflow.errors import DetailFlowError, missing_package
from detailflow.models.loading import torch_weights
from detailflow.torch_files import load_torch
from detailflow.words import also

SMALLEST_SIDE = 16  # whose last VGG map is one pixel
VGG16_FILE = "https://download.pytorch.org/models/vgg16-397923af.pth"
MAPS = (3, 8, 15, 22, 29)  # VGG-16's layers, the last ReLU before each pooling
MEAN, DEVIATION = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # ImageNet's, for pixels in [-1, 1]
_NEEDS = "LPIPS needs"


class LPIPS(nn.Module):
    """The mean distance of images to their targets (Zhang et al. 2018, arXiv 1801.03924); frozen.

    Args:
        weights: a local file with torchvision's weights of VGG-16; `None` downloads it, once, to torch.hub's cache.
        load: whether to read weights at all; the network of a plan has random ones.
        named: what `weights` is called in messages.
        instead: what somebody without them may do, in messages.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(
        self, weights: str | None = None, load: bool = True, named: str = "weights", instead: str = ""
    ) -> None:
        super().__init__()
        try:
            from torchvision.models import vgg16
        except ImportError as error:
            raise missing_package("LPIPS", "torchvision", instead) from error
        with torch.device("meta"):  # VGG-16's classifier, most of its 138M weights, takes no memory there
            self.layers = vgg16(weights=None, init_weights=False).features[: MAPS[-1] + 1]
        wanted = self.layers.state_dict()
        if load:
            stored = _vgg16_weights(weights, named, instead)
        else:
            stored = {f"features.{name}": torch.randn(tensor.shape) for name, tensor in wanted.items()}
        try:
            self.layers.load_state_dict({name: stored[f"features.{name}"] for name in wanted}, assign=True)
        except (KeyError, TypeError, RuntimeError):  # torch's error for another shape is the last
            raise DetailFlowError(
                f"{_NEEDS} VGG-16's weights, which {weights or VGG16_FILE} does not hold: "
                f"give torchvision's file, {VGG16_FILE}{also(instead)}"
            ) from None
        heads = _heads(instead) if load else [torch.ones(len(wanted[f"{i - 1}.bias"]), 1, 1) for i in MAPS]
        self.heads = nn.ParameterList(heads)
        for name, values in (("mean", MEAN), ("deviation", DEVIATION)):
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)
        self.float().eval().requires_grad_(False)

    def forward(self, pixels: Tensor, target: Tensor) -> Tensor:
        """Return the mean of `distances`."""
        return self.distances(pixels, target).mean()

    def distances(self, pixels: Tensor, target: Tensor) -> Tensor:
        """Return each image's distance (M,), in float32 of features of autocast's precision.

        Args:
            pixels: (M, 3, R, R) in [-1, 1] or a little beyond, R at least `SMALLEST_SIDE`.
            target: (B, 3, R, R), B ≤ M ≤ 2B: image B + i has the target of image i.
        """
        with torch.no_grad():
            wanted = self._features(target)
        twice = len(pixels) - len(target)
        total = torch.zeros(len(pixels), device=pixels.device)
        for a, b, head in zip(self._features(pixels), wanted, self.heads, strict=True):
            difference = _normalized(a) - _normalized(torch.cat((b, b[:twice])))
            total = total + (difference.square() * head).sum(1).mean((1, 2))
        return total

    def _features(self, images: Tensor) -> list[Tensor]:
        """(B, 3, R, R) → five maps (B, C, R/2ⁱ, R/2ⁱ)."""
        x = (images - self.mean) / self.deviation
        if x.is_cuda:  # where the kernels for convolutions want channels last
            x = x.contiguous(memory_format=torch.channels_last)
        maps = []
        for index, layer in enumerate(self.layers):
            x = layer(x)
            if index in MAPS:
                maps.append(x)
        return maps


def _normalized(features: Tensor) -> Tensor:
    """Scale to unit length over the channels, with a gradient if all are zero."""
    features = features.float()
    return features * torch.rsqrt(features.square().sum(1, keepdim=True) + 1e-8)


def _vgg16_weights(path: str | None, named: str, instead: str) -> dict[str, Tensor]:
    """Read a state dict, of a local file only what is used of it."""
    try:
        return torch_weights(VGG16_FILE, path)
    except Exception as error:  # downloads and damaged files have many kinds
        what = f"and {path} cannot be read" if path else "which cannot be downloaded"
        raise DetailFlowError(
            f"{_NEEDS} VGG-16's weights, {what}: get {VGG16_FILE} and give its path as {named}{also(instead)}"
        ) from error


def _heads(instead: str) -> list[Tensor]:
    """Read LPIPS's five linear heads (C, 1, 1), which torchmetrics ships."""
    package = find_spec("torchmetrics")
    if package is None or package.origin is None:
        raise missing_package("LPIPS", "torchmetrics", instead)
    path = Path(package.origin).parent / "functional" / "image" / "lpips_models" / "vgg.pth"
    try:
        stored = load_torch(path)
        return [stored[f"lin{i}.model.1.weight"][0] for i in range(len(MAPS))]
    except (DetailFlowError, KeyError) as error:
        raise DetailFlowError(
            f"{_NEEDS} {path}, which this torchmetrics lacks: install another{also(instead)}"
        ) from error
