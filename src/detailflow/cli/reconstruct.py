"""`detailflow reconstruct`: images through the tokenizer and back."""

from collections.abc import Sequence
from pathlib import Path

from detailflow.cli.common import Parser, add_model_options, add_output_option, check_output, expanded, make_output, write_png


def parser() -> Parser:
    """The command's options."""
    result = Parser(
        "reconstruct",
        "IMAGE …",
        "Encode images and decode them from their first 1, 2, 4, … tokens: a strip per image, and the PSNR in dB.",
    )
    result.add_argument(
        "images", type=expanded, nargs="+", metavar="IMAGE", help="image files of any size; the centre square is used"
    )
    result.add_argument("--whole", action="store_true", help="use the whole image in its own shape")
    add_output_option(result)
    add_model_options(result)
    return result


def main(argv: Sequence[str]) -> int:
    """Write `NAME-strip.png` for every image and print the table of PSNRs."""
    args = parser().parse_args(argv)
    check_output(args.output)

    from tqdm import tqdm

    from detailflow.data.images import load_rgb
    from detailflow.hub import default_directory
    from detailflow.models.tokenizer import DetailFlowTokenizer
    from detailflow.pictures import strip
    from detailflow.pipeline import fit, reconstruct, stage_counts

    source = default_directory("tokenizer") if args.model is None else args.model
    tokenizer = DetailFlowTokenizer.from_pretrained(source, device=args.device, dtype=args.dtype)
    schedule = tokenizer.schedule
    # All images are read before any work is done, but only what is encoded of them is kept.
    reading = tqdm(args.images, desc="reading", delay=2, leave=False, disable=None, unit="image")
    images = [fit(schedule, load_rgb(path), args.whole) for path in reading]
    names = _names([Path(path).stem for path in args.images])
    make_output(args.output)

    rows, counts = [], stage_counts(schedule)
    with tqdm(desc="reconstructing", total=len(images) * len(counts), delay=2, leave=False, disable=None, unit="picture") as bar:
        for name, image in zip(names, images, strict=True):
            stages = []
            for stage in reconstruct(tokenizer, image, counts):
                stages.append(stage)
                bar.update()
            write_png(strip(stages, original=image), args.output / f"{name}-strip.png")
            rows.append([name, *(f"{stage.psnr:.2f}" for stage in stages)])
    print(_table(["PSNR (dB) at tokens:", *map(str, counts)], rows))
    return 0


def _names(stems: Sequence[str]) -> list[str]:
    """A name for each file, all different, even where upper and lower case are the same."""
    names: list[str] = []
    taken: set[str] = set()
    for stem in stems:
        name, number = stem, 1
        while name.casefold() in taken:
            number += 1
            name = f"{stem}-{number}"
        taken.add(name.casefold())
        names.append(name)
    return names


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Text in columns: the first flush left, the others flush right."""
    lines = [header, *rows]
    first, *others = (max(map(len, column)) for column in zip(*lines, strict=True))
    return "\n".join(
        "  ".join([line[0].ljust(first), *(cell.rjust(width) for cell, width in zip(line[1:], others, strict=True))])
        for line in lines
    )
