import json
from itertools import islice

import numpy as np
import pytest
import torch

from detailflow.data.tokens import TokenBatches, TokenStore, TokenStoreInfo
from detailflow.errors import DetailFlowError

INFO = TokenStoreInfo(
    num_tokens=8, codebook_size=65536, crops=10, class_names=("cat", "dog", "frog"), tokenizer_fingerprint="abc"
)


def codes_for(first: int, count: int) -> np.ndarray:
    """Codes that say where they stand: image · 100 + crop · 10 + row, the same for all N tokens."""
    image, crop, row = np.ogrid[first : first + count, :10, :3]
    return np.repeat((image * 100 + crop * 10 + row)[..., None], 8, axis=-1)


@pytest.fixture
def store(tmp_path) -> TokenStore:
    writer = TokenStore.create(tmp_path / "tokens", INFO)
    writer.append(torch.from_numpy(codes_for(0, 30)), torch.arange(30) % 3)
    writer.append(codes_for(30, 20), [i % 3 for i in range(30, 50)])
    return writer.finish()


def test_round_trip(store):
    assert len(store) == 50 and store.info == INFO
    np.testing.assert_array_equal(store.codes, codes_for(0, 50))
    np.testing.assert_array_equal(store.labels, np.arange(50) % 3)
    assert store.codes.dtype == np.uint16 and isinstance(store.codes, np.memmap)
    assert sorted(file.name for file in store.directory.iterdir()) == ["codes.bin", "labels.bin", "manifest.json"]
    assert (store.directory / "codes.bin").stat().st_size == 50 * 10 * 3 * 8 * 2


def test_the_largest_code_fits(tmp_path):
    with TokenStore.create(tmp_path, INFO) as writer:
        writer.append(np.full((1, 10, 3, 8), 65535), [0])
    assert TokenStore.open(tmp_path).codes.max() == 65535


def test_nothing_half_written(tmp_path):
    with pytest.raises(KeyboardInterrupt), TokenStore.create(tmp_path / "a", INFO) as writer:
        writer.append(codes_for(0, 5), [0] * 5)
        raise KeyboardInterrupt
    assert list((tmp_path / "a").iterdir()) == []
    with pytest.raises(DetailFlowError, match="got no images"):
        TokenStore.create(tmp_path / "a", INFO).finish()
    assert list((tmp_path / "a").iterdir()) == []


def test_batches(store):
    batches = list(islice(TokenBatches(store, 10, seed=3), 50))
    seen_crops = set()
    for labels, inputs, targets in batches:
        assert labels.shape == (10,) and inputs.shape == targets.shape == (10, 8)
        assert labels.dtype == inputs.dtype == targets.dtype == torch.int64
        image, crop, row = inputs[:, 0] // 100, inputs[:, 0] // 10 % 10, inputs[:, 0] % 10
        assert torch.equal(labels, image % 3)
        assert torch.equal(targets[:, 0] - inputs[:, 0], row)  # clean → clean (0 → 0), input → label (1 → 2)
        assert set(row.tolist()) <= {0, 1}
        seen_crops |= set(crop.tolist())
    assert seen_crops == set(range(10))
    for epoch in range(10):  # every epoch holds every image once
        images = torch.cat([inputs[:, 0] // 100 for _, inputs, _ in batches[epoch * 5 : epoch * 5 + 5]])
        assert sorted(images.tolist()) == list(range(50))


def test_planted_share(store):
    def share(planted_share: float) -> float:
        batches = islice(TokenBatches(store, 50, seed=0, planted_share=planted_share), 60)
        return float(torch.cat([inputs[:, 0] % 10 for _, inputs, _ in batches]).float().mean())

    assert share(0.0) == 0 and share(1.0) == 1
    assert 0.27 < share(0.3) < 0.33


@pytest.mark.parametrize("batch_size", [7, 50, 64])
def test_resume_is_exact(store, batch_size):
    whole = list(islice(TokenBatches(store, batch_size, seed=5), 20))
    resumed = list(islice(TokenBatches(store, batch_size, seed=5, start_step=9), 11))
    for batch, again in zip(whole[9:], resumed, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(batch, again, strict=True))
    other = next(iter(TokenBatches(store, batch_size, seed=6)))
    assert not torch.equal(other[1], whole[0][1])


@pytest.mark.parametrize(
    ("codes", "labels", "message"),
    [
        (np.zeros((1, 10, 3, 9), int), [0], "do not fit"),
        (np.zeros((2, 10, 3, 8), int), [0], "do not fit"),
        (np.full((1, 10, 3, 8), 65536), [0], "0 to 65535"),
        (np.full((1, 10, 3, 8), -1), [0], "0 to 65535"),
        (np.zeros((1, 10, 3, 8), int), [3], "0 to 2"),
    ],
)
def test_append_refuses_what_does_not_fit(tmp_path, codes, labels, message):
    with pytest.raises(DetailFlowError, match=message), TokenStore.create(tmp_path, INFO) as writer:
        writer.append(codes, labels)


def test_create_refuses(tmp_path, store):
    with pytest.raises(DetailFlowError, match="already holds a token store"):
        TokenStore.create(store.directory, INFO)
    (tmp_path / "file").write_text("x")
    with pytest.raises(DetailFlowError, match="is a file"):
        TokenStore.create(tmp_path / "file", INFO)
    with pytest.raises(DetailFlowError, match="cannot be written"):
        TokenStore.create(tmp_path / "file" / "below", INFO)


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "is not the manifest"),
        ({"version": 2}, "version 2"),
        ({"images": 51}, "bytes where the manifest says"),
        ({"images": 0}, "0 images"),
        ({"num_tokens": 16}, "bytes where the manifest says"),
        ({"class_names": ["cat"]}, "beyond the store's classes"),
        ({"class_names": None}, "damaged"),
    ],
)
def test_open_refuses_a_manifest_that_does_not_fit(store, change, message):
    file = store.directory / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(DetailFlowError, match=message):
        TokenStore.open(store.directory)


def test_open_refuses_missing_or_damaged_files(store, tmp_path):
    with pytest.raises(DetailFlowError, match="is no token store"):
        TokenStore.open(tmp_path / "nowhere")
    (store.directory / "codes.bin").write_bytes(b"short")
    with pytest.raises(DetailFlowError, match="has 5 bytes"):
        TokenStore.open(store.directory)
    (store.directory / "codes.bin").unlink()
    with pytest.raises(DetailFlowError, match="codes.bin is missing"):
        TokenStore.open(store.directory)
    for content in ("{", "[]", "{}"):
        (store.directory / "manifest.json").write_text(content)
        with pytest.raises(DetailFlowError, match="is damaged"):
            TokenStore.open(store.directory)


def test_batches_refuse(store):
    with pytest.raises(DetailFlowError, match="probability"):
        TokenBatches(store, 4, seed=0, planted_share=1.5)
    with pytest.raises(DetailFlowError, match="batch size 0"):
        TokenBatches(store, 0, seed=0)
    with pytest.raises(DetailFlowError, match="seed -1"):
        TokenBatches(store, 4, seed=-1)
