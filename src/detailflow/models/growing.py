"""Progressive growing: weights learnt at a low resolution with few tokens, for a model of more of both.

The paper recommends it for high resolutions. Of a tokenizer's weights only the query tokens and their positions depend on the
number of tokens, of an AR model's none, and none depend on the resolution. As no token sees later groups, the first tokens of a
grown model are at first exactly those of the model that it grew from.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from detailflow.errors import DetailFlowError
from detailflow.models.gpt import GPTConfig
from detailflow.models.loading import require_same
from detailflow.models.tokenizer import DetailFlowTokenizer, TokenizerConfig

EXTRAS = ("linear_path", "pixel_channels", "absent_token")
LINEAR = ("encoder.linear", "decoder.linear")
PER_TOKEN = ("encoder.query_tokens", "encoder.refined_tokens", "encoder.query_pos_embed", "decoder.latent_pos_embed")


def grow_tokenizer(
    tensors: Mapping[str, Tensor], theirs: TokenizerConfig, fresh: DetailFlowTokenizer, source: object
) -> dict[str, Tensor]:
    """The weights of one tokenizer for a network with as many tokens or more, which keeps its own values for the further ones.

    Image size, α, group size and c may differ, as no weight depends on them.

    Args:
        tensors: the smaller tokenizer's, by name.
        theirs: its config.
        fresh: the network as it was made; it is not changed.
        source: what error messages call the smaller tokenizer.

    Raises:
        DetailFlowError: where anything else differs, or the network has fewer tokens.
    """
    ours = fresh.config
    require_same(ours, theirs, ("encoder", "decoder", "patch_size", "codebook_size", "codebook_dim", *EXTRAS), source)
    if ours.num_tokens < theirs.num_tokens:
        raise DetailFlowError(
            f"the weights of {source} do not fit: num_tokens is {theirs.num_tokens} there and {ours.num_tokens} here, "
            "and a tokenizer can only grow"
        )
    grown, own = dict(tensors), fresh.state_dict()
    for name in (*PER_TOKEN, *(LINEAR if ours.linear_path else ())):
        if tensors[name].shape[1:] != own[name].shape[1:]:
            raise DetailFlowError(
                f"the weights of {source} do not fit: with a linear path it grows to 64 tokens at most"
            )
        grown[name] = torch.cat((tensors[name], own[name][theirs.num_tokens :].to(tensors[name])))
    return grown


def require_growable(ours: GPTConfig, theirs: GPTConfig, source: object) -> None:
    """Check that an AR model's weights fit another, which may have more tokens: their positions are not learnt.

    Raises:
        DetailFlowError: that names what differs, or where the other has fewer tokens.
    """
    require_same(
        ours, theirs, ("width", "depth", "heads", "mlp", "group_size", "causal_tokens", "codebook_size"), source
    )
    if ours.num_tokens < theirs.num_tokens:
        raise DetailFlowError(
            f"the weights of {source} do not fit: num_tokens is {theirs.num_tokens} there and {ours.num_tokens} here, "
            "and an AR model can only grow"
        )
