"""What a step draws: the number of tokens and the position of mistakes (docs/method.md#coarse-targets)."""

from collections import Counter
from collections.abc import Mapping

import pytest
import torch

from detailflow.schedule import TokenSchedule
from detailflow.training.passes import draw_count, draw_position

SHAPES = [(128, 8, 8), (32, 4, 8), (16, 4, 4), (24, 8, 16), (12, 1, 3), (8, 8, 8), (8, 4, 8), (1, 1, 1)]  # (N, g, c)
SHAPES += [(16, 4, 0), (4, 4, 0)]


def fits(drawn: Counter, expected: Mapping[object, float]) -> bool:
    """Whether the counts are those of `expected` (probabilities), by chi-square at five standard deviations."""
    assert set(drawn) <= set(expected), set(drawn) - set(expected)
    total = sum(drawn.values())
    statistic = sum((drawn[k] - total * p) ** 2 / (total * p) for k, p in expected.items())
    freedom = max(len(expected) - 1, 1)
    return statistic < freedom + 5 * (2 * freedom) ** 0.5


@pytest.mark.parametrize(("n", "g", "c"), SHAPES)
@pytest.mark.parametrize("probability", [0.0, 0.2, 1.0])
def test_counts(n: int, g: int, c: int, probability: float):
    schedule = TokenSchedule(n, g, c, 256, 16)
    expected: Counter = Counter()
    for t in range(1, n - g + 1):
        expected[t if t <= c else (t + g - 1) // g * g] += probability / (n - g)
    expected[n] += 1 - sum(expected.values())
    assert set(expected) <= set(schedule.valid_counts)
    torch.manual_seed(1)
    drawn = Counter(draw_count(schedule, probability) for _ in range(4000))
    assert fits(drawn, {k: p for k, p in expected.items() if p > 1e-9})


@pytest.mark.parametrize(("n", "g", "c"), SHAPES)
def test_positions(n: int, g: int, c: int):
    schedule = TokenSchedule(n, g, c, 256, 16)
    torch.manual_seed(1)
    starts = {start for start, _ in schedule.steps}
    for t in schedule.valid_counts:
        if t == schedule.steps[0][1]:  # the first step's tokens alone
            assert draw_position(schedule, t) is None
            continue
        last = t if t <= c else t - g
        expected: Counter = Counter()
        for p in range(last):
            expected[p if p < c else p // g * g] += 1 / last
        assert set(expected) <= starts
        drawn = Counter(draw_position(schedule, t) for _ in range(1000))
        assert fits(drawn, expected), (t, drawn)


def test_a_generator_of_its_own():
    schedule = TokenSchedule(128, 8, 8, 256, 16)
    first, again = (
        [draw_position(schedule, 128, generator) for _ in range(50)]
        for generator in (torch.Generator().manual_seed(3), torch.Generator().manual_seed(3))
    )
    assert first == again and len(set(first)) > 5
