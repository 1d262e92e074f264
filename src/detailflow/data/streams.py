"""Sets of images that are read as a stream: a hub data set that is not downloaded first, or local files.

A stream has no random access: its order is the shuffled order of its files, through a buffer that images are drawn from. It
depends on the seed, the epoch and how many processes share it, and not on the number of threads.
"""

import logging
import os
from collections.abc import Iterator, Sequence
from glob import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from detailflow.data.decode import first_line
from detailflow.data.folder import Notes
from detailflow.data.images import find
from detailflow.data.parquet import list_tables, name_of, read_footers, stream_parquet
from detailflow.data.source import common_folder, file_sizes, fingerprint
from detailflow.data.stored import stored_image
from detailflow.data.tables import check_columns, import_datasets, load_hub, quiet, stored_names
from detailflow.distributed import World
from detailflow.errors import DetailFlowError, printable

_log = logging.getLogger(__name__)


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
    data: str | os.PathLike[str],
    *,
    split: str | None = None,
    image_column: str = "image",
    label_column: str = "label",
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
