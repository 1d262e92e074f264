"""Check tensors, and ids of codes and classes, that are given to a network."""

import torch
from torch import Tensor

from detailflow.errors import DetailFlowError, not_finite
from detailflow.words import shown

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32)


def check_plain(name: str, tensor: Tensor, kinds: str = "a tensor") -> None:
    """Check that it is a tensor whose numbers are all there: neither sparse nor nested, nor on the device `meta`."""
    if not isinstance(tensor, Tensor):
        raise DetailFlowError(f"{name} must be {kinds}, not {shown(tensor, 40)}")
    kind = "nested" if tensor.is_nested else "meta" if tensor.device.type == "meta" else None
    if kind or tensor.layout is not torch.strided:
        kind = kind or str(tensor.layout).removeprefix("torch.")
        raise DetailFlowError(f"{name} must be a dense tensor that holds numbers, not a {kind} one")


def all_finite(what: str, numbers: Tensor) -> Tensor:
    """Return what a network computed; raise a `DetailFlowError` if not all of it is finite. Waits for a GPU."""
    if not numbers.isfinite().all():
        raise not_finite(what)
    return numbers


def checked_ids(name: str, ids: Tensor, dimensions: int, count: int, wait: bool = True) -> Tensor:
    """Return `ids` as int64, after a check that they are integers below `count` in a tensor of so many dimensions.

    Args:
        wait: whether to look at those on a GPU as well, which waits for it.
    """
    check_plain(name, ids, "a tensor of integers, as torch.tensor makes it")
    if ids.ndim != dimensions or ids.dtype not in _INTEGERS:
        found = f"{tuple(ids.shape)} {ids.dtype}"
        raise DetailFlowError(f"{name} must be integers in {dimensions} dimension(s), not {found}")
    ids = ids.long()
    if (wait or ids.device.type == "cpu") and ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < count:
        raise DetailFlowError(f"{name} must be 0 to {count - 1}, not {int(ids.min())} to {int(ids.max())}")
    return ids
