"""A run's folder: whose it is, and the checkpoints in it, each written whole or not at all."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from detailflow.errors import DetailFlowError
from detailflow.hub import CONFIG_FILE
from detailflow.processes import Processes
from detailflow.runs import CHECKPOINTS, MILESTONES, RUN_FILE, checkpoints, read_checkpoint, read_settings, readable, step_of
from detailflow.storage import replacing, save_torch

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
        theirs = read_settings(path) if path.exists() else None
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


def _fixed(settings: Mapping[str, Any]) -> dict[str, Any]:
    loop = settings.get("loop")
    return {**settings, "loop": {k: v for k, v in loop.items() if k not in FREE} if isinstance(loop, dict) else loop}


def _differences(theirs: Any, mine: Any, prefix: str = "") -> list[str]:
    if isinstance(theirs, dict) and isinstance(mine, dict):
        keys = [*mine, *(k for k in theirs if k not in mine)]
        return [d for k in keys for d in _differences(theirs.get(k), mine.get(k), f"{prefix}.{k}" if prefix else k)]
    return [] if theirs == mine else [f"{prefix} ({theirs!r}, not {mine!r})"]


def save_checkpoint(
    output: Path,
    step: int,
    state: Mapping[str, Any],
    keep: int = 2,
    milestone: bool = False,
    model: Mapping[str, Any] | None = None,
) -> Path:
    """Write resume/step-….pt whole or not at all; a milestone is copied to milestones/, where all stay.

    Of this checkpoint and those before it, the last `keep` that can be read stay.

    Args:
        model: the "kind" and "config" of the model in it.

    Raises:
        DetailFlowError: if it can't be written, as on a full disk.
    """
    path = output / CHECKPOINTS / f"step-{step:08d}.pt"
    try:
        save_torch(path, {**(model or {}), "step": step, "state": state})
        if milestone:
            (output / MILESTONES).mkdir(exist_ok=True)
            with replacing(output / MILESTONES / path.name) as temporary:
                shutil.copyfile(path, temporary)
    except OSError as error:
        raise DetailFlowError(f"{path}: the checkpoint can't be written ({error.strerror or error})") from error
    left = keep - 1
    for older in [
        other for other in checkpoints(output) if step_of(other) < step
    ]:  # what is newer is damaged, or we had gone on from it
        if left < 1:
            older.unlink(missing_ok=True)
        elif readable(older):
            left -= 1
    for killed in path.parent.glob(".step-*.tmp"):  # what a run left that was killed while it wrote
        killed.unlink(missing_ok=True)
    return path


def load_checkpoint(output: Path, processes: Processes | None = None) -> tuple[int, dict[str, Any]]:
    """Return step and state of the newest checkpoint that can be read; (0, {}) if there is none.

    Args:
        processes: all of them get what the main one finds; `None` is this one alone.

    Raises:
        DetailFlowError: if there are checkpoints and none can be read, or a process does not find the main one's.
    """
    processes = processes or Processes()
    name = processes.from_main(lambda: _newest(output))
    if not name:
        return 0, {}
    with processes.together():
        checkpoint = read_checkpoint(output / CHECKPOINTS / name)
    return checkpoint.step, checkpoint.state


def _newest(output: Path) -> str:
    """Return the name of the newest checkpoint that can be read; "" if there is none at all."""
    found = checkpoints(output)
    for path in found:
        if readable(path):
            return path.name
        print(f"{path}: this checkpoint can't be read, trying the one before")
    if found:
        raise DetailFlowError(f"{output / CHECKPOINTS}: none of the checkpoints can be read; remove the folder to start afresh")
    return ""
