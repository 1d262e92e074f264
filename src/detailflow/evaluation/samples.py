"""Any two sets of images against each other, and what all evaluations share: who works, what was read, names of figures."""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from detailflow import hub
from detailflow.data.transforms import resized
from detailflow.distributed import World, launched
from detailflow.errors import DetailFlowError
from detailflow.evaluation.distances import REFERENCE_KEPT, SAMPLES_KEPT, Measured, cautions, compare_sets, measure
from detailflow.evaluation.features import INCEPTION, Extractor, Features, load_extractor
from detailflow.evaluation.metrics import IMAGES_PER_SPLIT
from detailflow.evaluation.report import Figure, Picture, Report, Row, Section
from detailflow.evaluation.sets import ImageSet, open_set, share_of
from detailflow.pictures import grid

BATCH_SIZE = {"cpu": 64, "cuda": 256}  # where the user gives none
PICTURES = 8  # images of each set that a report shows
WORDS, WORD = 4, 2**32  # of a checksum


@dataclass(frozen=True)
class Work:
    """Who computes, where and how: the same for all evaluations.

    Args:
        batch_size: images at once, in each process.
    """

    world: World
    device: torch.device
    batch_size: int

    @classmethod
    def here(cls, device: str | None, batch_size: int | None = None) -> "Work":
        """As this process was launched; `None` is the GPU where there is one, and a batch size that suits the device.

        Raises:
            DetailFlowError: for a device that cannot be used.
        """
        world, place = launched(device)
        return cls(world, place, batch_size or BATCH_SIZE.get(place.type, BATCH_SIZE["cpu"]))

    def open(self, path: str, size: int | None = None, count: int | None = None, split: str | None = None) -> ImageSet:
        """A set, of which this process reads its share in batches. Images of an .npz file are not cropped: they must have `size`.

        Raises:
            DetailFlowError: as `open_set`, or for images of another size in an .npz file.
        """
        with self.world.raise_together():
            place = Path(path).expanduser()
            if place.suffix != ".npz" and not os.path.isfile(place / "samples.npz"):
                return open_set(path, self.world, size, count, self.batch_size, split)
            found = open_set(path, self.world, None, count, self.batch_size, split)
            if size is not None and found.side is not None and found.side != (size, size):
                height, width = found.side
                raise DetailFlowError(f"{path} holds images of {width}×{height} pixels, where {size}×{size} are needed")
            return found


class Checksum:
    """Of a sequence of images: the same whatever the batches and the processes that read them."""

    def __init__(self, first: int) -> None:
        self.number = first
        self.words = [0] * WORDS

    def update(self, images: Tensor) -> None:
        """Add the next images, bytes (B, H, W, 3)."""
        for image in images.cpu().numpy():
            digest = hashlib.sha256(f"{self.number} {image.shape} ".encode() + image.tobytes()).digest()
            parts = (int.from_bytes(digest[4 * i : 4 * i + 4], "big") for i in range(WORDS))
            self.words = [(a + b) % WORD for a, b in zip(self.words, parts, strict=True)]
            self.number += 1

    def text(self, world: World) -> str:
        """In hex, of all processes' images; all must call it."""
        words = world.all_reduce(torch.tensor(self.words, device=world.device)).tolist()
        return "".join(f"{word % WORD:08x}" for word in words)


class Watching:
    """A feature network that takes notes of the images it sees: their checksum, the first ones, and the classes recognised."""

    def __init__(self, extractor: Extractor, first: int, pictures: int = 0) -> None:
        self.extractor, self.pictures = extractor, pictures
        self.name, self.fingerprint, self.preprocessing = extractor.name, extractor.fingerprint, extractor.preprocessing
        self.checksum = Checksum(first)
        self.shown: list[Tensor] = []
        self.recognised: list[Tensor] = []
        self.classes: int | None = None

    def __call__(self, images: Tensor) -> Features:
        """Bytes (B, H, W, 3) → their features."""
        self.checksum.update(images)
        self.shown += list(images[: self.pictures - len(self.shown)].cpu())
        features = self.extractor(images)
        if features.logits is not None:
            self.classes = features.logits.shape[1]
            self.recognised.append(features.logits.argmax(1).cpu())
        return features


def measure_set(extractor: Extractor, images: ImageSet, work: Work, keep: int) -> tuple[Measured, dict[str, Any]]:
    """Return what was measured of a set, and what a report says of it.

    Raises:
        DetailFlowError: as `measure`.
    """
    watching = Watching(extractor, share_of(len(images), work.world).start)
    measured = measure(watching, images, work.world, keep)
    return measured, data_entry(images, watching.checksum, work.world)


def at_side(images: Tensor, side: int) -> Tensor:
    """Bytes (B, H, W, 3) → (B, side, side, 3), resized by Pillow as everywhere in the project."""
    if images.shape[1:3] == (side, side):
        return images
    pictures = [resized(Image.fromarray(image), side, side) for image in images.cpu().numpy()]
    return torch.from_numpy(np.stack(pictures)).to(images.device)


def data_entry(images: ImageSet, checksum: Checksum, world: World) -> dict[str, Any]:
    """Of a report's provenance: a set, with the checksum of what was read, be it images or stored statistics."""
    read = checksum.text(world)
    entry = {"checksum": read} if int(read, 16) else {}
    if (stored := images.statistics) is not None:
        entry["checksum_of_statistics"] = hub.fingerprint({}, {"mu": stored.pool.mean, "sigma": stored.pool.covariance})
    return {**images.description(), **entry}


def evaluate_samples(
    samples: str,
    reference: str,
    work: Work,
    features: str = INCEPTION,
    weights: str | None = None,
    size: int | None = None,
    num_images: int | None = None,
) -> Report | None:
    """Compare two sets of images.

    Args:
        samples, reference: folders, .npz files, WebDataset shards, parquet files or hub names.
        features: "inception", "dinov2" or a .safetensors file, with `weights` where they don't lie where they are looked for.
        size: the shorter side of all images is brought to it, then their centres are used; `None` takes them as they are.
        num_images: so many of the samples, spread over the set.

    Returns:
        In the main process a report whose provenance is not complete yet; `None` in others.

    Raises:
        DetailFlowError: for sets that cannot be read or compared, or a network that cannot be had.
    """
    ours, theirs = work.open(samples, size, num_images), work.open(reference, size)
    if ours.side and theirs.side and ours.side != theirs.side:
        sides = [f"{width}×{height}" for height, width in (ours.side, theirs.side)]
        raise DetailFlowError(
            f"{samples} has images of {sides[0]} pixels and {reference} of {sides[1]}: give a size (--size) for both"
        )
    extractor = load_extractor(features, work.device, weights)
    measured, samples_entry = measure_set(extractor, ours, work, SAMPLES_KEPT)
    wanted, reference_entry = measure_set(extractor, theirs, work, REFERENCE_KEPT)
    if not work.world.is_main:
        return None
    figures = named(compare_sets(wanted, measured, work.device), extractor)
    return Report(
        kind="samples",
        title="Two sets of images",
        sections=[Section("Samples against the reference", [Row({}, figures)], spread_note(figures))],
        provenance={
            "data": {"samples": samples_entry, "reference": reference_entry},
            "features": features_entry(extractor),
            "preprocessing": preprocessing_entry(extractor, size),
        },
        pictures=_pictures(ours, theirs),
        notes=warnings_of(wanted, measured, extractor),
    )


def _pictures(samples: ImageSet, reference: ImageSet) -> list[Picture]:
    """Return a picture with a row of each set, as far as they have images."""
    shown = [Image.fromarray(image) for image in samples.some(PICTURES)]
    if not shown:
        return []
    beside = [Image.fromarray(image) for image in reference.some(len(shown))]
    caption = "Images spread over the samples" + (", and below them over the reference" if beside else "")
    return [Picture("samples", caption, grid([*shown, *beside], len(shown)))]


def names_of(extractor: Extractor, prefix: str = "", spatial: str = "") -> dict[str, str]:
    """`compare_sets`' keys → names of the field: FID is the distance of Inception's features only, that of others is FD.

    Args:
        prefix: before FID, such as "r" of reconstructions and "g" of generated images; `spatial` before sFID.
    """
    distance = "FID" if extractor.name == INCEPTION else "FD"
    names = {"fid": f"{prefix}{distance}", "sfid": f"{spatial}s{distance}", "is": "IS"}
    return names | {"precision": "precision", "recall": "recall"}


def named(figures: Mapping[str, float], extractor: Extractor, prefix: str = "", spatial: str = "") -> dict[str, Figure]:
    """`compare_sets`' figures by `names_of`, with the deviations that `spread_note` explains."""
    return {
        name: Figure(figures[key], figures.get(f"{key}_std"))
        for key, name in names_of(extractor, prefix, spatial).items()
        if key in figures
    }


def spread_note(figures: Mapping[str, Figure]) -> str:
    """What the deviations of `named` figures of one set of images are."""
    known = [name for name, figure in figures.items() if figure.spread is not None]
    parts = []
    if distances := [name for name in known if name.endswith("D")]:
        parts.append(
            f"{distances[0]} is ± the standard deviation over other such images, by bootstrap, for this reference."
        )
    if "IS" in known:
        parts.append(f"IS is ± the standard deviation over its splits of {IMAGES_PER_SPLIT:,} images.")
    return " ".join(parts)


def warnings_of(
    reference: Measured, samples: Measured, extractor: Extractor, prefix: str = "", spatial: str = "", kept: bool = True
) -> list[str]:
    """What a reader should know of the figures: features that are not the usual ones, and too few images.

    Args:
        kept: whether precision and recall were wanted at all.
    """
    result = naming_note(extractor)
    names = names_of(extractor, prefix, spatial)
    for caution in cautions(reference, samples):
        key, _, text = caution.partition(": ")
        if key in names or kept:
            result.append(f"{names.get(key, key)}: {text}.")
    return result


def naming_note(extractor: Extractor) -> list[str]:
    """A sentence where the features are not those that published figures are of."""
    if extractor.name == INCEPTION:
        return []
    return [
        f"FD is the Fréchet distance of the features of {extractor.name}: it cannot be compared with FIDs, nor precision, recall "
        "or IS in these features with those in others."
    ]


def features_entry(extractor: Extractor) -> dict[str, Any]:
    """Of a report's provenance."""
    return {"network": extractor.name, "fingerprint": extractor.fingerprint}


def preprocessing_entry(extractor: Extractor | None, size: int | None) -> dict[str, Any]:
    """Of a report's provenance."""
    crop = (
        "none"
        if size is None
        else f"shorter side to {size} pixels (bicubic with antialiasing), centre crop; .npz as they are"
    )
    return {"images": crop, "pixels": "bytes", **({"network": extractor.preprocessing} if extractor else {})}
