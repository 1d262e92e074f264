"""Count a training step's operations and memory on tensors that have shapes but no data."""

import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Generic, NamedTuple, TypeVar
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from detailflow.distributed import World
from detailflow.machine import keep_freed_memory
from detailflow.models import layers
from detailflow.native import training as in_cpp
from detailflow.training.config import LoopConfig
from detailflow.training.optimizer import Updater, recompute_activations

Stage = TypeVar("Stage")
TRIED_STEPS, TRIED_SECONDS = 3, 5.0


class Trial(NamedTuple, Generic[Stage]):
    """What a step is counted or tried with: makers of the stage, without `checkpoint_activations`, and its batch."""

    make_stage: Callable[[], Stage]
    make_batch: Callable[[], Any]
    device: torch.device

    def costs(self) -> tuple["StepCosts", Stage]:
        """Count the first and last step, and the last again with `checkpoint_activations`; also return the stage."""
        with counting() as counter:
            with torch.device(self.device):
                made, batch = self.make_stage(), self.make_batch()
            stage: Any = made
            last_step = stage.config.loop.steps - 1
            adversary = getattr(stage, "adversary", None)
            averages = sum(map(_take_step, (stage.updater, *([adversary.updater] if adversary else []))))
            first, _ = counter.of(lambda: stage.step(0, batch, 0.0))
            last, peak = counter.of(lambda: stage.step(last_step, batch, 0.0))
            recompute_activations(stage.blocks)
            recomputed, peak_recomputed = counter.of(lambda: stage.step(last_step, batch, 0.0))
            return StepCosts(first, last, peak, recomputed - last, peak_recomputed, averages), made

    def seconds(self) -> float:
        """Return the seconds of a real step like the run's last, the shortest of a few."""
        keep_freed_memory()
        stage: Any = self.make_stage()
        batch, last = self.make_batch(), stage.config.loop.steps - 1

        def step() -> None:
            stage.step(last, batch, 0.0)
            if self.device.type != "cpu":
                torch.accelerator.synchronize(self.device)

        return shortest(step, TRIED_STEPS)


class StepCosts(NamedTuple):
    """What one process does in a step.

    Attributes:
        first, last: operations of the run's first and last step, which has all losses.
        peak: bytes that the last step takes at most, besides weights, averages and the optimiser's state.
        recomputed: further operations with `checkpoint_activations`.
        peak_recomputed: `peak` with `checkpoint_activations`.
        averages: bytes of the optimisers' state.
    """

    first: float
    last: float
    peak: float = 0.0
    recomputed: float = 0.0
    peak_recomputed: float = 0.0
    averages: float = 0.0


class Counter(TorchDispatchMode):
    """Count operations of matrix products and convolutions, and the bytes of tensors that are made inside.

    Fake tensors have no values, so every draw and norm that a step asks for is 1, every index 0, every condition false:
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
        if func is torch.ops.aten._pin_memory.default:  # on the way to a GPU; fake tensors cannot
            return args[0]
        out = func(*args, **(kwargs or {}))
        if formula := flop_registry.get(func.overloadpacket):
            self.operations += formula(*args, **(kwargs or {}), out_val=out)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and (storage := leaf.untyped_storage())._cdata not in self._alive:
                self._alive.add(storage._cdata)
                self.bytes += storage.nbytes()
                weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.bytes)
        return out

    def _freed(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.bytes -= size

    def of(self, function: Callable[[], object]) -> tuple[int, int]:
        """Call a function; return its operations, and the most bytes that it takes at once."""
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
        patch.object(in_cpp, "is_plain", lambda x: x.device.type == "cpu"),  # the same tensors as in a real step
        patch.object(in_cpp, "call", lambda *_: None),
        patch.object(layers, "SCORES", 2**62),  # attention on a CPU in one part, of as many operations as in many
        _Fake(),
        Counter() as counter,
    ):
        yield counter


def shortest(work: Callable[[], object], calls: int) -> float:
    """Return the seconds of the fastest of some calls; none begins after `TRIED_SECONDS`."""
    times: list[float] = []
    while len(times) < calls and sum(times) <= TRIED_SECONDS:
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def _take_step(updater: Updater) -> int:
    """Take a step, so that the optimisers have their state; return its bytes."""
    for weight in updater.parameters():
        weight.grad = torch.zeros_like(weight)
    for optimizer in updater.optimizers:
        optimizer.step()
        optimizer.zero_grad()
    states = tree_leaves([list(optimizer.state.values()) for optimizer in updater.optimizers])
    return sum(value.nbytes for value in states if isinstance(value, Tensor))


def of_one_rank(loop: LoopConfig, world: World) -> LoopConfig:
    """Return the loop of one process with its part of the batch."""
    loop.images_at_once(world)
    part = loop.batch_size // world.size
    return replace(loop, batch_size=part, checkpoint_activations=False, shard=False, compile=False)
