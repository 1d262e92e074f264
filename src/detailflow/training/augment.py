"""DiffAugment: what the discriminator sees images through (Zhao et al. 2020, arXiv 2006.10738; docs/method.md#losses)."""

import torch
from torch import Tensor

DRAWS = 10  # for an image: which of the three policies it gets; brightness, saturation, contrast; translation; cutout
_TRANSLATION = 1 / 8  # of the side, at most


def diff_augment(images: Tensor, draws: Tensor, cutout: float = 0.2, probability: float = 0.5) -> Tensor:
    """Images with changed colours, moved, and with a square of zeros, each image in its own way.

    Args:
        images: (B, 3, H, W) in [-1, 1], where 0 is grey.
        draws: (B, DRAWS) uniform in [0, 1), on any device; an image's result depends on its own row alone.
        cutout: side of the square, as a share of the image's. Its centre lies anywhere, so part of it may lie outside.
        probability: with which an image gets each of colour, translation and cutout.

    Returns:
        Images of the same shape, on which gradients flow back to `images`.
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
    images = images + (images - grey) * (2 * saturation)  # written so that no change is none to the bit
    level = images.mean((1, 2, 3), keepdim=True)
    return images + (images - level) * contrast


def _translate(images: Tensor, chosen: Tensor, u: Tensor) -> Tensor:
    """Moved by up to 1/8 of each side, with zeros where nothing was."""
    for dim in (2, 3):
        size = images.shape[dim]
        most = int(size * _TRANSLATION + 0.5)
        shift = torch.where(chosen, _integers(u[:, dim - 2], 2 * most + 1) - most, 0)
        source = torch.arange(size, device=images.device) + shift[:, None]  # (B, size)
        shape = (-1, 1, size, 1) if dim == 2 else (-1, 1, 1, size)
        inside = ((source >= 0) & (source < size)).view(shape)
        index = source.clamp(0, size - 1).view(shape).expand_as(images)
        images = images.gather(dim, index) * inside
    return images


def _cut(images: Tensor, chosen: Tensor, u: Tensor, share: float) -> Tensor:
    """Zeros in a square, or as much of it as lies inside."""
    hidden = chosen[:, None, None, None]
    for dim in (2, 3):
        size = images.shape[dim]
        length = int(size * share + 0.5)
        start = _integers(u[:, dim - 2], size + 1 - length % 2) - length // 2
        place = torch.arange(size, device=images.device) - start[:, None]
        shape = (-1, 1, size, 1) if dim == 2 else (-1, 1, 1, size)
        hidden = hidden & ((place >= 0) & (place < length)).view(shape)
    return images * ~hidden


def _integers(u: Tensor, count: int) -> Tensor:
    """Uniform draws in [0, 1) → 0 to count − 1; a float below 1 times a small integer never rounds up to that integer."""
    return (u * count).long()
