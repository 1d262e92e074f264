"""The published numbers are those of the paper, as tests/data/published.md has them."""

import re
from pathlib import Path

import pytest

from detailflow.evaluation.quoted import published, quotes
from detailflow.evaluation.report import Figure, Row


def quoted(model: str | None, ours: dict[str, float], guidance: float | None = None) -> list[Row]:
    return quotes(model, {name: Figure(value) for name, value in ours.items()}, guidance)


PAGE = Path(__file__).parents[1] / "data" / "published.md"


def test_every_number_of_the_table_and_no_other():
    table = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("|")][2:]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table]
    models = published()["models"]
    assert len(models) == len(rows) + 1  # one of them stands for two settings
    for name, rfid, psnr, gfid, score, precision, recall, tokens, steps, seconds in rows:
        found = [model for model in models if model["name"].startswith(name)]
        numbers = {"rFID": rfid, "PSNR": psnr, "gFID": gfid, "IS": score, "precision": precision, "recall": recall}
        for measure, cell in numbers.items():
            expected = [float(text) for text in re.findall(r"\d+\.\d+", cell)]
            if len(found) == 1:
                assert list(found[0].get(measure, {}).values()) == expected, (name, measure)
        for key, cell in (("tokens", tokens), ("steps", steps), ("seconds", seconds)):
            expected = [float(text) for text in re.findall(r"[\d.]+", cell.replace(",", ""))]
            assert [model[key] for model in found if key in model] == expected, (name, key)
    flextok = [model for model in models if model["name"].startswith("FlexTok")]
    assert [list(model["gFID"].values()) for model in flextok] == [[1.9], [2.5]]
    assert [model["rFID"]["paper"] for model in flextok] == [1.45, 1.45]


def test_the_sweeps():
    text = PAGE.read_text(encoding="utf-8")
    guidance = re.findall(r"(\d\.\d) → (\d\.\d\d)", text)
    assert [(scale, f"{number:.2f}") for scale, number in published()["guidance"]["gFID"].items()] == guidance
    groups = re.findall(r"g=(\d+) (\d\.\d\d) \((\d+) steps\)", text.split(" Group size")[1])
    rows = published()["group_size"]["rows"]
    assert [(str(row["group_size"]), f"{row['gFID']:.2f}", str(row["steps"])) for row in rows] == groups


@pytest.mark.parametrize("model", ["detailflow-16", "ByteFlow-AI/DetailFlow-16", "ByteFlow-AI/DetailFlow-16-GPT-L"])
def test_a_zoo_model_has_published_figures_under_any_of_its_names(model: str):
    found = quoted(model, {"rFID": 1.3, "PSNR": 19.0, "SSIM": 0.5})
    assert [(row.setting["measure"], *(x.value for x in row.figures.values())) for row in found] == [
        ("rFID", 1.3, 1.22),
        ("rFID", 1.3, 1.13),
        ("PSNR", 19.0, 19.39),
    ]
    assert "ImageNet 256×256" in found[0].setting["conditions"]


def test_other_models_and_other_settings_have_none():
    assert quoted(None, {"rFID": 1.0}) == quoted("runs/mine", {"rFID": 1.0}) == []
    assert quoted("detailflow-16", {"gFID": 3.0}, guidance=2.0) == []
    assert quoted("detailflow-16", {"gFD": 3.0}, guidance=1.45) == []
    assert [row.figures["published"].value for row in quoted("detailflow-16", {"gFID": 3.0}, guidance=1.45)] == [
        2.96,
        2.96,
    ]


def test_the_guidance_that_the_paper_swept():
    (found,) = quoted("detailflow-32", {"gFID": 3.0, "IS": 200.0}, guidance=1.6)
    assert (found.setting["measure"], found.figures["published"].value) == ("gFID", 2.81)
    assert "guidance 1.6" in found.setting["conditions"]
    assert len(quoted("detailflow-32", {"gFID": 3.0, "IS": 200.0}, guidance=1.5)) == 3
