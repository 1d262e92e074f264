"""A run's folder: whose it is, and the checkpoints in it, each written whole or not at all."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from detailflow.errors import DetailFlowError
from detailflow.hub import CONFIG_FILE
from detailflow.storage import replacing

RUN_FILE = "run.yaml"
CHECKPOINTS = "resume"  # not "checkpoints", by which the published layout is known
MILESTONES = "milestones"
# Settings of the loop that a run may go on with in another value: they change how it is done, not what comes out.
FREE = {
    *("workers", "log_every", "pictures_every", "trackers", "checkpoint_minutes", "keep", "milestone_every"),
    *("accumulate", "checkpoint_activations", "shard", "compile"),
}


def claim(output: Path, kind: str, config: dict[str, Any]) -> bool:
    """Make `output` this run's folder; False where the run is finished already.

    Raises:
        DetailFlowError: if it can't be written, or belongs to a run with another config.
    """
    mine = {"kind": kind, **json.loads(json.dumps(config))}
    path = output / RUN_FILE
    try:
        finished = (output / CONFIG_FILE).exists()  # which `export` writes last
        theirs = _read_settings(path) if path.exists() else None
        if theirs is not None and (different := _differences(_fixed(theirs), _fixed(mine))):
            raise DetailFlowError(
                f"{output} holds a run with another {different[0]}; repeat its settings ({RUN_FILE}) or choose another output"
            )
        if finished and theirs is None:
            raise DetailFlowError(f"{output} holds a model that was not trained there; choose another output")
        if finished:
            return False
        (output / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
        if theirs != mine:
            with replacing(path) as temporary:
                temporary.write_text(yaml.safe_dump(mine, sort_keys=False))
    except OSError as error:
        raise DetailFlowError(f"{output}: the output folder can't be written ({error.strerror})") from None
    return True


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        settings = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError):
        settings = None
    if not isinstance(settings, dict):
        raise DetailFlowError(f"{path} is damaged; remove {path.parent} to start afresh or choose another output")
    return settings


def _fixed(settings: Mapping[str, Any]) -> dict[str, Any]:
    loop = settings.get("loop")
    return {**settings, "loop": {k: v for k, v in loop.items() if k not in FREE} if isinstance(loop, dict) else loop}


def _differences(theirs: Any, mine: Any, prefix: str = "") -> list[str]:
    if isinstance(theirs, dict) and isinstance(mine, dict):
        keys = [*mine, *(k for k in theirs if k not in mine)]
        return [d for k in keys for d in _differences(theirs.get(k), mine.get(k), f"{prefix}.{k}" if prefix else k)]
    return [] if theirs == mine else [f"{prefix} ({theirs!r}, not {mine!r})"]


def save_checkpoint(output: Path, step: int, state: Mapping[str, Any], keep: int = 2, milestone: bool = False) -> Path:
    """Write resume/step-….pt whole or not at all; the last `keep` stay; a milestone is copied to milestones/, where all stay.

    Raises:
        DetailFlowError: if it can't be written, as on a full disk.
    """
    path = output / CHECKPOINTS / f"step-{step:08d}.pt"
    try:
        with replacing(path) as temporary:
            torch.save({"step": step, "state": state}, temporary)
        if milestone:
            (output / MILESTONES).mkdir(exist_ok=True)
            with replacing(output / MILESTONES / path.name) as temporary:
                shutil.copyfile(path, temporary)
    except (OSError, RuntimeError) as error:  # torch's own writer raises the latter
        raise DetailFlowError(f"{path}: the checkpoint can't be written ({error})") from error
    killed = path.parent.glob(".step-*.tmp")  # what a run left that was killed while it wrote
    for old in [*_checkpoints(output)[keep:], *killed]:
        old.unlink()
    return path


def _checkpoints(output: Path) -> list[Path]:
    """The newest first."""
    return sorted((output / CHECKPOINTS).glob("step-*.pt"), reverse=True)


def newest(output: Path) -> Path | None:
    """The checkpoint that a run in `output` will go on from, if there is one."""
    return next(iter(_checkpoints(output)), None)


def load_checkpoint(output: Path) -> tuple[int, dict[str, Any]]:
    """Step and state of the newest checkpoint that can be read; (0, {}) where there is none.

    Raises:
        DetailFlowError: where there are checkpoints and none can be read.
    """
    for path in _checkpoints(output):
        try:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            return int(checkpoint["step"]), checkpoint["state"]
        except Exception as error:  # torch raises many kinds for a damaged file
            print(f"{path}: this checkpoint can't be read ({type(error).__name__}), trying the one before")
    if newest(output):
        raise DetailFlowError(f"{output / CHECKPOINTS}: none of the checkpoints can be read; remove the folder to start afresh")
    return 0, {}
