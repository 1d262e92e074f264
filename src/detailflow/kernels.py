"""A decoding step of few rows as five Triton kernels a layer, for CUDA GPUs in bfloat16 (docs/gpu.md#kernels).

    qkv     norm, projection, rotary positions, keys and values into the cache
    attend  attention over all that is cached
    add     output projection, and the residual stream with it
    gate    norm, gate and up, SwiGLU
    add     down, and the residual stream with it

A norm divides a row by one number, so products are taken of x · weight, and divided after. The kernel that writes the
residual stream also writes x · weight of the next norm, in bfloat16, and the sums of x² of its own columns, so that no
row is added up twice, and always in the same order. The stream itself is float32. A program computes a few outputs of
all rows: it reads its part of the weights, which is most of the work, once.
"""

import os
from functools import cache, cached_property
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import driver

from detailflow.generation import TorchEngine, layers_replaced

MOST = 32  # rows of a step: with more, PyTorch's products are faster
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # on a CPU, by Triton's interpreter


class Tiles(NamedTuple):
    """How a product is divided: outputs of a program, inputs that it takes at a time, its warps, its loads ahead."""

    outputs: int
    inputs: int
    warps: int
    stages: int


TILES: dict[tuple[str, int], Tiles] = {  # by kernel and the rows of a program; benchmarks/kernels.py measures others
    ("qkv", 16): Tiles(8, 256, 4, 5),
    ("proj", 16): Tiles(8, 512, 4, 3),
    ("gate", 16): Tiles(16, 512, 4, 3),
    ("down", 16): Tiles(16, 256, 4, 5),
    ("head", 16): Tiles(64, 256, 4, 5),
    ("qkv", 32): Tiles(16, 256, 4, 4),
    ("proj", 32): Tiles(8, 256, 4, 4),
    ("gate", 32): Tiles(16, 256, 4, 4),
    ("down", 32): Tiles(8, 256, 4, 4),
    ("head", 32): Tiles(32, 256, 4, 4),
}
ATTEND_WARPS = 4
problems: dict[torch.device, str] = {}  # of GPUs whose kernels could not be made or started


def why_not(model: Any) -> str | None:
    """Say why the steps of `model`, which can be captured, are left to PyTorch; None if kernels can take them."""
    config, device = model.config, model.device
    if any(weight.dtype != torch.bfloat16 or not weight.is_contiguous() for weight in model.parameters()):
        return "kernels are for bfloat16"
    has_bias = any(getattr(layer, "bias", None) is not None for layer in model.modules())  # none has one of its own
    if layers_replaced(model, type(model).__module__) or has_bias:
        return "some of its layers were replaced"
    if any(size % 32 for size in (config.width, config.hidden, config.codebook_size)):
        return "width, MLP and codebook must be multiples of 32"
    if config.width // config.heads not in (16, 32, 64, 128):
        return "a head must be 16, 32, 64 or 128 wide"
    if not INTERPRETED and (
        device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability(device) < (8, 0)
    ):
        return "kernels are for NVIDIA's GPUs from Ampere on"
    return problems.get(device)


# --- kernels ---------------------------------------------------------------------------------------------------------

VARYING = ["rows", "length", "start", "end"]  # numbers that no kernel is compiled for


@triton.jit
def _product(a, weight, r, rows, K: tl.constexpr, R: tl.constexpr, OUT: tl.constexpr, IN: tl.constexpr,
             WARPS: tl.constexpr, OPERAND: tl.constexpr):  # fmt: skip
    """Return (R, OUT) of (rows, K) · (OUT, K)ᵀ. Each warp takes its share of the inputs, which are added up last."""
    i = tl.arange(0, WARPS)[:, None] * IN + tl.arange(0, IN)[None, :]
    a_at = a + r[None, :, None] * K + i[:, None, :]
    w_at = weight + tl.arange(0, OUT)[None, None, :] * K + i[:, :, None]
    known = (r < rows)[None, :, None]
    result = tl.zeros((WARPS, R, OUT), tl.float32)
    for k in range(0, K, WARPS * IN):
        x = tl.load(a_at + k, known, 0.0).to(OPERAND)
        result = tl.dot(x, tl.load(w_at + k).to(OPERAND), result)
    return tl.sum(result, 0)


@triton.jit
def _parts(squares, r, rows, PARTS: tl.constexpr, PADDED: tl.constexpr):
    """Load (PARTS, rows) sums of squares; they are not waited for before `_scale` adds them up."""
    p = tl.arange(0, PADDED)[:, None]
    return tl.load(squares + p * rows + r[None, :], (p < PARTS) & (r < rows)[None, :], 0.0)


@triton.jit
def _scale(parts, WIDTH: tl.constexpr):
    """Return (R, 1) numbers that the norm multiplies rows by."""
    return tl.rsqrt(tl.sum(parts, 0) / WIDTH + 1e-5)[:, None]


@triton.jit(do_not_specialize=VARYING)
def _begin(embedded, norm, x, h, squares, rows, WIDTH: tl.constexpr, PADDED: tl.constexpr, PARTS: tl.constexpr,
           PARTS_PADDED: tl.constexpr):  # fmt: skip
    """Begin the residual stream, one row a program."""
    row, c, p = tl.program_id(0), tl.arange(0, PADDED), tl.arange(0, PARTS_PADDED)
    value = tl.load(embedded + row * WIDTH + c, c < WIDTH, 0.0).to(tl.float32)
    weight = tl.load(norm + c, c < WIDTH, 0.0).to(tl.float32)
    tl.store(x + row * WIDTH + c, value, c < WIDTH)
    tl.store(h + row * WIDTH + c, (value * weight).to(h.dtype.element_ty), c < WIDTH)
    tl.store(squares + p * rows + row, tl.where(p == 0, tl.sum(value * value, 0), 0.0), p < PARTS)


@triton.jit(do_not_specialize=VARYING)
def _qkv(h, squares, weight, rotation, q, keys, values, rows, length, start, WIDTH: tl.constexpr, HEADS: tl.constexpr,
         N: tl.constexpr, PARTS: tl.constexpr, PADDED: tl.constexpr, R: tl.constexpr, OUT: tl.constexpr,
         IN: tl.constexpr, WARPS: tl.constexpr, OPERAND: tl.constexpr):  # fmt: skip
    HEAD: tl.constexpr = WIDTH // HEADS
    first, r = tl.program_id(0) * OUT, tl.program_id(1) * R + tl.arange(0, R)
    part, column = first // WIDTH, first % WIDTH + tl.arange(0, OUT)
    image, position, known = r // length, start + r % length, (r < rows)[:, None]
    pair = (first % WIDTH // 2 + tl.arange(0, OUT // 2)) % (HEAD // 2)
    angle = rotation + position[:, None] * HEAD + pair[None, :] * 2
    cos, sin = tl.load(angle, known, 0.0), tl.load(angle + 1, known, 0.0)
    parts = _parts(squares, r, rows, PARTS, PADDED)
    result = _product(h, weight + first * WIDTH, r, rows, WIDTH, R, OUT, IN, WARPS, OPERAND) * _scale(parts, WIDTH)
    cos, sin = tl.where(part < 2, cos, 1.0), tl.where(part < 2, sin, 0.0)
    a, b = tl.split(tl.reshape(result, (R, OUT // 2, 2)))
    turned = tl.reshape(tl.join(a * cos - b * sin, a * sin + b * cos), (R, OUT)).to(q.dtype.element_ty)
    if part == 0:
        tl.store(q + r[:, None] * WIDTH + column[None, :], turned, known)
    else:
        place = (image[:, None].to(tl.int64) * HEADS + column[None, :] // HEAD) * N + position[:, None]
        place = place * HEAD + column[None, :] % HEAD
        if part == 1:
            tl.store(keys + place, turned, known)
        else:
            tl.store(values + place, turned, known)


@triton.jit(do_not_specialize=VARYING)
def _attend(q, keys, values, mixed, length, end, WIDTH: tl.constexpr, HEADS: tl.constexpr, N: tl.constexpr,
            QUERIES: tl.constexpr, KEYS: tl.constexpr, OPERAND: tl.constexpr):  # fmt: skip
    """One head of one image: every new position may attend to all that is cached."""
    HEAD: tl.constexpr = WIDTH // HEADS
    head, image, t, d = tl.program_id(0), tl.program_id(1), tl.arange(0, QUERIES), tl.arange(0, HEAD)
    at = (image * length + t)[:, None] * WIDTH + head * HEAD + d[None, :]
    cached = (image * HEADS + head).to(tl.int64) * N * HEAD
    query = tl.load(q + at, (t < length)[:, None], 0.0).to(OPERAND)
    largest = tl.full((QUERIES,), -float("inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    result = tl.zeros((QUERIES, HEAD), tl.float32)
    for first in range(0, N, KEYS):
        s = first + tl.arange(0, KEYS)
        k = tl.load(keys + cached + s[None, :] * HEAD + d[:, None], (s < end)[None, :], 0.0)
        v = tl.load(values + cached + s[:, None] * HEAD + d[None, :], (s < end)[:, None], 0.0)
        scores = tl.dot(query, k.to(OPERAND)) * (1.4426950408889634 / HEAD**0.5)  # in powers of 2
        scores = tl.where((s < end)[None, :], scores, -float("inf"))
        new = tl.maximum(largest, tl.max(scores, 1))
        share, fade = tl.exp2(scores - new[:, None]), tl.exp2(largest - new)
        total, largest = total * fade + tl.sum(share, 1), new
        result = result * fade[:, None] + tl.dot(share.to(v.dtype).to(OPERAND), v.to(OPERAND))
    tl.store(mixed + at, (result / total[:, None]).to(mixed.dtype.element_ty), (t < length)[:, None])


@triton.jit(do_not_specialize=VARYING)
def _add(a, weight, x, norm, h, squares, rows, K: tl.constexpr, WIDTH: tl.constexpr, R: tl.constexpr,
         OUT: tl.constexpr, IN: tl.constexpr, WARPS: tl.constexpr, OPERAND: tl.constexpr):  # fmt: skip
    """x += a · weightᵀ; h = x · norm; squares."""
    first, r = tl.program_id(0) * OUT, tl.program_id(1) * R + tl.arange(0, R)
    column, known = first + tl.arange(0, OUT), (r < rows)[:, None]
    at = r[:, None] * WIDTH + column[None, :]
    scale = tl.load(norm + column)[None, :].to(tl.float32)
    value = tl.load(x + at, known, 0.0)
    value += _product(a, weight + first * K, r, rows, K, R, OUT, IN, WARPS, OPERAND)
    tl.store(x + at, value, known)
    tl.store(h + at, (value * scale).to(h.dtype.element_ty), known)
    tl.store(squares + tl.program_id(0) * rows + r, tl.sum(value * value, 1), r < rows)


@triton.jit(do_not_specialize=VARYING)
def _gate(h, squares, gate, up, hidden, rows, WIDTH: tl.constexpr, HIDDEN: tl.constexpr, PARTS: tl.constexpr,
          PADDED: tl.constexpr, R: tl.constexpr, OUT: tl.constexpr, IN: tl.constexpr,
          WARPS: tl.constexpr, OPERAND: tl.constexpr):  # fmt: skip
    """Silu(gate(x)) · up(x), both products in one loop."""
    first, r = tl.program_id(0) * OUT, tl.program_id(1) * R + tl.arange(0, R)
    parts = _parts(squares, r, rows, PARTS, PADDED)
    i = tl.arange(0, WARPS)[:, None] * IN + tl.arange(0, IN)[None, :]
    a_at = h + r[None, :, None] * WIDTH + i[:, None, :]
    w_at = (first + tl.arange(0, OUT))[None, None, :] * WIDTH + i[:, :, None]
    known = (r < rows)[None, :, None]
    gates, ups = tl.zeros((WARPS, R, OUT), tl.float32), tl.zeros((WARPS, R, OUT), tl.float32)
    for k in range(0, WIDTH, WARPS * IN):
        x = tl.load(a_at + k, known, 0.0).to(OPERAND)
        gates = tl.dot(x, tl.load(gate + w_at + k).to(OPERAND), gates)
        ups = tl.dot(x, tl.load(up + w_at + k).to(OPERAND), ups)
    scale = _scale(parts, WIDTH)
    g, u = tl.sum(gates, 0) * scale, tl.sum(ups, 0) * scale
    at = r[:, None] * HIDDEN + first + tl.arange(0, OUT)[None, :]
    tl.store(hidden + at, (g / (1 + tl.exp(-g)) * u).to(hidden.dtype.element_ty), (r < rows)[:, None])


@triton.jit(do_not_specialize=VARYING)
def _head(h, squares, weight, logits, rows, WIDTH: tl.constexpr, CODES: tl.constexpr, PARTS: tl.constexpr,
          PADDED: tl.constexpr, R: tl.constexpr, OUT: tl.constexpr, IN: tl.constexpr,
          WARPS: tl.constexpr, OPERAND: tl.constexpr):  # fmt: skip
    first, r = tl.program_id(0) * OUT, tl.program_id(1) * R + tl.arange(0, R)
    parts = _parts(squares, r, rows, PARTS, PADDED)
    result = _product(h, weight + first * WIDTH, r, rows, WIDTH, R, OUT, IN, WARPS, OPERAND) * _scale(parts, WIDTH)
    tl.store(logits + r[:, None] * CODES + first + tl.arange(0, OUT)[None, :], result, (r < rows)[:, None])


# --- a step ----------------------------------------------------------------------------------------------------------


class TritonEngine(TorchEngine):
    """The PyTorch engine, whose steps of few rows are taken by kernels."""

    def step(self, tokens: Tensor, start: int, end: int) -> Tensor:
        """(B, N) tokens, known before `start` → logits (B or 2B, end − start, K), in float32 by kernels."""
        if len(self.class_ids) * (end - start) > MOST:
            return super().step(tokens, start, end)
        with torch.inference_mode(), torch.cuda.device_of(tokens):  # Triton's device is the current one
            if self.guided:
                tokens = tokens.repeat(2, 1)
            embedded = self.model.inputs(self.class_ids, tokens, start, end)
            return self.run(embedded.flatten(0, 1), start, end).unflatten(0, (-1, end - start))

    @cached_property
    def buffers(self) -> tuple[Tensor, ...]:
        """The residual stream, what products take and give, and sums of squares, for `MOST` rows."""
        config, weight = self.model.config, self.model.head.weight
        x, squares = (weight.new_empty(MOST * size, dtype=torch.float32) for size in (config.width, config.width // 8))
        h, q, mixed, hidden = (weight.new_empty(MOST * size) for size in (*[config.width] * 3, config.hidden))
        return x, squares, h, q, mixed, hidden

    def run(self, embedded: Tensor, start: int, end: int) -> Tensor:
        """(rows, width) embeddings of positions `start` to `end` → (rows, K) logits."""
        config, blocks, rows, length = self.model.config, self.model.blocks, len(embedded), end - start
        launch = Launch(config, rows)
        x, squares, h, q, mixed, hidden = self.buffers
        width, size = config.width, dict(WIDTH=config.width)
        down, proj = launch.parts("down"), launch.parts("proj")
        launch.start("begin", _begin, (rows,), embedded, blocks[0].attn_norm.weight, x, h, squares, rows,
                     PADDED=_padded(width), PARTS=down, PARTS_PADDED=_padded(down), **size)  # fmt: skip
        shape = dict(HEADS=config.heads, N=config.num_tokens, **size)
        for i, block in enumerate(blocks):
            keys, values = self.caches[i].keys, self.caches[i].values
            launch("qkv", _qkv, 3 * width, width, h, squares, block.attn.qkv.weight, self.rotation, q, keys, values,
                   rows, length, start, PARTS=down, PADDED=_padded(down), **shape)  # fmt: skip
            launch.attend(q, keys, values, mixed, length, end, **shape)
            launch("proj", _add, width, width, mixed, block.attn.proj.weight, x, block.mlp_norm.weight, h, squares,
                   rows, K=width, **size)  # fmt: skip
            launch("gate", _gate, config.hidden, width, h, squares, block.mlp.gate.weight, block.mlp.up.weight, hidden,
                   rows, HIDDEN=config.hidden, PARTS=proj, PADDED=_padded(proj), **size)  # fmt: skip
            norm = blocks[i + 1].attn_norm if i + 1 < len(blocks) else self.model.norm
            launch("down", _add, width, config.hidden, hidden, block.mlp.down.weight, x, norm.weight, h, squares, rows,
                   K=config.hidden, **size)  # fmt: skip
        logits = x.new_empty(rows, config.codebook_size)
        launch("head", _head, config.codebook_size, width, h, squares, self.model.head.weight, logits, rows,
               CODES=config.codebook_size, PARTS=down, PADDED=_padded(down), **size)  # fmt: skip
        return logits


class Launch:
    """Starts the kernels of a step of so many rows."""

    def __init__(self, config: Any, rows: int) -> None:
        self.config, self.rows = config, rows
        self.program = min(max(16, _padded(rows)), 32)  # rows of a program
        self.options: dict[str, Any] = dict(OPERAND=tl.float32 if INTERPRETED else tl.bfloat16)
        self.shared = 0 if INTERPRETED else _shared_memory(driver.active.get_current_device())

    def parts(self, name: str) -> int:
        """Count the programs that write sums of squares."""
        return self.config.width // _divisor(self.config.width, TILES[name, self.program].outputs)

    def __call__(self, name: str, kernel: Any, outputs: int, inputs: int, *arguments: Any, **sizes: Any) -> None:
        """Start a product of so many outputs and inputs."""
        tiles = TILES[name, self.program]
        # Of the queries alone in `qkv`, whose outputs are three times the width: a program is for one of the three.
        out = _divisor(outputs // 3 if name == "qkv" else outputs, tiles.outputs)
        taken = _divisor(inputs, tiles.inputs)
        warps = min(tiles.warps, taken // 16)  # a product has at least 16 inputs
        grid = outputs // out, -(-self.rows // self.program)
        loaded = 2 * taken * (self.program + out * (2 if name == "gate" else 1))  # bytes, once for each stage but one
        stages = min(tiles.stages, 1 + self.shared // loaded)
        sizes |= dict(R=self.program, OUT=out, IN=taken // warps, WARPS=warps)
        self.start(name, kernel, grid, *arguments, num_warps=warps, num_stages=stages, **sizes, **self.options)

    def attend(self, *arguments: Any, **sizes: Any) -> None:
        """Start the attention."""
        length: int = arguments[-2]
        sizes |= dict(QUERIES=max(16, _padded(length)), KEYS=min(128, max(16, _padded(self.config.num_tokens))))
        options = dict(num_warps=ATTEND_WARPS, num_stages=2, **self.options)
        self.start("attend", _attend, (self.config.heads, self.rows // length), *arguments, **sizes, **options)

    def start(self, name: str, kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        """Start a kernel, which `name` tells from others of the same code."""
        kernel[grid](*arguments, **options)


@cache
def _shared_memory(device: int) -> int:
    """Return how many bytes a program may load ahead: 227 KiB on an H100, 163 on an A100, 99 on GeForce cards."""
    return int(driver.active.utils.get_device_properties(device)["max_shared_mem"])


def _padded(size: int) -> int:
    """Return the next power of two."""
    return 1 << (size - 1).bit_length()


def _divisor(size: int, most: int) -> int:
    """Return the largest power of two, at most `most`, that divides `size`."""
    return min(most, size & -size)
