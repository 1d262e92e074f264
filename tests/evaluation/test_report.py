"""Reports: what is written, and how two compare."""

import json
import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from detailflow.errors import DetailFlowError
from detailflow.evaluation.compare import compare_reports
from detailflow.evaluation.report import (
    Figure,
    Picture,
    Plot,
    Report,
    Row,
    Section,
    check_folder,
    draw,
    load,
    section_table,
    versions,
)

COMMAND = "detailflow evaluate tokenizer --data x"


def report(
    psnr: float = 20.0,
    spread: float | None = 0.1,
    checksum: str = "1a",
    data: str = "x",
    kind: str = "tokenizer",
    **more: Figure,
) -> Report:
    rows = [
        Row({"tokens": 4, "side": 32}, {"PSNR": Figure(psnr, spread), "rFD": Figure(1.5)}),
        Row({"tokens": 8, "side": 32}, {"PSNR": Figure(math.inf), **more}),
    ]
    return Report(
        kind,
        "A title",
        [Section("Quality", rows, "What it means.")],
        {
            "command": COMMAND,
            "models": {"tokenizer": {"name": "m", "fingerprint": "f"}},
            "data": {"images": {"data": data, "checksum": checksum, "images": 2}},
            "features": {"network": "inception"},
        },
        [Plot("curve", "A caption", "tokens", [Row({"tokens": n}, {"PSNR": Figure(n / 4, 0.1)}) for n in (4, 8)])],
        [Picture("faces", "Faces", Image.new("RGB", (4, 3)))],
        ["Something was left out."],
    )


def test_control_characters_of_a_name(tmp_path: Path):
    """They are shown as in messages, and the JSON is still JSON."""
    made = report(data="set\x85one\x1b[2J")
    replace(made, provenance={**made.provenance, "more\x85": {"a\x9b": 1}}).write(tmp_path)
    assert load(tmp_path)["provenance"]["more\\x85"] == {"a\\x9b": 1}
    assert load(tmp_path)["provenance"]["data"]["images"]["data"] == "set\\x85one\\x1b[2J"
    assert "set\\x85one\\x1b[2J" in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_what_is_written(tmp_path: Path):
    report().write(tmp_path / "a" / "b")
    assert sorted(p.name for p in (tmp_path / "a" / "b").iterdir()) == [
        "curve.png",
        "faces.png",
        "report.json",
        "report.md",
    ]

    def refuse(text: str) -> None:
        raise AssertionError(f"{text} is not JSON")

    content = json.loads((tmp_path / "a" / "b" / "report.json").read_text(), parse_constant=refuse)
    assert content == load(tmp_path / "a" / "b") == load(tmp_path / "a" / "b" / "report.json")
    first, second = content["sections"][0]["rows"]
    assert first == {
        "setting": {"tokens": 4, "side": 32},
        "figures": {
            "PSNR": {"value": 20.0, "spread": 0.1, "values": []},
            "rFD": {"value": 1.5, "spread": None, "values": []},
        },
    }
    assert float(second["figures"]["PSNR"]["value"]) == math.inf
    text = (tmp_path / "a" / "b" / "report.md").read_text()
    for line in (
        "# A title",
        "Something was left out.",
        "| tokens | PSNR, dB | rFD |",
        "| 4 | 20.000 ± 0.100 | 1.500 |",
        "| 8 | inf | – |",
        "In all rows: side 32.",
        "What it means.",
        "![A caption](curve.png)",
        "![Faces](faces.png)",
        f"| command | {COMMAND} |",
        "| models.tokenizer.fingerprint | f |",
    ):
        assert line in text.splitlines(), line
    with Image.open(tmp_path / "a" / "b" / "curve.png") as plot:
        assert len(plot.convert("RGB").getcolors(1 << 16) or ()) > 10  # something is drawn
    with Image.open(tmp_path / "a" / "b" / "faces.png") as picture:
        assert picture.size == (4, 3)


def test_panels_stand_in_rows_of_three(tmp_path: Path):
    sizes = []
    for count in (1, 3, 4):
        figures = {f"measure {i}": Figure(i, 0.1) for i in range(count)}
        draw(Plot("p", "", "tokens", [Row({"tokens": n}, figures) for n in (1, 2)]), tmp_path / "p.png")
        with Image.open(tmp_path / "p.png") as picture:
            sizes.append(picture.size)
    (width, height), three, four = sizes
    expected = (3 * width, height), (2 * width, 2 * height)
    assert [*three, *four] == pytest.approx(
        [side for size in expected for side in size], rel=0.01
    )  # releases round otherwise


def test_one_row_and_measures_of_some_rows(tmp_path: Path):
    """A measure of one row among several has no curve; that of the only row has its point."""
    shared, more = {"PSNR": Figure(20.0, 0.1)}, {"PSNR": Figure(21.0, 0.1), "blockiness": Figure(1.1)}
    sizes = []
    for figures in ([shared], [more], [shared, more], [more, more], [more, shared, more]):
        rows = [Row({"tokens": n}, found) for n, found in enumerate(figures, 1)]
        draw(Plot("p", "", "tokens", rows), tmp_path / "p.png")
        with Image.open(tmp_path / "p.png") as picture:
            sizes.append(picture.size[0])
    assert [round(size / sizes[0]) for size in sizes] == [1, 2, 1, 2, 2]  # panels side by side


def test_one_row_shows_all_its_settings():
    assert section_table(Section("", [Row({"codes": 8}, {"usage": Figure(0.5)})]))[0] == "| codes | usage |"


def test_a_report_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    report(20.0).write(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(DetailFlowError, match="cannot write the report to .*: No space left on device"):
        report(30.0).write(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_folder_belongs_to_one_evaluation(tmp_path: Path):
    models = {"tokenizer": {"name": "m", "fingerprint": "f"}}
    check_folder(tmp_path, COMMAND, models)
    report().write(tmp_path)
    check_folder(tmp_path, COMMAND, models)
    with pytest.raises(DetailFlowError, match="has the report of another evaluation .*--data x"):
        check_folder(tmp_path, f"{COMMAND} --seed 1", models)
    with pytest.raises(DetailFlowError, match="another evaluation"):
        check_folder(tmp_path, COMMAND, {"tokenizer": {"name": "m", "fingerprint": "g"}})
    (tmp_path / "report.json").write_text('{"mine": 1}')
    with pytest.raises(DetailFlowError, match="has a report.json that is not a report of ours"):
        check_folder(tmp_path, COMMAND, models)


@pytest.mark.parametrize("name", ["report.md", "samples.png", "reconstructions.png"])
def test_files_of_somebody_else_are_not_replaced(name: str, tmp_path: Path):
    (tmp_path / name).write_text("mine")
    with pytest.raises(DetailFlowError, match=f"{name} is not of a report of ours: move it"):
        check_folder(tmp_path, COMMAND, {})


@pytest.mark.parametrize("placed", range(4))
def test_an_evaluation_that_is_stopped_while_it_writes_can_be_repeated(
    placed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    put, left = os.replace, iter(range(placed))

    def replace(*paths: Path) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt
        put(*paths)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", replace)
        report().write(tmp_path)
    assert len(list(tmp_path.iterdir())) == placed and not (tmp_path / "report.json").exists()
    check_folder(tmp_path, COMMAND, {})
    report().write(tmp_path)


def test_a_report_whose_json_was_removed_makes_room(tmp_path: Path):
    """As the message about another evaluation says; that report's other files are no obstacle."""
    report().write(tmp_path)
    (tmp_path / "samples.png").write_text("of that report")
    with pytest.raises(DetailFlowError, match=r"choose another folder, or remove report\.json"):
        check_folder(tmp_path, f"{COMMAND} --seed 1", {})
    (tmp_path / "report.json").unlink()
    check_folder(tmp_path, f"{COMMAND} --seed 1", {})
    report(30.0).write(tmp_path)
    assert load(tmp_path)["sections"][0]["rows"][0]["figures"]["PSNR"]["value"] == 30.0


def test_versions_are_those_of_this_package_and_its_libraries():
    import numpy
    import torch

    found = versions()
    assert found["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert found["numpy"] == numpy.__version__
    assert {"detailflow", "python", "pillow"} <= set(found)


# --- comparing ---


def compared(tmp_path: Path, a: Report, b: Report) -> str:
    for name, one in (("a", a), ("b", b)):
        replace(one, plots=()).write(tmp_path / name)
    return compare_reports(tmp_path / "a", tmp_path / "b")


def line(text: str, start: str) -> str:
    (found,) = (line for line in text.splitlines() if line.startswith(start))
    return found


def test_a_report_against_itself(tmp_path: Path):
    text = compared(tmp_path, report(), report())
    assert "Warning" not in text
    assert line(text, "| Quality | tokens 4 | PSNR, dB |").endswith("| 20 ± 0.1 | 20 ± 0.1 | 0 | equal |")
    assert line(text, "| Quality | tokens 8 |").endswith("| inf | inf | 0 | equal |")
    assert line(text, "command, ")
    assert "\nQuality, in all rows: side 32.\n" in text and "\nA and B say: Something was left out.\n" in text


@pytest.mark.parametrize(
    ("psnr", "spread", "verdict"),
    [
        (20.2, 0.1, "within the spread (1.4 deviations)"),
        (20.4, 0.1, "beyond the spread (2.8 deviations)"),
        (19.6, 0.1, "beyond the spread (2.8 deviations)"),
        (20.15, None, "within the spread (1.5 deviations)"),
    ],
)
def test_the_spread_explains_a_difference_or_not(psnr: float, spread: float | None, verdict: str, tmp_path: Path):
    text = compared(tmp_path, report(), report(psnr, spread))
    cells = line(text, "| Quality | tokens 4 | PSNR, dB |").split(" | ")
    assert float(cells[-2]) == pytest.approx(psnr - 20)
    assert cells[-1] == f"{verdict} |"


def test_a_difference_without_spread(tmp_path: Path):
    text = compared(tmp_path, report(spread=None), report(21.0, None))
    assert line(text, "| Quality | tokens 4 | PSNR, dB |").endswith("| +1 | no spread is known |")


def test_a_difference_of_rounding(tmp_path: Path):
    text = compared(tmp_path, report(), report(20.000001))
    assert line(text, "| Quality | tokens 4 | PSNR, dB |").endswith("| +1e-06 | equal but for rounding |")


def test_infinity_is_not_rounding(tmp_path: Path):
    for first, second in ((math.inf, 20.0), (20.0, math.inf)):
        text = compared(tmp_path, report(first), report(second))
        assert "beyond the spread" in line(text, "| Quality | tokens 4 | PSNR, dB |")


def test_what_only_one_has(tmp_path: Path):
    text = compared(tmp_path, report(), report(SSIM=Figure(0.5, 0.01)))
    assert line(text, "| Quality | tokens 8 | SSIM |").endswith("| – | 0.5 ± 0.01 | – | only in B |")


def test_other_data_is_warned_of_and_another_name_of_the_same_is_not(tmp_path: Path):
    text = compared(tmp_path, report(), report(checksum="2b", data="y"))
    (warning,) = (line for line in text.splitlines() if line.startswith("Warning"))
    assert "the data (images) differs: data x, checksum 1a in A, data y, checksum 2b in B" in warning
    text = compared(tmp_path, report(), report(data="y"))
    assert "Warning" not in text
    assert "| data.images.data | x | y |" in text


def test_a_report_and_itself(tmp_path: Path):
    assert "## What differs\n\nnothing\n" in compared(tmp_path, report(), report())


def test_data_without_an_entry_of_its_own(tmp_path: Path):
    a, b = (replace(report(), provenance={"data": {"training": name}}) for name in ("here", "there"))
    assert "Warning: the data (training) differs: data here in A, data there in B" in compared(tmp_path, a, b)


def test_what_cannot_be_compared(tmp_path: Path):
    report().write(tmp_path / "a")
    report(kind="gpt").write(tmp_path / "b")
    with pytest.raises(DetailFlowError, match="a is a report of tokenizer and .*b one of gpt"):
        compare_reports(tmp_path / "a", tmp_path / "b")
    with pytest.raises(DetailFlowError, match="nowhere has no report: give the output folder of an evaluation"):
        compare_reports(tmp_path / "a", tmp_path / "nowhere")
    (tmp_path / "a" / "report.json").write_text("{")
    with pytest.raises(DetailFlowError, match="report.json is not valid JSON"):
        compare_reports(tmp_path / "a", tmp_path / "b")
    content = json.loads((tmp_path / "b" / "report.json").read_text())
    for section in (
        {"title": "t", "rows": [{"setting": {}}]},
        {"title": "t", "rows": [{"setting": {}, "figures": {"PSNR": {"value": {}, "spread": None}}}]},
        {"title": "t", "rows": [{"setting": {}, "figures": {"PSNR": {"value": 10**400, "spread": None}}}]},
        {"title": "t", "rows": [{"setting": {}, "figures": {"PSNR": {"value": 1, "spread": ""}}}]},
        {"title": "t", "rows": [{"setting": [], "figures": {}}]},
        {"title": 3, "rows": []},
        [],
    ):
        (tmp_path / "b" / "report.json").write_text(json.dumps(content | {"sections": [section]}))
        with pytest.raises(DetailFlowError, match="report.json is damaged: its notes, sections or provenance"):
            compare_reports(tmp_path / "b", tmp_path / "b")


def test_a_name_that_is_no_text(tmp_path: Path):
    """A file's name may be bytes that are not UTF-8."""
    Report("samples", "FID of caf\udce9", [], {"command": "x \udcff"}).write(tmp_path / "odd")
    assert load(tmp_path / "odd")["title"] == "FID of caf\ufffd"
    assert (tmp_path / "odd" / "report.md").read_text().startswith("# FID of caf\ufffd")
