"""What the columns of tables and the entries of JSON objects are called that may hold labels."""

import json
import re
from collections.abc import Collection, Iterable
from typing import Any

from detailflow.errors import DetailFlowError, explained

_LIKE_LABEL = re.compile("(?<![a-z])(label|class|categor)")  # in the name of a column of labels: fine_label


def plain_name(column: str) -> str:
    """Return the name of a column as it is compared: in lower case, without spaces around it."""
    return column.strip().casefold()


def ask_for_labels(where: str, wanted: str, columns: Iterable[str], kind: str = "column") -> str:
    """Return the question whether another column than the wanted one has the labels, or "" if none is called so."""
    alike = [column for column in columns if _LIKE_LABEL.search(plain_name(column))]
    if not alike:
        return ""
    likeliest = min(alike, key=lambda column: (len(column), column))
    return f"{where} has no {kind} {wanted}: did you mean {likeliest} (label_column: {likeliest})?"


def parse_json(text: str, names: Collection[str], where: str) -> Any:
    """Return what JSON text holds; its object has no entry of these names twice, as only the last would count."""
    keys: list[str] = []

    def watched(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys[:] = [key for key, _ in pairs]  # in the end those of the outermost object, the last to be made
        return dict(pairs)

    with explained(f"{where} is not valid JSON", (ValueError, RecursionError)):
        found = json.loads(text, object_pairs_hook=watched)
    if isinstance(found, dict) and len(found) < len(keys):
        plain = list(map(plain_name, keys))
        if twice := [name for name in names if plain.count(name) > 1]:
            raise DetailFlowError(f"{where} has several entries called {twice[0]}: keep one of them")
    return found
