"""Several processes do what one does: the same curves, the same weights, whichever way the work is parted."""

import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from detailflow.cli.main import main
from detailflow.training.config import Extraction
from detailflow.training.extract import extract

LOOP = {
    "steps": 50,
    "batch_size": 4,
    "learning_rate": 3e-4,
    "precision": "fp32",
    "log_every": 1,
    "pictures_every": 1000,
}
TOKENIZER = {
    "model": {
        "image_size": 32,
        "patch_size": 8,
        "num_tokens": 16,
        "group_size": 4,
        "codebook_size": 16,  # few codes: where two are almost as near, rounding decides, and the curves part
        "codebook_dim": 8,
        "encoder": {"width": 32, "depth": 1, "heads": 2},
        "decoder": {"width": 32, "depth": 1, "heads": 2},
    },
    "perceptual": 0.1,
    "perceptual_warmup": 0.5,
    "classifier_epochs": 1,
    "adversarial_from": 35,  # two networks that learn from each other make the most of rounding
    "augment": True,
    "lecam": 0.001,
    "consistency": 1.0,
    "alignment": 0.5,
    "revive_every": 10,
    "loop": LOOP,
}
GPT = {"width": 32, "depth": 2, "heads": 2, "dropout": 0.0, "loop": {**LOOP, "learning_rate": 5e-4}}


@pytest.fixture(scope="module")
def commands(stage_commands: Callable[..., dict[str, list[str]]]) -> dict[str, list[str]]:
    """The command line of each stage."""
    return stage_commands(TOKENIZER, GPT)


def run(command: list[str], processes: int) -> None:
    if processes == 1:
        assert main(command) == 0
        return
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, "-m", "detailflow", *command], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def finished(commands: dict[str, list[str]], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Path]:
    """The run of a stage by so many processes, made once."""

    @cache
    def folder(stage: str, processes: int) -> Path:
        output = tmp_path_factory.mktemp("run") / stage
        run([*commands[stage], "--output", str(output)], processes)
        return output

    return folder


def curves(output: Path) -> dict[str, np.ndarray]:
    events = EventAccumulator(str(output / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    names = set(events.Tags()["scalars"]) - {"images_per_second", "peak_memory_gib"}
    return {name: np.array([(e.step, e.value) for e in events.Scalars(name)]) for name in names}


def assert_same(first: Path, second: Path, tolerance: float, steps: int = LOOP["steps"]) -> None:
    """Curves and weights."""
    ours, theirs = curves(first), curves(second)
    assert ours.keys() == theirs.keys() and len(ours["loss"]) == steps
    for name in ours:
        allowed = tolerance * (
            10 if name.endswith("gradient_norm") else 1
        )  # the losses' derivatives feel rounding more
        np.testing.assert_allclose(theirs[name], ours[name], rtol=allowed, atol=allowed, err_msg=name)
    learnt = ours["pixel" if "pixel" in ours else "loss"][
        :, 1
    ]  # a tokenizer's loss rises with the weights of its terms
    assert learnt[-10:].mean() < 0.95 * learnt[:10].mean()
    a, b = load_file(first / "model.safetensors"), load_file(second / "model.safetensors")
    for name in a:
        torch.testing.assert_close(
            b[name], a[name], rtol=0, atol=20 * tolerance, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("stage", ["tokenizer", "gpt"])
def test_two_processes_do_what_one_does(stage: str, finished: Callable[[str, int], Path]):
    """The same global batch.

    Every curve within 1e-5 over 50 steps, and so the work in parts of one process's memory.
    """
    assert_same(finished(stage, 1), finished(stage, 2), 1e-5)


@pytest.mark.parametrize("stage", ["tokenizer", "gpt"])
def test_accumulation_changes_nothing(
    stage: str, commands: dict[str, list[str]], finished: Callable[[str, int], Path], tmp_path: Path
):
    """But for the discriminator, whose batch norms see fewer images and whose spectral norms are estimated
    more often."""
    command, one, steps = commands[stage], tmp_path / "one", 25
    if stage == "tokenizer":
        command = [*command, "--adversarial", "0", "--loop.steps", str(steps)]
        run([*command, "--output", str(one)], 1)
    else:
        one, steps = finished(stage, 1), LOOP["steps"]
    more = ["--loop.accumulate", "2", "--loop.checkpoint_activations", "true"]
    run([*command, "--output", str(tmp_path / "parts"), *more], 1)
    assert_same(one, tmp_path / "parts", 1e-5, steps)


def test_sharded_weights_are_the_same(
    commands: dict[str, list[str]], finished: Callable[[str, int], Path], tmp_path: Path
):
    """FSDP2 beside DistributedDataParallel."""
    run([*commands["gpt"], "--output", str(tmp_path / "parted"), "--loop.shard", "true"], 2)
    assert_same(finished("gpt", 2), tmp_path / "parted", 1e-5)


@pytest.mark.parametrize("way", ["", "shard", "lora", "muon"])
def test_several_processes_go_on_with_a_run_of_one(
    way: str,
    commands: dict[str, list[str]],
    finished: Callable[[str, int], Path],
    cifar: Path,
    model: Path,
    tmp_path: Path,
):
    """From its last checkpoint but one; at the end they read its best one, of a step before."""
    output, tokens = tmp_path / "run", tmp_path / "tokens"
    extract(Extraction(str(cifar), str(model), val_share=0.2), tokens, "cpu")
    loop = {"steps": 8, "learning_rate": 3, "checkpoint_minutes": 0, "val_every": 1, "shard": way == "shard"}
    command = [*commands["gpt"], "--output", str(output), "--tokens", str(tokens)]
    command += [word for name, value in loop.items() for word in (f"--loop.{name}", str(value).lower())]
    if way == "lora":
        command += ["--lora", "2", "--init", str(finished("gpt", 1))]
    if way == "muon":
        command += ["--muon", "3"]
    run(command, 1)
    last = output / "resume" / "step-00000008.pt"
    exported, whole = load_file(output / "model.safetensors"), torch.load(last)["state"]
    assert [path.name for path in (output / "best").iterdir()] != [last.name]
    last.unlink()
    (output / "config.json").unlink()
    run(command, 2)
    torch.testing.assert_close(load_file(output / "model.safetensors"), exported, rtol=0, atol=0)
    resumed = torch.load(last)["state"]
    near: Any = dict(rtol=0, atol=0.03) if way == "muon" else dict(rtol=1e-4, atol=1e-4)  # it computes in bfloat16
    torch.testing.assert_close(resumed["model"], whole["model"], **near)
    torch.testing.assert_close(resumed["optimizer"]["state"], whole["optimizer"]["state"], rtol=1e-4, atol=1e-4)
    if way == "muon":
        assert "momentum_buffer" in whole["optimizer"]["state"]["blocks.0.attn.qkv.weight"]
