"""What training on a CPU does to activations, in C++, each with its derivative (docs/speed.md#training).

PyTorch's products, the optimiser and everything else stay as they are. `detailflow.models.operations` calls these.
"""

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from detailflow import native

MULTIPLE = 16  # of which the sizes of the last dimension are multiples
MOST = 2**31 - 1  # numbers
PARTS = 16  # as in training.hpp


def can_run(x: Tensor) -> bool:
    """Return whether these functions take (…, width) `x`, an activation in training, in place of PyTorch."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not native.is_plain(x):
        return False
    if x.shape[-1] % MULTIPLE or not 0 < x.numel() <= MOST or _product_type(x) not in native.TYPES:
        return False
    found = native.library()
    return not isinstance(found, str) and (torch.get_num_threads() == 1 or bool(found.detailflow_has_threads()))


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """Float32 x (…, width) / √(mean(x²) + 1e-5) · weight (width,), in the type that products take."""
    return _RMSNorm.apply(x.contiguous(), weight.float().contiguous(), _product_type(x))


def gelu(x: Tensor) -> Tensor:
    """GELU in its tanh form."""
    return _GELU.apply(x.contiguous())


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up."""
    return _SwiGLU.apply(gate.contiguous(), up.contiguous())


def dropout(x: Tensor, p: float, onto: Tensor | None = None) -> Tensor:
    """Return float32 `onto` + dropout of x; its mask is drawn by torch's generator, and again in the backward pass."""
    seed = int(torch.randint(2**63 - 1, ()))
    return _Dropout.apply(x.contiguous(), None if onto is None else onto.contiguous(), p, seed)


def split_heads(qkv: Tensor, heads: int, rotation: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(B, T, 3 · width) → queries, keys and values, (B, heads, T, width / heads) each.

    Args:
        rotation: (T, width / heads / 2, 2), by which neighbours in queries and keys are turned.
    """
    if rotation is not None:
        rotation = rotation.float().contiguous()
    return _SplitHeads.apply(qkv.contiguous(), heads, rotation)


def cross_entropy(logits: Tensor, wanted: Tensor) -> Tensor:
    """(rows, K) logits and (rows,) int64 → their mean cross-entropy in float32."""
    if wanted.amin() < 0 or wanted.amax() >= logits.shape[1]:
        raise IndexError("a wanted code is none of the logits'")
    return _CrossEntropy.apply(logits.contiguous(), wanted.contiguous())


def _product_type(x: Tensor) -> torch.dtype:
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype


def _call(name: str, dtype: torch.dtype, *values: Any) -> None:
    """Call the library; floats are of type `dtype` where they may be of two."""
    found = native.library()
    assert not isinstance(found, str)
    function = getattr(found, f"detailflow_{name}")
    if not function(int(dtype == torch.bfloat16), *values, torch.get_num_threads()):
        raise MemoryError


def _at(tensor: Tensor | None, dtype: torch.dtype) -> ctypes.c_void_p | None:
    return None if tensor is None else native.address(tensor, dtype)


def _count(tensor: Tensor) -> ctypes.c_int64:
    return ctypes.c_int64(tensor.numel())


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        y, width = torch.empty(x.shape, dtype=dtype, device="cpu"), x.shape[-1]
        scales = torch.empty(x.shape[:-1], dtype=torch.float32, device="cpu")
        number = torch.float32
        rows = x.numel() // width
        _call("rms_norm", dtype, _at(x, number), _at(weight, number), rows, width, _at(y, dtype), _at(scales, number))
        ctx.save_for_backward(x, weight, scales)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scales = ctx.saved_tensors
        dy, number, width = dy.contiguous(), torch.float32, x.shape[-1]
        dx, parts = torch.empty_like(x), torch.empty(PARTS, width, dtype=torch.float32, device="cpu")
        given = _at(x, number), _at(weight, number), _at(scales, number), _at(dy, dy.dtype)
        rows = x.numel() // width
        _call("rms_norm_backward", dy.dtype, *given, rows, width, _at(dx, number), _at(parts, number))
        return dx, parts.sum(0), None


class _GELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return _GELU.run(x, None)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return _GELU.run(ctx.saved_tensors[0], dy.contiguous())

    @staticmethod
    def run(x: Tensor, dy: Tensor | None) -> Tensor:
        to = torch.empty_like(x)
        _call("gelu", x.dtype, _at(x, x.dtype), _at(dy, x.dtype), _count(x), _at(to, x.dtype))
        return to


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return _SwiGLU.run(gate, up, None)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
        gate, up = ctx.saved_tensors
        return _SwiGLU.run(gate, up, dy.contiguous())

    @staticmethod
    def run(gate: Tensor, up: Tensor, dy: Tensor | None) -> tuple[Tensor, ...]:
        dtype, results = gate.dtype, [torch.empty_like(gate) for _ in range(1 if dy is None else 2)]
        given = [_at(tensor, dtype) for tensor in (gate, up, dy)]
        _call("swiglu", dtype, *given, _count(gate), _at(results[0], dtype), _at(results[-1], dtype))
        return tuple(results)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, onto: Tensor | None, p: float, seed: int) -> Tensor:
        ctx.dtype, ctx.p, ctx.seed = x.dtype, p, seed
        to = torch.empty(x.shape, dtype=torch.float32, device="cpu")
        _Dropout.run(ctx, x, onto, to, back=False)
        return to

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        to = torch.empty(dy.shape, dtype=ctx.dtype, device="cpu")
        _Dropout.run(ctx, dy.contiguous(), None, to, back=True)
        return to, dy if ctx.needs_input_grad[1] else None, None, None

    @staticmethod
    def run(ctx: Any, x: Tensor, onto: Tensor | None, to: Tensor, back: bool) -> None:
        numbers = _count(x), ctypes.c_float(ctx.p), ctypes.c_int64(ctx.seed)
        _call("dropout", ctx.dtype, _at(x, x.dtype), _at(onto, torch.float32), back, *numbers, _at(to, to.dtype))


class _SplitHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, heads: int, rotation: Tensor | None) -> tuple[Tensor, ...]:
        images, length, size = *qkv.shape[:2], qkv.shape[2] // 3 // heads
        ctx.rotation = rotation
        parts = tuple(qkv.new_empty(images, heads, length, size) for _ in range(3))
        _SplitHeads.run(qkv, parts, rotation, back=False)
        return parts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        images, heads, length, size = gradients[0].shape
        qkv = gradients[0].new_empty(images, length, 3 * heads * size)
        _SplitHeads.run(qkv, tuple(g.contiguous() for g in gradients), ctx.rotation, back=True)
        return qkv, None, None

    @staticmethod
    def run(qkv: Tensor, parts: tuple[Tensor, ...], rotation: Tensor | None, back: bool) -> None:
        images, heads, length, size = parts[0].shape
        each = (ctypes.c_void_p * 3)(*(native.address(part, qkv.dtype).value for part in parts))
        turn = _at(rotation, torch.float32)
        _call("split_heads", qkv.dtype, _at(qkv, qkv.dtype), each, turn, images, length, heads, size, back)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, wanted: Tensor) -> Tensor:
        dtype, number = logits.dtype, torch.float32
        losses, logs = (torch.empty(len(logits), dtype=number, device="cpu") for _ in range(2))
        given = _at(logits, dtype), _at(wanted, torch.int64), *logits.shape
        _call("cross_entropy", dtype, *given, _at(losses, number), _at(logs, number))
        ctx.save_for_backward(logits, wanted, logs)
        return losses.mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        logits, wanted, logs = ctx.saved_tensors
        dtype, to = logits.dtype, torch.empty_like(logits)
        given = _at(logits, dtype), _at(wanted, torch.int64), _at(logs, torch.float32)
        scale = ctypes.c_float(float(dy) / len(logits))
        _call("cross_entropy_backward", dtype, *given, scale, *logits.shape, _at(to, dtype))
        return to, None
