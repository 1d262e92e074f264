"""Tokenizer, extraction and AR model in a row: the newcomer's one command. It first says what it will do."""

import logging
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch

from detailflow import hub
from detailflow.data.images import open_images
from detailflow.data.notes import describe_amount
from detailflow.data.source import ImageSource
from detailflow.data.token_writer import is_finished
from detailflow.device import choose_device
from detailflow.distributed import World, launched
from detailflow.errors import DetailFlowError
from detailflow.published import CONFIG_FILE
from detailflow.runs import KNOWN_BY, newest_step
from detailflow.training.checkpoints import not_trained_there, of_loop, run_folder
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
)
from detailflow.training.presets import AllStages, StageSettings, stage_settings
from detailflow.training.run_report import PAGE_FILE, write_run_report
from detailflow.training.tokenizer import train_tokenizer
from detailflow.words import several

TOKEN_BYTES = 3 * 2  # of each token of a crop: three rows of 16-bit codes
_log = logging.getLogger(__name__)


def train_all(wanted: AllStages, output: Path, device: str | None = None) -> None:
    """Train into output/tokenizer, output/tokens and output/gpt; what is finished there already stays."""
    world, chosen = launched(device)
    world.check_same(asdict(wanted) | {"data": "", "init": wanted.init is not None})  # wherever these are
    with world.raise_together():
        source = open_images(wanted.data, **wanted.images)
        _check_folder(wanted, output, source)
        stages = stage_settings(wanted, source, output, chosen)
        tokenizer, tokens, gpt = (output / name for name in ("tokenizer", "tokens", "gpt"))
        if stages.tokenizer and not wanted.init:
            _check_steps(output, stages.tokenizer.loop.steps)
        if world.is_main:
            for line in outlook(stages, source, world, chosen, output):
                _log.info("%s", line)
        if stages.tokenizer is None and world.is_main:
            assert wanted.init
            _copy_tokenizer(wanted.init, tokenizer)
    if stages.tokenizer:
        train_tokenizer(stages.tokenizer, tokenizer, device)
    extract(stages.extraction, tokens, device)  # or check that finished tokens are of these images
    train_gpt(stages.gpt, gpt, device)
    write_run_report(output, source, wanted.data, device, wanted.image_column)


def describe_all(wanted: AllStages, output: Path, device: str | None = None) -> Iterator[str]:
    """Yield what `train_all` would do, each line as soon as it is known, and nothing on other ranks.

    No file is written, and none downloaded but configs of `init`, and the weights if it is published.
    """
    world = planned_world()
    if not world.is_main:
        return
    chosen = choose_device(device)
    source = open_images(wanted.data, **wanted.images)
    yield source.summary
    _check_folder(wanted, output, source)
    yield from outlook(stage_settings(wanted, source, output, chosen), source, world, chosen, output)


def outlook(
    stages: StageSettings, source: ImageSource, world: World, device: torch.device, output: Path
) -> Iterator[str]:
    """Yield lines on what the stages will do: sizes, and time and memory by a few real steps on this machine.

    Of a run that was begun in `output`, only on what is left; nothing if it is finished.
    """
    tokenizer = _left(output / "tokenizer", stages.tokenizer.loop.steps) if stages.tokenizer else 0.0
    tokens, gpt = not is_finished(output / "tokens"), _left(output / "gpt", stages.gpt.loop.steps)
    begun = _is_begun(output)
    yield from stages.as_begun
    if not (tokenizer or tokens or gpt):
        return
    yield stages.choice
    if not stages.gpt.init and not begun:
        yield describe_amount(len(source))
    yield "timing a few steps on this machine, to say how long it will take"
    total, disk, ceiling = 0.0, 0.0, ceiling_of(stages.gpt, device)
    if stages.tokenizer and tokenizer:
        plan = plan_tokenizer(stages.tokenizer, world, device)
        total += (seconds := plan.expected_seconds(*ceiling) * tokenizer)
        disk += plan.disk_bytes
        yield f"tokenizer: {plan.brief(seconds, tokenizer)}"
    crops = stages.extraction.num_crops
    if tokens:
        total += (seconds := extraction_seconds(stages.extraction, stages.sizes, len(source), world, device))
        disk += len(source) * crops * TOKEN_BYTES * stages.sizes.num_tokens
        yield f"tokens: {several(crops, 'crop')} of each image: {describe_duration(seconds)}"
    if gpt:
        expected = Expected(len(source), crops, source.class_names, stages.sizes)
        plan = plan_gpt(stages.gpt, world, device, expected)
        total += (seconds := plan.expected_seconds(*ceiling) * gpt)
        disk += plan.disk_bytes
        yield f"AR model: {plan.brief(seconds, gpt)}"
    if not begun:
        yield f"disk: about {rough_bytes(disk)} for checkpoints, tokens and the model"
    about = f"{'what is left takes' if begun else 'in all'} about {describe_duration(total)} on {device}"
    yield f"{about}, if it stays as busy as now; Ctrl-C stops, the same command goes on"


def _is_begun(output: Path) -> bool:
    return any((output / name).exists() for name in ("tokenizer", "tokens", "gpt"))


def _left(folder: Path, steps: int) -> float:
    """Return the share of a stage's steps that is still to be taken."""
    recorded = of_loop(run_folder(folder).read(), "steps")
    if (folder / CONFIG_FILE).exists() and recorded >= steps:
        return 0.0  # or it would say how it ended
    return max(0.0, 1 - newest_step(folder) / steps)


def _copy_tokenizer(source: str, folder: Path) -> None:
    """Copy the tokenizer of a model, or check that this was done."""
    config, tensors = hub.load(source, "tokenizer")
    if (folder / CONFIG_FILE).exists() or run_folder(folder).read():
        if hub.fingerprint(*hub.load(folder, "tokenizer"), torch.float32) != hub.fingerprint(
            config, tensors, torch.float32
        ):
            raise DetailFlowError(f"{folder} holds another tokenizer than that of {source}: choose another folder")
        return
    hub.save(folder, "tokenizer", config, tensors)


def _check_folder(wanted: AllStages, output: Path, source: ImageSource) -> None:
    """Check that a run that was begun in the folder has these images and way, before anything else."""
    if not _is_begun(output):
        run_folder(output).require_free([PAGE_FILE])
    known = dict(run_folder(output / "tokenizer").read().get(KNOWN_BY) or {}).get("data")
    if known and (changed := difference("data", known, images_input(source).read())):
        raise DetailFlowError(
            f"{output} holds a run that was begun with {changed}: choose another folder (--init {output} goes on from "
            "its models there), or give it the same again"
        )
    if (output / "gpt" / CONFIG_FILE).is_file() and not run_folder(output / "gpt").read():
        raise DetailFlowError(f"{not_trained_there(output / 'gpt')}: choose another folder")
    _check_start(wanted, output)


def _check_start(wanted: AllStages, output: Path) -> None:
    """Check that a run whose tokenizer was taken as it is from another model takes it again."""
    if not (output / "tokenizer" / CONFIG_FILE).is_file() or run_folder(output / "tokenizer").read():
        return
    start = run_folder(output / "gpt").read().get("init")
    begun = f"{output} holds a run that was begun with --init {start}, whose tokenizer stays as it is"
    if not start:  # it came no further
        begun = not_trained_there(output / "tokenizer")
    if not wanted.init:
        raise DetailFlowError(f"{begun}: give --init {start or 'with that model'}, or choose another folder")
    if wanted.finetune_decoder:
        raise DetailFlowError(f"{begun}: leave --finetune-decoder out, or choose another folder")


def _check_steps(output: Path, steps: int) -> None:
    """Check that the tokenizer stays the one that made the tokens, if there are any."""
    recorded = of_loop(run_folder(output / "tokenizer").read(), "steps")
    if 0 < recorded < steps and (output / "tokens").exists():
        raise DetailFlowError(
            f"{output / 'tokens'} is of a tokenizer that was trained for {recorded:,} steps, not {steps:,}: choose "
            f"another folder, repeat --tokenizer-steps {recorded}, or remove {output / 'tokens'} and {output / 'gpt'}"
        )
