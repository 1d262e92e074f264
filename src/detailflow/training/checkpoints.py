"""A run's folder: whose it is, and the checkpoints in it, each written whole or not at all."""

import json
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import yaml

from detailflow.distributed import World
from detailflow.errors import DetailFlowError
from detailflow.files import replacing
from detailflow.hub import CONFIG_FILE
from detailflow.runs import (
    CHECKPOINTS,
    MILESTONES,
    RUN_FILE,
    checkpoints,
    read_checkpoint,
    read_settings,
    readable,
    step_of,
)
from detailflow.tensors import save_torch
from detailflow.training.inputs import Input, difference

KNOWN_BY = "known_by"  # in run.yaml: the content of what the settings name
# Settings of the loop that a run may go on with in another value: they change how it is done, not what comes out.
FREE = {
    *("workers", "log_every", "pictures_every", "trackers", "checkpoint_minutes", "keep", "milestone_every"),
    *("accumulate", "checkpoint_activations", "shard", "compile"),
}


def claim(output: Path, kind: str, config: dict[str, Any], inputs: Mapping[str, Input] | None = None) -> bool:
    """Make `output` this run's folder; False if the run is finished already.

    Args:
        inputs: what those settings name that are known by their content; their paths may change.

    Raises:
        DetailFlowError: if it cannot be written, or belongs to a run with another config or other inputs.
    """
    mine = {"kind": kind, **json.loads(json.dumps(config))}
    path = output / RUN_FILE
    try:
        finished = (output / CONFIG_FILE).exists()  # which `export` writes last
        theirs = read_settings(path) if path.exists() else None
        known = dict((theirs or {}).get(KNOWN_BY) or {})
        mine[KNOWN_BY] = _content(output, inputs or {}, theirs or {}, mine, known)
        if theirs is not None:
            _require_same(output, theirs, mine, known)
        if finished and theirs is None:
            raise DetailFlowError(f"{output} holds a model that was not trained there; choose another output")
        if finished:
            return False
        (output / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
        if theirs != mine:
            with replacing(path) as temporary:
                temporary.write_text(yaml.safe_dump(mine, sort_keys=False, allow_unicode=True), encoding="utf-8")
    except OSError as error:
        raise DetailFlowError(f"{output}: the output folder cannot be written ({error.strerror})") from None
    return True


def _content(
    output: Path,
    inputs: Mapping[str, Input],
    theirs: Mapping[str, Any],
    mine: Mapping[str, Any],
    known: Mapping[str, Any],
) -> dict[str, Any]:
    """Return what the inputs are known by; those that a run does not need to go on are not read if their names are the same."""
    begun, result = bool(checkpoints(output)), {}
    for name, one in inputs.items():
        needed = not (one.at_start and begun and name in known and theirs.get(name) == mine.get(name))
        result[name] = one.read() if needed else known[name]
    return result


def _require_same(output: Path, theirs: Mapping[str, Any], mine: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    both = [name for name in mine[KNOWN_BY] if name in known]
    if different := _differences(_fixed(theirs, both), _fixed(mine, both)):
        raise DetailFlowError(
            f"{output} holds a run with another {different[0]}; repeat its settings ({RUN_FILE}) or choose another output"
        )
    for name in both:
        if changed := difference(name, known[name], mine[KNOWN_BY][name]):
            raise DetailFlowError(
                f"{output} holds a run that was begun with {changed}: give it the same again, or choose another output "
                f"(`detailflow train {mine['kind']} … --init {output}` starts from its weights)"
            )


def _fixed(settings: Mapping[str, Any], known: Collection[str]) -> dict[str, Any]:
    """Return the settings that must be the same, without those that are known by their content."""
    loop = settings.get("loop")
    fixed = {name: value for name, value in settings.items() if name != KNOWN_BY and name not in known}
    return {**fixed, "loop": {k: v for k, v in loop.items() if k not in FREE} if isinstance(loop, dict) else loop}


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
        DetailFlowError: if it cannot be written, as on a full disk.
    """
    path = output / CHECKPOINTS / f"step-{step:08d}.pt"
    try:
        save_torch(path, {**(model or {}), "step": step, "state": state})
        if milestone:
            (output / MILESTONES).mkdir(exist_ok=True)
            with replacing(output / MILESTONES / path.name) as temporary:
                shutil.copyfile(path, temporary)
    except OSError as error:
        raise DetailFlowError(f"{path}: the checkpoint cannot be written ({error.strerror or error})") from error
    left = keep - 1
    for older in [
        other for other in checkpoints(output) if step_of(other) < step
    ]:  # what is newer is damaged, or we had gone on from it
        if left < 1:
            older.unlink(missing_ok=True)
        elif readable(older):
            left -= 1
    for killed in path.parent.glob(".step-*.tmp"):  # what a run left that was killed while it wrote
        if killed.is_file():
            killed.unlink(missing_ok=True)
    return path


def load_checkpoint(output: Path, world: World | None = None) -> tuple[int, dict[str, Any]]:
    """Return step and state of the newest checkpoint that can be read; (0, {}) if there is none.

    Args:
        processes: all of them get what the main one finds; `None` is this one alone.

    Raises:
        DetailFlowError: if there are checkpoints and none can be read, or a process does not find the main one's.
    """
    world = world or World()
    name = world.from_main(lambda: _newest(output))
    if not name:
        return 0, {}
    with world.raise_together():
        checkpoint = read_checkpoint(output / CHECKPOINTS / name)
    return checkpoint.step, checkpoint.state


def _newest(output: Path) -> str:
    """Return the name of the newest checkpoint that can be read; "" if there is none at all."""
    found = checkpoints(output)
    for path in found:
        if readable(path):
            return path.name
        print(f"{path}: this checkpoint cannot be read, trying the one before")
    if found:
        raise DetailFlowError(
            f"{output / CHECKPOINTS}: none of the checkpoints can be read; remove the folder to start afresh"
        )
    return ""
