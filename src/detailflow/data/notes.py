"""What is said of a set of images: how many, of which classes and sizes, and what was left aside."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from detailflow.data.image_files import REMEDIES
from detailflow.labels import UNLABELLED
from detailflow.words import one_line, printable, several

_CLASSES_SHOWN, _NAMES_SHOWN, _KINDS_SHOWN = 10, 3, 6  # more are only counted
MADE = "image made by detailflow"


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

    def ask(self, question: str) -> None:
        """Add to what the user may have meant."""
        self.question = "; ".join(filter(None, (self.question, question)))

    def aside(self) -> str:
        """Return "2 archives (a.zip, b.zip), 40 .heic", or "" if nothing was left aside."""
        kinds = sorted(self.left_aside.items(), key=lambda item: item[0].startswith("."))
        parts = [_counted(*item) for item in kinds[:_KINDS_SHOWN]]
        if more := sum(len(names) for _, names in kinds[_KINDS_SHOWN:]):
            parts.append(f"{more:,} of other kinds")
        return ", ".join(parts)


def _counted(kind: str, names: Sequence[str]) -> str:
    number = f"{len(names):,} {plural(kind, len(names))}"
    if kind in REMEDIES:
        return f"{number} ({why(kind)})"
    return number if kind.startswith(".") or len(names) > _NAMES_SHOWN else f"{number} ({', '.join(names)})"


def why(kind: str) -> str:
    """Return why files of a kind are left aside; "" if the kind itself tells."""
    if kind in REMEDIES:
        return REMEDIES[kind]
    if kind == "archive":
        return "images in archives are not read between image files: unpack them, or give the archives alone"
    if kind == MADE:
        return "it is read in a folder of its own, or under another name"
    return "not the suffix of an image file" if kind.startswith(".") else ""


def plural(kind: str, count: int) -> str:
    """Return "links to a folder" of "link to a folder" if there are several."""
    return kind if count == 1 else re.sub(r"\b(archive|folder|file|image|link)\b", r"\1s", kind, count=1)


def describe(where: str, images: str, sizes: str, notes: Notes) -> str:
    """Return "photos: 60 images in 3 classes (cat 20, dog 20, fish 20), 32×32 to 64×48; left aside: 2 archives"."""
    split = f" (split {notes.split} of {', '.join(notes.splits)})" if notes.split else ""
    aside = notes.aside()
    parts = [f"{where}{split}: {images}{sizes and ', '}{sizes}", aside and f"left aside: {aside}", notes.question]
    return one_line("; ".join(filter(None, parts)))


def describe_classes(counts: Mapping[str, int], total: int | None = None) -> str:
    """Return "60 images in 3 classes (cat 20, dog 20, fish 20)"; of many classes, the least and the most.

    If images have several labels, `total` is the number of images.
    """
    labels = sum(counts.values())
    total = labels if total is None else total
    images = several(total, "image")
    if labels > total:
        images += f" with {labels:,} labels"
    if tuple(counts) == UNLABELLED:
        return f"{images} without classes"
    classes = f"{images} in {several(len(counts), 'class')}"
    if len(counts) <= _CLASSES_SHOWN:
        return f"{classes} ({', '.join(f'{name} {number:,}' for name, number in counts.items())})"
    fewest, most = min(counts.values()), max(counts.values())
    return f"{classes} of {fewest:,}{f' to {most:,}' if most > fewest else ''}"


def describe_amount(images: int) -> str:
    """Return what a model can learn from so many images and no others, a sentence or three."""
    if images == 1:
        can = "is enough to see that everything works, and for no more."
    elif images < 200:
        can = "are enough to see that everything works. A model stays noise, or learns these very images by heart."
    elif images < 2_000:
        can = (
            "are few. Expect their colours and rough shapes, and copies of single images after long training. Images "
            "that are much alike, such as faces in one pose, go further than photographs of anything."
        )
    elif images < 20_000:
        can = (
            "teach what they have in common: layout, colours, textures. Things are recognisable if each class is alike."
        )
    elif images < 200_000:
        can = "are what CIFAR-10 has: most classes become recognisable at small sizes, after hours rather than minutes."
    else:
        can = "are many: the size of the model and the time of training are the limit, not the images."
    return f"{several(images, 'image')} {can}"


def size_range(sizes: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the smallest and the largest (width, height) by area, one if they are the same."""
    by_area = sorted(sizes, key=lambda size: (size[0] * size[1], size))
    return list(dict.fromkeys((by_area[0], by_area[-1]))) if by_area else []


def describe_sizes(sizes: Sequence[tuple[int, int]]) -> str:
    """Return the smallest and the largest of (width, height) as "32×32 to 400×300"; "" of none."""
    return " to ".join(f"{width}×{height}" for width, height in size_range(sizes))
