"""Labels of a folder's images in `metadata.csv` or `metadata.jsonl`, as the `datasets` library has them."""

import csv
import json
import os
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import Any, TextIO

from detailflow.data.decode import explained
from detailflow.data.summary import Notes
from detailflow.errors import DetailFlowError

_NAMES = ("file_name", "image_file_name")
_LIKE_LABEL = ("label", "class", "categor")  # how a column of labels may be called


def read_labels(files: Sequence[str], label_column: str, notes: Notes) -> dict[str, str | None] | None:
    """Return the label of each image by its path; `None` if none of the files gives labels.

    A file that gives no labels is left aside, unless its column was asked for by name.
    """
    labels: dict[str, str | None] = {}
    wanted, used = _column(label_column), False
    for file in files:
        folder, base = os.path.split(file)
        found = 0
        others: set[str] = set()  # columns of rows that give no label
        for number, row in _rows(file, {*_NAMES, wanted}):
            name = next((row[key] for key in _NAMES if row.get(key)), None)
            if name is None or wanted not in row:
                others.update(row)
                continue
            found += 1
            where = f"{file} row {number}"
            path, label = _inside(folder, name, where), _text(row[wanted], where)
            if labels.setdefault(path, label) != label:
                raise DetailFlowError(
                    f"{where} gives {name} the label {label!r}, and another gives it {labels[path]!r}"
                )
        used = used or found > 0
        if not found:
            notes.leave(os.path.splitext(file)[1], base)
            if alike := sorted(column for column in others if column.startswith(_LIKE_LABEL)):
                notes.question = (
                    f"{base} has no column {label_column}: did you mean {alike[0]} (--label-column {alike[0]})?"
                )
    if not used and label_column != "label":
        raise DetailFlowError(
            f"no images have the label {label_column!r}: it would be a column beside file_name in metadata.csv or "
            "metadata.jsonl"
        )
    return labels if used else None


def _column(name: str) -> str:
    return name.strip().casefold()


def _rows(file: str, wanted: set[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield each row's number and its cells by the names of their columns in lower case."""
    kinds = (OSError, ValueError, csv.Error, RecursionError)
    with (
        explained(f"{file} cannot be read", kinds, hint="it has a row with file_name for each image"),
        open(file, encoding="utf-8-sig", newline="") as opened,
    ):
        rows = _csv_rows(opened) if file.lower().endswith(".csv") else map(_json_row, filter(str.strip, opened))
        for number, row in enumerate(rows, 1):
            columns = [_column(name) for name, _ in row]
            if twice := [name for name in wanted if columns.count(name) > 1]:
                raise DetailFlowError(f"{file} has several columns called {twice[0]}: keep one of them")
            yield number, dict(zip(columns, (cell for _, cell in row), strict=True))


def _csv_rows(opened: TextIO) -> Iterator[list[tuple[str, Any]]]:
    """Yield the rows of columns separated by commas, semicolons or tabs, whichever the first line has most of."""
    first = opened.readline()
    opened.seek(0)
    reader = csv.reader(opened, delimiter=max(",;\t", key=first.count), skipinitialspace=True)
    header = next(reader, [])
    for cells in reader:
        if cells:
            yield list(zip_longest(header, cells[: len(header)]))


def _json_row(line: str) -> list[tuple[str, Any]]:
    row = json.loads(line)
    if not isinstance(row, dict):
        raise ValueError("a row is no object")
    return list(row.items())


def _inside(folder: str, name: Any, where: str) -> str:
    if not isinstance(name, str):
        raise DetailFlowError(f"{where} has {name!r} as file_name, which is no text")
    path, home = os.path.normpath(os.path.join(folder, name)), os.path.abspath(folder)
    if os.path.isabs(name) or os.path.commonpath((os.path.abspath(path), home)) != home:
        raise DetailFlowError(f"{where} names {name}, which is not in the folder {folder}: give paths within it")
    return path


def _text(label: Any, where: str) -> str | None:
    if label in (None, "", -1, "-1"):
        return None
    if isinstance(label, bool) or not isinstance(label, str | int):
        raise DetailFlowError(f"{where} has the label {label!r}, which is neither a class number nor a name")
    return str(label).strip() or None
