"""The decoding loop: guidance, sampling and the KV cache (Sec. 3.4; docs/method.md#sampling).

Every image has a noise stream of its own: one uniform number per token, drawn in advance. A token is the code at which
the cumulative probability passes its number, so an image never depends on what else is in its batch.
"""

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from detailflow.device import to_device
from detailflow.errors import DetailFlowError, not_finite
from detailflow.sampling import SamplingConfig as SamplingConfig
from detailflow.schedule import TokenSchedule
from detailflow.words import shown

SMALLEST = torch.finfo(torch.float32).tiny

Generators = torch.Generator | Sequence[torch.Generator]


class Engine:
    """One batch of images on its way: classes and KV cache of an AR model, as the decoding loop uses them."""

    def start(self, noise: Tensor, sampling: SamplingConfig, device: torch.device) -> tuple[Tensor, Tensor]:
        """Begin with (B, N) float64 noise: return the tokens (B, N), all still 0, and the noise on the device."""
        noise = to_device(noise.to(torch.float64 if device.type != "mps" else torch.float32), device)
        return torch.zeros(noise.shape, dtype=torch.int64, device=device), noise

    def step(self, tokens: Tensor, start: int, end: int) -> Tensor:
        """Given all tokens (B, N), known before `start` → logits (B, end − start, K) of the next ones.

        With guidance there are twice as many rows: first with the class, then with the null class.
        """
        raise NotImplementedError

    def prefill(self, tokens: Tensor, end: int) -> Tensor:
        """Given all tokens (B, N), known before `end` → their logits (B or 2B, end, K), as if step after step."""
        return self.step(tokens, 0, end)

    def advance(
        self, tokens: Tensor, noise: Tensor, start: int, end: int, sampling: SamplingConfig, scale: float
    ) -> Tensor | bool:
        """Draw the tokens from `start` to `end` into (B, N) `tokens` with guidance `scale`.

        Returns:
            Whether all logits were finite, without waiting for a GPU.
        """
        tokens[:, start:end], finite = draw(self.step(tokens, start, end), noise[:, start:end], sampling, scale)
        return finite


def generate(
    engine: Engine,
    schedule: TokenSchedule,
    sampling: SamplingConfig,
    noise: Tensor,
    num_tokens: int,
    device: torch.device,
    prefix: Tensor | None = None,
) -> Iterator[Tensor]:
    """Yield the tokens so far, (B, n) int64, after every decoding step up to n = `num_tokens`.

    A `prefix` of known tokens, (B, k) for a valid count k, is yielded first and enters the cache in one pass.
    """
    tokens, noise = engine.start(noise, sampling, device)
    finite: Tensor | bool = True
    known = 0 if prefix is None else prefix.shape[1]
    if prefix is not None:
        tokens[:, :known] = prefix
        yield tokens[:, :known].clone()
        if known < num_tokens:
            engine.prefill(tokens, known)
    for start, end in schedule.steps:
        if start < known:
            continue
        if start >= num_tokens:
            return
        scale = guidance_at(sampling, schedule, start)
        finite = engine.advance(tokens, noise, start, end, sampling, scale) & finite
        if end == num_tokens and not finite:  # looked at once, as each look waits for a GPU
            raise not_finite("the AR model's logits")
        yield tokens[:, :end].clone()


def guidance_at(sampling: SamplingConfig, schedule: TokenSchedule, start: int) -> float:
    """Return the guidance scale at token `start`: s, or if linear, s · (M − i + 1) / (M + 1) for group i of M."""
    if sampling.guidance_schedule == "constant" or start < schedule.num_causal:
        return sampling.guidance_scale
    groups = schedule.num_tokens // schedule.group_size
    return sampling.guidance_scale * (groups - start // schedule.group_size + 1) / (groups + 1)


def draw(
    logits: Tensor,
    noise: Tensor,
    sampling: SamplingConfig,
    scale: float | Tensor,
    temperature: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Apply guidance and sample: logits of `Engine.step` → codes (B, m), and whether all logits were finite.

    `scale` and `temperature` may be tensors without dimensions, so that a captured step can be given others.
    """
    logits = logits.float()
    if sampling.guided:
        conditional, unconditional = logits.chunk(2)
        logits = unconditional + scale * (conditional - unconditional)
    return sample(logits, noise, sampling, temperature), logits.amax(-1).isfinite().all()


def sample(logits: Tensor, noise: Tensor, sampling: SamplingConfig, temperature: Tensor | None = None) -> Tensor:
    """Draw a code at each position: (B, m, K) logits and (B, m) uniform numbers → (B, m) int64 codes.

    A temperature near 0 comes near to argmax, and top-k and top-p keep the lower of equally likely codes.
    `temperature`, from `temperature_of`, takes the place of the sampling's own if that is not 0.

    >>> sample(torch.tensor([[[0.0, 0.0, 0.0, 0.0]]]), torch.tensor([[0.6]]), SamplingConfig())
    tensor([[2]])
    """
    if sampling.temperature == 0:
        return logits.argmax(-1)
    logits = logits.float()
    if temperature is None:  # a tensor here as well, as a GPU would multiply by the reciprocal of a number
        temperature = logits.new_full((), temperature_of(sampling))
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature  # the largest becomes exactly 0
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        logits = logits.masked_fill(_outside_top_k(logits, sampling.top_k), -torch.inf)
    if sampling.top_p is not None and sampling.top_p < 1:
        logits = logits.masked_fill(_outside_nucleus(logits, sampling.top_p), -torch.inf)
    cumulative = logits.softmax(-1).cumsum(-1, dtype=noise.dtype)
    below_one = 1 - torch.finfo(noise.dtype).eps / 2  # at 1 the threshold would be beyond the last code
    threshold = noise.clamp(max=below_one)[..., None] * cumulative[..., -1:]
    ids = torch.searchsorted(cumulative, threshold, right=True)[..., 0]
    return ids.clamp_(max=logits.shape[-1] - 1)


def temperature_of(sampling: SamplingConfig) -> float:
    """Return the temperature as a number that is neither 0 nor infinite in float32, so that nothing becomes NaN."""
    return min(max(sampling.temperature, SMALLEST), 1 / SMALLEST)


def _outside_top_k(logits: Tensor, k: int) -> Tensor:
    """Return True for all but the k most likely codes; of those as likely as the last of them, the lowest stay."""
    last = logits.topk(k, dim=-1).values[..., -1:]
    likelier, tied = logits > last, logits == last
    room = k - likelier.sum(-1, keepdim=True)
    return ~(likelier | (tied & (tied.cumsum(-1) <= room)))


def _outside_nucleus(logits: Tensor, top_p: float) -> Tensor:
    """Return True outside the smallest set of most likely codes whose probabilities sum to `top_p` or more."""
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    probabilities = ordered.softmax(-1)
    outside = probabilities.cumsum(-1) - probabilities >= top_p
    outside[..., 0] = False  # even if `top_p` is 0 in float32
    return torch.zeros_like(outside).scatter(-1, order, outside)


# --- noise -----------------------------------------------------------------------------------------------------------


def image_noise(generators: Sequence[torch.Generator], num_tokens: int) -> Tensor:
    """Return (B, N) float64 uniform numbers on the CPU, one row from each image's own generator."""
    rows = [torch.rand(num_tokens, generator=g, dtype=torch.float64, device=g.device).cpu() for g in generators]
    return torch.stack(rows)


def image_generator(seed: int, image: int) -> torch.Generator:
    """Return the noise generator of one image; the mixing is fixed, so that images stay the same for good."""
    state = np.random.SeedSequence(seed, spawn_key=(image,)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))


def image_generators(generator: Generators | None, images: int) -> list[torch.Generator]:
    """Return a generator per image: those of a list, or seeded by draws from one (`None`: torch's own)."""
    if generator is None or isinstance(generator, torch.Generator):
        device = generator.device if generator is not None else "cpu"
        seeds = torch.randint(2**62, (images,), generator=generator, device=device)
        return [torch.Generator().manual_seed(seed) for seed in seeds.tolist()]
    if not isinstance(generator, Sequence) or not all(isinstance(each, torch.Generator) for each in generator):
        raise DetailFlowError(
            f"generator must be a torch.Generator or a list of {images} of them, not {shown(generator, 40)}"
        )
    if len(generator) != images:
        raise DetailFlowError(
            f"generator must be one or a list of {images}, one per image, not a list of {len(generator)}"
        )
    return list(generator)


# --- the KV cache ----------------------------------------------------------------------------------------------------


class Cache:
    """Keys and values of one attention layer, preallocated for all N positions."""

    def __init__(self, shape: tuple[int, int, int, int], like: Tensor) -> None:
        self.keys, self.values = like.new_empty(shape), like.new_empty(shape)  # (B, heads, N, head_dim)

    def append(self, start: int | Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store positions from `start` on; return everything up to them."""
        assert isinstance(start, int)
        end = start + k.shape[2]
        self.keys[:, :, start:end], self.values[:, :, start:end] = k, v
        return self.keys[:, :, :end], self.values[:, :, :end]


class StaticCache(Cache):
    """A cache that is always returned whole, for steps of the same shapes; a mask hides later positions."""

    def __init__(self, shape: tuple[int, int, int, int], like: Tensor) -> None:
        self.keys, self.values = like.new_zeros(shape), like.new_zeros(shape)  # what is masked must still be a number

    def append(self, start: int | Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store the positions that `start` lists; return everything, later positions included."""
        assert isinstance(start, Tensor)
        self.keys.index_copy_(2, start, k)
        self.values.index_copy_(2, start, v)
        return self.keys, self.values


def layers_replaced(model: nn.Module, home: str) -> bool:
    """Return whether a layer may do something else than the code in `home`, a module's name, or simple ones of PyTorch.

    Some engines do not call layers.
    """
    own = nn.Linear, nn.Embedding, nn.ModuleList
    return any(
        (type(layer) not in own and type(layer).__module__ != home)
        or "forward" in vars(layer)
        or layer._forward_hooks
        or layer._forward_pre_hooks
        for layer in model.modules()
    )


def with_null_class(class_ids: Tensor, null_class: int) -> Tensor:
    """(B,) class ids → (2B,): these, then the null class B times, for guidance in one pass."""
    return torch.cat((class_ids, torch.full_like(class_ids, null_class)))


class TorchEngine(Engine):
    """The PyTorch engine: the classes, doubled with the null class if guided, and the cache of every layer.

    `model` is a `DetailFlowGPT`, which this module, below it, cannot import.
    """

    @torch.inference_mode()  # here as well, or a compiled program would meet two kinds of tensors
    def __init__(self, model: Any, class_ids: Tensor, guided: bool) -> None:
        config = model.config
        self.compiled = model.program if len(class_ids) == model.compiled_for else None
        if guided:
            class_ids = with_null_class(class_ids, config.num_classes)
        self.model, self.guided, self.class_ids = model, guided, class_ids
        self.rotation = model.tables()[0]

    @cached_property
    def caches(self) -> list[Cache]:
        """The KV cache of every layer."""
        config, kind = self.model.config, StaticCache if self.compiled else Cache
        shape = len(self.class_ids), config.heads, config.num_tokens, config.width // config.heads
        return [kind(shape, self.model.head.weight) for _ in range(config.depth)]

    @torch.inference_mode()
    def step(self, tokens: Tensor, start: int, end: int) -> Tensor:
        """(B, N) tokens, known before `start` → logits (B or 2B, end − start, K)."""
        if self.guided:
            tokens = tokens.repeat(2, 1)
        x = self.model.inputs(self.class_ids, tokens, start, end)
        rotation = self.rotation[start:end]
        if self.compiled is None:  # no mask: every new position may attend to all that is cached
            return self._logits(x, rotation, None, start)
        mask = torch.arange(self.model.config.num_tokens, device=x.device) < end
        positions = torch.arange(start, end, device=x.device)
        logits: Tensor = self.compiled(x, rotation, mask.expand(len(positions), -1), self.caches, positions)
        return logits

    @torch.inference_mode()
    def prefill(self, tokens: Tensor, end: int) -> Tensor:
        """(B, N) tokens, known before `end` → logits (B or 2B, end, K) at once; keys and values are cached."""
        if self.guided:
            tokens = tokens.repeat(2, 1)
        x = self.model.inputs(self.class_ids, tokens, 0, end)
        mask = self.model.schedule.attention_mask(end, x.device)
        if self.compiled is None:
            return self._logits(x, self.rotation[:end], mask, 0)
        mask = torch.nn.functional.pad(mask, (0, self.model.config.num_tokens - end))  # not compiled: any length
        positions = torch.arange(end, device=x.device)
        return self._logits(x, self.rotation[:end], mask, positions)

    def _logits(self, x: Tensor, rotation: Tensor, mask: Tensor | None, start: int | Tensor) -> Tensor:
        logits: Tensor = self.model.logits(x, rotation, mask, self.caches, start)
        return logits
