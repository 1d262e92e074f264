"""`detailflow data`: what a set of images holds, and what is wrong with it."""

import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from detailflow.cli.common import Parser, expanded
from detailflow.errors import DetailFlowError, printable

if TYPE_CHECKING:
    from detailflow.data.examine import Examined
    from detailflow.data.images import ImageSource

_LINES = 10  # of each kind that are shown; --json has all


def parser() -> Parser:
    """The command's options."""
    result = Parser(
        "data",
        "DATA",
        "Say what training, extraction and evaluation would read: images, classes, splits and sizes, what is left aside and "
        "why, unreadable files and duplicates. Reads every image. The exit status is 2 if they cannot be used.",
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
    """Print what is known of the set."""
    args = parser().parse_args(argv)

    from detailflow.data.examine import examine
    from detailflow.data.images import open_images

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they are in `notes`, too
        source = open_images(
            args.data, split=args.split, image_column=args.image_column, label_column=args.label_column
        )
        splits = dict(_splits(source, args.data, args.image_column, args.label_column))
    found = examine(source)
    if args.json:
        print(json.dumps(_facts(source, found, splits), indent=2))
    else:
        print("\n".join(map(printable, _text(source, found, splits))))
    if not found.usable:
        raise DetailFlowError(
            f"{len(found.unreadable)} of the {found.total} images cannot be read, more than 1%: remove or replace them"
        )
    return 0


def _splits(source: "ImageSource", data: str, image_column: str, label_column: str) -> Iterator[tuple[str, int | None]]:
    """Each split and its images; `None` for one that cannot be opened."""
    from detailflow.data.images import open_images

    for split in source.notes.splits:
        count = len(source) if split == source.notes.split else None
        if count is None:
            with suppress(DetailFlowError):
                count = len(open_images(data, split=split, image_column=image_column, label_column=label_column))
        yield split, count


def _facts(source: "ImageSource", found: "Examined", splits: dict[str, int | None]) -> dict[str, Any]:
    by_area = sorted(found.sizes, key=lambda size: (size[0] * size[1], size))
    return {
        "data": source.where,
        "summary": source.summary,
        "images": len(source),
        "classes": source.counts,
        "split": source.notes.split,
        "splits": splits,
        "sizes": {"smallest": by_area[0], "largest": by_area[-1]} if by_area else None,
        "left_aside": source.notes.left_aside,
        "unreadable": found.unreadable,
        "duplicates": found.duplicates,
        "warnings": [printable(warning) for warning in source.notes.warnings],
        "question": source.notes.question or None,
        "fingerprint": source.fingerprint,
        "usable": found.usable,
    }


def _text(source: "ImageSource", found: "Examined", splits: dict[str, int | None]) -> Iterator[str]:
    from detailflow.data.folder import plural, why
    from detailflow.data.source import describe_sizes

    notes = source.notes
    yield source.summary
    if len(splits) > 1:
        yield from (
            "",
            "splits",
            *(f"  {name}  {'not readable' if n is None else f'{n:,}'}" for name, n in splits.items()),
        )
    if source.class_names != ("image",):
        longest = max(map(len, source.counts))
        yield from ("", "classes", *(f"  {name.ljust(longest)}  {count:,}" for name, count in source.counts.items()))
    if found.sizes:
        (width, height), times = found.sizes.most_common(1)[0]
        often = f", most often {width}×{height} ({times:,})" if len(found.sizes) > 1 else ""
        yield from ("", f"sizes: {describe_sizes(list(found.sizes))}{often}")
    for kind, names in notes.left_aside.items():
        reason = f" ({why(kind)})" if why(kind) else ""
        yield from _listed(f"left aside: {len(names):,} {plural(kind) if len(names) != 1 else kind}{reason}", names)
    yield from _listed(f"unreadable: {len(found.unreadable):,}", list(found.unreadable.values()))
    yield from _listed(
        f"the same file several times: {len(found.duplicates):,}", [" = ".join(g) for g in found.duplicates]
    )
    yield from _listed("warnings", notes.warnings)
    if notes.question:
        yield from ("", notes.question)


def _listed(title: str, lines: Sequence[str]) -> Iterator[str]:
    if lines:
        yield from ("", title, *(f"  {line}" for line in lines[:_LINES]))
    if len(lines) > _LINES:
        yield f"  and {len(lines) - _LINES:,} more (--json lists all)"
