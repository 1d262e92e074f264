"""`detailflow bench`: time a model, compared with a loop without a KV cache and with the machine's limits."""

from collections.abc import Sequence

from detailflow.cli.common import DTYPES, Parser, add_model_options, check_output, expanded, expanded_path, positive
from detailflow.errors import DetailFlowError


def parser() -> Parser:
    """Return the command's parser."""
    result = Parser("bench", "", "Time a model on this machine: one table, with the machine's ceilings above it.")
    add = result.add_argument
    add("--random-weights", action="store_true", help="a published model's sizes without its weights: no download")
    add("--batch-sizes", type=positive, nargs="+", default=[1, 8], metavar="N", help="images at once (default: 1 8)")
    dtypes = f"of {', '.join(DTYPES)} (default: the first two)"
    add("--dtypes", nargs="+", choices=DTYPES, default=DTYPES[:2], metavar="TYPE", help=dtypes)
    add("--compile", action="store_true", help="time compiled generation too (minutes to compile on a CPU)")
    add("--no-naive", dest="naive", action="store_false", help="leave out the loop without a cache")
    add("--other", type=expanded, metavar="FILE.py:F", help="time another implementation too: images = F(class_ids)")
    add("--repeats", type=positive, default=3, metavar="N", help="the best of N counts (default: %(default)s)")
    add("--json", type=expanded_path, metavar="FILE", help="write the figures there too")
    add_model_options(result, tokenizer=True, dtype=False)
    return result


def main(argv: Sequence[str]) -> int:
    """Print the table."""
    options = vars(parser().parse_args(argv))
    if file := options.pop("json"):
        check_output(file.parent)
        if file.is_dir() or not file.name:
            raise DetailFlowError(f"--json must be a file to write, and {file} is a folder")

    from dataclasses import asdict

    from tqdm import tqdm

    from detailflow.benchmark import BenchmarkConfig, benchmark
    from detailflow.files import write_json

    with tqdm(bar_format="{desc} ({elapsed})", leave=False, disable=None) as bar:
        report = benchmark(BenchmarkConfig(**options), bar.set_description_str)
    print(report)
    if file:
        write_json(file, asdict(report))
    return 0
