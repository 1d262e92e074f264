"""The pickle in a file of `torch.save`: read with stand-ins for all that it names, before torch reads it.

torch's own reader runs no code of the file, but makes what it asks for: a few bytes can ask for a byte array, a tensor or a
storage of any size.
"""

import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from detailflow.errors import DetailFlowError

LARGEST_PICKLE = 4 * 2**20  # bytes, for about 20,000 tensors
_MAGIC = 0x1950A86A20F9469CFC6C  # which files that are no zip files begin with
_PICKLES = 5  # in such a file, before the tensors' numbers: this number, a version, the system, the content, the storages' names
_ITEM_BYTES = {
    **{f"torch.{name}Storage": size for size, names in {
        1: ("Byte", "Char", "Bool"), 2: ("Short", "Half", "BFloat16"), 4: ("Int", "Float"),
        8: ("Long", "Double", "ComplexFloat"), 16: ("ComplexDouble",),
    }.items() for name in names},
    "torch.storage.UntypedStorage": 1,
}  # fmt: skip


class _TooLargeError(Exception):
    """The file asks for more than it has."""


class _UnknownError(Exception):
    """The file asks for what plain weights do not need."""


class _Value:
    """Stands for any value, whatever it is made of."""

    def __init__(self, *_: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


class _Mapping(dict[Any, Any]):
    """Stands for an `OrderedDict`, which has attributes."""

    def __setstate__(self, state: Any) -> None: ...


class _ItemBytes(_Value):
    """Stands for a type of numbers, or of a storage of them."""

    def __init__(self, size: int) -> None:
        self.size = size


class _Storage(_Value):
    """Stands for a storage of so many bytes."""

    def __init__(self, size: int, item: int) -> None:
        self.size, self.item = size, item


class _Call(_Value):
    """Stands for a function; nothing in a file can change it, as Python's functions could be."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *arguments: Any) -> Any:
        return self.function(*arguments)


class _Reader(pickle._Unpickler):
    """Reads one pickle, and adds up what it asks for. In Python: the one in C makes room for as many memos as a file names."""

    def __init__(self, file: io.BytesIO, size: int) -> None:
        super().__init__(file, encoding="utf-8")
        self._size, self._copied, self._storages = size, 0, dict[str, int]()
        self._known: dict[str, Any] = {
            "collections.OrderedDict": _Call(self._mapping),
            "collections.Counter": _Call(self._copy),
            "builtins.set": _Call(self._copy),
            "builtins.bytearray": _Call(self._copy),
            "_codecs.encode": _Call(self._encode),
            "torch.Size": _Call(self._copy),
            "torch.device": _Call(_Value),
            "argparse.Namespace": _Value,  # which torch refuses unless it is allowed
            "torch.nn.parameter.Parameter": _Call(self._parameter),
            "torch._utils._rebuild_parameter": _Call(self._parameter),
            "torch._utils._rebuild_parameter_with_state": _Call(self._parameter),
            "torch._utils._rebuild_meta_tensor_no_storage": _Call(_Value),  # which has no numbers
            "torch._utils._rebuild_tensor": _Call(self._tensor),
            "torch._utils._rebuild_tensor_v2": _Call(self._tensor),
            "torch._utils._rebuild_tensor_v3": _Call(self._typed_tensor),
        }

    def find_class(self, module: str, name: str) -> Any:
        key = f"{pickle._compat_pickle.IMPORT_MAPPING.get(module, module)}.{name}"  # type: ignore[attr-defined]
        if key in self._known:
            return self._known[key]
        if key in _ITEM_BYTES:
            return _ItemBytes(_ITEM_BYTES[key])
        if module == "torch" and isinstance(value := getattr(torch, name, None), torch.dtype):
            return _ItemBytes(value.itemsize)
        raise _UnknownError(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> _Storage:
        kind, item, key, _, count = pid[:5]
        if kind != "storage" or type(count) is not int or count < 0:
            raise ValueError(kind)
        size = count * item.size
        self._storages[key] = max(size, self._storages.get(key, 0))
        if sum(self._storages.values()) > self._size:
            raise _TooLargeError
        return _Storage(size, item.size)

    def _take(self, size: int) -> None:
        self._copied += size
        if self._copied > self._size:
            raise _TooLargeError

    def _copy(self, *arguments: Any) -> _Value:
        """Stand for a function that copies its arguments, except for one that takes a number for a size."""
        for argument in arguments:
            self._take(argument if isinstance(argument, int) else len(argument))
        return _Value()

    def _mapping(self, *arguments: Any) -> _Mapping:
        self._copy(*arguments)
        return _Mapping()

    def _encode(self, text: str, encoding: str) -> bytes:
        if encoding not in ("latin1", "latin-1"):  # the one that Python writes for bytes
            raise _UnknownError(f"the encoding {encoding}")
        self._take(len(text))
        return text.encode("latin1")

    def _parameter(self, tensor: Any, *_: Any) -> Any:
        if not isinstance(tensor, _Value):  # a number would be a size
            raise _UnknownError("a tensor without numbers")
        return tensor

    def _tensor(
        self, storage: _Storage, offset: int, shape: tuple[int, ...], stride: tuple[int, ...], *_: Any
    ) -> _Value:
        return self._view(storage, storage.item, offset, shape, stride)

    def _typed_tensor(
        self,
        storage: _Storage,
        offset: int,
        shape: tuple[int, ...],
        stride: tuple[int, ...],
        grad: Any,
        hooks: Any,
        kind: Any,
        *_: Any,
    ) -> _Value:
        return self._view(storage, kind.size, offset, shape, stride)

    def _view(
        self, storage: _Storage, item: int, offset: int, shape: tuple[int, ...], stride: tuple[int, ...]
    ) -> _Value:
        """Stand for a tensor: torch makes a storage larger if a tensor does not fit it."""
        if any(type(x) is not int or x < 0 for x in (offset, *shape, *stride)) or len(shape) != len(stride):
            raise ValueError("a shape")
        last = offset + sum((side - 1) * step for side, step in zip(shape, stride, strict=True))
        if 0 not in shape and (last + 1) * item > storage.size:
            raise _TooLargeError
        return _Value()


def check_pickle(content: bytes, size: int, path: Path, whole: bool = True) -> None:
    """Check what a pickle asks for; nothing that it names is imported or run.

    Args:
        size: bytes of the file, which it may ask for at most.
        whole: whether `content` is the pickle of a zip file. If not, it is the beginning of a file of several.

    Raises:
        DetailFlowError: if it asks for more, for anything but plain values and tensors, or is damaged.
    """
    file = io.BytesIO(content)
    try:
        begun = _Reader(file, size).load()
        if not whole and begun == _MAGIC:  # else torch stops here as well
            for _ in range(_PICKLES - 1):
                _Reader(file, size).load()
    except _TooLargeError:
        raise DetailFlowError(
            f"refused to load {path}: it asks for more memory than it has bytes, so write it with torch.save"
        ) from None
    except _UnknownError as error:
        raise DetailFlowError(
            f"refused to load {path}: it asks for {error}, which a checkpoint of plain weights does not need; "
            "nothing was executed"
        ) from None
    except Exception as error:  # damaged bytes surface as nearly any exception
        raise DetailFlowError(
            f"could not read {path}: it is damaged, incomplete or no PyTorch checkpoint, so fetch it again"
        ) from error
