"""The loop that both training stages run in: progress, logs, pictures, checkpoints, exact resume.

Everything random is a function of (seed, step): the data order, the augmentation and, by reseeding torch before every
step, the rest. So a run that was killed and goes on from a checkpoint ends with the weights of one that was not.
"""

import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import yaml
from PIL import Image
from torch import Tensor

from detailflow.errors import DetailFlowError
from detailflow.hub import CONFIG_FILE
from detailflow.schedule import require_not_negative, require_positive, require_shares
from detailflow.storage import replacing

RUN_FILE = "run.yaml"
CHECKPOINTS = "resume"  # not "checkpoints", by which the published layout is known


@dataclass(frozen=True)
class LoopConfig:
    """What the two stages' runs have in common.

    Attributes:
        steps: optimiser steps of the whole run.
        batch_size: images (or token rows) per step.
        learning_rate: at the peak, as it is used (not per 256 images).
        warmup: share of the steps over which the rate rises linearly.
        final_rate: the rate that the cosine ends at, as a share of the peak.
        grad_clip: largest norm of a step's gradient.
        precision: "bf16" (autocast) or "fp32".
        compile: fuse the networks with `torch.compile`: a minute of preparation for about a third more speed.
        workers: processes that decode images.
        log_every, pictures_every: steps between log lines and between pictures.
        checkpoint_minutes: between checkpoints, the last two of which are kept.
    """

    steps: int
    batch_size: int
    learning_rate: float
    warmup: float = 0.05
    final_rate: float = 0.1
    grad_clip: float = 1.0
    precision: str = "bf16"
    compile: bool = False
    seed: int = 0
    workers: int = 0
    log_every: int = 20
    pictures_every: int = 500
    checkpoint_minutes: float = 3.0

    def __post_init__(self) -> None:
        require_positive(
            steps=self.steps, batch_size=self.batch_size, log_every=self.log_every, pictures_every=self.pictures_every
        )
        if self.precision not in PRECISIONS:
            raise DetailFlowError(f"precision must be {' or '.join(PRECISIONS)}, not {self.precision!r}")
        if not self.learning_rate > 0:
            raise DetailFlowError(f"learning_rate must be above 0, not {self.learning_rate!r}")
        if not 0 <= self.warmup < 1:
            raise DetailFlowError(f"warmup must be at least 0 and below 1, not {self.warmup!r}")
        require_shares(final_rate=self.final_rate)
        if not self.grad_clip > 0:
            raise DetailFlowError(f"grad_clip must be above 0, not {self.grad_clip!r}")
        require_not_negative(seed=self.seed, workers=self.workers, checkpoint_minutes=self.checkpoint_minutes)

    def rate_at(self, step: int) -> float:
        """Learning rate of `step` (0-based): linear warm-up, then a cosine."""
        rising = self.warmup * self.steps
        if step < rising:
            return self.learning_rate * (step + 1) / (rising + 1)
        progress = (step - rising) / max(self.steps - rising, 1)
        low = self.final_rate
        return self.learning_rate * (low + (1 - low) * (1 + math.cos(math.pi * progress)) / 2)


PRECISIONS = {"bf16": torch.bfloat16, "fp32": torch.float32}


class Stage(Protocol):
    """One kind of training: what the loop needs to know of it."""

    def batches(self, start_step: int) -> Iterator[Any]:
        """The data from step `start_step` on."""

    def step(self, step: int, batch: Any, rate: float) -> dict[str, Tensor]:
        """One optimiser step; scalars to log."""

    def state(self) -> dict[str, Any]:
        """All that a checkpoint must hold: nothing but tensors and plain containers."""

    def restore(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""

    def pictures(self) -> dict[str, Image.Image]:
        """Pictures of what has been learnt so far."""

    def export(self, directory: Path) -> None:
        """Write the model in our layout."""


def run(make_stage: Callable[[], Stage], kind: str, config: Any, output: Path) -> None:
    """Train from the last checkpoint in `output`, or from the start, and export the model to `output`.

    Args:
        make_stage: builds the stage; called after the folder is known to be usable.
        config: the stage's dataclass, a `LoopConfig` in its field `loop`.

    Raises:
        DetailFlowError: if `output` holds a run with another config, or can't be written.
    """
    loop: LoopConfig = config.loop
    fresh = not os.path.exists(output / RUN_FILE)
    if not claim(output, kind, asdict(config)):
        print(f"{output}: this {kind} is finished already")
        return
    from torch.utils.tensorboard import SummaryWriter
    from tqdm import tqdm

    torch.manual_seed(loop.seed)
    try:
        stage = make_stage()
    except DetailFlowError:
        if fresh:  # nothing has happened yet that other settings could contradict
            (output / RUN_FILE).unlink()
        raise
    start = load_checkpoint(output, stage)
    if start:
        print(f"{output}: going on from step {start}")
    stopping = _StopOnSignal()
    saved = time.monotonic()
    batches = stage.batches(start)
    with (
        stopping,
        SummaryWriter(str(output / "tensorboard"), purge_step=start) as writer,
        tqdm(total=loop.steps, initial=start, desc=kind, unit="step", dynamic_ncols=True) as bar,
    ):
        for step in range(start, loop.steps):
            batch = next(batches)  # before the seed: a data loader draws from torch's generator when it starts
            torch.manual_seed(loop.seed * 1_000_003 + step)
            scalars = stage.step(step, batch, loop.rate_at(step))
            bar.update()
            last = step + 1 == loop.steps
            if (step + 1) % loop.log_every == 0 or last:
                values = {name: float(value.detach()) for name, value in scalars.items()}
                _log(writer, step + 1, values, loop, bar)
            if (step + 1) % loop.pictures_every == 0 or last:
                _keep_pictures(stage, output, writer, step + 1)
            if time.monotonic() - saved > loop.checkpoint_minutes * 60 or last or stopping.asked:
                save_checkpoint(output, step + 1, stage)
                saved = time.monotonic()
            if stopping.asked:
                raise KeyboardInterrupt
    stage.export(output)


def claim(output: Path, kind: str, config: dict[str, Any]) -> bool:
    """Make `output` this run's folder; False where the run is finished already.

    Raises:
        DetailFlowError: if it can't be written, or belongs to a run with another config.
    """
    mine = {"kind": kind, **json.loads(json.dumps(config))}
    path = output / RUN_FILE
    try:
        finished = (output / CONFIG_FILE).exists()  # which `export` writes last
        known = path.exists()
        if known and (different := _differences(_read_settings(path), mine)):
            raise DetailFlowError(
                f"{output} holds a run with another {different[0]}; repeat its settings ({RUN_FILE}) or choose another output"
            )
        if finished and not known:
            raise DetailFlowError(f"{output} holds a model that was not trained there; choose another output")
        if finished:
            return False
        (output / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
        if not known:
            with replacing(path) as temporary:
                temporary.write_text(yaml.safe_dump(mine, sort_keys=False))
    except OSError as error:
        raise DetailFlowError(f"{output}: the output folder can't be written ({error.strerror})") from None
    return True


def _read_settings(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError):
        raise DetailFlowError(f"{path} is damaged; remove {path.parent} to start afresh or choose another output") from None


def _differences(theirs: Any, mine: Any, prefix: str = "") -> list[str]:
    if isinstance(theirs, dict) and isinstance(mine, dict):
        keys = [*mine, *(k for k in theirs if k not in mine)]
        return [d for k in keys for d in _differences(theirs.get(k), mine.get(k), f"{prefix}.{k}" if prefix else k)]
    return [] if theirs == mine else [f"{prefix} ({theirs!r}, not {mine!r})"]


def save_checkpoint(output: Path, step: int, stage: Stage) -> None:
    """Write resume/step-….pt whole or not at all; the last two stay.

    Raises:
        DetailFlowError: if it can't be written, as on a full disk.
    """
    path = output / CHECKPOINTS / f"step-{step:08d}.pt"
    try:
        with replacing(path) as temporary:
            torch.save({"step": step, "stage": stage.state()}, temporary)
    except (OSError, RuntimeError) as error:  # torch's own writer raises the latter
        raise DetailFlowError(f"{path}: the checkpoint can't be written ({error})") from error
    killed = path.parent.glob(".step-*.tmp")  # what a run left that was killed while it wrote
    for old in [*sorted(path.parent.glob("step-*.pt"))[:-2], *killed]:
        old.unlink()


def has_checkpoint(output: Path) -> bool:
    """Whether a run in `output` will go on from a checkpoint."""
    return any((output / CHECKPOINTS).glob("step-*.pt"))


def load_checkpoint(output: Path, stage: Stage) -> int:
    """Restore the newest checkpoint that can be read; the step it was written at, or 0 where there is none.

    Raises:
        DetailFlowError: where there are checkpoints and none can be read.
    """
    paths = sorted((output / CHECKPOINTS).glob("step-*.pt"), reverse=True)
    for path in paths:
        try:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises many kinds for a damaged file
            print(f"{path}: this checkpoint can't be read ({type(error).__name__}), trying the one before")
            continue
        stage.restore(checkpoint["stage"])
        return int(checkpoint["step"])
    if paths:
        raise DetailFlowError(f"{output / CHECKPOINTS}: none of the checkpoints can be read; remove the folder to start afresh")
    return 0


def _log(writer: Any, step: int, values: dict[str, float], loop: LoopConfig, bar: Any) -> None:
    if bad := [name for name, value in values.items() if not math.isfinite(value)]:
        raise DetailFlowError(
            f"{bad[0]} is not finite at step {step}: "
            f"lower learning_rate (now {loop.learning_rate}) and start again in another folder"
        )
    rate = (bar.format_dict["rate"] or 0) * loop.batch_size
    for name, value in {**values, "images_per_second": rate, "learning_rate": loop.rate_at(step - 1)}.items():
        writer.add_scalar(name, value, step)
    shown = {name: f"{value:.4g}" for name, value in list(values.items())[:3]}
    bar.set_postfix({**shown, "img/s": f"{rate:.0f}"}, refresh=False)


def _keep_pictures(stage: Stage, output: Path, writer: Any, step: int) -> None:
    import numpy as np

    (output / "pictures").mkdir(exist_ok=True)
    for name, picture in stage.pictures().items():
        picture.save(output / "pictures" / f"{name}-{step:08d}.png")
        writer.add_image(name, np.asarray(picture), step, dataformats="HWC")


class _StopOnSignal:
    """Turns SIGTERM and Ctrl-C into a request to save a checkpoint and stop after this step; asked twice, it stops at once."""

    asked = False

    def __enter__(self) -> None:
        self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGTERM, signal.SIGINT)}

    def _ask(self, *_: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
