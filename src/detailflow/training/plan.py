"""Plan a run before it starts (`--dry-run`): its networks, length, memory, operations, time and disk space."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from detailflow import hub
from detailflow.data.batches import BatchOrder
from detailflow.data.tokens import TokenStore
from detailflow.device import autocast, choose_device, precision_dtype
from detailflow.distributed import World, rank_and_world_size
from detailflow.errors import DetailFlowError
from detailflow.hub_client import is_hub_name
from detailflow.labels import UNLABELLED
from detailflow.machine import measure_ceilings
from detailflow.models.efficientnet import EfficientNetLite0
from detailflow.models.lpips import LPIPS
from detailflow.models.siglip2 import SigLIP2
from detailflow.models.tokenizer import DetailFlowTokenizer, TokenizerConfig
from detailflow.settings import parse_settings
from detailflow.training import gpt, tokenizer
from detailflow.training.adversary import DINODiscriminator, ProjectedDiscriminator
from detailflow.training.classifier import FeatureNetwork
from detailflow.training.config import Extraction, GPTTraining, LoopConfig, TokenizerTraining, count_of_steps
from detailflow.training.counting import StepCosts, Trial, shortest
from detailflow.training.extract import code_rows
from detailflow.training.gpt import GPTStage, model_config
from detailflow.training.images import image_count, open_source
from detailflow.training.tokenizer import TokenizerStage
from detailflow.words import several

UTILIZATION = {"cpu": 0.5, "gpu": 0.4}  # of the measured ceiling that training is assumed to reach
TRAINED, AUXILIARY, FROZEN = "trained", "trained, not kept", "frozen"
STAYING = "frozen, part of the model"
CPU = torch.device("cpu")
LONGEST_TRIAL = 5.0  # seconds of a step by the estimate, above which no real one is tried


class Network(NamedTuple):
    """One network of a run: `TRAINED`, `AUXILIARY` (trained, but no part of the model), `FROZEN` or `STAYING`."""

    name: str
    role: str
    parameters: int
    bytes: int
    downloaded: bool = False  # before the run, once


def network(name: str, role: str, weights: Iterable[Tensor], source: str = "") -> Network:
    """Count weights, which are read from `source`."""
    weights = list(weights)
    download = source in ("lpips", "dino") or (is_hub_name(source) and not os.path.exists(source))
    return Network(name, role, sum(w.numel() for w in weights), sum(w.numel() * w.itemsize for w in weights), download)


def networks_of(stage: TokenizerStage | GPTStage) -> list[Network]:
    """Return all networks of a stage, in the order that a plan lists them."""
    if isinstance(stage, GPTStage) and stage.lora:
        learnt = stage.lora.trained()
        others = [weight for name, weight in stage.model.named_parameters() if name not in learnt]
        return [
            network("LoRA and class table", TRAINED, learnt.values()),
            network("AR model, the rest", STAYING, others),
        ]
    if isinstance(stage, GPTStage):
        return [network("AR model", TRAINED, stage.model.parameters())]
    networks = []
    for name in ("encoder", "quantizer", "decoder"):
        weights = list(getattr(stage.model, name).parameters())
        networks.append(network(name, TRAINED if weights[0].requires_grad else STAYING, weights))
    if stage.networks.head is not None:
        networks.append(network("head of the alignment", AUXILIARY, stage.networks.head.parameters()))
    names: dict[type, str] = {SigLIP2: "SigLIP2", FeatureNetwork: "classifier", LPIPS: "VGG-16 (LPIPS)"}
    names[EfficientNetLite0] = "EfficientNet-Lite0"
    config = stage.config
    teachers = (stage.teachers.alignment, stage.teachers.features, stage.teachers.lpips, stage.teachers.classifier)
    sources: dict[type, str] = {SigLIP2: config.alignment_network, LPIPS: config.perceptual_network}
    for teacher in dict.fromkeys(filter(None, teachers)):  # one may be both
        kind = type(teacher)
        networks.append(network(names[kind], FROZEN, teacher.parameters(), sources.get(kind, "")))
    judge = stage.adversary.network if stage.adversary else None
    if isinstance(judge, DINODiscriminator | ProjectedDiscriminator):
        networks.append(network("heads of the discriminator", AUXILIARY, judge.parameters()))
        source = config.adversarial_network
        networks.append(network(judge.backbone_name, FROZEN, judge.backbone.parameters(), source))
    elif judge:
        networks.append(network("discriminator", AUXILIARY, judge.parameters()))
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
        trial: takes a few real steps of one process.
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
    trial: Trial[Any] | None = None

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
        parts = {"weights": 4 * own, "gradients": 4 * own}
        parts["the optimiser's averages"] = self.costs.averages / (self.world_size if sharded else 1)
        if self.ema:
            parts["average of the weights"] = 4 * own
        if self.world_size > 1 and not sharded:
            parts["gradients on their way"] = 4 * weights
        if frozen := sum(network.bytes for network in self.networks if network.role in (FROZEN, STAYING)):
            parts["frozen weights"] = frozen
        return parts

    @property
    def checkpoint_bytes(self) -> float:
        """Bytes of one checkpoint: weights, their moving average, and the optimiser's averages."""
        copies = 2 if self.ema else 1
        return 4 * copies * self.parameters(TRAINED, AUXILIARY, STAYING) + self.costs.averages

    @property
    def kept(self) -> int:
        """The checkpoints that are on the disk at the end, besides the best one by validation."""
        return self.loop.keep + (self.loop.steps // self.loop.milestone_every if self.loop.milestone_every else 0)

    @property
    def disk_bytes(self) -> float:
        """Bytes of the run's folder: its checkpoints and its model."""
        checkpoints = min(self.kept + bool(self.loop.val_every), self.loop.steps)
        return checkpoints * self.checkpoint_bytes + 4 * self.parameters(TRAINED, STAYING)

    def seconds(self, ceiling: float, utilization: float) -> float:
        """Return the run's time on devices that each reach this part of so many operations per second."""
        return self.loop.steps * self.operations / self.world_size / (ceiling * utilization)

    @property
    def all_memory(self) -> float:
        """Bytes of one process, without PyTorch's own."""
        return sum(self.memory.values()) + self.activations(self.loop.checkpoint_activations)

    def expected_seconds(self, ceiling: float, utilization: float) -> float:
        """Return the run's time by a few real steps; by `seconds` if these would take too long."""
        if self.trial is None or self.costs.last > LONGEST_TRIAL * ceiling * utilization:
            return self.seconds(ceiling, utilization)
        return self.seconds(self.costs.last / self.trial.seconds(), 1.0)

    def brief(self, seconds: float, left: float = 1.0) -> str:
        """Return one line on the run; `left` is the share of its steps that is to be taken, in so many seconds."""
        loop = self.loop
        most = "up to " if loop.patience and loop.val_every else ""
        parameters = _count(self.parameters(TRAINED))
        if staying := self.parameters(STAYING):
            parameters += f" of {_count(self.parameters(TRAINED) + staying)}"
        rest = f" ({loop.steps * left:,.0f} left)" if left < 1 else ""
        facts = f"{parameters} parameters, {most}{several(loop.steps, 'step')}{rest} of "
        facts += f"{several(loop.batch_size, 'image')}: {most}{describe_duration(seconds)}"
        return f"{facts}, {rough_bytes(self.all_memory)} of memory and PyTorch's own"

    def text(self, ceiling: float, utilization: float, device: str) -> str:
        """Return the plan as a page of at most 80 columns; for the arguments see `seconds`."""
        loop, of_all = self.loop, self.loop.steps * self.operations
        dtype = str(precision_dtype(loop.precision, torch.device(device))).removeprefix("torch.")
        each, images = loop.batch_size // self.world_size, loop.steps * loop.batch_size
        parts = f", in {loop.accumulate} parts of {each // loop.accumulate}" if loop.accumulate > 1 else ""
        on, duration = loop.checkpoint_activations, describe_duration(self.seconds(ceiling, utilization))
        epochs = "" if self.epochs is None else f": {self.epochs:,.1f} epochs"
        sections: dict[str, list[str]] = {
            "networks": [
                f"{n.name:<30}{_count(n.parameters):>10}  {n.role}{', downloaded once' if n.downloaded else ''}"
                for n in self.networks
            ],
            "length": [f"{several(loop.steps, 'step')} of {several(loop.batch_size, 'image')}{epochs}"],
            "tokens": [f"{self.tokens} of an image, {_count(images * self.tokens)} in all"],
            "processes": [f"{several(self.world_size, 'process')}: {several(each, 'image')} of a step for each{parts}"],
            "memory": [
                *(f"{name:<30}{_bytes(size):>10}" for name, size in self.memory.items()),
                f"{'activations, about':<30}{_bytes(self.activations(on)):>10}",
                f"{'':<30}{_bytes(self.activations(not on)):>10}  {'without' if on else 'with'} checkpoint_activations",
                f"{'together, of each process':<30}{_bytes(self.all_memory):>10}  and PyTorch's own",
            ],
            "products": [f"{_operations(self.operations)} a step, {_operations(of_all)} in all"],
            "time": [
                f"about {duration}, if every process reaches {utilization:.0%} of",
                f"the {_operations(ceiling)}/s of {dtype} products measured here on {device}",
            ],
            "disk": [
                f"{_bytes(self.kept * self.checkpoint_bytes)} for {several(self.kept, 'checkpoint')}",
                f"{_bytes(4 * self.parameters(TRAINED, STAYING))} for the model",
                *([f"{_bytes(self.store_bytes)} of tokens, which are there"] if self.store_bytes else []),
            ],
        }
        rows = [(label if not i else "", line) for label, lines in sections.items() for i, line in enumerate(lines)]
        return "\n".join([self.of, "", *(f"{label:<11}{line}" for label, line in rows)])


def planned_world() -> World:
    """Return the rank and world size that the launcher names; `WORLD_SIZE=8` in front of a command plans for 8."""
    return World(*rank_and_world_size())


def ceiling_of(config: TokenizerTraining | GPTTraining, device: torch.device) -> tuple[float, float]:
    """Measure the operations per second of matrix products; return them, and the part that training may reach."""
    ceiling = measure_ceilings(device, precision_dtype(config.loop.precision, device), repeats=2).flops
    return ceiling, UTILIZATION["cpu" if device.type == "cpu" else "gpu"]


def describe_plan(
    config: TokenizerTraining | GPTTraining, device: str | None = None, codec: TokenizerConfig | None = None
) -> str:
    """Measure the device and return the costs of a run as text, "" on other ranks; no file is written or downloaded.

    `codec` has the sizes of an AR model's tokenizer if that is still to be trained.
    """
    chosen, world = choose_device(device), planned_world()
    if not world.is_main:
        return ""
    plan = (
        plan_tokenizer(config, world, chosen)
        if isinstance(config, TokenizerTraining)
        else plan_gpt(config, world, chosen, _expected(config, codec))
    )
    return plan.text(*ceiling_of(config, chosen), str(chosen))


def plan_tokenizer(config: TokenizerTraining, world: World, device: torch.device = CPU) -> Plan:
    """Plan a tokenizer's run; every step is counted as one that trains all N tokens."""
    source, loop = open_source(config), config.loop
    tried = tokenizer.trial(config, source, world=world, device=device)
    costs, stage = tried.costs()
    count = image_count(source)
    start = count_of_steps(config.adversarial_from, loop.steps) / loop.steps if config.adversarial else 0.0
    epochs = loop.steps / BatchOrder(count, loop.batch_size, loop.seed).steps_per_epoch if count else None
    images = several(count, "image") if count else "a stream of images"
    of = f"a tokenizer, on {images} of {several(len(source.class_names), 'class')}"
    tokens, last_share = config.model.num_tokens, 1 - min(1.0, start)
    return Plan(of, loop, epochs, tokens, networks_of(stage), world.size, costs, last_share, trial=tried)


class Expected(NamedTuple):
    """A token store, which need not be there: what a plan must know of it. If that is not known, `images` is 0."""

    images: int
    crops: int
    class_names: tuple[str, ...]
    tokenizer: TokenizerConfig
    bytes: int = 0


def _expected(config: GPTTraining, codec: TokenizerConfig | None = None) -> Expected:
    """Return what is known of the tokens of a run; neither they nor their tokenizer need be there."""
    ready = os.path.lexists(config.tokens)
    store = TokenStore.open(config.tokens) if ready else None
    try:
        known = codec or parse_settings(
            TokenizerConfig, hub.load_config(config.tokenizer, "tokenizer"), config.tokenizer
        )
    except DetailFlowError as error:
        if store:
            raise
        way = "give --tokenizer a model, or the settings that it will be trained with, such as imagenet/tokenizer"
        raise DetailFlowError(f"a plan needs the tokenizer's sizes ({error}): {way}") from error
    if store is None:
        return Expected(0, 0, UNLABELLED, known)
    size = sum(path.stat().st_size for path in Path(config.tokens).rglob("*") if path.is_file())
    return Expected(len(store), store.info.crops, store.info.class_names, known, size)


def plan_gpt(config: GPTTraining, world: World, device: torch.device = CPU, expected: Expected | None = None) -> Plan:
    """Plan an AR model's run on the tokens that there are, or that are expected."""
    loop, expected = config.loop, expected or _expected(config)
    with torch.device("meta"):
        codec = DetailFlowTokenizer(expected.tokenizer)
    sizes = model_config(config, expected.class_names, codec)
    tried = gpt.trial(config, sizes, codec, world=world, device=device)
    costs, stage = tried.costs()
    epochs, of = None, "an AR model, on tokens that are still to come: their images and classes are not counted"
    if expected.images:
        epochs = loop.steps / BatchOrder(expected.images, loop.batch_size, loop.seed).steps_per_epoch
        crops = several(expected.crops, "crop")
        classes = f"of {several(sizes.num_classes, 'class')}" if sizes.num_classes else "without classes"
        of = f"an AR model, on {several(expected.images, 'image')} {classes}, {crops} of each"
    networks, n = networks_of(stage), sizes.num_tokens
    return Plan(of, loop, epochs, n, networks, world.size, costs, 1.0, True, expected.bytes, tried)


@torch.inference_mode()
def extraction_seconds(
    config: Extraction, sizes: TokenizerConfig, images: int, world: World, device: torch.device
) -> float:
    """Return the time of the extraction by a real pass of random weights over a few crops."""
    count = 4 if device.type == "cpu" else config.batch_size
    model = DetailFlowTokenizer(sizes).to(device).eval()
    crops = torch.zeros(count, 3, sizes.image_size, sizes.image_size, device=device)

    def encode() -> None:
        with autocast(device, precision_dtype(config.precision, device)):
            rows = code_rows(
                model, crops, torch.zeros(count, dtype=torch.long), torch.Generator(), config.mistakes, config.search
            )
            rows.cpu()

    return shortest(encode, 2) / count * images * config.num_crops / world.size


def _count(value: float) -> str:
    return _scaled(value, {1e12: "T", 1e9: "G", 1e6: "M"}, ",.1f") or f"{value:,.0f}"


def _operations(value: float) -> str:
    return _scaled(value, {1e18: " EFLOP", 1e15: " PFLOP", 1e12: " TFLOP", 0: " GFLOP"}, ",.3g")


def _bytes(value: float) -> str:
    return _scaled(value, {2**30: " GiB", 2**20: " MiB", 2**10: " KiB"}, ",.1f") or f"{value:,.0f} bytes"


def describe_duration(seconds: float) -> str:
    """Return seconds in the unit that they are at least two of, to two digits."""
    units = ((86400, "days"), (3600, "hours"), (60, "minutes"), (1, "seconds"))
    size, name = next((size, name) for size, name in units if seconds >= 2 * size or size == 1)
    number = _two_digits(seconds / size)
    return f"{number} {name.removesuffix('s') if number == '1' else name}"


def rough_bytes(value: float) -> str:
    """Return bytes in the largest unit that they are at least one of, to two digits."""
    size, unit = next(((10**n, u) for n, u in ((9, "GB"), (6, "MB"), (3, "kB")) if value >= 10**n), (1, "bytes"))
    return f"{_two_digits(value / size)} {unit}"


def _two_digits(value: float) -> str:
    return f"{float(f'{value:.2g}'):,.10g}"


def _scaled(value: float, units: dict[float, str], form: str) -> str:
    """Return `value` in the first unit that it is at least one of, "" if there is none."""
    return next((f"{value / (size or 1e9):{form}}{unit}" for size, unit in units.items() if value >= size), "")
