import io
import json
import os
import pickle
import re
import shutil
import tarfile
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from detailflow.data.batches import ImageBatches
from detailflow.data.images import open_images
from detailflow.errors import DetailFlowError
from detailflow.samples import SampleSet, WebDatasetWriter

from .conftest import write_tar


@pytest.fixture
def content(cifar: Path) -> bytes:
    """The bytes of an image."""
    return next(cifar.rglob("*.png")).read_bytes()


def test_shards_hold_what_the_folder_holds(cifar, shards):
    folder, source = open_images(cifar), open_images(shards)
    assert len(source) == 200 and source.class_names == tuple(map(str, range(10)))
    assert source.name(57) == f"{shards}/cifar-train-001.tar 057"
    for index in range(200):
        path = Path(folder.name(index))
        place = int(path.stem)
        assert path.parent.name == f"class{source.labels[place]}"
        np.testing.assert_array_equal(np.asarray(source.image(place)), np.asarray(folder.image(index)))


def test_ways_to_name_shards(shards):
    assert len(open_images(shards / "cifar-train-002.tar")) == 50
    assert len(open_images(f"{shards}/*-00[13].tar")) == 100
    ranged = open_images(f"{shards}/cifar-train-{{001..003}}.tar")
    assert len(ranged) == 150 and ranged.name(0).endswith("cifar-train-001.tar 050")
    assert len(open_images(f"{shards}/cifar-train-0{{0..0}}{{0..1}}.tar")) == 100
    assert len(open_images(shards, split="train")) == 200
    with pytest.raises(DetailFlowError, match="no split 'val': it has train"):
        open_images(shards, split="val")
    with pytest.raises(DetailFlowError, match=r"cifar-train-004.tar does not exist: check the range in .*\{003..004\}"):
        open_images(f"{shards}/cifar-train-{{003..004}}.tar")
    with pytest.raises(DetailFlowError, match="matches no .parquet file and no .tar file"):
        open_images(f"{shards}/*.zip")


def test_a_pattern_leaves_others_aside_as_a_folder_does(shards, tmp_path):
    """They were dropped without a word, and a single parquet file went before all shards."""
    (tmp_path / "notes").mkdir()
    for number, name in enumerate(("train-0.tar", "train-1.tar", "train-2.parquet", "train-3.tar.gz", "notes/a.txt")):
        shutil.copy(shards / f"cifar-train-00{number % 4}.tar", tmp_path / name)
    (tmp_path / "Thumbs.db").touch()
    folder, aside = open_images(tmp_path), {"archive": ["train-3.tar.gz"], ".parquet": ["train-2.parquet"]}
    assert folder.notes.left_aside == aside | {".txt": ["notes/a.txt"]}
    for pattern, more in (("*", {"folder": ["notes"]}), ("train-*", {}), ("**", {".txt": ["notes/a.txt"]})):
        source = open_images(f"{tmp_path}/{pattern}")
        assert source.fingerprint == folder.fingerprint and source.notes.left_aside == aside | more
    assert "left aside: 1 archive (train-3.tar.gz), 1 .parquet" in open_images(f"{tmp_path}/t*").summary


def test_split_folders_of_shards(shards, tmp_path):
    for split, shard in (("train", "000"), ("val", "003")):
        (tmp_path / split).mkdir()
        shutil.copy(shards / f"cifar-train-{shard}.tar", tmp_path / split / "images.tar")
    assert open_images(tmp_path).name(0).endswith("train/images.tar 000")
    assert open_images(tmp_path, split="validation").name(0).endswith("val/images.tar 150")


@pytest.mark.parametrize(
    ("train", "other"),
    [
        ("train00000.tar", "val00000.tar"),
        ("train2017-0.tar", "val2017-0.tar"),
        ("TRAIN0.tar", "TEST0.tar"),
        ("cifar10train.tar", "cifar10test.tar"),
        ("imagenet_train_0.tar", "imagenet_validation_0.tar"),
        ("0/train.tar", "0/test.tar"),
    ],
)
def test_splits_in_the_names_of_shards(train, other, shards, tmp_path):
    """A digit behind the word hid it, and the other split was trained on, too."""
    for name, shard in ((train, "000"), (other, "003")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(shards / f"cifar-train-{shard}.tar", tmp_path / name)
    assert open_images(tmp_path).name(0) == f"{tmp_path / train} 000" and len(open_images(tmp_path)) == 50
    split = "val" if "val" in other.lower() else "test"
    assert open_images(tmp_path, split=split).name(0) == f"{tmp_path / other} 150"


def test_shards_of_which_some_are_of_a_split(shards, tmp_path):
    """Perhaps the others are for training; the first line asks, and one can say so."""
    for name, shard in (("data-0.tar", "000"), ("data-1.tar", "001"), ("test-0.tar", "003")):
        shutil.copy(shards / f"cifar-train-{shard}.tar", tmp_path / name)
    source = open_images(tmp_path)
    assert len(source) == 150
    assert source.summary.endswith("; all files are read, with test-0.tar: is this of another split?")
    test = open_images(tmp_path, split="test")
    assert len(test) == 50 and "left aside: 2 files of no split" in test.summary
    train = open_images(tmp_path, split="train")
    assert len(train) == 100 and train.notes.splits == ("train", "test")
    assert "left aside: 1 file of another split" in train.summary
    with pytest.raises(DetailFlowError, match="no split 'val': it has test"):
        open_images(tmp_path, split="val")
    (tmp_path / "test-0.tar").rename(tmp_path / "extra-train-2.tar")
    assert len(open_images(tmp_path, split="train")) == 150


@pytest.mark.parametrize("workers", [0, 2])
def test_batches(shards, workers):
    source = open_images(shards)
    source.image(0)  # read in this process before it is copied
    alone = list(islice(ImageBatches(source, 32, 16, seed=0), 3))
    for (images, labels), (same, too) in zip(
        alone, ImageBatches(source, 32, 16, seed=0, workers=workers), strict=False
    ):
        assert torch.equal(images, same) and torch.equal(labels, too)


def test_a_source_goes_to_other_processes(shards):
    source = open_images(shards)
    expected = np.asarray(source.image(120))
    sent = pickle.dumps(source)
    assert len(sent) < 20_000
    np.testing.assert_array_equal(np.asarray(pickle.loads(sent).image(120)), expected)


def test_what_generate_writes_can_be_opened(tmp_path, cifar, pipeline, monkeypatch):
    source, labels = open_images(cifar), [7, 0, 7, 3]
    images = [source.image(index) for index in range(4)]
    monkeypatch.setattr("detailflow.samples.SHARD_IMAGES", 2)
    writer = WebDatasetWriter(tmp_path, SampleSet(labels, batch_size=2), pipeline)
    for part in writer.parts:
        writer.write(part, images[part.start : part.stop])
    written = open_images(tmp_path)
    assert written.labels.tolist() == labels and len(written.class_names) == 8
    assert written.name(3) == f"{tmp_path / 'samples-000001.tar'} 000000003"
    for index in range(4):
        np.testing.assert_array_equal(np.asarray(written.image(index)), np.asarray(images[index]))


def test_labels(tmp_path, content):
    def labels(*beside: tuple[str, str], **columns: str) -> tuple[list[int], tuple[str, ...]]:
        members = [(f"a/{k}.PNG", content) for k in range(3)] + [(f"a/{name}", text.encode()) for name, text in beside]
        source = open_images(write_tar(tmp_path / "a.tar", members), **columns)
        return source.labels.tolist(), source.class_names

    assert labels() == ([0, 0, 0], ("image",))
    assert labels(("0.cls", "2"), ("1.cls", "0\n"), ("2.cls", "2")) == ([2, 0, 2], ("0", "1", "2"))
    assert labels(("0.cls", "dog"), ("1.cls", "cat"), ("2.cls", "dog")) == ([1, 0, 1], ("cat", "dog"))
    entries = [(f"{k}.json", json.dumps({"label": [1, 0, 1][k], "kind": "abb"[k]})) for k in range(3)]
    assert labels(*entries) == ([1, 0, 1], ("0", "1"))
    assert labels(*entries, ("0.cls", "5"), ("1.cls", "5"), ("2.cls", "5"))[0] == [5, 5, 5]
    assert labels(*entries, ("0.cls", "5"), label_column="kind") == ([0, 1, 1], ("a", "b"))
    assert labels(("0.json", "[]"), ("1.txt", "caption")) == ([0, 0, 0], ("image",))
    with pytest.raises(DetailFlowError, match="a.tar a/1 has no label: give every image one, or none"):
        labels(("0.cls", "2"))
    with pytest.raises(DetailFlowError, match="a.tar a/1 has no label: give every image one, or none"):
        labels(("0.cls", "dog"), ("1.cls", "\n"), ("2.cls", "cat"))
    assert labels(*((f"{k}.cls", "-1") for k in range(3))) == ([0, 0, 0], ("image",))
    with pytest.raises(DetailFlowError, match="a.tar a/1 has no label: give every image one, or none"):
        labels(("0.cls", "dog"), ("1.cls", "-1"), ("2.cls", "cat"))
    with pytest.raises(DetailFlowError, match="has class numbers and names, such as 0 and 'dog': give one kind"):
        labels(("0.cls", "dog"), *entries[1:])
    with pytest.raises(DetailFlowError, match="no label 'breed': that is looked for in its .json files"):
        labels(*entries, label_column="breed")


@pytest.mark.parametrize("names", [("./a", "a"), ("a", "./a"), ("x//a", "x/a")], ids=str)
def test_one_name_in_two_spellings(tmp_path, names):
    """As `tar rf` adds a corrected image: the old one stayed, and took the label of the new one."""
    old, new = (io.BytesIO(), io.BytesIO())
    Image.new("RGB", (8, 8), "red").save(old, "PNG"), Image.new("RGB", (8, 8), "green").save(new, "PNG")
    members = [
        (f"{names[0]}.png", old.getvalue()), (f"{names[0]}.cls", b"0"),
        (f"{names[1]}.png", new.getvalue()), (f"{names[1]}.cls", b"1"),
    ]  # fmt: skip
    with pytest.warns(UserWarning, match=r"holds 2 files twice .*: the last of each name is taken"):
        source = open_images(write_tar(tmp_path / "a.tar", members))
    assert source.labels.tolist() == [1] and source.image(0).getpixel((0, 0)) == (0, 128, 0)


def test_numbers_as_texts_beside_numbers(tmp_path, content):
    members = [("a.png", content), ("a.json", b'{"label": 3}'), ("b.png", content), ("b.cls", b"1")]
    assert open_images(write_tar(tmp_path / "a.tar", members)).labels.tolist() == [3, 1]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", b'{"label":', r"a.tar a.json is not valid JSON \(Expecting value: line 1 column 10"),
        ("a.json", b"", "a.tar a.json is not valid JSON"),
        ("a.cls", "cat".encode("utf-16"), "a.tar a.cls is not text in UTF-8"),
    ],
)
def test_a_damaged_label_is_named(tmp_path, content, name, text, message):
    with pytest.raises(DetailFlowError, match=message):
        open_images(write_tar(tmp_path / "a.tar", [("a.png", content), (name, text)]))


def test_labels_by_another_name_are_asked_for(tmp_path, content):
    """The images had no classes, without a word."""

    def summary(*beside: tuple[str, bytes]) -> str:
        members = [("0.png", content), *beside]
        source = open_images(write_tar(tmp_path / "a.tar", members))
        assert source.class_names == ("image",)
        return source.summary

    for entry in ("Label", "labels", "class"):
        asked = f"a.tar 0.json has no entry label: did you mean {entry} (label_column: {entry})?"
        entries = json.dumps({"text": "a cat", entry: 3}).encode()
        assert summary(("0.json", entries), ("1.png", content), ("1.json", entries)).endswith(asked)
    assert open_images(tmp_path / "a.tar", label_column="class").counts["3"] == 2
    read = "files give no labels: these are read from .cls files, and from the entry label of .json files"
    for name, text in (("0.cls.gz", b""), ("0.json", b'["cat"]'), ("0.class", b"cat"), ("0.json", b'{"text": "cat"}')):
        assert summary((name, text)).endswith(f"; its {name[1:]} {read}")
    several = [("0.txt", b""), ("0.json", b"3"), ("README.md", b""), (".hidden", b""), ("0.seg.png", content)]
    assert summary(*several).endswith(f"; its .json, .txt {read}")
    for hidden in (b'{"label": null}', b'{"label": -1}'):
        assert summary(("0.json", hidden), ("README", b""), ("notes.txt", b"")).endswith("32×32")
    folders = [("cat/0.png", content), ("dog/0.png", content), ("dog/0.txt", b"")]
    asked = r"; its images are in the folders cat, dog: if these are their classes, unpack \S+; its .txt files give no"
    assert re.search(asked, open_images(write_tar(tmp_path / "a.tar", folders)).summary)
    write_tar(tmp_path / "test-a.tar", folders)
    asked = r"; all files are read, with test-a.tar: is this of another split\?; its images are in the folders cat, "
    assert re.search(asked, open_images(tmp_path).summary)
    labelled = [("0.png", content), ("0.cls", b"1"), ("0.json", b'{"Label": 3}'), ("0.txt", b"")]
    assert open_images(write_tar(tmp_path / "a.tar", labelled)).notes.question == ""


def test_an_entry_twice_is_refused(tmp_path, content):
    """The last one was taken without a word."""

    def labelled(text: str, **columns: str) -> dict[str, int]:
        members = [("0.png", content), ("0.json", text.encode())]
        return open_images(write_tar(tmp_path / "a.tar", members), **columns).counts

    twice = '{"label": "cat", "width": 1, "width": 2, "label": "dog", "Kind": "a", "Kind": "b"}'
    with pytest.raises(DetailFlowError, match=r"a\.tar 0\.json has several entries called label: keep one of them$"):
        labelled(twice)
    with pytest.raises(DetailFlowError, match=r"a\.tar 0\.json has several entries called kind: keep one of them$"):
        labelled(twice, label_column="Kind")
    assert labelled('{"label": "cat", "width": 1, "width": 2}') == {"cat": 1}  # nothing is read of the width


def test_one_of_several_images(tmp_path, content):
    Image.new("RGB", (4, 4)).save(tmp_path / "mask.bmp")
    mask = (tmp_path / "mask.bmp").read_bytes()
    file = write_tar(
        tmp_path / "a.tar", [("0.png", content), ("0.mask.bmp", mask), ("0.bmp", mask), (".hidden.png", b"")]
    )
    assert len(open_images(file)) == 1 and open_images(file).image(0).size == (32, 32)
    assert open_images(file, image_column="bmp").image(0).size == (4, 4)
    assert open_images(file, image_column="mask.bmp").image(0).size == (4, 4)
    with pytest.raises(DetailFlowError, match="holds no .webp images"):
        open_images(file, image_column="webp")


def test_unreadable_shards_are_named_in_one_sentence(tmp_path, content, shards):
    whole = (shards / "cifar-train-000.tar").read_bytes()
    spoiled = bytearray(whole)
    spoiled[1024:1100] = b"?" * 76  # the second header
    with tarfile.open(tmp_path / "packed.tar", "w:gz") as archive:
        archive.add(shards / "cifar-train-000.tar", "a")
    contents = {
        "text.tar": b"not a tar file " * 100,
        "empty.tar": b"",
        "cut.tar": whole[:60_000],
        "header.tar": whole[: 1024 + 100],
        "spoiled.tar": bytes(spoiled),
        "packed.tar": (tmp_path / "packed.tar").read_bytes(),
    }
    for name, bad in contents.items():
        (tmp_path / name).write_bytes(bad)
        with pytest.raises(DetailFlowError, match=f"{name} is not a readable WebDataset shard") as caught:
            open_images(tmp_path / name)
        assert "\n" not in str(caught.value)
    with pytest.raises(DetailFlowError, match=r"a.tar 0.json is not valid JSON \(Expecting value"):
        open_images(write_tar(tmp_path / "a.tar", [("0.png", content), ("0.json", b"")]))
    with pytest.raises(DetailFlowError, match="b.tar holds no images: a WebDataset shard has files such as"):
        open_images(write_tar(tmp_path / "b.tar", [("0.txt", b"")]))
    with pytest.raises(DetailFlowError, match="c.tgz is an archive, which is not read: unpack it"):
        open_images(write_tar(tmp_path / "c.tgz", []))


def test_a_shard_that_stops_at_the_end_of_a_file_is_a_warning(tmp_path, content):
    whole = write_tar(tmp_path / "0.tar", [("0.png", content), ("1.png", content)]).read_bytes()
    with tarfile.open(tmp_path / "0.tar") as archive:
        second, end = archive.getmembers()[1].offset, archive.offset
    for size, images in ((second, 1), (end, 2)):
        (tmp_path / "0.tar").write_bytes(whole[:size])
        with pytest.warns(UserWarning, match=r"^files may be missing from \S+0\.tar, as no mark of an archive's"):
            assert len(open_images(tmp_path / "0.tar")) == images
    for name, matched in (
        ("1.tar", r"0\.tar and 1 other shard, as"),
        ("2.tar", r"0\.tar and 2 other shards, as"),
    ):
        (tmp_path / name).write_bytes(whole[:second])
        with pytest.warns(UserWarning, match=matched):
            open_images(tmp_path)


@pytest.mark.parametrize("zeros", [512, 1024, 10_240, 100_000])
def test_the_end_of_a_shard_may_be_any_number_of_zeros(tmp_path, content, zeros, recwarn):
    with tarfile.open(write_tar(tmp_path / "a.tar", [("0.png", content)])) as archive:
        archive.getmembers()
        end = archive.offset
    for after in (b"", b"no header " * 100):
        (tmp_path / "a.tar").write_bytes((tmp_path / "a.tar").read_bytes()[:end] + bytes(zeros) + after)
        assert len(open_images(tmp_path / "a.tar")) == 1
    assert not recwarn.list


def test_archives_in_one_file_are_refused(tmp_path, content):
    first, second = (
        write_tar(tmp_path / f"{name}.tar", [(f"{name}.png", content)]).read_bytes() for name in ("0", "1")
    )
    with tarfile.open(tmp_path / "0.tar") as archive:
        archive.getmembers()
        end = archive.offset
    for joined in (first + second, first[: end + 512] + second, first + bytes(100 * 512) + second):
        (tmp_path / "0.tar").write_bytes(joined)
        with pytest.raises(DetailFlowError, match=rf"^\S+0\.tar is several archives in one.* byte {end:,}: unpack it"):
            open_images(tmp_path / "0.tar")


def test_an_unreadable_image_is_named(tmp_path, content):
    source = open_images(write_tar(tmp_path / "a.tar", [("0.png", content), ("1.png", content[:500])]))
    with pytest.raises(DetailFlowError, match=r"a\.tar 1 is damaged"):
        source.image(1)
    (tmp_path / "a.tar").unlink()
    with pytest.raises(DetailFlowError, match=r"a\.tar 0 cannot be read \(No such file"):
        source.image(0)


@pytest.mark.parametrize("way", ["replaced", "written to", "cut"])
def test_a_shard_that_changes_is_not_read_any_further(tmp_path, content, way):
    """Images of another shard had the labels of this one."""
    members = [(name, content) for name in ("0.png", "1.png")]
    file = write_tar(tmp_path / "a.tar", [*members, ("0.cls", b"0"), ("1.cls", b"1")])
    other = write_tar(tmp_path / "other", [*members, ("0.cls", b"1"), ("1.cls", b"0")])
    os.utime(file, (1e9, 1e9))
    source = open_images(file)
    sent = pickle.dumps(source)
    assert source.stored_bytes(0) == pickle.loads(sent).stored_bytes(0) == content
    if way == "replaced":
        os.replace(other, file)
    elif way == "written to":
        file.write_bytes(other.read_bytes())
    else:
        os.truncate(file, 1000)
    for one in (source, pickle.loads(sent)):
        for read in (one.image, one.size, one.stored_bytes, one.stored_size):
            with pytest.raises(DetailFlowError, match=r"a\.tar has changed since it was opened: start again$"):
                read(0)
    if way != "cut":
        assert open_images(file).labels.tolist() == [1, 0]


def test_keys_with_dots(content, tmp_path):
    members = [
        ("a.jpg", content),
        ("a.cls", b"0"),
        ("b.1.jpg", content),
        ("b.1.cls", b"1"),
        ("c.2.jpg", content),
        ("c.cls", b"2"),
    ]
    members += [("a.seg.png", content), ("__MACOSX/a.jpg", content), ("._a.jpg", b"")]
    source = open_images(write_tar(tmp_path / "a.tar", members))
    assert [source.name(index).split()[-1] for index in range(len(source))] == ["a", "b.1", "c.2"]
    assert source.labels.tolist() == [0, 1, 2] and all(source.image(index).size == (32, 32) for index in range(3))
    assert source.notes.left_aside == {".seg.png": ["a.seg.png"]} and "left aside: 1 .seg.png" in source.summary
    assert len(open_images(write_tar(tmp_path / "b.tar", [("caf\udce9.png", content)]))) == 1


def test_names_that_begin_with_a_dot_and_a_slash(tmp_path, content):
    members = [("./a.png", content), ("a.cls", b"x"), ("b.png", content), ("./b.json", b'{"label": "y"}')]
    source = open_images(write_tar(tmp_path / "a.tar", members))
    assert source.counts == {"x": 1, "y": 1} and source.name(0).endswith("a.tar ./a")
    source = open_images(write_tar(tmp_path / "c.tar", [("./cat/a.png", content), ("./dog/a.png", content)]))
    assert "its images are in the folders cat, dog: if these are their classes" in source.summary


def test_labels_of_no_image_are_named(tmp_path, content):
    members = [("0.png", content), ("1.1.png", content), ("1.cls", b"0"), ("0.cls", b"0"), ("0.json", b'{"label": 5}')]
    members += [("img/0.cls", b"0"), ("7.json", b'{"label": 5}'), ("8.json", b'{"width": 5}')]
    source = open_images(write_tar(tmp_path / "a.tar", members))
    assert source.notes.left_aside == {"label file without an image": ["7.json", "img/0.cls"]}
    assert "left aside: 2 label files without an image (7.json, img/0.cls)" in source.summary


# ------------------------------------------------------------------------------------------------- hostile shards


def base256(size: int) -> bytes:
    """A number as a header has it that octal digits do not hold, or that is negative."""
    return (size % 256**12 | (0x80 << 88 if size >= 0 else 0)).to_bytes(12, "big")


def with_size(header: bytes, size: int, kind: bytes = b"0") -> bytes:
    header = header[:124] + base256(size) + header[136:148] + b" " * 8 + kind + header[157:]
    return header[:148] + b"%06o\0 " % sum(header) + header[156:]


@pytest.mark.parametrize("size", [-512, -1024, 2**40, 2**62, 2**80])
@pytest.mark.parametrize("kind", [b"0", b"L", b"x", b"g"])
@pytest.mark.parametrize("name", ["1.png", "0.cls", "0.json"])
def test_sizes_that_cannot_be(tmp_path, content, name, size, kind):
    file = write_tar(tmp_path / "a.tar", [("0.png", content), (name, b"0")])
    whole = file.read_bytes()
    start = whole.index(name.encode() + b"\0")
    file.write_bytes(whole[:start] + with_size(whole[start : start + 512], size, kind) + whole[start + 512 :])
    with pytest.raises(DetailFlowError, match="a.tar is not a readable WebDataset shard"):
        open_images(file)


def test_names_and_labels_have_a_limit(tmp_path, content):
    file = write_tar(tmp_path / "a.tar", [("a" * 2000 + ".png", content)])
    with pytest.raises(DetailFlowError, match="a.tar is not a readable WebDataset shard.*name of 2,004 characters"):
        open_images(file)
    file = write_tar(tmp_path / "b.tar", [("0.png", content), ("0.cls", bytes(17 * 2**20))])
    with pytest.raises(DetailFlowError, match="b.tar is not a readable WebDataset shard"):
        open_images(file)


def test_the_last_of_two_members_of_one_name_is_taken(tmp_path, cifar):
    first, last = (file.read_bytes() for file in sorted(cifar.rglob("*.png"))[:2])
    members = [("0.png", first), ("0.json", b'{"label": "old"}'), ("1.png", first), ("1.cls", b"b")]
    members += [("0.png", last), ("0.json", b'{"label": "new"}')]
    file = write_tar(tmp_path / "a.tar", members)
    with pytest.warns(
        UserWarning, match=r"a\.tar holds 2 files twice \(the first: 0\.png\): the last of each name is taken"
    ):
        source = open_images(file)
    assert source.counts == {"b": 1, "new": 1} and source.class_names[source.labels[0]] == "new"
    assert source.stored_bytes(0) == last and source.stored_bytes(1) == first


def test_images_that_a_shard_holds_beside_are_named(tmp_path, content):
    file = write_tar(
        tmp_path / "a.tar", [("0.png", content), ("0.jpg", content), ("1.xheic", b""), ("2.dng", b""), ("2.txt", b"")]
    )
    with tarfile.open(file, "a") as archive:
        for name, kind in (("3.png", tarfile.LNKTYPE), ("4.png", tarfile.SYMTYPE)):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, "0.png"
            archive.addfile(link)
    source = open_images(file)
    assert len(source) == 1 and source.stored_bytes(0) == content
    assert source.notes.left_aside == {
        "second image of a key": ["0.jpg"],
        ".dng": ["2.dng"],
        "link": ["3.png", "4.png"],
    }
    assert "2 links (3.png, 4.png)" in source.summary and "1 .dng (convert these to JPEG first)" in source.summary


def test_folders_in_a_shard_may_be_classes(tmp_path, content):
    members = [("cat/a.png", content), ("dog/a.png", content)]
    source = open_images(write_tar(tmp_path / "a.tar", members))
    assert source.class_names == ("image",)
    assert "its images are in the folders cat, dog: if these are their classes, unpack " in source.summary
    labelled = [(f"{name[:-4]}.cls", b"x") for name, _ in members]
    assert "unpack" not in open_images(write_tar(tmp_path / "b.tar", members + labelled)).summary
    assert "unpack" not in open_images(write_tar(tmp_path / "c.tar", members[:1])).summary


@pytest.mark.parametrize(
    ("texts", "names"),
    [
        (("\N{ARABIC-INDIC DIGIT THREE}", "3"), ("3", "\N{ARABIC-INDIC DIGIT THREE}")),
        (("\ufeffcat", "cat"), ("cat",)),
        (("\ufeff1", "0"), ("0", "1")),
        (("9" * 30, "1"), ("1", "9" * 30)),  # a name rather than a number
        (("9" * 5000, "1"), ("1", "9" * 5000)),
    ],
)
def test_odd_labels(tmp_path, content, texts, names):
    members = [(f"{k}.png", content) for k in range(2)] + [(f"{k}.cls", text.encode()) for k, text in enumerate(texts)]
    assert open_images(write_tar(tmp_path / "a.tar", members)).class_names == names


def test_labels_that_are_no_text_have_a_sentence(tmp_path, content):
    def labelled(text: str) -> Path:
        return write_tar(tmp_path / "a.tar", [("0.png", content), ("0.json", f'{{"label": {text}}}'.encode())])

    assert open_images(labelled('"\\ud800"')).class_names == ("\N{REPLACEMENT CHARACTER}",)
    for wrong in ("9" * 25, "9" * 5000, "1.5", "[" * 100_000):
        with pytest.raises(DetailFlowError, match="a.tar"):
            open_images(labelled(wrong))
    for wrong in ("true", "false", "[1, true]"):  # as in metadata.jsonl; they became the classes 0 and 1
        with pytest.raises(
            DetailFlowError, match=r"0\.json has the label (True|False), which is neither a class number"
        ):
            open_images(labelled(wrong))
