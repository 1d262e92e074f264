"""Tensors in files: safetensors, in one file or in shards as the hub has them; state dicts of `torch.save`."""

import json
import math
import re
from collections.abc import Container, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from detailflow.errors import DetailFlowError
from detailflow.files import check_regular, check_utf8, read_json, reading, replacing, sync
from detailflow.torch_files import load_torch

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
TENSOR_FILES = (WEIGHTS_FILE, INDEX_FILE, "model-*-of-*.safetensors")  # as patterns
SHARD_SIZE = "5GB"  # the hub's convention
PIECE = 64 * 2**20  # bytes

Key = TypeVar("Key")


def in_pieces(sizes: Mapping[Key, int]) -> Iterator[list[Key]]:
    """Yield the keys in lists of about `PIECE` bytes.

    A memory-mapped file keeps the pages that were read in memory, so copying maps it again for each list.
    """
    piece: list[Key] = []
    total = 0
    for key, size in sizes.items():
        piece.append(key)
        total += size
        if total >= PIECE:
            yield piece
            piece, total = [], 0
    if piece:
        yield piece


def is_weights(value: Any) -> bool:
    """Return whether a value is a dense floating-point tensor on the CPU, and no larger than its storage."""
    dense = isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu"
    return dense and value.is_floating_point() and value.nbytes <= value.untyped_storage().nbytes()


def read_tensors(
    path: Path, dtype: torch.dtype | None = None, wanted: Container[str] | None = None, integers: bool = False
) -> dict[str, Tensor]:
    """Copy the tensors from a folder's model.safetensors or its shards, or from one such file.

    Args:
        path: the folder or the file.
        dtype: of the tensors; `None` is as they are stored.
        wanted: names of those to read; `None` is all.
        integers: accept tensors of other than floating-point numbers; these keep their type.
    """
    tensors: dict[str, Tensor] = {}
    for file in _files(path):
        shapes = {name: shape for name, (_, shape) in _header(file).items() if wanted is None or name in wanted}
        for names in in_pieces({name: 4 * math.prod(shape) for name, shape in shapes.items()}):
            with _opened(file) as opened:
                for name in names:
                    tensor = opened.get_tensor(name)
                    if not tensor.is_floating_point() and not integers:
                        raise DetailFlowError(
                            f"{name} in {file} is of type {tensor.dtype}, but weights are floating-point numbers"
                        )
                    try:
                        tensors[name] = tensor.to(dtype if tensor.is_floating_point() else None, copy=True)
                    except NotImplementedError as error:  # torch has types of four bits that it cannot copy
                        raise DetailFlowError(
                            f"{name} in {file} is of type {tensor.dtype}, which no model has"
                        ) from error
    return tensors


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a folder or safetensors file, or of a state dict that `torch.save` wrote."""
    if path.is_dir() or path.suffix == ".safetensors":
        return read_tensors(path)
    tensors = load_torch(path)
    entries = tensors.items() if isinstance(tensors, dict) else [(None, tensors)]
    if any(not isinstance(name, str) or not isinstance(tensor, Tensor) for name, tensor in entries):
        raise DetailFlowError(f"{path} must hold tensors by name and nothing else: save the network's state_dict()")
    for name, tensor in entries:
        if tensor.is_meta or tensor.nbytes > tensor.untyped_storage().nbytes():  # it would grow when it is used
            raise DetailFlowError(f"{name} in {path} has more numbers than the file: save the network's state_dict()")
    return dict(tensors)


def read_headers(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return the stored type ("F32", "BF16", …) and shape of each tensor that `read_tensors` would read."""
    return {name: header for file in _files(path) for name, header in _header(file).items()}


def read_metadata(file: Path) -> dict[str, str]:
    """Return the metadata of a safetensors file, empty if it has none."""
    with _opened(file) as opened:
        return dict(opened.metadata() or {})


def _header(file: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    with _opened(file) as opened:
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118  # not a mapping
        return {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}


@contextmanager
def _opened(file: Path) -> Iterator[safe_open]:
    if not file.exists():
        raise DetailFlowError(f"{file.parent} has no {file.name}, which must be beside config.json")
    try:
        with reading(file):
            check_regular(file)
            check_utf8(file)
            with safe_open(file, "pt") as opened:
                yield opened
    except SafetensorError as error:
        raise DetailFlowError(f"could not read {file}: it is damaged or incomplete ({error})") from error


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    index = path / INDEX_FILE
    if (path / WEIGHTS_FILE).exists() or not index.exists():
        return [path / WEIGHTS_FILE]
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise DetailFlowError(f"{index} must name the file of each tensor under 'weight_map'")
    for name in shards.values():
        if not isinstance(name, str) or name != Path(name).name or not name.endswith(".safetensors"):
            raise DetailFlowError(f"{index} names {name!r}, which is not a .safetensors file beside it")
    return [path / name for name in sorted(set(shards.values()))]


def shard_bytes(size: str) -> int:
    """Return the bytes in "5GB", "200MB" or "1.5KB"."""
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
    match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?) ?([KMGT]B)", size.strip().upper())
    total = int(float(match[1]) * units[match[2]]) if match else 0
    if total < 1:
        raise DetailFlowError(f"the shard size must be like 5GB or 200MB, not {size!r}")
    return total


def check_finite(tensors: Mapping[str, Tensor], source: object) -> None:
    """Raise a `DetailFlowError` for a tensor with infinite values or NaN."""
    if bad := next((name for name, tensor in tensors.items() if not _is_finite(tensor)), None):
        dtype = str(tensors[bad].dtype).removeprefix("torch.")
        raise DetailFlowError(
            f"{source}: {bad} has values that are not finite in {dtype}: the weights are damaged, or too large for it"
        )


def _is_finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    numbers = tensor.float() if tensor.dtype.itemsize == 1 else tensor  # those of 8 bits have no minimum
    return bool(torch.stack(numbers.aminmax()).isfinite().all())  # ten times as fast as looking at each number


@contextmanager
def writing_tensors(folder: Path, tensors: Mapping[str, Tensor], shard_size: str = SHARD_SIZE) -> Iterator[None]:
    """Write model.safetensors, or shards of at most `shard_size` ("5GB", "200MB") and their index.

    All are written at the start of the context and put in place at its end, or vanish on an error. If it is interrupted
    while shards are put in place, there is no index.

    Raises:
        OSError, SafetensorError: if that fails.
    """
    from huggingface_hub import split_torch_state_dict_into_shards

    check_utf8(folder)
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    split = split_torch_state_dict_into_shards(whole, max_shard_size=shard_bytes(shard_size))
    index = folder / INDEX_FILE
    with ExitStack() as stack:  # which puts the files in place in the opposite order
        if split.is_sharded:
            content = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            text = json.dumps(content, indent=2) + "\n"
            path = stack.enter_context(replacing(index))
            path.write_text(text, encoding="utf-8")
            sync(path)
        for name, members in split.filename_to_tensors.items():
            path = stack.enter_context(replacing(folder / name))
            save_file({member: whole[member] for member in members}, path, metadata={"format": "pt"})
            sync(path)
        yield
        index.unlink(missing_ok=True)
    digits = "[0-9]" * 5
    for path in (*folder.glob(f"model-{digits}-of-{digits}.safetensors"), folder / WEIGHTS_FILE):
        if path.name not in split.filename_to_tensors:
            path.unlink(missing_ok=True)
