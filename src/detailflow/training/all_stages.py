"""Tokenizer, extraction and AR model in a row: the newcomer's one command. It first says what it will do."""

import logging
from collections.abc import Iterator
from pathlib import Path

import torch

from detailflow import hub
from detailflow.data.images import ImageSource, open_images
from detailflow.data.source import describe_amount
from detailflow.distributed import World, launched
from detailflow.errors import DetailFlowError
from detailflow.published import CONFIG_FILE
from detailflow.training.checkpoints import KNOWN_BY, of_loop, run_folder
from detailflow.training.extract import extract
from detailflow.training.gpt import train_gpt
from detailflow.training.inputs import difference, images_input
from detailflow.training.plan import (
    Expected,
    ceiling_of,
    describe_duration,
    extraction_seconds,
    plan_gpt,
    plan_tokenizer,
    planned_world,
    rough_bytes,
    several,
)
from detailflow.training.presets import AllStages, StageSettings, stage_settings
from detailflow.training.run_report import write_run_report
from detailflow.training.tokenizer import train_tokenizer

TOKEN_BYTES = 3 * 2  # of each token of a crop: three rows of 16-bit codes
_log = logging.getLogger(__name__)


def train_all(wanted: AllStages, output: Path, device: str | None = None) -> None:
    """Train into output/tokenizer, output/tokens and output/gpt; what is finished there already stays."""
    world, chosen = launched(device)
    with world.raise_together():
        source = open_images(wanted.data, split=wanted.split)
        _check_data(output, source)
        stages = stage_settings(wanted, source, output, chosen)
        tokenizer, tokens, gpt = (output / name for name in ("tokenizer", "tokens", "gpt"))
        if stages.tokenizer and not wanted.init:
            _check_steps(output, stages.tokenizer.loop.steps)
        if world.is_main and not (tokenizer.exists() or gpt.exists()):
            for line in outlook(stages, source, world, chosen):
                _log.info("%s", line)
        if stages.tokenizer is None and world.is_main:
            assert wanted.init
            _copy_tokenizer(wanted.init, tokenizer)
    if stages.tokenizer:
        train_tokenizer(stages.tokenizer, tokenizer, device)
    extract(stages.extraction, tokens, device)  # or check that finished tokens are of these images
    train_gpt(stages.gpt, gpt, device)
    write_run_report(output, source, wanted.data, device)


def describe_all(wanted: AllStages, output: Path, device: str | None = None) -> Iterator[str]:
    """Yield what `train_all` would do, each line as soon as it is known, and nothing on other ranks.

    No file is written or downloaded but configs of `init`.
    """
    world = planned_world()
    if not world.is_main:
        return
    chosen = launched(device)[1] if world.size == 1 else torch.device(device or "cpu")
    source = open_images(wanted.data, split=wanted.split)
    yield source.summary
    _check_data(output, source)
    yield from outlook(stage_settings(wanted, source, output, chosen), source, world, chosen)


def outlook(stages: StageSettings, source: ImageSource, world: World, device: torch.device) -> Iterator[str]:
    """Yield lines on what the stages will do: sizes, and time and memory by a few real steps on this machine."""
    yield stages.choice
    if not stages.gpt.init:
        yield describe_amount(len(source))
    total, disk, ceiling = 0.0, 0.0, ceiling_of(stages.gpt, device)
    if stages.tokenizer:
        plan = plan_tokenizer(stages.tokenizer, world, device)
        total += (seconds := plan.expected_seconds(*ceiling))
        disk += plan.disk_bytes
        yield f"tokenizer: {plan.brief(seconds)}"
    crops = stages.extraction.num_crops
    total += (seconds := extraction_seconds(stages.extraction, stages.sizes, len(source), world, device))
    yield f"tokens: {several(crops, 'crop')} of each image: {describe_duration(seconds)}"
    expected = Expected(len(source), crops, source.class_names, stages.sizes)
    plan = plan_gpt(stages.gpt, world, device, expected)
    total += (seconds := plan.expected_seconds(*ceiling))
    disk += plan.disk_bytes + len(source) * crops * TOKEN_BYTES * stages.sizes.num_tokens
    yield f"AR model: {plan.brief(seconds)}"
    yield f"disk: about {rough_bytes(disk)} for checkpoints, tokens and the model"
    about = f"in all about {describe_duration(total)} on {device}, if it stays as busy as now"
    yield f"{about}; Ctrl-C stops, the same command goes on"


def _copy_tokenizer(source: str, folder: Path) -> None:
    """Copy the tokenizer of a model, or check that this was done."""
    config, tensors = hub.load(source, "tokenizer")
    if (folder / CONFIG_FILE).exists() or run_folder(folder).read():
        if hub.fingerprint(*hub.load(folder, "tokenizer")) != hub.fingerprint(config, tensors):
            raise DetailFlowError(f"{folder} holds another tokenizer than that of {source}: choose another folder")
        return
    hub.save(folder, "tokenizer", config, tensors)


def _check_data(output: Path, source: ImageSource) -> None:
    """Check that a run that was begun in the folder has these images, before anything else is said of them."""
    known = dict(run_folder(output / "tokenizer").read().get(KNOWN_BY) or {}).get("data")
    if known and (changed := difference("data", known, images_input(source).read())):
        raise DetailFlowError(
            f"{output} holds a run that was begun with {changed}: choose another folder, where --init {output} goes on "
            "from its models, or give it the same again"
        )


def _check_steps(output: Path, steps: int) -> None:
    """Check that the tokenizer stays the one that made the tokens, if there are any."""
    recorded = of_loop(run_folder(output / "tokenizer").read(), "steps")
    if 0 < recorded < steps and (output / "tokens").exists():
        raise DetailFlowError(
            f"{output / 'tokens'} is of a tokenizer that was trained for {recorded:,} steps, not {steps:,}: choose "
            f"another folder, repeat --tokenizer-steps {recorded}, or remove {output / 'tokens'} and {output / 'gpt'}"
        )
