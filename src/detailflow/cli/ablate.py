"""`detailflow ablate`: the paper's table 2 on images and at a size of one's own."""

import re
import shlex
from collections.abc import Sequence
from typing import Any

from detailflow.cli.common import Parser, check_output, expanded_path
from detailflow.errors import DetailFlowError, printable

SETTINGS = (
    *("data", "split", "test_data", "test_split", "reference", "reference_split", "features", "num_reconstructions"),
    *("num_samples", "guidance_scales", "seeds", "batch_size", "tokenizer.…", "extract.…", "gpt.…"),
)


def parser() -> Parser:
    """The command's options, without the settings."""
    result = Parser(
        "ablate",
        "--config FILE --output DIR [--KEY VALUE …]",
        "Train and measure the variants of the paper's ablation, each of which adds something to the one before, and write "
        "report.json and report.md. The same command goes on with a run that was interrupted.",
    )
    result.add_argument(
        "--config", action="append", required=True, metavar="FILE", help="YAML with settings; several are laid over one another"
    )
    result.add_argument("--output", type=expanded_path, required=True, metavar="DIR", help="where to write")
    result.add_argument("--variants", nargs="+", default=[], metavar="NAME", help="only these (default: all)")
    result.add_argument("--device", help="cpu, cuda, cuda:1, … (default: the GPU where there is one)")
    result.epilog = f"settings, in place of the file's: {', '.join(SETTINGS)} (as --gpt.loop.steps 1000)"
    return result


def main(argv: Sequence[str]) -> int:
    """Run the ablation, or go on with it; print the table."""
    args, rest = parser().parse_known_args(argv or ["--help"])
    check_output(args.output)

    from detailflow.cli.settings import expand_values, read_settings_file
    from detailflow.evaluation.ablation import run_ablation
    from detailflow.evaluation.report import section_table
    from detailflow.training.ablation import Ablation, laid_over

    values: dict[str, Any] = {}
    for one in (*map(read_settings_file, args.config), *_given(rest)):
        values = laid_over(values, one)
    config = Ablation.from_dict(expand_values(values), " ".join(args.config))
    report = run_ablation(config, args.output, args.variants, args.device, printable(shlex.join(["detailflow", "ablate", *argv])))
    if report is not None:
        for section in report.sections:
            print(f"\n{section.title}\n", *section_table(section), sep="\n")
        print("", *(f"{note}\n" for note in report.notes[:1]), f"wrote {args.output / 'report.md'}", sep="\n")
    return 0


def _given(words: Sequence[str]) -> list[dict[str, Any]]:
    """`--a.b VALUE` or `--a.b=VALUE`, each as nested settings.

    Raises:
        DetailFlowError: for words that are neither.
    """
    result = []
    rest = iter(words)
    for word in rest:
        key, equals, text = word.removeprefix("--").partition("=")
        if not word.startswith("--") or not all(key.split(".")):
            raise DetailFlowError(f"unexpected word {word!r}: settings are given as --KEY VALUE")
        if not equals and (text := next(rest, "--")).startswith("--"):
            raise DetailFlowError(f"--{key} needs a value")
        value = _value(text)
        for part in reversed(key.split(".")):
            value = {part: value}
        result.append(value)
    return result


def _value(text: str) -> Any:
    """As YAML reads it, and 1e-3 as a number too."""
    import yaml

    from detailflow.storage import load_yaml

    try:
        return float(text) if re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", text) else load_yaml(text)
    except yaml.YAMLError:
        raise DetailFlowError(f"{text!r} is no valid value") from None
