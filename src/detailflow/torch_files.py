"""Files of `torch.save`: read as plain values and tensors, with no more memory than the file has bytes; and written.

`torch.load(weights_only=True)` runs no code from a file, but it makes what the file asks for, and a compressed zip
member, or a few bytes of pickle that ask for a tensor of any size, could fill the memory. So each file is checked
first: its zip members must be stored once and uncompressed, and its pickle is read with stand-ins that add up what it
asks for.
"""

import argparse
import io
import os
import pickle
import threading
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch

from detailflow.errors import DetailFlowError
from detailflow.files import check_regular, check_utf8, reading, replacing

_LOADING = threading.Lock()  # torch's list of safe globals and filters of warnings belong to the process
LARGEST_PICKLE = 4 * 2**20  # bytes, for about 20,000 tensors
_ZIP_TAIL = 56 + 20 + 22  # bytes of the three records that end a zip file
_MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of files in torch's old format, which are not zip files
_OLD_PICKLES = 5  # in such a file: this number, a version, the system, the content, the storages' names
_ITEM_BYTES = {
    **{f"torch.{name}Storage": size for size, names in {
        1: ("Byte", "Char", "Bool"), 2: ("Short", "Half", "BFloat16"), 4: ("Int", "Float"),
        8: ("Long", "Double", "ComplexFloat"), 16: ("ComplexDouble",),
    }.items() for name in names},
    "torch.storage.UntypedStorage": 1,
}  # fmt: skip


def save_torch(path: Path, content: Any) -> None:
    """Write a file of `torch.save`, whole or not at all; an `OSError` if that fails."""
    with replacing(path) as temporary:
        write_torch(temporary, content)


def write_torch(path: Path, content: Any) -> None:
    """Write a file of `torch.save`; an `OSError` if that fails."""
    with path.open("wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # torch's own, after the file's
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def load_torch(path: Path, mmap: bool = False) -> Any:
    """Load tensors, plain containers and `argparse.Namespace` that `torch.save` wrote; nothing is executed.

    Args:
        mmap: leave the tensors on the disk until they are used; a file in torch's old format is read whole all the
            same.
    """
    check_torch_file(path)
    if mmap:
        with reading(path):
            check_utf8(path)
    try:
        with _LOADING, warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")  # about pickle protocols
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and zipfile.is_zipfile(path))
    except Exception as error:  # damaged bytes surface as nearly any exception
        raise _damaged(path) from error


def check_torch_file(path: Path) -> None:
    """Check that what `torch.load` will read is plain values and tensors, and no larger than the file."""
    with reading(path):
        check_regular(path)
        try:
            with path.open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(0)
                zipped = file.read(4) == b"PK\3\4"
                file.seek(0)
                if zipped:
                    _check_zip(file, size, path)
                else:
                    _check_old(io.BytesIO(file.read(LARGEST_PICKLE)), size)
        except _TooLargeError:
            raise _refused(path, "it asks for more memory than it has bytes, so write it with torch.save") from None
        except _UnknownError as error:
            needs = "which a checkpoint of plain weights does not need; nothing was executed"
            raise _refused(path, f"it asks for {error}, {needs}") from None
        except (DetailFlowError, OSError):
            raise
        except Exception as error:  # damaged bytes surface as nearly any exception
            raise _damaged(path) from error


def _damaged(path: Path) -> DetailFlowError:
    return DetailFlowError(
        f"could not read {path}: it is damaged, incomplete or not a PyTorch checkpoint, so fetch it again"
    )


def _refused(path: Path, why: str) -> DetailFlowError:
    return DetailFlowError(f"refused to load {path}: {why}")


def _check_zip(file: IO[bytes], size: int, path: Path) -> None:
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        compressed = any(member.compress_type != zipfile.ZIP_STORED for member in members)
        overlap = sum(member.file_size for member in members) > size
        if compressed or overlap or not _one_directory(file, size, archive.start_dir):
            raise _refused(path, "its members are compressed or overlap, so write it with torch.save")
        names = [member.filename.lower() for member in members]  # torch's reader takes upper for lower case
        pickles = [member for member in members if member.filename.lower().rpartition("/")[2] == "data.pkl"]
        if len(set(names)) < len(names) or len(pickles) != 1:
            raise _damaged(path)
        if pickles[0].file_size > LARGEST_PICKLE:
            raise _refused(path, f"its pickle is larger than {LARGEST_PICKLE:,} bytes, so write it with torch.save")
        _Reader(io.BytesIO(archive.read(pickles[0])), size).load()


def _one_directory(file: IO[bytes], size: int, start: int) -> bool:
    """Return whether the file ends with the record of a member list at `start`, so that all zip readers agree."""
    file.seek(max(0, size - _ZIP_TAIL))
    tail = file.read()
    end = tail[-22:]
    if end[:4] != b"PK\5\6":
        return False
    if tail[-42:-38] != b"PK\6\7":  # no second record with sizes of 64 bits
        return int.from_bytes(end[16:20], "little") == start
    record = int.from_bytes(tail[-34:-26], "little")
    return record == size - _ZIP_TAIL and tail[:4] == b"PK\6\6" and int.from_bytes(tail[48:56], "little") == start


def _check_old(file: IO[bytes], size: int) -> None:
    if _Reader(file, size).load() == _MAGIC:  # else torch stops here as well
        for _ in range(_OLD_PICKLES - 1):
            _Reader(file, size).load()


class _TooLargeError(Exception):
    """The file asks for more than it has."""


class _UnknownError(Exception):
    """The file asks for something that plain weights do not need."""


class _Value:
    """Stands for any value; nothing in a file can change it."""

    def __init__(self, *_: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


class _Mapping(dict[Any, Any]):
    """Stands for an `OrderedDict`, which has attributes."""

    def __setstate__(self, state: Any) -> None: ...


class _Bytes(_Value):
    """Stands for a number type, or a storage: its size and the size of one number."""

    def __init__(self, size: int, item: int = 1) -> None:
        self.size, self.item = size, item


class _Call(_Value):
    """Stands for a function."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *arguments: Any) -> Any:
        return self.function(*arguments)


class _Reader(pickle._Unpickler):
    """Reads one pickle and adds up what it asks for. The reader in C would allocate as many memos as a file names."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        super().__init__(file, encoding="utf-8")
        self._size, self._copied, self._storages = size, 0, dict[str, int]()
        copy, value, parameter = _Call(self._copy), _Call(_Value), _Call(self._parameter)
        tensor = _Call(
            lambda storage, offset, shape, stride, *_: self._view(storage, storage.item, offset, shape, stride)
        )
        self._known: dict[str, Any] = {
            "collections.OrderedDict": _Call(lambda *arguments: self._copy(*arguments) and _Mapping()),
            "collections.Counter": copy,
            "builtins.set": copy,
            "builtins.bytearray": copy,
            "_codecs.encode": _Call(self._encode),
            "torch.Size": copy,
            "torch.device": value,
            "argparse.Namespace": _Value,
            "torch.nn.parameter.Parameter": parameter,
            "torch._utils._rebuild_parameter": parameter,
            "torch._utils._rebuild_parameter_with_state": parameter,
            "torch._utils._rebuild_meta_tensor_no_storage": value,  # which has no numbers
            "torch._utils._rebuild_tensor": tensor,
            "torch._utils._rebuild_tensor_v2": tensor,
            "torch._utils._rebuild_tensor_v3": _Call(
                lambda storage, offset, shape, stride, _grad, _hooks, kind, *_: self._view(
                    storage, kind.size, offset, shape, stride
                )
            ),
        }

    def find_class(self, module: str, name: str) -> Any:
        key = f"{pickle._compat_pickle.IMPORT_MAPPING.get(module, module)}.{name}"  # type: ignore[attr-defined]
        if key in self._known:
            return self._known[key]
        if key in _ITEM_BYTES:
            return _Bytes(_ITEM_BYTES[key])
        if module == "torch" and isinstance(value := getattr(torch, name, None), torch.dtype):
            return _Bytes(value.itemsize)
        raise _UnknownError(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> _Bytes:
        kind, item, key, _, length = pid[:5]
        if kind != "storage" or type(length) is not int or length < 0:
            raise ValueError(kind)
        size = length * item.size
        self._storages[key] = max(size, self._storages.get(key, 0))
        if sum(self._storages.values()) > self._size:
            raise _TooLargeError
        return _Bytes(size, item.size)

    def _take(self, size: int) -> None:
        self._copied += size
        if self._copied > self._size:
            raise _TooLargeError

    def _copy(self, *arguments: Any) -> _Value:
        """Stand for a function that copies its arguments, or takes a number as a size."""
        for argument in arguments:
            self._take(argument if isinstance(argument, int) else len(argument))
        return _Value()

    def _encode(self, text: str, encoding: str) -> bytes:
        if encoding not in ("latin1", "latin-1"):  # the one that Python writes for bytes
            raise _UnknownError(f"the encoding {encoding}")
        self._take(len(text))
        return text.encode("latin1")

    def _parameter(self, tensor: Any, *_: Any) -> Any:
        if not isinstance(tensor, _Value):  # a number would be a size
            raise _UnknownError("a tensor without numbers")
        return tensor

    def _view(self, storage: _Bytes, item: int, offset: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> _Value:
        """Stand for a tensor: torch makes a storage larger if a tensor does not fit it."""
        if any(type(x) is not int or x < 0 for x in (offset, *shape, *stride)) or len(shape) != len(stride):
            raise ValueError("a shape")
        last = offset + sum((side - 1) * step for side, step in zip(shape, stride, strict=True))
        if 0 not in shape and (last + 1) * item > storage.size:
            raise _TooLargeError
        return _Value()
