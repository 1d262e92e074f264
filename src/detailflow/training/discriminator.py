"""The paper's discriminator: trainable heads on the features of a frozen DINO (docs/method.md#losses; DINO: arXiv 2104.14294)."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from detailflow import hub
from detailflow.errors import DetailFlowError
from detailflow.models.loading import load_weights
from detailflow.storage import WEIGHTS_FILE, read_state_dict, read_tensors

BACKBONE = "vit_small_patch16_224.dino"  # timm's name, and on the hub timm/…
SIDE = 224  # of the images that DINO was trained on
BLOCKS = (2, 5, 8, 11)  # after which features are taken, besides those after the patch embedding
CROP_DRAWS = 3  # of one call: whether larger images are cropped, and where
_INSTEAD = "or train with adversarial_network: patch"


class DINODiscriminator(nn.Module):
    """Judges every patch of an image at five depths of DINO ViT-S/16.

    The backbone is no registered submodule: optimisers, checkpoints, DistributedDataParallel, `train` and `requires_grad_` know
    of the heads alone, and it follows the images to their device.

    Args:
        weights: a local file of the backbone's weights, as on the hub (.safetensors, or a folder with it) or DINO's own (.pth);
            `None` downloads them, once, to the hub's cache.
        load: whether to read weights at all; the network of a plan has random ones.

    Raises:
        DetailFlowError: if those weights can't be had or read, or a package is missing.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, weights: str | None = None, load: bool = True) -> None:
        super().__init__()
        try:
            import timm
            from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
        except ImportError as error:
            raise DetailFlowError(
                "the adversarial loss (DINO discriminator) needs the package timm: install it with "
                f"pip install 'detailflow[train]', {_INSTEAD}"
            ) from error
        backbone: Any = timm.create_model(BACKBONE, num_classes=0)
        try:
            if load:
                load_weights(backbone, _read(weights), weights or BACKBONE)
        except DetailFlowError as error:
            raise DetailFlowError(
                "the adversarial loss (DINO discriminator) needs DINO ViT-S/16's weights: get model.safetensors of "
                f"timm/{BACKBONE} on the Hugging Face hub and give its path as adversarial_network, {_INSTEAD} ({error})"
            ) from error
        self._unregistered = (backbone.requires_grad_(False).eval(),)
        self.heads = nn.ModuleList(_head(backbone.embed_dim) for _ in range(1 + len(BLOCKS)))
        for name, values in (("mean", IMAGENET_DEFAULT_MEAN), ("deviation", IMAGENET_DEFAULT_STD)):
            self.register_buffer(name, 2 * torch.tensor(values)[:, None, None], persistent=False)
        self.mean -= 1  # as the pixels lie in [-1, 1]

    @property
    def backbone(self) -> Any:
        """The frozen vision transformer."""
        return self._unregistered[0]

    def forward(self, images: Tensor, draws: Tensor | None = None) -> Tensor:
        """(B, 3, H, W) pixels in [-1, 1] → (B, 5·196) logits, high for real, head by head.

        Args:
            images: of any side; gradients flow back to them.
            draws: (CROP_DRAWS,) uniform in [0, 1), on the CPU, which decide for the whole call whether larger images are cropped
                instead of resized, and where; `None` never crops. Processes that share a batch pass the same.
        """
        features = self._features((_to_side(images, draws) - self.mean) / self.deviation)
        return torch.cat([head(x).flatten(1) for head, x in zip(self.heads, features, strict=True)], 1)

    def _features(self, images: Tensor) -> list[Tensor]:
        """Normalised (B, 3, 224, 224) → (B, width, 196) at each depth, patch tokens plus class token."""
        vit = self.backbone.to(images.device)
        x = vit.patch_embed(images)
        x = torch.cat((vit.cls_token.expand(len(x), -1, -1), x), 1) + vit.pos_embed
        depths = [x]
        for index, block in enumerate(vit.blocks):
            x = block(x)
            if index in BLOCKS:
                depths.append(x)
        return [(x[:, 1:] + x[:, :1]).transpose(1, 2) for x in depths]


def _read(weights: str | None) -> dict[str, Tensor]:
    if weights is None:
        return read_tensors(hub.fetch(f"timm/{BACKBONE}", [WEIGHTS_FILE]))
    return read_state_dict(Path(weights).expanduser())


def _to_side(images: Tensor, draws: Tensor | None) -> Tensor:
    """(B, 3, H, W) → (B, 3, 224, 224): half of the larger images are cropped, where there are draws, all others resized."""
    height, width = images.shape[-2:]
    if min(height, width) > SIDE and draws is not None and float(draws[0]) < 0.5:
        top, left = (int(u * (size - SIDE + 1)) for u, size in zip(draws[1:].tolist(), (height, width), strict=True))
        return images[..., top : top + SIDE, left : left + SIDE]
    if height == width == SIDE:
        return images
    return F.interpolate(images, (SIDE, SIDE), mode="bicubic", align_corners=False, antialias=True)


def _convolution(inputs: int, outputs: int, kernel: int = 1) -> nn.Module:
    return spectral_norm(nn.Conv1d(inputs, outputs, kernel, padding=kernel // 2, padding_mode="circular"))


def _activated(width: int, kernel: int) -> nn.Sequential:
    return nn.Sequential(_convolution(width, width, kernel), BatchNorm(width), nn.LeakyReLU(0.2))


def _head(width: int) -> nn.Sequential:
    """(B, width, L) → (B, 1, L) logits."""
    return nn.Sequential(_activated(width, 1), _Residual(_activated(width, 9)), _convolution(width, 1))


class _Residual(nn.Module):
    """(x + f(x)) / √2, which keeps the variance."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.inner(x)) * 0.5**0.5


class BatchNorm(nn.BatchNorm1d):
    """Batch norm of (B, C, L) with the statistics of all processes' batches, which must be of one size.

    Each process's gradient is that of the sum of all losses, as in `nn.SyncBatchNorm`, which works on GPUs alone.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, L) → the same."""
        processes = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        if processes == 1 or not self.training:
            return super().forward(x)
        assert isinstance(self.momentum, float) and self.running_mean is not None and self.running_var is not None
        values = x.float()
        mean = _Sum.apply(values.mean((0, 2))) / processes
        centred = values - mean[:, None]
        variance = _Sum.apply(centred.square().mean((0, 2))) / processes
        count = processes * values.numel() // values.shape[1]
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return (centred * scale[:, None] + self.bias[:, None]).to(x.dtype)


class _Sum(torch.autograd.Function):
    """The sum over all processes; the gradient is that of all processes' uses of it."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        total = value.contiguous().clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.contiguous().clone()
        dist.all_reduce(total)
        return total
