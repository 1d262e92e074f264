"""What each network of a run costs: parameters, operations of an image, and what it keeps of it for the way back.

Operations are those of matrix products and convolutions; a way back is two ways forward, or one where only pixels get gradients.
Networks that are made here have no weights (torch's meta device), and those that would be downloaded are taken to have their
known sizes. Activations are counted operation by operation as autograd keeps them under autocast.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from detailflow.machine import decoding_work, encoding_work
from detailflow.models.gpt import DetailFlowGPT, GPTConfig
from detailflow.models.siglip2 import SigLIP2
from detailflow.models.tokenizer import DetailFlowTokenizer, TokenizerConfig
from detailflow.models.vit import ViTConfig
from detailflow.training.adversary import PATCH
from detailflow.training.networks import FEATURE_WIDTHS, AlignmentHead, FeatureNetwork, PatchDiscriminator
from detailflow.training.teachers import CLASSIFIER

SIGLIP2_SIZES = ViTConfig(1152, 27, 16, 4304)
DINO_SIZES, DINO_TOKENS, DINO_WEIGHTS = ViTConfig(384, 12, 6), 197, 21_665_664  # ViT-S/16 on 224×224
HEADS, HEAD_KERNELS = 5, (1, 9)  # on DINO's features, and the convolutions of full width of each
HEAD_MAPS = 8  # that a head keeps, about
VGG16 = (
    (64, 2),
    (128, 2),
    (256, 3),
    (512, 3),
    (512, 3),
)  # channels and convolutions, each line at half the side of the one before
LPIPS_WEIGHTS = sum(channels for channels, _ in VGG16)
TRAINED, THROWN_AWAY, FROZEN = "trained", "trained, not kept", "frozen"


@dataclass(frozen=True)
class Network:
    """One network of a run.

    Attributes:
        fate: `TRAINED`, `THROWN_AWAY` (trained, but no part of the model) or `FROZEN`.
        operations: per image of a step, there and back.
        activations: bytes per image that are kept for the way back.
        again: operations per image to compute the blocks' activations again, where `checkpoint_activations` asks for it.
        kept: bytes per image that are then kept in place of `activations`, with one block's that are there again.
        weight_bytes: of each weight of a frozen network.
    """

    name: str
    parameters: int
    fate: str
    operations: float = 0.0
    activations: float = 0.0
    again: float = 0.0
    kept: float | None = None
    weight_bytes: int = 4


def tokenizer_networks(sizes: TokenizerConfig, corrected: float, half: bool, on_cpu: bool) -> list[Network]:
    """Encoder, quantizer and decoder of a step that trains all N tokens.

    Args:
        corrected: share of the images that go through the self-correction pass as well.
        half: whether products are in 16 bits.
        on_cpu: whether attention keeps its scores, as it does there.
    """
    with torch.device("meta"):
        model = DetailFlowTokenizer(sizes)
    n, patches, encoder, decoder = sizes.num_tokens, (sizes.image_size // sizes.patch_size) ** 2, sizes.encoder, sizes.decoder
    seen, both = patches + n, 1 + corrected
    (encoding,), (decoding,) = encoding_work(model, 1), decoding_work(model, 1)
    correction = 2 * n * (block_weights(encoder) * encoder.depth + (2 * encoder.width + sizes.codebook_size) * sizes.codebook_dim)
    correction += 4 * n * seen * encoder.width * encoder.depth
    forward = encoding.operations + corrected * correction
    size = 2 if half else 4
    of_patches = block_bytes(encoder, patches, patches, half, on_cpu)
    of_queries = block_bytes(encoder, n, seen, half, on_cpu) + 2 * size * encoder.width * seen  # keys and values, put together
    of_both = block_bytes(decoder, seen, seen, half, on_cpu)
    cache = 2 * size * encoder.width * patches
    pixels = 2 * 4 * 3 * sizes.image_size**2  # a picture and its difference from the target
    in_encoder = 4 * encoder.width * (patches + both * n) + cache
    return [
        Network(
            "encoder",
            parameters(model.encoder),
            TRAINED,
            operations=3 * forward,
            activations=encoder.depth * (of_patches + both * of_queries),
            again=forward,
            kept=encoder.depth * in_encoder + max(of_patches, both * of_queries),
        ),
        Network("quantizer", parameters(model.quantizer), TRAINED),
        Network(
            "decoder",
            parameters(model.decoder),
            TRAINED,
            operations=3 * both * decoding.operations,
            activations=both * (decoder.depth * of_both + pixels),
            again=both * decoding.operations,
            kept=both * (decoder.depth * 4 * decoder.width * seen + of_both + pixels),
        ),
    ]


def alignment_networks(network: str, sizes: TokenizerConfig, half: bool) -> list[Network]:
    """The teacher of the first token and the head that learns from it."""
    side = sizes.image_size
    if network == CLASSIFIER:
        small, operations = _classifier(side)
        teacher, width = Network("classifier, aligned with", parameters(small), FROZEN, operations), FEATURE_WIDTHS[-1]
    else:
        with torch.device("meta"):
            tower = SigLIP2(SIGLIP2_SIZES)
        operations, width = transformer_operations(SIGLIP2_SIZES, (side // tower.patch_size) ** 2), SIGLIP2_SIZES.width
        teacher = Network("SigLIP2", parameters(tower), FROZEN, operations, weight_bytes=2 if half else 4)
    with torch.device("meta"):
        head = AlignmentHead(sizes.codebook_dim, width)
    return [Network("head of the alignment", parameters(head), THROWN_AWAY, 3 * 2 * parameters(head)), teacher]


def perceptual_network(network: str, side: int, pictures: float, half: bool) -> Network:
    """What compares features: targets forward; `pictures` reconstructions of each there and, to their pixels, back."""
    passes = 1 + 2 * pictures
    if network == CLASSIFIER:
        small, forward = _classifier(side)
        return Network(
            "classifier, for features", parameters(small), FROZEN, passes * forward, pictures * _saved(small.features, side)
        )
    weights, products, kept, inputs, size = LPIPS_WEIGHTS, 0.0, 0.0, 3, 2 if half else 4
    for level, (channels, count) in enumerate(VGG16):
        area = side**2 / 4**level
        for _ in range(count):
            weights += 9 * inputs * channels + channels
            products += 9 * inputs * channels * area
            inputs = channels
        kept += channels * area * (size * count + (8 if half else 4))  # the last of them in float32, and its difference
        if level:
            kept += VGG16[level - 1][0] * area * (size + 8)  # a pooling keeps places, as 8-byte numbers
    return Network("VGG-16 (LPIPS)", weights, FROZEN, passes * 2 * products, pictures * kept)


def discriminator_networks(network: str, side: int, share: float, pictures: float, views: int, half: bool) -> list[Network]:
    """A discriminator that plays in a `share` of the steps.

    Args:
        pictures: reconstructions of each image that it judges for the tokenizer.
        views: of each image that it learns from.
    """
    learning, judging = 3 * views, 2 * pictures  # ways forward and back
    if network == PATCH:
        with torch.device("meta"):
            small = PatchDiscriminator()
        operations = share * (learning + judging) * _operations(small, side)
        return [Network("discriminator", parameters(small), THROWN_AWAY, operations, pictures * _saved(small, side))]
    width = DINO_SIZES.width
    matrices = sum(kernel * width**2 for kernel in HEAD_KERNELS) + width
    weights = HEADS * (matrices + len(HEAD_KERNELS) * 3 * width + 1)  # with biases and batch norms
    heads = 2 * HEADS * matrices * (DINO_TOKENS - 1)
    backbone = transformer_operations(DINO_SIZES, DINO_TOKENS)
    of_heads = HEADS * HEAD_MAPS * 4 * width * DINO_TOKENS
    of_backbone = DINO_SIZES.depth * block_bytes(DINO_SIZES, DINO_TOKENS, DINO_TOKENS, half, scores=False, frozen=True)
    return [
        Network("heads of the discriminator", weights, THROWN_AWAY, share * (learning + judging) * heads, pictures * of_heads),
        Network("DINO ViT-S/16", DINO_WEIGHTS, FROZEN, share * (views + judging) * backbone, pictures * of_backbone),
    ]


def gpt_network(sizes: GPTConfig, half: bool, on_cpu: bool) -> Network:
    """An AR model's teacher forcing: all N positions at once. For `half` and `on_cpu` see `tokenizer_networks`."""
    with torch.device("meta"):
        model = DetailFlowGPT(sizes)
    n, width, depth = sizes.num_tokens, sizes.width, sizes.depth
    block = 2 * n * (4 * width**2 + 3 * width * sizes.hidden) + 4 * n**2 * width
    forward = depth * block + 2 * n * width * sizes.codebook_size
    of_block = gpt_block_bytes(sizes, half, on_cpu)
    logits = n * sizes.codebook_size * (2 + 4 + 4 if half else 4 + 4)  # as they come, in float32, and their softmax
    return Network(
        "AR model",
        parameters(model),
        TRAINED,
        operations=3 * forward,
        activations=depth * of_block + logits,
        again=depth * block,
        kept=depth * 4 * n * width + of_block + logits,
    )


def block_weights(config: ViTConfig) -> int:
    """Weights of one block's matrices."""
    return 4 * config.width**2 + 2 * config.width * config.hidden


def transformer_operations(config: ViTConfig, tokens: int) -> float:
    """One way forward of `tokens` that all see each other."""
    return config.depth * (2 * tokens * block_weights(config) + 4 * tokens**2 * config.width)


def block_bytes(config: ViTConfig, rows: int, columns: int, half: bool, scores: bool, frozen: bool = False) -> float:
    """What a block keeps of `rows` tokens that look at `columns`.

    In float32 the input of either norm; in the products' precision the inputs of the four matrices (not where these are frozen),
    queries, keys and values, what attention makes of them, and the MLP's values before its activation.
    """
    size, width, mlp = (2 if half else 4), config.width, config.hidden
    values = 4 * 2 * width + size * (4 * width + mlp)
    if not frozen:
        values += size * (2 * width + mlp)
    return rows * values + (_score_bytes(config.heads, width, rows, columns, size) if scores else 0)


def gpt_block_bytes(config: GPTConfig, half: bool, scores: bool) -> float:
    """What a block of an AR model keeps of N positions.

    As `block_bytes`, but norms also keep what they make in float32 (a fused one does not); turned queries and keys come beside
    the values, whose storage is all three's; the MLP has four wide values; dropout keeps two masks.
    """
    size, width, n = (2 if half else 4), config.width, config.num_tokens
    values = 4 * 4 * width + size * (8 * width + 4 * config.hidden) + (2 * width if config.dropout else 0)
    return n * values + (_score_bytes(config.heads, width, n, n, size) if scores else 0)


def parameters(module: nn.Module) -> int:
    """Weights of a network."""
    return sum(parameter.numel() for parameter in module.parameters())


def _score_bytes(heads: int, width: int, rows: int, columns: int, size: int) -> float:
    """What plain attention keeps besides: its scores after their softmax, and scaled queries."""
    return size * rows * (heads * columns + width)


def _classifier(side: int) -> tuple[FeatureNetwork, float]:
    """The network, but for its few classes, and the operations of its features."""
    with torch.device("meta"):
        network = FeatureNetwork(1)
    return network, _operations(network.features, side)


def _operations(function: Callable[[Tensor], object], side: int) -> float:
    """Of one image, on the meta device."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        function(torch.empty(1, 3, side, side, device="meta"))
    return float(counter.get_total_flops())


def _saved(function: Callable[[Tensor], object], side: int) -> float:
    """Bytes that one image's activations take in float32: all that is kept for the way back but the weights."""
    sizes: dict[int, int] = {}
    held = []

    def note(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter) and tensor.ndim > 2:
            held.append(tensor)  # so that no other takes its number
            sizes[id(tensor.untyped_storage())] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = function(torch.empty(1, 3, side, side, device="meta", requires_grad=True))
    del result
    return float(sum(sizes.values()))
