"""A file system that fills up while a run writes to it.

One sentence, and a checkpoint to go on from if there is room for one.
"""

import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from detailflow.cli.main import main

MODEL = {
    "image_size": 32,
    "patch_size": 16,
    "num_tokens": 8,
    "group_size": 4,
    "codebook_size": 32,
    "codebook_dim": 4,
    "encoder": {"width": 16, "depth": 1, "heads": 2},
    "decoder": {"width": 16, "depth": 1, "heads": 2},
}
LOOP = {
    "steps": 3,
    "batch_size": 4,
    "learning_rate": 1e-3,
    "checkpoint_minutes": 60,
    "pictures_every": 2,
    "log_every": 1,
}
TOKENIZER = {"model": MODEL, "adversarial": 0, "perceptual": 0.1, "classifier_epochs": 1, "loop": LOOP}
GPT = {"width": 16, "depth": 1, "heads": 2, "loop": LOOP}


def with_little_room(
    folder: Path, size: str, command: list[str], filled: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run detailflow where `folder` is a file system of `size`; what is written there is gone afterwards."""
    folder.mkdir(parents=True)
    mount = f"mount -t tmpfs -o size={size} tmpfs {shlex.quote(str(folder))}"
    space = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    try:
        possible = subprocess.run([*space, mount], capture_output=True).returncode == 0
    except FileNotFoundError:
        possible = False
    if not possible:
        pytest.skip("needs a file system of its own, which this machine does not allow")
    fill = f"head -c {size} /dev/zero > {shlex.quote(str(folder / 'full'))} && " if filled else ""
    run = shlex.join([sys.executable, "-m", "detailflow", *command])
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*space, f"{mount} && {fill}exec {run}"], capture_output=True, text=True, env=environment, timeout=300
    )


@pytest.fixture(scope="module")
def commands(stage_commands: Callable[..., dict[str, list[str]]]) -> dict[str, list[str]]:
    return stage_commands(TOKENIZER, GPT)


@pytest.mark.parametrize(
    ("part", "size", "message"),
    [
        ("pictures", "4k", "cannot write {output}/pictures/samples-00000002.png: No space left on device"),
        ("tensorboard", "4k", "cannot write TensorBoard's log to {output}: No space left on device"),
    ],
)
def test_there_is_a_checkpoint(part: str, size: str, message: str, commands: dict[str, list[str]], tmp_path: Path):
    """None was due yet; the same command goes on from it."""
    output = tmp_path / "run"
    command = [*commands["gpt"], "--output", str(output)]
    done = with_little_room(output / part, size, command)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert last == f"detailflow: error: {message.format(output=output)}"
    assert [path.name for path in (output / "resume").iterdir()] == ["step-00000002.pt"]
    assert main(command) == 0


def test_nothing_can_be_logged(commands: dict[str, list[str]], tmp_path: Path):
    """It is full before the run begins."""
    output = tmp_path / "run"
    command = [*commands["gpt"], "--output", str(output)]
    done = with_little_room(output / "tensorboard", "4k", command, filled=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    message = f"detailflow: error: cannot write TensorBoard's log to {output}: No space left on device"
    assert done.stderr.splitlines()[-1] == message
    assert main(command) == 0


def test_the_classifier_does_not_fit(commands: dict[str, list[str]], tmp_path: Path):
    output = tmp_path / "run"
    done = with_little_room(output, "64k", [*commands["tokenizer"], "--output", str(output)])
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert (
        done.stderr.splitlines()[-1] == f"detailflow: error: cannot write {output}/features.pt: No space left on device"
    )
