"""The forward passes of a step of tokenizer training, and what it draws (Sec. 3.2, 3.3)."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from detailflow.models.tokenizer import DetailFlowTokenizer
from detailflow.schedule import TokenSchedule
from detailflow.training.adversary import AugmentationNoise
from detailflow.training.losses import straight_through

# --- what a step draws (docs/method.md#coarse-targets, #self-correction) ---------------------------------------------


def draw_count(schedule: TokenSchedule, coarse_probability: float) -> int:
    """Draw t, the number of tokens that one step trains: N, or now and then fewer."""
    n, g = schedule.num_tokens, schedule.group_size
    if n == g or float(torch.rand(())) >= coarse_probability:
        return n
    t = int(torch.randint(1, n - g + 1, ()))
    return t if t <= schedule.num_causal else -(-t // g) * g


def draw_present(schedule: TokenSchedule, count: int) -> Tensor:
    """(count, N) bool: for each image its first 1, 2, 4, … tokens (nested dropout, docs/method.md#beyond-the-paper)."""
    powers = torch.tensor(schedule.stages()[:-1])
    kept = powers[torch.randint(len(powers), (count,))]
    return torch.arange(schedule.num_tokens) < kept[:, None]


def draw_position(schedule: TokenSchedule, t: int, generator: torch.Generator | None = None) -> int | None:
    """Draw p, at which a step of t tokens plants mistakes; `None` if nothing would come after."""
    if t == schedule.valid_counts[0]:
        return None
    last = t if t <= schedule.num_causal else t - schedule.group_size
    return schedule.group_start(int(torch.randint(last, (), generator=generator)))


class Draw(NamedTuple):
    """What is random in one step, for B images."""

    t: int  # tokens that are decoded
    present: Tensor | None  # (B, N) bool for nested dropout: those of them that each image is decoded from
    position: int | None  # p, the first planted mistake
    choice: Tensor | None  # (b ≤ B, mistakes), which of the nearest codes each mistake is; for the first b images
    views: AugmentationNoise | None  # how the discriminator augments images

    def part(self, images: slice, num_corrected: int) -> "Draw":
        """Return the draw of some images; the first few go through the self-correction pass."""
        present = None if self.present is None else self.present[images]
        choice = None if self.choice is None else self.choice[images][:num_corrected]
        return Draw(self.t, present, self.position, choice, self.views and self.views.of(images))


# --- the networks and both passes ------------------------------------------------------------------------------------


class AlignmentHead(nn.Sequential):
    """From the first token's code to a teacher's features of the whole image: (B, d) → (B, width)."""

    def __init__(self, d: int, width: int, hidden: int = 1024) -> None:
        super().__init__(
            nn.Linear(d, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, width)
        )


class Encoded(NamedTuple):
    """The clean pass and, if mistakes are planted, the self-correction pass: lists of one or two."""

    latents: list[Tensor]  # (B, N, d), and (b, N − end, d) after the mistakes; none from a frozen encoder
    codes: list[Tensor]  # nearest to them
    sequences: list[Tensor]  # (B, N, d) and (b, N, d) to decode: the straight-through codes, and the given ones
    ids: Tensor  # (B, N), the clean codes


class Passes(NamedTuple):
    """The output of `TokenizerNetworks.forward`: latents, codes and ids as in `Encoded`, and what is made of them."""

    pixels: Tensor  # (B + b, 3, D(t), D(t)): from the clean sequences, and from the corrected ones
    latents: list[Tensor]
    codes: list[Tensor]
    ids: Tensor
    summary: Tensor | None  # (B, width), the alignment head's output

    @property
    def corrected(self) -> int:
        """How many images went through the self-correction pass."""
        return len(self.pixels) - len(self.ids)


class TokenizerNetworks(nn.Module):
    """All that learns together, and one step's passes through it as one call, as DistributedDataParallel asks for."""

    def __init__(
        self, model: DetailFlowTokenizer, mistakes: int, teacher_width: int | None, frozen: bool = False
    ) -> None:
        super().__init__()
        self.model, self.mistakes, self.frozen = model, mistakes, frozen
        self.head = None if teacher_width is None else AlignmentHead(model.config.codebook_dim, teacher_width)
        self.full_canvas = model.decoder.canvas

    def forward(self, images: Tensor, draw: Draw, rows: tuple[Tensor, Tensor] | None = None) -> Passes:
        """Run both passes on (B, 3, R, R) pixels and decode the first t tokens.

        Args:
            rows: codes from a token store in place of the passes, clean (B, N) and corrected (b, N).
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            if rows is None:
                encoded = self.encode(images, draw.position, draw.choice)
            else:
                encoded = Encoded([], [], [self.model.quantizer.lookup(ids) for ids in rows], rows[0])
        model, t = self.model, draw.t
        side, sequences = model.schedule.decode_size(t), torch.cat([s[:, :t] for s in encoded.sequences])
        canvas = model.decoder.canvas
        if draw.present is None and t == model.config.num_tokens:
            canvas = self.full_canvas
        pixels = model.decoder.picture(canvas(sequences, side, side, draw.present), side, side)
        summary = None if self.head is None else self.head(encoded.sequences[0][:, 0])
        latents, codes = ([], []) if self.frozen else (encoded.latents, encoded.codes)
        return Passes(pixels.float(), latents, codes, encoded.ids, summary)

    def encode(self, images: Tensor, position: int | None, choice: Tensor | None) -> Encoded:
        """Encode images, and the first `len(choice)` again with mistakes (Sec. 3.3, docs/method.md#self-correction)."""
        model = self.model
        patches = model.encode_patches(images)
        z = model.encode_latents(patches, model.config.num_tokens)
        ids = model.quantizer.nearest(z)
        codes = model.quantizer.lookup(ids)
        clean = straight_through(z, codes)
        if position is None or choice is None or not len(choice):
            return Encoded([z], [codes], [clean], ids)
        count, end = len(choice), model.schedule.check_span(position)
        wrong = choice  # of all codes, in whatever order
        if self.mistakes < model.config.codebook_size:
            near = model.quantizer.nearest_k(z[:count, position:end].detach(), self.mistakes)
            wrong = near.gather(-1, choice[..., None])[..., 0]
        given = ids[:count].clone()
        given[:, position:end] = wrong
        corrected = model.correct_latents(patches.first(count), given, end)[:, end:]
        corrected_codes = model.quantizer.lookup(model.quantizer.nearest(corrected))
        planted = model.quantizer.lookup(wrong).detach()
        repaired = torch.cat((clean[:count, :position], planted, straight_through(corrected, corrected_codes)), 1)
        return Encoded([z, corrected], [codes, corrected_codes], [clean, repaired], ids)
