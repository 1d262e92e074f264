"""The tokenizer's transformer: pre-norm blocks over patches and 1-D tokens (docs/method.md#tokenizer)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detailflow.errors import DetailFlowError
from detailflow.models.operations import gelu, split_heads
from detailflow.native import blocks as native_blocks
from detailflow.native.blocks import KeyValue
from detailflow.processor import multiplies_bfloat16_fast
from detailflow.settings import Depth, PositiveInt, Settings

SCORES = 2**21  # at a time on a CPU: more than fit its caches take twice as long


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return softmax(q·kᵀ/√d)·v over (B, heads, T, d).

    `mask[i, j]`, (T, S), is True if query i may attend to key j. Every row has at least one True.

    On a CPU, plain products take a third to all of the fused kernel's time in bfloat16, and with gradients down to a
    quarter in any type. Their scores are in q's type, as in training; the kernel's are in float32.
    """
    if q.device.type != "cpu" or (q.dtype != torch.bfloat16 and not torch.is_grad_enabled()):
        return F.scaled_dot_product_attention(q, k, v, mask)
    images = max(1, SCORES // max(1, q.shape[1] * q.shape[2] * k.shape[2]))
    if images < len(q) and not torch.compiler.is_compiling():  # it would compile a program for each part
        parts = zip(q.split(images), k.split(images), v.split(images), strict=True)
        return torch.cat([attend(*part, mask) for part in parts])
    scale = q.shape[-1] ** -0.5
    if mask is None:
        scores = (q * scale) @ k.transpose(-2, -1)
    else:
        bias = q.new_zeros(()).masked_fill(~mask, -torch.inf)
        scores = torch.baddbmm(bias, q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2), alpha=scale)
        scores = scores.unflatten(0, q.shape[:2])
    return scores.softmax(-1).to(v.dtype) @ v


GRID = 16  # side of the learned position grid, whatever the image's own grid


@dataclass(frozen=True)
class ViTConfig(Settings):
    """Sizes of a transformer.

    >>> ViTConfig(width=768, depth=12, heads=12).mlp
    3072

    Attributes:
        width: of the transformer.
        depth: number of blocks.
        heads: number of attention heads.
        mlp: hidden units of the MLP; null is 4 times the width.
    """

    width: PositiveInt
    depth: Depth
    heads: PositiveInt
    mlp: PositiveInt | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mlp is None:
            object.__setattr__(self, "mlp", 4 * self.width)
        if self.width % self.heads:
            raise DetailFlowError(f"heads must divide width, and {self.heads} does not divide {self.width}")

    @property
    def hidden(self) -> int:
        """Hidden units of the MLP."""
        return self.mlp  # type: ignore[return-value]  # never None after __post_init__


def _converts(weight: Tensor, x: Tensor) -> bool:
    """Return whether weights are bfloat16 and their input is float32, in which is then computed."""
    return x.dtype == torch.float32 and weight.dtype == torch.bfloat16


class Linear(nn.Linear):
    """A linear layer that computes in float32 for input of that type if its weights are bfloat16."""

    def forward(self, x: Tensor) -> Tensor:
        if _converts(self.weight, x):
            return F.linear(x, self.weight.float(), self.bias.float())
        return super().forward(x)


class LayerNorm(nn.LayerNorm):
    """A norm that computes in float32 for input of that type if its weights are bfloat16."""

    def forward(self, x: Tensor) -> Tensor:
        if _converts(self.weight, x):
            return F.layer_norm(x, self.normalized_shape, self.weight.float(), self.bias.float(), self.eps)
        return super().forward(x)


class Attention(nn.Module):
    """Multi-head self-attention; `past` has keys and values of other tokens to attend to as well."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = Linear(width, 3 * width)
        self.proj = Linear(width, width)

    def forward(self, x: Tensor, past: KeyValue | None = None, mask: Tensor | None = None) -> tuple[Tensor, KeyValue]:
        batch, length, width = x.shape
        q, k, v = split_heads(self.qkv(x), self.heads)
        own = (k, v)
        if past is not None:
            k, v = torch.cat((past[0], k), 2), torch.cat((past[1], v), 2)
        out = attend(q, k, v, mask)
        return self.proj(out.transpose(1, 2).reshape(batch, length, width)), own


class MLP(nn.Module):
    """Two linear layers with a GELU (tanh form) between."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = Linear(width, hidden)
        self.fc2 = Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(gelu(self.fc1(x)))


class Block(nn.Module):
    """x += attn(LN(x)); x += MLP(LN(x)). In float32 on a CPU that is slower in bfloat16, whatever the weights' type."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.norm1 = LayerNorm(config.width, eps=1e-6)
        self.attn = Attention(config.width, config.heads)
        self.norm2 = LayerNorm(config.width, eps=1e-6)
        self.mlp = MLP(config.width, config.hidden)

    def forward(self, x: Tensor, past: KeyValue | None = None, mask: Tensor | None = None) -> tuple[Tensor, KeyValue]:
        if (
            self.norm1.weight.dtype == torch.bfloat16
            and x.device.type == "cpu"
            and not torch.compiler.is_compiling()
            and not multiplies_bfloat16_fast()
        ):
            past = past and (past[0].float(), past[1].float())
            result, own = self._add(x.float(), past, mask)
            return result.to(x.dtype), own
        return self._add(x, past, mask)

    def _add(self, x: Tensor, past: KeyValue | None, mask: Tensor | None) -> tuple[Tensor, KeyValue]:
        attended, own = self.attn(self.norm1(x), past, mask)
        x = x + attended
        return x + self.mlp(self.norm2(x)), own


def run_blocks(
    blocks: nn.ModuleList,
    x: Tensor,
    past: Sequence[KeyValue] | None = None,
    mask: Tensor | None = None,
    *,
    keep: bool = False,
    native: bool = False,
) -> tuple[Tensor, list[KeyValue]]:
    """Take x (B, T, width) through all blocks.

    Args:
        blocks: of one kind and size.
        x: their input.
        past: each block's keys and values of S positions to attend to before their own.
        mask: (T, S + T), True where a position attends to another; `None` is everywhere.
        keep: also return each block's own keys and values.
        native: by the native engine if it can, which is without gradients.
    """
    if native and native_blocks.can_run(blocks, x, __name__):
        return native_blocks.run(blocks, x, past, mask, keep)
    kept = []
    for i, block in enumerate(blocks):
        x, own = block(x, None if past is None else past[i], mask)
        if keep:
            kept.append(own)
    return x, kept


def convolution(inputs: int, outputs: int) -> nn.Sequential:
    """Return a 3×3 convolution with batch normalization and a GELU, the part of the small feature networks."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.GELU())


def has_patches(images: Tensor, patch: int) -> bool:
    """Return whether images are floats of shape (B, 3, H, W), with H and W multiples of `patch`."""
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point() or images.itemsize < 2:
        return False
    return all(side > 0 and side % patch == 0 for side in images.shape[2:])


def patchify(images: Tensor, patch: int) -> Tensor:
    """(B, 3, H, W) → (B, H/f · W/f, f·f·3), row by row, the values of a patch in (row, column, channel) order."""
    batch, channels, height, width = images.shape
    x = images.reshape(batch, channels, height // patch, patch, width // patch, patch)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(batch, height // patch * (width // patch), patch * patch * channels)


def unpatchify(patches: Tensor, height: int, width: int, patch: int) -> Tensor:
    """Undo `patchify` for images of `height` × `width` pixels."""
    channels = patches.shape[2] // patch**2
    x = patches.reshape(patches.shape[0], height // patch, width // patch, patch, patch, channels)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(patches.shape[0], channels, height, width)


def initial_normal(*shape: int, std: float) -> nn.Parameter:
    """Return a parameter of normal random numbers."""
    return nn.Parameter(torch.empty(*shape).normal_(std=std))


def initial_positions(width: int) -> Tensor:
    """Return (16·16, width) sines and cosines of row and column: learned positions that start alike for near cells."""
    grid = torch.empty(GRID * GRID, width)
    if grid.is_meta:  # arithmetic there would import a compiler: a second of every start
        return grid
    frequencies = math.pi / GRID * torch.logspace(0, math.log10(GRID / 1.5), -(-width // 4))
    phase = (torch.arange(GRID) + 0.5)[:, None] * frequencies
    axis = torch.cat((phase.sin(), phase.cos()), 1)
    rows, columns = axis[:, None].expand(GRID, GRID, -1), axis[None].expand(GRID, GRID, -1)
    return 0.7 * torch.cat((rows, columns), -1).reshape(GRID * GRID, -1)[:, :width]


def cosine_grid(num_tokens: int) -> Tensor:
    """Return (N, G, G), the N lowest frequencies of the orthonormal 2-D cosine transform, the lowest first; G ≥ 8."""
    side = max(8, math.isqrt(num_tokens - 1) + 1)
    k = torch.arange(side, dtype=torch.float32)
    waves = torch.cos(math.pi / side * (k[None] + 0.5) * k[:, None]) * (2 / side) ** 0.5  # (frequency, position)
    waves[0] /= 2**0.5
    order = sorted(range(side * side), key=lambda i: ((i // side) ** 2 + (i % side) ** 2, i))[:num_tokens]
    return torch.stack([torch.outer(waves[i // side], waves[i % side]) for i in order])


def resize_grid(grid: Tensor, rows: int, columns: int) -> Tensor:
    """(N, G, G) → (N, rows·columns), bilinear with antialiasing."""
    if grid.shape[1:] != (rows, columns):
        grid = _resize(grid.float()[None], rows, columns)[0]
    return grid.flatten(1)


def resize_positions(grid: Tensor, rows: int, columns: int) -> Tensor:
    """(16·16, w) learned positions → (rows·columns, w), bilinear with antialiasing."""
    square = grid.float().view(1, GRID, GRID, -1).permute(0, 3, 1, 2)  # a CPU resizes float32 only
    return _resize(square, rows, columns).flatten(2).transpose(1, 2)[0].to(grid.dtype)


def _resize(images: Tensor, rows: int, columns: int) -> Tensor:
    return F.interpolate(images, (rows, columns), mode="bilinear", align_corners=False, antialias=True)
