"""Hub data sets and folders by `save_to_disk`, through the `datasets` library, which never decodes an image here."""

import json
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from detailflow.data.decode import first_line
from detailflow.data.source import ImageSource, common_folder, file_sizes, labelled, unlabelled
from detailflow.data.stored import stored_image
from detailflow.errors import DetailFlowError, missing_package, printable
from detailflow.files import read_text


class _TableRows:
    """Rows of a memory-mapped `datasets.Dataset`, read from its Arrow table: that never decodes an image."""

    def __init__(self, dataset: Any, column: str, files: list[tuple[str, int]], on_hub: bool) -> None:
        self.dataset, self.column, self.on_hub = dataset, column, on_hub
        self.file_names = [name for name, _ in files]
        self.ends = np.cumsum([count for _, count in files])

    def __len__(self) -> int:
        return len(self.dataset)

    @cached_property
    def _values(
        self,
    ) -> Any:  # kept, since finding a column takes longer the more chunks a table has: 0.1 ms in ImageNet's
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
        sizes = file_sizes(self.file_names, common_folder(self.file_names))
        return [(*entry, rows) for entry, rows in zip(sizes, np.diff(self.ends, prepend=0).tolist(), strict=True)]


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


def load_hub(name: str, split: str, **options: Any) -> Any:
    """Open a data set on the hub by `datasets.load_dataset`, which runs no code of its own.

    Raises:
        DetailFlowError: if that fails.
    """
    datasets = import_datasets()
    try:
        with quiet(datasets, True):
            return datasets.load_dataset(_hub_id(name), split=split, **options)
    except Exception as error:  # no network, no such dataset, no such split, gated, ...: `datasets` says which
        reached = f"on the hub it cannot be opened as a data set ({first_line(error)})"
        if isinstance(error, ConnectionError):
            reached = "the hub cannot be reached to look for a data set of that name"
        raise DetailFlowError(f"{name} is neither a file nor a folder here, and {reached}") from error


def _hub_id(name: str) -> str:
    """Return the full name of a data set on the hub: "ylecun/mnist" for "mnist".

    A name without its owner is never handed to `load_dataset`, for which "json", "pandas" and the like are kinds of files
    that it then looks for in the current folder, and opens, pickles too.
    """
    if "/" in name:
        return name
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        found = str(HfApi().dataset_info(name).id)
    except (HfHubHTTPError, HFValidationError):
        raise
    except Exception as error:  # of the library that carries the question, which changes between releases
        raise ConnectionError(first_line(error)) from error
    if "/" not in found:
        raise DetailFlowError("give its owner too, as in owner/name")
    return found


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
        for file in ("dataset_info.json", *files):
            if not os.path.isfile(path := os.path.join(folder, file)):  # reading a pipe may never end
                raise DetailFlowError(
                    f"{path} is {'no regular file' if os.path.exists(path) else 'missing'}: save the set again"
                )
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
    names = stored_names(folder, dataset.features, label_column)
    return _from_table(dataset, folder, counted, image_column, label_column, names, on_hub=False)


def _arrow_rows(file: str) -> int:
    import pyarrow

    with pyarrow.memory_map(file) as mapped, pyarrow.ipc.open_stream(mapped) as batches:
        return sum(batch.num_rows for batch in batches)


def open_hub(name: str, split: str, image_column: str, label_column: str) -> ImageSource:
    """Raises DetailFlowError where the dataset cannot be opened, has no such columns, or labels that cannot be."""
    dataset = load_hub(name, split)
    names = stored_names(name, dataset.features, label_column)
    return _from_table(
        dataset, name, [(f"{name} {split}", len(dataset))], image_column, label_column, names, on_hub=True
    )


def stored_names(where: str, features: Any, column: str) -> tuple[str, ...]:
    """Return the class names that a dataset's features give for a label column; () if they give none."""
    return check_names(where, getattr(features.get(column), "names", None))


def check_names(where: str, names: Any) -> tuple[str, ...]:
    """Return the names of classes that a set states; () if it states none.

    Raises:
        DetailFlowError: if they are not a list of texts.
    """
    if names is None:
        return ()
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DetailFlowError(f"{where} does not name its classes in a list of texts: write its metadata again")
    return tuple(map(printable, names))


def require_columns(where: str, columns: Sequence[str], image_column: str, label_column: str = "label") -> None:
    """Check that a table has the columns that were asked for by name; "label" may be missing.

    Raises:
        DetailFlowError: if it has not.
    """
    for column in (image_column, label_column):
        if column not in columns and (column == image_column or column != "label"):
            raise DetailFlowError(f"{where} has no column {column!r}: its columns are {', '.join(columns)}")


def check_columns(where: str, features: Any, image_column: str, label_column: str) -> bool:
    """Return whether there is a label column.

    Raises:
        DetailFlowError: if there are no images, or no labels of a name asked for.
    """
    require_columns(where, list(features), image_column, label_column)
    storage = str(features.arrow_schema.field(image_column).type)
    datasets = import_datasets()
    if "binary" not in storage or not isinstance(
        features[image_column], datasets.Image | datasets.Value | dict
    ):  # not videos
        raise DetailFlowError(f"{where} has no images in its column {image_column!r}: that column holds {storage}")
    kind = features.get(label_column)
    if kind is not None and type(kind).__name__ not in ("ClassLabel", "Value"):  # others may name files that are opened
        raise DetailFlowError(f"{where} has no labels in its column {label_column!r}: that column holds {kind}")
    return label_column in features


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
