"""Statistics of a set of images by a network's features, and how far two sets are from each other.

With Inception's features these are the figures of ADM's evaluation (Dhariwal & Nichol 2021): FID, sFID, inception
score, precision and recall.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from detailflow.data.source import spread
from detailflow.device import exact_device
from detailflow.distributed import World
from detailflow.errors import DetailFlowError
from detailflow.evaluation.features import INCEPTION, Extractor, Features
from detailflow.evaluation.metrics import (
    IMAGES_PER_SPLIT,
    NEIGHBOURS,
    InceptionScore,
    Moments,
    frechet_deviation,
    frechet_distance,
    precision_recall,
)
from detailflow.evaluation.report import Figure
from detailflow.evaluation.sets import ImageSet, Statistics, check_total, shard_range
from detailflow.progress import progress_bar

SAMPLES_KEPT, REFERENCE_KEPT = 50_000, 10_000  # images whose features ADM's evaluation takes precision and recall of


class Checksum:
    """The running checksum of a sequence of images, whatever the batches and the ranks that read them."""

    def __init__(self, total: int, world: World) -> None:
        self.index, self.world = shard_range(total, world).start, world
        self._words = np.zeros(4, np.int64)  # sums of the first 16 bytes of each image's digest

    def update(self, images: Tensor) -> None:
        """Add the next images, bytes (B, H, W, 3)."""
        for image in images.cpu().numpy():
            digest = hashlib.sha256(f"{self.index} {image.shape} ".encode() + image.tobytes()).digest()
            self._words += np.frombuffer(digest[:16], ">u4")
            self.index += 1

    def compute(self) -> str:
        """Return the checksum of all ranks' images in hex; every rank must call it."""
        words = self.world.all_reduce(torch.tensor(self._words)).tolist()
        return "".join(f"{word % 2**32:08x}" for word in words)


class FeatureStatistics:
    """The running statistics of a set's features: of this rank's `shard_range` of `total` images, in order.

    Args:
        keep: features of at most so many images, spread over the set, are kept for precision and recall.
        labels: the class of every image, to count those that the network recognises.
    """

    def __init__(
        self, extractor: Extractor, total: int, world: World, keep: int = 0, labels: Sequence[int] | None = None
    ) -> None:
        self.name, self.fingerprint = extractor.name, extractor.fingerprint
        self.total, self.world, self.keep = total, world, min(keep, total)
        self.shard = shard_range(total, world)
        self.next = self.shard.start
        self.pool: Moments | None = None
        self.spatial: Moments | None = None
        self.score: InceptionScore | None = None
        self._kept: list[Tensor] = []
        self._labels = None if labels is None else torch.tensor(labels)
        self._hits = torch.zeros((), dtype=torch.int64)

    def update(self, found: Features) -> None:
        """Add the features of the next images."""
        size = len(found.pool)
        for x in found:
            if x is not None and not x.isfinite().all():
                raise DetailFlowError(
                    f"{self.name} gives features that are not finite numbers for images {self.next} to "
                    f"{self.next + size - 1}"
                )
        if self.pool is None:
            device = exact_device(found.pool.device)
            self.pool = Moments(found.pool.shape[1], device)
            self.spatial = None if found.spatial is None else Moments(found.spatial.shape[1], device)
            if found.logits is not None:
                self.score = InceptionScore(found.logits.shape[1], self.total, device=device)
        self.pool.update(found.pool)
        if self.spatial and found.spatial is not None:
            self.spatial.update(found.spatial)
        if self.score and found.logits is not None:
            self.score.update(found.logits, self.next)
            if self._labels is not None:
                self._hits += (found.logits.argmax(1).cpu() == self._labels[self.next : self.next + size]).sum()
        chosen = (torch.arange(self.next, self.next + size + 1) * self.keep // self.total).diff() > 0  # as in `spread`
        self._kept.append(found.pool[chosen.to(found.pool.device)].float().cpu())
        self.next += size

    def compute(self, checksum: str = "") -> Statistics:
        """Return the statistics of all ranks' images; every rank must call it."""
        if self.next != self.shard.stop or self.pool is None:
            raise ValueError(f"{self.next - self.shard.start} images came, and this rank's part is {len(self.shard)}")
        for running in (self.pool, self.spatial, self.score):
            if running:
                running.merge(self.world)
        return Statistics(
            self.name,
            self.fingerprint,
            self.pool.gaussian(),
            self.spatial.gaussian() if self.spatial else None,
            self.world.all_gather_uneven(torch.cat(self._kept)) if self.keep else None,
            self.score.score() if self.score else None,
            checksum,
            self.score.classes if self.score else 0,
            self.world.all_reduce(self._hits).item() / self.total,
        )


def measure(
    extractor: Extractor,
    images: ImageSet | Iterable[Tensor],
    *,
    keep: int = SAMPLES_KEPT,
    total: int | None = None,
    world: World = World(),
    labels: Sequence[int] | None = None,
) -> Statistics:
    """Return the statistics of a set of images; every rank must call it.

    Statistics that an .npz file has stored replace those of its images if they are of this network: ADM's reference has
    those of all of ImageNet, and 10,000 images for precision and recall.

    Args:
        images: bytes (B, H, W, 3) in batches of any sizes, those of this rank's `shard_range(total, world)`.
        keep, labels: as in `FeatureStatistics`.
        total: images of all ranks; needed if `images` is not an `ImageSet`.
    """
    stored = None
    if isinstance(images, ImageSet):
        total, world, stored = len(images), images.world, _usable(images, extractor)
    elif total is None:
        raise ValueError("images of unknown number: give their total")
    if stored and (stored.kept is not None or not total):
        kept = stored.kept[spread(len(stored.kept), min(keep, len(stored.kept)))] if stored.kept is not None else None
        few = kept if keep else None
        return Statistics(extractor.name, extractor.fingerprint, stored.pool, stored.spatial, few, side=stored.side)
    check_total(total, world)
    statistics, checksum = FeatureStatistics(extractor, total, world, keep, labels), Checksum(total, world)
    with progress_bar(desc="features", total=total, unit="image", main=world.is_main) as bar:
        for batch in images:
            checksum.update(batch)
            statistics.update(extractor(batch))
            bar.update(min(len(batch) * world.size, total - bar.n))
    if isinstance(images, ImageSet):
        images.gather_unreadable()
    found = replace(statistics.compute(checksum.compute()), side=getattr(images, "side", None))
    if stored:
        return replace(found, pool=stored.pool, spatial=stored.spatial)
    return found


def _usable(images: ImageSet, extractor: Extractor) -> Statistics | None:
    """Return a set's stored statistics if they are of this network."""
    stored = images.statistics
    if stored is None:
        return None
    if stored.fingerprint == extractor.fingerprint or (stored.fingerprint is None and extractor.name == INCEPTION):
        return stored
    if not len(images):
        theirs = stored.features + (" with other weights" if stored.features == extractor.name else "")
        raise DetailFlowError(
            f"{images.about['data']} has statistics of the features {theirs} and no images, so it cannot be "
            f"measured by {extractor.name}"
        )
    return None


def compare_sets(
    reference: Statistics,
    samples: Statistics,
    *,
    prefix: str = "",
    device: torch.device | str = "cpu",
    neighbours: bool = True,
) -> dict[str, Figure]:
    """Return the distances of samples from a reference: FID, sFID, IS, precision and recall, as far as they are known.

    sFID needs spatial features of both sets, IS logits of the samples, precision and recall kept features of at least
    four images of both. Distances of other features than Inception's are called FD. The spread of FID is by bootstrap
    over the samples, if more were kept than features have dimensions, that of IS over its splits.

    Args:
        prefix: of FID, such as "r" for reconstructions and "g" for generated images.
        device: where precision and recall are computed (by `exact_device`).
        neighbours: whether to compute them.
    """
    if reference.fingerprint != samples.fingerprint:
        ours, theirs = (f"{x.features} ({(x.fingerprint or '')[:8]})" for x in (reference, samples))
        raise DetailFlowError(
            f"the reference was measured by {ours} and the samples by {theirs}: measure both by one network"
        )
    device = exact_device(device)
    name, deviation = _distance_name(samples), None
    if samples.kept is not None and samples.pool.count and len(samples.kept) > len(samples.pool.mean):
        deviation = frechet_deviation(reference.pool, samples.kept.to(device), samples.pool.count)
    figures = {f"{prefix}{name}": Figure(frechet_distance(reference.pool, samples.pool), deviation)}
    if reference.spatial and samples.spatial:
        figures[f"s{name}"] = Figure(frechet_distance(reference.spatial, samples.spatial))
    if samples.inception_score:
        figures["IS"] = Figure(*samples.inception_score)
    if neighbours and _has_neighbours(reference, samples):
        assert reference.kept is not None and samples.kept is not None
        found = precision_recall(reference.kept.to(device), samples.kept.to(device))
        figures |= {"precision": Figure(found[0]), "recall": Figure(found[1])}
    return figures


def _distance_name(statistics: Statistics) -> str:
    return "FID" if statistics.features == INCEPTION else "FD"


def _has_neighbours(*sets: Statistics) -> bool:
    return all(statistics.kept is not None and len(statistics.kept) > NEIGHBOURS for statistics in sets)


def cautions(reference: Statistics, samples: Statistics, prefix: str = "", neighbours: bool = True) -> list[str]:
    """Return what a reader should know about the figures of `compare_sets`, a sentence each."""
    name, found = _distance_name(samples), []
    if name == "FD":
        found.append(
            f"FD is the Fréchet distance of the features of {samples.features}: it cannot be compared with FIDs, nor "
            "precision, recall or IS in these features with those in others."
        )
    for which, side in (("reference", reference), ("samples", samples)):
        for measure_name, part in ((f"{prefix}{name}", side.pool), (f"s{name}", side.spatial)):
            if part and part.count is not None and part.count <= len(part.mean):
                found.append(
                    f"{measure_name}: the {part.count} images of the {which} are too few for the covariance of "
                    f"{len(part.mean)} features, so the distance is much larger than that of more images."
                )
    if samples.inception_score and samples.pool.count and samples.pool.count < IMAGES_PER_SPLIT:
        found.append(
            f"IS: it is of {samples.pool.count:,} images, and usual splits have {IMAGES_PER_SPLIT:,}, and lower the "
            "fewer they are."
        )
    if samples.inception_score is None:
        found.append("IS: there is none, as the network gives no class logits or only statistics were measured.")
    if neighbours and not _has_neighbours(reference, samples):
        found.append(
            "precision, recall: there are none, as the features of images were not kept or are too few on one side."
        )
    elif neighbours and name == "FID":
        counts = [len(x.kept) for x in (reference, samples) if x.kept is not None]
        if counts != [REFERENCE_KEPT, SAMPLES_KEPT]:
            found.append(
                f"precision, recall: of {counts[0]:,} images of the reference and {counts[1]:,} samples, and ADM's "
                f"evaluation has {REFERENCE_KEPT:,} and {SAMPLES_KEPT:,}, on which both depend."
            )
    return found
