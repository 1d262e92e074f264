"""Token files: what is written comes back, and nothing else is taken for one."""

import io
import os
import pickle
import zipfile
from pathlib import Path
from random import Random

import numpy as np
import pytest

from detailflow import DetailFlowError, TokenSchedule
from detailflow.token_files import TokenFile

SCHEDULE = TokenSchedule(num_tokens=16, group_size=4, causal_tokens=None, image_size=32, patch_size=8)


def example(tokens: object = ((0, 1, 2, 3), (60, 61, 62, 63)), sizes: object = ((32, 32), (24, 40))) -> TokenFile:
    return TokenFile(np.array(tokens), np.array(sizes), ("cat", "Müde 猫")[: len(np.array(tokens))], "ab" * 32)


def entries(file: TokenFile, tmp_path: Path) -> dict[str, np.ndarray]:
    file.write(tmp_path / "entries.npz")
    with np.load(tmp_path / "entries.npz", allow_pickle=False) as stored:
        return dict(stored)


def test_a_folder_that_is_a_file(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(DetailFlowError, match=r"cannot write .*t\.npz: "):
        example().write(tmp_path / "file" / "t.npz")


def test_there_and_back(tmp_path: Path):
    path = tmp_path / "new" / "tokens.npz"
    example().write(path)
    example(((7,),), ((32, 32),)).write(path)  # an earlier one is replaced
    assert TokenFile.read(path).names == ("cat",)
    example().write(path)
    found = TokenFile.read(path)
    np.testing.assert_array_equal(found.tokens, example().tokens)
    np.testing.assert_array_equal(found.sizes, example().sizes)
    assert (found.names, found.fingerprint, found.tokens.dtype) == (example().names, "ab" * 32, np.int64)
    assert [path.name for path in path.parent.iterdir()] == ["tokens.npz"]
    found.check_fits(path, "ab" * 32, SCHEDULE, 64)


def test_numpy_reads_it(tmp_path: Path):
    stored = entries(example(), tmp_path)
    assert stored["tokens"].tolist() == [[0, 1, 2, 3], [60, 61, 62, 63]] and stored["tokens"].dtype == np.uint16
    assert stored["sizes"].tolist() == [[32, 32], [24, 40]]
    assert stored["names"].tolist() == ["cat", "Müde 猫"] and str(stored["fingerprint"]) == "ab" * 32
    np.savez_compressed(tmp_path / "again.npz", **stored)  # as other programs may write it
    assert TokenFile.read(tmp_path / "again.npz").tokens.tolist() == stored["tokens"].tolist()


def test_large_codes(tmp_path: Path):
    assert entries(example(((70_000, 1),), ((32, 32),)), tmp_path)["tokens"].tolist() == [[70_000, 1]]


@pytest.mark.parametrize("content", [b"a user's own", b"", None])
def test_a_file_of_the_users_own_is_not_replaced(content: bytes | None, tmp_path: Path):
    path = tmp_path / "tokens.npz"
    if content is None:
        np.savez(path, arr=np.arange(3))
    else:
        path.write_bytes(content)
    before = path.read_bytes()
    with pytest.raises(DetailFlowError, match="was not made by `detailflow encode`: move it"):
        example().write(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("name", "why"), [("a" * 300, "File name too long"), ("a\0b", ".*embedded null (byte|character in \\w+)")]
)
def test_a_name_that_no_file_can_have(name: str, why: str, tmp_path: Path):
    path = tmp_path / f"{name}.npz"
    for call, problem in ((TokenFile.read, "could not read"), (example().write, "cannot write")):
        with pytest.raises(DetailFlowError, match=f"^{problem} .*: {why}$"):
            call(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes with names")
def test_a_pipe_is_not_read_to_see_what_it_is(tmp_path: Path):
    os.mkfifo(tmp_path / "tokens.npz")
    with pytest.raises(DetailFlowError, match="was not made by `detailflow encode`: move it"):
        example().write(tmp_path / "tokens.npz")


def test_a_folder_in_place_of_a_token_file(tmp_path: Path):
    with pytest.raises(DetailFlowError, match=r"is a folder: give the name of a file, such as .*tokens\.npz"):
        example().write(tmp_path)
    with pytest.raises(DetailFlowError, match=r"could not read .*: it is a folder, not a file"):
        TokenFile.read(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": np.zeros((2, 0), np.uint16)}, "damaged, or no token file .*its tokens are uint16 of shape"),
        ({"tokens": np.zeros((2, 4))}, "its tokens are float64"),
        ({"tokens": np.array([[{}]], object)}, "Object arrays cannot be loaded"),
        ({"names": np.array([{}, {}], object)}, "Object arrays cannot be loaded"),
        ({"names": np.array(["cat"])}, "its names are <U3 of shape .1,., for 2 images"),
        ({"sizes": np.zeros((2, 3), np.int32)}, "its sizes are int32 of shape"),
        ({"sizes": None}, "no item named 'sizes.npy'"),
        ({"version": np.array(2)}, "is a token file of version 2, but this program reads 1"),
        ({"version": np.array([1, 2])}, "is a token file of version"),
        ({"format": np.array("another")}, "is not a token file: `detailflow encode` makes them"),
        ({"format": None}, "is not a token file"),
        ({"fingerprint": None}, "no item named 'fingerprint.npy'"),
    ],
)
def test_another_content(change: dict[str, np.ndarray | None], message: str, tmp_path: Path):
    changed = {name: value for name, value in (entries(example(), tmp_path) | change).items() if value is not None}
    np.savez(tmp_path / "tokens.npz", **changed)
    with pytest.raises(DetailFlowError, match=f"^{tmp_path / 'tokens.npz'} .*{message}"):
        TokenFile.read(tmp_path / "tokens.npz")


def test_a_pickle_is_not_executed(tmp_path: Path):
    class Attack:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return exec, (f"open({str(tmp_path / 'executed')!r}, 'w')",)

    example().write(tmp_path / "sound.npz")
    for member in ("tokens.npy", "format.npy", "names.npy"):
        path = tmp_path / "attack.npz"
        with zipfile.ZipFile(tmp_path / "sound.npz") as sound, zipfile.ZipFile(path, "w") as archive:
            for info in sound.infolist():
                archive.writestr(info, pickle.dumps(Attack()) if info.filename == member else sound.read(info))
        with pytest.raises(DetailFlowError, match="is damaged, or no token file"):
            TokenFile.read(path)
    (tmp_path / "tokens.npz").write_bytes(pickle.dumps(Attack()))
    with pytest.raises(DetailFlowError, match="is damaged, or no token file"):
        TokenFile.read(tmp_path / "tokens.npz")
    assert not (tmp_path / "executed").exists()


def test_a_small_file_stays_small(tmp_path: Path):
    stored = entries(example(), tmp_path) | {"tokens": np.zeros((2, 2**25), np.uint8)}
    np.savez_compressed(tmp_path / "bomb.npz", **stored)
    with pytest.raises(DetailFlowError, match="tokens grows from .* bytes to 67,10"):
        TokenFile.read(tmp_path / "bomb.npz")
    content = bytearray((tmp_path / "bomb.npz").read_bytes())
    place = content.rfind(b"tokens.npy") - 46 + 20  # in the list at the end: the size there is only what it says
    content[place : place + 4] = (2**24).to_bytes(4, "little")
    (tmp_path / "bomb.npz").write_bytes(content)
    with pytest.raises(DetailFlowError, match="tokens grows from .* bytes to 67,10"):
        TokenFile.read(tmp_path / "bomb.npz")
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<u2", "fortran_order": False, "shape": (2**40, 2**10)})
    example().write(tmp_path / "sound.npz")
    with zipfile.ZipFile(tmp_path / "sound.npz") as sound, zipfile.ZipFile(tmp_path / "vast.npz", "w") as archive:
        for info in sound.infolist():
            archive.writestr(info, header.getvalue() if info.filename == "tokens.npy" else sound.read(info))
    with pytest.raises(DetailFlowError, match="is damaged, or no token file"):
        TokenFile.read(tmp_path / "vast.npz")


def test_damaged_files(tmp_path: Path):
    """Any damage is found, or does no harm."""
    example().write(tmp_path / "sound.npz")
    sound, path, refused = (tmp_path / "sound.npz").read_bytes(), tmp_path / "tokens.npz", 0
    rng = Random(0)
    for number in range(400):
        content = bytearray(sound)
        for _ in range(rng.choice((1, 1, 3, 20))):
            content[rng.randrange(len(content))] = rng.randrange(256)
        path.write_bytes(content[: rng.randrange(len(content))] if number % 4 == 0 else content)
        try:
            file = TokenFile.read(path)
            file.check_fits(path, "ab" * 32, SCHEDULE, 64)
            assert file.tokens.shape == (2, 4) and len(file.names) == 2
        except DetailFlowError as error:
            assert str(error).startswith(str(path)) and "\n" not in str(error)
            refused += 1
    assert refused > 250


@pytest.mark.parametrize(
    ("file", "fingerprint", "message"),
    [
        (
            example(),
            "cd" * 32,
            "has the tokens of another tokenizer, abababababab, not of cdcdcdcdcdcd: give the model",
        ),
        (example(((1, 2, 3, 64),), ((32, 32),)), "ab" * 32, "is damaged: its tokens must be 0 to 63"),
        (example(((1, 2, 3, -1),), ((32, 32),)), "ab" * 32, "is damaged: its tokens must be 0 to 63"),
        (example(((1, 2, 3, 4, 5),), ((32, 32),)), "ab" * 32, "is damaged: no image has 5 tokens"),
        (example(((1, 2),), ((9_999_992, 8),)), "ab" * 32, "is damaged: no image is encoded at 9999992×8 pixels"),
        (example(((1, 2),), ((32, 0),)), "ab" * 32, "is damaged: no image is encoded at 32×0 pixels"),
        (example(((1, 2),), ((32, 33),)), "ab" * 32, "is damaged: no image is encoded at 32×33 pixels"),
    ],
)
def test_tokens_of_another_tokenizer(file: TokenFile, fingerprint: str, message: str):
    with pytest.raises(DetailFlowError, match=f"^some.npz {message}"):
        file.check_fits(Path("some.npz"), fingerprint, SCHEDULE, 64)


@pytest.mark.parametrize("kind", ["missing", "folder"])
def test_no_file(kind: str, tmp_path: Path):
    if kind == "folder":
        (tmp_path / "tokens.npz").mkdir()
    with pytest.raises(DetailFlowError, match=f"could not read {tmp_path / 'tokens.npz'}: "):
        TokenFile.read(tmp_path / "tokens.npz")
