"""The frozen networks that the tokenizer learns from: for the perceptual loss, and for the alignment of the first token."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detailflow.data.batches import ImageBatches, StreamedBatches
from detailflow.data.images import ImageSource, open_images
from detailflow.data.streams import StreamSource, open_stream
from detailflow.device import autocast
from detailflow.distributed import World
from detailflow.errors import DetailFlowError
from detailflow.models.efficientnet import EFFICIENTNET, EfficientNetLite0
from detailflow.models.siglip2 import SigLIP2
from detailflow.tensors import save_torch
from detailflow.torch_files import load_torch
from detailflow.training.config import CLASSIFIER, PRECISIONS
from detailflow.training.losses import LPIPS, SMALLEST_SIDE, perceptual_loss

if TYPE_CHECKING:
    from detailflow.training.config import TokenizerTraining

FEATURES_FILE = "features.pt"
CLASSIFIER_BATCH = 256


FEATURE_WIDTHS = (32, 64, 128, 192)


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
    """Train `network` for `steps` on (images, labels), freeze it; return its accuracy in the last tenth of them, one at least."""
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
        if step >= min(steps * 0.9, steps - 1):
            right, seen = right + int((logits.argmax(-1) == labels).sum()), seen + len(labels)
    network.eval().requires_grad_(False)
    return right / max(seen, 1)


class Teachers(NamedTuple):
    """What the settings ask for: features to compare, LPIPS instead of them, and the teacher of the first token."""

    features: EfficientNetLite0 | FeatureNetwork | None
    lpips: LPIPS | None
    alignment: SigLIP2 | EfficientNetLite0 | FeatureNetwork | None

    @property
    def width(self) -> int | None:
        """Of what the alignment's teacher makes of an image; `None` where there is no teacher."""
        return None if self.alignment is None else self.alignment.width

    def distance(self, pixels: Tensor, target: Tensor, corrected: int) -> Tensor:
        """The perceptual loss of (B + corrected, 3, s, s) pixels: those of (B, …) `target`, and of its first images again."""
        if self.lpips is not None:
            if pixels.shape[-1] < SMALLEST_SIDE:  # small patches make coarse pictures that VGG would pool to nothing
                pixels, target = (
                    F.interpolate(x, (SMALLEST_SIDE, SMALLEST_SIDE), mode="nearest") for x in (pixels, target)
                )
            return self.lpips(pixels, target)
        assert self.features is not None
        with torch.no_grad():
            wanted = self.features.features(target)
        return perceptual_loss(self.features.features(pixels), [torch.cat((w, w[:corrected])) for w in wanted])


def open_source(config: "TokenizerTraining") -> ImageSource | StreamSource:
    """The images of these settings.

    Raises:
        DetailFlowError: if they cannot be read.
    """
    opened = open_stream if config.streaming else open_images
    return opened(config.data, split=config.split, image_column=config.image_column, label_column=config.label_column)


def image_count(source: ImageSource | StreamSource) -> int | None:
    """How many images there are, where that is known."""
    return source.num_images if isinstance(source, StreamSource) else len(source)


def crops(
    config: "TokenizerTraining",
    source: ImageSource | StreamSource,
    batch_size: int,
    start_step: int = 0,
    world: World = World(),  # noqa: B008  (it is frozen)
) -> ImageBatches | StreamedBatches:
    """The endless training crops of these settings (docs/method.md#losses)."""
    kind = StreamedBatches if isinstance(source, StreamSource) else ImageBatches
    size, loop = config.model.image_size, config.loop
    return kind(source, size, batch_size, loop.seed, loop.workers, start_step, config.flip, config.max_scale, world)  # type: ignore[arg-type]


def find_teachers(
    config: "TokenizerTraining",
    source: ImageSource | StreamSource,
    output: Path,
    device: torch.device,
    world: World,
    load: bool = True,
) -> Teachers:
    """Load what can be had, and train what cannot; without `load` neither, and all weights are random, as for a plan.

    Raises:
        DetailFlowError: where weights cannot be downloaded or read.
    """
    made: dict[str, Any] = {}  # one network may be for both losses

    def network(loss: str, name: str) -> Any:
        if name in made:
            return made[name]
        if name == CLASSIFIER:
            made[name] = feature_network(config, source, output, device, world, load)
        elif name == EFFICIENTNET:
            instead = f"or train with {loss}_network: classifier, or {loss}: 0"
            made[name] = EfficientNetLite0.from_package(f"the {loss} loss", instead, load=load).to(device)
        elif loss == "perceptual":
            return LPIPS(None if name == "lpips" else name, load).to(device)
        else:
            tower = SigLIP2.from_pretrained if load else SigLIP2.without_weights
            return tower(name, device=device, dtype=PRECISIONS[config.loop.precision])
        return made[name]

    perceptual = network("perceptual", config.perceptual_network) if config.perceptual > 0 else None
    alignment = network("alignment", config.alignment_network) if config.alignment > 0 else None
    lpips = perceptual if isinstance(perceptual, LPIPS) else None
    return Teachers(None if lpips else perceptual, lpips, alignment)


def feature_network(
    config: "TokenizerTraining",
    source: ImageSource | StreamSource,
    output: Path,
    device: torch.device,
    world: World,
    load: bool,
) -> FeatureNetwork:
    """The frozen classifier: trained here, once, by the main process, and kept in the run's folder; or a random one."""
    network = FeatureNetwork(len(source.class_names)).to(device)
    if not load:
        return network.eval().requires_grad_(False)
    path = output / FEATURES_FILE
    with world.raise_together(), world.others_wait() as heartbeat:  # it may take longer than a collective call can wait
        if world.is_main and not path.exists():
            _train_features(network, config, source, path, heartbeat)
    with world.raise_together():
        load_features(network, path)
    return network.eval().requires_grad_(False)


def _train_features(
    network: FeatureNetwork,
    config: "TokenizerTraining",
    source: ImageSource | StreamSource,
    path: Path,
    heartbeat: Callable[[], None],
) -> None:
    """Train the classifier and write it; calls `heartbeat` at every step."""
    from tqdm import tqdm

    torch.manual_seed(config.loop.seed)
    images = crops(config, source, min(CLASSIFIER_BATCH, image_count(source) or CLASSIFIER_BATCH))
    steps = config.classifier_epochs * images.steps_per_epoch

    def heard(batches: Iterable[Any]) -> Iterator[Any]:
        for batch in batches:
            heartbeat()
            yield batch

    with tqdm(heard(images), total=steps, desc="features", unit="step", dynamic_ncols=True) as bar:
        device = next(network.parameters()).device
        accuracy = train_classifier(network, bar, steps, PRECISIONS[config.loop.precision], device)
    print(f"feature network: {accuracy:.1%} of the last training images recognised")
    try:
        save_torch(path, network.state_dict())
    except OSError as error:
        raise DetailFlowError(f"cannot write {path}: {error.strerror or error}") from error


def load_features(network: FeatureNetwork, path: Path) -> None:
    """Load the classifier that a run wrote.

    Raises:
        DetailFlowError: if the file is damaged.
    """
    try:
        network.load_state_dict(load_torch(path))
    except Exception as error:  # torch raises many kinds for a damaged file
        raise DetailFlowError(
            f"{path} is damaged, or of other classes: remove it to train the classifier again"
        ) from error
