"""The tokenizer's contract; the published model's recorded outputs are in test_parity.py."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from detailflow import DetailFlowPipeline, DetailFlowTokenizer
from detailflow.errors import DetailFlowError
from detailflow.models.layers import ViTConfig, patchify, unpatchify
from detailflow.models.tokenizer import TokenizerConfig

VIT = ViTConfig(32, 2, 2)
CONFIG = TokenizerConfig(
    VIT,
    VIT,
    image_size=32,
    patch_size=8,
    num_tokens=16,
    group_size=4,
    causal_tokens=8,
    codebook_size=64,
    codebook_dim=4,
)


@pytest.fixture(scope="module")
def tokenizer() -> DetailFlowTokenizer:
    torch.manual_seed(0)
    return DetailFlowTokenizer(CONFIG).eval()


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_encode(tokenizer: DetailFlowTokenizer, images: torch.Tensor):
    ids = tokenizer.encode(images)
    assert ids.shape == (3, 16) and ids.dtype == torch.int64 and 0 <= int(ids.min()) <= int(ids.max()) < 64
    for n in tokenizer.schedule.valid_counts:  # the first tokens do not depend on how many follow
        assert torch.equal(tokenizer.encode(images, num_tokens=n), ids[:, :n])
    assert torch.equal(tokenizer.encode(images[1:2])[0], ids[1])


def test_decode(tokenizer: DetailFlowTokenizer, images: torch.Tensor):
    ids = tokenizer.encode(images)
    for n in tokenizer.schedule.valid_counts:
        side = tokenizer.schedule.decode_size(n)
        pixels = tokenizer.decode(ids[:, :n])
        assert pixels.shape == (3, 3, side, side) and pixels.dtype == torch.float32
        for size in (8, 24, 32, 64):  # a count and a size are independent inputs
            assert tokenizer.decode(ids[:, :n], size=size).shape == (3, 3, size, size)
            assert torch.equal(
                tokenizer.decode(ids[:, :n], size=np.int64(size)), tokenizer.decode(ids[:, :n], size=size)
            )
        assert torch.equal(pixels, tokenizer.decode(ids[:, :n], size=side))


def test_correction(tokenizer: DetailFlowTokenizer, images: torch.Tensor):
    clean = tokenizer.encode(images)
    for start, end in tokenizer.schedule.steps:
        wrong = (clean[:, start:end] + 7) % 64
        corrected = tokenizer.encode_correction(images, position=start, wrong_tokens=wrong)
        assert corrected.shape == clean.shape and corrected.dtype == torch.int64
        assert torch.equal(corrected[:, :start], clean[:, :start])
        assert torch.equal(corrected[:, start:end], wrong)
    first = tokenizer.encode_correction(images, position=0, wrong_tokens=clean[:, :1])
    other = tokenizer.encode_correction(images, position=0, wrong_tokens=(clean[:, :1] + 7) % 64)
    assert not torch.equal(first[:, 1:], other[:, 1:])  # later tokens react to the mistake


def test_correction_does_not_look_at_what_comes_later(tokenizer: DetailFlowTokenizer, images: torch.Tensor):
    patches = tokenizer.encode_patches(images)
    given = tokenizer.encode(images)
    changed = given.clone()
    changed[:, 8:] = 0
    for end in (8, torch.tensor([[8], [8], [8]])):
        with torch.no_grad():
            latents = tokenizer.correct_latents(patches, given, end)
            assert torch.equal(latents, tokenizer.correct_latents(patches, changed, end))


def test_patches_do_not_depend_on_queries(images: torch.Tensor):
    """Keys and values of the patches are those of the same blocks with the queries left out
    (docs/method.md#tokenizer)."""
    torch.manual_seed(0)
    first = DetailFlowTokenizer(CONFIG).eval()
    second = DetailFlowTokenizer(CONFIG).eval()
    state = first.state_dict()
    state.update({k: v for k, v in second.state_dict().items() if "query" in k or "refine" in k})
    second.load_state_dict(state)
    with torch.no_grad():
        a, b = first.encode_patches(images), second.encode_patches(images)
        for (k, v), (other_k, other_v) in zip(a.blocks, b.blocks, strict=True):
            assert torch.equal(k, other_k) and torch.equal(v, other_v)
        assert not torch.equal(first.encode_latents(a, 16), second.encode_latents(b, 16))
        before = [(k.clone(), v.clone()) for k, v in a.blocks]
        first.encode_latents(a, 16)
        assert all(torch.equal(x, y) for pair in zip(a.blocks, before, strict=True) for x, y in zip(*pair, strict=True))


def test_training_and_inference_attend_alike(tokenizer: DetailFlowTokenizer, images: torch.Tensor):
    """With gradients attention goes another way (`attend`): the same values."""
    with torch.no_grad():
        plain = tokenizer.encode_latents(tokenizer.encode_patches(images), 16)
    torch.testing.assert_close(
        tokenizer.encode_latents(tokenizer.encode_patches(images), 16).detach(), plain, atol=1e-5, rtol=0
    )


def test_codes_are_the_nearest(tokenizer: DetailFlowTokenizer, images: torch.Tensor):
    with torch.no_grad():
        z = tokenizer.encode_latents(tokenizer.encode_patches(images), 16)
    torch.testing.assert_close(z.norm(dim=-1), torch.ones(3, 16))
    codes = tokenizer.quantizer.codes()
    distance = (z[:, :, None] - codes).norm(dim=-1)
    assert torch.equal(tokenizer.quantizer.nearest(z), distance.argmin(-1))
    assert torch.equal(tokenizer.quantizer.nearest_k(z, 5), distance.argsort(-1)[..., :5])
    assert tokenizer.quantizer.nearest_k(z, 1000).shape == (3, 16, 64)


def test_patches_in_their_order():
    image = (
        torch.arange(2 * 4 * 6 * 3).view(2, 4, 6, 3).permute(0, 3, 1, 2).float()
    )  # a pixel's values: row, column, channel
    patches = patchify(image, 2)
    assert patches.shape == (2, 6, 12)
    assert patches[0, 1].tolist() == [6, 7, 8, 9, 10, 11, 24, 25, 26, 27, 28, 29]
    assert torch.equal(unpatchify(patches, 4, 6, 2), image)


# ------------------------------------------------------------------------------------------------- the paper's table 2


def test_an_encoder_without_a_causal_mask(images: torch.Tensor, tmp_path: Path):
    """Every query counts for every other one, so the first codes are those of all N queries."""
    torch.manual_seed(0)
    tokenizer = DetailFlowTokenizer(replace(CONFIG, causal_encoder=False)).eval()
    ids = tokenizer.encode(images)
    for n in tokenizer.schedule.valid_counts:
        assert torch.equal(tokenizer.encode(images, num_tokens=n), ids[:, :n])
    tokenizer.save_pretrained(tmp_path)
    again = DetailFlowTokenizer.from_pretrained(tmp_path)
    assert again.config == tokenizer.config and torch.equal(again.encode(images), ids)
    causal = DetailFlowTokenizer(CONFIG).eval()
    causal.load_state_dict(tokenizer.state_dict())
    with torch.no_grad():
        patches = tokenizer.encode_patches(images)
        z, masked = (model.encode_latents(patches, 16) for model in (tokenizer, causal))
        before = z[:, 0].clone()
        tokenizer.encoder.query_tokens[-1] += 1
        assert not torch.equal(tokenizer.encode_latents(patches, 16)[:, 0], before)
        causal.encoder.query_tokens[-1] += 1
        assert torch.equal(causal.encode_latents(patches, 16)[:, 0], masked[:, 0])


def test_no_causal_prefix(images: torch.Tensor):
    """c = 0: the first group's queries see each other, and counts and corrections come in whole groups."""
    torch.manual_seed(0)
    tokenizer = DetailFlowTokenizer(replace(CONFIG, causal_tokens=0)).eval()
    ids = tokenizer.encode(images)
    assert tokenizer.schedule.valid_counts == (4, 8, 12, 16)
    for n in tokenizer.schedule.valid_counts:
        assert torch.equal(tokenizer.encode(images, num_tokens=n), ids[:, :n])
        assert tokenizer.decode(ids[:, :n]).shape[-1] == tokenizer.schedule.decode_size(n)
    wrong = (ids[:, :4] + 7) % 64
    assert torch.equal(tokenizer.encode_correction(images, position=0, wrong_tokens=wrong)[:, :4], wrong)
    with pytest.raises(DetailFlowError, match="num_tokens must be a multiple of 4 up to 16, not 1$"):
        tokenizer.encode(images, num_tokens=1)
    with pytest.raises(DetailFlowError, match="position must be a multiple of 4 below 16, not 1$"):
        tokenizer.encode_correction(images, position=1, wrong_tokens=wrong[:, :1])


def test_a_config_of_before(tokenizer: DetailFlowTokenizer, tmp_path: Path):
    tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.pop("causal_encoder") is True
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert DetailFlowTokenizer.from_pretrained(tmp_path).config == CONFIG


# ------------------------------------------------------------------------------------------------- bad inputs


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 1, 32, 32), (1, 3, 20, 32), (1, 3, 32, 0)])
def test_wrong_images(tokenizer: DetailFlowTokenizer, shape: tuple[int, ...]):
    for call in (
        tokenizer.encode,
        lambda x: tokenizer.encode_correction(x, position=0, wrong_tokens=torch.zeros(shape[0], 1, dtype=torch.int64)),
    ):
        with pytest.raises(
            DetailFlowError,
            match=r"images must be floats of shape .*, or with other multiples of 8 as sides, not ",
        ):
            call(torch.zeros(shape))


def test_bytes_are_not_pixels(tokenizer: DetailFlowTokenizer):
    with pytest.raises(DetailFlowError, match="not .* torch.uint8"):
        tokenizer.encode(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("low", "high", "shown"),
    [
        (0, 255, "0 to 255"),
        (-2.1, 1, "-2.1 to 1"),
        (0, math.inf, "0 to inf"),
        (-math.inf, 0, "-inf to 0"),
        (0, math.nan, "nan to nan"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_pixels_out_of_range(tokenizer: DetailFlowTokenizer, low: float, high: float, shown: str, dtype: torch.dtype):
    images = torch.zeros(2, 3, 32, 32, dtype=dtype)
    images[0, 0, 0, 0], images[1, 2, 3, 4] = low, high
    for call in (
        tokenizer.encode,
        lambda x: tokenizer.encode_correction(x, position=0, wrong_tokens=torch.zeros(2, 1, dtype=torch.int64)),
    ):
        with pytest.raises(
            DetailFlowError, match=r"pixels of images must be in \[-1, 1\], not .*: of bytes, take"
        ) as caught:
            call(images)
        assert dtype == torch.bfloat16 or shown in str(caught.value)


@pytest.mark.parametrize("place", [{"device": "meta"}, {"layout": torch.sparse_coo}])
def test_images_without_all_numbers(tokenizer: DetailFlowTokenizer, place: dict[str, Any]):
    with pytest.raises(DetailFlowError, match="images must be a dense tensor that holds numbers, not a (meta|sparse)"):
        tokenizer.encode(torch.zeros(1, 3, 32, 32, **place))
    with pytest.raises(DetailFlowError, match="codes must be a dense tensor that holds numbers, not a (meta|sparse)"):
        tokenizer.decode(torch.zeros(1, 16, dtype=torch.int64, **place))


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn])
def test_integers_are_not_pixels(tokenizer: DetailFlowTokenizer, dtype: torch.dtype):
    with pytest.raises(DetailFlowError, match=f"images must be floats .* not .* {dtype}"):
        tokenizer.encode(torch.zeros(1, 3, 32, 32, dtype=dtype))


def test_no_images_have_no_codes(model: Path):
    half = DetailFlowTokenizer.from_pretrained(model, dtype="bfloat16", device="cpu")
    assert half.encode(torch.zeros(0, 3, 32, 32)).shape == (0, 16)


def test_decoded_images_can_be_encoded(tokenizer: DetailFlowTokenizer, images: torch.Tensor):
    assert tokenizer.encode(images * 1.25).shape == (3, 16)  # a decoder's pixels are in about [-1, 1]


def test_images_of_another_type(tokenizer: DetailFlowTokenizer, images: torch.Tensor):
    assert torch.equal(tokenizer.encode(images.double()), tokenizer.encode(images))
    assert tokenizer.encode(images[:0]).shape == (0, 16)


@pytest.mark.parametrize("n", [0, 9, 13, 17, -1])
def test_wrong_counts(tokenizer: DetailFlowTokenizer, images: torch.Tensor, n: int):
    with pytest.raises(DetailFlowError, match=f"num_tokens must be 1 to 8 or a multiple of 4 up to 16, not {n}"):
        tokenizer.encode(images, num_tokens=n)
    if n >= 0:
        with pytest.raises(DetailFlowError, match=f"not {n}$"):
            tokenizer.decode(torch.zeros(1, n, dtype=torch.int64))


@pytest.mark.parametrize(
    ("ids", "size", "message"),
    [
        (torch.zeros(16, dtype=torch.int64), None, r"codes must be integers in 2 dimension"),
        (torch.zeros(1, 16), None, "codes must be integers"),
        (torch.full((1, 16), 64), None, "codes must be 0 to 63, not 64 to 64"),
        (torch.full((1, 16), -1), None, "codes must be 0 to 63"),
        (
            torch.zeros(1, 16, dtype=torch.int64),
            20,
            "size must be a positive multiple of 8 pixels, or .*, not 20",
        ),
        (
            torch.zeros(1, 16, dtype=torch.int64),
            0,
            "size must be a positive multiple of 8 pixels, or .*, not 0",
        ),
        (
            torch.zeros(1, 16, dtype=torch.int64),
            8 * 10**8,
            "a batch of 1 images at a size of 800000000 does not fit in memory, so give fewer codes or a smaller size",
        ),
        ([[0] * 16], None, r"codes must be a tensor of integers, as torch.tensor makes it, not \[\[0, 0, "),
    ],
)
def test_wrong_codes_and_sizes(tokenizer: DetailFlowTokenizer, ids: torch.Tensor, size: int | None, message: str):
    with pytest.raises(DetailFlowError, match=message):
        tokenizer.decode(ids, size=size)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32])
def test_codes_of_any_integers(tokenizer: DetailFlowTokenizer, images: torch.Tensor, dtype: torch.dtype):
    ids = tokenizer.encode(images)
    assert torch.equal(tokenizer.decode(ids.to(dtype)), tokenizer.decode(ids))
    given = [
        tokenizer.encode_correction(images, position=0, wrong_tokens=wrong)
        for wrong in (ids[:, 1:2], ids[:, 1:2].to(dtype))
    ]
    assert torch.equal(*given)


def test_wrong_tokens_that_are_none(tokenizer: DetailFlowTokenizer, images: torch.Tensor):
    for wrong, message in (
        ([[1]] * 3, "a tensor of integers, .*, not"),
        (torch.tensor([1, 2, 3]), "integers in 2 dim"),
    ):
        with pytest.raises(DetailFlowError, match=f"wrong_tokens must be {message}"):
            tokenizer.encode_correction(images, position=0, wrong_tokens=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("position", [-1, 9, 10, 16])
def test_wrong_positions(tokenizer: DetailFlowTokenizer, images: torch.Tensor, position: int):
    with pytest.raises(DetailFlowError, match=f"position must be below 8 or a multiple of 4 below 16, not {position}"):
        tokenizer.encode_correction(images, position=position, wrong_tokens=torch.zeros(3, 4, dtype=torch.int64))


@pytest.mark.parametrize("position", [12.0, True, "8", None])
def test_positions_that_are_no_integers(tokenizer: DetailFlowTokenizer, images: torch.Tensor, position: Any):
    with pytest.raises(DetailFlowError, match=f"position must be an integer, not {position!r}"):
        tokenizer.encode_correction(images, position=position, wrong_tokens=torch.zeros(3, 4, dtype=torch.int64))


@pytest.mark.parametrize(("position", "shape"), [(0, (3, 4)), (8, (3, 1)), (8, (2, 4))])
def test_wrong_tokens_of_another_shape(
    tokenizer: DetailFlowTokenizer, images: torch.Tensor, position: int, shape: tuple[int, ...]
):
    with pytest.raises(DetailFlowError, match=f"wrong_tokens at position {position} must have shape"):
        tokenizer.encode_correction(images, position=position, wrong_tokens=torch.zeros(shape, dtype=torch.int64))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"group_size": 5}, "group_size must divide num_tokens"),
        ({"patch_size": 5}, "patch_size must divide image_size"),
        ({"causal_tokens": 6}, "causal_tokens must be a multiple of group_size"),
        ({"codebook_size": 0}, "codebook_size must be a positive integer, not 0"),
        ({"codebook_dim": 2.5}, "codebook_dim must be a positive integer, not 2.5"),
        ({"alpha": 0.0}, "alpha must be above 0"),
    ],
)
def test_wrong_configs(values: dict, message: str):
    with pytest.raises(DetailFlowError, match=message):
        replace(CONFIG, **values)
    with pytest.raises(DetailFlowError, match="heads must divide width, and 3 does not divide 32"):
        ViTConfig(32, 1, 3)


# ------------------------------------------------------------------------------------------------- files


def test_round_trip(tokenizer: DetailFlowTokenizer, images: torch.Tensor, tmp_path: Path):
    tokenizer.save_pretrained(tmp_path)
    again = DetailFlowTokenizer.from_pretrained(tmp_path)
    assert again.config == tokenizer.config and not again.training
    assert torch.equal(again.encode(images), tokenizer.encode(images))


def test_bfloat16(pipeline: DetailFlowPipeline, model: Path, images: torch.Tensor):
    half = DetailFlowTokenizer.from_pretrained(model, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    ids = half.encode(images.bfloat16())
    agreement = (ids == pipeline.tokenizer.encode(images)).float().mean()
    assert agreement > 0.6
    pixels = half.decode(pipeline.tokenizer.encode(images)).float()
    torch.testing.assert_close(
        pixels, pipeline.tokenizer.decode(pipeline.tokenizer.encode(images)), atol=0.1, rtol=0.05
    )
    corrected = half.encode_correction(images.bfloat16(), position=0, wrong_tokens=ids[:, :1])
    assert torch.equal(corrected[:, :1], ids[:, :1])


def test_codes_that_are_no_codes_are_refused(tokenizer: DetailFlowTokenizer, images: torch.Tensor) -> None:
    ids = tokenizer.encode(images)
    size = tokenizer.config.codebook_size
    for wrong in (ids.float(), ids.bool(), ids - size, ids + size):
        with pytest.raises(DetailFlowError, match="codes must"):
            tokenizer.decode(wrong)
        with pytest.raises(DetailFlowError, match="wrong_tokens must"):
            tokenizer.encode_correction(images, position=0, wrong_tokens=wrong[:, :1])
    assert tokenizer.decode(ids[:0]).shape == (0, 3, tokenizer.config.image_size, tokenizer.config.image_size)


def test_rectangles(tokenizer: DetailFlowTokenizer):
    images = torch.rand(2, 3, 24, 40, generator=torch.Generator().manual_seed(0)) * 2 - 1
    ids = tokenizer.encode(images)
    assert ids.shape == (2, 16)
    assert tokenizer.decode(ids, size=(24, 40)).shape == (2, 3, 24, 40)
    assert tokenizer.encode_correction(images, position=0, wrong_tokens=ids[:, :1]).shape == (2, 16)
    assert torch.equal(tokenizer.decode(ids, size=(32, 32)), tokenizer.decode(ids))
    upright = tokenizer.encode(images.transpose(2, 3))
    assert upright.shape == ids.shape and not torch.equal(upright, ids)


@pytest.mark.parametrize("size", [(24,), (24, 40, 8), (24, 20), (0, 8), (8.0, 8), (8, 8**30)])
def test_rectangles_that_are_none(tokenizer: DetailFlowTokenizer, size: tuple):
    with pytest.raises(
        DetailFlowError, match="size must be a positive multiple of 8 pixels, or .height, width. of such, not"
    ):
        tokenizer.decode(torch.zeros(1, 16, dtype=torch.int64), size=size)
