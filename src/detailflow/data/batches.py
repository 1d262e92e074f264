"""Endless training batches: what step k sees depends only on (seed, k).

So a run that resumes at step k sees exactly the batches that it would have seen without the break, whatever the number
of workers; and several training processes together see the batches that one would see.
"""

import signal
import warnings
from abc import abstractmethod
from collections import deque
from collections.abc import Hashable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass
from itertools import chain, islice, repeat
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from detailflow.data.memory import kept_images
from detailflow.data.source import ImageSource, tolerated
from detailflow.data.streams import StreamSource
from detailflow.data.transforms import random_crop, side_for_crops, to_tensor
from detailflow.distributed import World
from detailflow.errors import DetailFlowError, DetailFlowWarning
from detailflow.settings import PositiveInt, Seed, Workers, require

Key = TypeVar("Key", bound=Hashable)
Batch = TypeVar("Batch")

_ORDER, _SAMPLE, _STREAM_ORDER, _STREAM_SAMPLE = range(4)  # separate the random streams that are made from one seed
_AHEAD = 4  # batches of a stream that are read and decoded before they are asked for
_HANDFUL = 5  # unreadable images that are no reason to stop a stream, however few have been read


def outlive_signals(worker: int) -> None:
    """Start a worker process that signals do not end: the run that they ask to stop ends it, after its last step.

    Ctrl-C and launchers send them to all processes of a group.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


class BatchKey(NamedTuple):
    """The items of one step, and where in its epoch it starts."""

    epoch: int
    first_slot: int
    items: np.ndarray  # (B,) indices into the set


class BatchOrder(Sampler[BatchKey]):
    """The endless order of `count` items in batches from `start_step` on: epoch e is a permutation seeded by (seed, e).

    The last partial batch of an epoch is dropped; a set smaller than one batch wraps around.
    """

    def __init__(self, count: int, batch_size: int, seed: int, start_step: int = 0) -> None:
        require(PositiveInt, batch_size=batch_size)
        require(Seed, seed=seed)
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
        """Return the generator for everything random about one batch except its order."""
        return np.random.default_rng((_SAMPLE, self.seed, key.epoch, key.first_slot))


def note_unreadable(bad: dict[Key, str], found: Mapping[Key, str], tolerated: int, images: str) -> None:
    """Add to `bad` what is wrong with images that cannot be read, with one warning each.

    It is an error if `bad` then has more than `tolerated` of `images` ("the 30 images").
    """
    for key, problem in found.items():
        if key not in bad:
            bad[key] = problem
            warnings.warn(f"{problem}. Another image takes its place.", DetailFlowWarning, stacklevel=3)
    check_unreadable(bad, tolerated, images)


def check_unreadable(bad: Mapping[Key, str], tolerated: int, images: str) -> None:
    """Raise an error if more than `tolerated` of `images` ("the 30 images") cannot be read."""
    if len(bad) > tolerated:
        first = next(iter(bad.values()))
        raise DetailFlowError(
            f"at least {len(bad)} of {images} cannot be read, more than 1%: remove or replace them (the first: {first})"
        )


def read_ahead(batches: Iterator[Batch], count: int = 2) -> Iterator[Batch]:
    """Yield the batches; a thread prepares the next `count`, so that a GPU does not wait for them."""
    with ThreadPoolExecutor(1) as thread:
        coming = deque(thread.submit(next, batches, None) for _ in range(count))
        try:
            while (batch := coming.popleft().result()) is not None:
                coming.append(thread.submit(next, batches, None))
                yield batch
        finally:
            thread.shutdown(cancel_futures=True)


@dataclass(eq=False)
class _Batches:
    """Endless training batches of random crops.

    Each of several processes makes its part of every batch; it is an error if the batch cannot be divided evenly. An
    image that cannot be read is replaced by the next one that can, with one warning, and is added to `bad` (its index
    or name → what is wrong with it); more than 1% of them are an error.

    Attributes:
        batch_size: images of all processes together.
        workers: processes that read images, or threads that decode a stream.
        flip, max_scale: see `transforms.random_crop`.
        keep: bytes of decoded images that stay in memory, if there are no worker processes.
    """

    source: Any
    size: int
    batch_size: int
    seed: int
    workers: int = 0
    start_step: int = 0
    flip: bool = True
    max_scale: float = 1.25
    world: World = World()
    keep: float = 0

    def __post_init__(self) -> None:
        require(PositiveInt, batch_size=self.batch_size)
        require(Seed, seed=self.seed)
        require(Workers, workers=self.workers)
        self.part = self.world.shard(self.batch_size)
        self.least = side_for_crops(self.size, self.max_scale)
        self.bad: dict[Any, str] = {}

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield images (B, 3, size, size) float32 in [-1, 1] and labels (B,) int64."""
        return ((to_tensor(crops), labels) for crops, labels in self.as_bytes())

    @abstractmethod
    def as_bytes(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield the same with images as bytes (B, size, size, 3), a quarter of the size, ready to be sent to a GPU."""


class ImageBatches(_Batches, Dataset[tuple[torch.Tensor, torch.Tensor, dict[int, str]]]):
    """Endless training batches of a set of images; the order is a new permutation in every epoch."""

    source: ImageSource

    def __post_init__(self) -> None:
        super().__post_init__()
        self.order = BatchOrder(len(self.source), self.batch_size, self.seed, self.start_step)
        self.steps_per_epoch = self.order.steps_per_epoch
        self.tolerated = tolerated(len(self.source))
        keep = 0 if self.workers else self.keep
        self.kept = kept_images(self.source, self.size, self.max_scale, keep)

    def as_bytes(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        # batch_size=None: the keys are whole batches already, so what a worker sends is one block of bytes, not floats.
        pin = torch.cuda.is_available()
        loader = DataLoader(
            self,
            sampler=self.order,
            batch_size=None,
            num_workers=self.workers,
            pin_memory=pin,
            worker_init_fn=outlive_signals,
        )
        batches: Iterator[Any] = iter(loader)
        if pin and not self.workers:
            batches = read_ahead(batches)
        for crops, labels, bad in batches:
            note_unreadable(self.bad, bad, self.tolerated, f"the {len(self.source)} images")
            yield crops, labels

    def __getitem__(self, key: BatchKey) -> tuple[torch.Tensor, torch.Tensor, dict[int, str]]:
        """Return this process's part of a batch: bytes (B, size, size, 3), labels (B,) and what could not be read."""
        # One generator for the whole batch: seeding one per image would take longer than the crop of a small one.
        draws = self.order.batch_rng(key).random((len(key.items), 4))[self.part]
        items = key.items[self.part].tolist()
        crops = np.zeros((len(items), self.size, self.size, 3), np.uint8)
        labels = np.zeros(len(items), np.int64)
        bad: dict[int, str] = {}
        missing = self.kept.fill(crops, key.items[self.part], self.flip & (draws[:, 3] < 0.5))
        labels[:] = self.source.labels[key.items[self.part]]
        for row in missing.tolist():
            item = items[row]
            while len(bad) <= self.tolerated:  # beyond that there will be an error, so stop reading
                try:
                    image = self.kept.image(item, self.least)
                except DetailFlowError as error:
                    bad[item] = str(error)
                    item = (item + 1) % len(self.source)
                    continue
                crops[row] = random_crop(image, self.size, draws[row], self.max_scale, self.flip)
                labels[row] = self.source.labels[item]
                break
        return torch.from_numpy(crops), torch.from_numpy(labels), bad


class _Decoded(NamedTuple):
    """A crop (size, size, 3) and its label, or what is wrong with the image of that name."""

    crop: np.ndarray | None
    label: int
    name: str
    problem: str


@dataclass(eq=False)
class StreamedBatches(_Batches):
    """Endless training batches of a stream, in an order by seed, epoch and number of processes.

    Each process reads a part of its own: whole files if these can be divided evenly, else every n-th image, for which
    it reads all. If the number of images is known, epochs have the same length for each, and a process whose part is
    shorter begins it again. To go on at `start_step`, the epoch's earlier images are read again, but not decoded; whole
    epochs are skipped, except that one has to be read to count its images if their number is not known.

    Attributes:
        buffer: images, not yet decoded, that the next one is drawn from: more are mixed better, and take more memory.
    """

    source: StreamSource
    _: KW_ONLY
    buffer: int = 2048

    def __post_init__(self) -> None:
        require(PositiveInt, buffer=self.buffer)
        super().__post_init__()
        self.part_size = self.part.stop - self.part.start

    @property
    def steps_per_epoch(self) -> int:
        """Return the steps of an epoch if the number of images is known."""
        if self.source.num_images is None:
            raise DetailFlowError(
                f"{self.source.name} does not say how many images it has: leave streaming off to know that"
            )
        return max(1, self.source.num_images // self.batch_size)

    def as_bytes(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        images, pin = self._readable(), torch.cuda.is_available()
        while batch := list(islice(images, self.part_size)):
            crops = torch.from_numpy(np.stack([image.crop for image in batch if image.crop is not None]))
            yield crops.pin_memory() if pin else crops, torch.tensor([image.label for image in batch])

    def _readable(self) -> Iterator[_Decoded]:
        """Yield images in order, the next readable one in place of each that is not."""
        unreadable = 0  # in a row
        for seen, image in enumerate(self._decoded(), 1):
            if image.crop is not None:
                yield from repeat(image, unreadable + 1)
                unreadable = 0
                continue
            unreadable += 1
            where, limit = f"the {seen} images of {self.source.name} read so far", max(_HANDFUL, seen // 100)
            note_unreadable(self.bad, {image.name: image.problem}, limit, where)
            if unreadable > _AHEAD * self.part_size:
                raise DetailFlowError(
                    f"{self.source.name} has only images in a row that cannot be read ({image.problem})"
                )

    def _decoded(self) -> Iterator[_Decoded]:
        """Yield decoded images; one thread reads ahead and `workers` threads decode."""
        records = self._records()
        reader, decoders = ThreadPoolExecutor(1), ThreadPoolExecutor(max(1, self.workers))

        def read() -> list[Future[_Decoded]]:
            return [decoders.submit(self._decode, *record) for record in islice(records, self.part_size)]

        try:
            batches = deque(reader.submit(read) for _ in range(_AHEAD))
            while True:
                for image in batches.popleft().result():
                    yield image.result()
                batches.append(reader.submit(read))
        finally:
            reader.shutdown(cancel_futures=True)
            decoders.shutdown(cancel_futures=True)

    def _records(self) -> Iterator[tuple[int, int, dict[str, Any]]]:
        """Yield epoch, index in it and record, of this process's part from `start_step` on."""
        epoch, skip = 0, self.start_step * self.part_size
        length = max(1, self.source.num_images // self.world.size) if self.source.num_images else None
        if length:
            epoch, skip = divmod(skip, length)
        while True:
            count = 0
            passes = repeat(epoch) if length else (epoch,)
            for index, record in enumerate(islice(chain.from_iterable(map(self._pass, passes)), length)):
                count = index + 1
                if index >= skip:
                    yield epoch, index, record
            passed, skip = divmod(max(0, skip - count), count)
            epoch += 1 + passed

    def _pass(self, epoch: int) -> Iterator[dict[str, Any]]:
        rng = np.random.default_rng((_STREAM_ORDER, self.seed, epoch))
        return self.source.records(rng, self.buffer, self.world)

    def _decode(self, epoch: int, index: int, record: dict[str, Any]) -> _Decoded:
        name = self.source.name_of(record) or f"{self.source.name} image {index} of epoch {epoch}"
        try:
            image, label = self.source.decode(record, name, self.least)
        except DetailFlowError as error:
            return _Decoded(None, 0, name, str(error))
        draws = np.random.default_rng((_STREAM_SAMPLE, self.seed, epoch, self.world.rank, index)).random(4)
        return _Decoded(random_crop(image, self.size, draws, self.max_scale, self.flip), label, name, "")
