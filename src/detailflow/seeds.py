"""Seeds: which are valid, and how several numbers become one."""

import numpy as np

from detailflow.errors import DetailFlowError

LARGEST_SEED = 2**64 - 1


def check_seeds(*seeds: int, name: str = "seeds") -> None:
    """Raise a `DetailFlowError` that names the first seed which no random numbers can be made from."""
    if bad := [seed for seed in seeds if not 0 <= seed <= LARGEST_SEED]:
        raise DetailFlowError(f"{name} must be 0 to 2^64 - 1, not {bad[0]}")


def mixed_seed(seed: int, *parts: int) -> int:
    """Return a seed for torch that stands for all of these numbers, 0 to 2^64 - 1 each, in their order.

    Each takes the same number of bits, so that no two sequences of one length are mixed from the same bits.
    """
    words = np.array([seed, *parts], "<u8").view("<u4")
    return int(np.random.SeedSequence(words.tolist()).generate_state(1, np.uint64)[0])
