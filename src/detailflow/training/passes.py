"""What one step of tokenizer training draws, and its passes through the networks (docs/method.md#coarse-targets)."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from detailflow.models.tokenizer import DetailFlowTokenizer
from detailflow.schedule import TokenSchedule
from detailflow.training.losses import straight_through
from detailflow.training.networks import AlignmentHead


def draw_count(schedule: TokenSchedule, coarse_probability: float) -> int:
    """t, the number of tokens that one step trains: N, or now and then a smaller count (docs/method.md#coarse-targets)."""
    n, g = schedule.num_tokens, schedule.group_size
    if n == g or float(torch.rand(())) >= coarse_probability:
        return n
    t = int(torch.randint(1, n - g + 1, ()))
    return t if t <= schedule.prefix else -(-t // g) * g


def draw_present(schedule: TokenSchedule, count: int) -> Tensor:
    """(count, N) bool: for each image the first 1, 2, 4, … of the tokens, as many images on average with each power of two
    (nested dropout: Rippel et al. 2014; FlexTok, arXiv 2502.13967).
    """
    powers = torch.tensor([n for n in schedule.valid_counts if n < schedule.num_tokens and n.bit_count() == 1])
    kept = powers[torch.randint(len(powers), (count,))]
    return torch.arange(schedule.num_tokens) < kept[:, None]


def draw_position(schedule: TokenSchedule, t: int, generator: torch.Generator | None = None) -> int | None:
    """Draw p, where a step of t tokens plants mistakes; `None` if nothing would come after (docs/method.md#self-correction)."""
    if t == schedule.valid_counts[0]:
        return None
    last = t if t <= schedule.prefix else t - schedule.group_size
    return schedule.group_start(int(torch.randint(last, (), generator=generator)))


class Encoded(NamedTuple):
    """The clean pass and, where mistakes are planted, the self-correction pass: a list each of one or two."""

    latents: list[Tensor]  # (B, N, d), and (b, N − end, d) after the mistakes
    codes: list[Tensor]  # nearest to them
    sequences: list[Tensor]  # (B, N, d) and (b, N, d) to decode: the straight-through codes, and those given
    ids: Tensor  # (B, N), the clean codes


class Passes(NamedTuple):
    """What the networks make of a batch: see `TokenizerNetworks.forward`."""

    pixels: Tensor
    latents: list[Tensor]
    codes: list[Tensor]
    ids: Tensor
    summary: Tensor | None

    @property
    def corrected(self) -> int:
        """How many images went through the self-correction pass."""
        return len(self.latents[1]) if len(self.latents) > 1 else 0


class TokenizerNetworks(nn.Module):
    """All that learns together, and one step's passes through it as one call, as DistributedDataParallel asks for."""

    def __init__(self, model: DetailFlowTokenizer, mistakes: int, teacher_width: int | None) -> None:
        super().__init__()
        self.model, self.mistakes = model, mistakes
        self.head = None if teacher_width is None else AlignmentHead(model.config.codebook_dim, teacher_width)
        self.decode_full = model.decode_quantized

    def forward(
        self, images: Tensor, t: int, position: int | None, choice: Tensor | None, present: Tensor | None = None
    ) -> Passes:
        """Both passes, and the decoding of what they made from t tokens (docs/method.md#coarse-targets).

        Args:
            images: (B, 3, R, R) pixels in [-1, 1].
            position: where mistakes are planted, in the first `len(choice)` images; `None` for nowhere.
            choice: (b, end − position), which of the nearest codes each mistake is.
            present: (B, N), the tokens that are decoded of each image; without mistakes only.

        Returns:
            pixels (B + b, 3, D(t), D(t)); latents, codes and ids as in `Encoded`; and what the alignment's head makes of the
            first token, (B, width).
        """
        made, model = self.encode(images, position, choice), self.model
        side, sequences = model.schedule.decode_size(t), torch.cat([s[:, :t] for s in made.sequences])
        if present is not None:
            pixels = model.decode_quantized(sequences, side, present)
        elif t == model.config.num_tokens:
            pixels = self.decode_full(sequences, side)
        else:
            pixels = model.decode_quantized(sequences, side)
        summary = None if self.head is None else self.head(made.sequences[0][:, 0])
        return Passes(pixels.float(), made.latents, made.codes, made.ids, summary)

    def encode(self, images: Tensor, position: int | None, choice: Tensor | None) -> Encoded:
        """The passes alone, with the arguments of `forward`."""
        model = self.model
        patches = model.encode_patches(images)
        z = model.encode_latents(patches, model.config.num_tokens)
        ids = model.quantizer.nearest(z)
        codes = model.quantizer.lookup(ids)
        clean = straight_through(z, codes)
        if position is None or choice is None or not len(choice):
            return Encoded([z], [codes], [clean], ids)
        count, end = len(choice), model.span(position)
        near = model.quantizer.nearest_k(z[:count, position:end].detach(), self.mistakes)
        given = ids[:count].clone()
        given[:, position:end] = wrong = near.gather(-1, choice[..., None])[..., 0]
        corrected = model.correct_latents(patches.first(count), given, end)[:, end:]
        corrected_codes = model.quantizer.lookup(model.quantizer.nearest(corrected))
        planted = model.quantizer.lookup(wrong).detach()
        repaired = torch.cat((clean[:count, :position], planted, straight_through(corrected, corrected_codes)), 1)
        return Encoded([z, corrected], [codes, corrected_codes], [clean, repaired], ids)
