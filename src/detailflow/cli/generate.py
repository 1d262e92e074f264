"""`detailflow generate`: images of classes."""

import argparse
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from detailflow.cli.common import (
    OFF,
    TOP_K,
    TOP_P,
    Parser,
    add_model_options,
    add_output_option,
    check_output,
    make_output,
    positive,
)
from detailflow.errors import DetailFlowError

if TYPE_CHECKING:
    from detailflow.distributed import World
    from detailflow.labels import ClassId
    from detailflow.pipeline import DetailFlowPipeline

FORMATS = ("png", "npz", "webdataset")
GRID_IMAGES = 400  # about as many as a grid shows if there are more
LARGEST_SET = 10_000_000  # images of one call
SAMPLING = ("guidance_scale", "guidance_schedule", "temperature", "top_k", "top_p")


def parser() -> Parser:
    """The command's options."""
    result = Parser("generate", "[CLASS …]", "Make images of classes with an AR model and its tokenizer.")
    result.add_argument(
        "classes",
        nargs="*",
        metavar="CLASS",
        help="names or numbers, as `detailflow classes` lists them (default: all)",
    )
    result.add_argument("--num", type=positive, default=1, metavar="N", help="images per class (default: %(default)s)")
    result.add_argument(
        "--seed", type=int, default=0, help="the same seed gives the same images (default: %(default)s)"
    )
    result.add_argument(
        "--num-tokens", type=int, metavar="N", help="stop after N tokens, for coarse images (default: all)"
    )
    add_output_option(result)
    many = result.add_argument_group("many images, by one process or, with torchrun or accelerate launch, by several")
    many.add_argument(
        "--num-images", type=positive, metavar="N", help="N in all, of the classes in turn; again to go on"
    )
    many.add_argument("--format", choices=FORMATS, default=FORMATS[0], help="of these N (default: %(default)s)")
    many.add_argument("--batch-size", type=positive, metavar="N", help="made at once (default: 32, or 128 on a GPU)")
    many.add_argument("--compile", action="store_true", help="compile first: minutes on a CPU, then faster")
    result.add_argument("--grid", action=argparse.BooleanOptionalAction, default=True, help="write grid.png too")
    result.add_argument("--progressive", action="store_true", help="write strips from coarse to fine, too")
    group = result.add_argument_group("sampling (default: the model's own best values)")
    group.add_argument("--guidance-scale", type=float, metavar="S", help="strength of the class; 1 is no guidance")
    group.add_argument("--guidance-schedule", metavar="NAME", help="constant, or linear: lower from group to group")
    group.add_argument("--temperature", type=float, metavar="T", help="0 always takes the most likely code")
    group.add_argument("--top-k", type=TOP_K, metavar="K", help="draw from the K likeliest codes only, or off")
    group.add_argument("--top-p", type=TOP_P, metavar="P", help="from the likeliest codes that sum to P, or off")
    add_model_options(result, tokenizer=True)
    return result


def main(argv: Sequence[str]) -> int:
    """Write `INDEX-CLASS.png` for every image, and the grid and strips that were asked for."""
    args = parser().parse_args(argv)
    check_output(args.output)
    _check(args)

    from detailflow.distributed import World
    from detailflow.generation import SamplingConfig
    from detailflow.labels import ClassId
    from detailflow.pipeline import DetailFlowPipeline

    world = World.from_launch(cpu=args.device == "cpu") if args.num_images else World()
    sampling = {name: getattr(args, name) for name in SAMPLING if getattr(args, name) is not None}
    SamplingConfig(
        **{name: value for name, value in sampling.items() if value != OFF}
    )  # raises before a large model is loaded
    pipeline = DetailFlowPipeline.from_pretrained(
        args.model, device=world.device or args.device, dtype=args.dtype, tokenizer=args.tokenizer
    )
    classes = pipeline.class_ids(args.classes or [ClassId(i) for i in range(pipeline.gpt.config.num_classes)])
    if args.num_images:
        _many(args, pipeline, classes, world, sampling)
    else:
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
    from detailflow.pipeline import BATCH_SIZE
    from detailflow.samples import SampleSet, generate_many

    num_tokens = pipeline.tokenizer.schedule.check_count(args.num_tokens)
    labels = [classes[i % len(classes)] for i in range(args.num_images)]
    batch_size = args.batch_size or (128 if pipeline.device.type == "cuda" else BATCH_SIZE)
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
    from tqdm import tqdm

    from detailflow.pictures import check_ours, grid, strip, write_png
    from detailflow.pipeline import BATCH_SIZE, stage_counts
    from detailflow.samples import check_no_set, file_label, remove_earlier

    total, schedule = len(classes) * args.num, pipeline.tokenizer.schedule
    if total > LARGEST_SET:
        raise DetailFlowError(
            f"--num must make at most {LARGEST_SET:,} images in all, not {total:,}: use several folders"
        )
    check_no_set(args.output)
    num_tokens = schedule.check_count(args.num_tokens)
    counts = stage_counts(schedule, num_tokens) if args.progressive else [num_tokens]
    labels = [label for label in classes for _ in range(args.num)]
    per_class = min(args.num, max(1, GRID_IMAGES // len(classes)))
    samples = [f"{i:04d}-{file_label(pipeline, label)}.png" for i, label in enumerate(labels)]
    strips = [f"strip-{name}" for name in samples] if args.progressive else []
    names = [*samples, *strips, *(["grid.png"] if args.grid else [])]
    check_ours([args.output / name for name in names], "generate")

    shown = []
    # A bar in percent: it counts decoding steps of images, which say nothing to the user.
    bar = tqdm(
        total=len(labels) * (schedule.valid_counts.index(num_tokens) + 1), desc="generating", delay=2, leave=False,
        disable=None, bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}",
    )  # fmt: skip
    with bar:
        for first in range(0, len(labels), BATCH_SIZE):
            batch = labels[first : first + BATCH_SIZE]
            made = pipeline.stream(
                batch,
                first_image=first,
                seed=args.seed,
                num_tokens=num_tokens,
                counts=counts,
                progress=bar.update,
                **sampling,
            )
            stages = list(made)
            make_output(args.output)
            for i, image in enumerate(stages[-1].images):
                write_png(image, args.output / samples[first + i], "sample")
                if strips:
                    write_png(strip(stages, i), args.output / strips[first + i], "strip")
                if (first + i) % args.num < per_class:
                    shown.append(image)
    if args.grid:
        captions = [pipeline.class_name(label) for label in classes for _ in range(per_class)]
        write_png(grid(shown, per_class if per_class > 1 else None, captions), args.output / "grid.png", "grid")
    removed = remove_earlier(args.output, names)
    instead = f" in place of {removed} earlier file{'s' if removed > 1 else ''}" if removed else ""
    print(f"wrote {len(labels)} image{'s' if len(labels) > 1 else ''} to {args.output}{instead}")
