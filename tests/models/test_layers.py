"""Attention against PyTorch's own."""

import copy
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F

from detailflow.models import layers
from detailflow.models.layers import ViTConfig, attend


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("queries", [1, 6])
@pytest.mark.parametrize("scores", [1, 2 * 3 * 6 * 9, 2**21])  # an image at a time, at most two, all five
def test_both_ways_agree(scores: int, queries: int, masked: bool, monkeypatch: pytest.MonkeyPatch):
    """Values and gradients, in one part or several, with fewer queries than keys."""
    monkeypatch.setattr(layers, "SCORES", scores)
    torch.manual_seed(0)
    q, k, v = (torch.randn(5, 3, length, 8, requires_grad=True) for length in (queries, 9, 9))
    mask = torch.ones(queries, 9, dtype=torch.bool).tril(9 - queries) if masked else None
    ours, theirs = attend(q, k, v, mask), F.scaled_dot_product_attention(q, k, v, mask)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    gradients = [torch.autograd.grad(found.square().sum(), (q, k, v)) for found in (ours, theirs)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    with torch.inference_mode():
        half = attend(*(x.bfloat16() for x in (q, k, v)), mask)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), theirs, atol=0.03, rtol=0.03)


def test_nothing_to_attend():
    empty = torch.zeros(0, 3, 4, 8)
    assert attend(empty, empty, empty).shape == (0, 3, 4, 8)


@pytest.mark.parametrize("fast", [True, False])
def test_bfloat16_where_float32_is_faster(monkeypatch: pytest.MonkeyPatch, fast: bool):
    """On a processor that is slower in bfloat16 a block rounds its result only; with and without keys of others."""
    torch.manual_seed(0)
    block = layers.Block(ViTConfig(width=64, depth=1, heads=4)).to(torch.bfloat16).requires_grad_(False)
    exact = copy.deepcopy(block).float()
    x = torch.randn(2, 6, 64).bfloat16()
    mask = torch.ones(6, 12, dtype=torch.bool).tril(6)
    _, past = exact(x.float())
    wanted, wanted_own = exact(x.float(), past, mask)
    monkeypatch.setattr(layers, "multiplies_bfloat16_fast", lambda: fast)
    _, past = block(x)
    result, own = block(x, past, mask)
    assert result.dtype == torch.bfloat16 and all(weight.dtype == torch.bfloat16 for weight in block.parameters())
    assert (result.equal(wanted.bfloat16()) and own[0].equal(wanted_own[0])) is not fast
    assert (result - wanted).abs().max() < 0.05


def test_bfloat16_in_several_threads(monkeypatch: pytest.MonkeyPatch):
    """Nothing of a block changes while it computes in float32."""
    monkeypatch.setattr(layers, "multiplies_bfloat16_fast", lambda: False)
    torch.manual_seed(0)
    block = layers.Block(ViTConfig(width=64, depth=1, heads=4)).to(torch.bfloat16).requires_grad_(False)
    x = torch.randn(2, 6, 64).bfloat16()
    alone = block(x)[0]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(4) as threads:
            for result, _ in threads.map(lambda _: block(x), range(200)):
                assert result.equal(alone)
    finally:
        sys.setswitchinterval(before)
