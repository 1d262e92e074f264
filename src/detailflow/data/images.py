"""Sets of images: a folder, parquet files, WebDataset shards or a hub dataset, read one image at a time as RGB.

Only parquet files and hub datasets need the `datasets` library (the `train` extra).
"""

import os
import re
from collections.abc import Iterator
from glob import glob
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from detailflow.data.decode import image_suffixes, load_rgb, to_rgb
from detailflow.data.source import ImageSource, file_sizes, unlabelled
from detailflow.data.tables import open_hub, open_parquet
from detailflow.data.webdataset import open_shards
from detailflow.errors import DetailFlowError

__all__ = ["Found", "ImageSource", "find", "load_rgb", "open_images", "to_rgb"]

_SPLIT_ALIASES = {"train": "train", "test": "test", "val": "val", "valid": "val", "validation": "val"}
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_MANY = (".parquet", ".tar")  # files of many images


def open_images(
    data: str | os.PathLike[str], split: str | None = None, image_column: str = "image", label_column: str = "label"
) -> ImageSource:
    """Open a set of images. `data` is one of

    - a folder of images, in one subfolder per class or all in one place (one class);
    - a parquet file, a glob of them or a folder of them, in the Hugging Face layout (an image and a label column);
    - a WebDataset shard (.tar), a glob or a range `{000..009}` of them or a folder of them, in which an image stands beside
      a .cls file (its class, as a number or a name) or a .json file with `label_column`;
    - the name of a dataset on the Hugging Face hub.

    `split` picks train, test or val where a folder has such subfolders or files of such names, and on the hub; None means
    train where there are splits. Single files, globs and ranges hold just their images. Raises DetailFlowError.
    """
    found = find(data, split)
    if found.kind == "hub":
        source = open_hub(found.where, split or "train", image_column, label_column)
    elif found.kind == ".parquet":
        source = open_parquet(found.files, image_column, label_column)
    elif found.kind == ".tar":
        source = open_shards(found.files, image_column, label_column)
    else:
        source = _open_folder(Path(found.where), found.files)
    source.where = os.fspath(data)
    return source


class Found(NamedTuple):
    """What a user's `data` and `split` mean. `kind` is "folder" (of image files), ".parquet", ".tar" or "hub"."""

    kind: str
    where: str  # the folder, or the name on the hub
    files: list[Path]


def find(data: str | os.PathLike[str], split: str | None = None) -> Found:
    """Where the images of `open_images(data, split)` lie. Raises DetailFlowError where there are none."""
    data = os.path.expanduser(os.fspath(data))
    path = Path(data)
    if path.is_dir():
        return _find_in_folder(path, split)
    if path.is_file():
        if path.suffix.lower() not in _MANY:
            raise DetailFlowError(f"{data} is neither a folder of images nor a .parquet or .tar file")
        return Found(path.suffix.lower(), data, [path])
    if _RANGE.search(data):
        return _of_one_kind(data, [Path(name) for name in _ranged(data)])
    if any(character in data for character in "*?["):
        return _of_one_kind(data, [Path(name) for name in sorted(glob(data, recursive=True))])
    if not _HUB_NAME.fullmatch(data) or path.suffix.lower() in image_suffixes().union(_MANY):
        raise DetailFlowError(
            f"{data} does not exist: give a folder of images, .parquet or .tar files, or the name of a hub dataset"
        )
    return Found("hub", data, [])


def _ranged(pattern: str) -> Iterator[str]:
    """shard-{000..002}.tar → shard-000.tar, shard-001.tar, shard-002.tar"""
    match = _RANGE.search(pattern)
    if match is None:
        yield pattern
        return
    first, last = match.groups()
    for number in range(int(first), int(last) + 1):
        yield from _ranged(f"{pattern[: match.start()]}{number:0{len(first)}d}{pattern[match.end() :]}")


def _of_one_kind(data: str, files: list[Path]) -> Found:
    for kind in _MANY:
        if chosen := [file for file in files if file.suffix.lower() == kind]:
            for file in chosen:
                if not file.is_file():
                    raise DetailFlowError(f"{file} does not exist: check the range in {data}")
            return Found(kind, data, chosen)
    raise DetailFlowError(f"{data} matches no .parquet file and no .tar file: check the pattern")


def _find_in_folder(folder: Path, split: str | None) -> Found:
    subfolders = _subfolders(folder)
    # Only where every subfolder is named like a split: "train" may also be a class, between "bus" and "truck".
    if subfolders and all(name in _SPLIT_ALIASES for name in subfolders):
        return _find_in_folder(folder / _pick_split(folder, subfolders, split), None)

    files = list(_files_under(folder))
    for kind in _MANY:
        if many := [file for file in files if file.suffix.lower() == kind]:
            splits = [_split_of(file.name) for file in many]
            if all(splits):
                picked = _pick_split(folder, sorted({name for name in splits if name}), split)
                return Found(kind, str(folder), [file for file, name in zip(many, splits, strict=True) if name == picked])
            if split is None:
                return Found(kind, str(folder), many)
            break
    if split is not None:
        raise DetailFlowError(f"{folder} has no split {split!r}: it has no train, test or val subfolder")
    images = [file for file in files if file.suffix.lower() in image_suffixes()]
    if not images:
        raise DetailFlowError(f"{folder} holds no images: put some there, in one subfolder per class")
    return Found("folder", str(folder), images)


def _subfolders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _files_under(folder: Path) -> Iterator[Path]:
    """Every file below `folder`, hidden ones left out, in a fixed order."""
    for root, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith("."):
                yield Path(root, name)


def _split_of(name: str) -> str | None:
    """train-00000-of-00002.parquet, imagenet1k-train-0000.tar → train"""
    return next((part for part in re.split(r"[-_.]", name) if part in _SPLIT_ALIASES), None)


def _pick_split(folder: Path, names: list[str], split: str | None) -> str:
    """The one of `names` that is `split`; train (or the only one) where `split` is None."""
    if split is None:
        if "train" not in names and len(names) > 1:
            raise DetailFlowError(f"{folder} has no train split: choose one of {', '.join(names)}")
        return "train" if "train" in names else names[0]
    for name in names:
        if _SPLIT_ALIASES[name] == _SPLIT_ALIASES.get(split, split):
            return name
    raise DetailFlowError(f"{folder} has no split {split!r}: it has {', '.join(names)}")


class _FileRows:
    def __init__(self, files: list[str], root: str) -> None:
        self.files, self.root = files, root

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        return self.files[index]

    def image(self, index: int, least: int | None = None) -> Image.Image:
        return load_rgb(self.files[index], least=least)

    def listing(self) -> Iterator[tuple[str, int]]:
        return file_sizes(self.files, self.root)


def _open_folder(folder: Path, images: list[Path]) -> ImageSource:
    subfolders = _subfolders(folder)
    classes = [file.relative_to(folder).parts[0] if file.parent != folder else None for file in images]
    rows = _FileRows([str(file) for file in images], str(folder))
    if not any(classes):
        return unlabelled(rows)
    if None in classes:
        raise DetailFlowError(
            f"{folder} has images beside its class subfolders (such as {images[classes.index(None)].name}): "
            "move each into the subfolder of its class"
        )
    if empty := set(subfolders).difference(name for name in classes if name):
        raise DetailFlowError(f"{folder / min(empty)} holds no images: put some there or remove this class subfolder")
    return ImageSource(rows, np.searchsorted(np.array(subfolders), np.array(classes)), tuple(subfolders))
