"""Tokenizer, extraction and AR model in a row, with the settings of a preset: the newcomer's one command."""

import logging
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from detailflow.data.images import open_images
from detailflow.distributed import World
from detailflow.errors import DetailFlowError
from detailflow.settings import parse_settings
from detailflow.training.checkpoints import run_folder
from detailflow.training.config import CLASSIFIER, Extraction, GPTTraining, TokenizerTraining
from detailflow.training.extract import extract
from detailflow.training.gpt import train_gpt
from detailflow.training.run_report import write_run_report
from detailflow.training.tokenizer import train_tokenizer

_log = logging.getLogger(__name__)
Preset = Literal["small-32", "own-64", "own-128", "own-256"]
PRESETS = get_args(Preset)  # the default first


def load_settings(preset: str, stage: str) -> dict[str, Any]:
    """Return the settings of one stage ("tokenizer", "extract" or "gpt") of a recipe in `recipes/`."""
    return yaml.safe_load((files("detailflow") / "recipes" / preset / f"{stage}.yaml").read_text())


def train_preset(
    preset: str,
    data: str,
    output: Path,
    split: str | None = None,
    tokenizer_steps: int | None = None,
    gpt_steps: int | None = None,
    device: str | None = None,
) -> None:
    """Train into output/tokenizer, output/tokens and output/gpt; what is finished there already stays."""
    images = {"data": data, "split": split}
    source = open_images(data, split=split)
    tokenizer, tokens, gpt = (str(output / name) for name in ("tokenizer", "tokens", "gpt"))

    first = parse_settings(TokenizerTraining, {**load_settings(preset, "tokenizer"), **images}, preset)
    if len(source.class_names) < 2:
        first = _without_classes(first)
    if tokenizer_steps is not None:
        first = replace(first, loop=replace(first.loop, steps=tokenizer_steps))
    _check_steps(output, first.loop.steps)
    train_tokenizer(first, Path(tokenizer), device)

    if not (Path(tokens) / "manifest.json").exists():
        settings = {**load_settings(preset, "extract"), **images, "tokenizer": tokenizer}
        extract(parse_settings(Extraction, settings, preset), Path(tokens), device)
    elif World.from_launch(cpu=device == "cpu").is_main:
        _log.info("%s: these tokens are finished already", tokens)

    last = parse_settings(
        GPTTraining, {**load_settings(preset, "gpt"), "tokens": tokens, "tokenizer": tokenizer}, preset
    )
    if gpt_steps is not None:
        last = replace(last, loop=replace(last.loop, steps=gpt_steps))
    train_gpt(last, Path(gpt), device)
    write_run_report(output, source, data, device)


def _check_steps(output: Path, steps: int) -> None:
    """Check that the tokenizer stays the one that made the tokens, if there are any."""
    loop = run_folder(output / "tokenizer").read().get("loop")
    recorded = loop.get("steps") if isinstance(loop, dict) else None
    if isinstance(recorded, int) and recorded < steps and (output / "tokens").exists():
        raise DetailFlowError(
            f"{output / 'tokens'} is of a tokenizer that was trained for {recorded:,} steps, not {steps:,}: choose "
            f"another folder, repeat --tokenizer-steps {recorded}, or remove {output / 'tokens'} and {output / 'gpt'}"
        )


def _without_classes(config: TokenizerTraining) -> TokenizerTraining:
    """Return the settings without the losses that need a classifier of the images' classes."""
    learnt = [name for name in ("perceptual", "alignment") if getattr(config, f"{name}_network") == CLASSIFIER]
    off: dict[str, Any] = {name: 0.0 for name in learnt if getattr(config, name)}
    for name in off:
        what = "these images have one class: training goes without the %s loss, whose features are learnt from classes"
        _log.info(what, name)
    return replace(config, **off)
