"""`detailflow generate`: images of classes."""

import argparse
from collections.abc import Sequence

from detailflow.cli.common import (
    Parser,
    add_model_options,
    add_output_option,
    check_output,
    make_output,
    positive,
    write_png,
)
from detailflow.errors import DetailFlowError

FORMATS = ("png", "npz", "webdataset")
GRID_IMAGES = 400  # about as many as a grid shows where there are more


def parser() -> Parser:
    """The command's options."""
    result = Parser("generate", "[CLASS …]", "Make images of classes with an AR model and its tokenizer.")
    result.add_argument(
        "classes", nargs="*", metavar="CLASS", help="names or numbers, as `detailflow classes` lists them (default: all)"
    )
    result.add_argument("--num", type=positive, default=1, metavar="N", help="images per class (default: %(default)s)")
    result.add_argument("--seed", type=int, default=0, help="the same seed gives the same images (default: %(default)s)")
    result.add_argument("--num-tokens", type=int, metavar="N", help="stop after N tokens, for coarse images (default: all)")
    add_output_option(result)
    many = result.add_argument_group("many images, by one process or, with torchrun or accelerate launch, by several")
    many.add_argument("--num-images", type=positive, metavar="N", help="N in all, of the classes in turn; again to go on")
    many.add_argument("--format", choices=FORMATS, default=FORMATS[0], help="of these N (default: %(default)s)")
    many.add_argument("--batch-size", type=positive, metavar="N", help="made at once (default: 32, or 128 on a GPU)")
    many.add_argument("--compile", action="store_true", help="compile first: minutes on a CPU, then faster")
    result.add_argument("--grid", action=argparse.BooleanOptionalAction, default=True, help="write grid.png too")
    result.add_argument("--progressive", action="store_true", help="write strips from coarse to fine, too")
    group = result.add_argument_group("sampling (default: the model's own best values)")
    group.add_argument("--guidance-scale", type=float, metavar="S", help="strength of the class; 1 is no guidance")
    group.add_argument("--guidance-schedule", metavar="NAME", help="constant, or linear: lower from group to group")
    group.add_argument("--temperature", type=float, metavar="T", help="0 always takes the most likely code")
    group.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest codes only")
    group.add_argument("--top-p", type=float, metavar="P", help="draw from the likeliest codes that sum to P")
    add_model_options(result, tokenizer=True)
    return result


def main(argv: Sequence[str]) -> int:
    """Write `INDEX-CLASS.png` for every image, and the grid and strips that were asked for."""
    args = parser().parse_args(argv)
    check_output(args.output)

    from tqdm import tqdm

    from detailflow.generation import SamplingConfig
    from detailflow.labels import ClassId
    from detailflow.pictures import grid, strip
    from detailflow.pipeline import BATCH_SIZE, DetailFlowPipeline, stage_counts
    from detailflow.processes import Processes
    from detailflow.samples import file_label, generate_many

    if args.num_images is None and (args.compile or args.format != FORMATS[0]):
        raise DetailFlowError(f"{'--compile' if args.compile else f'--format {args.format}'} is for --num-images")
    if args.num_images and (args.progressive or args.num > 1):
        raise DetailFlowError("--num-images counts all images and makes no strips: leave out --num and --progressive")
    processes = Processes.of_this_launch(cpu=args.device == "cpu") if args.num_images else Processes()
    names = ("guidance_scale", "guidance_schedule", "temperature", "top_k", "top_p")
    sampling = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    SamplingConfig(**sampling)  # raises before a large model is loaded
    pipeline = DetailFlowPipeline.from_pretrained(
        args.model, device=processes.device or args.device, dtype=args.dtype, tokenizer=args.tokenizer
    )
    schedule = pipeline.tokenizer.schedule
    num_tokens = schedule.check_count(args.num_tokens)
    counts = stage_counts(schedule, num_tokens) if args.progressive else [num_tokens]
    classes = pipeline.class_ids(args.classes or [ClassId(i) for i in range(pipeline.gpt.config.num_classes)])
    if args.num_images:
        labels = [classes[i % len(classes)] for i in range(args.num_images)]
        batch_size = args.batch_size or (128 if pipeline.gpt.device.type == "cuda" else BATCH_SIZE)
        if args.compile:
            if args.num_images < batch_size:
                raise DetailFlowError(f"--compile is for batches of {batch_size}, and {args.num_images} images fill none")
            pipeline.compile(batch_size)
        generate_many(
            pipeline, labels, args.output, args.format, args.seed, batch_size, processes, num_tokens=num_tokens, **sampling
        )
        if processes.is_main:
            print(f"wrote {len(labels)} images to {args.output}")
        return 0
    labels = [label for label in classes for _ in range(args.num)]
    per_class = min(args.num, max(1, GRID_IMAGES // len(classes)))

    shown = []
    # A bar in percent: it counts decoding steps of images, which say nothing to the user.
    bar = tqdm(
        total=len(labels) * (schedule.valid_counts.index(num_tokens) + 1), desc="generating", delay=2, leave=False,
        disable=None, bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}",
    )  # fmt: skip
    options = dict(seed=args.seed, num_tokens=num_tokens, counts=counts, progress=bar.update, **sampling)
    with bar:
        for first in range(0, len(labels), BATCH_SIZE):
            batch = labels[first : first + BATCH_SIZE]
            stages = list(pipeline.stream(batch, first_image=first, **options))
            make_output(args.output)
            for i, image in enumerate(stages[-1].images):
                name = f"{first + i:04d}-{file_label(pipeline, batch[i])}.png"
                write_png(image, args.output / name)
                if args.progressive:
                    write_png(strip(stages, i), args.output / f"strip-{name}")
                if (first + i) % args.num < per_class:
                    shown.append(image)
    if args.grid:
        captions = [pipeline.class_name(label) for label in classes for _ in range(per_class)]
        write_png(grid(shown, per_class if per_class > 1 else None, captions), args.output / "grid.png")
    print(f"wrote {len(labels)} image{'s' if len(labels) > 1 else ''} to {args.output}")
    return 0
