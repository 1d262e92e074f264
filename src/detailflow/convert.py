"""Convert models between the published layout and ours, bit for bit, with a model card (docs/method.md#published-layout)."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from detailflow import hub
from detailflow.errors import DetailFlowError
from detailflow.files import read_json, replacing
from detailflow.models.gpt import DetailFlowGPT, GPTConfig
from detailflow.models.loading import build
from detailflow.models.tokenizer import DetailFlowTokenizer, TokenizerConfig
from detailflow.published import (
    ARGUMENTS_FILE,
    CHECKPOINTS,
    PADDED,
    Kind,
    check_kind,
    heads_of,
    is_published,
    model_folder,
    read_arguments,
    tensor_names,
)
from detailflow.runs import is_run
from detailflow.tensors import SHARD_SIZE, shard_bytes

LAYOUTS = ("detailflow", "published")
CARD_FILE = "README.md"
TAGS: dict[Kind, str] = {"tokenizer": "image-tokenizer", "gpt": "class-conditional"}
CARD_MARK = "<!-- written by `detailflow convert` -->"
NETWORKS: dict[Kind, tuple[type[nn.Module], type]] = {
    "tokenizer": (DetailFlowTokenizer, TokenizerConfig),
    "gpt": (DetailFlowGPT, GPTConfig),
}


def convert(
    source: str | Path,
    output: Path,
    to: str = "detailflow",
    dtype: torch.dtype | None = None,
    variant: Literal["ema", "model"] = "ema",
    shard_size: str = SHARD_SIZE,
) -> dict[Kind, Path]:
    """Write the model of `source` to `output` in the layout `to`; of a pair, both, to tokenizer/ and gpt/ there.

    Only what inference needs is kept: no optimizer, no frozen teacher. What the published config says besides is carried along;
    class names and sampling have no place in the published layout.

    Args:
        source: as in `hub.resolve`.
        output: the folder to write to.
        to: "detailflow" or "published".
        dtype: of the weights; `None` leaves them as they are.
        variant: which weights of a published AR model: "ema" where present, or "model".
        shard_size: the largest file of weights, such as "5GB"; our layout only.

    Returns:
        The folder of each model that was written.

    Raises:
        DetailFlowError: if the source cannot be read or is no whole model, or the output cannot be written.
    """
    from tqdm import tqdm

    if to not in LAYOUTS:
        raise DetailFlowError(f"the layout must be {' or '.join(LAYOUTS)}, not {to!r}")
    shard_bytes(shard_size)  # raises
    found = hub.find(source)
    targets: dict[Kind, Path] = {kind: output / kind if len(found) > 1 else output for kind in found}
    if len(found) > 1 and (output / hub.CONFIG_FILE).exists():
        raise DetailFlowError(
            f"{output} already holds a model, where a pair would lie unseen: give another output folder"
        )
    for kind, target in targets.items():
        _check_target(target, kind, to)
    configs: dict[Kind, dict[str, Any]] = {}
    for kind, path in tqdm(found.items(), "converting", unit="model", delay=2, leave=False, disable=None):
        network, config_type = NETWORKS[kind]
        config, tensors = hub.load(path, kind, variant, dtype)
        model: Any = build(network, config_type, config, tensors, path)  # proves that all is there and fits
        configs[kind] = config = asdict(model.config)
        origin = _origin(path)
        if to == "published":
            save_published(targets[kind], kind, config, model.state_dict(), origin)
        else:
            extra = {"published": origin} if origin else {}
            hub.save(targets[kind], kind, config | extra, model.state_dict(), shard_size)
        del tensors, model
    _write_card(output, configs, str(source))
    return targets


def _check_target(target: Path, kind: Kind, to: str) -> None:
    """Refuse a folder in which the new model would lie beside, or in place of, another sort of model."""
    if is_run(target) and not (target / hub.CONFIG_FILE).exists():
        raise DetailFlowError(f"{target} holds a training run that is not finished: give another output folder")
    taken, published = (target / hub.CONFIG_FILE).exists(), is_published(target)
    if (published and to != "published") or (taken and not published and to == "published"):
        raise DetailFlowError(f"{target} already holds a model in the other layout: give another output folder")
    if taken:
        check_kind(target, hub.read_kind(target), kind)


def _origin(path: Path) -> dict[str, Any] | None:
    """The published config, and the text of the training arguments, of a model that is, or once was, in that layout."""
    if is_published(path):
        directory = model_folder(path)
        return {"config": read_json(directory / hub.CONFIG_FILE), "arguments": read_arguments(directory)}
    if not (path / hub.CONFIG_FILE).exists():  # a training run's
        return None
    origin = read_json(path / hub.CONFIG_FILE).get("published")
    known = (
        isinstance(origin, dict) and isinstance(origin.get("config"), dict) and isinstance(origin.get("arguments"), str)
    )
    return origin if known else None


def save_published(
    directory: Path,
    kind: Kind,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    origin: Mapping[str, Any] | None = None,
) -> None:
    """Write a model, in our keys and names, in the published layout; the config last.

    Args:
        origin: the published "config" and "arguments" where the model had them; else they are made from ours.

    Raises:
        DetailFlowError: if the files cannot be written, or the layout cannot hold the model.
    """
    state: dict[str, Tensor] = {}
    for ours, theirs in tensor_names(kind, _depths(kind, config)).items():
        tensor = tensors[ours]
        while tensor.ndim < PADDED.get(ours, (0, 0))[1]:
            tensor = tensor[None]
        state |= zip(theirs, tensor.chunk(len(theirs)), strict=True)
    checkpoint = {"model": state, "ema": state} if kind == "gpt" else {"model": state}
    origin = origin or _published_config(kind, config)
    try:
        (directory / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
        with replacing(directory / CHECKPOINTS / f"{config['num_tokens']}.pt") as path:
            torch.save(checkpoint, path)
        with replacing(directory / ARGUMENTS_FILE) as path:
            path.write_text(origin["arguments"], encoding="utf-8")
        with replacing(directory / hub.CONFIG_FILE) as path:
            path.write_text(json.dumps(origin["config"], indent=4) + "\n", encoding="utf-8")
    except (OSError, RuntimeError) as error:  # torch.save has a RuntimeError for a full disk
        reason = error.strerror if isinstance(error, OSError) else None
        raise DetailFlowError(f"could not write the model to {directory}: {reason or error}") from error


def _depths(kind: Kind, config: Mapping[str, Any]) -> list[int]:
    return [config["depth"]] if kind == "gpt" else [config[half]["depth"] for half in ("encoder", "decoder")]


def _published_config(kind: Kind, config: Mapping[str, Any]) -> dict[str, Any]:
    """The published keys of a model that never was in that layout.

    Raises:
        DetailFlowError: where the number of heads is not the one that the layout implies, or it has no place for what the model
            leaves out (the paper's table 2) or has beyond the paper.
    """
    lacking = {
        "causal_tokens of 0": not config["causal_tokens"],
        "an encoder without a causal mask": not config.get("causal_encoder", True),
        "a linear path": config.get("linear_path", False),
        "pixel_channels above 3": config.get("pixel_channels", 3) > 3,
        "an absent token": config.get("absent_token", False),
    }
    if what := next((name for name, present in lacking.items() if present), None):
        raise DetailFlowError(f"the published layout cannot hold a model with {what}: keep it in ours")
    shared = {"group_size": config["group_size"], "causal_num": config["causal_tokens"]}
    if kind == "gpt":
        names = {
            "dim": "width",
            "n_layer": "depth",
            "n_head": "heads",
            "block_size": "num_tokens",
            "vocab_size": "codebook_size",
            "num_classes": "num_classes",
            "rope_base": "rope_base",
            "token_dropout_p": "dropout",
            "resid_dropout_p": "dropout",
            "ffn_dropout_p": "dropout",
        }
        return {
            "config": {theirs: config[ours] for theirs, ours in names.items()} | shared,
            "arguments": "gpt_type: c2i\n",
        }
    for half in ("encoder", "decoder"):
        width, heads = config[half]["width"], config[half]["heads"]
        if heads != heads_of(width):
            raise DetailFlowError(
                f"the published layout cannot hold this tokenizer: there, width {width} means {heads_of(width)} heads, "
                f"and this {half} has {heads}"
            )
    names = {
        "image_size": "image_size",
        "max_image_size": "image_size",
        "enc_patch_size": "patch_size",
        "dec_patch_size": "patch_size",
        "num_latent_tokens": "num_tokens",
        "codebook_size": "codebook_size",
        "codebook_embed_dim": "codebook_dim",
    }
    return {
        "config": {theirs: config[ours] for theirs, ours in names.items()} | shared,
        "arguments": f"degradation_power: {config['alpha']}\n",
    }


def _write_card(directory: Path, configs: Mapping[Kind, Mapping[str, Any]], source: str) -> None:
    """A model card for the hub, unless there is one of somebody else."""
    from huggingface_hub import ModelCard, ModelCardData

    path = directory / CARD_FILE
    if path.exists() and CARD_MARK not in path.read_text(encoding="utf-8", errors="replace"):
        return
    pair = hub.zoo_model(source)
    data = ModelCardData(
        library_name="detailflow",
        pipeline_tag="unconditional-image-generation" if "gpt" in configs else "image-feature-extraction",
        tags=["detailflow", *(tag for kind, tag in TAGS.items() if kind in configs)],
        base_model=[getattr(pair, kind) for kind in configs] if pair else None,
    )
    what = {"tokenizer": "a DetailFlow tokenizer", "gpt": "a DetailFlow AR model"}
    rows = [
        f"| {kind} | {key} | {json.dumps(value)} |"
        for kind, config in configs.items()
        for key, value in config.items()
        if key != "class_names"
    ]
    name = directory.resolve().name
    loader = (
        "DetailFlowPipeline" if len(configs) > 1 else "DetailFlowGPT" if "gpt" in configs else "DetailFlowTokenizer"
    )
    text = f"""---
{data.to_yaml()}
---

{CARD_MARK}
# {name}

{" and ".join(what[kind] for kind in configs).capitalize().replace("detailflow", "DetailFlow").replace("ar model", "AR model")}: \
images as 1-D token sequences from coarse to fine ([arXiv 2505.21473](https://arxiv.org/abs/2505.21473)).

```python
from detailflow import {loader}

model = {loader}.from_pretrained("{name}")
```

| model | key | value |
|---|---|---|
{chr(10).join(rows)}
"""
    try:
        with replacing(path) as temporary:
            ModelCard(text).save(temporary)
    except OSError as error:
        raise DetailFlowError(f"could not write {path}: {error.strerror or error}") from error
