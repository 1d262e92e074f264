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
import shutil
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from detailflow.data.source import count_classes
from detailflow.errors import DetailFlowError, explained
from detailflow.files import check_regular, open_own, read_json, replacing
from detailflow.progress import progress_bar
from detailflow.runs import RUN_FILE, RunFolder, as_plain
from detailflow.settings import Must, PositiveInt, Settings, parse_settings

CLEAN, INPUT, LABEL = range(3)  # the rows of one crop
VALIDATION = "validation"
_FORMAT, _VERSION = "detailflow-tokens", 2
_CODES, _LABELS, _IDS, _MANIFEST = "codes.bin", "labels.bin", "ids.jsonl", "manifest.json"
_MORE_LABELS, _MORE = "more-labels.bin", ("more_labels", "more_labels_crc32")  # how many an image has, in the manifest
STORE_FILES = (_CODES, _LABELS, _IDS, _MORE_LABELS)
_STAMPS = "images_crc32"  # of each chunk's readable images; stores of earlier versions have none
_UNFINISHED, _BEGUN = "unfinished", "unfinished/begun.json"
_CODE_TYPE: np.dtype[np.integer] = np.dtype("<u2")
_LABEL_TYPE: np.dtype[np.integer] = np.dtype("<i8")
_UNREADABLE = -1  # the label of a slot without codes


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
        return math.prod(self.codes_shape) * _CODE_TYPE.itemsize


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
        slots, most = manifest["images"], manifest.get(_MORE[0], 0)
        self.codes = _map(directory / _CODES, _CODE_TYPE, (slots, *info.codes_shape))
        labels = np.array(_map(directory / _LABELS, _LABEL_TYPE, (slots,)))
        if labels.min() < _UNREADABLE or labels.max() >= len(info.class_names):
            raise DetailFlowError(f"{directory / _LABELS} has labels beyond the store's classes: extract it again")
        more = np.array(_map(directory / _MORE_LABELS, _LABEL_TYPE, (slots, most))) if most else labels[:, None][:, :0]
        if most and (more.min() < -1 or more.max() >= len(info.class_names)):
            raise DetailFlowError(f"{directory / _MORE_LABELS} has labels beyond the store's classes: extract it again")
        self.slots = np.flatnonzero(labels != _UNREADABLE)
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
        if store.directory.name == VALIDATION and (store.directory.parent / _MANIFEST).exists():
            above = store.directory.parent
            raise DetailFlowError(f"{store.directory} has the images held out from {above}: train on {above}")
        return store

    @classmethod
    def open(cls, directory: str | os.PathLike[str]) -> "TokenStore":
        """Open a finished store; `verify` compares its checksums, too."""
        directory = Path(directory).expanduser()
        manifest = _read_manifest(directory)
        try:
            fields = {name: manifest[name] for name in TokenStoreInfo.__dataclass_fields__}
            more = [name for name in _MORE if name in manifest]
            numbers = [manifest[name] for name in ("images", "chunk_images", "labels_crc32", "ids_crc32", *more)]
            if any(type(number) is not int for number in numbers):
                raise ValueError("counts and checksums are whole numbers")
            if manifest["images"] < 1:
                raise ValueError("0 images")
            if len(manifest["chunks"]) != -(-manifest["images"] // manifest["chunk_images"]):
                raise ValueError(f"{len(manifest['chunks'])} checksums")
            _check_size(directory / _IDS, manifest["ids_bytes"])
            return cls(
                directory, manifest, parse_settings(TokenStoreInfo, fields, f"{directory / _MANIFEST} is damaged")
            )
        except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            if isinstance(error, DetailFlowError):
                raise
            raise DetailFlowError(
                f"{directory / _MANIFEST} is damaged ({error!r}): extract the tokens again"
            ) from error

    @property
    def validation(self) -> "TokenStore | None":
        """The store of the images that were held out for validation, if there are any."""
        folder, named = self.directory / VALIDATION, self._manifest.get("validation")
        store = TokenStore.open(folder) if named or folder.is_dir() else None
        if store and named not in (None, store.fingerprint):
            raise DetailFlowError(f"{folder} is not the validation store of {self.directory}: extract the tokens again")
        return store

    @property
    def fingerprint(self) -> str:
        """A checksum of what the store holds, which is the same wherever it is."""
        names = [*TokenStoreInfo.__dataclass_fields__, "chunks", "labels_crc32", "ids_crc32"]
        names += [name for name in _MORE if name in self._manifest]
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
        known = self._manifest.get(_STAMPS, [])
        ends = np.searchsorted(self.slots, np.arange(1, len(known)) * self._manifest["chunk_images"])
        for chunk, part in zip(known, np.split(stamps, ends), strict=False):
            if chunk not in (None, _checksum(part)):
                raise DetailFlowError(f"{self.directory} holds tokens of other images of the same names: {advice}")

    def ids(self) -> list[str]:
        """Return the images' names in their source."""
        try:
            check_regular(self.directory / _IDS)
            lines = (self.directory / _IDS).read_text(encoding="utf-8").splitlines()
            return [str(json.loads(lines[slot])) for slot in self.slots.tolist()]
        except (OSError, ValueError, LookupError, RecursionError) as error:
            raise _damaged(self.directory / _IDS) from error

    def verify(self) -> None:
        """Compare every file with its checksum, in bounded memory; those for validation, too."""
        for name, checksum in ((_LABELS, "labels_crc32"), (_IDS, "ids_crc32"), (_MORE_LABELS, _MORE[1])):
            if (
                checksum in self._manifest
                and zlib.crc32((self.directory / name).read_bytes()) != self._manifest[checksum]
            ):
                raise _damaged(self.directory / name)
        expected, size = self._manifest["chunks"], self._manifest["chunk_images"] * self.info.image_bytes
        for chunk, found in _checksums(self.directory / _CODES, size, range(len(expected))):
            if found != expected[chunk]:
                raise _damaged(self.directory / _CODES)
        if validation := self.validation:
            validation.verify()


class TokenWriter:
    """Write a store: any number of processes write its chunks, each once, in any order.

    A process may be killed at any moment and another go on: `lock_folder` removes the temporary files that it left. The
    store's bytes depend on nothing but what is written.

    Args:
        labels: (slots,) of all images in the source, or (slots, most) if they have several; see `ImageSource`.
        chunk_images: images of a chunk; the last chunk may have fewer.
        stamps: (slots,) integers that tell an image from another of its name.
    """

    def __init__(
        self,
        directory: Path,
        info: TokenStoreInfo,
        labels: np.ndarray,
        chunk_images: int,
        stamps: np.ndarray | None = None,
    ) -> None:
        first, more = (labels, labels[:, None][:, :0]) if labels.ndim == 1 else (labels[:, 0], labels[:, 1:])
        if len(labels) and (first.min() < 0 or labels.min() < -1 or labels.max() >= len(info.class_names)):
            raise DetailFlowError(f"labels must be 0 to {len(info.class_names) - 1}, the store's classes")
        self.directory, self.info, self.chunk_images = directory, info, chunk_images
        self.labels, self.more_labels = first.astype(_LABEL_TYPE), more.astype(_LABEL_TYPE)
        self.chunks = -(-len(labels) // chunk_images)
        self.stamps = np.zeros(len(labels), np.int64) if stamps is None else stamps

    def begin(self, ids: Iterable[str], settings: Mapping[str, Any]) -> None:
        """Make the folder this store's, or check that it is; one process does it, before any other writes.

        Chunks of an earlier run that are not on disk as recorded, or whose images are others now, are written again.

        Args:
            ids: the images' names.
            settings: what else the codes depend on.
        """
        lines = "".join(f"{json.dumps(name)}\n" for name in ids).encode()
        identity = as_plain(
            {
                "format": _FORMAT,
                "version": _VERSION,
                "images": len(self.labels),
                "ids_bytes": len(lines),
                "ids_crc32": zlib.crc32(lines),
                "source_labels_crc32": zlib.crc32(self.labels.tobytes() + self.more_labels.tobytes()),
                "chunk_images": self.chunk_images,
                **asdict(self.info),
                "settings": dict(settings),
            }
        )
        if self.directory.exists() and not self.directory.is_dir():
            raise DetailFlowError(f"{self.directory} is a file: choose a folder for the token store")
        with _writing(self.directory):
            if self.finished:
                _check_same(RunFolder(self.directory, "tokens", _MANIFEST), _read_manifest(self.directory), identity)
                store = TokenStore.open(self.directory)
                store.check_images(self.stamps[store.slots], "extract into another folder")
                self._remove_records()
                return
            folder, records = RunFolder(self.directory, "tokens", _BEGUN), self._records()
            if records and (begun := folder.read()):
                _check_same(folder, begun, identity)
            else:  # nothing is written yet that other settings could contradict
                left = [name for name in STORE_FILES if (self.directory / name).exists()]
                if len(left) < 3 and not (self.directory / _UNFINISHED).exists():  # three are a store without manifest
                    folder.require_free((*left, RUN_FILE))
                (self.directory / _UNFINISHED).mkdir(parents=True, exist_ok=True)
                for chunk in records:
                    self.forget(chunk)
                folder.write(identity)
            with replacing(self.directory / _IDS) as temporary:
                temporary.write_bytes(lines)
            with open_own(self.directory / _CODES, os.O_RDWR) as file:  # sparse until it is written
                file.truncate(len(self.labels) * self.info.image_bytes)
            size = self.chunk_images * self.info.image_bytes
            for chunk, checksum in _checksums(self.directory / _CODES, size, records):
                stamp = self._stamp(chunk, records[chunk]["unreadable"])
                if checksum != records[chunk]["crc32"] or stamp != records[chunk].get(_STAMPS, stamp):
                    self.forget(chunk)

    @property
    def finished(self) -> bool:
        """Whether nothing is left to be written."""
        return is_finished(self.directory)

    def slots(self, chunk: int) -> range:
        """Return the slots of a chunk."""
        return range(chunk * self.chunk_images, min((chunk + 1) * self.chunk_images, len(self.labels)))

    def written(self) -> set[int]:
        """Return the chunks that are on disk."""
        return set(self._records())

    def unreadable(self) -> dict[int, str]:
        """Return slot → what is wrong with its image, of the chunks that are on disk."""
        bad = {slot: problem for record in self._records().values() for slot, problem in record["unreadable"].items()}
        return dict(sorted(bad.items()))

    def write(self, chunk: int, codes: np.ndarray, unreadable: Mapping[int, str]) -> None:
        """Put one chunk on disk: `codes` (images, crops, 3, N) in [0, K), zeros if unreadable."""
        expected = (len(self.slots(chunk)), *self.info.codes_shape)
        if codes.shape != expected:
            raise DetailFlowError(f"codes of shape {codes.shape} do not fit the token store: it takes {expected}")
        if codes.min() < 0 or codes.max() >= self.info.codebook_size:
            raise DetailFlowError(f"codes must be 0 to {self.info.codebook_size - 1}, the store's codebook")
        content = codes.astype(_CODE_TYPE).tobytes()
        record = {"crc32": zlib.crc32(content), "unreadable": dict(unreadable), _STAMPS: self._stamp(chunk, unreadable)}
        with _writing(self.directory):
            # Not through a map: a full disk would kill the process.
            with open_own(self.directory / _CODES, os.O_RDWR) as file:
                file.seek(self.slots(chunk).start * self.info.image_bytes)
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            with replacing(self._record(chunk)) as temporary:
                temporary.write_text(json.dumps(record))

    def forget(self, chunk: int) -> None:
        """Let a chunk be written again."""
        self._record(chunk).unlink(missing_ok=True)

    def finish(self) -> None:
        """Write labels and manifest, once every chunk is there; one process does it."""
        records, unreadable = self._records(), self.unreadable()
        if len(records) < self.chunks:
            missing = self.chunks - len(records)
            raise DetailFlowError(f"{self.directory} lacks {missing} of its chunks: extract again to go on")
        if len(unreadable) == len(self.labels):
            raise DetailFlowError(f"{self.directory} got no images: a token store needs at least one that can be read")
        labels = self.labels.copy()
        labels[list(unreadable)] = _UNREADABLE
        manifest = {
            **RunFolder(self.directory, "tokens", _BEGUN).read(),
            "labels_crc32": zlib.crc32(labels.tobytes()),
            "unreadable": unreadable,
            "chunks": [records[chunk]["crc32"] for chunk in range(self.chunks)],
            _STAMPS: [records[chunk].get(_STAMPS) for chunk in range(self.chunks)],
        }
        if (self.directory / VALIDATION / _MANIFEST).exists():
            manifest["validation"] = TokenStore.open(self.directory / VALIDATION).fingerprint
        with _writing(self.directory):
            with replacing(self.directory / _LABELS) as temporary:
                temporary.write_bytes(labels.tobytes())
            if most := self.more_labels.shape[1]:
                manifest |= dict(zip(_MORE, (most, zlib.crc32(self.more_labels.tobytes())), strict=True))
                with replacing(self.directory / _MORE_LABELS) as temporary:
                    temporary.write_bytes(self.more_labels.tobytes())
            with replacing(self.directory / _MANIFEST) as temporary:
                temporary.write_text(json.dumps(manifest, indent=1) + "\n")
            self._remove_records()

    def _stamp(self, chunk: int, unreadable: Collection[int]) -> int:
        return _checksum(self.stamps[[slot for slot in self.slots(chunk) if slot not in unreadable]])

    def _record(self, chunk: int) -> Path:
        return self.directory / _UNFINISHED / f"chunk-{chunk:06d}.json"

    def _records(self) -> dict[int, dict[str, Any]]:
        """Return those of the chunks on disk; one that is damaged, as after a power cut, will be written again."""
        found = {}
        for chunk in range(self.chunks):
            with suppress(DetailFlowError, KeyError, TypeError, ValueError):
                record = read_json(self._record(chunk))
                unreadable = {int(slot): str(problem) for slot, problem in dict(record["unreadable"]).items()}
                if type(record["crc32"]) is int and unreadable.keys() <= set(self.slots(chunk)):
                    found[chunk] = record | {"unreadable": unreadable}
        return found

    def _remove_records(self) -> None:
        if (self.directory / _UNFINISHED).exists():
            shutil.rmtree(self.directory / _UNFINISHED)


def is_finished(directory: Path) -> bool:
    """Return whether a folder has a finished store."""
    return (directory / _MANIFEST).exists()


def begun_chunk(directory: Path) -> int:
    """Return how many images a chunk of the store has that is in a folder, or was begun there; 0 if there is none."""
    found = None
    for record in (_MANIFEST, _BEGUN):
        with suppress(DetailFlowError):  # what uses the record will say so
            found = found or RunFolder(directory, "tokens", record).read().get("chunk_images")
    return found if type(found) is int and found > 0 else 0


def _checksums(file: Path, size: int, pieces: Collection[int]) -> Iterator[tuple[int, int]]:
    """Yield (piece, checksum) of those pieces of a file, `size` bytes each."""
    bar = progress_bar(desc=f"check {file.name}", total=len(pieces) * size, unit="B", unit_scale=True)
    with open(file, "rb") as opened, bar:
        for piece in pieces:
            opened.seek(piece * size)
            yield piece, zlib.crc32(opened.read(size))
            bar.update(size)


def _checksum(stamps: np.ndarray) -> int:
    return zlib.crc32(stamps.astype("<i8").tobytes())


def _damaged(file: Path) -> DetailFlowError:
    return DetailFlowError(f"{file} is damaged, for its checksum is not the manifest's: extract the tokens again")


def _writing(directory: Path) -> AbstractContextManager[None]:
    hint = "repeat the command to go on once it can, or choose another folder"
    return explained(f"{directory} cannot be written", OSError, hint)


def _check_size(file: Path, expected: int) -> None:
    if not file.is_file():
        raise DetailFlowError(f"{file} is missing from the token store: extract the tokens again")
    if (size := file.stat().st_size) != expected:
        raise DetailFlowError(f"{file} has {size} bytes, and the manifest says {expected}: extract the tokens again")


def _map(file: Path, dtype: np.dtype[np.integer], shape: tuple[int, ...]) -> np.ndarray:
    _check_size(file, math.prod(shape) * dtype.itemsize)
    return np.memmap(file, dtype=dtype, mode="r", shape=shape)


def _read_manifest(directory: Path) -> dict[str, Any]:
    file = directory / _MANIFEST
    if not file.is_file():
        begun = (directory / _UNFINISHED).is_dir()
        advice = (
            "repeat the `detailflow extract` that was not finished" if begun else "make one with `detailflow extract`"
        )
        raise DetailFlowError(f"{directory} is not a token store (no {_MANIFEST}): {advice}")
    manifest = RunFolder(directory, "tokens", _MANIFEST).read()
    if manifest.get("format") != _FORMAT:
        raise DetailFlowError(f"{file} is not the manifest of a token store: its format is not {_FORMAT!r}")
    if (version := manifest.get("version")) != _VERSION:
        raise DetailFlowError(
            f"{file} has version {version}, but this DetailFlow reads {_VERSION}: remove {directory} and extract again"
        )
    return manifest


def _check_same(folder: RunFolder, recorded: dict[str, Any], identity: dict[str, Any]) -> None:
    """Check that a store has the settings, the tokenizer and the images that it should have."""
    folder.check(dict(recorded.get("settings", {})), identity["settings"])
    counts = [f"{one.get('images')} in {len(one.get('class_names') or ())} classes" for one in (recorded, identity)]
    changed = "as many, by other names" if counts[0] == counts[1] else f"{counts[0]} then, {counts[1]} now"
    images = f"other images ({changed})"
    called = dict.fromkeys(("images", "ids_bytes", "ids_crc32"), images)
    called |= {"source_labels_crc32": "other labels", "class_names": "other classes"}
    rest = {name: value for name, value in identity.items() if name != "settings"}
    first = {"tokenizer_fingerprint": identity["tokenizer_fingerprint"]}
    folder.check(recorded, first | rest, called | {"tokenizer_fingerprint": "another tokenizer"})
