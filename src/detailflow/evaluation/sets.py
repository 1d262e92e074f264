"""Sets of images to measure: all that `open_images` reads, and .npz files in the layout of ADM's evaluation."""

import math
import os
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from detailflow.data.batches import check_unreadable, note_unreadable
from detailflow.data.images import open_images
from detailflow.data.source import ImageSource, spread, tolerated
from detailflow.data.transforms import center_crop
from detailflow.distributed import World
from detailflow.errors import DetailFlowError, explained
from detailflow.evaluation.metrics import Gaussian
from detailflow.files import check_regular, writing
from detailflow.runs import RunFolder
from detailflow.samples import SETTINGS_FILE

IMAGES = "arr_0"  # the entry of an ADM .npz that has images, (n, H, W, 3) bytes
THREADS = 4  # that decode a rank's images; Pillow lets them run at once
LARGEST_ENTRY = 256 * 2**20  # bytes that an entry of statistics may always have
MOST_EXPANSION = 20  # times its compressed size, for a larger one
MANY_IMAGES = 10**5  # may have any size
_ROUNDING = 1e-4  # of the largest number in a covariance, by which its halves may differ: others compute in float32
LEAST_BYTES = 64  # compressed, of each image if there are more
_DAMAGE = (OSError, EOFError, MemoryError, KeyError, ValueError, zipfile.BadZipFile, zlib.error, NotImplementedError)


@dataclass(frozen=True)
class Statistics:
    """The features of a set of images, as far as distances need them."""

    features: str  # the network's name
    fingerprint: str | None  # of its weights; None in ADM's files
    pool: Gaussian
    spatial: Gaussian | None = None
    kept: Tensor | None = None  # (n, D) float32 on the CPU, of images spread over the set
    inception_score: tuple[float, float | None] | None = None  # mean and standard deviation over splits
    checksum: str = ""  # of the images; empty if none were read
    num_classes: int = 0  # of the network
    recognised: float = 0.0  # the share of images whose likeliest class is their label
    side: tuple[int, int] | None = None  # (height, width) of the images, if known


def shard_range(total: int, world: World) -> range:
    """Return the indices of this rank's images among `total`; those of all ranks make it up in order."""
    return range(world.rank * total // world.size, (world.rank + 1) * total // world.size)


def check_total(total: int, world: World) -> None:
    """Check that so many images are enough for these ranks to measure."""
    if total < max(2, world.size):
        raise DetailFlowError(f"too few images to measure: there are {total}, and {max(2, world.size)} are the least")


@dataclass
class ImageSet:
    """Images of one size; made by `open_set`. Iterating gives bytes (B, H, W, 3) of this rank's images, in order.

    `len` counts the images of all ranks. It is 0 for a file of statistics alone, and `side` may be None.
    """

    source: "ImageSource | NpzImages | None"
    indices: Sequence[int]
    side: tuple[int, int] | None  # (height, width)
    size: int | None  # to crop images to
    statistics: Statistics | None
    about: dict[str, Any]
    world: World
    batch_size: int
    unreadable: dict[int, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[Tensor]:
        own = shard_range(len(self), self.world)
        for batch in self._read(self.indices[own.start : own.stop]):
            yield torch.from_numpy(np.stack(batch))

    def some(self, count: int) -> list[np.ndarray]:
        """Return up to `count` images (H, W, 3) spread over the whole set."""
        chosen = [self.indices[i] for i in spread(len(self), min(count, len(self)))]
        return [image for batch in self._read(chosen) for image in batch]

    def gather_unreadable(self) -> None:
        """Note what other ranks could not read, too; every rank must call it once it has read its images."""
        for found in self.world.gather(self.unreadable):
            self.unreadable |= found
        with self.world.raise_together():
            if self.source is not None:
                check_unreadable(self.unreadable, tolerated(len(self.source)), self._named())

    def _named(self) -> str:
        assert self.source is not None
        return f"the {len(self.source)} images of {self.source.where}"

    def description(self) -> dict[str, Any]:
        """Return what a report says about the set."""
        stored = self.statistics and (self.statistics.features if self.statistics.fingerprint else "inception (ADM)")
        height, width = self.side or (None, None)
        bad = {"unreadable": list(self.unreadable.values())} if self.unreadable else {}
        sizes = {"images": len(self), "height": height, "width": width}
        return self.about | bad | sizes | {"stored_statistics": stored}

    def _read(self, indices: Sequence[int]) -> Iterator[list[np.ndarray]]:
        """Yield batches, each decoded while the one before is in use."""
        if not indices or self.source is None:
            return
        batches = [indices[i : i + self.batch_size] for i in range(0, len(indices), self.batch_size)]
        # An .npz file must be read in order; a single thread does so.
        with ThreadPoolExecutor(1 if isinstance(self.source, NpzImages) else THREADS) as pool:
            ahead = pool.map(self._decode, batches[0])
            for following in [*batches[1:], ()]:
                current, ahead = ahead, pool.map(self._decode, following)
                batch = []
                for pixels, found in current:
                    note_unreadable(self.unreadable, found, tolerated(len(self.source)), self._named())
                    batch.append(pixels)
                yield batch

    def _decode(self, index: int) -> tuple[np.ndarray, dict[int, str]]:
        """Return an image or the next one that can be read, and what is wrong with those before it, as in training."""
        source, found = self.source, dict[int, str]()
        assert source is not None
        while len(found) <= tolerated(len(source)):
            try:
                image = source.image(index)
            except DetailFlowError as error:
                if isinstance(source, NpzImages):
                    raise
                found[index] = str(error)
                index = (index + 1) % len(source)
                continue
            return self._fitted(image, index), found
        return np.empty(0), found  # too many, which `_read` raises

    def _fitted(self, image: Image.Image, index: int) -> np.ndarray:
        assert self.source is not None
        if self.size and isinstance(self.source, ImageSource):
            return center_crop(image, self.size)
        if self.side and (image.height, image.width) != self.side:
            height, width = self.side
            raise DetailFlowError(
                f"{self.source.name(index)} has {image.width}×{image.height} pixels and {self.source.name(0)} "
                f"{width}×{height}: give images of one size, or a size (--size) to crop them to"
            )
        return np.asarray(image)


def open_set(
    path: str | os.PathLike[str],
    *,
    size: int | None = None,
    count: int | None = None,
    split: str | None = None,
    image_column: str = "image",
    world: World = World(),
    batch_size: int = 64,
) -> ImageSet:
    """Open a set of images to measure.

    Args:
        path: as for `open_images`; an .npz file with ADM's entries, `arr_0` (images), `mu`, `sigma`, `mu_s` and
            `sigma_s` (statistics of Inception's features), or either; or a folder with a `samples.npz`.
        size: resize the shorter side to so many pixels and take the centre; None takes images as they are, which must
            all have one size. It is one bicubic resize to the crop. ADM's reference was made of photographs that were
            first halved by averages, so figures of large photographs differ a little. An .npz must have this size.
        count: use only so many images, spread over the set.
        split: as for `open_images`.
        image_column: as for `open_images`.
        world: the ranks that share the images.
    """
    file = Path(path).expanduser()
    folder = file
    if os.path.isfile(file / "samples.npz"):
        file = file / "samples.npz"
    source: ImageSource | NpzImages | None
    about: dict[str, Any] = {"data": str(path), "kind": "images", "preprocessing": "none"}
    statistics: Statistics | None = None
    side = (size, size) if size else None
    if file.suffix == ".npz":
        about["kind"] = "npz"
        if split is not None:
            raise DetailFlowError(f"{file} has no splits: leave out the split")
        source, statistics = _open_npz(file)
        side = source.side if source else statistics.side if statistics else None
        if size and side not in (None, (size, size)):
            height, width = side
            what = "images" if source else "statistics of images"
            raise DetailFlowError(f"{path} has {what} of {width}×{height} pixels, and not of {size}×{size}")
    else:
        source = open_images(path, split=split, image_column=image_column)
        if size:
            about["preprocessing"] = f"shorter side to {size} pixels (bicubic with antialiasing), centre crop"
        else:
            side = _first_side(source)
        about |= {"split": split} if split else {}
    total = len(source) if source else 0
    _check_whole(folder, total)
    if count is not None and not 0 < count <= total:
        raise DetailFlowError(f"{path} has {total} images: {count} cannot be taken from it")
    indices: Sequence[int] = range(total)
    if count is not None and count < total:
        indices, statistics = spread(total, count), None  # as they are of all images
    return ImageSet(source, indices, side, size, statistics, about, world, batch_size)


def _check_whole(folder: Path, images: int) -> None:
    """Check that a set that `generate --num-images` was making is finished."""
    record: dict[str, Any] = {}
    with suppress(DetailFlowError):  # somebody else's file of that name
        record = RunFolder(folder, "samples", SETTINGS_FILE).read()
    total = record.get("num_images")
    if isinstance(total, int) and "gpt" in record and images != total:
        raise DetailFlowError(
            f"{folder} has {images:,} of its {total:,} images: repeat the `detailflow generate` that was not finished, "
            f"or remove {SETTINGS_FILE} if you took some out"
        )


def _first_side(source: ImageSource) -> tuple[int, int] | None:
    """Return the (height, width) of the first image that can be read; None if more than 1% cannot."""
    for index in range(min(len(source), 1 + tolerated(len(source)))):
        with suppress(DetailFlowError):
            image = source.image(index)
            return image.height, image.width
    return None


class NpzImages:
    """The images in an .npz file, read one by one in order: ADM's sets of samples have ten gigabytes."""

    def __init__(self, file: Path) -> None:
        self.where = str(file)
        archive = zipfile.ZipFile(file)
        self._member = archive.open(f"{IMAGES}.npy")
        major = np.lib.format.read_magic(self._member)[0]
        read = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
        shape, fortran, kind = read(self._member)
        self._offset = self._member.tell()
        compressed = archive.getinfo(f"{IMAGES}.npy").compress_size
        if kind.hasobject:
            raise DetailFlowError(
                f"{file} has pickled objects as {IMAGES}, which are not read: save the images as uint8 numbers"
            )
        grey = len(shape) == 3 or (len(shape) == 4 and shape[3] == 1)
        if kind != np.uint8 or fortran or not (grey or (len(shape) == 4 and shape[3] == 3)):
            raise DetailFlowError(
                f"{file} has {kind} {tuple(shape)}{' in Fortran order' if fortran else ''} as {IMAGES}, "
                "where images are uint8 (n, height, width, 3), or without the 3 if they are grey"
            )
        if 0 in shape:
            raise DetailFlowError(f"{file} has no images: {IMAGES} is empty")
        if shape[0] > max(MANY_IMAGES, compressed // LEAST_BYTES):
            raise DetailFlowError(
                f"{file} has {shape[0]:,} images in {compressed:,} bytes: no real images are as small"
            )
        self._count, self._image, self.side = shape[0], shape[1:], (shape[1], shape[2])

    def __len__(self) -> int:
        return int(self._count)

    def name(self, index: int) -> str:
        """Return what messages call an image."""
        return f"{self.where} image {index}"

    def image(self, index: int) -> Image.Image:
        """Return an image as RGB."""
        size = math.prod(self._image)
        with explained(f"{self.where} is damaged and cannot be read", _DAMAGE):
            self._member.seek(self._offset + index * size)
            content = self._member.read(size)
            if len(content) < size:
                raise EOFError(f"it ends at image {index}")
        pixels = np.frombuffer(content, np.uint8).reshape(*self.side, -1)
        return Image.fromarray(np.broadcast_to(pixels, (*self.side, 3)))  # grey is the same in all three


def _open_npz(file: Path) -> tuple[NpzImages | None, Statistics | None]:
    """Open the images and read the statistics in a file; either may be missing."""
    if not file.exists():
        raise DetailFlowError(f"{file} does not exist: give an .npz file, a folder or another set of images")
    with explained(f"{file} is damaged, or no .npz file", _DAMAGE):
        check_regular(file)
        with zipfile.ZipFile(file) as archive:
            names = {name.removesuffix(".npy") for name in archive.namelist()}
        images = NpzImages(file) if IMAGES in names else None
        statistics = _read_statistics(file, names) if {"mu", "sigma"} <= names else None
    if images is None and statistics is None:
        raise DetailFlowError(
            f"{file} has neither images ({IMAGES}) nor statistics (mu and sigma), "
            f"only {', '.join(sorted(names)) or 'nothing'}"
        )
    return images, statistics


def _read_statistics(file: Path, names: set[str]) -> Statistics:
    with np.load(file, allow_pickle=False) as stored:

        def entry(name: str, dtype: type, *shape: int) -> np.ndarray:
            """Read an entry of this type and shape, in which −1 is any number."""
            member = stored.zip.getinfo(f"{name}.npy")
            if member.file_size > max(LARGEST_ENTRY, MOST_EXPANSION * member.compress_size):
                raise DetailFlowError(
                    f"{file} grows from {member.compress_size:,} bytes to {member.file_size:,} as {member.filename} is "
                    "read: measure the statistics again"
                )
            try:
                value: np.ndarray = stored[name]
            except ValueError as error:
                raise DetailFlowError(
                    f"{file} has pickled objects as {name}, which are not read: save numbers"
                ) from error
            fits = value.ndim == len(shape) and all(w in (-1, n) for w, n in zip(shape, value.shape, strict=True))
            known = np.issubdtype(value.dtype, dtype) and (dtype is not np.floating or np.isfinite(value).all())
            if not fits or not known:
                sizes = ", ".join("n" if size < 0 else str(size) for size in shape)
                wanted = {np.integer: "a whole number", np.str_: "a text"}
                raise DetailFlowError(
                    f"{file} has {value.dtype} {value.shape} as {name}, where statistics have "
                    f"{wanted.get(dtype, f'finite floating-point numbers ({sizes})')}: measure the statistics again"
                )
            return value

        def gaussian(mean: str, covariance: str) -> Gaussian:
            mu = entry(mean, np.floating, -1)
            sigma = entry(covariance, np.floating, len(mu), len(mu))
            _check_covariance(sigma.astype(np.float64), f"{file} has a matrix as {covariance}")
            return Gaussian(torch.from_numpy(mu).double(), torch.from_numpy(sigma).double(), count)

        count = int(entry("count", np.integer)) if "count" in names else None
        pool, sides = gaussian("mu", "sigma"), {"height", "width"}
        return Statistics(
            features=str(entry("features", np.str_)) if "features" in names else "inception",
            fingerprint=str(entry("fingerprint", np.str_)) if "fingerprint" in names else None,
            pool=pool,
            spatial=gaussian("mu_s", "sigma_s") if {"mu_s", "sigma_s"} <= names else None,
            kept=torch.from_numpy(entry("kept", np.floating, -1, len(pool.mean))).float() if "kept" in names else None,
            side=(int(entry("height", np.integer)), int(entry("width", np.integer))) if sides <= names else None,
        )


def _check_covariance(sigma: np.ndarray, what: str) -> None:
    rounding = _ROUNDING * np.abs(sigma).max(initial=0)
    if np.abs(sigma - sigma.T).max(initial=0) > rounding or sigma.diagonal().min(initial=0) < -rounding:
        raise DetailFlowError(
            f"{what} that is no covariance, which is symmetric and has no negative numbers on its diagonal: "
            "measure the statistics again"
        )


def save_statistics(path: Path, statistics: Statistics) -> None:
    """Write an .npz file that `open_set` reads as a reference: ADM's entries, and beside them those of ours."""
    entries: dict[str, Any] = {"mu": statistics.pool.mean, "sigma": statistics.pool.covariance}
    if statistics.spatial:
        entries |= {"mu_s": statistics.spatial.mean, "sigma_s": statistics.spatial.covariance}
    entries |= {"count": statistics.pool.count, "kept": statistics.kept}
    entries |= {"features": statistics.features, "fingerprint": statistics.fingerprint}
    entries |= dict(zip(("height", "width"), statistics.side or (), strict=False))
    with writing(path) as temporary, temporary.open("wb") as file:
        known = {name: np.asarray(value) for name, value in entries.items() if value is not None}
        np.savez(file, **known)  # type: ignore[arg-type]  # allow_pickle is new in NumPy 2
