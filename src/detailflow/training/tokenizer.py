"""Tokenizer training: coarse-to-fine targets, self-correction, quantization and adversarial losses (docs/method.md#losses)."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from detailflow.data.batches import StreamedBatches
from detailflow.data.images import ImageSource
from detailflow.data.streams import StreamSource
from detailflow.data.transforms import center_crop, coarse_target, to_tensor, to_uint8
from detailflow.device import autocast
from detailflow.distributed import World, launched
from detailflow.errors import DetailFlowError
from detailflow.models.growing import grow_tokenizer
from detailflow.models.loading import load_weights
from detailflow.models.siglip2 import initialise_encoder
from detailflow.models.tokenizer import DetailFlowTokenizer, usage_and_perplexity
from detailflow.pictures import grid
from detailflow.psnr import psnr
from detailflow.schedule import TokenSchedule
from detailflow.training.adversary import Adversary, Draws
from detailflow.training.config import CLASSIFIER, NETWORKS, PRECISIONS, TokenizerTraining
from detailflow.training.inputs import Input, files_input, images_input, model_input
from detailflow.training.loop import run
from detailflow.training.losses import alignment_loss, quantization_loss, straight_through
from detailflow.training.optimizer import Updater, gradients_stay, recompute_activations
from detailflow.training.teachers import crops, find_teachers, open_source

PICTURES = 8  # images in the pictures of reconstructions
COUNT_STEPS = 100  # after which the uses of codes are counted anew, where no codes are replaced


class AlignmentHead(nn.Sequential):
    """From the first token's code to what a teacher says of the whole image: (B, d) → (B, width) (docs/method.md#losses)."""

    def __init__(self, d: int, width: int, hidden: int = 1024) -> None:
        super().__init__(
            nn.Linear(d, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, width)
        )


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


class TokenizerStage:
    """The networks, optimisers and one step of tokenizer training; a `Stage` of the loop.

    Without `load`, networks that would be read or downloaded have random weights: that is enough to plan a run.
    """

    def __init__(
        self,
        config: TokenizerTraining,
        source: ImageSource | StreamSource,
        output: Path,
        device: torch.device,
        resuming: bool = False,
        world: World | None = None,
        load: bool = True,
    ) -> None:
        loop, world = config.loop, world or World()
        self.config, self.source, self.device, self.world = config, source, device, world
        self.precision = PRECISIONS[loop.precision]
        torch.manual_seed(loop.seed)
        self.model = initial_tokenizer(config, resuming).to(device).train()
        self.adversary: Adversary | None = None
        if config.adversarial:
            regularisers = (config.augment, config.lecam, config.consistency)
            self.adversary = Adversary(config.adversarial_network, loop, *regularisers, device, world, load)
        self.teachers = find_teachers(config, source, output, device, world, load)  # last, as it may train one
        torch.manual_seed(loop.seed)
        self.networks = TokenizerNetworks(self.model, config.mistakes, self.teachers.width).to(device)
        self.updater = Updater(tokenizer_optimizers(self.networks, config), loop, device)
        self.counts = torch.zeros(
            config.model.codebook_size, device=device
        )  # of each code's uses since they were last set to 0
        if loop.checkpoint_activations:
            recompute_activations(self.blocks)
        if loop.compile:
            encoder = self.model.encoder
            encoder.patches = torch.compile(encoder.patches, dynamic=False)  # type: ignore[method-assign]
            encoder.queries = torch.compile(encoder.queries, dynamic=False)  # type: ignore[method-assign]
            self.networks.decode_full = torch.compile(self.networks.decode_full, dynamic=False)
        self.shown: np.ndarray | None = None
        self.passes: nn.Module = self.networks
        if world.size > 1:  # a step leaves out what fewer tokens or no correction don't need
            self.passes = DistributedDataParallel(self.networks, find_unused_parameters=True)

    @property
    def blocks(self) -> list[nn.Module]:
        """The layers that `checkpoint_activations` is about."""
        return [*self.model.encoder.blocks, *self.model.decoder.blocks]

    def batches(self, start_step: int) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's crops, as bytes (B, R, R, 3), and their labels."""
        config = self.config
        return crops(config, self.source, config.loop.batch_size, start_step, self.world).as_bytes()

    def step(self, step: int, batch: tuple[Tensor, Tensor], rate: float) -> dict[str, Tensor | float]:
        """One step (docs/method.md#coarse-targets)."""
        config, schedule = self.config, self.model.schedule
        t = draw_count(schedule, config.coarse_probability)
        present = None
        if t == schedule.num_tokens and config.nested_probability and float(torch.rand(())) < config.nested_probability:
            present = draw_present(schedule, config.loop.batch_size)[self.world.shard(config.loop.batch_size)].to(
                self.device
            )
        position = draw_position(schedule, t) if present is None else None
        choice = None
        if position is not None:
            candidates = min(config.mistakes, config.model.codebook_size)
            drawn = torch.randint(candidates, (config.loop.batch_size, self.model.span(position) - position))
            choice = drawn[self.world.shard(len(drawn))]
        images = to_tensor(batch[0].to(self.device, non_blocking=True))
        adversarial = self.adversary is not None and step >= count_of_steps(config.adversarial_from, config.loop.steps)
        draws = None
        if adversarial and present is None:
            draws = Draws.make(config.loop.batch_size).of(self.world.shard(config.loop.batch_size))
        size = config.loop.images_at_once(self.world)
        first = self.world.shard(config.loop.batch_size).start  # of the whole batch, a share of which is corrected
        logged: dict[str, Tensor | float] = {}
        latents, judged = [], []
        for start in range(0, len(images), size):
            part = slice(start, start + size)
            some = None
            if choice is not None:
                before, after = (round(config.correction_share * (first + end)) for end in (start, start + size))
                some = choice[part][: after - before].to(self.device)
            with gradients_stay(self.passes, start + size < len(images)):
                made, losses, pair = self._losses(
                    step,
                    images[part],
                    t,
                    position,
                    some,
                    draws and draws.of(part),
                    None if present is None else present[part],
                )
                total = sum((weight * loss for weight, loss in losses.values()), torch.zeros((), device=self.device))
                self.updater.backward(total * (size / len(images)))
            name = "psnr" if present is None else "psnr_nested"
            terms = {
                "loss": total,
                name: psnr(made.pixels[:size].clamp(-1, 1), pair[0], peak=2).mean(),
                **{k: v for k, (_, v) in losses.items()},
            }
            for name, value in terms.items():
                logged[name] = logged.get(name, 0.0) + value.detach() * (size / len(images))
            latents.append(made.latents[0].detach())
            ids = made.ids.flatten()
            used = torch.zeros_like(self.counts).index_add_(0, ids, torch.ones_like(ids, dtype=torch.float32))
            self.counts += self.world.all_reduce(used)
            if draws is not None:
                judged.append((*pair[1:], draws.of(part)))
        logged["gradient_norm"] = norm = self.updater.step(rate)
        if self.adversary and judged:
            logged |= self.adversary.step(judged, rate)
        logged["codebook_usage"], logged["codebook_perplexity"] = usage_and_perplexity(self.counts)
        if math.isfinite(norm):
            self._revive(step, torch.cat(latents))
        return logged

    def _losses(
        self,
        step: int,
        images: Tensor,
        t: int,
        position: int | None,
        choice: Tensor | None,
        draws: Draws | None,
        present: Tensor | None = None,
    ) -> tuple[Passes, dict[str, tuple[float, Tensor]], tuple[Tensor, Tensor, Tensor]]:
        """What the networks made, (weight, value) of each term (docs/method.md#losses), and the target, which follows again with
        the reconstruction as the discriminator sees them.
        """
        config, schedule, teachers = self.config, self.model.schedule, self.teachers
        target = coarse_target(images, schedule.resolution(t), schedule.decode_size(t))
        with autocast(self.device, self.precision):
            made: Passes = self.passes(images, t, position, choice, present)
        pixels, corrected = made.pixels, made.corrected
        losses = {
            "pixel": (config.pixel, F.mse_loss(pixels, torch.cat((target, target[:corrected])))),
            "quantization": (config.quantization, self._quantization(made)),
        }
        if config.perceptual and present is None:
            rising = count_of_steps(config.perceptual_warmup, config.loop.steps)
            weight = config.perceptual * min(1.0, step / rising if rising else 1.0)
            seen, wanted = (pixels, target) if teachers.lpips else (self._full_size(pixels), self._full_size(target))
            with autocast(self.device, self.precision):
                losses["perceptual"] = (weight, teachers.distance(seen, wanted, corrected))
        if made.summary is not None and teachers.alignment is not None:
            with autocast(self.device, self.precision):
                wanted = teachers.alignment.alignment_target(images)
            losses["alignment"] = (config.alignment, alignment_loss(made.summary, wanted))
        real, fake = target, pixels
        if self.adversary and draws is not None:
            if not self.adversary.any_side:
                real, fake = self._full_size(target), self._full_size(pixels)
            losses["adversarial"] = (config.adversarial, self.adversary.generator_loss(fake, draws))
        return made, losses, (target, real, fake.detach())

    def _quantization(self, made: Passes) -> Tensor:
        """The passes' losses, weighted by their token counts."""
        total = sum(z.numel() for z in made.latents)
        pairs = zip(made.latents, made.codes, strict=True)
        terms = [quantization_loss(z, q, self.config.commitment) * (z.numel() / total) for z, q in pairs if z.numel()]
        return torch.stack(terms).sum()

    def _full_size(self, pixels: Tensor) -> Tensor:
        side = self.config.model.image_size
        return (
            pixels
            if pixels.shape[-1] == side
            else F.interpolate(pixels, (side, side), mode="bilinear", align_corners=False)
        )

    @torch.no_grad()
    def _revive(self, step: int, z: Tensor) -> None:
        """Move codes that nothing was near to since the last time to latents of this step; count anew from time to time."""
        every, loop = self.config.revive_every, self.config.loop
        if (step + 1) % (every or COUNT_STEPS):
            return
        if every and step < loop.steps // 2:
            dead = (self.counts == 0).nonzero()[:, 0]
            pool = self.world.all_gather(z).flatten(0, -2).float()
            chosen = torch.randint(len(pool), (len(dead),)).to(pool.device)
            self.model.quantizer.codebook[dead] = pool[chosen]
        self.counts.zero_()

    def state(self) -> dict[str, Any]:
        """Weights, optimisers and the codebook's usage."""
        adversary = self.adversary.state() if self.adversary else {}
        networks = self.networks.state_dict()
        return {"networks": networks, "updater": self.updater.state(), "counts": self.counts, "adversary": adversary}

    def model_config(self) -> dict[str, Any]:
        """The tokenizer's config."""
        return asdict(self.model.config)

    def restore(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""
        self.networks.load_state_dict(state["networks"])
        self.updater.restore(state["updater"])
        self.counts.copy_(state["counts"])
        if self.adversary:
            self.adversary.restore(state["adversary"])

    @torch.no_grad()
    def pictures(self) -> dict[str, Image.Image]:
        """Images spread over the data: what 1, c/2, c, N/2 and N tokens make of them, and what planted mistakes do.

        In the latter the columns are the original, all tokens, mistakes at the first token alone, the tokens after it
        corrected, mistakes in the first whole group alone, corrected.
        """
        if not self.world.is_main:
            return {}
        schedule = self.model.schedule
        if self.shown is None:
            self.shown = some_images(self.source, self.config.model.image_size)
        originals, images = self.shown, to_tensor(self.shown).to(self.device)
        self.model.eval()
        ids = self.model.encode(images)
        counts = sorted(
            {1, schedule.prefix // 2, schedule.prefix, schedule.num_tokens // 2, schedule.num_tokens}
            & set(schedule.valid_counts)
        )
        by_count = [self._full_size(self.model.decode(ids[:, :n]).float()) for n in counts]
        mistaken, captions = [self.model.decode(ids)], [_tokens(schedule.num_tokens)]
        for position in sorted({0, schedule.prefix if schedule.prefix < schedule.num_tokens else 0}):
            end = schedule.span_end(position)
            z = self.model.encode_latents(self.model.encode_patches(images), schedule.num_tokens)[:, position:end]
            corrected = self.model.encode_correction(
                images, position=position, wrong_tokens=self.model.plant_mistakes(z, self.config.mistakes)
            )
            alone = torch.cat((corrected[:, :end], ids[:, end:]), 1)
            mistaken += [self.model.decode(alone), self.model.decode(corrected)]
            wrong = f"token {end} wrong" if end == position + 1 else f"tokens {position + 1}-{end} wrong"
            captions += [wrong, f"{wrong}\nlater ones corrected"]
        self.model.train()
        return {
            "reconstructions": _table(originals, by_count, [_tokens(n) for n in counts]),
            "mistakes": _table(originals, mistaken, captions),
        }

    def export(self, directory: Path) -> None:
        """Write the tokenizer."""
        if self.world.is_main:
            self.model.save_pretrained(directory)


def some_images(source: ImageSource | StreamSource, size: int) -> np.ndarray:
    """Return (≤ PICTURES, size, size, 3) bytes: the centres of images spread over the set, or the first of a stream."""
    if isinstance(source, StreamSource):
        images, _ = next(iter(StreamedBatches(source, size, PICTURES, 0, flip=False, max_scale=1.0, buffer=PICTURES)))
        return to_uint8(images).numpy()
    return np.stack([center_crop(image, size) for image in source.some(PICTURES)])


def _tokens(count: int) -> str:
    return f"{count} token{'s' if count > 1 else ''}"


def _table(originals: np.ndarray, columns: Sequence[Tensor], captions: Sequence[str]) -> Image.Image:
    """Lay out a row of pictures for each image: the original, then one of each (B, 3, R, R) with its caption."""
    made = [to_uint8(column.float()).cpu().numpy() for column in columns]
    rows = [Image.fromarray(a) for i, o in enumerate(originals) for a in (o, *(c[i] for c in made))]
    return grid(rows, len(made) + 1, ["original", *captions] * len(originals))


def tokenizer_optimizers(networks: TokenizerNetworks, config: TokenizerTraining) -> list[torch.optim.Optimizer]:
    """Adam for all weights (Sec. 3.4), or Muon for the matrices of the blocks and Adam for the rest."""
    rate, parts = config.loop.learning_rate, (networks.model.encoder.blocks, networks.model.decoder.blocks)
    matrices = [p for part in parts for p in part.parameters() if p.ndim == 2] if config.muon else []
    taken = {id(p) for p in matrices}
    others = [p for p in networks.parameters() if id(p) not in taken]
    optimizers: list[torch.optim.Optimizer] = [torch.optim.Adam(others, lr=rate, betas=(0.9, 0.95), fused=True)]
    if matrices:
        muon = torch.optim.Muon(
            matrices, lr=config.muon, weight_decay=0.0, momentum=0.95, adjust_lr_fn="match_rms_adamw"
        )
        optimizers.append(muon)
    return optimizers


def count_of_steps(value: float, steps: int) -> float:
    """A number of steps that is given as such, or below 1 as a share of all."""
    return value if value >= 1 else value * steps


def initial_tokenizer(config: TokenizerTraining, resuming: bool = False) -> DetailFlowTokenizer:
    """The network that training begins with; where it resumes, nothing is read that a checkpoint then replaces.

    Raises:
        DetailFlowError: if the weights to start from cannot be had or don't fit.
    """
    model = DetailFlowTokenizer(config.model)
    if config.init and not resuming:
        start = DetailFlowTokenizer.from_pretrained(config.init, device="cpu")
        load_weights(model, grow_tokenizer(start.state_dict(), start.config, model, config.init), config.init)
    elif config.encoder_init and not resuming:
        initialise_encoder(model.encoder, config.encoder_init)
    return model


def _inputs(config: TokenizerTraining, source: ImageSource | StreamSource) -> dict[str, Input]:
    """Return what the settings name that is known by its content."""
    inputs = {"data": images_input(source)}
    if config.init:
        inputs["init"] = model_input(config.init, "tokenizer")
    for name in ("encoder_init", "perceptual_network", "adversarial_network", "alignment_network"):
        value = getattr(config, name)
        if value not in NETWORKS and (one := files_input(value, at_start=name == "encoder_init")):
            inputs[name] = one
    return inputs


def train_tokenizer(config: TokenizerTraining, output: Path, device: str | None = None) -> None:
    """Train a tokenizer into `output`: config.json, model.safetensors, checkpoints, pictures, TensorBoard scalars.

    Raises:
        DetailFlowError: for images that cannot be read or have no labels for the perceptual loss to learn from, or an output
            folder that cannot be used.
    """
    world, place = launched(device)
    with world.raise_together():
        source = open_source(config)
        for name in ("perceptual", "alignment"):
            if (
                getattr(config, name)
                and getattr(config, f"{name}_network") == CLASSIFIER
                and len(source.class_names) < 2
            ):
                raise DetailFlowError(
                    f"the {name} loss learns its features from class labels, and these images have one class only: "
                    f"set {name} to 0 or {name}_network to another"
                )

    def make(resuming: bool) -> TokenizerStage:
        return TokenizerStage(config, source, output, place, resuming, world)

    run(make, "tokenizer", config, output, world, _inputs(config, source))
