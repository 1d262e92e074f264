"""One block of memory for all weights of a model, in huge pages (docs/speed.md#engines)."""

import mmap
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

ALIGNMENT = 64  # bytes: a cache line, and the widest register
_MOVING = threading.Lock()  # or several threads would each move the weights to a block of their own


@torch.inference_mode(False)  # or the weights could not be trained after an image was generated
@torch.no_grad()
def gather(weights: Sequence[Tensor]) -> None:
    """Move weights of one dtype side by side into one block in huge pages, unless they share a block already.

    The tensors stay the same objects, so modules and optimizers see the same numbers. Without huge pages the processor
    has to look up where the next weights are every 4 KiB.
    """
    with _MOVING:
        _gather(weights)


def _gather(weights: Sequence[Tensor]) -> None:
    if len({weight.untyped_storage().data_ptr() for weight in weights}) == 1 or not hasattr(mmap, "MADV_HUGEPAGE"):
        return
    unit = ALIGNMENT // weights[0].itemsize
    sizes = [-(-weight.numel() // unit) * unit for weight in weights]
    try:
        memory = mmap.mmap(-1, sum(sizes) * weights[0].itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # there is no room, or a kernel without them: the weights stay where they are
        return
    block = torch.frombuffer(memory, dtype=weights[0].dtype)  # keeps the memory
    for weight, room in zip(weights, block.split(sizes), strict=True):
        weight.data = room[: weight.numel()].view(weight.shape).copy_(weight)
