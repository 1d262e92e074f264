"""`detailflow vary`: the first tokens of images stay, and the AR model writes the others."""

import argparse
import os
import shlex
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from detailflow.cli.common import (
    Parser,
    add_model_options,
    add_output_option,
    add_sampling_options,
    check_apart,
    check_output,
    sampling_options,
)
from detailflow.cli.operands import Inputs, add_image_options
from detailflow.errors import DetailFlowError
from detailflow.progress import PERCENT, progress_bar
from detailflow.settings import PositiveInt, Seed
from detailflow.words import several

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from detailflow.labels import ClassId
    from detailflow.pipeline import DetailFlowPipeline

OF_A_SET = 4  # images that are taken of a folder or token file unless --num-inputs says otherwise


class Subject(NamedTuple):
    """An image to vary: its (n,) tokens, its size (height, width), and itself, or `None` if only tokens were given."""

    tokens: "Tensor"
    size: tuple[int, int]
    original: "Image.Image | None"


def parser() -> Parser:
    """Return the command's parser."""
    result = Parser(
        "vary",
        "IMAGE …",
        "Keep the first tokens of images and let the AR model write the others: NAME-KEEP-CLASS-INDEX.png, and all of "
        "them in NAME-variations.png. Put images before --keep and --class, which take all words that follow.",
    )
    add_image_options(result, OF_A_SET, "--num-inputs", ", token files")
    keep = "first tokens that stay (default: a quarter)"
    result.option("--keep", tuple[int, ...], help=keep, metavar="K")
    classes = "as `detailflow classes` lists them (default: none)"
    result.option("--class", tuple[str, ...], help=classes, metavar="CLASS", dest="classes")
    result.option("--num", PositiveInt, 4, "variations of each image, K, CLASS", "N")
    result.option("--seed", Seed, 0, "the same seed gives the same images (default: 0)")
    add_output_option(result)
    add_sampling_options(result)
    add_model_options(result, tokenizer=True)
    return result


def main(argv: Sequence[str]) -> int:
    """Write the variations and a grid of them for every image."""
    args = parser().parse_args(argv)
    check_output(args.output)
    for images in args.images:
        check_apart(args.output, images)

    from detailflow.pictures import grid, in_place_of, write_png
    from detailflow.pipeline import LARGEST_CALL, DetailFlowPipeline
    from detailflow.samples import file_label

    if args.num > LARGEST_CALL:
        raise DetailFlowError(f"--num must be at most {LARGEST_CALL:,}, not {args.num:,}")
    sampling = sampling_options(args)
    pipeline = DetailFlowPipeline.from_pretrained(
        args.model, device=args.device, dtype=args.dtype, tokenizer=args.tokenizer, engine=args.engine
    )
    schedule = pipeline.tokenizer.schedule
    keeps = list(dict.fromkeys(schedule.check_count(k, "--keep") for k in args.keep or [schedule.quarter]))
    classes: list[ClassId | None] = list(dict.fromkeys(pipeline.class_ids(args.classes))) if args.classes else [None]
    _check_no_classes(args.images, pipeline)
    inputs = _inputs(args, pipeline, max(keeps))
    words = {label: "any" if label is None else file_label(pipeline, label) for label in classes}
    names = [f"{k}-{words[label]}-{i}" for k in keeps for label in classes for i in range(args.num)]
    outputs = [args.output / f"{name}-{rest}.png" for name in inputs.names for rest in [*names, "variations"]]
    earlier = inputs.check_outputs(outputs, "vary")

    steps = sum(n >= k for k in keeps for n in schedule.valid_counts) * args.num * len(classes)
    with progress_bar(desc="generating", total=steps * len(inputs.names), bar_format=PERCENT) as bar:
        options = {"num_images": args.num, "seed": args.seed, "progress": bar.update, **sampling}
        for name, subject in inputs:
            tiles, variations = variation_tiles(pipeline, subject, keeps, classes, options)
            for rest, image in zip(names, variations, strict=True):
                write_png(image, args.output / f"{name}-{rest}.png", "variation")
            pictures, captions = zip(*tiles, strict=True)
            sheet = grid(pictures, len(tiles) // len(keeps), captions)
            write_png(sheet, args.output / f"{name}-variations.png", "variations")
    done = len(inputs.names) - len(inputs.left_out)
    each = f"of each of {done} images" if done > 1 else f"of {inputs.names[0]}"
    together = f"{name if done == 1 else 'IMAGE'}-variations.png"
    print(
        f"wrote {several(len(names), 'variation')} {each} to {args.output}, together in {args.output / together}"
        f"{in_place_of(earlier)}"
    )
    inputs.report_left_out()
    return 0


def variation_tiles(
    pipeline: "DetailFlowPipeline",
    subject: Subject,
    keeps: Sequence[int],
    classes: "Sequence[ClassId | None]",
    options: dict[str, Any],
) -> "tuple[list[tuple[Image.Image, str]], list[Image.Image]]":
    """Vary an image: return the tiles of its grid with captions, a row for each of `keeps`, and the variations alone.

    Args:
        pipeline: the models.
        subject: the image.
        keeps: numbers of tokens.
        classes: of the variations; `None` is no class.
        options: of `DetailFlowPipeline.vary`.
    """
    from PIL import Image

    tokens, (height, width), original = subject

    def shown(n: int) -> Image.Image:
        (image,) = pipeline.vary(tokens, keep=n, num_tokens=n, size=subject.size)
        return image.resize((width, height), Image.Resampling.BICUBIC)

    first = (shown(len(tokens)), several(len(tokens), "token")) if original is None else (original, "original")
    tiles, variations = list[tuple[Image.Image, str]](), list[Image.Image]()
    for keep in keeps:
        tiles += [first, (shown(keep), several(keep, "token"))]
        for label in classes:
            images = pipeline.vary(tokens, keep=keep, label=label, size=subject.size, **options)
            name = "no class" if label is None else pipeline.class_name(label)
            tiles += [(image, name) for image in images]
            variations += images
    return tiles, variations


def _inputs(args: argparse.Namespace, pipeline: "DetailFlowPipeline", keep: int) -> Inputs:
    import torch

    from detailflow.pipeline import encode_images, fit
    from detailflow.token_files import TokenFile

    tokenizer = pipeline.tokenizer

    def encoded(image: "Image.Image") -> Subject:
        fitted = fit(tokenizer.schedule, image, args.whole)
        return Subject(encode_images(tokenizer, [fitted])[0], (fitted.height, fitted.width), fitted)

    def stored(path: Path) -> list[tuple[str, Subject]]:
        file = TokenFile.read(path)
        file.check_fits(path, tokenizer.fingerprint(), tokenizer.schedule, tokenizer.config.codebook_size)
        if keep > (most := file.tokens.shape[1]):
            raise DetailFlowError(f"--keep must be at most the {most} tokens of {path}, not {keep}")
        rows = zip(file.names, torch.from_numpy(file.tokens), file.sizes.tolist(), strict=True)
        return [(name, Subject(ids, (height, width), None)) for name, ids, (height, width) in rows]

    return Inputs(args.images, args.num_inputs, encoded, "--num-inputs", stored)


def _check_no_classes(images: Sequence[str], pipeline: "DetailFlowPipeline") -> None:
    """Check that no word among the images is a class; one that is not here would be looked for on the hub."""
    classes = list[str]()
    for word in images:
        with suppress(DetailFlowError):  # that there is no such class
            pipeline.labels.index(word)
            classes += [] if os.path.exists(word) else [word]
    if classes:
        are = "are classes, not images" if classes[1:] else "is a class, not an image"
        raise DetailFlowError(f"{', '.join(classes)} {are}: put --class {shlex.join(classes)} after the images")
