"""`detailflow bench`: time a model, compared with a loop without a KV cache and with the machine's limits."""

import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from detailflow.cli.common import DTYPES, Dtype, Parser, add_model_options, check_output
from detailflow.errors import DetailFlowError, os_errors
from detailflow.progress import progress_bar
from detailflow.settings import BatchSize, Location, PositiveInt


def parser() -> Parser:
    """Return the command's parser."""
    result = Parser("bench", "", "Time a model on this machine: one table, with the machine's ceilings above it.")
    result.option("--random-weights", bool, help="a published model's sizes without its weights: no download")
    result.option("--batch-sizes", tuple[BatchSize, ...], [1, 8], "images at once (default: 1 8)", "N")
    dtypes = f"of {', '.join(DTYPES)} (default: the first two)"
    result.option("--dtypes", tuple[Dtype, ...], list(DTYPES[:2]), dtypes, "TYPE")
    result.option("--accuracy", bool, help="compare the logits of all engines with float32's, instead of timing")
    result.option("--compile", bool, help="on a GPU, time compiled generation too")
    result.option("--naive", bool, True, "time the loop without a cache too")
    result.option(
        "--other", Location, help="time another implementation too: images = F(class_ids)", metavar="FILE.py:F"
    )
    result.option("--repeats", PositiveInt, 5, "the median of N counts", "N")
    result.option("--json", Path, help="write the figures there too", metavar="FILE")
    add_model_options(result, tokenizer=True, dtype=False)
    return result


def _is_report(file: Path) -> bool:
    """Return whether a file may be replaced by a report: it is empty, or one."""
    from detailflow.files import read_json

    try:
        return file.stat().st_size == 0 or {"model", "rows"} <= read_json(file).keys()
    except DetailFlowError:
        return False


def _check_together(options: Mapping[str, object]) -> None:
    """Refuse options that would be left unused without a word."""
    for option, with_it in (("accuracy", "other"), ("accuracy", "compile"), ("random_weights", "tokenizer")):
        if options[option] and options[with_it]:
            names = [f"--{name.replace('_', '-')}" for name in (with_it, option)]
            raise DetailFlowError(f"{names[0]} does not go with {names[1]}: leave out one of them")


def main(argv: Sequence[str]) -> int:
    """Print the table."""
    options = vars(parser().parse_args(argv))
    _check_together(options)
    if file := options.pop("json"):
        from detailflow.files import check_regular

        check_output(file.parent)
        with os_errors(f"cannot write {file}"):
            check_regular(file)
        if file.exists() and not _is_report(file):
            raise DetailFlowError(
                f"{file} is not a report of `detailflow bench`: give another file, or remove it first"
            )

    from dataclasses import asdict

    from detailflow.accuracy import accuracy
    from detailflow.benchmark import BenchmarkConfig, benchmark
    from detailflow.files import write_json

    compares = options.pop("accuracy")
    config = BenchmarkConfig(**options)
    with progress_bar(desc="", bar_format="{desc} ({elapsed})", delay=0) as bar:
        tell = bar.set_description_str
        # The table follows at the end; what is known before is kept if that is never reached.
        report = accuracy(config, tell) if compares else benchmark(config, tell, partial(bar.write, file=sys.stderr))
    print(report)
    if file:
        write_json(file, asdict(report))
    return 0
