"""Seeds: any of 64 bits is valid, and no two steps of two runs share their random numbers."""

import pytest
import torch

from detailflow.errors import DetailFlowError
from detailflow.seeds import mixed_seed
from detailflow.settings import Seed, require


def test_every_seed_is_one_of_torchs():
    for seed in (0, 1, 10**14, 2**63, 2**64 - 1):
        require(Seed, seed=seed)
        for step in (0, 1_000_003, 2**40):
            torch.manual_seed(mixed_seed(seed, step))
    for seed in (-1, 2**64):
        with pytest.raises(DetailFlowError, match=rf"seed must be 0 to 2\^64 - 1, not {seed}"):
            require(Seed, seed=seed)


def test_no_two_are_the_same():
    """Among them what once was: a million steps after one seed came those of the next."""
    pairs = [(seed, step) for seed in (0, 1, 2, 7, 2**32, 7 * 2**32 + 1) for step in (0, 1, 7, 1_000_003, 2**32)]
    assert len({mixed_seed(*pair) for pair in pairs}) == len(pairs)
    assert mixed_seed(1, 2, 0) != mixed_seed(1, 2, 1) != mixed_seed(2, 1, 1)
    assert mixed_seed(3, 4) == mixed_seed(3, 4)
