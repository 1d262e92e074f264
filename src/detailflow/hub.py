"""Model folders: found, downloaded, read, written and uploaded. Knows no model class.

Our layout is a folder with `config.json` ("format": "detailflow", "kind", then the model's own keys) and
`model.safetensors`, or its shards. `published.py` translates the published layout, `runs.py` reads the models of
training runs.
"""

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from detailflow import hub_client
from detailflow.errors import DetailFlowError, os_errors
from detailflow.files import making, read_json, reading, replacing, similar, sync
from detailflow.hub_client import HUB, is_hub_name
from detailflow.published import (
    ARGUMENTS_FILE,
    CHECKPOINTS,
    CONFIG_FILE,
    KIND_NAMES,
    KINDS,
    Kind,
    Variant,
    check_kind,
    is_published,
    kind_of,
    load_published,
    load_published_config,
    model_folder,
)
from detailflow.runs import RUN_FILE, checkpoint_of, is_checkpoint, is_run, load_run, run_config, run_kind
from detailflow.settings import checked
from detailflow.tensors import SHARD_SIZE, TENSOR_FILES, check_finite, read_tensors, writing_tensors
from detailflow.words import unknown

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PublishedPair:
    """A published pair of models: hub ids, sequence length N and best guidance scale (docs/method.md#sampling)."""

    tokenizer: str
    gpt: str
    num_tokens: int
    guidance_scale: float


ZOO = {
    "detailflow-16": PublishedPair("ByteFlow-AI/DetailFlow-16", "ByteFlow-AI/DetailFlow-16-GPT-L", 128, 1.45),
    "detailflow-32": PublishedPair("ByteFlow-AI/DetailFlow-32", "ByteFlow-AI/DetailFlow-32-GPT-L", 256, 1.5),
    "detailflow-64": PublishedPair("ByteFlow-AI/DetailFlow-64", "ByteFlow-AI/DetailFlow-64-GPT-L", 512, 1.32),
}

SHIPPED = "shipped"  # the model in the package that is meant if none is named
PACKAGED = (SHIPPED, "emoji-64")  # the models in the package
MODEL_FILES = (CONFIG_FILE, *TENSOR_FILES, ARGUMENTS_FILE, f"{CHECKPOINTS}/*.pt")  # as patterns
GPT_SUFFIX = "-GPT-L"  # of a published AR model's name, after that of its tokenizer


def zoo_model(name: str | Path) -> PublishedPair | None:
    """Return the published pair that a short name, or the hub id of either half, stands for; a path goes first."""
    return None if os.path.exists(name) else _published_pair(str(name).partition("@")[0])  # of any revision


def _published_pair(name: str) -> PublishedPair | None:
    return next((model for short, model in ZOO.items() if name in (short, model.tokenizer, model.gpt)), None)


def packaged_folder(kind: Kind, name: str = SHIPPED) -> Path:
    """Return the folder of a model in the package."""
    return Path(__file__).parent / "weights" / name / kind


# --- finding ---------------------------------------------------------------------------------------------------------


def resolve(path_or_id: str | Path | None, kind: Kind, revision: str | None = None, weights: bool = True) -> Path:
    """Return the local folder of a model, or one checkpoint file in it.

    An existing folder comes first; models on the hub are downloaded into the hub's cache.

    Args:
        path_or_id: a folder, one with tokenizer/ and gpt/ or any two such folders inside, a checkpoint of the published
            layout (FOLDER/checkpoints/NAME.pt), the folder of a training run that is not finished, one of a run's
            checkpoints (step-….pt), a short name in `ZOO` or a hub id (owner/name), also as NAME@REVISION. Either half
            of a published pair stands for both, on the hub and as a folder X beside X-GPT-L. A model in
            the package goes by its name in `PACKAGED`; `None` is the first of them.
        revision: a branch, tag or commit on the hub; `None` is the newest.
        weights: whether to download them, too, where the config says all without.
    """
    if path_or_id is None or (path_or_id in PACKAGED and not os.path.lexists(path_or_id)):
        path_or_id = packaged_folder(kind, str(path_or_id or SHIPPED))
    name = str(path_or_id)
    path = Path(os.path.expanduser(name))
    if revision is None and isinstance(path_or_id, str):
        name, revision = split_revision(name)
        path_or_id = name
    elif revision is not None and os.path.lexists(path):
        raise DetailFlowError(f"{name} is on this machine, and only models on the hub have a revision: leave it out")
    if name and os.path.isdir(path):  # os.path, which takes an impossible name for a missing one
        return _nested(path, kind)
    if os.path.isfile(path):
        if is_checkpoint(path) or (path.suffix == ".pt" and is_published(path.absolute())):
            return path.absolute()
        raise DetailFlowError(f"{name} is a file: give the folder that holds {CONFIG_FILE} and the weights")
    if isinstance(path_or_id, str):
        pair = _published_pair(name)
        if pair or is_hub_name(name):
            if pair is None:
                return resolve(_fetch_models(name, [kind], revision, weights), kind)
            return resolve(
                hub_client.fetch(getattr(pair, kind), _patterns([kind]), revision, _both_of(pair, name)), kind
            )
    if name and os.path.lexists(path):
        raise DetailFlowError(f"{name} is no folder: give one that holds {CONFIG_FILE} and the weights")
    if "/" in name or isinstance(path_or_id, Path):
        raise DetailFlowError("; ".join(filter(None, (f"there is no such folder: {name}", similar(name)))))
    otherwise = f"give a folder, a hub name (owner/name) or one of {', '.join((*ZOO, *PACKAGED))}"
    raise DetailFlowError(unknown("model", name, (*ZOO, *PACKAGED), similar(name) or otherwise))


def split_revision(name: str) -> tuple[str, str | None]:
    """Split "owner/name@revision" into its parts, unless it is the name of a local file or folder.

    >>> split_revision("detailflow-16@v1"), split_revision("detailflow-16")
    (('detailflow-16', 'v1'), ('detailflow-16', None))
    """
    model, _, revision = name.partition("@")
    if not revision or os.path.lexists(os.path.expanduser(name)) or not (is_hub_name(model) or model in ZOO):
        return name, None
    return model, revision


def find(path_or_id: str | Path) -> dict[Kind, Path]:
    """Return the folder of each kind of model, one or both, that `path_or_id` has; see `resolve`."""
    name, revision = split_revision(str(path_or_id))
    local = isinstance(path_or_id, Path) or (revision is None and os.path.exists(os.path.expanduser(name)))
    if not local and is_hub_name(name) and not _published_pair(name):
        path_or_id = _fetch_models(name, KINDS, revision)
    own = Path(os.path.expanduser(name))  # a folder that is a model is that model alone
    alone = local and os.path.isdir(own) and _holds_model(own)
    paths = {kind: own if alone else resolve(path_or_id, kind) for kind in KINDS}
    found = {kind: path for kind, path in paths.items() if not path.is_dir() or _holds_model(path)}
    if not found:
        read_kind(paths["tokenizer"])  # raises
    if len(set(found.values())) == len(found):
        return found
    (path,) = set(found.values())
    kind = read_kind(path)
    if kind not in KINDS:
        raise DetailFlowError(f"{path} holds neither a tokenizer nor an AR model")
    return {kind: path}


def read_kind(path: Path) -> Any:
    """Return the kind that a model's config states, or `None`."""
    if _is_unfinished(path):
        return run_kind(path)
    config = read_json(model_folder(path) / CONFIG_FILE)
    return kind_of(config) if is_published(path) else config.get("kind")


def _nested(folder: Path, kind: Kind) -> Path:
    """Return the folder itself, or its other half, if it holds a model; else the one inside of that kind."""
    if _holds_model(folder):
        other = _other_half(folder, kind)
        return folder if other is None or _is_of(folder, kind) else other
    found: list[Path] = []
    with reading(folder):
        children = sorted(folder.iterdir())
        if os.path.isdir(named := folder / kind):  # goes before others, but for published ones, whose pair may be meant
            found, children = [named], [child for child in children if child != named and is_published(child)]
        found += [child for child in children if _holds_model(child) and _is_of(child, kind)]
    if len(found) > 1:
        names = ", ".join(child.name for child in found)
        paired = next((child for child in found if _other_half(child, "gpt") or _other_half(child, "tokenizer")), None)
        way = (
            f", such as {paired}; its other half is found beside it by name"
            if paired
            else " AR model, and its tokenizer"
        )
        raise DetailFlowError(f"{folder} holds several models of that kind ({names}): give one{way}")
    return found[0] if found else folder


def _other_half(folder: Path, kind: Kind) -> Path | None:
    """Return the folder beside a published model that has its other half, if it is named as on the hub."""
    folder = Path(os.path.abspath(folder)) if folder.name in ("", "..") else folder
    if kind == "gpt":
        other = folder.with_name(folder.name + GPT_SUFFIX)
    elif folder.name.endswith(GPT_SUFFIX) and folder.name != GPT_SUFFIX:
        other = folder.with_name(folder.name.removesuffix(GPT_SUFFIX))
    else:
        return None
    return other if _holds_model(other) and _is_of(other, kind) else None


def _is_of(folder: Path, kind: Kind) -> bool:
    """Return whether a folder's config can be read and says that it holds a model of this kind."""
    with suppress(DetailFlowError):
        return bool(read_kind(folder) == kind)
    return False


def _holds_model(folder: Path) -> bool:
    """Return whether a folder holds a model itself, also that of a training run that is not finished."""
    return os.path.isfile(folder / CONFIG_FILE) or is_run(folder)


def _is_unfinished(path: Path) -> bool:
    """Return whether a resolved path is a training run that is not finished, or a checkpoint of a run."""
    return not is_published(path) and (is_checkpoint(path) or (not os.path.exists(path / CONFIG_FILE) and is_run(path)))


# --- the hub ---------------------------------------------------------------------------------------------------------


def _patterns(kinds: Sequence[Kind], files: Sequence[str] = MODEL_FILES) -> list[str]:
    return [f"{folder}{file}" for folder in ("", *(f"{kind}/" for kind in kinds)) for file in files]


def _fetch_models(repository: str, kinds: Sequence[Kind], revision: str | None, weights: bool = True) -> Path:
    """Download the models of these kinds; the configs first, as a repository by a wrong name may be of any size."""
    names = _patterns(kinds, [CONFIG_FILE])
    folder = hub_client.fetch(repository, names, revision)
    configs = [read_json(path) for name in names if (path := folder / name).exists()]
    published = any(kind_of(config) for config in configs)
    if not published and not any(config.get("format") == "detailflow" for config in configs):
        raise DetailFlowError(f"{repository!r} on the Hugging Face hub holds no DetailFlow model")
    complete = not weights and not published  # whose sizes are in its weights
    return folder if complete else hub_client.fetch(repository, _patterns(kinds), revision)


def _both_of(pair: PublishedPair, name: str) -> str:
    """Return what to do if a half of a published pair cannot be downloaded."""
    both = f"{HUB}/{pair.tokenizer} and {HUB}/{pair.gpt}"
    return (
        f"{name} is not a local folder, and stands for two repositories, {both}: "
        "check the connection, or give a local folder that holds copies of both"
    )


# --- reading and writing ---------------------------------------------------------------------------------------------


def load(
    path_or_id: str | Path | None,
    kind: Kind,
    variant: Variant = "ema",
    dtype: torch.dtype | None = None,
    revision: str | None = None,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return a model's config and tensors, in our keys and names whatever its layout, on the CPU.

    No more than the tensors as `dtype` and a small piece of the file are in memory at any time.

    Args:
        path_or_id: as in `resolve`.
        kind: "tokenizer" or "gpt".
        variant: which weights of a published checkpoint or of a run's checkpoint: "ema" if present, or "model". Our
            layout has one set.
        dtype: of the tensors; `None` is as they are stored.
        revision: as in `resolve`.
    """
    if variant not in ("ema", "model"):
        raise DetailFlowError(f"variant must be 'ema' or 'model', not {variant!r}")
    path = resolve(path_or_id, kind, revision)
    if _is_unfinished(path):
        config, tensors, step = load_run(checkpoint_of(path), kind, variant, dtype)
        _log_step(path, step)
        return config, tensors
    if variant == "model" and kind == "gpt" and is_run(path):
        checkpoints = "its checkpoints in resume/ have the others"
        raise DetailFlowError(f"{path} is a finished training run, whose model has the averaged weights: {checkpoints}")
    if is_published(path):
        config, tensors = load_published(path, kind, variant, dtype)
        return _with_guidance(config, kind), tensors
    return _read_config(path, kind), read_tensors(path, dtype)


def load_config(path_or_id: str | Path | None, kind: Kind) -> dict[str, Any]:
    """Return the config of what `load` reads, without its weights."""
    path = resolve(path_or_id, kind, weights=False)
    if _is_unfinished(path):
        return run_config(checkpoint_of(path), kind)
    return _with_guidance(load_published_config(path, kind), kind) if is_published(path) else _read_config(path, kind)


@cache  # once for each, as some commands load a model more than once
def _log_step(path: Path, step: int) -> None:
    what = "the model of this checkpoint" if path.is_file() else "this training run is not finished: its model"
    logger.warning("%s: %s is as it was at step %d", path, what, step)


def _with_guidance(config: dict[str, Any], kind: Kind) -> dict[str, Any]:
    if kind == "gpt":
        scales = {model.num_tokens: model.guidance_scale for model in ZOO.values()}
        config["guidance_scale"] = scales.get(config["num_tokens"], config["guidance_scale"])
    return config


def _read_config(folder: Path, kind: Kind) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    if kind == "gpt" and not path.exists() and _holds_model(folder / "tokenizer"):
        problem = f"{folder} holds a tokenizer and no AR model"
        if (folder / "tokenizer" / RUN_FILE).exists():
            problem += ", whose training has not begun: repeat the training command to go on"
        raise DetailFlowError(problem)
    config = read_json(path)
    if config.pop("format", None) != "detailflow":
        raise DetailFlowError(
            f'{path} is not a DetailFlow config: it lacks "format": "detailflow", '
            "so give another model, or get it again"
        )
    check_kind(folder, config.pop("kind", None), kind)
    config.pop("published", None)  # what `convert` keeps of the published config
    return config


def targets(folder: str | Path, kinds: Sequence[Kind], to: str = "detailflow") -> dict[Kind, Path]:
    """Return the folder to write each model to, after checking that nothing would be lost or hidden there."""
    output = Path(checked("folder", folder, Path))
    if len(kinds) > 1 and (output / CONFIG_FILE).exists():
        raise DetailFlowError(
            f"{output} already holds a model, which would hide a pair inside: give another output folder"
        )
    if len(kinds) == 1 and any((output / kind / CONFIG_FILE).exists() for kind in KINDS):
        (kind,) = kinds
        raise DetailFlowError(
            f"{output} holds a pair of models, which another would hide: give {output / kind} or another folder"
        )
    found = {kind: output / kind if len(kinds) > 1 else output for kind in kinds}
    for kind, target in found.items():
        _check_target(target, kind, to)
    return found


def _check_target(target: Path, kind: Kind, to: str) -> None:
    """Refuse a folder with a model of another kind or layout, or with a training run, finished or not."""
    taken, published = (target / CONFIG_FILE).exists(), is_published(target)
    if is_run(target):
        raise DetailFlowError(f"{target} holds a training run, whose model this would replace: give another folder")
    if (published and to != "published") or (taken and not published and to == "published"):
        raise DetailFlowError(f"{target} already holds a model in the other layout: give another output folder")
    if taken and (found := read_kind(target)) != kind:
        held = KIND_NAMES.get(str(found), f"a model of kind {found!r}")
        raise DetailFlowError(f"{target} holds {held}, not {KIND_NAMES[kind]}: give another output folder")


def save(folder: Path, kind: Kind, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write a model in our layout."""
    with saving(folder, kind, config, tensors):
        pass


@contextmanager
def saving(
    folder: Path,
    kind: Kind,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    shard_size: str = SHARD_SIZE,
) -> Iterator[None]:
    """Write a model in our layout, in shards if it is larger than `shard_size`.

    All files are written at the start of the context and put in place at its end, or vanish on an error: in nested
    contexts, all models are written or none. The config comes last: an interrupted first save leaves no model, not half
    of one.
    """
    check_finite(tensors, f"no model is written to {folder}")
    text = json.dumps({"format": "detailflow", "kind": kind, **config}, indent=2, ensure_ascii=False)
    try:
        with (
            os_errors(f"could not write the model to {folder}"),
            making(folder),
            replacing(folder / CONFIG_FILE) as path,
            writing_tensors(folder, tensors, shard_size),
        ):
            path.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")  # JSON has halves of pairs so
            sync(path)
            yield
    except SafetensorError as error:
        raise DetailFlowError(f"could not write the model to {folder}: {error}") from error


def fingerprint(config: Mapping[str, Any], tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> str:
    """Return the SHA-256, in hex, of the config and every tensor's name, type, shape and bytes, in any order.

    It is the same after saving and loading. `dtype` is what they count as; `None` is as they are.
    """
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().to("cpu", dtype).contiguous()
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
