"""The loop that both training stages run in: progress, logs, pictures, checkpoints, exact resume.

Everything random is a function of (seed, step): the data order, the augmentation and, by reseeding torch before every
step, the rest. So a run that was killed and goes on from a checkpoint ends with the weights of one that was not. It is drawn for
the whole batch, of which each process takes its part, so that several processes do what one would.
"""

import logging
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from detailflow.distributed import World
from detailflow.errors import DetailFlowError
from detailflow.files import lock_folder
from detailflow.pictures import write_png
from detailflow.runs import CHECKPOINTS, RUN_FILE, checkpoints
from detailflow.seeds import mixed_seed
from detailflow.training.checkpoints import claim, load_checkpoint, save_checkpoint
from detailflow.training.config import LoopConfig
from detailflow.training.inputs import Input
from detailflow.training.tracking import Trackers

_log = logging.getLogger(__name__)
AGAIN_SECONDS = 2.0  # after which another Ctrl-C is another wish
BAD_STEPS = {"bf16": 5, "fp32": 5, "fp16": 25}  # in a row that stop a run; float16 may need 16 to find its loss scale


class Stage(Protocol):
    """One kind of training: what the loop needs to know of it. All processes call every method."""

    def batches(self, start_step: int) -> Iterator[Any]:
        """The data of this process from step `start_step` on."""

    def step(self, step: int, batch: Any, rate: float) -> dict[str, Tensor | float]:
        """One optimiser step; scalars to log. Those whose name ends in gradient_norm tell whether it was a good one."""

    def state(self) -> dict[str, Any]:
        """All that a checkpoint must hold: nothing but tensors and plain containers. Only the main process's is written."""

    def restore(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""

    def model_config(self) -> dict[str, Any]:
        """The config of the model that `export` writes."""

    def pictures(self) -> Mapping[str, Image.Image]:
        """Pictures of what has been learnt so far. Only the main process's are kept."""

    def export(self, directory: Path) -> None:
        """Let the main process write the model in our layout."""


def run(
    make_stage: Callable[[bool], Stage],
    kind: str,
    config: Any,
    output: Path,
    world: World,
    inputs: Mapping[str, Input] | None = None,
) -> None:
    """Train from the last checkpoint in `output`, or from the start, and export the model to `output`.

    Args:
        make_stage: builds the stage; called after the folder is known to be usable, with whether a checkpoint will be restored.
        config: the stage's dataclass, a `LoopConfig` in its field `loop`.
        inputs: what the settings of these names are known by.

    Raises:
        DetailFlowError: if `output` holds a run with another config or other inputs, is at work in another process, or cannot be
            written; or if steps go wrong.
    """
    loop: LoopConfig = config.loop
    loop.images_at_once(world)
    with lock_folder(output, "training run", world):
        fresh = not os.path.exists(output / RUN_FILE)
        if not world.from_main(lambda: claim(output, kind, asdict(config), inputs)):
            if world.is_main:
                _log.info("%s: this %s is finished already", output, "AR model" if kind == "gpt" else kind)
            return
        try:
            checkpoint = load_checkpoint(output, world)
            start = checkpoint.step if checkpoint else 0
            torch.manual_seed(loop.seed)
            stage = make_stage(bool(start))
        except DetailFlowError:
            if fresh and world.is_main:  # nothing has happened yet that other settings could contradict
                (output / RUN_FILE).unlink()
            raise
        if checkpoint:
            _restore(stage, checkpoint.state, output / CHECKPOINTS, start)
        del checkpoint
        _Run(stage, kind, config, output, world).train(start)
        with world.raise_together():
            stage.export(output)


def _restore(stage: Stage, state: dict[str, Any], folder: Path, step: int) -> None:
    """Have a stage go on from what a checkpoint holds.

    Raises:
        DetailFlowError: if that is not what a run of these settings writes.
    """
    try:
        stage.restore(state)
    except torch.OutOfMemoryError:
        raise
    except (
        RuntimeError,
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
    ) as error:  # torch has one for each difference
        raise DetailFlowError(
            f"{folder}: the checkpoint of step {step} does not fit this run; remove it to go on from the one before"
        ) from error


class _Run:
    """The steps of a run, and what is kept of them."""

    def __init__(self, stage: Stage, kind: str, config: Any, output: Path, world: World) -> None:
        self.stage, self.kind, self.config, self.output, self.world = stage, kind, config, output, world
        self.loop: LoopConfig = config.loop
        self.health = _Health(self.loop, output)
        self.saved, self.saved_at = 0, time.monotonic()  # the step of the last checkpoint, and when it was written

    def train(self, start: int) -> None:
        """Take all steps from `start` on; after the last one there is a checkpoint."""
        from tqdm import tqdm

        loop, world, self.saved = self.loop, self.world, start
        if world.is_main and start:
            _log.info("%s: going on from step %d", self.output, start)
        batches = self.stage.batches(start)
        names, hidden = loop.trackers if world.is_main else (), not world.is_main
        with (
            _StopOnSignal() as stopping,
            Trackers(names, self.output, self.kind, asdict(self.config), start, world) as trackers,
            tqdm(
                total=loop.steps, initial=start, desc=self.kind, unit="step", dynamic_ncols=True, disable=hidden
            ) as bar,
        ):
            for step in range(start, loop.steps):
                batch = next(batches)  # before the seed: a data loader draws from torch's generator when it starts
                torch.manual_seed(mixed_seed(loop.seed, step))
                scalars = self.stage.step(step, batch, loop.rate_at(step))
                self.health.check(step, scalars)
                bar.update()
                done = step + 1
                stop = world.any(stopping.asked)
                if self._checkpoint_is_due(done) or stop:
                    self._save(done)
                self._log(done, scalars, trackers, bar)
                if stop:
                    world.barrier()  # or the launcher, seeing one gone, would end the one that still writes
                    at = f"interrupted at step {done} of {loop.steps}: the same command goes on from there"
                    raise KeyboardInterrupt(*([at] if world.is_main else []))

    def _checkpoint_is_due(self, done: int) -> bool:
        late = self.world.is_main and time.monotonic() - self.saved_at > self.loop.checkpoint_minutes * 60
        return self.world.any(late) or self._is_milestone(done) or done == self.loop.steps

    def _is_milestone(self, done: int) -> bool:
        return bool(self.loop.milestone_every) and done % self.loop.milestone_every == 0

    def _save(self, done: int) -> None:
        state = self.stage.state()
        with self.world.raise_together():
            if self.world.is_main:
                model = {"kind": self.kind, "config": self.stage.model_config()}
                self.health.good = save_checkpoint(
                    self.output, done, state, self.loop.keep, self._is_milestone(done), model
                )
        self.saved, self.saved_at = done, time.monotonic()

    def _log(self, done: int, scalars: Mapping[str, Tensor | float], trackers: Trackers, bar: Any) -> None:
        """Log a step and keep its pictures, if it is time; if they cannot be written, there is a checkpoint of it at least."""
        loop, last = self.loop, done == self.loop.steps
        logs, shows = (done % every == 0 or last for every in (loop.log_every, loop.pictures_every))
        if not logs and not shows:
            return
        values: dict[str, float] = {}
        if logs:
            values = {**_means(scalars, self.world), "skipped_steps": float(self.health.skipped)}
            values["learning_rate"] = loop.rate_at(done - 1)
        try:
            with self.world.raise_together():
                pictures = self.stage.pictures() if shows else {}
                if self.world.is_main:
                    if values:
                        speed = (bar.format_dict["rate"] or 0) * loop.batch_size
                        shown = {name: f"{value:.4g}" for name, value in list(values.items())[:3]}
                        bar.set_postfix({**shown, "img/s": f"{speed:.0f}"}, refresh=False)
                        values["images_per_second"] = speed
                    for name, picture in pictures.items():
                        write_png(picture, self.output / "pictures" / f"{name}-{done:08d}.png")
                    trackers.log(done, values, pictures)
        except DetailFlowError:
            if self.saved < done:
                self._save(done)
            raise


def _means(scalars: Mapping[str, Tensor | float], world: World) -> dict[str, float]:
    """Over the processes."""
    values = torch.tensor([float(value) for value in scalars.values()], device=world.device)
    return dict(zip(scalars, world.mean(values).tolist(), strict=True))


class _Health:
    """Counts the steps that changed nothing because their gradients were not finite."""

    def __init__(self, loop: LoopConfig, output: Path) -> None:
        self.loop, self.good = loop, next(iter(checkpoints(output)), None)
        self.limit, self.in_a_row, self.skipped = BAD_STEPS[loop.precision], 0, 0

    def check(self, step: int, scalars: Mapping[str, Tensor | float]) -> None:
        """Raises DetailFlowError after too many bad steps in a row."""
        norms = [float(value) for name, value in scalars.items() if name.endswith("gradient_norm")]
        bad = not all(map(math.isfinite, norms))
        self.in_a_row = self.in_a_row + 1 if bad else 0
        self.skipped += bad
        if self.in_a_row >= self.limit:
            good = f"the last good checkpoint is {self.good}" if self.good else "there is no checkpoint yet"
            raise DetailFlowError(
                f"gradients were not finite in {self.limit} steps in a row, up to step {step + 1}: lower learning_rate "
                f"(now {self.loop.learning_rate}) and start again in another folder; {good}"
            )


class _StopOnSignal:
    """Turns SIGTERM and Ctrl-C into a request to save a checkpoint and stop after this step; a later Ctrl-C stops at once.

    Launchers send the same signal more than once: SIGTERM again, or Ctrl-C within a moment, changes nothing.
    """

    asked = False
    when = 0.0

    def __enter__(self) -> "_StopOnSignal":
        self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def _ask(self, number: int, frame: Any) -> None:
        if self.asked and number == signal.SIGINT and time.monotonic() - self.when > AGAIN_SECONDS:
            raise KeyboardInterrupt
        if not self.asked:
            self.asked, self.when = True, time.monotonic()

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
