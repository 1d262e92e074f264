"""Published numbers (docs/method.md#published-numbers) from one data file, and which of them belong beside ours."""

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from detailflow.evaluation.report import Figure, Row
from detailflow.hub import ZOO, zoo_model


@cache
def published() -> dict[str, Any]:
    """Return the data file: "models", "guidance", "group_size", and the "conditions" and "source" of all."""
    content: dict[str, Any] = json.loads(Path(__file__).with_name("published.json").read_text(encoding="utf-8"))
    return content


def quotes(model: str | None, ours: Mapping[str, Figure], guidance: float | None = None) -> list[Row]:
    """Return the published figures of the same model and measures, each in a row with ours.

    Args:
        model: as the user named it; only the zoo's models have such figures.
        ours: by measure, of whole images: all tokens, the full side.
        guidance: the scale of generated images, whose published figures are for the model's own best, and in gFID for
            those that the paper tried.
    """
    pair = zoo_model(model) if model else None
    name = next((short for short, other in ZOO.items() if other is pair), None)
    if name is None:
        return []
    (entry,) = (m for m in published()["models"] if m.get("zoo") == name)
    sweep = published()["guidance"]
    if guidance in (None, ZOO[name].guidance_scale):
        found = [(measure, source, value) for measure in ours for source, value in entry.get(measure, {}).items()]
    else:
        tried = sweep["gFID"] if sweep["zoo"] == name and "gFID" in ours else {}
        found = [("gFID", f"paper, guidance {x}", value) for x, value in tried.items() if float(x) == guidance]
    conditions = f"{entry['name']}; {published()['conditions']}"
    return [
        Row({"measure": m, "conditions": f"{s}: {conditions}"}, {"ours": Figure(ours[m].value), "published": Figure(v)})
        for m, s, v in found
    ]
