"""What a tokenizer of our own layout may have beyond the paper.

A linear path, convolutions at the end, an absent token.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from detailflow import DetailFlowTokenizer
from detailflow.convert import convert
from detailflow.errors import DetailFlowError
from detailflow.models.growing import grow_tokenizer
from detailflow.models.layers import ViTConfig, cosine_grid, resize_grid
from detailflow.models.tokenizer import TokenizerConfig

VIT = ViTConfig(32, 2, 2)
PLAIN = TokenizerConfig(
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
ALL = replace(PLAIN, linear_path=True, pixel_channels=8, absent_token=True)


def made(config: TokenizerConfig) -> DetailFlowTokenizer:
    torch.manual_seed(0)
    return DetailFlowTokenizer(config).eval()


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize(("tokens", "side"), [(64, 8), (48, 8), (1, 8), (65, 9), (128, 12)])
def test_the_linear_path_starts_as_a_cosine_transform(tokens: int, side: int):
    grid = cosine_grid(tokens)
    assert grid.shape == (tokens, side, side)
    torch.testing.assert_close(grid.flatten(1) @ grid.flatten(1).T, torch.eye(tokens), atol=1e-5, rtol=0)
    torch.testing.assert_close(grid[0], torch.full((side, side), 1 / side))
    changes = [(g.sign().diff(dim=0) != 0).sum() + (g.sign().diff(dim=1) != 0).sum() for g in grid[:9]]
    assert changes[0] == 0 and all(changes[0] < c for c in changes[1:])  # low frequencies first


def test_what_is_smooth_passes_the_linear_path_of_another_grid():
    """A slow wave sampled on a finer grid has the same coefficients."""
    waves = cosine_grid(64)
    for rows, columns in ((16, 16), (8, 12)):
        scale = 8 / (rows * columns) ** 0.5
        there = resize_grid(waves[:4], rows, columns)
        torch.testing.assert_close(there.square().sum(1) * scale**2, torch.ones(4), atol=0.12, rtol=0)


@pytest.mark.parametrize("option", [{"linear_path": True}, {"pixel_channels": 8}, {"absent_token": True}, {}])
def test_the_contract_holds(option: dict, images: torch.Tensor, tmp_path: Path):
    """The first tokens do not depend on later ones, corrections keep what is written, any shape goes, and
    files bring it back."""
    tokenizer = made(replace(PLAIN, **option) if option else ALL)
    ids = tokenizer.encode(images)
    for n in tokenizer.schedule.valid_counts:
        assert torch.equal(tokenizer.encode(images, num_tokens=n), ids[:, :n])
        side = tokenizer.schedule.decode_size(n)
        assert tokenizer.decode(ids[:, :n]).shape == (3, 3, side, side)
    wrong = (ids[:, 8:12] + 7) % 64
    corrected = tokenizer.encode_correction(images, position=8, wrong_tokens=wrong)
    assert torch.equal(corrected[:, :8], ids[:, :8]) and torch.equal(corrected[:, 8:12], wrong)
    wide = torch.rand(1, 3, 24, 40) * 2 - 1
    assert tokenizer.decode(tokenizer.encode(wide), size=(24, 40)).shape == wide.shape
    tokenizer.save_pretrained(tmp_path / "model")
    again = DetailFlowTokenizer.from_pretrained(tmp_path / "model", device="cpu")
    assert again.config == tokenizer.config
    assert torch.equal(again.decode(ids), tokenizer.decode(ids))


def test_the_linear_path_reaches_the_tokens_and_the_corrected_ones(images: torch.Tensor):
    tokenizer, plain = made(replace(PLAIN, linear_path=True)), made(PLAIN)
    plain.load_state_dict({name: tensor for name, tensor in tokenizer.state_dict().items() if ".linear" not in name})
    with torch.no_grad():
        patches, bare = tokenizer.encode_patches(images), plain.encode_patches(images)
        assert not torch.equal(tokenizer.encode_latents(patches, 16), plain.encode_latents(bare, 16))
        given = tokenizer.quantizer.nearest(tokenizer.encode_latents(patches, 16))
        ours, theirs = tokenizer.correct_latents(patches, given, 8), plain.correct_latents(bare, given, 8)
        torch.testing.assert_close(ours[:, :8], theirs[:, :8])  # what is written is known by its codes alone
        assert not torch.allclose(ours[:, 8:], theirs[:, 8:], atol=1e-3)
        assert patches.first(2).linear is not None and len(patches.first(2).linear) == patches.first(2).images == 2


def test_convolutions_at_the_end_start_as_nothing(images: torch.Tensor):
    """The picture is the first three numbers of each pixel."""
    tokenizer = made(replace(PLAIN, pixel_channels=5))
    ids = tokenizer.encode(images)
    before = tokenizer.decode(ids)
    plain = made(PLAIN)
    rows = tokenizer.decoder.to_pixels.weight.view(8 * 8, 5, 32)[:, :3].reshape(-1, 32)
    own = {name: t for name, t in tokenizer.decoder.state_dict().items() if "refine_pixels" not in name}
    plain.decoder.load_state_dict(own | {"to_pixels.weight": rows, "to_pixels.bias": torch.zeros(8 * 8 * 3)})
    plain.quantizer.load_state_dict(tokenizer.quantizer.state_dict())
    torch.testing.assert_close(plain.decode(ids), before)


def test_absent_tokens(images: torch.Tensor):
    """n tokens are decoded as N of which only the first n are present; what is absent does not count."""
    tokenizer = made(ALL)
    ids = tokenizer.encode(images)
    quantized = tokenizer.quantizer.lookup(ids)

    def pixels(quantized: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
        return tokenizer.decoder.picture(tokenizer.decoder.canvas(quantized, 32, 32, present), 32, 32)

    with torch.no_grad():
        for n in (1, 4, 12, 16):
            present = (torch.arange(16) < n).expand(3, -1)
            whole = pixels(quantized, present)
            torch.testing.assert_close(whole, tokenizer.decode(ids[:, :n], size=32))
            changed = torch.where(present[..., None], quantized, -quantized)
            torch.testing.assert_close(pixels(changed, present), whole)


def test_it_stays_in_our_own_layout(tmp_path: Path):
    for number, option in enumerate(({"linear_path": True}, {"pixel_channels": 8}, {"absent_token": True})):
        made(replace(PLAIN, **option)).save_pretrained(tmp_path / str(number))
        with pytest.raises(DetailFlowError, match="the published layout cannot hold a model with"):
            convert(str(tmp_path / str(number)), tmp_path / "out", to="published")
    assert not (tmp_path / "out").exists()


def test_it_grows(images: torch.Tensor):
    small, large = made(ALL), made(replace(ALL, num_tokens=32))
    large.load_state_dict(grow_tokenizer(small.state_dict(), small.config, large, "small"))
    assert torch.equal(large.encode(images, num_tokens=16), small.encode(images))
    with pytest.raises(DetailFlowError, match="linear_path is True there and False here"):
        grow_tokenizer(small.state_dict(), small.config, made(replace(PLAIN, num_tokens=32)), "small")
    with pytest.raises(DetailFlowError, match="grows to 64 tokens at most"):
        grow_tokenizer(small.state_dict(), small.config, made(replace(ALL, num_tokens=80)), "small")


@pytest.mark.parametrize("channels", [0, 2, True, 3.5])
def test_wrong_channels(channels: object):
    with pytest.raises(DetailFlowError, match="pixel_channels must be (an integer, )?3 "):
        replace(PLAIN, pixel_channels=channels)  # type: ignore[arg-type]
