"""The endless, deterministic streams that training reads: what batch step k holds depends on (seed, k) alone.

So a run that resumes at step k sees exactly the batches that it would have seen without the break, whatever the number
of worker processes.
"""

import warnings
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from detailflow.data.images import ImageSource
from detailflow.data.transforms import random_crop, to_tensor
from detailflow.errors import DetailFlowError

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


class _Crops(Dataset[tuple[torch.Tensor, torch.Tensor, dict[int, str]]]):
    """Whole batches of random crops: BatchKey → bytes (B, size, size, 3), labels (B,), what could not be read."""

    def __init__(self, source: ImageSource, size: int, order: BatchOrder, flip: bool, max_scale: float) -> None:
        self.source, self.size, self.order, self.flip, self.max_scale = source, size, order, flip, max_scale
        self.tolerated = max(1, len(source) // 100)

    def __getitem__(self, key: BatchKey) -> tuple[torch.Tensor, torch.Tensor, dict[int, str]]:
        crops = np.zeros((len(key.items), self.size, self.size, 3), np.uint8)
        labels = np.zeros(len(key.items), np.int64)
        bad: dict[int, str] = {}
        rng = self.order.batch_rng(key)  # one for the batch: seeding one per image would take longer than its crop
        for row, item in enumerate(key.items.tolist()):
            while len(bad) <= self.tolerated:  # beyond that the stream ends with an error, so stop reading
                try:
                    image = self.source.image(item)
                except DetailFlowError as error:
                    bad[item] = str(error)
                    item = (item + 1) % len(self.source)
                    continue
                crops[row] = random_crop(image, self.size, rng, self.max_scale, self.flip)
                labels[row] = self.source.labels[item]
                break
        return torch.from_numpy(crops), torch.from_numpy(labels), bad


class ImageBatches:
    """Endless training batches: images (B, 3, size, size) float32 in [-1, 1] and labels (B,) int64.

    Crops and mirroring are random by (seed, step). An image that cannot be read is replaced by the
    next one that can, with one warning, and stands in `bad` (index → what is wrong with it). More bad images than 1% of
    the set (and more than one) end the stream with a DetailFlowError that names the first few.
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
    ) -> None:
        self.order = BatchOrder(len(source), batch_size, seed, start_step)
        self.steps_per_epoch = self.order.steps_per_epoch
        self.workers = workers
        self.bad: dict[int, str] = {}
        self._crops = _Crops(source, size, self.order, flip, max_scale)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        # batch_size=None: the keys are whole batches already, so what a worker sends is one block of bytes, not floats.
        loader = DataLoader(self._crops, sampler=self.order, batch_size=None, num_workers=self.workers)
        for crops, labels, bad in loader:
            self._note(bad)
            yield to_tensor(crops), labels

    def _note(self, bad: dict[int, str]) -> None:
        for item in bad.keys() - self.bad.keys():
            self.bad[item] = bad[item]
            warnings.warn(f"{bad[item]} Another image takes its place.", stacklevel=3)
        if len(self.bad) > self._crops.tolerated:
            first = "; ".join(self._crops.source.name(item) for item in sorted(self.bad)[:3])
            raise DetailFlowError(
                f"At least {len(self.bad)} of the {len(self._crops.source)} images cannot be read, more than 1%: "
                f"remove or replace the damaged ones (the first are {first})"
            )
