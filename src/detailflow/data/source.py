"""A set of labelled images that are read one at a time, and what is known about it without reading them."""

import hashlib
import json
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import chain
from typing import Any, Protocol

import numpy as np
from PIL import Image

from detailflow.data.image_files import image_size, load_rgb
from detailflow.data.notes import Notes, describe, describe_classes, describe_sizes
from detailflow.errors import DetailFlowError, NotThereError, explained
from detailflow.files import check_regular, similar
from detailflow.labels import UNLABELLED
from detailflow.words import printable

_SIZES_READ = 256  # images whose headers are read for a summary
_MOST_CLASSES = 10**6
_MOST_LABELS = 64  # of an image


class Rows(Protocol):
    """How the images of a set are stored."""

    def __len__(self) -> int: ...
    def name(self, index: int) -> str:
        """Return an image's path, "file.parquet row 17" or "shard.tar key", for messages."""

    def stored(self, index: int) -> str | bytes:
        """Return the path of an image's file, or its bytes."""

    def listing(self) -> Iterable[tuple[str | int, ...]]:
        """Return each file's name within the set, its bytes and what else identifies it, without reading images."""

    def stamps(self) -> np.ndarray:
        """Return the bytes of each image's file: another image in its place rarely has as many."""


class _Subset:
    """Some of the rows of others."""

    def __init__(self, rows: Rows, indices: Sequence[int]) -> None:
        self.rows, self.indices = rows, indices

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, index: int) -> str:
        return self.rows.name(self.indices[index])

    def stored(self, index: int) -> str | bytes:
        return self.rows.stored(self.indices[index])

    def listing(self) -> Iterable[tuple[str | int, ...]]:
        return [*self.rows.listing(), tuple(self.indices)]

    def stamps(self) -> np.ndarray:
        return self.rows.stamps()[list(self.indices)]


class ImageSource:
    """A set of labelled images in a fixed order; made by `open_images`.

    Attributes:
        labels: (len,) int64, each an index into `class_names`: an image's label, or its first one.
        all_labels: (len, most) int64, all labels of each image, the first one first; −1 after the last.
        class_names: a set without labels has the one class "image".
        where: what the user called the set.
        notes: its splits, what was left aside, and what is probably a mistake.
    """

    def __init__(self, rows: Rows, labels: np.ndarray, class_names: tuple[str, ...]) -> None:
        self.all_labels = labels if labels.ndim == 2 else labels[:, None]
        self._rows, self.labels, self.class_names = rows, self.all_labels[:, 0].copy(), class_names
        self.where, self.notes = "images", Notes()
        self.kept: Any = None  # decoded images; see data/memory.py

    def subset(self, indices: Sequence[int]) -> "ImageSource":
        """Return a set of some of the images, with all the classes."""
        return ImageSource(_Subset(self._rows, indices), self.all_labels[indices], self.class_names)

    @property
    def counts(self) -> dict[str, int]:
        """Return class name → images with this label; classes of one name have their numbers behind it."""
        return count_classes(self.all_labels, self.class_names)

    @property
    def fingerprint(self) -> str:
        """Return a checksum of each file's name within the set and its size, and of the images' classes.

        It does not depend on where the set is or by which path it was opened. No image is read for it.
        """
        return fingerprint(self._rows.listing(), self.class_names, self.all_labels.astype("<i8").tobytes())

    @property
    def stamps(self) -> np.ndarray:
        """Return a number for each image, (len,) int64, to notice another image in its place; none is read."""
        return self._rows.stamps().astype(np.int64)

    @property
    def summary(self) -> str:
        """Return one line on the set and what was left aside. Reads the headers of up to 256 images."""
        sizes, count = [], min(len(self), _SIZES_READ)
        for number in range(count):
            with suppress(DetailFlowError):
                sizes.append(self.size(number * len(self) // count))
        text = describe_sizes(sizes)
        if text and count < len(self):
            text += f" ({count} looked at)"
        return self.described(text)

    def described(self, sizes: str, unreadable: int = 0) -> str:
        """Return one line on the set, given its sizes and the number of unreadable images."""
        images = describe_classes(self.counts, len(self))
        if unreadable:
            images += f", {unreadable:,} of them unreadable"
        return describe(self.where, images, sizes, self.notes)

    def __len__(self) -> int:
        return len(self._rows)

    def __getstate__(self) -> dict[str, Any]:
        """Return all but the notes and decoded images, which would be sent to every worker process."""
        return {**self.__dict__, "notes": Notes(), "kept": None}

    def name(self, index: int) -> str:
        """Return an image's name for messages: a path, "file.parquet row 17" or "shard.tar key"."""
        return printable(self._rows.name(index))

    def image(self, index: int, least: int | None = None) -> Image.Image:
        """Return an image as RGB; a JPEG may come smaller, its shorter side at least `least` pixels."""
        return load_rgb(self._rows.stored(index), self.name(index), least)

    def size(self, index: int) -> tuple[int, int]:
        """Return an image's width and height, from its header."""
        return image_size(self._rows.stored(index), self.name(index))

    def stored_bytes(self, index: int) -> bytes:
        """Return what is stored of an image, not decoded."""
        stored, name = self._rows.stored(index), self.name(index)
        if isinstance(stored, bytes):
            return stored
        with explained(f"{name} cannot be read"):
            check_regular(stored)
            with open(stored, "rb") as file:
                return file.read()

    def stored_size(self, index: int) -> int:
        """Return the number of bytes that are stored of an image; a file of its own is not read for it."""
        stored = self._rows.stored(index)
        if isinstance(stored, bytes):
            return len(stored)
        with explained(f"{self.name(index)} cannot be read"):
            return os.stat(stored).st_size

    def some(self, count: int) -> Iterator[Image.Image]:
        """Yield up to `count` images spread over the set; the nearest one before replaces one that cannot be read."""
        before = -1
        for index in spread(len(self), min(count, len(self))):
            for candidate in range(index, before, -1):
                with suppress(DetailFlowError):
                    yield self.image(candidate)
                    break
            before = index


def not_there(name: str, also: str = "") -> NotThereError:
    """Return the error that a set of images does not exist; `also` names what might be given besides sets."""
    sets = "a folder of images, .parquet or .tar files, or a hub name (owner/name)"
    give = f"give {also and f'{also}, '}{sets}"
    if os.path.exists(name):  # a device, a pipe
        return NotThereError(f"{name} is not a regular file, nor a folder: {give}")
    return NotThereError(f"{name} does not exist: {similar(name) or give}")


def count_classes(labels: np.ndarray, names: Sequence[str]) -> dict[str, int]:
    """Return the number of labels of each class by its name: "cat", or "crane (134)" of two classes called crane.

    Numbers below 0 are not labels.
    """
    times = Counter(names)
    counts = np.bincount(labels[labels >= 0], minlength=len(names)).tolist()
    shown = (name if times[name] == 1 else f"{name} ({number})" for number, name in enumerate(names))
    return dict(zip(shown, counts, strict=True))


def spread(total: int, count: int) -> list[int]:
    """Return `count` of the numbers below `total`, evenly spaced: a set may be sorted by class."""
    return [((i + 1) * total - 1) // count for i in range(count)]


def tolerated(count: int) -> int:
    """Return how many of `count` images may be unreadable: 1%, but at least one. More stop whatever reads them."""
    return max(1, count // 100)


def fingerprint(listing: Iterable[tuple[str | int, ...]], class_names: Sequence[str], labels: bytes = b"") -> str:
    """Return the SHA-256 of a set's listing, its class names and its labels, in hex."""
    digest = hashlib.sha256()
    for entry in (*listing, ("classes", *class_names)):
        digest.update(json.dumps(entry).encode() + b"\n")
    digest.update(labels)
    return digest.hexdigest()


def class_order(names: Iterable[str]) -> list[str]:
    """Return the names in the classes' order: by number if all are numbers, else by code point."""
    names = sorted(set(names))
    if all(re.fullmatch("-?[0-9]{1,1000}", name) for name in names):
        names.sort(key=lambda name: (int(name), len(name)))
    return names


def labelled(
    rows: Rows,
    where: str,
    values: Sequence[Any] | None,
    class_names: tuple[str, ...] = (),
    *,
    no_label: Sequence[Any] = (None, -1, "", "-1"),
) -> ImageSource:
    """Return the set of these images and their labels, which are class numbers or names, or none at all.

    A list has several labels of its image. An empty one and what is in `no_label` (-1 is the hub's mark of a hidden
    label, as a number or as text) are not a label: either all images have one, or none.
    """
    if _are_vectors(values or ()):
        raise DetailFlowError(
            f"{where} has lists of zeros and ones as labels, a place for each class: give class numbers or names"
        )
    lists = [_listed(value, no_label) for value in values or ()]
    counts = np.array([len(labels) for labels in lists], np.int64)
    if not counts.any():
        return ImageSource(rows, np.zeros(len(rows), np.int64), UNLABELLED)
    if not counts.all():
        raise DetailFlowError(f"{rows.name(int(counts.argmin()))} has no label: give every image one, or none")
    if (most := int(counts.max())) > _MOST_LABELS:
        raise DetailFlowError(
            f"{rows.name(int(counts.argmax()))} has {most} labels, and an image may have {_MOST_LABELS}"
        )
    numbers, class_names = _numbered(where, list(chain.from_iterable(lists)), class_names)
    table = np.full((len(rows), most), -1, np.int64)
    table[np.arange(most) < counts[:, None]] = numbers
    return ImageSource(rows, table, class_names)


def _are_vectors(values: Sequence[Any]) -> bool:
    """Tell vectors with a place for each class (one-hot) from lists of class numbers, which are of any length.

    That every image has both classes, 0 and 1, is unlikely, but possible if all say it in one order.
    """
    first = values[0] if values else None
    if not isinstance(first, list) or len(first) < 2 or (len(first) == 2 and all(value == first for value in values)):
        return False
    return all(
        isinstance(value, list) and len(value) == len(first) and all(one in (0, 1, "0", "1") for one in value)
        for value in values
    )


def _listed(value: Any, no_label: Sequence[Any]) -> list[Any]:
    """Return the labels of an image, each once; blank text is as good as empty."""
    several = value if isinstance(value, list) else [value]
    some = [label for label in several if (label.strip() if isinstance(label, str) else label) not in no_label]
    return [label for i, label in enumerate(some) if label not in some[:i]]


def _numbered(where: str, values: list[Any], class_names: tuple[str, ...]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return the class numbers of labels, and what the classes are called."""
    if all(isinstance(value, str) for value in values):
        return _named(where, values)
    if not all(isinstance(value, int) and value >= 0 for value in values):
        wrong = next((value for value in values if not isinstance(value, int | str)), None)
        if wrong is None and any(isinstance(value, str) for value in values):
            number, name = (next(value for value in values if isinstance(value, kind)) for kind in (int, str))
            raise DetailFlowError(f"{where} has class numbers and names, such as {number} and {name!r}: give one kind")
        wrong = min(values) if wrong is None else wrong
        raise DetailFlowError(f"{where} has the label {wrong!r}, which is neither a class number nor a name")
    highest = max(values)
    if highest >= _MOST_CLASSES:  # as many names would be made
        raise DetailFlowError(f"{where} has a label of {_MOST_CLASSES:,} or more: class numbers count from 0")
    class_names = class_names or tuple(map(str, range(highest + 1)))
    if highest >= len(class_names):
        raise DetailFlowError(f"{where} has the label {highest}, but names only {len(class_names)} classes")
    return np.array(values, np.int64), class_names


def _named(where: str, names: Sequence[str]) -> tuple[np.ndarray, tuple[str, ...]]:
    classes = class_order(names)
    shown = tuple(map(printable, classes))
    looks = [unicodedata.normalize("NFC", name).strip() for name in shown]
    if len(set(looks)) < len(looks):  # names that are not UTF-8, or that differ only in a space at their end
        raise DetailFlowError(f"{where} has several classes called {max(looks, key=looks.count)}: rename them")
    numbers = {name: number for number, name in enumerate(classes)}
    return np.array([numbers[name] for name in names], np.int64), shown
