"""Images in rows of tables: hub data sets and folders by `save_to_disk`, opened by the `datasets` library.

The library never decodes an image here: rows are read from its Arrow tables.
"""

import ipaddress
import json
import logging
import os
import re
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, build_opener

import numpy as np

from detailflow.data.columns import ask_for_labels
from detailflow.data.folder import DataFiles, file_sizes
from detailflow.data.source import ImageSource, labelled, not_there
from detailflow.errors import DetailFlowError, MissingPackageError, explained, first_line, missing_package
from detailflow.files import read_text, similar
from detailflow.words import printable

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:(?=/)|[a-z]+::", re.IGNORECASE)
_HUB_URL = re.compile(r"(?:zip://[^:]+::)?hf://[^:]+(?::[^:]+)?")  # a file on the hub, or one in an archive there
_LARGEST = 512 * 2**20  # bytes that are fetched as one image
_TIMEOUT = 60  # seconds


class TableRows:
    """Rows of Arrow tables that are mapped into memory.

    Args:
        files: what rows are named by: "FILE row 3"; `counts` of each.
        column: returns the image column of a file by its number; picklable.
        hub: name and checksum of a hub data set, whose rows may name files of its download and on the web.
    """

    def __init__(
        self,
        files: Sequence[str],
        counts: Sequence[int],
        column: Callable[[int], Any],
        hub: tuple[str, str] | None = None,
    ) -> None:
        self.files, self.column, self.hub = list(files), column, hub
        self.ends = np.cumsum(counts)
        self._columns: dict[int, Any] = {}

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getstate__(self) -> dict[str, Any]:
        """Return all but the columns, which would be sent to a worker process with all of their images."""
        return {**self.__dict__, "_columns": {}}

    def _locate(self, index: int) -> tuple[int, int]:
        file = int(np.searchsorted(self.ends, index, side="right"))
        return file, index - (int(self.ends[file - 1]) if file else 0)

    def name(self, index: int) -> str:
        file, row = self._locate(index)
        return f"{self.files[file]} row {row}"

    def stored(self, index: int) -> str | bytes:
        file, row = self._locate(index)
        if file not in self._columns:  # finding a column takes long in a table of many chunks
            self._columns[file] = self.column(file)
        folders = cache_folders(self.hub[0]) if self.hub else [os.path.dirname(self.files[file]) or "."]
        value = self._columns[file][row].as_py()
        return stored_image(value, self.name(index), folders, urls=self.hub is not None)

    def listing(self) -> Iterable[tuple[str | int, ...]]:
        if self.hub:
            return [(self.files[0], len(self), self.hub[1])]
        counts = np.diff(self.ends, prepend=0).tolist()
        return [(*entry, count) for entry, count in zip(file_sizes(self.files), counts, strict=True)]

    def stamps(self) -> np.ndarray:
        if self.hub:
            return np.zeros(len(self), np.int64)  # the hub tells one commit from another, but not their images
        return np.repeat([size for _, size in file_sizes(self.files)], np.diff(self.ends, prepend=0))


def mapped_column(files: Sequence[str], column: str, file: int) -> Any:
    """Return a column of one of several Arrow files, mapped into memory."""
    import pyarrow

    with (
        explained(f"{files[file]} cannot be read", hint="start again"),
        pyarrow.memory_map(files[file]) as mapped,
        pyarrow.ipc.open_stream(mapped) as batches,
    ):
        return batches.read_all().column(column)


def _dataset_column(dataset: Any, column: str, file: int) -> Any:
    return dataset.data.column(column)


def import_datasets() -> ModuleType:
    """Return the `datasets` library."""
    try:
        import datasets
    except ImportError as error:
        raise missing_package("a parquet file or hub data set", "datasets") from error
    return datasets


@contextmanager
def quiet(datasets: ModuleType, progress: bool = False) -> Iterator[None]:
    """Keep `datasets` from writing to the terminal, except its progress bars if `progress`."""
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
    """Open a data set on the hub by `datasets.load_dataset`, which runs no code of its own."""
    try:
        datasets = import_datasets()
    except MissingPackageError as error:  # more likely a path that was misspelt
        if "/" not in name:
            raise not_there(name) from error
        what = f"{name} is neither a file nor a folder here, and a hub data set"
        raise missing_package(what, "datasets") from error
    try:
        with quiet(datasets, progress=True):
            return datasets.load_dataset(_hub_id(name), split=split, **options)
    except Exception as error:  # no network, no such dataset, no such split, gated, ...: `datasets` says which
        reached = f"on the hub it cannot be opened as a data set ({first_line(error)})"
        if isinstance(error, ConnectionError):
            reached = "the hub cannot be reached to look for a data set of that name"
        meant = similar(name)
        raise DetailFlowError(
            f"{name} is neither a file nor a folder here, and {reached}{meant and f': {meant}'}"
        ) from error


def _hub_id(name: str) -> str:
    """Return the full name of a data set on the hub: "ylecun/mnist" for "mnist".

    A name without its owner never reaches `load_dataset`, which takes "json", "pandas" and the like for kinds of files
    in the current folder, and opens them, pickles too.
    """
    if "/" in name:
        return name
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        found = str(HfApi().dataset_info(name).id)
    except (HfHubHTTPError, HFValidationError):
        raise
    except Exception as error:  # the network's, of a library that changes between releases
        raise ConnectionError(first_line(error)) from error
    if "/" not in found:
        raise DetailFlowError("give its owner too, as in owner/name")
    return found


def cache_folders(name: str) -> list[str]:
    """Return where the `datasets` library keeps the files of a hub data set."""
    from huggingface_hub.constants import HF_HUB_CACHE

    downloads = str(import_datasets().config.DOWNLOADED_DATASETS_PATH)
    return [os.path.join(HF_HUB_CACHE, f"datasets--{name.replace('/', '--')}"), downloads]


def open_hub(found: DataFiles, image_column: str, label_column: str) -> ImageSource:
    """Open a data set on the hub, which is downloaded."""
    name, split = found.where, found.split
    dataset = load_hub(name, split)
    column, identity = partial(_dataset_column, dataset, image_column), str(dataset._fingerprint)
    rows = TableRows([f"{name} {split}"], [len(dataset)], column, (name, identity))
    return _from_dataset(dataset, found, rows, image_column, label_column)


def open_saved(found: DataFiles, image_column: str, label_column: str) -> ImageSource:
    """Open a folder that `save_to_disk` of the `datasets` library wrote, of one set."""
    datasets, folder = import_datasets(), found.where
    with explained(f"{folder} is not a readable folder by `save_to_disk`", Exception), quiet(datasets):
        state = json.loads(read_text(Path(folder) / "state.json"))
        if state.get("_indices_files"):  # of rows that are meant, by versions of `datasets` before 2.0
            raise DetailFlowError(f"{folder} is a selection as old versions of `datasets` wrote it: save it again")
        names = [str(entry["filename"]) for entry in state.get("_data_files") or ()]
        if outside := [name for name in names if os.path.basename(name) != name]:
            raise DetailFlowError(f"{folder} names {outside[0]}, which is not in it: no other file is read")
        for path in (os.path.join(folder, name) for name in ("dataset_info.json", *names)):
            if not os.path.isfile(path):  # reading a pipe may never end
                problem = "not a regular file" if os.path.exists(path) else "missing"
                raise DetailFlowError(f"{path} is {problem}: save the set again")
        dataset = datasets.load_from_disk(folder)
        files = [os.path.join(folder, name) for name in names]
        rows = TableRows(files, [count_rows(file) for file in files], partial(mapped_column, files, image_column))
    return _from_dataset(dataset, found, rows, image_column, label_column)


def count_rows(file: str) -> int:
    """Return the rows of an Arrow file, without reading them."""
    import pyarrow

    with pyarrow.memory_map(file) as mapped, pyarrow.ipc.open_stream(mapped) as batches:
        return sum(batch.num_rows for batch in batches)


def _from_dataset(dataset: Any, found: DataFiles, rows: TableRows, image_column: str, label_column: str) -> ImageSource:
    where, names = found.where, check_columns(found.where, dataset.features, image_column, label_column)
    if len(dataset) == 0:
        raise DetailFlowError(f"{where} holds no images: it has no rows")
    labels = None if names is None else dataset.data.column(label_column).to_pylist()
    if labels is None:
        found.notes.ask(ask_for_labels(where, label_column, set(dataset.features) - {image_column}))
    return labelled(rows, where, labels, names or ())


def check_names(where: str, names: Any) -> tuple[str, ...]:
    """Return the class names that a set gives, which must be a list of texts; () if it gives none."""
    if names is None:
        return ()
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DetailFlowError(f"{where} does not name its classes in a list of texts: write its metadata again")
    return tuple(map(printable, names))


def require_columns(where: str, columns: Sequence[str], image_column: str, label_column: str = "label") -> None:
    """Check that a table has these columns; "label" may be missing."""
    for column in (image_column, label_column):
        if column not in columns and (column == image_column or column != "label"):
            raise DetailFlowError(f"{where} has no column {column!r}: its columns are {', '.join(columns)}")


def check_columns(where: str, features: Any, image_column: str, label_column: str) -> tuple[str, ...] | None:
    """Check the columns of a dataset with images; return the class names of its labels, `None` if it has no labels."""
    require_columns(where, list(features), image_column, label_column)
    storage = str(features.arrow_schema.field(image_column).type)
    datasets = import_datasets()
    is_image = isinstance(features[image_column], datasets.Image | datasets.Value | dict)  # not a video
    if "binary" not in storage or not is_image:
        raise DetailFlowError(f"{where} has no images in its column {image_column!r}: that column holds {storage}")
    if label_column not in features:
        return None
    kind = features[label_column]
    if type(kind).__name__ in ("List", "LargeList"):  # several labels of an image
        kind = kind.feature
    if type(kind).__name__ not in ("ClassLabel", "Value"):  # others may name files that are opened
        raise DetailFlowError(f"{where} has no labels in its column {label_column!r}: that column holds {kind}")
    return check_names(where, getattr(kind, "names", None))


def stored_image(value: Any, name: str, folders: Sequence[str], urls: bool) -> str | bytes:
    """Return the bytes in one row of an image column, or the path that it names.

    A path must lead into one of `folders`, links resolved; a URL on the web or the hub is fetched if `urls`. `name` is
    the row, for messages.
    """
    content = value.get("bytes") or value.get("path") if isinstance(value, dict) else value
    if not content:
        raise DetailFlowError(f"{name} has no image: its row is empty")
    if isinstance(content, bytes):
        return content
    if not isinstance(content, str):
        raise DetailFlowError(f"{name} has no image: its row holds {type(content).__name__}")
    if _URL.match(content):
        if urls and (_HUB_URL.fullmatch(content) or content.lower().startswith("https://")):
            return _fetch(content, name)
        kinds = "only https:// and hf:// are read" if urls else "URLs are read only from hub data sets"
        raise DetailFlowError(f"{name} names {_short(content)}, which is not fetched: {kinds}")
    for folder in () if "\0" in content else map(os.path.realpath, folders):
        path = os.path.realpath(os.path.join(folder, content))
        if path.startswith(os.path.join(folder, "")):
            return path
    raise DetailFlowError(
        f"{name} names {_short(content)}, which is not in the folder of its set: no other file is read"
    )


def _short(text: str) -> str:
    return repr(text if len(text) <= 100 else f"{text[:100]}…")


def _fetch(url: str, name: str) -> bytes:
    with explained(f"{name} cannot be fetched from {_short(url)}", Exception):  # each file system has its own kinds
        content = _download(url)
    if len(content) > _LARGEST:
        raise DetailFlowError(f"{name} cannot be fetched: {_short(url)} has more than {_LARGEST >> 20} MiB")
    return content


def _download(url: str) -> bytes:
    """Return the file at a URL, or the first `_LARGEST` + 1 bytes of it."""
    if url.lower().startswith("https://"):
        _check_public(url)
        with build_opener(_HttpsRedirects()).open(url, timeout=_TIMEOUT) as response:
            return bytes(response.read(_LARGEST + 1))
    import fsspec  # type: ignore[import-untyped]

    with fsspec.open(url, "rb") as file:
        return bytes(file.read(_LARGEST + 1))


class _HttpsRedirects(HTTPRedirectHandler):
    """Follow redirects to other public https servers, and to nothing else."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        _check_public(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _check_public(url: str) -> None:
    parts = urlsplit(url)
    if parts.scheme.lower() != "https" or not parts.hostname or _is_local(parts.hostname, parts.port or 443):
        raise DetailFlowError(f"{_short(url)} is not an https:// address on the public web")


@lru_cache(4096)
def _is_local(host: str, port: int) -> bool:
    """Return whether a name leads to this machine or its own network, where a data set must not look."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError:  # only the proxy may know the name
        return host == "localhost"
    return not all(ipaddress.ip_address(str(entry[4][0]).partition("%")[0]).is_global for entry in found)
