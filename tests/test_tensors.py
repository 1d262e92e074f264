"""Tensors on disk: one file or shards, and how much of them is in memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from detailflow.errors import DetailFlowError
from detailflow.tensors import PIECE, in_pieces, read_headers, read_state_dict, read_tensors, writing_tensors


def some_tensors(count: int = 6) -> dict[str, torch.Tensor]:
    return {f"t{i}": torch.randn(100, 10) for i in range(count)}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write_tensors(folder: Path, tensors: dict[str, torch.Tensor], *shard_size: str) -> None:
    with writing_tensors(folder, tensors, *shard_size):
        pass


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


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
        ('{"weight_map": {"t0": 3}}', "names 3, which is not a .safetensors file beside it"),
        ('{"weight_map": {"t0": "../other/model.safetensors"}}', "names '../other/model.safetensors', which is not a"),
        ('{"weight_map": {"t0": "model.pt"}}', "names 'model.pt', which is not a .safetensors file beside it"),
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


def test_tensors_come_from_regular_files(tmp_path: Path):
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(DetailFlowError, match=r"could not read .*model.safetensors: it is not a regular file"):
        read_tensors(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "a.safetensors"}}')
    os.mkfifo(tmp_path / "a.safetensors")
    for read in (read_headers, read_tensors):
        with pytest.raises(DetailFlowError, match=r"could not read .*a.safetensors: it is not a regular file"):
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
    from detailflow.models.gpt import GPTConfig
    from detailflow.published import saving_published

    model = DetailFlowGPT(
        GPTConfig(num_classes=10, width=768, depth=10, heads=12)
    )  # 75M parameters, 151 MB in bfloat16
    model.save_pretrained(tmp_path / "ours")
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    with saving_published(tmp_path / "published", "gpt", config, model.state_dict()):
        pass
    path = tmp_path / "published" / "checkpoints" / "128.pt"
    state = torch.load(path, weights_only=True, mmap=True)
    moments = {name: tensor.clone() for name, tensor in state["model"].items()}
    torch.save({**state, "model": moments, "optimizer": {"state": {0: moments}}, "steps": 1}, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)
    for folder in ("ours", "published"):
        run = subprocess.run([sys.executable, LOAD, tmp_path / folder], capture_output=True, text=True, check=True)
        size, held = map(int, run.stdout.split())
        assert size > 100e6 and held < 1.3 * size + 200e6, folder
