"""What a run will cost, before it starts: steps of the real stage, counted on tensors that have shapes but no data."""

import os
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from detailflow import hub
from detailflow.data.batches import BatchOrder
from detailflow.data.tokens import TokenStore
from detailflow.device import choose_device
from detailflow.distributed import World
from detailflow.machine import measure_ceilings
from detailflow.models import layers
from detailflow.models.efficientnet import EfficientNetLite0
from detailflow.models.loading import config_from_dict
from detailflow.models.siglip2 import SigLIP2
from detailflow.models.tokenizer import DetailFlowTokenizer, TokenizerConfig
from detailflow.training.adversary import DINODiscriminator, ProjectedDiscriminator
from detailflow.training.config import PRECISIONS, GPTTraining, LoopConfig, TokenizerTraining
from detailflow.training.gpt import GPTStage, model_config
from detailflow.training.losses import LPIPS
from detailflow.training.optimizer import recompute_activations
from detailflow.training.teachers import FeatureNetwork, image_count, open_source
from detailflow.training.tokenizer import TokenizerStage, count_of_steps

SHARES = {"cpu": 0.5, "gpu": 0.4}  # of the measured ceiling of products that training is taken to reach
TRAINED, THROWN_AWAY, FROZEN = "trained", "trained, not kept", "frozen"
CPU = torch.device("cpu")


class Network(NamedTuple):
    """One network of a run; `fate` is `TRAINED`, `THROWN_AWAY` (trained, but no part of the model) or `FROZEN`."""

    name: str
    fate: str
    parameters: int
    bytes: int

    @classmethod
    def of(cls, name: str, fate: str, module: nn.Module) -> "Network":
        """Count a module's weights."""
        weights = list(module.parameters())
        return cls(name, fate, sum(w.numel() for w in weights), sum(w.numel() * w.itemsize for w in weights))


class StepCosts(NamedTuple):
    """What one process does in a step.

    Attributes:
        operations: of products, the mean over the run's steps.
        peak: bytes that the step takes at most, besides weights, averages and the optimiser's state.
        again: further operations with `checkpoint_activations`.
        peak_again: `peak` with `checkpoint_activations`.
    """

    operations: float
    peak: float
    again: float
    peak_again: float


class Counter(TorchDispatchMode):
    """Count operations of matrix products and convolutions, and the bytes that tensors made inside take.

    Fake tensors have no numbers to give, so every draw and norm that a step asks for is 1, every index 0, every condition false:
    such a step trains all N tokens, plants its mistakes at the first and finds finite gradients.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.bytes = self.peak = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "prim":  # questions about a tensor, which are most of all calls
            return func(*args, **(kwargs or {}))
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1.0 if args[0].is_floating_point() else 0
        out = func(*args, **(kwargs or {}))
        if formula := flop_registry.get(func.overloadpacket):
            self.operations += formula(*args, **(kwargs or {}), out_val=out)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and (storage := leaf.untyped_storage())._cdata not in self._alive:
                self._alive.add(storage._cdata)
                self.bytes += storage.nbytes()
                weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.bytes)
        return out

    def _gone(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.bytes -= size

    def of(self, function: Callable[[], object]) -> tuple[int, int]:
        """Call it; return its operations, and the most bytes that it held beyond those held before."""
        operations, self.peak, before = self.operations, self.bytes, self.bytes
        function()
        return self.operations - operations, self.peak - before


class _Fake(FakeTensorMode):
    def __deepcopy__(self, memo: Any) -> "_Fake":  # one mode for all, also of a network that is copied
        return self


@contextmanager
def counting() -> Iterator[Counter]:
    """Make tensors without data and count them. Networks must be made on their device: they cannot be moved."""
    with (
        warnings.catch_warnings(action="ignore"),
        patch.object(nn.Module, "_apply", lambda self, *_, **__: self),
        patch.object(layers, "SCORES", 2**62),  # attention on a CPU in one part, of as many operations as in many
        _Fake(),
        Counter() as counter,
    ):
        yield counter


def count_steps(
    make_stage: Callable[[], TokenizerStage | GPTStage],
    make_batch: Callable[[], Any],
    place: torch.device,
    last_share: float = 1.0,
) -> tuple[StepCosts, list[Network]]:
    """Count a run's first and last step, and the last again with `checkpoint_activations`.

    Args:
        make_stage: called once, for a stage without `checkpoint_activations`.
        last_share: of the run's steps, those that are like the last one; the others are like the first.
    """
    with counting() as counter:
        with torch.device(place):
            stage, batch = make_stage(), make_batch()
        steps = stage.config.loop.steps
        adversary = getattr(stage, "adversary", None)
        for updater in (stage.updater, *([adversary.updater] if adversary else [])):  # so that their state is there
            for weight in updater.parameters():
                weight.grad = torch.zeros_like(weight)
            for optimizer in updater.optimizers:
                optimizer.step()
                optimizer.zero_grad()
        first, _ = counter.of(lambda: stage.step(0, batch, 0.0)) if last_share < 1 else (0, 0)
        last, peak = counter.of(lambda: stage.step(steps - 1, batch, 0.0))
        recompute_activations(stage.blocks)
        with_again, peak_again = counter.of(lambda: stage.step(steps - 1, batch, 0.0))
        costs = StepCosts(last_share * last + (1 - last_share) * first, peak, with_again - last, peak_again)
        return costs, networks_of(stage)


def networks_of(stage: TokenizerStage | GPTStage) -> list[Network]:
    """All networks of a stage, in the order that a page lists them."""
    if isinstance(stage, GPTStage):
        return [Network.of("AR model", TRAINED, stage.model)]
    networks = [Network.of(name, TRAINED, getattr(stage.model, name)) for name in ("encoder", "quantizer", "decoder")]
    if stage.networks.head is not None:
        networks.append(Network.of("head of the alignment", THROWN_AWAY, stage.networks.head))
    names: dict[type, str] = {SigLIP2: "SigLIP2", FeatureNetwork: "classifier", LPIPS: "VGG-16 (LPIPS)"}
    names[EfficientNetLite0] = "EfficientNet-Lite0"
    teachers = (stage.teachers.alignment, stage.teachers.features, stage.teachers.lpips)
    for teacher in dict.fromkeys(filter(None, teachers)):  # one may be both
        networks.append(Network.of(names[type(teacher)], FROZEN, teacher))
    judge = stage.adversary.network if stage.adversary else None
    if isinstance(judge, DINODiscriminator | ProjectedDiscriminator):
        networks += [
            Network.of("heads of the discriminator", THROWN_AWAY, judge),
            Network.of(judge.backbone_name, FROZEN, judge.backbone),
        ]
    elif judge:
        networks.append(Network.of("discriminator", THROWN_AWAY, judge))
    return networks


@dataclass(frozen=True)
class Plan:
    """A run's costs; `text` is the page that `--dry-run` prints.

    Attributes:
        of: what is trained on what.
        epochs: passes over the data; `None` if nobody knows how much there is.
        tokens: N, of an image.
        costs: of one process, with its share of the batch.
        ema: whether a moving average of the weights is kept.
        store: bytes of the token store, if the data is one.
    """

    of: str
    loop: LoopConfig
    epochs: float | None
    tokens: int
    networks: Sequence[Network]
    world_size: int
    costs: StepCosts
    ema: bool = False
    store: int = 0

    def parameters(self, *fates: str) -> int:
        """Weights of all networks of these fates."""
        return sum(network.parameters for network in self.networks if network.fate in fates)

    @property
    def operations(self) -> float:
        """Of one step, all ranks together."""
        return self.world_size * (self.costs.operations + self.loop.checkpoint_activations * self.costs.again)

    def activations(self, checkpointed: bool) -> float:
        """Bytes that a step of one process takes at most, besides gradients: what autograd keeps, copies in 16 bits, …"""
        peak = self.costs.peak_again if checkpointed else self.costs.peak
        return max(0.0, peak - 4 * self.parameters(TRAINED))

    @property
    def memory(self) -> dict[str, float]:
        """Bytes of one process, by what they hold, without activations."""
        weights = self.parameters(TRAINED, THROWN_AWAY)
        sharded = self.loop.shard and self.world_size > 1
        own = weights / self.world_size if sharded else weights
        parts = {"weights": 4 * own, "gradients": 4 * own, "Adam's averages": 8 * own}
        if self.ema:
            parts["average of the weights"] = 4 * own
        if self.world_size > 1 and not sharded:
            parts["gradients on their way"] = 4 * weights
        frozen = sum(network.bytes for network in self.networks if network.fate == FROZEN)
        return {**parts, **({"frozen weights": frozen} if frozen else {})}

    @property
    def checkpoint_bytes(self) -> float:
        """Bytes of one checkpoint: weights, Adam's averages and the moving average."""
        return (16 if self.ema else 12) * self.parameters(TRAINED, THROWN_AWAY)

    def seconds(self, products: float, share: float) -> float:
        """Of the whole run, on devices that each reach a `share` of so many operations per second."""
        return self.loop.steps * self.operations / self.world_size / (products * share)

    def text(self, products: float, share: float, device: str) -> str:
        """The plan as a page of at most 80 columns; for the arguments see `seconds`."""
        loop, total = self.loop, self.loop.steps * self.operations
        each, images = loop.batch_size // self.world_size, loop.steps * loop.batch_size
        parts = f", in {loop.accumulate} parts of {each // loop.accumulate}" if loop.accumulate > 1 else ""
        on = loop.checkpoint_activations
        epochs = "" if self.epochs is None else f": {self.epochs:,.1f} epochs"
        with_them = sum(self.memory.values()) + self.activations(on)
        count = loop.keep + (loop.steps // loop.milestone_every if loop.milestone_every else 0)
        time = _duration(self.seconds(products, share))
        sections: dict[str, list[str]] = {
            "networks": [f"{n.name:<30}{_count(n.parameters):>10}  {n.fate}" for n in self.networks],
            "length": [f"{_several(loop.steps, 'step')} of {_several(loop.batch_size, 'image')}{epochs}"],
            "tokens": [f"{self.tokens} of an image, {_count(images * self.tokens)} in all"],
            "processes": [
                f"{_several(self.world_size, 'process')}: {_several(each, 'image')} of a step for each{parts}"
            ],
            "memory": [
                *(f"{name:<30}{_bytes(size):>10}" for name, size in self.memory.items()),
                f"{'activations, about':<30}{_bytes(self.activations(on)):>10}",
                f"{'':<30}{_bytes(self.activations(not on)):>10}  {'without' if on else 'with'} checkpoint_activations",
                f"{'together, of each process':<30}{_bytes(with_them):>10}  and PyTorch's own",
            ],
            "products": [f"{_operations(self.operations)} a step, {_operations(total)} in all"],
            "time": [
                f"about {time}, if every process reaches {share:.0%} of",
                f"the {_operations(products)}/s of {loop.precision} products measured here on {device}",
            ],
            "disk": [
                f"{_bytes(count * self.checkpoint_bytes)} for {_several(count, 'checkpoint')}",
                f"{_bytes(4 * self.parameters(TRAINED))} for the model",
                *([f"{_bytes(self.store)} of tokens, which are there"] if self.store else []),
            ],
        }
        rows = [(label if not i else "", line) for label, lines in sections.items() for i, line in enumerate(lines)]
        return "\n".join([self.of, "", *(f"{label:<11}{line}" for label, line in rows)])


def processes_of_this_launch() -> World:
    """How many would train, as the launcher says; they need not be there, so `WORLD_SIZE=8` in front of a command asks for 8."""
    return World(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))


def print_plan(config: TokenizerTraining | GPTTraining, device: str | None = None) -> None:
    """Measure what the device can do and print the costs of a run; nothing is written or downloaded but the data's own.

    Raises:
        DetailFlowError: for a device that this machine lacks, or as `plan_tokenizer` and `plan_gpt`.
    """
    place, world = choose_device(device), processes_of_this_launch()
    if not world.is_main:
        return
    plan = (
        plan_tokenizer(config, world, place)
        if isinstance(config, TokenizerTraining)
        else plan_gpt(config, world, place)
    )
    products = measure_ceilings(place, PRECISIONS[config.loop.precision], repeats=2).flops
    print(plan.text(products, SHARES["cpu" if place.type == "cpu" else "gpu"], str(place)))


def _alone(loop: LoopConfig, world: World) -> LoopConfig:
    """The loop of one process with its share of the batch.

    Raises:
        DetailFlowError: if the batch cannot be parted evenly.
    """
    loop.images_at_once(world)
    return replace(
        loop, batch_size=loop.batch_size // world.size, checkpoint_activations=False, shard=False, compile=False
    )


def plan_tokenizer(config: TokenizerTraining, world: World, place: torch.device = CPU) -> Plan:
    """Count a tokenizer's run; every step is counted as one that trains all N tokens.

    Raises:
        DetailFlowError: for images that cannot be read, or a batch that cannot be parted evenly.
    """
    source, loop = open_source(config), config.loop
    count, side = image_count(source), config.model.image_size
    alone = replace(config, loop=_alone(loop, world), revive_every=0)
    costs, networks = count_steps(
        lambda: TokenizerStage(alone, source, Path(), place, resuming=True, load=False),
        lambda: (torch.zeros(alone.loop.batch_size, side, side, 3, dtype=torch.uint8), None),
        place,
        last_share=1 - min(1.0, count_of_steps(config.adversarial_from, loop.steps) / loop.steps)
        if config.adversarial
        else 1.0,
    )
    epochs = loop.steps / BatchOrder(count, loop.batch_size, loop.seed).steps_per_epoch if count else None
    images = _several(count, "image") if count else "a stream of images"
    of = f"a tokenizer, on {images} of {_several(len(source.class_names), 'class')}"
    return Plan(of, loop, epochs, config.model.num_tokens, networks, world.size, costs)


def plan_gpt(config: GPTTraining, world: World, place: torch.device = CPU) -> Plan:
    """Count an AR model's run.

    Raises:
        DetailFlowError: for a store or a tokenizer that cannot be read, sizes that contradict each other, or a batch that the
            processes cannot share evenly.
    """
    store, loop = TokenStore.open(config.tokens), config.loop
    known = config_from_dict(TokenizerConfig, hub.load_config(config.tokenizer, "tokenizer"), config.tokenizer)
    with torch.device("meta"):
        tokenizer = DetailFlowTokenizer(known)
    sizes = model_config(config, store, tokenizer)
    alone = replace(config, loop=_alone(loop, world))
    rows, n = alone.loop.batch_size, sizes.num_tokens
    costs, networks = count_steps(
        lambda: GPTStage(alone, sizes, store, tokenizer, place, resuming=True),  # so no weights to start from are read
        lambda: [torch.zeros(shape, dtype=torch.long) for shape in ((rows,), (rows, n), (rows, n))],
        place,
    )
    epochs = loop.steps / BatchOrder(len(store), loop.batch_size, loop.seed).steps_per_epoch
    size = sum(path.stat().st_size for path in Path(config.tokens).rglob("*") if path.is_file())
    crops = _several(store.info.crops, "crop")
    of = f"an AR model, on {_several(len(store), 'image')} of {_several(sizes.num_classes, 'class')}, {crops} of each"
    return Plan(of, loop, epochs, n, networks, world.size, costs, ema=True, store=size)


def _several(number: int, word: str) -> str:
    return f"{number:,} {word}" + ("" if number == 1 else "es" if word.endswith("s") else "s")


def _count(value: float) -> str:
    return _scaled(value, {1e12: "T", 1e9: "G", 1e6: "M"}, ",.1f") or f"{value:,.0f}"


def _operations(value: float) -> str:
    return _scaled(value, {1e18: " EFLOP", 1e15: " PFLOP", 1e12: " TFLOP"}, ",.3g") or f"{value / 1e9:,.3g} GFLOP"


def _bytes(value: float) -> str:
    return _scaled(value, {2**30: " GiB", 2**20: " MiB", 2**10: " KiB"}, ",.1f") or f"{value:,.0f} bytes"


def _duration(seconds: float) -> str:
    units = ((86400, "days"), (3600, "hours"), (60, "minutes"))
    return next(
        (f"{seconds / size:,.1f} {name}" for size, name in units if seconds >= 2 * size), f"{seconds:,.0f} seconds"
    )


def _scaled(value: float, units: dict[float, str], form: str) -> str | None:
    """`value` in the first unit that it is at least one of."""
    return next((f"{value / size:{form}}{unit}" for size, unit in units.items() if value >= size), None)
