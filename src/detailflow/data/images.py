"""Sets of images: a folder, parquet files, WebDataset shards or a hub data set, read one image at a time as RGB.

Only parquet files, folders by `save_to_disk` and hub data sets need the `datasets` library (the `train` extra).
"""

import csv
import logging
import os
import re
import unicodedata
import warnings
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from detailflow.data.columns import ask_for_labels, parse_json, plain_name
from detailflow.data.folder import (
    ARCHIVES,
    MANY,
    DataFiles,
    file_sizes,
    find_in_folder,
    first_folders,
    is_system,
    leave_others,
    most_of_one_kind,
    within,
)
from detailflow.data.image_files import image_suffixes
from detailflow.data.notes import Notes
from detailflow.data.parquet import open_parquet
from detailflow.data.source import ImageSource, class_order, labelled, not_there
from detailflow.data.tables import open_hub, open_saved
from detailflow.data.webdataset import open_shards
from detailflow.errors import DetailFlowError, DetailFlowWarning, explained
from detailflow.progress import progress_bar
from detailflow.words import printable, several, shown

_log = logging.getLogger(__name__)
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_LONGEST_RANGE = 1_000_000  # files
_LONGEST_NUMBER = 12  # digits
_MAGIC = re.compile(r"[*?[]")
_FILE_NAMES = ("file_name", "image_file_name", "filename")  # columns of metadata files
Labels = dict[str, str | list[str | None] | None]  # by path
_MORE = "\0"  # the key of cells beyond the columns of a table


def open_images(
    data: str | os.PathLike[str],
    *,
    split: str | None = None,
    image_column: str = "image",
    label_column: str = "label",
) -> ImageSource:
    """Open a set of images. What is probably a mistake in it is a Python warning; `detailflow data` tells more.

    >>> source = open_images("photos")  # doctest: +SKIP
    >>> len(source), source.class_names, source.labels, source.summary  # doctest: +SKIP

    Args:
        data: one of

            - a folder of images, in one subfolder per class, with labels in `metadata.csv` or `metadata.jsonl`
              (`file_name`, `label`), or without either (no classes);
            - a parquet file, a glob of them or a folder of them, in the Hugging Face layout (an image and a label
              column), or a folder by `save_to_disk`;
            - a WebDataset shard (.tar), a glob or a range `{000..009}` of them or a folder of them, with a .cls file
              (its class, as a number or a name) or a .json file with `label_column` beside each image;
            - the name of a data set on the Hugging Face hub.
        split: train, val or test, if a folder has such subfolders or files of such names, and on the hub; `None` is
            train if there are splits. Single files, globs and ranges have no splits.
    """
    found = find(data, split)
    openers = {
        "folder": _open_folder,
        ".parquet": open_parquet,
        ".tar": open_shards,
        "saved": open_saved,
        "hub": open_hub,
    }
    source = openers[found.kind](found, image_column, label_column)
    source.where, source.notes = printable(os.fspath(data)), found.notes
    for problem in found.notes.warnings:
        warnings.warn(printable(problem), DetailFlowWarning, stacklevel=2)
    if _log.isEnabledFor(logging.INFO):  # a summary reads headers of images
        _log.info("%s", source.summary)
    return source


def find(data: str | os.PathLike[str], split: str | None = None) -> DataFiles:
    """Return the files with the images of `open_images(data, split=split)`."""
    if not isinstance(data, str | os.PathLike):
        raise DetailFlowError(f"data must be a path or a name, not {shown(data, 40)}")
    data = os.path.expanduser(os.fspath(data))
    path = Path(data)
    with explained(f"{data!r} cannot be opened"):  # no name of a file at all, or one that may not be looked at
        is_folder, is_file = path.is_dir(), path.is_file()
    if is_folder:
        return find_in_folder(str(path), split)
    if is_file:
        if path.suffix.lower() not in MANY:
            if path.suffix.lower() in ARCHIVES:
                raise DetailFlowError(f"{data} is an archive, which is not read: unpack it, and give the folder")
            raise DetailFlowError(f"{data} is neither a folder of images nor a .parquet or .tar file")
        return DataFiles(path.suffix.lower(), data, [str(path)], Notes())
    if _RANGE.search(data):
        return _of_one_kind(data, _ranged(data))
    if _MAGIC.search(data):
        return _of_one_kind(data, _matching(data))
    if not _HUB_NAME.fullmatch(data) or path.suffix.lower() in image_suffixes().union(MANY):
        raise not_there(data)
    return DataFiles("hub", data, [], Notes(), split=split or "train")


def _ranged(pattern: str) -> Iterator[str]:
    """Yield shard-000.tar, shard-001.tar, shard-002.tar of shard-{000..002}.tar."""
    parts: list[Sequence[str]] = []
    count, end = 1, 0
    for match in _RANGE.finditer(pattern):
        first, last = match.groups()
        count *= int(last) - int(first) + 1 if len(last) <= _LONGEST_NUMBER else _LONGEST_RANGE + 1
        if count > _LONGEST_RANGE:
            raise DetailFlowError(f"{pattern} is too long a range: it may name {_LONGEST_RANGE:,} files")
        numbers = range(int(first), int(last) + 1)
        parts += [pattern[end : match.start()]], [f"{number:0{len(first)}d}" for number in numbers]
        end = match.end()
    return map("".join, product(*parts, [pattern[end:]]))


def _matching(pattern: str) -> list[str]:
    """Return the files and folders that a pattern matches. `**` follows no links, which may lead round in circles."""
    parts = Path(pattern).parts
    first = next(number for number, part in enumerate(parts) if _MAGIC.search(part))
    rest = [part if part == "**" else part.replace("**", "*") for part in parts[first:]]
    if rest[-1] == "**":
        rest.append("*")
    top = Path(*parts[:first])
    found: Iterable[Path] = top.glob(os.path.join(*rest))
    if not any(map(is_system, rest)):
        found = (path for path in found if not any(map(is_system, path.relative_to(top).parts)))
    return sorted(map(str, set(found)))


def _of_one_kind(data: str, files: Iterable[str]) -> DataFiles:
    """Return those of the files of many images that a folder of them would be; the others are left aside."""
    files = [str(Path(file)) for file in files]
    folders = set(filter(os.path.isdir, files))
    kind, chosen = most_of_one_kind([file for file in files if file not in folders])
    if not chosen and folders:
        raise DetailFlowError(f"{data} matches only folders, such as {min(folders)}: give what is in them, as {data}/*")
    if not chosen:
        raise DetailFlowError(f"{data} matches no .parquet file and no .tar file: check the pattern")
    if wrong := next((file for file in chosen if not os.path.isfile(file)), None):
        if os.path.exists(wrong):  # reading a pipe may never end
            raise DetailFlowError(f"{wrong} is not a regular file: choose a pattern without it")
        raise DetailFlowError(f"{wrong} does not exist: check the range in {data}")
    notes, top = Notes(), os.path.commonpath(list(map(os.path.dirname, files)))
    if folders:  # those that a pattern such as ** matches with the files in them are read
        unread = folders.difference(str(folder) for file in files for folder in Path(file).parents)
        notes.leave("folder", *(within(folder, top) for folder in sorted(unread)))
    leave_others(top, files, {*chosen, *folders}, notes)
    return DataFiles(kind, data, chosen, notes)


class _FileRows:
    """Images that are files of their own."""

    def __init__(self, files: list[str], root: str) -> None:
        self.files, self.root = files, root
        self._stamps: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        return self.files[index]

    def stored(self, index: int) -> str:
        return self.files[index]

    def listing(self) -> Iterator[tuple[str, int]]:
        return file_sizes(self.files, self.root)

    def stamps(self) -> np.ndarray:
        if self._stamps is None:
            files = progress_bar(self.listing(), desc="look at files", total=len(self), unit="file")
            self._stamps = np.array([size for _, size in files])
        return self._stamps


def _open_folder(found: DataFiles, image_column: str, label_column: str) -> ImageSource:
    """Open a folder of image files, with the labels of its metadata, or else of its subfolders."""
    top, metadata = found.where, _whole_metadata(found)
    labels = _read_labels(metadata, label_column, found.notes) if metadata or label_column != "label" else None
    if labels is not None:
        return _with_metadata(found, " or ".join(sorted(set(map(os.path.basename, metadata)))), labels)
    classes = list(first_folders(found.files, top))
    if any(classes):
        _check_classes(found, classes)
    return labelled(_FileRows(found.files, top), top, classes, no_label=(None, ""))  # a folder may be called -1


def _check_classes(found: DataFiles, classes: list[str | None]) -> None:
    """Check that all images are in class folders and that each has some; ask if the user meant the folder below."""
    top, notes = found.where, found.notes
    if None in classes:
        beside = os.path.basename(found.files[classes.index(None)])
        raise DetailFlowError(
            f"{top} has images beside its class subfolders (such as {beside}): "
            "move each into the subfolder of its class"
        )
    for empty in sorted(set(found.folders).difference(filter(None, classes))):
        folder = os.path.join(top, empty)
        if any(problem.startswith((f"{folder} ", f"{folder}{os.sep}")) for problem in notes.warnings):
            continue
        kinds = sorted(
            kind for kind, files in notes.left_aside.items() if any(f.startswith(f"{empty}{os.sep}") for f in files)
        )
        inside = f" (it holds {', '.join(kinds)})" if kinds else ""
        question = f"; {notes.question}" if notes.question else ""
        raise DetailFlowError(
            f"{folder} holds no images{inside}: put some there or remove this class subfolder{question}"
        )
    if len(set(classes)) == 1:
        below = os.path.join(top, classes[0] or "")
        inner = set(first_folders(found.files, below))
        if None not in inner:
            names = class_order(filter(None, inner))
            notes.question = f"did you mean {below}, with {', '.join(names[:3])}{', …' * (len(names) > 3)}?"


def _whole_metadata(found: DataFiles) -> Sequence[str]:
    """Return the metadata files, or none if there are images outside their folders, which would vanish."""
    holders = {os.path.dirname(file) for file in found.metadata}
    folders = sorted({Path(file).parent for file in found.files}) if holders else []
    outside = [folder for folder in folders if not holders.intersection(map(str, (folder, *folder.parents)))]
    if not outside:
        return found.metadata
    for file in found.metadata:
        found.notes.leave(os.path.splitext(file)[1].lower(), within(file, found.where))
    found.notes.warnings.append(
        f"{found.metadata[0]} is left aside: it says nothing of images in other folders, such as {outside[0]}"
    )
    return ()


def _with_metadata(found: DataFiles, what: str, labels: Labels) -> ImageSource:
    notes, files = found.notes, {os.path.normpath(file): file for file in found.files}
    labels = _by_files(labels, files)
    chosen = [path for path in files if path in labels]
    notes.leave(f"image without a row in {what}", *(within(path, found.where) for path in files if path not in labels))
    missing = [path for path in labels if path not in files and not os.path.exists(path)]
    if missing:
        gone = several(len(missing), "file")
        notes.warnings.append(f"{what} names {gone} that cannot be found (the first: {missing[0]})")
    if not chosen:
        raise DetailFlowError(f"{found.where} has no image that {what} names: check the paths in its column file_name")
    rows = _FileRows([files[path] for path in chosen], found.where)
    return labelled(rows, found.where, [labels[path] for path in chosen])


def _by_files(labels: Labels, files: Collection[str]) -> Labels:
    """Return labels by the names that the files have, which some systems write with other characters for accents."""
    alike = {unicodedata.normalize("NFC", file): file for file in files if file not in labels}
    return {
        path if path in files else alike.get(unicodedata.normalize("NFC", path), path): labels[path] for path in labels
    }


def _read_labels(files: Sequence[str], label_column: str, notes: Notes) -> Labels | None:
    """Return the label of each image by its path; `None` if none of the files gives labels.

    A file that gives no labels is left aside, unless its column was asked for by name.
    """
    labels: Labels = {}
    without: list[tuple[str, Any, str]] = []  # folder, name and row of images that files of labels give none
    wanted, used = plain_name(label_column), False
    for file in files:
        folder, base = os.path.split(file)
        found = nameless = 0
        unnamed: list[tuple[str, Any, str]] = []
        others: set[str] = set()  # columns of rows that give no label
        for number, row in _rows(file, {*_FILE_NAMES, wanted}):
            name = next((row[key] for key in _FILE_NAMES if row.get(key)), None)
            where = f"{file} row {number}"
            if name is None or wanted not in row:
                others.update(row)
                if name is not None:
                    unnamed.append((folder, name, where))
                elif not nameless and _label(row.get(wanted), where, base) is not None:
                    nameless = number
                continue
            found += 1
            path, label = _inside(folder, name, where), _label(row[wanted], where, base)
            if labels.setdefault(path, label) != label:
                raise DetailFlowError(
                    f"{where} gives {name} the label {label!r}, and another gives it {labels[path]!r}: "
                    "write several labels of an image in one row"
                )
        if found and nameless:
            raise DetailFlowError(f"{file} row {nameless} has a label and no file_name: name its image or remove it")
        without += unnamed if found else []
        used = used or found > 0
        if not found:
            notes.leave(os.path.splitext(file)[1], base)
            if wanted in others:
                notes.question = f"{base} has no column file_name, so its labels are not used: is it called otherwise?"
            elif question := ask_for_labels(base, label_column, others):
                notes.question = question
            elif others.isdisjoint(_FILE_NAMES):
                notes.question = (
                    f"{base} has no column file_name, so it is not used: does its first row name the columns?"
                )
    if not used and label_column != "label":
        raise DetailFlowError(
            f"no images have the label {label_column!r}: it would be a column beside file_name in metadata.csv or "
            "metadata.jsonl"
        )
    for folder, name, where in without:
        labels.setdefault(_inside(folder, name, where), None)  # which is said with the name of the image
    return labels if used else None


def _rows(file: str, wanted: set[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield each row's number and its cells by the names of their columns in lower case."""
    kinds = (OSError, ValueError, RecursionError)
    with (
        explained(f"{file} cannot be read", csv.Error, hint="a quote that begins a cell must be closed at its end"),
        explained(f"{file} cannot be read", kinds, hint="it has a row with file_name for each image"),
        explained(f"{file} cannot be read", UnicodeDecodeError, hint="save it as UTF-8"),
        open(file, encoding="utf-8-sig", newline="") as opened,
    ):
        lines = enumerate(filter(str.strip, opened), 1)
        rows: Iterator[Any] = (parse_json(line, wanted, f"{file} row {number}") for number, line in lines)
        header = None
        if file.lower().endswith(".csv"):
            first = opened.readline()
            opened.seek(0)
            separator = max(",;\t", key=first.count)
            # Not strict, it would take all lines after a quote that is never closed for one cell.
            rows = reader = csv.DictReader(
                opened, restkey=_MORE, delimiter=separator, skipinitialspace=True, strict=True
            )
            header = reader.fieldnames
        for number, row in enumerate(rows, 1):
            if not isinstance(row, dict):
                raise ValueError("a row is not an object")
            if header and any(map(str.strip, more := row.pop(_MORE, []))):
                raise DetailFlowError(
                    f"{file} row {number} has {len(header) + len(more)} cells, and the first row names {len(header)} "
                    "columns: put a cell with a comma in quotes, and write several labels as cat;dog"
                )
            columns = list(map(plain_name, header or row))
            if twice := [name for name in wanted if columns.count(name) > 1]:
                raise DetailFlowError(f"{file} has several columns called {twice[0]}: keep one of them")
            yield number, {plain_name(name): cell for name, cell in row.items()}


def _inside(folder: str, name: Any, where: str) -> str:
    if not isinstance(name, str):
        raise DetailFlowError(f"{where} has {name!r} as file_name, which is not text")
    path, home = os.path.normpath(os.path.join(folder, name)), os.path.abspath(folder)
    if os.path.isabs(name) or os.path.commonpath((os.path.abspath(path), home)) != home:
        raise DetailFlowError(f"{where} names {name}, which is not in the folder {folder}: give paths within it")
    return path


def _label(cell: Any, where: str, file: str) -> str | list[str | None] | None:
    """Return the label in a cell, or several: a list in JSON, and "cat;dog" in CSV, which has no lists."""
    if isinstance(cell, str) and ";" in cell and file.lower().endswith(".csv"):
        cell = cell.split(";")
    return [_text(label, where) for label in cell] if isinstance(cell, list) else _text(cell, where)


def _text(label: Any, where: str) -> str | None:
    if label in (None, "", -1, "-1"):
        return None
    if isinstance(label, bool) or not isinstance(label, str | int):
        raise DetailFlowError(f"{where} has the label {label!r}, which is neither a class number nor a name")
    return str(label).strip() or None
