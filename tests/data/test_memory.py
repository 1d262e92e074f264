"""Images that stay in memory: the same batches, and each image is read once."""

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from detailflow.data.batches import ImageBatches, read_ahead
from detailflow.data.images import open_images
from detailflow.data.source import ImageSource
from detailflow.errors import DetailFlowError


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Square images of the crops' size and larger ones, and wide ones."""
    rng = np.random.default_rng(0)
    for index, shape in enumerate([(16, 16), (40, 40), (20, 30), (16, 17)] * 5):
        path = tmp_path / f"class{index % 2}" / f"{index:02d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (*shape, 3), np.uint8)).save(path)
    return tmp_path


def counted(source: ImageSource) -> dict[int, int]:
    """How often each image is read."""
    reads: dict[int, int] = {}
    image = source.image

    def read(index: int, least: int | None = None) -> Image.Image:
        reads[index] = reads.get(index, 0) + 1
        return image(index, least)

    source.image = read  # type: ignore[method-assign]
    return reads


@pytest.mark.parametrize("max_scale", [1.0, 1.5])
@pytest.mark.parametrize("flip", [True, False])
def test_the_same_batches(mixed: Path, max_scale: float, flip: bool):
    source = open_images(mixed)
    reads = counted(source)
    options = dict(seed=3, flip=flip, max_scale=max_scale)
    kept = list(islice(ImageBatches(source, 16, 8, keep=2**20, **options), 12))
    assert set(reads.values()) == {1}
    read = list(islice(ImageBatches(open_images(mixed), 16, 8, **options), 12))
    for (images, labels), (expected, names) in zip(kept, read, strict=True):
        assert torch.equal(images, expected) and torch.equal(labels, names)
    again = list(islice(ImageBatches(source, 16, 4, keep=2**20, **options), 8))  # another that trains on them
    assert len(again) == 8 and set(reads.values()) == {1}
    other = ImageBatches(source, 8, 4, keep=2**20, **options)  # crops of another kind
    next(iter(other))
    assert sum(reads.values()) == len(source) + 4


def test_no_more_than_there_is_room_for(mixed: Path):
    source = open_images(mixed)
    reads = counted(source)
    batches = ImageBatches(source, 16, 8, seed=3, max_scale=1.5, keep=4 * (16 * 16 * 4))
    expected = list(islice(ImageBatches(open_images(mixed), 16, 8, seed=3, max_scale=1.5), 12))
    for (images, _), (theirs, _) in zip(batches, expected, strict=False):
        assert torch.equal(images, theirs)
    assert 0 <= batches.kept.room < 4 * (16 * 16 * 4)
    assert sum(reads.values()) > 60
    assert ImageBatches(source, 16, 8, seed=3, workers=1, keep=2**20).kept.room == 0


@pytest.mark.filterwarnings("ignore:.*Another image takes its place")
def test_an_unreadable_image(mixed: Path):
    source = open_images(mixed)
    Path(source.name(3)).write_text("not an image")
    kept = list(islice(ImageBatches(source, 16, 8, seed=3, max_scale=1.0, keep=2**20), 8))
    read = list(islice(ImageBatches(open_images(mixed), 16, 8, seed=3, max_scale=1.0), 8))
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(kept, read, strict=True))


def test_reading_ahead():
    assert list(read_ahead(iter(range(7)), 3)) == list(range(7))
    assert list(read_ahead(iter(()))) == []

    def broken():
        yield 1
        raise DetailFlowError("no more")

    ahead = read_ahead(broken())
    assert next(ahead) == 1
    with pytest.raises(DetailFlowError, match="no more"):
        next(ahead)
    endless = read_ahead(iter(int, 1))
    assert next(endless) == 0
    endless.close()
