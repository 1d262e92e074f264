"""The settings of training runs; `recipes/` has values for them."""

import math
from dataclasses import KW_ONLY, dataclass, field
from typing import Annotated, Literal

from detailflow.distributed import World
from detailflow.errors import DetailFlowError
from detailflow.models.efficientnet import EFFICIENTNET
from detailflow.models.tokenizer import WRONG_CANDIDATES, TokenizerConfig
from detailflow.sampling import SamplingConfig
from detailflow.settings import (
    BatchSize,
    Depth,
    Location,
    Must,
    NotNegative,
    NotNegativeInt,
    Positive,
    PositiveInt,
    Seed,
    Settings,
    Share,
    ShareBelowOne,
    Workers,
)
from detailflow.training.tracking import check_trackers

CLASSIFIER = "classifier"  # in place of a network that would be downloaded
PATCH = "patch"  # the discriminator that needs no download
PROJECTED = "projected"  # the discriminator on features of EfficientNet-Lite0
PROJECTED_BOTH = "projected-both"  # and on those of the classifier
NETWORKS = (CLASSIFIER, PATCH, PROJECTED, PROJECTED_BOTH, EFFICIENTNET, "lpips", "dino")  # which are not files
CropSet = Literal["ten", "six", "two"]
CROPS: dict[CropSet, int] = {"ten": 10, "six": 6, "two": 2}
Precision = Literal["auto", "bf16", "fp16", "fp32"]
SMALLEST_FEATURES_SIDE = 8  # pixels of an image whose last map of a classifier's features is one pixel


@dataclass(frozen=True)
class LoopConfig(Settings):
    """What training runs of both stages have in common.

    Attributes:
        steps: optimizer steps of the whole run.
        batch_size: images (or token rows) per step; of all processes together.
        learning_rate: at the peak; as it is used, not per 256 images.
        warmup: share of the steps with linear warm-up.
        initial_rate: where the warm-up begins; a share of the peak.
        final_rate: where the cosine ends; a share of the peak.
        grad_clip: largest norm of a step's gradient.
        precision: bf16 or fp16 (autocast), fp32, or auto; which is bf16 where that is fast, else fp32.
        accumulate: micro-batches per step and process; more of them need less memory.
        checkpoint_activations: compute activations again in the backward pass; less memory, a third more time.
        shard: split weights and optimizer over the processes (FSDP2); for AR models that do not fit one of them.
        compile: use torch.compile; a minute of preparation, then faster steps on a GPU.
        seed: the same seed gives the same run.
        workers: processes that decode images; for each training process.
        image_memory: GiB for decoded images; so a small set is decoded once. For each training process without
            workers.
        log_every: steps between log lines.
        pictures_every: steps between pictures.
        val_every: steps between validations; if images are held out. 0 for none.
        val_images: size of the fixed sample for validation.
        patience: validations without a better loss that end a run before its last step; 0 for never.
        trackers: where the log goes; a list of tensorboard and wandb.
        checkpoint_minutes: minutes between checkpoints.
        keep: number of last checkpoints that stay.
        milestone_every: steps between checkpoints that stay for good; 0 for none.
    """

    steps: PositiveInt
    batch_size: BatchSize
    learning_rate: Positive
    warmup: ShareBelowOne = 0.05
    initial_rate: Share = 0.0
    final_rate: Share = 0.1
    grad_clip: Positive = 1.0
    precision: Precision = "auto"
    accumulate: PositiveInt = 1
    checkpoint_activations: bool = False
    shard: bool = False
    compile: bool = False
    seed: Seed = 0
    workers: Workers = 0
    image_memory: NotNegative = 1.0
    log_every: PositiveInt = 20
    pictures_every: PositiveInt = 500
    val_every: NotNegativeInt = 500
    val_images: PositiveInt = 256
    patience: NotNegativeInt = 0
    trackers: tuple[str, ...] = ("tensorboard",)
    checkpoint_minutes: NotNegative = 3.0
    keep: PositiveInt = 2
    milestone_every: NotNegativeInt = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_trackers(self.trackers)

    def images_at_once(self, world: World) -> int:
        """Return the size of a micro-batch of one process."""
        shard = world.shard(self.batch_size)
        images = shard.stop - shard.start
        if images % self.accumulate:
            raise DetailFlowError(
                f"accumulate must divide the images of each process, and {self.accumulate} does not divide "
                f"{images} (batch_size {self.batch_size}, {world.size} process(es))"
            )
        return images // self.accumulate

    def rate_at(self, step: int) -> float:
        """Return the learning rate of `step` (0-based): linear warm-up, then a cosine."""
        rising = self.warmup * self.steps
        if step < rising:
            low = self.initial_rate
            return self.learning_rate * (low + (1 - low) * (step + 1) / (rising + 1))
        progress = (step - rising) / max(self.steps - rising, 1)
        low = self.final_rate
        return self.learning_rate * (low + (1 - low) * (1 + math.cos(math.pi * progress)) / 2)


def count_of_steps(value: float, steps: int) -> float:
    """Return a number of steps that is given as such or, below 1, as a share of all."""
    return value if value >= 1 else value * steps


@dataclass(frozen=True)
class ImageSettings(Settings):
    """Where the images come from.

    Attributes:
        data: images; a folder, with a subfolder per class or without, parquet or WebDataset files, a folder by
            save_to_disk, or a hub data set.
        split: of the data, such as train.
        image_column: of parquet files and hub data sets.
        label_column: of these, and of metadata files.
        val_data: images to validate on; like `data`, with the same classes. Never trained on.
        val_split: of val_data, such as val.
        val_share: share of `data` held out instead; never trained on, chosen by the content of each image.
    """

    data: Location
    _: KW_ONLY
    split: str | None = None
    image_column: str = "image"
    label_column: str = "label"
    val_data: Location | None = None
    val_split: str | None = None
    val_share: Share = 0.0

    @property
    def columns(self) -> dict[str, str]:
        """The columns as `open_images` takes them."""
        return {"image_column": self.image_column, "label_column": self.label_column}


@dataclass(frozen=True)
class TokenizerTraining(ImageSettings):
    """A tokenizer's training run; the defaults are the paper's if it has them (docs/method.md#losses).

    Attributes:
        init: tokenizer to start from; a folder, hub name or detailflow-16. `model` has its sizes or more tokens.
        encoder_init: SigLIP2 vision tower for the encoder; a hub name, folder or file (docs/method.md#tokenizer).
        freeze: encoder, to train the decoder alone; that of `init`, by losses of pixels, so tokens keep their meaning.
        new_decoder: begin with a new decoder; with `freeze`, of any size. That of `init` is forgotten.
        tokens: token store of `init` and these images; with `freeze`, its crops and rows replace the random crops
            and the passes of the encoder.
        gpt: AR model of these tokens; with `freeze` and the adversarial loss, rows that it samples are decoded too, and
            judged as the reconstructions are. Not in the paper.
        sampled_share: such rows per image of the batch.
        anchor: weight of their distance from `init`'s; that is, from what the decoder of `init` makes of them.
        streaming: read a hub data set as a stream; without a copy on this machine.
        flip: mirror half of the training crops.
        max_scale: crops are from images enlarged up to this.
        coarse_probability: share of steps with fewer than N tokens; the paper's table 3.
        nested_probability: share of the other steps with nested dropout; images are decoded at full size from their
            first 1, 2, 4, … tokens, without perceptual and adversarial loss. Needs `model.absent_token`. Not in the
            paper.
        correction_share: share of a batch for self-correction.
        mistakes: number of codes to plant one of; the nearest ones.
        pixel: weight of the pixel loss.
        quantization: weight of the quantization loss.
        commitment: weight of its commitment term.
        perceptual: weight of the perceptual loss; 0 for none.
        perceptual_network: lpips, a file or another; lpips is the paper's and downloads VGG-16's
            weights once, a file has those weights, efficientnet-lite0 is in a package of the extra `train`, and
            classifier is a small network that first learns the classes of the same images.
        perceptual_warmup: share or number of steps to full weight; from 1 on it is a number.
        classifier_epochs: epochs of training that classifier.
        adversarial: weight of the adversarial loss; 0 for none.
        adversarial_network: dino, patch, projected or others; dino is the paper's and downloads DINO ViT-S/16's
            weights once, a file has those weights, patch is a small convolutional network that learns from scratch,
            projected has convolutions on features of EfficientNet-Lite0, and projected-both on those of the classifier
            as well.
        adversarial_from: share or number of steps before it; from 1 on it is a number.
        adversarial_adaptive: scale that weight by gradients; by the ratio of the gradients of the pixel and perceptual
            losses to that of the adversarial loss, as VQGAN does. Not in the paper.
        augment: DiffAugment for the discriminator.
        lecam: weight of LeCAM regularization; 0 for none.
        consistency: weight of its consistency term; 0 for none.
        alignment: weight of the alignment loss; of the first token with a teacher's view of the image. 0 for none.
        alignment_network: the teacher; SigLIP2's vision tower by hub name, folder or file, or efficientnet-lite0 or
            classifier.
        muon: Muon's learning rate; of the blocks' matrices, 0 for Adam (Jordan et al. 2024). Not in the paper.
        revive_every: steps between revivals of unused codes; in the first half of the run. 0 for never.
    """

    model: TokenizerConfig
    loop: LoopConfig
    init: Location | None = None
    encoder_init: Location | None = None
    freeze: Literal["encoder"] | None = None
    new_decoder: bool = False
    tokens: Location | None = None
    gpt: Location | None = None
    sampled_share: Annotated[float, Must("more than 0 and at most 1", lambda share: 0 < share <= 1)] = 0.5
    anchor: NotNegative = 1.0
    streaming: bool = False
    flip: bool = True
    max_scale: Annotated[float, Must("1 (no zoom) or more", lambda scale: 1 <= scale < float("inf"))] = 1.25
    coarse_probability: Share = 0.2
    nested_probability: Share = 0.0
    correction_share: Share = 1.0
    mistakes: PositiveInt = WRONG_CANDIDATES
    pixel: NotNegative = 1.0
    quantization: NotNegative = 1.0
    commitment: NotNegative = 0.25
    perceptual: NotNegative = 0.0
    perceptual_network: Location = CLASSIFIER
    perceptual_warmup: NotNegative = 0.0
    classifier_epochs: PositiveInt = 5
    adversarial: NotNegative = 0.2
    adversarial_network: Location = PATCH
    adversarial_from: NotNegative = 0.5
    adversarial_adaptive: bool = False
    augment: bool = False
    lecam: NotNegative = 0.0
    consistency: NotNegative = 0.0
    alignment: NotNegative = 0.0
    alignment_network: Location = CLASSIFIER
    muon: NotNegative = 0.0
    revive_every: NotNegativeInt = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init and self.encoder_init:
            raise DetailFlowError("init and encoder_init exclude each other: a tokenizer has an encoder already")
        if self.freeze and not self.init:
            raise DetailFlowError("freeze keeps the tokens of a tokenizer: give that tokenizer as init")
        if self.new_decoder and not self.freeze:
            raise DetailFlowError("new_decoder trains a decoder for the tokens of init: set freeze to encoder")
        if self.freeze and self.alignment:
            raise DetailFlowError("alignment trains the encoder: set alignment to 0, or freeze to null")
        if self.tokens and not self.freeze:
            raise DetailFlowError("tokens are those of a frozen encoder: set freeze to encoder, or tokens to null")
        if self.gpt and not (self.freeze and self.adversarial):
            raise DetailFlowError(
                "gpt gives rows to a decoder that learns by the adversarial loss: set freeze to encoder and "
                "adversarial above 0, or gpt to null"
            )
        if self.nested_probability and not self.model.absent_token:
            raise DetailFlowError(
                "nested_probability needs a model with an absent token: set model.absent_token to true"
            )
        if self.nested_probability and len(self.model.schedule.stages()) == 1:
            raise DetailFlowError(
                "nested_probability leaves an image 1, 2, 4, … tokens, and of this model's groups none ends there: set "
                "nested_probability to 0"
            )
        if self.perceptual and self.model.image_size < SMALLEST_FEATURES_SIDE:
            least = SMALLEST_FEATURES_SIDE
            raise DetailFlowError(f"the perceptual loss needs an image_size of {least} or more: set perceptual to 0")
        if self.loop.shard:
            raise DetailFlowError("loop.shard is for AR models: a tokenizer fits one process, so leave it false")


@dataclass(frozen=True)
class GPTTraining(Settings):
    """An AR model's training run; the defaults are the paper's GPT-L (docs/method.md#ar-model).

    Attributes:
        tokens: folder of a token store.
        tokenizer: the tokenizer that made it; gives the groups, and decodes the samples to look at.
        init: AR model to start from; a folder, hub name or detailflow-16, of as many tokens or fewer. Its classes are
            matched by name.
        lora: rank of the matrices that LoRA trains beside those of the model to start from, which stay as they are;
            0 trains all weights.
        width: of the transformer.
        depth: number of blocks.
        heads: number of attention heads.
        dropout: share of values that are dropped.
        planted_share: share of samples with planted mistakes.
        label_dropout: share of samples with the null class.
        weight_decay: on matrices only; times the learning rate, with `muon` that one for the blocks'.
        muon: Muon's learning rate; of the blocks' matrices, 0 for AdamW (Jordan et al. 2024). Not in the paper.
        ema: decay of the weights' moving average; the average is what the run exports.
        sampling: stored in the model's config as its own best.
    """

    tokens: Location
    tokenizer: Location
    loop: LoopConfig
    init: Location | None = None
    lora: NotNegativeInt = 0
    width: PositiveInt = 1024
    depth: Depth = 24
    heads: PositiveInt = 16
    dropout: ShareBelowOne = 0.1
    planted_share: Share = 0.3
    label_dropout: Share = 0.1
    weight_decay: NotNegative = 0.05
    muon: NotNegative = 0.0
    ema: Share = 0.9999
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lora and not self.init:
            raise DetailFlowError("lora trains a small addition to a trained model: give that model as init")
        if self.lora and self.loop.shard:
            raise DetailFlowError("loop.shard saves memory of weights that are trained, and lora has few: choose one")
        if self.muon and (self.lora or self.loop.shard):
            other = "lora" if self.lora else "loop.shard"
            raise DetailFlowError(f"muon trains whole matrices, which {other} has not: choose one")


@dataclass(frozen=True)
class Extraction(ImageSettings):
    """What to extract, and how (docs/method.md#extraction).

    Attributes:
        tokenizer: a folder, hub name or detailflow-16.
        crops: ten, six or two of each image; ten are the corners and the centre at 1.1 times the size, and their flips
            (the paper's). For small images that fill their frame: six are the centre, moved by a sixteenth of the size
            along the diagonal too, and their flips, and two the centre and its flip.
        flip: false leaves the flips out: five, three or one crop. For text, or anything else with a left and a right.
        mistakes: number of codes to plant one of; the nearest ones.
        search: steps of a search for codes that rebuild the crops better (docs/method.md#code-search).
        batch_size: crops per pass through the tokenizer; in each process.
        precision: bf16, fp16, fp32, or auto as in training.
        workers: processes that decode images; for each process.
        seed: of the planted mistakes.
    """

    tokenizer: Location
    crops: CropSet = "ten"
    flip: bool = True
    mistakes: PositiveInt = WRONG_CANDIDATES
    search: NotNegativeInt = 0
    batch_size: BatchSize = 250
    precision: Precision = "fp32"
    workers: Workers = 0
    seed: Seed = 0

    @property
    def num_crops(self) -> int:
        """Return how many crops of each image there are."""
        return CROPS[self.crops] // (1 if self.flip else 2)

    @property
    def images_per_pass(self) -> int:
        """Return how many images' crops go through the tokenizer at once."""
        return max(1, self.batch_size // self.num_crops)
