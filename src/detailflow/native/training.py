"""What training on a CPU does to activations, in C++, each with its derivative (docs/speed.md#training).

PyTorch's products, the optimiser and everything else stay as they are. `detailflow.models.operations` calls these, with
`plain`, the same by PyTorch, for derivatives of derivatives.
"""

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from detailflow import native
from detailflow.native import is_plain

MULTIPLE = 16  # of which the sizes of the last dimension are multiples
MOST = 2**31 - 1  # numbers
PARTS = 16  # as in training.hpp
Plain = Callable[..., Tensor | tuple[Tensor, ...]]


def can_run(x: Tensor, *others: Tensor) -> bool:
    """Return whether these functions take (…, width) `x`, an activation in training, in place of PyTorch.

    Args:
        others: tensors that come with it.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not all(map(is_plain, (x, *others))):
        return False
    if x.shape[-1] % MULTIPLE or not 0 < x.numel() <= MOST or _product_type(x) not in native.TYPES:
        return False
    found = native.library()
    return not isinstance(found, str) and (torch.get_num_threads() == 1 or bool(found.detailflow_has_threads()))


def rms_norm(x: Tensor, weight: Tensor, plain: Plain) -> Tensor:
    """Float32 x (…, width) / √(mean(x²) + 1e-5) · weight (width,), in the type that products take."""
    return _RMSNorm.apply(x.contiguous(), weight.float().contiguous(), _product_type(x), plain)


def gelu(x: Tensor, plain: Plain) -> Tensor:
    """GELU in its tanh form."""
    return _GELU.apply(x.contiguous(), plain)


def swiglu(gate: Tensor, up: Tensor, plain: Plain) -> Tensor:
    """silu(gate) · up."""
    return _SwiGLU.apply(gate.contiguous(), up.contiguous(), plain)


def dropout(x: Tensor, p: float, onto: Tensor | None = None) -> Tensor:
    """Return float32 `onto` + dropout of x; its mask is drawn by torch's generator, and again in the backward pass."""
    seed = int(torch.randint(2**63 - 1, (), device="cpu"))
    return _Dropout.apply(x.contiguous(), None if onto is None else onto.contiguous(), p, seed)


def split_heads(qkv: Tensor, heads: int, rotation: Tensor | None, plain: Plain) -> tuple[Tensor, Tensor, Tensor]:
    """(B, T, 3 · width) → queries, keys and values, (B, heads, T, width / heads) each.

    Args:
        rotation: (T, width / heads / 2, 2), by which neighbours in queries and keys are turned.
    """
    if rotation is not None:
        rotation = rotation.float().contiguous()
    return _SplitHeads.apply(qkv.contiguous(), heads, rotation, plain)


def cross_entropy(logits: Tensor, wanted: Tensor, plain: Plain) -> Tensor:
    """(rows, K) logits and (rows,) int64 → their mean cross-entropy in float32."""
    if wanted.amin() < 0 or wanted.amax() >= logits.shape[1]:
        raise IndexError("a wanted code is none of the logits'")
    return _CrossEntropy.apply(logits.contiguous(), wanted.contiguous(), plain)


def _product_type(x: Tensor) -> torch.dtype:
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype


def call(name: str, dtype: torch.dtype, *values: Any) -> None:
    """Call the library, with the addresses of tensors and of tuples of them; activations are of type `dtype`."""
    found = native.library()
    assert not isinstance(found, str)
    given = map(_for_library, values)
    if not getattr(found, f"detailflow_{name}")(int(dtype == torch.bfloat16), *given, torch.get_num_threads()):
        raise MemoryError


def _for_library(value: Any) -> Any:
    if isinstance(value, tuple):
        return (ctypes.c_void_p * len(value))(*(native.address(one, one.dtype).value for one in value))
    return native.address(value, value.dtype) if isinstance(value, Tensor) else value


def _by_pytorch(*gradients: Tensor) -> bool:
    """Return whether PyTorch must differentiate: as the result is to be differentiated again, or of many at once."""
    return torch.is_grad_enabled() or not all(map(is_plain, gradients))


def _differentiated(plain: Plain, given: Sequence[Tensor], *gradients: Tensor) -> tuple[Tensor, ...]:
    """Return the gradients of what `plain` takes, which can be differentiated again."""
    with torch.enable_grad():
        given = [tensor if tensor.requires_grad else tensor.detach().requires_grad_() for tensor in given]
        made = plain(*given)
        results = [made] if isinstance(made, Tensor) else [*made]
        results = [result.to(gradient.dtype) for result, gradient in zip(results, gradients, strict=True)]
        return torch.autograd.grad(results, given, gradients, create_graph=True)


def _count(tensor: Tensor) -> ctypes.c_int64:
    return ctypes.c_int64(tensor.numel())


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, dtype: torch.dtype, plain: Plain) -> Tensor:
        y, width = torch.empty(x.shape, dtype=dtype, device="cpu"), x.shape[-1]
        scales = torch.empty(x.shape[:-1], dtype=torch.float32, device="cpu")
        call("rms_norm", dtype, x, weight, x.numel() // width, width, y, scales)
        ctx.save_for_backward(x, weight, scales)
        ctx.plain = plain
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scales = ctx.saved_tensors
        if _by_pytorch(dy):
            return *_differentiated(ctx.plain, (x, weight), dy), None, None
        dy, width = dy.contiguous(), x.shape[-1]
        dx, parts = torch.empty_like(x), torch.empty(PARTS, width, dtype=torch.float32, device="cpu")
        call("rms_norm_backward", dy.dtype, x, weight, scales, dy, x.numel() // width, width, dx, parts)
        return dx, parts.sum(0), None, None


class _GELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, plain: Plain) -> Tensor:
        ctx.save_for_backward(x)
        ctx.plain = plain
        return _GELU.run(x, None)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if _by_pytorch(dy):
            return *_differentiated(ctx.plain, ctx.saved_tensors, dy), None
        return _GELU.run(ctx.saved_tensors[0], dy.contiguous()), None

    @staticmethod
    def run(x: Tensor, dy: Tensor | None) -> Tensor:
        to = torch.empty_like(x)
        call("gelu", x.dtype, x, dy, _count(x), to)
        return to


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, plain: Plain) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.plain = plain
        return _SwiGLU.run(gate, up, None)[0]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        if _by_pytorch(dy):
            return *_differentiated(ctx.plain, (gate, up), dy), None
        return *_SwiGLU.run(gate, up, dy.contiguous()), None

    @staticmethod
    def run(gate: Tensor, up: Tensor, dy: Tensor | None) -> tuple[Tensor, ...]:
        results = tuple(torch.empty_like(gate) for _ in range(1 if dy is None else 2))
        call("swiglu", gate.dtype, gate, up, dy, _count(gate), results[0], results[-1])
        return results


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, onto: Tensor | None, p: float, seed: int) -> Tensor:
        ctx.dtype, ctx.p, ctx.seed = x.dtype, p, seed
        to = torch.empty(x.shape, dtype=torch.float32, device="cpu")
        _Dropout.run(ctx, x, onto, to, back=False)
        return to

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        onto = dy if ctx.needs_input_grad[1] else None
        to = torch.empty(dy.shape, dtype=ctx.dtype, device="cpu")
        if _by_pytorch(dy):
            _Dropout.run(ctx, torch.ones(dy.shape, device="cpu"), None, to, back=True)
            return (dy * to).to(ctx.dtype), onto, None, None
        _Dropout.run(ctx, dy.contiguous(), None, to, back=True)
        return to, onto, None, None

    @staticmethod
    def run(ctx: Any, x: Tensor, onto: Tensor | None, to: Tensor, back: bool) -> None:
        numbers = _count(x), ctypes.c_float(ctx.p), ctypes.c_int64(ctx.seed)
        call("dropout", ctx.dtype, x, onto, back, *numbers, to)


class _SplitHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, heads: int, rotation: Tensor | None, plain: Plain) -> tuple[Tensor, ...]:
        images, length, size = *qkv.shape[:2], qkv.shape[2] // 3 // heads
        ctx.rotation, ctx.plain = rotation, plain
        parts = tuple(qkv.new_empty(images, heads, length, size) for _ in range(3))
        _SplitHeads.run(qkv, parts, rotation, back=False)
        return parts

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        images, heads, length, size = gradients[0].shape
        qkv = gradients[0].new_empty(images, length, 3 * heads * size)
        if _by_pytorch(*gradients):  # whatever `qkv` is: it is linear
            return *_differentiated(ctx.plain, [torch.zeros_like(qkv)], *gradients), None, None, None
        _SplitHeads.run(qkv, tuple(g.contiguous() for g in gradients), ctx.rotation, back=True)
        return qkv, None, None, None

    @staticmethod
    def run(qkv: Tensor, parts: tuple[Tensor, ...], rotation: Tensor | None, back: bool) -> None:
        images, heads, length, size = parts[0].shape
        call("split_heads", qkv.dtype, qkv, parts, rotation, images, length, heads, size, back)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, wanted: Tensor, plain: Plain) -> Tensor:
        losses, logs = (torch.empty(len(logits), dtype=torch.float32, device="cpu") for _ in range(2))
        call("cross_entropy", logits.dtype, logits, wanted, *logits.shape, losses, logs)
        ctx.save_for_backward(logits, wanted, logs)
        ctx.plain = plain
        return losses.mean()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        logits, wanted, logs = ctx.saved_tensors
        if _by_pytorch(dy):
            return *_differentiated(lambda x: ctx.plain(x, wanted), [logits], dy), None, None
        to, scale = torch.empty_like(logits), ctypes.c_float(float(dy) / len(logits))
        call("cross_entropy_backward", logits.dtype, logits, wanted, logs, scale, *logits.shape, to)
        return to, None, None
