"""One block of memory for all weights of a model, in huge pages (docs/speed.md#engines)."""

import mmap
import threading
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

ALIGNMENT = 64  # bytes: a cache line, and the widest register
_MOVING = threading.Lock()  # or several threads would each move the weights to a block of their own


@torch.inference_mode(False)  # or the weights could not be trained after an image was generated
@torch.no_grad()
def gather(weights: Sequence[Tensor]) -> None:
    """Move weights of one dtype side by side into one block in huge pages, unless they are in one already.

    The tensors stay the same objects, so modules and optimizers see the same numbers; other tensors that shared their
    memory, such as those of an earlier state dict, keep the old one. Each has a storage of its own, so it is saved and
    sent to other processes alone. Without huge pages the processor has to look up where the next weights are every
    4 KiB.
    """
    with _MOVING:
        _gather(weights)


def _gather(weights: Sequence[Tensor]) -> None:
    weights = [weight for weight in weights if weight.numel()]
    starts = list(accumulate((-(-weight.nbytes // ALIGNMENT) * ALIGNMENT for weight in weights), initial=0))
    shared = any(weight.is_shared() for weight in weights)  # with other processes, which would not see the new ones
    if shared or _offsets(weights) == starts[:-1] or not hasattr(mmap, "MADV_HUGEPAGE"):
        return
    try:
        memory = mmap.mmap(-1, starts[-1], flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # there is no room, or a kernel without them: the weights stay where they are
        return
    for weight, start in zip(weights, starts[:-1], strict=True):
        room = torch.frombuffer(memory, dtype=weight.dtype, count=weight.numel(), offset=start)  # keeps the memory
        weight.data = room.view(weight.shape).copy_(weight)


def _offsets(weights: Sequence[Tensor]) -> list[int]:
    """Return how many bytes after the first weight each one is."""
    return [weight.data_ptr() - weights[0].data_ptr() for weight in weights]
