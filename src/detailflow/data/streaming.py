"""Training batches from images that are read as a stream, from a hub dataset that is not downloaded first or from local files.

A stream has no random access: its order is the shuffled order of its files, through a buffer that images are drawn from. It
depends on the seed, the epoch and how many processes share it, and not on the number of threads.
"""

import logging
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from glob import escape
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from detailflow.data.decode import first_line, load_rgb
from detailflow.data.folder import Notes
from detailflow.data.images import find
from detailflow.data.loader import note_unreadable
from detailflow.data.parquet import list_tables, name_of, read_footers, stream_parquet
from detailflow.data.source import common_folder, file_sizes, fingerprint
from detailflow.data.stored import stored_image
from detailflow.data.tables import check_columns, import_datasets, load_hub, quiet, stored_names
from detailflow.data.transforms import random_crop, side_for_crops, to_tensor
from detailflow.distributed import World
from detailflow.errors import DetailFlowError, printable
from detailflow.schedule import require_not_negative, require_positive

_log = logging.getLogger(__name__)
_ORDER, _SAMPLE = 2, 3  # random streams of their own beside the loader's
_AHEAD = 4  # batches that are read and decoded before they are asked for
_HANDFUL = 5  # unreadable images that are no reason to stop, however few have been read


class Record(NamedTuple):
    """One image of a stream, not yet decoded: the values of its column and its label's, and where a shard has it."""

    image: Any
    label: Any
    shard: str
    key: str


class StreamSource:
    """A set of images that is read as a stream; made by `open_stream`.

    Attributes:
        name: what the set is called in messages.
        class_names: those that the set itself names; ("image",) where it names none, and then every label is 0: without
            reading all of the set nobody knows its classes.
        num_images: how many it has, where that is known.
    """

    def __init__(
        self,
        dataset: Any,
        name: str,
        image_column: str,
        label_column: str | None,
        class_names: tuple[str, ...],
        num_images: int | None,
        listing: Sequence[tuple[str | int, ...]] = (),
        folders: Sequence[str] = (),
    ) -> None:
        self._listing, self._folders, self.notes = listing, folders, Notes()
        self.name, self.class_names, self.num_images = name, class_names or ("image",), num_images
        self._image_column, self._label_column = image_column, label_column if class_names else None
        columns = [image_column, self._label_column, "__url__", "__key__"]
        self._dataset = dataset.select_columns([column for column in columns if column in dataset.features])

    @property
    def counts(self) -> dict[str, int]:
        """Class name → images, if that is known without reading all of the set; else empty."""
        return {"image": self.num_images} if self.num_images and self.class_names == ("image",) else {}

    @property
    def fingerprint(self) -> str:
        """A checksum of the listing: names, sizes and rows of files, or a hub data set's name, sizes and revision."""
        return fingerprint(self._listing, self.class_names)

    @property
    def summary(self) -> str:
        """One line on what the set holds."""
        count = "an unknown number of" if self.num_images is None else f"{self.num_images:,}"
        classes = "without classes" if self.class_names == ("image",) else f"in {len(self.class_names):,} classes"
        split = f" (split {self.notes.split} of {', '.join(self.notes.splits)})" if self.notes.split else ""
        return printable(f"{self.name}{split}: {count} images {classes}, streamed")

    def records(self, rng: np.random.Generator, buffer: int, world: World) -> Iterator[Record]:
        """One pass over this process's part, shuffled. Raises DetailFlowError where reading fails or there is nothing."""
        # The library shuffles the files; its own buffer of images cannot hold more than 2 GB.
        rows = _part(self._dataset, world).shuffle(seed=int(rng.integers(2**31)), buffer_size=1)
        waiting: list[Record] = []
        try:
            for row in rows:
                label = row[self._label_column] if self._label_column else None
                record = Record(row[self._image_column], label, row.get("__url__", ""), row.get("__key__", ""))
                if len(waiting) < buffer:
                    waiting.append(record)
                else:
                    drawn = int(rng.integers(buffer))
                    record, waiting[drawn] = waiting[drawn], record
                    yield record
        except Exception as error:  # the network's, the file system's and Arrow's: `datasets` passes many kinds on
            raise DetailFlowError(f"{self.name} cannot be read any further ({first_line(error)})") from error
        if not waiting:
            raise DetailFlowError(f"{self.name} holds no images for process {world.rank + 1} of {world.size}")
        for drawn in rng.permutation(len(waiting)).tolist():
            yield waiting[drawn]

    def stored(self, record: Record, name: str) -> str | bytes:
        """Return the path or the bytes of its image, from the web or the hub if the row holds a URL there.

        Raises:
            DetailFlowError: if there is none, or none that may be read.
        """
        return stored_image(record.image, name, self._folders, urls=True)

    def label(self, record: Record, name: str) -> int:
        """Its class number. Raises DetailFlowError where it has none of the classes."""
        if self._label_column is None:
            return 0
        if not isinstance(record.label, int) or not 0 <= record.label < len(self.class_names):
            raise DetailFlowError(
                f"{name} has the label {record.label!r}, not a number of the {len(self.class_names)} classes"
            )
        return record.label


def _part(dataset: Any, world: World) -> Any:
    """Whole files, of which a process then reads no others, where they can be dealt out evenly; else every n-th image."""
    if world.size == 1:
        return dataset
    if dataset.num_shards % world.size == 0:
        return dataset.shard(num_shards=world.size, index=world.rank, contiguous=False)
    from datasets.distributed import split_dataset_by_node

    return split_dataset_by_node(dataset, world.rank, world.size)


def open_stream(
    data: str | os.PathLike[str], split: str | None = None, image_column: str = "image", label_column: str = "label"
) -> StreamSource:
    """Open a set of images to be read as a stream: what `open_images` opens, but for a folder of image files.

    In WebDataset shards the image column is the images' suffix ("jpg"); "image" is the first there is. Raises
    DetailFlowError for what cannot be opened so, or has no such columns.
    """
    found, datasets = find(data, split), import_datasets()
    folders = sorted({str(file.parent) for file in found.files})
    listing: Sequence[tuple[str | int, ...]]
    if found.kind in ("folder", "saved"):
        what = "a folder of image files" if found.kind == "folder" else "a folder by `save_to_disk`"
        raise DetailFlowError(f"{data} is {what}, which cannot be streamed: leave streaming off")
    if found.kind == ".parquet":
        footers = read_footers(found.files, image_column, label_column)
        name, count, listing = name_of(found.files), sum(footer.rows for footer in footers), list_tables(footers)
        names = footers[0].class_names if footers[0].labels == "numbers" else ()
        has_labels = bool(names)
        dataset = stream_parquet(footers, image_column, label_column if has_labels else None)
    else:
        name, count = os.fspath(data), None
        if found.kind == "hub":
            dataset = load_hub(name, split or "train", streaming=True)
            sizes = (dataset.info.splits or {}).get(split or "train")
            count = sizes.num_examples if sizes else None
            listing = [
                (name, split or "train", str(dataset.info.version), str(dataset.info.download_checksums), str(sizes))
            ]
        else:
            dataset = _stream_shards(found.files, name)
            paths = [str(file) for file in found.files]
            listing = list(file_sizes(paths, common_folder(paths)))
        if dataset.features is None:
            raise DetailFlowError(
                f"{name} doesn't say what its columns are, so it cannot be streamed: leave streaming off"
            )
        names = stored_names(name, dataset.features, label_column)
        pictures = [column for column, kind in dataset.features.items() if isinstance(kind, datasets.Image)]
        if image_column == "image" and "__key__" in dataset.features and pictures:
            image_column = pictures[0]
        has_labels = check_columns(name, dataset.features, image_column, label_column)
    if isinstance(dataset.features[image_column], datasets.Image):
        dataset = dataset.cast_column(image_column, datasets.Image(decode=False))
    label = label_column if has_labels else None
    source = StreamSource(dataset, name, image_column, label, names, count or None, listing, folders)
    source.notes = found.notes
    _log.info("%s", source.summary)
    return source


def _stream_shards(files: list[Path], name: str) -> Any:
    datasets, paths = import_datasets(), [os.path.abspath(file) for file in files]
    if odd := next((path for path in paths if "::" in path or "://" in path), None):
        raise DetailFlowError(
            f"{odd} cannot be streamed, since '::' stands for an address: rename it, or leave streaming off"
        )
    try:
        with quiet(datasets, False):  # which takes paths for patterns
            return datasets.load_dataset(
                "webdataset", data_files=list(map(escape, paths)), split="train", streaming=True
            )
    except Exception as error:
        raise DetailFlowError(f"{name} cannot be read ({first_line(error.__cause__ or error)})") from error


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
            rng = np.random.default_rng((_ORDER, self.seed, epoch))
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
        draws = np.random.default_rng((_SAMPLE, self.seed, epoch, self.world.rank, index)).random(4)
        return _Made(random_crop(image, self.size, draws, self.max_scale, self.flip), label, name, "")
