"""The published layout, read safely and written, in our config keys and tensor names (docs/method.md#published-layout).

A published model is a folder with `config.json` (constructor arguments), `config.yaml` (training arguments) and
`checkpoints/N.pt`, a pickle of state dicts and training leftovers. Nothing in the pickle is ever executed.
"""

import json
import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from torch import Tensor

from detailflow.errors import DetailFlowError, os_errors
from detailflow.files import LARGEST_YAML, check_utf8, making, read_json, read_text, reading, replacing, sync
from detailflow.labels import default_names
from detailflow.plain_yaml import load_yaml
from detailflow.published_names import tensor_names
from detailflow.tensors import in_pieces, is_weights
from detailflow.torch_files import load_torch, write_torch
from detailflow.words import some_names

Kind = Literal["tokenizer", "gpt"]
Variant = Literal["ema", "model"]
KINDS: tuple[Kind, ...] = ("tokenizer", "gpt")
KIND_NAMES: dict[str, str] = {"tokenizer": "a tokenizer", "gpt": "an AR model (gpt)"}
CONFIG_FILE = "config.json"
ARGUMENTS_FILE = "config.yaml"
CHECKPOINTS = "checkpoints"

# Our config keys and the published ones. What is missing here is in the shapes of the tensors.
KEYS: dict[Kind, dict[str, str]] = {
    "tokenizer": {
        "image_size": "image_size",
        "patch_size": "enc_patch_size",
        "num_tokens": "num_latent_tokens",
        "group_size": "group_size",
        "causal_tokens": "causal_num",
        "codebook_size": "codebook_size",
        "codebook_dim": "codebook_embed_dim",
    },
    "gpt": {
        "num_classes": "num_classes",
        "num_tokens": "block_size",
        "group_size": "group_size",
        "causal_tokens": "causal_num",
        "codebook_size": "vocab_size",
        "heads": "n_head",
    },
}
# Further published keys that are only written, and where their values are in our config.
_WRITTEN: dict[Kind, dict[str, str]] = {
    "tokenizer": {"max_image_size": "image_size", "dec_patch_size": "patch_size"},
    "gpt": {
        "dim": "width",
        "n_layer": "depth",
        "rope_base": "rope_base",
        "token_dropout_p": "dropout",
        "resid_dropout_p": "dropout",
        "ffn_dropout_p": "dropout",
    },
}
# What only training needs: the frozen alignment encoder, its projection and the codebook's usage counter.
_TRAINING_ONLY = ("repa_model.", "global_token_proj.", "quantize.codebook_used")
# Our tensors that are stored with leading dimensions of size 1: how many dimensions they have without, and with them.
_PADDED = {
    "encoder.query_tokens": (2, 3),
    "encoder.refined_tokens": (2, 3),
    "encoder.query_pos_embed": (2, 3),
    "decoder.latent_pos_embed": (2, 3),
    "decoder.mask_token": (1, 3),
}
_LAYERS: dict[Kind, tuple[str, ...]] = {
    "tokenizer": ("encoder.visual_model.encoder.", "decoder.visual_model.encoder."),
    "gpt": ("",),
}
_HEADS = {1152: 16, 768: 12}  # any other width: width / 64

# --- recognising -----------------------------------------------------------------------------------------------------


def is_published(path: Path) -> bool:
    """Return whether a folder has the published layout, or a file is a checkpoint in one.

    A model of ours may have a folder of that name beside it as well: its config has a "format".
    """
    if path.is_file():
        return path.parent.name == CHECKPOINTS
    if not (path / CHECKPOINTS).is_dir():
        return False
    try:
        return "format" not in read_json(path / CONFIG_FILE)
    except DetailFlowError:  # raised again when it is read
        return True


def model_folder(path: Path) -> Path:
    """Return the folder of a model that is given by it, or by one checkpoint in it."""
    return path.parent.parent if path.is_file() else path


def kind_of(config: Mapping[str, Any]) -> Kind | None:
    """Return the kind of model that a published config describes."""
    return "tokenizer" if "num_latent_tokens" in config else "gpt" if "block_size" in config else None


def check_kind(folder: Path, found: Any, wanted: Kind) -> None:
    """Raise a `DetailFlowError` that names both kinds, and the way, if a model is not of the wanted one."""
    if found != wanted:
        name = KIND_NAMES.get(found) if isinstance(found, str) else None
        runs = [run for run in folder.parents if name and folder.is_relative_to(run / found)]
        both = next((run for run in runs if (run / wanted / CONFIG_FILE).is_file()), None)
        way = f"{both}, which holds both" if both else f"{KIND_NAMES[wanted]}, or a folder that holds both"
        held = f"{folder} holds {name or f'a model of kind {found!r}'}, not {KIND_NAMES[wanted]}"
        raise DetailFlowError(f"{held}: give {way}" if name else held)


# --- reading ---------------------------------------------------------------------------------------------------------


def load_published(
    path: Path, kind: Kind, variant: Variant = "ema", dtype: torch.dtype | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a published model into our config keys and tensor names, on the CPU, as `dtype` or as it is stored.

    `path` is a folder, whose checkpoint is the one named after N if there are several, or one checkpoint in it. Only
    the weights of `variant` are brought into memory; "ema" is "model" if there is no "ema".
    """
    config, checkpoint, names = _inspect(path, kind, variant)
    mapped = zipfile.is_zipfile(checkpoint)  # files in torch's old format cannot be memory-mapped
    state = _read_state(checkpoint, variant)
    tensors: dict[str, Tensor] = {}
    for piece in in_pieces({ours: sum(state[name].nbytes for name in theirs) for ours, theirs in names.items()}):
        if mapped:
            state = _read_state(checkpoint, variant)
        tensors |= {ours: _assemble(ours, state, names[ours], checkpoint, dtype) for ours in piece}
    return config, tensors


def has_both_variants(path: Path) -> bool:
    """Return whether a published AR model has averaged weights ("ema") and others ("model")."""
    _, checkpoint, names = _inspect(path, "gpt", "ema")
    stored, first = load_torch(checkpoint, mmap=True), next(iter(names.values()))[0]
    states = [stored.get(variant) for variant in ("model", "ema")]
    raw, averaged = (state.get(first) if isinstance(state, Mapping) else None for state in states)
    if not (isinstance(raw, Tensor) and isinstance(averaged, Tensor) and is_weights(raw) and is_weights(averaged)):
        return False
    return raw.dtype != averaged.dtype or not torch.equal(raw, averaged)


def load_published_config(path: Path, kind: Kind) -> dict[str, Any]:
    """Return the config of what `load_published` reads, without its weights."""
    return _inspect(path, kind, "ema")[0]


def _inspect(path: Path, kind: Kind, variant: Variant) -> tuple[dict[str, Any], Path, dict[str, tuple[str, ...]]]:
    """Return our config, the checkpoint, and our name of each tensor → its names there; no weights are read."""
    folder = model_folder(path)
    config_path = folder / CONFIG_FILE
    theirs = read_json(config_path)
    found = kind_of(theirs)
    if found is None:
        raise DetailFlowError(
            f"{config_path} has neither num_latent_tokens nor block_size, so it is not a published config"
        )
    check_kind(folder, found, kind)
    config: dict[str, Any] = {ours: _integer(theirs, key, config_path) for ours, key in KEYS[kind].items()}
    checkpoint = path if path.is_file() else _find_checkpoint(folder / CHECKPOINTS, config["num_tokens"])
    state = _read_state(checkpoint, variant)
    names = tensor_names(kind, [layer_count(state, prefix) for prefix in _LAYERS[kind]])
    _check_names(state, names, checkpoint)
    shapes = {ours: tuple(state[sources[0]].shape) for ours, sources in names.items()}
    if kind == "tokenizer":
        config |= {half: _vit_sizes(shapes, f"{half}.") for half in ("encoder", "decoder")}
        config["alpha"] = _alpha(folder)
    else:
        depth = sum(name.endswith("mlp.gate.weight") for name in shapes)
        config |= {
            "width": shapes["norm.weight"][0],
            "depth": depth,
            "mlp": shapes["blocks.0.mlp.gate.weight"][0] if depth else 0,
            "dropout": _float(theirs, "token_dropout_p", config_path, 0.1),
            "rope_base": _float(theirs, "rope_base", config_path, 10000.0),
            "class_names": default_names(config["num_classes"]),
            "guidance_scale": 1.5,
            "guidance_schedule": "constant",
            "temperature": 1.0,
            "top_k": None,
            "top_p": None,
        }
    return config, checkpoint, names


def _integer(config: Mapping[str, Any], key: str, path: Path) -> int:
    if key not in config:
        raise DetailFlowError(f"{path} lacks {key!r}, which every published DetailFlow config of its kind has")
    value = config[key]
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise DetailFlowError(f"{key} in {path} must be a positive integer, not {value!r}")
    return value


def _float(config: Mapping[str, Any], key: str, path: Path, default: float) -> float:
    value = config.get(key, default)
    try:
        if not isinstance(value, bool) and isinstance(value, int | float):
            return float(value)
    except OverflowError:
        pass
    raise DetailFlowError(f"{key} in {path} must be a number, not {value!r}")


def _vit_sizes(shapes: Mapping[str, tuple[int, ...]], prefix: str) -> dict[str, int]:
    width = shapes[f"{prefix}norm.weight"][0]
    depth = sum(name.startswith(f"{prefix}blocks.") and name.endswith("fc1.weight") for name in shapes)
    mlp = shapes[f"{prefix}blocks.0.mlp.fc1.weight"][0] if depth else 0
    return {"width": width, "depth": depth, "heads": heads_of(width), "mlp": mlp}


def heads_of(width: int) -> int:
    """Return the attention heads of a published transformer of that width, which no tensor's shape tells."""
    return _HEADS.get(width, max(1, width // 64))


def layer_count(state: Mapping[str, object], prefix: str) -> int:
    """Return the number of layers; gaps in their numbers then show as missing tensors."""
    layer = re.compile(re.escape(prefix) + r"layers\.(\d+)\.")
    return len({match[1] for match in map(layer.match, state) if match})


def _alpha(folder: Path) -> float:
    """Return α as trained; 1.5 if the training arguments do not say."""
    path = folder / ARGUMENTS_FILE
    try:
        arguments = load_yaml(read_arguments(folder) or "{}")
    except yaml.YAMLError as error:
        raise DetailFlowError(f"{path} is not valid YAML of plain values: {' '.join(str(error).split())}") from error
    if not isinstance(arguments, dict):
        raise DetailFlowError(f"{path} must hold the training arguments as 'name: value' lines")
    return _float(arguments, "degradation_power", path, 1.5)


def read_arguments(folder: Path) -> str:
    """Return the text of a published model's training arguments, empty if it has none."""
    path = folder / ARGUMENTS_FILE
    if not path.exists():
        return ""
    try:
        with reading(path):
            return read_text(path, LARGEST_YAML)
    except UnicodeDecodeError as error:
        raise DetailFlowError(f"{path} is not valid YAML of plain values: {error}") from error


def _find_checkpoint(folder: Path, num_tokens: int) -> Path:
    found = sorted(folder.glob("*.pt"))
    named = [path for path in found if path.stem == str(num_tokens)]
    if not found:
        raise DetailFlowError(f"{folder} has no checkpoint: expected {num_tokens}.pt there")
    if len(found) > 1 and not named:
        names = ", ".join(path.name for path in found)
        raise DetailFlowError(
            f"{folder} has several checkpoints ({names}) but no {num_tokens}.pt: give one of them by its path"
        )
    return named[0] if named else found[0]


def _read_state(path: Path, variant: Variant) -> dict[str, Tensor]:
    """Return the state dict of one variant, memory-mapped."""
    checkpoint = load_torch(path, mmap=True)
    variants = checkpoint if isinstance(checkpoint, dict) else {}
    state = variants.get("model")
    if variant == "ema" and variants.get("ema") not in (None, {}):
        state = variants["ema"]
    if not isinstance(state, dict) or not state:
        raise DetailFlowError(f"{path} holds no model weights: expected a state dict under 'model'")
    for name, tensor in state.items():
        unused = str(name).startswith(_TRAINING_ONLY) and isinstance(tensor, Tensor)
        if not unused and not (is_weights(tensor) and tensor.ndim > 0):
            raise DetailFlowError(f"{name!s} in {path} is not a tensor of floating-point weights")
    return {str(name): tensor for name, tensor in state.items()}


def _check_names(state: Mapping[str, Tensor], names: Mapping[str, tuple[str, ...]], path: Path) -> None:
    wanted = {theirs for sources in names.values() for theirs in sources}
    present = {name for name in state if not name.startswith(_TRAINING_ONLY)}
    for what, difference in (("lacks", wanted - present), ("has the unexpected", present - wanted)):
        if difference:
            raise DetailFlowError(
                f"{path} is not a published DetailFlow checkpoint of this kind: it {what} {some_names(difference)}"
            )


def _assemble(
    ours: str, state: Mapping[str, Tensor], sources: tuple[str, ...], path: Path, dtype: torch.dtype | None
) -> Tensor:
    """Return a copy, as `dtype` or as they are stored, of one of our tensors from the published ones stacked in it."""
    parts = [state[theirs].detach() for theirs in sources]
    if any(part.shape != parts[0].shape or part.dtype != parts[0].dtype for part in parts):
        shapes = ", ".join(f"{theirs} {tuple(state[theirs].shape)}" for theirs in sources)
        raise DetailFlowError(f"{path} holds tensors of a wrong shape or type: {shapes}")
    # In the wanted type at once: memory that is freed between tensors that stay is hard to use again.
    tensor = parts[0].new_empty((len(parts), *parts[0].shape), dtype=dtype)
    for own, part in zip(tensor, parts, strict=True):
        own.copy_(part)
    tensor = tensor.flatten(0, 1)
    while tensor.ndim > _PADDED.get(ours, (tensor.ndim,))[0] and tensor.shape[0] == 1:
        tensor = tensor[0]
    return tensor


# --- writing ---------------------------------------------------------------------------------------------------------


@contextmanager
def saving_published(
    folder: Path,
    kind: Kind,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    origin: Mapping[str, Any] | None = None,
) -> Iterator[None]:
    """Write a model, in our keys and names, in the published layout; as `hub.saving` does, the config last.

    `origin` is the published "config" and "arguments" of a model that had them; else they are made from ours.
    """
    depths = [config["depth"]] if kind == "gpt" else [config[half]["depth"] for half in ("encoder", "decoder")]
    state: dict[str, Tensor] = {}
    for ours, theirs in tensor_names(kind, depths).items():
        tensor = tensors[ours]
        while tensor.ndim < _PADDED.get(ours, (0, 0))[1]:
            tensor = tensor[None]
        state |= zip(theirs, tensor.chunk(len(theirs)), strict=True)
    origin = origin or _to_published(kind, config)
    checkpoint = {"model": state, "ema": state} if kind == "gpt" else {"model": state}
    texts = {CONFIG_FILE: json.dumps(origin["config"], indent=4) + "\n", ARGUMENTS_FILE: origin["arguments"]}
    with (
        os_errors(f"could not write the model to {folder}"),
        making(folder),
        making(folder / CHECKPOINTS),
        ExitStack() as stack,  # which puts the files in place in the opposite order
    ):
        check_utf8(folder)
        for name, text in texts.items():
            path = stack.enter_context(replacing(folder / name))
            path.write_text(text, encoding="utf-8")
            sync(path)
        path = stack.enter_context(replacing(folder / CHECKPOINTS / f"{config['num_tokens']}.pt"))
        write_torch(path, checkpoint)
        sync(path)
        yield


def _to_published(kind: Kind, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the published keys and arguments of a model that never was in that layout, if it can be."""
    impossible = {
        "causal_tokens of 0": not config["causal_tokens"],
        "an encoder without a causal mask": not config.get("causal_encoder", True),
        "a linear path": config.get("linear_path", False),
        "pixel_channels above 3": config.get("pixel_channels", 3) > 3,
        "an absent token": config.get("absent_token", False),
        "no classes": config.get("num_classes") == 0,
    }
    if what := next((name for name, present in impossible.items() if present), None):
        raise DetailFlowError(f"the published layout cannot hold a model with {what}: keep it in ours")
    for half in ("encoder", "decoder") if kind == "tokenizer" else ():
        width, heads = config[half]["width"], config[half]["heads"]
        if heads != heads_of(width):
            raise DetailFlowError(
                f"the published layout cannot hold this tokenizer: there, width {width} means {heads_of(width)} heads, "
                f"and this {half} has {heads}"
            )
    keys = {theirs: config[ours] for ours, theirs in KEYS[kind].items()}
    keys |= {theirs: config[ours] for theirs, ours in _WRITTEN[kind].items()}
    arguments = "gpt_type: c2i\n" if kind == "gpt" else f"degradation_power: {config['alpha']}\n"
    return {"config": keys, "arguments": arguments}
