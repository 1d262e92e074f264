import io
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from detailflow.data.batches import StreamedBatches
from detailflow.data.images import open_images
from detailflow.data.streams import open_stream
from detailflow.data.transforms import to_tensor
from detailflow.distributed import World
from detailflow.errors import DetailFlowError

from .conftest import write_tar

datasets = pytest.importorskip("datasets", reason="needs detailflow[train]")
pyarrow = pytest.importorskip("pyarrow", reason="needs detailflow[train]")
pytest.importorskip("pyarrow.parquet")
pytestmark = pytest.mark.usefixtures("cache")


def stream(data: str, batch_size: int = 20, seed: int = 1, **options: object) -> StreamedBatches:
    """Whole images as they are, so that each can be told from the others."""
    options = {"flip": False, "max_scale": 1.0, "buffer": 64, **options}
    return StreamedBatches(open_stream(data), 32, batch_size, seed, **options)


def batches(data: str, count: int, **options: object) -> list[tuple[torch.Tensor, torch.Tensor]]:
    iterator = iter(stream(data, **options))
    try:
        return list(islice(iterator, count))
    finally:
        iterator.close()


def same(some: list, others: list) -> bool:
    return all(torch.equal(a, b) and torch.equal(c, d) for (a, c), (b, d) in zip(some, others, strict=True))


def contents(some: list) -> Counter:
    return Counter(image.numpy().tobytes() for images, _ in some for image in images)


@pytest.fixture
def streamed_tables(hub: Callable[[Path], str], tables: Path) -> str:
    return hub(tables)


@pytest.fixture
def streamed_shards(hub: Callable[[Path], str], shards: Path) -> str:
    return hub(shards)


@pytest.fixture(scope="module")
def labels(cifar: Path) -> dict[bytes, int]:
    """The class of each of the 200 images by its contents."""
    source = open_images(cifar)
    numbers = [int(name.removeprefix("class")) for name in source.class_names]
    return {
        to_tensor(np.asarray(source.image(index))).numpy().tobytes(): numbers[source.labels[index]]
        for index in range(200)
    }


def test_an_epoch_holds_every_image_once_with_its_label(streamed_tables, labels):
    tables = streamed_tables
    source = open_stream(tables)
    assert source.class_names == tuple(f"class{k}" for k in range(10)) and source.num_images == 200
    assert stream(tables).steps_per_epoch == 10
    read = batches(tables, 20, workers=2)
    for images, numbers in read:
        assert images.shape == (20, 3, 32, 32) and images.dtype == torch.float32 and images.is_contiguous()
        assert numbers.dtype == torch.int64
        assert [labels[image.numpy().tobytes()] for image in images] == numbers.tolist()
    for epoch in (read[:10], read[10:]):
        assert contents(epoch) == Counter(labels.keys())
    assert not same(read[:10], read[10:])
    first = [labels[image.numpy().tobytes()] for images, _ in read for image in images]
    assert first != list(labels.values())


def test_shards_are_streamed_too(streamed_shards, labels):
    shards = streamed_shards
    source = open_stream(shards)
    assert source.class_names == ("image",) and source.num_images is None
    read = batches(shards, 20)
    assert contents(read[:10]) == contents(read[10:]) == Counter(labels.keys())
    assert not any(numbers.any() for _, numbers in read)
    with pytest.raises(DetailFlowError, match="does not say how many images it has"):
        _ = stream(shards).steps_per_epoch


def test_another_column_of_labels_is_asked_for(tables, tmp_path, hub):
    for file in sorted(tables.iterdir()):
        table = pyarrow.parquet.read_table(file)
        pyarrow.parquet.write_table(table.rename_columns(["image", "Labels"]), tmp_path / file.name)
    source = open_stream(hub(tmp_path))
    assert source.class_names == ("image",)
    assert source.summary.endswith(" has no column label: did you mean Labels (label_column: Labels)?")
    assert "did you mean" not in open_stream(hub(tables)).summary


@pytest.mark.parametrize("form", ["streamed_tables", "streamed_shards"])
def test_resume_is_exact_with_any_number_of_threads(request, form):
    data, crops = request.getfixturevalue(form), dict(batch_size=16, flip=True, max_scale=1.25)
    whole = batches(data, 29, **crops)  # 12½ in an epoch
    for start, workers in ((5, 3), (12, 1), (27, 2)):
        assert same(whole[start : start + 2], batches(data, 2, start_step=start, workers=workers, **crops))
    assert not same(whole[:2], batches(data, 2, **{**crops, "seed": 2}))


@pytest.mark.parametrize("form", ["streamed_tables", "streamed_shards"])
@pytest.mark.parametrize(
    "count", [2, 3]
)  # four files are dealt out to two processes; of three each takes every third image
def test_processes_share_an_epoch(request, form, count, labels):
    data = request.getfixturevalue(form)
    size = {2: 10, 3: 6}[count]
    parts = [batches(data, 24, batch_size=size * count, world=World(rank, count)) for rank in range(count)]
    assert all(images.shape == (size, 3, 32, 32) for part in parts for images, _ in part)
    epoch = sum((contents(part[: 200 // count // size]) for part in parts), Counter())
    assert set(epoch.values()) == {1} and len(epoch) == 200 // count // size * size * count
    last = World(count - 1, count)
    assert same(parts[-1][21:], batches(data, 3, batch_size=size * count, start_step=21, world=last))


def test_a_short_part_begins_again_where_the_epoch_is_not_over(tables, tmp_path, hub):
    shutil.copy(tables / "train-00000-of-00004.parquet", tmp_path / "train-0.parquet")
    shorter = pyarrow.parquet.read_table(tables / "train-00001-of-00004.parquet").slice(0, 10)
    pyarrow.parquet.write_table(shorter, tmp_path / "train-1.parquet")
    name = hub(tmp_path)
    long, short = (batches(name, 5, batch_size=12, world=World(rank, 2)) for rank in range(2))
    assert set(contents(long).values()) == {1}  # 30 of its 50 images
    assert set(contents(short).values()) == {3}  # its 10 images in three passes
    assert len(contents(short)) == 10


def spoiled(shards: Path, folder: Path, numbers: set[int]) -> Path:
    """The images as shards in which some images are none."""
    source = open_images(shards)
    for shard in range(4):
        members = []
        for index in range(shard * 50, shard * 50 + 50):
            key, start, size = source.name(index).split()[-1], *source._rows.spans[index].tolist()
            content = (shards / f"cifar-train-{shard:03d}.tar").read_bytes()[start : start + size]
            members.append((f"{key}.png", b"not an image" if index in numbers else content))
        write_tar(folder / f"{shard}.tar", members)
    return folder


@pytest.mark.filterwarnings("ignore:.*Another image takes its place")
def test_unreadable_images_are_replaced_and_named(shards, tmp_path, hub):
    bad = {3, 77, 78, 150}
    folder = hub(spoiled(shards, tmp_path / "set", bad))
    stream_ = stream(folder, workers=2)
    iterator = iter(stream_)
    read = list(islice(iterator, 10))
    iterator.close()
    assert len(stream_.bad) == 4
    for index in bad:
        assert any(f"{index // 50}.tar {index:03d} is not an image" in problem for problem in stream_.bad.values())
    clean = batches(hub(shards), 10)
    flat, expected = ([image for images, _ in some for image in images] for some in (read, clean))
    differs = [place for place in range(200) if not torch.equal(flat[place], expected[place])]
    assert len(differs) == 4  # every other image is where it would be
    for place in differs:
        following = next(k for k in range(place + 1, 220) if k not in differs)
        assert torch.equal(flat[place], expected[following])
    assert same(read[4:], batches(folder, 6, start_step=4))
    assert same(read, batches(folder, 10, workers=4))


@pytest.mark.filterwarnings("ignore:.*Another image takes its place")
def test_too_many_unreadable_images(shards, tmp_path, hub):
    folder = hub(spoiled(shards, tmp_path / "some", set(range(0, 200, 20))))
    with pytest.raises(
        DetailFlowError, match="at least [67] of the .* images of .* read so far cannot be read, more than 1%"
    ) as caught:
        batches(folder, 10)
    assert "is not an image" in str(caught.value)
    folder = hub(spoiled(shards, tmp_path / "all", set(range(200))))
    with pytest.raises(DetailFlowError, match="has only images in a row that cannot be read"):
        batches(folder, 1, batch_size=1)


def test_labels_outside_the_classes_are_unreadable(tables, tmp_path, hub):
    table = pyarrow.parquet.read_table(tables / "train-00001-of-00004.parquet")
    hidden = table.set_column(1, table.schema.field("label"), pyarrow.array([-1] * 50))
    pyarrow.parquet.write_table(hidden, tmp_path / "a.parquet")
    with (
        pytest.warns(UserWarning, match="has the label -1, not a number of the 10 classes"),
        pytest.raises(DetailFlowError),
    ):
        batches(hub(tmp_path / "a.parquet"), 1)


def table_of_paths(file: Path, paths: list[str]) -> Path:
    """A parquet file whose images are only named."""
    kind, marked = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()}), {"image": {"_type": "Image"}}
    metadata = {b"huggingface": json.dumps({"info": {"features": marked}}).encode()}
    rows = pyarrow.array([{"bytes": None, "path": path} for path in paths], kind)
    file.parent.mkdir(exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table({"image": rows}).replace_schema_metadata(metadata), file)
    return file


def test_rows_may_name_files_on_the_hub(cifar, tmp_path, monkeypatch, hub):
    files = sorted(cifar.rglob("*.png"))[:12]
    monkeypatch.setattr("fsspec.open", lambda url, mode: io.BytesIO(Path(url.removeprefix("hf:/")).read_bytes()))
    data = table_of_paths(tmp_path / "a.parquet", [f"hf:/{file}" for file in files])
    read = batches(hub(data), 1, batch_size=12)
    assert contents(read) == Counter(
        to_tensor(np.asarray(open_images(cifar).image(k))).numpy().tobytes() for k in range(12)
    )


@pytest.mark.filterwarnings("ignore:.*Another image takes its place")
def test_a_stream_reads_no_file_that_a_row_names(cifar, tmp_path, hub):
    secret = next(cifar.rglob("*.png"))
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "link.png").symlink_to(secret)
    for path in (
        secret.as_uri(),
        str(secret),
        os.path.relpath(secret, tmp_path / "set"),
        "link.png",
        f"simplecache::{secret.as_uri()}",
    ):
        data = table_of_paths(tmp_path / "set" / "a.parquet", [path] * 6)
        with pytest.raises(DetailFlowError, match="which is not (fetched|in the folder of its set)"):
            batches(hub(data), 1, batch_size=6)


def test_hub(tables, monkeypatch):
    """The hub itself is stood in for: what is tested is the name, the split, the number of images and the error."""
    load, asked = datasets.load_dataset, []

    def load_dataset(name: str, split: str, streaming: bool) -> object:
        asked.append((name, split, streaming))
        if name != "someone/cats":
            raise datasets.exceptions.DatasetNotFoundError(f"Dataset {name!r} doesn't exist on the Hub.\nMore.")
        stream = load("parquet", data_files=[str(file) for file in tables.iterdir()], split="train", streaming=True)
        stream.info.splits = datasets.SplitDict({"train": datasets.SplitInfo("train", num_examples=200)})
        return stream

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = open_stream("someone/cats")
    assert source.class_names[:2] == ("class0", "class1") and source.num_images == 200 and source.name == "someone/cats"
    images, numbers = next(iter(StreamedBatches(source, 32, 8, seed=0)))
    assert images.shape == (8, 3, 32, 32) and numbers.any()
    with pytest.raises(DetailFlowError, match="someone/nobody is neither .*, and on the hub it cannot") as caught:
        open_stream("someone/nobody", split="val")
    assert "\n" not in str(caught.value)
    assert asked == [("someone/cats", "train", True), ("someone/nobody", "val", True)]


def test_what_cannot_be_streamed(cifar, tables, shards, streamed_tables, streamed_shards):
    for data in (cifar, tables, shards, next(shards.iterdir())):
        with pytest.raises(DetailFlowError, match="is on this machine, and only hub data sets are streamed: leave"):
            open_stream(data)
    with pytest.raises(DetailFlowError, match="no column 'img': its columns are image, label"):
        open_stream(streamed_tables, image_column="img")
    with pytest.raises(DetailFlowError, match="no column 'breed'"):
        open_stream(streamed_tables, label_column="breed")
    with pytest.raises(DetailFlowError, match="no images in its column 'label'"):
        open_stream(streamed_tables, image_column="label")
    with pytest.raises(DetailFlowError, match="no column 'jpg': its columns are cls, png, __key__, __url__"):
        open_stream(streamed_shards, image_column="jpg")
    assert open_stream(streamed_shards, image_column="png").class_names == ("image",)
    with pytest.raises(DetailFlowError, match="a batch of 9 cannot be divided evenly among 2 processes"):
        stream(streamed_tables, 9, world=World(0, 2))


def test_damage_in_the_middle_ends_the_stream(tables, tmp_path, hub):
    content = bytearray((tables / "train-00000-of-00004.parquet").read_bytes())
    content[4:2000] = b"\xff" * 1996
    (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(DetailFlowError, match=r"someone/set-0 cannot be read any further") as caught:
        batches(hub(tmp_path / "a.parquet"), 1)
    assert "\n" not in str(caught.value)
