"""Sets of images: a folder, parquet files, WebDataset shards or a hub data set, read one image at a time as RGB.

Only parquet files, folders by `save_to_disk` and hub data sets need the `datasets` library (the `train` extra).
"""

import logging
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path

from detailflow.data.decode import image_suffixes, load_rgb, to_rgb
from detailflow.data.folder import MANY, Found, Notes, find_in_folder, in_folders, within
from detailflow.data.metadata import read_labels
from detailflow.data.parquet import open_parquet
from detailflow.data.source import (
    ImageSource,
    class_order,
    file_sizes,
    from_names,
    labelled,
    spread,
    tolerated,
    unlabelled,
)
from detailflow.data.tables import open_hub, open_saved
from detailflow.data.webdataset import open_shards
from detailflow.errors import DetailFlowError, DetailFlowWarning, printable

__all__ = ["Found", "ImageSource", "find", "load_rgb", "open_images", "spread", "to_rgb", "tolerated"]

_log = logging.getLogger(__name__)
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_LONGEST_RANGE = 1_000_000  # files
_LONGEST_NUMBER = 12  # digits
_MAGIC = re.compile(r"[*?[]")


def open_images(
    data: str | os.PathLike[str],
    *,
    split: str | None = None,
    image_column: str = "image",
    label_column: str = "label",
) -> ImageSource:
    """Open a set of images. What is probably a mistake in it is a Python warning; `detailflow data` tells more.

    Args:
        data: one of

            - a folder of images, in one subfolder per class, with labels in `metadata.csv` or `metadata.jsonl` (`file_name`,
              `label`), or without either (one class);
            - a parquet file, a glob of them or a folder of them, in the Hugging Face layout (an image and a label column), or
              a folder by `save_to_disk`;
            - a WebDataset shard (.tar), a glob or a range `{000..009}` of them or a folder of them, in which an image stands
              beside a .cls file (its class, as a number or a name) or a .json file with `label_column`;
            - the name of a data set on the Hugging Face hub.
        split: train, val or test, if a folder has such subfolders or files of such names, and on the hub; `None` is train if
            there are splits. Single files, globs and ranges hold just their images.

    Raises:
        DetailFlowError: if it cannot be read or holds no images.
    """
    found = find(data, split)
    if found.kind == "hub":
        source = open_hub(found.where, split or "train", image_column, label_column)
    elif found.kind == ".parquet":
        source = open_parquet(found.files, image_column, label_column, found.notes)
    elif found.kind == "saved":
        source = open_saved(found.where, image_column, label_column)
    elif found.kind == ".tar":
        source = open_shards(found.files, image_column, label_column, found.notes)
    else:
        source = _open_folder(found, label_column)
    source.where, source.notes = printable(os.fspath(data)), found.notes
    for problem in found.notes.warnings:
        warnings.warn(printable(problem), DetailFlowWarning, stacklevel=2)
    if _log.isEnabledFor(logging.INFO):  # as the summary takes a while
        _log.info("%s", source.summary)
    return source


def find(data: str | os.PathLike[str], split: str | None = None) -> Found:
    """Return what the images of `open_images(data, split)` are in.

    Raises:
        DetailFlowError: if there are none.
    """
    data = os.path.expanduser(os.fspath(data))
    path = Path(data)
    try:
        is_folder, is_file = path.is_dir(), path.is_file()
    except (OSError, ValueError) as error:  # no name of a file at all, or one that may not be looked at
        raise DetailFlowError(f"{data!r} cannot be opened ({getattr(error, 'strerror', None) or error})") from error
    if is_folder:
        return find_in_folder(path, split)
    if is_file:
        if path.suffix.lower() not in MANY:
            raise DetailFlowError(f"{data} is neither a folder of images nor a .parquet or .tar file")
        return Found(path.suffix.lower(), data, [path], Notes())
    if _RANGE.search(data):
        return _of_one_kind(data, [Path(name) for name in _ranged(data)])
    if _MAGIC.search(data):
        return _of_one_kind(data, _matching(data))
    if not _HUB_NAME.fullmatch(data) or path.suffix.lower() in image_suffixes().union(MANY):
        raise DetailFlowError(
            f"{data} does not exist: give a folder of images, .parquet or .tar files, or the name of a hub data set"
        )
    return Found("hub", data, [], Notes())


def _ranged(pattern: str) -> Iterator[str]:
    """shard-{000..002}.tar → shard-000.tar, shard-001.tar, shard-002.tar"""
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


def _matching(pattern: str) -> list[Path]:
    """Return the files and folders that a pattern matches. `**` follows no links, which may lead round in circles."""
    parts = Path(pattern).parts
    first = next(number for number, part in enumerate(parts) if _MAGIC.search(part))
    rest = [part if part == "**" else part.replace("**", "*") for part in parts[first:]]
    if rest[-1] == "**":
        rest.append("*")
    top = Path(*parts[:first])
    found = top.glob(os.path.join(*rest))
    if not any(part.startswith(".") for part in rest):
        found = (path for path in found if not any(part.startswith(".") for part in path.relative_to(top).parts))
    return sorted(set(found), key=str)


def _of_one_kind(data: str, files: list[Path]) -> Found:
    for kind in MANY:
        if chosen := [file for file in files if file.suffix.lower() == kind]:
            for file in chosen:
                if not file.is_file():
                    raise DetailFlowError(f"{file} does not exist: check the range in {data}")
            return Found(kind, data, chosen, Notes())
    raise DetailFlowError(f"{data} matches no .parquet file and no .tar file: check the pattern")


class _FileRows:
    def __init__(self, files: list[str], root: str) -> None:
        self.files, self.root = files, root

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        return self.files[index]

    def stored(self, index: int) -> str:
        return self.files[index]

    def listing(self) -> Iterator[tuple[str, int]]:
        return file_sizes(self.files, self.root)


def _open_folder(found: Found, label_column: str) -> ImageSource:
    """A folder of image files, with the labels of its metadata, or else of its subfolders."""
    top, notes = found.where, found.notes
    found = _without_partial_metadata(found)
    labels = read_labels(found.metadata, label_column, notes) if found.metadata or label_column != "label" else None
    if labels is not None:
        return _with_labels(found, labels)
    rows = _FileRows([str(file) for file in found.files], top)
    classes = list(in_folders(found.files, top))
    if not any(classes):
        return unlabelled(rows)
    if None in classes:
        raise DetailFlowError(
            f"{top} has images beside its class subfolders (such as {found.files[classes.index(None)].name}): "
            "move each into the subfolder of its class"
        )
    names = [name for name in classes if name is not None]
    for empty in sorted(set(found.folders).difference(names)):
        folder = os.path.join(top, empty)
        if not any(
            problem.startswith((f"{folder} ", f"{folder}{os.sep}")) for problem in notes.warnings
        ):  # said already
            holds = sorted(
                {kind for kind, files in notes.left_aside.items() if any(f.startswith(f"{empty}/") for f in files)}
            )
            inside = f" (it holds {', '.join(holds)})" if holds else ""
            question = f"; {notes.question}" if notes.question else ""
            raise DetailFlowError(
                f"{folder} holds no images{inside}: put some there or remove this class subfolder{question}"
            )
    _ask_for_the_folder_below(top, names, found)
    return from_names(rows, names, top)


def _without_partial_metadata(found: Found) -> Found:
    """Leave metadata aside if there are images above it or beside its folder: it would make these vanish."""
    holders = {os.path.dirname(file) for file in found.metadata}
    folders = {file.parent for file in found.files}
    outside = next(
        (folder for folder in sorted(folders) if not holders.intersection(map(str, (folder, *folder.parents)))), None
    )
    if outside is None or not holders:
        return found
    for file in found.metadata:
        found.notes.leave(os.path.splitext(file)[1].lower(), within(file, found.where))
    metadata = found.metadata[0]
    found.notes.warnings.append(
        f"{metadata} is left aside: it says nothing of images in other folders, such as {outside}"
    )
    return found._replace(metadata=[])


def _ask_for_the_folder_below(top: str, names: list[str], found: Found) -> None:
    if len(set(names)) > 1:
        return
    below = os.path.join(top, names[0])
    folders = list(in_folders(found.files, below))
    if None not in folders:
        classes = class_order({name for name in folders if name})
        shown = ", ".join(classes[:3]) + (", …" if len(classes) > 3 else "")
        found.notes.question = f"did you mean {below}, with {shown}?"


def _with_labels(found: Found, labels: dict[str, str | None]) -> ImageSource:
    notes, what = found.notes, " or ".join(sorted({os.path.basename(file) for file in found.metadata}))
    files = {os.path.normpath(file): str(file) for file in found.files}
    chosen = [path for path in files if path in labels]
    notes.leave(f"image without a row in {what}", *(within(path, found.where) for path in files if path not in labels))
    missing = [path for path in labels if path not in files and not os.path.exists(path)]
    if missing:
        notes.warnings.append(f"{what} names {len(missing):,} files that are not there (the first: {missing[0]})")
    if not chosen:
        raise DetailFlowError(f"{found.where} has no image that {what} names: check the paths in its column file_name")
    rows = _FileRows([files[path] for path in chosen], found.where)
    return labelled(rows, found.where, [labels[path] for path in chosen])
