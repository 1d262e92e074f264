"""Sets of images that are read as a stream: a hub data set that is not downloaded first, or local files.

A stream has no random access: its files are shuffled, then its images, through a buffer that they are drawn from.
"""

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from glob import escape
from typing import Any

import numpy as np
from PIL import Image

from detailflow.data.decode import first_line, load_rgb
from detailflow.data.folder import DataFiles, file_sizes
from detailflow.data.images import find
from detailflow.data.parquet import read_footers, stream_parquet
from detailflow.data.source import describe, fingerprint
from detailflow.data.tables import check_columns, import_datasets, list_tables, load_hub, quiet, stored_image
from detailflow.distributed import World
from detailflow.errors import DetailFlowError

_log = logging.getLogger(__name__)


@dataclass(eq=False)
class StreamSource:
    """A set of images that is read as a stream; made by `open_stream`.

    Attributes:
        dataset: the rows, as the `datasets` library streams them.
        label_column: `None` if the set does not name its classes: then every label is 0, since nobody knows its
            classes without reading all of it.
        num_images: how many it has, if that is known.
        listing: each file's name and bytes, or what else identifies the set.
        found: its files; rows may name others in the same folders.
    """

    dataset: Any
    name: str
    image_column: str
    label_column: str | None
    class_names: tuple[str, ...]
    num_images: int | None
    listing: list[tuple[str | int, ...]]
    found: DataFiles

    def __post_init__(self) -> None:
        features, kind = self.dataset.features, import_datasets().Image
        if isinstance(features[self.image_column], kind):
            self.dataset = self.dataset.cast_column(self.image_column, kind(decode=False))
        if not self.class_names:
            self.class_names, self.label_column = ("image",), None
        columns = [self.image_column, self.label_column, "__url__", "__key__"]
        self.dataset = self.dataset.select_columns([column for column in columns if column in features])
        self.notes, self._folders = self.found.notes, sorted(set(map(os.path.dirname, self.found.files)))

    @property
    def counts(self) -> dict[str, int]:
        """Return class name → images if that is known without reading all of the set; else nothing."""
        return {"image": self.num_images} if self.num_images and self.class_names == ("image",) else {}

    @property
    def fingerprint(self) -> str:
        """Return a checksum of the names, sizes and rows of files, or of a hub data set's name, sizes and revision."""
        return fingerprint(self.listing, self.class_names)

    @property
    def summary(self) -> str:
        """Return one line on the set."""
        count = "an unknown number of" if self.num_images is None else f"{self.num_images:,}"
        classes = "without classes" if self.class_names == ("image",) else f"in {len(self.class_names):,} classes"
        return describe(self.name, f"{count} images {classes}", "streamed", self.notes)

    def records(self, rng: np.random.Generator, buffer: int, world: World) -> Iterator[dict[str, Any]]:
        """Yield this process's part once, shuffled; images are not decoded yet."""
        # The library shuffles the files; its own buffer of images cannot hold more than 2 GB.
        rows = self._part(world).shuffle(seed=int(rng.integers(2**31)), buffer_size=1)
        waiting: list[dict[str, Any]] = []
        try:
            for row in rows:
                if len(waiting) < buffer:
                    waiting.append(row)
                else:
                    drawn = int(rng.integers(buffer))
                    row, waiting[drawn] = waiting[drawn], row
                    yield row
        except Exception as error:  # the network's, the file system's and Arrow's: `datasets` passes many kinds on
            raise DetailFlowError(f"{self.name} cannot be read any further ({first_line(error)})") from error
        if not waiting:
            raise DetailFlowError(f"{self.name} holds no images for process {world.rank + 1} of {world.size}")
        for drawn in rng.permutation(len(waiting)).tolist():
            yield waiting[drawn]

    def _part(self, world: World) -> Any:
        """Return whole files, if they can be divided evenly: a process then reads no others; else every n-th image."""
        if world.size == 1:
            return self.dataset
        if self.dataset.num_shards % world.size == 0:
            return self.dataset.shard(num_shards=world.size, index=world.rank, contiguous=False)
        from datasets.distributed import split_dataset_by_node

        return split_dataset_by_node(self.dataset, world.rank, world.size)

    def name_of(self, record: dict[str, Any]) -> str:
        """Return "shard.tar key" for messages, or "" if the image is not in a shard."""
        return f"{record.get('__url__', '')} {record['__key__']}" if record.get("__key__") else ""

    def decode(self, record: dict[str, Any], name: str, least: int) -> tuple[Image.Image, int]:
        """Return a record's image (see `load_rgb`), from the web or the hub if it is a URL there, and its class."""
        label = record[self.label_column] if self.label_column else 0
        if not isinstance(label, int) or not 0 <= label < len(self.class_names):
            raise DetailFlowError(
                f"{name} has the label {label!r}, not a number of the {len(self.class_names)} classes"
            )
        return load_rgb(stored_image(record[self.image_column], name, self._folders, urls=True), name, least), label


def open_stream(
    data: str | os.PathLike[str],
    *,
    split: str | None = None,
    image_column: str = "image",
    label_column: str = "label",
) -> StreamSource:
    """Open a set of images to be read as a stream: whatever `open_images` opens, except a folder of image files.

    In WebDataset shards the image column is the images' suffix ("jpg"); "image" is the first there is.
    """
    found = find(data, split)
    import_datasets()
    if found.kind in ("folder", "saved"):
        what = "a folder of image files" if found.kind == "folder" else "a folder by `save_to_disk`"
        raise DetailFlowError(f"{data} is {what}, which cannot be streamed: leave streaming off")
    if found.kind == ".parquet":
        source = _stream_parquet(found, image_column, label_column)
    else:
        source = _stream_dataset(found, os.fspath(data), image_column, label_column)
    _log.info("%s", source.summary)
    return source


def _stream_parquet(found: DataFiles, image_column: str, label_column: str) -> StreamSource:
    footers = read_footers(found, image_column, label_column)
    names = footers[0].class_names if footers[0].labels == "numbers" else ()
    counts = [footer.rows for footer in footers]
    dataset = stream_parquet(footers, image_column, label_column if names else None)
    listing = list_tables(found.files, counts)
    return StreamSource(dataset, found.name, image_column, label_column, names, sum(counts), listing, found)


def _stream_dataset(found: DataFiles, name: str, image_column: str, label_column: str) -> StreamSource:
    """Stream a hub data set, or shards, by the `datasets` library."""
    count = None
    listing: list[tuple[str | int, ...]]
    if found.kind == "hub":
        dataset = load_hub(name, found.split, streaming=True)
        sizes = (dataset.info.splits or {}).get(found.split)
        count = sizes.num_examples if sizes else None
        info = dataset.info
        listing = [(name, found.split, str(info.version), str(info.download_checksums), str(sizes))]
    else:
        dataset, listing = _load_shards(found.files, name), [*file_sizes(found.files)]
    if dataset.features is None:
        raise DetailFlowError(
            f"{name} does not say what its columns are, so it cannot be streamed: leave streaming off"
        )
    kind = import_datasets().Image
    images = [column for column, feature in dataset.features.items() if isinstance(feature, kind)]
    if image_column == "image" and "__key__" in dataset.features and images:
        image_column = images[0]
    names = check_columns(name, dataset.features, image_column, label_column)
    return StreamSource(dataset, name, image_column, label_column, names or (), count or None, listing, found)


def _load_shards(files: list[str], name: str) -> Any:
    datasets, paths = import_datasets(), list(map(os.path.abspath, files))
    if odd := next((path for path in paths if "::" in path or "://" in path), None):
        raise DetailFlowError(
            f"{odd} cannot be streamed, since '::' stands for an address: rename it, or leave streaming off"
        )
    try:
        with quiet(datasets):  # `datasets` takes paths for patterns
            return datasets.load_dataset("webdataset", data_files=[*map(escape, paths)], split="train", streaming=True)
    except Exception as error:
        raise DetailFlowError(f"{name} cannot be read ({first_line(error.__cause__ or error)})") from error
