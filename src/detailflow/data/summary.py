"""What there is to say about a set of images: its splits, what was left aside, and one line on all of it."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from detailflow.data.decode import PLUGINS
from detailflow.errors import printable

_CLASSES_SHOWN, _NAMES_SHOWN, _KINDS_SHOWN = 10, 3, 6  # more are only counted


@dataclass
class Notes:
    """What was found beside the images of a set.

    Attributes:
        split: the split that was taken; `None` if there are none.
        splits: the names of all splits.
        left_aside: files that were not taken: kind, such as ".txt" or "archive" → names.
        warnings: what is probably a mistake, a sentence each.
        question: what the user may have meant instead.
    """

    split: str | None = None
    splits: tuple[str, ...] = ()
    left_aside: dict[str, list[str]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    question: str = ""

    def leave(self, kind: str, *names: str) -> None:
        """Add to what was left aside."""
        if names:
            self.left_aside.setdefault(kind, []).extend(map(printable, names))

    def aside(self) -> str:
        """Return "2 archives (a.zip, b.zip), 40 .heic", or "" if nothing was left aside."""
        kinds = sorted(self.left_aside.items(), key=lambda item: item[0].startswith("."))
        parts = [_counted(*item) for item in kinds[:_KINDS_SHOWN]]
        if more := sum(len(names) for _, names in kinds[_KINDS_SHOWN:]):
            parts.append(f"{more:,} of other kinds")
        return ", ".join(parts)


def _counted(kind: str, names: Sequence[str]) -> str:
    number = f"{len(names):,} {plural(kind, len(names))}"
    if kind in PLUGINS:
        return f"{number} ({why(kind)})"
    return number if kind.startswith(".") or len(names) > _NAMES_SHOWN else f"{number} ({', '.join(names)})"


def why(kind: str) -> str:
    """Return why files of a kind are left aside; "" if the kind itself tells."""
    if kind in PLUGINS:
        return f"read by {PLUGINS[kind]}"
    if kind == "archive":
        return "images in archives are not read between image files: unpack them, or give the archives alone"
    return "not the suffix of an image file" if kind.startswith(".") else ""


def plural(kind: str, count: int) -> str:
    """Return "links to a folder" of "link to a folder" if there are several."""
    return kind if count == 1 else re.sub(r"\b(archive|folder|file|image|link)\b", r"\1s", kind, count=1)


def describe(where: str, images: str, sizes: str, notes: Notes) -> str:
    """Return "photos: 60 images in 3 classes (cat 20, dog 20, fish 20), 32×32 to 64×48; left aside: 2 archives"."""
    split = f" (split {notes.split} of {', '.join(notes.splits)})" if notes.split else ""
    aside = notes.aside()
    parts = [f"{where}{split}: {images}{sizes and ', '}{sizes}", aside and f"left aside: {aside}", notes.question]
    return printable("; ".join(filter(None, parts)))


def describe_classes(counts: Mapping[str, int]) -> str:
    """Return "60 images in 3 classes (cat 20, dog 20, fish 20)"; of many classes, the least and the most."""
    total = sum(counts.values())
    images = f"{total:,} image{'s' * (total != 1)}"
    if tuple(counts) == ("image",):
        return f"{images} without classes"
    classes = f"{images} in {len(counts):,} class{'es' * (len(counts) != 1)}"
    if len(counts) <= _CLASSES_SHOWN:
        return f"{classes} ({', '.join(f'{name} {number:,}' for name, number in counts.items())})"
    fewest, most = min(counts.values()), max(counts.values())
    return f"{classes} of {fewest:,}{f' to {most:,}' if most > fewest else ''}"


def size_range(sizes: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the smallest and the largest (width, height) by area, one if they are the same."""
    by_area = sorted(sizes, key=lambda size: (size[0] * size[1], size))
    return list(dict.fromkeys((by_area[0], by_area[-1]))) if by_area else []


def describe_sizes(sizes: Sequence[tuple[int, int]]) -> str:
    """Return the smallest and the largest of (width, height) as "32×32 to 400×300"; "" of none."""
    return " to ".join(f"{width}×{height}" for width, height in size_range(sizes))
