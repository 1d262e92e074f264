"""Files are replaced whole, locked and read with bounds."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from detailflow.errors import DetailFlowError
from detailflow.files import (
    LARGEST_YAML,
    lock_folder,
    making,
    output_names,
    read_json,
    read_yaml,
    replacing,
    write_json,
)
from detailflow.plain_yaml import load_yaml


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_names_of_outputs():
    """All different whatever the file system, short, and without separators."""
    names = output_names(
        ["x", "X", "x", "x-2", "a/b\\c\nd", "", "caf\udce9", "e\u0301", "\u00e9", "y" * 300, "y" * 300, "猫" * 100]
    )
    assert names[:9] == ["x", "X-2", "x-3", "x-2-2", "a-b-c-d", "image", "caf\ufffd", "e\u0301", "\u00e9-2"]
    assert names[9:] == ["y" * 100, "y" * 100 + "-2", "猫" * 33]
    many = output_names(["image"] * 5000)
    assert len(set(many)) == 5000


def test_a_file_with_as_long_a_name_as_can_be(tmp_path: Path):
    path = tmp_path / ("x" * 250 + ".json")
    with replacing(path) as temporary:
        temporary.write_text("{}")
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


HOLD = """
import sys
from pathlib import Path
from detailflow.files import lock_folder
with lock_folder(Path(sys.argv[1]), "run"):
    print("held", flush=True)
    sys.stdin.read()
"""


BOMB = "a0: &a0 [1,1,1,1,1,1,1,1,1]\n" + "".join(f"a{k}: &a{k} [{','.join([f'*a{k - 1}'] * 9)}]\n" for k in range(1, 9))
NOT_YAML = (
    *(BOMB, "a: &a [*a]", "[" * 3000, "a: " + "9" * 5000, "a: !!int x", "a: 2020-13-45", "a: !!python/name:os.system"),
    *("? [a]\n: b", "<<: 1"),
)


@pytest.mark.parametrize("text", NOT_YAML, ids=range(len(NOT_YAML)))
def test_yaml_that_is_none(text: str):
    with pytest.raises(yaml.YAMLError):
        load_yaml(text)


def test_aliases_that_stand_for_little():
    values = load_yaml("a: &a {b: [1, 2]}\nc: *a\nd: {<<: *a, e: 3}")
    assert values == {"a": {"b": [1, 2]}, "c": {"b": [1, 2]}, "d": {"b": [1, 2], "e": 3}}


@pytest.mark.parametrize("text", ["a: 1\nb: 2\na: 3", "c: {a: 1, 'a': 1}", "- 1: 2\n  a: 3\n  a: 4"])
def test_a_key_that_is_there_twice(text: str):
    with pytest.raises(yaml.YAMLError, match="a is there twice"):
        load_yaml(text)
    assert load_yaml("a: &a {b: 1, c: 3}\nd: {<<: *a, b: 2}")["d"] == {"b": 2, "c": 3}
    with pytest.raises(yaml.YAMLError, match="<< is there twice"):
        load_yaml("a: &a {c: 1}\nb: &b {c: 2}\nd:\n  <<: *a\n  <<: *b")


def test_numbers_are_as_they_look(tmp_path: Path):
    """Those that YAML would take for other ones stay text, also what was text before it was written."""
    numbers = {"0": 0, "-7": -7, "1_000": 1000, "1.0e-3": 1e-3, "0.5": 0.5, ".5": 0.5, "-.inf": -math.inf, "1.": 1}
    others = {"true": True, "null": None, "~": None, "off": False, "": None}
    text = ["0100", "-010", "08", "1:30", "1:30.5", "0x10", "0b11", "1e-3", ".iNf", "+"]
    for given, value in (numbers | others | {word: word for word in text}).items():
        assert load_yaml(f"a: {given}") == {"a": value}
    assert [type(load_yaml(given)) for given in ("1", "1.0")] == [int, float]
    words = [*text, *numbers, *others]
    assert load_yaml(yaml.safe_dump(words)) == words


def test_text_comes_from_regular_files_of_a_bounded_size(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "zero.json").symlink_to("/dev/zero")
    for name in ("pipe.json", "zero.json"):
        with pytest.raises(DetailFlowError, match=f"could not read .*{name}: it is not a regular file"):
            read_json(tmp_path / name)
    (tmp_path / "large.yaml").write_text("#" * (LARGEST_YAML + 1))
    with pytest.raises(OSError, match="it is larger than 262,144 bytes"):
        read_yaml(tmp_path / "large.yaml")


def test_a_folder_is_held_by_one_process(tmp_path: Path):
    folder = tmp_path / "a" / "b"
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout and other.stdout.readline() == "held\n"
        with (
            pytest.raises(DetailFlowError, match="another run is at work in .*b: choose another folder, or wait"),
            lock_folder(folder, "run"),
        ):
            pass
        assert folder.exists()
        other.kill()  # and what it held is free
    with lock_folder(folder, "run"):
        (folder / "kept").touch()
    assert [path.name for path in folder.iterdir()] == ["kept"]
    with lock_folder(tmp_path / "new", "run"):
        assert (tmp_path / "new").exists()
    assert not (tmp_path / "new").exists()
    with (
        pytest.raises(DetailFlowError, match="cannot write to .*kept: it is not a folder"),
        lock_folder(folder / "kept", "run"),
    ):
        pass


@pytest.mark.parametrize("kind", ["link", "dangling link", "pipe", "folder"])
def test_a_lock_that_is_no_file(tmp_path: Path, kind: str):
    """A link would lead to a file that nobody named, and a pipe would be waited for."""
    (tmp_path / "diary.txt").write_text("dear diary")
    folder = tmp_path / "out"
    folder.mkdir()
    if kind == "pipe":
        os.mkfifo(folder / ".lock")
    elif kind == "folder":
        (folder / ".lock").mkdir()
    else:
        (folder / ".lock").symlink_to(tmp_path / ("diary.txt" if kind == "link" else "new.txt"))
    with pytest.raises(DetailFlowError, match="cannot write to .*out: "), lock_folder(folder, "run"):
        pass
    assert names(tmp_path) == ["diary.txt", "out"] and (tmp_path / "diary.txt").read_text() == "dear diary"


def test_a_killed_process_leaves_no_lock_to_its_workers(tmp_path: Path):
    """Forked workers, which live on for seconds, have its open files."""
    code = (
        "import os, sys, time; from pathlib import Path; from detailflow.files import lock_folder\n"
        "with lock_folder(Path(sys.argv[1]), 'run'):\n"
        "    worker = os.fork()\n"
        "    time.sleep(0.2) if worker else None\n"
        "    print(worker, flush=True) if worker else None\n"
        "    time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout
        worker = int(other.stdout.readline())
        try:
            with pytest.raises(DetailFlowError, match="at work"), lock_folder(tmp_path, "run"):
                pass
            other.kill()
            other.wait()
            with lock_folder(tmp_path, "run"):
                pass
        finally:
            os.kill(worker, 9)


def test_what_a_killed_process_left_goes(tmp_path: Path):
    mine = [".a", ".b.tmp", ".c.12.tmp", "d.99999999-0123abcd.tmp"]
    for name in (*mine, ".samples.npz.99999999-0123abcd.tmp"):
        (tmp_path / name).touch()
    with lock_folder(tmp_path, "run"):
        assert names(tmp_path) == sorted([*mine, ".lock"])


def test_what_a_process_at_work_is_writing_stays(tmp_path: Path):
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as other:
        being_written = tmp_path / f".model.safetensors.{other.pid}-0123abcd.tmp"
        being_written.touch()
        with lock_folder(tmp_path, "run"):
            assert being_written.exists()
        other.kill()
        other.wait()
        with lock_folder(tmp_path, "run"):
            assert not being_written.exists()


def test_what_it_left_in_folders_within_goes_unless_another_is_at_work_there(tmp_path: Path):
    for folder in ("pictures", "gpt", "pictures/deeper"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / ".a.png.99999999-0123abcd.tmp").touch()
    with lock_folder(tmp_path / "gpt", "run"):
        (tmp_path / "gpt" / ".b.99999999-0123abcd.tmp").touch()
        with lock_folder(tmp_path, "run"):
            assert names(tmp_path / "pictures") == ["deeper"]
            assert names(tmp_path / "gpt") == [".b.99999999-0123abcd.tmp", ".lock"]
            assert names(tmp_path / "pictures" / "deeper") == [".a.png.99999999-0123abcd.tmp"]


def test_also_where_models_are_written(tmp_path: Path):
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as other:
        being_written = f".model.safetensors.{other.pid}-0123abcd.tmp"
        fresh = ".model.safetensors.99999998-0123abcd.tmp"  # perhaps of another machine
        for name in (".model.safetensors.99999999-0123abcd.tmp", being_written, "model.safetensors", fresh):
            (tmp_path / name).touch()
            if name != fresh:
                os.utime(tmp_path / name, (0, 0))
        with replacing(tmp_path / "a") as ours, making(tmp_path), replacing(tmp_path / "config.json"):
            assert ours.exists()
        other.kill()
    assert names(tmp_path) == sorted([being_written, fresh, "a", "config.json", "model.safetensors"])


def test_temporary_files_follow_no_link(tmp_path: Path):
    """Their names cannot be known before, as several machines that share a folder have processes of one number."""
    with replacing(tmp_path / "a") as first, replacing(tmp_path / "a") as second:
        assert first != second
    (tmp_path / "diary.txt").write_text("dear diary")
    (tmp_path / "b").symlink_to(tmp_path / "diary.txt")
    with replacing(tmp_path / "b") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "diary.txt").read_text() == "dear diary" and (tmp_path / "b").read_text() == "new"


@pytest.mark.parametrize("kind", ["folder", "pipe", "device", "link to a pipe"])
def test_only_a_regular_file_is_replaced(kind: str, tmp_path: Path):
    path = tmp_path / "figures.json"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path = Path("/dev/null")
    else:
        os.mkfifo(tmp_path / "pipe")
        path.symlink_to(tmp_path / "pipe")
    before, content = os.lstat(path).st_ino, names(tmp_path)
    reason = "a folder, not a file" if kind == "folder" else "not a regular file"
    with pytest.raises(DetailFlowError, match=f"cannot write {path}: it is {reason}"):
        write_json(path, {})
    assert os.lstat(path).st_ino == before and names(tmp_path) == content
