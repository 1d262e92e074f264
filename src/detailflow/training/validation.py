"""Images that are held out for validation, as a set of their own or as a share by content; never trained on."""

import hashlib
import logging
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from detailflow.data.images import open_images
from detailflow.data.source import ImageSource
from detailflow.data.streams import StreamSource
from detailflow.data.transforms import center_crop, to_tensor
from detailflow.distributed import World
from detailflow.errors import DetailFlowError
from detailflow.progress import progress_bar
from detailflow.psnr import psnr
from detailflow.training.config import ImageSettings

_log = logging.getLogger(__name__)
ENOUGH = 20  # held-out images, below which a better step may be one by chance
BATCH = 32  # images at once, whatever the number of ranks: rounding depends on it


Source = TypeVar("Source", ImageSource, ImageSource | StreamSource)


def held_out(source: ImageSource, share: float) -> list[int]:
    """Return the indices of a share of the images, chosen by their stored bytes, so that copies are on the same side.

    It is one image at least, and every class keeps one.
    """
    draws = []
    for index in progress_bar(range(len(source)), desc="hold out", unit="img"):
        try:
            draws.append(int.from_bytes(_digest(source, index)[:8], "big") / 2**64)
        except DetailFlowError:  # training will say so
            draws.append(1.0)
    limit = max(share, np.nextafter(min(draws), 1.0))
    drawn = np.array(draws)
    chosen = drawn < limit
    held = source.all_labels[chosen]
    for label in np.unique(held[held >= 0]):  # −1 is no class: it fills up the rows of images with fewer labels
        members = np.flatnonzero((source.all_labels == label).any(1))
        if chosen[members].all():
            chosen[drawn == drawn[members].max()] = False  # with its copies
    return np.flatnonzero(chosen).tolist()


def trained_on(validation: ImageSource, source: ImageSource) -> list[int]:
    """Return the indices of the images for validation whose stored bytes are among those to train on.

    Of these, only images of as many bytes as one for validation are read as a whole.
    """
    digests: dict[bytes, list[int]] = {}
    sizes: set[int] = set()
    for index in range(len(validation)):
        with suppress(DetailFlowError):  # what cannot be read is no copy
            digests.setdefault(_digest(validation, index), []).append(index)
            sizes.add(validation.stored_size(index))
    found: list[int] = []
    for index in progress_bar(range(len(source)), desc="compare with val_data", unit="img"):
        with suppress(DetailFlowError):
            if source.stored_size(index) in sizes:
                found += digests.pop(_digest(source, index), [])
    return sorted(found)


def _digest(source: ImageSource, index: int) -> bytes:
    """Return what tells an image's stored bytes from those of others."""
    return hashlib.sha256(source.stored_bytes(index)).digest()


def split(config: ImageSettings, source: Source, world: World) -> tuple[Source, ImageSource | None]:
    """Return the images to train on and those to validate on, `None` if there are none."""
    with world.raise_together():
        images = source.fingerprint if world.size > 1 else ""
    world.check_same(
        {
            "their images": images,
            "val_data": bool(config.val_data),
            "val_split": config.val_split,
            "val_share": config.val_share,
        }
    )
    if config.val_data:
        return source, _other_images(config, source, world)
    with world.raise_together():
        if config.val_split:
            raise DetailFlowError("val_split is a split of val_data, which is not set: give the images to validate on")
        if not config.val_share:
            return source, None
        if isinstance(source, StreamSource):
            raise DetailFlowError("val_share needs images that are not streamed: give val_data, or set val_share to 0")
    chosen = set(world.from_main(lambda: held_out(source, config.val_share)))
    if not chosen:
        return source, None
    if world.is_main:
        verb = "is" if len(chosen) == 1 else "are"
        few = f"; which step is the best by fewer than {ENOUGH} is partly chance" * (len(chosen) < ENOUGH)
        counts = source.where, len(chosen), len(source), verb, few
        _log.info("%s: %d of the %d images %s held out for validation%s", *counts)
    rest = [index for index in range(len(source)) if index not in chosen]
    return source.subset(rest), source.subset(sorted(chosen))


def _other_images(config: ImageSettings, source: ImageSource | StreamSource, world: World) -> ImageSource:
    """Return the images of `val_data` without those that are trained on; with a stream they are not compared."""
    assert config.val_data
    with world.raise_together():
        validation = open_images(config.val_data, split=config.val_split, **config.columns)
        identity = validation.fingerprint
        same = identity == source.fingerprint
        if not same and validation.class_names != source.class_names:
            raise DetailFlowError(f"{config.val_data} must have the same classes as the images to train on")
    world.check_same({"their images for validation": identity})
    copies = set[int]()
    if isinstance(source, ImageSource) and not same:
        copies = set(world.from_main(lambda: trained_on(validation, source)))
    with world.raise_together():
        if same or len(copies) == len(validation):
            raise DetailFlowError(
                f"val_data {config.val_data} has the images to train on: give others, or a split of it by val_split"
            )
    if not copies:
        return validation
    if world.is_main:
        text = "%d of the %d images of val_data %s are among the images to train on, and are left out of validation"
        _log.warning(text, len(copies), len(validation), config.val_data)
    return validation.subset([index for index in range(len(validation)) if index not in copies])


def sample_crops(source: ImageSource, count: int, size: int) -> Tensor:
    """Return (≤ count, size, size, 3) bytes: the centres of images spread over the set."""
    crops = [center_crop(image, size) for image in source.some(count)]
    if not crops:
        raise DetailFlowError(
            f"none of the {len(source):,} images for validation or pictures can be read: `detailflow data` says why"
        )
    return torch.from_numpy(np.stack(crops))


@torch.no_grad()
def mean_figures(
    count: int, measure: Callable[[slice], dict[str, Any]], world: World, together: bool
) -> dict[str, float]:
    """Return the means of figures over a sample, the same for any number of ranks.

    Args:
        measure: returns the means over a part of the sample; each rank measures its own parts.
        together: let every rank measure every part, for networks whose ranks must call each other.
    """
    parts = [slice(start, min(start + BATCH, count)) for start in range(0, count, BATCH)]
    names: list[str] = []
    table = torch.zeros(len(parts), 8, dtype=torch.float64)
    for index, part in enumerate(parts):
        if together or index % world.size == world.rank:
            figures = measure(part)
            names = list(figures)
            for column, value in enumerate(figures.values()):
                table[index, column] = float(value) * (part.stop - part.start) / count
    if not together:
        table = world.all_reduce(table)
    names = world.from_main(lambda: names)
    return {name: float(table[:, column].sum()) for column, name in enumerate(names)}


def tokenizer_figures(
    model: Any, crops: Tensor, loss: Callable[[Tensor, Tensor], Tensor], world: World
) -> dict[str, float]:
    """Return the loss and PSNR of a tokenizer's reconstructions from all tokens.

    Args:
        crops: (n, R, R, 3) bytes.
        loss: of (B, 3, R, R) pixels and their targets.
    """

    def measure(part: slice) -> dict[str, Tensor]:
        images = to_tensor(crops[part].to(model.device))
        pixels = model.decode(model.encode(images)).float()
        return {"val_loss": loss(pixels, images), "val_psnr": psnr(pixels.clamp(-1, 1), images, peak=2).mean()}

    training = model.training
    model.eval()
    figures = mean_figures(len(crops), measure, world, together=False)
    model.train(training)
    return figures
