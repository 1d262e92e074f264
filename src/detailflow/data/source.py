"""A set of labelled images that are read one at a time, and what is known of it without reading them."""

import hashlib
import json
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, Protocol

import numpy as np
from PIL import Image

from detailflow.data.decode import image_size, load_rgb
from detailflow.data.folder import Notes
from detailflow.errors import DetailFlowError, printable

_CLASSES_SHOWN = 10  # more are only counted
_SIZES_READ = 256  # images whose headers are read for a summary


class Rows(Protocol):
    """Where a set's images lie."""

    def __len__(self) -> int: ...
    def name(self, index: int) -> str:
        """Of an image, for messages."""

    def stored(self, index: int) -> str | bytes:
        """The path of an image's file, or its bytes."""

    def listing(self) -> Iterable[tuple[str | int, ...]]:
        """What the images are stored in, without reading it: of each file its name within the set and its bytes."""


class ImageSource:
    """A set of labelled images in a fixed order; made by `open_images`.

    Attributes:
        labels: (len,) int64, each an index into `class_names`.
        class_names: a set without labels has the one class "image".
        where: what the user called the set.
        notes: its splits, what was left aside, and what is probably a mistake.
    """

    def __init__(self, rows: Rows, labels: np.ndarray, class_names: tuple[str, ...], where: str = "images") -> None:
        self._rows, self.labels, self.class_names = rows, labels, class_names
        self.where, self.notes = where, Notes()

    @property
    def counts(self) -> dict[str, int]:
        """Class name → images. Two classes of one name count together."""
        result: dict[str, int] = {}
        for name, count in zip(
            self.class_names, np.bincount(self.labels, minlength=len(self.class_names)), strict=True
        ):
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
        """One line on what the set holds and what was left aside. Reads the headers of up to 256 images."""
        return describe(self.where, len(self), self.counts, self.notes, self._sizes())

    def __len__(self) -> int:
        return len(self._rows)

    def __getstate__(self) -> dict[str, Any]:
        """All but what is only said once, which may be long: it would travel to every worker process."""
        return {**self.__dict__, "notes": Notes()}

    def name(self, index: int) -> str:
        """Where the image lies, for messages: a path, "file.parquet row 17" or "shard.tar key"."""
        return printable(self._rows.name(index))

    def image(self, index: int, least: int | None = None) -> Image.Image:
        """The image as RGB; a JPEG may come smaller, its shorter side at least `least` pixels. Raises DetailFlowError,
        naming it, when it cannot be read."""
        return load_rgb(self._rows.stored(index), self.name(index), least)

    def size(self, index: int) -> tuple[int, int]:
        """Return an image's width and height, from its header.

        Raises:
            DetailFlowError: naming it, if the header cannot be read.
        """
        return image_size(self._rows.stored(index), self.name(index))

    def stored_bytes(self, index: int) -> bytes:
        """Return what is stored of an image, not decoded.

        Raises:
            DetailFlowError: naming it, if it cannot be read.
        """
        stored = self._rows.stored(index)
        return stored if isinstance(stored, bytes) else read_file(stored, self.name(index))

    def _sizes(self) -> str:
        """ "32×32 to 400×300" of up to 256 images spread over the set."""
        sizes = []
        for number in range(min(len(self), _SIZES_READ)):
            with suppress(DetailFlowError):
                sizes.append(self.size(number * len(self) // min(len(self), _SIZES_READ)))
        text = describe_sizes(sizes)
        return text if len(self) <= _SIZES_READ or not text else f"{text} ({_SIZES_READ} looked at)"

    def readable(self) -> Iterator[Image.Image]:
        """The images in order, without those that cannot be read."""
        for index in range(len(self)):
            with suppress(DetailFlowError):
                yield self.image(index)

    def some(self, count: int) -> Iterator[Image.Image]:
        """Yield up to `count` images spread over the set; one that cannot be read gives way to one before it."""
        before = -1
        for index in spread(len(self), min(count, len(self))):
            for candidate in range(index, before, -1):
                with suppress(DetailFlowError):
                    yield self.image(candidate)
                    break
            before = index


def spread(total: int, count: int) -> list[int]:
    """Return `count` of the numbers below `total`, evenly: a set may be sorted by class."""
    return [((i + 1) * total - 1) // count for i in range(count)]


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
            raise DetailFlowError(
                f"{file} cannot be read ({error.strerror}): it was there when the set was opened"
            ) from error


def common_folder(files: Sequence[str]) -> str:
    """Return the deepest folder that holds all of these files."""
    return os.path.commonpath([os.path.dirname(os.path.abspath(file)) for file in files])


def describe(where: str, count: int, counts: Mapping[str, int], notes: Notes, sizes: str = "") -> str:
    """Return "photos: 60 images in 3 classes (cat 20, dog 20, fish 20), 32×32 to 64×48; left aside: 2 archives"."""
    images = f"{count:,} image{'s' * (count != 1)}"
    classes = f"{len(counts):,} class{'es' * (len(counts) != 1)}"
    if tuple(counts) == ("image",):
        images += " without classes"
    elif len(counts) <= _CLASSES_SHOWN:
        images += f" in {classes} ({', '.join(f'{name} {number:,}' for name, number in counts.items())})"
    else:
        fewest, most = min(counts.values()), max(counts.values())
        images += f" in {classes} of {fewest:,}{f' to {most:,}' if most > fewest else ''}"
    split = f" (split {notes.split} of {', '.join(notes.splits)})" if notes.split else ""
    parts = [f"{where}{split}: {', '.join(filter(None, (images, sizes)))}"]
    if aside := notes.aside():
        parts.append(f"left aside: {aside}")
    if notes.question:
        parts.append(notes.question)
    return printable("; ".join(parts))


def describe_sizes(sizes: Sequence[tuple[int, int]]) -> str:
    """Return the smallest and the largest of (width, height) as "32×32 to 400×300"; "" of none."""
    if not sizes:
        return ""
    by_area = sorted(sizes, key=lambda size: (size[0] * size[1], size))
    ends = [f"{width}×{height}" for width, height in dict.fromkeys((by_area[0], by_area[-1]))]
    return " to ".join(ends)


def tolerated(count: int) -> int:
    """Return how many of so many images may be unreadable: 1%, but at least one. More stop whatever reads them."""
    return max(1, count // 100)


def read_file(path: str, name: str) -> bytes:
    """Return a file's content.

    Raises:
        DetailFlowError: naming it, if it cannot be read.
    """
    try:
        if os.path.exists(path) and not os.path.isfile(path):  # reading a pipe or a device may never end
            raise DetailFlowError(f"{name} cannot be read: {path} is no regular file")
        with open(path, "rb") as file:
            return file.read()
    except (OSError, ValueError) as error:
        raise DetailFlowError(f"{name} cannot be read ({getattr(error, 'strerror', None) or error})") from error


def class_order(names: Iterable[str]) -> list[str]:
    """Return the names in the classes' order: by number if all are numbers, else by code point."""
    names = sorted(set(names))
    if all(re.fullmatch("-?[0-9]{1,1000}", name) for name in names):
        names.sort(key=lambda name: (int(name), len(name)))
    return names


def from_names(rows: Rows, names: Sequence[str], where: str) -> ImageSource:
    """A set whose images' classes are known by name.

    Raises:
        DetailFlowError: if two classes look the same, as names that are no UTF-8, or that differ in a space at their end, do.
    """
    classes = class_order(names)
    shown = tuple(map(printable, classes))
    looks = [unicodedata.normalize("NFC", name).strip() for name in shown]
    if len(set(looks)) < len(looks):
        raise DetailFlowError(f"{where} has several classes called {max(looks, key=looks.count)}: rename them")
    numbers = {name: number for number, name in enumerate(classes)}
    return ImageSource(rows, np.array([numbers[name] for name in names], np.int64), shown)


def unlabelled(rows: Rows) -> ImageSource:
    """A set that has no labels."""
    return ImageSource(rows, np.zeros(len(rows), np.int64), ("image",))


_MOST_CLASSES = 10**6


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
        return from_names(rows, values, where)
    if not all(isinstance(value, int) and value >= 0 for value in values):
        raise DetailFlowError(f"{where} has labels that are neither class numbers nor names")
    if max(values) >= _MOST_CLASSES:  # as many names would be made
        raise DetailFlowError(f"{where} has a label of {_MOST_CLASSES:,} or more: class numbers count from 0")
    labels = given.astype(np.int64)
    class_names = class_names or tuple(map(str, range(labels.max() + 1)))
    if labels.max() >= len(class_names):
        raise DetailFlowError(f"{where} has the label {labels.max()}, but names only {len(class_names)} classes")
    return ImageSource(rows, labels, class_names)
