"""`detailflow extract`."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detailflow.cli.main import main
from detailflow.data.tokens import TokenStore


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 tiny images in three classes, one of them no image at all."""
    folder = tmp_path_factory.mktemp("images")
    noise = np.random.default_rng(0)
    for k in range(300):
        path = folder / "abc"[k % 3] / f"{k:03d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(noise.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)
    (folder / "b" / "100.png").write_text("These are the notes that I wanted to keep.\n")
    return folder


def extract(folder: Path, model: Path, output: Path, *argv: str) -> list[str]:
    source = ["--data", str(folder), "--tokenizer", str(model), "--crops", "two"]
    return ["extract", *source, "--output", str(output), "--device", "cpu", *argv]


def written(folder: Path) -> list[str]:
    return [str(p) for p in folder.rglob("*") if p.is_file()]


def test_a_text_file_among_many_images(folder: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(extract(folder, model, tmp_path / "store")) == 0
    out, err = capsys.readouterr()
    assert f"skipped: {folder / 'b' / '100.png'} is not an image" in out
    assert "1 of 300 images could not be read and were left out" in out
    assert out.endswith(f"299 images, 2 crops each, in {tmp_path / 'store'}\n") and "tokens" in err  # the progress bar
    store = TokenStore.open(tmp_path / "store")
    assert np.bincount(store.labels).tolist() == [100, 99, 100]
    before = {p: Path(p).read_bytes() for p in written(tmp_path)}
    assert main(extract(folder, model, tmp_path / "store")) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{folder}: 300 images in 3 classes (a 100, b 100, c 100), ")
    assert f"\n{tmp_path / 'store'}: these tokens are finished already\n299 images, " in out
    assert main(extract(folder, model, tmp_path / "store", "--seed", "1")) == 2
    err = capsys.readouterr().err
    assert (
        err.count("\n") == 1
        and "holds tokens with another seed (0, not 1): repeat its settings or choose another folder" in err
    )
    assert {p: Path(p).read_bytes() for p in written(tmp_path)} == before


def test_more_than_one_in_a_hundred(folder: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for k in range(4):
        (folder / "a" / f"bad{k}.png").write_text("not an image")
    try:
        assert main(extract(folder, model, tmp_path / "store")) == 2
    finally:
        for k in range(4):
            (folder / "a" / f"bad{k}.png").unlink()
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith(
        "detailflow: error: 4 images cannot be read, more than 1%: remove or replace them (the first: "
    )
    assert all(f"{folder / 'a' / f'bad{k}.png'} is not an image" in message for k in range(3))
    assert not (tmp_path / "store" / "manifest.json").exists()
    assert main(extract(folder, model, tmp_path / "store")) == 0  # they are removed now
    assert len(TokenStore.open(tmp_path / "store")) == 299


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--crops", "three"], "crops must be ten, six or two, not 'three'"),
        (["--crop", "two"], "unknown option '--crop': did you mean --crops?"),
        (["--batch_size", "0"], "batch_size must be a positive integer, not 0"),
        (["--batch_size", "some"], "--batch_size must be a positive integer, not 'some'"),
        (["--workers", "-1"], "workers must be 0 or more, not -1"),
        (["--data", "nowhere/at/all"], "nowhere/at/all does not exist"),
        (["--tokenizer", "nowhere/at/all"], "there is no such folder: nowhere/at/all"),
        (["--device", "quantum"], "device 'quantum' cannot be used here"),
        (["--split", "test"], " has no split 'test'"),
        (["--config", "nowhere.yaml"], "--config nowhere.yaml: this file cannot be read"),
        (["--config", "own-32/tokenizer"], "no such file, and unknown recipe 'own-32/tokenizer': did you mean own-"),
    ],
)
def test_bad_input(
    argv: list[str], message: str, folder: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(extract(folder, model, tmp_path / "store", *argv)) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert err.startswith("detailflow: error: ") and message in err
    assert list(tmp_path.iterdir()) == []


def test_bad_folders(folder: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("mine")
    for data, tokenizer, output, message in (
        (tmp_path / "empty", model, "store", "holds no images"),
        (folder, model / "gpt", "store", f"holds an AR model (gpt), not a tokenizer: give {model}, which holds both"),
        (folder, tmp_path / "empty", "store", "has no config.json"),
        (folder, model, "file", "is not a folder"),
        (folder, model, folder / "a", f"{folder / 'a'} is in your data, {folder}: choose another --output, such as r"),
    ):
        assert main(extract(data, tokenizer, tmp_path / output)) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and message in err
    assert written(tmp_path) == [str(tmp_path / "file")]
    assert main(["extract", "--data", str(folder), "--tokenizer", str(model)]) == 2
    assert capsys.readouterr().err == "detailflow: error: the following arguments are required: --output\n"
