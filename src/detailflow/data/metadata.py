"""Labels of a folder's images in `metadata.csv` or `metadata.jsonl`, as the `datasets` library has them: `file_name`, `label`."""

import csv
import json
import os
from collections.abc import Iterator
from typing import Any

from detailflow.data.decode import first_line
from detailflow.data.folder import Notes
from detailflow.errors import DetailFlowError

_NAMES = ("file_name", "image_file_name")


def read_labels(files: list[str], label_column: str, notes: Notes) -> dict[str, str | None] | None:
    """Return the label of each image by its path, as text; `None` if none of the files gives labels.

    A file that gives no labels is left aside, unless its column was asked for by name.

    Raises:
        DetailFlowError: for a file that cannot be read, a path that leads out of its folder, or an image with two labels.
    """
    labels: dict[str, str | None] = {}
    used = False
    for file in files:
        folder = os.path.dirname(file)
        found = 0
        for number, row in _rows(file):
            name = next((row[key] for key in _NAMES if row.get(key)), None)
            if name is None or label_column not in row:
                continue
            found += 1
            path = _inside(folder, name, f"{file} row {number}")
            label = _text(row[label_column], f"{file} row {number}")
            if labels.setdefault(path, label) != label:
                raise DetailFlowError(
                    f"{file} row {number} gives {name} the label {label!r}, and another gives it {labels[path]!r}"
                )
        if found:
            used = True
        else:
            notes.leave(os.path.splitext(file)[1], os.path.basename(file))
    if not used and label_column != "label":
        raise DetailFlowError(
            f"no images have the label {label_column!r}: it would be a column beside file_name in metadata.csv or metadata.jsonl"
        )
    return labels if used else None


def _rows(file: str) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        with open(file, encoding="utf-8-sig", newline="") as opened:
            rows = csv.DictReader(opened) if file.endswith(".csv") else map(json.loads, filter(str.strip, opened))
            for number, row in enumerate(rows, 1):
                if not isinstance(row, dict):
                    raise ValueError(f"row {number} is no object")
                yield number, row
    except (OSError, ValueError, csv.Error, RecursionError) as error:
        raise DetailFlowError(
            f"{file} cannot be read ({first_line(error)}): it has a row with file_name for each image"
        ) from error


def _inside(folder: str, name: Any, where: str) -> str:
    if not isinstance(name, str):
        raise DetailFlowError(f"{where} has {name!r} as file_name, which is no text")
    path = os.path.normpath(os.path.join(folder, name))
    if os.path.isabs(name) or os.path.commonpath((os.path.abspath(path), os.path.abspath(folder))) != os.path.abspath(folder):
        raise DetailFlowError(f"{where} names {name}, which is not in the folder {folder}: give paths within it")
    return path


def _text(label: Any, where: str) -> str | None:
    if label in (None, "", -1, "-1"):
        return None
    if isinstance(label, bool) or not isinstance(label, str | int):
        raise DetailFlowError(f"{where} has the label {label!r}, which is neither a class number nor a name")
    return str(label)
