"""Plan a run before it starts (`--dry-run`): its networks, length, memory, operations, time and disk space."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from detailflow import hub
from detailflow.data.batches import BatchOrder
from detailflow.data.tokens import TokenStore
from detailflow.device import choose_device
from detailflow.distributed import World
from detailflow.machine import measure_ceilings
from detailflow.models.efficientnet import EfficientNetLite0
from detailflow.models.siglip2 import SigLIP2
from detailflow.models.tokenizer import DetailFlowTokenizer, TokenizerConfig
from detailflow.settings import parse_settings
from detailflow.training.adversary import DINODiscriminator, ProjectedDiscriminator
from detailflow.training.classifier import FeatureNetwork
from detailflow.training.config import PRECISIONS, GPTTraining, LoopConfig, TokenizerTraining
from detailflow.training.counting import StepCosts
from detailflow.training.gpt import GPTStage, count_gpt, model_config
from detailflow.training.losses import LPIPS
from detailflow.training.teachers import image_count, open_source
from detailflow.training.tokenizer import TokenizerStage, count_of_steps, count_tokenizer

UTILIZATION = {"cpu": 0.5, "gpu": 0.4}  # of the measured ceiling that training is assumed to reach
TRAINED, AUXILIARY, FROZEN = "trained", "trained, not kept", "frozen"
CPU = torch.device("cpu")


class Network(NamedTuple):
    """One network of a run: `TRAINED`, `AUXILIARY` (trained, but no part of the model) or `FROZEN`."""

    name: str
    role: str
    parameters: int
    bytes: int


def network(name: str, role: str, module: nn.Module) -> Network:
    """Count a module's weights."""
    weights = list(module.parameters())
    return Network(name, role, sum(w.numel() for w in weights), sum(w.numel() * w.itemsize for w in weights))


def networks_of(stage: TokenizerStage | GPTStage) -> list[Network]:
    """Return all networks of a stage, in the order that a plan lists them."""
    if isinstance(stage, GPTStage):
        return [network("AR model", TRAINED, stage.model)]
    networks = [network(name, TRAINED, getattr(stage.model, name)) for name in ("encoder", "quantizer", "decoder")]
    if stage.networks.head is not None:
        networks.append(network("head of the alignment", AUXILIARY, stage.networks.head))
    names: dict[type, str] = {SigLIP2: "SigLIP2", FeatureNetwork: "classifier", LPIPS: "VGG-16 (LPIPS)"}
    names[EfficientNetLite0] = "EfficientNet-Lite0"
    teachers = (stage.teachers.alignment, stage.teachers.features, stage.teachers.lpips)
    for teacher in dict.fromkeys(filter(None, teachers)):  # one may be both
        networks.append(network(names[type(teacher)], FROZEN, teacher))
    judge = stage.adversary.network if stage.adversary else None
    if isinstance(judge, DINODiscriminator | ProjectedDiscriminator):
        networks.append(network("heads of the discriminator", AUXILIARY, judge))
        networks.append(network(judge.backbone_name, FROZEN, judge.backbone))
    elif judge:
        networks.append(network("discriminator", AUXILIARY, judge))
    return networks


@dataclass(frozen=True)
class Plan:
    """A run's costs; `text` is the page that `--dry-run` prints.

    Attributes:
        of: what is trained on what.
        epochs: passes over the data; `None` if its size is not known.
        tokens: N, of an image.
        costs: of one process, with its part of the batch.
        last_share: of the steps, those that cost what the last one does; the others cost what the first one does.
        ema: whether a moving average of the weights is kept.
        store_bytes: of the token store, if the data is one.
    """

    of: str
    loop: LoopConfig
    epochs: float | None
    tokens: int
    networks: Sequence[Network]
    world_size: int
    costs: StepCosts
    last_share: float = 1.0
    ema: bool = False
    store_bytes: int = 0

    def parameters(self, *roles: str) -> int:
        """Return the weights of all networks of these roles."""
        return sum(network.parameters for network in self.networks if network.role in roles)

    @property
    def operations(self) -> float:
        """Of one step, the mean over the run, all ranks together."""
        costs = self.costs
        mean = self.last_share * costs.last + (1 - self.last_share) * costs.first
        return self.world_size * (mean + self.loop.checkpoint_activations * costs.recomputed)

    def activations(self, checkpointed: bool) -> float:
        """Return the bytes that a step of one process takes at most, besides gradients."""
        peak = self.costs.peak_recomputed if checkpointed else self.costs.peak
        return max(0.0, peak - 4 * self.parameters(TRAINED))

    @property
    def memory(self) -> dict[str, float]:
        """Bytes of one process without activations, by what they are for."""
        weights = self.parameters(TRAINED, AUXILIARY)
        sharded = self.loop.shard and self.world_size > 1
        own = weights / self.world_size if sharded else weights
        parts = {"weights": 4 * own, "gradients": 4 * own, "Adam's averages": 8 * own}
        if self.ema:
            parts["average of the weights"] = 4 * own
        if self.world_size > 1 and not sharded:
            parts["gradients on their way"] = 4 * weights
        if frozen := sum(network.bytes for network in self.networks if network.role == FROZEN):
            parts["frozen weights"] = frozen
        return parts

    @property
    def checkpoint_bytes(self) -> float:
        """Bytes of one checkpoint: weights, Adam's averages and the moving average."""
        return (16 if self.ema else 12) * self.parameters(TRAINED, AUXILIARY)

    def seconds(self, ceiling: float, utilization: float) -> float:
        """Return the run's time on devices that each reach this part of so many operations per second."""
        return self.loop.steps * self.operations / self.world_size / (ceiling * utilization)

    def text(self, ceiling: float, utilization: float, device: str) -> str:
        """Return the plan as a page of at most 80 columns; for the arguments see `seconds`."""
        loop, of_all = self.loop, self.loop.steps * self.operations
        each, images = loop.batch_size // self.world_size, loop.steps * loop.batch_size
        parts = f", in {loop.accumulate} parts of {each // loop.accumulate}" if loop.accumulate > 1 else ""
        on = loop.checkpoint_activations
        epochs = "" if self.epochs is None else f": {self.epochs:,.1f} epochs"
        memory = sum(self.memory.values()) + self.activations(on)
        kept = loop.keep + (loop.steps // loop.milestone_every if loop.milestone_every else 0)
        sections: dict[str, list[str]] = {
            "networks": [f"{n.name:<30}{_count(n.parameters):>10}  {n.role}" for n in self.networks],
            "length": [f"{_several(loop.steps, 'step')} of {_several(loop.batch_size, 'image')}{epochs}"],
            "tokens": [f"{self.tokens} of an image, {_count(images * self.tokens)} in all"],
            "processes": [
                f"{_several(self.world_size, 'process')}: {_several(each, 'image')} of a step for each{parts}"
            ],
            "memory": [
                *(f"{name:<30}{_bytes(size):>10}" for name, size in self.memory.items()),
                f"{'activations, about':<30}{_bytes(self.activations(on)):>10}",
                f"{'':<30}{_bytes(self.activations(not on)):>10}  {'without' if on else 'with'} checkpoint_activations",
                f"{'together, of each process':<30}{_bytes(memory):>10}  and PyTorch's own",
            ],
            "products": [f"{_operations(self.operations)} a step, {_operations(of_all)} in all"],
            "time": [
                f"about {_duration(self.seconds(ceiling, utilization))}, if every process reaches {utilization:.0%} of",
                f"the {_operations(ceiling)}/s of {loop.precision} products measured here on {device}",
            ],
            "disk": [
                f"{_bytes(kept * self.checkpoint_bytes)} for {_several(kept, 'checkpoint')}",
                f"{_bytes(4 * self.parameters(TRAINED))} for the model",
                *([f"{_bytes(self.store_bytes)} of tokens, which are there"] if self.store_bytes else []),
            ],
        }
        rows = [(label if not i else "", line) for label, lines in sections.items() for i, line in enumerate(lines)]
        return "\n".join([self.of, "", *(f"{label:<11}{line}" for label, line in rows)])


def planned_world() -> World:
    """Return the rank and world size that the launcher names; `WORLD_SIZE=8` in front of a command plans for 8."""
    return World(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))


def describe_plan(config: TokenizerTraining | GPTTraining, device: str | None = None) -> str:
    """Measure the device and return the costs of a run as text, "" on other ranks; no file is written or downloaded."""
    chosen, world = choose_device(device), planned_world()
    if not world.is_main:
        return ""
    plan = (
        plan_tokenizer(config, world, chosen)
        if isinstance(config, TokenizerTraining)
        else plan_gpt(config, world, chosen)
    )
    ceiling = measure_ceilings(chosen, PRECISIONS[config.loop.precision], repeats=2).flops
    return plan.text(ceiling, UTILIZATION["cpu" if chosen.type == "cpu" else "gpu"], str(chosen))


def plan_tokenizer(config: TokenizerTraining, world: World, device: torch.device = CPU) -> Plan:
    """Plan a tokenizer's run; every step is counted as one that trains all N tokens."""
    source, loop = open_source(config), config.loop
    costs, stage = count_tokenizer(config, source, world=world, device=device)
    count = image_count(source)
    start = count_of_steps(config.adversarial_from, loop.steps) / loop.steps if config.adversarial else 0.0
    epochs = loop.steps / BatchOrder(count, loop.batch_size, loop.seed).steps_per_epoch if count else None
    images = _several(count, "image") if count else "a stream of images"
    of = f"a tokenizer, on {images} of {_several(len(source.class_names), 'class')}"
    tokens = config.model.num_tokens
    return Plan(of, loop, epochs, tokens, networks_of(stage), world.size, costs, 1 - min(1.0, start))


def plan_gpt(config: GPTTraining, world: World, device: torch.device = CPU) -> Plan:
    """Plan an AR model's run."""
    store, loop = TokenStore.open(config.tokens), config.loop
    known = parse_settings(TokenizerConfig, hub.load_config(config.tokenizer, "tokenizer"), config.tokenizer)
    with torch.device("meta"):
        tokenizer = DetailFlowTokenizer(known)
    sizes = model_config(config, store, tokenizer)
    costs, stage = count_gpt(config, sizes, store, tokenizer, world=world, device=device)
    epochs = loop.steps / BatchOrder(len(store), loop.batch_size, loop.seed).steps_per_epoch
    size = sum(path.stat().st_size for path in Path(config.tokens).rglob("*") if path.is_file())
    crops = _several(store.info.crops, "crop")
    of = f"an AR model, on {_several(len(store), 'image')} of {_several(sizes.num_classes, 'class')}, {crops} of each"
    return Plan(of, loop, epochs, sizes.num_tokens, networks_of(stage), world.size, costs, ema=True, store_bytes=size)


def _several(number: int, word: str) -> str:
    return f"{number:,} {word}" + ("" if number == 1 else "es" if word.endswith("s") else "s")


def _count(value: float) -> str:
    return _scaled(value, {1e12: "T", 1e9: "G", 1e6: "M"}, ",.1f") or f"{value:,.0f}"


def _operations(value: float) -> str:
    return _scaled(value, {1e18: " EFLOP", 1e15: " PFLOP", 1e12: " TFLOP", 0: " GFLOP"}, ",.3g")


def _bytes(value: float) -> str:
    return _scaled(value, {2**30: " GiB", 2**20: " MiB", 2**10: " KiB"}, ",.1f") or f"{value:,.0f} bytes"


def _duration(seconds: float) -> str:
    units = ((86400, "days"), (3600, "hours"), (60, "minutes"), (1, "seconds"))
    return next(f"{seconds / size:,.1f} {name}" for size, name in units if seconds >= 2 * size or size == 1)


def _scaled(value: float, units: dict[float, str], form: str) -> str:
    """Return `value` in the first unit that it is at least one of, "" if there is none."""
    return next((f"{value / (size or 1e9):{form}}{unit}" for size, unit in units.items() if value >= size), "")
