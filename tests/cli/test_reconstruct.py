"""`detailflow reconstruct`."""

import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detailflow import DetailFlowPipeline
from detailflow.cli.main import main


def reconstruct(model: Path, output: Path, *images: Path) -> int:
    options = ["--model", str(model), "--output", str(output), "--device", "cpu"]
    return main(["reconstruct", *map(str, images), *options])


def test_a_strip_and_a_row_per_image(
    pipeline: DetailFlowPipeline, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    wide = Image.effect_noise((90, 50), 60).convert("RGB")
    small = Image.radial_gradient("L").resize((20, 20)).convert("RGB")
    wide.save(tmp_path / "wide.png")
    small.save(tmp_path / "small one.bmp")
    assert reconstruct(model, tmp_path / "out", tmp_path / "wide.png", tmp_path / "small one.bmp") == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["small one-strip.png", "wide-strip.png"]
    with Image.open(tmp_path / "out" / "wide-strip.png") as sheet:
        assert sheet.width == 6 * 132 + 4  # 1, 2, 4, 8, 16 tokens and the original
    out, err = capsys.readouterr()
    assert err == ""
    header, *rows = out.splitlines()
    assert header.split() == ["PSNR", "(dB)", "at", "tokens:", "1", "2", "4", "8", "16"]
    assert [row[:9].strip() for row in rows] == ["wide", "small one"]
    for row, image in zip(rows, (wide, small), strict=True):
        assert [float(cell) for cell in row[9:].split()] == [round(s.psnr, 2) for s in pipeline.reconstruct(image)]


def test_the_whole_image(pipeline: DetailFlowPipeline, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    wide = Image.effect_noise((90, 50), 60).convert("RGB")
    wide.save(tmp_path / "wide.png")
    assert main(["reconstruct", str(tmp_path / "wide.png"), "--whole", "--model", str(model), "--output", str(tmp_path)]) == 0
    with Image.open(tmp_path / "wide-strip.png") as sheet:
        assert sheet.size == (6 * (4 * 40 + 4) + 4, 4 * 24 + 32 + 8)  # 40×24 pixels, four times enlarged, with two lines below
    stages = pipeline.reconstruct(wide, whole=True)
    assert [stage.images[0].size for stage in stages] == [(40, 24)] * 5
    assert stages[-1].size == (24, 40) and stages[0].size == 8
    shown = [float(cell) for cell in capsys.readouterr().out.splitlines()[1].split()[1:]]
    assert shown == [round(stage.psnr, 2) for stage in stages]


def any_image(mode: str) -> Image.Image:
    values = np.arange(40 * 30).reshape(30, 40)
    if mode == "I;16":
        return Image.fromarray((values * 50).astype(np.uint16))
    if mode == "F":
        return Image.fromarray(values.astype(np.float32) / 5)
    return Image.fromarray((values % 256).astype(np.uint8)).convert(mode)


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [
        ("1", "png"),
        ("L", "jpg"),
        ("LA", "png"),
        ("P", "gif"),
        ("RGBA", "webp"),
        ("CMYK", "jpg"),
        ("I;16", "png"),
        ("F", "tiff"),
    ],
)
def test_every_mode(mode: str, suffix: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    any_image(mode).save(tmp_path / f"picture.{suffix}")
    assert reconstruct(model, tmp_path, tmp_path / f"picture.{suffix}") == 0
    assert (tmp_path / "picture-strip.png").exists()
    assert all(math.isfinite(float(cell)) for cell in capsys.readouterr().out.splitlines()[1].split()[1:])


def test_files_of_one_name_are_kept_apart(model: Path, tmp_path: Path):
    images = []
    for i, name in enumerate(("a/x.png", "b/X.png", "c/x.png", "x-2.png")):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (32, 32), (i, i, i)).save(path)
        images.append(path)
    assert reconstruct(model, tmp_path / "out", *images) == 0
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["X-2-strip.png", "x-2-2-strip.png", "x-3-strip.png", "x-strip.png"]


@pytest.mark.parametrize("problem", ["missing", "folder", "text", "truncated"])
def test_an_image_that_cannot_be_read(problem: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    good, bad = tmp_path / "good.png", tmp_path / "bad.png"
    Image.effect_noise((40, 30), 60).save(good)
    if problem == "folder":
        bad.mkdir()
    elif problem == "text":
        bad.write_text("no image")
    elif problem == "truncated":
        bad.write_bytes(good.read_bytes()[:200])
    assert reconstruct(model, tmp_path / "out", good, bad) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"detailflow: error: {bad} ")
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_no_image(capsys: pytest.CaptureFixture[str]):
    assert main(["reconstruct"]) == 2
    assert "the following arguments are required: IMAGE" in capsys.readouterr().err


def test_a_model_of_the_other_kind(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    any_image("RGB").save(tmp_path / "a.png")
    assert reconstruct(model / "gpt", tmp_path / "out", tmp_path / "a.png") == 2
    assert "detailflow: error: " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
