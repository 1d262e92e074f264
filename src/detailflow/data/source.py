"""A set of labelled images that are read one at a time, and what is known of it without reading them."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, Protocol

import numpy as np
from PIL import Image

from detailflow.errors import DetailFlowError

_CLASSES_SHOWN = 10  # more are only counted


class Rows(Protocol):
    """Where a set's images lie."""

    def __len__(self) -> int: ...
    def name(self, index: int) -> str:
        """Of an image, for messages."""

    def image(self, index: int, least: int | None = None) -> Image.Image:
        """As RGB; see `load_rgb`."""

    def listing(self) -> Iterable[tuple[str | int, ...]]:
        """What the images are stored in, without reading it: of each file its name within the set and its bytes."""


class ImageSource:
    """A set of labelled images in a fixed order; made by `open_images`.

    Attributes:
        labels: (len,) int64, each an index into `class_names`.
        class_names: a set without labels has the one class "image".
        where: what the user called the set.
    """

    def __init__(self, rows: Rows, labels: np.ndarray, class_names: tuple[str, ...], where: str = "images") -> None:
        self._rows, self.labels, self.class_names, self.where = rows, labels, class_names, where

    @property
    def counts(self) -> dict[str, int]:
        """Class name → images. Two classes of one name count together."""
        result: dict[str, int] = {}
        for name, count in zip(self.class_names, np.bincount(self.labels, minlength=len(self.class_names)), strict=True):
            result[name] = result.get(name, 0) + int(count)
        return result

    @property
    def fingerprint(self) -> str:
        """A checksum of the listing: each file's name within the set and its size, and the images' classes.

        It does not depend on where the set is or by which path it was opened. No image is read for it.

        Raises:
            DetailFlowError: if a file is not there any more.
        """
        return fingerprint(self._rows.listing(), self.class_names, self.labels.astype("<i8").tobytes())

    @property
    def summary(self) -> str:
        """One line on what the set holds."""
        return f"{self.where}: {describe(len(self), self.counts)}"

    def __len__(self) -> int:
        return len(self._rows)

    def name(self, index: int) -> str:
        """Where the image lies, for messages: a path, "file.parquet row 17" or "shard.tar key"."""
        return self._rows.name(index)

    def image(self, index: int, least: int | None = None) -> Image.Image:
        """The image as RGB; a JPEG may come smaller, its shorter side at least `least` pixels. Raises DetailFlowError,
        naming it, when it cannot be read."""
        return self._rows.image(index, least)

    def readable(self) -> Iterator[Image.Image]:
        """The images in order, without those that cannot be read."""
        for index in range(len(self)):
            with suppress(DetailFlowError):
                yield self.image(index)


def fingerprint(listing: Iterable[tuple[str | int, ...]], class_names: Sequence[str], labels: bytes = b"") -> str:
    """Return the SHA-256 of a set's listing, its class names and its labels, in hex."""
    digest = hashlib.sha256()
    for entry in (*listing, ("classes", *class_names)):
        digest.update(json.dumps(entry).encode() + b"\n")
    digest.update(labels)
    return digest.hexdigest()


def file_sizes(files: Iterable[str | os.PathLike[str]], root: str | os.PathLike[str]) -> Iterator[tuple[str, int]]:
    """Yield each file's name within `root` and its bytes.

    Raises:
        DetailFlowError: if a file is not there any more.
    """
    start = len(os.path.join(os.path.abspath(root), ""))
    for file in map(os.path.abspath, files):
        try:
            yield file[start:].replace(os.sep, "/"), os.stat(file).st_size
        except OSError as error:
            raise DetailFlowError(f"{file} cannot be read ({error.strerror}): it was there when the set was opened") from error


def common_folder(files: Sequence[str]) -> str:
    """Return the deepest folder that holds all of these files."""
    return os.path.commonpath([os.path.dirname(os.path.abspath(file)) for file in files])


def describe(count: int, counts: Mapping[str, int]) -> str:
    """Return "60 images in 3 classes (cat 20, dog 20, fish 20)"."""
    images = f"{count:,} image{'s' * (count != 1)}"
    if tuple(counts) == ("image",):
        return f"{images} without classes"
    classes = f"{len(counts):,} class{'es' * (len(counts) != 1)}"
    if len(counts) <= _CLASSES_SHOWN:
        return f"{images} in {classes} ({', '.join(f'{name} {number:,}' for name, number in counts.items())})"
    fewest, most = min(counts.values()), max(counts.values())
    return f"{images} in {classes} of {fewest:,}{f' to {most:,}' if most > fewest else ''}"


def unlabelled(rows: Rows) -> ImageSource:
    """A set that has no labels."""
    return ImageSource(rows, np.zeros(len(rows), np.int64), ("image",))


def labelled(rows: Rows, where: str, values: Sequence[Any], class_names: tuple[str, ...] = ()) -> ImageSource:
    """A set whose labels stand beside its images as class numbers or names; `None` and −1 (the hub's mark of a hidden label)
    are none. Raises DetailFlowError where only some images have one, or for labels of another kind.
    """
    given = np.array(values, dtype=object)
    missing = np.array([value is None or value == -1 for value in values])
    if missing.all():
        return unlabelled(rows)
    if missing.any():
        raise DetailFlowError(f"{rows.name(int(missing.argmax()))} has no label: give every image one, or none")
    if all(isinstance(value, str) for value in values):
        names, labels = np.unique(given.astype(str), return_inverse=True)
        return ImageSource(rows, labels.astype(np.int64), tuple(names.tolist()))
    if not all(isinstance(value, int) and value >= 0 for value in values):
        raise DetailFlowError(f"{where} has labels that are neither class numbers nor names")
    labels = given.astype(np.int64)
    class_names = class_names or tuple(map(str, range(labels.max() + 1)))
    if labels.max() >= len(class_names):
        raise DetailFlowError(f"{where} has the label {labels.max()}, but names only {len(class_names)} classes")
    return ImageSource(rows, labels, class_names)
