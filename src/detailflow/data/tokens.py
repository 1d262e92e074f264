"""The token store: what `detailflow extract` writes and AR training reads (docs/method.md#extraction, #ar-model).

A folder of four files or five, whatever the number of images. Every image of the source has a slot, at its place there:

- codes.bin: uint16 (slots, crops, 3, N), the rows *clean*, *input* and *label* of each crop;
- labels.bin: int64 (slots,), −1 if the image could not be read; of several labels the first;
- more-labels.bin, if images have several: int64 (slots, most − 1), their other labels, −1 after the last;
- ids.jsonl: each slot's image by its name in the source, as a JSON string on a line of its own;
- manifest.json: format, version, counts, checksums, what could not be read, what the codes came from, and the
  fingerprint of the store for validation, if there is one.

The manifest is written last. Until then the folder `unfinished` has the settings and a small record of each chunk of
images that is on disk: all that a killed extraction needs to go on. Images that are held out for validation have their
own store, in the folder `validation`.
"""

import hashlib
import json
import math
import os
import zlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from detailflow.data.source import count_classes
from detailflow.errors import DetailFlowError
from detailflow.files import check_regular
from detailflow.progress import progress_bar
from detailflow.runs import RunFolder
from detailflow.settings import Must, PositiveInt, Settings, parse_settings

CLEAN, INPUT, LABEL = range(3)  # the rows of one crop
VALIDATION = "validation"
FORMAT, VERSION = "detailflow-tokens", 2
CODES, LABELS, IDS, MANIFEST = "codes.bin", "labels.bin", "ids.jsonl", "manifest.json"
MORE_LABELS, MORE = "more-labels.bin", ("more_labels", "more_labels_crc32")  # how many an image has, in the manifest
STORE_FILES = (CODES, LABELS, IDS, MORE_LABELS)
STAMPS = "images_crc32"  # of each chunk's readable images; stores of earlier versions have none
UNFINISHED, BEGUN = "unfinished", "unfinished/begun.json"
CODE_TYPE: np.dtype[np.integer] = np.dtype("<u2")
LABEL_TYPE: np.dtype[np.integer] = np.dtype("<i8")
UNREADABLE = -1  # the label of a slot without codes


@dataclass(frozen=True)
class TokenStoreInfo(Settings):
    """What a token store's codes are. `tokenizer_fingerprint` names the weights that made them."""

    num_tokens: PositiveInt
    codebook_size: Annotated[PositiveInt, Must("at most 65536, as codes have 16 bits", lambda size: size <= 65536)]
    crops: PositiveInt
    class_names: Annotated[tuple[str, ...], Must("a list of at least one name", bool)]
    tokenizer_fingerprint: str

    @property
    def codes_shape(self) -> tuple[int, int, int]:
        """The shape of one image's codes."""
        return (self.crops, 3, self.num_tokens)

    @property
    def image_bytes(self) -> int:
        """The bytes of one image's codes."""
        return math.prod(self.codes_shape) * CODE_TYPE.itemsize


class TokenStore:
    """A finished token store, memory-mapped; its images are those that could be read.

    Attributes:
        info: what the codes are.
        codes: (slots, crops, 3, N) uint16 on disk; `read` has those of images.
        slots: (images,) int64, the slot of each image.
        labels: (images,) int64, the first label of each.
        all_labels: (images, most) int64, −1 after the last label of each.
        unreadable: slot → what was wrong with its image.
    """

    def __init__(self, directory: Path, manifest: dict[str, Any], info: TokenStoreInfo) -> None:
        self.directory, self._manifest, self.info = directory, manifest, info
        slots, most = manifest["images"], manifest.get(MORE[0], 0)
        self.codes = _map(directory / CODES, CODE_TYPE, (slots, *info.codes_shape))
        labels = np.array(_map(directory / LABELS, LABEL_TYPE, (slots,)))
        more = np.array(_map(directory / MORE_LABELS, LABEL_TYPE, (slots, most))) if most else labels[:, None][:, :0]
        for name, found in ((LABELS, labels), (MORE_LABELS, more)):
            if found.size and not -1 <= found.min() <= found.max() < len(info.class_names):
                raise DetailFlowError(f"{directory / name} has labels beyond the store's classes: {_repair(directory)}")
        self.slots = np.flatnonzero(labels != UNREADABLE)
        self.labels = labels[self.slots]
        self.all_labels = np.column_stack((labels, more))[self.slots]
        self.unreadable = {int(slot): str(problem) for slot, problem in manifest["unreadable"].items()}
        if not len(self.slots):
            raise DetailFlowError(f"{directory} holds no images that could be read: extract the tokens of others")

    def __len__(self) -> int:
        return len(self.slots)

    def __reduce__(self) -> tuple[Any, ...]:  # for worker processes: the codes stay on disk
        return TokenStore.open, (self.directory,)

    @classmethod
    def open_for_training(cls, directory: str | os.PathLike[str]) -> "TokenStore":
        """Open a finished store, but none of images that are held out from the store above it."""
        store = cls.open(directory)
        if store.directory.name == VALIDATION and (store.directory.parent / MANIFEST).exists():
            above = store.directory.parent
            raise DetailFlowError(f"{store.directory} has the images held out from {above}: train on {above}")
        return store

    @classmethod
    def open(cls, directory: str | os.PathLike[str]) -> "TokenStore":
        """Open a finished store; `verify` compares its checksums, too."""
        directory = Path(directory).expanduser()
        manifest = read_manifest(directory)
        try:
            fields = {name: manifest[name] for name in TokenStoreInfo.__dataclass_fields__}
            more = [name for name in MORE if name in manifest]
            numbers = [manifest[name] for name in ("images", "chunk_images", "labels_crc32", "ids_crc32", *more)]
            if any(type(number) is not int for number in numbers):
                raise ValueError("counts and checksums are whole numbers")
            if manifest["images"] < 1:
                raise ValueError("0 images")
            if len(manifest["chunks"]) != -(-manifest["images"] // manifest["chunk_images"]):
                raise ValueError(f"{len(manifest['chunks'])} checksums")
            _check_size(directory / IDS, manifest["ids_bytes"])
            return cls(
                directory, manifest, parse_settings(TokenStoreInfo, fields, f"{directory / MANIFEST} is damaged")
            )
        except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            if isinstance(error, DetailFlowError):
                raise
            raise DetailFlowError(f"{directory / MANIFEST} is damaged ({error!r}): {_repair(directory)}") from error

    @property
    def validation(self) -> "TokenStore | None":
        """The store of the images that were held out for validation, if there are any."""
        folder, named = self.directory / VALIDATION, self._manifest.get("validation")
        store = TokenStore.open(folder) if named or folder.is_dir() else None
        if store and named not in (None, store.fingerprint):
            raise DetailFlowError(
                f"{folder} is not the validation store of {self.directory}: {_repair(self.directory)}"
            )
        return store

    @property
    def fingerprint(self) -> str:
        """A checksum of what the store holds, which is the same wherever it is."""
        names = [*TokenStoreInfo.__dataclass_fields__, "chunks", "labels_crc32", "ids_crc32"]
        names += [name for name in MORE if name in self._manifest]
        return hashlib.sha256(json.dumps([self._manifest[name] for name in names]).encode()).hexdigest()

    @property
    def counts(self) -> dict[str, int]:
        """Class name → images with this label."""
        return count_classes(self.all_labels, self.info.class_names)

    def draw_labels(self, images: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """Return one of the labels of each image by B uniform numbers. → (B,)"""
        table = self.all_labels[images]
        return table[np.arange(len(images)), ((table >= 0).sum(1) * draws).astype(np.int64)]

    def read(self, images: np.ndarray, crops: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Return the codes of B images, of one crop and row each. → (B, N) uint16"""
        return self.codes[self.slots[images], crops, rows]

    def check_images(self, stamps: np.ndarray, advice: str) -> None:
        """Check that the images, which have the same names, are those that were encoded, by their stamps, (images,)."""
        known = self._manifest.get(STAMPS, [])
        ends = np.searchsorted(self.slots, np.arange(1, len(known)) * self._manifest["chunk_images"])
        for chunk, part in zip(known, np.split(stamps, ends), strict=False):
            if chunk not in (None, checksum(part)):
                raise DetailFlowError(f"{self.directory} holds tokens of other images of the same names: {advice}")

    def ids(self) -> list[str]:
        """Return the images' names in their source."""
        try:
            check_regular(self.directory / IDS)
            lines = (self.directory / IDS).read_text(encoding="utf-8").splitlines()
            return [str(json.loads(lines[slot])) for slot in self.slots.tolist()]
        except (OSError, ValueError, LookupError, RecursionError) as error:
            raise _damaged(self.directory / IDS) from error

    def verify(self) -> None:
        """Compare every file with its checksum, in bounded memory; those for validation, too."""
        for name, checksum in ((LABELS, "labels_crc32"), (IDS, "ids_crc32"), (MORE_LABELS, MORE[1])):
            if (
                checksum in self._manifest
                and zlib.crc32((self.directory / name).read_bytes()) != self._manifest[checksum]
            ):
                raise _damaged(self.directory / name)
        expected, size = self._manifest["chunks"], self._manifest["chunk_images"] * self.info.image_bytes
        for chunk, found in checksums(self.directory / CODES, size, range(len(expected))):
            if found != expected[chunk]:
                raise _damaged(self.directory / CODES)
        if validation := self.validation:
            validation.verify()


def checksums(file: Path, size: int, pieces: Collection[int]) -> Iterator[tuple[int, int]]:
    """Yield (piece, checksum) of those pieces of a file, `size` bytes each."""
    bar = progress_bar(desc=f"check {file.name}", total=len(pieces) * size, unit="B", unit_scale=True)
    with open(file, "rb") as opened, bar:
        for piece in pieces:
            opened.seek(piece * size)
            yield piece, zlib.crc32(opened.read(size))
            bar.update(size)


def checksum(stamps: np.ndarray) -> int:
    return zlib.crc32(stamps.astype("<i8").tobytes())


def _damaged(file: Path) -> DetailFlowError:
    return DetailFlowError(f"{file} is damaged, for its checksum is not the manifest's: {_repair(file.parent)}")


def _repair(directory: Path) -> str:
    """Return what helps: a finished store is not written again by itself."""
    store = directory.parent if directory.name == VALIDATION else directory
    return f"remove {store} and extract the tokens again"


def _check_size(file: Path, expected: int) -> None:
    if not file.is_file():
        raise DetailFlowError(f"{file} is missing from the token store: {_repair(file.parent)}")
    if (size := file.stat().st_size) != expected:
        raise DetailFlowError(f"{file} has {size} bytes, and the manifest says {expected}: {_repair(file.parent)}")


def _map(file: Path, dtype: np.dtype[np.integer], shape: tuple[int, ...]) -> np.ndarray:
    _check_size(file, math.prod(shape) * dtype.itemsize)
    return np.memmap(file, dtype=dtype, mode="r", shape=shape)


def read_manifest(directory: Path) -> dict[str, Any]:
    file = directory / MANIFEST
    if not file.is_file():
        begun = (directory / UNFINISHED).is_dir()
        advice = (
            "repeat the `detailflow extract` that was not finished" if begun else "make one with `detailflow extract`"
        )
        raise DetailFlowError(f"{directory} is not a token store (no {MANIFEST}): {advice}")
    manifest = read_record(directory, MANIFEST)
    if manifest.get("format") != FORMAT:
        raise DetailFlowError(f"{file} is not the manifest of a token store: its format is not {FORMAT!r}")
    if (version := manifest.get("version")) != VERSION:
        raise DetailFlowError(
            f"{file} has version {version}, but this DetailFlow reads {VERSION}: {_repair(directory)}"
        )
    return manifest


def read_record(directory: Path, name: str) -> dict[str, Any]:
    """Return the manifest or what was begun, {} if there is none, once its entries are what this module takes."""
    record = RunFolder(directory, "tokens", name).read()
    stamps, chunk_images = record.get(STAMPS, []), record.get("chunk_images", 1)
    if (
        not isinstance(record.get("settings", {}), dict)
        or not isinstance(record.get("class_names", []), list)
        or not (isinstance(stamps, list) and all(one is None or type(one) is int for one in stamps))
        or not (type(chunk_images) is int and 0 < chunk_images < 2**31)
    ):
        raise DetailFlowError(f"{directory / name} is damaged: {_repair(directory)}")
    return record
