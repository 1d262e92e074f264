"""Parquet files and hub datasets, through the `datasets` library (the `train` extra), which never decodes an image here."""

import json
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from detailflow.data.decode import first_line
from detailflow.data.source import ImageSource, common_folder, file_sizes, labelled, unlabelled
from detailflow.data.stored import stored_image
from detailflow.errors import DetailFlowError, missing_package
from detailflow.files import read_text

_EXPANDED = 256 * 2**20  # bytes that a row group may always have
_MOST_EXPANSION = 20  # and how many times its compressed size if it is larger
_SHOW_PROGRESS_ABOVE = 256 * 2**20  # bytes of parquet; less is ready in seconds


class _TableRows:
    """Rows of a memory-mapped `datasets.Dataset`, read from its Arrow table: that never decodes an image."""

    def __init__(self, dataset: Any, column: str, files: list[tuple[str, int]], on_hub: bool) -> None:
        self.dataset, self.column, self.on_hub = dataset, column, on_hub
        self.file_names = [name for name, _ in files]
        self.ends = np.cumsum([count for _, count in files])

    def __len__(self) -> int:
        return len(self.dataset)

    @cached_property
    def _values(self) -> Any:  # kept, since finding a column takes longer the more chunks a table has: 0.1 ms in ImageNet's
        return self.dataset.data.column(self.column)

    def __getstate__(self) -> dict[str, Any]:
        """All but `_values`, which would travel to a worker process with all of its images."""
        return {name: value for name, value in self.__dict__.items() if name != "_values"}

    def _file(self, index: int) -> int:
        return int(np.searchsorted(self.ends, index, side="right"))

    def name(self, index: int) -> str:
        file = self._file(index)
        return f"{self.file_names[file]} row {index - (int(self.ends[file - 1]) if file else 0)}"

    def stored(self, index: int) -> str | bytes:
        return stored_image(self._values[index].as_py(), self.name(index), self._folders(index), self.on_hub)

    def _folders(self, index: int) -> list[str]:
        if self.on_hub:
            return cache_folders(self.file_names[0])
        return [os.path.dirname(self.file_names[self._file(index)]) or "."]

    def listing(self) -> Iterable[tuple[str | int, ...]]:
        if self.on_hub:  # where the library's own checksum is of the files' contents or revision
            return [(self.file_names[0], len(self), str(self.dataset._fingerprint))]
        return list_tables(list(zip(self.file_names, np.diff(self.ends, prepend=0).tolist(), strict=True)))


def list_tables(files: Sequence[tuple[str, int]]) -> list[tuple[str | int, ...]]:
    """Return each file's name in the folder that holds them all, its bytes and its rows."""
    names = [name for name, _ in files]
    sizes = file_sizes(names, common_folder(names))
    return [(*entry, rows) for entry, (_, rows) in zip(sizes, files, strict=True)]


def import_datasets() -> ModuleType:
    """The `datasets` library. Raises DetailFlowError where it is not installed."""
    try:
        import datasets
    except ImportError as error:
        raise missing_package("a parquet file or hub data set", "datasets") from error
    return datasets


@contextmanager
def quiet(datasets: ModuleType, progress: bool) -> Iterator[None]:
    """Keep `datasets` from writing to the terminal, but for a progress bar where the wait is long."""
    loggers = [logging.getLogger(name) for name in ("datasets", "huggingface_hub")]
    levels, hide_bars = [logger.level for logger in loggers], not progress and not datasets.are_progress_bars_disabled()
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)  # what goes wrong is raised as well
    if hide_bars:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if hide_bars:
            datasets.enable_progress_bars()


class ParquetFiles(NamedTuple):
    """What the footers of parquet files say."""

    where: str
    counted: list[tuple[str, int]]  # each file's name and its rows
    schema: Any

    @property
    def features(self) -> Any:
        """Plain columns, without the label names in the files' metadata: `datasets` refuses names that occur twice, and
        ImageNet has two cranes."""
        return import_datasets().Features.from_arrow_schema(self.schema.remove_metadata())

    def class_names(self, column: str) -> tuple[str, ...]:
        """Those that the Hugging Face metadata gives for a label column; () where none."""
        try:
            metadata = json.loads(self.schema.metadata[b"huggingface"])
            return tuple(metadata["info"]["features"][column]["names"])
        except (KeyError, TypeError, ValueError):
            return ()


def read_footers(files: list[Path]) -> ParquetFiles:
    """Raises DetailFlowError for a file that is no parquet."""
    import_datasets()
    import pyarrow.parquet

    counted = []
    for file in files:
        try:
            parquet = pyarrow.parquet.ParquetFile(file)
        except (OSError, ValueError) as error:
            raise DetailFlowError(f"{file} is not a readable parquet file ({first_line(error)})") from error
        _check_expansion(file, parquet.metadata)
        counted.append((str(file), parquet.metadata.num_rows))
    where = str(files[0]) if len(files) == 1 else f"{files[0].parent} ({len(files)} parquet files)"
    return ParquetFiles(where, counted, parquet.schema_arrow)


def _check_expansion(file: Path, metadata: Any) -> None:
    """Check that no row group, which is read as a whole, is far larger than what of the file holds it.

    Raises:
        DetailFlowError: for one that could fill the memory from a small file. Images, compressed already, hardly grow.
    """
    for i in range(metadata.num_row_groups):
        group = metadata.row_group(i)
        columns = [group.column(j) for j in range(group.num_columns)]
        stored, read = sum(c.total_compressed_size for c in columns), sum(c.total_uncompressed_size for c in columns)
        if read > max(_EXPANDED, _MOST_EXPANSION * stored):
            raise DetailFlowError(
                f"{file} grows from {stored:,} bytes to {read:,} as it is read (row group {i}): store images as PNG or JPEG files"
            )


def open_parquet(files: list[Path], image_column: str, label_column: str) -> ImageSource:
    """Raises DetailFlowError for files that can't be read, have no such columns, or labels that can't be."""
    datasets, parquet = import_datasets(), read_footers(files)
    if not any(rows for _, rows in parquet.counted):
        raise DetailFlowError(f"{parquet.where} holds no images: it has no rows")
    paths = [str(file) for file in files]
    try:
        with quiet(datasets, sum(file.stat().st_size for file in files) > _SHOW_PROGRESS_ABOVE):
            dataset = datasets.load_dataset("parquet", data_files=paths, features=parquet.features, split="train")
    except Exception as error:  # `datasets` raises many kinds: columns that differ, a full disk, damaged pages
        raise DetailFlowError(f"{parquet.where} cannot be read ({first_line(error.__cause__ or error)})") from error
    names = parquet.class_names(label_column)
    return _from_table(dataset, parquet.where, parquet.counted, image_column, label_column, names, on_hub=False)


def load_hub(name: str, split: str, **options: Any) -> Any:
    """`datasets.load_dataset`. Raises DetailFlowError where it fails."""
    datasets = import_datasets()
    try:
        with quiet(datasets, True):
            return datasets.load_dataset(name, split=split, **options)
    except Exception as error:  # no network, no such dataset, no such split, gated, ...: `datasets` says which
        reached = f"on the hub it cannot be opened as a data set ({first_line(error)})"
        if isinstance(error, ConnectionError):
            reached = "the hub cannot be reached to look for a data set of that name"
        raise DetailFlowError(f"{name} is neither a file nor a folder here, and {reached}") from error


def cache_folders(name: str) -> list[str]:
    """Return where the `datasets` library keeps the files of a hub data set."""
    from huggingface_hub.constants import HF_HUB_CACHE

    downloads = str(import_datasets().config.DOWNLOADED_DATASETS_PATH)
    return [os.path.join(HF_HUB_CACHE, f"datasets--{name.split()[0].replace('/', '--')}"), downloads]


def open_saved(folder: str, image_column: str, label_column: str) -> ImageSource:
    """Open a folder that `save_to_disk` of the `datasets` library wrote, of one set.

    Raises:
        DetailFlowError: if it cannot be read, names files elsewhere, has no such columns, or labels that cannot be.
    """
    datasets = import_datasets()
    try:
        state = json.loads(read_text(Path(folder) / "state.json"))
        files = [str(entry["filename"]) for key in ("_data_files", "_indices_files") for entry in state.get(key) or ()]
        if outside := [file for file in files if os.path.basename(file) != file]:
            raise DetailFlowError(f"{folder} names {outside[0]}, which is not in it: no other file is read")
        with quiet(datasets, False):
            dataset = datasets.load_from_disk(folder)
        counted = [(os.path.join(folder, file), _arrow_rows(os.path.join(folder, file))) for file in files]
    except DetailFlowError:
        raise
    except Exception as error:  # `datasets` raises many kinds
        raise DetailFlowError(f"{folder} is not a readable folder by `save_to_disk` ({first_line(error)})") from error
    if dataset._indices is not None:  # a selection of the rows that are stored
        with quiet(datasets, False):
            dataset = dataset.flatten_indices(keep_in_memory=True)
        counted = [*((file, 0) for file, _ in counted), (os.path.join(folder, "state.json"), len(dataset))]
    names = stored_names(dataset.features, label_column)
    return _from_table(dataset, folder, counted, image_column, label_column, names, on_hub=False)


def _arrow_rows(file: str) -> int:
    import pyarrow

    with pyarrow.memory_map(file) as mapped, pyarrow.ipc.open_stream(mapped) as batches:
        return sum(batch.num_rows for batch in batches)


def open_hub(name: str, split: str, image_column: str, label_column: str) -> ImageSource:
    """Raises DetailFlowError where the dataset can't be opened, has no such columns, or labels that can't be."""
    dataset = load_hub(name, split)
    names = stored_names(dataset.features, label_column)
    return _from_table(dataset, name, [(f"{name} {split}", len(dataset))], image_column, label_column, names, on_hub=True)


def stored_names(features: Any, column: str) -> tuple[str, ...]:
    """The class names that a dataset's features give for a label column; () where none."""
    return tuple(getattr(features.get(column), "names", ()))


def check_columns(where: str, features: Any, image_column: str, label_column: str) -> bool:
    """Whether there is a label column. Raises DetailFlowError where there are no images, or no labels of a name asked for."""
    columns = list(features)
    if image_column not in columns:
        raise DetailFlowError(f"{where} has no column {image_column!r}: its columns are {', '.join(columns)}")
    storage = str(features.arrow_schema.field(image_column).type)
    datasets = import_datasets()
    if "binary" not in storage or not isinstance(features[image_column], datasets.Image | datasets.Value | dict):  # not videos
        raise DetailFlowError(f"{where} has no images in its column {image_column!r}: that column holds {storage}")
    kind = features.get(label_column)
    if kind is not None and type(kind).__name__ not in ("ClassLabel", "Value"):  # others may name files that are opened
        raise DetailFlowError(f"{where} has no labels in its column {label_column!r}: that column holds {kind}")
    if label_column not in columns and label_column != "label":  # asked for by name
        raise DetailFlowError(f"{where} has no column {label_column!r}: its columns are {', '.join(columns)}")
    return label_column in columns


def _from_table(
    dataset: Any,
    where: str,
    files: list[tuple[str, int]],
    image_column: str,
    label_column: str,
    class_names: tuple[str, ...],
    on_hub: bool,
) -> ImageSource:
    has_labels = check_columns(where, dataset.features, image_column, label_column)
    if len(dataset) == 0:
        raise DetailFlowError(f"{where} holds no images: it has no rows")
    rows = _TableRows(dataset, image_column, files, on_hub)
    if not has_labels:
        return unlabelled(rows)
    return labelled(rows, where, dataset.data.column(label_column).to_pylist(), class_names)
