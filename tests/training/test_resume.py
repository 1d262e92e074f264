"""Runs that are killed, stopped, repeated and damaged, as a user meets them.

Another process, real images, every file real.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import yaml

from detailflow import DetailFlowGPT, DetailFlowTokenizer
from detailflow.cli.main import main
from detailflow.errors import DetailFlowError

TOKENIZER = {
    "model": {
        "image_size": 32,
        "patch_size": 8,
        "num_tokens": 16,
        "group_size": 4,
        "codebook_size": 64,
        "codebook_dim": 4,
        "encoder": {"width": 32, "depth": 1, "heads": 2},
        "decoder": {"width": 32, "depth": 1, "heads": 2},
    },
    "correction_share": 0.5,
    "perceptual": 0.1,
    "classifier_epochs": 1,
    "adversarial_from": 0.2,  # so that the discriminator has a state to lose
    "revive_every": 4,  # and so has the count of the used codes
    "loop": {
        "steps": 24,
        "batch_size": 8,
        "learning_rate": 1e-3,
        "pictures_every": 10,
        "log_every": 5,
        "checkpoint_minutes": 0,
    },
}
GPT = {"width": 32, "depth": 2, "heads": 2, "loop": TOKENIZER["loop"]}


@pytest.fixture(scope="module")
def commands(stage_commands: Callable[..., dict[str, list[str]]]) -> dict[str, list[str]]:
    """The command line of each stage, but for --output."""
    return {stage: [*command, "--output"] for stage, command in stage_commands(TOKENIZER, GPT).items()}


@pytest.fixture(scope="module")
def finished(commands: dict[str, list[str]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each stage's run that nothing happened to."""
    outputs = {stage: tmp_path_factory.mktemp("whole") / stage for stage in commands}
    for stage, command in commands.items():
        assert main([*command, str(outputs[stage])]) == 0
    return outputs


@contextmanager
def started(*argv: str) -> Iterator[subprocess.Popen]:
    command = [sys.executable, "-m", "detailflow", *argv]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process = subprocess.Popen(command, text=True, env=environment, start_new_session=True, **pipes)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_for(folder: Path, pattern: str, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 300
    while not list(folder.glob(pattern)):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)


def weights(output: Path) -> bytes:
    return (output / "model.safetensors").read_bytes()


@pytest.mark.parametrize("stage", ["tokenizer", "gpt"])
def test_killed_and_started_again(
    stage: str,
    commands: dict[str, list[str]],
    finished: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    """SIGKILL at a random moment; the same command ends with the same weights, bit for bit."""
    output, moments = tmp_path / "run", random.Random(stage)
    with started(*commands[stage], str(output)) as process:
        wait_for(output, f"resume/step-{moments.randint(2, 14):08d}.pt", process)
        time.sleep(moments.random() * 0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (output / "model.safetensors").exists()
    assert main([*commands[stage], str(output)]) == 0
    assert "going on from step" in capsys.readouterr().out
    assert weights(output) == weights(finished[stage])
    assert not list(output.rglob("*.tmp"))


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["tokenizer", "gpt"])
def test_killed_ten_times(stage: str, commands: dict[str, list[str]], finished: dict[str, Path], tmp_path: Path):
    """SIGKILL at ten random moments, between steps, within them and while a checkpoint is written."""
    output, moments = tmp_path / "run", random.Random(stage)
    for _ in range(10):
        newest = max((int(p.stem[-8:]) for p in (output / "resume").glob("step-*.pt")), default=0)
        with started(*commands[stage], str(output)) as process:
            wait_for(output, f"resume/step-{min(newest + moments.randint(1, 2), 23):08d}.pt", process)
            time.sleep(moments.random() * 0.1)
            process.send_signal(signal.SIGKILL)
            process.wait()
    assert main([*commands[stage], str(output)]) == 0
    assert weights(output) == weights(finished[stage])
    assert not list(output.rglob("*.tmp"))


@pytest.mark.parametrize("stage", [pytest.param("tokenizer", marks=pytest.mark.slow), "gpt"])
def test_a_damaged_checkpoint(
    stage: str,
    commands: dict[str, list[str]],
    finished: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    """Stopped after some steps, the newest checkpoint then cut short: the one before leads to the same weights."""
    output = tmp_path / "run"
    with started(*commands[stage], str(output)) as process:
        wait_for(output, "resume/step-00000005.pt", process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(300) == 130
    newest = sorted((output / "resume").glob("step-*.pt"))[-1]
    newest.write_bytes(newest.read_bytes()[: newest.stat().st_size // 2])
    assert main([*commands[stage], str(output)]) == 0
    out, err = capsys.readouterr()
    assert f"{newest}: this checkpoint cannot be read" in err
    assert f"going on from step {int(newest.stem[-8:]) - 1}" in out
    assert weights(output) == weights(finished[stage])


@pytest.mark.parametrize("stage", [pytest.param("tokenizer", marks=pytest.mark.slow), "gpt"])
def test_sigterm_saves_and_exits(stage: str, commands: dict[str, list[str]], tmp_path: Path):
    """Long before the next checkpoint is due."""
    output = tmp_path / "run"
    more = ["--loop.steps", "1000000", "--loop.checkpoint_minutes", "60"]
    with started(*commands[stage], str(output), *more) as process:
        wait_for(output, "pictures/*-00000010.png", process)  # ten steps are done
        assert not list((output / "resume").iterdir())
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=300)
    assert process.returncode == 130
    (checkpoint,) = (output / "resume").glob("step-*.pt")
    step = int(checkpoint.stem.removeprefix("step-"))
    assert err.endswith(f"detailflow: interrupted at step {step} of 1000000: the same command goes on from there\n")
    assert "Traceback" not in err
    assert not (output / "model.safetensors").exists()


def test_sigterm_to_its_workers_too(commands: dict[str, list[str]], tmp_path: Path):
    """As from `timeout`, Ctrl-C and launchers, which send it to all processes of the group."""
    output = tmp_path / "run"
    more = ["--loop.steps", "1000000", "--loop.checkpoint_minutes", "60", "--loop.workers", "2", "--perceptual", "0"]
    with started(*commands["tokenizer"], str(output), *more) as process:
        wait_for(output, "pictures/*-00000010.png", process)  # ten steps are done
        os.killpg(process.pid, signal.SIGTERM)
        _, err = process.communicate(timeout=300)
    assert process.returncode == 130 and "Traceback" not in err
    assert len(list((output / "resume").glob("step-*.pt"))) == 1


def test_a_full_disk(commands: dict[str, list[str]], finished: dict[str, Path], tmp_path: Path):
    """A checkpoint that doesn't fit ends the run with a sentence and leaves those before it.

    With room again it goes on.
    """
    import resource

    output = tmp_path / "run"
    with started(*commands["gpt"], str(output)) as process:
        wait_for(output, "resume/step-00000003.pt", process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(300) == 130
    before = {p.name: p.read_bytes() for p in (output / "resume").iterdir()}
    room = max(map(len, before.values())) // 2  # no file may grow beyond it
    done = subprocess.run(
        [sys.executable, "-m", "detailflow", *commands["gpt"], str(output)],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (room, room)),
        capture_output=True,
        text=True,
    )
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and last.startswith(f"detailflow: error: {output}/resume/step-"), done.stderr
    assert "the checkpoint cannot be written" in last
    assert {p.name: p.read_bytes() for p in (output / "resume").iterdir()} == before
    assert main([*commands["gpt"], str(output)]) == 0
    assert weights(output) == weights(finished["gpt"])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("stage", ["tokenizer", "gpt"])
def test_a_finished_run(
    stage: str, commands: dict[str, list[str]], finished: dict[str, Path], capsys: pytest.CaptureFixture[str]
):
    output = finished[stage]
    assert [p.name for p in sorted((output / "resume").iterdir())] == ["step-00000023.pt", "step-00000024.pt"]
    kinds = {"tokenizer": ("reconstructions", "mistakes"), "gpt": ("samples",)}[stage]
    assert {p.stem for p in (output / "pictures").iterdir()} == {
        f"{kind}-{s:08d}" for kind in kinds for s in (10, 20, 24)
    }
    before = contents(output)
    assert main([*commands[stage], str(output)]) == 0
    what = {"tokenizer": "tokenizer", "gpt": "AR model"}[stage]
    assert capsys.readouterr().out.splitlines()[-1] == f"{output}: this {what} is finished already"
    assert main([*commands[stage], str(output), "--loop.batch_size", "9"]) == 2
    assert capsys.readouterr().err == (
        f"detailflow: error: {output} holds a run with another loop.batch_size (8, not 9): "
        "repeat its settings or choose another folder\n"
    )
    assert contents(output) == before


def test_raw_weights_are_in_checkpoints(finished: dict[str, Path]):
    with pytest.raises(DetailFlowError, match="averaged weights: its checkpoints in resume/ have the others"):
        DetailFlowGPT.from_pretrained(finished["gpt"], variant="model")
    (*_, last) = sorted((finished["gpt"] / "resume").glob("step-*.pt"))
    averaged, raw = (DetailFlowGPT.from_pretrained(last, variant=name).state_dict() for name in ("ema", "model"))
    exported = DetailFlowGPT.from_pretrained(finished["gpt"]).state_dict()
    assert torch.equal(averaged["head.weight"], exported["head.weight"])
    assert not torch.equal(raw["head.weight"], exported["head.weight"])
    DetailFlowTokenizer.from_pretrained(finished["tokenizer"], variant="model")  # it has one set


def test_killed_before_the_model_was_written(commands: dict[str, list[str]], finished: dict[str, Path], tmp_path: Path):
    """All steps are done, the model is not there or there in half."""
    output = tmp_path / "run"
    shutil.copytree(finished["gpt"], output)
    (output / "config.json").unlink()
    (output / "model.safetensors").write_bytes(b"half")
    assert main([*commands["gpt"], str(output)]) == 0
    assert contents(output)["config.json"] == contents(finished["gpt"])["config.json"]
    assert weights(output) == weights(finished["gpt"])


def test_killed_before_the_report_was_written(
    commands: dict[str, list[str]], finished: dict[str, Path], tmp_path: Path
):
    """The model is there; without a checkpoint it stays the only thing that is."""
    output = shutil.copytree(finished["gpt"], tmp_path / "run")
    for name in ("report.md", "samples.png"):
        (output / name).unlink()
    assert main([*commands["gpt"], str(output)]) == 0
    for name in ("report.md", "samples.png", "config.json", "log.jsonl"):
        assert (output / name).read_bytes() == (finished["gpt"] / name).read_bytes()
    assert weights(output) == weights(finished["gpt"])
    (output / "report.md").unlink()
    shutil.rmtree(output / "resume")
    assert main([*commands["gpt"], str(output)]) == 0
    assert not (output / "report.md").exists()


def test_precision_of_an_earlier_version(commands: dict[str, list[str]], finished: dict[str, Path], tmp_path: Path):
    """Runs that were begun in bf16, once the default, go on with today's; another one that is asked for is refused."""
    output = shutil.copytree(finished["gpt"], tmp_path / "run")
    record = (output / "run.yaml").read_text()
    assert "precision: auto" in record
    (output / "run.yaml").write_text(record.replace("precision: auto", "precision: bf16"))
    assert main([*commands["gpt"], str(output)]) == 0
    assert main([*commands["gpt"], str(output), "--loop.precision", "fp32"]) == 2


def test_a_damaged_record(
    commands: dict[str, list[str]], finished: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    output = shutil.copytree(finished["gpt"], tmp_path / "run")
    record = yaml.safe_load((output / "run.yaml").read_text())
    for known in (5, {"tokens": 5}, {"tokens": {"classes": ["cat"]}}, {"tokens": {"classes": {"cat": "many"}}}):
        (output / "run.yaml").write_text(yaml.safe_dump(record | {"known_by": known}))
        assert main([*commands["gpt"], str(output)]) == 2
        assert "run.yaml is damaged: remove" in capsys.readouterr().err


def test_no_run_begins_among_images(
    commands: dict[str, list[str]], cifar: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    photos = Path(shutil.copytree(cifar, tmp_path / "photos"))
    for output in (photos, photos / "class0"):
        before = contents(output)
        assert main([*commands["gpt"], str(output)]) == 2
        assert f"{output} has images in it, such as " in capsys.readouterr().err
        assert contents(output) == before


def test_precision_stays(commands: dict[str, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """A run that was begun in float32 does not go on in what is chosen by itself."""
    command, fp32 = [*commands["gpt"], str(tmp_path / "run")], ("--loop.precision", "fp32")
    assert main([*command, *fp32, "--loop.steps", "2"]) == 0
    before = contents(tmp_path / "run")
    assert main(command) == 2
    assert "another loop.precision ('fp32', not 'auto')" in capsys.readouterr().err
    assert contents(tmp_path / "run") == before
    assert main([*command, *fp32, "--loop.steps", "4"]) == 0
