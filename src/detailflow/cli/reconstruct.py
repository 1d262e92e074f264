"""`detailflow reconstruct`: images through the tokenizer and back."""

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from detailflow.cli.common import Parser, add_model_options, add_output_option, check_output
from detailflow.errors import DetailFlowError
from detailflow.progress import progress_bar
from detailflow.settings import Location, PositiveInt

if TYPE_CHECKING:
    from PIL import Image

    from detailflow.data.images import ImageSource

    Fit = Callable[[Image.Image], Image.Image]

OF_A_SET = 16  # images that are taken of a folder unless --num says otherwise


def parser() -> Parser:
    """Return the command's parser."""
    result = Parser(
        "reconstruct",
        "IMAGE …",
        "Encode images and decode them from their first 1, 2, 4, … tokens: a strip per image, the image from all "
        "of its tokens, and the PSNR in dB.",
    )
    images = "image files of any size, folders of them, parquet, WebDataset or a hub name; the centre square is used"
    result.option("images", tuple[Location, ...], help=images, metavar="IMAGE")
    result.option("--whole", bool, help="use the whole image in its own shape")
    result.option("--num", PositiveInt, OF_A_SET, "images of each folder or set", "N")
    add_output_option(result)
    add_model_options(result)
    return result


def main(argv: Sequence[str]) -> int:
    """Write `NAME-strip.png` and `NAME-reconstruction.png` for every image and print the table of PSNRs."""
    args = parser().parse_args(argv)
    check_output(args.output)

    from detailflow.data.images import tolerated
    from detailflow.files import output_names
    from detailflow.models.tokenizer import DetailFlowTokenizer
    from detailflow.pictures import strip, write_png
    from detailflow.pipeline import fit, reconstruct, stage_counts

    tokenizer = DetailFlowTokenizer.from_pretrained(args.model, device=args.device, dtype=args.dtype)
    schedule, given = tokenizer.schedule, progress_bar(args.images, desc="reading", unit="image")
    inputs = [
        item for path in given for item in _inputs(path, args.num, lambda image: fit(schedule, image, args.whole))
    ]
    names = output_names([name for name, _ in inputs])
    _check_replaced(args, names)

    rows, counts, bad = [], stage_counts(schedule), list[DetailFlowError]()
    with progress_bar(desc="reconstructing", total=len(inputs) * len(counts), unit="picture") as bar:
        for name, (_, read) in zip(names, inputs, strict=True):
            try:
                image = read()
            except DetailFlowError as error:
                bad.append(error)
                if len(bad) > tolerated(len(inputs)):
                    raise
                continue
            stages = []
            for stage in reconstruct(tokenizer, image, counts):
                stages.append(stage)
                bar.update()
            write_png(strip(stages, original=image), args.output / f"{name}-strip.png", "comparison")
            write_png(stages[-1].images[0], args.output / f"{name}-reconstruction.png", "reconstruction")
            rows.append([name, *(f"{stage.psnr:.2f}" for stage in stages)])
    if not rows:
        raise bad[0]
    _print_table(["PSNR (dB) at tokens:", *map(str, counts)], rows)
    each = "each image" if len(rows) > 1 else "it"
    print(f"wrote a strip and a reconstruction of {each} to {args.output}", file=sys.stderr)
    for problem in bad:
        print(f"left out: {problem}", file=sys.stderr)
    return 0


def _inputs(given: str, most: int, fit: "Fit") -> "Iterator[tuple[str, Callable[[], Image.Image]]]":
    """Yield the name and the reader of each image: of a file, which is read now, or of a set, which is read later."""
    from detailflow.data.folder import MANY
    from detailflow.data.images import load_rgb, open_images, spread

    path = Path(given)
    if os.path.isfile(path) and path.suffix.lower() not in MANY:
        image = fit(load_rgb(given))
        yield path.stem, lambda: image
        return
    source = open_images(given)
    total = len(source)
    if total > most:
        print(
            f"{source.where}: {most:,} of its {total:,} images, evenly spread; --num {total} takes all", file=sys.stderr
        )
    for index in spread(total, most) if total > most else range(total):
        yield _name_in(source, index, given), lambda index=index: fit(source.image(index))  # type: ignore[misc]


def _name_in(source: "ImageSource", index: int, given: str) -> str:
    """Name an image of a set: photos/cat/1.jpg of photos is cat-1, row 3 of photos.parquet is photos.parquet-row-3."""
    name = source.name(index)
    if os.path.isdir(given) and os.path.isfile(name):
        return os.path.splitext(os.path.relpath(name, given))[0].replace(os.sep, "-")
    return name.removeprefix(os.path.dirname(given) + os.sep).replace(" ", "-")


def _check_replaced(args: argparse.Namespace, names: Sequence[str]) -> None:
    """Check that no picture would replace an image that was given, or another file that is not ours."""
    from detailflow.pictures import check_ours

    given = {os.path.realpath(path) for path in args.images if os.path.isfile(path)}
    outputs = [args.output / f"{name}-{what}.png" for name in names for what in ("strip", "reconstruction")]
    for output in outputs:
        if os.path.realpath(output) in given:
            raise DetailFlowError(f"{output} is one of the images and would be replaced: give another --output")
    check_ours(outputs, "reconstruct")


def _print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    lines = [header, *rows]
    first, *widths = (max(map(len, column)) for column in zip(*lines, strict=True))
    for name, *cells in lines:
        print("  ".join([name.ljust(first), *(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))]))
