"""Training in a given time, with tiny recipes on a CPU."""

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from detailflow import DetailFlowPipeline
from detailflow.data import open_images

SCRIPT = Path(__file__).parents[2] / "experiments" / "shipped-model" / "on_gpu.py"
RECIPE = SCRIPT.parent / "gpu"


def test_a_shard_of_a_set(tmp_path: Path, cifar: Path, monkeypatch: pytest.MonkeyPatch):
    """The same images in the same classes."""
    argv = ["shard.py", "--data", str(cifar), "--output", str(tmp_path / "images.tar")]
    monkeypatch.setattr(sys, "argv", argv)
    runpy.run_path(str(SCRIPT.with_name("shard.py")), run_name="__main__")
    before, after = open_images(cifar), open_images(tmp_path / "images.tar")
    assert after.class_names == before.class_names and after.labels.tolist() == before.labels.tolist()
    assert all(after.stored_bytes(i) == before.stored_bytes(i) for i in range(len(before)))


@pytest.mark.parametrize("script", ["shard.py", "bounds.py"])
def test_no_such_images(script: str, tmp_path: Path):
    """One sentence and status 2, as the commands have it."""
    words = [sys.executable, SCRIPT.with_name(script), "--data", tmp_path / "nowhere"]
    words += ["--output", tmp_path / "images.tar"] if script == "shard.py" else []
    done = subprocess.run([*map(str, words)], capture_output=True, text=True)
    assert done.returncode == 2 and re.fullmatch(r"error: .*nowhere does not exist[^\n]*\n", done.stderr), done.stderr


def test_speed_is_that_of_steps_with_all_losses(tmp_path: Path):
    """Not of the first, beside a compiler, nor of those before the discriminator learns, which are faster."""
    script = runpy.run_path(str(SCRIPT))
    assert script["all_losses_from"](dict(adversarial=0.5, adversarial_from=0.25), 400) == 100
    assert script["all_losses_from"](dict(adversarial=0.0, adversarial_from=0.25), 400) == 0
    assert script["all_losses_from"](dict(adversarial=0.5, adversarial_from=300), 400) == 300
    speeds = [10.0] * 3 + [400.0] * 7 + [100.0] * 5
    lines = [json.dumps({"step": 10 * i, "images_per_second": speed}) for i, speed in enumerate(speeds, 1)]
    log = tmp_path / "log.jsonl"
    log.write_text("\n".join(lines[:10]) + "\n")
    assert script["speed"](tmp_path, 200) == (100, 0.5) and script["speed"](tmp_path, 200, 100) is None
    log.write_text("\n".join(lines) + "\n")
    assert script["speed"](tmp_path, 200, 100) == (150, 2.0)


@pytest.mark.slow
def test_all_stages_in_a_given_time(tmp_path: Path, cifar_table: Path):
    (tmp_path / "recipe").mkdir()
    for stage in ("tokenizer", "extract", "gpt", "decoder"):
        settings = yaml.safe_load((RECIPE / f"{stage}.yaml").read_text())
        if stage != "extract":
            settings["loop"] |= {"batch_size": 4, "compile": False, "trackers": [], "log_every": 1}
        if stage in ("tokenizer", "decoder"):
            settings["classifier_epochs"] = 1
            settings["model"] |= {name: {"width": 32, "depth": 1, "heads": 2} for name in ("encoder", "decoder")}
        if stage == "gpt":
            settings |= {"width": 32, "depth": 1, "heads": 2}
        if stage == "extract":
            settings |= {"workers": 0}
        (tmp_path / "recipe" / f"{stage}.yaml").write_text(yaml.safe_dump(settings))
    output = tmp_path / "made"
    options = ["--recipe", tmp_path / "recipe", "--device", "cpu", "--minutes", "0.2", "--fewest-steps", "3"]
    options += ["--steps", "gpt=3"]  # the others begin with more than fit
    command = [sys.executable, SCRIPT, "--data", cifar_table, "--output", output, *options]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for stage in ("tokenizer", "decoder"):
        assert re.search(rf"{stage}: [\d,]+ images per second, so ", done.stdout)
        steps = yaml.safe_load((RECIPE / f"{stage}.yaml").read_text())["loop"]["steps"]
        assert 8 <= json.loads((output / stage / "log.jsonl").read_text().splitlines()[-1])["step"] < steps
    assert json.loads((output / "gpt" / "log.jsonl").read_text().splitlines()[-1])["step"] == 3
    assert len(DetailFlowPipeline.from_pretrained(output / "shipped", device="cpu")(3)) == 1
    assert "exists already" in subprocess.run(list(map(str, command)), capture_output=True, text=True).stderr
