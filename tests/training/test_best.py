"""The best step by validation: which steps can be compared, also when a run goes on with other settings."""

import contextlib
import itertools
import math
import pkgutil
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from detailflow.distributed import World
from detailflow.errors import DetailFlowError
from detailflow.runs import checkpoints, step_of
from detailflow.training import loop
from detailflow.training.config import LoopConfig
from detailflow.training.loop import Run
from detailflow.training.tracking import read_history


@dataclass(frozen=True)
class Settings:
    loop: LoopConfig
    init: str | None = None


class Counter:
    """A stage whose weight is the number of its steps, and whose validation loss is given for each of them."""

    validation = None

    def __init__(self, losses: list[float], comparable_from: float = 0.0) -> None:
        self.losses, self.comparable_from, self.done = losses, comparable_from, 0

    def batches(self, start_step: int) -> Iterator[int]:
        yield from range(start_step, 1000)

    def step(self, step: int, batch: int, rate: float, log: bool = True) -> dict[str, Any]:
        self.done = step + 1
        return {"gradient_norm": 1.0}

    def state(self) -> dict[str, Any]:
        return {"done": torch.tensor(self.done)}

    def restore(self, state: dict[str, Any]) -> None:
        self.done = int(state["done"])

    def validate(self) -> dict[str, float]:
        return {"val_loss": self.losses[self.done - 1] if self.done else 2.0}

    def model_config(self) -> dict[str, Any]:
        return {}

    def pictures(self) -> dict[str, Image.Image]:
        return {}

    def export(self, directory: Path) -> None:
        (directory / "config.json").write_text(str(self.done))


def train(output: Path, losses: list[float], comparable_from: float = 0.0, **settings: Any) -> int:
    """Train and return the step that was exported."""
    init = settings.pop("init", None)
    config = LoopConfig(
        **{"steps": len(losses), "batch_size": 1, "learning_rate": 0.1, "trackers": (), "val_every": 1, **settings}
    )
    run = Run("line", Settings(config, init), output, World(), torch.device("cpu"))
    loop.train(lambda _: Counter(losses, comparable_from), run)
    return int((output / "config.json").read_text())


def test_a_short_run_that_goes_on(tmp_path: Path):
    """Its last step counted although not all losses were trained; with more steps it does not."""
    assert train(tmp_path, [3.0, 1.0], comparable_from=2) == 2
    assert train(tmp_path, [3.0, 1.0, 4.0, 5.0], comparable_from=2) == 3


def test_a_run_that_goes_on_with_the_same_images(tmp_path: Path):
    assert train(tmp_path, [3.0, 1.0]) == 2
    assert train(tmp_path, [3.0, 1.0, 2.0]) == 2


@pytest.mark.parametrize(("settings", "exported"), [({"val_images": 7}, 3), ({"val_every": 0}, 4)])
def test_a_run_that_goes_on_with_other_validation(settings: dict[str, Any], exported: int, tmp_path: Path):
    assert train(tmp_path, [3.0, 1.0]) == 2
    assert train(tmp_path, [3.0, 1.0, 4.0, 5.0], **settings) == exported


def test_a_run_that_goes_on_with_other_steps_to_compare(tmp_path: Path):
    assert train(tmp_path, [3.0, 1.0], comparable_from=1) == 2
    assert train(tmp_path, [3.0, 1.0, 4.0], comparable_from=1.5) == 3


STALLING = [5.0, 3.0, 4.0, 4.0, 2.0, 1.0, 1.0, 1.0, 1.0, 0.5]


def last(output: Path) -> int:
    """The last step that was taken."""
    return max(step_of(path) for path in checkpoints(output))


def test_a_run_stops_once_validation_has_stopped_improving(tmp_path: Path):
    assert train(tmp_path / "never", STALLING) == 10 == last(tmp_path / "never")
    assert (train(tmp_path / "two", STALLING, patience=2), last(tmp_path / "two")) == (2, 4)
    assert (train(tmp_path / "three", STALLING, patience=3), last(tmp_path / "three")) == (6, 9)
    report = (tmp_path / "three" / "report.md").read_text()
    assert (
        "- 9 steps of 1 images\n- stopped before step 10: validation has not improved since step 6 (patience 3)"
        in report
    )


def test_patience_counts_validations(tmp_path: Path):
    """Of which one is taken every third step: of 4.0, 1.0 and 1.0."""
    assert (train(tmp_path, STALLING, patience=1, val_every=3), last(tmp_path)) == (6, 9)


def test_steps_that_cannot_be_compared_need_no_patience(tmp_path: Path):
    assert (train(tmp_path, STALLING, comparable_from=6, patience=2), last(tmp_path)) == (7, 9)


def test_a_run_that_stopped_early_is_finished(tmp_path: Path):
    assert train(tmp_path, STALLING, patience=2) == 2
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert train(tmp_path, STALLING, patience=2) == 2
    assert train(tmp_path, STALLING, patience=1) == 2
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_run_that_was_killed_as_it_stopped(tmp_path: Path):
    """Before the model was written: no further step is taken."""
    assert train(tmp_path, STALLING, patience=2) == 2
    (tmp_path / "config.json").unlink()
    assert (train(tmp_path, STALLING, patience=2), last(tmp_path)) == (2, 4)


@pytest.mark.parametrize(("patience", "exported", "end"), [(0, 10, 10), (3, 6, 9)])
def test_a_run_that_stopped_early_goes_on_with_more_patience(patience: int, exported: int, end: int, tmp_path: Path):
    assert train(tmp_path, STALLING, patience=2) == 2
    assert (train(tmp_path, STALLING, patience=patience), last(tmp_path)) == (exported, end)


def test_a_run_that_stopped_early_goes_on_for_longer(tmp_path: Path):
    """Its patience begins again, once; so the same command later changes nothing."""
    losses = [*STALLING, 0.5, 0.5]
    assert train(tmp_path, STALLING, patience=2) == 2
    assert (train(tmp_path, losses, patience=2), last(tmp_path)) == (6, 8)
    assert (train(tmp_path, losses, patience=2), last(tmp_path)) == (6, 8)
    (tmp_path / "config.json").unlink()
    assert (train(tmp_path, losses, patience=2), last(tmp_path)) == (6, 8)


def train_from(output: Path, losses: list[float], comparable_from: float = 0.0, patience: int = 0) -> int:
    """Train from a model whose loss is 2 and return the step that was exported."""
    config = LoopConfig(len(losses), 1, 0.1, trackers=(), val_every=1, patience=patience)
    run = Run("line", Settings(config, "model"), output, World(), torch.device("cpu"))
    loop.train(lambda _: Counter(losses, comparable_from), run)
    return int((output / "config.json").read_text())


def test_what_a_run_starts_from_may_be_the_best(tmp_path: Path):
    assert train_from(tmp_path / "worse", [3.0, 4.0]) == 0
    assert train_from(tmp_path / "better", [3.0, 1.0]) == 2
    assert (train_from(tmp_path / "stopped", [3.0] * 9, patience=2), last(tmp_path / "stopped")) == (0, 2)
    assert train_from(tmp_path / "late", [3.0, 4.0], comparable_from=1) == 2  # it lacks a loss that is trained later
    assert train(tmp_path / "scratch", [3.0, 4.0]) == 1
    (tmp_path / "stopped" / "config.json").unlink()
    assert train_from(tmp_path / "stopped", [3.0] * 9, patience=2) == 0


@pytest.mark.parametrize("error", [DetailFlowError("no room"), KeyboardInterrupt()])
def test_a_finished_run_whose_longer_one_never_starts(error: BaseException, tmp_path: Path):
    assert train(tmp_path, [3.0, 1.0]) == 2
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def fail(resuming: bool) -> Counter:
        raise error

    config = LoopConfig(steps=5, batch_size=1, learning_rate=0.1, trackers=(), val_every=1)
    with pytest.raises(type(error)):
        loop.train(fail, Run("line", Settings(config), tmp_path, World(), torch.device("cpu")))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert train(tmp_path, [3.0, 1.0]) == 2


def test_a_first_start_that_fails_leaves_no_features(tmp_path: Path):
    """They would be taken for those of other images."""

    def fail(resuming: bool) -> Counter:
        (tmp_path / "features.pt").write_text("of these images")
        raise DetailFlowError("a network is not there")

    config = LoopConfig(steps=2, batch_size=1, learning_rate=0.1, trackers=())
    with pytest.raises(DetailFlowError, match="a network is not there"):
        loop.train(fail, Run("line", Settings(config), tmp_path, World(), torch.device("cpu")))
    assert not any(tmp_path.iterdir())


def test_a_loss_that_is_not_finite_is_not_the_best(tmp_path: Path):
    assert train(tmp_path / "first", [math.nan, 2.0, -math.inf, 3.0]) == 2
    assert train(tmp_path / "all", [math.nan, math.nan]) == 2 and not (tmp_path / "all" / "best").exists()


def test_the_model_is_there_before_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The same command writes the report once that can be done."""

    def fails(*_: object) -> None:
        (tmp_path / "report.md").mkdir()
        usual(*_)

    usual = loop.write_report
    monkeypatch.setattr(loop, "write_report", fails)
    with pytest.raises(DetailFlowError, match="report.md"):
        train(tmp_path, [2.0, 1.0])
    assert (tmp_path / "config.json").read_text() == "2"
    monkeypatch.setattr(loop, "write_report", usual)
    (tmp_path / "report.md").rmdir()
    assert train(tmp_path, [2.0, 1.0]) == 2
    assert "the exported model is that of step 2" in (tmp_path / "report.md").read_text()


def test_a_report_costs_no_model(tmp_path: Path):
    """What validates otherwise might find another step the best: with such settings the model stays as it is."""
    assert train(tmp_path, [1.0, 2.0]) == 1
    (tmp_path / "report.md").unlink()
    assert train(tmp_path, [1.0, 2.0], val_images=3) == 1
    assert not (tmp_path / "report.md").exists()
    assert train(tmp_path, [1.0, 2.0]) == 1
    assert "the exported model is that of step 1" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("at", [3, 4])
def test_the_best_step_is_not_lost_between_two_files(
    at: int, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The disk is full, or the process killed, after the first of a step's files: a run that goes on has them all."""
    losses, settings = [3.0, 2.5, 1.0, 2.0], {"checkpoint_minutes": 0, "milestone_every": 2}
    assert train(tmp_path / "whole", losses, **settings) == 3
    real, failed = shutil.copyfile, []

    def copy(source: Path, target: Path) -> None:
        if step_of(Path(source)) == at and not failed:
            failed.append(source)
            raise error
        real(source, target)

    monkeypatch.setattr(shutil, "copyfile", copy)
    with pytest.raises(DetailFlowError if isinstance(error, OSError) else KeyboardInterrupt):
        train(tmp_path / "run", losses, **settings)
    assert failed and train(tmp_path / "run", losses, **settings) == 3
    whole, run = (
        [[p.name for p in checkpoints(tmp_path / one, kind)] for kind in ("resume", "best", "milestones")]
        for one in ("whole", "run")
    )
    assert whole == run == [["step-00000004.pt", "step-00000003.pt"], ["step-00000003.pt"], run[2]] and len(run[2]) == 2


class Killed(BaseException):
    """What nothing expects."""


def logged(output: Path) -> list[dict[str, float]]:
    return [{name: record[name] for name in ("step", "val_loss")} for record in read_history(output)]


@pytest.mark.parametrize("init", [None, "a model"])
@pytest.mark.parametrize("work", ["Trackers.log", "save_checkpoint"])
def test_a_run_that_is_killed_at_any_step_has_the_log_of_one_that_was_not(
    work: str, init: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Whether it was after the step was logged or after its checkpoint was written; each has one record."""
    losses = [3.0, 1.0, 2.0, 1.5]
    train(tmp_path / "whole", losses, init=init, checkpoint_minutes=0)
    work = f"detailflow.training.loop.{work}"
    usual = pkgutil.resolve_name(work)
    for at in range(len(losses) + (init is not None)):
        output, calls = tmp_path / str(at), itertools.count()

        def dies(*given: Any, at: int = at, calls: Iterator[int] = calls, **settings: Any) -> Any:
            result = usual(*given, **settings)
            if next(calls) == at:
                raise Killed
            return result

        monkeypatch.setattr(work, dies)
        with contextlib.suppress(Killed):
            train(output, losses, init=init, checkpoint_minutes=0)
        assert next(calls) == at + 1
        monkeypatch.setattr(work, usual)
        assert train(output, losses, init=init, checkpoint_minutes=0) == 2
        assert logged(output) == logged(tmp_path / "whole")
