"""What a run leaves for its reader: its log, its report, and how well it used the machine."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detailflow.cli.main import main
from detailflow.training import loop
from detailflow.training.stage_report import command_line, draw_curves, write_report
from detailflow.training.tracking import read_history


def test_a_log_that_was_cut_short(tmp_path: Path):
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 2.0}\n[1]\n{"loss": 1.0}\n{"step": 2, "lo')
    assert read_history(tmp_path) == [{"step": 1, "loss": 2.0}]
    damaged = [
        b'{"step": 1, "loss": 2.0}',
        b'{"step": 2, "\xcb": 1.0',
        b"[" * 100_000,
        b'{"step": 3, "loss": "low"}',
        b"",
    ]
    (tmp_path / "log.jsonl").write_bytes(b"\n".join(damaged))
    assert read_history(tmp_path) == [{"step": 1, "loss": 2.0}, {"step": 3}]
    assert read_history(tmp_path / "nowhere") == []


def test_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    history = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0, "val_loss": 3.0, "psnr": float("nan")}]
    monkeypatch.setattr("sys.argv", ["/usr/bin/detailflow", "train", "--data", "my photos"])
    write_report(tmp_path, "gpt", ["it is a test"], history, {"samples": Image.new("RGB", (4, 4))})
    page = (tmp_path / "report.md").read_text()
    for line in ("# Training report: AR model", "- it is a test", "| loss | 1 | 1 | 2 |", "![samples](samples.png)"):
        assert line in page.splitlines()
    assert "detailflow train --data 'my photos'" in page
    assert {path.name for path in tmp_path.iterdir()} == {"report.md", "curves.png", "samples.png"}
    assert Image.open(tmp_path / "curves.png").width > 300
    for program in ("mine.py", "mine/__main__.py"):
        monkeypatch.setattr("sys.argv", [program])
        assert command_line() is None
    monkeypatch.setattr("sys.argv", ["/lib/detailflow/__main__.py", "train"])
    assert command_line() == "detailflow train"


def test_the_report_says_which_images_it_shows(tmp_path: Path):
    for held_out, words in ((False, "Training images"), (True, "Held-out images")):
        write_report(tmp_path, "tokenizer", [], [], {"reconstructions": Image.new("RGB", (4, 4))}, held_out=held_out)
        assert f"{words} spread over the data, and their recon" in (tmp_path / "report.md").read_text()


def test_the_report_of_a_damaged_log(tmp_path: Path):
    """Steps without figures, numbers that cannot be drawn, names that cannot be written."""
    for record, kept in (
        ({"step": 1}, {"step": 1}),
        ({"step": 1, "loss": 10**400, "psnr": 1e308}, {"step": 1}),
        ({"step": 1, "\ud800": 1.0, "$\\frac": 2.0}, {"step": 1, "$\\frac": 2.0}),
        ({"step": 1, "loss": math.inf}, {"step": 1, "loss": math.inf}),
    ):
        (tmp_path / "log.jsonl").write_text(f"{json.dumps(record)}\n{json.dumps({'step': 10**400, 'loss': 1.0})}\n")
        assert read_history(tmp_path) == [kept]
        write_report(tmp_path, "gpt", [], read_history(tmp_path), {})


def test_a_curve_of_one_point_is_seen(tmp_path: Path):
    draw_curves([{"step": 1, "loss": 2.0}], tmp_path / "curves.png")
    red, _, blue = np.asarray(Image.open(tmp_path / "curves.png").convert("RGB")).astype(int).transpose(2, 0, 1)
    assert (blue > red + 100).sum() > 10


@pytest.mark.parametrize("stage", ["tokenizer", "gpt"])
def test_utilization(
    stage: str, stage_commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Counted steps against what this machine's products reach."""
    network = {"width": 32, "depth": 1, "heads": 2}
    sizes = dict(image_size=32, patch_size=8, num_tokens=16, group_size=4, codebook_size=64, codebook_dim=4)
    steps = {"steps": 6, "batch_size": 16, "learning_rate": 1e-3, "precision": "fp32", "trackers": [], "log_every": 2}
    tokenizer = {"model": {**sizes, "encoder": network, "decoder": network}, "adversarial_from": 0.5, "loop": steps}
    command = stage_commands(tokenizer, {**network, "loop": steps})[stage]
    monkeypatch.setattr(loop, "UTILIZATION_SECONDS", 0.0)
    assert main([*command, "--output", str(tmp_path / "run")]) == 0
    values = [record["flop_utilization"] for record in read_history(tmp_path / "run")]
    most = (
        2.25 if stage == "tokenizer" else 1
    )  # Winograd's convolutions take so many times fewer operations than counted
    assert len(values) == 3 and all(0 < value < most for value in values)
