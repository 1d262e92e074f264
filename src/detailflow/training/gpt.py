"""Training of the AR model on extracted tokens: teacher forcing with planted mistakes, label dropout, EMA (method §6)."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from detailflow import hub
from detailflow.data.tokens import TokenBatches, TokenStore
from detailflow.data.transforms import to_uint8
from detailflow.device import autocast, choose_device
from detailflow.errors import DetailFlowError
from detailflow.generation import SamplingConfig
from detailflow.labels import ClassLabels
from detailflow.models.gpt import DetailFlowGPT, GPTConfig
from detailflow.models.loading import config_from_dict, load_weights, require_same
from detailflow.models.tokenizer import DetailFlowTokenizer
from detailflow.pictures import grid
from detailflow.schedule import require_not_negative, require_shares
from detailflow.training.extract import tokenizer_fingerprint
from detailflow.training.loop import PRECISIONS, LoopConfig, has_checkpoint, run

PICTURE_CLASSES, PICTURE_SAMPLES = 10, 4


@dataclass(frozen=True)
class GPTTraining:
    """An AR model's training run; the defaults are the paper's GPT-L (method §6).

    Attributes:
        tokens: a token store's folder.
        tokenizer: the tokenizer that made it; gives the groups, and decodes the samples to look at.
        init: an AR model to start from: a folder, hub name or zoo name. Its classes are matched by name.
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


class GPTStage:
    """The network, its EMA, the optimiser and one step; a `Stage` of the loop."""

    def __init__(
        self,
        config: GPTTraining,
        sizes: GPTConfig,
        store: TokenStore,
        tokenizer: DetailFlowTokenizer,
        device: torch.device,
        resuming: bool = False,
    ) -> None:
        self.config, self.store, self.tokenizer, self.device = config, store, tokenizer, device
        self.precision = PRECISIONS[config.loop.precision]
        self.model = DetailFlowGPT(sizes).to(device).train()
        if config.init and not resuming:
            load_weights(self.model, initial_weights(config.init, sizes), config.init)
        self.ema = DetailFlowGPT(sizes).to(device).eval().requires_grad_(False)
        self.ema.load_state_dict(self.model.state_dict())
        matrices = [p for p in self.model.parameters() if p.ndim > 1]
        vectors = [p for p in self.model.parameters() if p.ndim <= 1]
        groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=config.loop.learning_rate, betas=(0.9, 0.95), fused=True)
        self.forward = torch.compile(self.model, dynamic=False) if config.loop.compile else self.model

    def batches(self, start_step: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Labels, input rows and target rows."""
        loop = self.config.loop
        return iter(TokenBatches(self.store, loop.batch_size, loop.seed, self.config.planted_share, start_step))

    def step(self, step: int, batch: tuple[Tensor, Tensor, Tensor], rate: float) -> dict[str, Tensor]:
        """One step of method §6."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        labels, given, wanted = (tensor.to(self.device) for tensor in batch)
        dropped = torch.rand(len(labels)).to(self.device) < self.config.label_dropout
        labels = torch.where(dropped, self.model.config.num_classes, labels)
        with autocast(self.device, self.precision):
            logits = self.forward(labels, given)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), wanted.flatten())
        self.optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.loop.grad_clip)
        self.optimizer.step()
        self._average(step)
        with torch.no_grad():
            accuracy = (logits.argmax(-1) == wanted).float().mean()
        return {"loss": loss.detach(), "accuracy": accuracy, "gradient_norm": norm}

    @torch.no_grad()
    def _average(self, step: int) -> None:
        decay = min(self.config.ema, (1 + step) / (10 + step))  # young averages follow faster
        for average, weight in zip(self.ema.parameters(), self.model.parameters(), strict=True):
            average.lerp_(weight, 1 - decay)

    def state(self) -> dict[str, Any]:
        """Weights, their average and the optimiser."""
        return {name: getattr(self, name).state_dict() for name in ("model", "ema", "optimizer")}

    def restore(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""
        for name in ("model", "ema", "optimizer"):
            getattr(self, name).load_state_dict(state[name])

    def pictures(self) -> dict[str, Image.Image]:
        """Samples of the first classes by the averaged weights."""
        classes = min(PICTURE_CLASSES, self.model.config.num_classes)
        labels = torch.arange(classes).repeat_interleave(PICTURE_SAMPLES)
        ids = self.ema.generate(labels, generator=torch.Generator().manual_seed(self.config.loop.seed))
        pixels = to_uint8(self.tokenizer.decode(ids)).cpu().numpy()
        return {"samples": grid([Image.fromarray(p) for p in pixels], columns=PICTURE_SAMPLES)}

    def export(self, directory: Path) -> None:
        """Write the averaged weights."""
        self.ema.save_pretrained(directory)


def initial_weights(source: str, sizes: GPTConfig) -> dict[str, Tensor]:
    """The weights of another AR model for a network of these sizes.

    The class table is made anew: a class that the other model knows by name keeps its row, any other starts from the null
    class. Where the other model has no names and as many classes, its table stays.

    Raises:
        DetailFlowError: if the model can't be had or its sizes differ.
    """
    settings, tensors = hub.load(source, "gpt", dtype=torch.float32)
    theirs = config_from_dict(GPTConfig, settings, source)
    keys = ("width", "depth", "heads", "mlp", "num_tokens", "group_size", "causal_tokens", "codebook_size")
    require_same(sizes, theirs, keys, source)
    if theirs.class_names is None and theirs.num_classes == sizes.num_classes:
        return tensors
    known, null = ClassLabels(theirs.class_names, theirs.num_classes), theirs.num_classes
    rows = [null if (row := known.find(name)) is None else row for name in sizes.class_names or ()]
    tensors["class_embedding.weight"] = tensors["class_embedding.weight"][[*rows, null]]
    return tensors


def model_config(config: GPTTraining, store: TokenStore, tokenizer: DetailFlowTokenizer) -> GPTConfig:
    """The AR model that `config` asks for on these tokens.

    Raises:
        DetailFlowError: where its sizes contradict each other, or the model that it starts from can't be read.
    """
    start = config_from_dict(GPTConfig, hub.load_config(config.init, "gpt"), config.init) if config.init else None
    return GPTConfig(
        mlp=start.mlp if start else None,
        rope_base=start.rope_base if start else 10000.0,
        num_classes=len(store.info.class_names),
        class_names=store.info.class_names,
        width=config.width,
        depth=config.depth,
        heads=config.heads,
        num_tokens=tokenizer.config.num_tokens,
        group_size=tokenizer.config.group_size,
        causal_tokens=tokenizer.config.causal_tokens,
        codebook_size=tokenizer.config.codebook_size,
        dropout=config.dropout,
        **asdict(config.sampling),
    )


def train_gpt(config: GPTTraining, output: Path, device: str | None = None) -> None:
    """Train an AR model into `output`: config.json, model.safetensors, checkpoints, pictures, TensorBoard scalars.

    Raises:
        DetailFlowError: for a store that the tokenizer did not make, sizes that contradict each other, or an output folder
            that can't be used.
    """
    place = choose_device(device)
    store = TokenStore.open(config.tokens)
    if store.info.tokenizer_fingerprint != tokenizer_fingerprint(config.tokenizer):
        raise DetailFlowError(
            f"{config.tokens}: these tokens were made by another tokenizer than {config.tokenizer}; extract them again"
        )
    tokenizer = DetailFlowTokenizer.from_pretrained(config.tokenizer, device=place)
    sizes = model_config(config, store, tokenizer)
    run(lambda: GPTStage(config, sizes, store, tokenizer, place, has_checkpoint(output)), "gpt", config, output)
