"""A small classifier of the user's own images, whose features stand in for pretrained ones."""

import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detailflow.data.batches import ImageBatches, StreamedBatches
from detailflow.device import autocast, precision_dtype
from detailflow.distributed import World
from detailflow.errors import DetailFlowError, os_errors
from detailflow.models.layers import convolution
from detailflow.progress import LONG_RUN, progress_bar
from detailflow.runs import FEATURES_FILE
from detailflow.torch_files import load_torch, save_torch
from detailflow.training.config import TokenizerTraining

_log = logging.getLogger(__name__)

FEATURE_WIDTHS = (32, 64, 128, 192)


class FeatureNetwork(nn.Module):
    """A small residual classifier, trained on the labels of the tokenizer's own images before the tokenizer."""

    width = FEATURE_WIDTHS[-1]  # of `alignment_target`

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        pairs = zip((3, *FEATURE_WIDTHS[:-1]), FEATURE_WIDTHS, strict=True)
        self.enter = nn.ModuleList(convolution(i, o) for i, o in pairs)
        self.refine = nn.ModuleList(convolution(w, w) for w in FEATURE_WIDTHS)
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
        """(B, 3, R, R) → (B, `width`) float32, the mean over the last map, as `SigLIP2.alignment_target`."""
        return self.features(images)[-1].float().mean((2, 3))


def train_classifier(
    network: FeatureNetwork,
    batches: Iterable[tuple[Tensor, Tensor]],
    steps: int,
    precision: torch.dtype,
    device: torch.device,
) -> float:
    """Train and freeze `network`; return its accuracy in the last tenth of the steps, in one at least."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.05)
    total = max(steps, 10)  # torch divides by zero if the rise takes one step
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
        if step >= min(steps * 0.9, steps - 1):
            right, seen = right + int((logits.argmax(-1) == labels).sum()), seen + len(labels)
    network.eval().requires_grad_(False)
    return right / max(seen, 1)


def trained_classifier(
    config: TokenizerTraining,
    num_classes: int,
    make_batches: Callable[[], ImageBatches | StreamedBatches],
    output: Path,
    device: torch.device,
    world: World,
) -> FeatureNetwork:
    """Return the frozen classifier that the run's folder has; the main process trains it if there is none yet."""
    network, path = FeatureNetwork(num_classes).to(device), output / FEATURES_FILE
    with world.raise_together(), world.others_wait() as heartbeat:  # it may take longer than a collective call can wait
        if world.is_main and not path.exists():
            _train(network, config, make_batches, heartbeat)
            with os_errors(f"cannot write {path}"):
                save_torch(path, network.state_dict())
    with world.raise_together():
        try:
            network.load_state_dict(load_torch(path))
        except Exception as error:  # torch raises many kinds for a damaged file
            what = f"{path} is damaged, or of other classes: remove it to train the classifier again"
            raise DetailFlowError(what) from error
    return network.eval().requires_grad_(False)


def _train(
    network: FeatureNetwork,
    config: TokenizerTraining,
    make_batches: Callable[[], ImageBatches | StreamedBatches],
    heartbeat: Callable[[], None],
) -> None:
    torch.manual_seed(config.loop.seed)
    images = make_batches()
    steps = config.classifier_epochs * images.steps_per_epoch

    def heard(batches: Iterable[Any]) -> Iterator[Any]:
        for batch in batches:
            heartbeat()
            yield batch

    with progress_bar(heard(images), desc="features", unit="step", total=steps, **LONG_RUN) as bar:
        device = next(network.parameters()).device
        accuracy = train_classifier(network, bar, steps, precision_dtype(config.loop.precision, device), device)
    _log.info("feature network: %s of the last training images recognised", f"{accuracy:.1%}")
