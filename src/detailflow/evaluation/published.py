"""Published numbers (docs/method.md#published-numbers) from one data file, and which of them belong beside ours."""

import json
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from detailflow.hub import ZOO, zoo_model

FILE = Path(__file__).with_name("published.json")
SIDE = 256  # of the images that all of them are for


@cache
def published() -> dict[str, Any]:
    """The data file: "models", "guidance", "group_size", and the "conditions" and "source" of all."""
    content: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    return content


def zoo_name(model: str | None) -> str | None:
    """The zoo's shorthand of a model that is given by it or by a hub name; `None` for any other model."""
    pair = zoo_model(model) if model else None
    return next((name for name, other in ZOO.items() if other is pair), None)


def quotes(model: str | None, ours: Mapping[str, float], guidance: float | None = None) -> list[dict[str, Any]]:
    """Published figures of the same model and measures, each beside ours.

    Args:
        model: as the user named it; only the zoo's models have such figures.
        ours: measure (such as "rFID") → our figure, of whole images: all tokens, the full side.
        guidance: the scale that generated images were made with; figures of generation are for the model's own best or one of
            those that the paper swept.

    Returns:
        "measure", "ours", "published" and "conditions" of each.
    """
    name = zoo_name(model)
    if name is None:
        return []
    (entry,) = (m for m in published()["models"] if m.get("zoo") == name)
    best = ZOO[name].guidance_scale
    where = f"{entry['name']}; {published()['conditions']}"
    result = []
    if guidance in (None, best):
        for measure, value in ours.items():
            result += [
                {"measure": measure, "ours": value, "published": number, "conditions": f"{source}: {where}"}
                for source, number in entry.get(measure, {}).items()
            ]
    elif "gFID" in ours:
        result += [
            {
                "measure": "gFID",
                "ours": ours["gFID"],
                "published": number,
                "conditions": f"paper, guidance {scale:g}: {where}",
            }
            for scale, number in _swept(name)
            if scale == guidance
        ]
    return result


def _swept(name: str) -> Iterator[tuple[float, float]]:
    """(guidance scale, gFID) of the paper's sweep, which is of one model."""
    sweep = published()["guidance"]
    if sweep["zoo"] == name:
        yield from ((float(scale), number) for scale, number in sweep["gFID"].items())
