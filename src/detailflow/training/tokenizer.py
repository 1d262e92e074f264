"""Tokenizer training: coarse-to-fine targets, self-correction, quantization and adversarial losses (method §4)."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from detailflow import hub
from detailflow.data.images import ImageSource, open_images
from detailflow.data.loader import ImageBatches
from detailflow.data.transforms import center_crop, coarse_target, to_tensor, to_uint8
from detailflow.device import autocast, choose_device
from detailflow.errors import DetailFlowError
from detailflow.models.loading import config_from_dict, load_weights, require_same
from detailflow.models.siglip2 import initialise_encoder
from detailflow.models.tokenizer import WRONG_CANDIDATES, DetailFlowTokenizer, TokenizerConfig
from detailflow.pictures import grid
from detailflow.schedule import TokenSchedule, require_not_negative, require_positive, require_shares
from detailflow.storage import replacing
from detailflow.training.loop import PRECISIONS, LoopConfig, has_checkpoint, run
from detailflow.training.losses import (
    discriminator_loss,
    generator_loss,
    perceptual_loss,
    quantization_loss,
    straight_through,
)
from detailflow.training.networks import SMALLEST_SIDE, FeatureNetwork, PatchDiscriminator, train_classifier

FEATURES_FILE = "features.pt"
CLASSIFIER_BATCH = 256
PICTURES = 8  # images in the picture of reconstructions


@dataclass(frozen=True)
class TokenizerTraining:
    """A tokenizer's training run; the defaults are the paper's where it has them (method §4).

    Attributes:
        data: a folder of images in class subfolders, parquet file(s), or a hub data set.
        init: a tokenizer to start from: a folder, hub name or zoo name; `model` must have its sizes.
        encoder_init: SigLIP2's vision tower to start the encoder from: a hub name, folder or file (method §3).
        flip, max_scale: training crops are mirrored half of the time, out of images enlarged by up to `max_scale`.
        coarse_probability: share of the steps that train fewer than all N tokens (paper table 3).
        correction_share: share of each batch that also goes through the self-correction pass.
        mistakes: planted mistakes are drawn from that many nearest codes.
        perceptual: weight of the distance of features; 0 for none. LPIPS needs downloaded weights; the features here are those
            of a classifier that is trained on the same images first, for `classifier_epochs`.
        adversarial: weight of the adversarial loss; 0 for none.
        adversarial_from: share of the steps before the discriminator starts.
        revive_every: steps after which codes that were not used since are replaced, in the first half of the run; 0 for never.
    """

    data: str
    model: TokenizerConfig
    loop: LoopConfig
    init: str | None = None
    encoder_init: str | None = None
    split: str | None = None
    image_column: str = "image"
    label_column: str = "label"
    flip: bool = True
    max_scale: float = 1.25
    coarse_probability: float = 0.2
    correction_share: float = 1.0
    mistakes: int = WRONG_CANDIDATES
    pixel: float = 1.0
    quantization: float = 1.0
    commitment: float = 0.25
    perceptual: float = 0.0
    classifier_epochs: int = 5
    adversarial: float = 0.2
    adversarial_from: float = 0.5
    revive_every: int = 100

    def __post_init__(self) -> None:
        require_positive(classifier_epochs=self.classifier_epochs, mistakes=self.mistakes)
        if self.init and self.encoder_init:
            raise DetailFlowError("init and encoder_init exclude each other: a tokenizer has an encoder already")
        require_shares(
            coarse_probability=self.coarse_probability,
            correction_share=self.correction_share,
            adversarial_from=self.adversarial_from,
        )
        require_not_negative(
            pixel=self.pixel,
            quantization=self.quantization,
            commitment=self.commitment,
            perceptual=self.perceptual,
            adversarial=self.adversarial,
            revive_every=self.revive_every,
        )
        if not 1 <= self.max_scale < float("inf"):
            raise DetailFlowError(f"max_scale must be 1 (no zoom) or more, not {self.max_scale!r}")
        if self.perceptual and self.model.image_size < SMALLEST_SIDE:
            raise DetailFlowError(f"the perceptual loss needs an image_size of {SMALLEST_SIDE} or more: set perceptual to 0")


def draw_count(schedule: TokenSchedule, coarse_probability: float) -> int:
    """t, the number of tokens that one step trains: N, or now and then a smaller count (method §4.1)."""
    n, g = schedule.num_tokens, schedule.group_size
    if n == g or float(torch.rand(())) >= coarse_probability:
        return n
    t = int(torch.randint(1, n - g + 1, ()))
    return t if t <= schedule.prefix else -(-t // g) * g


def draw_position(schedule: TokenSchedule, t: int, generator: torch.Generator | None = None) -> int | None:
    """p, where mistakes are planted for a step that trains t tokens; `None` where nothing would come after (method §4.2)."""
    last = t if t <= schedule.prefix else t - schedule.group_size
    if t == 1:
        return None
    return schedule.group_start(int(torch.randint(last, (), generator=generator)))


class TokenizerStage:
    """The networks, optimisers and one step of tokenizer training; a `Stage` of the loop."""

    def __init__(self, config: TokenizerTraining, source: ImageSource, output: Path, device: torch.device) -> None:
        loop = config.loop
        self.config, self.source, self.device = config, source, device
        self.precision = PRECISIONS[loop.precision]
        self.features = feature_network(config, source, output, device) if config.perceptual else None
        torch.manual_seed(loop.seed)
        self.model = initial_tokenizer(config, resuming=has_checkpoint(output)).to(device).train()
        self.discriminator = PatchDiscriminator().to(device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=loop.learning_rate, betas=(0.9, 0.95), fused=True)
        self.judge = torch.optim.Adam(self.discriminator.parameters(), lr=loop.learning_rate, betas=(0.9, 0.95), fused=True)
        self.used = torch.zeros(config.model.codebook_size, dtype=torch.bool, device=device)
        self.decode_full = self.model.decode_quantized
        if loop.compile:
            encoder = self.model.encoder
            encoder.patches = torch.compile(encoder.patches, dynamic=False)  # type: ignore[method-assign]
            encoder.queries = torch.compile(encoder.queries, dynamic=False)  # type: ignore[method-assign]
            self.decode_full = torch.compile(self.decode_full, dynamic=False)

    def batches(self, start_step: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Crops and their labels."""
        return iter(crops(self.config, self.source, self.config.loop.batch_size, start_step))

    def step(self, step: int, batch: tuple[Tensor, Tensor], rate: float) -> dict[str, Tensor]:
        """One step of method §4."""
        config, schedule = self.config, self.model.schedule
        for optimizer in (self.optimizer, self.judge):
            for group in optimizer.param_groups:
                group["lr"] = rate
        images = batch[0].to(self.device)
        t = draw_count(schedule, config.coarse_probability)
        position = draw_position(schedule, t)
        side = schedule.decode_size(t)
        target = coarse_target(images, schedule.resolution(t), side)
        with autocast(self.device, self.precision):
            z, quantized, corrected = self._encode(images, position)
            decode = self.decode_full if t == schedule.num_tokens else self.model.decode_quantized
            pixels = decode(torch.cat([q[:, :t] for q in quantized]), side).float()
        losses = {"pixel": F.mse_loss(pixels, torch.cat((target, target[:corrected])))}
        losses["quantization"] = self._quantization(z)
        wide, wide_target = self._full_size(pixels), self._full_size(target)
        if self.features is not None:
            losses["perceptual"] = self._perceptual(wide, wide_target, corrected)
        adversarial = config.adversarial > 0 and step >= config.adversarial_from * config.loop.steps
        if adversarial:
            self.discriminator.requires_grad_(False)
            losses["adversarial"] = generator_loss(self._judge(wide))
        total = sum((getattr(config, name) * value for name, value in losses.items()), torch.zeros((), device=self.device))
        self.optimizer.zero_grad()
        total.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.loop.grad_clip)
        self.optimizer.step()
        scalars = {
            "loss": total.detach(),
            "psnr": self._psnr(pixels[: len(images)], target),
            **losses,
            "gradient_norm": norm,
        }
        if adversarial:
            scalars["discriminator"] = self._train_discriminator(wide_target, wide[: len(images)].detach())
        scalars["codebook_usage"] = self.used.float().mean()
        self._revive(step, z[0][0].detach())
        return scalars

    def _encode(self, images: Tensor, position: int | None) -> tuple[list[tuple[Tensor, Tensor]], list[Tensor], int]:
        """→ (latents, codes) pairs for the quantization loss, the sequences to decode, and how many images were corrected."""
        model, n = self.model, self.config.model.num_tokens
        patches = model.encode_patches(images)
        z = model.encode_latents(patches, n)
        ids = model.quantizer.nearest(z)
        self.used[ids.flatten()] = True
        codes = model.quantizer.lookup(ids)
        clean = straight_through(z, codes)
        count = 0 if position is None else round(self.config.correction_share * len(images))
        if position is None or not count:
            return [(z, codes)], [clean], 0
        end = model.span(position)
        given = ids[:count].clone()
        given[:, position:end] = wrong = model.plant_mistakes(z[:count, position:end].detach(), self.config.mistakes)
        corrected = model.correct_latents([(k[:count], v[:count]) for k, v in patches], given, end)[:, end:]
        corrected_codes = model.quantizer.lookup(model.quantizer.nearest(corrected))
        sequence = torch.cat(
            (
                clean[:count, :position],
                model.quantizer.lookup(wrong).detach(),
                straight_through(corrected, corrected_codes),
            ),
            1,
        )
        return [(z, codes), (corrected, corrected_codes)], [clean, sequence], count

    def _quantization(self, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
        """The passes' losses, weighted by their token counts."""
        total = sum(z.numel() for z, _ in pairs)
        terms = [quantization_loss(z, q, self.config.commitment) * (z.numel() / total) for z, q in pairs if z.numel()]
        return torch.stack(terms).sum()

    def _full_size(self, pixels: Tensor) -> Tensor:
        side = self.config.model.image_size
        return pixels if pixels.shape[-1] == side else F.interpolate(pixels, (side, side), mode="bilinear", align_corners=False)

    def _perceptual(self, pixels: Tensor, target: Tensor, corrected: int) -> Tensor:
        assert self.features is not None
        with autocast(self.device, self.precision):
            with torch.no_grad():
                wanted = self.features.features(target)
            made = self.features.features(pixels)
        return perceptual_loss(made, [torch.cat((w, w[:corrected])) for w in wanted])

    def _judge(self, pixels: Tensor) -> Tensor:
        with autocast(self.device, self.precision):
            return self.discriminator(pixels).float()

    def _train_discriminator(self, real: Tensor, fake: Tensor) -> Tensor:
        self.discriminator.requires_grad_(True)
        loss = discriminator_loss(self._judge(real), self._judge(fake))
        self.judge.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.discriminator.parameters(), self.config.loop.grad_clip)
        self.judge.step()
        return loss.detach()

    @torch.no_grad()
    def _revive(self, step: int, z: Tensor) -> None:
        """Move codes that nothing was near to since the last time to latents of this batch."""
        every, loop = self.config.revive_every, self.config.loop
        if not every or (step + 1) % every:
            return
        if step < loop.steps // 2:
            dead = (~self.used).nonzero()[:, 0]
            pool = z.reshape(-1, z.shape[-1]).float()
            chosen = torch.randint(len(pool), (len(dead),)).to(pool.device)
            self.model.quantizer.codebook[dead] = pool[chosen]
        self.used.zero_()

    @staticmethod
    def _psnr(pixels: Tensor, target: Tensor) -> Tensor:
        return 10 * torch.log10(4 / F.mse_loss(pixels.detach().clamp(-1, 1), target).clamp_min(1e-10))

    def state(self) -> dict[str, Any]:
        """Weights, optimisers and the codebook's usage."""
        parts = ("model", "discriminator", "optimizer", "judge")
        return {"used": self.used, **{name: getattr(self, name).state_dict() for name in parts}}

    def restore(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""
        self.used.copy_(state["used"])
        for name in ("model", "discriminator", "optimizer", "judge"):
            getattr(self, name).load_state_dict(state[name])

    @torch.no_grad()
    def pictures(self) -> dict[str, Image.Image]:
        """The first images of the data, and what 1, c/2, c, N/2 and N tokens make of them."""
        size, schedule = self.config.model.image_size, self.model.schedule
        originals = [center_crop(image, size) for image in islice(readable(self.source), PICTURES)]
        images = torch.stack([to_tensor(o) for o in originals]).to(self.device)
        self.model.eval()
        ids = self.model.encode(images)
        counts = sorted(
            {1, schedule.prefix // 2, schedule.prefix, schedule.num_tokens // 2, schedule.num_tokens} & set(schedule.valid_counts)
        )
        columns = [to_uint8(self._full_size(self.model.decode(ids[:, :n]).float())).cpu().numpy() for n in counts]
        self.model.train()
        rows = [Image.fromarray(a) for i, o in enumerate(originals) for a in (o, *(c[i] for c in columns))]
        return {"reconstructions": grid(rows, columns=len(counts) + 1)}

    def export(self, directory: Path) -> None:
        """Write the tokenizer."""
        self.model.save_pretrained(directory)


def initial_tokenizer(config: TokenizerTraining, resuming: bool = False) -> DetailFlowTokenizer:
    """The network that training begins with; where it resumes, nothing is read that a checkpoint then replaces.

    Raises:
        DetailFlowError: if the weights to start from can't be had or don't fit.
    """
    model = DetailFlowTokenizer(config.model)
    if config.init and not resuming:
        settings, tensors = hub.load(config.init, "tokenizer", dtype=torch.float32)
        keys = ("encoder", "decoder", "patch_size", "num_tokens", "codebook_size", "codebook_dim")
        require_same(config.model, config_from_dict(TokenizerConfig, settings, config.init), keys, config.init)
        load_weights(model, tensors, config.init)
    elif config.encoder_init and not resuming:
        initialise_encoder(model.encoder, config.encoder_init)
    return model


def readable(source: ImageSource) -> Iterator[Image.Image]:
    """The images in order, without those that can't be read."""
    for index in range(len(source)):
        with suppress(DetailFlowError):
            yield source.image(index)


def crops(config: TokenizerTraining, source: ImageSource, batch_size: int, start_step: int = 0) -> ImageBatches:
    """The stream of training crops."""
    size, loop = config.model.image_size, config.loop
    return ImageBatches(source, size, batch_size, loop.seed, loop.workers, start_step, config.flip, config.max_scale)


def feature_network(config: TokenizerTraining, source: ImageSource, output: Path, device: torch.device) -> FeatureNetwork:
    """The frozen classifier behind the perceptual loss: trained here, once, and kept in the run's folder."""
    network = FeatureNetwork(len(source.class_names)).to(device)
    path = output / FEATURES_FILE
    if not path.exists():
        from tqdm import tqdm

        torch.manual_seed(config.loop.seed)
        batches = crops(config, source, min(CLASSIFIER_BATCH, len(source)))
        steps = config.classifier_epochs * batches.steps_per_epoch
        with tqdm(batches, total=steps, desc="features", unit="step", dynamic_ncols=True) as bar:
            accuracy = train_classifier(network, bar, steps, PRECISIONS[config.loop.precision], device)
        print(f"feature network: {accuracy:.1%} of the last training images recognised")
        with replacing(path) as temporary:
            torch.save(network.state_dict(), temporary)
    network.load_state_dict(torch.load(path, map_location=device, weights_only=True))
    return network.eval().requires_grad_(False)


def train_tokenizer(config: TokenizerTraining, output: Path, device: str | None = None) -> None:
    """Train a tokenizer into `output`: config.json, model.safetensors, checkpoints, pictures, TensorBoard scalars.

    Raises:
        DetailFlowError: for images that can't be read or have no labels for the perceptual loss to learn from, or an output
            folder that can't be used.
    """
    place = choose_device(device)
    source = open_images(config.data, config.split, config.image_column, config.label_column)
    if config.perceptual and len(source.class_names) < 2:
        raise DetailFlowError(
            "the perceptual loss learns its features from class labels, and these images have one class only: set perceptual to 0"
        )
    run(lambda: TokenizerStage(config, source, output, place), "tokenizer", config, output)
