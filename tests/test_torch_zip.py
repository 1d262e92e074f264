"""What torch.save writes can't expand; other zip files of the same content can."""

import os
import zipfile
from pathlib import Path

import pytest
import torch

from detailflow.errors import DetailFlowError
from detailflow.torch_zip import check_torch_zip


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
    check_torch_zip(plain)
    check_torch_zip(again(plain, "stored.pt", zipfile.ZIP_STORED))
    torch.save({"a": torch.zeros(3)}, plain.with_name("old.pt"), _use_new_zipfile_serialization=False)
    check_torch_zip(plain.with_name("old.pt"))


def test_compressed_members(plain: Path):
    file = again(plain, "small.pt", zipfile.ZIP_DEFLATED)
    assert file.stat().st_size < 5000 and len(torch.load(file, weights_only=True)["a"]) == 100_000  # torch itself reads it
    with pytest.raises(DetailFlowError, match="refused to load .*small.pt: its members are compressed or overlap"):
        check_torch_zip(file)


def test_names_that_share_a_member(plain: Path):
    with zipfile.ZipFile(plain, "a") as archive:
        (large,) = (item for item in archive.infolist() if item.filename.endswith("data/0"))
        archive.filelist.append(large)
        archive.writestr("plain/more", b"")
    with pytest.raises(DetailFlowError, match="compressed or overlap"):
        check_torch_zip(plain)


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
            check_torch_zip(plain.with_name("hidden.pt"))


def test_files_that_are_damaged(plain: Path):
    with pytest.raises(DetailFlowError, match="could not read .*none.pt: No such file"):
        check_torch_zip(plain.with_name("none.pt"))
    os.mkfifo(plain.with_name("pipe.pt"))
    with pytest.raises(DetailFlowError, match="could not read .*pipe.pt: it is no regular file"):
        check_torch_zip(plain.with_name("pipe.pt"))
    content = plain.read_bytes()
    for cut in (4, 40, len(content) // 2, len(content) - 30, len(content) - 1):
        plain.write_bytes(content[:cut])
        with pytest.raises(DetailFlowError, match="plain.pt"):
            check_torch_zip(plain)
