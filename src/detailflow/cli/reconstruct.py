"""`detailflow reconstruct`: images through the tokenizer and back."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from detailflow.cli.common import Parser, add_model_options, add_output_option, check_output, make_output
from detailflow.errors import DetailFlowError
from detailflow.settings import Location, PositiveInt

if TYPE_CHECKING:
    from PIL import Image

    from detailflow.data.images import ImageSource

OF_A_SET = 16  # images that are taken of a folder unless --num says otherwise


class _Input(NamedTuple):
    name: str
    read: "Callable[[], Image.Image]"
    of_a_set: bool


def parser() -> Parser:
    """The command's options."""
    result = Parser(
        "reconstruct",
        "IMAGE …",
        "Encode images and decode them from their first 1, 2, 4, … tokens: a strip per image, the image from all of its tokens, "
        "and the PSNR in dB.",
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

    from tqdm import tqdm

    from detailflow.data.images import tolerated
    from detailflow.files import output_names
    from detailflow.models.tokenizer import DetailFlowTokenizer
    from detailflow.pictures import strip, write_png
    from detailflow.pipeline import fit, reconstruct, stage_counts

    tokenizer = DetailFlowTokenizer.from_pretrained(args.model, device=args.device, dtype=args.dtype)
    schedule = tokenizer.schedule
    inputs = _inputs(args, lambda image: fit(schedule, image, args.whole))
    names = output_names([given.name for given in inputs])
    _spare_inputs(args, names)
    make_output(args.output)

    rows, counts = [], stage_counts(schedule)
    bad: list[DetailFlowError] = []
    with tqdm(
        desc="reconstructing", total=len(inputs) * len(counts), delay=2, leave=False, disable=None, unit="picture"
    ) as bar:
        for name, given in zip(names, inputs, strict=True):
            try:
                image = given.read()
            except DetailFlowError as error:
                bad.append(error)
                if not given.of_a_set or len(bad) > tolerated(len(inputs)):
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
    print(_table(["PSNR (dB) at tokens:", *map(str, counts)], rows))
    print(
        f"wrote a strip and a reconstruction of {'each image' if len(rows) > 1 else 'it'} to {args.output}",
        file=sys.stderr,
    )
    for problem in bad:
        print(f"left out: {problem}", file=sys.stderr)
    return 0


def _inputs(args: argparse.Namespace, fitted: "Callable[[Image.Image], Image.Image]") -> list[_Input]:
    """All images. Those that are given as files are read before any work is done, but only what is encoded of them is kept."""
    from tqdm import tqdm

    from detailflow.data.folder import MANY
    from detailflow.data.images import load_rgb, open_images, spread

    result: list[_Input] = []
    for given in tqdm(args.images, desc="reading", delay=2, leave=False, disable=None, unit="image"):
        path = Path(given)
        if os.path.isfile(path) and path.suffix.lower() not in MANY:
            image = fitted(load_rgb(given))
            result.append(_Input(path.stem, partial(_same, image), of_a_set=False))
            continue
        source = open_images(given)
        total = len(source)
        if total > args.num:
            print(
                f"{source.where}: {args.num:,} of its {total:,} images, evenly spread; --num {total} takes all",
                file=sys.stderr,
            )
        for number in spread(total, args.num) if total > args.num else range(total):
            result.append(
                _Input(_name_in(source, number, given), partial(_read, source, number, fitted), of_a_set=True)
            )
    return result


def _same(image: "Image.Image") -> "Image.Image":
    return image


def _read(source: "ImageSource", number: int, fitted: "Callable[[Image.Image], Image.Image]") -> "Image.Image":
    return fitted(source.image(number))


def _name_in(source: "ImageSource", number: int, given: str) -> str:
    """Name an image of a set: cat/1.jpg of the folder photos is cat-1, and row 3 of photos.parquet is photos.parquet-row-3."""
    name = source.name(number)
    if os.path.isdir(given) and os.path.isfile(name):
        return os.path.splitext(os.path.relpath(name, given))[0].replace(os.sep, "-")
    return name.removeprefix(os.path.dirname(given) + os.sep).replace(" ", "-")


def _spare_inputs(args: argparse.Namespace, names: Sequence[str]) -> None:
    """Raise a `DetailFlowError` if a picture would take the place of an image that was given, or another of the user's own."""
    from detailflow.pictures import check_ours

    given = {os.path.realpath(path) for path in args.images if os.path.isfile(path)}
    for name in names:
        for what in ("strip", "reconstruction"):
            output = args.output / f"{name}-{what}.png"
            if os.path.realpath(output) in given:
                raise DetailFlowError(f"{output} is one of the images and would be replaced: give another --output")
            check_ours([output], "reconstruct")


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Text in columns: the first flush left, the others flush right."""
    lines = [header, *rows]
    first, *others = (max(map(len, column)) for column in zip(*lines, strict=True))
    return "\n".join(
        "  ".join([line[0].ljust(first), *(cell.rjust(width) for cell, width in zip(line[1:], others, strict=True))])
        for line in lines
    )
