"""Images with several labels: every way to write them, the token store that keeps them, and the draw of one a step."""

import io
import json
import tarfile
import zlib
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from detailflow.cli.main import main
from detailflow.data import open_images
from detailflow.data.streams import open_stream
from detailflow.data.token_batches import TokenBatches
from detailflow.data.token_writer import TokenWriter
from detailflow.data.tokens import TokenStore, TokenStoreInfo
from detailflow.errors import DetailFlowError
from detailflow.training import validation
from detailflow.training.config import Extraction
from detailflow.training.extract import extract
from detailflow.training.validation import held_out

pytestmark = pytest.mark.usefixtures("cache")
LABELS = [["cat", "night"], ["dog"], ["dog", "cat", "night"], ["night"]]
NAMES = ("cat", "dog", "night")
TABLE = [[0, 2, -1], [1, -1, -1], [1, 0, 2], [2, -1, -1]]


def png(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def folder(top: Path, metadata: str, content: str) -> Path:
    top.mkdir(exist_ok=True)
    for i in range(len(LABELS)):
        (top / f"{i}.png").write_bytes(png(50 * i))
    (top / metadata).write_text(content)
    return top


def as_csv(top: Path) -> Path:
    rows = [f"{i}.png,{' ; '.join(labels)}" for i, labels in enumerate(LABELS)]
    return folder(top, "metadata.csv", "\n".join(["file_name,label", *rows]))


def as_jsonl(top: Path) -> Path:
    rows = [{"file_name": f"{i}.png", "label": labels} for i, labels in enumerate(LABELS)]
    return folder(top, "metadata.jsonl", "\n".join(map(json.dumps, rows)))


def as_shard(top: Path) -> Path:
    members = [(f"{i}.png", png(50 * i)) for i in range(len(LABELS))]
    members += [(f"{i}.json", json.dumps({"label": labels}).encode()) for i, labels in enumerate(LABELS)]
    top.mkdir()
    with tarfile.open(top / "0.tar", "w") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return top / "0.tar"


def as_parquet(top: Path, labels: Any = LABELS, feature: Any = None) -> Path:
    import datasets
    import pyarrow.parquet

    images = [{"bytes": png(50 * i), "path": None} for i in range(len(LABELS))]
    features = datasets.Features(
        {"image": datasets.Image(), "label": feature or datasets.List(datasets.Value("string"))}
    )
    top.mkdir(exist_ok=True)
    datasets.Dataset.from_dict({"image": images, "label": labels}, features).to_parquet(str(top / "0.parquet"))
    assert pyarrow.types.is_list(pyarrow.parquet.read_schema(top / "0.parquet").field("label").type)
    return top / "0.parquet"


def as_numbers(top: Path) -> Path:
    import datasets

    numbers = [[NAMES.index(label) for label in labels] for labels in LABELS]
    return as_parquet(top, numbers, datasets.List(datasets.ClassLabel(names=list(NAMES))))


def as_saved(top: Path) -> Path:
    import datasets

    datasets.load_dataset("parquet", data_files=str(as_numbers(top)), split="train").save_to_disk(str(top / "saved"))
    return top / "saved"


@pytest.mark.parametrize("write", [as_csv, as_jsonl, as_shard, as_parquet, as_numbers, as_saved])
def test_every_way_to_write_them(write: Any, tmp_path: Path):
    source = open_images(write(tmp_path / "set"))
    assert source.class_names == NAMES and source.all_labels.tolist() == TABLE
    assert source.labels.tolist() == [0, 1, 1, 2] and source.counts == {"cat": 2, "dog": 2, "night": 3}
    assert "4 images with 7 labels in 3 classes (cat 2, dog 2, night 3)" in source.summary
    part = source.subset([2, 3])
    assert part.all_labels.tolist() == TABLE[2:] and part.labels.tolist() == [1, 2]


def test_a_stream_takes_the_first(hub: Any, tmp_path: Path):
    from detailflow.distributed import World

    stream = open_stream(hub(as_numbers(tmp_path / "set")))
    records = list(stream.records(np.random.default_rng(0), 1, World()))
    assert sorted(stream.decode(record, "a row", 8)[1] for record in records) == [0, 1, 1, 2]


def test_another_second_label_is_another_set(tmp_path: Path):
    before = open_images(as_csv(tmp_path / "set")).fingerprint
    path = tmp_path / "set" / "metadata.csv"
    path.write_text(path.read_text().replace("cat ; night", "cat ; dog", 1))
    assert open_images(tmp_path / "set").fingerprint != before


def test_repeated_and_empty_ones_do_not_count(tmp_path: Path):
    rows = "file_name,label\n0.png,cat;cat;\n1.png,;dog\n2.png,dog\n3.png,cat"
    assert open_images(folder(tmp_path / "a", "metadata.csv", rows)).all_labels.tolist() == [[0], [1], [1], [0]]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["cat;dog", "", "cat", "cat"], r"1\.png has no label: give every image one, or none"),
        ([";".join(map(str, range(65))), "1", "2", "3"], r"0\.png has 65 labels, and an image may have 64"),
        (
            ["cat,night", "dog"],
            r"row 1 has 3 cells, and the first row names 2 columns: .* write several labels as cat;dog",
        ),
    ],
)
def test_what_is_refused(rows: list[str], message: str, tmp_path: Path):
    text = "\n".join(["file_name,label", *(f"{i}.png,{label}" for i, label in enumerate(rows))])
    with pytest.raises(DetailFlowError, match=message):
        open_images(folder(tmp_path / "set", "metadata.csv", text))


@pytest.mark.parametrize("label", [[["cat"]], [1.5], [{"a": 1}], [True]])
def test_lists_of_other_things_are_refused(label: Any, tmp_path: Path):
    row = json.dumps({"file_name": "0.png", "label": label})
    with pytest.raises(DetailFlowError, match="neither a class number nor a name"):
        open_images(folder(tmp_path / "set", "metadata.jsonl", row))


@pytest.mark.parametrize("vectors", [["100", "010", "001", "011"], ["10", "01", "01", "10"]])
@pytest.mark.parametrize("file", ["metadata.jsonl", "metadata.csv"])
def test_a_place_for_each_class_is_no_list_of_classes(vectors: list[str], file: str, tmp_path: Path):
    rows = [{"file_name": f"{i}.png", "label": [int(one) for one in vector]} for i, vector in enumerate(vectors)]
    content = list(map(json.dumps, rows))
    if file.endswith(".csv"):
        content = ["file_name,label", *(f"{i}.png,{';'.join(vector)}" for i, vector in enumerate(vectors))]
    with pytest.raises(DetailFlowError, match="lists of zeros and ones as labels, a place for each class: give class"):
        open_images(folder(tmp_path / "set", file, "\n".join(content)))


def test_both_of_two_classes_for_every_image(tmp_path: Path):
    rows = "\n".join(json.dumps({"file_name": f"{i}.png", "label": [0, 1]}) for i in range(len(LABELS)))
    assert open_images(folder(tmp_path / "set", "metadata.jsonl", rows)).all_labels.tolist() == [[0, 1]] * 4


def test_lists_of_one_length(tmp_path: Path):
    import pyarrow
    import pyarrow.parquet

    kinds = [pyarrow.list_(pyarrow.int64(), 2), pyarrow.large_list(pyarrow.int64())]
    for i, kind in enumerate(kinds):
        labels = pyarrow.array([[0, 2], [1, 2], [1, 0], [2, 1]], kind)
        pyarrow.parquet.write_table(
            pyarrow.table({"image": [png(i) for i in range(4)], "label": labels}), tmp_path / "0.parquet"
        )
        source = open_images(tmp_path / "0.parquet")
        assert source.all_labels.tolist() == labels.to_pylist() and source.class_names == ("0", "1", "2")


def test_trailing_separators_are_no_cells(tmp_path: Path):
    text = "file_name,label\n0.png,cat,,\n1.png,dog,\n"
    assert open_images(folder(tmp_path / "set", "metadata.csv", text)).class_names == ("cat", "dog")


def test_a_table_that_names_no_columns_is_asked_about(tmp_path: Path):
    source = open_images(folder(tmp_path / "set", "metadata.csv", "0.png,cat\n1.png,dog\n"))
    assert "metadata.csv has no column file_name, so it is not used: does its first row name the" in source.summary


def test_a_table_of_another_encoding(tmp_path: Path):
    made = folder(tmp_path / "set", "metadata.csv", "")  # as spreadsheets write it
    (made / "metadata.csv").write_bytes("file_name,label\n0.png,café\n".encode("utf-16"))
    with pytest.raises(DetailFlowError, match=r"metadata\.csv cannot be read .*: save it as UTF-8"):
        open_images(made)


def test_no_class_loses_all_its_images_to_validation(tmp_path: Path):
    """Of dog and night some image stays, also where they are second labels."""
    source = open_images(as_csv(tmp_path / "set"))
    kept = [i for i in range(4) if i not in held_out(source, 0.9)]
    assert {0, 1, 2} <= set(source.all_labels[kept].ravel().tolist())


def test_images_with_fewer_labels_are_no_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Else "every class keeps one" took an image out of validation, as if its missing labels were a class."""
    rows = ["file_name,label", "0.png,cat", "1.png,cat;dog", "2.png,cat;dog"]
    source = open_images(folder(tmp_path / "set", "metadata.csv", "\n".join(rows)))
    draws = iter([0.1, 0.5, 0.6])
    monkeypatch.setattr(validation, "_digest", lambda *_: int(next(draws) * 2**64).to_bytes(8, "big"))
    assert source.all_labels.tolist() == [[0, -1], [0, 1], [0, 1]]
    assert held_out(source, 0.2) == [0]  # the only image that has one label


def test_the_report_on_a_set(tmp_path: Path, capsys: Any):
    assert main(["data", str(as_jsonl(tmp_path / "set"))]) == 0
    assert "4 images with 7 labels in 3 classes" in capsys.readouterr().out


# --- the token store -------------------------------------------------------------------------------------------------


@pytest.fixture
def store(model: Path, tmp_path: Path) -> TokenStore:
    return extract(Extraction(str(as_csv(tmp_path / "set")), str(model), crops="two"), tmp_path / "tokens", "cpu")


def test_the_store_keeps_all_of_them(store: TokenStore, model: Path, tmp_path: Path):
    assert store.all_labels.tolist() == TABLE and store.labels.tolist() == [0, 1, 1, 2]
    assert store.counts == {"cat": 2, "dog": 2, "night": 3}
    store.verify()
    again = Extraction(str(tmp_path / "set"), str(model), crops="two")
    assert extract(again, tmp_path / "tokens", "cpu").fingerprint == store.fingerprint
    path = tmp_path / "set" / "metadata.csv"
    path.write_text(path.read_text().replace("cat ; night", "cat ; dog", 1))
    with pytest.raises(DetailFlowError, match="tokens of other labels"):
        extract(again, tmp_path / "tokens", "cpu")


def test_damaged_labels_are_found(store: TokenStore):
    path = store.directory / "more-labels.bin"
    content = path.read_bytes()
    path.write_bytes(b"\0" * len(content))
    with pytest.raises(DetailFlowError, match=r"more-labels\.bin is damaged"):
        TokenStore.open(store.directory).verify()
    path.write_bytes(b"\7" * len(content))
    with pytest.raises(DetailFlowError, match="labels beyond the store's classes"):
        TokenStore.open(store.directory)
    path.unlink()
    with pytest.raises(DetailFlowError, match=r"more-labels\.bin is missing"):
        TokenStore.open(store.directory)
    manifest = json.loads((store.directory / "manifest.json").read_text())
    for number in (True, -1, "2"):
        (store.directory / "manifest.json").write_text(json.dumps(manifest | {"more_labels": number}))
        with pytest.raises(DetailFlowError):
            TokenStore.open(store.directory)


def test_each_label_is_drawn_as_often(store: TokenStore):
    counts = np.zeros((4, 3), int)
    codes = {store.codes[slot, crop, 0].tobytes(): slot for slot in range(4) for crop in range(2)}
    batches = TokenBatches(store, 4, seed=0, planted_share=0.0)
    for labels, inputs, _ in islice(batches, 600):
        slots = [codes[row.astype("<u2").tobytes()] for row in inputs.numpy()]
        np.add.at(counts, (slots, labels.numpy()), 1)
    for slot, labels in enumerate(TABLE):
        known = [label for label in labels if label >= 0]
        assert counts[slot].sum() == counts[slot, known].sum() == 600
        assert counts[slot, known].min() > 0.8 * 600 / len(known)


def test_a_draw_depends_on_the_step_alone(store: TokenStore):
    from detailflow.distributed import World

    whole = [batch[0].tolist() for batch in islice(TokenBatches(store, 4, seed=3), 10)]
    assert [batch[0].tolist() for batch in islice(TokenBatches(store, 4, seed=3, start_step=4), 6)] == whole[4:]
    parts = [islice(TokenBatches(store, 4, seed=3, world=World(rank, 2)), 10) for rank in range(2)]
    assert [a[0].tolist() + b[0].tolist() for a, b in zip(*parts, strict=True)] == whole


def test_one_label_is_stored_as_before(tmp_path: Path):
    """Stores of version 0.1 are read, and those of one label an image are written as they were."""
    info = TokenStoreInfo(4, 8, 1, ("cat", "dog"), "")
    for name, labels in (("flat", np.array([0, 1])), ("table", np.array([[0], [1]]))):
        writer = TokenWriter(tmp_path / name, info, labels, 8)
        writer.begin(["a", "b"], {})
        writer.write(0, np.zeros((2, 1, 3, 4), np.int64), {})
        writer.finish()
        manifest = json.loads((tmp_path / name / "manifest.json").read_text())
        assert "more_labels" not in manifest and not (tmp_path / name / "more-labels.bin").exists()
        assert manifest["source_labels_crc32"] == zlib.crc32(np.array([0, 1], "<i8").tobytes())
        assert TokenStore.open(tmp_path / name).labels.tolist() == [0, 1]
