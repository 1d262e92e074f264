"""Check ids of codes and classes that are given to a network."""

import torch
from torch import Tensor

from detailflow.errors import DetailFlowError

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32)


def checked_ids(name: str, ids: Tensor, dimensions: int, count: int, wait: bool = True) -> Tensor:
    """Return `ids` as int64, after a check that they are integers below `count` in a tensor of so many dimensions.

    Args:
        wait: whether to look at those on a GPU as well, which waits for it.
    """
    if not isinstance(ids, Tensor):
        raise DetailFlowError(f"{name} must be a tensor of integers, as torch.tensor makes it, not {ids!r:.40}")
    if ids.ndim != dimensions or ids.dtype not in _INTEGERS:
        found = f"{tuple(ids.shape)} {ids.dtype}"
        raise DetailFlowError(f"{name} must be integers in {dimensions} dimension(s), not {found}")
    ids = ids.long()
    if (wait or ids.device.type == "cpu") and ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < count:
        raise DetailFlowError(f"{name} must lie in 0 to {count - 1}, not {int(ids.min())} to {int(ids.max())}")
    return ids
