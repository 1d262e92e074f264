"""The ablation's figures and report; its settings and training are in tests/training/test_ablation.py."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from detailflow.cli.ablate import main
from detailflow.errors import DetailFlowError
from detailflow.evaluation import ablation
from detailflow.evaluation.ablation import STUDENT, by_chance, comparisons, run_ablation
from detailflow.evaluation.compare import compare_reports
from detailflow.evaluation.features import Features
from detailflow.evaluation.report import Figure, Report, Row, Section, load
from detailflow.training.ablation import Ablation, spent

LOOP = {"steps": 1, "batch_size": 2, "learning_rate": 1e-3, "trackers": [], "precision": "fp32"}
VIT = {"width": 16, "depth": 1, "heads": 2}


class Colours:
    """Mean colours as features, and which is the largest as a class."""

    name, fingerprint, preprocessing = "colours.safetensors", "abc", "none"

    def __call__(self, images: Tensor) -> Features:
        means = images.float().mean((1, 2))
        return Features(means, logits=means)


def make(folder: Path, **changes: Any) -> Ablation:
    settings = {
        "data": str(folder),
        "test_split": None,
        "features": "colours.safetensors",
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
    assert first.notes[0] == "Not measured with these settings, so not in the table: one, mine."

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
        assert distances[row.figures["guidance"].value] == row.figures["gFD"].value
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

    data = content["provenance"]["data"]
    assert data["training"] == {"data": str(images), "split": None}
    assert data["test"]["checksum"] == data["reference"]["checksum"] and data["test"]["images"] == 20
    models = content["provenance"]["models"]["mine"]
    assert models["tokenizer"]["name"] == str(output / "two" / "tokenizer") and len(models["gpt"]["fingerprint"]) == 64

    # The same folder elsewhere and under another name; a set whose files have another time holds what it did.
    shutil.copy(output / "report.json", tmp_path / "before.json")
    monkeypatch.chdir(tmp_path)
    output.rename("moved")
    output = Path("moved")
    os.utime(next(images.rglob("*.png")), (1, 1))
    again = run_ablation(config, output, (), "cpu", "the command")
    assert again is not None and again.sections[0] == report.sections[0] and len(measured) == 3

    # Only what was measured with these settings stands in the table; what is damaged was not.
    kept = json.loads((output / "one" / "evaluation.json").read_text())
    (output / "one" / "evaluation.json").write_text(json.dumps(kept | {"generated": [[1.0, {"gFD": {}}]]}))
    (output / "times.json").unlink()
    some = run_ablation(config, output, ["two"], "cpu", "the command")
    assert some is not None and [row.setting["variant"] for row in some.sections[0].rows] == ["two", "mine"]
    assert "Not measured with these settings, so not in the table: one." in some.notes and len(measured) == 3
    assert "not known" in some.sections[1].note and some.sections[1].rows[0].figures == {}
    (output / "times.json").write_text(json.dumps({"one/evaluation": {"cpu": 1e6, "wall": 1e6}}))
    other = run_ablation(make(images, num_samples=16), output, ["one"], "cpu", "the command")
    assert other is not None and len(measured) == 4  # measured anew, not trained anew
    assert [row.setting["variant"] for row in other.sections[0].rows] == ["one"]
    assert "Not measured with these settings, so not in the table: two, mine." in other.notes
    assert 0 < spent(output)["one/evaluation"].cpu < 1e5

    # Another reference; other training images are another run.
    reference = Path(shutil.copytree(images, tmp_path / "reference"))
    one, another = sorted(reference.rglob("*.png"))[:2]
    one.write_bytes(another.read_bytes())
    with pytest.raises(DetailFlowError, match="begun with other images"):
        run_ablation(make(reference, num_samples=16), output, ["one"], "cpu", "the command")
    changed = run_ablation(make(images, num_samples=16, reference=str(reference)), output, ["one"], "cpu", "the command")
    assert changed is not None and len(measured) == 5
    assert changed.provenance["data"]["reference"]["checksum"] != data["reference"]["checksum"]

    text = compare_reports(tmp_path / "before.json", output)
    assert "Warning: the data (reference) differs" in text and "(training)" not in text
    (line,) = (line for line in text.splitlines() if "variant one" in line and "| gFD |" in line)
    assert "only in" not in line


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
    other = {"format": "detailflow-report", "kind": "gpt", "title": "", "notes": [], "sections": [], "provenance": {}}
    (output / "report.json").write_text(json.dumps(other))
    with pytest.raises(DetailFlowError, match="holds the report of another evaluation"):
        run_ablation(make(images), output, (), "cpu")


def test_what_goes_wrong_is_one_sentence(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ablation, "load_extractor", lambda *_: Colours())
    (tmp_path / "file").touch()
    with pytest.raises(DetailFlowError, match="cannot write to .*file: it is no folder"):
        run_ablation(make(images), tmp_path / "file", (), "cpu")
    for damaged in sorted(images.rglob("*.png"))[3:6]:
        damaged.write_bytes(damaged.read_bytes()[:100])
    with pytest.raises(DetailFlowError, match=r"more than 1%.*\.png is damaged and cannot be decoded"):
        run_ablation(make(images), tmp_path / "out", (), "cpu")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": [0.5]}, "seeds must be whole numbers, 0 to 2^64 - 1, not 0.5"),
        ({"seeds": [0, 2**64]}, "seeds must be whole numbers, 0 to 2^64 - 1, not 18446744073709551616"),
        ({"guidance_scales": [1.0, float("inf")]}, "guidance_scale must be 0 or more (1 is no guidance), at most 1e+06, not inf"),
        ({"guidance_scales": [1.0, float("nan")]}, "guidance_scale must be 0 or more (1 is no guidance), at most 1e+06, not nan"),
    ],
)
def test_seeds_and_scales_are_checked_before_training(changes: dict[str, Any], message: str):
    with pytest.raises(DetailFlowError) as caught:
        make(Path("images"), **changes)
    assert str(caught.value) == f"tiny.yaml: {message}"


def test_seeds_and_scales_count_once():
    config = make(Path("images"), seeds=[3, 0, 3, 2**64 - 1], guidance_scales=[2, 1.0, 2.0])
    assert config.seeds == (3, 0, 2**64 - 1) and config.guidance_scales == (2.0, 1.0)


def test_a_report_without_notes_is_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    report = Report("ablation", "A title", [Section("Variants", [Row({"variant": "one"}, {"gFID": Figure(2.0)})])], {})
    monkeypatch.setattr(ablation, "run_ablation", lambda *_: report)
    monkeypatch.setattr(Ablation, "from_dict", lambda *_: None)
    (tmp_path / "tiny.yaml").write_text("data: images")
    assert main(["--config", str(tmp_path / "tiny.yaml"), "--output", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.endswith(f"| one | 2.000 |\n\nwrote {tmp_path / 'out' / 'report.md'}\n")


def seen(*values: tuple[float, float | None, float | None], seeds: int = 0) -> dict[str, tuple[Figure | None, float | None]]:
    """(ours, its spread, the paper's) of variants a, b, …, ours over so many seeds."""
    return {
        name: (Figure(ours, spread, (ours,) * seeds), paper) for name, (ours, spread, paper) in zip("abcd", values, strict=False)
    }


def test_what_is_said_of_the_ordering():
    summary, lines, once = comparisons(seen((2.0, None, 3.9), (1.5, None, 3.6), (1.9, None, 4.1), (1.8, None, 5.0)), "gFD")
    assert summary == (
        "The paper's ordering is seen in 2 of 3 steps at this scale. It is not seen, as figures move the other way, in: d. "
        "Only directions are compared: how far the figures of other samples lie from these is not known."
    )
    assert lines.splitlines() == [
        "- b: gFID 3.9 → 3.6 in the paper, gFD 2.000 → 1.500 here: as in the paper.",
        "- c: gFID 3.6 → 4.1 in the paper, gFD 1.500 → 1.900 here: as in the paper.",
        "- d: gFID 4.1 → 5 in the paper, gFD 1.900 → 1.800 here: the other way than in the paper.",
    ]
    assert "trained once, from one seed" in once
    # With 3 seeds b and d are 6.1 and 17 standard errors away, c 1.2.
    steps = seen((2.0, 0.1, 3.9), (2.5, 0.1, 3.6), (2.4, 0.1, 3.3), (1.0, 0.1, 3.0), seeds=3)
    summary, lines, _ = comparisons(steps, "gFID")
    assert summary == (
        "The paper's ordering is seen in 1 of 3 steps at this scale. It is not seen, as figures move the other way, in: b. "
        "It can't be told, as other samples may differ as much, in: c. "
        "A step is told by a two-sided t test at 95%, of 3 seeds of samples of each variant, their variances taken as equal."
    )
    verdicts = [line.rpartition(": ")[2] for line in lines.splitlines()]
    assert verdicts == ["the other way than in the paper.", "no more than other samples may differ.", "as in the paper."]
    assert comparisons(seen((2.0, None, 3.9), (1.0, None, None)), "gFD") == []


def test_a_step_has_two_neighbours():
    steps = seen((2.0, None, 3.9), (1.5, None, 3.6), (1.9, None, 4.1), (1.8, None, 5.0))
    steps["b"] = None, 3.6  # not measured
    summary, lines, _ = comparisons(steps, "gFD")
    assert summary.startswith("The paper's ordering is seen in 0 of 1 steps") and lines.startswith("- d: gFID 4.1 → 5 in")
    assert len(lines.splitlines()) == 1
    steps["d"] = None, 5.0
    assert comparisons(steps, "gFD") == []


def test_two_seeds_tell_little_and_bootstrap_tells_as_well():
    two = seen((2.0, 0.1, 3.9), (1.6, 0.1, 3.6), (1.1, 0.1, 3.3), seeds=2)
    lines = comparisons(two, "gFD")[1].splitlines()  # 4 standard errors, and 5: beyond 4.3
    assert ["other samples may" in line for line in lines] == [True, False]
    one = seen((2.0, 0.1, 3.9), (1.6, 0.1, 3.6), (1.4, 0.1, 3.3))
    summary, lines, _ = comparisons(one, "gFD")  # 2.8 standard deviations, and 1.4
    assert ["other samples may" in line for line in lines.splitlines()] == [False, True]
    assert "A step is told by a normal test at 95%, with the deviations over other samples that bootstrap finds." in summary


def test_the_quantiles_are_student_s():
    stats = pytest.importorskip("scipy.stats")
    assert pytest.approx([stats.t.ppf(0.975, 2 * seeds - 2) for seeds in range(2, 12)], abs=5e-4) == STUDENT
    a, b = Figure(1.0, 0.3, (0.0,) * 4), Figure(2.0, 0.4, (0.0,) * 4)
    chance = by_chance(a, b)
    assert chance is not None
    test = stats.ttest_ind_from_stats(1.0, 0.3, 4, 1.0 + chance, 0.4, 4)  # of equal variances
    assert test.pvalue == pytest.approx(0.05, abs=1e-4)
    many = by_chance(Figure(1.0, 0.3, (0.0,) * 50), Figure(2.0, 0.4, (0.0,) * 50))
    assert many == pytest.approx(0.5 / 50**0.5 * 2.086)
