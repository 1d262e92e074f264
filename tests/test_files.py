"""Tensors on disk: one file or shards, and how much of them is in memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from detailflow.errors import DetailFlowError
from detailflow.files import (
    LARGEST_YAML,
    PIECE,
    held,
    in_pieces,
    load_yaml,
    output_names,
    read_headers,
    read_json,
    read_state_dict,
    read_tensors,
    read_yaml,
    replacing,
    write_tensors,
)


def some_tensors(count: int = 6) -> dict[str, torch.Tensor]:
    return {f"t{i}": torch.randn(100, 10) for i in range(count)}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


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


def test_shards_and_back_to_one_file(tmp_path: Path):
    tensors = some_tensors()
    write_tensors(tmp_path, tensors, "10KB")
    assert names(tmp_path) == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)] + [
        "model.safetensors.index.json"
    ]
    assert same(read_tensors(tmp_path), tensors)
    assert read_headers(tmp_path)["t3"] == ("F32", (100, 10))
    write_tensors(tmp_path, tensors, "20KB")
    assert names(tmp_path) == [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)] + ["model.safetensors.index.json"]
    assert same(read_tensors(tmp_path), tensors)
    write_tensors(tmp_path, tensors)
    assert names(tmp_path) == ["model.safetensors"]
    assert same(read_tensors(tmp_path), tensors)


def test_a_type_and_a_choice_of_tensors(tmp_path: Path):
    tensors = some_tensors()
    write_tensors(tmp_path, tensors)
    assert same(read_tensors(tmp_path, torch.bfloat16), {name: t.bfloat16() for name, t in tensors.items()})
    assert same(read_tensors(tmp_path, wanted={"t2", "t5", "t9"}), {name: tensors[name] for name in ("t2", "t5")})


def test_the_tensors_are_copies(tmp_path: Path):
    write_tensors(tmp_path, some_tensors())
    tensors = read_tensors(tmp_path)
    save_file({"t0": torch.zeros(600, 10)}, tmp_path / "model.safetensors")  # written over in place
    assert not any((tensor == 0).all() for tensor in tensors.values())


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("[]", "must hold a JSON object, not a list"),
        ("{}", "must name the file of each tensor under 'weight_map'"),
        ('{"weight_map": ["a.safetensors"]}', "must name the file of each tensor"),
        ('{"weight_map": {"t0": 3}}', "names 3, which is no .safetensors file beside it"),
        ('{"weight_map": {"t0": "../other/model.safetensors"}}', "names '../other/model.safetensors', which is no"),
        ('{"weight_map": {"t0": "model.pt"}}', "names 'model.pt', which is no .safetensors file beside it"),
        ('{"weight_map": {"t0": "model-00009-of-00009.safetensors"}}', "has no model-00009-of-00009.safetensors"),
    ],
)
def test_a_damaged_index(index: str, message: str, tmp_path: Path):
    write_tensors(tmp_path, some_tensors(), "10KB")
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(DetailFlowError, match=message):
        read_tensors(tmp_path)


def test_a_truncated_shard(tmp_path: Path):
    write_tensors(tmp_path, some_tensors(), "10KB")
    shard = tmp_path / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(DetailFlowError, match="model-00002-of-00003.safetensors: it is damaged or incomplete"):
        read_tensors(tmp_path)


@pytest.mark.parametrize("size", ["5X", "", "GB", "0GB", "-5GB", "infGB", "1e999GB", "12"])
def test_a_shard_size_that_is_none(size: str, tmp_path: Path):
    with pytest.raises(DetailFlowError, match="the shard size must be like 5GB or 200MB, not"):
        write_tensors(tmp_path, some_tensors(), size)
    assert names(tmp_path) == []


def test_pieces():
    sizes = {"a": PIECE // 2, "b": PIECE // 2, "c": 3 * PIECE, "d": 1, "e": 1}
    assert list(in_pieces(sizes)) == [["a", "b"], ["c"], ["d", "e"]]
    assert list(in_pieces({})) == []


HOLD = """
import sys
from pathlib import Path
from detailflow.files import held
with held(Path(sys.argv[1]), "run"):
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


def test_text_comes_from_regular_files_of_a_bounded_size(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "zero.json").symlink_to("/dev/zero")
    for name in ("pipe.json", "zero.json"):
        with pytest.raises(DetailFlowError, match=f"could not read .*{name}: it is no regular file"):
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
            held(folder, "run"),
        ):
            pass
        assert folder.exists()
        other.kill()  # and what it held is free
    with held(folder, "run"):
        (folder / "kept").touch()
    assert [path.name for path in folder.iterdir()] == ["kept"]
    with held(tmp_path / "new", "run"):
        assert (tmp_path / "new").exists()
    assert not (tmp_path / "new").exists()
    with pytest.raises(DetailFlowError, match="cannot write to .*kept: it is no folder"), held(folder / "kept", "run"):
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
    with pytest.raises(DetailFlowError, match="cannot write to .*out: "), held(folder, "run"):
        pass
    assert names(tmp_path) == ["diary.txt", "out"] and (tmp_path / "diary.txt").read_text() == "dear diary"


def test_a_killed_process_leaves_no_lock_to_its_workers(tmp_path: Path):
    """Forked workers, which live on for seconds, have its open files."""
    code = (
        "import os, sys, time; from pathlib import Path; from detailflow.files import held\n"
        "with held(Path(sys.argv[1]), 'run'):\n"
        "    worker = os.fork()\n"
        "    time.sleep(0.2) if worker else None\n"
        "    print(worker, flush=True) if worker else None\n"
        "    time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout
        worker = int(other.stdout.readline())
        try:
            with pytest.raises(DetailFlowError, match="at work"), held(tmp_path, "run"):
                pass
            other.kill()
            other.wait()
            with held(tmp_path, "run"):
                pass
        finally:
            os.kill(worker, 9)


def test_what_a_killed_process_left_goes(tmp_path: Path):
    mine = [".a", ".b.tmp", ".c.12.tmp", "d.12-0123abcd.tmp"]
    for name in (*mine, ".samples.npz.12-0123abcd.tmp"):
        (tmp_path / name).touch()
    with held(tmp_path, "run"):
        assert names(tmp_path) == sorted([*mine, ".lock"])


def test_temporary_files_follow_no_link(tmp_path: Path):
    """Their names cannot be known before, as several machines that share a folder have processes of one number."""
    with replacing(tmp_path / "a") as first, replacing(tmp_path / "a") as second:
        assert first != second
    (tmp_path / "diary.txt").write_text("dear diary")
    (tmp_path / "b").symlink_to(tmp_path / "diary.txt")
    with replacing(tmp_path / "b") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "diary.txt").read_text() == "dear diary" and (tmp_path / "b").read_text() == "new"


def test_tensors_come_from_regular_files(tmp_path: Path):
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(DetailFlowError, match=r"could not read .*model.safetensors: it is no regular file"):
        read_tensors(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "a.safetensors"}}')
    os.mkfifo(tmp_path / "a.safetensors")
    for read in (read_headers, read_tensors):
        with pytest.raises(DetailFlowError, match=r"could not read .*a.safetensors: it is no regular file"):
            read(tmp_path)


@pytest.mark.parametrize(
    "header",
    [
        {"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 16]}},
        {"a": {"dtype": "F32", "shape": [2**63, 2], "data_offsets": [0, 16]}},
        {"a": {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]}},
        {name: {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} for name in "ab"},
        {"a": {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]}},
        {"a": {"dtype": "F32", "shape": [4], "data_offsets": [2**60, 2**60 + 16]}},
        {"a": {"dtype": "F99", "shape": [4], "data_offsets": [0, 16]}},
        {"a": {"dtype": "F4", "shape": [32], "data_offsets": [0, 16]}},
        {"a": {"dtype": "F6_E2M3", "shape": [16], "data_offsets": [0, 12]}},
        {"a": {"dtype": "C64", "shape": [2], "data_offsets": [0, 16]}},
        {"a": {"dtype": "BOOL", "shape": [16], "data_offsets": [0, 16]}},
    ],
)
def test_headers_that_lie(tmp_path: Path, header: dict[str, object]):
    content = json.dumps(header).encode()
    (tmp_path / "a.safetensors").write_bytes(len(content).to_bytes(8, "little") + content + bytes(16))
    with pytest.raises(DetailFlowError, match=r"a\.safetensors"):
        read_tensors(tmp_path / "a.safetensors", torch.float32)


@pytest.mark.parametrize("length", [0, 2**30, 2**63, 2**64 - 1])
def test_a_header_of_a_length_that_cannot_be(tmp_path: Path, length: int):
    (tmp_path / "a.safetensors").write_bytes(length.to_bytes(8, "little") + b"{}" + bytes(16))
    with pytest.raises(DetailFlowError, match=r"could not read .*a\.safetensors: it is damaged"):
        read_headers(tmp_path / "a.safetensors")


def test_a_state_dict_that_grows(tmp_path: Path):
    torch.save({"a": torch.zeros(1).expand(10**9)}, tmp_path / "a.pt")
    with pytest.raises(DetailFlowError, match=r"a in .*a.pt has more numbers than the file"):
        read_state_dict(tmp_path / "a.pt")


def test_a_state_dict_of_either_kind(tmp_path: Path):
    tensors = some_tensors()
    torch.save(tensors, tmp_path / "a.pth")
    save_file(tensors, tmp_path / "a.safetensors")
    assert same(read_state_dict(tmp_path / "a.pth"), tensors) and same(
        read_state_dict(tmp_path / "a.safetensors"), tensors
    )
    for content in ([1], torch.zeros(2), {"a": 1}, {1: torch.zeros(2)}):
        torch.save(content, tmp_path / "b.pth")
        with pytest.raises(DetailFlowError, match="b.pth must hold tensors by name and nothing else"):
            read_state_dict(tmp_path / "b.pth")
    (tmp_path / "b.pth").write_bytes((tmp_path / "a.pth").read_bytes()[:-100])
    with pytest.raises(DetailFlowError, match="b.pth: it is damaged, incomplete"):
        read_state_dict(tmp_path / "b.pth")


LOAD = Path(__file__).with_name("load_gpt.py")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's account of a process's memory")
def test_loading_holds_little_more_than_the_model(tmp_path: Path):
    """Published checkpoints carry optimizer state and are in float32; ours may be as well."""
    from detailflow import DetailFlowGPT
    from detailflow.convert import save_published
    from detailflow.models.gpt import GPTConfig

    model = DetailFlowGPT(
        GPTConfig(num_classes=10, width=768, depth=10, heads=12)
    )  # 75M parameters, 151 MB in bfloat16
    model.save_pretrained(tmp_path / "ours")
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    save_published(tmp_path / "published", "gpt", config, model.state_dict())
    path = tmp_path / "published" / "checkpoints" / "128.pt"
    state = torch.load(path, weights_only=True, mmap=True)
    moments = {name: tensor.clone() for name, tensor in state["model"].items()}
    torch.save({**state, "model": moments, "optimizer": {"state": {0: moments}}, "steps": 1}, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)
    for folder in ("ours", "published"):
        run = subprocess.run([sys.executable, LOAD, tmp_path / folder], capture_output=True, text=True, check=True)
        size, held = map(int, run.stdout.split())
        assert size > 100e6 and held < 1.3 * size + 200e6, folder
