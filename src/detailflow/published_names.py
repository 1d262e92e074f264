"""What the published checkpoints and SigLIP2 call our tensors (docs/method.md#published-layout)."""

from collections.abc import Iterator, Sequence
from typing import Literal


def tensor_names(kind: Literal["tokenizer", "gpt"], depths: Sequence[int]) -> dict[str, tuple[str, ...]]:
    """Return our name of each tensor of a published model → the published ones that are stacked in it.

    `depths`: layers of the AR model, or of the tokenizer's encoder and decoder.
    """
    return dict(_gpt_names(*depths) if kind == "gpt" else _tokenizer_names(*depths))


def _linear(ours: str, *theirs: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    for part in ("weight", "bias"):
        yield f"{ours}.{part}", tuple(f"{name}.{part}" for name in theirs)


def _tokenizer_names(encoder_depth: int, decoder_depth: int) -> Iterator[tuple[str, tuple[str, ...]]]:
    yield "encoder.query_tokens", ("encoder.latent_tokens",)
    yield "encoder.refined_tokens", ("encoder.refined_tokens",)
    yield "encoder.query_pos_embed", ("encoder.latent_pos_embed",)
    yield from _linear("encoder.refine", "refine_conv")
    yield from _linear("quantizer.project", "quant_conv")
    yield "quantizer.codebook", ("quantize.embedding.weight",)
    yield from _linear("decoder.project", "post_quant_conv")
    yield "decoder.latent_pos_embed", ("decoder.latent_pos_embed",)
    yield "decoder.mask_token", ("decoder.mask_token",)
    yield from _linear("decoder.to_pixels", "decoder.to_pixel.model")
    yield from vit_names("encoder.", "encoder.visual_model.", encoder_depth)
    yield from vit_names("decoder.", "decoder.visual_model.", decoder_depth, patches=False)


def vit_names(ours: str, theirs: str, depth: int, patches: bool = True) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield the names of one transformer, also SigLIP2's vision tower; `ours` and `theirs` are prefixes, with dot.

    `patches`: whether image patches go in, as they do not in the decoder.
    """
    if patches:
        yield from _linear(f"{ours}patch_embed", f"{theirs}embeddings.patch_embedding")
    yield f"{ours}pos_embed", (f"{theirs}embeddings.position_embedding.weight",)
    yield from _linear(f"{ours}norm", f"{theirs}post_layernorm")
    for i in range(depth):
        block, layer = f"{ours}blocks.{i}", f"{theirs}encoder.layers.{i}"
        yield from _linear(f"{block}.norm1", f"{layer}.layer_norm1")
        yield from _linear(f"{block}.attn.qkv", *(f"{layer}.self_attn.{x}_proj" for x in "qkv"))
        yield from _linear(f"{block}.attn.proj", f"{layer}.self_attn.out_proj")
        yield from _linear(f"{block}.norm2", f"{layer}.layer_norm2")
        yield from _linear(f"{block}.mlp.fc1", f"{layer}.mlp.fc1")
        yield from _linear(f"{block}.mlp.fc2", f"{layer}.mlp.fc2")


def _gpt_names(depth: int) -> Iterator[tuple[str, tuple[str, ...]]]:
    yield "class_embedding.weight", ("cls_embedding.embedding_table.weight",)
    yield "token_embedding.weight", ("tok_embeddings.weight",)
    yield "mask_embedding.weight", ("spe_tok_embeddings.special_embeddings.weight",)
    yield "norm.weight", ("norm.weight",)
    yield "head.weight", ("output.weight",)
    parts = {
        "attn_norm": "attention_norm",
        "attn.qkv": "attention.wqkv",
        "attn.proj": "attention.wo",
        "mlp_norm": "ffn_norm",
        "mlp.gate": "feed_forward.w1",
        "mlp.up": "feed_forward.w3",
        "mlp.down": "feed_forward.w2",
    }
    for i in range(depth):
        for ours, theirs in parts.items():
            yield f"blocks.{i}.{ours}.weight", (f"layers.{i}.{theirs}.weight",)
