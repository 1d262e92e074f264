"""What is measured of a set of images by a network's features, and how far two sets are from each other.

With Inception's features these are the figures of ADM's evaluation (Dhariwal & Nichol 2021): FID, sFID, inception score,
precision and recall.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from detailflow.data.images import spread
from detailflow.distributed import World
from detailflow.errors import DetailFlowError
from detailflow.evaluation.features import Extractor, Features
from detailflow.evaluation.metrics import (
    IMAGES_PER_SPLIT,
    NEIGHBOURS,
    Gaussian,
    InceptionScore,
    Moments,
    frechet_deviation,
    frechet_distance,
    precision_recall,
)
from detailflow.evaluation.sets import ImageSet, Statistics, check_total, share_of
from detailflow.files import writing

SAMPLES_KEPT, REFERENCE_KEPT = 50_000, 10_000  # images whose features ADM's evaluation takes precision and recall of


@dataclass(frozen=True)
class Measured:
    """What was measured of a set."""

    features: str  # the network's name
    fingerprint: str  # and of its weights
    count: int | None  # images that `pool` is of; `None` where stored statistics don't say
    pool: Gaussian
    spatial: Gaussian | None
    inception_score: (
        tuple[float, float | None] | None
    )  # mean, and standard deviation over the splits if there are several
    kept: Tensor | None  # (n, D) float32 on the CPU, features of images spread over the set


def measure(
    extractor: Extractor,
    images: ImageSet | Iterable[Tensor],
    world: World | None = None,
    keep: int = SAMPLES_KEPT,
    total: int | None = None,
) -> Measured:
    """Measure a set, in memory for one batch, the moments and what is kept; all processes take part and get the same.

    Statistics that an .npz file has stored stand in for those of its images, where they are of this network: ADM's reference
    has those of all of ImageNet, and 10,000 images for precision and recall.

    Args:
        extractor: the network.
        images: bytes (B, H, W, 3) in batches of any sizes, this process's `share_of(total, processes)`.
        processes: those that share the images, the same as those of an `ImageSet`.
        keep: features of at most so many images, spread over the set, are kept for precision and recall; 0 keeps none.
        total: images of all processes; needed where `images` is no `ImageSet`.

    Raises:
        DetailFlowError: for images that cannot be read, too few of them, features that are not finite, or stored statistics of
            another network without images.
        ValueError: where `images` are not this process's share of `total`.
    """
    world = world or World()
    stored = None
    if isinstance(images, ImageSet):
        total = len(images)
        stored = _usable(images, extractor)
    elif total is None:
        raise ValueError("images of unknown number: give their total")
    if stored and (stored.kept is not None or not total):
        kept = None if stored.kept is None else stored.kept[spread(len(stored.kept), min(keep, len(stored.kept)))]
        return _measured(extractor, stored.pool, stored.spatial, None, kept if keep else None)
    check_total(total, world)
    running = Running(extractor.name, share_of(total, world), total, min(keep, total), moments=stored is None)
    with tqdm(total=total, desc="features", unit="image", leave=False, disable=True if world.rank else None) as bar:
        for batch in images:
            running.update(extractor(batch))
            bar.update(min(len(batch) * world.size, total - bar.n))
    return running.finish(extractor, world, stored)


def _usable(images: ImageSet, extractor: Extractor) -> Statistics | None:
    """A set's stored statistics where they are of this network."""
    stored = images.statistics
    if stored is None:
        return None
    if stored.fingerprint == extractor.fingerprint or (stored.fingerprint is None and extractor.name == "inception"):
        return stored
    if not len(images):
        theirs = f"{stored.features or 'inception'}{' with other weights' if stored.features == extractor.name else ''}"
        raise DetailFlowError(
            f"{images.description()['data']} holds statistics of the features {theirs} and no images, so it cannot be "
            f"measured by {extractor.name}"
        )
    return None


def _measured(
    extractor: Extractor,
    pool: Gaussian,
    spatial: Gaussian | None,
    score: tuple[float, float | None] | None,
    kept: Tensor | None,
) -> Measured:
    return Measured(extractor.name, extractor.fingerprint, pool.count, pool, spatial, score, kept)


class Running:
    """What one process has seen of its share so far: `measure` for features that come from elsewhere.

    Args:
        name: the network's, for messages.
        share: the numbers of this process's images among the `total` of all, `share_of(total, processes)`.
        keep: as for `measure`, at most `total`.
        moments: whether to compute means and covariances.
    """

    def __init__(self, name: str, share: range, total: int, keep: int, moments: bool = True) -> None:
        self.name, self.share, self.total, self.keep, self.with_moments = name, share, total, keep, moments
        self.next = share.start  # the number of the next image
        self.pool: Moments | None = None
        self.spatial: Moments | None = None
        self.score: InceptionScore | None = None
        self.kept: list[Tensor] = []

    def update(self, found: Features) -> None:
        """Add the next images of the share.

        Raises:
            DetailFlowError: for features that are not finite.
        """
        for x in found:
            if x is not None and not x.isfinite().all():
                raise DetailFlowError(
                    f"{self.name} gives features that are not finite numbers for images {self.next} to "
                    f"{self.next + len(found.pool) - 1}"
                )
        if self.next == self.share.start:
            # Apple's GPUs know no float64.
            device = found.pool.device if found.pool.device.type == "cuda" else torch.device("cpu")
            if self.with_moments:
                self.pool = Moments(found.pool.shape[1], device)
                self.spatial = None if found.spatial is None else Moments(found.spatial.shape[1], device)
            if found.logits is not None:
                self.score = InceptionScore(found.logits.shape[1], self.total, device=device)
        if self.pool:
            self.pool.update(found.pool)
        if self.spatial and found.spatial is not None:
            self.spatial.update(found.spatial)
        if self.score and found.logits is not None:
            self.score.update(found.logits, self.next)
        numbers = torch.arange(self.next, self.next + len(found.pool) + 1)
        chosen = (numbers * self.keep // self.total).diff() > 0  # those of `spread`
        self.kept.append(found.pool[chosen.to(found.pool.device)].float().cpu())
        self.next += len(found.pool)

    def finish(self, extractor: Extractor, world: World, stored: Statistics | None = None) -> Measured:
        """Put together what all processes have seen; `stored` stands in for the moments.

        Raises:
            DetailFlowError: for fewer than two images.
            ValueError: where the share is not complete.
        """
        if self.next != self.share.stop:
            raise ValueError(
                f"{self.next - self.share.start} images came where this process's share is {len(self.share)}"
            )
        for part in (self.pool, self.spatial, self.score):
            if part:
                part.merge(world)
        score = self.score.score() if self.score else None
        kept = _gather(torch.cat(self.kept), self.share, self.total, self.keep, world) if self.keep else None
        if stored:
            return _measured(extractor, stored.pool, stored.spatial, score, kept)
        assert self.pool is not None  # no share is empty
        return _measured(
            extractor, self.pool.gaussian(), self.spatial.gaussian() if self.spatial else None, score, kept
        )


def _gather(kept: Tensor, share: range, total: int, keep: int, world: World) -> Tensor:
    """All processes' kept features in order; their numbers differ by one or two."""
    counts = []
    for rank in range(world.size):
        part = share_of(total, World(rank, world.size))
        counts.append(part.stop * keep // total - part.start * keep // total)
    return world.all_gather_uneven(kept, counts)


def compare_sets(
    reference: Measured, samples: Measured, device: torch.device | str = "cpu", neighbours: bool = True
) -> dict[str, float]:
    """The distances of samples from a reference, by the keys "fid", "sfid", "is", "precision" and "recall".

    "fid" and "sfid" are Fréchet distances of whichever features were measured, "is" is the samples' inception score. "fid_std"
    says how far the first would vary with other samples, by bootstrap, "is_std" how far the score does over its splits. What
    cannot be had is left out: "sfid" without spatial features on both sides, "is" without logits, precision and recall without
    kept features of at least four images on both sides, "fid_std" without those of more samples than features have dimensions.

    Args:
        reference: of the real images.
        samples: of the others.
        device: where precision and recall are computed, if it knows float64.
        neighbours: whether to compute them.

    Raises:
        DetailFlowError: where the two were measured by different networks.
    """
    if reference.fingerprint != samples.fingerprint:
        raise DetailFlowError(
            f"the reference was measured by {reference.features} ({reference.fingerprint[:8]}) and the samples by "
            f"{samples.features} ({samples.fingerprint[:8]}): measure both by one network"
        )
    there = "cpu" if torch.device(device).type == "mps" else device
    figures = {"fid": _distance(reference.pool, samples.pool)}
    if samples.kept is not None and samples.count and len(samples.kept) > len(samples.pool.mean):
        figures["fid_std"] = frechet_deviation(reference.pool, samples.kept.to(there), samples.count)
    if reference.spatial and samples.spatial:
        figures["sfid"] = _distance(reference.spatial, samples.spatial)
    if samples.inception_score:
        figures["is"], deviation = samples.inception_score
        figures |= {} if deviation is None else {"is_std": deviation}
    if neighbours and _has_neighbours(reference) and _has_neighbours(samples):
        assert reference.kept is not None and samples.kept is not None
        figures["precision"], figures["recall"] = precision_recall(reference.kept.to(there), samples.kept.to(there))
    return figures


def _distance(a: Gaussian, b: Gaussian) -> float:
    return frechet_distance(a.mean, a.covariance, b.mean, b.covariance)


def _has_neighbours(measured: Measured) -> bool:
    return measured.kept is not None and len(measured.kept) > NEIGHBOURS


def cautions(reference: Measured, samples: Measured) -> list[str]:
    """What a reader of these figures should know, a sentence each."""
    found = []
    for name, side in (("reference", reference), ("samples", samples)):
        for key, part in (("fid", side.pool), ("sfid", side.spatial)):
            if part and part.count is not None and part.count <= len(part.mean):
                found.append(
                    f"{key}: the {part.count} images of the {name} are too few for the covariance of {len(part.mean)} features, "
                    "so the distance is much larger than that of more images"
                )
    if samples.inception_score and samples.count and samples.count < IMAGES_PER_SPLIT:
        found.append(
            f"is: it is of {samples.count:,} images, where usual splits have {IMAGES_PER_SPLIT:,}, and lower the fewer they are"
        )
    if samples.inception_score is None:
        found.append("is: there is none, as the network gives no class logits or statistics stood in for images")
    if not (_has_neighbours(reference) and _has_neighbours(samples)):
        found.append(
            "precision, recall: there are none, as the features of images were not kept or are too few on one side"
        )
    elif reference.features == "inception":
        assert reference.kept is not None and samples.kept is not None
        counts = len(reference.kept), len(samples.kept)
        if counts != (REFERENCE_KEPT, SAMPLES_KEPT):
            found.append(
                f"precision, recall: of {counts[0]:,} images of the reference and {counts[1]:,} samples, where ADM's evaluation "
                f"has {REFERENCE_KEPT:,} and {SAMPLES_KEPT:,}, on which both depend"
            )
    return found


def save_statistics(path: Path, measured: Measured) -> None:
    """Write what was measured as an .npz file that `open_set` reads as a reference: ADM's entries `mu`, `sigma`, `mu_s` and
    `sigma_s`, and beside them `count`, `features`, `fingerprint` and `kept`.

    Raises:
        DetailFlowError: if the file cannot be written.
    """
    entries: dict[str, np.ndarray] = {"mu": measured.pool.mean.numpy(), "sigma": measured.pool.covariance.numpy()}
    if measured.spatial:
        entries |= {"mu_s": measured.spatial.mean.numpy(), "sigma_s": measured.spatial.covariance.numpy()}
    if measured.count is not None:
        entries["count"] = np.asarray(measured.count)
    if measured.kept is not None:
        entries["kept"] = measured.kept.numpy()
    entries |= {"features": np.asarray(measured.features), "fingerprint": np.asarray(measured.fingerprint)}
    with writing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, allow_pickle=False, **entries)
