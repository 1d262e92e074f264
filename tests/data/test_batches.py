"""Batches of several processes; batches of one are in test_images.py."""

import shutil
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from detailflow.data.batches import ImageBatches
from detailflow.data.images import open_images
from detailflow.data.transforms import random_crop, to_tensor
from detailflow.distributed import World
from detailflow.errors import DetailFlowError


def test_an_image_has_four_draws_of_its_own(cifar):
    source = open_images(cifar)
    batches = ImageBatches(source, 24, 8, seed=5, start_step=3)
    key = next(iter(batches.order))
    rng = np.random.default_rng((1, 5, key.epoch, key.first_slot))
    expected = np.stack([random_crop(source.image(item), 24, rng.random(4)) for item in key.items])
    images, labels = next(iter(batches))
    assert torch.equal(images, to_tensor(expected)) and labels.tolist() == source.labels[key.items].tolist()


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.filterwarnings("ignore:.*Another image takes its place")
def test_processes_see_together_what_one_sees(cifar, tmp_path, workers):
    folder = shutil.copytree(cifar, tmp_path / "images")
    source = open_images(folder)
    bad = source.name(next(iter(ImageBatches(source, 32, 8, seed=1).order)).items[1])  # the second of the first batch
    Path(bad).write_text("not an image")
    alone = ImageBatches(source, 32, 8, seed=1)
    whole = list(islice(alone, 30))  # into the second epoch
    parts = [ImageBatches(source, 32, 8, 1, workers, world=World(rank, 2)) for rank in range(2)]
    shares = [list(islice(part, 30)) for part in parts]
    for (images, labels), first, second in zip(whole, *shares, strict=True):
        assert first[0].shape == (4, 3, 32, 32)
        assert torch.equal(torch.cat((first[0], second[0])), images)
        assert torch.equal(torch.cat((first[1], second[1])), labels)
    assert list(alone.bad.values()) == [f"{bad} is not an image: its contents are in no raster format that is read"]
    assert alone.bad == {**parts[0].bad, **parts[1].bad} and parts[0].bad
    resumed = ImageBatches(source, 32, 8, seed=1, start_step=20, world=World(1, 2))
    assert torch.equal(next(iter(resumed))[0], shares[1][20][0])


def test_a_batch_that_cannot_be_shared(cifar):
    with pytest.raises(DetailFlowError, match="a batch of 9 cannot be divided evenly among 2 processes"):
        ImageBatches(open_images(cifar), 32, 9, seed=0, workers=2, world=World(0, 2))


@pytest.mark.filterwarnings("ignore:.*Another image takes its place")
def test_each_process_counts_its_own_unreadable_images(cifar, tmp_path):
    folder = shutil.copytree(cifar, tmp_path / "images")
    source = open_images(folder)
    items = next(iter(ImageBatches(source, 32, 8, seed=1).order)).items
    for item in items[[0, 1, 4, 5]]:  # two in each share, which are 1% of 200
        Path(source.name(item)).write_text("not an image")
    for rank in range(2):
        part = ImageBatches(source, 32, 8, seed=1, world=World(rank, 2))
        next(iter(part))
        assert sorted(part.bad) == sorted(items[[0, 1]] if rank == 0 else items[[4, 5]])
    with pytest.raises(DetailFlowError, match="at least 3 of the 200 images cannot be read, more than 1%"):
        next(iter(ImageBatches(source, 32, 8, seed=1)))
