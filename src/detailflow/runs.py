"""Folders that belong to one run, and the checkpoints of training runs with the model in each. Knows no training.

A training run's folder has `run.yaml`, `resume/step-….pt` to go on from, perhaps `milestones/step-….pt` and
`best/step-….pt`, and, once the run is finished, a model in our layout. A checkpoint has the step, the state to go on
from, and the config of its model.
"""

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from torch import Tensor

from detailflow.errors import DetailFlowError
from detailflow.files import read_text, read_yaml, reading, writing
from detailflow.published import Kind, Variant, check_kind
from detailflow.tensors import in_pieces, is_weights
from detailflow.torch_files import load_torch

RUN_FILE = "run.yaml"
CHECKPOINTS = "resume"  # not "checkpoints", by which the published layout is known
KNOWN_BY = "known_by"  # in run.yaml: the content of what the settings name
MILESTONES = "milestones"
BEST = "best"  # by validation
FEATURES_FILE = "features.pt"  # a classifier of a run's images
_NAME = re.compile(r"step-(\d+)\.pt")


def _are_inputs(known: Any) -> bool:
    """Return whether this says what inputs are known by, as a run writes it."""
    return isinstance(known, dict) and all(
        isinstance(one, dict)
        and isinstance(classes := one.get("classes") or {}, dict)
        and all(isinstance(count, int) for count in classes.values())
        for one in known.values()
    )


@dataclass(frozen=True)
class RunFolder:
    """A folder that one run writes to: locked while it works, and known as its own by a record of its settings.

    A run that finds its own record in the folder goes on with what is there; any other leaves the folder as it is.

    Attributes:
        path: the folder.
        content: what the run writes, for messages: "a run", "samples", "tokens".
        record: name of the file with the settings, .json or .yaml.
    """

    path: Path
    content: str
    record: str

    @property
    def record_path(self) -> Path:
        """The record's path."""
        return self.path / self.record

    def read(self) -> dict[str, Any]:
        """Return the record, {} if there is none."""
        path = self.record_path
        if not os.path.exists(path):  # False for names that no file can have, too
            return {}
        settings = None
        try:
            with reading(path):
                settings = json.loads(read_text(path)) if path.suffix == ".json" else read_yaml(path)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            if isinstance(error, DetailFlowError):
                raise
        if not isinstance(settings, dict) or not _are_inputs(settings.get(KNOWN_BY) or {}):
            raise DetailFlowError(f"{path} is damaged: remove {self.path} to start afresh, or choose another folder")
        return settings

    def write(self, settings: Mapping[str, Any]) -> None:
        """Write the record, whole or not at all."""
        plain = as_plain(settings)
        text = json.dumps(plain, indent=1) + "\n"
        if self.record_path.suffix != ".json":
            text = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)
        with writing(self.record_path) as temporary:
            temporary.write_text(text, encoding="utf-8")

    def require_free(self, names: Iterable[str]) -> None:
        """Check that a folder without a record has none of these files, which would be overwritten or mixed up."""
        for name in names:
            if os.path.lexists(self.path / name):
                raise DetailFlowError(
                    f"{self.path} has {name} in it, which is not of {self.content}: choose another folder, or move it "
                    "elsewhere"
                )

    def check(
        self, recorded: Mapping[str, Any], settings: Mapping[str, Any], called: Mapping[str, str] | None = None
    ) -> None:
        """Check that a record has the same settings; it may have others besides.

        Args:
            called: settings whose values say nothing to a reader, such as checksums, by name; the text takes the place
                of name and values in the message: "another tokenizer".
        """
        for name, value in as_plain(settings).items():
            if difference := first_difference(name, recorded.get(name), value):
                text = (called or {}).get(name)
                what = f"with another {difference}" if text is None else f"of {text}"
                raise DetailFlowError(
                    f"{self.path} holds {self.content} {what}: repeat its settings or choose another folder"
                )


def as_plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings as JSON has them: tuples as lists, keys as text."""
    plain: dict[str, Any] = json.loads(json.dumps(settings))
    return plain


def first_difference(name: str, recorded: Any, value: Any) -> str | None:
    """Return where two settings differ, as "loop.steps (30, not 40)"; `None` if they are the same.

    A setting that an earlier version did not have is the same if it is off; its default precision was bf16, now auto.
    """
    if isinstance(recorded, dict) and isinstance(value, dict):
        found = (first_difference(f"{name}.{key}", recorded.get(key), value[key]) for key in value)
        return next(filter(None, found), None)
    same = recorded == value or (recorded is None and not value) or (recorded, value) == ("bf16", "auto")
    return None if same else f"{name} ({recorded!r}, not {value!r})"


class Checkpoint(NamedTuple):
    """A checkpoint, memory-mapped. Those of earlier versions have no kind and no config.

    Attributes:
        validation: the loss that it was chosen for as the best, if it was.
        comparable: the settings that such a loss depends on.
    """

    step: int
    state: dict[str, Any]
    kind: str | None
    config: dict[str, Any] | None
    validation: float | None = None
    comparable: dict[str, Any] | None = None


def is_run(folder: Path) -> bool:
    """Return whether a folder is a training run's."""
    return (folder / RUN_FILE).is_file() and (folder / CHECKPOINTS).is_dir()


def is_checkpoint(path: Path) -> bool:
    """Return whether a file is named as the checkpoints of a run are."""
    return _NAME.fullmatch(path.name) is not None and path.is_file()


def run_kind(path: Path) -> Any:
    """Return the kind of model that a run, or the run of a checkpoint, trains."""
    return read_checkpoint(path).kind if path.is_file() else RunFolder(path, "a run", RUN_FILE).read().get("kind")


def checkpoints(folder: Path, kind: str = CHECKPOINTS) -> list[Path]:
    """Return the checkpoints of one kind in a run's folder, the newest first."""
    return sorted(filter(is_checkpoint, (folder / kind).glob("step-*.pt")), key=step_of, reverse=True)


def newest_step(folder: Path) -> int:
    """Return the step of the newest checkpoint in a run's folder, 0 if there is none."""
    return max(map(step_of, checkpoints(folder)), default=0)


def step_of(path: Path) -> int:
    """Return the step that a checkpoint's name states."""
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else 0


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint as plain data; its tensors stay on the disk until they are used."""
    content = load_torch(path, mmap=True)
    try:
        config = content.get("config")
        checkpoint = Checkpoint(
            int(content["step"]),
            content["state"],
            content.get("kind"),
            None if config is None else as_plain(config),
            None if content.get("validation") is None else float(content["validation"]),
            None if content.get("comparable") is None else dict(content["comparable"]),
        )
    except Exception as error:  # what stands there may be of any type
        raise DetailFlowError(f"could not read {path}: it is not a checkpoint of a training run") from error
    if not isinstance(checkpoint.state, dict) or not isinstance(checkpoint.config, dict | None):
        raise DetailFlowError(f"could not read {path}: it is not a checkpoint of a training run")
    return checkpoint


def is_readable(path: Path) -> bool:
    """Return whether a checkpoint can be read, without reading its tensors."""
    try:
        read_checkpoint(path)
    except DetailFlowError:
        return False
    return True


def checkpoint_of(path: Path) -> Path:
    """Return the newest checkpoint of a run that can be read, or the one that is given."""
    if path.is_file():
        return path
    found = checkpoints(path)
    if not found:
        raise DetailFlowError(f"{path} is a training run without a checkpoint: repeat its command to let it go on")
    return next(filter(is_readable, found[:-1]), found[-1])


def run_config(path: Path, kind: Kind) -> dict[str, Any]:
    """Return the config of the model that `load_run` reads."""
    return _model(path, read_checkpoint(path), kind)


def load_run(
    path: Path, kind: Kind, variant: Variant = "ema", dtype: torch.dtype | None = None
) -> tuple[dict[str, Any], dict[str, Tensor], int]:
    """Read the model in a checkpoint: its config, its tensors, and the step that it was at.

    Args:
        path: the checkpoint.
        kind: "tokenizer" or "gpt".
        variant: of an AR model, the averaged weights ("ema") or the last ones ("model").
        dtype: of the tensors; `None` is as they are stored.
    """
    checkpoint = read_checkpoint(path)
    config, tensors = _model(path, checkpoint, kind), dict[str, Tensor]()
    sizes = {name: 4 * tensor.numel() for name, tensor in _weights(path, checkpoint, kind, variant).items()}
    for names in in_pieces(sizes):  # each from a map of its own, so that a piece of the file is in memory at once
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
    if isinstance(stored, Mapping) and kind == "tokenizer":  # without the networks that only training needs
        own = (name for name in stored if str(name).startswith("model."))
        stored = {name.removeprefix("model."): stored[name] for name in own}
    if not isinstance(stored, Mapping) or not stored:
        raise DetailFlowError(f"{path} holds no weights of {kind}")
    for name, tensor in stored.items():
        if not is_weights(tensor):
            raise DetailFlowError(f"{name!s} in {path} is not a tensor of floating-point weights")
    return {str(name): tensor for name, tensor in stored.items()}
