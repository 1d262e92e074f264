"""The schedule against plain enumeration; the published model's own numbers are in test_parity.py."""

import numpy as np
import pytest
import torch

from detailflow.errors import DetailFlowError
from detailflow.schedule import TokenSchedule

SHAPES = [(128, 8, 8), (32, 4, 8), (16, 4, 16), (12, 1, 3), (12, 3, 6), (8, 8, 8), (1, 1, 1)]  # (N, g, c)
SHAPES += [(16, 4, 0), (8, 8, 0), (8, 1, 0)]


def make(n: int, g: int, c: int | None) -> TokenSchedule:
    return TokenSchedule(n, g, c, 64, 16)


@pytest.mark.parametrize(("n", "g", "c"), SHAPES)
def test_counts_and_steps(n: int, g: int, c: int):
    schedule = make(n, g, c)
    valid = [k for k in range(1, n + 1) if k <= c or k % g == 0]
    assert list(schedule.valid_counts) == valid
    assert [end for _, end in schedule.steps] == valid
    assert [start for start, _ in schedule.steps] == [0, *valid[:-1]]
    assert len(schedule.steps) == c + n // g - c // g
    assert schedule.check_count(None) == n
    for k in range(-1, n + 2):
        if k in valid:
            assert schedule.check_count(k) == k
        else:
            with pytest.raises(DetailFlowError, match=f"not {k}$"):
                schedule.check_count(k)
    for start, end in schedule.steps:
        for position in range(start, end):
            assert (schedule.group_start(position), schedule.span_end(position)) == (start, end)


@pytest.mark.parametrize(("n", "g", "c"), SHAPES)
def test_the_mask(n: int, g: int, c: int):
    mask = make(n, g, c).attention_mask(n)
    for i in range(n):
        for j in range(n):
            assert bool(mask[i, j]) == (j <= i if i < c else j // g <= i // g)
    for k in make(n, g, c).valid_counts:
        assert torch.equal(make(n, g, c).attention_mask(k), mask[:k, :k])  # what comes later changes nothing


@pytest.mark.parametrize(("n", "g", "c"), SHAPES)
def test_resolutions_only_grow(n: int, g: int, c: int):
    schedule = make(n, g, c)
    resolutions = [schedule.resolution(k) for k in schedule.valid_counts]
    assert resolutions == sorted(resolutions) and resolutions[-1] == 64
    assert n == 1 or schedule.resolution(1) == 1
    for k in schedule.valid_counts:
        side = schedule.decode_size(k)
        assert side % 16 == 0 and 0 <= side - schedule.resolution(k) < 16 <= side <= 64
        best = schedule.best_count(side)
        assert schedule.decode_size(best) == side
        assert abs(schedule.resolution(best) - side) <= abs(schedule.resolution(k) - side)


def test_counts_of_stages():
    assert TokenSchedule(128, 8, None, 256, 16).stages() == [1, 2, 4, 8, 16, 32, 64, 128]
    assert TokenSchedule(36, 12, 12, 32, 4).stages() == [1, 2, 4, 8, 36]
    assert TokenSchedule(128, 8, None, 256, 16).stages(24) == [1, 2, 4, 8, 16, 24]
    assert TokenSchedule(128, 8, None, 256, 16).stages(1) == [1] and make(12, 6, 0).stages() == [12]


@pytest.mark.parametrize("n", [-1, 0, 17, 500])
def test_numbers_of_tokens_that_no_image_has(n: int):
    schedule = make(16, 4, 8)
    for call in (schedule.resolution, schedule.decode_size):
        with pytest.raises(DetailFlowError, match=f"n must be 1 to 16 tokens, not {n}$"):
            call(n)
    if n:
        with pytest.raises(DetailFlowError, match=f"n must be 0 to 16 tokens, not {n}$"):
            schedule.attention_mask(n)


def test_integers_of_other_libraries():
    for n in (np.int64(12), torch.tensor(12)):
        assert (make(16, 4, 8).check_count(n), make(16, 4, 8).decode_size(n)) == (12, make(16, 4, 8).decode_size(12))
    assert TokenSchedule(np.int32(16), torch.tensor(4), None, 64, 16) == make(16, 4, None)
    for wrong in (True, np.True_, torch.tensor(True), 12.0, torch.tensor(12.0)):
        with pytest.raises(DetailFlowError, match="num_tokens must be an integer, not"):
            make(16, 4, 8).check_count(wrong)


def test_a_side_that_no_count_has():
    with pytest.raises(
        DetailFlowError, match="no number of tokens is decoded at side 20; the sides are 16, 32, 48, 64"
    ):
        make(32, 4, 8).best_count(20)


def test_causal_tokens_default_to_a_group():
    assert make(16, 4, None).causal_tokens == 4


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((16, 5, 5, 64, 16), "group_size must divide num_tokens, and 5 does not divide 16"),
        (
            (16, 4, 6, 64, 16),
            r"causal_tokens must be a multiple of group_size \(4\) and at most num_tokens \(16\), not 6",
        ),
        ((16, 4, 20, 64, 16), "causal_tokens must be a multiple"),
        ((16, 4, 4, 60, 16), "patch_size must divide image_size, and 16 does not divide 60"),
        ((0, 4, 4, 64, 16), "num_tokens must be a positive integer, not 0"),
        ((16, 0, 4, 64, 16), "group_size must be a positive integer, not 0"),
        ((16, 4, -4, 64, 16), "causal_tokens must be 0 or a positive integer, not -4"),
        ((16, 4, 4.0, 64, 16), "causal_tokens must be 0 or a positive integer, not 4.0"),
        ((16, 4, False, 64, 16), "causal_tokens must be 0 or a positive integer, not False"),
        ((16.0, 4, 4, 64, 16), "num_tokens must be a positive integer, not 16.0"),
        ((16, 4, 4, 64, 16, 0.0), "alpha must be above 0 and at most 20, not 0.0"),
        ((16, 4, 4, 64, 16, float("nan")), "alpha must be above 0 and at most 20, not nan"),
    ],
)
def test_values_that_contradict_each_other(values: tuple, message: str):
    with pytest.raises(DetailFlowError, match=message):
        TokenSchedule(*values)


def test_no_causal_prefix():
    """Every group at once, the first too (the paper's table 2): N/g steps, and counts are multiples of g."""
    schedule = make(16, 4, 0)
    assert schedule.steps == ((0, 4), (4, 8), (8, 12), (12, 16))
    with pytest.raises(DetailFlowError, match="num_tokens must be a multiple of 4 up to 16, not 1$"):
        schedule.check_count(1)
    assert schedule.attention_mask(4).all()


def test_shapes_that_are_not_square():
    schedule = TokenSchedule(128, 8, 8, 256, 16)
    for n in schedule.valid_counts:
        assert schedule.decode_shape(n, 256, 256) == (schedule.decode_size(n),) * 2
        height, width = schedule.decode_shape(n, 192, 320)
        assert height % 16 == width % 16 == 0
        assert 192 * schedule.resolution(n) / 256 <= height < 192 * schedule.resolution(n) / 256 + 16
        assert 320 * schedule.resolution(n) / 256 <= width < 320 * schedule.resolution(n) / 256 + 16
    assert schedule.decode_shape(128, 192, 320) == (192, 320)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((256, 256), (256, 256)),
        ((1000, 1000), (256, 256)),
        ((272, 272), (256, 256)),
        ((192, 320), (192, 320)),  # its own
        ((191, 320), (192, 336)),
        ((384, 640), (192, 336)),
        ((640, 384), (336, 192)),
        ((1, 100_000), (16, 4096)),
        ((100_000, 1), (4096, 16)),
    ],
)
def test_how_a_photo_of_another_shape_is_encoded(shape: tuple[int, int], expected: tuple[int, int]):
    schedule = TokenSchedule(128, 8, 8, 256, 16)
    assert schedule.full_shape(*shape) == expected
    assert schedule.full_shape(*expected) == expected  # and stays so
