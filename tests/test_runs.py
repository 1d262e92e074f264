"""Training runs that are not finished, and their checkpoints, used as models."""

import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from detailflow import DetailFlowGPT, DetailFlowPipeline, DetailFlowTokenizer, hub
from detailflow.cli.main import main
from detailflow.errors import DetailFlowError
from detailflow.published import KINDS
from detailflow.runs import read_checkpoint

NETWORK = {"width": 16, "depth": 1, "heads": 2}
SIZES = dict(image_size=32, patch_size=16, num_tokens=8, group_size=4, codebook_size=32, codebook_dim=4)
LOOP = {
    "steps": 4,
    "batch_size": 2,
    "learning_rate": 0.01,
    "trackers": [],
    "checkpoint_minutes": 0,
    "milestone_every": 2,
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images/, and two finished runs in it: tokenizer/ and gpt/."""
    folder = tmp_path_factory.mktemp("runs")
    for name in ("cat", "dog"):
        for i in range(3):
            path = folder / "images" / name / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.effect_noise((32, 32), 60).save(path)
    first = {
        "data": str(folder / "images"),
        "model": {**SIZES, "encoder": NETWORK, "decoder": NETWORK},
        "adversarial": 0,
    }
    tokens, tokenizer = str(folder / "tokens"), str(folder / "tokenizer")
    last = {"tokens": tokens, "tokenizer": tokenizer, "width": 16, "depth": 1, "heads": 2, "ema": 0.5}
    for stage, settings in (("tokenizer", first), ("gpt", last)):
        (folder / f"{stage}.yaml").write_text(yaml.safe_dump({**settings, "loop": LOOP}))
    extraction = [
        "extract",
        "--data",
        str(folder / "images"),
        "--tokenizer",
        tokenizer,
        "--output",
        tokens,
        "--crops",
        "two",
    ]
    for command in (train(folder, "tokenizer"), extraction, train(folder, "gpt")):
        assert main([*command, "--device", "cpu"]) == 0
    return folder


def train(folder: Path, stage: str) -> list[str]:
    return ["train", stage, "--config", str(folder / f"{stage}.yaml"), "--output", str(folder / stage)]


@pytest.fixture
def stopped(whole: Path, tmp_path: Path) -> Path:
    """The same after it was stopped at the last checkpoint of each run, which the models are not written from yet."""
    folder = Path(shutil.copytree(whole, tmp_path / "runs"))
    for stage in KINDS:
        for name in ("config.json", "model.safetensors"):
            (folder / stage / name).unlink()
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_its_newest_checkpoint_is_the_model(
    kind: hub.Kind, whole: Path, stopped: Path, caplog: pytest.LogCaptureFixture
):
    """What the run would write if it ended there; of an AR model the averaged weights, or on request the others."""
    config, tensors = hub.load(whole / kind, kind)
    for place in (stopped / kind, stopped, str(stopped / kind / "resume" / "step-00000004.pt")):
        found_config, found = hub.load(place, kind)
        assert found_config == config == hub.load_config(place, kind)
        assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert f"{stopped / kind}: this training run is not finished: its model is as it was at step 4" in caplog.text
    if kind == "gpt":
        last = hub.load(stopped, kind, "model", dtype=torch.bfloat16)[1]
        assert any(not torch.equal(last[name], tensors[name].bfloat16()) for name in tensors)
        DetailFlowGPT.from_pretrained(stopped)
    else:
        DetailFlowTokenizer.from_pretrained(stopped)


def test_one_that_is_damaged(stopped: Path, caplog: pytest.LogCaptureFixture):
    newest = stopped / "tokenizer" / "resume" / "step-00000004.pt"
    newest.write_bytes(newest.read_bytes()[:1000])
    hub.load(stopped / "tokenizer", "tokenizer")
    assert "as it was at step 3" in caplog.text
    with pytest.raises(DetailFlowError, match="could not read .*step-00000004.pt: it is damaged"):
        hub.load(newest, "tokenizer")


def test_every_command(
    stopped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.chdir(stopped)
    milestone, cpu = "tokenizer/milestones/step-00000002.pt", ["--device", "cpu"]
    assert main(["reconstruct", "images/cat/0.png", "--model", "tokenizer", "--output", "a", *cpu]) == 0
    assert main(["reconstruct", "images/cat/0.png", "--model", milestone, "--output", "b", *cpu]) == 0
    assert f"{stopped / milestone}: the model of this checkpoint is as it was at step 2" in caplog.text
    strips = [next(Path(name).glob("*-strip.png")).read_bytes() for name in "ab"]
    assert strips[0] != strips[1]
    assert main(["generate", "cat", "--model", ".", "--output", "c", *cpu]) == 0
    pair = ["--model", "gpt/milestones/step-00000002.pt", "--tokenizer", milestone]
    assert main(["generate", "cat", *pair, "--output", "d", *cpu]) == 0
    assert main(["classes", "--model", "gpt"]) == 0
    assert main(["convert", ".", "--output", "e"]) == 0
    assert main(["convert", milestone, "--output", "f"]) == 0
    DetailFlowPipeline.from_pretrained("e")
    written, read = (hub.load(place, "tokenizer")[1]["quantizer.codebook"] for place in ("f", milestone))
    assert torch.equal(written, read)
    for start in ("tokenizer", milestone):
        assert (
            main(
                [*train(stopped, "tokenizer")[:-1], f"g-{Path(start).stem}", "--init", start, "--loop.steps", "1", *cpu]
            )
            == 0
        )
    assert (
        main([*train(stopped, "gpt")[:-1], "h", "--init", "gpt", "--tokenizer", "tokenizer", "--loop.steps", "1", *cpu])
        == 0
    )


def test_what_cannot_be_used(stopped: Path, capsys: pytest.CaptureFixture[str]):
    def complaint(*argv: str) -> str:
        capsys.readouterr()
        assert main(list(argv)) == 2
        return capsys.readouterr().err

    image, tokenizer, gpt = str(stopped / "images/cat/0.png"), stopped / "tokenizer", stopped / "gpt"
    out = ("--output", str(stopped / "out"))
    assert "gpt holds an AR model (gpt), not a tokenizer" in complaint(
        "reconstruct", image, "--model", str(gpt), *out
    ).replace("/resume/step-00000004.pt", "")
    assert "holds a training run, whose model this would replace: give another folder" in complaint(
        "convert", str(tokenizer), "--output", str(tokenizer)
    )
    old = torch.load(tokenizer / "resume" / "step-00000004.pt", weights_only=True)
    torch.save({"step": 4, "state": old["state"]}, tokenizer / "resume" / "step-00000004.pt")
    assert "is of an earlier version" in complaint("reconstruct", image, "--model", str(tokenizer), *out)
    for path in (tokenizer / "resume").iterdir():
        path.unlink()
    assert "is a training run without a checkpoint" in complaint("reconstruct", image, "--model", str(tokenizer), *out)


class Payload:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("harmed",)


def test_nothing_in_a_checkpoint_is_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"step": 1, "state": {"networks": Payload()}, "kind": "tokenizer", "config": {}}, "step-00000001.pt")
    with pytest.raises(DetailFlowError, match="refused to load step-00000001.pt: it asks for .*mkdir"):
        read_checkpoint(Path("step-00000001.pt"))
    for state in (
        {},
        {"networks": 3},
        {"networks": {"model.x": 3}},
        {"networks": {"model.x": torch.ones(1, dtype=torch.int64)}},
    ):
        torch.save({"step": 1, "state": state, "kind": "tokenizer", "config": {}}, "step-00000001.pt")
        with pytest.raises(DetailFlowError):
            DetailFlowTokenizer.from_pretrained("step-00000001.pt")
    assert not Path("harmed").exists()
