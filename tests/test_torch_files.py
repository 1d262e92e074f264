"""What torch.save writes cannot expand; other zip files of the same content can."""

import argparse
import os
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from detailflow.errors import DetailFlowError
from detailflow.torch_files import check_torch_file, load_torch


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    torch.save({"a": torch.zeros(100_000), "b": [1, "c"]}, tmp_path / "plain.pt")
    return tmp_path / "plain.pt"


def again(plain: Path, name: str, compression: int) -> Path:
    with zipfile.ZipFile(plain) as old, zipfile.ZipFile(plain.with_name(name), "w", compression) as new:
        for item in old.namelist():
            new.writestr(item, old.read(item))
    return plain.with_name(name)


def test_files_that_pass(plain: Path):
    """The check raises nothing, and torch reads the same from each."""
    content = torch.load(plain, weights_only=True)
    torch.save(content, plain.with_name("old.pt"), _use_new_zipfile_serialization=False)
    for file in (plain, again(plain, "stored.pt", zipfile.ZIP_STORED), plain.with_name("old.pt")):
        check_torch_file(file)
        found = torch.load(file, weights_only=True)
        assert torch.equal(found["a"], torch.zeros(100_000)) and found["b"] == [1, "c"]


def test_several_threads_load_at_once(tmp_path: Path):
    """Torch's list of what may be in a file belongs to the process: one thread must not take it from another."""
    torch.save({"model": {"a": torch.ones(3)}, "args": argparse.Namespace(a=1)}, tmp_path / "a.pt")
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(load_torch, [tmp_path / "a.pt"] * 200))
    assert all(content["args"].a == 1 for content in found)


def test_compressed_members(plain: Path):
    file = again(plain, "small.pt", zipfile.ZIP_DEFLATED)
    assert (
        file.stat().st_size < 5000 and len(torch.load(file, weights_only=True)["a"]) == 100_000
    )  # torch itself reads it
    with pytest.raises(DetailFlowError, match="refused to load .*small.pt: its members are compressed or overlap"):
        check_torch_file(file)


def test_names_that_share_a_member(plain: Path):
    with zipfile.ZipFile(plain, "a") as archive:
        (large,) = (item for item in archive.infolist() if item.filename.endswith("data/0"))
        archive.filelist.append(large)
        archive.writestr("plain/more", b"")
    with pytest.raises(DetailFlowError, match="compressed or overlap"):
        check_torch_file(plain)


def test_a_second_list_of_members(plain: Path):
    """Python's reader takes the list before the last record, torch's the one that the record names."""
    bomb = again(plain, "small.pt", zipfile.ZIP_DEFLATED).read_bytes()
    with zipfile.ZipFile(plain.with_name("hidden.pt"), "w") as archive:
        archive.writestr("harmless", b"")
    harmless = plain.with_name("hidden.pt").read_bytes()
    harmless = harmless[:-6] + bomb[-6:]  # the place of the list
    for content in (bomb[:-22] + harmless, plain.read_bytes() + bytes(30), b"PK\3\4" + plain.read_bytes()):
        plain.with_name("hidden.pt").write_bytes(content)
        with pytest.raises(DetailFlowError, match="hidden.pt"):
            check_torch_file(plain.with_name("hidden.pt"))


def test_files_that_are_damaged(plain: Path):
    with pytest.raises(DetailFlowError, match="could not read .*none.pt: No such file"):
        check_torch_file(plain.with_name("none.pt"))
    os.mkfifo(plain.with_name("pipe.pt"))
    with pytest.raises(DetailFlowError, match="could not read .*pipe.pt: it is not a regular file"):
        check_torch_file(plain.with_name("pipe.pt"))
    content = plain.read_bytes()
    for cut in (4, 40, len(content) // 2, len(content) - 30, len(content) - 1):
        plain.write_bytes(content[:cut])
        with pytest.raises(DetailFlowError, match="plain.pt"):
            check_torch_file(plain)


def pickled(path: Path, *parts: bytes, zipped: bool) -> Path:
    """A file whose pickle is of these opcodes."""
    content = b"\x80\x02" + b"".join(parts) + b"."
    if not zipped:
        path.write_bytes(content)
        return path
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/byteorder", b"little")
        archive.writestr("archive/data/0", bytes(16))
        archive.writestr("archive/version", b"3\n")
    return path


def number(value: int) -> bytes:
    return b"\x8a\x08" + value.to_bytes(8, "little", signed=True)


def text(value: str) -> bytes:
    return b"X" + len(value).to_bytes(4, "little") + value.encode()


STORAGE = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + b"%stQ"
TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n(" + STORAGE + b"%s\x89ccollections\nOrderedDict\n)RtR"
LARGE = {
    "a byte array": b"cbuiltins\nbytearray\n" + number(10**9) + b"\x85R",
    "text in hex": b"c_codecs\nencode\n" + text("a" * 1000) + text("hex") + b"\x86R",
    "many copies of a text": text("a" * 1000)
    + b"q\x01"
    + (b"c_codecs\nencode\nh\x01" + text("latin1") + b"\x86R") * 1000,
    "a tensor by its side": b"ctorch\nFloatTensor\n" + number(10**9) + b"\x85R",
    "a parameter by its side": b"ctorch._utils\n_rebuild_parameter\n" + number(10**9) + b"\x89}\x87R",
    "a storage": TENSOR % (number(10**9), b"K\x00K\x04\x85K\x01\x85"),
    "a tensor beyond its storage": TENSOR % (b"K\x04", b"K\x00" + number(10**9) + b"\x85K\x01\x85"),
    "a tensor in several parts": b"ctorch._utils\n_rebuild_nested_tensor\n)R",
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", LARGE)
def test_a_small_pickle_that_asks_for_much(tmp_path: Path, name: str, zipped: bool):
    file = pickled(tmp_path / "small.pt", LARGE[name], zipped=zipped)
    with pytest.raises(DetailFlowError, match="refused to load .*small.pt: it asks for"):
        check_torch_file(file)


def test_a_tensor_that_fits(tmp_path: Path):
    file = pickled(tmp_path / "small.pt", TENSOR % (b"K\x04", b"K\x00K\x02K\x02\x86K\x01K\x02\x86"), zipped=True)
    check_torch_file(file)
    assert torch.load(file, weights_only=True).shape == (2, 2)


def test_what_torch_saves(tmp_path: Path):
    network = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)).double()
    optimizer = torch.optim.AdamW(network.parameters())
    network(torch.zeros(5, 3, dtype=torch.double)).sum().backward()
    optimizer.step()
    content = {
        "network": network.state_dict(),
        "parameters": dict(network.named_parameters()),
        "optimizer": optimizer.state_dict(),
        "views": [torch.arange(12.0).reshape(3, 4).T, torch.zeros(0, 4), torch.zeros(()), torch.ones(9)[3:5]],
        "types": [torch.zeros(2, dtype=kind) for kind in (torch.bfloat16, torch.half, torch.uint8, torch.bool)],
        "plain": [
            1,
            2**70,
            1.5,
            None,
            True,
            "é",
            b"bytes\xff",
            {"a"},
            bytearray(b"b"),
            torch.Size([1]),
            torch.float32,
            (1, 2),
        ],
        "rng": torch.get_rng_state(),
        "device": torch.device("cpu"),
    }
    for zipped in (True, False):
        torch.save(content, tmp_path / "file.pt", _use_new_zipfile_serialization=zipped)
        check_torch_file(tmp_path / "file.pt")
        assert torch.load(tmp_path / "file.pt", weights_only=True)["plain"] == content["plain"]
    torch.save([torch.zeros(3, dtype=torch.uint16), torch.zeros(3, dtype=torch.float8_e5m2)], tmp_path / "new.pt")
    check_torch_file(tmp_path / "new.pt")


def test_two_pickles_in_a_zip_file(plain: Path):
    for name in ("PLAIN/DATA.PKL", "other/data.pkl"):
        with zipfile.ZipFile(again(plain, "two.pt", zipfile.ZIP_STORED), "a") as archive:
            archive.writestr(name, b"\x80\x02}.")
        with pytest.raises(DetailFlowError, match="two.pt"):
            check_torch_file(plain.with_name("two.pt"))


@pytest.mark.parametrize(
    "name", ["ccollections\nOrderedDict\n", "cargparse\nNamespace\n", "ctorch._utils\n_rebuild_tensor_v2\n"]
)
def test_a_pickle_cannot_change_the_check(tmp_path: Path, name: str):
    """BUILD sets attributes of what is on the stack."""
    changes = name.encode() + b"}" + text("function") + b"Nsb0"
    pickled(tmp_path / "file.pt", changes, LARGE["a tensor beyond its storage"], zipped=True)
    with pytest.raises(DetailFlowError, match=r"file\.pt"):
        check_torch_file(tmp_path / "file.pt")
