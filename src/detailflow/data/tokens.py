"""The token store: what `detailflow extract` writes and training the AR model reads (docs/method.md#extraction, #ar-model).

A directory of four files, whatever the number of images. Every image of the source has a slot, at its place there:

- codes.bin: uint16 (slots, crops, 3, N), the rows *clean*, *input* and *label* of each crop;
- labels.bin: int64 (slots,), −1 where the image could not be read;
- ids.jsonl: each slot's image by its name in the source, as a JSON string on a line of its own;
- manifest.json: format, version, counts, checksums, what could not be read, and what the codes came from.

The manifest is written last. Until then there is also a folder, `unfinished`, of what was begun and a small record of each
chunk of images that is on disk: all that a killed extraction needs to go on.
"""

import hashlib
import json
import math
import os
import shutil
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from detailflow.data.batches import BatchOrder
from detailflow.distributed import World
from detailflow.errors import DetailFlowError
from detailflow.files import check_regular, open_own, read_text, replacing

CLEAN, INPUT, LABEL = range(3)  # the rows of one crop
_FORMAT, _VERSION = "detailflow-tokens", 2
_CODES, _LABELS, _IDS, _MANIFEST = "codes.bin", "labels.bin", "ids.jsonl", "manifest.json"
_UNFINISHED, _BEGUN = "unfinished", "begun.json"
_CODE_TYPE: np.dtype[np.integer] = np.dtype("<u2")
_LABEL_TYPE: np.dtype[np.integer] = np.dtype("<i8")
_UNREADABLE = -1  # the label of a slot without codes


@dataclass(frozen=True)
class TokenStoreInfo:
    """What a token store's codes are. `tokenizer_fingerprint` names the weights that made them."""

    num_tokens: int
    codebook_size: int
    crops: int
    class_names: tuple[str, ...]
    tokenizer_fingerprint: str

    def __post_init__(self) -> None:
        for field in ("num_tokens", "codebook_size", "crops"):
            value = getattr(self, field)
            if type(value) is not int or value < 1:
                raise DetailFlowError(f"A token store's {field} is {value!r}: it must be a positive whole number")
        if self.codebook_size > 65536:
            raise DetailFlowError(
                f"A codebook of {self.codebook_size} codes does not fit a token store: it holds at most 65536"
            )
        if not self.class_names or not all(isinstance(name, str) for name in self.class_names):
            raise DetailFlowError("A token store's class_names must be a list of at least one name")

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
        labels: (images,) int64.
        unreadable: what was wrong with the image of each slot that stayed empty.
    """

    def __init__(self, directory: Path, manifest: dict[str, Any], info: TokenStoreInfo) -> None:
        self.directory, self._manifest, self.info = directory, manifest, info
        slots = manifest["images"]
        self.codes = _map(directory / _CODES, _CODE_TYPE, (slots, *info.codes_shape))
        labels = np.array(_map(directory / _LABELS, _LABEL_TYPE, (slots,)))
        if labels.min() < _UNREADABLE or labels.max() >= len(info.class_names):
            raise DetailFlowError(f"{directory / _LABELS} has labels beyond the store's classes: extract it again")
        self.slots = np.flatnonzero(labels != _UNREADABLE)
        self.labels = labels[self.slots]
        self.unreadable = {int(slot): str(problem) for slot, problem in manifest["unreadable"].items()}
        if not len(self.slots):
            raise DetailFlowError(f"{directory} holds no images that could be read: extract the tokens of others")

    def __len__(self) -> int:
        return len(self.slots)

    @classmethod
    def open(cls, directory: str | os.PathLike[str]) -> "TokenStore":
        """Open a finished store. Raises DetailFlowError when anything is missing or does not fit; see also `verify`."""
        directory = Path(directory).expanduser()
        manifest = _read_manifest(directory)
        try:
            fields = {name: manifest[name] for name in TokenStoreInfo.__dataclass_fields__}
            fields["class_names"] = tuple(fields["class_names"])
            images, per_chunk, checksums = (manifest[name] for name in ("images", "chunk_images", "chunks"))
            if type(per_chunk) is not int or any(
                type(manifest[name]) is not int for name in ("labels_crc32", "ids_crc32")
            ):
                raise ValueError("chunk_images and checksums are whole numbers")
            if type(images) is not int or images < 1:
                raise DetailFlowError(
                    f"{directory / _MANIFEST} says that it holds {images!r} images: extract the tokens again"
                )
            if len(checksums) != -(-images // per_chunk):
                raise ValueError(f"{len(checksums)} checksums")
            _require_size(directory / _IDS, manifest["ids_bytes"])
            return cls(directory, manifest, TokenStoreInfo(**fields))
        except DetailFlowError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            raise DetailFlowError(
                f"{directory / _MANIFEST} is damaged ({error!r}): extract the tokens again"
            ) from error

    @property
    def fingerprint(self) -> str:
        """A checksum of what the store holds, which is the same wherever it is."""
        names = (*TokenStoreInfo.__dataclass_fields__, "chunks", "labels_crc32", "ids_crc32")
        return hashlib.sha256(json.dumps([self._manifest[name] for name in names]).encode()).hexdigest()

    @property
    def counts(self) -> dict[str, int]:
        """Class name → images."""
        counts = np.bincount(self.labels, minlength=len(self.info.class_names)).tolist()
        return dict(zip(self.info.class_names, counts, strict=True))

    def read(self, images: np.ndarray, crops: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """The codes of B images, of one crop and row each. → (B, N) uint16"""
        return self.codes[self.slots[images], crops, rows]

    def ids(self) -> list[str]:
        """Return the images' names in their source.

        Raises:
            DetailFlowError: if their file is damaged.
        """
        try:
            check_regular(self.directory / _IDS)
            lines = (self.directory / _IDS).read_text(encoding="utf-8").splitlines()
            return [str(json.loads(lines[slot])) for slot in self.slots.tolist()]
        except (OSError, ValueError, LookupError, RecursionError) as error:
            raise _damaged(self.directory / _IDS) from error

    def verify(self) -> None:
        """Compare every file with its checksum, in bounded memory.

        Raises:
            DetailFlowError: naming the file that is damaged.
        """
        for name, checksum in ((_LABELS, "labels_crc32"), (_IDS, "ids_crc32")):
            if zlib.crc32((self.directory / name).read_bytes()) != self._manifest[checksum]:
                raise _damaged(self.directory / name)
        expected, size = self._manifest["chunks"], self._manifest["chunk_images"] * self.info.image_bytes
        for chunk, found in _checksums(self.directory / _CODES, size, range(len(expected))):
            if found != expected[chunk]:
                raise _damaged(self.directory / _CODES)


class TokenWriter:
    """A store in the making: any number of processes write its chunks, each once, in any order.

    A process may be killed at any moment and another go on. The store's bytes depend on nothing but what is written.

    Args:
        labels: (slots,) of all images in the source.
        chunk_images: images of a chunk, the last but for what is left.

    Raises:
        DetailFlowError: for labels beyond the classes.
    """

    def __init__(self, directory: Path, info: TokenStoreInfo, labels: np.ndarray, chunk_images: int) -> None:
        self.directory, self.info, self.labels, self.chunk_images = (
            directory,
            info,
            labels.astype(_LABEL_TYPE),
            chunk_images,
        )
        if len(labels) and (labels.min() < 0 or labels.max() >= len(info.class_names)):
            raise DetailFlowError(f"Labels must lie in 0 to {len(info.class_names) - 1}, the store's classes")
        self.chunks = -(-len(labels) // chunk_images)
        self._unfinished = directory / _UNFINISHED

    def begin(self, ids: Iterable[str], settings: Mapping[str, Any]) -> None:
        """Make the folder this store's, or find it so; one process does it, before any other writes.

        Chunks of an earlier run that are not on disk as recorded will be written again.

        Args:
            ids: the images' names.
            settings: what else the codes depend on; an unfinished store goes on with the same alone.

        Raises:
            DetailFlowError: where the folder cannot be used, or holds a store of something else.
        """
        lines = "".join(f"{json.dumps(name)}\n" for name in ids).encode()
        mine: dict[str, Any] = {
            "format": _FORMAT,
            "version": _VERSION,
            "images": len(self.labels),
            "ids_bytes": len(lines),
            "ids_crc32": zlib.crc32(lines),
            "source_labels_crc32": zlib.crc32(self.labels.tobytes()),
            "chunk_images": self.chunk_images,
            **asdict(self.info),
            "settings": dict(settings),
        }
        mine = json.loads(json.dumps(mine))
        if self.directory.exists() and not self.directory.is_dir():
            raise DetailFlowError(f"{self.directory} is a file: choose a folder for the token store")
        with _writing(self.directory):
            if self.finished:
                _require_same(self.directory, _read_manifest(self.directory), mine)
                self._tidy()
                return
            begun, records = self._unfinished / _BEGUN, self._records()
            if begun.exists() and records:
                _require_same(self.directory, _read_object(begun), mine)
            else:  # nothing is written yet that something else could contradict
                shutil.rmtree(self._unfinished, ignore_errors=True)
                self._unfinished.mkdir(parents=True)
                with replacing(begun) as temporary:
                    temporary.write_text(json.dumps(mine))
            self._sweep()
            with replacing(self.directory / _IDS) as temporary:
                temporary.write_bytes(lines)
            with open_own(self.directory / _CODES, os.O_RDWR) as file:  # sparse until it is written
                file.truncate(len(self.labels) * self.info.image_bytes)
            for chunk, checksum in _checksums(
                self.directory / _CODES, self.chunk_images * self.info.image_bytes, records
            ):
                if checksum != records[chunk]["crc32"]:
                    self.forget(chunk)

    @property
    def finished(self) -> bool:
        """Whether nothing is left to be written."""
        return (self.directory / _MANIFEST).exists()

    def slots(self, chunk: int) -> range:
        """The images of a chunk."""
        return range(chunk * self.chunk_images, min((chunk + 1) * self.chunk_images, len(self.labels)))

    def written(self) -> set[int]:
        """The chunks that are on disk."""
        return set(self._records())

    def unreadable(self) -> dict[int, str]:
        """What is wrong with the images of those chunks that cannot be read, by slot."""
        bad = {slot: problem for record in self._records().values() for slot, problem in record["unreadable"].items()}
        return dict(sorted(bad.items()))

    def write(self, chunk: int, codes: np.ndarray, unreadable: Mapping[int, str]) -> None:
        """Put one chunk on disk: `codes` (images, crops, 3, N) in [0, K), zeros where unreadable.

        Raises:
            DetailFlowError: where they do not fit, or the disk is full.
        """
        expected = (len(self.slots(chunk)), *self.info.codes_shape)
        if codes.shape != expected:
            raise DetailFlowError(f"Codes of shape {codes.shape} do not fit the token store: it takes {expected}")
        if codes.min() < 0 or codes.max() >= self.info.codebook_size:
            raise DetailFlowError(f"Codes must lie in 0 to {self.info.codebook_size - 1}, the store's codebook")
        content = codes.astype(_CODE_TYPE).tobytes()
        record = {"crc32": zlib.crc32(content), "unreadable": dict(unreadable)}
        with _writing(self.directory):
            with open_own(
                self.directory / _CODES, os.O_RDWR
            ) as file:  # not through a map: a full disk would kill the process
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
        """Write labels and manifest, once every chunk is there; one process does it.

        Raises:
            DetailFlowError: where a chunk is missing, or the disk is full.
        """
        records, unreadable = self._records(), self.unreadable()
        if len(records) < self.chunks:
            raise DetailFlowError(
                f"{self.directory} lacks {self.chunks - len(records)} of its chunks: extract again to go on"
            )
        if len(unreadable) == len(self.labels):
            raise DetailFlowError(f"{self.directory} got no images: a token store needs at least one that can be read")
        labels = self.labels.copy()
        labels[list(unreadable)] = _UNREADABLE
        manifest = {
            **_read_object(self._unfinished / _BEGUN),
            "labels_crc32": zlib.crc32(labels.tobytes()),
            "unreadable": unreadable,
            "chunks": [records[chunk]["crc32"] for chunk in range(self.chunks)],
        }
        with _writing(self.directory):
            with replacing(self.directory / _LABELS) as temporary:
                temporary.write_bytes(labels.tobytes())
            with replacing(self.directory / _MANIFEST) as temporary:
                temporary.write_text(json.dumps(manifest, indent=1) + "\n")
            self._tidy()

    def _record(self, chunk: int) -> Path:
        return self._unfinished / f"chunk-{chunk:06d}.json"

    def _records(self) -> dict[int, dict[str, Any]]:
        """Return those of the chunks on disk; one that is damaged, as a power cut may leave it, is none, to be written again."""
        found = {}
        for chunk in range(self.chunks):
            with suppress(DetailFlowError, KeyError, TypeError, ValueError):
                record = _read_object(self._record(chunk))
                unreadable = {int(slot): str(problem) for slot, problem in dict(record["unreadable"]).items()}
                if type(record["crc32"]) is int and unreadable.keys() <= set(self.slots(chunk)):
                    found[chunk] = {"crc32": record["crc32"], "unreadable": unreadable}
        return found

    def _sweep(self) -> None:
        """Remove what a run left that was killed while it wrote."""
        for name in (_IDS, _LABELS, _MANIFEST):
            for temporary in self.directory.glob(f".{name}.*.tmp"):
                temporary.unlink()

    def _tidy(self) -> None:
        self._sweep()
        if self._unfinished.exists():
            shutil.rmtree(self._unfinished)


def _checksums(file: Path, size: int, pieces: Collection[int]) -> Iterator[tuple[int, int]]:
    """(piece, checksum) of those pieces of a file, `size` bytes each."""
    from tqdm import tqdm

    with (
        open(file, "rb") as opened,
        tqdm(
            total=len(pieces) * size, desc=f"check {file.name}", unit="B", unit_scale=True, delay=2, dynamic_ncols=True
        ) as bar,
    ):
        for piece in pieces:
            opened.seek(piece * size)
            yield piece, zlib.crc32(opened.read(size))
            bar.update(size)


def _damaged(file: Path) -> DetailFlowError:
    return DetailFlowError(f"{file} is damaged, for its checksum is not the manifest's: extract the tokens again")


@contextmanager
def _writing(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DetailFlowError(
            f"{directory} cannot be written ({error.strerror}): repeat the command to go on once it can, or choose another folder"
        ) from error


def _require_size(file: Path, expected: int) -> None:
    if not file.is_file():
        raise DetailFlowError(f"{file} is missing from the token store: extract the tokens again")
    if (size := file.stat().st_size) != expected:
        raise DetailFlowError(f"{file} has {size} bytes where the manifest says {expected}: extract the tokens again")


def _map(file: Path, dtype: np.dtype[np.integer], shape: tuple[int, ...]) -> np.ndarray:
    _require_size(file, math.prod(shape) * dtype.itemsize)
    return np.memmap(file, dtype=dtype, mode="r", shape=shape)


def _read_object(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(read_text(file))
    except (OSError, ValueError, RecursionError) as error:
        raise DetailFlowError(
            f"{file} is damaged ({error!r}): delete {file.parent} and extract the tokens again"
        ) from error
    if not isinstance(content, dict):
        raise DetailFlowError(f"{file} is damaged: delete {file.parent} and extract the tokens again")
    return content


def _read_manifest(directory: Path) -> dict[str, Any]:
    file = directory / _MANIFEST
    if not file.is_file():
        left = (directory / _UNFINISHED).is_dir()
        advice = (
            "repeat the `detailflow extract` that was not finished" if left else "make one with `detailflow extract`"
        )
        raise DetailFlowError(f"{directory} is no token store (no {_MANIFEST}): {advice}")
    manifest = _read_object(file)
    if manifest.get("format") != _FORMAT:
        raise DetailFlowError(f"{file} is not the manifest of a token store: its format is not {_FORMAT!r}")
    if manifest.get("version") != _VERSION:
        raise DetailFlowError(
            f"{file} has version {manifest.get('version')}, but this DetailFlow reads {_VERSION}: delete it and extract again"
        )
    return manifest


_DIFFERENCES = {
    "tokenizer_fingerprint": "another tokenizer",
    "images": "other images",
    "ids_bytes": "other images",
    "ids_crc32": "other images",
    "source_labels_crc32": "other labels",
    "class_names": "other classes",
}


def _require_same(directory: Path, theirs: dict[str, Any], mine: dict[str, Any]) -> None:
    advice = "repeat its settings, delete it or choose another folder"
    for name, value in mine["settings"].items():
        if (other := dict(theirs.get("settings", {})).get(name)) != value:
            raise DetailFlowError(f"{directory} holds tokens made with {name} {other!r}, not {value!r}: {advice}")
    for name, value in mine.items():
        if theirs.get(name) != value:
            what = _DIFFERENCES.get(name, f"another {name}")
            counts = f" ({_listing(theirs)} then, {_listing(mine)} now)" if what == "other images" else ""
            raise DetailFlowError(f"{directory} holds tokens of {what}: {advice}{counts}")


def _listing(manifest: Mapping[str, Any]) -> str:
    images, names, checksum = (manifest.get(key) for key in ("images", "class_names", "ids_crc32"))
    return f"{images} in {len(names or ())} classes, checksum of their names {checksum}"


class TokenBatches:
    """Endless training batches from a token store: labels (B,), input (B, N) and target (B, N), all int64.

    Each sample is a random crop of its image; with probability `planted_share` its input and target are the rows
    *input* and *label* (wrong tokens planted, and what should have followed), else *clean* for both. Which batch comes
    at a step depends on (seed, step) alone, so a resumed run (`start_step`) continues exactly, whatever the number of
    `processes`, of which each gets its share of the `batch_size` samples.
    """

    def __init__(
        self,
        store: TokenStore,
        batch_size: int,
        seed: int,
        planted_share: float = 0.3,
        start_step: int = 0,
        world: World = World(),  # noqa: B008  # frozen
    ) -> None:
        if not 0.0 <= planted_share <= 1.0:
            raise DetailFlowError(f"planted_share {planted_share} is not possible: it is a probability, 0 to 1")
        self.store, self.planted_share = store, planted_share
        self.order = BatchOrder(len(store), batch_size, seed, start_step)
        self.share = world.shard(batch_size)
        self.steps_per_epoch = self.order.steps_per_epoch

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        for key in self.order:
            rng = self.order.batch_rng(key)  # draws for the samples of all processes
            crops = rng.integers(self.store.info.crops, size=len(key.items))[self.share]
            planted = (rng.random(len(key.items)) < self.planted_share)[self.share]
            images = key.items[self.share]
            inputs = self.store.read(images, crops, np.where(planted, INPUT, CLEAN))
            targets = self.store.read(images, crops, np.where(planted, LABEL, CLEAN))
            yield _int64(self.store.labels[images]), _int64(inputs), _int64(targets)


def _int64(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.int64))
