"""`detailflow bench`: how fast a model is here, beside a loop without a cache and the machine's own limits."""

from collections.abc import Sequence

from detailflow.cli.common import DTYPES, Parser, add_model_options, check_output, expanded, expanded_path, positive
from detailflow.errors import DetailFlowError


def parser() -> Parser:
    """The command's options."""
    result = Parser("bench", "", "Time a model on this machine: one table, with the machine's ceilings above it.")
    result.add_argument(
        "--random-weights", action="store_true", help="a zoo model's sizes without its weights: no download"
    )
    result.add_argument(
        "--batch-sizes", type=positive, nargs="+", default=[1, 8], metavar="N", help="images at once (default: 1 8)"
    )
    result.add_argument(
        "--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES[:2]), metavar="TYPE",
        help=f"of {', '.join(DTYPES)} (default: the first two)",
    )  # fmt: skip
    result.add_argument(
        "--compile", action="store_true", help="time the compiled engine too (minutes to compile on a CPU)"
    )
    result.add_argument("--no-naive", action="store_true", help="leave out the loop without a cache")
    result.add_argument(
        "--other", type=expanded, metavar="FILE.py:F", help="time another implementation too: images = F(class_ids)"
    )
    result.add_argument("--repeats", type=positive, default=3, metavar="N", help="the best of N (default: %(default)s)")
    result.add_argument("--json", type=expanded_path, metavar="FILE", help="write the figures there too")
    add_model_options(result, tokenizer=True, dtype=False)
    return result


def main(argv: Sequence[str]) -> int:
    """Print the table."""
    args = parser().parse_args(argv)
    if args.json:
        check_output(args.json.parent)
        if args.json.is_dir() or not args.json.name:
            raise DetailFlowError(f"--json must be a file to write, and {args.json} is a folder")

    from tqdm import tqdm

    from detailflow.benchmark import benchmark, other_implementation
    from detailflow.files import write_json

    other = other_implementation(args.other) if args.other else None
    with tqdm(bar_format="{desc} ({elapsed})", leave=False, disable=None) as bar:
        report = benchmark(
            args.model, args.batch_sizes, args.dtypes, args.device, args.tokenizer, args.random_weights, args.compile,
            not args.no_naive, args.repeats, other, bar.set_description_str,
        )  # fmt: skip
    print(report)
    if args.json:
        write_json(args.json, report.as_dict())
    return 0
