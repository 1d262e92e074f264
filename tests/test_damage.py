"""A thousand damaged or malicious models.

Each is loaded or refused in one sentence, and nothing in them is ever executed.
"""

import io
import json
import os
import pickle
import random
import shutil
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from detailflow import DetailFlowGPT, DetailFlowTokenizer
from detailflow.errors import DetailFlowError

TINY = Path(__file__).parent / "parity" / "tiny-32"
LOADERS = {"tokenizer": DetailFlowTokenizer, "gpt": DetailFlowGPT}
NUMBERS = (-1, 0, 3, 7.5, 10**6, 10**15, 10**40, 10**400, 1e308, float("nan"), float("inf"))
ODD_VALUES = (None, True, *NUMBERS, "", "8", "x" * 10_000, [], [[1]], {})


def outcome(kind: str, folder: Path) -> str:
    """How loading ended; anything but a model or a sentence is a failure."""
    try:
        LOADERS[kind].from_pretrained(folder)
        return "loaded"
    except DetailFlowError as error:
        text = str(error)
        assert text and "\n" not in text and len(text) < 2_000 + 10_000 * ("x" * 100 in text)
        return "refused"


def truncate(path: Path, rng: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: rng.choice((0, 1, 7, 8, 100, rng.randrange(path.stat().st_size)))])


def flip(path: Path, rng: random.Random, where: range | None = None) -> None:
    content = bytearray(path.read_bytes())
    for _ in range(rng.choice((1, 1, 4, 50))):
        content[rng.choice(where or range(len(content)))] = rng.randrange(256)
    path.write_bytes(content)


def flip_header(path: Path, rng: random.Random) -> None:
    """In safetensors the first bytes; in a checkpoint the pickle, and the zip's table of contents at the end."""
    size = path.stat().st_size
    if path.suffix == ".safetensors":
        return flip(path, rng, range(min(2_000, size)))
    return flip(path, rng, rng.choice((range(min(20_000, size)), range(max(0, size - 4_000), size))))


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """Where something stands in nested containers."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, part in items for place in ((*path, key), *places(part, (*path, key)))]


def odd_config(path: Path, rng: random.Random) -> None:
    config = json.loads(path.read_text())
    for _ in range(rng.choice((1, 1, 2, 5))):
        *above, last = rng.choice(places(config))
        inner = config
        for key in above:
            inner = inner[key]
        action = rng.random()
        if action < 0.7:
            inner[last] = rng.choice(ODD_VALUES)
        elif action < 0.85 or not isinstance(inner, dict):
            del inner[last]
        else:
            inner[f"{last}?"] = 1
        if not places(config):
            break
    path.write_text(json.dumps(config))


class Attack:
    """Pickles into a call that leaves a mark."""

    def __init__(self, function: Callable, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple:
        return self.call


def attack(path: Path, rng: random.Random, mark: Path) -> None:
    """Put a call somewhere into a checkpoint, in one of the formats that torch reads."""
    function, *arguments = rng.choice(
        (
            (os.system, f"touch {mark}"),
            (exec, f"open({str(mark)!r}, 'w')"),
            (eval, f"open({str(mark)!r}, 'w')"),
            (open, str(mark), "w"),
            (os.mkdir, str(mark)),
            (Path.touch, mark),
            (shutil.copy, str(path), str(mark)),
        )
    )
    call = Attack(function, *arguments)
    checkpoint: Any = {"model": {"norm.weight": torch.zeros(3)}, "args": 1}
    target, key = rng.choice(
        ((checkpoint, "args"), (checkpoint, "model"), (checkpoint["model"], "norm.weight"), (checkpoint, "x"))
    )
    target[key] = call
    checkpoint = rng.choice((checkpoint, call, [call], {"model": {"a": call}}))
    style = rng.random()
    if style < 0.5:
        torch.save(checkpoint, path, pickle_protocol=rng.choice((2, 3, 4)))
    elif style < 0.7:
        torch.save(checkpoint, path, _use_new_zipfile_serialization=False)
    elif style < 0.9:
        path.write_bytes(pickle.dumps(checkpoint, protocol=rng.choice((0, 2, 5))))
    else:
        content = io.BytesIO()
        with zipfile.ZipFile(content, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps(checkpoint, protocol=2))
            archive.writestr("archive/version", "3\n")
        path.write_bytes(content.getvalue())


@pytest.mark.parametrize("seed", range(10))
def test_a_hundred_damaged_models(seed: int, model: Path, tmp_path: Path):
    rng, mark = random.Random(seed), tmp_path / "executed"
    outcomes: Counter[str] = Counter()
    for _ in range(100):
        kind, layout = rng.choice(("tokenizer", "gpt")), rng.choice(("ours", "published"))
        original = (model if layout == "ours" else TINY) / kind
        folder = tmp_path / "damaged"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(original, folder)
        weights = folder / ("model.safetensors" if layout == "ours" else "checkpoints/32.pt")
        ways = ("config", "config", "config bytes", "truncate", "flip", "header", "attack")
        way = rng.choice((*ways, "arguments") if layout == "published" else ways)
        if way == "config":
            odd_config(folder / "config.json", rng)
        elif way == "config bytes":
            rng.choice((truncate, flip))(folder / "config.json", rng)
        elif way == "truncate":
            truncate(weights, rng)
        elif way == "flip":
            flip(weights, rng)
        elif way == "header":
            flip_header(weights, rng)
        elif way == "attack":
            attack(weights, rng, mark)
        else:
            rng.choice((truncate, flip))(folder / "config.yaml", rng)
        result = outcome(kind, folder)
        assert result == "refused" or way != "attack"
        assert not mark.exists()
        outcomes[result] += 1
    assert outcomes["refused"] > 30 and outcomes["loaded"] > 5  # both happen, so that neither is for nothing
