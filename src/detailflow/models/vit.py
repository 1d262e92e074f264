"""The tokenizer's transformer: pre-norm blocks over patches and 1-D tokens (docs/method.md#tokenizer)."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detailflow.errors import DetailFlowError
from detailflow.models.attention import attend
from detailflow.schedule import require_positive

KeyValue = tuple[Tensor, Tensor]  # (B, heads, T, width / heads) each

GRID = 16  # side of the learned position grid, whatever the image's own grid


@dataclass(frozen=True)
class ViTConfig:
    """Sizes of a transformer: `depth` blocks of `width` with `heads` heads and an MLP of `mlp` hidden units (`None`: 4·width)."""

    width: int
    depth: int
    heads: int
    mlp: int | None = None

    def __post_init__(self) -> None:
        if self.mlp is None:
            object.__setattr__(self, "mlp", 4 * self.width)
        require_positive(width=self.width, depth=self.depth, heads=self.heads, mlp=self.hidden)
        if self.width % self.heads:
            raise DetailFlowError(f"heads must divide width, and {self.heads} does not divide {self.width}")

    @property
    def hidden(self) -> int:
        """Hidden units of the MLP."""
        return self.mlp  # type: ignore[return-value]  # never None after __post_init__


class Attention(nn.Module):
    """Multi-head self-attention; `past` holds keys and values of earlier tokens that every token here may look at as well."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, past: KeyValue | None = None, mask: Tensor | None = None) -> tuple[Tensor, KeyValue]:
        batch, length, width = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        own = (k, v)
        if past is not None:
            k, v = torch.cat((past[0], k), 2), torch.cat((past[1], v), 2)
        out = attend(q, k, v, mask)
        return self.proj(out.transpose(1, 2).reshape(batch, length, width)), own


class MLP(nn.Module):
    """Two linear layers with a GELU (tanh form) between."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    """x += attn(LN(x)); x += MLP(LN(x))."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, eps=1e-6)
        self.attn = Attention(config.width, config.heads)
        self.norm2 = nn.LayerNorm(config.width, eps=1e-6)
        self.mlp = MLP(config.width, config.hidden)

    def forward(self, x: Tensor, past: KeyValue | None = None, mask: Tensor | None = None) -> tuple[Tensor, KeyValue]:
        attended, own = self.attn(self.norm1(x), past, mask)
        x = x + attended
        return x + self.mlp(self.norm2(x)), own


def has_patches(images: Tensor, patch: int) -> bool:
    """Whether these are floats of shape (B, 3, H, W) that can be cut into patches: H and W are multiples of `patch`."""
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        return False
    return all(side > 0 and side % patch == 0 for side in images.shape[2:])


def patchify(images: Tensor, patch: int) -> Tensor:
    """(B, 3, H, W) → (B, H/f · W/f, f·f·3), row-major, values inside a patch in (row, column, channel) order."""
    batch, channels, height, width = images.shape
    x = images.reshape(batch, channels, height // patch, patch, width // patch, patch)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(batch, height // patch * (width // patch), patch * patch * channels)


def unpatchify(patches: Tensor, height: int, width: int, patch: int) -> Tensor:
    """The inverse of `patchify` for an image of `height` × `width` pixels."""
    channels = patches.shape[2] // patch**2
    x = patches.reshape(patches.shape[0], height // patch, width // patch, patch, patch, channels)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(patches.shape[0], channels, height, width)


def initial_normal(*shape: int, std: float) -> nn.Parameter:
    """A parameter that starts from normal numbers of standard deviation `std`."""
    return nn.Parameter(torch.empty(*shape).normal_(std=std))


def initial_positions(width: int) -> Tensor:
    """(16·16, width) sines and cosines of row and column, to start the learned positions from: near cells are alike at once."""
    grid = torch.empty(GRID * GRID, width)
    if grid.is_meta:  # only a shape is wanted, and arithmetic without data would import a compiler: a second of every start
        return grid
    frequencies = math.pi / GRID * torch.logspace(0, math.log10(GRID / 1.5), -(-width // 4))
    phase = (torch.arange(GRID) + 0.5)[:, None] * frequencies
    axis = torch.cat((phase.sin(), phase.cos()), 1)
    rows, columns = axis[:, None].expand(GRID, GRID, -1), axis[None].expand(GRID, GRID, -1)
    return 0.7 * torch.cat((rows, columns), -1).reshape(GRID * GRID, -1)[:, :width]


def resize_positions(grid: Tensor, rows: int, columns: int) -> Tensor:
    """(16·16, w) learned positions → (rows·columns, w), bilinear with antialiasing."""
    square = grid.float().view(1, GRID, GRID, -1).permute(0, 3, 1, 2)  # a CPU resizes float32 only
    resized = F.interpolate(square, (rows, columns), mode="bilinear", align_corners=False, antialias=True)
    return resized.flatten(2).transpose(1, 2)[0].to(grid.dtype)
