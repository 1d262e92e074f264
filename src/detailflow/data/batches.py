"""The endless, deterministic streams that training reads: what batch step k holds depends on (seed, k) alone.

So a run that resumes at step k sees exactly the batches that it would have seen without the break, whatever the number
of worker processes; and several training processes see together what one alone would.
"""

import warnings
from collections import deque
from collections.abc import Hashable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, islice, repeat
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from detailflow.data.decode import load_rgb
from detailflow.data.images import ImageSource, tolerated
from detailflow.data.streams import Record, StreamSource
from detailflow.data.transforms import random_crop, side_for_crops, to_tensor
from detailflow.distributed import World
from detailflow.errors import DetailFlowError, DetailFlowWarning
from detailflow.schedule import require_not_negative, require_positive

Key = TypeVar("Key", bound=Hashable)

_ORDER, _SAMPLE, _STREAM_ORDER, _STREAM_SAMPLE = range(4)  # separate the random streams that are made from one seed
_AHEAD = 4  # batches that are read and decoded before they are asked for
_HANDFUL = 5  # unreadable images that are no reason to stop, however few have been read


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


class _Made(NamedTuple):
    """A crop (size, size, 3) and its label; or, where there is none, what is wrong with the image of that name."""

    crop: np.ndarray | None
    label: int
    name: str
    problem: str


class StreamedBatches:
    """Endless training batches from a stream: images (B, 3, size, size) float32 in [-1, 1] and labels (B,) int64.

    Several `processes` each read a part of their own (whole files where these can be dealt out evenly, else every n-th
    image, for which each reads all) and make their share of the batch of `batch_size` of it. An epoch is as long for each:
    where the number of images is known, a process whose part is shorter begins it again. The order is by (seed, epoch,
    processes), an image's crop and mirroring by its index in that. A thread reads ahead and `workers` threads decode.

    An image that cannot be read is replaced by the next one that can, with one warning, and stands in `bad` (name → what is
    wrong with it). More than 1% of those read so far (and more than five) end the stream with a DetailFlowError.

    A run that goes on at `start_step` sees what it would have seen. For that, the part of the epoch that is over is read
    again, though not decoded: at the speed of the network or disk. Whole epochs are passed over, but where the number of
    images isn't known one has to be read to count it.

    Args:
        buffer: images, not yet decoded, that the next one is drawn from: the more, the better mixed, the more memory, and the
            later the first.

    Raises:
        DetailFlowError: at once, where the batch cannot be shared evenly.
    """

    def __init__(
        self,
        source: StreamSource,
        size: int,
        batch_size: int,
        seed: int,
        workers: int = 0,
        start_step: int = 0,
        flip: bool = True,
        max_scale: float = 1.25,
        world: World | None = None,
        buffer: int = 2048,
    ) -> None:
        require_positive(batch_size=batch_size, buffer=buffer)
        require_not_negative(seed=seed, workers=workers)
        self.source, self.size, self.batch_size, self.seed, self.workers = source, size, batch_size, seed, workers
        self.flip, self.max_scale, self.buffer = flip, max_scale, buffer
        self.world = world or World()
        share = self.world.shard(batch_size)
        self.share = share.stop - share.start
        self.first = start_step * self.share
        self.bad: dict[str, str] = {}

    @property
    def steps_per_epoch(self) -> int:
        """Raises DetailFlowError where the number of images is not known."""
        if self.source.num_images is None:
            raise DetailFlowError(
                f"{self.source.name} doesn't say how many images it has: leave streaming off to know that"
            )
        return max(1, self.source.num_images // self.batch_size)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return ((to_tensor(crops), labels) for crops, labels in self.as_bytes())

    def as_bytes(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The same with images as bytes (B, size, size, 3)."""
        records, seen = self._records(), 0
        reader, decoders = ThreadPoolExecutor(1), ThreadPoolExecutor(max(1, self.workers))

        def read() -> list[Future[_Made]]:
            return [decoders.submit(self._make, *record) for record in islice(records, self.share)]

        pin = torch.cuda.is_available()
        try:
            batches = deque(reader.submit(read) for _ in range(_AHEAD))
            while True:
                made = [image.result() for image in batches[0].result()]
                found = {image.name: image.problem for image in made if image.crop is None}
                seen += len(made)
                tolerated = max(_HANDFUL, seen // 100)
                note_unreadable(self.bad, found, tolerated, f"the {seen} images of {self.source.name} read so far")
                if found:
                    made = self._replace(made, batches)
                batches.popleft()
                batches.append(reader.submit(read))
                crops = torch.from_numpy(np.stack([image.crop for image in made if image.crop is not None]))
                yield crops.pin_memory() if pin else crops, torch.tensor([image.label for image in made])
        finally:
            reader.shutdown(cancel_futures=True)
            decoders.shutdown(cancel_futures=True)

    def _replace(self, made: list[_Made], batches: "deque[Future[list[Future[_Made]]]]") -> list[_Made]:
        """`made`, the first of `batches`, with the next readable image in place of each that is not."""
        later = chain.from_iterable(batch.result() for batch in islice(batches, 1, None))
        following = next((image for image in (future.result() for future in later) if image.crop is not None), None)
        replaced: list[_Made] = []
        for image in reversed(made):
            if image.crop is not None:
                following = image
            if following is None:
                raise DetailFlowError(
                    f"{self.source.name} has only images in a row that cannot be read ({made[0].problem})"
                )
            replaced.append(following)
        return replaced[::-1]

    def _records(self) -> Iterator[tuple[int, int, Record]]:
        """Epoch, index in it and record, of this process's part from `first` on."""
        epoch, skip = 0, self.first
        length = max(1, self.source.num_images // self.world.size) if self.source.num_images else None
        if length:
            epoch, skip = divmod(skip, length)
        while True:
            count = 0
            for index, record in enumerate(self._epoch(epoch, length)):
                count = index + 1
                if index >= skip:
                    yield epoch, index, record
            passed, skip = divmod(max(0, skip - count), count)
            epoch += 1 + passed

    def _epoch(self, epoch: int, length: int | None) -> Iterator[Record]:
        def one_pass() -> Iterator[Record]:
            rng = np.random.default_rng((_STREAM_ORDER, self.seed, epoch))
            return self.source.records(rng, self.buffer, self.world)

        if length is None:
            return one_pass()
        return islice(chain.from_iterable(one_pass() for _ in repeat(None)), length)

    def _make(self, epoch: int, index: int, record: Record) -> _Made:
        name = f"{record.shard} {record.key}" if record.key else f"{self.source.name} image {index} of epoch {epoch}"
        try:
            label = self.source.label(record, name)
            image = load_rgb(self.source.stored(record, name), name, side_for_crops(self.size, self.max_scale))
        except DetailFlowError as error:
            return _Made(None, 0, name, str(error))
        draws = np.random.default_rng((_STREAM_SAMPLE, self.seed, epoch, self.world.rank, index)).random(4)
        return _Made(random_crop(image, self.size, draws, self.max_scale, self.flip), label, name, "")
