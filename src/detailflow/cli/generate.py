"""`detailflow generate`: images of classes."""

import argparse
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

from detailflow.cli.common import (
    Parser,
    add_model_options,
    add_output_option,
    add_sampling_options,
    check_output,
    sampling_options,
)
from detailflow.errors import DetailFlowError
from detailflow.progress import PERCENT, progress_bar
from detailflow.settings import BatchSize, PositiveInt, Seed
from detailflow.words import listed, several

if TYPE_CHECKING:
    from detailflow.distributed import World
    from detailflow.labels import ClassId
    from detailflow.pipeline import DetailFlowPipeline

Format = Literal["png", "npz", "webdataset"]
FORMATS = get_args(Format)  # the default first
GRID_IMAGES = 400  # about as many as a grid shows if there are more
LARGEST_SET = 10_000_000  # images of one call


def parser() -> Parser:
    """Return the command's parser."""
    result = Parser("generate", "[CLASS …]", "Make images of classes with an AR model and its tokenizer.")
    classes = "as `detailflow classes` lists them, if there are any (default: all)"
    result.option("classes", tuple[str, ...], (), classes, "CLASS")
    result.option("--num", PositiveInt, 1, "images per class", "N")
    result.option("--seed", Seed, 0, "the same seed gives the same images (default: 0)")
    result.option("--num-tokens", int, help="stop after N tokens (shipped: 1-16, 24, …, 48)", metavar="N")
    result.option("--grid", bool, True, "write grid.png too")
    result.option("--progressive", bool, help="write strips from coarse to fine, too")
    add_output_option(result)
    result.heading("many images, by one process or, with torchrun or accelerate launch, by several")
    result.option("--num-images", PositiveInt, help="N in all, of the classes in turn; again to go on", metavar="N")
    result.option("--format", Format, FORMATS[0], f"{listed(FORMATS)} (default: png)", "FORMAT")
    result.option("--batch-size", BatchSize, help="made at once (default: 32, or 128 on a GPU)", metavar="N")
    result.option("--compile", bool, help="on a GPU, compile first")
    add_sampling_options(result)
    add_model_options(result, tokenizer=True)
    return result


def main(argv: Sequence[str]) -> int:
    """Write `INDEX-CLASS.png` for every image, and the grid and strips that were asked for."""
    args = parser().parse_args(argv)
    check_output(args.output)
    _check(args)

    from detailflow.distributed import World, rank_and_world_size
    from detailflow.pipeline import DetailFlowPipeline

    if not args.num_images and rank_and_world_size()[1] > 1:
        raise DetailFlowError("several processes make a set of samples together: give --num-images, or start one")
    world = World.from_launch(cpu=args.device == "cpu") if args.num_images else World()
    sampling = sampling_options(args)
    pipeline = DetailFlowPipeline.from_pretrained(
        args.model, device=world.device or args.device, dtype=args.dtype, tokenizer=args.tokenizer, engine=args.engine
    )
    classes = pipeline.class_ids(args.classes or pipeline.labels.ids)
    if args.num_images:
        _many(args, pipeline, classes, world, sampling)
        return 0

    from detailflow.files import lock_folder

    with lock_folder(args.output, "generation"):
        _few(args, pipeline, classes, sampling)
    return 0


def _check(args: argparse.Namespace) -> None:
    """Raise a `DetailFlowError` for options that don't go together."""
    if args.num_images is None and (args.compile or args.format != FORMATS[0]):
        raise DetailFlowError(f"{'--compile' if args.compile else f'--format {args.format}'} is for --num-images")
    if args.num_images and (args.progressive or args.num > 1):
        raise DetailFlowError("--num-images counts all images and makes no strips: leave out --num and --progressive")
    if args.num_images and args.num_images > LARGEST_SET:
        raise DetailFlowError(
            f"--num-images must be at most {LARGEST_SET:,}, not {args.num_images:,}: make several sets"
        )


def _many(
    args: argparse.Namespace,
    pipeline: "DetailFlowPipeline",
    classes: "Sequence[ClassId]",
    world: "World",
    sampling: Mapping[str, Any],
) -> None:
    """Write the set of `--num-images`, this process's share of it."""
    from detailflow.pipeline import BATCH_SIZE, LARGEST_CALL
    from detailflow.samples import SampleSet, generate_many

    num_tokens = pipeline.tokenizer.schedule.check_count(args.num_tokens, "--num-tokens")
    labels = [classes[i % len(classes)] for i in range(args.num_images)]
    batch_size = args.batch_size or (128 if pipeline.device.type == "cuda" else BATCH_SIZE)
    if batch_size > LARGEST_CALL:
        raise DetailFlowError(f"--batch-size must be at most {LARGEST_CALL:,}, not {batch_size:,}")
    if args.compile:
        if args.num_images < batch_size:
            raise DetailFlowError(f"--compile is for batches of {batch_size}, and {args.num_images} images fill none")
        pipeline.compile(batch_size)
    samples = SampleSet(labels, args.format, args.seed, batch_size, num_tokens)
    generate_many(pipeline, args.output, samples, world, **sampling)
    if world.is_main:
        print(f"wrote {len(labels)} images to {args.output}")


def _few(
    args: argparse.Namespace, pipeline: "DetailFlowPipeline", classes: "Sequence[ClassId]", sampling: Mapping[str, Any]
) -> None:
    """Write `--num` images of each class and the pictures of them, in place of those of an earlier call."""
    from detailflow.pictures import check_ours, grid, in_place_of, strip, write_png
    from detailflow.pipeline import BATCH_SIZE
    from detailflow.samples import check_no_set, file_label, remove_earlier

    total, schedule = len(classes) * args.num, pipeline.tokenizer.schedule
    if total > LARGEST_SET:
        raise DetailFlowError(
            f"--num must make at most {LARGEST_SET:,} images in all, not {total:,}: use several folders"
        )
    check_no_set(args.output)
    num_tokens = schedule.check_count(args.num_tokens, "--num-tokens")
    counts = schedule.stages(num_tokens) if args.progressive else [num_tokens]
    labels = [label for label in classes for _ in range(args.num)]
    per_class = min(args.num, max(1, GRID_IMAGES // len(classes)))
    samples = [f"{i:04d}-{file_label(pipeline, label)}.png" for i, label in enumerate(labels)]
    strips = [f"strip-{name}" for name in samples] if args.progressive else []
    names = [*samples, *strips, *(["grid.png"] if args.grid else [])]
    check_ours([args.output / name for name in names], "generate")

    shown = []
    steps = schedule.valid_counts.index(num_tokens) + 1
    with progress_bar(desc="generating", total=len(labels) * steps, bar_format=PERCENT) as bar:
        options = {"seed": args.seed, "num_tokens": num_tokens, "counts": counts, "progress": bar.update, **sampling}
        for first in range(0, len(labels), BATCH_SIZE):
            stages = list(pipeline.stream(labels[first : first + BATCH_SIZE], first_image=first, **options))
            if first == 0:  # all of them before the first new image: a call that is stopped leaves no mixture
                earlier = remove_earlier(args.output)
            for i, image in enumerate(stages[-1].images):
                write_png(image, args.output / samples[first + i], "sample")
                if strips:
                    write_png(strip(stages, i), args.output / strips[first + i], "strip")
                if (first + i) % args.num < per_class:
                    shown.append(image)
    if args.grid:
        captions = [pipeline.class_name(label) for label in classes for _ in range(per_class)]
        rows = (per_class if per_class > 1 else None, captions) if pipeline.labels.count else ()
        write_png(grid(shown, *rows), args.output / "grid.png", "grid")
    together = f", together in {args.output / 'grid.png'}" if args.grid else ""
    print(f"wrote {several(len(labels), 'image')} to {args.output}{together}{in_place_of(earlier)}")
