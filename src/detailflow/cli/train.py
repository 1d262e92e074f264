"""`detailflow train`: a tokenizer, an AR model, or all in a row from a preset."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from detailflow.cli.common import Parser, add_device_option, check_output
from detailflow.cli.settings import Request, read_request
from detailflow.errors import DetailFlowError
from detailflow.settings import Location, PositiveInt, parse_settings, unknown

AGAIN = "The same command goes on with a run that was interrupted."
TOKENIZER = f"Train a tokenizer on images: a folder of class subfolders, parquet file(s), or a hub data set. {AGAIN}"
GPT = f"Train an AR model on the tokens that `detailflow extract` wrote. {AGAIN}"


def main(argv: Sequence[str]) -> int:
    """Run the command and return the exit status."""
    stage = argv[0] if argv else ""
    if stage == "tokenizer":
        _tokenizer(argv[1:])
    elif stage == "gpt":
        _gpt(argv[1:])
    elif stage and not stage.startswith("-"):
        otherwise = "give tokenizer or gpt, or --data DATA --output DIR for all in a row"
        raise DetailFlowError(unknown("stage", stage, ("tokenizer", "gpt"), otherwise))
    else:
        _all(argv)
    return 0


def _tokenizer(argv: Sequence[str]) -> None:
    from detailflow.training.config import TokenizerTraining
    from detailflow.training.tokenizer import train_tokenizer

    _run(read_request(TokenizerTraining, "train tokenizer", TOKENIZER, argv, _tokenizer_sizes, True), train_tokenizer)


def _gpt(argv: Sequence[str]) -> None:
    from detailflow.training.config import GPTTraining
    from detailflow.training.gpt import train_gpt

    _run(read_request(GPTTraining, "train gpt", GPT, argv, _gpt_sizes, True), train_gpt)


def _run(request: Request | None, train: Callable[[Any, Path, str | None], object]) -> None:
    if request and request.dry_run:
        from detailflow.training.plan import describe_plan

        if plan := describe_plan(request.settings, request.device):
            print(plan)
    elif request:
        train(request.settings, request.output, request.device)


def _tokenizer_sizes(source: str) -> dict[str, Any]:
    """Return the settings that a tokenizer to start from implies."""
    from detailflow import hub
    from detailflow.models.tokenizer import TokenizerConfig

    return {"model": asdict(parse_settings(TokenizerConfig, hub.load_config(source, "tokenizer"), source))}


def _gpt_sizes(source: str) -> dict[str, Any]:
    """Return the settings that an AR model to start from implies."""
    from detailflow import hub
    from detailflow.models.gpt import GPTConfig

    config = parse_settings(GPTConfig, hub.load_config(source, "gpt"), source)
    sizes = {key: getattr(config, key) for key in ("width", "depth", "heads", "dropout")}
    return sizes | {"sampling": asdict(config.sampling)}


def preset_parser() -> Parser:
    """Return the options of training all in a row."""
    from detailflow.training.presets import PRESETS, Preset

    parser = Parser(
        "train",
        "{tokenizer,gpt} … | --data DATA --output DIR",
        "Train a tokenizer or an AR model (see `detailflow train tokenizer --help`, `detailflow train gpt --help`), "
        f"or, with --data, all in a row: tokenizer, extraction, AR model. {AGAIN}",
    )
    data = "a folder of class subfolders, parquet, or a hub data set"
    parser.option("--data", Location, help=data, required=True)
    parser.option("--preset", Preset, PRESETS[0], f"one of {', '.join(PRESETS)} (default: the first)", "NAME")
    parser.option("--output", Path, help="gets tokenizer/, tokens/, gpt/ and report.html", metavar="DIR", required=True)
    parser.option("--split", help="of the data, if it has several (default: train)")
    parser.option("--tokenizer-steps", PositiveInt, help="in place of the preset's", metavar="N")
    parser.option("--gpt-steps", PositiveInt, help="in place of the preset's", metavar="N")
    add_device_option(parser)
    return parser


def _all(argv: Sequence[str]) -> None:
    from detailflow.training.presets import train_preset

    options = vars(preset_parser().parse_args(list(argv) or ["--help"]))
    output = options.pop("output")
    check_output(output)
    train_preset(options.pop("preset"), options.pop("data"), output, **options)
    print(f"done: detailflow generate --model {output}")
