"""What both models do to activations: by PyTorch, or in C++ when they train on a CPU (docs/speed.md#training)."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from detailflow.native import training as in_cpp

_gelu = partial(F.gelu, approximate="tanh")


def gelu(x: Tensor) -> Tensor:
    """GELU in its tanh form."""
    return in_cpp.gelu(x, _gelu) if in_cpp.can_run(x) else _gelu(x)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up."""
    alike = gate.dtype == up.dtype and gate.shape == up.shape
    return in_cpp.swiglu(gate, up, _swiglu) if alike and in_cpp.can_run(gate, up) else _swiglu(gate, up)


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """Return x / √(mean(x²) + 1e-5) · weight for (…, width) x and (width,) weight, in float32 inside."""
    if x.dtype == torch.float32 and weight.shape == x.shape[-1:] and in_cpp.can_run(x, weight):
        return in_cpp.rms_norm(x, weight, _rms_norm)
    return _rms_norm(x, weight)


def _rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight.to(x.dtype), eps=1e-5)


def dropout(x: Tensor, p: float, onto: Tensor | None = None) -> Tensor:
    """Return dropout(x), or `onto` + dropout(x)."""
    total = x if onto is None else onto
    if p and total.dtype == torch.float32 and total.shape == x.shape and in_cpp.can_run(x, total):
        return in_cpp.dropout(x, p, onto)
    dropped = F.dropout(x, p)
    return dropped if onto is None else onto + dropped


def split_heads(qkv: Tensor, heads: int, rotation: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """(B, T, 3 · width) → queries, keys and values, (B, heads, T, width / heads) each.

    Args:
        rotation: (T, width / heads / 2, 2), by which `rotate` turns queries and keys.
    """
    plain = partial(_split_heads, heads=heads, rotation=rotation)
    size, rest = divmod(qkv.shape[2], 3 * heads)
    fits = rest == size % in_cpp.MULTIPLE == 0 and (rotation is None or rotation.shape == (qkv.shape[1], size // 2, 2))
    if fits and in_cpp.can_run(qkv):
        return in_cpp.split_heads(qkv, heads, rotation, plain)
    return plain(qkv)


def _split_heads(qkv: Tensor, heads: int, rotation: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    parts = qkv.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    if rotation is None:
        q, k, v = parts.unbind(0)
        return q, k, v
    qk, v = parts.split((2, 1))
    q, k = rotate(qk, rotation).unbind(0)
    return q, k, v[0]


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Turn neighbouring pairs of x (…, T, head_dim) by `rotation` (T, head_dim/2, 2), in float32.

    A pair is a complex number: one complex product is several times faster than the real ones, which only a compiler
    fuses.
    """
    pairs = x.float().unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling() or x.device.type not in ("cpu", "cuda"):
        a, b = pairs.unbind(-1)
        cos, sin = rotation.unbind(-1)
        turned = torch.stack((a * cos - b * sin, a * sin + b * cos), -1)
    else:
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(rotation))
    return turned.flatten(-2).to(x.dtype)


def cross_entropy(logits: Tensor, wanted: Tensor) -> Tensor:
    """(B, N, K) logits and (B, N) codes → their mean cross-entropy in float32."""
    rows, codes = logits.flatten(0, 1), wanted.flatten()
    if codes.dtype == torch.int64 and len(codes) == len(rows) and in_cpp.can_run(rows):
        return in_cpp.cross_entropy(rows, codes, _cross_entropy)
    return _cross_entropy(rows, codes)


def _cross_entropy(rows: Tensor, codes: Tensor) -> Tensor:
    return F.cross_entropy(rows.float(), codes)
