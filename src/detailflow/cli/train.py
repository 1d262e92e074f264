"""`detailflow train`: a tokenizer, an AR model, or all in a row from a preset."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from detailflow.cli.common import Parser, check_output, expanded, expanded_path, positive, unknown
from detailflow.cli.settings import Request, parse
from detailflow.errors import DetailFlowError

AGAIN = "The same command goes on with a run that was interrupted."
TOKENIZER = "Train a tokenizer on images: a folder of class subfolders, parquet file(s), or a hub data set.\n" + AGAIN
GPT = "Train an AR model on the tokens that `detailflow extract` wrote.\n" + AGAIN


def main(argv: Sequence[str]) -> int:
    """Run the command; the exit status."""
    stage = argv[0] if argv else ""
    if stage == "tokenizer":
        from detailflow.training.config import TokenizerTraining
        from detailflow.training.tokenizer import train_tokenizer

        if request := parse(TokenizerTraining, "train tokenizer", TOKENIZER, argv[1:], _tokenizer_sizes, can_plan=True):
            if request.dry_run:
                _print_plan(request)
            else:
                train_tokenizer(request.settings, request.output, request.device)
    elif stage == "gpt":
        from detailflow.training.config import GPTTraining
        from detailflow.training.gpt import train_gpt

        if request := parse(GPTTraining, "train gpt", GPT, argv[1:], _gpt_sizes, can_plan=True):
            if request.dry_run:
                _print_plan(request)
            else:
                train_gpt(request.settings, request.output, request.device)
    elif stage and not stage.startswith("-"):
        otherwise = "give tokenizer or gpt, or --data DATA --output DIR for all in a row"
        raise DetailFlowError(unknown("stage", stage, ("tokenizer", "gpt"), otherwise))
    else:
        _train_all(argv)
    return 0


def _print_plan(request: Request) -> None:
    from detailflow.training.plan import print_plan

    print_plan(request.settings, request.device)


def _tokenizer_sizes(source: str) -> dict[str, Any]:
    """The settings that a tokenizer to start from implies."""
    from detailflow import hub
    from detailflow.models.loading import config_from_dict
    from detailflow.models.tokenizer import TokenizerConfig

    return {"model": asdict(config_from_dict(TokenizerConfig, hub.load_config(source, "tokenizer"), source))}


def _gpt_sizes(source: str) -> dict[str, Any]:
    """The settings that an AR model to start from implies."""
    from detailflow import hub
    from detailflow.models.gpt import GPTConfig
    from detailflow.models.loading import config_from_dict

    config = config_from_dict(GPTConfig, hub.load_config(source, "gpt"), source)
    return {key: getattr(config, key) for key in ("width", "depth", "heads", "dropout")} | {
        "sampling": asdict(config.sampling)
    }


def _train_all(argv: Sequence[str]) -> None:
    from detailflow.training.presets import PRESETS, train_preset

    parser = Parser(
        "train",
        "{tokenizer,gpt} … | --data DATA --output DIR",
        "Train a tokenizer or an AR model (see `detailflow train tokenizer --help`, `detailflow train gpt --help`), "
        "or, with --data, all in a row: tokenizer, extraction, AR model. The same command goes on with an interrupted run.",
    )
    parser.add_argument(
        "--data", type=expanded, required=True, help="a folder of class subfolders, parquet, or a hub data set"
    )
    parser.add_argument(
        "--preset",
        choices=PRESETS,
        default=PRESETS[0],
        metavar="NAME",
        help=f"one of {', '.join(PRESETS)} (default: the first)",
    )
    parser.add_argument(
        "--output", type=expanded_path, required=True, metavar="DIR", help="gets tokenizer/, tokens/ and gpt/"
    )
    parser.add_argument("--split", help="of the data, where it has several (default: train)")
    parser.add_argument("--tokenizer-steps", type=positive, metavar="N", help="in place of the preset's")
    parser.add_argument("--gpt-steps", type=positive, metavar="N", help="in place of the preset's")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, … (default: the GPU where there is one)")
    options = parser.parse_args(list(argv) or ["--help"])
    check_output(options.output)
    train_preset(
        options.preset,
        options.data,
        options.output,
        split=options.split,
        tokenizer_steps=options.tokenizer_steps,
        gpt_steps=options.gpt_steps,
        device=options.device,
    )
    print(f"done: detailflow generate --model {options.output}")
