"""`detailflow reconstruct`: images through the tokenizer and back."""

import sys
from collections.abc import Sequence

from detailflow.cli.common import Parser, add_model_options, add_output_option, check_apart, check_output
from detailflow.cli.operands import Inputs, add_image_options, add_search_option
from detailflow.progress import progress_bar

OF_A_SET = 16  # images that are taken of a folder unless --num says otherwise


def parser() -> Parser:
    """Return the command's parser."""
    result = Parser(
        "reconstruct",
        "IMAGE …",
        "Encode images and decode them from their first 1, 2, 4, … tokens: a strip per image, the image from all "
        "of its tokens, and the PSNR in dB.",
    )
    add_image_options(result, OF_A_SET)
    add_search_option(result)
    add_output_option(result)
    add_model_options(result)
    return result


def main(argv: Sequence[str]) -> int:
    """Write `NAME-strip.png` and `NAME-reconstruction.png` for every image and print the table of PSNRs."""
    args = parser().parse_args(argv)
    check_output(args.output)
    for images in args.images:
        check_apart(args.output, images)

    from detailflow.models.tokenizer import DetailFlowTokenizer
    from detailflow.pictures import in_place_of, strip, write_png
    from detailflow.pipeline import fit, reconstruct

    tokenizer = DetailFlowTokenizer.from_pretrained(args.model, device=args.device, dtype=args.dtype)
    schedule = tokenizer.schedule
    inputs = Inputs(args.images, args.num, lambda image: fit(schedule, image, args.whole))
    names = [f"{name}-{what}.png" for name in inputs.names for what in ("strip", "reconstruction")]
    earlier = inputs.check_outputs([args.output / name for name in names], "reconstruct")

    rows, counts = [], schedule.stages()
    with progress_bar(desc="reconstructing", total=len(inputs.names) * len(counts), unit="picture") as bar:
        for name, image in inputs:
            stages = []
            for stage in reconstruct(tokenizer, image, counts, args.search):
                stages.append(stage)
                bar.update()
            write_png(strip(stages, original=image), args.output / f"{name}-strip.png", "comparison")
            write_png(stages[-1].images[0], args.output / f"{name}-reconstruction.png", "reconstruction")
            rows.append([name, *(f"{stage.psnr:.2f}" for stage in stages)])
    _print_table(["PSNR (dB) at tokens:", *map(str, counts)], rows)
    each = "each image" if len(rows) > 1 else "it"
    print(f"wrote a strip and a reconstruction of {each} to {args.output}{in_place_of(earlier)}", file=sys.stderr)
    inputs.report_left_out()
    return 0


def _print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    lines = [header, *rows]
    first, *widths = (max(map(len, column)) for column in zip(*lines, strict=True))
    for name, *cells in lines:
        print("  ".join([name.ljust(first), *(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))]))
