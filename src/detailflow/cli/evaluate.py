"""`detailflow evaluate`: figures of models and of images, written as a report."""

import argparse
import shlex
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from detailflow.cli.common import (
    TOP_K,
    TOP_P,
    Parser,
    add_model_options,
    check_output,
    expanded,
    expanded_path,
    positive,
    unknown,
)
from detailflow.errors import DetailFlowError, printable

if TYPE_CHECKING:
    from detailflow.evaluation.report import Report
    from detailflow.evaluation.samples import Work
    from detailflow.published import Kind

NONE = "none"  # for --features
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


def main(argv: Sequence[str]) -> int:
    """Run one evaluation; the exit status."""
    if not argv or argv[0] in ("-h", "--help"):
        print(HELP, end="")
        return 0
    kinds = {"tokenizer": _tokenizer, "gpt": _gpt, "samples": _samples, "statistics": _statistics, "compare": _compare}
    if argv[0] not in kinds:
        raise DetailFlowError(unknown("evaluation", argv[0], kinds, f"give {', '.join(kinds)}"))
    with ExitStack() as stack:
        kinds[argv[0]](argv[1:], printable(shlex.join(["detailflow", "evaluate", *argv])), stack)
    return 0


# --- options -------------------------------------------------------------------------------------------------------------


def tokenizer_parser() -> Parser:
    """The options of `evaluate tokenizer`."""
    result = Parser(
        "evaluate tokenizer",
        "--data DATA --output DIR",
        "rFID, PSNR, SSIM, LPIPS and codebook usage of reconstructions.",
    )
    _add_data(result, "--data", "images to rebuild: a folder, parquet, WebDataset or a hub name")
    result.add_argument("--num-images", type=positive, metavar="N", help="only N images, spread over the set")
    result.add_argument(
        "--num-tokens", type=positive, nargs="+", metavar="N", help="rebuild from N tokens (default: 1, 2, 4, …)"
    )
    result.add_argument(
        "--size", type=positive, nargs="+", metavar="S", help="decode at side S (default: each N's own)"
    )
    result.add_argument(
        "--mistakes-at",
        nargs="+",
        default=[],
        metavar="P",
        help="mistakes at token P, in group gP, or all: each but the last",
    )
    result.add_argument("--seed", type=int, default=0, help="of the mistakes (default: %(default)s)")
    result.add_argument(
        "--reference", type=expanded, metavar="SET", help="what rFID is to, in place of the images themselves"
    )
    result.add_argument(
        "--lpips", type=expanded, metavar="FILE", help="VGG-16's weights (default: downloaded); none leaves LPIPS out"
    )
    _add_features(result, "; none: no rFID")
    _add_output(result)
    add_model_options(result)
    return result


def gpt_parser() -> Parser:
    """The options of `evaluate gpt`."""
    result = Parser(
        "evaluate gpt", "--reference SET --output DIR", "gFID, sFID, IS, precision and recall of generated images."
    )
    _add_data(result, "--reference", "real images, or ADM's reference .npz")
    result.add_argument(
        "--num-samples", type=positive, default=50_000, metavar="N", help="images (default: %(default)s)"
    )
    result.add_argument("--labels", default="balanced", metavar="HOW", help="balanced or random (default: %(default)s)")
    result.add_argument(
        "--seeds", "--seed", type=int, nargs="+", default=[0], metavar="S", help="several show the spread"
    )
    result.add_argument("--keep-samples", action="store_true", help="leave the images in DIR/samples, as .npz")
    sweep = result.add_argument_group("sampling: all combinations (default: the model's own best values)")
    sweep.add_argument("--guidance-scale", type=float, nargs="+", default=[None], metavar="S", help="1 is no guidance")
    sweep.add_argument("--guidance-schedule", nargs="+", default=[None], metavar="NAME", help="constant, linear")
    sweep.add_argument("--temperature", type=float, nargs="+", default=[None], metavar="T", help="0 is argmax")
    sweep.add_argument("--top-k", type=TOP_K, nargs="+", default=[None], metavar="K", help="numbers, or off")
    sweep.add_argument("--top-p", type=TOP_P, nargs="+", default=[None], metavar="P", help="numbers, or off")
    sweep.add_argument(
        "--num-tokens", type=positive, nargs="+", default=[None], metavar="N", help="stop after N tokens"
    )
    _add_features(result)
    _add_output(result)
    add_model_options(result, tokenizer=True)
    return result


def samples_parser() -> Parser:
    """The options of `evaluate samples`."""
    result = Parser(
        "evaluate samples", "SAMPLES REFERENCE --output DIR", "FID, sFID, IS, precision and recall of two sets."
    )
    result.add_argument(
        "samples", type=expanded, metavar="SAMPLES", help="a folder, .npz, WebDataset, parquet or a hub name"
    )
    result.add_argument(
        "reference", type=expanded, metavar="REFERENCE", help="the same, or an .npz of ADM's reference statistics"
    )
    result.add_argument(
        "--size", type=positive, metavar="S", help="bring shorter sides to S, take the centre (default: as is)"
    )
    result.add_argument("--num-images", type=positive, metavar="N", help="only N of the samples, spread over the set")
    _add_features(result)
    _add_output(result)
    _add_device(result)
    return result


def compare_parser() -> Parser:
    """The options of `evaluate compare`."""
    result = Parser("evaluate compare", "A B", "Print two reports beside each other: what is equal, and what differs.")
    for name in ("a", "b"):
        result.add_argument(
            name,
            metavar=name.upper(),
            type=expanded_path,
            help="the output folder of an evaluation, or its report.json",
        )
    return result


def statistics_parser() -> Parser:
    """The options of `evaluate statistics`."""
    result = Parser(
        "evaluate statistics",
        "SET --output FILE.npz",
        "Measure a set once, to give the file as --reference from then on.",
    )
    result.add_argument("set", type=expanded, metavar="SET", help="a folder, .npz, WebDataset, parquet or a hub name")
    _add_split(result)
    result.add_argument(
        "--size", type=positive, metavar="S", help="the model's: shorter sides to S, centres (default: as is)"
    )
    result.add_argument("--num-images", type=positive, metavar="N", help="only N images, spread over the set")
    _add_features(result)
    _add_batch_size(result)
    result.add_argument("--output", type=expanded_path, required=True, metavar="FILE", help="the .npz file to write")
    _add_device(result)
    return result


def _add_data(parser: argparse.ArgumentParser, name: str, text: str) -> None:
    parser.add_argument(name, type=expanded, required=True, metavar=name.strip("-").upper(), help=text)
    _add_split(parser)


def _add_split(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--split", help="train, val or test, where there are such")


def _add_features(parser: argparse.ArgumentParser, instead: str = "") -> None:
    text = f"inception, dinov2, efficientnet-lite0 or FILE.safetensors{instead} (default: %(default)s)"
    parser.add_argument("--features", type=expanded, default="inception", metavar="NAME", help=text)
    parser.add_argument("--weights", type=expanded, metavar="FILE", help="of inception or dinov2 (default: downloaded)")


def _add_output(parser: argparse.ArgumentParser) -> None:
    _add_batch_size(parser)
    parser.add_argument("--output", type=expanded_path, required=True, metavar="DIR", help="where to write the report")


def _add_batch_size(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--batch-size", type=positive, metavar="N", help="images at once (default: 64, or 256 on a GPU)"
    )


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="cpu, cuda, cuda:1, … (default: the GPU where there is one)")


# --- evaluations ---------------------------------------------------------------------------------------------------------


def _tokenizer(argv: Sequence[str], command: str, stack: ExitStack) -> None:
    args = tokenizer_parser().parse_args(argv)
    work = _start(args, stack)

    from detailflow.evaluation.features import load_extractor
    from detailflow.evaluation.tokenizer import evaluate_tokenizer, find_lpips
    from detailflow.evaluation.views import parse_spans, views_by_count
    from detailflow.hub import default_directory
    from detailflow.models.tokenizer import DetailFlowTokenizer

    tokenizer = DetailFlowTokenizer.from_pretrained(
        args.model or default_directory("tokenizer"), device=work.device, dtype=args.dtype
    )
    models = _claim(args, command, work, {"tokenizer": args.model})
    side, mistakes = tokenizer.config.image_size, parse_spans(tokenizer.schedule, args.mistakes_at)
    views_by_count(tokenizer.schedule, args.num_tokens, args.size)  # raises before anything is downloaded
    images = work.open(args.data, side, args.num_images, args.split)
    reference = work.open(args.reference, side) if args.reference else None
    extractor = None if args.features == NONE else load_extractor(args.features, work.device, args.weights)
    lpips, notes = find_lpips(args.lpips, side, work.device)
    report = evaluate_tokenizer(
        tokenizer, images, work, extractor, reference, lpips, args.num_tokens, args.size, mistakes, args.seed,
        args.model, notes,
    )  # fmt: skip
    _finish(args, report, command, work, models)


def _gpt(argv: Sequence[str], command: str, stack: ExitStack) -> None:
    args = gpt_parser().parse_args(argv)
    work = _start(args, stack)

    from detailflow.evaluation.features import load_extractor
    from detailflow.evaluation.gpt import Sweep, evaluate_gpt
    from detailflow.pipeline import DetailFlowPipeline

    names = ("guidance_scale", "guidance_schedule", "temperature", "top_k", "top_p", "num_tokens")
    sweep = Sweep(**{name: getattr(args, name) for name in names})
    pipeline = DetailFlowPipeline.from_pretrained(
        args.model, device=work.device, dtype=args.dtype, tokenizer=args.tokenizer
    )
    sweep.settings(pipeline)  # raises before anything is downloaded
    models = _claim(args, command, work, {"tokenizer": args.tokenizer or args.model, "gpt": args.model})
    reference = work.open(args.reference, pipeline.tokenizer.config.image_size, split=args.split)
    extractor = load_extractor(args.features, work.device, args.weights)
    report = evaluate_gpt(
        pipeline, reference, work, extractor, args.output, args.num_samples, sweep, args.labels, args.seeds, args.keep_samples,
        args.model, lambda text: print(text, file=sys.stderr, flush=True),
    )  # fmt: skip
    _finish(args, report, command, work, models)


def _samples(argv: Sequence[str], command: str, stack: ExitStack) -> None:
    args = samples_parser().parse_args(argv)
    work = _start(args, stack)

    from detailflow.evaluation.samples import evaluate_samples

    models = _claim(args, command, work, {})
    report = evaluate_samples(
        args.samples, args.reference, work, args.features, args.weights, args.size, args.num_images
    )
    _finish(args, report, command, work, models)


def _statistics(argv: Sequence[str], command: str, stack: ExitStack) -> None:
    args = statistics_parser().parse_args(argv)
    if args.output.suffix != ".npz" or args.output.exists():
        problem = "exists already" if args.output.exists() else "is not named so"
        raise DetailFlowError(f"--output must be a new .npz file, and {args.output} {problem}")
    check_output(args.output.parent)

    from detailflow.evaluation.distances import REFERENCE_KEPT, save_statistics
    from detailflow.evaluation.features import load_extractor
    from detailflow.evaluation.samples import Work, measure_set

    work = Work.here(args.device, args.batch_size)
    images = work.open(args.set, args.size, args.num_images, args.split)
    measured, _ = measure_set(load_extractor(args.features, work.device, args.weights), images, work, REFERENCE_KEPT)
    if work.world.is_main:
        save_statistics(args.output, measured)
        print(f"wrote {args.output}")


def _compare(argv: Sequence[str], command: str, stack: ExitStack) -> None:
    args = compare_parser().parse_args(argv)

    from detailflow.evaluation.compare import compare_reports

    print(compare_reports(args.a, args.b))


def _start(args: argparse.Namespace, stack: ExitStack) -> "Work":
    """Find out what would fail only after long work, and who works; hold the folder for them."""
    check_output(args.output)

    from detailflow.evaluation.report import check_packages
    from detailflow.evaluation.samples import Work
    from detailflow.files import lock_folder

    check_packages("matplotlib")
    work = Work.here(args.device, args.batch_size)
    stack.enter_context(lock_folder(args.output, "evaluation", work.world))
    return work


def _claim(
    args: argparse.Namespace, command: str, work: "Work", sources: "Mapping[Kind, str | None]"
) -> dict[str, Any]:
    """What the report says of the models, once it is clear that its folder is free for it."""
    from detailflow.evaluation.report import claim, model_entry

    models: dict[str, Any] = {}
    with work.world.raise_together():
        if work.world.is_main:
            models = {kind: model_entry(source, kind) for kind, source in sources.items()}
            claim(args.output, command, models)
    return models


def _finish(
    args: argparse.Namespace, report: "Report | None", command: str, work: "Work", models: Mapping[str, Any]
) -> None:
    """Write the report with all that it was computed from, and show its tables."""
    if report is None:
        return

    from dataclasses import replace
    from datetime import UTC, datetime

    from detailflow.evaluation.report import circumstances, section_table

    date = datetime.now(UTC).isoformat(timespec="seconds")
    around = circumstances(work.device, work.world.size, getattr(args, "dtype", None))
    provenance = {"command": command, "date": date, "models": dict(models), **report.provenance, **around}
    replace(report, provenance=provenance).write(args.output)
    for section in report.sections:
        print(f"{section.title}\n", *section_table(section), "", sep="\n")
    for note in report.notes:
        print(f"{note}\n")
    print(f"wrote {args.output / 'report.md'}")
