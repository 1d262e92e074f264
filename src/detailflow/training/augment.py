"""DiffAugment (Zhao et al. 2020, arXiv 2006.10738): colour, translation and cutout that gradients flow through."""

import torch
from torch import Tensor

DRAWS = 10  # for an image: which of the three it gets; brightness, saturation, contrast; translation; cutout
_TRANSLATION = 1 / 8  # of the side, at most


def diff_augment(images: Tensor, draws: Tensor, cutout: float = 0.2, probability: float = 0.5) -> Tensor:
    """Change the colours of (B, 3, H, W) images in [-1, 1], move them and hide a square, each image in its own way.

    Args:
        draws: (B, DRAWS) uniform in [0, 1), on any device; an image's result depends on its own row alone.
        cutout: side of the square relative to the image's. Its centre may be anywhere, so part of it may be outside.
        probability: with which an image gets each of colour, translation and cutout.
    """
    draws = draws.to(images.device)
    chosen, u = draws[:, :3] < probability, draws[:, 3:]
    images = _colour(images, chosen[:, 0], u[:, :3])
    images = _translate(images, chosen[:, 1], u[:, 3:5])
    return _cut(images, chosen[:, 2], u[:, 5:7], cutout)


def _colour(images: Tensor, chosen: Tensor, u: Tensor) -> Tensor:
    """Brightness + [-0.5, 0.5), saturation × [0, 2), contrast × [0.5, 1.5)."""
    change = torch.where(chosen[:, None], u - 0.5, 0).to(images.dtype)
    brightness, saturation, contrast = change[..., None, None, None].unbind(1)
    images = images + brightness
    grey = images.mean(1, keepdim=True)
    images = images + (images - grey) * (2 * saturation)  # written so that no change is exactly none
    level = images.mean((1, 2, 3), keepdim=True)
    return images + (images - level) * contrast


def _translate(images: Tensor, chosen: Tensor, u: Tensor) -> Tensor:
    """Move by up to 1/8 of each side, with zeros at the edges."""
    for dim in (2, 3):
        size = images.shape[dim]
        most = int(size * _TRANSLATION + 0.5)
        shift = torch.where(chosen, _integers(u[:, dim - 2], 2 * most + 1) - most, 0)
        source = torch.arange(size, device=images.device) + shift[:, None]  # (B, size)
        inside = _along(dim, (source >= 0) & (source < size))
        images = images.gather(dim, _along(dim, source.clamp(0, size - 1)).expand_as(images)) * inside
    return images


def _cut(images: Tensor, chosen: Tensor, u: Tensor, side: float) -> Tensor:
    """Put zeros in a square, or the part of it that is inside."""
    hidden = chosen[:, None, None, None]
    for dim in (2, 3):
        size = images.shape[dim]
        length = int(size * side + 0.5)
        start = _integers(u[:, dim - 2], size + 1 - length % 2) - length // 2
        offset = torch.arange(size, device=images.device) - start[:, None]
        hidden = hidden & _along(dim, (offset >= 0) & (offset < length))
    return images * ~hidden


def _along(dim: int, values: Tensor) -> Tensor:
    """(B, size) → (B, 1, size, 1) or (B, 1, 1, size)."""
    return values[:, None, :, None] if dim == 2 else values[:, None, None, :]


def _integers(u: Tensor, count: int) -> Tensor:
    """Turn uniform draws in [0, 1) into 0 to count − 1 (rounding never reaches a small `count`)."""
    return (u * count).long()
