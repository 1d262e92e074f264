"""What stands between a loss and new weights: loss scaling, clipping, and the refusal of gradients that are not finite."""

import functools
import math
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from detailflow.training.config import PRECISIONS, LoopConfig


class Updater:
    """Optimisers of one loss and its scale (which only float16 needs).

    The learning rate of a step is that of the first; those of the others keep the ratio to it that they began with.
    """

    def __init__(
        self,
        optimizers: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        config: LoopConfig,
        device: torch.device,
    ) -> None:
        self.optimizers = [optimizers] if isinstance(optimizers, torch.optim.Optimizer) else list(optimizers)
        self.clip = config.grad_clip
        rates = [float(optimizer.param_groups[0]["lr"]) for optimizer in self.optimizers]
        self.ratios = [rate / rates[0] for rate in rates]
        self.scaler = torch.amp.GradScaler(device.type, enabled=PRECISIONS[config.precision] == torch.float16)

    def backward(self, loss: Tensor) -> None:
        """Add this loss's gradients."""
        self.scaler.scale(loss).backward()

    def step(self, rate: float) -> float:
        """Change the weights, at this learning rate, and forget the gradients; nothing changes where they are not finite.

        Returns:
            the norm of all gradients before clipping.
        """
        for optimizer, ratio in zip(self.optimizers, self.ratios, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * ratio
            self.scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters(), self.clip)
        if isinstance(norm, torch.distributed.tensor.DTensor):
            norm = norm.full_tensor()
        size = float(norm)
        if math.isfinite(size):
            for optimizer in self.optimizers:
                self.scaler.step(optimizer)
        if self.scaler.is_enabled():
            self.scaler.update()
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        return size

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "scaler": self.scaler.state_dict(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            own = optimizer.state_dict()["param_groups"]  # the settings, which are this run's
            optimizer.load_state_dict({"state": saved["state"], "param_groups": own})
        self.check()
        self.scaler.load_state_dict(state["scaler"])

    def check(self) -> None:
        """Check that what the optimisers remember of each parameter is all there and has its shape, as torch would find out late.

        Raises:
            ValueError, KeyError, AttributeError: if not.
        """
        pairs = [
            (optimizer, parameter, known)
            for optimizer in self.optimizers
            for parameter, known in optimizer.state.items()
        ]
        for optimizer, parameter, known in pairs:
            for name in (
                ("momentum_buffer",) if isinstance(optimizer, torch.optim.Muon) else ("step", "exp_avg", "exp_avg_sq")
            ):
                shape = known[name].shape
                if shape != (torch.Size() if name == "step" else parameter.shape):
                    raise ValueError(f"{name} has shape {shape}, not {tuple(parameter.shape)}")

    def parameters(self) -> Iterable[Tensor]:
        """Return the weights of all optimisers."""
        return (
            parameter
            for optimizer in self.optimizers
            for group in optimizer.param_groups
            for parameter in group["params"]
        )


def gradients_stay(network: nn.Module, stay: bool) -> AbstractContextManager[None]:
    """The context of a backward pass after which gradients stay with each process, as more of them will come; or don't."""
    if isinstance(network, FSDPModule):
        network.set_requires_gradient_sync(not stay)
    return network.no_sync() if stay and isinstance(network, DistributedDataParallel) else nullcontext()


def recompute_activations(blocks: Iterable[nn.Module]) -> None:
    """Let each block keep its inputs alone, and compute the rest again on the way back (Chen et al., arXiv 1604.06174)."""
    for block in blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
