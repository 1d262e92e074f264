"""`detailflow data`, and the line with which other commands begin."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from detailflow.cli.main import main
from detailflow.errors import MissingPackageError


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three classes of 4, in sizes of their own, with an archive, a text, and one file twice."""
    for number, name in enumerate(("cat", "dog", "fish")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for index in range(4):
            image = Image.new("RGB", (16 + number, 8 + index), (number, index, 0))
            image.save(tmp_path / "photos" / name / f"{index}.png")
    shutil.copy(tmp_path / "photos" / "cat" / "0.png", tmp_path / "photos" / "dog" / "4.png")
    (tmp_path / "photos" / "all.zip").write_text("")
    (tmp_path / "photos" / "fish" / "notes.txt").write_text("")
    return tmp_path / "photos"


def test_all_that_is_known(photos: Path, capsys: pytest.CaptureFixture[str]):
    (photos / "fish" / "3.png").write_text("no image")
    assert main(["data", str(photos)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    line, *rest = out.splitlines()
    expected = f"{photos}: 13 images in 3 classes (cat 4, dog 5, fish 4), 1 of them unreadable, 16×8 to 17×11; "
    assert line == expected + "left aside: 1 archive (all.zip), 1 .txt"
    shown = "\n".join(rest)
    assert "  cat   4\n  dog   5\n  fish  4" in shown and "sizes: 16×8 to 17×11, most often 16×8 (2)" in shown
    assert "\nwhat to expect: 13 images are enough to see that everything works. " in shown
    assert "left aside: 1 .txt (not the suffix of an image file)\n  fish/notes.txt" in shown and "unpack them" in shown
    assert f"unreadable: 1\n  {photos}/fish/3.png is not an image" in shown
    assert f"the same file several times: 1\n  {photos}/cat/0.png = {photos}/dog/4.png" in shown


def test_names_with_newlines_and_tabs(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Each class is a line of the table."""
    for name in ("a\nb", "a\tb"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8), "red").save(tmp_path / name / "0.png")
    assert main(["data", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "2 classes (a\\x09b 1, a\\x0ab 1)" in out and "\nclasses\n  a\\x09b  1\n  a\\x0ab  1\n" in out
    assert f"= {tmp_path}/a\\x0ab/0.png\n" in out


def test_the_same_as_json(photos: Path, capsys: pytest.CaptureFixture[str]):
    shutil.copytree(photos, photos.parent / "splits" / "Train")
    shutil.copytree(photos / "cat", photos.parent / "splits" / "val" / "cat")
    (photos.parent / "splits" / "val" / "dog").symlink_to("/nowhere")
    assert main(["data", str(photos.parent / "splits"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["images"] == 13 and found["classes"] == {"cat": 4, "dog": 5, "fish": 4} and found["usable"]
    assert found["split"] == "train" and found["splits"] == {"train": 13, "val": 4}
    assert found["expect"].startswith("13 images are enough to see")
    assert found["sizes"] == {"smallest": [16, 8], "largest": [18, 11]}
    assert found["left_aside"] == {"archive": ["all.zip"], ".txt": ["fish/notes.txt"]}
    assert [[Path(name).name for name in group] for group in found["duplicates"]] == [["0.png", "4.png"]]
    assert found["unreadable"] == {} and found["warnings"] == [] and len(found["fingerprint"]) == 64
    assert main(["data", str(photos.parent / "splits"), "--split", "val", "--json"]) == 0
    (warning,) = json.loads(capsys.readouterr().out)["warnings"]
    assert "dog is a link to /nowhere, which is not there" in warning


def test_the_first_line_has_the_sizes_of_all_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Other commands look at 256 of them, evenly spread."""
    for index in range(300):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{index:03d}.png")
    Image.new("RGB", (99, 9)).save(tmp_path / "006.png")
    assert "006" not in [f"{number * 300 // 256:03d}" for number in range(256)]
    assert main(["data", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[0] == f"{tmp_path}: 300 images without classes, 8×8 to 99×9"


def test_what_was_meant(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("detailflow.data.tables.import_datasets", _missing)
    for given, said in (
        ("photoz", "photoz does not exist: did you mean photos?"),
        ("./photoz", "./photoz does not exist: did you mean ./photos?"),
        ("photos/fsh/", "photos/fsh/ does not exist: did you mean photos/fish?"),
        ("else", "else does not exist: give a folder of images, .parquet or .tar files, or a hub name (owner/name)"),
        ("photos/all.zip", "photos/all.zip is an archive, which is not read: unpack it, and give the folder"),
    ):
        assert main(["data", given]) == 2
        assert capsys.readouterr().err == f"detailflow: error: {said}\n"


def _missing(*_: object) -> None:
    raise MissingPackageError("datasets")


def test_a_name_that_is_not_on_the_hub_either(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip("datasets", reason="needs detailflow[train]")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", _missing)  # which needs a network
    assert main(["data", "photoz"]) == 2
    assert capsys.readouterr().err.endswith("a data set of that name: did you mean photos?\n")


def test_sets_that_cannot_be_used(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for name in ("0", "1"):
        (photos / "cat" / f"{name}.png").write_text("no image")
    assert main(["data", str(photos)]) == 2
    out, err = capsys.readouterr()
    assert "unreadable: 2" in out
    assert err == "detailflow: error: 2 of the 13 images cannot be read, more than 1%: remove or replace them\n"
    (tmp_path / "empty").mkdir()
    for wrong in ("empty", "nowhere/at/all", "photos/cat/2.png"):
        assert main(["data", str(tmp_path / wrong)]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1


def test_what_reads_images_says_first_what_it_reads(
    photos: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    pytest.importorskip("tensorboard", reason="needs detailflow[train]")
    line = f"{photos}: 13 images in 3 classes (cat 4, dog 5, fish 4), 16×8 to 18×11; "
    line += "left aside: 1 archive (all.zip), 1 .txt\n"

    def out(*argv: object) -> str:
        main([*map(str, argv), "--data", str(photos), "--output", str(tmp_path / "out" / str(argv[0]))])
        return capsys.readouterr().out

    settings = ["--crops", "two", "--tokenizer", model]
    assert out("extract", *settings).startswith(line)
    assert out("extract", *settings).startswith(line)  # finished already
    assert out("evaluate", "tokenizer", "--model", model, "--features", "clip").startswith(line)
    sizes = "{image_size: 32, patch_size: 16, num_tokens: 8, group_size: 4, codebook_size: 32, codebook_dim: 4, "
    sizes += "encoder: {width: 16, depth: 1, heads: 2}, decoder: {width: 16, depth: 1, heads: 2}}"
    loop = "{steps: 1, batch_size: 4, learning_rate: 0.001}"
    (tmp_path / "a.yaml").write_text(f"{{model: {sizes}, loop: {loop}, perceptual: 0, adversarial: 0, alignment: 0}}")
    printed = out("train", "tokenizer", "--config", tmp_path / "a.yaml")
    assert printed.startswith(line) and printed.count(line) == 1
    assert "photos" not in out("train", "tokenizer", "--config", tmp_path / "a.yaml", "--loop.steps", "none")


def test_a_warning_is_a_sentence(photos: Path):
    (photos / "bird").symlink_to("/nowhere")
    code = "import sys; from detailflow.cli import main; from detailflow.data import open_images; "
    code += "main._run = lambda argv: open_images(argv[0]) and 0; main.main(sys.argv[1:])"
    result = subprocess.run([sys.executable, "-c", code, str(photos)], capture_output=True, text=True)
    assert (
        result.stderr
        == f"detailflow: warning: {photos}/bird is a link to /nowhere, which is not there: it is left out\n"
    )
