"""The blocks of the tokenizer's transformers in C++ (docs/speed.md#engines)."""

import ctypes
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from detailflow import native
from detailflow.generation import layers_replaced
from detailflow.processor import has_amx

KeyValue = tuple[Tensor, Tensor]  # (B, heads, T, width / heads) each


class Sizes(ctypes.Structure):
    """`ViTSizes` of vit.hpp."""

    _fields_ = [(name, ctypes.c_int32) for name in ("width", "depth", "heads", "hidden")]


def can_run(blocks: nn.ModuleList, x: Tensor, home: str) -> bool:
    """Return whether `run` would do what the blocks do to `x` (B, T, width) without gradients, and not slower.

    Args:
        blocks: of one kind and size.
        x: their input.
        home: the name of the module that has their own code.
    """
    if type(x) is not Tensor or x.device.type != "cpu" or x.dtype not in native.TYPES or layers_replaced(blocks, home):
        return False
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or torch.jit.is_tracing():
        return False
    block: Any = blocks[0]
    width, hidden = x.shape[-1], block.mlp.fc1.out_features
    if width % 32 or hidden % 32 or width // block.attn.heads % 16 or isinstance(native.library(), str):
        return False
    if x.dtype == torch.bfloat16 and has_amx() and native.instructions() != "AMX":
        return False  # PyTorch multiplies by AMX
    weights = list(blocks.parameters())
    shapes = [(width,), (width,), (3 * width, width), (3 * width,), (width, width), (width,), (width,), (width,)]
    shapes += [(hidden, width), (hidden,), (width, hidden), (width,)]
    plain = all(type(w) is nn.Parameter and w.dtype == x.dtype and w.is_contiguous() for w in weights)
    return plain and [tuple(weight.shape) for weight in weights] == shapes * len(blocks)


def run(
    blocks: nn.ModuleList,
    x: Tensor,
    past: Sequence[KeyValue] | None = None,
    mask: Tensor | None = None,
    keep: bool = False,
) -> tuple[Tensor, list[KeyValue]]:
    """Take `x` (B, T, width) through all blocks, without gradients, where `can_run`.

    Args:
        blocks: of one kind and size.
        x: it is not changed.
        past: each block's keys and values of S positions to attend to before their own.
        mask: (T, S + T), True where a position attends to another; `None` is everywhere.
        keep: also return each block's own keys and values.
    """
    first: Any = blocks[0]
    found = native.library()
    assert not isinstance(found, str)
    images, length, width = x.shape
    heads = first.attn.heads
    shape = len(blocks) * keep, 2, images, heads, length, width // heads
    own = torch.empty(shape, dtype=x.dtype, device="cpu")
    given = [tensor.to(x.dtype).contiguous() for tensor in chain.from_iterable(past or ())]
    if mask is not None:
        mask = mask.contiguous()
    result = torch.empty(x.shape, dtype=torch.float32, device="cpu").copy_(x)
    done = found.detailflow_transform(
        ctypes.byref(Sizes(width, len(blocks), heads, first.mlp.fc1.out_features)),
        int(x.dtype == torch.bfloat16),
        _addresses(list(blocks.parameters()), x.dtype),
        native.address(result, torch.float32),
        images,
        length,
        _addresses(list(own.flatten(0, 1)), x.dtype),
        _addresses(given, x.dtype),
        given[0].shape[2] if given else 0,
        None if mask is None else native.address(mask, torch.bool),
        torch.get_num_threads(),
    )
    if not done:
        raise MemoryError
    return result.to(x.dtype), [(keys, values) for keys, values in own]


def _addresses(tensors: Sequence[Tensor], dtype: torch.dtype) -> Any:
    """Return where tensors are, or null if there are none."""
    return (ctypes.c_void_p * len(tensors))(*(native.address(t, dtype).value for t in tensors)) if tensors else None
