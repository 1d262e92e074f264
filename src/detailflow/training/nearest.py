"""Is a model memorising? How near its samples are to the training images, beside images that it has never seen."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from itertools import chain, islice
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from detailflow.data.source import ImageSource
from detailflow.data.transforms import center_crop, to_tensor
from detailflow.errors import DetailFlowError
from detailflow.models.efficientnet import EFFICIENTNET, EfficientNetLite0
from detailflow.words import several

BATCH = 64  # images at once
LARGEST_SIDE = 128  # pixels of the images that are compared; larger ones tell no more and take longer
PIXELS_SIDE = 16  # of those whose pixels are compared: small, so that a shift by a pixel hardly counts
FEW = 20  # images that are too few to compare with
NEARER, FARTHER = 0.75, 0.25  # shares of pairs from which on samples are nearer or farther than unseen images

Embed = Callable[[Tensor], Tensor]


class Neighbours(NamedTuple):
    """The nearest training images of Q images: distances in [0, 1] and indices, both (Q, k), the nearest first."""

    distances: Tensor
    indices: Tensor


def load_embedding(device: torch.device) -> tuple[str, Embed]:
    """Return what images are compared by, in words, and the function from (B, 3, S, S) in [-1, 1] to (B, D).

    Distances of what it returns are 0 for equal images and 1 at most.
    """
    try:
        network = EfficientNetLite0.from_package("the report").to(device)
    except DetailFlowError:  # a package of the extra `train`
        return f"pixels, at {PIXELS_SIDE}×{PIXELS_SIDE}", _pixels

    def embed(images: Tensor) -> Tensor:  # on a sphere; the features are not negative
        return F.normalize(network.pool(images.to(device)), dim=1).cpu() / 2**0.5

    return f"features of {EFFICIENTNET}", embed


def _pixels(images: Tensor) -> Tensor:
    small = F.interpolate(images, (PIXELS_SIDE, PIXELS_SIDE), mode="area").flatten(1)
    return small / (2 * small.shape[1] ** 0.5)  # so that distances are root mean squares, as shares of the range


@torch.inference_mode()
def embed_images(images: Iterable[Image.Image], size: int, embed: Embed) -> Tensor:
    """Return (n, D) of the centres of images, at side `size` or less."""
    side, parts = min(size, LARGEST_SIDE), []
    crops = (center_crop(image, side) for image in images)
    while batch := list(islice(crops, BATCH)):
        parts.append(embed(to_tensor(np.stack(batch))))
    return torch.cat(parts)


def readable(source: ImageSource, indices: Iterable[int]) -> Iterator[tuple[int, Image.Image]]:
    """Yield those of the images that can be read, with their indices."""
    for index in indices:
        with suppress(DetailFlowError):
            yield index, source.image(index)


def find_nearest(images: list[Image.Image], among: Tensor, count: int, size: int, embed: Embed) -> Neighbours:
    """Return the nearest of the embeddings `among` (n, D) to images or their mirror images, as training mirrors its."""
    mirrored = (image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for image in images)
    both = embed_images(chain(images, mirrored), size, embed)
    exact = "donot_use_mm_for_euclid_dist"  # or equal images would have a distance
    distances = torch.minimum(*torch.cdist(both, among, compute_mode=exact).chunk(2))
    return Neighbours(*distances.topk(min(count, len(among)), largest=False))


def nearer_share(samples: Tensor, unseen: Tensor) -> float:
    """Return the share of pairs of a sample and an unseen image in which the sample is nearer to its nearest image."""
    difference = unseen[None, :] - samples[:, None]
    return ((difference > 0).double() + (difference == 0).double() / 2).mean().item()


def verdict(samples: Tensor, unseen: Tensor | None, unfinished: str = "") -> str:
    """Return what the distances (n,) of samples and of unseen images to their nearest training images say.

    Args:
        unfinished: why the samples cannot be images yet, if so; then the distances say little.
    """
    if unseen is None:
        return (
            "No images were held out, so there is nothing to compare these distances with: look at the pairs. "
            "A sample that is the same picture as its neighbour is a copy."
        )
    if unfinished:
        return (
            f"Too early to say: {unfinished}, so the samples are not yet images, and how near they are to training "
            "images means little."
        )
    share = nearer_share(samples, unseen)
    found = f"in {share:.0%} of all pairs of a sample and a held-out image, the sample is nearer to a training image"
    if share >= NEARER:
        text = f"This model repeats training images, at least in part: {found}."
    elif share > FARTHER:
        text = (
            "No sign of memorising, which does not say that samples are good: they are about as near to the training "
            f"images as unseen images are ({found})."
        )
    else:
        text = (
            "These samples are not copies, but not yet such images either: other real images are more like "
            f"the training images ({found})."
        )
    if len(unseen) < FEW:
        text += f" With only {several(len(unseen), 'held-out image')}, take that as a hint and no more."
    return text
