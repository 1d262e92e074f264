"""The token store: what `detailflow extract` writes and training the AR model reads (method §5, §6).

A directory with three files, written under temporary names and put in place with the manifest last:

- codes.bin: uint16 (images, crops, 3, N), the rows *clean*, *input* and *label* of each crop;
- labels.bin: int64 (images,);
- manifest.json: format, version, counts, and what the codes came from.
"""

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
import torch

from detailflow.data.loader import BatchOrder
from detailflow.errors import DetailFlowError

CLEAN, INPUT, LABEL = range(3)  # the rows of one crop
_FORMAT, _VERSION = "detailflow-tokens", 1
_CODES, _LABELS, _MANIFEST = "codes.bin", "labels.bin", "manifest.json"
_CODE_TYPE: np.dtype[np.integer] = np.dtype("<u2")
_LABEL_TYPE: np.dtype[np.integer] = np.dtype("<i8")


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
            raise DetailFlowError(f"A codebook of {self.codebook_size} codes does not fit a token store: it holds at most 65536")
        if not self.class_names or not all(isinstance(name, str) for name in self.class_names):
            raise DetailFlowError("A token store's class_names must be a list of at least one name")

    @property
    def codes_shape(self) -> tuple[int, int, int]:
        """The shape of one image's codes."""
        return (self.crops, 3, self.num_tokens)


class TokenStore:
    """A finished token store, memory-mapped. `codes` (images, crops, 3, N) uint16, `labels` (images,) int64."""

    def __init__(self, directory: Path, info: TokenStoreInfo, codes: np.ndarray, labels: np.ndarray) -> None:
        self.directory, self.info, self.codes, self.labels = directory, info, codes, labels

    def __len__(self) -> int:
        return len(self.labels)

    @staticmethod
    def create(directory: str | os.PathLike[str], info: TokenStoreInfo) -> "TokenWriter":
        """Start a new store in `directory`. Raises DetailFlowError where one stands already."""
        return TokenWriter(Path(directory), info)

    @classmethod
    def open(cls, directory: str | os.PathLike[str]) -> "TokenStore":
        """Open a finished store. Raises DetailFlowError when anything is missing, damaged or does not fit."""
        directory = Path(directory)
        info, images = _read_manifest(directory)
        codes = _map(directory / _CODES, _CODE_TYPE, (images, *info.codes_shape))
        labels = np.array(_map(directory / _LABELS, _LABEL_TYPE, (images,)))
        if labels.min() < 0 or labels.max() >= len(info.class_names):
            raise DetailFlowError(f"{directory / _LABELS} has labels beyond the store's classes: extract it again")
        return cls(directory, info, codes, labels)


def _map(file: Path, dtype: np.dtype[np.integer], shape: tuple[int, ...]) -> np.ndarray:
    if not file.is_file():
        raise DetailFlowError(f"{file} is missing from the token store: extract the tokens again")
    size, expected = file.stat().st_size, math.prod(shape) * dtype.itemsize
    if size != expected:
        raise DetailFlowError(f"{file} has {size} bytes where the manifest says {expected}: extract the tokens again")
    return np.memmap(file, dtype=dtype, mode="r", shape=shape)


def _read_manifest(directory: Path) -> tuple[TokenStoreInfo, int]:
    """→ the store's info and its number of images."""
    file = directory / _MANIFEST
    if not file.is_file():
        raise DetailFlowError(f"{directory} is no token store (no {_MANIFEST}): make one with `detailflow extract`.")
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        if manifest["format"] != _FORMAT:
            raise DetailFlowError(f"{file} is not the manifest of a token store: its format is not {_FORMAT!r}")
        if manifest["version"] != _VERSION:
            raise DetailFlowError(
                f"{file} has version {manifest['version']}, but this DetailFlow reads {_VERSION}: extract it again"
            )
        fields = {name: manifest[name] for name in TokenStoreInfo.__dataclass_fields__}
        fields["class_names"] = tuple(fields["class_names"])
        images = manifest["images"]
    except (KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DetailFlowError(f"{file} is damaged ({error!r}): extract the tokens again") from error
    if type(images) is not int or images < 1:
        raise DetailFlowError(f"{file} says that it holds {images!r} images: extract the tokens again")
    return TokenStoreInfo(**fields), images


class TokenWriter:
    """Appends images to a new store. As a context manager it finishes the store, or removes it after an error."""

    def __init__(self, directory: Path, info: TokenStoreInfo) -> None:
        if directory.exists() and not directory.is_dir():
            raise DetailFlowError(f"{directory} is a file: choose a folder for the token store")
        if (directory / _MANIFEST).exists():
            raise DetailFlowError(f"{directory} already holds a token store: delete it or choose another folder")
        self.directory, self.info, self.images = directory, info, 0
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._files: dict[str, BinaryIO] = {
                name: open(self._temporary(name), "wb")  # noqa: SIM115 (closed by `finish` or `discard`)
                for name in (_CODES, _LABELS)
            }
        except OSError as error:
            raise DetailFlowError(f"{directory} cannot be written ({error.strerror}): choose another one") from error

    def _temporary(self, name: str) -> Path:
        return self.directory / f".{name}.part"

    def append(self, codes: torch.Tensor | np.ndarray, labels: torch.Tensor | np.ndarray | Sequence[int]) -> None:
        """Add images: `codes` (B, crops, 3, N) in [0, K), `labels` (B,). DetailFlowError when they do not fit."""
        codes, labels = torch.as_tensor(codes).cpu().numpy(), torch.as_tensor(labels).cpu().numpy()
        if codes.shape != (len(labels), *self.info.codes_shape):
            expected = (len(labels), *self.info.codes_shape)
            raise DetailFlowError(f"Codes of shape {codes.shape} do not fit the token store: it takes {expected}")
        if not len(labels):
            return
        if codes.min() < 0 or codes.max() >= self.info.codebook_size:
            raise DetailFlowError(f"Codes must lie in 0 to {self.info.codebook_size - 1}, the store's codebook")
        if labels.min() < 0 or labels.max() >= len(self.info.class_names):
            raise DetailFlowError(f"Labels must lie in 0 to {len(self.info.class_names) - 1}, the store's classes")
        self._files[_CODES].write(codes.astype(_CODE_TYPE).tobytes())
        self._files[_LABELS].write(labels.astype(_LABEL_TYPE).tobytes())
        self.images += len(labels)

    def finish(self) -> TokenStore:
        """Put the store in place, the manifest last, and open it."""
        if not self.images:
            self.discard()
            raise DetailFlowError(f"{self.directory} got no images: a token store needs at least one")
        for file in self._files.values():
            _close_on_disk(file)
        manifest = {"format": _FORMAT, "version": _VERSION, "images": self.images, **asdict(self.info)}
        with open(self._temporary(_MANIFEST), "wb") as file:
            file.write(json.dumps(manifest, indent=2, ensure_ascii=False).encode() + b"\n")
            _close_on_disk(file)
        for name in (_CODES, _LABELS, _MANIFEST):
            os.replace(self._temporary(name), self.directory / name)
        return TokenStore.open(self.directory)

    def discard(self) -> None:
        """Remove what was written so far."""
        for name, file in self._files.items():
            file.close()
            self._temporary(name).unlink(missing_ok=True)

    def __enter__(self) -> "TokenWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self.finish()
        else:
            self.discard()


def _close_on_disk(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()


class TokenBatches:
    """Endless training batches from a token store: labels (B,), input (B, N) and target (B, N), all int64.

    Each sample is a random crop of its image; with probability `planted_share` its input and target are the rows
    *input* and *label* (wrong tokens planted, and what should have followed), else *clean* for both. Which batch comes
    at a step depends on (seed, step) alone, so a resumed run (`start_step`) continues exactly.
    """

    def __init__(self, store: TokenStore, batch_size: int, seed: int, planted_share: float = 0.3, start_step: int = 0) -> None:
        if not 0.0 <= planted_share <= 1.0:
            raise DetailFlowError(f"planted_share {planted_share} is not possible: it is a probability, 0 to 1")
        self.store, self.planted_share = store, planted_share
        self.order = BatchOrder(len(store), batch_size, seed, start_step)
        self.steps_per_epoch = self.order.steps_per_epoch

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        for key in self.order:
            rng = self.order.batch_rng(key)
            crops = rng.integers(self.store.info.crops, size=len(key.items))
            planted = rng.random(len(key.items)) < self.planted_share
            inputs = self.store.codes[key.items, crops, np.where(planted, INPUT, CLEAN)]
            targets = self.store.codes[key.items, crops, np.where(planted, LABEL, CLEAN)]
            yield _int64(self.store.labels[key.items]), _int64(inputs), _int64(targets)


def _int64(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.int64))
