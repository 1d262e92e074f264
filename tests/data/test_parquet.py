"""Parquet files: what their names, labels and contents say, and what a small file may cost."""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from detailflow.data.images import open_images
from detailflow.errors import DetailFlowError

arrow = pytest.importorskip("pyarrow", reason="needs detailflow[train]")
parquet = pytest.importorskip("pyarrow.parquet")
pytest.importorskip("datasets", reason="needs detailflow[train]")
pytestmark = pytest.mark.usefixtures("cache")


def png(colour: tuple[int, int, int] = (0, 0, 0)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(file, "PNG")
    return file.getvalue()


RED, BLUE = png((255, 0, 0)), png((0, 0, 255))


def write(file: Path, images: list[Any], labels: Any = None, names: Any = None, metadata: bytes | None = None) -> Path:
    """Write a table of images (bytes or paths) and labels; `names` go into the Hugging Face metadata."""
    kind = arrow.struct({"bytes": arrow.binary(), "path": arrow.string()})
    cells = [{"path": image} if isinstance(image, str) else {"bytes": image} for image in images]
    table = arrow.table({"image": arrow.array(cells, kind)})
    if labels is not None:
        table = table.append_column("label", labels if isinstance(labels, arrow.Array) else arrow.array(labels))
    if names is not None:
        metadata = json.dumps({"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}).encode()
    if metadata is not None:
        table = table.replace_schema_metadata({b"huggingface": metadata})
    file.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table, file)
    return file


def colour(source: Any, index: int) -> str:
    return "red" if source.image(index).getpixel((0, 0))[0] else "blue"


def test_files_that_name_their_classes_differently_are_refused(tmp_path):
    write(tmp_path / "0.parquet", [RED, BLUE], [0, 1], ["cat", "dog"])
    write(tmp_path / "1.parquet", [RED, BLUE], [0, 1], ["dog", "cat"])
    with pytest.raises(DetailFlowError, match=r"1\.parquet names the classes dog, cat, and .*0\.parquet cat, dog"):
        open_images(tmp_path)
    write(tmp_path / "1.parquet", [RED, BLUE], [0, 1])
    with pytest.raises(DetailFlowError, match=r"1\.parquet names no classes, and .*0\.parquet cat, dog"):
        open_images(tmp_path)


@pytest.mark.parametrize(
    "first, second", [([1, 2], ["10", "9"]), (["10", "9"], [1, 2]), ([1, 2], None), (None, [1, 2])]
)
def test_files_with_different_columns_are_refused(tmp_path, first, second):
    write(tmp_path / "0.parquet", [RED, BLUE], first)
    write(tmp_path / "1.parquet", [RED, BLUE], second)
    with pytest.raises(DetailFlowError, match=r"1\.parquet has .* 'label', and .*0\.parquet"):
        open_images(tmp_path)


def test_a_file_that_is_replaced_is_read_again(tmp_path):
    file = tmp_path / "a.parquet"
    for image, label in ((RED, 0), (BLUE, 1)):
        write(file, [image, image], [label, label])
        os.utime(file, (1e9, 1e9))
        source = open_images(file)
        assert colour(source, 1) == ("blue" if label else "red") and source.labels.tolist() == [label, label]
    os.replace(write(tmp_path / "new", [RED, BLUE], [0, 1]), file)
    os.utime(file, (1e9, 1e9))
    assert [colour(open_images(file), k) for k in range(2)] == ["red", "blue"]


@pytest.mark.parametrize("folder", ["p[1]", "zip::b", "a{b}", "x*y", "q?"])
@pytest.mark.skipif(os.name == "nt", reason="Windows has no such names")
def test_paths_are_no_patterns(tmp_path, folder):
    write(tmp_path / folder / "x?.parquet", [RED], [0])
    write(tmp_path / folder / "xy.parquet", [BLUE], [1])
    source = open_images(tmp_path / folder)
    assert [colour(source, k) for k in range(2)] == ["red", "blue"] and source.labels.tolist() == [0, 1]
    assert source.name(1).endswith("xy.parquet row 0")


def repeated(value: Any, rows: int, kind: Any) -> Any:
    return arrow.DictionaryArray.from_arrays(np.zeros(rows, np.int32), arrow.array([value], kind))


def test_a_small_file_does_not_become_a_large_one(tmp_path, monkeypatch):
    """What all rows share is stored once: half a megabyte on the disk may be gigabytes of images or labels."""
    monkeypatch.setattr("detailflow.data.parquet._EXPANDED", 2**24)  # a sixteenth, to write less
    file, big = tmp_path / "a.parquet", np.random.default_rng(0).bytes(2**19)
    parquet.write_table(arrow.table({"image": repeated(big, 200, arrow.binary())}), file, store_schema=False)
    with pytest.raises(DetailFlowError, match=r"a\.parquet grows from .* bytes to more than"):
        open_images(file)
    parquet.write_table(arrow.table({"image": [bytes(2**25)]}), file, compression="zstd")
    with pytest.raises(DetailFlowError, match=r"a\.parquet grows from .* bytes to 33,55.* as it is read"):
        open_images(file)
    parquet.write_table(arrow.table({"image": arrow.nulls(3_000_000, arrow.binary())}), file, store_schema=False)
    with pytest.raises(DetailFlowError, match=r"a\.parquet has 3,000,000 rows in [\d,]+ bytes"):
        open_images(file)
    columns = {"image": repeated(RED, 100_000, arrow.binary()), "label": repeated("x" * 2**19, 100_000, arrow.string())}
    parquet.write_table(arrow.table(columns), file, store_schema=False)
    assert len(open_images(file).class_names) == 1  # of 52 GB, were each label a text of its own
    columns["label"] = arrow.ListArray.from_arrays(arrow.array(range(100_001), "int32"), columns["label"])
    parquet.write_table(arrow.table(columns), file, store_schema=False)
    assert len(open_images(file).class_names) == 1  # as many lists of that text


def test_folders_of_parquet_files(tmp_path):
    for name in ("cat", "dog"):
        write(tmp_path / "hive" / f"label={name}" / "0.parquet", [RED])
        write(tmp_path / "plain" / name / "0.parquet", [RED])
    hive = open_images(tmp_path / "hive")
    assert hive.class_names == ("cat", "dog") and hive.labels.tolist() == [0, 1]
    plain = open_images(tmp_path / "plain")
    assert plain.class_names == ("image",)
    assert "in folders (cat, dog), which give no labels: add a column 'label'" in plain.summary
    inner = shutil.copytree(tmp_path / "hive", tmp_path / "label=experiment" / "set")
    assert open_images(inner).class_names == ("cat", "dog")  # no folder above the set says what its images are
    assert open_images(inner / "label=cat").class_names == ("cat",)
    assert open_images(inner.parent).class_names == ("cat", "dog")  # and the nearest one goes first
    (inner / "label=cat" / "0.parquet").rename(inner / "0.parquet")
    shutil.rmtree(inner / "label=dog")
    assert open_images(inner).class_names == ("image",)


def test_the_folder_of_rows_without_a_label_is_no_class(tmp_path):
    """Hive and Spark call it so; it was a class of this name."""
    write(tmp_path / "label=__HIVE_DEFAULT_PARTITION__" / "0.parquet", [RED])
    assert open_images(tmp_path).class_names == ("image",)
    write(tmp_path / "label=cat" / "0.parquet", [RED])
    with pytest.raises(
        DetailFlowError, match=r"PARTITION__/0\.parquet row 0 has no label: give every image one, or none"
    ):
        open_images(tmp_path)
    inner = tmp_path / "label=outer" / "kind=__HIVE_DEFAULT_PARTITION__"
    write(inner / "0.parquet", [RED])
    assert open_images(inner, label_column="kind").class_names == ("image",)
    assert open_images(inner.parent).class_names == ("outer",)


@pytest.mark.parametrize("column", ["labels", "Label", "class_name", "category"])
def test_another_column_of_labels_is_asked_for(tmp_path, column):
    """The images had no classes, without a word."""
    table = arrow.table({"image": [RED, BLUE], "text": ["a", "b"], column: ["cat", "dog"]})
    for folder in ("x", "y", "label=cat"):
        (tmp_path / folder).mkdir()
        parquet.write_table(table, tmp_path / folder / "0.parquet")
    question = f"x/0.parquet has no column label: did you mean {column} (label_column: {column})?"
    for data in (f"{tmp_path}/x", f"{tmp_path}/[xy]/*"):  # before the folders, which are asked for, too
        source = open_images(data)
        assert source.class_names == ("image",) and source.summary.endswith(question)
    assert open_images(tmp_path / "x", label_column=column).counts == {"cat": 1, "dog": 1}
    assert "did you mean" not in open_images(tmp_path / "x", image_column="image", label_column="text").summary
    assert "did you mean" not in open_images(tmp_path / "label=cat").summary
    assert "did you mean" not in open_images(write(tmp_path / "a.parquet", [RED])).summary
    parquet.write_table(arrow.table({"class_image": [RED]}), tmp_path / "a.parquet")
    assert "did you mean" not in open_images(tmp_path / "a.parquet", image_column="class_image").summary


@pytest.mark.parametrize("names", ["cat", {"0": "cat"}, [1, 2], [None, ["x"]]])
def test_names_of_classes_are_texts(tmp_path, names):
    with pytest.raises(DetailFlowError, match=r"a\.parquet does not name its classes in a list of texts"):
        open_images(write(tmp_path / "a.parquet", [RED, BLUE], [0, 1], names))


@pytest.mark.parametrize(
    "metadata", [b"[" * 100_000, b"{", b"\xff", b'{"info": {"features": {"label": {"names": [' + b"[" * 10_000]
)
def test_metadata_that_is_none(tmp_path, metadata):
    with pytest.raises(DetailFlowError, match=r"a\.parquet has damaged Hugging Face metadata"):
        open_images(write(tmp_path / "a.parquet", [RED], [0], metadata=metadata))


@pytest.mark.parametrize("metadata", [b"[]", b"1", b'{"info": 3}', b'{"info": {"features": []}}', b'{"pandas": {}}'])
def test_metadata_of_something_else(tmp_path, metadata):
    assert open_images(write(tmp_path / "a.parquet", [RED], [0], metadata=metadata)).class_names == ("0",)


def test_labels_of_every_type(tmp_path):
    words = arrow.array(["dog", "cat"]).dictionary_encode()
    assert open_images(write(tmp_path / "a.parquet", [RED, BLUE], words)).class_names == ("cat", "dog")
    for kind in ("int8", "uint16", "int64", "uint64"):
        file = write(tmp_path / "a.parquet", [RED, BLUE], arrow.array([1, 0], kind))
        assert open_images(file).labels.tolist() == [1, 0]
    source = open_images(write(tmp_path / "a.parquet", [RED, BLUE], arrow.array([True, False])))
    assert source.labels.tolist() == [1, 0] and source.class_names == ("0", "1")
    assert open_images(write(tmp_path / "a.parquet", [RED], arrow.nulls(1))).class_names == ("image",)
    for number in (arrow.array([2**63, 1], "uint64"), arrow.array([2**63 - 1, 1]), arrow.array([30_000_000, 0])):
        with pytest.raises(DetailFlowError, match="label of 1,000,000 or more"):
            open_images(write(tmp_path / "a.parquet", [RED, BLUE], number))
    kinds = [arrow.float32(), arrow.decimal128(38), arrow.binary(), arrow.timestamp("us"), arrow.list_(arrow.float32())]
    for kind in kinds:
        with pytest.raises(
            DetailFlowError, match="no labels in its column 'label', but .*: give class numbers or names"
        ):
            open_images(write(tmp_path / "a.parquet", [RED], arrow.nulls(1, kind)))


LISTS = [["a"], ["b", "c"], ["a"]]


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (arrow.list_(arrow.string()), LISTS),
        (arrow.large_list(arrow.string()), LISTS),
        (arrow.list_(arrow.string(), 2), [["a", "b"], ["b", "c"], ["a", "c"]]),
        (arrow.list_(arrow.dictionary(arrow.int32(), arrow.string())), LISTS),
        (arrow.list_(arrow.int64()), [[0], [1, 2], [0]]),
        (arrow.string_view(), ["a", "b", "c"]),
        (arrow.dictionary(arrow.int32(), arrow.string()), ["a", "b", "c"]),
    ],
    ids=str,
)
def test_labels_in_several_row_groups(tmp_path, kind, values):
    """Lists of texts ended in pyarrow's own error: it makes no list of dictionaries of several groups."""
    cells = [{"bytes": RED}] * 3
    parquet.write_table(arrow.table({"image": cells, "label": arrow.array(values, kind)}), tmp_path / "a.parquet", 2)
    source = open_images(tmp_path / "a.parquet")
    assert len(source.class_names) == 3
    table = source.all_labels.reshape(3, -1).tolist()
    names = [[source.class_names[number] for number in row if number >= 0] for row in table]
    assert names == [list(map(str, value if isinstance(value, list) else [value])) for value in values]


def test_images_without_a_struct_or_with_another_one(tmp_path):
    for kind in (arrow.binary(), arrow.large_binary(), arrow.binary_view()):
        parquet.write_table(arrow.table({"image": arrow.array([RED, BLUE], kind)}), tmp_path / "a.parquet")
        source = open_images(tmp_path / "a.parquet")
        assert [colour(source, index) for index in (0, 1)] == ["red", "blue"]
    parquet.write_table(arrow.table({"image": [{"data": RED}]}), tmp_path / "b.parquet")
    with pytest.raises(DetailFlowError, match="no images in its column 'image': .* struct<data: binary>"):
        open_images(tmp_path / "b.parquet")


DAMAGED = """
import sys
from detailflow.data import open_images
from detailflow.errors import DetailFlowError
path, start, end = sys.argv[1], *map(int, sys.argv[2:])
content = open(path, "rb").read()
for place in range(start, min(end, len(content))):
    open(f"{path}.damaged.parquet", "wb").write(content[:place] + bytes([content[place] ^ 6]) + content[place + 1 :])
    try:
        open_images(f"{path}.damaged.parquet")
    except DetailFlowError:
        pass
"""


@pytest.mark.parametrize("labels", [["a", "b", "a"], LISTS], ids=["texts", "lists"])
def test_every_damaged_byte_of_a_file_is_survived(tmp_path, labels):
    """Some ended the process, in C++ code of pyarrow's, and others in errors of kinds that were not expected."""
    file = write(tmp_path / "a.parquet", [RED, BLUE, RED], labels)
    argv = [sys.executable, "-c", DAMAGED, str(file), "0", str(10**6)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr[-500:]) == (0, "")


def test_a_label_that_its_dictionary_lacks():
    from detailflow.data.parquet import _plain

    for places in ([0, 2], [-1, 0]):
        indices = arrow.array(places, arrow.int32())
        damaged = arrow.DictionaryArray.from_arrays(indices, arrow.array(["a", "b"]), safe=False)
        with pytest.raises(ValueError, match="it has no text"):
            list(_plain(damaged))


def test_fewer_labels_than_rows(tmp_path, monkeypatch):
    file = write(tmp_path / "a.parquet", [RED, BLUE], ["a", "b"])
    monkeypatch.setattr("detailflow.data.parquet._plain", lambda chunk: ["a"])
    with pytest.raises(DetailFlowError, match="a.parquet has 1 rows, but its footer says 2: it is damaged"):
        open_images(file)


@pytest.mark.parametrize("left", [0, 100, 0.5, 0.99])
def test_a_damaged_copy_is_made_again(tmp_path, monkeypatch, left):
    """Once it was kept for good, and the images were said to be damaged."""
    file = write(tmp_path / "a.parquet", [np.random.default_rng(k).bytes(3000) for k in range(600)], [0] * 600)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    expected = open_images(file).stored_bytes(599)
    (copy,) = (tmp_path / "cache").rglob("*.arrow")
    content = copy.read_bytes()
    copy.write_bytes(content[: left if isinstance(left, int) else int(left * len(content))])
    assert open_images(file).stored_bytes(599) == expected and copy.read_bytes() == content


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_rows_that_name_no_regular_file(tmp_path):
    """None of them may wait for ever, nor keep the others from being looked at."""
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "a.png").write_bytes(RED)
    source = open_images(write(tmp_path / "a.parquet", ["a.png", "pipe.png", "a\0.png", "."]))
    assert "8×8" in source.summary and colour(source, 0) == "red"
    for index in range(1, 4):
        for read in (source.image, source.size, source.stored_bytes):
            with pytest.raises(DetailFlowError, match=f"row {index} "):
                read(index)
    os.mkfifo(tmp_path / "pipe.parquet")
    with pytest.raises(DetailFlowError, match=r"neither a folder of images nor|not a regular file|does not exist"):
        open_images(tmp_path / "pipe.parquet")


def test_a_damaged_page_is_named(tmp_path):
    file = write(tmp_path / "a.parquet", [np.random.default_rng(k).bytes(3000) for k in range(10)], [0] * 10)
    content = bytearray(file.read_bytes())
    content[4:3000] = b"\xff" * 2996
    file.write_bytes(content)
    with pytest.raises(DetailFlowError, match=r"a\.parquet cannot be read") as caught:
        open_images(file)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("twice", ["image", "label"])
def test_two_columns_of_one_name(tmp_path, twice):
    table = arrow.table([[png()], [0], [png()]], names=["image", "label", "other"])
    names = ["image", "label", twice] if twice == "image" else ["image", "label", "label"]
    parquet.write_table(table.rename_columns(names), tmp_path / "a.parquet")
    with pytest.raises(DetailFlowError, match=rf"a\.parquet has 2 columns '{twice}': give each a name of its own"):
        open_images(tmp_path / "a.parquet")


def test_names_of_columns_that_are_no_text(tmp_path):
    content = write(tmp_path / "a.parquet", [png()], [0]).read_bytes()
    for name in (b"image", b"label", b"bytes"):
        damaged = content.replace(name, b"\xff" + name[1:])
        assert damaged != content
        (tmp_path / "a.parquet").write_bytes(damaged)
        with pytest.raises(DetailFlowError, match=r"a\.parquet "):
            open_images(tmp_path / "a.parquet")
