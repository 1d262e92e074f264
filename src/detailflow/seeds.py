"""Seeds: checked, and mixed from several numbers."""

import numpy as np

from detailflow.errors import DetailFlowError

LARGEST_SEED = 2**64 - 1


def check_seeds(*seeds: int, name: str = "seeds") -> None:
    """Raise a `DetailFlowError` that names the first seed out of range."""
    if bad := [seed for seed in seeds if not 0 <= seed <= LARGEST_SEED]:
        raise DetailFlowError(f"{name} must be 0 to 2^64 - 1, not {bad[0]}")


def mixed_seed(seed: int, *parts: int) -> int:
    """Return a seed for torch from several numbers, 0 to 2^64 - 1 each, in order."""
    # Each takes the same number of bits, so that no two sequences of one length have the same bits.
    words = np.array([seed, *parts], "<u8").view("<u4")
    return int(np.random.SeedSequence(words.tolist()).generate_state(1, np.uint64)[0])
