"""Hub data sets and folders by `save_to_disk`: which names are asked for, and what a damaged folder may do."""

import io
import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from detailflow.data.images import open_images
from detailflow.data.streams import open_stream
from detailflow.errors import DetailFlowError

datasets = pytest.importorskip("datasets", reason="needs detailflow[train]")
HFValidationError = pytest.importorskip("huggingface_hub.errors").HFValidationError
pytestmark = pytest.mark.usefixtures("cache")


class _Touch:
    def __reduce__(self) -> Any:
        return os.mkdir, ("executed",)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub that knows one data set, which stands in for the real one."""

    def dataset_info(self: object, name: str) -> Any:
        if name not in ("cats", "lonely"):
            raise HFValidationError(f"{name} is not on the hub")
        return type("Info", (), {"id": "someone/cats" if name == "cats" else name})

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", dataset_info)


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("opened", [open_images, open_stream])
@pytest.mark.parametrize(
    "name", ["pandas", "parquet", "imagefolder", "csv", "json", "webdataset", "arrow", "text", "lonely"]
)
def test_no_kind_of_file_is_a_data_set(tmp_path, monkeypatch, name, opened):
    """`datasets` takes these names for kinds of files, and looks for them in the current folder."""
    monkeypatch.chdir(tmp_path)
    for suffix in ("pkl", "pandas", "parquet", "csv", "json", "txt"):
        (tmp_path / f"train.{suffix}").write_bytes(pickle.dumps(_Touch()))
    with pytest.raises(DetailFlowError, match=f"{name} is neither a file nor a folder here, and on the hub it cannot"):
        opened(name)
    assert not (tmp_path / "executed").exists()


@pytest.mark.usefixtures("hub")
def test_a_name_without_its_owner(monkeypatch):
    asked = []

    def load_dataset(name: str, split: str) -> Any:
        asked.append((name, split))
        raise ValueError("no network")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for name in ("cats", "someone/cats"):
        with pytest.raises(DetailFlowError, match=f"{name} is neither .*no network"):
            open_images(name)
    assert asked == [("someone/cats", "train")] * 2


def save(folder: Path, column: str = "label") -> Path:
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    label = datasets.ClassLabel(names=["cat", "dog"])
    features = datasets.Features({"image": datasets.Image(decode=False), column: label})
    cell = {"bytes": file.getvalue(), "path": None}
    datasets.Dataset.from_dict({"image": [cell], column: [1]}, features).save_to_disk(str(folder))
    return folder


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_a_saved_folder_of_pipes(tmp_path):
    folder = save(tmp_path / "set")
    assert open_images(folder).counts == {"cat": 0, "dog": 1}
    arrow = next(folder.glob("*.arrow"))
    arrow.unlink()
    with pytest.raises(DetailFlowError, match=r"\.arrow is missing"):
        open_images(folder)
    os.mkfifo(arrow)
    with pytest.raises(DetailFlowError, match=r"\.arrow is not a regular file"):
        open_images(folder)


def test_a_saved_selection(tmp_path):
    """The library writes the selected rows; once it wrote all of them and a file of which are meant."""
    folder = save(tmp_path / "set")
    datasets.load_from_disk(folder).select([0, 0, 0]).save_to_disk(tmp_path / "three")
    assert open_images(tmp_path / "three").counts == {"cat": 0, "dog": 3}
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(state | {"_indices_files": [{"filename": "indices.arrow"}]}))
    with pytest.raises(DetailFlowError, match="set is a selection as old versions of `datasets` wrote it"):
        open_images(folder)


@pytest.mark.parametrize("names", ["cat", {"0": "cat"}, [1, 2], [None, ["x"]], 3])
def test_a_saved_folder_with_odd_names(tmp_path, names):
    info = save(tmp_path / "set") / "dataset_info.json"
    content = json.loads(info.read_text())
    content["features"]["label"]["names"] = names
    info.write_text(json.dumps(content))
    with pytest.raises(DetailFlowError, match="list of texts|is not a readable folder by `save_to_disk`"):
        open_images(tmp_path / "set")


def test_a_saved_folder_with_nested_settings(tmp_path):
    for name in ("dataset_info.json", "state.json"):
        (save(tmp_path / name) / name).write_text("[" * 100_000)
        with pytest.raises(DetailFlowError, match="is not a readable folder by `save_to_disk`"):
            open_images(tmp_path / name)


def test_another_column_of_labels_is_asked_for(tmp_path, monkeypatch):
    """The images had no classes, without a word."""
    folder = save(tmp_path / "set", "glass")
    assert "did you mean" not in open_images(folder).summary
    folder = save(tmp_path / "other", "fine_label")
    for data in (folder, "someone/cats"):
        monkeypatch.setattr(datasets, "load_dataset", lambda name, split, **_: datasets.load_from_disk(folder))
        source = open_images(data)
        question = f"{data} has no column label: did you mean fine_label (label_column: fine_label)?"
        assert source.class_names == ("image",) and source.summary.endswith(question)
        assert open_images(data, label_column="fine_label").counts == {"cat": 0, "dog": 1}
