"""The settings of training runs: dataclasses that validate themselves. `recipes/` has values for them."""

import math
from dataclasses import dataclass, field

import torch

from detailflow.data.transforms import ten_crops, two_crops
from detailflow.distributed import World
from detailflow.errors import DetailFlowError
from detailflow.generation import SamplingConfig
from detailflow.models.efficientnet import EFFICIENTNET
from detailflow.models.tokenizer import WRONG_CANDIDATES, TokenizerConfig
from detailflow.schedule import require_at_most, require_not_negative, require_positive, require_shares
from detailflow.seeds import check_seeds
from detailflow.training.tracking import check_trackers

CLASSIFIER = "classifier"  # in place of a network that would be downloaded
PATCH = "patch"  # the discriminator that needs no download
PROJECTED = "projected"  # the discriminator on features of EfficientNet-Lite0
NETWORKS = (CLASSIFIER, PATCH, PROJECTED, EFFICIENTNET, "lpips", "dino")  # which are no files
CROPS = {"ten": (ten_crops, 10), "two": (two_crops, 2)}
SMALLEST_FEATURES_SIDE = 8  # pixels of an image whose last map of a classifier's features is one pixel


@dataclass(frozen=True)
class LoopConfig:
    """What the two stages' runs have in common.

    Attributes:
        steps: optimiser steps of the whole run.
        batch_size: images (or token rows) per step, of all processes together.
        learning_rate: at the peak, as it is used (not per 256 images).
        warmup: share of the steps over which the rate rises linearly, from `initial_rate` (a share of the peak).
        final_rate: the rate that the cosine ends at, as a share of the peak.
        grad_clip: largest norm of a step's gradient.
        precision: "bf16" or "fp16" (autocast), or "fp32".
        accumulate: parts that each process's share of the batch is worked through in, where memory is short.
        checkpoint_activations: compute the blocks' activations again on the way back: less memory, a third more time.
        shard: part weights and optimiser among the processes (FSDP2), where the network does not fit one; AR models only.
        compile: fuse the networks with `torch.compile`: a minute of preparation for about a third more speed.
        workers: processes that decode images, for each training process.
        log_every, pictures_every: steps between log lines and between pictures.
        trackers: where the log goes: tensorboard, wandb.
        checkpoint_minutes: between checkpoints, the last `keep` of which stay, and one every `milestone_every` steps (0: none).
    """

    steps: int
    batch_size: int
    learning_rate: float
    warmup: float = 0.05
    initial_rate: float = 0.0
    final_rate: float = 0.1
    grad_clip: float = 1.0
    precision: str = "bf16"
    accumulate: int = 1
    checkpoint_activations: bool = False
    shard: bool = False
    compile: bool = False
    seed: int = 0
    workers: int = 0
    log_every: int = 20
    pictures_every: int = 500
    trackers: tuple[str, ...] = ("tensorboard",)
    checkpoint_minutes: float = 3.0
    keep: int = 2
    milestone_every: int = 0

    def __post_init__(self) -> None:
        require_positive(
            steps=self.steps,
            batch_size=self.batch_size,
            accumulate=self.accumulate,
            log_every=self.log_every,
            pictures_every=self.pictures_every,
            keep=self.keep,
        )
        if self.precision not in PRECISIONS:
            raise DetailFlowError(f"precision must be {', '.join(PRECISIONS)}, not {self.precision!r}")
        if not self.learning_rate > 0:
            raise DetailFlowError(f"learning_rate must be above 0, not {self.learning_rate!r}")
        if not 0 <= self.warmup < 1:
            raise DetailFlowError(f"warmup must be at least 0 and below 1, not {self.warmup!r}")
        require_shares(initial_rate=self.initial_rate, final_rate=self.final_rate)
        if not self.grad_clip > 0:
            raise DetailFlowError(f"grad_clip must be above 0, not {self.grad_clip!r}")
        require_at_most(1000, workers=self.workers)
        require_not_negative(
            workers=self.workers,
            checkpoint_minutes=self.checkpoint_minutes,
            milestone_every=self.milestone_every,
        )
        check_seeds(self.seed, name="seed")
        check_trackers(self.trackers)

    def images_at_once(self, world: World) -> int:
        """Of a step, those that one process works on at a time.

        Raises:
            DetailFlowError: where the batch cannot be parted evenly.
        """
        share = world.shard(self.batch_size)
        if (share.stop - share.start) % self.accumulate:
            raise DetailFlowError(
                f"accumulate must divide the images of each process, and {self.accumulate} does not divide "
                f"{share.stop - share.start} (batch_size {self.batch_size}, {world.size} process(es))"
            )
        return (share.stop - share.start) // self.accumulate

    def rate_at(self, step: int) -> float:
        """Learning rate of `step` (0-based): linear warm-up, then a cosine."""
        rising = self.warmup * self.steps
        if step < rising:
            low = self.initial_rate
            return self.learning_rate * (low + (1 - low) * (step + 1) / (rising + 1))
        progress = (step - rising) / max(self.steps - rising, 1)
        low = self.final_rate
        return self.learning_rate * (low + (1 - low) * (1 + math.cos(math.pi * progress)) / 2)


PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class TokenizerTraining:
    """A tokenizer's training run; the defaults are the paper's where it has them (docs/method.md#losses).

    Attributes:
        data: a folder of images in class subfolders, parquet file(s), WebDataset shards, or a hub data set.
        streaming: whether to read a hub data set or shards as a stream, without a copy on this machine.
        init: a tokenizer to start from: a folder, hub name or zoo name; `model` must have its sizes, but may have more tokens.
        encoder_init: SigLIP2's vision tower to start the encoder from: a hub name, folder or file (docs/method.md#tokenizer).
        freeze: "encoder" trains the decoder of `init` alone, by the losses of its pixels: the tokens keep their meaning.
        tokens: with `freeze`, a token store of `init` and of these images: its crops and rows replace the random crops and
            the passes of the encoder.
        flip, max_scale: training crops are mirrored half of the time, out of images enlarged by up to `max_scale`.
        coarse_probability: share of the steps that train fewer than all N tokens (paper table 3).
        nested_probability: share of the other steps, in which images are decoded at full size from their first 1, 2, 4, … tokens,
            by the pixel loss alone; needs `model.absent_token`. Not in the paper.
        correction_share: share of each batch that also goes through the self-correction pass.
        mistakes: planted mistakes are drawn from that many nearest codes.
        perceptual: weight of the distance of features; 0 for none.
        perceptual_network: "lpips" (the paper's; needs VGG-16's weights, downloaded once), a file with those weights,
            "efficientnet-lite0" (ImageNet's, in a package of the extra `train`), or "classifier", a small one that learns the
            classes of the same images first, for `classifier_epochs`.
        perceptual_warmup: share of the steps, or from 1 on their number, over which that weight rises linearly.
        adversarial: weight of the adversarial loss; 0 for none.
        adversarial_network: "dino" (the paper's; needs DINO ViT-S/16's weights, downloaded once), a file with those weights,
            "patch", small convolutions that learn from scratch, or "projected", convolutions on features of EfficientNet-Lite0.
        adversarial_from: share of the steps, or from 1 on their number, before the discriminator starts.
        adversarial_adaptive: multiply that weight by the ratio of the gradients of the pixel and perceptual losses to that of
            the adversarial loss, as VQGAN does. Not in the paper.
        augment: whether the discriminator sees images through DiffAugment.
        lecam, consistency: weights of the discriminator's two regularisers; 0 for none.
        alignment: weight of the first token's alignment with a teacher's view of the whole image; 0 for none.
        alignment_network: the teacher, SigLIP2's vision tower by hub name, folder or file, or "efficientnet-lite0" or
            "classifier", as above.
        muon: learning rate of the matrices of all blocks, by Muon (Jordan et al. 2024) in place of Adam; 0 for Adam. Not in the
            paper.
        revive_every: steps after which codes that were not used since are replaced, in the first half of the run; 0 for never.
    """

    data: str
    model: TokenizerConfig
    loop: LoopConfig
    init: str | None = None
    encoder_init: str | None = None
    freeze: str | None = None
    tokens: str | None = None
    split: str | None = None
    image_column: str = "image"
    label_column: str = "label"
    streaming: bool = False
    flip: bool = True
    max_scale: float = 1.25
    coarse_probability: float = 0.2
    nested_probability: float = 0.0
    correction_share: float = 1.0
    mistakes: int = WRONG_CANDIDATES
    pixel: float = 1.0
    quantization: float = 1.0
    commitment: float = 0.25
    perceptual: float = 0.0
    perceptual_network: str = CLASSIFIER
    perceptual_warmup: float = 0.0
    classifier_epochs: int = 5
    adversarial: float = 0.2
    adversarial_network: str = PATCH
    adversarial_from: float = 0.5
    adversarial_adaptive: bool = False
    augment: bool = False
    lecam: float = 0.0
    consistency: float = 0.0
    alignment: float = 0.0
    alignment_network: str = CLASSIFIER
    muon: float = 0.0
    revive_every: int = 100

    def __post_init__(self) -> None:
        require_positive(classifier_epochs=self.classifier_epochs, mistakes=self.mistakes)
        if self.init and self.encoder_init:
            raise DetailFlowError("init and encoder_init exclude each other: a tokenizer has an encoder already")
        if self.freeze not in (None, "encoder"):
            raise DetailFlowError(f"freeze must be encoder or null, not {self.freeze!r}")
        if self.freeze and not self.init:
            raise DetailFlowError("freeze keeps the tokens of a tokenizer: give that tokenizer as init")
        if self.freeze and self.alignment:
            raise DetailFlowError("alignment trains the encoder: set alignment to 0, or freeze to null")
        if self.tokens and not self.freeze:
            raise DetailFlowError("tokens are those of a frozen encoder: set freeze to encoder, or tokens to null")
        require_shares(
            coarse_probability=self.coarse_probability,
            nested_probability=self.nested_probability,
            correction_share=self.correction_share,
        )
        if self.nested_probability and not self.model.absent_token:
            raise DetailFlowError(
                "nested_probability needs a model with an absent token: set model.absent_token to true"
            )
        require_not_negative(
            pixel=self.pixel,
            quantization=self.quantization,
            commitment=self.commitment,
            perceptual=self.perceptual,
            perceptual_warmup=self.perceptual_warmup,
            adversarial=self.adversarial,
            adversarial_from=self.adversarial_from,
            lecam=self.lecam,
            consistency=self.consistency,
            alignment=self.alignment,
            muon=self.muon,
            revive_every=self.revive_every,
        )
        if not 1 <= self.max_scale < float("inf"):
            raise DetailFlowError(f"max_scale must be 1 (no zoom) or more, not {self.max_scale!r}")
        if self.perceptual and self.model.image_size < SMALLEST_FEATURES_SIDE:
            least = SMALLEST_FEATURES_SIDE
            raise DetailFlowError(f"the perceptual loss needs an image_size of {least} or more: set perceptual to 0")
        if self.loop.shard:
            raise DetailFlowError("loop.shard is for AR models: a tokenizer fits one process, so leave it false")


@dataclass(frozen=True)
class GPTTraining:
    """An AR model's training run; the defaults are the paper's GPT-L (docs/method.md#ar-model).

    Attributes:
        tokens: a token store's folder.
        tokenizer: the tokenizer that made it; gives the groups, and decodes the samples to look at.
        init: an AR model to start from: a folder, hub name or zoo name, of as many tokens or fewer. Its classes are matched
            by name.
        planted_share: share of the samples whose input has planted mistakes.
        label_dropout: share of the samples whose class is replaced by the null class.
        weight_decay: on matrices only.
        ema: decay of the moving average of the weights, which is what the run exports.
        sampling: stored in the model's config as its own best.
    """

    tokens: str
    tokenizer: str
    loop: LoopConfig
    init: str | None = None
    width: int = 1024
    depth: int = 24
    heads: int = 16
    dropout: float = 0.1
    planted_share: float = 0.3
    label_dropout: float = 0.1
    weight_decay: float = 0.05
    ema: float = 0.9999
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    def __post_init__(self) -> None:
        require_shares(planted_share=self.planted_share, label_dropout=self.label_dropout, ema=self.ema)
        require_not_negative(weight_decay=self.weight_decay)


@dataclass(frozen=True)
class Extraction:
    """What to extract, and how.

    Attributes:
        data, split, image_column, label_column: the images, as in tokenizer training.
        tokenizer: folder or hub id.
        crops: "ten" (4 corners and centre of the image at 1.1 times the size, and their flips: the paper's) or "two" (the
            centre and its flip, for small images that fill their frame).
        mistakes: planted mistakes are drawn from that many nearest codes.
        batch_size: crops per pass through the tokenizer, in each process.
        workers: processes that decode images, for each process.
    """

    data: str
    tokenizer: str
    split: str | None = None
    image_column: str = "image"
    label_column: str = "label"
    crops: str = "ten"
    mistakes: int = WRONG_CANDIDATES
    batch_size: int = 250
    precision: str = "fp32"
    workers: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        require_positive(batch_size=self.batch_size, mistakes=self.mistakes)
        require_at_most(1000, workers=self.workers)
        require_not_negative(workers=self.workers)
        check_seeds(self.seed, name="seed")
        if self.crops not in CROPS:
            raise DetailFlowError(f"crops must be {' or '.join(CROPS)}, not {self.crops!r}")
        if self.precision not in PRECISIONS:
            raise DetailFlowError(f"precision must be {' or '.join(PRECISIONS)}, not {self.precision!r}")

    @property
    def images_per_pass(self) -> int:
        """How many images' crops go through the tokenizer at once."""
        return max(1, self.batch_size // CROPS[self.crops][1])
