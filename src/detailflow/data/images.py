"""Sets of images: a folder, parquet files or a hub dataset, read one image at a time as RGB.

Pillow does all the decoding here, so that a damaged image is known by its name and can be skipped. Only parquet files
and hub datasets need the `datasets` library (the `train` extra).
"""

import io
import json
import logging
import os
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import glob
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np
from PIL import Image, ImageOps

from detailflow.errors import DetailFlowError

IMAGE_SUFFIXES = frozenset((".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"))
_SPLIT_ALIASES = {"train": "train", "test": "test", "val": "val", "valid": "val", "validation": "val"}
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_SHOW_PROGRESS_ABOVE = 256 * 2**20  # bytes of parquet; less is ready in seconds


# ------------------------------------------------------------------------------------------------- one image


def load_rgb(source: str | os.PathLike[str] | bytes, name: str | None = None) -> Image.Image:
    """Read one image file (path) or its bytes as RGB.

    EXIF orientation is applied, transparency is laid over white, and palettes, CMYK, greyscale and 16-bit greyscale are
    converted. Raises DetailFlowError, naming the image by `name` (default: its path), when it cannot be read.
    """
    file: Any
    if isinstance(source, bytes):
        name, file = name or "image", io.BytesIO(source)
    else:
        path = Path(source)
        name, file = name or str(path), path
        if path.is_dir():
            raise DetailFlowError(f"{name} is a folder: give the path of one image file")
        if not path.exists():
            raise DetailFlowError(f"{name} does not exist: give the path of an image file")
    try:
        with Image.open(file) as image:
            image.load()
            return to_rgb(image)
    except PermissionError as error:
        raise DetailFlowError(f"{name} cannot be opened: you have no permission to read it") from error
    except Image.UnidentifiedImageError as error:
        raise DetailFlowError(f"{name} is not an image: its contents are in no format that Pillow knows") from error
    except Image.DecompressionBombError as error:
        raise DetailFlowError(f"{name} is too large an image: it may have at most 178 million pixels") from error
    except (OSError, ValueError, TypeError, SyntaxError, EOFError, LookupError, ArithmeticError, struct.error) as error:
        raise DetailFlowError(f"{name} is damaged and cannot be decoded ({_first_line(error)})") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB of a loaded image of any mode: turned upright by its EXIF data, transparency over white, 16 bits scaled to 8."""
    # The pixels may be sound where only the EXIF block is not: then take them as they are stored.
    with suppress(OSError, ValueError, TypeError, SyntaxError, LookupError, struct.error):
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I"):  # Pillow would clip 16 bits to 8 instead of scaling them
        values = np.asarray(image).astype(np.int64)
        if image.mode != "I" or values.max(initial=0) > 255:
            values = (values + 128) // 257
        image = Image.fromarray(values.clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0].rstrip(".") if text else type(error).__name__


# ------------------------------------------------------------------------------------------------- sets of images


class _Rows(Protocol):
    """Where a set's images lie."""

    def __len__(self) -> int: ...
    def name(self, index: int) -> str: ...
    def image(self, index: int) -> Image.Image: ...


class ImageSource:
    """A set of labelled images in a fixed order; made by `open_images`.

    `labels` is (len,) int64 and counts into `class_names`. A set without labels has the one class "image".
    """

    def __init__(self, rows: _Rows, labels: np.ndarray, class_names: tuple[str, ...]) -> None:
        self._rows, self.labels, self.class_names = rows, labels, class_names

    def __len__(self) -> int:
        return len(self._rows)

    def name(self, index: int) -> str:
        """Where the image lies, for messages: a path, or "file.parquet row 17"."""
        return self._rows.name(index)

    def image(self, index: int) -> Image.Image:
        """The image as RGB. Raises DetailFlowError, naming it, when it cannot be read."""
        return self._rows.image(index)


def open_images(
    data: str | os.PathLike[str], split: str | None = None, image_column: str = "image", label_column: str = "label"
) -> ImageSource:
    """Open a set of images. `data` is one of

    - a folder of images, in one subfolder per class or all in one place (one class);
    - a parquet file, a glob of them or a folder of them, in the Hugging Face layout (an image and a label column);
    - the name of a dataset on the Hugging Face hub.

    `split` picks train, test or val where a folder has such subfolders or parquet files of such names, and on the hub;
    None means train where there are splits. Single files and globs hold just their rows. Raises DetailFlowError.
    """
    data = os.path.expanduser(os.fspath(data))
    path = Path(data)
    if path.is_dir():
        return _open_folder(path, split, image_column, label_column)
    if path.is_file():
        if path.suffix.lower() != ".parquet":
            raise DetailFlowError(f"{data} is neither a folder of images nor a .parquet file")
        return _open_parquet([path], image_column, label_column)
    if any(character in data for character in "*?["):
        files = [Path(name) for name in sorted(glob(data, recursive=True)) if name.lower().endswith(".parquet")]
        if not files:
            raise DetailFlowError(f"{data} matches no .parquet file: check the pattern")
        return _open_parquet(files, image_column, label_column)
    if not _HUB_NAME.fullmatch(data) or path.suffix.lower() in IMAGE_SUFFIXES | {".parquet"}:
        raise DetailFlowError(f"{data} does not exist: give a folder of images, a .parquet file or a hub dataset name")
    return _open_hub(data, split or "train", image_column, label_column)


# ------------------------------------------------------------------------------------------------- folders


class _FileRows:
    def __init__(self, files: list[str]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        return self.files[index]

    def image(self, index: int) -> Image.Image:
        return load_rgb(self.files[index])


def _files_under(folder: Path) -> Iterator[Path]:
    """Every file below `folder`, hidden ones left out, in a fixed order."""
    for root, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith("."):
                yield Path(root, name)


def _open_folder(folder: Path, split: str | None, image_column: str, label_column: str) -> ImageSource:
    subfolders = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    # Only where every subfolder is named like a split: "train" may also be a class, between "bus" and "truck".
    if subfolders and all(name in _SPLIT_ALIASES for name in subfolders):
        return _open_folder(folder / _pick_split(folder, subfolders, split), None, image_column, label_column)

    files = list(_files_under(folder))
    parquet = [file for file in files if file.suffix.lower() == ".parquet"]
    if parquet:
        splits = {file: re.split(r"[-_.]", file.name)[0] for file in parquet}
        if set(splits.values()) <= _SPLIT_ALIASES.keys():
            picked = _pick_split(folder, sorted(set(splits.values())), split)
            return _open_parquet([file for file in parquet if splits[file] == picked], image_column, label_column)
    if split is not None:
        raise DetailFlowError(f"{folder} has no split {split!r}: it has no train, test or val subfolder")
    if parquet:
        return _open_parquet(parquet, image_column, label_column)

    images = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
    if not images:
        raise DetailFlowError(f"{folder} holds no images: put some there, in one subfolder per class")
    classes = [file.relative_to(folder).parts[0] if file.parent != folder else None for file in images]
    rows = _FileRows([str(file) for file in images])
    if not any(classes):
        return _unlabelled(rows)
    if None in classes:
        raise DetailFlowError(
            f"{folder} has images beside its class subfolders (such as {images[classes.index(None)].name}): "
            "move each into the subfolder of its class"
        )
    if empty := set(subfolders).difference(name for name in classes if name):
        raise DetailFlowError(f"{folder / min(empty)} holds no images: put some there or remove this class subfolder")
    return ImageSource(rows, np.searchsorted(np.array(subfolders), np.array(classes)), tuple(subfolders))


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


def _unlabelled(rows: _Rows) -> ImageSource:
    return ImageSource(rows, np.zeros(len(rows), np.int64), ("image",))


# ------------------------------------------------------------------------------------------------- parquet and hub


class _TableRows:
    """Rows of a memory-mapped `datasets.Dataset`, read from its Arrow table: that never decodes an image."""

    def __init__(self, dataset: Any, column: str, files: list[tuple[str, int]]) -> None:
        self.dataset, self.column = dataset, column
        self.file_names = [name for name, _ in files]
        self.ends = np.cumsum([count for _, count in files])

    def __len__(self) -> int:
        return len(self.dataset)

    def name(self, index: int) -> str:
        file = int(np.searchsorted(self.ends, index, side="right"))
        return f"{self.file_names[file]} row {index - (int(self.ends[file - 1]) if file else 0)}"

    def image(self, index: int) -> Image.Image:
        value = self.dataset.data.column(self.column)[index].as_py()
        content = value.get("bytes") or value.get("path") if isinstance(value, dict) else value
        if not content:
            raise DetailFlowError(f"{self.name(index)} has no image: its {self.column!r} is empty")
        return load_rgb(content, self.name(index))


def _import_datasets() -> ModuleType:
    try:
        import datasets
    except ImportError as error:
        raise DetailFlowError(
            "Parquet files and hub datasets need the datasets library: pip install 'detailflow[train]'"
        ) from error
    return datasets


@contextmanager
def _quiet(datasets: ModuleType, progress: bool) -> Iterator[None]:
    """Keep `datasets` from writing to the terminal, but for a progress bar where the wait is long."""
    loggers = [logging.getLogger(name) for name in ("datasets", "huggingface_hub")]
    levels, hide_bars = [logger.level for logger in loggers], not progress and not datasets.are_progress_bars_disabled()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    if hide_bars:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if hide_bars:
            datasets.enable_progress_bars()


def _open_parquet(files: list[Path], image_column: str, label_column: str) -> ImageSource:
    datasets = _import_datasets()
    import pyarrow.parquet

    counted = []
    for file in files:
        try:
            parquet = pyarrow.parquet.ParquetFile(file)
        except (OSError, ValueError) as error:
            raise DetailFlowError(f"{file} is not a readable parquet file ({_first_line(error)})") from error
        counted.append((str(file), parquet.metadata.num_rows))
    where = str(files[0]) if len(files) == 1 else f"{files[0].parent} ({len(files)} parquet files)"
    # Plain columns, without the label names in the file's metadata: `datasets` refuses names that occur twice, and
    # ImageNet has two cranes.
    schema = parquet.schema_arrow
    features = datasets.Features.from_arrow_schema(schema.remove_metadata())
    paths = [str(file) for file in files]
    try:
        with _quiet(datasets, sum(file.stat().st_size for file in files) > _SHOW_PROGRESS_ABOVE):
            dataset = datasets.load_dataset("parquet", data_files=paths, features=features, split="train")
    except Exception as error:  # `datasets` raises many kinds: columns that differ, a full disk, damaged pages
        raise DetailFlowError(f"{where} cannot be read ({_first_line(error.__cause__ or error)})") from error
    return _from_table(dataset, where, counted, image_column, label_column, _stored_names(schema, label_column))


def _stored_names(schema: Any, column: str) -> tuple[str, ...]:
    """The class names that the Hugging Face metadata of a parquet file gives for its label column; () where none."""
    try:
        metadata = json.loads(schema.metadata[b"huggingface"])
        return tuple(metadata["info"]["features"][column]["names"])
    except (KeyError, TypeError, ValueError):
        return ()


def _open_hub(name: str, split: str, image_column: str, label_column: str) -> ImageSource:
    datasets = _import_datasets()
    try:
        with _quiet(datasets, True):
            dataset = datasets.load_dataset(name, split=split)
    except Exception as error:  # no network, no such dataset, no such split, gated, ...: `datasets` says which
        raise DetailFlowError(
            f"{name} is neither a file or folder here nor a hub dataset that can be opened ({_first_line(error)})"
        ) from error
    names = tuple(getattr(dataset.features.get(label_column), "names", ()))
    return _from_table(dataset, name, [(f"{name} {split}", len(dataset))], image_column, label_column, names)


def _from_table(
    dataset: Any,
    where: str,
    files: list[tuple[str, int]],
    image_column: str,
    label_column: str,
    class_names: tuple[str, ...],
) -> ImageSource:
    columns = dataset.column_names
    if image_column not in columns:
        raise DetailFlowError(f"{where} has no column {image_column!r}: its columns are {', '.join(columns)}")
    storage = str(dataset.data.column(image_column).type)
    if "binary" not in storage:
        raise DetailFlowError(f"{where} has no images in its column {image_column!r}: that column holds {storage}")
    if len(dataset) == 0:
        raise DetailFlowError(f"{where} holds no images: it has no rows")
    rows = _TableRows(dataset, image_column, files)
    if label_column not in columns:
        if label_column != "label":  # asked for by name
            raise DetailFlowError(f"{where} has no column {label_column!r}: its columns are {', '.join(columns)}")
        return _unlabelled(rows)
    return _with_labels(rows, where, label_column, class_names)


def _with_labels(rows: _TableRows, where: str, column: str, class_names: tuple[str, ...]) -> ImageSource:
    values = np.array(rows.dataset.data.column(column).to_pylist(), dtype=object)
    missing = np.array([value is None or value == -1 for value in values])  # -1: the hub's mark of a hidden label
    if missing.all():
        return _unlabelled(rows)
    if missing.any():
        raise DetailFlowError(f"{rows.name(int(missing.argmax()))} has no label: give every row one, or none")
    if all(isinstance(value, str) for value in values):
        names, labels = np.unique(values.astype(str), return_inverse=True)
        return ImageSource(rows, labels.astype(np.int64), tuple(names.tolist()))
    if not all(isinstance(value, int) and value >= 0 for value in values):
        raise DetailFlowError(f"{where} has labels in column {column!r} that are neither class numbers nor names")
    labels = values.astype(np.int64)
    class_names = class_names or tuple(map(str, range(labels.max() + 1)))
    if labels.max() >= len(class_names):
        raise DetailFlowError(f"{where} has the label {labels.max()}, but names only {len(class_names)} classes")
    return ImageSource(rows, labels, class_names)
