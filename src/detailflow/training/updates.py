"""What stands between a loss and new weights: loss scaling, clipping, and the refusal of gradients that are not finite."""

import functools
import math
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from detailflow.training.loop import PRECISIONS, LoopConfig


class Updater:
    """One optimiser and its loss scale (which only float16 needs)."""

    def __init__(self, optimizer: torch.optim.Optimizer, config: LoopConfig, device: torch.device) -> None:
        self.optimizer, self.clip = optimizer, config.grad_clip
        self.scaler = torch.amp.GradScaler(device.type, enabled=PRECISIONS[config.precision] == torch.float16)

    def backward(self, loss: Tensor) -> None:
        """Add this loss's gradients."""
        self.scaler.scale(loss).backward()

    def step(self, rate: float) -> float:
        """Change the weights, at this learning rate, and forget the gradients; nothing changes where they are not finite.

        Returns:
            the norm of all gradients before clipping.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self._parameters(), self.clip)
        if isinstance(norm, torch.distributed.tensor.DTensor):
            norm = norm.full_tensor()
        size = float(norm)
        if math.isfinite(size):
            self.scaler.step(self.optimizer)
        if self.scaler.is_enabled():
            self.scaler.update()
        self.optimizer.zero_grad()
        return size

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}

    def restore(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""
        own = self.optimizer.state_dict()["param_groups"]  # the settings, which are this run's
        self.optimizer.load_state_dict({"state": state["optimizer"]["state"], "param_groups": own})
        self.check()
        self.scaler.load_state_dict(state["scaler"])

    def check(self) -> None:
        """Check that what Adam remembers of each parameter is all there and has its shape, as torch would find out late.

        Raises:
            ValueError, KeyError, AttributeError: if not.
        """
        for parameter, known in self.optimizer.state.items():
            for name in ("step", "exp_avg", "exp_avg_sq"):
                shape = known[name].shape
                if shape != (torch.Size() if name == "step" else parameter.shape):
                    raise ValueError(f"{name} has shape {shape}, not {tuple(parameter.shape)}")

    def _parameters(self) -> Iterable[Tensor]:
        return (parameter for group in self.optimizer.param_groups for parameter in group["params"])


def gradients_stay(network: nn.Module, stay: bool) -> AbstractContextManager[None]:
    """The context of a backward pass after which gradients stay with each process, as more of them will come; or don't."""
    if isinstance(network, FSDPModule):
        network.set_requires_gradient_sync(not stay)
    return network.no_sync() if stay and isinstance(network, DistributedDataParallel) else nullcontext()


def recompute_activations(blocks: Iterable[nn.Module]) -> None:
    """Let each block keep its inputs alone, and compute the rest again on the way back (Chen et al., arXiv 1604.06174)."""
    for block in blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
