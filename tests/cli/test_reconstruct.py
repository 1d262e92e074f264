"""`detailflow reconstruct`."""

import math
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detailflow import DetailFlowPipeline
from detailflow.cli.main import main
from detailflow.data.images import open_images


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
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "small one-reconstruction.png",
        "small one-strip.png",
        "wide-reconstruction.png",
        "wide-strip.png",
    ]
    for name, image in (("wide", wide), ("small one", small)):
        with Image.open(tmp_path / "out" / f"{name}-reconstruction.png") as written:
            assert written.tobytes() == pipeline.reconstruct(image)[-1].images[0].tobytes()
    source = open_images(tmp_path / "out")
    assert len(source) == 2  # strips are not images of a set
    with Image.open(tmp_path / "out" / "wide-strip.png") as sheet:
        assert sheet.width == 6 * 132 + 4  # 1, 2, 4, 8, 16 tokens and the original
    out, err = capsys.readouterr()
    assert err == f"wrote a strip and a reconstruction of each image to {tmp_path / 'out'}\n"
    header, *rows = out.splitlines()
    assert header.split() == ["PSNR", "(dB)", "at", "tokens:", "1", "2", "4", "8", "16"]
    assert [row[:9].strip() for row in rows] == ["wide", "small one"]
    for row, image in zip(rows, (wide, small), strict=True):
        assert [float(cell) for cell in row[9:].split()] == [round(s.psnr, 2) for s in pipeline.reconstruct(image)]


def test_a_search(shipped: DetailFlowPipeline, cifar: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = sorted(cifar.rglob("*.png"))[0]
    options = [str(path), "--output", str(tmp_path), "--device", "cpu"]
    assert main(["reconstruct", *options, "--search", "4"]) == 0
    row = capsys.readouterr().out.splitlines()[1].split()
    stages = shipped.reconstruct(path, search=4)
    assert [float(cell) for cell in row[1:]] == [round(stage.psnr, 2) for stage in stages]
    assert stages[-1].psnr > shipped.reconstruct(path)[-1].psnr
    assert main(["encode", str(path), "--output", str(tmp_path / "t.npz"), "--device", "cpu", "--search", "4"]) == 0
    with np.load(tmp_path / "t.npz") as file:
        np.testing.assert_array_equal(file["tokens"][0], shipped.tokens(path, search=4))
    few = ["--num-tokens", "8", "--search", "4"]
    assert main(["encode", str(path), "--output", str(tmp_path / "8.npz"), *few]) == 2
    assert "a search is for all 48 tokens together: leave out --num-tokens" in capsys.readouterr().err
    assert not (tmp_path / "8.npz").exists()
    assert main(["reconstruct", *options, "--search", "-4"]) == 2
    assert "--search must be 0 or more, not" in capsys.readouterr().err


def test_a_photo_of_a_phone_held_upright_is_turned_once(pipeline: DetailFlowPipeline, model: Path, tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112] = 6
    shown = Image.effect_mandelbrot((50, 90), (-3, -2.5, 2, 2.5), 100).convert("RGB")
    shown.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "photo.png", exif=exif)
    assert reconstruct(model, tmp_path / "out", tmp_path / "photo.png") == 0
    with Image.open(tmp_path / "out" / "photo-reconstruction.png") as written:
        assert written.tobytes() == pipeline.reconstruct(shown)[-1].images[0].tobytes()


def test_the_whole_image(pipeline: DetailFlowPipeline, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    wide = Image.effect_noise((90, 50), 60).convert("RGB")
    wide.save(tmp_path / "wide.png")
    assert (
        main(["reconstruct", str(tmp_path / "wide.png"), "--whole", "--model", str(model), "--output", str(tmp_path)])
        == 0
    )
    with Image.open(tmp_path / "wide-strip.png") as sheet:
        assert sheet.size == (
            6 * (4 * 40 + 4) + 4,
            4 * 24 + 32 + 8,
        )  # 40×24 pixels, four times enlarged, with two lines below
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


def test_files_of_one_name_are_kept_apart(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """By their folders, or else by a number."""
    images = []
    for i, name in enumerate(("in/a/x.png", "in/b/X.png", "in/x.png", "a-x.png", "y.png", "y.gif")):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (i, i, i)).save(path)
        images.append(path)
    assert reconstruct(model, tmp_path / "out", *images) == 0
    names = sorted(path.name for path in (tmp_path / "out").glob("*-strip.png"))
    expected = ["a-x", "b-X", "x", "a-x-2", "y", "y-2"]
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]] == expected
    assert len(list((tmp_path / "out").iterdir())) == 12 and names == sorted(f"{name}-strip.png" for name in expected)


@pytest.mark.parametrize("name", ["a" * 246, "é" * 120, "猫" * 80])
def test_a_name_as_long_as_a_file_can_have(name: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Every image gets its output, under a shortened name."""
    for suffix in (".png", ".jpg"):
        Image.new("RGB", (32, 32)).save(tmp_path / f"{name}{suffix}")
    Image.new("RGB", (32, 32)).save(tmp_path / "other.png")
    images = [tmp_path / f"{name}.png", tmp_path / f"{name}.jpg", tmp_path / "other.png"]
    assert reconstruct(model, tmp_path / "out", *images) == 0
    written = sorted(path.name for path in (tmp_path / "out").glob("*-strip.png"))
    assert len(written) == 3 and "other-strip.png" in written
    assert all(len(name.encode()) < 130 for name in written)
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_a_name_that_is_no_utf8(model: Path, tmp_path: Path):
    image = os.fsencode(tmp_path) + b"/caf\xe9.png"
    try:
        Image.new("RGB", (32, 32)).save(os.fsdecode(image))
    except OSError:
        pytest.skip("this file system takes UTF-8 alone")
    command = [
        sys.executable,
        "-m",
        "detailflow",
        "reconstruct",
        image,
        "--model",
        str(model),
        "--output",
        str(tmp_path / "out"),
    ]
    done = subprocess.run(command, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and done.stderr.count(b"\n") == 1  # where they are
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "caf\ufffd-reconstruction.png",
        "caf\ufffd-strip.png",
    ]
    assert "caf\ufffd" in done.stdout.decode()


def photos(folder: Path, per: int = 3) -> Path:
    for number, name in enumerate(("cat", "dog")):
        (folder / name).mkdir(parents=True)
        for i in range(per):
            Image.new("RGB", (40, 32), (80 * number, 20 * i, 0)).save(folder / name / f"{i}.png")
    return folder


def test_a_folder(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = photos(tmp_path / "photos")
    assert reconstruct(model, tmp_path / "out", folder, folder / "cat" / "0.png") == 0
    out, err = capsys.readouterr()
    expected = ["cat-0", "cat-1", "cat-2", "dog-0", "dog-1", "dog-2", "0"]
    assert [line.split()[0] for line in out.splitlines()[1:]] == expected
    assert err.splitlines()[:-1] == [f"{folder}: 6 images in 2 classes (cat 3, dog 3), 40×32"]
    assert sorted(path.name for path in (tmp_path / "out").glob("*-reconstruction.png")) == sorted(
        f"{name}-reconstruction.png" for name in expected
    )


def test_so_many_of_a_folder(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = photos(tmp_path / "photos", per=10)
    assert (
        main(["reconstruct", str(folder), "--model", str(model), "--output", str(tmp_path / "out"), "--num", "4"]) == 0
    )
    out, err = capsys.readouterr()
    assert [line.split()[0] for line in out.splitlines()[1:]] == ["cat-4", "cat-9", "dog-4", "dog-9"]  # of every class
    assert err.splitlines()[1] == f"{folder}: 4 of its 20 images, evenly spread; --num 20 takes all"
    assert reconstruct(model, tmp_path / "default", folder) == 0
    assert len(list((tmp_path / "default").glob("*-strip.png"))) == 16


def test_other_sets(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder, shard = photos(tmp_path / "photos"), tmp_path / "shard.tar"
    with tarfile.open(shard, "w") as archive:
        archive.add(folder / "cat" / "0.png", "a/b.png")
    assert reconstruct(model, tmp_path / "out", shard) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "shard.tar-a-b-reconstruction.png",
        "shard.tar-a-b-strip.png",
    ]


def test_an_unreadable_image_in_a_folder(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = photos(tmp_path / "photos")
    (folder / "cat" / "1.png").write_text("no image")
    assert reconstruct(model, tmp_path / "out", folder) == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 6
    assert err.splitlines()[-1].startswith(f"left out: {folder / 'cat' / '1.png'} is ")
    (folder / "dog" / "1.png").write_text("no image")  # 1% is tolerated, and at least one
    assert reconstruct(model, tmp_path / "again", folder) == 2
    assert str(folder / "dog" / "1.png") in capsys.readouterr().err


def test_an_image_is_not_replaced_by_its_own_picture(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for name in ("a.png", "a-strip.png"):
        Image.new("RGB", (32, 32)).save(tmp_path / name)
    before = (tmp_path / "a-strip.png").read_bytes()
    assert reconstruct(model, tmp_path, tmp_path / "a.png", tmp_path / "a-strip.png") == 2
    assert "a-strip.png is one of the images and would be replaced: give another --output" in capsys.readouterr().err
    assert (tmp_path / "a-strip.png").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("command", ["reconstruct", "vary"])
def test_no_pictures_among_the_images(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """The same command would take them for images."""
    folder = photos(tmp_path / "photos")
    before = sorted(folder.rglob("*"))
    assert main([command, str(folder), "--output", str(folder / "out")]) == 2
    assert "is in your data" in capsys.readouterr().err
    assert sorted(folder.rglob("*")) == before


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
    assert problem != "missing" or err.endswith(f"{bad} does not exist: give the path of an image file\n")
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_no_file_of_the_users_own_is_replaced(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    any_image("RGB").save(tmp_path / "a.png")
    assert reconstruct(model, tmp_path / "out", tmp_path / "a.png") == 0
    assert " in place of " not in capsys.readouterr().err
    assert reconstruct(model, tmp_path / "out", tmp_path / "a.png") == 0  # its own it replaces
    assert capsys.readouterr().err.endswith(f"of it to {tmp_path / 'out'} in place of 2 earlier files\n")
    for name in ("a-strip.png", "a-reconstruction.png"):
        own = tmp_path / name / name
        own.parent.mkdir()
        any_image("RGB").save(own)
        before = own.read_bytes()
        assert reconstruct(model, own.parent, tmp_path / "a.png") == 2
        assert f"{own} was not made by `detailflow reconstruct`: move it" in capsys.readouterr().err
        assert own.read_bytes() == before and len(list(own.parent.iterdir())) == 1


def test_a_pattern_that_the_shell_did_not_resolve(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert reconstruct(model, tmp_path / "out", tmp_path / "*.jpg") == 2
    assert capsys.readouterr().err.endswith("*.jpg does not exist: give the path of an image file\n")
    assert not (tmp_path / "out").exists()


def test_no_image(capsys: pytest.CaptureFixture[str]):
    assert main(["reconstruct"]) == 2
    assert "the following arguments are required: IMAGE" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "-- -dash.png --output rec",
            "--output comes after --, where nothing is an option: put -- and what follows it",
        ),
        (
            "-- -dash.png --output=rec",
            "--output comes after --, where nothing is an option: put -- and what follows it",
        ),
        ("-dash.jpg", "-dash.jpg begins with a dash, as options do: write ./-dash.jpg"),
        ("a.png -dash.jpg --num 3", "-dash.jpg begins with a dash, as options do: write ./-dash.jpg"),
        ("--dash.png", "--dash.png begins with a dash, as options do: write ./--dash.png"),  # as there is such a file
        ("a.png --dash.jpg", "unknown option '--dash.jpg': see detailflow reconstruct --help"),
        ("a.png --num -1.e5", "--num needs a value: --num N"),
    ],
)
def test_images_that_begin_with_a_dash(
    words: str, message: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    monkeypatch.chdir(tmp_path)
    for name in ("a.png", "-dash.png", "--dash.png"):
        Image.new("RGB", (32, 32)).save(name)
    assert main(["reconstruct", *words.split()]) == 2
    assert capsys.readouterr().err.startswith(f"detailflow: error: {message}")
    assert main(["reconstruct", "--output", "out", "--model", str(model), "--", "-dash.png", "--dash.png"]) == 0
    assert main(["reconstruct", "./-dash.png", "--output", "out", "--model", str(model)]) == 0


def test_a_model_of_the_other_kind(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    any_image("RGB").save(tmp_path / "a.png")
    assert reconstruct(model / "gpt", tmp_path / "out", tmp_path / "a.png") == 2
    assert "detailflow: error: " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
