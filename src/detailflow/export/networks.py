"""The two networks as ONNX graphs: what `models/gpt.py`, `models/tokenizer.py` and `models/layers.py` compute.

Everything that does not depend on the input is computed here by the models' own functions: positions, masks, codes.
"""

from typing import Any

import torch
from onnx import ModelProto
from torch import Tensor, nn

from detailflow.export.graph import Graph
from detailflow.models.gpt import DetailFlowGPT, RMSNorm
from detailflow.models.layers import resize_grid, resize_positions
from detailflow.models.tokenizer import DetailFlowTokenizer

Module = Any  # a torch module, whose attributes mypy takes for tensors or modules


# --- the AR model ----------------------------------------------------------------------------------------------------


def step(gpt: DetailFlowGPT, bits: int) -> ModelProto:
    """One decoding step with its KV cache: rows of the input table (rows, new) → logits (rows, new, K).

    The table has the classes, the null class, the codes and the mask embeddings, in this order.
    """
    config, g = gpt.config, Graph("step", bits)
    head = config.width // config.heads
    past = [
        [
            g.input(f"past_key_values.{i}.{kind}", float, ("rows", config.heads, "past", head))
            for kind in ("key", "value")
        ]
        for i in range(config.depth)
    ]
    inputs = g.input("inputs", int, ("rows", "new"))
    tables = (gpt.class_embedding, gpt.token_embedding, gpt.mask_embedding)
    x = g("Gather", g.weight(torch.cat([table.weight for table in tables])), inputs)
    start = g.size(past[0][0], 2)
    end = g("Add", start, g.size(inputs, 1))
    cos, sin = gpt.tables()[0].repeat_interleave(2, 1).unbind(-1)
    sin = sin * torch.tensor([-1, 1]).repeat(head // 2)
    turn = [g("Slice", g.weight(table), start, end, g.numbers(0)) for table in (cos, sin)]
    block: Module
    for i, block in enumerate(gpt.blocks):
        mixed, cache = _cached_attention(g, block.attn, _rms_norm(g, block.attn_norm, x), turn, past[i])
        for kind, value in zip(("key", "value"), cache, strict=True):
            g.output(f"present.{i}.{kind}", value, float, ("rows", config.heads, "past + new", head))
        x = g("Add", x, mixed)
        y = _rms_norm(g, block.mlp_norm, x)
        gate = g.linear(y, block.mlp.gate.weight)
        hidden = g("Mul", g("Mul", gate, g("Sigmoid", gate)), g.linear(y, block.mlp.up.weight))
        x = g("Add", x, g.linear(hidden, block.mlp.down.weight))
    logits = g.linear(_rms_norm(g, gpt.norm, x), gpt.head.weight)
    g.output("logits", logits, float, ("rows", "new", config.codebook_size))
    return g.model()


def _rms_norm(g: Graph, norm: RMSNorm, x: str) -> str:
    mean = g("ReduceMean", g("Pow", x, g.number(2.0)), g.numbers(-1))
    return g("Mul", g("Div", x, g("Sqrt", g("Add", mean, g.number(1e-5)))), g.weight(norm.weight))


def _cached_attention(
    g: Graph, attention: Module, x: str, turn: list[str], past: list[str]
) -> tuple[str, tuple[str, str]]:
    """Return the output, and the keys and values of all positions so far."""
    heads, width = attention.heads, attention.proj.weight.shape[0]
    qkv = g("Transpose", g.reshape(g.linear(x, attention.qkv.weight), 0, 0, 3 * heads, -1), perm=(0, 2, 1, 3))
    qk, v = g.several("Split", qkv, g.numbers(2 * heads, heads), count=2, axis=1)
    partners = g.numbers(*(i ^ 1 for i in range(width // heads)))  # a pair's other half
    qk = g("Add", g("Mul", qk, turn[0]), g("Mul", g("Gather", qk, partners, axis=3), turn[1]))
    q, k = g.several("Split", qk, g.numbers(heads, heads), count=2, axis=1)
    k, v = (g("Concat", old, new, axis=2) for old, new in zip(past, (k, v), strict=True))
    return g.linear(g.attend(q, k, v, width // heads), attention.proj.weight), (k, v)


# --- the tokenizer ---------------------------------------------------------------------------------------------------


def encode(tokenizer: DetailFlowTokenizer, bits: int) -> ModelProto:
    """Images (B, 3, R, R) in [-1, 1] → their N codes. Patches and queries are one sequence under one mask."""
    config, encoder, g = tokenizer.config, tokenizer.encoder, Graph("encoder", bits)
    patch, side, n = config.patch_size, config.image_size // config.patch_size, config.num_tokens
    images = g.input("images", float, ("images", 3, config.image_size, config.image_size))
    cut = g("Transpose", g.reshape(images, 0, 3, side, patch, side, patch), perm=(0, 2, 4, 3, 5, 1))
    embedded = _linear(g, encoder.patch_embed, g.reshape(cut, 0, side * side, -1))
    queries: str = g.weight(encoder.query_tokens + encoder.query_pos_embed)
    if encoder.linear is not None:
        grid = resize_grid(encoder.linear, side, side) * (encoder.linear.shape[1] / side)
        queries = g("Add", queries, g("MatMul", g.weight(grid), embedded))
    else:
        queries = _repeated(g, queries, images, n, config.encoder.width)
    x = g("Concat", g("Add", embedded, g.weight(resize_positions(encoder.pos_embed, side, side))), queries, axis=1)
    mask = torch.ones(side * side + n, side * side + n, dtype=torch.bool)
    mask[:-n, -n:] = False  # patches do not see queries
    if encoder.causal:
        mask[-n:, -n:] = tokenizer.schedule.attention_mask(n)
    bias = g.weight(torch.zeros(mask.shape).masked_fill(~mask, -torch.inf))
    for block in encoder.blocks:
        x = _block(g, block, x, bias)
    latents = g("Slice", x, g.numbers(side * side), g.numbers(side * side + n), g.numbers(1))
    projected = _linear(g, tokenizer.quantizer.project, _layer_norm(g, encoder.norm, latents))
    length = g("Max", g("ReduceL2", projected, g.numbers(-1)), g.number(1e-12))
    # In float32 also in 8 bits: the nearest code is all that counts, and there are few of these weights.
    near = g("MatMul", g("Div", projected, length), g.weight(tokenizer.quantizer.codes().T))
    g.output("ids", g("ArgMax", near, axis=-1, keepdims=0), int, ("images", n))
    return g.model()


def decode(tokenizer: DetailFlowTokenizer, bits: int) -> ModelProto:
    """Codes (B, n) and a side s in pixels, a multiple of f up to R → (B, 3, s, s) pixels in about [-1, 1]."""
    config, decoder, g = tokenizer.config, tokenizer.decoder, Graph("decoder", bits)
    patch, width, channels = config.patch_size, config.decoder.width, config.pixel_channels
    ids = g.input("ids", int, ("images", "tokens"))
    size = g.input("size", int, (1,))
    count, side = g.size(ids, 1), g("Div", size, g.numbers(patch))
    patches = g("Mul", side, side)
    projected = _linear(g, decoder.project, g("Gather", g.weight(tokenizer.quantizer.codes()), ids))
    latents = g("Add", projected, g.first(g.weight(decoder.latent_pos_embed), count, 0))
    if decoder.absent is not None:
        missing = g("Sub", g.numbers(config.num_tokens), count)
        shape = g("Concat", g.size(ids, 0), missing, g.numbers(width), axis=0)
        latents = g("Concat", latents, g("Expand", g.weight(decoder.absent), shape), axis=1)
    sides = range(1, config.image_size // patch + 1)
    start = g("Gather", g.numbers(0, *(sum(s * s for s in sides[:i]) for i in range(len(sides)))), side)
    end = g("Add", start, patches)

    def of_this_side(grids: list[Tensor]) -> str:
        return g("Slice", g.weight(torch.cat(grids)), start, end, g.numbers(0))

    canvas = of_this_side([decoder.mask_token + resize_positions(decoder.pos_embed, s, s) for s in sides])
    shape = g("Concat", g.size(ids, 0), patches, g.numbers(width), axis=0)
    canvas = g("Expand", canvas, shape)
    if decoder.linear is not None:
        linear = of_this_side([resize_grid(decoder.linear, s, s).T for s in sides])
        canvas = g("Add", canvas, g("MatMul", g.first(linear, count, 1), projected))
    x = g("Concat", canvas, latents, axis=1)
    for block in decoder.blocks:
        x = _block(g, block, x)
    x = _linear(g, decoder.to_pixels, _layer_norm(g, decoder.norm, g.first(x, patches, 1)))
    x = g("Reshape", x, g("Concat", g.numbers(-1), side, side, g.numbers(patch, patch, channels), axis=0))
    x = g("Transpose", x, perm=(0, 5, 1, 3, 2, 4))
    x = g("Reshape", x, g("Concat", g.numbers(-1, channels), size, size, axis=0))
    if decoder.refine_pixels is not None:
        x = _refined(g, decoder.refine_pixels, x)
    g.output("pixels", x, float, ("images", 3, "size", "size"))
    return g.model()


def _refined(g: Graph, convolutions: Module, x: str) -> str:
    """Add what two convolutions make of all channels to the first three, which are the image."""
    first, _, last = convolutions
    hidden = g("Gelu", _convolution(g, first, x))
    return g("Add", g.first(x, g.numbers(3), 1), _convolution(g, last, hidden))


def _convolution(g: Graph, layer: nn.Conv2d, x: str) -> str:
    assert layer.bias is not None
    return g("Conv", x, g.weight(layer.weight), g.weight(layer.bias), pads=(1, 1, 1, 1))


def _repeated(g: Graph, x: str, images: str, *shape: int) -> str:
    return g("Expand", x, g("Concat", g.size(images, 0), g.numbers(*shape), axis=0))


def _block(g: Graph, block: Module, x: str, bias: str | None = None) -> str:
    """Return `layers.Block` of x (B, T, width)."""
    heads, width = block.attn.heads, block.attn.proj.weight.shape[0]
    qkv = g.reshape(_linear(g, block.attn.qkv, _layer_norm(g, block.norm1, x)), 0, 0, 3 * heads, -1)
    q, k, v = g.several("Split", g("Transpose", qkv, perm=(0, 2, 1, 3)), count=3, axis=1, num_outputs=3)
    x = g("Add", x, _linear(g, block.attn.proj, g.attend(q, k, v, width // heads, bias)))
    hidden = g("Gelu", _linear(g, block.mlp.fc1, _layer_norm(g, block.norm2, x)), approximate="tanh")
    return g("Add", x, _linear(g, block.mlp.fc2, hidden))


def _linear(g: Graph, layer: nn.Linear, x: str) -> str:
    return g.linear(x, layer.weight, layer.bias)


def _layer_norm(g: Graph, norm: nn.LayerNorm, x: str) -> str:
    return g("LayerNormalization", x, g.weight(norm.weight), g.weight(norm.bias), axis=-1, epsilon=norm.eps)
