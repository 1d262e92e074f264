"""The small networks that train the tokenizer and are then thrown away."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from detailflow.device import autocast

FEATURE_WIDTHS = (32, 64, 128, 192)
SMALLEST_SIDE = 2 ** (len(FEATURE_WIDTHS) - 1)  # which the last map of features halves to one pixel


class FeatureNetwork(nn.Module):
    """A small residual classifier of images, whose features stand in for LPIPS's and SigLIP2's where no weights can be had.

    It is trained on the labels of the tokenizer's own images before the tokenizer (`train_classifier`).
    """

    width = FEATURE_WIDTHS[-1]  # of `alignment_target`

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        pairs = zip((3, *FEATURE_WIDTHS[:-1]), FEATURE_WIDTHS, strict=True)
        self.enter = nn.ModuleList(_convolution(i, o) for i, o in pairs)
        self.refine = nn.ModuleList(_convolution(w, w) for w in FEATURE_WIDTHS)
        self.head = nn.Linear(FEATURE_WIDTHS[-1], num_classes)

    def features(self, images: Tensor) -> list[Tensor]:
        """(B, 3, R, R) → four maps, each half the side of the one before."""
        maps = []
        x = images.contiguous(memory_format=torch.channels_last)
        for level, (enter, refine) in enumerate(zip(self.enter, self.refine, strict=True)):
            x = enter(F.max_pool2d(x, 2) if level else x)
            x = x + refine(x)
            maps.append(x)
        return maps

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, R, R) → (B, classes) logits."""
        return self.head(self.features(images)[-1].mean((2, 3)))

    @torch.no_grad()
    def alignment_target(self, images: Tensor) -> Tensor:
        """(B, 3, R, R) → (B, `FEATURE_WIDTHS[-1]`) float32, the mean over the last map, as `SigLIP2.alignment_target`."""
        return self.features(images)[-1].float().mean((2, 3))


def _convolution(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.GELU())


def train_classifier(
    network: FeatureNetwork,
    batches: Iterable[tuple[Tensor, Tensor]],
    steps: int,
    precision: torch.dtype,
    device: torch.device,
) -> float:
    """Train `network` for `steps` on (images, labels), freeze it; return its accuracy over the last tenth of the steps."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.05)
    total = max(steps, 10)  # torch divides by zero where the rise takes one step
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=total, pct_start=0.2)
    network.train()
    right = seen = 0
    for step, (images, labels) in zip(range(steps), batches, strict=False):
        images, labels = images.to(device), labels.to(device)
        with autocast(device, precision):
            logits = network(images).float()
        optimizer.zero_grad()
        F.cross_entropy(logits, labels, label_smoothing=0.1).backward()
        optimizer.step()
        schedule.step()
        if step >= steps * 0.9:
            right, seen = right + int((logits.argmax(-1) == labels).sum()), seen + len(labels)
    network.eval().requires_grad_(False)
    return right / max(seen, 1)


class PatchDiscriminator(nn.Module):
    """Spectral-norm convolutions that judge overlapping patches of an image; trained from scratch (for docs/method.md#losses)."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            spectral_norm(nn.Conv2d(3, width, 4, stride=2, padding=1)),
            nn.LeakyReLU(0.2),
            spectral_norm(nn.Conv2d(width, 2 * width, 4, stride=2, padding=1)),
            nn.LeakyReLU(0.2),
            spectral_norm(nn.Conv2d(2 * width, 2 * width, 3, padding=1)),
            nn.LeakyReLU(0.2),
            spectral_norm(nn.Conv2d(2 * width, 1, 3, padding=1)),
        )

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, R, R) → (B, 1, R/4, R/4) logits, high for real."""
        return self.layers(images.contiguous(memory_format=torch.channels_last))


class AlignmentHead(nn.Sequential):
    """From the first token's code to what a teacher says of the whole image: (B, d) → (B, width) (docs/method.md#losses)."""

    def __init__(self, d: int, width: int, hidden: int = 1024) -> None:
        super().__init__(nn.Linear(d, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, width))
