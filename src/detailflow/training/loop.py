"""The loop that both training stages run in: progress, logs, validation, checkpoints, exact resume.

Everything random is a function of (seed, step): the data order, the augmentation and, by reseeding torch before every
step, the rest. So a run that was killed and goes on from a checkpoint ends with the weights of one that was not. It is
drawn for the whole batch, and each rank takes its part, so that several processes do what one would.
"""

import logging
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sized
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from detailflow.device import precision_dtype
from detailflow.distributed import World, lost
from detailflow.errors import DetailFlowError, first_line, os_errors
from detailflow.files import check_utf8, lock_folder
from detailflow.machine import keep_freed_memory, measure_ceilings
from detailflow.pictures import write_png
from detailflow.progress import LONG_RUN, progress_bar
from detailflow.runs import BEST, CHECKPOINTS, FEATURES_FILE, RUN_FILE, checkpoints, read_checkpoint
from detailflow.seeds import mixed_seed
from detailflow.settings import flat
from detailflow.training.checkpoints import (
    LONGER_FROM,
    go_on,
    load_checkpoint,
    reserve_run,
    save_checkpoint,
)
from detailflow.training.config import LoopConfig
from detailflow.training.inputs import Input
from detailflow.training.stage_report import TITLES, write_report
from detailflow.training.tracking import Trackers, read_history

_log = logging.getLogger(__name__)
AGAIN_SECONDS = 2.0  # after which another Ctrl-C is another wish
BAD_STEPS, FP16_BAD_STEPS = 5, 25  # in a row that stop a run; float16 may need 16 to find its loss scale
UTILIZATION_SECONDS = 60.0  # before model FLOP utilization is logged, as the machine's ceiling takes seconds to measure


class Stage(Protocol):
    """One kind of training: what the loop needs to know of it. All ranks call every method."""

    @property
    def validation(self) -> Sized | None:
        """The images that are held out, if there are any."""

    @property
    def comparable_from(self) -> float:
        """The step from which on validation losses can be compared, as all losses are trained."""

    def batches(self, start_step: int) -> Iterator[Any]:
        """Yield this rank's data from step `start_step` on."""

    def step(self, step: int, batch: Any, rate: float, log: bool = True) -> dict[str, Tensor | float]:
        """Take one optimizer step; return every …gradient_norm and, with `log`, all other scalars."""

    def validate(self) -> dict[str, float]:
        """Return figures of the images that are held out, "val_loss" among them; {} if there are none."""

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint needs: tensors and plain containers. Only rank 0's is written."""

    def restore(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""

    def model_config(self) -> dict[str, Any]:
        """Return the config of the model that `export` writes."""

    def pictures(self) -> Mapping[str, Image.Image]:
        """Draw what has been learnt so far. Only rank 0's pictures are kept."""

    def export(self, directory: Path) -> None:
        """Let rank 0 write the model in our layout."""


@dataclass(frozen=True)
class Run:
    """What is trained, and where to.

    Attributes:
        kind: "tokenizer" or "gpt".
        config: the stage's dataclass, with a `LoopConfig` as its field `loop`.
        inputs: the settings that are known by the content of what they name.
        operations: step → the operations that it takes on this rank, for model FLOP utilization.
    """

    kind: str
    config: Any
    output: Path
    world: World
    device: torch.device
    inputs: Mapping[str, Input] | None = None
    operations: Callable[[int], float] | None = None


def train(make_stage: Callable[[bool], Stage], run: Run) -> None:
    """Train from the last checkpoint in the output folder, or from the start, and export the model there.

    Args:
        make_stage: builds the stage; called once the folder is known to be usable, with whether a checkpoint follows.
    """
    output, world, loop = run.output, run.world, run.config.loop
    keep_freed_memory()
    world.check_same({name: value for name, value in flat(asdict(run.config)) if name not in (run.inputs or {})})
    with world.raise_together(), os_errors(f"cannot write to {output}"):
        loop.images_at_once(world)
        check_utf8(output)
    with lock_folder(output, "training run", world):
        fresh = not os.path.exists(output / RUN_FILE)
        settings = world.from_main(lambda: reserve_run(output, run.kind, asdict(run.config), run.inputs))
        if settings is None:
            if world.is_main:
                _log.info("%s: this %s is finished already", output, TITLES.get(run.kind, run.kind))
            return
        try:
            checkpoint = load_checkpoint(output, world)
            torch.manual_seed(loop.seed)
            stage = make_stage(checkpoint is not None)
        except DetailFlowError:
            if fresh and world.is_main:  # nothing has happened yet that other settings could contradict
                (output / FEATURES_FILE).unlink(missing_ok=True)  # which are of these settings, too
                (output / RUN_FILE).unlink()
                with suppress(OSError):  # it is not empty
                    (output / CHECKPOINTS).rmdir()
            raise
        start = checkpoint.step if checkpoint else 0
        if checkpoint:
            _restore(stage, checkpoint.state, output / CHECKPOINTS, start)
        del checkpoint
        with world.raise_together():
            if world.is_main:
                go_on(output, settings)  # only now, so that what fails before leaves a finished run as it is
        training = _Training(stage, run, start, settings.get(LONGER_FROM, 0))
        training.train()
        training.finish()


def _restore(stage: Stage, state: dict[str, Any], folder: Path, step: int) -> None:
    """Restore a checkpoint's state, which may be that of other settings."""
    try:
        stage.restore(state)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, LookupError, TypeError, ValueError, AttributeError) as error:  # torch has one for each case
        if lost(error):  # not the checkpoint, but another rank failed
            raise
        what = f"the checkpoint of step {step} does not fit this run ({type(error).__name__}: {first_line(error)})"
        raise DetailFlowError(f"{folder}: {what}; move it to another folder to go on from the one before") from error


class _Training:
    """The steps of a run, and what is kept of them.

    Args:
        start: steps that are done.
        longer_from: the step at which the run was last given more steps; patience begins again there.
    """

    def __init__(self, stage: Stage, run: Run, start: int, longer_from: int) -> None:
        self.stage, self.run, self.output, self.world = stage, run, run.output, run.world
        self.longer_from, self.done = longer_from, start
        self.loop: LoopConfig = run.config.loop
        self.health = _Health(self.loop, run.output)
        self.speed = _Speed(run, start)
        self.saved_at = time.monotonic()  # when the last checkpoint was written
        # The settings that make validation losses comparable, and the best step so far with its loss.
        self.comparable = {"comparable_from": stage.comparable_from, "val_images": self.loop.val_images}
        self.best = self.world.from_main(self._find_best) if self.loop.val_every else None

    def train(self) -> None:
        """Take the steps that are left, all or until validation stalls; after the last one there is a checkpoint."""
        loop, run, world = self.loop, self.run, self.world
        start = self.done
        if world.is_main and start:
            _log.info("%s: going on from step %d", self.output, start)
        batches = self.stage.batches(start)
        desc = TITLES.get(run.kind, run.kind)
        with (
            _StopOnSignal() as stopping,
            Trackers(loop.trackers, self.output, run.kind, asdict(run.config), start, world) as trackers,
            progress_bar(
                desc=desc, unit="step", total=loop.steps, main=world.is_main, initial=start, **LONG_RUN
            ) as bar,
        ):
            if start == 0 and loop.val_every and getattr(run.config, "init", None):
                self._log_start(trackers)
            for step in range(start, loop.steps):
                if self._has_stalled(step):
                    break
                batch = next(batches)  # before the seed: a data loader draws from torch's generator when it starts
                self.done = done = step + 1
                logs, shows, validates = (
                    self._is_due(done, every) for every in (loop.log_every, loop.pictures_every, loop.val_every)
                )
                torch.manual_seed(mixed_seed(loop.seed, step))
                scalars = self.stage.step(step, batch, loop.rate_at(step), logs)
                self.health.update(scalars)
                bar.update()
                late = world.is_main and time.monotonic() - self.saved_at > loop.checkpoint_minutes * 60
                stop, late = self._on_any_rank(stopping.asked, late)
                keeps = late or stop or self._is_milestone(done) or done == loop.steps
                if logs or keeps or self.health.on_cpu:
                    self.health.check(done)
                with self.speed.paused():
                    figures = self._validate(done) if validates else {}
                if logs or shows or figures:  # before the checkpoint, from which a run goes on with the next step
                    self._log(done, scalars if logs else {}, figures, shows, trackers, bar)
                with self.speed.paused():
                    if keeps or self._is_best(done) or self._has_stalled(done):
                        self._save(done)
                if stop:
                    world.barrier()  # or the launcher, seeing one gone, would end the one that still writes
                    at = f"interrupted at step {done} of {loop.steps}: the same command goes on from there"
                    raise KeyboardInterrupt(*([at] if world.is_main else []))

    def _log_start(self, trackers: Trackers) -> None:
        """Measure what the run starts from, which is exported if no step is better."""
        with self.speed.paused():
            figures = self._validate(0)
            with self.world.raise_together():
                if figures and self.world.is_main:
                    trackers.log(0, figures)
            if self._is_best(0):
                self._save(0)

    def finish(self) -> None:
        """Export the model, the best by validation if there is one, and write the report."""
        facts = [f"{self.done:,} steps of {self.loop.batch_size:,} images"]
        if self.best is not None and self.done < self.loop.steps:
            since = f"validation has not improved since step {max(self.best[0], self.longer_from):,}"
            facts.append(f"stopped before step {self.loop.steps:,}: {since} (patience {self.loop.patience})")
            if self.world.is_main:
                _log.info("%s: at step %d %s", self.output, self.done, facts[-1])
        if self.stage.validation is not None:
            facts.append(f"{len(self.stage.validation):,} other images are held out for validation")
        if self.best is not None:
            step, loss = self.best
            which = f"the exported model is that of step {step}, the best by validation (val_loss {loss:.4g})"
            if step != self.done:
                with self.world.raise_together():
                    state = read_checkpoint(self.output / BEST / f"step-{step:08d}.pt").state
                _restore(self.stage, state, self.output / BEST, step)
            if self.world.is_main:
                _log.info("%s: %s", self.output, which)
            facts.append(which)
        with self.world.raise_together():
            self.stage.export(self.output)
        with self.world.raise_together():
            pictures = self.stage.pictures()
            if self.world.is_main:
                held_out = self.stage.validation is not None
                write_report(self.output, self.run.kind, facts, read_history(self.output), pictures, held_out)

    def _is_due(self, done: int, every: int) -> bool:
        return bool(every) and (done % every == 0 or done == self.loop.steps)

    def _has_stalled(self, done: int) -> bool:
        """Return whether as many validations as `patience` have gone by without a better loss."""
        loop = self.loop
        if not (loop.patience and loop.val_every and self.best):
            return False
        return done // loop.val_every - max(self.best[0], self.longer_from) // loop.val_every >= loop.patience

    def _is_milestone(self, done: int) -> bool:
        return bool(self.loop.milestone_every) and done % self.loop.milestone_every == 0

    def _on_any_rank(self, *flags: bool) -> list[bool]:
        if self.world.size == 1:
            return list(flags)
        return (self.world.all_reduce(torch.tensor(flags, dtype=torch.float32)) > 0).tolist()

    def _validate(self, done: int) -> dict[str, float]:
        """Measure the images that are held out, and note the best step so far."""
        figures = self.stage.validate()
        if figures and self._is_comparable(done):
            loss = self.world.from_main(lambda: figures["val_loss"])  # so that all ranks decide alike
            # The best step comes again if the run was killed right after writing it.
            if math.isfinite(loss) and (self.best is None or loss < self.best[1] or done == self.best[0]):
                self.best = done, loss
        return figures

    def _is_best(self, done: int) -> bool:
        return self.best is not None and self.best[0] == done

    def _is_comparable(self, done: int) -> bool:
        """Return whether all losses are trained at a step; the last one counts in any case."""
        start = self.stage.comparable_from
        return done > min(start, self.loop.steps - 1) or done == start == 0

    def _find_best(self) -> tuple[int, float] | None:
        """Return the step and loss of the best checkpoint so far, if losses from now on can be compared with it."""
        for path in checkpoints(self.output, BEST):
            try:
                checkpoint = read_checkpoint(path)
            except DetailFlowError:
                continue
            step, loss = checkpoint.step, checkpoint.validation
            same = checkpoint.comparable == self.comparable and self._is_comparable(step)
            if same and loss is not None and math.isfinite(loss):
                return step, loss
        return None

    def _save(self, done: int) -> None:
        """Write a checkpoint, also as the best by validation so far if it is that."""
        state = self.stage.state()

        def save() -> Path:
            model = {"kind": self.run.kind, "config": self.stage.model_config()}
            best = (self.best[1], self.comparable) if self.best and self._is_best(done) else None
            return save_checkpoint(self.output, done, state, self.loop.keep, self._is_milestone(done), model, best)

        self.health.good = self.world.from_main(save)
        self.saved_at = time.monotonic()

    def _log(
        self,
        done: int,
        scalars: Mapping[str, Tensor | float],
        figures: Mapping[str, float],
        shows: bool,
        trackers: Trackers,
        bar: Any,
    ) -> None:
        """Log a step and keep its pictures; if they cannot be written, there is at least a checkpoint of it."""
        values: dict[str, float] = {}
        if scalars:
            values = {**_means(scalars, self.world), "skipped_steps": self.health.skipped}
            values["learning_rate"] = self.loop.rate_at(done - 1)
        try:
            with self.world.raise_together():
                with self.speed.paused():
                    pictures = self.stage.pictures() if shows else {}
                if self.world.is_main:
                    if values:
                        shown = {name: f"{value:.4g}" for name, value in list(values.items())[:3]}
                        values |= self.speed.measure(done)
                        bar.set_postfix({**shown, "img/s": f"{values['images_per_second']:.0f}"}, refresh=False)
                    for name, picture in pictures.items():
                        write_png(picture, self.output / "pictures" / f"{name}-{done:08d}.png")
                    trackers.log(done, {**values, **figures}, pictures)
        except Exception:
            self._save(done)
            raise


def _means(scalars: Mapping[str, Tensor | float], world: World) -> dict[str, float]:
    """Return the means over the ranks; the device is read once."""
    values = [torch.as_tensor(value, dtype=torch.float32, device=world.device) for value in scalars.values()]
    return dict(zip(scalars, world.mean(torch.stack(values)).tolist(), strict=True))


class _Speed:
    """Measure images per second, peak memory and, after a minute, model FLOP utilization; on rank 0."""

    def __init__(self, run: Run, start: int) -> None:
        self.run, self.ceiling, self.done = run, 0.0, start
        self.began = self.since = time.monotonic()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time in the block out of the next measure."""
        start = time.monotonic()
        yield
        self.since += time.monotonic() - start

    def measure(self, done: int) -> dict[str, float]:
        """Return the figures of the steps since the last measure."""
        now, device, loop = time.monotonic(), self.run.device, self.run.config.loop
        steps_per_second = (done - self.done) / max(now - self.since, 1e-9)
        self.done, self.since = done, now
        values = {"images_per_second": steps_per_second * loop.batch_size}
        if device.type == "cuda":
            values["peak_memory_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
        elif sys.platform == "linux":
            import resource

            values["peak_memory_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        if self.run.operations and now - self.began >= UTILIZATION_SECONDS:
            with self.paused():
                dtype = precision_dtype(loop.precision, device)
                self.ceiling = self.ceiling or measure_ceilings(device, dtype, repeats=2).flops
                values["flop_utilization"] = self.run.operations(done - 1) * steps_per_second / self.ceiling
        return values


class _Health:
    """Count the steps that changed nothing because their gradients were not finite, on the device that has these."""

    def __init__(self, loop: LoopConfig, output: Path) -> None:
        self.loop, self.good = loop, next(iter(checkpoints(output)), None)
        self.limit, self.on_cpu = FP16_BAD_STEPS if loop.precision == "fp16" else BAD_STEPS, True
        self._in_a_row, self._skipped = torch.zeros(()), torch.zeros(())

    @property
    def skipped(self) -> float:
        """How many there were since this process started."""
        return float(self._skipped)

    def update(self, scalars: Mapping[str, Tensor | float]) -> None:
        """Count a step, without waiting for it."""
        norms = [torch.as_tensor(value) for name, value in scalars.items() if name.endswith("gradient_norm")]
        bad = ~torch.stack([norm.isfinite() for norm in norms]).all()
        self.on_cpu = bad.device.type == "cpu"
        self._in_a_row = (self._in_a_row.to(bad.device) + 1) * bad
        self._skipped = self._skipped.to(bad.device) + bad

    def check(self, done: int) -> None:
        """Raise an error after too many of them in a row."""
        if float(self._in_a_row) >= self.limit:
            good = f"the last good checkpoint is {self.good}" if self.good else "there is no checkpoint yet"
            raise DetailFlowError(
                f"gradients were not finite in {int(self._in_a_row)} steps in a row, up to step {done}: lower "
                f"learning_rate (now {self.loop.learning_rate}) and start again in another folder; {good}"
            )


class _StopOnSignal:
    """Let SIGTERM and Ctrl-C ask for a checkpoint and a stop after this step; a later Ctrl-C stops at once.

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
