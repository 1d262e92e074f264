"""Token extraction: every training image's crops as three rows of codes in a token store (method §5)."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from detailflow import hub
from detailflow.data.images import ImageSource, open_images
from detailflow.data.tokens import TokenStore, TokenStoreInfo
from detailflow.data.transforms import ten_crops, to_tensor, two_crops
from detailflow.device import autocast, choose_device
from detailflow.errors import DetailFlowError
from detailflow.models.tokenizer import DetailFlowTokenizer
from detailflow.schedule import require_not_negative, require_positive
from detailflow.training.loop import PRECISIONS
from detailflow.training.tokenizer import draw_position

CROPS = {"ten": (ten_crops, 10), "two": (two_crops, 2)}
BAD_SHARE = 0.01  # more unreadable images than this stop the extraction


@dataclass(frozen=True)
class Extraction:
    """What to extract, and how.

    Attributes:
        data, split, image_column, label_column: the images, as in tokenizer training.
        tokenizer: folder or hub id.
        crops: "ten" (4 corners and centre of the image at 1.1 times the size, and their flips: the paper's) or "two" (the
            centre and its flip, for small images that fill their frame).
        batch_size: crops per pass through the tokenizer.
    """

    data: str
    tokenizer: str
    split: str | None = None
    image_column: str = "image"
    label_column: str = "label"
    crops: str = "ten"
    batch_size: int = 250
    precision: str = "fp32"
    workers: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        require_positive(batch_size=self.batch_size)
        require_not_negative(workers=self.workers)
        if self.crops not in CROPS:
            raise DetailFlowError(f"crops must be {' or '.join(CROPS)}, not {self.crops!r}")
        if self.precision not in PRECISIONS:
            raise DetailFlowError(f"precision must be {' or '.join(PRECISIONS)}, not {self.precision!r}")


class _ImageCrops(Dataset[tuple[np.ndarray | None, int, str]]):
    """(crops (C, R, R, 3) or None where the image can't be read, label, what is wrong) by index."""

    def __init__(self, source: ImageSource, size: int, crops: str) -> None:
        self.source, self.size, self.make = source, size, CROPS[crops][0]

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[np.ndarray | None, int, str]:
        try:
            crops = self.make(self.source.image(index), self.size)
        except DetailFlowError as error:
            return None, 0, str(error)
        return crops, int(self.source.labels[index]), ""


def code_rows(model: DetailFlowTokenizer, images: Tensor, positions: Tensor, generator: torch.Generator) -> Tensor:
    """The three rows of codes of each image: clean, input (mistakes planted, later tokens corrected), label (method §5).

    Args:
        images: (B, 3, R, R) pixels in [-1, 1].
        positions: (B,) p of each image, below c or the start of a group.

    Returns:
        (B, 3, N) int64.
    """
    schedule, n = model.schedule, model.config.num_tokens
    patches = model.encode_patches(images)
    z = model.encode_latents(patches, n)
    clean = model.quantizer.nearest(z)
    at = torch.arange(n)
    end = torch.tensor([schedule.span_end(p) for p in positions.tolist()])[:, None]
    planted = ((at >= positions[:, None]) & (at < end)).to(images.device)
    end = end.to(images.device)
    given = torch.where(planted, model.plant_mistakes(z, generator=generator), clean)
    corrected = model.quantizer.nearest(model.correct_latents(patches, given, end))
    written = at.to(images.device) < end
    given = torch.where(written, given, corrected)
    return torch.stack((clean, given, torch.where(planted, clean, given)), 1)


@torch.no_grad()
def extract(config: Extraction, output: Path, device: str | None = None) -> TokenStore:
    """Write the token store at `output` and return it.

    Raises:
        DetailFlowError: for images or a tokenizer that can't be read, or an output folder that can't be used.
    """
    from tqdm import tqdm

    place = choose_device(device)
    model = DetailFlowTokenizer.from_pretrained(config.tokenizer, device=place)
    source = open_images(config.data, config.split, config.image_column, config.label_column)
    dataset = _ImageCrops(source, model.config.image_size, config.crops)
    count = CROPS[config.crops][1]
    info = TokenStoreInfo(
        num_tokens=model.config.num_tokens,
        codebook_size=model.config.codebook_size,
        crops=count,
        class_names=source.class_names,
        tokenizer_fingerprint=tokenizer_fingerprint(config.tokenizer),
    )
    generator = torch.Generator().manual_seed(config.seed)
    precision = PRECISIONS[config.precision]
    with TokenStore.create(output, info) as writer, tqdm(total=len(source), desc="extract", unit="img") as bar:
        for crops, labels in _batches(dataset, max(1, config.batch_size // count), config.workers, bar):
            draws = [draw_position(model.schedule, model.config.num_tokens, generator) or 0 for _ in labels]
            positions = torch.tensor(draws).repeat_interleave(count)
            images = to_tensor(crops.reshape(-1, *crops.shape[2:])).to(place)
            with autocast(place, precision):
                rows = code_rows(model, images, positions, generator)
            writer.append(rows.view(len(labels), count, *rows.shape[1:]).cpu().numpy(), labels)
    return TokenStore.open(output)


def _as_it_is(item: Any) -> Any:
    return item


def _batches(dataset: _ImageCrops, size: int, workers: int, bar) -> Iterator[tuple[np.ndarray, np.ndarray]]:  # type: ignore[no-untyped-def]
    """Readable images in order, `size` at a time; the others are counted and named.

    Raises:
        DetailFlowError: where more than 1% (and more than one) can't be read.
    """
    bad: list[str] = []
    crops: list[np.ndarray] = []
    labels: list[int] = []
    for made, label, problem in DataLoader(dataset, batch_size=None, num_workers=workers, collate_fn=_as_it_is):
        bar.update()
        if made is None:
            bad.append(problem)
            bar.write(f"skipped: {problem}")
            if len(bad) > max(1, BAD_SHARE * len(dataset)):
                raise DetailFlowError(
                    f"{len(bad)} images can't be read, more than 1%: remove or replace them (the first: {bad[0]})"
                )
            continue
        crops.append(made)
        labels.append(label)
        if len(crops) == size:
            yield np.stack(crops), np.array(labels)
            crops, labels = [], []
    if crops:
        yield np.stack(crops), np.array(labels)
    if bad:
        bar.write(f"{len(bad)} of {len(dataset)} images could not be read and were left out")


def tokenizer_fingerprint(path_or_id: str | Path) -> str:
    """What ties a token store to the tokenizer that made it."""
    return hub.fingerprint(*hub.load(path_or_id, "tokenizer"))
