"""The search for codes that rebuild an image better, beside the encoder's own (docs/method.md#code-search)."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from detailflow import DetailFlowPipeline, DetailFlowTokenizer
from detailflow.data.images import open_images
from detailflow.data.transforms import center_crop, to_tensor
from detailflow.errors import DetailFlowError
from detailflow.models import tokenizer as tokenizers
from detailflow.psnr import psnr


@pytest.fixture(scope="module")
def images(cifar: Path) -> Tensor:
    """(10, 3, 32, 32) real images of ten classes."""
    source = open_images(cifar)
    return torch.stack([to_tensor(center_crop(source.image(i), 32)) for i in range(0, 200, 20)])


def decibels(tokenizer: DetailFlowTokenizer, ids: Tensor, images: Tensor) -> Tensor:
    pixels = tokenizer.decode(ids).float()
    return psnr(pixels.clamp(-1, 1), images, peak=2)


def test_each_image_is_rebuilt_better(shipped: DetailFlowPipeline, images: Tensor):
    tokenizer = shipped.tokenizer
    none, one, few, many = (
        decibels(tokenizer, tokenizer.encode(images, search=steps), images) for steps in (0, 1, 4, 12)
    )
    assert torch.equal(tokenizer.encode(images, search=0), tokenizer.encode(images))
    assert (one > none - 0.02).all()  # at worst the same codes; decibels are of pixels within their range
    assert (few > none).all()
    assert (few - none).mean() > 0.4
    assert (many - none).mean() > 0.6  # 0.6 and 0.8 dB of 40 images, when this was written
    assert all(parameter.grad is None for parameter in tokenizer.parameters())


def test_an_image_depends_neither_on_its_batch_nor_on_how_many_tokens_are_wanted(
    shipped: DetailFlowPipeline, images: Tensor, monkeypatch: pytest.MonkeyPatch
):
    tokenizer = shipped.tokenizer
    together = tokenizer.encode(images[:6], search=2)
    assert torch.equal(tokenizer.encode(images[4:5], search=2)[0], together[4])
    assert torch.equal(tokenizer.encode(images[:6], num_tokens=8, search=2), together[:, :8])
    monkeypatch.setattr(tokenizers, "SEARCHED", 1)  # so one image at a time
    assert torch.equal(tokenizer.encode(images[:6], search=2), together)


def test_in_inference_mode_and_with_weights_that_learn(model: Path, images: Tensor):
    tokenizer = DetailFlowTokenizer.from_pretrained(model).requires_grad_(True)
    expected = tokenizer.encode(images, search=2)
    assert not torch.equal(expected, tokenizer.encode(images))
    with torch.inference_mode():
        assert torch.equal(tokenizer.encode(images, search=2), expected)
    assert all(parameter.grad is None for parameter in tokenizer.parameters())


def test_other_types_and_shapes(shipped: DetailFlowPipeline, images: Tensor):
    half = DetailFlowTokenizer.from_pretrained(dtype="bfloat16", device="cpu")
    gain = decibels(half, half.encode(images, search=4), images) - decibels(half, half.encode(images), images)
    assert gain.min() > -0.1 and gain.mean() > 0.4  # their errors are rounded to bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        ids = shipped.tokenizer.encode(images, search=4)
    gain = decibels(shipped.tokenizer, ids, images) - decibels(
        shipped.tokenizer, shipped.tokenizer.encode(images), images
    )
    assert gain.min() > -0.1 and gain.mean() > 0.4
    wide = torch.cat((images[:2], images[2:4]), -1)[..., :40]
    before, after = (shipped.tokenizer.encode(wide, search=steps) for steps in (0, 4))
    errors = [(shipped.tokenizer.decode(ids, size=(32, 40)) - wide).square().mean((1, 2, 3)) for ids in (before, after)]
    assert (errors[1] < errors[0]).all()
    assert shipped.tokenizer.encode(images[:0], search=2).shape == (0, 48)


def test_through_the_pipeline(shipped: DetailFlowPipeline, cifar: Path):
    path = sorted(cifar.rglob("*.png"))[0]
    plain, better = (shipped.reconstruct(path, counts=[16, 48], search=steps) for steps in (0, 4))
    assert better[-1].psnr > plain[-1].psnr + 0.2
    tokens = shipped.tokens(path, search=4)
    shown = np.asarray(shipped.vary(tokens, keep=48)[0])
    np.testing.assert_array_equal(shown, np.asarray(better[-1].images[0]))


@pytest.mark.parametrize("wrong", [-1, 2.5, "many", None])
def test_wrong_numbers_of_steps(shipped: DetailFlowPipeline, images: Tensor, wrong: object):
    with pytest.raises(DetailFlowError, match=r"search must be .*not "):
        shipped.tokenizer.encode(images, search=wrong)  # type: ignore[arg-type]
