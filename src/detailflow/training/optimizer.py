"""From a loss to new weights: loss scaling, gradient clipping, and no step for gradients that are not finite."""

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

from detailflow.training.config import LoopConfig


def muon(
    trained: Iterable[nn.Parameter], blocks: Iterable[nn.Module], rate: float, weight_decay: float = 0.0
) -> tuple[list[nn.Parameter], list[torch.optim.Optimizer]]:
    """Return the weights that are left for Adam, and Muon of the blocks' matrices (docs/method.md#beyond-the-paper).

    At the same rate it moves these as far as Adam would; at a rate of 0 there is none.
    """
    matrices = [p for block in blocks for p in block.parameters() if p.ndim == 2 and p.requires_grad and rate]
    taken = {id(p) for p in matrices}
    settings: Any = dict(weight_decay=weight_decay, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    made: list[torch.optim.Optimizer] = [torch.optim.Muon(matrices, lr=rate, **settings)] if matrices else []
    return [p for p in trained if id(p) not in taken], made


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
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")

    def backward(self, loss: Tensor) -> None:
        """Add this loss's gradients."""
        self.scaler.scale(loss).backward()

    def step(self, rate: float) -> Tensor:
        """Change the weights at this learning rate and reset the gradients; if these are not finite, change nothing.

        The device decides that itself if the optimizer is fused, so that nobody waits for it.

        Returns:
            The norm of all gradients before clipping.
        """
        for optimizer, ratio in zip(self.optimizers, self.ratios, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * ratio
            self.scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters(), self.clip)
        if sharded := isinstance(norm, torch.distributed.tensor.DTensor):
            norm = norm.full_tensor()
        for optimizer in self.optimizers:  # all or none: clipping spreads what is not finite to all gradients
            if optimizer.defaults.get("fused") and not sharded:
                optimizer.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]
                optimizer.step()
                del optimizer.found_inf  # type: ignore[attr-defined]
            elif math.isfinite(float(norm)):
                self.scaler.step(optimizer)
        if self.scaler.is_enabled():
            self.scaler.update()
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        return norm

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint needs."""
        return {
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "scaler": self.scaler.state_dict(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            own = optimizer.state_dict()["param_groups"]  # the settings, which are this run's
            optimizer.load_state_dict({"state": saved["state"], "param_groups": own})
        self.check()
        self.scaler.load_state_dict(state["scaler"])

    def check(self) -> None:
        """Check that the optimizers' state is whole and has the parameters' shapes, which torch would find out late."""
        for optimizer in self.optimizers:
            muon = isinstance(optimizer, torch.optim.Muon)
            for parameter, state in optimizer.state.items():
                for name in ("momentum_buffer",) if muon else ("step", "exp_avg", "exp_avg_sq"):
                    expected = torch.Size() if name == "step" else parameter.shape
                    if state[name].shape != expected:
                        raise ValueError(f"{name} has shape {state[name].shape}, not {tuple(expected)}")

    def parameters(self) -> Iterable[Tensor]:
        """Return the weights of all optimisers."""
        return (
            parameter
            for optimizer in self.optimizers
            for group in optimizer.param_groups
            for parameter in group["params"]
        )


def no_sync(network: nn.Module, more_follow: bool) -> AbstractContextManager[None]:
    """Skip the gradient all-reduce of a backward pass if more micro-batches follow."""
    if isinstance(network, FSDPModule):
        network.set_requires_gradient_sync(not more_follow)
    return network.no_sync() if more_follow and isinstance(network, DistributedDataParallel) else nullcontext()


def recompute_activations(blocks: Iterable[nn.Module]) -> None:
    """Let each block keep only its inputs and compute the rest again in the backward pass (arXiv 1604.06174)."""
    for block in blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
