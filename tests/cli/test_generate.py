"""`detailflow generate`."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detailflow import DetailFlowPipeline, pictures
from detailflow.cli.main import main
from detailflow.data.images import open_images
from detailflow.files import lock_folder


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_all_classes_by_default(pipeline: DetailFlowPipeline, model: Path, tmp_path: Path):
    """As a user runs it: another process, in a folder of their own."""
    done = subprocess.run(
        [sys.executable, "-m", "detailflow", "generate", "--model", str(model), "--device", "cpu"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert (done.returncode, done.stdout, done.stderr) == (
        0,
        "wrote 5 images to outputs, together in outputs/grid.png\n",
        "",
    )
    names = ["0000-airplane.png", "0001-automobile.png", "0002-bird.png", "0003-cat.png", "0004-Hot-dog.png"]
    assert files(tmp_path / "outputs") == [*names, "grid.png"]
    for name, expected in zip(names, pipeline(range(5)), strict=True):
        with Image.open(tmp_path / "outputs" / name) as image:
            assert image.tobytes() == expected.tobytes()


def generate(model: Path, output: Path, *argv: str) -> int:
    return main(["generate", *argv, "--model", str(model), "--output", str(output), "--device", "cpu"])


def test_options_reach_the_pipeline(pipeline: DetailFlowPipeline, model: Path, tmp_path: Path):
    sampling = ["--guidance-scale", "3", "--guidance-schedule", "linear", "--temperature", "1.2", "--top-k", "50"]
    argv = ["CAT", "2", "--num", "2", "--seed", "7", "--top-p", "0.9", "--num-tokens", "4", "--no-grid", *sampling]
    assert generate(model, tmp_path / "a" / "b", *argv) == 0
    assert files(tmp_path / "a" / "b") == ["0000-cat.png", "0001-cat.png", "0002-bird.png", "0003-bird.png"]
    expected = pipeline(
        ["cat", "bird"], num_images_per_class=2, guidance_scale=3, guidance_schedule="linear", temperature=1.2,
        top_k=50, top_p=0.9, seed=7, num_tokens=4,
    )  # fmt: skip
    for name, image in zip(files(tmp_path / "a" / "b"), expected, strict=True):
        with Image.open(tmp_path / "a" / "b" / name) as written:
            assert written.tobytes() == image.tobytes()


def test_a_long_list_is_made_in_parts(pipeline: DetailFlowPipeline, model: Path, tmp_path: Path):
    assert generate(model, tmp_path, "cat", "bird", "--num", "20") == 0
    assert len(files(tmp_path)) == 41
    expected = pipeline(["cat", "bird"], num_images_per_class=20)
    for name, i in (("0031-bird", 31), ("0032-bird", 32), ("0039-bird", 39)):
        with Image.open(tmp_path / f"{name}.png") as written:
            assert written.tobytes() == expected[i].tobytes()
    with Image.open(tmp_path / "grid.png") as sheet:
        assert sheet.size == (20 * 132 + 4, 2 * (132 + 16) + 4)  # a row per class


def test_strips(model: Path, tmp_path: Path):
    assert generate(model, tmp_path, "cat", "--progressive") == 0
    assert files(tmp_path) == ["0000-cat.png", "grid.png", "strip-0000-cat.png"]
    with Image.open(tmp_path / "strip-0000-cat.png") as sheet:
        assert sheet.width == 5 * 132 + 4  # 1, 2, 4, 8 and 16 tokens


def test_a_second_run_replaces_the_files(model: Path, tmp_path: Path):
    assert generate(model, tmp_path, "cat", "--seed", "1") == 0
    before = (tmp_path / "0000-cat.png").read_bytes()
    assert generate(model, tmp_path, "cat", "--seed", "2") == 0
    assert (tmp_path / "0000-cat.png").read_bytes() != before
    assert files(tmp_path) == ["0000-cat.png", "grid.png"]


@pytest.mark.parametrize("off", [["--top-k", "off"], ["--top-k", "0"], ["--top-p", "off"], ["--top-p", "1"]])
def test_top_k_and_top_p_can_be_off(off: list[str], pipeline: DetailFlowPipeline, model: Path, tmp_path: Path):
    """Whatever the model's own best is."""
    shutil.copytree(model, tmp_path / "model")
    config = tmp_path / "model" / "gpt" / "config.json"
    own = {off[0].strip("-").replace("-", "_"): 1 if off[0] == "--top-k" else 1e-6}  # argmax
    config.write_text(json.dumps(json.loads(config.read_text()) | own))
    assert generate(tmp_path / "model", tmp_path / "out", "cat", "--seed", "3", *off) == 0
    with Image.open(tmp_path / "out" / "0000-cat.png") as written:
        assert written.tobytes() == pipeline("cat", seed=3)[0].tobytes()
        assert written.tobytes() != pipeline("cat", temperature=0)[0].tobytes()


def test_one_image_of_many_again(model: Path, pipeline: DetailFlowPipeline, tmp_path: Path):
    """The number in its name is its place, which the noise depends on."""
    assert generate(model, tmp_path, "bird", "cat", "--num", "2", "--seed", "1") == 0
    again = [pipeline("cat", seed=1, first_image=place)[0] for place in (3, 2)]
    with Image.open(tmp_path / "0003-cat.png") as written:
        distances = [np.abs(np.asarray(written, np.int16) - np.asarray(image)).mean() for image in again]
    assert distances[0] < 1 < distances[1]


def test_fewer_images_in_the_same_folder(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """The folder holds what was asked for, and what nobody's `generate` wrote."""
    own = {"0007-mine.png": b"mine", "grid.txt": b"mine", "strip-0009-mine.png": b"mine"}
    for name, content in own.items():
        (tmp_path / name).write_bytes(content)
    Image.new("RGB", (8, 8)).save(tmp_path / "0008-mine.png")
    mine = [*own, "0008-mine.png"]
    assert generate(model, tmp_path, "cat", "--num", "4", "--progressive") == 0
    assert len(files(tmp_path)) == 4 + 9
    assert generate(model, tmp_path, "bird", "cat", "--no-grid") == 0
    assert files(tmp_path) == sorted([*mine, "0000-bird.png", "0001-cat.png"])
    assert capsys.readouterr().out.splitlines()[1] == f"wrote 2 images to {tmp_path} in place of 9 earlier files"
    assert generate(model, tmp_path, "bird", "cat", "--no-grid", "--seed", "9") == 0
    assert capsys.readouterr().out == f"wrote 2 images to {tmp_path} in place of 2 earlier files\n"
    assert all((tmp_path / name).read_bytes() == content for name, content in own.items())


def test_a_stopped_call_leaves_no_mixture(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def stopped(image: Image.Image, path: Path, kind: str) -> None:
        if path.name == "0001-cat.png":
            raise KeyboardInterrupt
        write_png(image, path, kind)

    write_png = pictures.write_png
    assert generate(model, tmp_path, "cat", "--num", "3") == 0
    monkeypatch.setattr(pictures, "write_png", stopped)
    assert generate(model, tmp_path, "cat", "--num", "3", "--seed", "1") == 130
    assert files(tmp_path) == ["0000-cat.png"]


@pytest.mark.parametrize("name", ["0000-cat.png", "strip-0001-cat.png", "grid.png"])
def test_no_file_of_the_users_own_is_replaced(
    name: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    Image.new("RGB", (8, 8)).save(tmp_path / name)
    before = (tmp_path / name).read_bytes()
    assert generate(model, tmp_path, "cat", "--num", "2", "--progressive") == 2
    problem = f"{tmp_path / name} was not made by `detailflow generate`: move it, or choose another output"
    assert capsys.readouterr().err == f"detailflow: error: {problem}\n"
    assert files(tmp_path) == [name] and (tmp_path / name).read_bytes() == before


def test_copies_under_other_names_stay(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Also of pictures that `generate` made, under names that it could give; those of other models' classes go."""
    assert generate(model, tmp_path, "4", "cat", "--progressive") == 0
    shutil.copy(tmp_path / "0001-cat.png", tmp_path / "0007-kitten.png")
    shutil.copy(tmp_path / "strip-0001-cat.png", tmp_path / "strip-0001-kitten.png")
    assert generate(model, tmp_path, "bird", "--no-grid") == 0
    assert files(tmp_path) == ["0000-bird.png", "0007-kitten.png", "strip-0001-kitten.png"]


def test_a_run_that_fails_removes_nothing(model: Path, tmp_path: Path):
    assert generate(model, tmp_path, "cat", "--num", "2") == 0
    before = files(tmp_path)
    (tmp_path / "0000-bird.png").mkdir()
    assert generate(model, tmp_path, "bird") == 2
    assert files(tmp_path) == sorted([*before, "0000-bird.png"])


def test_a_set_of_samples_is_left_alone(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert generate(model, tmp_path / "set", "--num-images", "2") == 0
    assert generate(model, tmp_path / "few", "cat") == 0
    capsys.readouterr()
    for folder, argv, message in (
        ("set", ["cat"], "set has a set of samples (samples.json): choose another folder"),
        ("few", ["--num-images", "2"], "few has 0000-cat.png and no samples.json that says how it was"),
        (
            "few",
            ["--num-images", "2", "--format", "npz"],
            "few has 0000-cat.png and no samples.json that says how it was made",
        ),
    ):
        before = files(tmp_path / folder)
        assert generate(model, tmp_path / folder, *argv) == 2
        assert message in capsys.readouterr().err
        assert files(tmp_path / folder) == before


def test_grid_and_strips_are_no_samples(model: Path, tmp_path: Path):
    assert generate(model, tmp_path, "cat", "--num", "4", "--progressive") == 0
    assert len(files(tmp_path)) == 9
    source = open_images(tmp_path)
    assert [Path(source.name(i)).name for i in range(len(source))] == [f"000{i}-cat.png" for i in range(4)]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["catt"], "unknown class 'catt': did you mean cat?"),
        (["cat", "5"], "unknown class 5: the numbers are 0 to 4"),
        (["-1"], "unknown class -1: the numbers are 0 to 4"),
        (["--seed", "-1"], "--seed must be 0 to 2^64 - 1, not -1"),
        (["--seed", "18446744073709551616"], "--seed must be"),
        (["--seed", "one"], "--seed must be an integer, 0 to 2^64 - 1, not 'one'"),
        (["--temperature", "-1"], "--temperature must be 0 (argmax) or more, not -1.0"),
        (["--temperature", "nan"], "--temperature must be"),
        (["--guidance-scale", "-2"], "--guidance-scale must be"),
        (["--guidance-schedule", "cosine"], "--guidance-schedule must be constant or linear, not 'cosine'"),
        (["--top-k", "-1"], "--top-k must be 0 or more (0 is off), not -1"),
        (["--top-k", "99999999999999999999999999"], "--top-k must be at most 2,147,483,647"),  # C++ would take another
        (["--top-k", "none"], "--top-k must be an integer, 0 or more (0 is off), not 'none'"),
        (["--top-p", "0"], "--top-p must be above 0 and at most 1 (1 is off), not 0.0"),
        (["--guidance-scale", "inf"], "--guidance-scale must be"),
        (["--guidance-scale", "1e39"], "--guidance-scale must be"),
        (["--num", "1000000000"], "--num must make at most 10,000,000 images in all, not 5,000,000,000"),
        (
            ["--num-images", "1000000000"],
            "--num-images must be at most 10,000,000, not 1,000,000,000: make several sets",
        ),
        (["--num-images", "2", "--batch-size", "200000"], "--batch-size must be at most 100,000, not 200,000"),
        (["--top-p", "1.5"], "--top-p must be above 0 and at most 1 (1 is off), not 1.5"),
        (["--num-tokens", "5"], "--num-tokens must be 1 to 4 or a multiple of 4 up to 16, not 5"),
        (["--num", "0"], "--num must be a positive integer, not 0"),
        (["--num", "many"], "--num must be a positive integer, not 'many'"),
        (["--dtype", "int8"], "--dtype must be float32, bfloat16 or float16, not 'int8'"),
        (["--device", "quantum"], "device 'quantum' cannot be used here: give another, such as cpu"),
        (["--output", ""], "--output must be a path, not ''"),
        (["--model="], "--model must be a path or a name, not ''"),
        (["--class", "cat"], "unknown option '--class': give CLASS without it, before the options"),
        (["--num"], "--num needs a value: --num N"),
        (["--bogus"], "unknown option '--bogus': see detailflow generate --help"),
        (["--tempreature", "1"], "unknown option '--tempreature': did you mean --temperature?"),
        (["--nmu=3"], "unknown option '--nmu': did you mean --num?"),
        (["-x"], "-x is more than this command takes: see detailflow generate --help"),
        (["--model", "nowhere/at/all"], "there is no such folder: nowhere/at/all"),
    ],
)
def test_bad_input(argv: list[str], message: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    output = tmp_path / "out"
    defaults = ["--model", str(model), "--device", "cpu", "--output", str(output)]
    assert main(["generate", *defaults, *argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"detailflow: error: {message}")
    assert err.count("\n") == 1
    assert not output.exists()


def test_two_at_once(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """One would remove the other's images as those of an earlier call."""
    assert generate(model, tmp_path / "out", "cat") == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with lock_folder(tmp_path / "out", "generation"):
        assert generate(model, tmp_path / "out", "1") == 2
    assert "another generation is at work in" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert generate(model, tmp_path / "out", "1") == 0


def test_a_file_where_the_output_folder_should_be(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "file").write_text("mine")
    assert generate(model, tmp_path / "file", "cat") == 2
    assert generate(model, tmp_path / "file" / "deeper", "cat") == 2
    for line in capsys.readouterr().err.splitlines():
        assert line.startswith("detailflow: error: cannot write to ")
        assert line.endswith(f"{tmp_path / 'file'} is not a folder")
    assert (tmp_path / "file").read_text() == "mine"
    (tmp_path / "dangling").symlink_to("nowhere")
    assert generate(model, tmp_path / "dangling", "cat") == 2
    assert "is not a folder" in capsys.readouterr().err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written_to(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    tmp_path.chmod(0o500)
    assert generate(model, tmp_path / "out", "cat") == 2
    assert f"cannot write to {tmp_path / 'out'}: Permission denied" in capsys.readouterr().err


def test_an_impossible_folder_name(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert generate(model, tmp_path / ("x" * 300), "cat") == 2
    assert capsys.readouterr().err.startswith("detailflow: error: cannot write to ")
    assert files(tmp_path) == []


def test_a_folder_in_the_place_of_a_file(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "0000-cat.png").mkdir()
    assert generate(model, tmp_path, "cat") == 2
    assert "0000-cat.png was not made by `detailflow generate`: move it" in capsys.readouterr().err
    assert files(tmp_path) == ["0000-cat.png"]


def test_engines(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Both give the same images, the one in C++ only of types that it knows."""
    for engine in ("native", "torch"):
        assert main(["generate", "cat", "--device", "cpu", "--engine", engine, "--output", str(tmp_path / engine)]) == 0
    images = [np.asarray(Image.open(next((tmp_path / engine).glob("*-cat.png")))) for engine in ("native", "torch")]
    np.testing.assert_array_equal(*images)
    capsys.readouterr()
    assert main(["generate", "cat", "--device", "cpu", "--engine", "native", "--dtype", "float16"]) == 2
    assert "the native engine cannot run this model: it needs plain weights" in capsys.readouterr().err
    assert main(["generate", "cat", "--engine", "nativ"]) == 2
    assert "--engine must be" in capsys.readouterr().err
