"""The autoregressive model: LlamaGen's transformer over grouped tokens (docs/method.md#ar-model)."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar, Literal, Unpack

import torch
from torch import Tensor, nn

from detailflow import generation, graphs, native
from detailflow.device import to_device
from detailflow.errors import DetailFlowError
from detailflow.generation import Cache, Generators
from detailflow.models.ids import checked_ids
from detailflow.models.layers import attend
from detailflow.models.operations import dropout, rms_norm, split_heads, swiglu
from detailflow.models.pretrained import Pretrained
from detailflow.sampling import GuidanceSchedule, SamplingConfig, SamplingOptions
from detailflow.schedule import TokenSchedule
from detailflow.settings import Depth, Must, NotNegativeInt, PositiveInt, Settings, ShareBelowOne, check_arguments

EngineUsed = Literal["native", "graphs", "torch"]
ENGINES: dict[EngineUsed, Callable[["DetailFlowGPT", Tensor, bool], generation.Engine]] = {
    "native": native.NativeEngine,
    "graphs": graphs.GraphEngine,
    "torch": generation.TorchEngine,
}  # each begins a batch of (B,) class ids, with guidance or without


@dataclass(frozen=True)
class GPTConfig(Settings):
    """Sizes of a `DetailFlowGPT`, the defaults are GPT-L's, and the sampling that suits the model best.

    `mlp` is the number of hidden units, `None` is 2/3 · 4 · width rounded up to a multiple of 256; `tokenizer` is the
    fingerprint of the tokenizer that the model was trained with, if that is known. A model without classes
    (`num_classes` 0) makes images of the null class, and has nothing to guide them by: its `guidance_scale` is 1.

    >>> GPTConfig(num_classes=1000).mlp
    2816
    """

    num_classes: NotNegativeInt
    width: PositiveInt = 1024
    depth: Depth = 24
    heads: PositiveInt = 16
    mlp: PositiveInt | None = None
    num_tokens: int = 128
    group_size: int = 8
    causal_tokens: int | None = None
    codebook_size: PositiveInt = 8192
    dropout: ShareBelowOne = 0.1
    rope_base: Annotated[float, Must("above 0", lambda base: 0 < base < float("inf"))] = 10000.0
    class_names: tuple[str, ...] | None = None
    guidance_scale: float = 1.5
    guidance_schedule: GuidanceSchedule = "constant"
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    tokenizer: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "causal_tokens", self.schedule.causal_tokens)
        if self.mlp is None:
            object.__setattr__(self, "mlp", -(-(8 * self.width // 3) // 256) * 256)
        if self.width % self.heads or self.width // self.heads % 4:
            wanted = "heads times a multiple of 4 (2-D rotary positions)"
            raise DetailFlowError(f"width must be {wanted}: {self.width} is not for {self.heads} heads")
        if self.class_names is not None and len(self.class_names) != self.num_classes:
            raise DetailFlowError(f"class_names has {len(self.class_names)} names for num_classes {self.num_classes}")
        if not self.num_classes:
            object.__setattr__(self, "guidance_scale", 1.0)
        _ = self.sampling  # validates itself

    @property
    def num_labels(self) -> int:
        """How many class ids images can be asked for; a model without classes has the null class alone."""
        return self.num_classes or 1

    @property
    def hidden(self) -> int:
        """Hidden units of the MLP."""
        return self.mlp  # type: ignore[return-value]  # never None after __post_init__

    @property
    def schedule(self) -> TokenSchedule:
        """The order of the tokens; their resolutions are known to the tokenizer only."""
        return TokenSchedule(self.num_tokens, self.group_size, self.causal_tokens, image_size=1, patch_size=1)

    @property
    def sampling(self) -> SamplingConfig:
        """The model's own best way to sample."""
        return SamplingConfig(self.guidance_scale, self.guidance_schedule, self.temperature, self.top_k, self.top_p)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + 1e-5) · weight, in float32 inside."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight)


class Attention(nn.Module):
    """Self-attention with rotary positions and a fused projection."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.proj = nn.Linear(config.width, config.width, bias=False)

    def forward(
        self, x: Tensor, rotation: Tensor, mask: Tensor | None, cache: Cache | None, start: int | Tensor
    ) -> Tensor:
        batch, length, width = x.shape
        q, k, v = split_heads(self.qkv(x), self.heads, rotation)
        if cache is not None:
            k, v = cache.append(start, k, v)
        out = attend(q, k, v, mask)
        return self.proj(out.transpose(1, 2).reshape(batch, length, width))


class SwiGLU(nn.Module):
    """down(silu(gate(x)) · up(x))."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.width, config.hidden, bias=False)
        self.up = nn.Linear(config.width, config.hidden, bias=False)
        self.down = nn.Linear(config.hidden, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(swiglu(self.gate(x), self.up(x)))


class Block(nn.Module):
    """x += attn(norm(x)); x += mlp(norm(x)); in training with dropout of what is added, not while generating."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.attn_norm = RMSNorm(config.width)
        self.attn = Attention(config)
        self.mlp_norm = RMSNorm(config.width)
        self.mlp = SwiGLU(config)

    def forward(
        self,
        x: Tensor,
        rotation: Tensor,
        mask: Tensor | None = None,
        cache: Cache | None = None,
        start: int | Tensor = 0,
    ) -> Tensor:
        p = self.dropout if self.training and cache is None else 0.0
        x = dropout(self.attn(self.attn_norm(x), rotation, mask, cache, start), p, onto=x)
        return dropout(self.mlp(self.mlp_norm(x)), p, onto=x)


def rotary_table(config: GPTConfig) -> Tensor:
    """Return (N, head_dim/2, 2) cosines and sines of 2-D positions.

    The row ⌊(i−1)/g⌋ turns the first half of the pairs, the column (i−1) mod g the second. Position 0, the class, gets
    zeros, so that its query and key vanish (docs/method.md#ar-model).
    """
    half = config.width // config.heads // 2
    frequencies = config.rope_base ** (-torch.arange(0, half, 2, dtype=torch.float32) / half)
    i = torch.arange(config.num_tokens - 1)[:, None]
    angles = torch.cat((i // config.group_size * frequencies, i % config.group_size * frequencies), -1)
    return torch.cat((angles.new_zeros(1, half, 2), torch.stack((angles.cos(), angles.sin()), -1)))


class DetailFlowGPT(Pretrained):
    """Class labels to token sequences; see `forward` and `generate`.

    >>> gpt = DetailFlowGPT.from_pretrained(device="cpu")  # the model in the package
    >>> gpt.generate(torch.tensor([3, 5]), num_tokens=8, temperature=0).shape
    torch.Size([2, 8])
    """

    kind, config_type = "gpt", GPTConfig
    keys: ClassVar = {
        "mask_embedding.weight": "group_size",
        "class_embedding.weight": "num_classes",
        "token_embedding.weight": "codebook_size",
        "head.weight": "codebook_size",
    }
    config: GPTConfig

    def __init__(self, config: GPTConfig) -> None:
        super().__init__(config)
        self.schedule = config.schedule
        self.class_embedding = nn.Embedding(config.num_classes + 1, config.width)
        self.token_embedding = nn.Embedding(config.codebook_size, config.width)
        self.mask_embedding = nn.Embedding(config.group_size - 1, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = RMSNorm(config.width)
        self.head = nn.Linear(config.width, config.codebook_size, bias=False)
        self.apply(_initialise)
        self._tables: tuple[Tensor, Tensor] | None = None

    def forward(self, class_ids: Tensor, ids: Tensor) -> Tensor:
        """Teacher forcing: (B,) class ids and (B, N) codes → (B, N, K) logits, those at position i predicting token i.

        Class id `num_classes` is the null class.
        """
        if not torch.compiler.is_compiling():  # a compiled step would break here
            class_ids = checked_ids("class_ids", class_ids, 1, self.config.num_classes + 1, wait=False)
            ids = checked_ids("codes", ids, 2, self.config.codebook_size, wait=False)
        if ids.ndim != 2 or ids.shape != (len(class_ids), self.config.num_tokens):
            raise DetailFlowError(
                f"codes must have shape ({len(class_ids)}, {self.config.num_tokens}), not {tuple(ids.shape)}"
            )
        class_ids, ids = class_ids.to(self.device), ids.to(self.device)
        p = self.config.dropout if self.training else 0.0
        x = dropout(self.inputs(class_ids, ids, 0, self.config.num_tokens), p)
        return self.logits(x, *self.tables())

    def compile_generation(self, batch_size: int) -> None:
        """Compile the generation of `batch_size` images at a time on a GPU; other numbers of images are not affected.

        One block is compiled, for one token and for a group, and serves all layers: the compiler's time does not grow
        with their number.
        """
        self.compile_for(batch_size, Block.forward, lambda block: partial(self.logits, run=block))

    def logits(
        self,
        x: Tensor,
        rotation: Tensor,
        mask: Tensor | None,
        caches: Sequence[Cache] | None = None,
        start: int | Tensor = 0,
        run: Callable[..., Tensor] = nn.Module.__call__,
    ) -> Tensor:
        """(B, T, width) embeddings → (B, T, K) logits; `run` runs a block with what follows it."""
        for i, block in enumerate(self.blocks):
            x = run(block, x, rotation, mask, None if caches is None else caches[i], start)
        return self.head(self.norm(x))

    @torch.no_grad()
    def generate(
        self,
        class_ids: Tensor,
        *,
        prefix: Tensor | None = None,
        generator: Generators | None = None,
        num_tokens: int | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> Tensor:
        """Generate token sequences: (B,) class ids → (B, n) int64 codes.

        Args:
            class_ids: 0 to num_classes − 1, or num_classes, the null class, for images of no class in particular; of a
                model without classes 0, its null class.
            prefix: (B, k) first tokens that are kept, for a valid count k; the rest is written to them.
            generator: one per image, or one that each image's own seed is drawn from; `None` is torch's own.
            num_tokens: stop after the first n tokens; `None` is all N.
            sampling: see `SamplingOptions`.
        """
        check_arguments(sampling, ("prefix", "generator", "num_tokens", *SamplingOptions.__annotations__))
        *_, ids = self.stream(class_ids, self.sampling(**sampling), generator, num_tokens, prefix)
        return ids

    def sampling(self, **options: Unpack[SamplingOptions]) -> SamplingConfig:
        """Return the model's own best way to sample, with the options that are given in its place."""
        check_arguments(options, SamplingOptions.__annotations__)
        sampling = self.config.sampling.updated(**options)
        if sampling.guided and not self.config.num_classes:
            raise DetailFlowError("this model has no classes, so nothing to guide by: leave out guidance_scale")
        return sampling

    def stream(
        self,
        class_ids: Tensor,
        sampling: SamplingConfig,
        generator: Generators | None = None,
        num_tokens: int | None = None,
        prefix: Tensor | None = None,
    ) -> Iterator[Tensor]:
        """Yield the codes so far, (B, n), after each decoding step, or first the prefix; see `generate`."""
        n = self.schedule.check_count(num_tokens)
        # Where they are, and only then moved: a GPU would be waited for.
        class_ids = checked_ids("class_ids", class_ids, 1, self.config.num_classes + 1)
        class_ids = to_device(class_ids, self.device)
        if not len(class_ids):
            raise DetailFlowError("class_ids must have at least one class")
        if prefix is not None:
            prefix = self._checked_prefix(prefix, len(class_ids), n)
        noise = generation.image_noise(generation.image_generators(generator, len(class_ids)), self.config.num_tokens)
        engine = self.begin(class_ids, sampling.guided)
        return generation.generate(engine, self.schedule, sampling, noise, n, self.device, prefix)

    def _checked_prefix(self, prefix: Tensor, images: int, num_tokens: int) -> Tensor:
        prefix = checked_ids("prefix", prefix, 2, self.config.codebook_size)
        if len(prefix) != images:
            raise DetailFlowError(f"prefix must have a row for each of {images} images, not {len(prefix)} rows")
        self.schedule.check_prefix(prefix.shape[1], num_tokens)
        return to_device(prefix, self.device)

    def begin(self, class_ids: Tensor, guided: bool) -> generation.Engine:
        """Begin a batch with the engine that `engine` names, or the first that can run this model."""
        return ENGINES[self.engine_used](self, class_ids, guided)

    @property
    def engine_used(self) -> EngineUsed:
        """What takes the decoding steps: the engine that `engine` names, or the first that can run this model."""
        return "native" if self.uses_native else "graphs" if self.uses_graphs else "torch"

    @property
    def uses_native(self) -> bool:
        """Whether the native engine generates (docs/speed.md#engines), as it does if model and machine allow it."""
        if self.engine in ("torch", "graphs"):
            return False
        problem = native.why_not(self)
        if problem and self.engine == "native":
            raise DetailFlowError(f"the native engine cannot run this model: {problem}")
        return not problem

    @property
    def uses_graphs(self) -> bool:
        """Whether decoding steps are captured as CUDA graphs, as they are if model and machine allow it."""
        uses = super().uses_graphs
        if self.engine == "graphs" and not uses:
            raise DetailFlowError(f"the graphs engine cannot run this model: {graphs.why_not(self)}")
        return uses

    def tables(self) -> tuple[Tensor, Tensor]:
        """Return the rotary table and the (N, N) mask on the model's device; made once, as each is some kernels.

        They are not buffers: these would take the weights' dtype, and have no values in a model that is still to be
        loaded.
        """
        if self._tables is None or self._tables[0].device != self.device:
            with torch.inference_mode(False):  # or training could not use them later
                mask = self.schedule.attention_mask(self.config.num_tokens, self.device)
                self._tables = rotary_table(self.config).to(self.device), mask
        return self._tables

    def inputs(self, class_ids: Tensor, ids: Tensor, start: int, end: int) -> Tensor:
        """Embed positions `start` to `end` of [class, z_1 … z_c, m_1 … m_{g−1}, z_{c+1} … z_{N−g}].

        See docs/method.md#ar-model. Position i has token i − 1 up to c; the g − 1 masks follow; from c + g on position
        i has token i − g.
        """
        c, g = self.schedule.num_causal, self.schedule.group_size
        parts = []
        if start == 0:
            parts.append(self.class_embedding(class_ids)[:, None])
        if (first := max(start, 1)) <= (last := min(end - 1, c)):
            parts.append(self.token_embedding(ids[:, first - 1 : last]))
        if start <= c and end > c + 1:
            parts.append(self.mask_embedding.weight.expand(len(class_ids), -1, -1))
        if end > c + g:
            parts.append(self.token_embedding(ids[:, max(start, c + g) - g : end - g]))
        return torch.cat(parts, 1)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
