import io
import json
import os
import pickle
import shutil
import sys
import warnings
from contextlib import nullcontext
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from detailflow.data.batches import ImageBatches
from detailflow.data.image_files import load_rgb
from detailflow.data.images import find, open_images
from detailflow.data.source import ImageSource
from detailflow.data.transforms import center_crop, random_crop, side_for_crops, to_tensor
from detailflow.errors import DetailFlowError, DetailFlowWarning

pytestmark = pytest.mark.usefixtures("cache")


def picture(index: int, size: int = 40) -> Image.Image:
    """A picture of its own for every index, noise so that crops of it tell each other apart."""
    pixels = np.random.default_rng(index).integers(0, 256, (size, size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """30 images, 10 in each of 3 classes."""
    for index in range(30):
        file = tmp_path / "set" / ("cat", "dog", "frog")[index // 10] / f"{index:03}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        picture(index).save(file)
    return tmp_path / "set"


# ------------------------------------------------------------------------------------------------- one image


def test_plain_rgb_is_unchanged(tmp_path):
    picture(1).save(tmp_path / "a.png")
    for source in (tmp_path / "a.png", str(tmp_path / "a.png"), (tmp_path / "a.png").read_bytes()):
        image = load_rgb(source)
        assert image.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(image), np.asarray(picture(1)))


def saved(image: Image.Image, form: str = "PNG", **options: object) -> np.ndarray:
    file = io.BytesIO()
    image.save(file, form, **options)
    loaded = load_rgb(file.getvalue())
    assert loaded.mode == "RGB" and loaded.size == image.size
    return np.asarray(loaded)


def test_grey_modes():
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    expected = np.repeat(ramp[..., None], 3, axis=-1)
    np.testing.assert_array_equal(saved(Image.fromarray(ramp)), expected)
    np.testing.assert_array_equal(saved(Image.fromarray(ramp.astype(np.uint16) * 257)), expected)  # I;16
    np.testing.assert_array_equal(saved(Image.fromarray(ramp.astype(np.int32) * 257), "TIFF"), expected)  # I
    bits = saved(Image.fromarray(ramp > 127))
    np.testing.assert_array_equal(bits[..., 0], np.where(ramp > 127, 255, 0))


@pytest.mark.parametrize("mode", ["LA", "RGBA", "P"])
def test_transparency_lies_over_white(mode):
    image = Image.new("RGBA", (4, 2), (0, 0, 0, 255))
    image.paste((10, 10, 10, 0), (0, 0, 2, 2))
    pixels = saved(image.quantize(4) if mode == "P" else image.convert(mode))
    assert (pixels[:, :2] == 255).all() and (pixels[:, 2:] == 0).all()


def test_half_transparent():
    assert abs(int(saved(Image.new("RGBA", (2, 2), (0, 0, 0, 128)))[0, 0, 0]) - 127) <= 1


@pytest.mark.parametrize("mode", ["L", "RGB", "P"])
def test_transparent_colour(mode):
    image = Image.new("RGB", (4, 2), (204, 204, 204))
    image.paste((0, 0, 0), (0, 0, 2, 2))
    image = image.convert(mode)
    pixels = saved(image, transparency=(0, 0, 0) if mode == "RGB" else image.getpixel((0, 0)))
    assert (pixels[:, :2] == 255).all() and (pixels[:, 2:] == 204).all()


def test_opaque_palette_and_cmyk():
    red = Image.new("RGB", (4, 4), (255, 0, 0))
    assert (saved(red.convert("P")) == (255, 0, 0)).all()
    cmyk = saved(red.convert("CMYK"), "JPEG", quality=95)
    assert np.abs(cmyk.astype(int) - (255, 0, 0)).max() < 12


def test_exif_orientation():
    image = picture(2, 8).crop((0, 0, 8, 4))
    exif = Image.Exif()
    exif[0x0112] = 6  # as a phone held upright writes it: turn a quarter clockwise to show
    file = io.BytesIO()
    image.save(file, "PNG", exif=exif)
    loaded = load_rgb(file.getvalue())
    assert loaded.size == (4, 8)
    np.testing.assert_array_equal(np.asarray(loaded), np.rot90(np.asarray(image), -1))


def test_unreadable_images_are_named_in_one_sentence(tmp_path):
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "empty.png").touch()
    big = picture(3, 200)
    (tmp_path / "cut.png").write_bytes(png(big)[:5000])
    big.save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:5000])
    (tmp_path / "broken.png").write_bytes(png(big)[:60] + b"?" * 500 + png(big)[560:])
    for name, message in {
        "text.png": "is not an image",
        "empty.png": "is empty: it has 0 bytes",
        "cut.png": "is damaged",
        "cut.jpg": "is damaged",
        "broken.png": "is damaged",
        "missing.png": "does not exist",
        ".": "is a folder",
    }.items():
        with pytest.raises(DetailFlowError, match=message) as caught:
            load_rgb(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)


def test_a_jpeg_may_come_smaller_with_the_same_crops(cifar):
    original = Image.open(next(cifar.rglob("*.png")))
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    original.resize((600, 480), Image.Resampling.BICUBIC).save(file, "JPEG", quality=95, exif=exif)
    whole = load_rgb(file.getvalue())
    assert whole.size == (480, 600)
    for least, shorter in ((None, 480), (481, 480), (241, 480), (240, 240), (121, 240), (120, 120), (8, 60)):
        small = load_rgb(file.getvalue(), least=least)
        assert min(small.size) == shorter and abs(small.width / small.height - 0.8) < 0.01
    assert side_for_crops(96) == 240
    small = load_rgb(file.getvalue(), least=240)
    for draws in np.random.default_rng(0).random((8, 4)):
        difference = random_crop(small, 96, draws).astype(int) - random_crop(whole, 96, draws)
        assert np.abs(difference).mean() < 1
    with pytest.raises(DetailFlowError, match="is damaged"):
        load_rgb(file.getvalue()[:5000], least=60)


# ------------------------------------------------------------------------------------------------- folders


def test_class_folder(folder):
    (folder / "cat" / "notes.txt").write_text("not an image")
    (folder / "cat" / ".hidden.png").write_text("not an image")
    (folder / "dog" / "deeper").mkdir()
    picture(99).save(folder / "dog" / "deeper" / "a.JPEG")
    source = open_images(str(folder))
    assert len(source) == 31 and source.class_names == ("cat", "dog", "frog")
    assert source.labels.dtype == np.int64 and source.labels.tolist() == [0] * 10 + [1] * 11 + [2] * 10
    assert source.name(0) == str(folder / "cat" / "000.png")
    np.testing.assert_array_equal(np.asarray(source.image(3)), np.asarray(picture(3)))


def test_flat_folder(folder):
    source = open_images(folder / "dog")
    assert len(source) == 10 and source.class_names == ("image",) and source.labels.tolist() == [0] * 10


def test_split_folders(folder, tmp_path):
    for split in ("train", "val"):
        for name in ("bird", "train"):  # a class may be called train
            (tmp_path / "whole" / split / name).mkdir(parents=True)
            picture(1).save(tmp_path / "whole" / split / name / f"{split}.png")
    for split, found in ((None, "train"), ("train", "train"), ("val", "val"), ("validation", "val")):
        source = open_images(tmp_path / "whole", split=split)
        assert source.class_names == ("bird", "train") and source.name(1).endswith(f"{found}.png")
    with pytest.raises(DetailFlowError, match="no split 'test': it has train, val"):
        open_images(tmp_path / "whole", split="test")
    with pytest.raises(DetailFlowError, match="no split 'test'"):
        open_images(folder, split="test")


def test_wrong_folders(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DetailFlowError, match="empty holds no images"):
        open_images(tmp_path / "empty")
    for missing in (tmp_path / "nowhere", "./nowhere", "a/b/c", "photo.png", "gone.parquet"):
        with pytest.raises(DetailFlowError, match=f"{missing} does not exist"):
            open_images(missing)
    with pytest.raises(DetailFlowError, match="is neither a folder of images nor"):
        open_images(folder / "cat" / "000.png")
    with pytest.raises(DetailFlowError, match="matches no .parquet file"):
        open_images(str(folder / "*.parquet"))
    (folder / "bat").mkdir()
    with pytest.raises(DetailFlowError, match="bat holds no images"):
        open_images(folder)
    picture(1).save(folder / "stray.png")
    with pytest.raises(DetailFlowError, match="images beside its class subfolders .such as stray.png"):
        open_images(folder)


# ------------------------------------------------------------------------------------------------- fingerprints


def test_patterns_that_never_end(shards, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).symlink_to(".")
    for name in ("0.tar", "sub/1.tar", ".hidden/2.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(shards / "cifar-train-000.tar", tmp_path / name)
    assert [str(file) for file in find(f"{tmp_path}/**/*.tar").files] == [f"{tmp_path}/0.tar", f"{tmp_path}/sub/1.tar"]
    assert len(find(f"{tmp_path}/**").files) == 2 and len(find(f"{tmp_path}/a/[s]*/*.tar").files) == 1
    assert len(find(f"{tmp_path}/.hid*/*.tar").files) == 1
    (tmp_path / "more.tar").mkdir()  # Spark calls folders so
    shutil.copy(shards / "cifar-train-000.tar", tmp_path / "more.tar" / "part-0.tar")
    assert [Path(file).name for file in find(f"{tmp_path}/*.tar").files] == ["0.tar"]
    assert len(find(f"{tmp_path}/*.tar/*").files) == 1
    with pytest.raises(DetailFlowError, match=r"m\*\.tar matches only folders, such as .*more\.tar: give"):
        find(f"{tmp_path}/m*.tar")
    os.mkfifo(tmp_path / "pipe.tar")
    with pytest.raises(DetailFlowError, match=r"pipe\.tar is not a regular file"):
        find(f"{tmp_path}/pi*")
    for pattern in ("x{0..999999}/{0..999999}/{0..99}.tar", "x{0..1000}{0..1000}.tar", "{0..1000000}.tar"):
        with pytest.raises(DetailFlowError, match="is too long a range: it may name 1,000,000 files"):
            find(pattern)


def test_classes_of_one_name_are_counted_apart(folder):
    """As ImageNet has two cranes, a bird and a machine."""
    source = ImageSource(open_images(folder)._rows, np.repeat([0, 1, 2], 10), ("crane", "heron", "crane"))
    assert source.counts == {"crane (0)": 10, "heron": 10, "crane (2)": 10}
    assert "in 3 classes (crane (0) 10, heron 10, crane (2) 10)" in source.summary


def test_a_set_is_known_by_its_content_and_not_by_its_path(folder, tmp_path, monkeypatch):
    source = open_images(folder)
    assert source.counts == {"cat": 10, "dog": 10, "frog": 10}
    assert source.summary == f"{folder}: 30 images in 3 classes (cat 10, dog 10, frog 10), 40×40"
    known = source.fingerprint
    assert len(known) == 64 and int(known, 16)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("set")
    for path in ("set", "set/", "./set", "link", "set/../set", f"{folder}/"):
        assert open_images(path).fingerprint == known
    folder = folder.rename(tmp_path / "moved")
    assert open_images(folder).fingerprint == known
    picture(99).save(folder / "cat" / "more.png")
    assert open_images(folder).fingerprint != known
    (folder / "cat" / "more.png").rename(folder / "dog" / "more.png")
    more = open_images(folder).fingerprint
    picture(99, 41).save(folder / "dog" / "more.png")
    (folder / "dog").rename(folder / "hound")
    assert len({known, more, open_images(folder).fingerprint}) == 3


def test_tables_and_shards_are_known_by_content(tables, shards, tmp_path):
    for kind in (tables, shards):
        source = open_images(kind)
        copy = shutil.copytree(kind, tmp_path / kind.name)
        assert open_images(copy).fingerprint == source.fingerprint == open_images(f"{copy}/*").fingerprint
        assert sum(source.counts.values()) == 200 and "200 images in " in source.summary
        max(copy.iterdir()).unlink()
        with pytest.warns(UserWarning, match="-of-0000[0-9] only 3 are there") if kind == tables else nullcontext():
            assert open_images(copy).fingerprint != source.fingerprint


# ------------------------------------------------------------------------------------------------- parquet


def write_parquet(file: Path, images: list[bytes | None], labels: list | None, names: list[str] | None = None) -> Path:
    datasets = pytest.importorskip("datasets", reason="needs detailflow[train]")
    features = {"image": datasets.Image()}
    columns: dict[str, list] = {"image": [image and {"bytes": image, "path": None} for image in images]}
    if labels is not None:
        kind = datasets.Value("string" if isinstance(labels[0], str) else "int64")
        features["label"] = kind
        columns["label"] = labels
    file.parent.mkdir(parents=True, exist_ok=True)
    bars = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict(columns, datasets.Features(features)).to_parquet(str(file))
    if not bars:
        datasets.enable_progress_bars()
    if names:
        _write_names(file, names)
    return file


def _write_names(file: Path, names: list[str]) -> None:
    """Put class names into the metadata as older writers do, which let a name occur twice (ImageNet's crane)."""
    parquet = pytest.importorskip("pyarrow.parquet")
    table = parquet.read_table(file)
    label = {"names": names, "_type": "ClassLabel"}
    features = {"image": {"_type": "Image"}, "label": label}
    metadata = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    parquet.write_table(table.replace_schema_metadata(metadata), file)


def test_parquet_files(tmp_path, capfd):
    pictures = [png(picture(index)) for index in range(6)]
    pictures[3] = b"damaged"
    write_parquet(tmp_path / "d" / "train-00000-of-00002.parquet", pictures[:2], [0, 1], ["cat", "dog"])
    write_parquet(tmp_path / "d" / "train-00001-of-00002.parquet", [*pictures[2:4], None], [1, 1, 0], ["cat", "dog"])
    write_parquet(tmp_path / "d" / "test.parquet", pictures[4:], [0, 0], ["cat", "dog"])
    capfd.readouterr()
    for source in (open_images(tmp_path / "d"), open_images(str(tmp_path / "d" / "train-*.parquet"))):
        assert len(source) == 5 and source.class_names == ("cat", "dog") and source.labels.tolist() == [0, 1, 1, 1, 0]
        np.testing.assert_array_equal(np.asarray(source.image(2)), np.asarray(picture(2)))
        assert source.name(1).endswith("train-00000-of-00002.parquet row 1")
        with pytest.raises(DetailFlowError, match="train-00001-of-00002.parquet row 1 is not an image"):
            source.image(3)
        with pytest.raises(DetailFlowError, match="row 2 has no image"):
            source.image(4)
        again = pickle.dumps(source)  # as it goes to a worker process that is spawned
        assert len(again) < 20_000 and np.asarray(pickle.loads(again).image(0)).shape == (40, 40, 3)
    test = open_images(tmp_path / "d", split="test")
    assert len(test) == 2 and test.name(0).endswith("test.parquet row 0")
    assert len(open_images(tmp_path / "d" / "test.parquet")) == 2
    assert capfd.readouterr() == ("", "")


def test_splits_in_the_middle_of_file_names(tmp_path):
    for split in ("train", "validation"):
        write_parquet(tmp_path / f"photos-{split}-0000.parquet", [png(picture(0))], [0])
    assert [len(open_images(tmp_path, split=split)) for split in (None, "train", "val")] == [1, 1, 1]
    with pytest.raises(DetailFlowError, match="no split 'test': it has train, validation"):
        open_images(tmp_path, split="test")


def test_parquet_labels(tmp_path):
    pictures = [png(picture(index)) for index in range(3)]
    words = open_images(write_parquet(tmp_path / "words.parquet", pictures, ["dog", "cat", "dog"]))
    assert words.class_names == ("cat", "dog") and words.labels.tolist() == [1, 0, 1]
    numbers = open_images(write_parquet(tmp_path / "numbers.parquet", pictures, [2, 0, 2]))
    assert numbers.class_names == ("0", "1", "2") and numbers.labels.tolist() == [2, 0, 2]
    twice = open_images(write_parquet(tmp_path / "twice.parquet", pictures, [0, 1, 2], ["crane", "dog", "crane"]))
    assert twice.class_names == ("crane", "dog", "crane") and twice.labels.tolist() == [0, 1, 2]
    for name, labels in (("none", None), ("hidden", [-1, -1, -1]), ("text", ["-1", "-1", " -1 "])):
        source = open_images(write_parquet(tmp_path / f"{name}.parquet", pictures, labels))
        assert source.class_names == ("image",) and source.labels.tolist() == [0, 0, 0]
    with pytest.raises(DetailFlowError, match="some.parquet row 1 has no label"):
        open_images(write_parquet(tmp_path / "some.parquet", pictures, [0, -1, 1]))
    for blank in ("", " \t", "-1"):  # as in a CSV file
        with pytest.raises(DetailFlowError, match="blank.parquet row 1 has no label"):
            open_images(write_parquet(tmp_path / "blank.parquet", pictures, ["dog", blank, "cat"]))
    blank = open_images(write_parquet(tmp_path / "blank.parquet", pictures, ["", "", ""]))
    assert blank.class_names == ("image",) and blank.labels.tolist() == [0, 0, 0]
    with pytest.raises(DetailFlowError, match="large.parquet has a label of 1,000,000 or more"):
        open_images(write_parquet(tmp_path / "large.parquet", pictures, [0, 2**40, 1]))


def test_wrong_parquet(tmp_path):
    file = write_parquet(tmp_path / "a.parquet", [png(picture(0))], [0])
    with pytest.raises(DetailFlowError, match="no column 'img': its columns are image, label"):
        open_images(file, image_column="img")
    with pytest.raises(DetailFlowError, match="no column 'class'"):
        open_images(file, label_column="class")
    with pytest.raises(DetailFlowError, match="no images in its column 'label'"):
        open_images(file, image_column="label")
    (tmp_path / "b.parquet").write_text("not parquet")
    with pytest.raises(DetailFlowError, match="b.parquet is not a readable parquet file"):
        open_images(tmp_path / "b.parquet")


def test_parquet_files_without_rows(tmp_path, capfd):
    pytest.importorskip("datasets", reason="needs detailflow[train]")
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"image": pyarrow.array([], pyarrow.binary())}), tmp_path / "a.parquet")
    with pytest.raises(DetailFlowError, match="a.parquet holds no images: it has no rows"):
        open_images(tmp_path / "a.parquet")
    assert capfd.readouterr() == ("", "")


def test_datasets_is_named_where_it_is_missing(tmp_path, monkeypatch):
    file = write_parquet(tmp_path / "a.parquet", [png(picture(0))], [0])
    monkeypatch.setitem(sys.modules, "datasets", None)
    for data in (file, "someone/some-dataset"):
        with pytest.raises(DetailFlowError, match=r"pip install 'detailflow\[train\]'"):
            open_images(data)


def test_hub(tmp_path, monkeypatch):
    """The hub itself is stood in for: what is tested is the name, the split and the error."""
    datasets = pytest.importorskip("datasets", reason="needs detailflow[train]")
    load = datasets.load_dataset
    file = write_parquet(tmp_path / "a.parquet", [png(picture(0))], [0], ["cat"])

    def load_dataset(name: str, split: str) -> object:
        if name != "someone/cats":
            raise datasets.exceptions.DatasetNotFoundError(f"Dataset {name!r} doesn't exist on the Hub.\nMore.")
        return load("parquet", data_files={split: str(file)}, split=split)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = open_images("someone/cats")
    assert source.class_names == ("cat",) and source.name(0) == "someone/cats train row 0"
    assert source.image(0).size == (40, 40)
    with pytest.raises(DetailFlowError, match="someone/nobody is neither .*, and on the hub it cannot") as caught:
        open_images("someone/nobody")
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------- batches


def same(batches: list, others: list) -> bool:
    return all(torch.equal(a, b) and torch.equal(c, d) for (a, c), (b, d) in zip(batches, others, strict=True))


def test_batches(folder):
    source = open_images(folder)
    batches = ImageBatches(source, 32, 8, seed=1)
    assert batches.steps_per_epoch == 3
    for images, labels in islice(batches, 4):
        assert images.shape == (8, 3, 32, 32) and images.dtype == torch.float32 and images.is_contiguous()
        assert -1 <= images.min() < -0.5 and 0.5 < images.max() <= 1
        assert labels.shape == (8,) and labels.dtype == torch.int64


def test_an_epoch_holds_every_image_once_with_its_label(tmp_path):
    for index in range(24):  # flat colours, so that a crop tells which image it is from
        (tmp_path / f"class{index % 3}").mkdir(exist_ok=True)
        Image.new("RGB", (32, 32), (index, 0, 0)).save(tmp_path / f"class{index % 3}" / f"{index}.png")
    batches = iter(ImageBatches(open_images(tmp_path), 32, 8, seed=0))
    orders = []
    for _ in range(2):
        epoch = list(islice(batches, 3))
        found = torch.cat([(images[:, 0, 0, 0] + 1) * 127.5 for images, _ in epoch]).round().long()
        assert sorted(found.tolist()) == list(range(24))
        assert torch.equal(torch.cat([labels for _, labels in epoch]), found % 3)
        orders.append(found.tolist())
    assert orders[0] != orders[1]


def test_resume_is_exact_with_any_number_of_workers(folder):
    source = open_images(folder)
    whole = list(islice(ImageBatches(source, 32, 8, seed=1), 9))
    assert not same(whole[:3], whole[3:6])
    assert same(whole[4:], list(islice(ImageBatches(source, 32, 8, seed=1, start_step=4), 5)))
    assert same(whole[4:], list(islice(ImageBatches(source, 32, 8, seed=1, start_step=4, workers=2), 5)))
    assert not same(whole, list(islice(ImageBatches(source, 32, 8, seed=2), 9)))


def test_a_set_smaller_than_a_batch_wraps_around(folder):
    images, _labels = next(iter(ImageBatches(open_images(folder / "dog"), 32, 25, seed=0)))
    assert images.shape == (25, 3, 32, 32)
    assert len({image.numpy().tobytes() for image in images}) > 20  # repeats are other crops


def test_flip_off(folder):
    source = open_images(folder / "dog")
    assert not same(*(list(islice(ImageBatches(source, 32, 8, seed=0, flip=flip), 1)) for flip in (True, False)))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.filterwarnings("ignore:.*Another image takes its place")
def test_one_bad_image_is_replaced_and_named_once(folder, workers):
    bad = folder / "cat" / "004.png"
    bad.write_text("not an image")
    batches = ImageBatches(open_images(folder), 32, 10, seed=0, workers=workers)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        seen = list(islice(batches, 7))
    assert list(batches.bad) == [4] and str(bad) in batches.bad[4]
    ours = [str(one.message) for one in caught if issubclass(one.category, DetailFlowWarning)]  # torch counts the cores
    assert [str(bad) in message for message in ours] == [True]
    assert torch.cat([labels for _, labels in seen[:3]]).bincount().tolist() == [10, 10, 10]
    assert same(seen, list(islice(ImageBatches(open_images(folder), 32, 10, seed=0), 7)))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("count", [2, 30])
@pytest.mark.filterwarnings("ignore:.*Another image takes its place")
def test_too_many_bad_images(folder, workers, count):
    for file in sorted(folder.rglob("*.png"))[:count]:
        file.write_text("not an image")
    with pytest.raises(DetailFlowError, match="of the 30 images cannot be read, more than 1%.*cat"):
        list(islice(ImageBatches(open_images(folder), 32, 10, seed=0, workers=workers), 3))


def test_cifar(cifar_table, tmp_path):
    pytest.importorskip("datasets", reason="needs detailflow[train]")
    source = open_images(cifar_table)
    assert len(source) == 400 and len(source.class_names) == 10
    assert np.bincount(source.labels).tolist() == [45, 47, 39, 33, 49, 27, 40, 47, 40, 33]
    for index in range(20):
        path = tmp_path / source.class_names[source.labels[index]] / f"{index}.png"
        path.parent.mkdir(exist_ok=True)
        source.image(index).save(path)
    copies = open_images(tmp_path)
    assert len(copies) == 20 and set(copies.class_names) < set(source.class_names)
    for index in range(20):
        original = source.image(int(Path(copies.name(index)).stem))
        np.testing.assert_array_equal(center_crop(copies.image(index), 32), np.asarray(original))
    images, _ = next(iter(ImageBatches(source, 32, 256, seed=0)))
    assert abs(float(images.mean())) < 0.3 and images.shape == (256, 3, 32, 32)
    assert to_tensor(np.asarray(source.image(0))).shape == (3, 32, 32)
