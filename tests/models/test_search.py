"""The search for codes that rebuild an image better, beside the encoder's own (docs/method.md#code-search)."""

import itertools
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


def test_an_image_depends_on_its_batch_by_rounding_only(
    shipped: DetailFlowPipeline, images: Tensor, monkeypatch: pytest.MonkeyPatch
):
    tokenizer = shipped.tokenizer
    together = tokenizer.encode(images[:6], search=2)
    expected = decibels(tokenizer, together, images[:6])
    alone = tokenizer.encode(images[4:5], search=2)
    torch.testing.assert_close(decibels(tokenizer, alone, images[4:5])[0], expected[4], atol=0.05, rtol=0)
    monkeypatch.setattr(tokenizers, "SEARCHED", 1)  # so one image at a time
    parts = tokenizer.encode(images[:6], search=2)
    assert (parts == together).float().mean() > 0.9  # rounding decides between codes that are equally near
    torch.testing.assert_close(decibels(tokenizer, parts, images[:6]), expected, atol=0.05, rtol=0)


def test_in_inference_mode_and_with_weights_that_learn(model: Path, images: Tensor):
    tokenizer = DetailFlowTokenizer.from_pretrained(model).requires_grad_(True)
    expected = tokenizer.encode(images, search=2)
    assert not torch.equal(expected, tokenizer.encode(images))
    with torch.inference_mode():
        assert torch.equal(tokenizer.encode(images, search=2), expected)
        assert torch.equal(DetailFlowTokenizer.from_pretrained(model).encode(images, search=2), expected)
    assert all(p.grad is None and p.requires_grad for p in tokenizer.parameters())
    assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()


def test_step_by_step(shipped: DetailFlowPipeline, images: Tensor):
    steps = shipped.tokenizer.encode_steps(images[:3], search=3)
    first = next(steps)
    assert torch.equal(first, shipped.tokenizer.encode(images[:3]))
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()  # between steps, too
    errors = [decibels(shipped.tokenizer, ids, images[:3]) for ids in [first, *steps]]
    assert len(errors) == 5
    assert all((after > before - 0.02).all() for before, after in itertools.pairwise(errors))


def test_codes_that_stay(shipped: DetailFlowPipeline, images: Tensor, monkeypatch: pytest.MonkeyPatch):
    """As in extraction: those before the end of a mistake, another end for each image."""
    tokenizer = shipped.tokenizer
    with torch.no_grad():
        z = tokenizer.encode_latents(tokenizer.encode_patches(images), 48)
    ends = torch.tensor([0, 1, 8, 16, 24, 32, 40, 40, 47, 48])[:, None]
    wrong = torch.randint(2048, (10, 48), generator=torch.Generator().manual_seed(2))
    given = torch.where(torch.arange(48) < ends, wrong, -1)
    before = torch.where(given < 0, tokenizer.quantizer.nearest(z), given)
    monkeypatch.setattr(tokenizers, "SEARCHED", 2**16)  # so in parts, and those to come have them, too
    for after in tokenizer.search_steps(images, z, 6, given):
        assert torch.equal(torch.where(given < 0, -1, after), given)
    assert torch.equal(torch.where(given < 0, -1, after), given)
    gains = decibels(tokenizer, after, images) - decibels(tokenizer, before, images)
    assert (gains[:5] > 0.1).all() and (gains > -0.02).all() and gains[-1] == 0


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


def test_a_decoder_of_nan_is_an_error_and_no_gradient_stays(shipped: DetailFlowPipeline, images: Tensor):
    quantizer, calls = shipped.tokenizer.quantizer, []

    def decode(codes: Tensor) -> Tensor:
        calls.append(codes)
        return codes.mean((1, 2))[:, None, None, None] * (torch.nan if broken else 1.0) + torch.zeros(2, 3, 8, 8)

    z = torch.nn.functional.normalize(torch.randn(2, 48, 8), dim=-1).requires_grad_()
    broken, target, given = False, torch.zeros(2, 3, 8, 8), torch.full((2, 48), -1)
    given[:, :4] = 7
    *_, found = quantizer.search(z, target, decode, 3, given)
    assert (found[:, :4] == 7).all() and len(calls) == 4
    assert all(codes.grad_fn is None for codes in calls)  # nothing of what z was made of is kept
    broken = True
    with pytest.raises(DetailFlowError, match="the decoder's pixels"):
        list(quantizer.search(z, target, decode, 3, given))


def test_what_a_search_is_not_for(shipped: DetailFlowPipeline, images: Tensor):
    with pytest.raises(DetailFlowError, match="a search is for all 48 tokens together: leave out num_tokens"):
        shipped.tokenizer.encode(images, num_tokens=8, search=2)
    assert shipped.tokenizer.encode(images[:1], num_tokens=48, search=1).shape == (1, 48)
    with pytest.raises(DetailFlowError, match="a search is for an image, and tokens are given: leave out search"):
        shipped.tokens([1, 2, 3], search=2)


@pytest.mark.parametrize("wrong", [-1, 2.5, "many", None])
def test_wrong_numbers_of_steps(shipped: DetailFlowPipeline, images: Tensor, wrong: object):
    with pytest.raises(DetailFlowError, match=r"search must be .*not "):
        shipped.tokenizer.encode(images, search=wrong)  # type: ignore[arg-type]
