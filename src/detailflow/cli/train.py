"""`detailflow train`: a tokenizer, an AR model, or all in a row from a preset."""

import os
import shlex
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from detailflow.cli.common import Parser, add_device_option, check_apart, check_output
from detailflow.cli.request import DRY_RUN, RECIPES, Request, read_request, read_settings_file, recipe_file
from detailflow.errors import DetailFlowError, MissingPackageError, missing_package
from detailflow.settings import Location, PositiveInt, flat, parse_settings
from detailflow.words import unknown

AGAIN = "The same command goes on with a run that was interrupted."
DATA = "a folder, with class subfolders or without, parquet, WebDataset, a save_to_disk folder, or a hub data set"
TOKENIZER = f"Train a tokenizer on images: {DATA}. {AGAIN}"
GPT = f"Train an AR model on the tokens that `detailflow extract` wrote. {AGAIN}"


def main(argv: Sequence[str]) -> int:
    """Run the command and return the exit status."""
    try:
        _main(argv)
    except MissingPackageError as error:  # of the first setting that needs one; without the extra there will be more
        if error.extra == "train" and find_spec("accelerate") is None:
            raise missing_package("detailflow train", None) from error
        raise
    return 0


def _main(argv: Sequence[str]) -> None:
    stage = argv[0] if argv else ""
    if stage == "tokenizer":
        _tokenizer(argv[1:])
    elif stage == "gpt":
        _gpt(argv[1:])
    elif stage and not stage.startswith("-"):
        data = shlex.quote(stage) if os.path.exists(stage) else "DATA"
        otherwise = f"give tokenizer or gpt, or --data {data} --output DIR for all in a row"
        raise DetailFlowError(unknown("stage", stage, ("tokenizer", "gpt"), otherwise))
    else:
        _all(argv)


def _tokenizer(argv: Sequence[str]) -> None:
    from detailflow.training.config import TokenizerTraining
    from detailflow.training.presets import tokenizer_sizes
    from detailflow.training.tokenizer import train_tokenizer

    _run(read_request(TokenizerTraining, "train tokenizer", TOKENIZER, argv, tokenizer_sizes, True), train_tokenizer)


def _gpt(argv: Sequence[str]) -> None:
    from detailflow.training.config import GPTTraining
    from detailflow.training.gpt import train_gpt
    from detailflow.training.presets import gpt_sizes

    _run(read_request(GPTTraining, "train gpt", GPT, argv, gpt_sizes, True), train_gpt)


def _run(request: Request | None, train: Callable[[Any, Path, str | None], object]) -> None:
    if request and request.dry_run:
        from detailflow.training.plan import describe_plan

        sizes = _planned_tokenizer(getattr(request.settings, "tokenizer", None))
        if plan := describe_plan(request.settings, request.device, sizes):
            print(plan)
    elif request:
        train(request.settings, request.output, request.device)


def _planned_tokenizer(name: str | None) -> Any:
    """Return the sizes in the settings file or recipe of a tokenizer that is still to be trained, if `name` is one."""
    from detailflow.models.tokenizer import TokenizerConfig

    file = Path(recipe_file(name)) if name else None
    if file is None or not os.path.isfile(file) or file.suffix not in (".yaml", ".yml"):
        return None
    under = [file.with_name("tokenizer.yaml")] if file.is_relative_to(RECIPES) else []  # the base of the others
    values = {key: value for path in (*under, file) for key, value in flat(read_settings_file(str(path)))}
    sizes = {key.removeprefix("model."): value for key, value in values.items() if key.startswith("model.")}
    return parse_settings(TokenizerConfig, sizes, name)


def preset_parser() -> Parser:
    """Return the options of training all in a row."""
    from detailflow.training.config import CropSet
    from detailflow.training.presets import PRESETS, Preset

    parser = Parser(
        "train",
        "{tokenizer,gpt} … | --data DATA --output DIR",
        "Train a tokenizer or an AR model (see `detailflow train tokenizer --help`, `detailflow train gpt --help`), "
        f"or, with --data, all in a row: tokenizer, extraction, AR model. {AGAIN}",
    )
    parser.option("--data", Location, help=DATA, required=True)
    parser.option("--preset", Preset, None, f"{', '.join(PRESETS)} (default: by the images' size)", "NAME")
    parser.option("--init", Location, help="start from this model: a folder, hub name, detailflow-16 or shipped")
    parser.option("--finetune-decoder", bool, help="train the decoder of --init, too")
    parser.option(
        "--lora", PositiveInt, help="train only LoRA matrices of this rank in the AR model of --init", metavar="N"
    )
    parser.option("--output", Path, help="gets tokenizer/, tokens/, gpt/ and report.html", metavar="DIR", required=True)
    parser.option("--split", help="of the data, if it has several (default: train)")
    parser.option("--image-column", default="image", help="of parquet files and hub data sets", metavar="NAME")
    parser.option("--label-column", default="label", help="of these, and of metadata files", metavar="NAME")
    parser.option("--tokenizer-steps", PositiveInt, help="in place of the recipe's", metavar="N")
    parser.option("--gpt-steps", PositiveInt, help="in place of the recipe's", metavar="N")
    parser.option("--no-flip", bool, help="no mirror images: for text, or anything else with a left and a right")
    parser.option("--crops", CropSet, None, "of each image for the AR model: ten, six or two (default: ten)", "NAME")
    add_device_option(parser)
    parser.option(DRY_RUN, bool, help="only say what it would do, with time and memory")
    return parser


def _all(argv: Sequence[str]) -> None:
    from detailflow.distributed import World
    from detailflow.training.all_stages import describe_all, train_all
    from detailflow.training.presets import AllStages

    options = vars(preset_parser().parse_args(list(argv) or ["--help"]))
    output, device, dry_run = options.pop("output"), options.pop("device"), options.pop("dry_run")
    wanted = AllStages(**options)
    check_apart(output, wanted.data)
    if dry_run:
        for line in describe_all(wanted, output, device):
            print(line, flush=True)
        return
    check_output(output, models=True)
    train_all(wanted, output, device)
    if not World.from_launch().is_main:
        return
    model = shlex.quote(str(output))
    print(f"next: detailflow generate --model {model}; detailflow serve --model {model}; open {output / 'report.html'}")
