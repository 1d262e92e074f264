"""What all evaluations share, and the simplest one: any two sets of images against each other."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from detailflow import hub
from detailflow.data.source import ImageSource
from detailflow.data.transforms import resized
from detailflow.distributed import World, launched
from detailflow.errors import DetailFlowError
from detailflow.evaluation.distances import REFERENCE_KEPT, cautions, compare_sets, measure
from detailflow.evaluation.features import Extractor
from detailflow.evaluation.metrics import IMAGES_PER_SPLIT
from detailflow.evaluation.report import Figure, Picture, Report, Row, Section
from detailflow.evaluation.sets import ImageSet, Statistics, open_set
from detailflow.machine import keep_freed_memory
from detailflow.pictures import grid

BATCH_SIZE, GPU_BATCH_SIZE = 64, 256  # if the user gives none
PICTURES = 8  # images of each set that a report shows


@dataclass(frozen=True)
class Context:
    """The ranks of an evaluation, this one's device, and how many images it takes at once."""

    world: World
    device: torch.device
    batch_size: int

    @classmethod
    def launch(cls, device: str | None, batch_size: int | None = None) -> "Context":
        """Join the ranks of this launch; None is a GPU if there is one, and a batch size that suits the device."""
        world, own = launched(device)
        keep_freed_memory()
        return cls(world, own, batch_size or (GPU_BATCH_SIZE if own.type == "cuda" else BATCH_SIZE))

    def open(self, path: str, size: int | None = None, count: int | None = None, **columns: Any) -> ImageSet:
        """Open a set, as `open_set`, which all ranks share."""
        with self.world.raise_together():
            found = open_set(path, size=size, count=count, world=self.world, batch_size=self.batch_size, **columns)
            stored, several = found.statistics, self.world.size > 1
            kept = stored is not None and stored.kept is not None
            listing = found.source.fingerprint if several and isinstance(found.source, ImageSource) else ""
        self.world.check_same({"their images": (listing, len(found), found.side, stored is not None, kept)})
        return found


def evaluate_samples(samples: ImageSet, reference: ImageSet, extractor: Extractor, context: Context) -> Report | None:
    """Compare two sets of images; the report, whose provenance is not complete yet, is for the main process."""
    if samples.side and reference.side and samples.side != reference.side:
        ours, theirs = (
            f"{images.about['data']} has images of {images.side[1]}×{images.side[0]} pixels"  # type: ignore[index]
            for images in (samples, reference)
        )
        raise DetailFlowError(f"{ours} and {theirs}: give a size (--size) for both")
    measured = measure(extractor, samples)
    wanted = measure(extractor, reference, keep=REFERENCE_KEPT)
    if not context.world.is_main:
        return None
    figures = compare_sets(wanted, measured, device=context.device)
    data = {"samples": data_entry(samples, measured), "reference": data_entry(reference, wanted)}
    shown, beside = (images.some(PICTURES) for images in (samples, reference))
    caption = "Images spread over the samples" + (", and below them over the reference" if beside else "")
    pictures = [Image.fromarray(image) for image in (*shown, *beside[: len(shown)])]
    return Report(
        kind="samples",
        title="Two sets of images",
        sections=[Section("Samples against the reference", [Row({}, figures)], spread_note(figures))],
        provenance=provenance(data, extractor, samples.size),
        pictures=[Picture("samples", caption, grid(pictures, len(shown)))] if shown else [],
        notes=cautions(wanted, measured),
    )


def at_side(images: Tensor, side: int) -> Tensor:
    """Resize bytes (B, H, W, 3) to (B, side, side, 3), by Pillow as everywhere in the project."""
    if images.shape[1:3] == (side, side):
        return images
    pictures = [resized(Image.fromarray(image), side, side) for image in images.cpu().numpy()]
    return torch.from_numpy(np.stack(pictures)).to(images.device)


def spread_note(figures: Mapping[str, Figure]) -> str:
    """Return what the spread of figures of one set of images is."""
    known = [name for name, figure in figures.items() if figure.spread is not None]
    parts = []
    if distances := [name for name in known if name.endswith("D")]:
        parts.append(
            f"{distances[0]} is ± the standard deviation over other such images, by bootstrap, for this reference."
        )
    if "IS" in known:
        parts.append(f"IS is ± the standard deviation over its splits of {IMAGES_PER_SPLIT:,} images.")
    return " ".join(parts)


def data_entry(images: ImageSet, measured: Statistics) -> dict[str, Any]:
    """Return a set's entry in the provenance, with the checksum of what was read: images or stored statistics."""
    entry = {"checksum": measured.checksum} if measured.checksum else {}
    if (stored := images.statistics) is not None:
        entry["checksum_of_statistics"] = hub.fingerprint({}, {"mu": stored.pool.mean, "sigma": stored.pool.covariance})
    return {**images.description(), **entry}


def provenance(data: Mapping[str, Any], extractor: Extractor | None, size: int | None) -> dict[str, Any]:
    """Return the part of a report's provenance that must be equal for figures to be compared."""
    crop = f"shorter side to {size} pixels (bicubic with antialiasing), centre crop; .npz as they are"
    preprocessing = {"images": crop if size else "none", "pixels": "bytes"}
    if extractor is None:
        return {"data": data, "features": {}, "preprocessing": preprocessing}
    return {
        "data": data,
        "features": {"network": extractor.name, "fingerprint": extractor.fingerprint},
        "preprocessing": preprocessing | {"network": extractor.preprocessing},
    }
