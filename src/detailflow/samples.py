"""Many generated images on disk: written part by part by any number of processes, and gone on with where they stopped.

A part is a run of image numbers that is made in the same batches whoever makes it, and image i's noise depends on the seed and
i alone, so one process and many write the same files. A part is written whole or not at all; those that are there are skipped.
"""

import hashlib
import io
import json
import math
import os
import re
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from detailflow.distributed import World
from detailflow.errors import DetailFlowError
from detailflow.files import lock_folder, read_json, replacing, shortened, write_json
from detailflow.hub import fingerprint
from detailflow.labels import ClassId
from detailflow.pictures import generated
from detailflow.pipeline import DetailFlowPipeline
from detailflow.seeds import check_seeds

SETTINGS_FILE = "samples.json"
TEMPORARY = "temporary"  # in that file: whether the samples may go once they have served
SHARD_IMAGES = 1000  # about as many are in one tar file
CHECKSUMS = ("labels", "tokenizer", "gpt")  # settings whose values say nothing to a reader


class Writer(Protocol):
    """A format of many images."""

    batches: int  # in a part

    def found(self) -> Iterable[Path]:
        """Files on disk that it would take for the set's."""

    def is_done(self, part: int, numbers: range) -> bool:
        """Whether the part is on disk already."""

    def write(self, part: int, numbers: range, labels: Sequence[int], images: Sequence[Image.Image]) -> None:
        """Write a part, whole or not at all."""

    def finish(self, parts: int, labels: Sequence[int]) -> None:
        """What is left to do, by one process, once all parts are there."""

    def reopen(self, images: int, size: int) -> None:
        """Let a set of so many images grow, by one process: its whole parts, of `size` images, stay as they are."""


class PngWriter:
    """A file per image, `NUMBER-NAME.png`."""

    batches = 1

    def __init__(self, folder: Path, labels: Sequence[int], name: Callable[[int], str]) -> None:
        self.folder, self.labels, self.name = folder, labels, name

    def path(self, number: int) -> Path:
        """Of an image."""
        return self.folder / f"{number:04d}-{self.name(self.labels[number])}.png"

    def found(self) -> Iterable[Path]:
        return filter(Path.exists, map(self.path, range(len(self.labels))))

    def is_done(self, part: int, numbers: range) -> bool:
        return all(self.path(number).is_file() for number in numbers)

    def write(self, part: int, numbers: range, labels: Sequence[int], images: Sequence[Image.Image]) -> None:
        for number, image in zip(numbers, images, strict=True):
            with replacing(self.path(number)) as path:
                image.save(path, format="PNG")

    def finish(self, parts: int, labels: Sequence[int]) -> None:
        pass

    def reopen(self, images: int, size: int) -> None:
        pass


class NpzWriter:
    """One `samples.npz` in the layout of the ADM evaluation suite: `arr_0` (n, H, W, 3) uint8, and the labels as `arr_1`."""

    batches = 1

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _part(self, part: int) -> Path:
        return self.folder / f"part-{part:06d}.npy"

    def found(self) -> Iterable[Path]:
        return [*self.folder.glob("samples.npz"), *self.folder.glob("part-*.npy")]

    def is_done(self, part: int, numbers: range) -> bool:
        return self._part(part).is_file() or (self.folder / "samples.npz").is_file()

    def write(self, part: int, numbers: range, labels: Sequence[int], images: Sequence[Image.Image]) -> None:
        with replacing(self._part(part)) as path, path.open("wb") as file:
            file.write(_npy(np.stack([np.asarray(image) for image in images])))

    def finish(self, parts: int, labels: Sequence[int]) -> None:
        if (self.folder / "samples.npz").is_file():
            return
        shape = np.load(self._part(0), mmap_mode="r").shape[1:]
        with replacing(self.folder / "samples.npz") as path, zipfile.ZipFile(path, "w") as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as file:
                header = {"descr": "|u1", "fortran_order": False, "shape": (len(labels), *shape)}
                np.lib.format.write_array_header_1_0(file, header)
                for part in range(parts):
                    file.write(np.load(self._part(part)).tobytes())
            with archive.open("arr_1.npy", "w") as file:
                np.save(file, np.asarray(labels, np.int64))
        for part in range(parts):
            self._part(part).unlink()

    def reopen(self, images: int, size: int) -> None:
        whole, file = images // size, self.folder / "samples.npz"
        if file.is_file():
            with zipfile.ZipFile(file) as archive, archive.open("arr_0.npy") as member:
                np.lib.format.read_magic(member)
                shape = np.lib.format.read_array_header_1_0(member)[0][1:]
                for part in range(whole):
                    pixels = np.frombuffer(member.read(size * math.prod(shape)), np.uint8)
                    with replacing(self._part(part)) as path, path.open("wb") as out:
                        out.write(_npy(pixels.reshape(size, *shape)))
            file.unlink()
        self._part(whole).unlink(missing_ok=True)


def _npy(array: np.ndarray) -> memoryview:
    """Return the bytes of an .npy file: NumPy's own writing does not say that the disk is full."""
    content = io.BytesIO()
    np.save(content, array)
    return content.getbuffer()


class WebDatasetWriter:
    """Tar files of about a thousand images, `NUMBER.png` with its class in `NUMBER.cls`."""

    def __init__(self, folder: Path, batch_size: int) -> None:
        self.folder, self.batches = folder, max(1, SHARD_IMAGES // batch_size)

    def _shard(self, part: int) -> Path:
        return self.folder / f"samples-{part:06d}.tar"

    def found(self) -> Iterable[Path]:
        return self.folder.glob("samples-*.tar")

    def is_done(self, part: int, numbers: range) -> bool:
        return self._shard(part).is_file()

    def write(self, part: int, numbers: range, labels: Sequence[int], images: Sequence[Image.Image]) -> None:
        with replacing(self._shard(part)) as path, tarfile.open(path, "w") as archive:
            for number, label, image in zip(numbers, labels, images, strict=True):
                picture = io.BytesIO()
                image.save(picture, format="PNG")
                for suffix, content in (("cls", str(label).encode()), ("png", picture.getvalue())):
                    member = tarfile.TarInfo(f"{number:09d}.{suffix}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))

    def finish(self, parts: int, labels: Sequence[int]) -> None:
        pass

    def reopen(self, images: int, size: int) -> None:
        if images % size:
            self._shard(images // size).unlink(missing_ok=True)


def claim(folder: Path, settings: dict[str, Any], found: Iterable[Path] = (), temporary: bool = False) -> None:
    """Make `folder` this set of samples' own, or find that it is.

    Args:
        found: files in it that would be taken for the set's, which they are only where its record is.
        temporary: note that `remove_temporary` may remove the set, unless it has been asked for otherwise before.

    Raises:
        DetailFlowError: if it holds samples of other or unknown settings, or cannot be written.
    """
    path = folder / SETTINGS_FILE
    mine = json.loads(json.dumps(settings))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            if stranger := next(iter(found), None):
                raise DetailFlowError(
                    f"{folder} holds {stranger.name} and no {SETTINGS_FILE} that says how it was made: choose another folder"
                )
            write_json(path, mine | ({TEMPORARY: True} if temporary else {}))
        theirs = _recorded(path)
        for key in mine:
            if theirs.get(key) != mine[key]:
                values = "" if key in CHECKSUMS else f" ({theirs.get(key)!r}, not {mine[key]!r})"
                raise DetailFlowError(f"{folder} holds samples with another {key}{values}: choose another folder")
        if theirs.get(TEMPORARY) and not temporary:
            write_json(path, mine)
    except OSError as error:
        raise DetailFlowError(f"cannot write to {folder}: {error.strerror or error}") from error


def claim_set(
    folder: Path, settings: dict[str, Any], labels: Sequence[int], writer: Writer, size: int, temporary: bool = False
) -> None:
    """Make `folder` the set of these labels, as `claim` does; a set of the first of them is let grow.

    Args:
        settings: what else makes the set what it is.
        size: images in a part.

    Raises:
        DetailFlowError: as `claim`, or if the set in the folder has more images or is damaged.
    """
    path, count = folder / SETTINGS_FILE, len(labels)
    mine = settings | {"labels": _checksum(labels), "num_images": count}
    theirs = _recorded(path) if path.exists() else {}
    before = theirs.get("num_images")
    if isinstance(before, int) and before > count:
        raise DetailFlowError(
            f"{folder} holds a set of {before:,} images, more than {count:,}: ask for as many or more, or choose another folder"
        )
    if not isinstance(before, int) or before == count or theirs.get("labels") != _checksum(labels[:before]):
        claim(folder, mine, chain(writer.found(), generated(folder) if folder.is_dir() else ()), temporary)
        return
    claim(folder, mine | {"num_images": before, "labels": theirs["labels"]}, (), temporary)
    try:
        writer.reopen(before, size)  # before the record, so that an interruption leaves a set that can grow
    except (zipfile.BadZipFile, ValueError, KeyError, EOFError) as error:
        raise DetailFlowError(f"the samples in {folder} are damaged: choose another folder") from error
    except OSError as error:
        raise DetailFlowError(f"cannot write to {folder}: {error.strerror or error}") from error
    write_json(path, mine | ({TEMPORARY: True} if theirs.get(TEMPORARY) and temporary else {}))


def _checksum(labels: Sequence[int]) -> str:
    return hashlib.sha256(json.dumps(list(labels)).encode()).hexdigest()


def check_no_set(folder: Path) -> None:
    """Check that a folder holds no set of samples, whose files others of the same name would replace.

    Raises:
        DetailFlowError: if it does.
    """
    if os.path.exists(folder / SETTINGS_FILE):  # which takes an impossible name for a missing one
        raise DetailFlowError(f"{folder} holds a set of samples ({SETTINGS_FILE}): choose another folder")


def remove_earlier(folder: Path, names: Iterable[str]) -> int:
    """Remove what an earlier `generate` wrote to `folder`, except for files of these names; nobody else's files.

    Returns:
        How many files are gone.

    Raises:
        DetailFlowError: if one cannot be removed.
    """
    kept = {(folder / name).stat().st_ino for name in names}  # a file system may not tell upper from lower case
    earlier = [path for path in generated(folder) if path.stat().st_ino not in kept]
    try:
        for path in earlier:
            path.unlink()
    except OSError as error:
        raise DetailFlowError(f"cannot remove {path}: {error.strerror or error}") from error
    return len(earlier)


def _recorded(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except DetailFlowError as error:
        raise DetailFlowError(f"{path} is damaged: choose another output folder") from error


def remove_temporary(folder: Path) -> None:
    """Remove the samples in `folder` where all that asked for them called them temporary.

    Their record goes last, so that an interruption leaves nothing that is not known for what it is.
    """
    record = folder / SETTINGS_FILE
    with suppress(OSError):
        if _recorded(record).get(TEMPORARY):
            for path in folder.iterdir():
                if path != record:
                    path.unlink()
            record.unlink()
            folder.rmdir()


def generate_many(
    pipeline: DetailFlowPipeline,
    labels: Sequence[int],
    folder: Path,
    form: str = "png",
    seed: int = 0,
    batch_size: int = 32,
    world: World | None = None,
    num_tokens: int | None = None,
    temporary: bool = False,
    **sampling: Any,
) -> None:
    """Write an image of each class number in `labels` to `folder`; what is there already of the same set stays.

    Args:
        form: "png", "npz" or "webdataset".
        batch_size: images made at once, on which floating-point rounding depends.
        processes: those that share the work; `None` is this one alone.
        temporary: `remove_temporary` may remove them later, unless they have been asked for otherwise.
        sampling: guidance_scale and so on, as for a pipeline's call.

    Raises:
        DetailFlowError: as a pipeline's call, for a folder with another set of samples, or if a file cannot be written.
    """
    from tqdm import tqdm

    check_seeds(seed)
    world = world or World()
    writers: dict[str, Callable[[], Writer]] = {
        "png": lambda: PngWriter(folder, labels, lambda label: file_label(pipeline, label)),
        "npz": lambda: NpzWriter(folder),
        "webdataset": lambda: WebDatasetWriter(folder, batch_size),
    }
    if form not in writers:
        raise DetailFlowError(f"the format must be one of {', '.join(writers)}, not {form!r}")
    writer = writers[form]()
    with lock_folder(folder, "generation", world):
        with world.raise_together():
            if world.is_main:
                settings = {
                    "format": form,
                    "seed": seed,
                    "num_tokens": pipeline.tokenizer.schedule.check_count(num_tokens),
                    "batch_size": batch_size,
                    "compiled_for": pipeline.gpt.compiled_for,  # on which rounding depends as well
                    "dtype": str(pipeline.gpt.head.weight.dtype).removeprefix("torch."),
                    **asdict(pipeline.gpt.sampling(**sampling)),
                    "tokenizer": fingerprint({}, pipeline.tokenizer.state_dict()),
                    "gpt": fingerprint({}, pipeline.gpt.state_dict()),
                }
                claim_set(folder, settings, labels, writer, batch_size * writer.batches, temporary)
        parts = range(-(-len(labels) // (batch_size * writer.batches)))
        bar = tqdm(total=len(labels), desc="generating", unit="image", disable=True if world.rank else None)
        with world.raise_together(), bar, _writing_samples():
            mine = parts[world.rank :: world.size]
            for count in _write_parts(
                pipeline, labels, writer, seed, batch_size, mine, num_tokens=num_tokens, **sampling
            ):
                bar.update(min(count * world.size, len(labels) - bar.n))
        with world.raise_together(), _writing_samples():
            if world.is_main:
                writer.finish(len(parts), labels)


@contextmanager
def _writing_samples() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DetailFlowError(f"cannot write the samples: {error.strerror or error}") from error


def file_label(pipeline: DetailFlowPipeline, class_id: int) -> str:
    """The class's name, fit for a file name."""
    return shortened(re.sub(r"\W+", "-", pipeline.class_name(class_id)).strip("-")[:50]) or str(class_id)


def _write_parts(
    pipeline: DetailFlowPipeline,
    labels: Sequence[int],
    writer: Writer,
    seed: int,
    batch_size: int,
    parts: Sequence[int],
    **options: Any,
) -> Iterator[int]:
    """Make those of these parts that are missing; yields how many images each has."""
    size = batch_size * writer.batches
    for part in parts:
        numbers = range(part * size, min((part + 1) * size, len(labels)))
        if not writer.is_done(part, numbers):
            own = [ClassId(label) for label in labels[numbers.start : numbers.stop]]
            images = pipeline(own, seed=seed, first_image=numbers.start, batch_size=batch_size, **options)
            writer.write(part, numbers, own, images)
        yield len(numbers)
