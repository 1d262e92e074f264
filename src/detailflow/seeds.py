"""How several numbers become one seed."""

import numpy as np


def mixed_seed(seed: int, *parts: int) -> int:
    """Return a seed for torch from several numbers, 0 to 2^64 - 1 each, in order."""
    # Each takes the same number of bits, so that no two sequences of one length have the same bits.
    words = np.array([seed, *parts], "<u8").view("<u4")
    return int(np.random.SeedSequence(words.tolist()).generate_state(1, np.uint64)[0])
