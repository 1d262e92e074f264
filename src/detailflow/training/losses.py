"""The tokenizer's loss terms (docs/method.md#losses), each a plain function of tensors."""

from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detailflow.errors import DetailFlowError, missing_package
from detailflow.torch_files import load_torch


def quantization_loss(z: Tensor, quantized: Tensor, commitment: float) -> Tensor:
    """‖z_q − sg(z)‖² + β‖sg(z_q) − z‖², means over everything."""
    return F.mse_loss(quantized, z.detach()) + commitment * F.mse_loss(z, quantized.detach())


def straight_through(z: Tensor, quantized: Tensor) -> Tensor:
    """The value of `quantized` with the gradient of `z`."""
    return z + (quantized - z).detach()


def perceptual_loss(features: list[Tensor], targets: list[Tensor]) -> Tensor:
    """Sum over maps (B, C, h, w) of the mean squared distance of channel-normalised features: LPIPS without its weights."""
    total = features[0].new_zeros(())
    for a, b in zip(features, targets, strict=True):
        total = total + (F.normalize(a.float(), dim=1) - F.normalize(b.float(), dim=1)).square().sum(1).mean()
    return total


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Hinge loss of the discriminator's logits; the caller detaches the fake images, not their logits."""
    return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2


def generator_loss(fake: Tensor) -> Tensor:
    """The generator's side of the hinge loss."""
    return -fake.mean()


def lecam_loss(real: Tensor, fake: Tensor, ema_real: Tensor, ema_fake: Tensor) -> Tensor:
    """LeCAM's regulariser of the discriminator's logits (Tseng et al. 2021, arXiv 2104.03310, equation 3).

    Args:
        real, fake: logits, with gradients.
        ema_real, ema_fake: moving averages of their means: scalars without gradients, which the caller keeps.
    """
    return (real - ema_fake).square().mean() + (fake - ema_real).square().mean()


def consistency_loss(logits: Tensor, other: Tensor) -> Tensor:
    """Mean squared difference of the discriminator's logits on two views of the same images; both get gradients."""
    return F.mse_loss(logits, other)


def alignment_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """−cos of (B, width) predictions and a frozen teacher's features, which the caller gives without gradients; batch mean."""
    return -F.cosine_similarity(prediction.float(), target.float(), dim=-1).mean()


SMALLEST_SIDE = 16  # which the last map of features halves to one pixel
VGG16_FILE = "https://download.pytorch.org/models/vgg16-397923af.pth"
MAPS = (3, 8, 15, 22, 29)  # VGG-16's layers, the last ReLU before each pooling
MEAN, DEVIATION = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # ImageNet's, for pixels in [-1, 1]
_INSTEAD = "or train with perceptual_network: classifier, or perceptual: 0"


class LPIPS(nn.Module):
    """The mean distance of images to their targets; frozen, so that gradients reach only the images.

    Args:
        weights: a local file with torchvision's weights of VGG-16, of which only those of the features are read; `None`
            downloads it, once, to torch.hub's cache.
        load: whether to read weights at all; the network of a plan has random ones.

    Raises:
        DetailFlowError: if those weights cannot be had or read, or a package is missing.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, weights: str | None = None, load: bool = True) -> None:
        super().__init__()
        try:
            from torchvision.models import vgg16
        except ImportError as error:
            raise _missing("torchvision") from error
        with torch.device("meta"):  # VGG-16's classifier, most of its 138M weights, takes no memory there
            self.layers = vgg16(weights=None, init_weights=False).features[: MAPS[-1] + 1]
        wanted = self.layers.state_dict()
        if load:
            stored = _vgg16_weights(weights)
        else:
            stored = {f"features.{name}": torch.randn(tensor.shape) for name, tensor in wanted.items()}
        try:
            self.layers.load_state_dict({name: stored[f"features.{name}"] for name in wanted}, assign=True)
        except (KeyError, TypeError, RuntimeError):  # torch's error for another shape is the last
            raise DetailFlowError(
                f"the perceptual loss (LPIPS) needs VGG-16's weights, which {weights or VGG16_FILE} does not hold: "
                f"give torchvision's file, {VGG16_FILE}, {_INSTEAD}"
            ) from None
        self.heads = nn.ParameterList(
            _heads() if load else [torch.ones(wanted[f"{i - 1}.bias"].shape[0], 1, 1) for i in MAPS]
        )
        self.register_buffer("mean", torch.tensor(MEAN)[:, None, None], persistent=False)
        self.register_buffer("deviation", torch.tensor(DEVIATION)[:, None, None], persistent=False)
        self.float().eval().requires_grad_(False)

    def forward(self, pixels: Tensor, target: Tensor) -> Tensor:
        """→ the mean of `distances`, a scalar."""
        return self.distances(pixels, target).mean()

    def distances(self, pixels: Tensor, target: Tensor) -> Tensor:
        """→ (M,) each image's distance, computed in float32 from features of autocast's precision.

        Args:
            pixels: (M, 3, R, R) in [-1, 1] or a little beyond, R at least `SMALLEST_SIDE`.
            target: (B, 3, R, R), B ≤ M ≤ 2B: image B + i has the target of image i, as the corrected reconstructions of the
                first images follow the clean ones of all.
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
        maps = []
        for index, layer in enumerate(self.layers):
            x = layer(x)
            if index in MAPS:
                maps.append(x)
        return maps


def _normalized(features: Tensor) -> Tensor:
    """Unit length over the channels, with a gradient where all are zero."""
    features = features.float()
    return features * torch.rsqrt(features.square().sum(1, keepdim=True) + 1e-8)


def _vgg16_weights(path: str | None) -> dict[str, Tensor]:
    """A state dict; of a local file, only what is used of it is read from the disk."""
    try:
        if path is None:
            return torch.hub.load_state_dict_from_url(
                VGG16_FILE, map_location="cpu", check_hash=True, weights_only=True
            )
        return load_torch(Path(path).expanduser(), mmap=True)
    except Exception as error:  # downloads and damaged files have many kinds
        what = f"{path} cannot be read" if path else "cannot be downloaded"
        raise DetailFlowError(
            f"the perceptual loss (LPIPS) needs VGG-16's weights, {'and ' if path else 'which '}{what}: "
            f"get {VGG16_FILE} and give its path as perceptual_network, {_INSTEAD}"
        ) from error


def _heads() -> list[Tensor]:
    """LPIPS's five linear heads (C, 1, 1), as torchmetrics ships them."""
    package = find_spec("torchmetrics")
    if package is None or package.origin is None:
        raise _missing("torchmetrics")
    path = Path(package.origin).parent / "functional" / "image" / "lpips_models" / "vgg.pth"
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
        return [stored[f"lin{i}.model.1.weight"][0] for i in range(len(MAPS))]
    except (OSError, KeyError) as error:
        raise DetailFlowError(
            f"the perceptual loss (LPIPS) needs {path}, which this torchmetrics lacks: install another version, {_INSTEAD}"
        ) from error


def _missing(package: str) -> DetailFlowError:
    return missing_package("the perceptual loss (LPIPS)", package, _INSTEAD)
