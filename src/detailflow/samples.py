"""Many generated images on disk: written part by part by any number of processes, and continued after a stop.

A part is a range of images that is made in the same batches whoever makes it, and image i's noise depends on the seed
and i alone, so one process and many write the same files. A part is written whole or not at all; finished ones stay.
"""

import hashlib
import io
import json
import math
import os
import re
import tarfile
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from detailflow.distributed import World
from detailflow.errors import DetailFlowError, os_errors
from detailflow.files import lock_folder, replacing, shortened
from detailflow.hub import fingerprint
from detailflow.labels import ClassId
from detailflow.pictures import generated, write_png
from detailflow.pipeline import DetailFlowPipeline
from detailflow.progress import progress_bar
from detailflow.runs import RunFolder
from detailflow.settings import Seed, require

SETTINGS_FILE = "samples.json"
SHARD_IMAGES = 1000  # about as many are in one tar file
CALLED = {
    "labels": "other labels",
    "engine": "another engine",
    "tokenizer": "another tokenizer",
    "gpt": "another AR model",
}


@dataclass(frozen=True)
class SampleSet:
    """Images to generate.

    Args:
        labels: the class number of each.
        form: "png", "npz" or "webdataset".
        batch_size: images made at once, on which floating-point rounding depends.
    """

    labels: Sequence[int]
    form: str = "png"
    seed: int = 0
    batch_size: int = 32
    num_tokens: int | None = None


class PngWriter:
    """Write a file per image, `INDEX-NAME.png`. The base of the other formats."""

    batches = 1  # in a part

    def __init__(self, folder: Path, samples: SampleSet, pipeline: DetailFlowPipeline) -> None:
        self.folder, self.labels, self.pipeline = folder, samples.labels, pipeline
        self.size = samples.batch_size * self.batches
        starts = range(0, len(self.labels), self.size)
        self.parts = [range(start, min(start + self.size, len(self.labels))) for start in starts]

    def _path(self, index: int) -> Path:
        return self.folder / f"{index:04d}-{file_label(self.pipeline, self.labels[index])}.png"

    def found(self) -> Iterable[Path]:
        """Return files on disk that would be taken for this set's."""
        return filter(Path.exists, map(self._path, range(len(self.labels))))

    def is_done(self, part: range) -> bool:
        """Return whether a part is on disk, with all of its images: the set may have grown since."""
        paths = map(self._path, part)
        return all(path.is_file() and path.stat().st_size > 0 for path in paths)

    def write(self, part: range, images: Sequence[Image.Image]) -> None:
        """Write a part, whole or not at all."""
        for index, image in zip(part, images, strict=True):
            write_png(image, self._path(index), "set")

    def finish(self) -> None:
        """Do what is left once all parts are there, in one process."""


class NpzWriter(PngWriter):
    """Write `samples.npz` as ADM's evaluation reads it: `arr_0` (n, H, W, 3) uint8, and the labels as `arr_1`.

    A set that grows keeps its old file until the new one is complete.
    """

    def __init__(self, folder: Path, samples: SampleSet, pipeline: DetailFlowPipeline) -> None:
        super().__init__(folder, samples, pipeline)
        schedule = pipeline.tokenizer.schedule
        side = schedule.decode_size(schedule.check_count(samples.num_tokens))
        self.shape = (side, side, 3)  # of an image

    def _part(self, part: range) -> Path:
        return self.folder / f"part-{part.start // self.size:06d}.npy"

    def found(self) -> Iterable[Path]:
        return [*self.folder.glob("samples.npz"), *self.folder.glob("part-*.npy")]

    @contextmanager
    def _stored(self) -> Iterator[tuple[tuple[int, ...], Any]]:
        """Open the file: its images' shape, (0,) if there is no file, and where to read their bytes."""
        if not (self.folder / "samples.npz").is_file():
            yield (0,), None
            return
        with zipfile.ZipFile(self.folder / "samples.npz") as archive, archive.open("arr_0.npy") as member:
            np.lib.format.read_magic(member)
            yield np.lib.format.read_array_header_1_0(member)[0], member

    def is_done(self, part: range) -> bool:
        with self._stored() as (shape, stored):
            if stored and shape[1:] != self.shape:
                raise DetailFlowError(
                    f"{self.folder / 'samples.npz'} has images of shape {shape[1:]}, and those of this set have "
                    f"{self.shape}: choose another folder"
                )
            if part.stop <= shape[0]:
                return True
        path = self._part(part)
        return path.is_file() and np.load(path, mmap_mode="r").shape == (len(part), *self.shape)

    def write(self, part: range, images: Sequence[Image.Image]) -> None:
        content = io.BytesIO()  # NumPy's own writing ignores a full disk
        np.save(content, np.stack([np.asarray(image) for image in images]))
        with replacing(self._part(part)) as path, path.open("wb") as file:
            file.write(content.getbuffer())

    def finish(self) -> None:
        with self._stored() as (shape, old):
            if shape[0] != len(self.labels):
                self._pack(shape[0], old)
        for path in self.folder.glob("part-*.npy"):  # of a call that was interrupted here, too
            path.unlink()

    def _pack(self, stored: int, old: Any) -> None:
        """Write the file from the first `stored` images of the old one, and the parts."""
        with replacing(self.folder / "samples.npz") as path, zipfile.ZipFile(path, "w") as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as file:
                header = {"descr": "|u1", "fortran_order": False, "shape": (len(self.labels), *self.shape)}
                np.lib.format.write_array_header_1_0(file, header)
                for part in self.parts:
                    size = len(part) * math.prod(self.shape)
                    file.write(old.read(size) if part.stop <= stored else np.load(self._part(part)).tobytes())
            with archive.open("arr_1.npy", "w") as file:
                np.save(file, np.asarray(self.labels, np.int64))


class WebDatasetWriter(PngWriter):
    """Write tar files of about a thousand images, `INDEX.png` with its class in `INDEX.cls`."""

    def __init__(self, folder: Path, samples: SampleSet, pipeline: DetailFlowPipeline) -> None:
        self.batches = max(1, SHARD_IMAGES // samples.batch_size)
        super().__init__(folder, samples, pipeline)

    def _shard(self, part: range) -> Path:
        return self.folder / f"samples-{part.start // self.size:06d}.tar"

    def found(self) -> Iterable[Path]:
        return self.folder.glob("samples-*.tar")

    def is_done(self, part: range) -> bool:
        if not self._shard(part).is_file():
            return False
        with tarfile.open(self._shard(part)) as archive:
            return len(archive.getnames()) == 2 * len(part)

    def write(self, part: range, images: Sequence[Image.Image]) -> None:
        with replacing(self._shard(part)) as path, tarfile.open(path, "w") as archive:
            for index, image in zip(part, images, strict=True):
                picture = io.BytesIO()
                image.save(picture, format="PNG")
                for suffix, content in (("cls", str(self.labels[index]).encode()), ("png", picture.getvalue())):
                    member = tarfile.TarInfo(f"{index:09d}.{suffix}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))


WRITERS = {"png": PngWriter, "npz": NpzWriter, "webdataset": WebDatasetWriter}


def generate_many(
    pipeline: DetailFlowPipeline, folder: Path, samples: SampleSet, world: World = World(), **sampling: Any
) -> None:
    """Write a set of images to `folder`; what is there of the same set, or of a smaller one, stays.

    Args:
        world: the ranks that share the work.
        sampling: guidance_scale and so on, as for a pipeline's call.
    """
    require(Seed, seeds=samples.seed)
    if samples.form not in WRITERS:
        raise DetailFlowError(f"the format must be one of {', '.join(WRITERS)}, not {samples.form!r}")
    writer, total = WRITERS[samples.form](folder, samples, pipeline), len(samples.labels)
    with world.raise_together():
        settings = _settings(pipeline, samples, sampling)
    world.check_same(settings)
    with lock_folder(folder, "generation", world):
        with world.raise_together(), _errors(folder):
            if world.is_main:
                _reserve(folder, samples, settings, writer)
        with world.raise_together(), _errors(folder, reading=True):
            own = [(part, writer.is_done(part)) for part in writer.parts[world.rank :: world.size]]
        bar = progress_bar(desc="generating", total=total, unit="image", main=world.is_main)
        with world.raise_together(), bar, _errors(folder):
            for part, done in own:
                if not done:
                    images = pipeline(
                        [ClassId(samples.labels[index]) for index in part], seed=samples.seed, first_image=part.start,
                        batch_size=samples.batch_size, num_tokens=samples.num_tokens, **sampling,
                    )  # fmt: skip
                    writer.write(part, images)
                bar.update(min(len(part) * world.size, total - bar.n))
        with world.raise_together(), _errors(folder, reading=True):
            if world.is_main:
                writer.finish()


@contextmanager
def _errors(folder: Path, reading: bool = False) -> Iterator[None]:
    try:
        with os_errors(f"cannot write the samples to {folder}"):
            yield
    except DetailFlowError:
        raise
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, KeyError, ValueError) as error:
        if not reading:
            raise
        raise DetailFlowError(f"the samples in {folder} are damaged: choose another folder") from error


def _settings(pipeline: DetailFlowPipeline, samples: SampleSet, sampling: dict[str, Any]) -> dict[str, Any]:
    """Return what makes a set of samples what it is."""
    return {
        "format": samples.form,
        "seed": samples.seed,
        "num_tokens": pipeline.tokenizer.schedule.check_count(samples.num_tokens),
        "batch_size": samples.batch_size,
        "compiled_for": pipeline.gpt.compiled_for,  # on which rounding depends as well
        "engine": None if pipeline.gpt.engine_used == "torch" else pipeline.gpt.engine_used,
        "dtype": str(pipeline.gpt.head.weight.dtype).removeprefix("torch."),
        **asdict(pipeline.gpt.sampling(**sampling)),
        "tokenizer": fingerprint({}, pipeline.tokenizer.state_dict()),
        "gpt": fingerprint({}, pipeline.gpt.state_dict()),
        "labels": _checksum(samples.labels),
        "num_images": len(samples.labels),
    }


def _reserve(folder: Path, samples: SampleSet, settings: dict[str, Any], writer: PngWriter) -> None:
    """Reserve `folder` for this sample set, or check that it already belongs to it or to the first part of it."""
    record, count = RunFolder(folder, "samples", SETTINGS_FILE), len(samples.labels)
    theirs = record.read()
    if not theirs and (stranger := next(iter(chain(writer.found(), generated(folder))), None)):
        raise DetailFlowError(
            f"{folder} has {stranger.name} and no {SETTINGS_FILE} that says how it was made: choose another folder"
        )
    before = theirs.get("num_images")
    if isinstance(before, int) and before > count:
        raise DetailFlowError(
            f"{folder} has a set of {before:,} images, more than {count:,}: ask for as many or more, "
            "or choose another folder"
        )
    grows = isinstance(before, int) and theirs.get("labels") == _checksum(samples.labels[:before])
    if theirs:
        must = {key: value for key, value in settings.items() if not (grows and key in ("labels", "num_images"))}
        record.check(theirs, must, CALLED)
    record.write(settings)


def _checksum(labels: Sequence[int]) -> str:
    return hashlib.sha256(json.dumps(list(labels)).encode()).hexdigest()


def check_no_set(folder: Path) -> None:
    """Check that a folder contains no set of samples, whose files others of the same name would replace."""
    if os.path.exists(folder / SETTINGS_FILE):  # which takes an impossible name for a missing one
        raise DetailFlowError(f"{folder} has a set of samples ({SETTINGS_FILE}): choose another folder")


def remove_earlier(folder: Path) -> int:
    """Remove what an earlier `generate` wrote to `folder`; return how many files."""
    earlier = list(generated(folder))
    for path in earlier:
        with os_errors(f"cannot remove {path}"):
            path.unlink()
    return len(earlier)


def file_label(pipeline: DetailFlowPipeline, class_id: int) -> str:
    """Return the class's name, fit for a file name."""
    return shortened(re.sub(r"\W+", "-", pipeline.class_name(class_id)).strip("-")[:50]) or str(class_id)
