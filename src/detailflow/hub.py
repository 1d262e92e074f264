"""Where models lie and how they are read and written. Knows no network.

Our layout is a directory with `config.json` ("format": "detailflow", "kind", then the model's own keys) and
`model.safetensors`; the published layout (method §9) is recognised and translated by `published`.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from detailflow.errors import DetailFlowError
from detailflow.published import Kind, check_kind, is_published, load_published, read_config

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"


@dataclass(frozen=True)
class ZooModel:
    """A published pair of models: hub names, length N of its sequences and its best guidance scale (method §7)."""

    tokenizer: str
    gpt: str
    num_tokens: int
    guidance_scale: float


ZOO = {
    "detailflow-16": ZooModel("ByteFlow-AI/DetailFlow-16", "ByteFlow-AI/DetailFlow-16-GPT-L", 128, 1.45),
    "detailflow-32": ZooModel("ByteFlow-AI/DetailFlow-32", "ByteFlow-AI/DetailFlow-32-GPT-L", 256, 1.5),
    "detailflow-64": ZooModel("ByteFlow-AI/DetailFlow-64", "ByteFlow-AI/DetailFlow-64-GPT-L", 512, 1.32),
}


def default_directory(kind: Kind) -> Path:
    """The small model that is shipped in the package."""
    return Path(__file__).parent / "weights" / kind


def resolve(path_or_id: str | Path, kind: Kind) -> Path:
    """The local directory of a model.

    `path_or_id` is a folder, a folder with tokenizer/ and gpt/ inside, a zoo shorthand or a hub name (owner/name).
    Whatever is an existing folder is taken as one; hub models are downloaded into the hub's cache.

    Raises:
        DetailFlowError: if there is no such folder or the download fails.
    """
    name = str(path_or_id)
    directory = Path(os.path.expanduser(name))
    if name and os.path.isdir(directory):  # os.path, which takes an impossible name for a missing one
        nested = directory / kind
        return nested if nested.is_dir() and not (directory / CONFIG_FILE).exists() else directory
    if os.path.isfile(directory):
        raise DetailFlowError(f"{name} is a file: give the folder that holds {CONFIG_FILE} and the weights")
    if isinstance(path_or_id, str) and name in ZOO:
        return _download(getattr(ZOO[name], kind), kind)
    if isinstance(path_or_id, str) and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name, re.ASCII):
        return _download(name, kind)
    if "/" in name or isinstance(path_or_id, Path):
        raise DetailFlowError(f"there is no such folder: {name}")
    raise DetailFlowError(f"unknown model {name!r}: give a folder, a hub name (owner/name) or one of {', '.join(ZOO)}")


def _download(repository: str, kind: Kind) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise DetailFlowError(
            f"could not download {repository!r} without the package huggingface_hub: install it, or give a local folder"
        ) from error
    ours = [f"{folder}{file}" for folder in ("", f"{kind}/") for file in (CONFIG_FILE, WEIGHTS_FILE)]
    try:
        directory = Path(snapshot_download(repository, allow_patterns=[*ours, "config.yaml", "checkpoints/*.pt"]))
    except Exception as error:  # connection, name, permission, disk: the hub's client has an exception type for each
        lines = str(error).strip().splitlines()
        reason = lines[0].rstrip(".") if lines else type(error).__name__
        raise DetailFlowError(
            f"could not download {repository!r} from the Hugging Face hub ({reason}): "
            "check the name and the connection, or give a local folder instead"
        ) from error
    if not directory.is_dir():  # what the hub's client returns where no file matches
        raise DetailFlowError(f"{repository!r} on the Hugging Face hub holds no DetailFlow model")
    return resolve(directory, kind)


def load(
    path_or_id: str | Path, kind: Kind, variant: Literal["ema", "model"] = "ema"
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config and the tensors of a model, in our keys and names whatever its layout, on the CPU.

    Args:
        path_or_id: as in `resolve`.
        kind: "tokenizer" or "gpt".
        variant: which weights of a published checkpoint: "ema" where present, or "model". Our layout has one set.

    Raises:
        DetailFlowError: if the model cannot be found, is damaged or is of the other kind.
    """
    if variant not in ("ema", "model"):
        raise DetailFlowError(f"variant must be 'ema' or 'model', not {variant!r}")
    directory = resolve(path_or_id, kind)
    if is_published(directory):
        config, tensors = load_published(directory, kind, variant)
        if kind == "gpt":
            scales = {model.num_tokens: model.guidance_scale for model in ZOO.values()}
            config["guidance_scale"] = scales.get(config["num_tokens"], config["guidance_scale"])
        return config, tensors
    config = read_config(directory / CONFIG_FILE)
    if config.pop("format", None) != "detailflow":
        raise DetailFlowError(f'{directory / CONFIG_FILE} is no DetailFlow config: it lacks "format": "detailflow"')
    check_kind(directory, config.pop("kind", None), kind)
    path = directory / WEIGHTS_FILE
    try:
        return config, load_file(path)
    except FileNotFoundError:
        raise DetailFlowError(f"{directory} has no {WEIGHTS_FILE}, which must lie beside {CONFIG_FILE}") from None
    except OSError as error:
        raise DetailFlowError(f"could not read {path}: {error.strerror or error}") from error
    except SafetensorError as error:
        raise DetailFlowError(f"could not read {path}: it is damaged or incomplete ({error})") from error


def save(directory: str | Path, kind: Kind, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write a model in our layout, making the directory if needed.

    Each file is replaced at once, the config last: an interrupted first save leaves no model, not half of one.

    Raises:
        DetailFlowError: if the files cannot be written.
    """
    directory = Path(directory)
    text = json.dumps({"format": "detailflow", "kind": kind, **config}, indent=2, ensure_ascii=False)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with replacing(directory / WEIGHTS_FILE) as path:
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)
        with replacing(directory / CONFIG_FILE) as path:
            path.write_text(text + "\n", encoding="utf-8")
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) else None
        raise DetailFlowError(f"could not write the model to {directory}: {reason or error}") from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` to write to: it takes the place of `path` at the end, or vanishes on an error."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # what the umask allows; safetensors makes files for their owner only
        yield temporary
        temporary.chmod(mode)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def fingerprint(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 in hex over the config and every tensor's name, type, shape and bytes, whatever their order.

    It is the same after saving and loading.
    """
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
