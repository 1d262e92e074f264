"""What a folder means: archives, splits, links, system files, labels, and the messages about them."""

import csv
import json
import os
import shutil
import subprocess
import sys
import tempfile
import unicodedata
import warnings
from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image

from detailflow.data import open_images
from detailflow.data.image_files import image_suffixes
from detailflow.errors import DetailFlowError
from detailflow.pictures import write_png

from .conftest import write_tar

pytestmark = pytest.mark.usefixtures("cache")

CLASSES = ("cat", "dog", "fish")


def photos(root: Path, classes: Sequence[str] = CLASSES, per: int = 4, suffix: str = "png") -> Path:
    for number, name in enumerate(classes):
        (root / name).mkdir(parents=True, exist_ok=True)
        for index in range(per):
            Image.new("RGB", (8, 8), (number, index, 0)).save(root / name / f"{index}.{suffix}")
    return root


def save(file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(file)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return photos(tmp_path / "set")


def counts(folder: Path, split: str | None = None) -> dict[str, int]:
    """Without any warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return open_images(folder, split=split).counts


ALL = dict.fromkeys(CLASSES, 4)

# ------------------------------------------------------------------------------------------------- archives


@pytest.mark.parametrize(
    "names", [["cat.tar", "dog.tar"], ["cat/backup.tar"], ["all.parquet"], ["a.zip", "b.tar.gz", "c.7z"]]
)
def test_archives_between_images_are_left_aside(folder, names):
    for name in names:
        write_tar(folder / name, [("0.png", b"")])
    assert counts(folder) == ALL
    kept = open_images(folder)
    assert sorted(name for names in kept.notes.left_aside.values() for name in names) == sorted(names)
    assert all(name in kept.summary or ".parquet" in kept.summary for name in names) and "left aside: " in kept.summary


def test_a_folder_of_shards_may_hold_a_picture(tmp_path):
    save(tmp_path / "picture.png")
    for number in range(3):
        write_tar(tmp_path / f"{number}.tar", [("0.png", (tmp_path / "picture.png").read_bytes())])
    source = open_images(tmp_path)
    assert len(source) == 3 and "left aside: 1 .png" in source.summary


# ------------------------------------------------------------------------------------------------- splits


@pytest.mark.parametrize(
    ("names", "split", "taken"),
    [
        (("Train", "Test"), None, "Train"),
        (("Train", "Test"), "test", "Test"),
        (("TRAIN", "Validation"), "val", "Validation"),
        (("training", "dev"), "validation", "dev"),
        (("train", "eval"), "test", "eval"),
        (("train2017", "val2017"), "val", "val2017"),
        (("train_images", "test_images"), "train", "train_images"),
    ],
)
def test_splits_are_named_as_in_datasets(tmp_path, names, split, taken):
    for name in names:
        photos(tmp_path / name)
    source = open_images(tmp_path, split=split)
    assert source.name(0).startswith(str(tmp_path / taken)) and source.counts == ALL
    assert source.notes.split == taken.lower() and set(source.notes.splits) == {name.lower() for name in names}
    assert f"split {taken.lower()} of " in source.summary


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("seg_train", "seg_test"),
        ("asl_alphabet_train", "asl_alphabet_test"),
        ("imagenet-train", "imagenet-val"),
        ("train-v2", "test-v2"),
        ("my_train", "my_val"),
        ("train_full", "test_full"),
        ("train.v1", "valid.v1"),
        ("train_32x32", "val_32x32"),
        ("train-clean-100", "test-clean"),
        ("Train ", "Test "),
        ("xtrain", "xtest"),
        ("Trainings", "Tests"),
        ("trainval", "test"),
        ("train_val", "test"),
        ("train", "holdout"),
        ("train", "hold-out"),
        ("train", "validate"),
    ],
)
def test_names_that_differ_in_the_split_alone_are_splits(tmp_path, train, test):
    photos(tmp_path / train, per=2)
    photos(tmp_path / test, per=1)
    assert counts(tmp_path) == dict.fromkeys(CLASSES, 2)
    assert open_images(tmp_path).notes.splits == (train.lower(), test.lower())
    meaning = "val" if "val" in test else "test"
    assert counts(tmp_path, meaning) == dict.fromkeys(CLASSES, 1)


@pytest.mark.parametrize(
    "names",
    [
        ("bullet train", "test tube"),
        ("constraint", "contest"),
        ("strain", "test"),
        ("medieval", "medical"),
        ("train", "training wheel", "bus"),
        ("model train", "model plane"),
        ("latest", "greatest"),
    ],
)
def test_classes_whose_names_hold_the_word_of_a_split(tmp_path, names):
    assert counts(photos(tmp_path, names)) == dict.fromkeys(names, 4)


@pytest.mark.parametrize(
    "names", [("public_test", "private_test"), ("Training", "PublicTest", "PrivateTest"), ("train_a", "test_b")]
)
def test_what_may_be_splits_is_asked(tmp_path, names):
    source = open_images(photos(tmp_path, names))
    assert set(source.counts) == set(names)
    assert "did you mean" in source.summary and "split" in source.summary


def test_folders_beside_the_splits_are_left_aside(tmp_path):
    for name in ("train", "val", "unlabeled"):
        photos(tmp_path / name)
    (tmp_path / "README.md").write_text("words")
    source = open_images(tmp_path)
    assert source.counts == ALL and source.notes.splits == ("train", "val")
    assert source.notes.left_aside == {
        "folder beside the splits": ["unlabeled"],
        "file beside the splits": ["README.md"],
    }
    with pytest.raises(DetailFlowError, match="has no split 'unlabeled': it has train, val"):
        open_images(tmp_path, split="unlabeled")


def test_a_class_may_be_called_train(tmp_path):
    photos(tmp_path, ("bus", "train", "truck"))
    assert counts(tmp_path) == {"bus": 4, "train": 4, "truck": 4}
    assert "did you mean the split" in open_images(tmp_path).summary
    (tmp_path / "truck" / "0.png").unlink()
    for index in range(1, 4):
        (tmp_path / "truck" / f"{index}.png").unlink()
    with pytest.raises(DetailFlowError, match="truck holds no images.*; did you mean the split .*train?"):
        open_images(tmp_path)
    photos(tmp_path / "more", ("bullet train", "test tube"))
    assert counts(tmp_path / "more") == {"bullet train": 4, "test tube": 4}


def test_two_folders_of_one_split(tmp_path):
    for name in ("train", "valid", "dev"):
        photos(tmp_path / name)
    with pytest.raises(DetailFlowError, match="several splits for val: choose one of"):
        open_images(tmp_path, split="val")
    assert open_images(tmp_path, split="dev").name(0).startswith(str(tmp_path / "dev"))


# ------------------------------------------------------------------------------------------------- files


def test_every_suffix_that_pillow_reads(tmp_path):
    suffixes = ["jpg", "jfif", "jpe", "TIF", "webp", "tga", "jp2"]
    if ".avif" in image_suffixes():
        suffixes.append("avif")
    for suffix in suffixes:
        form = {"jfif": "JPEG", "jpe": "JPEG"}.get(suffix)
        (tmp_path / "cat").mkdir(exist_ok=True)
        Image.new("RGB", (16, 16)).save(tmp_path / "cat" / f"a.{suffix}", format=form)
    source = open_images(tmp_path)
    assert len(source) == len(suffixes) and all(source.image(index).size == (16, 16) for index in range(len(source)))


def test_suffixes_that_need_more_are_named(folder):
    for name in ("cat/a.heic", "cat/b.HEIC", "dog/a.nef", "dog/a.svg", "dog/notes.txt", "dog/LICENCE"):
        (folder / name).write_text("x")
    source = open_images(folder)
    assert source.counts == ALL
    assert "1 file without a suffix (dog/LICENCE)" in source.summary
    assert (
        "2 .heic (needs pillow-heif: pip install pillow-heif)" in source.summary
        and "1 .nef (convert these to" in source.summary
    )
    shutil.rmtree(folder / "fish")
    (folder / "fish").mkdir()
    (folder / "fish" / "a.heic").write_text("x")
    with pytest.raises(DetailFlowError, match=r"fish holds no images \(it holds .heic\)"):
        open_images(folder)


@pytest.mark.parametrize(
    "name",
    [
        "@eaDir",
        "__MACOSX",
        "lost+found",
        ".ipynb_checkpoints",
        ".thumbnails",
        "$RECYCLE.BIN",
        "#snapshot",
        "~snapshot",
        "@Recently-Snapshot",
        "RECYCLER",
        "Recycled",
        "@tmp",
    ],
)
def test_folders_of_systems_are_no_data(folder, name):
    save(folder / name / "a.png")
    save(folder / "cat" / name / "0.png" / "thumbnail.png")
    (folder / "cat" / "._0.png").write_text("not an image")
    (folder / "dog" / "Thumbs.db").write_text("not an image")
    (folder / ".DS_Store").write_text("not an image")
    (folder / "desktop.ini").write_text("not an image")
    assert counts(folder) == ALL
    assert "left aside" not in open_images(folder).summary


# ------------------------------------------------------------------------------------------------- links


@pytest.mark.parametrize(
    "links",
    [
        {"cat/up": ".."},
        {"cat/up": "..", "dog/up": ".."},
        {"cat/here": "."},
        {"cat/x": "../dog", "dog/y": "../cat"},
        {"cat/x": "../dog/y", "dog/y": "../cat/x"},
        {"self": "."},
        {"cat/all": "/"},
        {"cat/above": "../.."},
    ],
    ids=str,
)
def test_links_within_a_set_are_not_followed(folder, links):
    for name, target in links.items():
        (folder / name).symlink_to(target)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a link to a link that leads to it leads nowhere
        source = open_images(folder)
    assert source.counts == ALL and "link" in source.summary


def test_links_to_elsewhere_are_followed_once(tmp_path):
    photos(tmp_path / "store")
    (tmp_path / "store" / "cat" / "round").symlink_to("../dog")
    (tmp_path / "set").mkdir()
    for name in CLASSES:
        (tmp_path / "set" / name).symlink_to(tmp_path / "store" / name)
    os.symlink(tmp_path / "store" / "cat" / "0.png", tmp_path / "store" / "fish" / "more.png")
    (tmp_path / "store" / "cat" / "round").unlink()
    assert counts(tmp_path / "set") == {"cat": 4, "dog": 4, "fish": 5}
    (tmp_path / "store" / "fish" / "x").symlink_to(tmp_path / "other")
    photos(tmp_path / "other", ("y",))
    (tmp_path / "other" / "back").symlink_to(tmp_path / "other")
    assert counts(tmp_path / "set") == {"cat": 4, "dog": 4, "fish": 9}


@pytest.mark.parametrize(
    "kind, name", [("sample", "0000-cat.png"), ("set", "0000-cat.png"), ("variation", "a-8-any-0.png")]
)
def test_made_images_among_others_are_left_aside(folder, tmp_path, kind, name):
    picture = Image.new("RGB", (16, 16))
    write_png(picture, folder / name, kind)
    write_png(picture, folder / "cat" / name, kind)
    assert counts(folder) == ALL
    assert f"left aside: 2 images made by detailflow ({name}, cat/{name})" in open_images(folder).summary
    shutil.copy(folder / name, folder / "cat" / "mine.png")  # a copy is the user's
    assert counts(folder)["cat"] == ALL["cat"] + 1
    (tmp_path / "samples").mkdir()
    write_png(picture, tmp_path / "samples" / name, kind)
    assert len(open_images(tmp_path / "samples")) == 1
    write_png(picture, tmp_path / "samples" / "b.png")
    rows = f"file_name,label\n{name},cat\nb.png,dog\n"
    (tmp_path / "samples" / "metadata.csv").write_text(rows)
    assert counts(tmp_path / "samples") == {"cat": 1, "dog": 1}


def test_a_dangling_link_is_named(folder):
    shutil.rmtree(folder / "dog")
    (folder / "dog").symlink_to("/nowhere/dog")
    (folder / "cat" / "more.png").symlink_to("/nowhere/more.png")
    with pytest.warns(UserWarning, match="set/dog is a link to /nowhere/dog, which is not there"):
        source = open_images(folder)
    assert source.counts == {"cat": 4, "fish": 4} and "2 dangling links (dog, cat/more.png)" in source.summary


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="needs permissions as in POSIX")
def test_a_folder_that_cannot_be_read_is_named():
    folder = photos(Path(tempfile.mkdtemp()))  # not below pytest's, which nobody else may enter
    folder.chmod(0o755)
    (folder / "dog").chmod(0)
    code = """
import os, sys, warnings
warnings.simplefilter("ignore")
from detailflow.data import open_images
from detailflow.data.image_files import image_suffixes
image_suffixes()  # whoever has no rights cannot import anything any more
if os.geteuid() == 0:
    os.setuid(65534)
source = open_images(sys.argv[1])
print(source.counts, source.notes.warnings)
try:
    open_images(sys.argv[1] + "/dog")
except ValueError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True)
    (folder / "dog").chmod(0o755)
    shutil.rmtree(folder)
    assert (
        result.stdout.startswith("{'cat': 4, 'fish': 4}")
        and result.stdout.count("dog cannot be read (Permission denied)") == 2
    ), result


# ------------------------------------------------------------------------------------------------- classes


def test_a_class_without_images(folder):
    (folder / "ca").mkdir()
    (folder / "cat2").symlink_to("/nowhere")
    with pytest.raises(DetailFlowError, match="set/ca holds no images: put some there or remove this class subfolder"):
        open_images(folder)
    (folder / "ca").rename(folder / "ant")
    with pytest.raises(DetailFlowError, match="set/ant holds no images"):
        open_images(folder)


def test_one_level_too_high(tmp_path):
    photos(tmp_path / "animals")
    source = open_images(tmp_path)
    assert source.counts == {"animals": 12}
    assert f"did you mean {tmp_path / 'animals'}, with cat, dog, fish?" in source.summary
    assert "did you mean" not in open_images(tmp_path / "animals").summary


def test_numbers_are_in_numeric_order(tmp_path):
    photos(tmp_path / "numbers", ("10", "0", "2", "1", "01", "-1", "-10"))
    assert open_images(tmp_path / "numbers").class_names == ("-10", "-1", "0", "1", "01", "2", "10")
    photos(tmp_path / "names", ("10", "b2", "2"))
    assert open_images(tmp_path / "names").class_names == ("10", "2", "b2")


def test_names_that_are_not_utf8(tmp_path):
    photos(tmp_path, ("tea",))
    for name in (b"caf\xe9", b"caf\xe8"):
        shutil.copytree(tmp_path / "tea", os.fsdecode(os.fsencode(tmp_path) + b"/" + name))
    with pytest.raises(DetailFlowError, match="several classes called caf\N{REPLACEMENT CHARACTER}: rename them"):
        open_images(tmp_path)
    shutil.rmtree(os.fsencode(tmp_path) + b"/caf\xe8")
    source = open_images(tmp_path)
    assert source.class_names == ("caf\N{REPLACEMENT CHARACTER}", "tea") and source.image(0).size == (8, 8)
    (source.summary + source.name(0) + source.fingerprint + json.dumps(source.class_names, ensure_ascii=False)).encode()


@pytest.mark.parametrize("names", [("caf\xe9", "cafe\u0301"), ("cat", "cat ")])
def test_names_that_look_the_same(tmp_path, names):
    photos(tmp_path, names)
    with pytest.raises(DetailFlowError, match="several classes called (caf.|cat): rename them"):
        open_images(tmp_path)


def test_thumbnails_are_left_aside(folder):
    photos(folder / "cat", ("Thumbnails",))
    photos(folder, ("thumbnails",))
    assert counts(folder) == ALL
    assert open_images(folder).notes.left_aside == {
        "folder of thumbnails": ["thumbnails", os.path.join("cat", "Thumbnails")]
    }


# ------------------------------------------------------------------------------------------------- metadata


def write_metadata(file: Path, rows: dict[str, object], label: str = "label") -> None:
    if file.suffix == ".csv":
        with open(file, "w", newline="") as opened:
            csv.writer(opened).writerows([("file_name", label), *rows.items()])
    else:
        file.write_text("".join(json.dumps({"file_name": name, label: value}) + "\n" for name, value in rows.items()))


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_labels_in_metadata(tmp_path, suffix):
    photos(tmp_path, (".", "sub"), per=2)
    write_metadata(
        tmp_path / f"metadata.{suffix}", {"0.png": "cat", "1.png": "dog", "sub/0.png": "dog", "./sub/1.png": "cat"}
    )
    assert counts(tmp_path) == {"cat": 2, "dog": 2}
    assert "left aside" not in open_images(tmp_path).summary
    save(tmp_path / "more.png")
    assert f"1 image without a row in metadata.{suffix} (more.png)" in open_images(tmp_path).summary
    (tmp_path / "1.png").unlink()
    with pytest.warns(UserWarning, match=f"metadata.{suffix} names 1 file that cannot be found .*1.png"):
        assert open_images(tmp_path).counts == {"cat": 2, "dog": 1}


@pytest.mark.parametrize(
    ("names", "missing"),
    [
        (["train-00000-of-00003", "train-00002-of-00003"], "train-…-of-00003 only 2 are there: get the others"),
        (["train-1-of-2"], "train-…-of-2 only 1 are there"),
        (["train-2-of-3", "train-3-of-3"], "train-…-of-3 only 2 are there"),
        (["train-1-of-3", "train-2-of-3"], "train-…-of-3 only 2 are there"),
        (["photos-12-of-05-2020"], None),
        (["train-00000-of-00002-5a6b", "train-00001-of-00002-7c8d", "test-0-of-9"], None),
        (["0-of-1", "x"], None),
    ],
    ids=str,
)
def test_a_shard_that_is_missing(tmp_path, names, missing):
    for name in names:
        save(tmp_path / "images" / "a.png")
        write_tar(tmp_path / "set" / f"{name}.tar", [(f"{name}.png", (tmp_path / "images" / "a.png").read_bytes())])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        open_images(tmp_path / "set")
    told = [str(warning.message) for warning in caught]
    assert [missing in text for text in told] == [True] if missing else not told


def test_metadata_of_splits(tmp_path):
    for split in ("train", "test"):
        photos(tmp_path / split, (".",), per=2)
        write_metadata(tmp_path / split / "metadata.csv", {"0.png": "cat", "1.png": split})
    assert counts(tmp_path) == {"cat": 1, "train": 1} and counts(tmp_path, "test") == {"cat": 1, "test": 1}
    for split in ("train", "test"):
        (tmp_path / split / "metadata.csv").unlink()
    write_metadata(
        tmp_path / "metadata.jsonl", {f"{split}/{i}.png": f"{split}{i}" for split in ("train", "test") for i in (0, 1)}
    )
    assert counts(tmp_path) == {"train0": 1, "train1": 1} and counts(tmp_path, "test") == {"test0": 1, "test1": 1}


def test_numbers_as_labels_in_metadata(tmp_path):
    photos(tmp_path, (".",), per=3)
    write_metadata(tmp_path / "metadata.csv", {"0.png": 10, "1.png": 2, "2.png": 2})
    assert counts(tmp_path) == {"2": 2, "10": 1}
    with pytest.raises(DetailFlowError, match="no images have the label 'breed'"):
        open_images(tmp_path, label_column="breed")
    write_metadata(tmp_path / "metadata.csv", {"0.png": "pug", "1.png": "pug", "2.png": "tabby"}, "breed")
    assert open_images(tmp_path, label_column="breed").counts == {"pug": 2, "tabby": 1}
    assert counts(tmp_path) == {"image": 3} and "left aside: 1 .csv" in open_images(tmp_path).summary


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("metadata.csv", "file_name, label\n0.png, cat\n1.png, dog\n"),
        ("metadata.csv", "file_name;label\n0.png;cat\n1.png;dog\n"),
        ("metadata.csv", "file_name\tlabel\n0.png\tcat\n1.png\tdog\n"),
        ("metadata.csv", "\ufeffFile_Name,Label\r\n0.png,cat \r\n1.png,dog\r\n"),
        ("metadata.csv", '"file_name","label","text"\n"0.png","cat","a, b; c; d"\n"1.png","dog",""\n'),
        ("Metadata.CSV", "file_name,label\n0.png,cat\n1.png,dog\n"),
        ("metadata.jsonl", '{"File_Name": "0.png", "Label": "cat"}\n{"file_name": "1.png", "label": " dog"}\n'),
    ],
)
def test_ways_to_write_metadata(tmp_path, name, text):
    photos(tmp_path, (".",), per=2)
    (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    assert counts(tmp_path) == {"cat": 1, "dog": 1}


def test_another_column_of_labels_is_asked_for(tmp_path):
    photos(tmp_path, (".",), per=2)
    (tmp_path / "metadata.csv").write_text("file_name,labels\n0.png,cat\n1.png,dog\n")
    assert "metadata.csv has no column label: did you mean labels" in open_images(tmp_path).summary
    (tmp_path / "metadata.csv").write_text("file_name,text\n0.png,cat\n1.png,dog\n")
    assert "did you mean" not in open_images(tmp_path).summary
    (tmp_path / "metadata.csv").write_text("filename,label\n0.png,cat\n1.png,dog\n")
    assert counts(tmp_path) == {"cat": 1, "dog": 1}
    (tmp_path / "metadata.csv").write_text("path,label\n0.png,cat\n1.png,dog\n")
    assert "metadata.csv has no column file_name, so its labels are not used" in open_images(tmp_path).summary


@pytest.mark.parametrize("rows", ['0.png,"cat\n1.png,dog\n2.png,dog\n', '0.png,"cat" dog\n1.png,dog\n2.png,dog\n'])
def test_a_quote_that_is_not_closed(tmp_path, rows):
    """What follows is not taken for the label."""
    photos(tmp_path, (".",), per=3)
    (tmp_path / "metadata.csv").write_text(f"file_name,label\n{rows}")
    with pytest.raises(DetailFlowError, match=r"metadata.csv cannot be read .*: a quote that begins a cell must be"):
        open_images(tmp_path)


@pytest.mark.parametrize("data", [None, 3, b"photos", ["photos"]])
def test_what_is_no_path(data):
    with pytest.raises(DetailFlowError, match="^data must be a path or a name, not "):
        open_images(data)


@pytest.mark.parametrize("header", ["file_name,label,label", "file_name,label,Label ", "file_name,file_name,label"])
def test_a_column_twice(tmp_path, header):
    photos(tmp_path, (".",), per=1)
    (tmp_path / "metadata.csv").write_text(f"{header}\n0.png,0.png,cat\n")
    with pytest.raises(DetailFlowError, match="metadata.csv has several columns called"):
        open_images(tmp_path)


@pytest.mark.parametrize("twice", ['"label": "cat", "label": "dog"', '"label": "cat", "file_name": "0.png"'])
def test_an_entry_twice(tmp_path, twice):
    """Of two in one object the last was taken without a word."""
    photos(tmp_path, (".",), per=2)
    rows = ['{"file_name": "1.png", "label": "cat"}', f'{{"file_name": "0.png", {twice}}}']
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
    with pytest.raises(
        DetailFlowError, match=r"metadata\.jsonl row 2 has several entries called (label|file_name): keep"
    ):
        open_images(tmp_path)


ROW = '{"file_name": "0.png", "label": "cat"}\n'


@pytest.mark.parametrize(
    ("suffix", "text", "message"),
    [
        ("jsonl", ROW + '{"file_name": "1.png", "labels": "dog"}', "1.png has no label: give every image one, or none"),
        ("jsonl", ROW + '{"label": "dog"}', "metadata.jsonl row 2 has a label and no file_name"),
        ("csv", "file_name,label\n0.png,cat\n,dog\n", "metadata.csv row 2 has a label and no file_name"),
        ("jsonl", ROW + '{"file_name', "metadata.jsonl row 2 is not valid JSON"),
    ],
)
def test_a_row_without_its_label_or_name(tmp_path, suffix, text, message):
    """The image was left aside as if it had no row."""
    photos(tmp_path, (".",), per=2)
    (tmp_path / f"metadata.{suffix}").write_text(text)
    with pytest.raises(DetailFlowError, match=message):
        open_images(tmp_path)


@pytest.mark.parametrize(
    "row",
    [
        '{"file_name": "2.png", "text": "a cat"}',
        '{"file_name": ["0.png"], "text": "x"}',
        '{"file_name": "/etc/hostname"}',
    ],
)
def test_a_file_of_captions_beside_one_of_labels(tmp_path, row):
    """It gives no labels, so its rows mean nothing here."""
    photos(tmp_path, (".",), per=3)
    write_metadata(tmp_path / "metadata.csv", {"0.png": "cat", "1.png": "dog"})
    (tmp_path / "metadata.jsonl").write_text(row)
    source = open_images(tmp_path)
    assert source.counts == {"cat": 1, "dog": 1} and "left aside: 1 image without a row" in source.summary


def test_the_last_rows_of_no_label(tmp_path):
    photos(tmp_path, (".",), per=1)
    (tmp_path / "metadata.jsonl").write_text(ROW + '{"label": -1}\n{"label": "  "}\n{"label": null}\n')
    assert counts(tmp_path) == {"cat": 1}


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")], ids=str)
def test_accents_of_another_system(tmp_path, forms):
    """Archives that macOS made have names with accents as characters of their own."""
    ours, theirs = (unicodedata.normalize(form, "café.png") for form in forms)
    save(tmp_path / ours)
    write_metadata(tmp_path / "metadata.csv", {theirs: "cat"})
    assert counts(tmp_path) == {"cat": 1}


def test_accents_of_both_systems(tmp_path):
    """The name as it is written goes before the other one, whose label is of no file."""
    composed, decomposed = (unicodedata.normalize(form, "café.png") for form in ("NFC", "NFD"))
    save(tmp_path / composed)
    for rows in ({composed: "cat", decomposed: "dog"}, {decomposed: "dog", composed: "cat"}):
        write_metadata(tmp_path / "metadata.csv", rows)
        with pytest.warns(UserWarning, match="names 1 file that cannot be found"):
            assert open_images(tmp_path).counts == {"cat": 1}


def test_metadata_in_parquet_is_named(tmp_path):
    photos(tmp_path, (".",), per=1)
    (tmp_path / "metadata.parquet").write_bytes(b"PAR1")
    source = open_images(tmp_path)
    assert len(source) == 1 and "metadata.parquet is not read: write metadata.csv" in source.summary


def test_metadata_of_some_class_folders_is_left_aside(folder):
    write_metadata(folder / "cat" / "metadata.csv", {"0.png": "pug"})
    with pytest.warns(
        UserWarning, match=r"cat.metadata\.csv is left aside: it says nothing of images in other folders"
    ):
        assert open_images(folder).counts == ALL
    for name in CLASSES:
        write_metadata(folder / name / "metadata.csv", {f"{index}.png": f"{index}" for index in range(4)})
    assert counts(folder) == {str(index): 3 for index in range(4)}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"../secret.png": "cat"}, "names ../secret.png, which is not in the folder"),
        ({"/etc/hostname": "cat"}, "which is not in the folder"),
        ({"sub/../../secret.png": "cat"}, "which is not in the folder"),
        ({"gone.png": "cat"}, "has no image that metadata.csv names"),
        ({"0.png": "cat", "1.png": ""}, "1.png has no label"),
        ({"0.png": "cat", "./0.png": "dog"}, "row 2 gives ./0.png the label 'dog'"),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:metadata.csv names")
def test_wrong_metadata(tmp_path, rows, message):
    photos(tmp_path / "set", (".",), per=2)
    save(tmp_path / "secret.png")
    write_metadata(tmp_path / "set" / "metadata.csv", rows)
    with pytest.raises(DetailFlowError, match=message):
        open_images(tmp_path / "set")


@pytest.mark.parametrize(
    "content", [b"\xff\xfe", b"[]\n", b"{", b'{"file_name": 3, "label": 1}', b'{"file_name": "0.png", "label": {}}']
)
def test_damaged_metadata(tmp_path, content):
    photos(tmp_path, (".",), per=1)
    (tmp_path / "metadata.jsonl").write_bytes(content)
    with pytest.raises(DetailFlowError, match="metadata.jsonl"):
        open_images(tmp_path)


# ------------------------------------------------------------------------------------------------- save_to_disk


def test_a_folder_by_save_to_disk(folder, tmp_path):
    datasets = pytest.importorskip("datasets", reason="needs detailflow[train]")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    cells = [{"bytes": (folder / name / "0.png").read_bytes(), "path": None} for name in ("cat", "dog", "dog")]
    whole = datasets.Dataset.from_dict({"image": cells, "label": [0, 1, 1]}, features)
    datasets.disable_progress_bars()
    whole.save_to_disk(str(tmp_path / "one"), num_shards=2)
    datasets.DatasetDict(train=whole, validation=whole.select([1])).save_to_disk(str(tmp_path / "splits"))
    datasets.enable_progress_bars()
    source = open_images(tmp_path / "one")
    assert source.counts == {"cat": 1, "dog": 2} and source.image(2).size == (8, 8)
    assert source.name(2).endswith("one/data-00001-of-00002.arrow row 0")
    moved = shutil.copytree(tmp_path / "one", tmp_path / "moved")
    assert open_images(moved).fingerprint == source.fingerprint
    with pytest.raises(DetailFlowError, match="no split 'test': it was saved as one set"):
        open_images(moved, split="test")
    assert open_images(tmp_path / "splits").counts == source.counts
    assert open_images(tmp_path / "splits", split="val").counts == {"cat": 0, "dog": 1}
    (moved / "state.json").write_text("{")
    (folder / "state.json").write_text("{}")  # of something else
    assert counts(folder) == ALL
    (folder / "dataset_dict.json").write_text("{}")
    with pytest.raises(DetailFlowError, match="no split that was saved"):
        open_images(folder)
    with pytest.raises(DetailFlowError, match="is not a readable folder by `save_to_disk`"):
        open_images(moved)


def test_some_images_are_of_every_class(folder: Path):
    """And one that cannot be read gives way to its neighbour."""
    assert [image.getpixel((0, 0))[:2] for image in open_images(folder).some(3)] == [(0, 3), (1, 3), (2, 3)]
    (folder / "dog" / "3.png").write_text("no image")
    assert [image.getpixel((0, 0))[:2] for image in open_images(folder).some(3)] == [(0, 3), (1, 2), (2, 3)]
    assert len(list(open_images(folder).some(100))) == 11
