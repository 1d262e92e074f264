"""The scripts in examples/ and the notebook run, and the notebook keeps what it showed."""

import base64
import io
import json
import runpy
import sys
from pathlib import Path

import pytest
from PIL import Image

EXAMPLES = Path(__file__).parents[1] / "examples"
NOTEBOOK = EXAMPLES / "detailflow.ipynb"
LONG = ("train", "finetune", "evaluate")
SCRIPTS = {  # the arguments that make each short, and what it writes
    "generate": ([], ["classes.png", "guidance.png"]),
    "stream": (["ship"], ["ship.gif", "ship-strip.png"]),
    "reconstruct": ([], ["reconstruction.png"]),
    "vary": ([], ["variations.png"]),
    "train": (["--steps", "3"], ["shapes.png", "shapes-run/gpt/report.md"]),
    "finetune": (["--steps", "2", "--images", "4"], ["strange.png"]),
    "evaluate": (["--images", "20"], ["reports/no guidance/report.md"]),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.example if name in LONG else ()) for name in SCRIPTS]
)
def test_script(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    arguments, written = SCRIPTS[name]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert [file for file in written if not (tmp_path / "outputs" / file).stat().st_size] == []
    assert capsys.readouterr().out


def test_the_animation_ends_with_the_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["stream", "cat"])
    names = runpy.run_path(str(EXAMPLES / "stream.py"))
    with Image.open("outputs/cat.gif") as animation:
        assert animation.n_frames == len({frame.tobytes() for frame in names["frames"]})
    assert names["stages"][-1].images[0].tobytes() == names["pipe"]("cat", seed=1)[0].tobytes()


def test_every_example_is_here_and_in_the_list():
    table = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    for file in EXAMPLES.glob("*.py"):
        assert f"({file.name})" in table
        assert (file.read_text(encoding="utf-8").split('"""')[1].splitlines()[0]).endswith(".")


@pytest.mark.example
def test_notebook(tmp_path: Path):
    nbformat, client = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    resources = {"metadata": {"path": str(tmp_path)}}
    client.NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources).execute()
    shown = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert sum("image/png" in output.get("data", {}) for output in shown) == 6


def test_the_notebook_keeps_its_output():
    assert NOTEBOOK.stat().st_size <= 1.5e6
    cells = [cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    pictures = [output["data"]["image/png"] for cell in cells for output in cell["outputs"] if "data" in output]
    assert len(pictures) == 6
    for picture in pictures:
        assert Image.open(io.BytesIO(base64.b64decode("".join(picture)))).width > 900
    assert not any(output.get("name") == "stderr" for cell in cells for output in cell["outputs"])
