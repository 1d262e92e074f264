import json
import os
from itertools import islice

import numpy as np
import pytest
import torch

from detailflow.data.token_batches import TokenBatches
from detailflow.data.token_writer import TokenWriter
from detailflow.data.tokens import TokenStore, TokenStoreInfo
from detailflow.distributed import World
from detailflow.errors import DetailFlowError

INFO = TokenStoreInfo(
    num_tokens=8, codebook_size=65536, crops=10, class_names=("cat", "dog", "frog"), tokenizer_fingerprint="abc"
)
FILES = ["codes.bin", "ids.jsonl", "labels.bin", "manifest.json"]
BAD = 33  # a slot whose image cannot be read
NAMES = [f"{INFO.class_names[k % 3]}/{k}.png" for k in range(49)] + ["frog/\udcffé\n.png"]


def codes_for(slots: range) -> np.ndarray:
    """Codes that say where they stand: slot · 100 + crop · 10 + row, the same for all N tokens."""
    slot, crop, row = np.ogrid[slots.start : slots.stop, :10, :3]
    codes = np.repeat((slot * 100 + crop * 10 + row)[..., None], 8, axis=-1)
    codes[np.arange(slots.start, slots.stop) == BAD] = 0
    return codes


def writer_for(directory, labels=None, info=INFO, names=NAMES, **settings) -> TokenWriter:
    """50 images in chunks of 16, begun."""
    writer = TokenWriter(directory, info, np.arange(len(names)) % 3 if labels is None else labels, 16)
    writer.begin(names, {"seed": 0} | settings)
    return writer


def write(writer: TokenWriter, *chunks: int) -> None:
    for chunk in chunks:
        bad = {BAD: "frog/33.png is damaged"} if BAD in writer.slots(chunk) else {}
        writer.write(chunk, codes_for(writer.slots(chunk)), bad)


def files_in(directory) -> dict[str, bytes]:
    return {str(file.relative_to(directory)): file.read_bytes() for file in directory.rglob("*") if file.is_file()}


@pytest.fixture
def store(tmp_path) -> TokenStore:
    writer = writer_for(tmp_path / "tokens")
    write(writer, 2, 0, 3, 1)
    writer.finish()
    return TokenStore.open(tmp_path / "tokens")


def test_round_trip(store):
    assert len(store) == 49 and store.info == INFO
    slots = [slot for slot in range(50) if slot != BAD]
    assert store.slots.tolist() == slots
    np.testing.assert_array_equal(store.codes, codes_for(range(50)))
    np.testing.assert_array_equal(store.labels, np.array(slots) % 3)
    assert store.codes.dtype == np.uint16 and isinstance(store.codes, np.memmap)
    assert store.ids() == [NAMES[slot] for slot in slots]
    assert store.unreadable == {BAD: "frog/33.png is damaged"}
    assert sorted(file.name for file in store.directory.iterdir()) == FILES
    assert (store.directory / "codes.bin").stat().st_size == 50 * 10 * 3 * 8 * 2
    read = store.read(np.array([32, 33]), np.array([9, 0]), np.array([2, 1]))  # images, which slot 33 is none of
    np.testing.assert_array_equal(read, np.repeat([[3292], [3401]], 8, 1))
    store.verify()


def test_the_largest_code_fits(tmp_path):
    writer = writer_for(tmp_path, names=["a"])
    writer.write(0, np.full((1, 10, 3, 8), 65535), {})
    writer.finish()
    assert TokenStore.open(tmp_path).codes.max() == 65535


def test_going_on_ends_in_the_same_bytes(store, tmp_path):
    """Whatever is on disk when another process takes over; what is not there as recorded is written again."""
    directory = tmp_path / "again"
    assert writer_for(directory).written() == set()
    write(writer_for(directory), 1, 3)
    with pytest.raises(DetailFlowError, match="again lacks 2 of its chunks"):
        writer_for(directory).finish()
    with pytest.raises(
        DetailFlowError, match="not a token store .*: repeat the `detailflow extract` that was not finished"
    ):
        TokenStore.open(directory)
    (directory / "unfinished" / ".chunk-000002.json.99999999-0123abcd.tmp").write_text("{")
    odd = ('{"crc32": 1}', '{"crc32": "x", "unreadable": {}}', '{"crc32": 1, "unreadable": {"999": "x"}}', "[" * 10**5)
    for content in ("", *odd):  # as a power cut may leave it
        (directory / "unfinished" / "chunk-000000.json").write_text(content)
        assert writer_for(directory).written() == {1, 3}
    with open(directory / "codes.bin", "r+b") as file:
        file.seek(49 * INFO.image_bytes)
        file.write(b"\xff")
    assert writer_for(directory).written() == {1}
    (directory / "codes.bin").unlink()
    writer = writer_for(directory)
    assert writer.written() == set() and writer.unreadable() == {}
    write(writer, 0, 1, 2, 3)
    assert writer.unreadable() == {BAD: "frog/33.png is damaged"} and not writer.finished
    writer.finish()
    assert writer.finished and files_in(directory) == files_in(store.directory)


def test_killed_at_the_very_end(store, tmp_path):
    """The manifest is there, and so is a part of what was begun."""
    (store.directory / "unfinished").mkdir()
    (store.directory / "unfinished" / "chunk-000001.json").write_text("{}")
    before = {file: file.stat().st_mtime_ns for file in store.directory.iterdir() if file.is_file()}
    assert writer_for(store.directory).finished
    assert {file: file.stat().st_mtime_ns for file in store.directory.iterdir()} == before


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, r"holds tokens with another seed \(0, not 1\): repeat its settings"),
        ({"crops": "two"}, r"holds tokens with another crops \(None, not 'two'\)"),
        ({"names": NAMES[:-1]}, "holds tokens of other images "),
        ({"names": [*NAMES[:-1], "frog/50.png"]}, "holds tokens of other images "),
        ({"labels": np.zeros(50, np.int64)}, "holds tokens of other labels: "),
        ({"info": TokenStoreInfo(8, 65536, 10, INFO.class_names, "def")}, "holds tokens of another tokenizer: "),
        ({"info": TokenStoreInfo(8, 65536, 10, ("cat", "dog", "toad"), "abc")}, "holds tokens of other classes: "),
    ],
)
def test_another_store_stands_there(finished, change, message, store, tmp_path):
    directory = store.directory if finished else tmp_path / "begun"
    if not finished:
        write(writer_for(directory), 1)
    before = files_in(directory)
    with pytest.raises(DetailFlowError, match=message):
        writer_for(directory, **change)
    assert files_in(directory) == before


def test_before_anything_is_written_all_may_change(tmp_path, store):
    writer_for(tmp_path / "a", names=["a", "b"], seed=3)
    writer = writer_for(tmp_path / "a")
    write(writer, *range(4))
    writer.finish()
    assert files_in(tmp_path / "a") == files_in(store.directory)


def test_no_image_can_be_read(tmp_path):
    writer = writer_for(tmp_path, names=["a", "b"])
    writer.write(0, np.zeros((2, 10, 3, 8), np.int64), {0: "a is damaged", 1: "b is damaged"})
    with pytest.raises(DetailFlowError, match="got no images"):
        writer.finish()


def test_a_full_disk(tmp_path, store, monkeypatch):
    """What was written before stays; the chunk that was not is written by the next."""
    writer = writer_for(tmp_path / "a")
    write(writer, 0)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with (
        monkeypatch.context() as patch,
        pytest.raises(DetailFlowError, match=r"a cannot be written \(No space left on device\)"),
    ):
        patch.setattr("os.fsync", full)
        write(writer, 1)
    writer = writer_for(tmp_path / "a")
    assert writer.written() == {0}
    write(writer, 1, 2, 3)
    writer.finish()
    assert files_in(tmp_path / "a") == files_in(store.directory)


# ------------------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize("name", FILES[:3])
def test_one_flipped_bit(store, name):
    content = bytearray((store.directory / name).read_bytes())
    content[len(content) * 3 // 4 // 8 * 8] ^= 1
    (store.directory / name).write_bytes(content)
    with pytest.raises(DetailFlowError, match=f"{name} is damaged, .*: remove {store.directory} and extract"):
        TokenStore.open(store.directory).verify()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "is not the manifest"),
        ({"version": 1}, "has version 1, but this DetailFlow reads 2: remove .* and extract the tokens"),
        ({"images": 51}, "bytes, and the manifest says"),
        ({"images": 0}, "0 images"),
        ({"num_tokens": 16}, "bytes, and the manifest says"),
        ({"ids_bytes": 5}, "ids.jsonl has .* bytes, and the manifest says 5"),
        ({"class_names": ["cat"]}, "beyond the store's classes"),
        ({"class_names": None}, "damaged"),
        ({"chunks": [1, 2, 3]}, "damaged"),
        ({"chunk_images": 0}, "damaged"),
        ({"chunk_images": 12.5}, "damaged"),
        ({"labels_crc32": None}, "damaged"),
        ({"ids_crc32": "1"}, "damaged"),
        ({"unreadable": None}, "damaged"),
        ({"class_names": 5}, r"manifest.json is damaged: remove .* and extract the tokens again"),
        ({"settings": [1]}, "damaged"),
        ({"images_crc32": 5}, "damaged"),
        ({"images_crc32": ["1"]}, "damaged"),
        ({"chunk_images": 10**30}, "damaged"),
    ],
)
def test_open_refuses_a_manifest_that_does_not_fit(store, change, message):
    file = store.directory / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(DetailFlowError, match=message):
        TokenStore.open(store.directory)


@pytest.mark.parametrize("change", [{"settings": 5}, {"class_names": 5}, {"chunk_images": None}])
@pytest.mark.parametrize("finished", [True, False])
def test_extraction_refuses_such_a_record_too(store, change, finished, tmp_path):
    directory = store.directory
    if not finished:
        write(writer_for(directory := tmp_path / "begun"), 1)
    file = directory / ("manifest.json" if finished else "unfinished/begun.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(DetailFlowError, match=f"{file} is damaged: remove {directory} and extract the tokens again"):
        writer_for(directory)


def test_open_refuses_missing_or_damaged_files(store, tmp_path):
    with pytest.raises(DetailFlowError, match="is not a token store .*: make one with `detailflow extract`"):
        TokenStore.open(tmp_path / "nowhere")
    (store.directory / "codes.bin").write_bytes(b"short")
    with pytest.raises(DetailFlowError, match="has 5 bytes"):
        TokenStore.open(store.directory)
    (store.directory / "codes.bin").unlink()
    with pytest.raises(DetailFlowError, match="codes.bin is missing"):
        TokenStore.open(store.directory)
    for content in ("{", "[]"):
        (store.directory / "manifest.json").write_text(content)
        with pytest.raises(DetailFlowError, match="is damaged"):
            TokenStore.open(store.directory)


def test_codes_that_are_no_file(tmp_path):
    """A link would lead to a file that nobody named, and a pipe would be waited for."""
    (tmp_path / "diary.txt").write_text("dear diary")
    for name, make in (("link", lambda path: path.symlink_to(tmp_path / "diary.txt")), ("pipe", os.mkfifo)):
        (tmp_path / name / "unfinished").mkdir(parents=True)  # of a run that was begun; else it is refused before
        make(tmp_path / name / "codes.bin")
        with pytest.raises(DetailFlowError, match=f"{name} cannot be written .*codes.bin is"):
            writer_for(tmp_path / name)
    assert (tmp_path / "diary.txt").read_text() == "dear diary"


def test_names_that_are_damaged(store):
    for content in (b"", b'"a"\n' * 3, b"\xff" * 50, b"{" * 50):
        (store.directory / "ids.jsonl").write_bytes(content)
        with pytest.raises(DetailFlowError, match=r"ids\.jsonl is damaged"):
            store.ids()


# ------------------------------------------------------------------------------------------------- what does not fit


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (np.zeros((16, 10, 3, 9), int), "do not fit"),
        (np.zeros((15, 10, 3, 8), int), "do not fit"),
        (np.full((16, 10, 3, 8), 65536), "0 to 65535"),
        (np.full((16, 10, 3, 8), -1), "0 to 65535"),
    ],
)
def test_write_refuses_what_does_not_fit(tmp_path, codes, message):
    writer = writer_for(tmp_path)
    with pytest.raises(DetailFlowError, match=message):
        writer.write(1, codes, {})
    assert writer.written() == set()


def test_begin_refuses(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(DetailFlowError, match="is a file"):
        writer_for(tmp_path / "file")
    with pytest.raises(DetailFlowError, match="cannot be written"):
        writer_for(tmp_path / "file" / "below")
    with pytest.raises(DetailFlowError, match="0 to 2"):
        writer_for(tmp_path / "a", labels=np.full(50, 3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codebook_size": 65537}, "at most 65536"),
        ({"num_tokens": 0}, "num_tokens"),
        ({"crops": 2.5}, "crops"),
        ({"class_names": ()}, "class_names"),
    ],
)
def test_info_validates(change, message):
    fields = {name: getattr(INFO, name) for name in TokenStoreInfo.__dataclass_fields__}
    with pytest.raises(DetailFlowError, match=message):
        TokenStoreInfo(**(fields | change))


# ------------------------------------------------------------------------------------------------- batches


def test_batches(store):
    batches = list(islice(TokenBatches(store, 7, seed=3), 70))
    seen_crops = set()
    for labels, inputs, targets in batches:
        assert labels.shape == (7,) and inputs.shape == targets.shape == (7, 8)
        assert labels.dtype == inputs.dtype == targets.dtype == torch.int64
        slot, crop, row = inputs[:, 0] // 100, inputs[:, 0] // 10 % 10, inputs[:, 0] % 10
        assert torch.equal(labels, slot % 3)
        assert torch.equal(targets[:, 0] - inputs[:, 0], row)  # clean → clean (0 → 0), input → label (1 → 2)
        assert set(row.tolist()) <= {0, 1}
        seen_crops |= set(crop.tolist())
    assert seen_crops == set(range(10))
    for epoch in range(10):  # every epoch holds every image once
        slots = torch.cat([inputs[:, 0] // 100 for _, inputs, _ in batches[epoch * 7 : epoch * 7 + 7]])
        assert sorted(slots.tolist()) == [slot for slot in range(50) if slot != BAD]


def test_planted_share(store):
    def share(planted_share: float) -> float:
        batches = islice(TokenBatches(store, 49, seed=0, planted_share=planted_share), 60)
        return float(torch.cat([inputs[:, 0] % 10 for _, inputs, _ in batches]).float().mean())

    assert share(0.0) == 0 and share(1.0) == 1
    assert 0.27 < share(0.3) < 0.33


@pytest.mark.parametrize("batch_size", [7, 49, 64])
def test_resume_is_exact(store, batch_size):
    whole = list(islice(TokenBatches(store, batch_size, seed=5), 20))
    resumed = list(islice(TokenBatches(store, batch_size, seed=5, start_step=9), 11))
    for batch, again in zip(whole[9:], resumed, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(batch, again, strict=True))
    other = next(iter(TokenBatches(store, batch_size, seed=6)))
    assert not torch.equal(other[1], whole[0][1])


@pytest.mark.parametrize("count", [2, 3])
def test_processes_share_the_same_batches(store, count):
    whole = islice(TokenBatches(store, 12, seed=5, start_step=3), 10)
    parts = [TokenBatches(store, 12, seed=5, start_step=3, world=World(rank, count)) for rank in range(count)]
    for batch, *shares in zip(whole, *parts, strict=False):
        assert all(len(share[0]) == 12 // count for share in shares)
        for together, part in zip(batch, zip(*shares, strict=True), strict=True):
            assert torch.equal(together, torch.cat(part))


def test_batches_refuse(store):
    with pytest.raises(DetailFlowError, match="probability"):
        TokenBatches(store, 4, seed=0, planted_share=1.5)
    with pytest.raises(DetailFlowError, match="batch_size must be .*, not 0"):
        TokenBatches(store, 0, seed=0)
    with pytest.raises(DetailFlowError, match="seed must be .*, not -1"):
        TokenBatches(store, 4, seed=-1)
    with pytest.raises(DetailFlowError, match="a batch of 4 cannot be divided evenly among 3 processes"):
        TokenBatches(store, 4, seed=0, world=World(0, 3))
