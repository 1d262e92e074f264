"""Sets of images to measure: all that `open_images` reads, and .npz files in the layout of ADM's evaluation."""

import math
import os
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from detailflow.data.batches import note_unreadable
from detailflow.data.decode import first_line
from detailflow.data.images import ImageSource, open_images, spread, tolerated
from detailflow.data.transforms import center_crop
from detailflow.distributed import World
from detailflow.errors import DetailFlowError
from detailflow.evaluation.metrics import Gaussian
from detailflow.files import check_regular

IMAGES = "arr_0"  # the entry of an ADM .npz that holds images, (n, H, W, 3) bytes
_READERS = 4  # threads that decode a process's images; Pillow lets them run at once


class Statistics(NamedTuple):
    """What an .npz file says of a set's features."""

    pool: Gaussian
    spatial: Gaussian | None
    kept: Tensor | None  # (n, D) float32, the features of images spread over the set
    features: str | None  # the network's name; `None` in ADM's files, where it is Inception
    fingerprint: str | None  # and of its weights


def share_of(total: int, world: World) -> range:
    """The numbers of this process's images among `total`: the shares follow one another in the processes' order."""
    return range(world.rank * total // world.size, (world.rank + 1) * total // world.size)


def check_total(total: int, world: World) -> None:
    """Raise a `DetailFlowError` where a set of so many images is too small to be measured by these processes."""
    if total < max(2, world.size):
        raise DetailFlowError(f"too few images to measure: there are {total}, where {max(2, world.size)} are the least")


class _Pixels(Protocol):
    """Where images lie, each (H, W, 3) bytes of one size."""

    unreadable: dict[int, str]  # those that others stood in for: what is wrong with them

    def __len__(self) -> int: ...
    def read(self, numbers: Sequence[int]) -> Iterator[np.ndarray]:
        """Those of these ascending numbers. Raises DetailFlowError, naming what cannot be read or has another size."""


class ImageSet:
    """Images of one size; made by `open_set`.

    Iterating gives bytes (B, H, W, 3) of this process's share, in order. `len` counts those of all processes, and is 0 for a
    file of statistics alone. `side` is (height, width), `None` there.
    """

    def __init__(
        self,
        pixels: _Pixels | None,
        numbers: Sequence[int],
        side: tuple[int, int] | None,
        statistics: Statistics | None,
        about: dict[str, Any],
        world: World,
        batch_size: int,
    ) -> None:
        self._pixels, self._numbers, self._about = pixels, numbers, about
        self._processes, self._batch_size = world, batch_size
        self.side, self.statistics = side, statistics

    def __len__(self) -> int:
        return len(self._numbers)

    def __iter__(self) -> Iterator[Tensor]:
        own = share_of(len(self), self._processes)
        if self._pixels is None or not own:
            return
        batch: list[np.ndarray] = []
        for pixels in self._pixels.read(self._numbers[own.start : own.stop]):
            batch.append(pixels)
            if len(batch) == self._batch_size:
                yield torch.from_numpy(np.stack(batch))
                batch = []
        if batch:
            yield torch.from_numpy(np.stack(batch))

    def some(self, count: int) -> list[np.ndarray]:
        """Return up to `count` images spread over the whole set, as bytes (H, W, 3); none of a file of statistics alone."""
        if self._pixels is None:
            return []
        return list(self._pixels.read([self._numbers[i] for i in spread(len(self), min(count, len(self)))]))

    def description(self) -> dict[str, Any]:
        """What it is, for reports: data, kind, images, height, width, preprocessing and stored statistics."""
        height, width = self.side or (None, None)
        stored = self.statistics and (self.statistics.features or "inception (ADM)")
        bad = {"unreadable": list(self._pixels.unreadable.values())} if self._pixels and self._pixels.unreadable else {}
        return {
            **self._about,
            **bad,
            "images": len(self),
            "height": height,
            "width": width,
            "stored_statistics": stored,
        }


def open_set(
    path: str | os.PathLike[str],
    world: World | None = None,
    size: int | None = None,
    count: int | None = None,
    batch_size: int = 64,
    split: str | None = None,
) -> ImageSet:
    """Open a set of images to measure.

    Args:
        path: a folder, .parquet or .tar files or the name of a hub dataset, as for `data.images.open_images`; an .npz file with
            ADM's entries, `arr_0` (images), `mu`, `sigma`, `mu_s` and `sigma_s` (statistics of Inception's features), or either;
            or a folder with a `samples.npz`.
        processes: those that share the images; `None` is this one alone.
        size: resize the shorter side to so many pixels and take the centre; `None` takes images as they are, which must all
            have one size. It is one bicubic resize straight to the crop, where ADM's reference was made of photographs halved by
            averages as often as they were twice as large, then resized: figures of large photographs differ a little.
        count: of the set's images, so many spread over it; `None` is all.
        batch_size: images per batch.
        split: as for `open_images`.

    Raises:
        DetailFlowError: if it cannot be read or holds too few images; iterating raises it for too many unreadable images, or
            one of another size.
    """
    file = Path(path).expanduser()
    if os.path.isfile(file / "samples.npz"):
        file = file / "samples.npz"
    pixels: _Npz | _Decoded | None
    statistics = None
    if file.suffix == ".npz":
        if size is not None or split is not None:
            raise DetailFlowError(f"{file} holds images of one size and has no splits: leave out its size and split")
        pixels, statistics = _open_npz(file)
        about = {"data": str(path), "kind": "npz", "preprocessing": "none"}
    else:
        source = open_images(path, split=split)
        if not len(source):
            raise DetailFlowError(f"{path} holds no images")
        pixels = _Decoded(source, size)
        cropped = f"shorter side to {size} pixels (bicubic with antialiasing), centre crop"
        about = {"data": str(path), "kind": "images", "preprocessing": cropped if size else "none"}
        if split is not None:
            about["split"] = split
    total = len(pixels) if pixels else 0
    if count is not None and not 0 < count <= total:
        raise DetailFlowError(f"{path} holds {total} images, of which {count} cannot be taken")
    if count is not None and count < total:
        numbers: Sequence[int] = spread(total, count)
        statistics = None  # which are of all
    else:
        numbers = range(total)
    return ImageSet(pixels, numbers, pixels.side if pixels else None, statistics, about, world or World(), batch_size)


class _Decoded:
    """Image files of any kind, decoded a few at a time ahead of their use.

    As in training, up to 1% of them may be unreadable: the next one takes the place of each, with a warning.
    """

    def __init__(self, source: ImageSource, size: int | None) -> None:
        self.source, self.size = source, size
        self.unreadable: dict[int, str] = {}
        self._first = 0
        self.side = (size, size) if size else self._first_side()

    def __len__(self) -> int:
        return len(self.source)

    def _first_side(self) -> tuple[int, int]:
        image, found, self._first = self._image(0)
        self._note(found)
        assert image is not None  # or `_note` has raised
        return image.height, image.width

    def _image(self, number: int) -> tuple[Image.Image | None, dict[int, str], int]:
        """An image or the next one that can be read, what is wrong with those before it, and its number."""
        found: dict[int, str] = {}
        while len(found) <= tolerated(len(self)):
            try:
                return self.source.image(number), found, number
            except DetailFlowError as error:
                found[number] = str(error)
                number = (number + 1) % len(self)
        return None, found, number

    def _note(self, found: dict[int, str]) -> None:
        note_unreadable(self.unreadable, found, tolerated(len(self)), f"the {len(self)} images of {self.source.where}")

    def _decode(self, number: int) -> tuple[np.ndarray, dict[int, str]]:
        image, found, number = self._image(number)
        if image is None:
            return np.empty(0), found
        if self.size:
            return center_crop(image, self.size), found
        height, width = self.side
        if image.size != (width, height):
            name, first = self.source.name(number), self.source.name(self._first)
            raise DetailFlowError(
                f"{name} has {image.width}×{image.height} pixels and {first} {width}×{height}: "
                "give images of one size, or a size (--size) to crop them to"
            )
        return np.asarray(image), found

    def read(self, numbers: Sequence[int]) -> Iterator[np.ndarray]:
        window = 16 * _READERS
        with ThreadPoolExecutor(_READERS) as pool:
            ahead = [pool.submit(self._decode, number) for number in numbers[:window]]
            for position in range(len(numbers)):
                pixels, found = ahead[position % window].result()
                self._note(found)
                yield pixels
                if position + window < len(numbers):
                    ahead[position % window] = pool.submit(self._decode, numbers[position + window])


class _Npz:
    """The images of an .npz file, read one by one: ADM's sets of samples have ten gigabytes."""

    def __init__(self, file: Path, shape: tuple[int, ...], offset: int) -> None:
        self.file, self.shape, self.offset = file, shape, offset
        self.unreadable: dict[int, str] = {}
        self.side = (shape[1], shape[2])

    def __len__(self) -> int:
        return self.shape[0]

    def read(self, numbers: Sequence[int]) -> Iterator[np.ndarray]:
        image = self.shape[1:]
        size = math.prod(image)
        try:
            with zipfile.ZipFile(self.file) as archive, archive.open(f"{IMAGES}.npy") as member:
                for number in numbers:
                    member.seek(self.offset + number * size)
                    content = member.read(size)
                    if len(content) < size:
                        raise EOFError(f"it ends at image {number}")
                    pixels = np.frombuffer(content, np.uint8).reshape(image)
                    yield np.broadcast_to(
                        pixels.reshape(*self.side, -1), (*self.side, 3)
                    )  # grey is the same in all three
        except _DAMAGE as error:
            raise DetailFlowError(f"{self.file} is damaged and cannot be read ({first_line(error)})") from error


_EXPANDED = 256 * 2**20  # bytes that an entry of statistics may always have
_MOST_EXPANSION = 20  # and how many times its compressed size if it is larger
_MANY_IMAGES = 10**5  # that may have any size
_LEAST_BYTES = 64  # compressed, of each image if there are more
_DAMAGE = (OSError, EOFError, MemoryError, KeyError, ValueError, zipfile.BadZipFile, zlib.error, NotImplementedError)


def _open_npz(file: Path) -> tuple[_Npz | None, Statistics | None]:
    """Images and statistics; one may be missing."""
    if not file.exists():
        raise DetailFlowError(f"{file} does not exist: give an .npz file, a folder or another set of images")
    try:
        check_regular(file)
        with zipfile.ZipFile(file) as archive:
            names = {name.removesuffix(".npy") for name in archive.namelist()}
            header = _read_header(archive, file) if IMAGES in names else None
        statistics = _read_statistics(file, names)
    except DetailFlowError:
        raise
    except _DAMAGE as error:
        raise DetailFlowError(f"{file} is damaged, or no .npz file ({first_line(error)})") from error
    if header is None and statistics is None:
        raise DetailFlowError(
            f"{file} holds neither images ({IMAGES}) nor statistics (mu and sigma), only {', '.join(sorted(names)) or 'nothing'}"
        )
    return header, statistics


def _read_header(archive: zipfile.ZipFile, file: Path) -> _Npz:
    with archive.open(f"{IMAGES}.npy") as member:
        version = np.lib.format.read_magic(member)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, kind = read(member)
        offset = member.tell()
    compressed = archive.getinfo(f"{IMAGES}.npy").compress_size
    if kind.hasobject:
        raise DetailFlowError(
            f"{file} holds pickled objects as {IMAGES}, which are not read: save the images as uint8 numbers"
        )
    grey = len(shape) == 3 or (len(shape) == 4 and shape[3] == 1)
    if kind != np.uint8 or fortran or not (grey or (len(shape) == 4 and shape[3] == 3)):
        raise DetailFlowError(
            f"{file} holds {kind} {tuple(shape)}{' in Fortran order' if fortran else ''} as {IMAGES}, "
            "where images are uint8 (n, height, width, 3), or without the 3 if they are grey"
        )
    if 0 in shape:
        raise DetailFlowError(f"{file} holds no images: {IMAGES} is empty")
    if shape[0] > max(_MANY_IMAGES, compressed // _LEAST_BYTES):
        raise DetailFlowError(f"{file} holds {shape[0]:,} images in {compressed:,} bytes: no real images are as small")
    return _Npz(file, shape, offset)


def _check_expansion(member: zipfile.ZipInfo, file: Path) -> None:
    """Check that an entry that is read as a whole is not far larger than what of the file holds it."""
    if member.file_size > max(_EXPANDED, _MOST_EXPANSION * member.compress_size):
        raise DetailFlowError(
            f"{file} grows from {member.compress_size:,} bytes to {member.file_size:,} as {member.filename} is read: "
            "measure the statistics again"
        )


def _read_statistics(file: Path, names: set[str]) -> Statistics | None:
    if not {"mu", "sigma"} <= names:
        return None
    with np.load(file, allow_pickle=False) as stored:

        def entry(name: str, dtype: type, *shape: int) -> np.ndarray:
            """Raises where it is another thing; −1 in the shape is any number."""
            _check_expansion(stored.zip.getinfo(f"{name}.npy"), file)
            try:
                value = stored[name]
            except ValueError as error:
                raise DetailFlowError(
                    f"{file} holds pickled objects as {name}, which are not read: save numbers"
                ) from error
            fits = value.ndim == len(shape) and all(w in (-1, n) for w, n in zip(shape, value.shape, strict=True))
            if (
                not fits
                or not np.issubdtype(value.dtype, dtype)
                or (dtype is np.floating and not np.isfinite(value).all())
            ):
                raise DetailFlowError(
                    f"{file} holds {value.dtype} {value.shape} as {name}, where statistics have finite floating-point numbers, "
                    "a vector and a square matrix of its length"
                )
            return value

        def gaussian(mean: str, covariance: str) -> Gaussian:
            mu = entry(mean, np.floating, -1)
            sigma = entry(covariance, np.floating, len(mu), len(mu))
            return Gaussian(torch.from_numpy(mu).double(), torch.from_numpy(sigma).double(), count)

        count = int(entry("count", np.integer)) if "count" in names else None
        pool = gaussian("mu", "sigma")
        return Statistics(
            pool,
            gaussian("mu_s", "sigma_s") if {"mu_s", "sigma_s"} <= names else None,
            torch.from_numpy(entry("kept", np.floating, -1, len(pool.mean))).float() if "kept" in names else None,
            str(entry("features", np.str_)) if "features" in names else None,
            str(entry("fingerprint", np.str_)) if "fingerprint" in names else None,
        )
