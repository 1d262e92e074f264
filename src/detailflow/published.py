"""The published checkpoint layout (method §9), read safely and in our config keys and tensor names. Knows no network.

A published model is a directory with `config.json` (constructor arguments), `config.yaml` (training arguments) and
`checkpoints/N.pt`, a pickle of state dicts and training leftovers. Nothing in the pickle is ever executed.
"""

import argparse
import json
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from torch import Tensor

from detailflow.errors import DetailFlowError

Kind = Literal["tokenizer", "gpt"]
KIND_NAMES: dict[str, str] = {"tokenizer": "a tokenizer", "gpt": "an AR model (gpt)"}

# What only training needs: the frozen alignment encoder, its projection and the codebook's usage counter.
_TRAINING_ONLY = ("repa_model.", "global_token_proj.", "quantize.codebook_used")
# Our tensors that are stored with extra leading dimensions of size 1, and how many dimensions they have without.
_PADDED = {
    "encoder.query_tokens": 2,
    "encoder.refined_tokens": 2,
    "encoder.query_pos_embed": 2,
    "decoder.latent_pos_embed": 2,
    "decoder.mask_token": 1,
}
_HEADS = {1152: 16, 768: 12}  # any other width: width / 64
_REFUSED_GLOBAL = re.compile(r"(?:unsupported GLOBAL|Unsupported global: GLOBAL) (\S+)")


def is_published(directory: Path) -> bool:
    """Whether the directory has the published layout."""
    return (directory / "checkpoints").is_dir()


def load_published(
    directory: Path, kind: Kind, variant: Literal["ema", "model"] = "ema"
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a published model into our config keys and our tensor names, on the CPU.

    Only the chosen weights are brought into memory: `variant` "ema" where present, else "model".

    Raises:
        DetailFlowError: if a file is missing, damaged or unsafe, or does not hold a model of that kind.
    """
    path = directory / "config.json"
    config = read_config(path)
    found = "tokenizer" if "num_latent_tokens" in config else "gpt" if "block_size" in config else None
    if found is None:
        raise DetailFlowError(f"{path} has neither num_latent_tokens nor block_size, so it is no published config")
    check_kind(directory, found, kind)
    num_tokens = _integer(config, "num_latent_tokens" if kind == "tokenizer" else "block_size", path)
    checkpoint = _find_checkpoint(directory / "checkpoints", num_tokens)
    state = _read_state(checkpoint, variant)
    if kind == "tokenizer":
        depths = [_depth(state, f"{half}.visual_model.encoder.") for half in ("encoder", "decoder")]
        tensors = _translate(state, dict(_tokenizer_names(*depths)), checkpoint)
        alpha = _degradation_power(directory / "config.yaml")
        return _tokenizer_config(config, path, tensors, num_tokens, alpha), tensors
    tensors = _translate(state, dict(_gpt_names(_depth(state, ""))), checkpoint)
    return _gpt_config(config, path, tensors, num_tokens), tensors


def read_config(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        DetailFlowError: if the file is missing or holds anything else.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DetailFlowError(
            f"{path.parent} has no {path.name}: expected a model folder, or one with tokenizer/ and gpt/ inside"
        ) from None
    except OSError as error:
        raise DetailFlowError(f"could not read {path}: {error.strerror}") from error
    except json.JSONDecodeError as error:
        raise DetailFlowError(f"{path} is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}") from error
    except (UnicodeDecodeError, RecursionError) as error:
        raise DetailFlowError(f"{path} is not valid JSON: it must be UTF-8 text with one object") from error
    if not isinstance(config, dict):
        raise DetailFlowError(f"{path} must hold a JSON object, not a {type(config).__name__}")
    return config


def check_kind(directory: Path, found: Any, wanted: Kind) -> None:
    """Raise a `DetailFlowError` that names both kinds where a model is not of the wanted one."""
    if found != wanted:
        name = KIND_NAMES.get(found) if isinstance(found, str) else None
        raise DetailFlowError(f"{directory} holds {name or f'a model of kind {found!r}'}, not {KIND_NAMES[wanted]}")


def _integer(config: Mapping[str, Any], key: str, path: Path) -> int:
    if key not in config:
        raise DetailFlowError(f"{path} lacks {key!r}, which every published DetailFlow config of its kind has")
    value = config[key]
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise DetailFlowError(f"{key} in {path} must be a positive integer, not {value!r}")
    return value


def _float(config: Mapping[str, Any], key: str, path: Path, default: float) -> float:
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise DetailFlowError(f"{key} in {path} must be a number, not {value!r}")
    return float(value)


def _find_checkpoint(folder: Path, num_tokens: int) -> Path:
    found = sorted(folder.glob("*.pt"))
    named = [path for path in found if path.stem == str(num_tokens)]
    if not found:
        raise DetailFlowError(f"{folder} has no checkpoint: expected {num_tokens}.pt there")
    if len(found) > 1 and not named:
        names = ", ".join(path.name for path in found)
        raise DetailFlowError(f"{folder} has several checkpoints ({names}) but no {num_tokens}.pt: keep one")
    return named[0] if named else found[0]


def _read_state(path: Path, variant: str) -> dict[str, Tensor]:
    """The state dict of one variant, memory-mapped."""
    checkpoint = _read_pickle(path)
    state = checkpoint.get("model") if isinstance(checkpoint, dict) else None
    if variant == "ema" and isinstance(checkpoint, dict) and checkpoint.get("ema"):
        state = checkpoint["ema"]
    if not isinstance(state, dict) or not state:
        raise DetailFlowError(f"{path} holds no model weights: expected a state dict under 'model'")
    for name, tensor in state.items():
        dense = isinstance(tensor, Tensor) and tensor.layout == torch.strided and tensor.device.type == "cpu"
        if not dense or not (tensor.is_floating_point() or str(name).startswith(_TRAINING_ONLY)):
            raise DetailFlowError(f"{name!s} in {path} is no tensor of floating-point weights")
    return {str(name): tensor for name, tensor in state.items()}


def _read_pickle(path: Path) -> Any:
    """Unpickle tensors, plain containers and `argparse.Namespace`, which unpickles into attributes and runs nothing."""
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")  # about pickle protocols; what matters ends in an exception
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except OSError as error:
        raise DetailFlowError(f"could not read {path}: {error.strerror or error}") from error
    except Exception as error:  # damaged bytes surface as nearly any exception, depending on where the damage is
        refused = _REFUSED_GLOBAL.search(str(error))
        if refused:
            raise DetailFlowError(
                f"refused to load {path}: it asks for {refused[1]}, which a checkpoint of plain weights does not need; "
                "nothing was executed"
            ) from error
        raise DetailFlowError(
            f"could not read {path}: it is damaged, incomplete or no PyTorch checkpoint, so fetch it again"
        ) from error


def _depth(state: Mapping[str, Tensor], prefix: str) -> int:
    """The number of layers; gaps in their numbering then show as missing tensors."""
    layer = re.compile(re.escape(prefix) + r"layers\.(\d+)\.")
    return len({match[1] for match in map(layer.match, state) if match})


def _affine(ours: str, *theirs: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    for part in ("weight", "bias"):
        yield f"{ours}.{part}", tuple(f"{name}.{part}" for name in theirs)


def _tokenizer_names(encoder_depth: int, decoder_depth: int) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Our name of each tensor → the published ones that are stacked to make it."""
    yield "encoder.query_tokens", ("encoder.latent_tokens",)
    yield "encoder.refined_tokens", ("encoder.refined_tokens",)
    yield "encoder.query_pos_embed", ("encoder.latent_pos_embed",)
    yield from _affine("encoder.patch_embed", "encoder.visual_model.embeddings.patch_embedding")
    yield from _affine("encoder.refine", "refine_conv")
    yield from _affine("quantizer.project", "quant_conv")
    yield "quantizer.codebook", ("quantize.embedding.weight",)
    yield from _affine("decoder.project", "post_quant_conv")
    yield "decoder.latent_pos_embed", ("decoder.latent_pos_embed",)
    yield "decoder.mask_token", ("decoder.mask_token",)
    yield from _affine("decoder.to_pixels", "decoder.to_pixel.model")
    for half, depth in (("encoder", encoder_depth), ("decoder", decoder_depth)):
        yield f"{half}.pos_embed", (f"{half}.visual_model.embeddings.position_embedding.weight",)
        yield from _affine(f"{half}.norm", f"{half}.visual_model.post_layernorm")
        for i in range(depth):
            ours, theirs = f"{half}.blocks.{i}", f"{half}.visual_model.encoder.layers.{i}"
            yield from _affine(f"{ours}.norm1", f"{theirs}.layer_norm1")
            yield from _affine(f"{ours}.attn.qkv", *(f"{theirs}.self_attn.{x}_proj" for x in "qkv"))
            yield from _affine(f"{ours}.attn.proj", f"{theirs}.self_attn.out_proj")
            yield from _affine(f"{ours}.norm2", f"{theirs}.layer_norm2")
            yield from _affine(f"{ours}.mlp.fc1", f"{theirs}.mlp.fc1")
            yield from _affine(f"{ours}.mlp.fc2", f"{theirs}.mlp.fc2")


def _gpt_names(depth: int) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Our name of each tensor → the published one, as a tuple of one."""
    yield "class_embedding.weight", ("cls_embedding.embedding_table.weight",)
    yield "token_embedding.weight", ("tok_embeddings.weight",)
    yield "mask_embedding.weight", ("spe_tok_embeddings.special_embeddings.weight",)
    yield "norm.weight", ("norm.weight",)
    yield "head.weight", ("output.weight",)
    parts = {
        "attn_norm": "attention_norm",
        "attn.qkv": "attention.wqkv",
        "attn.proj": "attention.wo",
        "mlp_norm": "ffn_norm",
        "mlp.gate": "feed_forward.w1",
        "mlp.up": "feed_forward.w3",
        "mlp.down": "feed_forward.w2",
    }
    for i in range(depth):
        for ours, theirs in parts.items():
            yield f"blocks.{i}.{ours}.weight", (f"layers.{i}.{theirs}.weight",)


def _translate(state: Mapping[str, Tensor], names: Mapping[str, tuple[str, ...]], path: Path) -> dict[str, Tensor]:
    """Copies of the named tensors, off the memory map, under our names."""
    wanted = {theirs for sources in names.values() for theirs in sources}
    present = {name for name in state if not name.startswith(_TRAINING_ONLY)}
    for what, difference in (("lacks", wanted - present), ("has the unexpected", present - wanted)):
        if difference:
            first = ", ".join(sorted(difference)[:3])
            more = f" and {len(difference) - 3} more" if len(difference) > 3 else ""
            raise DetailFlowError(f"{path} is no published DetailFlow checkpoint of this kind: it {what} {first}{more}")
    tensors = {}
    for ours, sources in names.items():
        parts = [state[theirs].detach() for theirs in sources]
        if any(part.shape != parts[0].shape or part.dtype != parts[0].dtype for part in parts) or parts[0].ndim == 0:
            shapes = ", ".join(f"{theirs} {tuple(state[theirs].shape)}" for theirs in sources)
            raise DetailFlowError(f"{path} holds tensors of a wrong shape or type: {shapes}")
        tensor = torch.cat(parts)
        while tensor.ndim > _PADDED.get(ours, tensor.ndim) and tensor.shape[0] == 1:
            tensor = tensor[0]
        tensors[ours] = tensor
    return tensors


def _degradation_power(path: Path) -> float:
    """α as trained; 1.5 where the training arguments do not say."""
    try:
        arguments = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return 1.5
    except OSError as error:
        raise DetailFlowError(f"could not read {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise DetailFlowError(f"{path} is not valid YAML of plain values: {' '.join(str(error).split())}") from error
    if not isinstance(arguments, dict):
        raise DetailFlowError(f"{path} must hold the training arguments as 'name: value' lines")
    return _float(arguments, "degradation_power", path, 1.5)


def _tower(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, int]:
    """Sizes of the encoder or decoder from its tensors' shapes."""
    width = tensors[f"{prefix}norm.weight"].shape[0]
    depth = sum(name.startswith(f"{prefix}blocks.") and name.endswith("fc1.weight") for name in tensors)
    mlp = tensors[f"{prefix}blocks.0.mlp.fc1.weight"].shape[0] if depth else 0
    return {"width": width, "depth": depth, "heads": _HEADS.get(width, max(1, width // 64)), "mlp": mlp}


def _tokenizer_config(
    config: Mapping[str, Any], path: Path, tensors: Mapping[str, Tensor], num_tokens: int, alpha: float
) -> dict[str, Any]:
    return {
        "image_size": _integer(config, "image_size", path),
        "patch_size": _integer(config, "enc_patch_size", path),
        "num_tokens": num_tokens,
        "group_size": _integer(config, "group_size", path),
        "causal_tokens": _integer(config, "causal_num", path),
        "alpha": alpha,
        "codebook_size": _integer(config, "codebook_size", path),
        "codebook_dim": _integer(config, "codebook_embed_dim", path),
        "encoder": _tower(tensors, "encoder."),
        "decoder": _tower(tensors, "decoder."),
    }


def _gpt_config(config: Mapping[str, Any], path: Path, tensors: Mapping[str, Tensor], num_tokens: int) -> dict[str, Any]:
    depth = sum(name.endswith("mlp.gate.weight") for name in tensors)
    return {
        "num_classes": _integer(config, "num_classes", path),
        "num_tokens": num_tokens,
        "group_size": _integer(config, "group_size", path),
        "causal_tokens": _integer(config, "causal_num", path),
        "codebook_size": _integer(config, "vocab_size", path),
        "width": tensors["norm.weight"].shape[0],
        "depth": depth,
        "heads": _integer(config, "n_head", path),
        "mlp": tensors["blocks.0.mlp.gate.weight"].shape[0] if depth else 0,
        "dropout": _float(config, "token_dropout_p", path, 0.1),
        "rope_base": _float(config, "rope_base", path, 10000.0),
        "class_names": None,
        "guidance_scale": 1.5,
        "guidance_schedule": "constant",
        "temperature": 1.0,
        "top_k": None,
        "top_p": None,
    }
