"""Where a run's curves and pictures go: log.jsonl always, TensorBoard and Weights & Biases if they are asked for."""

import json
import math
import os
import secrets
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from detailflow.distributed import World
from detailflow.errors import DetailFlowError, missing_package, reason_of
from detailflow.files import open_own, read_text, reading, writing

TRACKERS = ("tensorboard", "wandb")  # each is named as the package that it needs
HISTORY_FILE, WANDB_ID_FILE = "log.jsonl", "wandb-id.txt"
LARGEST_HISTORY = 2**30  # bytes: a line each 20 steps is some hundred bytes
Record = Mapping[str, float]


def check_trackers(names: Sequence[str]) -> None:
    """Check that these trackers exist and their packages are installed."""
    for name in names:
        if name not in TRACKERS:
            raise DetailFlowError(f"trackers must be among {', '.join(TRACKERS)}, not {name!r}")
        if find_spec(name) is None and name == "wandb":  # which no extra brings
            raise DetailFlowError("the tracker wandb needs the package wandb: pip install wandb")
        if find_spec(name) is None:
            raise missing_package(f"the tracker {name}", name)


class Trackers:
    """All of a run's trackers, from `start_step` on; what was logged beyond it before is dropped, and at 0 everything.

    Args:
        names: of trackers, besides log.jsonl; only rank 0 logs.
    """

    def __init__(
        self,
        names: Sequence[str],
        output: Path,
        kind: str,
        config: Mapping[str, Any],
        start_step: int,
        world: World = World(),
    ) -> None:
        self.output, self.world = output, world
        self.board: Any = None
        self.wandb: Any = None
        self._hook, threading.excepthook = threading.excepthook, _without_tensorboard(threading.excepthook)
        try:
            with self.world.raise_together():
                if self.world.is_main:
                    self._open(names, kind, config, start_step)
        except DetailFlowError:
            threading.excepthook = self._hook
            raise

    def _open(self, names: Sequence[str], kind: str, config: Mapping[str, Any], start_step: int) -> None:
        records = read_history(self.output) if start_step else []
        kept = [json.dumps(record) + "\n" for record in records if record["step"] <= start_step]
        with writing(self.output / HISTORY_FILE) as temporary:
            temporary.write_text("".join(kept), encoding="utf-8")
        if "tensorboard" in names:
            from torch.utils.tensorboard import SummaryWriter

            with _writing("TensorBoard's log", self.output):
                purge = start_step + 1 if start_step else 0
                self.board = SummaryWriter(str(self.output / "tensorboard"), purge_step=purge)
                self.board.flush()
        if "wandb" in names:
            import wandb  # type: ignore[import-not-found, unused-ignore]

            with _writing("Weights & Biases' log", self.output):
                self.wandb = wandb.init(
                    project=f"detailflow-{kind}",
                    name=self.output.resolve().name,
                    dir=str(self.output),
                    id=run_id(self.output),
                    resume="allow",
                    config=dict(config),
                )

    def log(self, step: int, values: Mapping[str, float], pictures: Mapping[str, Image.Image] | None = None) -> None:
        """Log the numbers and pictures of a step, if there are any; they are on the disk afterwards."""
        pictures = pictures or {}
        if values:
            with _writing("the log", self.output), open_own(self.output / HISTORY_FILE, os.O_RDWR) as file:
                file.seek(0, os.SEEK_END)
                file.write(f"{json.dumps({'step': step, **values})}\n".encode())
        if self.board and (values or pictures):
            with _writing("TensorBoard's log", self.output):
                for name, value in values.items():
                    self.board.add_scalar(name, value, step)
                for name, picture in pictures.items():
                    self.board.add_image(name, np.asarray(picture), step, dataformats="HWC")
                self.board.flush()  # now, when an error can be reported
        if self.wandb and (values or pictures):
            import wandb

            with _writing("Weights & Biases' log", self.output):
                images = {name: wandb.Image(picture) for name, picture in pictures.items()}
                self.wandb.log({**values, **images}, step=step)

    def __enter__(self) -> "Trackers":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if self.board:
                with _writing("TensorBoard's log", self.output):
                    self.board.close()
            if self.wandb:
                with _writing("Weights & Biases' log", self.output):
                    self.wandb.finish()
        except DetailFlowError:
            if kind is None:  # else the first error is the news
                raise
        finally:
            threading.excepthook = self._hook


def read_history(output: Path) -> list[dict[str, float]]:
    """Return what a run has logged, a record for each step that was logged."""
    path, records = output / HISTORY_FILE, []
    if path.is_file():
        with reading(path):
            lines = read_text(path, LARGEST_HISTORY, errors="replace").split("\n")
        for line in lines:
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):  # the last line of a run that was killed while it wrote, or damage
                continue
            if isinstance(record, dict) and isinstance(record.get("step"), int) and _is_number(record["step"]):
                records.append(
                    {name: value for name, value in record.items() if name.isprintable() and _is_number(value)}
                )
    return records


def _is_number(value: Any) -> bool:
    """Return whether a logged value is a number; those that no float32 can be are damage, and too large to draw."""
    return isinstance(value, int | float) and not 1e38 <= abs(value) < math.inf


def run_id(output: Path) -> str:
    """Return the name by which Weights & Biases knows the run in `output`: drawn once and kept in its folder."""
    path = output / WANDB_ID_FILE
    if not path.exists():
        with writing(path) as temporary:
            temporary.write_text(f"{secrets.token_hex(8)}\n", encoding="ascii")
    try:
        with reading(path):
            return read_text(path).strip()
    except UnicodeDecodeError as error:
        raise DetailFlowError(f"could not read {path}: remove it to begin another run there ({error})") from error


@contextmanager
def _writing(what: str, output: Path) -> Iterator[None]:
    """Turn the errors of a tracker into a sentence; each has its own kinds of them."""
    try:
        yield
    except DetailFlowError:
        raise
    except Exception as error:
        raise DetailFlowError(f"cannot write {what} to {output}: {reason_of(error)}") from error


def _without_tensorboard(hook: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Print no traceback of TensorBoard's writing thread: its error comes again in `Trackers.log`."""

    def quiet(args: Any) -> None:
        if not type(args.thread).__module__.startswith("tensorboard"):
            hook(args)

    return quiet
