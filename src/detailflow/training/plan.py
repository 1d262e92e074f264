"""What a run will cost, before it starts: memory, operations, time and disk, from the settings and the data's count."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from detailflow import hub
from detailflow.data.loader import BatchOrder
from detailflow.data.tokens import TokenStore
from detailflow.device import choose_device
from detailflow.machine import measure_ceilings
from detailflow.models.loading import config_from_dict
from detailflow.models.tokenizer import DetailFlowTokenizer, TokenizerConfig
from detailflow.processes import Processes
from detailflow.training.costs import (
    FROZEN,
    THROWN_AWAY,
    TRAINED,
    Network,
    alignment_networks,
    discriminator_networks,
    gpt_network,
    perceptual_network,
    tokenizer_networks,
)
from detailflow.training.gpt import GPTTraining, model_config
from detailflow.training.loop import PRECISIONS, LoopConfig
from detailflow.training.teachers import image_count, open_source
from detailflow.training.tokenizer import TokenizerTraining, count_of_steps

SHARES = {"cpu": 0.5, "gpu": 0.4}  # of the measured ceiling of products that training is taken to reach


@dataclass(frozen=True)
class Plan:
    """A run's costs; `text` is the page that `--dry-run` prints.

    Attributes:
        of: what is trained on what.
        epochs: passes over the data; `None` where nobody knows how much there is.
        tokens: N, of an image.
        ema: whether a moving average of the weights is kept.
        store: bytes of the token store, where the data is one.
    """

    of: str
    loop: LoopConfig
    epochs: float | None
    tokens: int
    networks: tuple[Network, ...]
    processes: int
    ema: bool = False
    store: int = 0

    def parameters(self, *fates: str) -> int:
        """Weights of all networks of these fates."""
        return sum(network.parameters for network in self.networks if network.fate in fates)

    @property
    def operations(self) -> float:
        """Of one step, all processes together."""
        again = sum(network.again for network in self.networks) if self.loop.checkpoint_activations else 0.0
        return self.loop.batch_size * (again + sum(network.operations for network in self.networks))

    def activations(self, checkpointed: bool) -> float:
        """Bytes that one process keeps for the way back, of the images that it works on at once."""
        kept = (n.activations if n.kept is None or not checkpointed else n.kept for n in self.networks)
        return sum(kept) * self.loop.batch_size / self.processes / self.loop.accumulate

    @property
    def memory(self) -> dict[str, float]:
        """Bytes of one process, by what they hold, without activations."""
        weights = self.parameters(TRAINED, THROWN_AWAY)
        sharded = self.loop.shard and self.processes > 1
        own = weights / self.processes if sharded else weights
        parts = {"weights": 4 * own, "gradients": 4 * own, "Adam's averages": 8 * own}
        if self.ema:
            parts["average of the weights"] = 4 * own
        if self.loop.precision != "fp32":
            parts[f"{self.loop.precision} copies"] = 2 * weights
        if self.processes > 1 and not sharded:
            parts["gradients on their way"] = 4 * weights
        frozen = sum(network.parameters * network.weight_bytes for network in self.networks if network.fate == FROZEN)
        return {**parts, **({"frozen weights": frozen} if frozen else {})}

    @property
    def checkpoint_bytes(self) -> float:
        """Bytes of one checkpoint: weights, Adam's averages and the moving average."""
        return (16 if self.ema else 12) * self.parameters(TRAINED, THROWN_AWAY)

    def seconds(self, products: float, share: float) -> float:
        """Of the whole run, on devices that each reach a `share` of so many operations per second."""
        return self.loop.steps * self.operations / self.processes / (products * share)

    def text(self, products: float, share: float, device: str) -> str:
        """The plan as a page of at most 80 columns; for the arguments see `seconds`."""
        loop, total = self.loop, self.loop.steps * self.operations
        each, images = loop.batch_size // self.processes, loop.steps * loop.batch_size
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
            "processes": [f"{_several(self.processes, 'process')}: {_several(each, 'image')} of a step for each{parts}"],
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


def processes_of_this_launch() -> Processes:
    """How many would train, as the launcher says; they need not be there, so `WORLD_SIZE=8` in front of a command asks for 8."""
    return Processes(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))


def print_plan(config: TokenizerTraining | GPTTraining, device: str | None = None) -> None:
    """Measure what the device can do and print the costs of a run; nothing is written or downloaded but the data's own.

    Raises:
        DetailFlowError: for a device that this machine lacks, or as `plan_tokenizer` and `plan_gpt`.
    """
    place, processes = choose_device(device), processes_of_this_launch()
    if not processes.is_main:
        return
    on_cpu = place.type == "cpu"
    if isinstance(config, TokenizerTraining):
        plan = plan_tokenizer(config, processes, on_cpu)
    else:
        plan = plan_gpt(config, processes, on_cpu)
    products = measure_ceilings(place, PRECISIONS[config.loop.precision], repeats=2).products
    print(plan.text(products, SHARES["cpu" if on_cpu else "gpu"], str(place)))


def plan_tokenizer(config: TokenizerTraining, processes: Processes, on_cpu: bool = False) -> Plan:
    """The costs of a tokenizer's run; every step is counted as one that trains all N tokens.

    Raises:
        DetailFlowError: for images that can't be read, or a batch that can't be parted evenly.
    """
    source = open_source(config)
    count = image_count(source)
    config.loop.images_at_once(processes)
    loop, side, half = config.loop, config.model.image_size, config.loop.precision != "fp32"
    pictures = 1 + config.correction_share
    networks = tokenizer_networks(config.model, config.correction_share, half, on_cpu)
    if config.alignment:
        networks += alignment_networks(config.alignment_network, config.model, half)
    if config.perceptual:
        networks.append(perceptual_network(config.perceptual_network, side, pictures, half))
    if config.adversarial:
        share = 1 - min(1.0, count_of_steps(config.adversarial_from, loop.steps) / loop.steps)
        views = 2 + 2 * (config.consistency > 0)  # real and fake, and both again
        networks += discriminator_networks(config.adversarial_network, side, share, pictures, views, half)
    epochs = loop.steps / BatchOrder(count, loop.batch_size, loop.seed).steps_per_epoch if count else None
    images = _several(count, "image") if count else "a stream of images"
    of = f"a tokenizer, on {images} of {_several(len(source.class_names), 'class')}"
    return Plan(of, loop, epochs, config.model.num_tokens, tuple(networks), processes.count)


def plan_gpt(config: GPTTraining, processes: Processes, on_cpu: bool = False) -> Plan:
    """The costs of an AR model's run.

    Raises:
        DetailFlowError: for a store or a tokenizer that can't be read, sizes that contradict each other, or a batch that the
            processes can't share evenly.
    """
    store, loop = TokenStore.open(config.tokens), config.loop
    known = config_from_dict(TokenizerConfig, hub.load_config(config.tokenizer, "tokenizer"), config.tokenizer)
    with torch.device("meta"):
        sizes = model_config(config, store, DetailFlowTokenizer(known))
    loop.images_at_once(processes)
    epochs = loop.steps / BatchOrder(len(store), loop.batch_size, loop.seed).steps_per_epoch
    size = sum(path.stat().st_size for path in Path(config.tokens).rglob("*") if path.is_file())
    crops = _several(store.info.crops, "crop")
    of = f"an AR model, on {_several(len(store), 'image')} of {_several(sizes.num_classes, 'class')}, {crops} of each"
    networks = (gpt_network(sizes, loop.precision != "fp32", on_cpu),)
    return Plan(of, loop, epochs, sizes.num_tokens, networks, processes.count, ema=True, store=size)


def _several(number: int, word: str) -> str:
    return f"{number:,} {word}" + ("" if number == 1 else "es" if word.endswith("s") else "s")


def _count(value: float) -> str:
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= size:
            return f"{value / size:,.1f}{letter}"
    return f"{value:,.0f}"


def _operations(value: float) -> str:
    for size, letter in ((1e18, "E"), (1e15, "P"), (1e12, "T")):
        if value >= size:
            return f"{value / size:,.3g} {letter}FLOP"
    return f"{value / 1e9:,.3g} GFLOP"


def _bytes(value: float) -> str:
    for size, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if value >= size:
            return f"{value / size:,.1f} {unit}"
    return f"{value:,.0f} bytes"


def _duration(seconds: float) -> str:
    for size, name in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {name}"
    return f"{seconds:,.0f} seconds"
