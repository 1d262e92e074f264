"""The adversarial loss: a discriminator, how it learns, and what it asks of the tokenizer (docs/method.md#losses)."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from detailflow.device import autocast
from detailflow.processes import Processes
from detailflow.training.augment import DRAWS, diff_augment
from detailflow.training.discriminator import CROP_DRAWS, DINODiscriminator
from detailflow.training.loop import PRECISIONS, LoopConfig
from detailflow.training.losses import consistency_loss, discriminator_loss, generator_loss, lecam_loss
from detailflow.training.networks import PatchDiscriminator
from detailflow.training.updates import Updater, gradients_stay

PATCH = "patch"  # the discriminator that needs no download
# Of each image in a step. What is made of it is two pictures, clean and corrected, whose views are neighbours.
TOKENIZERS, REAL, FAKE, STRONG_REAL, STRONG_FAKE, VIEWS = 0, 2, 3, 5, 6, 8
PLAIN_CUTOUT, STRONG_CUTOUT = 0.2, 0.5  # the latter for the consistency loss
ANCHOR_DECAY = 0.999  # of LeCAM's moving averages


class Draws(NamedTuple):
    """What is random in one step: (B, VIEWS, DRAWS) to augment each image, and (VIEWS, CROP_DRAWS) for the crops of all."""

    views: Tensor
    crops: Tensor

    @classmethod
    def make(cls, count: int) -> "Draws":
        """For `count` images, from torch's generator."""
        return cls(torch.rand(count, VIEWS, DRAWS), torch.rand(VIEWS, CROP_DRAWS))

    def of(self, images: slice) -> "Draws":
        """For some of them."""
        return Draws(self.views[images], self.crops)


class _Judgement(nn.Module):
    """All that the discriminator says in one of its steps, as one call, which is what DistributedDataParallel asks for."""

    def __init__(self, network: nn.Module, augment: bool, consistency: bool) -> None:
        super().__init__()
        self.network, self.augment, self.consistency = network, augment, consistency

    def forward(self, real: Tensor, fake: Tensor, draws: Draws) -> tuple[Tensor, ...]:
        """Logits of real and fake, and, for the consistency loss, of both under strong augmentation."""
        plain = (self.judge(real, draws, REAL), self.judge(fake, draws, FAKE))
        if not self.consistency:
            return plain
        return (*plain, self.judge(real, draws, STRONG_REAL, True), self.judge(fake, draws, STRONG_FAKE, True))

    def judge(self, images: Tensor, draws: Draws, view: int, strong: bool = False) -> Tensor:
        """(B, 3, H, W) → logits; or (B + b, …), where those after the first B are made of the first b images again."""
        more = len(images) - len(draws.views)
        views = torch.cat((draws.views[:, view], draws.views[:more, view + 1])) if more else draws.views[:, view]
        if strong:
            images = diff_augment(images, views, STRONG_CUTOUT, probability=1.0)
        elif self.augment:
            images = diff_augment(images, views, PLAIN_CUTOUT)
        if isinstance(self.network, DINODiscriminator):
            return self.network(images, draws.crops[view])
        return self.network(images)


class Adversary:
    """A discriminator and its optimiser.

    Args:
        network: "patch", "dino", or a file of DINO's weights.
        augment: whether it sees images through DiffAugment.
        lecam, consistency: weights of its regularisers.
        load: whether to read DINO's weights; those of a plan are random.
    """

    def __init__(
        self,
        network: str,
        loop: LoopConfig,
        augment: bool,
        lecam: float,
        consistency: float,
        device: torch.device,
        processes: Processes,
        load: bool = True,
    ) -> None:
        self.device, self.precision, self.processes = device, PRECISIONS[loop.precision], processes
        self.lecam, self.consistency = lecam, consistency
        made = PatchDiscriminator() if network == PATCH else DINODiscriminator(None if network == "dino" else network, load)
        self.network = made.to(device).train()
        self.any_side = isinstance(made, DINODiscriminator)  # or the tokenizer's full size alone
        self.judgement: nn.Module = _Judgement(self.network, augment, consistency > 0)
        self.judge = self.judgement.judge
        if processes.count > 1:
            self.judgement = DistributedDataParallel(self.judgement)
        parameters = list(self.network.parameters())
        adam = torch.optim.Adam(parameters, lr=loop.learning_rate, betas=(0.9, 0.95), fused=True)
        self.updater = Updater(adam, loop, device)
        self.anchors = torch.zeros(2, device=device)  # moving averages of the logits of real and fake

    def generator_loss(self, pixels: Tensor, draws: Draws) -> Tensor:
        """What the tokenizer is to make smaller, of (B + b, 3, s, s) pixels: clean, and corrected for the first b images."""
        self.network.requires_grad_(False)
        with autocast(self.device, self.precision):
            logits = self.judge(pixels, draws, TOKENIZERS)
        self.network.requires_grad_(True)
        return generator_loss(logits.float())

    def step(self, parts: Sequence[tuple[Tensor, Tensor, Draws]], rate: float) -> dict[str, Tensor | float]:
        """One step on (B real, B + b fake, draws) in several parts; its loss terms, to log."""
        logged: dict[str, Tensor] = {}
        means = torch.zeros(2, device=self.device)
        for i, (real, fake, draws) in enumerate(parts):
            with gradients_stay(self.judgement, i + 1 < len(parts)):
                with autocast(self.device, self.precision):
                    logits = [x.float() for x in self.judgement(real, fake.detach(), draws)]
                losses = {"discriminator": discriminator_loss(*logits[:2])}
                if self.lecam:
                    losses["lecam"] = lecam_loss(*logits[:2], *self.anchors.unbind())
                if self.consistency:
                    losses["consistency"] = sum((consistency_loss(a, b) for a, b in zip(logits[:2], logits[2:], strict=True)))  # type: ignore[assignment]
                weights = {"discriminator": 1.0, "lecam": self.lecam, "consistency": self.consistency}
                total = torch.stack([weights[name] * loss for name, loss in losses.items()]).sum() / len(parts)
                self.updater.backward(total)
            for name, loss in losses.items():
                logged[name] = logged.get(name, 0) + loss.detach() / len(parts)
            means += torch.stack([x.detach().mean() for x in logits[:2]]) / len(parts)
        norm = self.updater.step(rate)
        if self.lecam and bool((means := self.processes.mean(means)).isfinite().all()):
            self.anchors.lerp_(means, 1 - ANCHOR_DECAY)
        return {**logged, "discriminator_gradient_norm": norm}

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"network": self.network.state_dict(), "anchors": self.anchors, "updater": self.updater.state()}

    def restore(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""
        self.network.load_state_dict(state["network"])
        self.anchors.copy_(state["anchors"])
        self.updater.restore(state["updater"])
