"""What a row of a table may name: only files of its own set and of the public web."""

import io
import os
import socket
from pathlib import Path

import pytest
from PIL import Image

from detailflow.data.images import open_images
from detailflow.data.tables import check_columns, stored_image
from detailflow.errors import DetailFlowError

pyarrow = pytest.importorskip("pyarrow", reason="needs detailflow[train]")
pytest.importorskip("pyarrow.parquet")
pytestmark = pytest.mark.usefixtures("cache")


def png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    return file.getvalue()


def table(file: Path, rows: list[object]) -> Path:
    kind = (
        pyarrow.string()
        if isinstance(rows[0], str)
        else pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
    )
    pyarrow.parquet.write_table(pyarrow.table({"image": pyarrow.array(rows, kind)}), file)
    return file


def test_a_row_names_files_of_its_own_set_alone(tmp_path):
    secret = tmp_path / "secret.png"
    secret.write_bytes(png())
    own = tmp_path / "set"
    (own / "images").mkdir(parents=True)
    (own / "images" / "a.png").write_bytes(png())
    (own / "link.png").symlink_to(secret)
    (own / "out").symlink_to(tmp_path)
    paths = [
        "images/a.png",
        str(own / "images" / "a.png"),
        str(secret),
        "../secret.png",
        "images/../../secret.png",
        "link.png",
    ]
    paths += ["out/secret.png", secret.as_uri(), "https://example.com/a.png", "~/a.png", "images/gone.png"]
    source = open_images(table(own / "a.parquet", [{"bytes": None, "path": path} for path in paths]))
    for index in range(2):
        assert source.image(index).size == (8, 8)
    for index in range(2, 7):
        with pytest.raises(
            DetailFlowError, match=f"row {index} names .* not in the folder of its set: no other file is read"
        ):
            source.image(index)
    for index in (7, 8):
        with pytest.raises(DetailFlowError, match="not fetched: URLs are read only from hub data sets"):
            source.image(index)
    for index in (9, 10):
        with pytest.raises(DetailFlowError, match="does not exist"):
            source.image(index)
    with pytest.raises(DetailFlowError, match="not in the folder of its set"):
        stored_image({"path": "images/\0a.png"}, "row 1", [str(own)], False)


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/hostname",
        "FILE:///etc/hostname",
        "http://127.0.0.1/a.png",
        "http://example.com/a.png",
        "ftp://example.com/a.png",
        "s3://bucket/a.png",
        "local:///etc/hostname",
        "simplecache::file:///etc/hostname",
        "zip://a.png::file:///tmp/a.zip",
        "zip://a.png::https://example.com/a.zip",
        "hf://datasets/a/b/c.png::file:///etc/hostname",
        "memory://a.png",
    ],
)
def test_only_the_web_and_the_hub_are_fetched(url, tmp_path):
    with pytest.raises(DetailFlowError, match="row 1 names .*, which is not (fetched|in the folder)"):
        stored_image({"bytes": None, "path": url}, "row 1", [str(tmp_path)], urls=True)


def test_addresses_in_ones_own_network_are_not_fetched(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        for host in ("127.0.0.1", "localhost", "[::1]", "10.0.0.1", "169.254.169.254"):
            url = f"https://{host}:{server.getsockname()[1]}/a.png"
            with pytest.raises(DetailFlowError, match="is not an https:// address on the public web"):
                stored_image(url, "row 1", [str(tmp_path)], urls=True)
        with pytest.raises(BlockingIOError):  # nobody has called
            server.accept()


def test_a_redirect_leads_to_no_file():
    from detailflow.data.tables import _HttpsRedirects

    for url in ("file:///etc/hostname", "http://example.com/a.png", "ftp://example.com/a", "https://127.0.0.1/a.png"):
        with pytest.raises(DetailFlowError, match="is not an https:// address on the public web"):
            _HttpsRedirects().redirect_request(None, None, 302, "Found", {}, url)


def test_a_saved_folder_names_no_files_elsewhere(tmp_path):
    datasets = pytest.importorskip("datasets", reason="needs detailflow[train]")
    features = datasets.Features({"image": datasets.Image(decode=False)})
    saved = datasets.Dataset.from_dict({"image": [{"bytes": png(), "path": None}]}, features)
    for name in ("other", "set"):
        saved.save_to_disk(str(tmp_path / name))
    assert len(open_images(tmp_path / "set")) == 1
    state = (tmp_path / "set" / "state.json").read_text()
    (tmp_path / "set" / "state.json").write_text(state.replace("data-00000", f"..{os.sep}other{os.sep}data-00000"))
    with pytest.raises(DetailFlowError, match="which is not in it: no other file is read"):
        open_images(tmp_path / "set")


def test_a_hub_data_set_names_files_of_its_own_download_alone(tmp_path, monkeypatch):
    """The hub itself is stood in for."""
    datasets = pytest.importorskip("datasets", reason="needs detailflow[train]")
    own, other = (tmp_path / "hub" / f"datasets--someone--{name}" / "a.png" for name in ("cats", "private"))
    for file in (own, other, tmp_path / "secret.png"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png())
    paths = [str(own), str(other), str(tmp_path / "secret.png"), other.as_uri()]
    file, load = table(tmp_path / "a.parquet", [{"bytes": None, "path": path} for path in paths]), datasets.load_dataset
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(
        datasets, "load_dataset", lambda name, split: load("parquet", data_files=str(file), split="train")
    )
    source = open_images("someone/cats")
    assert source.image(0).size == (8, 8)
    for index in range(1, 4):
        with pytest.raises(
            DetailFlowError, match=f"someone/cats train row {index} names .*, which is not (in the folder|fetched)"
        ):
            source.image(index)


def test_labels_are_no_files(tmp_path):
    datasets = pytest.importorskip("datasets", reason="needs detailflow[train]")
    features = datasets.Features({"image": datasets.Image(decode=False), "label": datasets.Image(decode=False)})
    cell = {"bytes": png(), "path": None}
    datasets.Dataset.from_dict({"image": [cell], "label": [cell]}, features).to_parquet(str(tmp_path / "a.parquet"))
    with pytest.raises(DetailFlowError, match="no labels in its column 'label'"):
        open_images(tmp_path / "a.parquet")


def test_only_images_are_images(tmp_path):
    """Videos, sounds and PDF files are stored like images, and other libraries would open them."""
    datasets = pytest.importorskip("datasets", reason="needs detailflow[train]")
    kinds = [getattr(datasets, name) for name in ("Audio", "Video", "Pdf") if hasattr(datasets, name)]
    for kind in kinds:
        with pytest.raises(DetailFlowError, match="a set has no images in its column 'image'"):
            check_columns("a set", datasets.Features({"image": kind(decode=False)}), "image", "label")
    assert kinds and not check_columns("a set", datasets.Features({"image": datasets.Image()}), "image", "label")


def test_rows_that_hold_no_image():
    for value, message in (
        (None, "row is empty"),
        ({"bytes": None, "path": ""}, "row is empty"),
        (3, "row holds int"),
        ({"bytes": [1]}, "holds list"),
    ):
        with pytest.raises(DetailFlowError, match=message):
            stored_image(value, "row 1", [], urls=True)
