"""Scaled dot-product attention, by whichever of two ways is faster."""

import torch
import torch.nn.functional as F
from torch import Tensor

SCORES = 2**21  # of so many images at a time on a CPU: more than fit its caches take twice as long


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q·kᵀ/√d)·v over (B, heads, T, d); `mask` (T, S) is True where a row may look at a column, of which each has one.

    On a CPU with units for bfloat16 plain products take a third to all of the fused kernel's time in that type, least where
    queries are few, and with gradients down to a quarter in any. Their scores are in q's type, as in training; the kernel's in
    float32.
    """
    if q.device.type != "cpu" or (q.dtype != torch.bfloat16 and not torch.is_grad_enabled()):
        return F.scaled_dot_product_attention(q, k, v, mask)
    count = max(1, SCORES // max(1, q.shape[1] * q.shape[2] * k.shape[2]))
    if count < len(q) and not torch.compiler.is_compiling():  # which would take a program for each part
        parts = zip(q.split(count), k.split(count), v.split(count), strict=True)
        return torch.cat([attend(*part, mask) for part in parts])
    scale = q.shape[-1] ** -0.5
    if mask is None:
        scores = (q * scale) @ k.transpose(-2, -1)
    else:
        bias = q.new_zeros(()).masked_fill(~mask, -torch.inf)
        scores = torch.baddbmm(bias, q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2), alpha=scale).unflatten(0, q.shape[:2])
    return scores.softmax(-1).to(v.dtype) @ v
