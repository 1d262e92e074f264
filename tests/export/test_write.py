"""An exported folder is whole, replaces an earlier one, and nothing of the user's."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from detailflow import DetailFlowPipeline
from detailflow.cli.main import main
from detailflow.errors import DetailFlowError

onnx = pytest.importorskip("onnx", reason="needs the packages of detailflow[onnx]")
ort = pytest.importorskip("onnxruntime", reason="needs the packages of detailflow[onnx]")

from detailflow.export import networks  # noqa: E402
from detailflow.export.write import export  # noqa: E402

TINY = Path(__file__).parents[1] / "parity" / "tiny-32"
FILES = {f"{part}{kind}.onnx" for part in ("encoder", "decoder", "step") for kind in ("", "-int8")}


@pytest.fixture
def exported(pipeline: DetailFlowPipeline, tmp_path: Path) -> Path:
    export(pipeline, tmp_path / "exported", "tiny")
    return tmp_path / "exported"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def decoded(folder: Path, ids: torch.Tensor) -> np.ndarray:
    session = ort.InferenceSession(folder / "decoder.onnx", providers=["CPUExecutionProvider"])
    return session.run(["pixels"], {"ids": ids.numpy(), "size": np.array([32])})[0]


def test_what_is_written(pipeline: DetailFlowPipeline, exported: Path):
    assert set(contents(exported)) == {*FILES, "README.md", "model.json"}
    model = json.loads((exported / "model.json").read_text())
    schedule = pipeline.tokenizer.schedule
    assert {name for files in model["files"].values() for name in files.values()} == FILES
    assert model["steps"] == [list(step) for step in schedule.steps]
    assert dict(zip(model["counts"], model["sizes"], strict=True)) == {
        n: schedule.decode_size(n) for n in schedule.valid_counts
    }
    assert (model["null_class"], model["code_row"], model["mask_row"]) == (5, 6, 70)
    assert model["class_names"][4] == "Hot dog" and model["sampling"]["guidance_scale"] == 1.5
    for name in FILES:  # the README has every input and output
        for value in (graph := onnx.load(exported / name).graph).input[:1], graph.output[:1]:
            assert f"`{value[0].name.replace('.0.', '.L.')}`" in (exported / "README.md").read_text()


def test_an_export_replaces_an_earlier_one(pipeline: DetailFlowPipeline, exported: Path, tmp_path: Path):
    before = contents(exported)
    (exported / "mine.txt").write_text("mine")
    export(DetailFlowPipeline.from_pretrained(TINY, device="cpu"), exported, "another")
    assert all(content != before[name] for name, content in contents(exported).items() if name in before)
    export(pipeline, exported, "tiny")
    assert contents(exported) == before | {"mine.txt": b"mine"}


def test_large_weights_have_a_file_of_their_own(pipeline: DetailFlowPipeline, exported: Path):
    ids = torch.randint(64, (2, 16))
    whole = decoded(exported, ids)
    export(pipeline, exported, "tiny", largest_file=50_000)
    names = {path.name for path in exported.glob("*.data")}
    assert names == {"encoder.onnx.data", "decoder.onnx.data", "step.onnx.data"}
    assert (exported / "decoder.onnx").stat().st_size < 50_000
    assert (decoded(exported, ids) == whole).all()
    export(pipeline, exported, "tiny")
    assert not list(exported.glob("*.data"))


def test_an_interrupted_export_is_known_and_repeated(
    pipeline: DetailFlowPipeline, exported: Path, monkeypatch: pytest.MonkeyPatch
):
    before = contents(exported)
    with monkeypatch.context() as patched:
        patched.setattr(networks, "step", lambda *_: 1 / 0)  # as if the process ended there
        with pytest.raises(ZeroDivisionError):
            export(pipeline, exported, "tiny")
    assert "files" not in json.loads((exported / "model.json").read_text())
    assert not list(exported.glob("*.tmp")) and not (exported / ".lock").exists()
    export(pipeline, exported, "tiny")
    assert contents(exported) == before


@pytest.mark.parametrize("name", ["README.md", "step.onnx", "encoder-int8.onnx", "model.json"])
def test_nothing_of_the_users_is_replaced(name: str, pipeline: DetailFlowPipeline, tmp_path: Path):
    (tmp_path / name).write_text("{}")
    with pytest.raises(DetailFlowError) as caught:
        export(pipeline, tmp_path, "tiny")
    why = (
        "is not what `detailflow export` writes"
        if name == "model.json"
        else "is there, without the model.json of an export"
    )
    assert str(caught.value) == f"{tmp_path / name} {why}: move it, or choose another folder"
    assert contents(tmp_path) == {name: b"{}"}


@pytest.mark.parametrize("content", ["{", "[]", "\0"])
def test_an_export_whose_description_is_damaged(
    content: str, exported: Path, pipeline: DetailFlowPipeline, tmp_path: Path
):
    """To repeat it, as a program that reads it advises, its file must go."""
    folder = tmp_path / "copy"
    shutil.copytree(exported, folder)
    (folder / "model.json").write_text(content)
    with pytest.raises(DetailFlowError, match=r"model\.json is not what `detailflow export` writes: move it, or"):
        export(pipeline, folder, "tiny")


def test_the_command(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "out"
    assert main(["export", str(model), "--onnx", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8 and lines[0].startswith(f"wrote {out / 'encoder.onnx'} (")
    assert all(line.endswith(" kB)") for line in lines if "model.json" in line or "README.md" in line)
    assert (out / "README.md").read_text().startswith(f"# {model.name}\n")
    apart = [str(model / "gpt"), "--tokenizer", str(model / "tokenizer"), "--onnx", str(tmp_path / "apart")]
    assert main(["export", *apart]) == 0
    assert (tmp_path / "apart" / "model.json").read_text() == (out / "model.json").read_text()
    capsys.readouterr()
    (tmp_path / "taken").write_text("")
    for arguments, message in (
        ([str(model)], "the following arguments are required: --onnx"),
        ([str(tmp_path / "no"), "--onnx", str(tmp_path / "x")], f"there is no such folder: {tmp_path / 'no'}"),
        ([str(model), "--onnx", str(tmp_path / "taken")], f"{tmp_path / 'taken'} is not a folder"),
        ([str(model / "tokenizer"), "--onnx", str(tmp_path / "x")], "not an AR model"),
    ):
        assert main(["export", *arguments]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert not (tmp_path / "x").exists()


def test_without_its_extra(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)
    monkeypatch.delitem(__import__("sys").modules, "detailflow.export.write")
    assert main(["export", str(model), "--onnx", str(tmp_path / "x")]) == 2
    assert "export needs the package onnx: install it with pip install 'detailflow[onnx]'" in capsys.readouterr().err


def test_a_model_in_the_published_layout(published: Path, tmp_path: Path):
    pair = Path(shutil.copytree(published.parent, tmp_path / "pair"))
    assert main(["export", str(pair), "--onnx", str(tmp_path / "out")]) == 0
    model = json.loads((tmp_path / "out" / "model.json").read_text())
    assert model["num_classes"] == 1000 and model["class_names"][0] == "tench"
