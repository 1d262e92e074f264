"""`detailflow data`: what a set of images holds, and what is wrong with it."""

import argparse
import hashlib
import json
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from detailflow.cli.common import SETS, Parser
from detailflow.errors import DetailFlowError
from detailflow.progress import progress_bar
from detailflow.settings import Location
from detailflow.words import one_line, printable

if TYPE_CHECKING:
    from detailflow.data.source import ImageSource

_LINES = 10  # of each kind that are shown; --json has all
_READERS = 4  # threads; Pillow lets them run at once
_CHUNK = 256  # images that are read ahead


def parser() -> Parser:
    """Return the command's options."""
    result = Parser(
        "data",
        "DATA",
        "Say what training, extraction and evaluation would read: images, classes, splits and sizes, what is "
        "left aside and why, unreadable files and duplicates. Reads every image. The exit status is 2 if they "
        "cannot be "
        "used.",
    )
    result.option("data", Location, help=SETS, metavar="DATA")
    result.option("--split", help="of the data, if there are several (default: train)")
    result.option("--image-column", default="image", help="of parquet files and hub data sets", metavar="NAME")
    result.option("--label-column", default="label", help="of these, and of metadata files", metavar="NAME")
    result.option("--json", bool, help="print all of it as one JSON object")
    return result


def main(argv: Sequence[str]) -> int:
    """Print a report on the set."""
    args = parser().parse_args(argv)

    from detailflow.data.notes import describe_amount, describe_sizes, size_range
    from detailflow.data.source import tolerated

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they are in `notes`, too
        source = _open(args, args.split)
        splits = dict(_count_splits(source, args))
    notes = source.notes
    sizes, unreadable, duplicates = _read_all(source)
    ends, summary = size_range(list(sizes)), source.described(describe_sizes(list(sizes)), len(unreadable))
    report = {
        "data": source.where,
        "summary": summary,
        "images": len(source),
        "classes": source.counts,
        "split": notes.split,
        "splits": splits,
        "expect": describe_amount(len(source)),
        "sizes": {"smallest": ends[0], "largest": ends[-1]} if ends else None,
        "left_aside": notes.left_aside,
        "unreadable": unreadable,
        "duplicates": duplicates,
        "warnings": list(map(printable, notes.warnings)),
        "question": notes.question or None,
        "fingerprint": source.fingerprint,
        "usable": len(unreadable) <= tolerated(len(source)) and len(unreadable) < len(source),
    }
    print(json.dumps(report, indent=2) if args.json else "\n".join(map(one_line, _as_text(report, sizes))))
    if not report["usable"]:
        raise DetailFlowError(
            f"{len(unreadable)} of the {len(source)} images cannot be read, more than 1%: remove or replace them"
        )
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


def _read_all(source: "ImageSource") -> tuple[Counter[tuple[int, int]], dict[str, str], list[list[str]]]:
    """Read every image; return how many have each size, what cannot be read and why, and groups of equal files."""
    from detailflow.data.image_files import image_size, load_rgb

    sizes: Counter[tuple[int, int]] = Counter()
    unreadable: dict[str, str] = {}
    by_content: dict[bytes, list[str]] = {}

    def read(index: int) -> tuple[bytes, tuple[int, int]] | str:
        try:
            content, name = source.stored_bytes(index), source.name(index)
            load_rgb(content, name, least=1)  # a JPEG as small as can be: all of it is read, which shows damage
            return hashlib.sha256(content).digest(), image_size(content, name)
        except DetailFlowError as error:
            return str(error)

    bar = progress_bar(desc="reading", total=len(source), unit="img")
    with bar, ThreadPoolExecutor(_READERS) as pool:
        for start in range(0, len(source), _CHUNK):
            indices = range(start, min(start + _CHUNK, len(source)))
            for index, image in zip(indices, pool.map(read, indices), strict=True):
                bar.update()
                if isinstance(image, str):
                    unreadable[source.name(index)] = image
                else:
                    sizes[image[1]] += 1
                    by_content.setdefault(image[0], []).append(source.name(index))
    return sizes, unreadable, [group for group in by_content.values() if len(group) > 1]


def _as_text(report: dict[str, Any], sizes: Counter[tuple[int, int]]) -> Iterator[str]:
    from detailflow.data.notes import describe_sizes, plural, why
    from detailflow.labels import UNLABELLED

    splits, classes = report["splits"], report["classes"]
    yield report["summary"]
    if len(splits) > 1:
        yield from ("", "splits")
        yield from (f"  {name}  {'not readable' if n is None else f'{n:,}'}" for name, n in splits.items())
    if tuple(classes) != UNLABELLED:
        names = list(map(one_line, classes))
        longest = max(map(len, names))
        counts = zip(names, classes.values(), strict=True)
        yield from ("", "classes", *(f"  {name.ljust(longest)}  {count:,}" for name, count in counts))
    if sizes:
        (width, height), times = sizes.most_common(1)[0]
        often = f", most often {width}×{height} ({times:,})" if len(sizes) > 1 else ""
        yield from ("", f"sizes: {describe_sizes(list(sizes))}{often}")
    yield from ("", f"what to expect: {report['expect']}")
    for kind, names in report["left_aside"].items():
        reason = f" ({why(kind)})" if why(kind) else ""
        yield from _list(f"left aside: {len(names):,} {plural(kind, len(names))}{reason}", names)
    yield from _list(f"unreadable: {len(report['unreadable']):,}", list(report["unreadable"].values()))
    duplicates = [" = ".join(group) for group in report["duplicates"]]
    yield from _list(f"the same file several times: {len(duplicates):,}", duplicates)
    yield from _list("warnings", report["warnings"])
    if report["question"]:
        yield from ("", report["question"])


def _list(title: str, lines: Sequence[str]) -> Iterator[str]:
    if lines:
        yield from ("", title, *(f"  {line}" for line in lines[:_LINES]))
    if len(lines) > _LINES:
        yield f"  and {len(lines) - _LINES:,} more (--json lists all)"
