"""The published checkpoint layout, read safely, in our config keys and tensor names (docs/method.md#published-layout).

A published model is a directory with `config.json` (constructor arguments), `config.yaml` (training arguments) and
`checkpoints/N.pt`, a pickle of state dicts and training leftovers. Nothing in the pickle is ever executed.
"""

import re
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from torch import Tensor

from detailflow.errors import DetailFlowError, some_names
from detailflow.files import LARGEST_YAML, load_yaml, read_json, read_text
from detailflow.labels import default_names
from detailflow.tensors import in_pieces
from detailflow.torch_files import load_torch

Kind = Literal["tokenizer", "gpt"]
CHECKPOINTS = "checkpoints"
ARGUMENTS_FILE = "config.yaml"
KIND_NAMES: dict[str, str] = {"tokenizer": "a tokenizer", "gpt": "an AR model (gpt)"}

# What only training needs: the frozen alignment encoder, its projection and the codebook's usage counter.
_TRAINING_ONLY = ("repa_model.", "global_token_proj.", "quantize.codebook_used")
# Our tensors that are stored with leading dimensions of size 1: how many dimensions they have without, and with them.
PADDED = {
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


def is_published(path: Path) -> bool:
    """Return whether a folder has the published layout, or a file is a checkpoint of one.

    A model of ours may have a folder of that name beside it as well: its config says what it is.
    """
    if path.is_file():
        return path.parent.name == CHECKPOINTS
    if not (path / CHECKPOINTS).is_dir():
        return False
    try:
        return "format" not in read_json(path / "config.json")
    except DetailFlowError:  # which whoever reads it says
        return True


def model_folder(path: Path) -> Path:
    """The folder of a model that is given by it, or by one checkpoint in it."""
    return path.parent.parent if path.is_file() else path


def load_published(
    path: Path, kind: Kind, variant: Literal["ema", "model"] = "ema", dtype: torch.dtype | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a published model into our config keys and our tensor names, on the CPU.

    Args:
        path: a folder, whose checkpoint is the one named after N where there are several, or one checkpoint in it.
        kind: "tokenizer" or "gpt".
        variant: "ema" where present, or "model". Only these weights are brought into memory.
        dtype: of the tensors; `None` is as they are stored.

    Raises:
        DetailFlowError: if a file is missing, damaged or unsafe, or does not hold a model of that kind.
    """
    config, checkpoint, names = _inspect(path, kind, variant)
    state = (
        None if zipfile.is_zipfile(checkpoint) else _read_state(checkpoint, variant)
    )  # an old pickle cannot be mapped
    return config, _translate(lambda: state or _read_state(checkpoint, variant), names, checkpoint, dtype)


def published_config(path: Path, kind: Kind) -> dict[str, Any]:
    """The config alone of what `load_published` reads.

    Raises:
        DetailFlowError: as `load_published`.
    """
    return _inspect(path, kind, "ema")[0]


def _inspect(path: Path, kind: Kind, variant: str) -> tuple[dict[str, Any], Path, dict[str, tuple[str, ...]]]:
    """Our config, the checkpoint, and our name of each tensor → the names it has there; no weights are read."""
    directory = model_folder(path)
    config_path = directory / "config.json"
    config = read_json(config_path)
    found = kind_of(config)
    if found is None:
        raise DetailFlowError(
            f"{config_path} has neither num_latent_tokens nor block_size, so it is no published config"
        )
    check_kind(directory, found, kind)
    num_tokens = _integer(config, "num_latent_tokens" if kind == "tokenizer" else "block_size", config_path)
    checkpoint = path if path.is_file() else _find_checkpoint(directory / CHECKPOINTS, num_tokens)
    state = _read_state(checkpoint, variant)
    names = tensor_names(kind, [layer_count(state, prefix) for prefix in _LAYERS[kind]])
    _check_names(state, names, checkpoint)
    shapes = {ours: tuple(state[theirs[0]].shape) for ours, theirs in names.items()}
    if kind == "tokenizer":
        alpha = _degradation_power(directory)
        return _tokenizer_config(config, config_path, shapes, num_tokens, alpha), checkpoint, names
    return _gpt_config(config, config_path, shapes, num_tokens), checkpoint, names


def kind_of(config: Mapping[str, Any]) -> Kind | None:
    """What a published config is of."""
    return "tokenizer" if "num_latent_tokens" in config else "gpt" if "block_size" in config else None


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
    try:
        if not isinstance(value, bool) and isinstance(value, int | float):
            return float(value)
    except OverflowError:
        pass
    raise DetailFlowError(f"{key} in {path} must be a number, not {value!r}")


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


def _read_state(path: Path, variant: str) -> dict[str, Tensor]:
    """The state dict of one variant, memory-mapped."""
    checkpoint = _read_pickle(path)
    variants = checkpoint if isinstance(checkpoint, dict) else {}
    state = variants.get("model")
    if variant == "ema" and variants.get("ema") not in (None, {}):
        state = variants["ema"]
    if not isinstance(state, dict) or not state:
        raise DetailFlowError(f"{path} holds no model weights: expected a state dict under 'model'")
    for name, tensor in state.items():
        dense = isinstance(tensor, Tensor) and tensor.layout == torch.strided and tensor.device.type == "cpu"
        whole = (
            dense and tensor.nbytes <= tensor.untyped_storage().nbytes()
        )  # an expanded one would need more than the file has
        weights = whole and tensor.is_floating_point() and tensor.ndim > 0
        if not weights and not (dense and str(name).startswith(_TRAINING_ONLY)):
            raise DetailFlowError(f"{name!s} in {path} is no tensor of floating-point weights")
    return {str(name): tensor for name, tensor in state.items()}


def _read_pickle(path: Path) -> Any:
    """Unpickle tensors, plain containers and `argparse.Namespace`, which unpickles into attributes and runs nothing."""
    return load_torch(path, mmap=True)


def layer_count(state: Mapping[str, object], prefix: str) -> int:
    """The number of layers; gaps in their numbering then show as missing tensors."""
    layer = re.compile(re.escape(prefix) + r"layers\.(\d+)\.")
    return len({match[1] for match in map(layer.match, state) if match})


def heads_of(width: int) -> int:
    """Attention heads of a published transformer of that width, which no tensor's shape tells."""
    return _HEADS.get(width, max(1, width // 64))


def tensor_names(kind: Kind, depths: Sequence[int]) -> dict[str, tuple[str, ...]]:
    """Our name of each tensor of a published model → the published ones that are stacked to make it.

    `depths`: layers of the AR model, or of the tokenizer's encoder and decoder.
    """
    return dict(_gpt_names(*depths) if kind == "gpt" else _tokenizer_names(*depths))


def _affine(ours: str, *theirs: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    for part in ("weight", "bias"):
        yield f"{ours}.{part}", tuple(f"{name}.{part}" for name in theirs)


def _tokenizer_names(encoder_depth: int, decoder_depth: int) -> Iterator[tuple[str, tuple[str, ...]]]:
    yield "encoder.query_tokens", ("encoder.latent_tokens",)
    yield "encoder.refined_tokens", ("encoder.refined_tokens",)
    yield "encoder.query_pos_embed", ("encoder.latent_pos_embed",)
    yield from _affine("encoder.refine", "refine_conv")
    yield from _affine("quantizer.project", "quant_conv")
    yield "quantizer.codebook", ("quantize.embedding.weight",)
    yield from _affine("decoder.project", "post_quant_conv")
    yield "decoder.latent_pos_embed", ("decoder.latent_pos_embed",)
    yield "decoder.mask_token", ("decoder.mask_token",)
    yield from _affine("decoder.to_pixels", "decoder.to_pixel.model")
    for half, depth in (("encoder", encoder_depth), ("decoder", decoder_depth)):
        yield from vit_names(f"{half}.", f"{half}.visual_model.", depth, patches=half == "encoder")


def vit_names(ours: str, theirs: str, depth: int, patches: bool = True) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The same for one transformer, SigLIP2's vision tower among them; `ours` and `theirs` are prefixes, with their dot.

    `patches`: whether image patches go in, as they do not in the decoder.
    """
    if patches:
        yield from _affine(f"{ours}patch_embed", f"{theirs}embeddings.patch_embedding")
    yield f"{ours}pos_embed", (f"{theirs}embeddings.position_embedding.weight",)
    yield from _affine(f"{ours}norm", f"{theirs}post_layernorm")
    for i in range(depth):
        block, layer = f"{ours}blocks.{i}", f"{theirs}encoder.layers.{i}"
        yield from _affine(f"{block}.norm1", f"{layer}.layer_norm1")
        yield from _affine(f"{block}.attn.qkv", *(f"{layer}.self_attn.{x}_proj" for x in "qkv"))
        yield from _affine(f"{block}.attn.proj", f"{layer}.self_attn.out_proj")
        yield from _affine(f"{block}.norm2", f"{layer}.layer_norm2")
        yield from _affine(f"{block}.mlp.fc1", f"{layer}.mlp.fc1")
        yield from _affine(f"{block}.mlp.fc2", f"{layer}.mlp.fc2")


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


def _check_names(state: Mapping[str, Tensor], names: Mapping[str, tuple[str, ...]], path: Path) -> None:
    wanted = {theirs for sources in names.values() for theirs in sources}
    present = {name for name in state if not name.startswith(_TRAINING_ONLY)}
    for what, difference in (("lacks", wanted - present), ("has the unexpected", present - wanted)):
        if difference:
            raise DetailFlowError(
                f"{path} is no published DetailFlow checkpoint of this kind: it {what} {some_names(difference)}"
            )


def _translate(
    read: Callable[[], Mapping[str, Tensor]],
    names: Mapping[str, tuple[str, ...]],
    path: Path,
    dtype: torch.dtype | None,
) -> dict[str, Tensor]:
    """Copies of the named tensors, off the memory map that `read` makes, under our names."""
    state = read()
    sizes = {ours: sum(state[theirs].nbytes for theirs in sources) for ours, sources in names.items()}
    tensors: dict[str, Tensor] = {}
    for piece in in_pieces(sizes):
        state = read()
        tensors |= {ours: _assemble(ours, state, names[ours], path).to(dtype) for ours in piece}
    return tensors


def _assemble(ours: str, state: Mapping[str, Tensor], sources: tuple[str, ...], path: Path) -> Tensor:
    """A copy of one of our tensors from the published ones it is made of."""
    parts = [state[theirs].detach() for theirs in sources]
    if any(part.shape != parts[0].shape or part.dtype != parts[0].dtype for part in parts) or parts[0].ndim == 0:
        shapes = ", ".join(f"{theirs} {tuple(state[theirs].shape)}" for theirs in sources)
        raise DetailFlowError(f"{path} holds tensors of a wrong shape or type: {shapes}")
    tensor = torch.cat(parts)
    while tensor.ndim > PADDED.get(ours, (tensor.ndim,))[0] and tensor.shape[0] == 1:
        tensor = tensor[0]
    return tensor


def read_arguments(directory: Path) -> str:
    """The text of a published model's training arguments, empty where it has none.

    Raises:
        DetailFlowError: if it cannot be read.
    """
    path = directory / ARGUMENTS_FILE
    try:
        return read_text(path, LARGEST_YAML)
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise DetailFlowError(f"could not read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DetailFlowError(f"{path} is not valid YAML of plain values: {error}") from error


def _degradation_power(directory: Path) -> float:
    """α as trained; 1.5 where the training arguments do not say."""
    path = directory / ARGUMENTS_FILE
    try:
        arguments = load_yaml(read_arguments(directory) or "{}")
    except yaml.YAMLError as error:
        raise DetailFlowError(f"{path} is not valid YAML of plain values: {' '.join(str(error).split())}") from error
    if not isinstance(arguments, dict):
        raise DetailFlowError(f"{path} must hold the training arguments as 'name: value' lines")
    return _float(arguments, "degradation_power", path, 1.5)


def _tower(shapes: Mapping[str, tuple[int, ...]], prefix: str) -> dict[str, int]:
    """Sizes of the encoder or decoder from its tensors' shapes."""
    width = shapes[f"{prefix}norm.weight"][0]
    depth = sum(name.startswith(f"{prefix}blocks.") and name.endswith("fc1.weight") for name in shapes)
    mlp = shapes[f"{prefix}blocks.0.mlp.fc1.weight"][0] if depth else 0
    return {"width": width, "depth": depth, "heads": heads_of(width), "mlp": mlp}


def _tokenizer_config(
    config: Mapping[str, Any], path: Path, shapes: Mapping[str, tuple[int, ...]], num_tokens: int, alpha: float
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
        "encoder": _tower(shapes, "encoder."),
        "decoder": _tower(shapes, "decoder."),
    }


def _gpt_config(
    config: Mapping[str, Any], path: Path, shapes: Mapping[str, tuple[int, ...]], num_tokens: int
) -> dict[str, Any]:
    depth = sum(name.endswith("mlp.gate.weight") for name in shapes)
    return {
        "num_classes": _integer(config, "num_classes", path),
        "num_tokens": num_tokens,
        "group_size": _integer(config, "group_size", path),
        "causal_tokens": _integer(config, "causal_num", path),
        "codebook_size": _integer(config, "vocab_size", path),
        "width": shapes["norm.weight"][0],
        "depth": depth,
        "heads": _integer(config, "n_head", path),
        "mlp": shapes["blocks.0.mlp.gate.weight"][0] if depth else 0,
        "dropout": _float(config, "token_dropout_p", path, 0.1),
        "rope_base": _float(config, "rope_base", path, 10000.0),
        "class_names": default_names(_integer(config, "num_classes", path)),
        "guidance_scale": 1.5,
        "guidance_schedule": "constant",
        "temperature": 1.0,
        "top_k": None,
        "top_p": None,
    }
