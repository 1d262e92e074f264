"""The model in the package: there, small, and as good on real photographs as docs/shipped-model.md says."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ImageOps

from detailflow import DetailFlowPipeline
from detailflow.data.images import open_images
from detailflow.data.transforms import to_tensor
from detailflow.hub import packaged_folder
from detailflow.pipeline import reconstruct
from detailflow.psnr import psnr

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@pytest.fixture(scope="module")
def shipped() -> DetailFlowPipeline:
    return DetailFlowPipeline.from_pretrained()


def test_is_small_and_knows_its_classes(shipped: DetailFlowPipeline) -> None:
    files = [f for kind in ("tokenizer", "gpt") for f in packaged_folder(kind).iterdir()]
    assert sum(f.stat().st_size for f in files) <= 30e6
    assert shipped.gpt.config.class_names == CLASSES


def test_classes_look_different_and_images_are_no_noise(shipped: DetailFlowPipeline) -> None:
    images = [np.asarray(image, np.float64) for image in shipped(list(CLASSES), seed=1)]
    assert all(image.shape == (32, 32, 3) and image.std() > 15 for image in images)
    assert len({image.tobytes() for image in images}) == len(CLASSES)
    steps = np.mean([np.abs(np.diff(image, axis=1)).mean() for image in images])
    assert steps < 25  # neighbouring pixels are alike; of uniform noise they differ by 85


def test_bfloat16_keeps_the_distribution(shipped: DetailFlowPipeline) -> None:
    """docs/speed.md states these tolerances: logits, of standard deviation 2, are within 0.02 on average, 0.2 at most;
    the distributions differ by less than 0.001 nats.
    """
    classes = torch.arange(11).repeat(2)  # the null class too
    ids = shipped.gpt.generate(classes.clamp(max=9), generator=torch.Generator().manual_seed(0))
    half = DetailFlowPipeline.from_pretrained(device="cpu", dtype=torch.bfloat16).gpt
    with torch.inference_mode():
        exact, rounded = shipped.gpt(classes, ids), half(classes, ids).float()
    error = (rounded - exact).abs()
    assert error.square().mean().sqrt() < 0.02 and error.max() < 0.2
    divergence = (exact.softmax(-1) * (exact.log_softmax(-1) - rounded.log_softmax(-1))).sum(-1)
    assert divergence.mean() < 0.001


def test_more_tokens_come_closer_to_real_photographs(shipped: DetailFlowPipeline, cifar_table: Path) -> None:
    source = open_images(str(cifar_table))
    schedule = shipped.tokenizer.schedule
    originals = [source.image(i) for i in range(100)]
    counts = [1, schedule.num_causal, schedule.num_tokens]
    decibels = np.array([[s.psnr for s in reconstruct(shipped.tokenizer, o, counts)] for o in originals]).mean(0)
    colour = np.mean(
        [psnr(np.broadcast_to(np.asarray(o).mean((0, 1)).round(), (32, 32, 3)), np.asarray(o)) for o in originals]
    )
    assert decibels[0] < decibels[1] < decibels[2]
    assert decibels[1] > colour + 3
    assert decibels[2] > 22


def test_later_tokens_correct_planted_mistakes(shipped: DetailFlowPipeline, cifar_table: Path) -> None:
    """With wrong tokens in a group, the tokens that the correction pass writes after it beat the clean
    ones (paper figure 4a)."""
    tokenizer = shipped.tokenizer
    source = open_images(str(cifar_table))
    images = to_tensor(np.stack([np.asarray(source.image(i)) for i in range(64)]))
    g, clean = tokenizer.config.group_size, tokenizer.encode(images)
    for start in (g, tokenizer.schedule.num_causal):  # the second group, and the first that is written in parallel
        with torch.inference_mode():
            patches = tokenizer.encode_patches(images)
            z = tokenizer.encode_latents(patches, start + g)[:, start:]
            planted = clean.clone()
            planted[:, start : start + g] = tokenizer.plant_mistakes(z, generator=torch.Generator().manual_seed(0))
            later = tokenizer.quantizer.nearest(tokenizer.correct_latents(patches, planted, start + g))[:, start + g :]
        corrected = torch.cat((planted[:, : start + g], later), 1)
        error = [(tokenizer.decode(ids) - images).square().mean((1, 2, 3)) for ids in (clean, planted, corrected)]
        assert error[0].mean() < error[2].mean() < error[1].mean()


def test_photographs_of_any_shape(shipped: DetailFlowPipeline, photograph_table: Path) -> None:
    source = open_images(str(photograph_table), split=None)
    for i, (width, height) in enumerate(((40, 24), (24, 40), (48, 20), (32, 32))):
        photo = ImageOps.fit(source.image(i), (width, height))
        (stage,) = shipped.reconstruct(photo, counts=[48], whole=True)
        assert stage.images[0].size == (width, height)
        colour = psnr(np.broadcast_to(np.asarray(photo).mean((0, 1)).round(), (height, width, 3)), np.asarray(photo))
        assert stage.psnr > colour + 3
        if width == height:
            assert stage == shipped.reconstruct(photo, counts=[48])[0]


@pytest.fixture(scope="module")
def emoji() -> DetailFlowPipeline:
    return DetailFlowPipeline.from_pretrained("emoji-64")


@pytest.fixture(scope="module")
def figures(emoji: DetailFlowPipeline) -> np.ndarray:
    return np.stack([np.asarray(image) for image in emoji(list(range(10)), num_images_per_class=2, seed=3)])


def test_the_model_of_emoji_is_small_and_has_its_licence(emoji: DetailFlowPipeline) -> None:
    folder = packaged_folder("gpt", "emoji-64").parent
    assert sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) <= 20e6
    assert "Copyright (c) Microsoft Corporation" in (folder / "LICENSE").read_text()
    assert emoji.labels.names[7] == "smiley" and len(emoji.labels.names) == 10


def test_emoji_are_figures_on_white(figures: np.ndarray) -> None:
    assert figures.shape == (20, 64, 64, 3)
    assert len({image.tobytes() for image in figures}) >= 18  # what is learnt by heart may come twice
    corners = figures[:, [0, 0, -1, -1], [0, -1, 0, -1]].reshape(20, -1).mean(1)
    assert (corners > 230).mean() >= 0.8  # a few fill their frame
    assert (figures.std((1, 2)).max(1) > 25).all()


def test_emoji_are_rebuilt(emoji: DetailFlowPipeline, figures: np.ndarray) -> None:
    images = to_tensor(figures)
    with torch.inference_mode():
        ids = emoji.tokenizer.encode(images)
        made = [emoji.tokenizer.decode(ids[:, :n], size=64) for n in (1, 16, 64, 128)]
    decibels = [psnr(image, images, peak=2).mean().item() for image in made]
    assert decibels == sorted(decibels) and decibels[0] > 11 and decibels[-1] > 23
