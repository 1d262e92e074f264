"""The endless, deterministic streams that training reads: what batch step k holds depends on (seed, k) alone.

So a run that resumes at step k sees exactly the batches that it would have seen without the break, whatever the number
of worker processes; and several training processes see together what one alone would.
"""

import warnings
from collections.abc import Hashable, Iterator, Mapping
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from detailflow.data.source import ImageSource, tolerated
from detailflow.data.transforms import random_crop, side_for_crops, to_tensor
from detailflow.distributed import World
from detailflow.errors import DetailFlowError, DetailFlowWarning

Key = TypeVar("Key", bound=Hashable)

_ORDER, _SAMPLE = 0, 1  # separate the random streams that are made from one seed


class BatchKey(NamedTuple):
    """Which items make up one step, and where in its epoch it starts."""

    epoch: int
    first_slot: int
    items: np.ndarray  # (B,) indices into the set


class BatchOrder(Sampler[BatchKey]):
    """The endless order of `count` items in batches, from `start_step` on.

    Epoch e is a permutation seeded by (seed, e). The last partial batch of an epoch is dropped; a set smaller than one
    batch wraps around.
    """

    def __init__(self, count: int, batch_size: int, seed: int, start_step: int = 0) -> None:
        if batch_size < 1:
            raise DetailFlowError(f"batch size {batch_size} is not possible: it must be at least 1")
        if seed < 0:
            raise DetailFlowError(f"seed {seed} is not possible: it must be 0 or greater")
        self.count, self.batch_size, self.seed, self.start_step = count, batch_size, seed, start_step
        self.steps_per_epoch = max(1, count // batch_size)

    def __iter__(self) -> Iterator[BatchKey]:
        epoch, step = divmod(self.start_step, self.steps_per_epoch)
        while True:
            order = np.random.default_rng((_ORDER, self.seed, epoch)).permutation(self.count)
            order = np.resize(order, self.steps_per_epoch * self.batch_size)
            for first in range(step * self.batch_size, len(order), self.batch_size):
                yield BatchKey(epoch, first, order[first : first + self.batch_size])
            epoch, step = epoch + 1, 0

    def batch_rng(self, key: BatchKey) -> np.random.Generator:
        """The generator for everything random about one batch but its order."""
        return np.random.default_rng((_SAMPLE, self.seed, key.epoch, key.first_slot))


def note_unreadable(bad: dict[Key, str], found: Mapping[Key, str], tolerated: int, images: str) -> None:
    """Add what could not be read to `bad` (image → what is wrong with it), with one warning each.

    Raises:
        DetailFlowError: where `bad` are then more than `tolerated` of `images` ("the 30 images").
    """
    for key, problem in found.items():
        if key not in bad:
            bad[key] = problem
            warnings.warn(f"{problem}. Another image takes its place.", DetailFlowWarning, stacklevel=3)
    if len(bad) > tolerated:
        first = next(iter(bad.values()))
        raise DetailFlowError(
            f"At least {len(bad)} of {images} cannot be read, more than 1%: remove or replace them (the first: {first})"
        )


class _Crops(Dataset[tuple[torch.Tensor, torch.Tensor, dict[int, str]]]):
    """This process's share of whole batches of random crops: BatchKey → bytes (B, size, size, 3), labels (B,), what could
    not be read."""

    def __init__(
        self, source: ImageSource, size: int, order: BatchOrder, share: slice, flip: bool, max_scale: float
    ) -> None:
        self.source, self.size, self.order, self.share = source, size, order, share
        self.flip, self.max_scale = flip, max_scale
        self.least = side_for_crops(size, max_scale)
        self.tolerated = tolerated(len(source))

    def __getitem__(self, key: BatchKey) -> tuple[torch.Tensor, torch.Tensor, dict[int, str]]:
        # One generator for the whole batch: seeding one per image would take longer than the crop of a small one.
        draws = self.order.batch_rng(key).random((len(key.items), 4))[self.share]
        items = key.items[self.share].tolist()
        crops = np.zeros((len(items), self.size, self.size, 3), np.uint8)
        labels = np.zeros(len(items), np.int64)
        bad: dict[int, str] = {}
        for row, item in enumerate(items):
            while len(bad) <= self.tolerated:  # beyond that the stream ends with an error, so stop reading
                try:
                    image = self.source.image(item, self.least)
                except DetailFlowError as error:
                    bad[item] = str(error)
                    item = (item + 1) % len(self.source)
                    continue
                crops[row] = random_crop(image, self.size, draws[row], self.max_scale, self.flip)
                labels[row] = self.source.labels[item]
                break
        return torch.from_numpy(crops), torch.from_numpy(labels), bad


class ImageBatches:
    """Endless training batches: images (B, 3, size, size) float32 in [-1, 1] and labels (B,) int64.

    Crops and mirroring are random by (seed, step). Of several `processes` each makes its share of the batch of `batch_size`,
    and together they make the batch that one alone would make. An image that cannot be read is replaced by the next one
    that can, with one warning, and stands in `bad` (index → what is wrong with it). More bad images than 1% of the set (and
    more than one) in one process end its stream with a DetailFlowError that names the first.

    Raises:
        DetailFlowError: at once, where the batch cannot be shared evenly.
    """

    def __init__(
        self,
        source: ImageSource,
        size: int,
        batch_size: int,
        seed: int,
        workers: int = 0,
        start_step: int = 0,
        flip: bool = True,
        max_scale: float = 1.25,
        world: World | None = None,
    ) -> None:
        self.order = BatchOrder(len(source), batch_size, seed, start_step)
        self.steps_per_epoch = self.order.steps_per_epoch
        self.workers = workers
        self.bad: dict[int, str] = {}
        share = (world or World()).shard(batch_size)
        self._crops = _Crops(source, size, self.order, share, flip, max_scale)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return ((to_tensor(crops), labels) for crops, labels in self.as_bytes())

    def as_bytes(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The same with images as bytes (B, size, size, 3), a quarter of what floats would be, ready to be sent to a GPU."""
        pin = torch.cuda.is_available()
        # batch_size=None: the keys are whole batches already, so what a worker sends is one block of bytes, not floats.
        loader = DataLoader(self._crops, sampler=self.order, batch_size=None, num_workers=self.workers, pin_memory=pin)
        for crops, labels, bad in loader:
            note_unreadable(self.bad, bad, self._crops.tolerated, f"the {len(self._crops.source)} images")
            yield crops, labels
