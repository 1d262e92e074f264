"""A training run's folder and its checkpoints, and the model that each of them holds. Knows no training.

A run's folder has `run.yaml`, `resume/step-….pt` to go on from, perhaps `milestones/step-….pt`, and, once the run is
finished, a model in our layout. A checkpoint holds the step, the state to go on from, and the config of the model in it.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import yaml
from torch import Tensor

from detailflow.errors import DetailFlowError
from detailflow.files import read_yaml
from detailflow.published import Kind, check_kind
from detailflow.tensors import in_pieces
from detailflow.torch_files import load_torch

RUN_FILE = "run.yaml"
CHECKPOINTS = "resume"  # not "checkpoints", by which the published layout is known
MILESTONES = "milestones"
_NAME = re.compile(r"step-(\d+)\.pt")


class Checkpoint(NamedTuple):
    """What a checkpoint holds, memory-mapped. Those of earlier versions have no kind and no config."""

    step: int
    state: dict[str, Any]
    kind: str | None
    config: dict[str, Any] | None


def is_run(folder: Path) -> bool:
    """Return whether a folder is a training run's."""
    return (folder / RUN_FILE).is_file() and (folder / CHECKPOINTS).is_dir()


def is_checkpoint(path: Path) -> bool:
    """Return whether a file is named as the checkpoints of a run are."""
    return _NAME.fullmatch(path.name) is not None and path.is_file()


def run_kind(path: Path) -> Any:
    """Return the kind of model that a run, or the run of a checkpoint, trains.

    Raises:
        DetailFlowError: if that cannot be read.
    """
    return read_checkpoint(path).kind if path.is_file() else read_settings(path / RUN_FILE).get("kind")


def read_settings(path: Path) -> dict[str, Any]:
    """Return what is in a run.yaml.

    Raises:
        DetailFlowError: if it is damaged.
    """
    try:
        settings = read_yaml(path)
    except OSError as error:
        raise DetailFlowError(f"could not read {path}: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError):
        settings = None
    if not isinstance(settings, dict):
        raise DetailFlowError(f"{path} is damaged; remove {path.parent} to start afresh or choose another output")
    return settings


def checkpoints(folder: Path) -> list[Path]:
    """Return those that a run can go on from, the newest first."""
    found = (path for path in (folder / CHECKPOINTS).glob("step-*.pt") if _NAME.fullmatch(path.name) and path.is_file())
    return sorted(found, key=step_of, reverse=True)


def step_of(path: Path) -> int:
    """Return the step that a checkpoint's name states."""
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else 0


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint as plain data; its tensors stay on the disk until they are used.

    Raises:
        DetailFlowError: if it is damaged.
    """
    content = load_torch(path, mmap=True)
    try:
        step, state, kind = int(content["step"]), content["state"], content.get("kind")
        config = json.loads(
            json.dumps(content.get("config"))
        )  # lists for tuples, as in config.json; raises for anything else
    except Exception as error:  # torch raises many kinds for a damaged file
        raise DetailFlowError(
            f"could not read {path}: it is damaged or no checkpoint ({type(error).__name__})"
        ) from error
    if not isinstance(state, dict) or not isinstance(config, dict | None):
        raise DetailFlowError(f"could not read {path}: it is no checkpoint of a training run")
    return Checkpoint(step, state, kind, config)


def readable(path: Path) -> bool:
    """Return whether a checkpoint can be read; its tensors are not."""
    try:
        read_checkpoint(path)
    except DetailFlowError:
        return False
    return True


def checkpoint_of(path: Path) -> Path:
    """Return the newest checkpoint of a run that can be read, or the one that is given.

    Raises:
        DetailFlowError: if there is none.
    """
    if path.is_file():
        return path
    found = checkpoints(path)
    if not found:
        raise DetailFlowError(f"{path} is a training run without a checkpoint: repeat its command to let it go on")
    for checkpoint in found[:-1]:
        if readable(checkpoint):
            return checkpoint
    return found[-1]


def run_config(path: Path, kind: Kind) -> dict[str, Any]:
    """Return the config of the model that `load_run` reads.

    Raises:
        DetailFlowError: as `load_run`.
    """
    return _model(path, read_checkpoint(path), kind)


def load_run(
    path: Path, kind: Kind, variant: Literal["ema", "model"] = "ema", dtype: torch.dtype | None = None
) -> tuple[dict[str, Any], dict[str, Tensor], int]:
    """Read the model in a checkpoint: its config, its tensors, and the step that it was at.

    Args:
        path: the checkpoint.
        kind: "tokenizer" or "gpt".
        variant: of an AR model, the averaged weights ("ema") or the last ones ("model").
        dtype: of the tensors; `None` is as they are stored.

    Raises:
        DetailFlowError: if it is damaged, of an earlier version, or of the other kind.
    """
    checkpoint = read_checkpoint(path)
    config, tensors = _model(path, checkpoint, kind), dict[str, Tensor]()
    for names in in_pieces(
        {name: 4 * tensor.numel() for name, tensor in _weights(path, checkpoint, kind, variant).items()}
    ):
        stored = _weights(path, read_checkpoint(path), kind, variant)
        tensors |= {name: stored[name].to(dtype, copy=True) for name in names}
    return config, tensors, checkpoint.step


def _model(path: Path, checkpoint: Checkpoint, kind: Kind) -> dict[str, Any]:
    if checkpoint.kind is None or checkpoint.config is None:
        raise DetailFlowError(
            f"{path} is of an earlier version, which did not note the model's sizes: let the run go on first"
        )
    check_kind(path, checkpoint.kind, kind)
    return dict(checkpoint.config)


def _weights(path: Path, checkpoint: Checkpoint, kind: Kind, variant: str) -> dict[str, Tensor]:
    stored: Any = checkpoint.state.get("networks" if kind == "tokenizer" else variant)
    if isinstance(stored, Mapping) and kind == "tokenizer":  # which was trained along with what only training needs
        stored = {
            name.removeprefix("model."): value for name, value in stored.items() if str(name).startswith("model.")
        }
    if not isinstance(stored, Mapping) or not stored:
        raise DetailFlowError(f"{path} holds no weights of {kind}")
    for name, tensor in stored.items():
        dense = isinstance(tensor, Tensor) and tensor.layout == torch.strided and tensor.device.type == "cpu"
        if not dense or not tensor.is_floating_point() or tensor.nbytes > tensor.untyped_storage().nbytes():
            raise DetailFlowError(f"{name!s} in {path} is no tensor of floating-point weights")
    return {str(name): tensor for name, tensor in stored.items()}
