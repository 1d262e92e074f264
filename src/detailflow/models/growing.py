"""Progressive growing: start from a model that was trained at a lower resolution with fewer tokens.

The paper recommends it for high resolutions. Only a tokenizer's query tokens and their positions depend on the number
of tokens, and no weight on the resolution. No token sees later groups, so the first tokens of a grown model are at
first exactly those of the smaller one. A decoder grows in depth, and to convolutions at its end, and draws the same
pictures at first.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from detailflow.errors import DetailFlowError
from detailflow.models.gpt import GPTConfig
from detailflow.models.loading import require_same
from detailflow.models.tokenizer import DetailFlowTokenizer, TokenizerConfig

EXTRAS = ("linear_path", "pixel_channels", "absent_token")
LINEAR = ("encoder.linear", "decoder.linear")
LAST_OF_BLOCK = ("attn.proj.", "mlp.fc2.")
PER_TOKEN = ("encoder.query_tokens", "encoder.refined_tokens", "encoder.query_pos_embed", "decoder.latent_pos_embed")
OF_CODES = ("num_tokens", "image_size", "group_size", "causal_tokens", "causal_encoder", "alpha")  # beside the weights


def grow_tokenizer(
    tensors: Mapping[str, Tensor], theirs: TokenizerConfig, fresh: DetailFlowTokenizer, source: object
) -> dict[str, Tensor]:
    """Return the weights of a smaller tokenizer for a larger network, which keeps its own for the further tokens.

    Further blocks of the decoder, and convolutions at its end, change nothing until they learn.

    Args:
        tensors: the smaller tokenizer's, by name.
        theirs: its config; image size, α, group size and c may differ, as no weight depends on them.
        fresh: the initialized network; it is not changed.
        source: the smaller tokenizer's name in messages.
    """
    ours = fresh.config
    deeper = replace(theirs.decoder, depth=max(theirs.decoder.depth, ours.decoder.depth))
    channels = ours.pixel_channels if theirs.pixel_channels == 3 else theirs.pixel_channels
    reached = replace(theirs, decoder=deeper, pixel_channels=channels)
    keys = ("encoder", "decoder", "patch_size", "codebook_size", "codebook_dim", "causal_encoder", *EXTRAS)
    require_same(ours, reached, keys, f"the weights of {source} do not fit")
    _require_growth(ours.num_tokens, theirs.num_tokens, "a tokenizer", source)
    grown, own = dict(tensors), fresh.state_dict()
    for name in (*PER_TOKEN, *(LINEAR if ours.linear_path else ())):
        if tensors[name].shape[1:] != own[name].shape[1:]:
            raise DetailFlowError(
                f"the weights of {source} do not fit: with a linear path it grows to 64 tokens at most"
            )
        grown[name] = torch.cat((tensors[name], own[name][theirs.num_tokens :].to(tensors[name])))
    for name, tensor in own.items():  # new blocks add nothing at first; nor do convolutions, as the last one is zeros
        if name not in grown:
            grown[name] = torch.zeros_like(tensor) if name.split(".", 3)[-1].startswith(LAST_OF_BLOCK) else tensor
    if channels != theirs.pixel_channels:
        for name in ("decoder.to_pixels.weight", "decoder.to_pixels.bias"):
            wider = own[name].unflatten(0, (-1, channels)).clone()
            wider[:, :3] = tensors[name].unflatten(0, (-1, 3))
            grown[name] = wider.flatten(0, 1)
    return grown


def require_growable(ours: GPTConfig, theirs: GPTConfig, source: object) -> None:
    """Check that an AR model's weights fit another one, of as many tokens or more."""
    keys = ("width", "depth", "heads", "mlp", "group_size", "causal_tokens", "codebook_size")
    require_same(ours, theirs, keys, f"the weights of {source} do not fit")
    _require_growth(ours.num_tokens, theirs.num_tokens, "an AR model", source)


def _require_growth(ours: int, theirs: int, what: str, source: object) -> None:
    if ours < theirs:
        sizes = f"num_tokens is {theirs} there and {ours} here"
        raise DetailFlowError(f"the weights of {source} do not fit: {sizes}, and {what} can only grow")
