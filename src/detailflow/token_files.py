"""Token files: the tokens of images as one .npz file, which any program with NumPy reads (docs/vary.md#token-files).

- format, version: "detailflow tokens", 1
- tokens: uint16 or uint32 (images, n), each image's first n tokens
- sizes: int32 (images, 2), height and width of each full image in pixels
- names: text (images,)
- fingerprint: text, of the tokenizer that made them
"""

import io
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from detailflow.errors import DetailFlowError, explained, os_errors
from detailflow.files import check_regular, making, reading, replacing
from detailflow.schedule import TokenSchedule

SUFFIX = ".npz"
FORMAT, VERSION = "detailflow tokens", 1
LARGEST_ENTRY = 2**24  # bytes that an entry may always have
MOST_EXPANSION = 20  # times the bytes in the file, for larger ones; we write them as they are


@dataclass(frozen=True)
class TokenFile:
    """The first n tokens of images, (images, n), of full size `sizes` (images, 2: height, width)."""

    tokens: np.ndarray
    sizes: np.ndarray
    names: tuple[str, ...]
    fingerprint: str

    def write(self, path: Path) -> None:
        """Write the file, whole or not at all; an earlier token file is replaced, any other file is an error."""
        check_replaceable(path)
        entries = {
            "format": np.array(FORMAT),
            "version": np.array(VERSION),
            "tokens": self.tokens.astype(np.uint16 if self.tokens.max() < 2**16 else np.uint32),
            "sizes": np.asarray(self.sizes, np.int32),
            "names": np.array(self.names, np.str_),
            "fingerprint": np.array(self.fingerprint),
        }
        with (
            os_errors(f"cannot write {path}"),
            making(path.parent),
            replacing(path) as temporary,
            temporary.open("wb") as file,
        ):
            np.savez(file, **entries)  # type: ignore[arg-type]  # allow_pickle is new in NumPy 2

    @classmethod
    def read(cls, path: Path) -> "TokenFile":
        """Read a file; nothing in it is executed."""
        with reading(path):
            path.stat()
            check_regular(path)
        problem = f"{path} is damaged, or no token file of `detailflow encode`"
        with explained(problem, Exception), zipfile.ZipFile(path) as archive:  # damage raises errors of all kinds
            found = _identity(archive)
            if found == (FORMAT, VERSION):
                return cls._checked(archive)
        if found is not None and found[0] == FORMAT:
            raise DetailFlowError(f"{path} is a token file of version {found[1]!r}, but this program reads {VERSION}")
        raise DetailFlowError(f"{path} is not a token file: `detailflow encode` makes them")

    @classmethod
    def _checked(cls, archive: zipfile.ZipFile) -> "TokenFile":
        tokens, sizes, names, fingerprint = (
            _entry(archive, name) for name in ("tokens", "sizes", "names", "fingerprint")
        )
        if tokens.ndim != 2 or tokens.dtype.kind not in "ui" or not tokens.size:
            raise ValueError(f"its tokens are {tokens.dtype} of shape {tokens.shape}")
        if sizes.shape != (len(tokens), 2) or sizes.dtype.kind not in "ui":
            raise ValueError(f"its sizes are {sizes.dtype} of shape {sizes.shape}, for {len(tokens)} images")
        if names.shape != (len(tokens),) or names.dtype.kind != "U":
            raise ValueError(f"its names are {names.dtype} of shape {names.shape}, for {len(tokens)} images")
        return cls(tokens.astype(np.int64), sizes.astype(np.int64), tuple(names.tolist()), str(fingerprint))

    def check_fits(self, path: Path, fingerprint: str, schedule: TokenSchedule, codebook_size: int) -> None:
        """Check that the tokens are those of a tokenizer; `path` is the file's name in messages."""
        if self.fingerprint != fingerprint:
            raise DetailFlowError(
                f"{path} has the tokens of another tokenizer, {self.fingerprint[:12]}, not of {fingerprint[:12]}: "
                "give the model that they were encoded with as --model"
            )
        if self.tokens.min() < 0 or self.tokens.max() >= codebook_size:
            raise DetailFlowError(f"{path} is damaged: its tokens must be 0 to {codebook_size - 1}")
        if self.tokens.shape[1] not in schedule.valid_counts:
            raise DetailFlowError(f"{path} is damaged: no image has {self.tokens.shape[1]} tokens")
        for height, width in np.unique(self.sizes, axis=0).tolist():
            if not schedule.is_full_shape(height, width):
                raise DetailFlowError(f"{path} is damaged: no image is encoded at {height}×{width} pixels")


def check_replaceable(path: Path) -> None:
    """Check that no file of another kind is at `path`."""
    with os_errors(f"cannot write {path}"):  # as of a name that is too long
        if not path.exists() and not path.is_symlink():
            return
    if path.is_dir():
        raise DetailFlowError(f"{path} is a folder: give the name of a file, such as {path / 'tokens.npz'}")
    try:
        check_regular(path)
        with zipfile.ZipFile(path) as archive:
            found = _identity(archive)
    except Exception:  # no such file at all
        found = None
    if found is None or found[0] != FORMAT:
        raise DetailFlowError(f"{path} was not made by `detailflow encode`: move it, or choose another output")


def _identity(archive: zipfile.ZipFile) -> tuple[str, Any] | None:
    """Return the format and version, or `None` if the archive has none."""
    if not {"format.npy", "version.npy"} <= set(archive.namelist()):
        return None
    version = _entry(archive, "version")
    return str(_entry(archive, "format")), version.item() if version.ndim == 0 else version.shape


def _entry(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """Read an array without pickled objects, whose size is bounded before it is unpacked."""
    member = archive.getinfo(f"{name}.npy")
    packed = min(member.compress_size, Path(str(archive.filename)).stat().st_size)  # the first is only what it says
    if member.file_size > max(LARGEST_ENTRY, MOST_EXPANSION * packed):
        raise ValueError(f"{name} grows from {packed:,} bytes to {member.file_size:,}")
    array: np.ndarray = np.lib.format.read_array(io.BytesIO(archive.read(member)), allow_pickle=False)
    return array
