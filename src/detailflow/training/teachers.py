"""The frozen networks that the tokenizer learns from: for the perceptual loss, and for the alignment of the first token."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from detailflow.data.images import ImageSource, open_images
from detailflow.data.loader import ImageBatches
from detailflow.data.streaming import StreamedBatches, StreamSource, open_stream
from detailflow.models.siglip2 import SigLIP2
from detailflow.processes import Processes
from detailflow.storage import replacing
from detailflow.training.loop import PRECISIONS
from detailflow.training.losses import perceptual_loss
from detailflow.training.networks import FeatureNetwork, train_classifier
from detailflow.training.perceptual import LPIPS, SMALLEST_SIDE

if TYPE_CHECKING:
    from detailflow.training.tokenizer import TokenizerTraining

CLASSIFIER = "classifier"  # in place of a network that would be downloaded
FEATURES_FILE = "features.pt"
CLASSIFIER_BATCH = 256


class Teachers(NamedTuple):
    """What the settings ask for: features to compare, LPIPS instead of them, and the teacher of the first token."""

    features: FeatureNetwork | None
    lpips: LPIPS | None
    alignment: SigLIP2 | FeatureNetwork | None

    @property
    def width(self) -> int | None:
        """Of what the alignment's teacher makes of an image; `None` where there is no teacher."""
        return None if self.alignment is None else self.alignment.width

    def distance(self, pixels: Tensor, target: Tensor, corrected: int) -> Tensor:
        """The perceptual loss of (B + corrected, 3, s, s) pixels: those of (B, …) `target`, and of its first images again."""
        if self.lpips is not None:
            if pixels.shape[-1] < SMALLEST_SIDE:  # small patches make coarse pictures that VGG would pool to nothing
                pixels, target = (F.interpolate(x, (SMALLEST_SIDE, SMALLEST_SIDE), mode="nearest") for x in (pixels, target))
            return self.lpips(pixels, target)
        assert self.features is not None
        with torch.no_grad():
            wanted = self.features.features(target)
        return perceptual_loss(self.features.features(pixels), [torch.cat((w, w[:corrected])) for w in wanted])


def open_source(config: "TokenizerTraining") -> ImageSource | StreamSource:
    """The images of these settings.

    Raises:
        DetailFlowError: if they can't be read.
    """
    where = (config.data, config.split, config.image_column, config.label_column)
    return open_stream(*where) if config.streaming else open_images(*where)


def image_count(source: ImageSource | StreamSource) -> int | None:
    """How many images there are, where that is known."""
    return source.num_images if isinstance(source, StreamSource) else len(source)


def crops(
    config: "TokenizerTraining",
    source: ImageSource | StreamSource,
    batch_size: int,
    start_step: int = 0,
    processes: Processes | None = None,
) -> ImageBatches | StreamedBatches:
    """The endless training crops of these settings (method §4.5)."""
    kind = StreamedBatches if isinstance(source, StreamSource) else ImageBatches
    size, loop = config.model.image_size, config.loop
    return kind(source, size, batch_size, loop.seed, loop.workers, start_step, config.flip, config.max_scale, processes)  # type: ignore[arg-type]


def find_teachers(
    config: "TokenizerTraining", source: ImageSource | StreamSource, output: Path, device: torch.device, processes: Processes
) -> Teachers:
    """Load what can be had, and train what can't.

    Raises:
        DetailFlowError: where weights can't be downloaded or read.
    """
    perceptual, alignment = config.perceptual > 0, config.alignment > 0
    lpips = None
    if perceptual and config.perceptual_network != CLASSIFIER:
        lpips = LPIPS(None if config.perceptual_network == "lpips" else config.perceptual_network).to(device)
    teacher: SigLIP2 | FeatureNetwork | None = None
    if alignment and config.alignment_network != CLASSIFIER:
        teacher = SigLIP2.from_pretrained(config.alignment_network, device=device, dtype=PRECISIONS[config.loop.precision])
    features = None
    if (perceptual and lpips is None) or (alignment and teacher is None):
        features = feature_network(config, source, output, device, processes)
    return Teachers(features if lpips is None else None, lpips, teacher if teacher or not alignment else features)


def feature_network(
    config: "TokenizerTraining", source: ImageSource | StreamSource, output: Path, device: torch.device, processes: Processes
) -> FeatureNetwork:
    """The frozen classifier: trained here, once, by the main process, and kept in the run's folder."""
    network = FeatureNetwork(len(source.class_names)).to(device)
    path = output / FEATURES_FILE
    if processes.is_main and not path.exists():
        from tqdm import tqdm

        torch.manual_seed(config.loop.seed)
        loop = config.loop
        images = crops(config, source, min(CLASSIFIER_BATCH, image_count(source) or CLASSIFIER_BATCH))
        steps = config.classifier_epochs * images.steps_per_epoch
        with tqdm(images, total=steps, desc="features", unit="step", dynamic_ncols=True) as bar:
            accuracy = train_classifier(network, bar, steps, PRECISIONS[loop.precision], device)
        print(f"feature network: {accuracy:.1%} of the last training images recognised")
        with replacing(path) as temporary:
            torch.save(network.state_dict(), temporary)
    while not path.exists():  # longer than processes may wait for each other in a collective call
        time.sleep(0.2)
    network.load_state_dict(torch.load(path, map_location=device, weights_only=True))
    return network.eval().requires_grad_(False)
