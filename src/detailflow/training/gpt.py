"""Train the AR model on extracted tokens: planted mistakes, label dropout, EMA (docs/method.md#ar-model)."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn

from detailflow import hub
from detailflow.data.batches import read_ahead
from detailflow.data.source import spread
from detailflow.data.token_batches import TokenBatches
from detailflow.data.tokens import CLEAN, TokenStore
from detailflow.data.transforms import to_uint8
from detailflow.device import autocast, precision_dtype, to_device
from detailflow.distributed import World, launched
from detailflow.errors import DetailFlowError
from detailflow.labels import UNLABELLED, ClassLabels
from detailflow.models.gpt import DetailFlowGPT, GPTConfig
from detailflow.models.growing import require_growable
from detailflow.models.loading import load_weights
from detailflow.models.operations import cross_entropy
from detailflow.models.tokenizer import DetailFlowTokenizer
from detailflow.pictures import grid
from detailflow.seeds import mixed_seed
from detailflow.settings import parse_settings
from detailflow.training.config import GPTTraining
from detailflow.training.counting import StepCosts, Trial, of_one_rank
from detailflow.training.extract import made_by
from detailflow.training.inputs import Input, model_input, tokens_input
from detailflow.training.loop import Run, train
from detailflow.training.lora import LoRA
from detailflow.training.optimizer import Updater, muon, no_sync, recompute_activations
from detailflow.training.validation import mean_figures

PICTURE_CLASSES, PICTURE_SAMPLES = 10, 4
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


class GPTStage:
    """The network, its EMA, the optimizer and one step; a `Stage` of the loop."""

    def __init__(
        self,
        config: GPTTraining,
        sizes: GPTConfig,
        store: TokenStore | None,
        tokenizer: DetailFlowTokenizer,
        device: torch.device,
        resuming: bool = False,
        world: World = World(),
    ) -> None:
        self.config, self.store, self.tokenizer, self.device = config, store, tokenizer, device
        self.validation = store.validation if store else None
        self.world = world
        loop = config.loop
        self.precision, self.sizes = precision_dtype(loop.precision, device), sizes
        self.model = DetailFlowGPT(sizes)
        if config.init and not resuming:
            load_weights(self.model, initial_weights(config.init, sizes), config.init)
        self.start_loaded = bool(config.init) and not resuming
        self.lora = LoRA(self.model, config.lora) if config.lora else None
        self.lora_ema = self.lora.average() if self.lora else None
        self.ema = (self.lora_ema.model if self.lora_ema else copy.deepcopy(self.model)).eval().requires_grad_(False)
        self.model.train()
        if sizes.schedule.num_causal == sizes.num_tokens:  # no groups, so nothing for the mask embeddings to learn
            self.model.mask_embedding.requires_grad_(False)
        self.sharded = loop.shard and world.size > 1
        for network in (self.model, self.ema):
            if self.sharded:
                _shard(network, device)
            else:
                network.to(device)
            network.tables()  # now, as a compiled step should find them
        self.updater = Updater(gpt_optimizers(self.model, config), loop, device)
        if loop.checkpoint_activations:
            recompute_activations(self.blocks)
        forward: nn.Module = self.model
        if world.size > 1 and not self.sharded:
            forward = DistributedDataParallel(self.model)
        self.forward: Callable[..., Tensor] = torch.compile(forward, dynamic=False) if loop.compile else forward
        self.parallel = forward

    @property
    def blocks(self) -> nn.ModuleList:
        """The layers for `checkpoint_activations`."""
        return self.model.blocks

    def batches(self, start_step: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield this rank's labels, input rows and target rows."""
        loop = self.config.loop
        share = self.config.planted_share
        assert self.store is not None
        batches = iter(TokenBatches(self.store, loop.batch_size, loop.seed, share, start_step, self.world))
        return read_ahead(batches) if self.device.type == "cuda" else batches

    def step(
        self, step: int, batch: tuple[Tensor, Tensor, Tensor], rate: float, log: bool = True
    ) -> dict[str, Tensor | float]:
        """Take one step (docs/method.md#ar-model)."""
        loop, world = self.config.loop, self.world
        dropped = torch.rand(loop.batch_size)[world.shard(loop.batch_size)] < self.config.label_dropout
        if world.size > 1:  # what a process drops out of its own images is its own
            torch.manual_seed(mixed_seed(loop.seed, step, world.rank))
        labels, given, wanted, dropped = (to_device(tensor, self.device) for tensor in (*batch, dropped))
        labels = torch.where(dropped, self.sizes.num_classes, labels)
        size = loop.images_at_once(world)
        logged: dict[str, Tensor | float] = {"loss": 0.0, "accuracy": 0.0} if log else {}
        for start in range(0, len(labels), size):
            part = slice(start, start + size)
            with no_sync(self.parallel, start + size < len(labels)):
                with autocast(self.device, self.precision):
                    logits = self.forward(labels[part], given[part])
                loss = cross_entropy(logits, wanted[part])
                self.updater.backward(loss * (size / len(labels)))
            if log:
                accuracy = (logits.detach().argmax(-1) == wanted[part]).float().mean()
                logged["loss"] += loss.detach() * (size / len(labels))
                logged["accuracy"] += accuracy * (size / len(labels))
        logged["gradient_norm"] = self.updater.step(rate)
        self._average(step)
        return logged

    @torch.no_grad()
    def _average(self, step: int) -> None:
        decay = min(self.config.ema, (1 + step) / (10 + step))  # young averages follow faster
        pairs = zip(self.ema.parameters(), self.model.parameters(), strict=True)
        averages, weights = zip(*((average, weight) for average, weight in pairs if weight.requires_grad), strict=True)
        get_ema_multi_avg_fn(decay)(averages, weights, 0)  # in few kernels

    comparable_from = 0.0

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Return the averaged weights' loss and accuracy on clean tokens of a fixed sample of the images held out."""
        if self.validation is None:
            return {}
        images = np.array(spread(len(self.validation), min(self.config.loop.val_images, len(self.validation))))
        rows = self.validation.read(images, np.zeros_like(images), np.full_like(images, CLEAN))
        ids, labels = torch.from_numpy(rows.astype(np.int64)), torch.from_numpy(self.validation.labels[images])

        def measure(part: slice) -> dict[str, Tensor]:
            wanted = ids[part].to(self.device)
            with autocast(self.device, self.precision):
                logits = self.ema(labels[part].to(self.device), wanted).float()
            loss = cross_entropy(logits, wanted)
            return {"val_loss": loss, "val_accuracy": (logits.argmax(-1) == wanted).float().mean()}

        return mean_figures(len(images), measure, self.world, together=self.sharded)

    def state(self) -> dict[str, Any]:
        """Return weights, their average and the optimizer, unsharded, for any world size to go on with.

        With LoRA weights and average are merged, which can be used as models, and what is trained is there as well.
        """
        optimizer = get_optimizer_state_dict(self.model, self.updater.optimizers, options=WHOLE)
        state: dict[str, Any] = {"optimizer": optimizer, "scaler": self.updater.scaler.state_dict()}
        if not (self.lora and self.lora_ema):
            networks = {"model": self.model, "ema": self.ema}
            return state | {name: get_model_state_dict(network, options=WHOLE) for name, network in networks.items()}
        for name, lora in (("model", self.lora), ("ema", self.lora_ema)):
            state[f"{name}_lora"] = _on_cpu(lora.trained())
            if self.world.is_main:  # which writes it
                state[name] = _on_cpu(lora.merged().state_dict())
        return state

    def model_config(self) -> dict[str, Any]:
        """Return the AR model's config."""
        return asdict(self.sizes)

    def restore(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""
        own = get_optimizer_state_dict(self.model, self.updater.optimizers)  # WHOLE, it would be rank 0's alone
        optimizer = {
            "state": state["optimizer"]["state"],
            "param_groups": own["param_groups"],
        }  # the settings are this run's
        if self.lora and self.lora_ema:
            self._restore_lora(self.lora, self.lora_ema, state)
        else:
            set_model_state_dict(self.model, state["model"], options=WHOLE)
            set_model_state_dict(self.ema, state["ema"], options=WHOLE)
        set_optimizer_state_dict(self.model, self.updater.optimizers, optimizer, options=WHOLE)
        self.updater.check()
        self.updater.scaler.load_state_dict(state["scaler"])

    def _restore_lora(self, lora: LoRA, average: LoRA, state: dict[str, Any]) -> None:
        """Restore what is trained, and what LoRA leaves as it is unless this run has read it already."""
        if not self.start_loaded:
            assert self.config.init
            with self.world.raise_together():
                start = initial_weights(self.config.init, self.sizes)
            lora.load_start(start)
            self.start_loaded = True
        lora.load(state["model_lora"])
        average.load(state["ema_lora"])

    def _averaged(self) -> DetailFlowGPT | None:
        """Return the averaged weights unsharded and merged, on rank 0; `None` on the others."""
        if self.lora_ema:
            return self.lora_ema.merged() if self.world.is_main else None
        if not self.sharded:
            return self.ema if self.world.is_main else None
        weights = get_model_state_dict(self.ema, options=WHOLE)
        if not self.world.is_main:
            return None
        whole = DetailFlowGPT(self.sizes).eval()
        whole.load_state_dict(weights)
        return whole

    def pictures(self) -> dict[str, Image.Image]:
        """Draw samples of classes spread over all, by the averaged weights."""
        averaged = self._averaged()
        if averaged is None:
            return {}
        averaged.to(self.device)
        known = ClassLabels(self.sizes.class_names, self.sizes.num_classes)
        classes = spread(len(known.ids), min(PICTURE_CLASSES, len(known.ids)))
        labels = torch.tensor(classes).repeat_interleave(PICTURE_SAMPLES)
        ids = averaged.generate(labels, generator=torch.Generator().manual_seed(self.config.loop.seed))
        pixels = to_uint8(self.tokenizer.decode(ids)).cpu().numpy()
        names = [known.name(label) for label in labels] if known.count else None
        return {"samples": grid([Image.fromarray(p) for p in pixels], PICTURE_SAMPLES, names)}

    def export(self, directory: Path) -> None:
        """Write the averaged weights."""
        averaged = self._averaged()
        if averaged is not None:
            averaged.export(directory)


def gpt_optimizers(model: DetailFlowGPT, config: GPTTraining) -> list[torch.optim.Optimizer]:
    """AdamW for all weights (Sec. 3.4), or Muon for the matrices of the blocks and AdamW for the rest."""
    trained, decay = [p for p in model.parameters() if p.requires_grad], config.weight_decay
    others, muons = muon(trained, model.blocks, config.muon, decay)
    matrices, vectors = [p for p in others if p.ndim > 1], [p for p in others if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, lr=config.loop.learning_rate, betas=(0.9, 0.95), fused=True)
    return [adam, *muons]


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu() for name, tensor in tensors.items()}


def _shard(network: DetailFlowGPT, device: torch.device) -> None:
    """Shard the weights, block by block (FSDP2); each goes to its device only then, and stays float32."""
    from torch.distributed.fsdp import fully_shard

    mesh = torch.distributed.device_mesh.init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for block in network.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh)


def initial_weights(source: str, sizes: GPTConfig) -> dict[str, Tensor]:
    """Return the weights of another AR model for a network of these sizes.

    A class that the other model knows by name keeps its row of the class table, any other starts from the null class.
    If the other model has the same names, or none and as many classes, its table stays.
    """
    settings, tensors = hub.load(source, "gpt", dtype=torch.float32)
    theirs = parse_settings(GPTConfig, settings, source)
    require_growable(sizes, theirs, source)
    if theirs.class_names in (None, sizes.class_names) and theirs.num_classes == sizes.num_classes:
        return tensors
    known, null = ClassLabels(theirs.class_names, theirs.num_classes), theirs.num_classes
    rows = [null if (row := known.find(name)) is None else row for name in sizes.class_names or ()]
    tensors["class_embedding.weight"] = tensors["class_embedding.weight"][[*rows, null]]
    return tensors


def model_config(config: GPTTraining, class_names: Sequence[str], tokenizer: DetailFlowTokenizer) -> GPTConfig:
    """Return the config of the AR model that `config` asks for, of these classes and on tokens of `tokenizer`."""
    start = parse_settings(GPTConfig, hub.load_config(config.init, "gpt"), config.init) if config.init else None
    names = None if tuple(class_names) == UNLABELLED else tuple(class_names)
    return GPTConfig(
        mlp=start.mlp if start else None,
        rope_base=start.rope_base if start else 10000.0,
        num_classes=len(names or ()),
        class_names=names,
        width=config.width,
        depth=config.depth,
        heads=config.heads,
        num_tokens=tokenizer.config.num_tokens,
        group_size=tokenizer.config.group_size,
        causal_tokens=tokenizer.config.causal_tokens,
        codebook_size=tokenizer.config.codebook_size,
        tokenizer=None if tokenizer.device.type == "meta" else tokenizer.fingerprint(),  # a plan has no weights
        dropout=config.dropout,
        **asdict(config.sampling),
    )


def trial(
    config: GPTTraining, sizes: GPTConfig, tokenizer: DetailFlowTokenizer, *, world: World, device: torch.device
) -> Trial[GPTStage]:
    """Return a stage of one rank and its batch, with neither data nor weights that would be read."""
    alone = replace(config, loop=of_one_rank(config.loop, world))
    rows, n = alone.loop.batch_size, sizes.num_tokens
    return Trial(
        lambda: GPTStage(alone, sizes, None, tokenizer, device, resuming=True),  # so no weights are read
        lambda: [torch.zeros(shape, dtype=torch.long) for shape in ((rows,), (rows, n), (rows, n))],
        device,
    )


def train_gpt(config: GPTTraining, output: Path, device: str | None = None) -> None:
    """Train an AR model into `output`: the model, checkpoints, pictures, log and report."""
    world, chosen = launched(device)
    with world.raise_together():
        store = TokenStore.open_for_training(config.tokens)
        if not made_by(store, config.tokenizer):
            raise DetailFlowError(
                f"{config.tokens}: these tokens were made by another tokenizer than {config.tokenizer}; "
                "extract them again"
            )
        if world.is_main:
            store.verify()
        tokenizer = DetailFlowTokenizer.from_pretrained(config.tokenizer, device=chosen, dtype=torch.float32)
        sizes = model_config(config, store.info.class_names, tokenizer)

    world.check_same({"their tokens": store.fingerprint})

    def make(resuming: bool) -> GPTStage:
        return GPTStage(config, sizes, store, tokenizer, chosen, resuming, world)

    @cache
    def costs() -> StepCosts:
        return trial(config, sizes, tokenizer, world=world, device=chosen).costs()[0]

    inputs = {
        "tokens": tokens_input(store),
        "tokenizer": Input(lambda: {"fingerprint": store.info.tokenizer_fingerprint}),
    }
    if config.init:
        inputs["init"] = model_input(config.init, "gpt", at_start=not config.lora)  # LoRA reads it again
    train(make, Run("gpt", config, output, world, chosen, inputs, lambda step: costs().last))
