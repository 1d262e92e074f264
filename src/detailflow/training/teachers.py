"""The frozen networks that the tokenizer learns from, for the perceptual and the alignment loss."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from detailflow.data.source import ImageSource
from detailflow.data.streams import StreamSource
from detailflow.device import precision_dtype
from detailflow.distributed import World
from detailflow.models.efficientnet import EFFICIENTNET, EfficientNetLite0
from detailflow.models.lpips import LPIPS, SMALLEST_SIDE
from detailflow.models.siglip2 import SigLIP2
from detailflow.training.classifier import FeatureNetwork, trained_classifier
from detailflow.training.config import CLASSIFIER, PROJECTED_BOTH, TokenizerTraining
from detailflow.training.images import crops, image_count
from detailflow.training.losses import perceptual_loss

CLASSIFIER_BATCH = 256


class Teachers(NamedTuple):
    """What the settings ask for.

    Attributes:
        features: to compare.
        lpips: instead of them.
        alignment: the teacher of the first token.
        classifier: the discriminator sees its features.
    """

    features: EfficientNetLite0 | FeatureNetwork | None
    lpips: LPIPS | None
    alignment: SigLIP2 | EfficientNetLite0 | FeatureNetwork | None
    classifier: FeatureNetwork | None = None

    @property
    def width(self) -> int | None:
        """The size of the alignment teacher's features; `None` if there is no such teacher."""
        return None if self.alignment is None else self.alignment.width

    def distance(self, pixels: Tensor, target: Tensor, corrected: int) -> Tensor:
        """Return the perceptual loss of (B + corrected, 3, s, s) pixels, the last of the first images again."""
        if self.lpips is not None:
            if pixels.shape[-1] < SMALLEST_SIDE:  # VGG would pool small coarse images to nothing
                side = (SMALLEST_SIDE, SMALLEST_SIDE)
                pixels, target = (F.interpolate(x, side, mode="nearest") for x in (pixels, target))
            return self.lpips(pixels, target)
        assert self.features is not None
        with torch.no_grad():
            wanted = self.features.features(target)
        return perceptual_loss(self.features.features(pixels), [torch.cat((w, w[:corrected])) for w in wanted])


def find_teachers(
    config: TokenizerTraining,
    source: ImageSource | StreamSource,
    output: Path,
    device: torch.device,
    world: World,
    load: bool = True,
) -> Teachers:
    """Load pretrained networks, and train the classifier; without `load` all weights are random, as for a plan."""
    shared: dict[str, Any] = {}  # one network may serve both losses

    def find(loss: str, name: str) -> Any:
        if name in shared:
            return shared[name]
        instead = f"or train with {loss}_network: classifier, or {loss}: 0"
        if name == CLASSIFIER:
            shared[name] = classifier()
        elif name == EFFICIENTNET:
            shared[name] = EfficientNetLite0.from_package(f"the {loss} loss", instead, load=load).to(device)
        elif loss == "perceptual":
            return LPIPS(None if name == "lpips" else name, load, "perceptual_network", instead).to(device)
        else:
            tower = SigLIP2.from_pretrained if load else SigLIP2.without_weights
            return tower(name, device=device, dtype=precision_dtype(config.loop.precision, device))
        return shared[name]

    def classifier() -> FeatureNetwork:
        num_classes, size = len(source.class_names), min(CLASSIFIER_BATCH, image_count(source) or CLASSIFIER_BATCH)
        if not load:
            return FeatureNetwork(num_classes).to(device).eval().requires_grad_(False)
        return trained_classifier(config, num_classes, lambda: crops(config, source, size), output, device, world)

    perceptual = find("perceptual", config.perceptual_network) if config.perceptual > 0 else None
    alignment = find("alignment", config.alignment_network) if config.alignment > 0 else None
    lpips = perceptual if isinstance(perceptual, LPIPS) else None
    judges = config.adversarial > 0 and config.adversarial_network == PROJECTED_BOTH
    return Teachers(None if lpips else perceptual, lpips, alignment, find("", CLASSIFIER) if judges else None)
