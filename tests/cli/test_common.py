"""What the commands share: `~` is the home folder in every option and setting that may be a path."""

import argparse
from pathlib import Path

import pytest
import yaml
from PIL import Image

from detailflow.cli import bench, classes, convert, evaluate, generate, reconstruct
from detailflow.cli.main import main

PARSERS = (
    *(module.parser for module in (bench, classes, convert, generate, reconstruct)),
    *(getattr(evaluate, f"{name}_parser") for name in ("tokenizer", "gpt", "samples", "statistics", "compare")),
)
PATHS = {
    "DIR",
    "FILE",
    "MODEL",
    "IMAGE",
    "SOURCE",
    "SAMPLES",
    "REFERENCE",
    "DATA",
    "SET",
    "A",
    "B",
}  # as their values are called


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("make", PARSERS, ids=lambda make: make().prog)
def test_every_option_that_names_a_path(make, home: Path):
    parser: argparse.ArgumentParser = make()
    actions = [a for a in parser._actions if a.dest == "model" or str(a.metavar).removesuffix(".npz") in PATHS]
    read = {a.dest: Path(a.type("~/x")) for a in actions if a.type}
    assert read.keys() == {a.dest for a in actions}
    assert set(read.values()) == {home / "x"}


def test_settings(home: Path, capsys: pytest.CaptureFixture[str]):
    """In the file, beside it, after `=`, and in the name of the file."""
    for k in range(2):
        path = home / "images" / f"class{k}" / "0.png"
        path.parent.mkdir(parents=True)
        Image.new("RGB", (32, 32), (90 * k, 100, 200)).save(path)
    network = {"width": 16, "depth": 1, "heads": 2}
    sizes = dict(image_size=32, patch_size=16, num_tokens=8, group_size=4, codebook_size=32, codebook_dim=4)
    loop = {"steps": 1, "batch_size": 2, "learning_rate": 0.001, "trackers": []}
    settings = {
        "data": "~/images",
        "model": {**sizes, "encoder": network, "decoder": network},
        "loop": loop,
        "adversarial": 0,
    }
    (home / "a.yaml").write_text(yaml.safe_dump(settings))
    assert main(["train", "tokenizer", "--config=~/a.yaml", "--output=~/first", "--device", "cpu"]) == 0
    again = [
        "train",
        "tokenizer",
        "--config",
        "~/a.yaml",
        "--output",
        "~/second",
        "--init",
        "~/first",
        "--device",
        "cpu",
    ]
    assert main(again) == 0
    extraction = ["extract", "--data=~/images", "--tokenizer=~/second", "--crops", "two", "--output", "~/tokens"]
    assert main([*extraction, "--device", "cpu"]) == 0
    sizes_of_gpt = ["--width", "16", "--depth", "1", "--heads", "2", "--loop.steps", "1", "--loop.batch_size", "2"]
    more = ["--loop.learning_rate", "0.001", "--loop.trackers", "[]", "--device", "cpu"]
    assert (
        main(
            ["train", "gpt", "--tokens", "~/tokens", "--tokenizer", "~/second", "--output=~/gpt", *sizes_of_gpt, *more]
        )
        == 0
    )
    assert (home / "gpt" / "model.safetensors").exists() and not Path("~").exists()
