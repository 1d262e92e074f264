"""Hub data sets that are read as a stream, without being downloaded first.

A stream has no random access: its files are shuffled, then its images, through a buffer that they are drawn from.
"""

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from detailflow.data.columns import ask_for_labels
from detailflow.data.image_files import load_rgb
from detailflow.data.images import find
from detailflow.data.notes import Notes, describe
from detailflow.data.source import fingerprint
from detailflow.data.tables import check_columns, import_datasets, load_hub, stored_image
from detailflow.distributed import World
from detailflow.errors import DetailFlowError, explained
from detailflow.labels import UNLABELLED

_log = logging.getLogger(__name__)


@dataclass(eq=False)
class StreamSource:
    """A set of images that is read as a stream; made by `open_stream`.

    Attributes:
        dataset: the rows, as the `datasets` library streams them.
        label_column: `None` if the set does not name its classes: then every label is 0, since nobody knows its
            classes without reading all of it.
        num_images: how many it has, if that is known.
        identity: its name, split, version and sizes.
        question: what the user may have meant instead.
    """

    dataset: Any
    name: str
    image_column: str
    label_column: str | None
    class_names: tuple[str, ...]
    num_images: int | None
    identity: tuple[str, ...]
    question: str = ""

    def __post_init__(self) -> None:
        features, kind = self.dataset.features, import_datasets().Image
        if isinstance(features[self.image_column], kind):
            self.dataset = self.dataset.cast_column(self.image_column, kind(decode=False))
        if not self.class_names:
            self.class_names, self.label_column = UNLABELLED, None
        columns = [self.image_column, self.label_column, "__url__", "__key__"]
        self.dataset = self.dataset.select_columns([column for column in columns if column in features])

    @property
    def counts(self) -> dict[str, int]:
        """Return class name → images if that is known without reading all of the set; else nothing."""
        return {"image": self.num_images} if self.num_images and self.class_names == UNLABELLED else {}

    @property
    def fingerprint(self) -> str:
        """Return a checksum of the set's name, version, sizes and classes."""
        return fingerprint([self.identity], self.class_names)

    @property
    def summary(self) -> str:
        """Return one line on the set."""
        count = "an unknown number of" if self.num_images is None else f"{self.num_images:,}"
        classes = "without classes" if self.class_names == UNLABELLED else f"in {len(self.class_names):,} classes"
        return describe(self.name, f"{count} images {classes}", "streamed", Notes(question=self.question))

    def records(self, rng: np.random.Generator, buffer: int, world: World) -> Iterator[dict[str, Any]]:
        """Yield this process's part once, shuffled; images are not decoded yet."""
        # The library shuffles the files; its own buffer of images cannot hold more than 2 GB.
        rows = self._part(world).shuffle(seed=int(rng.integers(2**31)), buffer_size=1)
        waiting: list[dict[str, Any]] = []
        # The errors are the network's, the file system's and Arrow's: `datasets` passes many kinds on.
        with explained(f"{self.name} cannot be read any further", Exception):
            for row in rows:
                if len(waiting) < buffer:
                    waiting.append(row)
                else:
                    drawn = int(rng.integers(buffer))
                    row, waiting[drawn] = waiting[drawn], row
                    yield row
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
        if isinstance(label, list):  # several labels of an image, as `ImageSource.labels` has them
            label = label[0] if label else None
        if not isinstance(label, int) or not 0 <= label < len(self.class_names):
            raise DetailFlowError(
                f"{name} has the label {label!r}, not a number of the {len(self.class_names)} classes"
            )
        return load_rgb(stored_image(record[self.image_column], name, (), urls=True), name, least), label


def open_stream(
    data: str | os.PathLike[str],
    *,
    split: str | None = None,
    image_column: str = "image",
    label_column: str = "label",
) -> StreamSource:
    """Open a data set on the hub to be read as a stream.

    If it is of WebDataset shards, the image column is the images' suffix ("jpg"); "image" is the first there is.
    """
    found = find(data, split)
    if found.kind != "hub":
        raise DetailFlowError(f"{data} is on this machine, and only hub data sets are streamed: leave streaming off")
    name, datasets = found.where, import_datasets()
    dataset = load_hub(name, found.split, streaming=True)
    info, sizes = dataset.info, (dataset.info.splits or {}).get(found.split)
    if dataset.features is None:
        raise DetailFlowError(
            f"{name} does not say what its columns are, so it cannot be streamed: leave streaming off"
        )
    images = [column for column, feature in dataset.features.items() if isinstance(feature, datasets.Image)]
    if image_column == "image" and "__key__" in dataset.features and images:
        image_column = images[0]
    names = check_columns(name, dataset.features, image_column, label_column)
    identity = (name, found.split, str(info.version), str(info.download_checksums), str(sizes))
    count = sizes.num_examples or None if sizes else None
    others = set(dataset.features) - {image_column}
    question = ask_for_labels(name, label_column, others) if names is None else ""
    source = StreamSource(dataset, name, image_column, label_column, names or (), count, identity, question)
    _log.info("%s", source.summary)
    return source
