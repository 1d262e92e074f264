"""The loop's parts: the learning rate, the run's folder, checkpoints. What they are for is in test_resume.py."""

import math
import os
import stat
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pytest
import torch
import yaml

from detailflow.distributed import World
from detailflow.errors import DetailFlowError
from detailflow.runs import RUN_FILE
from detailflow.training.checkpoints import go_on, load_checkpoint, reserve_run, save_checkpoint
from detailflow.training.config import LoopConfig


def test_the_learning_rate():
    loop = LoopConfig(steps=200, batch_size=1, learning_rate=0.5, warmup=0.1, final_rate=0.02)
    rates = [loop.rate_at(step) for step in range(200)]
    for step in range(20):  # linear, from one part in 21
        assert rates[step] == pytest.approx(0.5 * (step + 1) / 21)
    assert rates[20] == max(rates) == 0.5
    for step in (20, 65, 110, 199):
        cosine = (1 + math.cos(math.pi * (step - 20) / 180)) / 2
        assert rates[step] == pytest.approx(0.5 * 0.02 + 0.5 * 0.98 * cosine)
    assert rates[110] == pytest.approx(0.5 * (1.02 / 2))
    assert rates[20:] == sorted(rates[20:], reverse=True)
    assert 0.01 <= rates[199] < 0.0101


def test_a_warm_up_from_a_share_of_the_peak():
    """docs/method.md#ar-model: from 0.005 over 5% of the steps, to 0.01 of the peak."""
    loop = LoopConfig(steps=1000, batch_size=1, learning_rate=2.0, warmup=0.05, initial_rate=0.005, final_rate=0.01)
    rates = [loop.rate_at(step) for step in range(1000)]
    for step in range(50):
        assert rates[step] == pytest.approx(2 * (0.005 + 0.995 * (step + 1) / 51))
    assert rates[50] == 2.0 and 0.02 < rates[-1] < 0.0201


def test_no_warm_up_and_a_single_step():
    assert LoopConfig(steps=10, batch_size=1, learning_rate=0.5, warmup=0).rate_at(0) == 0.5
    assert 0 < LoopConfig(steps=1, batch_size=1, learning_rate=0.5).rate_at(0) <= 0.5


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"accumulate": 0}, "accumulate must be a positive integer, not 0"),
        ({"keep": 0}, "keep must be a positive integer"),
        ({"initial_rate": 1.5}, "initial_rate must be 0 to 1"),
        ({"trackers": ("paper",)}, "trackers must be among tensorboard, wandb, not 'paper'"),
        ({"milestone_every": -1}, "milestone_every must be 0 or more"),
        ({"steps": 0}, "steps must be a positive integer, not 0"),
        ({"batch_size": 2.5}, "batch_size must be a positive integer, not 2.5"),
        ({"log_every": 0}, "log_every must be a positive integer"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0"),
        ({"learning_rate": math.nan}, "learning_rate must be above 0"),
        ({"warmup": 1.0}, "warmup must be at least 0 and below 1"),
        ({"final_rate": 1.1}, "final_rate must be 0 to 1"),
        ({"grad_clip": 0.0}, "grad_clip must be above 0"),
        ({"precision": "fp8"}, "precision must be auto, bf16, fp16 or fp32, not 'fp8'"),
        ({"seed": -1}, r"seed must be 0 to 2\^64 - 1, not -1"),
        ({"seed": 2**64}, r"seed must be 0 to 2\^64 - 1, not 18446744073709551616"),
        ({"workers": -1}, "workers must be 0 or more"),
        ({"checkpoint_minutes": -1.0}, "checkpoint_minutes must be 0 or more"),
    ],
)
def test_wrong_settings(setting: dict, message: str):
    with pytest.raises(DetailFlowError, match=message):
        LoopConfig(**({"steps": 1, "batch_size": 1, "learning_rate": 0.1} | setting))


def test_parts_of_a_batch():
    loop = LoopConfig(steps=1, batch_size=24, learning_rate=0.1, accumulate=3)
    assert loop.images_at_once(World()) == 8 and loop.images_at_once(World(1, 4)) == 2
    with pytest.raises(DetailFlowError, match="a batch of 24 cannot be divided evenly among 5 processes"):
        loop.images_at_once(World(0, 5))
    with pytest.raises(
        DetailFlowError, match="accumulate must divide the images of each process, and 3 does not divide 4"
    ):
        loop.images_at_once(World(0, 6))


# ------------------------------------------------------------------------------------------------- the folder


@dataclass(frozen=True)
class Settings:
    loop: LoopConfig
    names: tuple[str, ...] = ("a", "b")


LOOP = LoopConfig(steps=5, batch_size=1, learning_rate=0.1)


def test_a_folder_belongs_to_one_run(tmp_path: Path):
    output = tmp_path / "deep" / "run"
    assert reserve_run(output, "gpt", asdict(Settings(LOOP)))
    (output / "resume").rmdir()  # as the message about checkpoints that cannot be read advises
    assert reserve_run(output, "gpt", asdict(Settings(LOOP)))  # tuples came back as lists
    assert (output / "resume").is_dir()
    with pytest.raises(DetailFlowError, match=r"another names \(\['a', 'b'\], not \['a'\]\)"):
        reserve_run(output, "gpt", asdict(Settings(LOOP, ("a",))))
    with pytest.raises(DetailFlowError, match=r"another kind \('gpt', not 'tokenizer'\)"):
        reserve_run(output, "tokenizer", asdict(Settings(LOOP)))
    (output / "config.json").write_text("{}")
    assert not reserve_run(output, "gpt", asdict(Settings(LOOP)))


def test_a_model_from_elsewhere_is_not_overwritten(model: Path):
    before = (model / "tokenizer" / "config.json").read_bytes()
    with pytest.raises(DetailFlowError, match="holds a model that was not trained there"):
        reserve_run(model / "tokenizer", "tokenizer", asdict(Settings(LOOP)))
    assert sorted(p.name for p in (model / "tokenizer").iterdir()) == ["config.json", "model.safetensors"]
    assert (model / "tokenizer" / "config.json").read_bytes() == before


def test_a_damaged_run_file(tmp_path: Path):
    (tmp_path / RUN_FILE).write_text("kind: [")
    with pytest.raises(DetailFlowError, match=f"{RUN_FILE} is damaged"):
        reserve_run(tmp_path, "gpt", asdict(Settings(LOOP)))


@pytest.mark.parametrize("name", ["file", "file/deeper", "x" * 300])
def test_a_folder_that_cannot_be_made(name: str, tmp_path: Path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(DetailFlowError, match="cannot write .*run.yaml"):
        reserve_run(tmp_path / name, "gpt", asdict(Settings(LOOP)))
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


# ------------------------------------------------------------------------------------------------- checkpoints


@pytest.fixture
def four(tmp_path: Path) -> None:
    """Checkpoints of steps 1 to 4 lie in the folder, as far as they are kept."""
    (tmp_path / "resume").mkdir()
    for step in range(1, 5):
        save_checkpoint(tmp_path, step, {"value": torch.full((3,), float(step))})


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in (folder / "resume").iterdir())


def test_the_last_two_stay(four: None, tmp_path: Path):
    assert names(tmp_path) == ["step-00000003.pt", "step-00000004.pt"]
    found = load_checkpoint(tmp_path)
    assert found and found.step == 4 and found.state["value"].tolist() == [4, 4, 4]


def test_as_many_as_asked_for_and_milestones(tmp_path: Path):
    (tmp_path / "resume").mkdir()
    for step in range(1, 10):
        save_checkpoint(tmp_path, step, {"value": step}, keep=3, milestone=step % 4 == 0)
    assert names(tmp_path) == [f"step-{step:08d}.pt" for step in (7, 8, 9)]
    assert sorted(p.name for p in (tmp_path / "milestones").iterdir()) == ["step-00000004.pt", "step-00000008.pt"]
    assert torch.load(tmp_path / "milestones" / "step-00000004.pt", weights_only=True)["state"] == {"value": 4}


def test_damaged_ones_take_no_place(tmp_path: Path):
    """A newer one does not cost the one that was just written, and one in between not the last good one before."""
    (tmp_path / "resume").mkdir()
    (tmp_path / "resume" / "step-00000009.pt").write_bytes(b"rubbish")
    save_checkpoint(tmp_path, 1, {"value": 1}, keep=1)
    save_checkpoint(tmp_path, 3, {"value": 3}, keep=1)
    assert names(tmp_path) == ["step-00000003.pt", "step-00000009.pt"]
    (tmp_path / "resume" / "step-00000004.pt").write_bytes(b"rubbish")
    save_checkpoint(tmp_path, 5, {"value": 5}, keep=2)
    assert names(tmp_path) == [f"step-{step:08d}.pt" for step in (3, 4, 5, 9)]
    save_checkpoint(tmp_path, 6, {"value": 6}, keep=2)
    assert names(tmp_path) == [f"step-{step:08d}.pt" for step in (5, 6, 9)]
    found = load_checkpoint(tmp_path)
    assert found and found.step == 6


def test_a_checkpoint_is_on_the_disk_before_those_before_it_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its bytes first, then its name in the folder, and only then the others."""
    happened = []
    sync, unlink = os.fsync, Path.unlink
    monkeypatch.setattr(os, "fsync", lambda file: (happened.append(stat.S_ISDIR(os.fstat(file).st_mode)), sync(file)))
    monkeypatch.setattr(Path, "unlink", lambda path, **options: (happened.append(path.name), unlink(path, **options)))
    (tmp_path / "resume").mkdir()
    for step in (1, 2):
        save_checkpoint(tmp_path, step, {"value": step}, keep=1)
    events = [event for event in happened if not str(event).startswith(".")]  # without the temporary files'
    assert events == [False, True, False, True, "step-00000001.pt"]


def test_settings_that_may_change_when_a_run_goes_on(tmp_path: Path):
    reserve_run(tmp_path, "gpt", asdict(Settings(LOOP)))
    more = replace(LOOP, workers=3, log_every=1, keep=5, trackers=(), accumulate=4, checkpoint_minutes=9)
    settings = reserve_run(tmp_path, "gpt", asdict(Settings(more)))
    assert settings and yaml.safe_load((tmp_path / RUN_FILE).read_text())["loop"]["workers"] != 3
    go_on(tmp_path, settings)
    assert yaml.safe_load((tmp_path / RUN_FILE).read_text())["loop"]["workers"] == 3
    with pytest.raises(DetailFlowError, match=r"another loop.learning_rate \(0.1, not 0.2\)"):
        reserve_run(tmp_path, "gpt", asdict(Settings(replace(more, learning_rate=0.2))))


def test_fewer_steps_than_recorded(tmp_path: Path):
    """If as many are not done yet; a finished run stays as it is."""
    reserve_run(tmp_path, "gpt", asdict(Settings(LOOP)))
    save_checkpoint(tmp_path, 3, {})
    with pytest.raises(DetailFlowError, match="holds a run that has taken 3 steps, more than 2"):
        reserve_run(tmp_path, "gpt", asdict(Settings(replace(LOOP, steps=2))))
    fewer = reserve_run(tmp_path, "gpt", asdict(Settings(replace(LOOP, steps=3))))
    assert fewer and fewer["loop"]["steps"] == 3
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(DetailFlowError, match="holds a finished run of 5 steps, more than 3"):
        reserve_run(tmp_path, "gpt", asdict(Settings(replace(LOOP, steps=3))))


def test_a_finished_model_without_checkpoints_is_not_trained_over(tmp_path: Path):
    reserve_run(tmp_path, "gpt", asdict(Settings(LOOP)))
    (tmp_path / "config.json").write_text("{}")
    before = (tmp_path / RUN_FILE).read_bytes()
    with pytest.raises(DetailFlowError, match="holds a finished model, but no checkpoint in resume/ to go on from"):
        reserve_run(tmp_path, "gpt", asdict(Settings(replace(LOOP, steps=9))))
    assert (tmp_path / RUN_FILE).read_bytes() == before and (tmp_path / "config.json").exists()
    assert reserve_run(tmp_path, "gpt", asdict(Settings(LOOP))) is None


@pytest.mark.parametrize("length", [0, 1, 100, -1])
def test_a_truncated_one_gives_way_to_the_one_before(
    length: int, four: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    path = tmp_path / "resume" / "step-00000004.pt"
    path.write_bytes(path.read_bytes()[:length])
    found = load_checkpoint(tmp_path)
    assert found and found.step == 3 and found.state["value"].tolist() == [3, 3, 3]
    assert "this checkpoint cannot be read" in caplog.text


def test_none_that_can_be_read(four: None, tmp_path: Path):
    for path in (tmp_path / "resume").iterdir():
        path.write_bytes(b"rubbish")
    with pytest.raises(DetailFlowError, match="none of the checkpoints can be read"):
        load_checkpoint(tmp_path)


def test_no_checkpoint_is_a_start(tmp_path: Path):
    assert load_checkpoint(tmp_path) is None


def test_a_checkpoint_that_cannot_be_written(tmp_path: Path):
    with pytest.raises(DetailFlowError, match="the checkpoint cannot be written"):
        save_checkpoint(tmp_path / "missing", 1, {})
