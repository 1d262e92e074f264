"""Tokenizer training: the objective and its optimisation (Sec. 3.4, docs/method.md#losses)."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from detailflow.data.source import ImageSource
from detailflow.data.streams import StreamSource
from detailflow.data.tokens import TokenStore
from detailflow.data.transforms import coarse_target, to_tensor
from detailflow.device import autocast, precision_dtype, to_device
from detailflow.distributed import World, launched
from detailflow.errors import DetailFlowError
from detailflow.models.growing import OF_CODES, grow_tokenizer
from detailflow.models.loading import load_weights, require_same
from detailflow.models.quantizer import usage_and_perplexity
from detailflow.models.siglip2 import initialise_encoder
from detailflow.models.tokenizer import DetailFlowTokenizer
from detailflow.psnr import psnr
from detailflow.training.adversary import Adversary, AugmentationNoise
from detailflow.training.config import CLASSIFIER, NETWORKS, PROJECTED_BOTH, TokenizerTraining, count_of_steps
from detailflow.training.counting import StepCosts, Trial, of_one_rank
from detailflow.training.images import crops, open_source
from detailflow.training.inputs import Input, files_input, images_input, model_input, tokens_input
from detailflow.training.loop import Run, train
from detailflow.training.losses import alignment_loss, quantization_loss
from detailflow.training.optimizer import Updater, muon, no_sync, recompute_activations
from detailflow.training.passes import Draw, Passes, TokenizerNetworks, draw_count, draw_position, draw_present
from detailflow.training.reconstructions import draw_reconstructions, some_images
from detailflow.training.sampled_rows import SampledRows
from detailflow.training.stored_rows import StoredRows
from detailflow.training.teachers import find_teachers
from detailflow.training.validation import sample_crops, split, tokenizer_figures

COUNT_STEPS = 100  # after which the uses of codes are counted from 0 again, if no codes are replaced
LARGEST_RATIO = 1e4  # of gradients' norms


class Objective(NamedTuple):
    """The terms of the loss, each with its weight, of what the networks made of some images."""

    terms: dict[str, tuple[float | Tensor, Tensor]]
    passes: Passes
    target: Tensor  # (B, 3, D(t), D(t))
    judged: tuple[Tensor, Tensor] | None  # real and fake images as the discriminator sees them, without gradients

    @property
    def total(self) -> Tensor:
        """The loss."""
        return torch.stack([weight * value for weight, value in self.terms.values()]).sum()


class TokenizerStage:
    """The networks, optimisers and one step of tokenizer training; a `Stage` of the loop.

    It may `start` "new", with weights from a "checkpoint" to come, which replace what a new run would read, or for a
    "plan" alone: then networks that would be read or downloaded have random weights.
    """

    def __init__(
        self,
        config: TokenizerTraining,
        source: ImageSource | StreamSource,
        output: Path,
        device: torch.device,
        start: Literal["new", "checkpoint", "plan"] = "new",
        world: World = World(),
        validation: ImageSource | None = None,
    ) -> None:
        loop, load = config.loop, start != "plan"
        self.config, self.source, self.device, self.world = config, source, device, world
        self.validation = validation
        self.validation_crops: Tensor | None = None
        self.precision, self.frozen = precision_dtype(loop.precision, device), config.freeze is not None
        torch.manual_seed(loop.seed)
        self.model = initial_tokenizer(config, start == "new").to(device).train()
        for part in (self.model.encoder, self.model.quantizer) if self.frozen else ():
            part.requires_grad_(False)
        self.rows = StoredRows(config, source, validation) if config.tokens and load else None
        self.sampled = SampledRows(config, device, world) if config.gpt and load else None
        self.adversary: Adversary | None = None
        if config.adversarial:
            self.adversary = Adversary(config, device, world, load)
        self.teachers = find_teachers(config, source, output, device, world, load)  # last, as it may train one
        if self.adversary and self.teachers.classifier:
            self.adversary.set_classifier(self.teachers.classifier)
        torch.manual_seed(loop.seed)
        self.networks = TokenizerNetworks(self.model, config.mistakes, self.teachers.width, self.frozen).to(device)
        self.updater = Updater(tokenizer_optimizers(self.networks, config), loop, device)
        self.counts = torch.zeros(config.model.codebook_size, device=device)  # uses of each code since they were reset
        if loop.checkpoint_activations:
            recompute_activations(self.blocks)
        if loop.compile:
            encoder = self.model.encoder
            encoder.patches = torch.compile(encoder.patches, dynamic=False)  # type: ignore[method-assign]
            encoder.queries = torch.compile(encoder.queries, dynamic=False)  # type: ignore[method-assign]
            # Not what follows: `_balance` goes through it twice, which a compiled function does not allow.
            self.networks.full_canvas = torch.compile(self.networks.full_canvas, dynamic=False)
        self.shown: Tensor | None = None
        self.passes: nn.Module = self.networks
        if world.size > 1:  # fewer tokens or no correction leave some parameters out of a step
            self.passes = DistributedDataParallel(self.networks, find_unused_parameters=True)

    @property
    def blocks(self) -> list[nn.Module]:
        """The layers that `checkpoint_activations` is about."""
        return [*self.model.encoder.blocks, *self.model.decoder.blocks]

    def batches(self, start_step: int) -> Iterator[tuple[Tensor, ...]]:
        """Return this rank's crops as bytes (B, R, R, 3), labels and, from a token store, rows (B, 2, N)."""
        config = self.config
        if self.rows is not None:
            return self.rows.batches(config.loop, start_step, self.world)
        return crops(config, self.source, config.loop.batch_size, start_step, self.world).as_bytes()

    def draw(self, step: int) -> Draw:
        """Draw for the whole batch, and return this process's part."""
        config, schedule, size = self.config, self.model.schedule, self.config.loop.batch_size
        shard = self.world.shard(size)
        t = draw_count(schedule, config.coarse_probability)
        present = position = choice = views = None
        if t == schedule.num_tokens and config.nested_probability and float(torch.rand(())) < config.nested_probability:
            present = to_device(draw_present(schedule, size)[shard], self.device)
        else:
            position = draw_position(schedule, t)
        if position is not None:
            candidates = min(config.mistakes, config.model.codebook_size)
            choice = torch.randint(candidates, (size, schedule.check_span(position) - position))[shard]
            choice = to_device(choice, self.device)
        if self.adversary and present is None and step >= count_of_steps(config.adversarial_from, config.loop.steps):
            views = AugmentationNoise.make(size).of(shard)
            views = views._replace(views=to_device(views.views, self.device))
        return Draw(t, present, position, choice, views)

    def step(self, step: int, batch: Sequence[Tensor], rate: float, log: bool = True) -> dict[str, Tensor | float]:
        """Take one step, in micro-batches (docs/method.md#coarse-targets)."""
        config, world = self.config, self.world
        draw, size = self.draw(step), config.loop.images_at_once(world)
        images = to_tensor(to_device(batch[0], self.device))
        stored = to_device(batch[2], self.device) if len(batch) > 2 else None
        first = world.shard(config.loop.batch_size).start  # of the whole batch, whose `correction_share` is corrected
        logged: dict[str, Tensor | float] = defaultdict(float)
        latents, judged = [], []
        with_samples = self.sampled is not None and draw.views is not None and draw.t == config.model.num_tokens
        for start in range(0, len(images), size):
            before, after = (round(config.correction_share * (first + end)) for end in (start, start + size))
            some, num_corrected = slice(start, start + size), after - before if draw.present is None else 0
            part = draw.part(some, num_corrected)
            rows = None if stored is None else (stored[some, 0], stored[some, 1][:num_corrected])
            with no_sync(self.passes, start + size < len(images) or with_samples):
                objective = self.objective(step, images[some], part, rows)
                self.updater.backward(objective.total * (size / len(images)))
            for name, value in self.scalars(objective, draw).items() if log else ():
                logged[name] = logged[name] + value.detach() * (size / len(images))
            latents += objective.passes.latents[:1]
            self._count(objective.passes.ids)
            if objective.judged is not None and part.views is not None:
                judged.append((*objective.judged, part.views))
        if with_samples:
            judged.append(self._samples_step(images, objective.terms["adversarial"][0], logged))
        logged["gradient_norm"] = norm = self.updater.step(rate)
        if self.adversary and judged:
            logged |= self.adversary.step(judged, rate)
        if log:
            logged["codebook_usage"], logged["codebook_perplexity"] = usage_and_perplexity(self.counts)
        self._revive(step, latents, norm)
        return dict(logged)

    def objective(self, step: int, images: Tensor, draw: Draw, rows: tuple[Tensor, Tensor] | None = None) -> Objective:
        """Return the whole objective: L = MSE + L_perceptual + λ · L_adversarial + L_VQ + L_alignment (Sec. 3.4).

        A frozen encoder leaves the pixels' losses; nested dropout leaves out the perceptual and the adversarial loss.
        """
        config, schedule, teachers = self.config, self.model.schedule, self.teachers
        target = coarse_target(images, schedule.resolution(draw.t), schedule.decode_size(draw.t))
        terms: dict[str, tuple[float | Tensor, Tensor]] = {}
        judged = None
        with autocast(self.device, self.precision):
            passes: Passes = self.passes(images, draw, rows)
        pixels, nested = passes.pixels, draw.present is not None
        terms["pixel"] = (config.pixel, F.mse_loss(pixels, torch.cat((target, target[: passes.corrected]))))
        if passes.latents:
            terms["quantization"] = (config.quantization, self._quantization(passes))
        if config.perceptual and not nested:
            rising = count_of_steps(config.perceptual_warmup, config.loop.steps)
            weight = config.perceptual * min(1.0, step / rising if rising else 1.0)
            seen, wanted = (pixels, target) if teachers.lpips else (self._full_size(pixels), self._full_size(target))
            with autocast(self.device, self.precision):
                terms["perceptual"] = (weight, teachers.distance(seen, wanted, passes.corrected))
        if passes.summary is not None and teachers.alignment is not None:
            with autocast(self.device, self.precision):
                features = teachers.alignment.alignment_target(images)
            terms["alignment"] = (config.alignment, alignment_loss(passes.summary, features))
        if self.adversary and draw.views is not None:
            real, fake = target, pixels
            if not self.adversary.any_side:
                real, fake = self._full_size(target), self._full_size(pixels)
            judged = real, fake.detach()
            loss = self.adversary.generator_loss(fake, draw.views)
            terms["adversarial"] = (config.adversarial, loss)
            if config.adversarial_adaptive:
                self._balance(pixels, terms)
        return Objective(terms, passes, target, judged)

    def _samples_step(
        self, images: Tensor, weight: float | Tensor, logged: dict[str, Tensor | float]
    ) -> tuple[Tensor, Tensor, AugmentationNoise]:
        """Add the gradients of rows that the AR model samples, and return what the discriminator learns from them.

        Args:
            weight: of the adversarial loss.
        """
        assert self.sampled and self.adversary
        ids, views = self.sampled.draw(), AugmentationNoise.make(self.sampled.count).of(self.sampled.shard)
        with autocast(self.device, self.precision):
            passes: Passes = self.passes(images, Draw(ids.shape[1], None, None, None, None), (ids, ids[:0]))
        anchor = self.sampled.distance(passes.pixels, ids)
        adversarial = self.adversary.generator_loss(passes.pixels, views)
        self.updater.backward((self.config.anchor * anchor + weight * adversarial) * (len(ids) / len(images)))
        logged |= {"anchor": anchor.detach(), "adversarial_sampled": adversarial.detach()}
        return images[: len(ids)], passes.pixels.detach(), views

    def _balance(self, pixels: Tensor, terms: dict[str, tuple[float | Tensor, Tensor]]) -> None:
        """Multiply the adversarial weight by the ratio of gradients (Esser et al. 2021, arXiv 2012.09841, Eq. 7).

        It is that of the pixel and perceptual losses' gradient to the adversarial loss's, by their norms at the last
        layer. Each loss is differentiated once, up to the pixels, and replaced by one that is linear in them.
        """
        last, scale = self.model.decoder.to_pixels.weight, self.updater.scaler.get_scale()
        adversarial, others = torch.zeros_like(pixels), torch.zeros_like(pixels)
        for name in filter(terms.__contains__, ("pixel", "perceptual", "adversarial")):  # a set's order is by chance
            weight, loss = terms[name]
            gradient = torch.autograd.grad(loss * scale, pixels, retain_graph=True)[0] / scale
            product = (pixels * gradient).sum()
            terms[name] = (weight, loss.detach() + (product - product.detach()))
            if name == "adversarial":
                adversarial += gradient
            else:
                others += weight * gradient
        gradients = [torch.autograd.grad(pixels, last, x, retain_graph=True)[0] for x in (others, adversarial)]
        norms = self.world.mean(torch.stack([x.float().norm() for x in gradients]))
        ratio = (norms[0] / (norms[1] + 1e-12)).clamp(max=LARGEST_RATIO)
        terms["adversarial"] = (terms["adversarial"][0] * ratio, terms["adversarial"][1])

    def scalars(self, objective: Objective, draw: Draw) -> dict[str, Tensor]:
        """Return what is logged of some images."""
        name = "psnr" if draw.present is None else "psnr_nested"
        clean = objective.passes.pixels[: len(objective.target)].clamp(-1, 1)
        scalars = {"loss": objective.total, name: psnr(clean, objective.target, peak=2).mean()}
        if self.config.adversarial_adaptive and "adversarial" in objective.terms:
            scalars["adversarial_weight"] = torch.as_tensor(objective.terms["adversarial"][0])
        return scalars | {name: value for name, (_, value) in objective.terms.items()}

    def _quantization(self, passes: Passes) -> Tensor:
        """L_VQ of both passes, weighted by their numbers of tokens."""
        total = sum(z.numel() for z in passes.latents)
        pairs = zip(passes.latents, passes.codes, strict=True)
        terms = [quantization_loss(z, q, self.config.commitment) * (z.numel() / total) for z, q in pairs if z.numel()]
        return torch.stack(terms).sum()

    def _full_size(self, pixels: Tensor) -> Tensor:
        side = self.config.model.image_size
        if pixels.shape[-1] == side:
            return pixels
        return F.interpolate(pixels, (side, side), mode="bilinear", align_corners=False)

    def _count(self, ids: Tensor) -> None:
        """Add this step's uses of codes, in all processes."""
        used = torch.zeros_like(self.counts)
        used.index_add_(0, ids.flatten(), torch.ones(ids.numel(), device=used.device))
        self.counts += self.world.all_reduce(used)

    def _counts_end(self, step: int) -> bool:
        return (step + 1) % (self.config.revive_every or COUNT_STEPS) == 0

    @torch.no_grad()
    def _revive(self, step: int, latents: Sequence[Tensor], norm: Tensor) -> None:
        """Move codes that were not used lately to latents of this step, and reset the counts, from time to time.

        A frozen encoder has no latents, and its codes stay. If the gradients' `norm` is not finite, nothing changes: to
        look at it waits for a GPU, so that is done in these steps alone.
        """
        if not self._counts_end(step) or not norm.isfinite():
            return
        if latents and self.config.revive_every and step < self.config.loop.steps // 2:
            dead = (self.counts == 0).nonzero()[:, 0]
            pool = self.world.all_gather(torch.cat([*latents]).detach()).flatten(0, -2).float()
            chosen = torch.randint(len(pool), (len(dead),)).to(pool.device)
            self.model.quantizer.codebook[dead] = pool[chosen]
        self.counts.zero_()

    @property
    def comparable_from(self) -> float:
        """The step from which on all losses are trained; the discriminator makes the others worse at first."""
        config, steps = self.config, self.config.loop.steps
        return max(
            count_of_steps(config.adversarial_from, steps) if config.adversarial else 0.0,
            count_of_steps(config.perceptual_warmup, steps) if config.perceptual else 0.0,
        )

    def validate(self) -> dict[str, float]:
        """Return the loss and PSNR of the images that are held out, from all tokens."""
        if self.validation is None:
            return {}
        if self.validation_crops is None:
            count, side = self.config.loop.val_images, self.config.model.image_size
            self.validation_crops = sample_crops(self.validation, count, side)

        def loss(pixels: Tensor, target: Tensor) -> Tensor:
            total = self.config.pixel * F.mse_loss(pixels, target)
            if self.config.perceptual:
                with autocast(self.device, self.precision):
                    total = total + self.config.perceptual * self.teachers.distance(pixels, target, 0)
            return total

        return tokenizer_figures(self.model, self.validation_crops, loss, self.world)

    def state(self) -> dict[str, Any]:
        """Return weights, optimisers and the codebook's usage."""
        adversary = self.adversary.state() if self.adversary else {}
        networks = self.networks.state_dict()
        return {"networks": networks, "updater": self.updater.state(), "counts": self.counts, "adversary": adversary}

    def model_config(self) -> dict[str, Any]:
        """Return the tokenizer's config."""
        return asdict(self.model.config)

    def restore(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""
        self.networks.load_state_dict(state["networks"])
        self.updater.restore(state["updater"])
        self.counts.copy_(state["counts"])
        if self.adversary:
            self.adversary.restore(state["adversary"])

    def pictures(self) -> dict[str, Image.Image]:
        """Draw reconstructions of held-out images, or of training images if none are held out."""
        if not self.world.is_main:
            return {}
        if self.shown is None:
            among = self.source if self.validation is None else self.validation
            self.shown = some_images(among, self.config.model.image_size)
        return draw_reconstructions(self.model, self.shown, self.config.mistakes)

    def export(self, directory: Path) -> None:
        """Write the tokenizer."""
        if self.world.is_main:
            self.model.export(directory)


def tokenizer_optimizers(networks: TokenizerNetworks, config: TokenizerTraining) -> list[torch.optim.Optimizer]:
    """Adam for all weights (Sec. 3.4), or Muon for the matrices of the blocks and Adam for the rest."""
    rate, blocks = config.loop.learning_rate, (networks.model.encoder.blocks, networks.model.decoder.blocks)
    trained = [p for p in networks.parameters() if p.requires_grad]
    others, muons = muon(trained, blocks, config.muon)
    return [torch.optim.Adam(others, lr=rate, betas=(0.9, 0.95), fused=True), *muons]


def initial_tokenizer(config: TokenizerTraining, new: bool = True) -> DetailFlowTokenizer:
    """Return the network that training begins with; a resumed run reads nothing that its checkpoint replaces."""
    model = DetailFlowTokenizer(config.model)
    if config.init and new:
        start = DetailFlowTokenizer.from_pretrained(config.init, device="cpu")
        tensors, theirs = start.state_dict(), start.config
        if config.freeze:  # or the tokens would be others
            require_same(config.model, theirs, OF_CODES, f"the tokens of {config.init} would be others")
        if config.new_decoder:
            tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("decoder.")}
            tensors |= {name: tensor for name, tensor in model.state_dict().items() if name.startswith("decoder.")}
            theirs = replace(theirs, decoder=config.model.decoder, pixel_channels=config.model.pixel_channels)
        load_weights(model, grow_tokenizer(tensors, theirs, model, config.init), config.init)
    elif config.encoder_init and new:
        initialise_encoder(model.encoder, config.encoder_init)
    return model


def _inputs(config: TokenizerTraining, source: ImageSource | StreamSource) -> dict[str, Input]:
    """Return what the settings name that is known by its content."""
    inputs = {"data": images_input(source)}
    if config.init:
        inputs["init"] = model_input(config.init, "tokenizer", at_start=not config.gpt)
    if config.gpt:  # its rows are sampled again when a run goes on
        inputs["gpt"] = model_input(config.gpt, "gpt", at_start=False)
    if config.tokens:
        inputs["tokens"] = tokens_input(TokenStore.open(config.tokens))
    for name in ("encoder_init", "perceptual_network", "adversarial_network", "alignment_network"):
        value = getattr(config, name)
        if value not in NETWORKS and (one := files_input(value, at_start=name == "encoder_init")):
            inputs[name] = one
    return inputs


def trial(
    config: TokenizerTraining, source: ImageSource | StreamSource, *, world: World, device: torch.device
) -> Trial[TokenizerStage]:
    """Return a stage of one rank and its batch, with neither data nor weights that would be read."""
    alone = replace(config, loop=of_one_rank(config.loop, world), revive_every=0)
    rows, side = alone.loop.batch_size, config.model.image_size
    return Trial(
        lambda: TokenizerStage(alone, source, Path(), device, "plan"),
        lambda: (torch.zeros(rows, side, side, 3, dtype=torch.uint8), None),
        device,
    )


def train_tokenizer(config: TokenizerTraining, output: Path, device: str | None = None) -> None:
    """Train a tokenizer into `output`: config.json, model.safetensors, checkpoints, pictures, TensorBoard scalars."""
    world, chosen = launched(device)
    with world.raise_together():
        everything = open_source(config)
        for name in ("perceptual", "alignment", "adversarial"):
            learns = getattr(config, name) and getattr(config, f"{name}_network") in (CLASSIFIER, PROJECTED_BOTH)
            if learns and len(everything.class_names) < 2:
                raise DetailFlowError(
                    f"the {name} loss learns its features from class labels, and these images have one class only: "
                    f"set {name} to 0 or {name}_network to another"
                )
        if config.tokens and world.is_main:
            TokenStore.open(config.tokens).verify()
    source, validation = split(config, everything, world)

    def make(resuming: bool) -> TokenizerStage:
        start: Literal["new", "checkpoint"] = "checkpoint" if resuming else "new"
        return TokenizerStage(config, source, output, chosen, start, world, validation)

    @cache
    def costs() -> StepCosts:
        return trial(config, source, world=world, device=chosen).costs()[0]

    def operations(step: int) -> float:
        return costs().last if step >= count_of_steps(config.adversarial_from, config.loop.steps) else costs().first

    inputs = _inputs(config, everything)
    if validation is not None and config.val_data:
        inputs["val_data"] = images_input(validation)
    train(make, Run("tokenizer", config, output, world, chosen, inputs, operations))
