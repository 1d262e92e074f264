"""A case by its number: files in the current folder, and a command line that reads them."""

import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random

from . import folders, images, models, words

SEED = 14
KINDS: dict[
    str, tuple[Callable[[Random], list[str]], float, tuple[str, ...]]
] = {  # how often, and the stock that each needs
    "image": (images.reconstruct, 25, ("model",)),
    "data": (folders.data, 20, ("model", "photos*", "shards", "features*", "*.yaml")),
    "model": (models.model, 16, ("model", "published", "photos", "tokens", "*.yaml")),
    "run": (models.run, 6, ("model", "photos", "tokens", "run-*", "*.yaml")),
    "tokens": (models.tokens, 5, ("model", "photos", "tokens", "*.yaml")),
    "report": (models.report, 3, ("model", "photos", "report")),
    "network": (models.network, 7, ("model", "photos", "photos.npz", "features*", "*.yaml")),
    "settings": (words.settings, 10, ("model", "photos", "tokens", "*.yaml")),
    "line": (words.line, 15, ("model", "photos*", "tokens", "report", "run-gpt", "features*", "*.yaml")),
}


def kind_of(number: int) -> str:
    """Which of them case `number` is."""
    return Random(f"{SEED}-{number}").choices(list(KINDS), [weight for _, weight, _ in KINDS.values()])[0]


def make(number: int, stock: Path) -> list[str]:
    """Write the files of case `number` into the current folder, and return its command line."""
    function, _, needed = KINDS[kind_of(number)]
    for pattern in needed:
        for source in sorted((stock / "in").glob(pattern)):
            target = Path("in") / source.name
            shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
    return function(Random(f"{SEED}-files-{number}"))
