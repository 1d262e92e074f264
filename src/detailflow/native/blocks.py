"""The blocks of the tokenizer's transformers in C++ (docs/speed.md#engines)."""

import ctypes
from collections.abc import Sequence
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor, nn

from detailflow import native
from detailflow.generation import layers_replaced
from detailflow.processor import has_amx

KeyValue = tuple[Tensor, Tensor]  # (B, heads, T, width / heads) each
POSITIONS = 512  # about as many go through all blocks at a time for two threads; with more threads more
EPSILON = 1e-6  # of the norms


class ViTSizes(ctypes.Structure):
    """As in vit.hpp."""

    _fields_ = [(name, ctypes.c_int32) for name in ("width", "depth", "heads", "hidden")]


def can_run(blocks: nn.ModuleList, x: Tensor, home: str) -> bool:
    """Return whether `run` gives the same result as the blocks for `x`, and is not known to be slower.

    Args:
        blocks: of one kind and size.
        x: (B, T, width), their input.
        home: the name of the module that has their own code.
    """
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or not native.is_plain(x):
        return False
    if layers_replaced(blocks, home):
        return False
    block: Any = blocks[0]
    width, heads, hidden = x.shape[-1], block.attn.heads, block.mlp.fc1.out_features
    found = native.library()
    if width % 32 or hidden % 32 or width // heads % 16 or isinstance(found, str):
        return False
    if torch.get_num_threads() > 1 and not found.detailflow_has_threads():
        return False
    if x.dtype == torch.bfloat16 and has_amx() and native.instructions() != "AMX":
        return False  # PyTorch multiplies by AMX
    if any((b.attn.heads, b.norm1.eps, b.norm2.eps) != (heads, EPSILON, EPSILON) for b in cast(Any, blocks)):
        return False
    shapes = [(width,), (width,), (3 * width, width), (3 * width,), (width, width), (width,), (width,), (width,)]
    shapes += [(hidden, width), (hidden,), (width, hidden), (width,)]
    weights = list(blocks.parameters())
    return all(_plain(w, x.dtype) for w in weights) and [tuple(w.shape) for w in weights] == shapes * len(blocks)


def _plain(weight: Tensor, dtype: torch.dtype) -> bool:
    if type(weight) is not nn.Parameter or weight.layout != torch.strided or weight.device.type != "cpu":
        return False
    return weight.dtype == dtype and weight.is_contiguous()


@torch.no_grad()
def run(
    blocks: nn.ModuleList,
    x: Tensor,
    past: Sequence[KeyValue] | None = None,
    mask: Tensor | None = None,
    keep: bool = False,
) -> tuple[Tensor, list[KeyValue]]:
    """Take `x` (B, T, width) through all blocks, without gradients, where `can_run`.

    Some images go through all blocks at a time: what they leave stays in the caches, and Ctrl-C is seen between them.

    Args:
        blocks: of one kind and size.
        x: it is not changed.
        past: each block's keys and values of S positions to attend to before their own.
        mask: (T, S + T), True where a position attends to another; `None` is everywhere.
        keep: also return each block's own keys and values.
    """
    first: Any = blocks[0]
    images, length, width = x.shape
    heads, threads = first.attn.heads, torch.get_num_threads()
    shape = 2 * len(blocks) * keep, images, heads, length, width // heads
    own = torch.empty(shape, dtype=x.dtype, device="cpu")
    given = [tensor.to(x.dtype).contiguous() for tensor in chain.from_iterable(past or ())]
    if mask is not None:
        mask = mask.contiguous()
    sizes = ViTSizes(width, len(blocks), heads, first.mlp.fc1.out_features)
    weights = _addresses(list(blocks.parameters()), x.dtype)
    result = torch.empty(x.shape, dtype=torch.float32, device="cpu").copy_(x)
    found = native.library()
    assert not isinstance(found, str)
    some = max(1, POSITIONS * max(1, threads // 2) // max(1, length))
    for start in range(0, images, some):
        part = slice(start, start + some)
        done = found.detailflow_transform(
            ctypes.byref(sizes),
            int(x.dtype == torch.bfloat16),
            weights,
            native.address(result[part], torch.float32),
            len(result[part]),
            length,
            _addresses([tensor[part] for tensor in own], x.dtype),
            _addresses([tensor[part] for tensor in given], x.dtype),
            given[0].shape[2] if given else 0,
            None if mask is None else native.address(mask, torch.bool),
            threads,
        )
        if not done:
            raise MemoryError
    return result.to(x.dtype), list(zip(own[::2], own[1::2], strict=True))


def _addresses(tensors: Sequence[Tensor], dtype: torch.dtype) -> Any:
    """Return where tensors are, or null if there are none."""
    return (ctypes.c_void_p * len(tensors))(*(native.address(t, dtype).value for t in tensors)) if tensors else None
