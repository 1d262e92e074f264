"""Convert models between the published layout and ours, bit for bit (docs/method.md#published-layout)."""

import json
import logging
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from detailflow import hub
from detailflow.errors import DetailFlowError, os_errors
from detailflow.files import check_regular, making, read_json, writing
from detailflow.models.gpt import DetailFlowGPT, GPTConfig
from detailflow.models.loading import TOKEN_KEYS, build, require_same
from detailflow.models.tokenizer import DetailFlowTokenizer, TokenizerConfig
from detailflow.progress import progress_bar
from detailflow.published import (
    CONFIG_FILE,
    Kind,
    Variant,
    has_both_variants,
    is_published,
    model_folder,
    read_arguments,
    saving_published,
)
from detailflow.settings import parse_settings
from detailflow.tensors import SHARD_SIZE, shard_bytes
from detailflow.words import printable

_log = logging.getLogger(__name__)
LAYOUTS = ("detailflow", "published")
CARD_FILE = "README.md"
CARD_MARK = "<!-- written by `detailflow convert` -->"
NETWORKS: dict[Kind, tuple[type[nn.Module], type]] = {
    "tokenizer": (DetailFlowTokenizer, TokenizerConfig),
    "gpt": (DetailFlowGPT, GPTConfig),
}


def convert(
    source: str | Path,
    output: Path,
    *,
    to: str = "detailflow",
    dtype: torch.dtype | None = None,
    variant: Variant = "ema",
    shard_size: str = SHARD_SIZE,
) -> dict[Kind, Path]:
    """Write the model of `source` to `output` in the layout `to`; of a pair, both, to tokenizer/ and gpt/ there.

    Only what inference needs is kept: no optimizer, no frozen teacher, one variant of the weights. The rest of the
    published config is carried along; a warning lists what has no place in the published layout, such as class names.

    Args:
        source: as in `hub.resolve`.
        output: the folder to write to.
        to: "detailflow" or "published".
        dtype: of the weights; `None` leaves them as they are.
        variant: which weights of a published AR model: "ema" if present, or "model".
        shard_size: the largest file of weights, such as "5GB"; our layout only.

    Returns:
        The folder of each model that was written.
    """
    if to not in LAYOUTS:
        raise DetailFlowError(f"the layout must be {' or '.join(LAYOUTS)}, not {to!r}")
    shard_bytes(shard_size)  # raises
    pair, found = hub.zoo_model(source), hub.find(source)
    targets = hub.targets(output, list(found), to)
    models = _read(found, variant, dtype)
    if len(models) > 1:
        problem = f"the tokenizer and the AR model of {source} do not fit together: give one of them"
        require_same(models["tokenizer"].config, models["gpt"].config, TOKEN_KEYS, problem)
    configs: dict[Kind, dict[str, Any]] = {kind: asdict(model.config) for kind, model in models.items()}
    has_card = _may_write_card(output / CARD_FILE)
    with ExitStack() as stack:  # which puts all files in place once all are written, those of the first model last
        stack.enter_context(os_errors(f"could not write the model to {output}"))
        stack.enter_context(making(output))
        for kind, model in progress_bar(models.items(), desc="writing", unit="model", total=len(models)):
            target, origin, tensors = targets[kind], _origin(found[kind]), model.state_dict()
            if to == "published":
                saving = saving_published(target, kind, configs[kind], tensors, origin)
            else:
                extra = {"published": origin} if origin else {}
                saving = hub.saving(target, kind, configs[kind] | extra, tensors, shard_size)
            stack.enter_context(saving)
        if has_card:  # of another model
            (output / CARD_FILE).unlink(missing_ok=True)
    written = {kind: _read_again(targets[kind], kind) for kind in configs} if to == "published" else configs
    for kind, config in configs.items():
        _warn_of_loss(targets[kind], config, written[kind])
    if has_card:
        _write_card(output, written, pair)
    return targets


def _read(found: Mapping[Kind, Path], variant: Variant, dtype: torch.dtype | None) -> dict[Kind, Any]:
    """Return the models, which are whole."""
    models: dict[Kind, Any] = {}
    for kind, path in progress_bar(found.items(), desc="reading", unit="model", total=len(found)):
        config, tensors = hub.load(path, kind, variant, dtype)
        models[kind] = build(*NETWORKS[kind], config, tensors, path)  # checks that all is there and fits
        if kind == "gpt" and is_published(path) and has_both_variants(path):
            kept, other = ("EMA", "model") if variant == "ema" else ("raw", "ema")
            _log.info(
                "of its two sets of weights the %s ones are converted: --variant %s takes the others", kept, other
            )
    return models


def _read_again(written: Path, kind: Kind) -> dict[str, Any]:
    return asdict(parse_settings(NETWORKS[kind][1], hub.load_config(written, kind)))


def _warn_of_loss(written: Path, config: Mapping[str, Any], read: Mapping[str, Any]) -> None:
    """Warn of the settings that are not those that are read again, as the published layout has no place for them."""
    lost = [key for key, value in config.items() if value != read[key]]
    numbers = {key: f" ({config[key]})" for key in lost if isinstance(config[key], int | float)}
    if lost:
        names = ", ".join(f"{key}{numbers.get(key, '')}" for key in lost)
        _log.warning("%s: the published layout has no place for %s: keep the original for them", written, names)


def _origin(path: Path) -> dict[str, Any] | None:
    """Return the published config and training arguments of a model that is, or once was, in that layout."""
    if is_published(path):
        folder = model_folder(path)
        return {"config": read_json(folder / CONFIG_FILE), "arguments": read_arguments(folder)}
    if not (path / CONFIG_FILE).exists():  # a training run's
        return None
    origin = read_json(path / CONFIG_FILE).get("published")
    if isinstance(origin, dict) and isinstance(origin.get("config"), dict) and isinstance(origin.get("arguments"), str):
        return origin
    return None


def _may_write_card(path: Path) -> bool:
    """Return whether there is no model card, or one of ours."""
    with os_errors(f"cannot write {path}"):
        check_regular(path)
        return not path.exists() or CARD_MARK in path.read_text(encoding="utf-8", errors="replace")


def _write_card(folder: Path, configs: Mapping[Kind, Mapping[str, Any]], pair: hub.PublishedPair | None) -> None:
    """Write a model card for the hub; `pair` is what the models were, if they are published ones."""
    from huggingface_hub import ModelCard, ModelCardData

    tags = {"tokenizer": "image-tokenizer", "gpt": "class-conditional"}
    data = ModelCardData(
        library_name="detailflow",
        pipeline_tag="unconditional-image-generation" if "gpt" in configs else "image-feature-extraction",
        tags=["detailflow", *(tag for kind, tag in tags.items() if kind in configs)],
        base_model=[getattr(pair, kind) for kind in configs] if pair else None,
    )
    both, (first, *_) = len(configs) > 1, configs
    loader = "DetailFlowPipeline" if both else NETWORKS[first][0].__name__
    what = {"tokenizer": "DetailFlow tokenizer", "gpt": "DetailFlow AR model"}
    rows = [
        f"| {kind} | {key} | {json.dumps(value)} |"
        for kind, config in configs.items()
        for key, value in config.items()
        if key != "class_names"
    ]
    name = printable(folder.resolve().name)
    place = json.dumps(f"OWNER/{name}", ensure_ascii=False)
    text = f"""---
{data.to_yaml()}
---

{CARD_MARK}
# {name}

{" and ".join(what[kind] for kind in configs)}: \
images as 1-D token sequences from coarse to fine ([arXiv 2505.21473](https://arxiv.org/abs/2505.21473)).

```python
from detailflow import {loader}

model = {loader}.from_pretrained({place})  # or the path of this folder
```

| model | key | value |
|---|---|---|
{chr(10).join(rows)}
"""
    with writing(folder / CARD_FILE) as path:
        path.write_text(str(ModelCard(text)), encoding="utf-8")
