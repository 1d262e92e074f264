"""`detailflow data`: what a set of images holds, and what is wrong with it."""

import argparse
import hashlib
import json
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from detailflow.cli.common import Parser, expanded
from detailflow.errors import DetailFlowError, printable

if TYPE_CHECKING:
    from detailflow.data.images import ImageSource

_LINES = 10  # of each kind that are shown; --json has all
_READERS = 4  # threads; Pillow lets them run at once
_CHUNK = 256  # images that are read ahead


def parser() -> Parser:
    """Return the command's options."""
    result = Parser(
        "data",
        "DATA",
        "Say what training, extraction and evaluation would read: images, classes, splits and sizes, what is "
        "left aside and why, unreadable files and duplicates. Reads every image. The exit status is 2 if they cannot be used.",
    )
    result.add_argument(
        "data", type=expanded, metavar="DATA", help="a folder, parquet or WebDataset files, or a hub name"
    )
    result.add_argument("--split", help="of the data, if there are several (default: train)")
    result.add_argument("--image-column", default="image", metavar="NAME", help="of parquet files and hub data sets")
    result.add_argument("--label-column", default="label", metavar="NAME", help="of these, and of metadata files")
    result.add_argument("--json", action="store_true", help="print all of it as one JSON object")
    return result


def main(argv: Sequence[str]) -> int:
    """Print a report on the set."""
    args = parser().parse_args(argv)

    from detailflow.data.images import tolerated

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they are in `notes`, too
        source = _open(args, args.split)
        splits = dict(_count_splits(source, args))
    found = _read_all(source)
    bad = len(found.unreadable)
    usable = bad <= tolerated(len(source)) and bad < len(source)
    if args.json:
        print(json.dumps(_as_json(source, found, splits) | {"usable": usable}, indent=2))
    else:
        print("\n".join(map(printable, _as_text(source, found, splits))))
    if not usable:
        raise DetailFlowError(f"{bad} of the {len(source)} images cannot be read, more than 1%: remove or replace them")
    return 0


def _open(args: argparse.Namespace, split: str | None) -> "ImageSource":
    from detailflow.data.images import open_images

    return open_images(args.data, split=split, image_column=args.image_column, label_column=args.label_column)


def _count_splits(source: "ImageSource", args: argparse.Namespace) -> Iterator[tuple[str, int | None]]:
    """Yield each split and its images; `None` for one that cannot be opened."""
    for split in source.notes.splits:
        count = len(source) if split == source.notes.split else None
        if count is None:
            with suppress(DetailFlowError):
                count = len(_open(args, split))
        yield split, count


@dataclass
class _Images:
    """What reading every image has shown."""

    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)  # (width, height) → images
    unreadable: dict[str, str] = field(default_factory=dict)  # name → what is wrong with it
    names: dict[bytes, list[str]] = field(default_factory=dict)  # checksum of the file → images

    @property
    def duplicates(self) -> list[list[str]]:
        """Return groups of images whose files are the same."""
        return [group for group in self.names.values() if len(group) > 1]


def _read_all(source: "ImageSource") -> _Images:
    from concurrent.futures import ThreadPoolExecutor

    from tqdm import tqdm

    from detailflow.data.decode import image_size, load_rgb

    found, total = _Images(), len(source)

    def read(index: int) -> tuple[bytes, tuple[int, int]] | str:
        try:
            content = source.stored_bytes(index)
            load_rgb(
                content, source.name(index), least=1
            )  # a JPEG as small as can be: all of it is read, which shows damage
            return hashlib.sha256(content).digest(), image_size(content, source.name(index))
        except DetailFlowError as error:
            return str(error)

    bar = tqdm(desc="reading", total=total, delay=2, leave=False, unit="img", dynamic_ncols=True)
    with bar, ThreadPoolExecutor(_READERS) as pool:
        for start in range(0, total, _CHUNK):
            for index, image in enumerate(pool.map(read, range(start, min(start + _CHUNK, total))), start):
                bar.update()
                if isinstance(image, str):
                    found.unreadable[source.name(index)] = image
                else:
                    found.sizes[image[1]] += 1
                    found.names.setdefault(image[0], []).append(source.name(index))
    return found


def _as_json(source: "ImageSource", found: _Images, splits: dict[str, int | None]) -> dict[str, Any]:
    from detailflow.data.summary import size_range

    sizes, notes = size_range(list(found.sizes)), source.notes
    return {
        "data": source.where,
        "summary": source.summary,
        "images": len(source),
        "classes": source.counts,
        "split": notes.split,
        "splits": splits,
        "sizes": {"smallest": sizes[0], "largest": sizes[-1]} if sizes else None,
        "left_aside": notes.left_aside,
        "unreadable": found.unreadable,
        "duplicates": found.duplicates,
        "warnings": list(map(printable, notes.warnings)),
        "question": notes.question or None,
        "fingerprint": source.fingerprint,
    }


def _as_text(source: "ImageSource", found: _Images, splits: dict[str, int | None]) -> Iterator[str]:
    from detailflow.data.summary import describe_sizes, plural, why

    notes, counts = source.notes, source.counts
    yield source.summary
    if len(splits) > 1:
        yield from ("", "splits")
        yield from (f"  {name}  {'not readable' if n is None else f'{n:,}'}" for name, n in splits.items())
    if source.class_names != ("image",):
        longest = max(map(len, counts))
        yield from ("", "classes", *(f"  {name.ljust(longest)}  {count:,}" for name, count in counts.items()))
    if found.sizes:
        (width, height), times = found.sizes.most_common(1)[0]
        often = f", most often {width}×{height} ({times:,})" if len(found.sizes) > 1 else ""
        yield from ("", f"sizes: {describe_sizes(list(found.sizes))}{often}")
    for kind, names in notes.left_aside.items():
        reason = f" ({why(kind)})" if why(kind) else ""
        yield from _list(f"left aside: {len(names):,} {plural(kind, len(names))}{reason}", names)
    yield from _list(f"unreadable: {len(found.unreadable):,}", list(found.unreadable.values()))
    duplicates = [" = ".join(group) for group in found.duplicates]
    yield from _list(f"the same file several times: {len(duplicates):,}", duplicates)
    yield from _list("warnings", notes.warnings)
    if notes.question:
        yield from ("", notes.question)


def _list(title: str, lines: Sequence[str]) -> Iterator[str]:
    if lines:
        yield from ("", title, *(f"  {line}" for line in lines[:_LINES]))
    if len(lines) > _LINES:
        yield f"  and {len(lines) - _LINES:,} more (--json lists all)"
