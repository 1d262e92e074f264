"""`detailflow evaluate`: figures of models and of images, written as a report."""

import argparse
import shlex
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from detailflow.cli.common import (
    Parser,
    add_device_option,
    add_model_options,
    add_sampling_options,
    check_apart,
    check_output,
    reader,
)
from detailflow.cli.operands import add_search_option
from detailflow.errors import DetailFlowError
from detailflow.sampling import SamplingConfig
from detailflow.settings import BatchSize, Location, PositiveInt, Seed
from detailflow.words import printable, unknown

if TYPE_CHECKING:
    from detailflow.evaluation.evaluate import Context
    from detailflow.evaluation.report import Report
    from detailflow.published import Kind

HELP = """usage: detailflow evaluate WHAT …

Measure models and images by the field's standard means. The first three write
a folder with report.json, report.md and plots; torchrun or accelerate launch
may start several processes.

what:
  tokenizer   how well a tokenizer rebuilds images
  gpt         how good generated images are, over ways to sample them
  samples     any two sets of images: folder, .npz, WebDataset, parquet
  statistics  a reference's, measured once and kept in an .npz file
  compare     two reports beside each other

options:
  -h, --help  show this help, or after one of these that one's
"""
SET = "a folder, .npz, WebDataset, parquet or a hub name"
Numbers = tuple[PositiveInt, ...]
NETWORKS = "inception, dinov2, efficientnet-lite0 or FILE.safetensors"


def main(argv: Sequence[str]) -> int:
    """Run one evaluation and return the exit status."""
    if not argv or argv[0] in ("-h", "--help"):
        print(HELP, end="")
        return 0
    kinds = {"tokenizer": _tokenizer, "gpt": _gpt, "samples": _samples, "statistics": _statistics, "compare": _compare}
    if argv[0] not in kinds:
        raise DetailFlowError(unknown("evaluation", argv[0], kinds, f"give {', '.join(kinds)}"))
    with ExitStack() as stack:
        kinds[argv[0]](argv[1:], printable(shlex.join(["detailflow", "evaluate", *argv])), stack)
    return 0


def tokenizer_parser() -> Parser:
    """Return the options of `evaluate tokenizer`."""
    about = "rFID, PSNR, SSIM, LPIPS and codebook usage of reconstructions."
    result = Parser("evaluate tokenizer", "--data DATA --output DIR", about)
    data = "images to rebuild: a folder, parquet, WebDataset or a hub name"
    result.option("--data", Location, help=data, required=True)
    _add_choice(result)
    result.option("--num-images", PositiveInt, help="only N images, spread over the set", metavar="N")
    result.option("--num-tokens", Numbers, help="rebuild from N tokens (default: 1, 2, 4, …)", metavar="N")
    result.option("--size", Numbers, help="decode at side S (default: each N's own)", metavar="S")
    add_search_option(result)
    mistakes = "mistakes at token P, in group gP, or all: each but the last"
    result.option("--mistakes-at", tuple[str, ...], [], mistakes, "P")
    result.option("--seed", Seed, 0, "of the mistakes (default: 0)")
    result.option("--reference", Location, help="what rFID is to, in place of the images themselves", metavar="SET")
    lpips = "VGG-16's weights (default: downloaded); none leaves LPIPS out"
    result.option("--lpips", Location, help=lpips, metavar="FILE")
    _add_features(result, "; none: no rFID")
    _add_output(result)
    add_model_options(result, measures=True)
    return result


def gpt_parser() -> Parser:
    """Return the options of `evaluate gpt`."""
    about = "gFID, sFID, IS, precision and recall of generated images."
    result = Parser("evaluate gpt", "--reference SET --output DIR", about)
    result.option("--reference", Location, help="real images, or ADM's reference .npz", required=True)
    _add_choice(result)
    result.option("--num-samples", PositiveInt, 50_000, "images; for a quick look: 1000", "N")
    result.option("--labels", Literal["balanced", "random"], "balanced", "balanced or random")
    seeds: dict[str, Any] = {"type": reader("--seeds", Seed), "nargs": "+", "default": [0], "metavar": "S"}
    result.add("--seeds", "--seed", help="several show the spread (default: 0)", **seeds)
    result.option("--keep-samples", bool, help="leave the images in DIR/samples, as .npz")
    add_sampling_options(result, several=True)
    result.option("--num-tokens", Numbers, [None], "stop after N tokens (default: all)", "N")
    result.heading("measures and report")
    _add_features(result)
    _add_output(result)
    add_model_options(result, tokenizer=True, measures=True)
    return result


def samples_parser() -> Parser:
    """Return the options of `evaluate samples`."""
    about = "FID, sFID, IS, precision and recall of two sets."
    result = Parser("evaluate samples", "SAMPLES REFERENCE --output DIR", about)
    result.option("samples", Location, help=SET, metavar="SAMPLES")
    reference = "the same, or an .npz of ADM's reference statistics"
    result.option("reference", Location, help=reference, metavar="REFERENCE")
    size = "bring shorter sides to S, take the centre (default: as is)"
    result.option("--size", PositiveInt, help=size, metavar="S")
    result.option("--num-images", PositiveInt, help="only N of the samples, spread over the set", metavar="N")
    _add_features(result)
    _add_output(result)
    add_device_option(result)
    return result


def statistics_parser() -> Parser:
    """Return the options of `evaluate statistics`."""
    about = "Measure a set once, to give the file as --reference from then on."
    result = Parser("evaluate statistics", "SET --output FILE.npz", about)
    result.option("set", Location, help=SET, metavar="SET")
    _add_choice(result)
    size = "the model's: shorter sides to S, centres (default: as is)"
    result.option("--size", PositiveInt, help=size, metavar="S")
    result.option("--num-images", PositiveInt, help="only N images, spread over the set", metavar="N")
    _add_features(result)
    _add_output(result, "FILE", "the .npz file to write")
    add_device_option(result)
    return result


def compare_parser() -> Parser:
    """Return the options of `evaluate compare`."""
    result = Parser("evaluate compare", "A B", "Print two reports beside each other: what is equal, and what differs.")
    for name in ("a", "b"):
        report = "the output folder of an evaluation, or its report.json"
        result.option(name, Path, help=report, metavar=name.upper())
    return result


def _add_choice(parser: Parser) -> None:
    parser.option("--split", help="train, val or test, if there are such")
    parser.option("--image-column", default="image", help="of parquet files and hub data sets", metavar="NAME")


def _choice(args: argparse.Namespace) -> dict[str, Any]:
    """Return which images of a set are asked for."""
    return {"split": args.split, "image_column": args.image_column}


def _add_features(parser: Parser, instead: str = "") -> None:
    parser.option("--features", Location, "inception", f"{NETWORKS}{instead} (default: inception)", "NAME")
    parser.option("--weights", Location, help="of inception or dinov2 (default: downloaded)", metavar="FILE")


def _add_output(parser: Parser, metavar: str = "DIR", help: str = "where to write the report") -> None:
    parser.option("--batch-size", BatchSize, help="images at once (default: 64, or 256 on a GPU)", metavar="N")
    parser.option("--output", Path, help=help, metavar=metavar, required=True)


def _tokenizer(argv: Sequence[str], command: str, stack: ExitStack) -> None:
    args = tokenizer_parser().parse_args(argv)
    context = _start(args, stack)

    from detailflow.evaluation.features import load_extractor
    from detailflow.evaluation.tokenizer import (
        TokenizerOptions,
        evaluate_tokenizer,
        find_lpips,
        parse_spans,
        views_by_count,
    )
    from detailflow.models.tokenizer import DetailFlowTokenizer

    tokenizer = DetailFlowTokenizer.from_pretrained(args.model, device=context.device, dtype=args.dtype)
    models = _check_folder(args, command, context, {"tokenizer": args.model})
    side, mistakes = tokenizer.config.image_size, parse_spans(tokenizer.schedule, args.mistakes_at)
    views_by_count(tokenizer.schedule, args.num_tokens, args.size)  # raises before anything is downloaded
    images = context.open(args.data, side, args.num_images, **_choice(args))
    reference = context.open(args.reference, side, image_column=args.image_column) if args.reference else None
    if args.features == "none" and args.weights:
        raise DetailFlowError(f"--features none needs no weights: leave out --weights {args.weights}")
    extractor = None if args.features == "none" else load_extractor(args.features, context.device, args.weights)
    lpips, notes = find_lpips(args.lpips, side, context.device)
    options = TokenizerOptions(
        extractor, reference, lpips, args.num_tokens, args.size, mistakes, args.seed, args.model, notes, args.search
    )
    _finish(args, evaluate_tokenizer(tokenizer, images, context, options), command, context, models)


def _gpt(argv: Sequence[str], command: str, stack: ExitStack) -> None:
    args = gpt_parser().parse_args(argv)
    context = _start(args, stack)

    from detailflow.evaluation.features import load_extractor
    from detailflow.evaluation.gpt import GPTOptions, evaluate_gpt, sweep
    from detailflow.pipeline import DetailFlowPipeline

    pipeline = DetailFlowPipeline.from_pretrained(
        args.model, device=context.device, dtype=args.dtype, tokenizer=args.tokenizer, engine=args.engine
    )
    names = (*SamplingConfig.__dataclass_fields__, "num_tokens")
    settings = sweep(pipeline, **{name: getattr(args, name) for name in names})  # raises before any download
    sources: dict[Kind, str | None] = {"tokenizer": args.tokenizer or args.model, "gpt": args.model}
    models = _check_folder(args, command, context, sources, args.num_samples if args.keep_samples else 0)
    reference = context.open(args.reference, pipeline.tokenizer.config.image_size, **_choice(args))
    extractor = load_extractor(args.features, context.device, args.weights)
    options = GPTOptions(
        extractor, settings, args.output, args.num_samples, args.labels, args.seeds, args.keep_samples, args.model
    )
    _finish(args, evaluate_gpt(pipeline, reference, context, options), command, context, models)


def _samples(argv: Sequence[str], command: str, stack: ExitStack) -> None:
    args = samples_parser().parse_args(argv)
    context = _start(args, stack)

    from detailflow.evaluation.evaluate import evaluate_samples
    from detailflow.evaluation.features import load_extractor

    models = _check_folder(args, command, context, {})
    samples, reference = context.open(args.samples, args.size, args.num_images), context.open(args.reference, args.size)
    extractor = load_extractor(args.features, context.device, args.weights)
    _finish(args, evaluate_samples(samples, reference, extractor, context), command, context, models)


def _statistics(argv: Sequence[str], command: str, stack: ExitStack) -> None:
    args = statistics_parser().parse_args(argv)
    if args.output.suffix != ".npz" or args.output.exists():
        problem = "exists already" if args.output.exists() else "is not named so"
        raise DetailFlowError(f"--output must be a new .npz file, and {args.output} {problem}")
    check_output(args.output.parent)

    from detailflow.evaluation.distances import REFERENCE_KEPT, measure
    from detailflow.evaluation.evaluate import Context
    from detailflow.evaluation.features import load_extractor
    from detailflow.evaluation.sets import save_statistics

    context = Context.launch(args.device, args.batch_size)
    images = context.open(args.set, args.size, args.num_images, **_choice(args))
    measured = measure(load_extractor(args.features, context.device, args.weights), images, keep=REFERENCE_KEPT)
    if context.world.is_main:
        save_statistics(args.output, measured)
        print(f"wrote {args.output}")


def _compare(argv: Sequence[str], command: str, stack: ExitStack) -> None:
    args = compare_parser().parse_args(argv)

    from detailflow.evaluation.compare import compare_reports

    print(compare_reports(args.a, args.b))


def _start(args: argparse.Namespace, stack: ExitStack) -> "Context":
    """Check what would fail only after long work, join the ranks of this launch and lock the output folder."""
    for images in ("data", "samples", "reference"):
        check_apart(args.output, getattr(args, images, None))
    check_output(args.output)

    import matplotlib  # noqa: F401  # which a report needs at the end

    from detailflow.evaluation.evaluate import Context
    from detailflow.files import lock_folder

    context = Context.launch(args.device, args.batch_size)
    stack.enter_context(lock_folder(args.output, "evaluation", context.world))
    return context


def _check_folder(
    args: argparse.Namespace,
    command: str,
    context: "Context",
    sources: "Mapping[Kind, str | None]",
    kept_samples: int = 0,
) -> dict[str, Any]:
    """Return what the report says about the models, after a check that its folder is free for it."""
    from detailflow.evaluation.report import check_folder, model_entry

    models: dict[str, Any] = {}
    with context.world.raise_together():
        if context.world.is_main:
            models = {kind: model_entry(source, kind) for kind, source in sources.items()}
            check_folder(args.output, command, models, kept_samples)
    return models


def _finish(
    args: argparse.Namespace, report: "Report | None", command: str, context: "Context", models: Mapping[str, Any]
) -> None:
    """Write the report with all that it was computed from, and print its tables."""
    if report is None:
        return

    from dataclasses import replace
    from datetime import UTC, datetime

    from detailflow.evaluation.report import machine_entry, section_table

    date = datetime.now(UTC).isoformat(timespec="seconds")
    machine = machine_entry(context.device, context.world.size, getattr(args, "dtype", None))
    provenance = {"command": command, "date": date, "models": dict(models), **report.provenance, **machine}
    replace(report, provenance=provenance).write(args.output)
    for section in report.sections:
        print(f"{section.title}\n", *section_table(section), "", sep="\n")
    for note in report.notes:
        print(f"{note}\n")
    print(f"wrote {args.output / 'report.md'}")
