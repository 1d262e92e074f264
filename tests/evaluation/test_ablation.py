"""The ablation's figures and report; its settings and training are in tests/training/test_ablation.py."""

import json
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from detailflow.errors import DetailFlowError
from detailflow.evaluation import ablation
from detailflow.evaluation.ablation import comparisons, run_ablation
from detailflow.evaluation.features import Features
from detailflow.evaluation.report import Figure, load
from detailflow.training.ablation import Ablation

LOOP = {"steps": 1, "batch_size": 2, "learning_rate": 1e-3, "trackers": [], "precision": "fp32"}
VIT = {"width": 16, "depth": 1, "heads": 2}


class Colours:
    """Mean colours as features, and which is the largest as a class."""

    name, fingerprint, preprocessing = "colours.pt2", "abc", "none"

    def __call__(self, images: Tensor) -> Features:
        means = images.float().mean((1, 2))
        return Features(means, logits=means)


def make(folder: Path, **changes: Any) -> Ablation:
    settings = {
        "data": str(folder),
        "test_split": None,
        "features": "colours.pt2",
        "num_samples": 12,
        "guidance_scales": [1.0, 2.0],
        "seeds": [0, 1],
        "tokenizer": {
            "model": {
                "image_size": 16,
                "patch_size": 8,
                "num_tokens": 4,
                "group_size": 1,
                "codebook_size": 16,
                "codebook_dim": 4,
                "encoder": VIT,
                "decoder": VIT,
                "causal_encoder": False,
            },
            "adversarial": 0.0,
            "correction_share": 0.0,
            "loop": LOOP,
        },
        "extract": {"crops": "two"},
        "gpt": {"width": 16, "depth": 1, "heads": 2, "loop": LOOP},
        "variants": [
            {"name": "one", "paper": "baseline"},
            {"name": "two", "paper": "parallel, groups of 4", "tokenizer": {"model": {"group_size": 2, "causal_tokens": 0}}},
            {"name": "mine", "gpt": {"planted_share": 0.0}},
        ],
    }
    return Ablation.from_dict(settings | changes, "tiny.yaml")


@pytest.fixture
def images(cifar: Path, tmp_path: Path) -> Path:
    """20 of the images."""
    for k, path in enumerate(sorted(cifar.rglob("*.png"))[::10]):
        copy = tmp_path / "images" / ("even", "odd")[k % 2] / path.name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    return tmp_path / "images"


def test_a_table_that_grows(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ablation, "load_extractor", lambda *_: Colours())
    measured = []
    real = ablation.evaluate_gpt
    monkeypatch.setattr(ablation, "evaluate_gpt", lambda *a, **k: measured.append(a) or real(*a, **k))
    output, config = tmp_path / "out", make(images)
    first = run_ablation(config, output, ["two"], "cpu", "the command")
    assert first is not None and [row.setting["variant"] for row in first.sections[0].rows] == ["two"]
    assert not (output / "one").exists() and len(measured) == 1

    report = run_ablation(config, output, (), "cpu", "the command")
    assert len(measured) == 3  # "two" is there
    content = load(output)
    assert content["kind"] == "ablation" and content["provenance"]["command"] == "the command"
    assert report is not None and content["sections"][0]["rows"][1]["figures"]["gFD"]["value"] > 0
    rows = report.sections[0].rows
    assert [row.setting["#"] for row in rows] == [1, 2, 3]
    assert [row.setting["steps"] for row in rows] == [4, 2, 2]
    assert [row.setting["gFID in the paper"] for row in rows] == [3.97, 4.11, None]
    for row, name in zip(rows, ("one", "two", "mine"), strict=True):
        kept = json.loads((output / name / "evaluation.json").read_text())
        distances = {scale: figures["gFD"]["value"] for scale, figures in kept["generated"]}
        assert distances.keys() == {1.0, 2.0} and row.figures["gFD"].value == min(distances.values())
        assert distances[row.setting["guidance"]] == row.figures["gFD"].value
        assert row.figures["PSNR"].value == kept["rebuilt"]["PSNR"]["value"] and len(row.figures["gFD"].values) == 2
        assert (output / name / "samples.png").exists() and not (output / name / "samples").exists()
    assert rows[1].figures["PSNR"] == rows[2].figures["PSNR"]  # "mine" has the tokenizer of "two"
    times = report.sections[1].rows
    assert (
        times[2].figures["tokenizer, CPU min"] == times[1].figures["tokenizer, CPU min"]
        and "reference" in report.sections[1].note
    )
    text = (output / "report.md").read_text()
    assert (
        "The paper's ordering is" in report.notes[0]
        and report.notes[0] in text
        and "![The variants: 1 one, 2 two, 3 mine]" in text
    )
    assert (output / "ablation.png").stat().st_size > 1000

    again = run_ablation(config, output, (), "cpu", "the command")
    assert again is not None and again.sections[0] == report.sections[0] and len(measured) == 3
    other = run_ablation(make(images, num_samples=16), output, ["one"], "cpu", "the command")
    assert other is not None and len(measured) == 4  # measured anew, not trained anew


def test_what_is_refused(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ablation, "load_extractor", lambda *_: Colours())
    output = tmp_path / "out"
    for config, names, message in (
        (make(images), ["three"], "there is no variant 'three': the variants are one, two, mine"),
        (make(images, test_data=str(tmp_path / "nowhere")), [], "nowhere"),
        (make(images, num_reconstructions=21), [], "holds 20 images, of which 21 can't be taken"),
    ):
        with pytest.raises(DetailFlowError, match=message):
            run_ablation(config, output, names, "cpu")
        assert not output.exists()
    output.mkdir()
    other = {"format": "detailflow-report", "kind": "gpt", "sections": [], "provenance": {}}
    (output / "report.json").write_text(json.dumps(other))
    with pytest.raises(DetailFlowError, match="holds the report of another evaluation"):
        run_ablation(make(images), output, (), "cpu")


def seen(*values: tuple[float, float | None, float | None]) -> dict[str, tuple[Figure, float | None]]:
    """(ours, its spread, the paper's) of variants a, b, …"""
    return {name: (Figure(ours, spread), paper) for name, (ours, spread, paper) in zip("abcd", values, strict=False)}


def test_what_is_said_of_the_ordering():
    summary, lines, once = comparisons(seen((2.0, None, 3.9), (1.5, None, 3.6), (1.9, None, 4.1)), "gFD")
    assert summary == "The paper's ordering is seen in 2 of 2 steps at this scale."
    assert lines.splitlines() == [
        "- b: gFID 3.9 → 3.6 in the paper, gFD 2.000 → 1.500 here: as in the paper.",
        "- c: gFID 3.6 → 4.1 in the paper, gFD 1.500 → 1.900 here: as in the paper.",
    ]
    assert "trained once, from one seed" in once
    summary, lines, _ = comparisons(seen((2.0, 0.1, 3.9), (2.5, 0.1, 3.6), (2.4, 0.1, 3.3), (1.0, 0.1, 3.0)), "gFID")
    assert summary == (
        "The paper's ordering is seen in 1 of 3 steps at this scale. It is not seen, as figures move the other way, in: b. "
        "It is not seen, as figures hardly move, in: c."
    )
    verdicts = [line.rpartition(": ")[2] for line in lines.splitlines()]
    assert verdicts == [
        "the other way than in the paper.",
        "no more than samples of other seeds differ.",
        "as in the paper.",
    ]
    assert comparisons(seen((2.0, None, 3.9), (1.0, None, None)), "gFD") == []
