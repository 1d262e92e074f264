"""Where models lie and how they are read and written. Knows no network.

Our layout is a directory with `config.json` ("format": "detailflow", "kind", then the model's own keys) and
`model.safetensors`, or its shards. `published` recognises and translates the other (docs/method.md#published-layout).
"""

import hashlib
import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor

from detailflow.errors import DetailFlowError
from detailflow.files import read_json, replacing
from detailflow.published import (
    ARGUMENTS_FILE,
    CHECKPOINTS,
    Kind,
    check_kind,
    is_published,
    kind_of,
    load_published,
    model_folder,
    published_config,
)
from detailflow.runs import RUN_FILE, checkpoint_of, is_checkpoint, is_run, load_run, run_config, run_kind
from detailflow.tensors import SHARD_SIZE, TENSOR_FILES, read_tensors, write_tensors

logger = logging.getLogger(__name__)
CONFIG_FILE = "config.json"
KINDS: tuple[Kind, ...] = ("tokenizer", "gpt")


@dataclass(frozen=True)
class ZooModel:
    """A published pair of models: hub names, length N of its sequences and its best guidance scale (docs/method.md#sampling)."""

    tokenizer: str
    gpt: str
    num_tokens: int
    guidance_scale: float


ZOO = {
    "detailflow-16": ZooModel("ByteFlow-AI/DetailFlow-16", "ByteFlow-AI/DetailFlow-16-GPT-L", 128, 1.45),
    "detailflow-32": ZooModel("ByteFlow-AI/DetailFlow-32", "ByteFlow-AI/DetailFlow-32-GPT-L", 256, 1.5),
    "detailflow-64": ZooModel("ByteFlow-AI/DetailFlow-64", "ByteFlow-AI/DetailFlow-64-GPT-L", 512, 1.32),
}


def zoo_model(name: str | Path) -> ZooModel | None:
    """The published pair that a shorthand, or the hub name of either half, stands for."""
    return next((model for short, model in ZOO.items() if name in (short, model.tokenizer, model.gpt)), None)


def default_directory(kind: Kind) -> Path:
    """The small model that is shipped in the package."""
    return Path(__file__).parent / "weights" / kind


def resolve(path_or_id: str | Path, kind: Kind, revision: str | None = None) -> Path:
    """Return the local folder of a model, or one checkpoint file in it.

    `path_or_id` is a folder, one with tokenizer/ and gpt/ or any two such folders inside, a checkpoint of the published layout
    (FOLDER/checkpoints/NAME.pt), the folder of a training run that is not finished, one of a run's checkpoints (step-….pt), a
    zoo shorthand or a hub name (owner/name; that of either half of a zoo pair stands for both). Whatever is an existing folder
    is taken as one; hub models are downloaded into the hub's cache, `revision` (a branch, tag or commit; `None` is the newest)
    of them.

    Raises:
        DetailFlowError: if there is no such folder, the download fails or a folder is given with a revision.
    """
    name = str(path_or_id)
    path = Path(os.path.expanduser(name))
    if revision is not None and os.path.lexists(path):
        raise DetailFlowError(f"{name} is on this machine, and only models on the hub have a revision: leave it out")
    if name and os.path.isdir(path):  # os.path, which takes an impossible name for a missing one
        return _nested(path, kind)
    if os.path.isfile(path):
        if is_checkpoint(path) or (path.suffix == ".pt" and is_published(path.absolute())):
            return path.absolute()
        raise DetailFlowError(f"{name} is a file: give the folder that holds {CONFIG_FILE} and the weights")
    if isinstance(path_or_id, str):
        if pair := zoo_model(name):
            return download(getattr(pair, kind), kind, revision)
        if is_hub_name(name):
            return download(name, kind, revision)
    if "/" in name or isinstance(path_or_id, Path):
        raise DetailFlowError(f"there is no such folder: {name}")
    raise DetailFlowError(f"unknown model {name!r}: give a folder, a hub name (owner/name) or one of {', '.join(ZOO)}")


def is_hub_name(name: str) -> bool:
    """Whether it is written as the hub's names are, owner/name."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name, re.ASCII) is not None


def _nested(directory: Path, kind: Kind) -> Path:
    """The folder itself where it holds a model, else the one inside that holds a model of that kind."""
    if _holds_model(directory):
        return directory
    if os.path.isdir(directory / kind):
        return directory / kind
    try:
        inside = [child for child in sorted(directory.iterdir()) if _holds_model(child)]
    except OSError as error:
        raise DetailFlowError(f"could not read {directory}: {error.strerror or error}") from error
    found = []
    for child in inside:
        with suppress(DetailFlowError):  # whatever else lies there
            found += [child] if read_kind(child) == kind else []
    if len(found) > 1:
        raise DetailFlowError(
            f"{directory} holds several models of that kind ({', '.join(f.name for f in found)}): give one"
        )
    return found[0] if found else directory


def _holds_model(folder: Path) -> bool:
    """Return whether a folder holds a model itself, be it that of a training run that is not finished."""
    return os.path.isfile(folder / CONFIG_FILE) or is_run(folder)


def _is_unfinished(path: Path) -> bool:
    """Return whether a path that was resolved is a training run's that is not finished, or a checkpoint of a run."""
    return not is_published(path) and (is_checkpoint(path) or (not os.path.exists(path / CONFIG_FILE) and is_run(path)))


def read_kind(path: Path) -> Any:
    """The kind that a model's config states, or `None`.

    Raises:
        DetailFlowError: if the config cannot be read.
    """
    if _is_unfinished(path):
        return run_kind(path)
    config = read_json(model_folder(path) / CONFIG_FILE)
    return kind_of(config) if is_published(path) else config.get("kind")


def find(path_or_id: str | Path) -> dict[Kind, Path]:
    """The models of a place, one or both kinds of them; see `resolve`.

    Raises:
        DetailFlowError: if there is none.
    """
    name = str(path_or_id)
    local = isinstance(path_or_id, Path) or os.path.exists(os.path.expanduser(name))
    if not local and is_hub_name(name) and not zoo_model(name):
        path_or_id = fetch(name, [pattern for kind in KINDS for pattern in _patterns(kind)])
    places = {kind: resolve(path_or_id, kind) for kind in KINDS}
    found = {kind: place for kind, place in places.items() if not place.is_dir() or _holds_model(place)}
    if not found:
        read_kind(places["tokenizer"])  # raises
    if len(set(found.values())) == len(found):
        return found
    (place,) = set(found.values())
    kind = read_kind(place)
    if kind not in KINDS:
        raise DetailFlowError(f"{place} holds neither a tokenizer nor an AR model")
    return {kind: place}


def download(repository: str, kind: Kind, revision: str | None = None) -> Path:
    """Return a model's folder in the hub's cache, after its files were fetched there.

    Raises:
        DetailFlowError: if that fails.
    """
    return resolve(fetch(repository, _patterns(kind), revision), kind)


def _patterns(kind: Kind) -> list[str]:
    files = (CONFIG_FILE, *TENSOR_FILES, ARGUMENTS_FILE, f"{CHECKPOINTS}/*.pt")
    return [f"{folder}{file}" for folder in ("", f"{kind}/") for file in files]


def fetch(repository: str, patterns: Sequence[str], revision: str | None = None) -> Path:
    """Return the folder in the hub's cache where a repository's files of these patterns are.

    Raises:
        DetailFlowError: if they cannot be downloaded.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise DetailFlowError(
            f"could not download {repository!r} without the package huggingface_hub: install it, or give a local folder"
        ) from error
    chosen: dict[str, Any] = {} if revision is None else {"revision": revision}
    try:
        directory = Path(snapshot_download(repository, allow_patterns=list(patterns), **chosen))
    except Exception as error:  # connection, name, permission, disk: the hub's client has an exception type for each
        lines = str(error).strip().splitlines()
        reason = lines[0].rstrip(".") if lines else type(error).__name__
        raise DetailFlowError(
            f"could not download {repository!r} from the Hugging Face hub ({reason}): "
            "check the name and the connection, or give a local folder instead"
        ) from error
    if not directory.is_dir():  # what the hub's client returns where no file matches
        raise DetailFlowError(f"{repository!r} on the Hugging Face hub holds no such model")
    return directory


def load(
    path_or_id: str | Path,
    kind: Kind,
    variant: Literal["ema", "model"] = "ema",
    dtype: torch.dtype | None = None,
    revision: str | None = None,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the config and the tensors of a model, in our keys and names whatever its layout, on the CPU.

    No more than the tensors as `dtype` and a small piece of the file are in memory at any time.

    Args:
        path_or_id: as in `resolve`.
        kind: "tokenizer" or "gpt".
        variant: which weights of a published checkpoint, or of one of a training run: "ema" where present, or "model". Our
            layout has one set.
        dtype: of the tensors; `None` is as they are stored.
        revision: as in `resolve`.

    Raises:
        DetailFlowError: if the model cannot be found, is damaged or is of the other kind.
    """
    if variant not in ("ema", "model"):
        raise DetailFlowError(f"variant must be 'ema' or 'model', not {variant!r}")
    path = resolve(path_or_id, kind, revision)
    if _is_unfinished(path):
        checkpoint = checkpoint_of(path)
        config, tensors, step = load_run(checkpoint, kind, variant, dtype)
        _say_step(path, step)
        return config, tensors
    if is_published(path):
        config, tensors = load_published(path, kind, variant, dtype)
        return _with_guidance(config, kind), tensors
    return _read_config(path, kind), read_tensors(path, dtype)


def load_config(path_or_id: str | Path, kind: Kind) -> dict[str, Any]:
    """The config alone of what `load` reads, without its weights.

    Raises:
        DetailFlowError: as `load`.
    """
    path = resolve(path_or_id, kind)
    if _is_unfinished(path):
        return run_config(checkpoint_of(path), kind)
    return _with_guidance(published_config(path, kind), kind) if is_published(path) else _read_config(path, kind)


@cache  # once for each, as some commands load a model more than once
def _say_step(path: Path, step: int) -> None:
    what = "the model of this checkpoint" if path.is_file() else "this training run is not finished: its model"
    logger.warning("%s: %s is as it was at step %d", path, what, step)


def _with_guidance(config: dict[str, Any], kind: Kind) -> dict[str, Any]:
    if kind == "gpt":
        scales = {model.num_tokens: model.guidance_scale for model in ZOO.values()}
        config["guidance_scale"] = scales.get(config["num_tokens"], config["guidance_scale"])
    return config


def _read_config(directory: Path, kind: Kind) -> dict[str, Any]:
    path = directory / CONFIG_FILE
    if kind == "gpt" and not path.exists() and _holds_model(directory / "tokenizer"):
        problem = f"{directory} holds a tokenizer and no AR model"
        if (directory / "tokenizer" / RUN_FILE).exists():
            problem += ", whose training has not begun: repeat the training command to go on"
        raise DetailFlowError(problem)
    config = read_json(path)
    if config.pop("format", None) != "detailflow":
        raise DetailFlowError(f'{path} is no DetailFlow config: it lacks "format": "detailflow"')
    check_kind(directory, config.pop("kind", None), kind)
    config.pop("published", None)  # what `convert` keeps of the published config
    return config


def save(
    directory: str | Path,
    kind: Kind,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    shard_size: str = SHARD_SIZE,
) -> None:
    """Write a model in our layout, making the directory if needed; in shards where it is larger than `shard_size`.

    Each file is replaced at once, the config last: an interrupted first save leaves no model, not half of one.

    Raises:
        DetailFlowError: if the files cannot be written.
    """
    directory = Path(directory)
    text = json.dumps({"format": "detailflow", "kind": kind, **config}, indent=2, ensure_ascii=False)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_tensors(directory, tensors, shard_size)
        with replacing(directory / CONFIG_FILE) as path:
            path.write_text(text + "\n", encoding="utf-8")
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) else None
        raise DetailFlowError(f"could not write the model to {directory}: {reason or error}") from error


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
