"""Parquet files, read by pyarrow (in the `train` extra): what they say of themselves, their labels and their images.

A row of a parquet file can only be read with its whole row group, 100 to 5,000 images. Training reads rows in random order, so
the images of each file are copied into an Arrow file of the `datasets` library's cache once, which is mapped into memory.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

import numpy as np

from detailflow.data.decode import first_line
from detailflow.data.folder import Notes
from detailflow.data.source import ImageSource, common_folder, file_sizes, labelled, unlabelled
from detailflow.data.stored import stored_image
from detailflow.data.tables import check_names, import_datasets, require_columns
from detailflow.errors import DetailFlowError, some_names
from detailflow.files import writing

_EXPANDED = 256 * 2**20  # bytes that a row group or a file's images may always have
_MOST_EXPANSION = 20  # and how many times its compressed size if it is larger
_ROWS = 2**20  # that a file of any size may have
_BATCH, _BATCH_ROWS = 16 * 2**20, 256  # bytes and images that are copied at once
_SHOW_PROGRESS_ABOVE = 256 * 2**20  # bytes of parquet; less is ready in seconds


class ParquetFile(NamedTuple):
    """What the footer of a parquet file says.

    Attributes:
        rows: how many it has.
        images: the Arrow type of its image column.
        labels: what its label column holds: "numbers", "names" or, if all are missing, "hidden"; "" if it has none.
        folder_label: what stands for a label column in a path as "label=cat/0.parquet", as other writers lay out tables.
        class_names: those that its Hugging Face metadata gives; () if it gives none.
        largest: bytes, decompressed, of the images in its largest row group.
    """

    path: Path
    rows: int
    images: Any
    labels: str
    folder_label: str | None
    class_names: tuple[str, ...]
    largest: int


def read_footers(files: list[Path], image_column: str, label_column: str) -> list[ParquetFile]:
    """Read what parquet files say of themselves, which must be the same in all.

    Raises:
        DetailFlowError: for a file that is no parquet or has no such columns, and for files that do not belong together.
    """
    import_datasets()
    footers = [_read_footer(file, image_column, label_column) for file in files]
    first = footers[0]
    for other in footers[1:]:
        if other.class_names != first.class_names:
            named = [_some_ordered(footer.class_names) for footer in (other, first)]
            said = f"names {'the' if other.class_names else 'no'} classes{' ' * bool(other.class_names)}{named[0]}"
            raise DetailFlowError(
                f"{other.path} {said}, and {first.path} {named[1] or 'some'}: give all the same names"
            )
        if (other.labels, other.folder_label is None) != (first.labels, first.folder_label is None):
            held = [
                footer.labels or ("its folder's" if footer.folder_label is not None else "no")
                for footer in (other, first)
            ]
            raise DetailFlowError(
                f"{other.path} has {held[0]} labels in column {label_column!r}, and {first.path} {held[1]}: give all the same"
            )
    if not any(footer.rows for footer in footers):
        raise DetailFlowError(f"{name_of(files)} holds no images: it has no rows")
    return footers


def _some_ordered(names: tuple[str, ...]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def name_of(files: list[Path]) -> str:
    """Return what to call these files in a message."""
    return str(files[0]) if len(files) == 1 else f"{files[0].parent} ({len(files)} parquet files)"


def list_tables(footers: list[ParquetFile]) -> list[tuple[str | int, ...]]:
    """Return each file's name in the folder that holds them all, its bytes and its rows."""
    names = [str(footer.path) for footer in footers]
    sizes = file_sizes(names, common_folder(names))
    return [(*entry, footer.rows) for entry, footer in zip(sizes, footers, strict=True)]


def _read_footer(file: Path, image_column: str, label_column: str) -> ParquetFile:
    import pyarrow.parquet

    if file.exists() and not file.is_file():  # reading a pipe may never end
        raise DetailFlowError(f"{file} is no regular file: give the path of a parquet file")
    try:
        with pyarrow.parquet.ParquetFile(file) as parquet:
            metadata, schema = parquet.metadata, parquet.schema_arrow
        largest, columns = _check_expansion(file, metadata, image_column), schema.names
    except DetailFlowError:
        raise
    except (OSError, ValueError) as error:  # names that are not UTF-8 among them
        raise DetailFlowError(f"{file} is not a readable parquet file ({first_line(error)})") from error
    folders = [part.partition("=") for part in file.parent.parts]
    folder_label = next((unquote(value) for key, _, value in folders if key == label_column and value), None)
    wanted = [image_column] if folder_label is not None else [image_column, label_column]
    require_columns(str(file), columns, *wanted)
    if twice := [column for column in (image_column, label_column) if columns.count(column) > 1]:
        raise DetailFlowError(f"{file} has {columns.count(twice[0])} columns {twice[0]!r}: give each a name of its own")
    images = schema.field(image_column).type
    if not (_is_binary(images) or (pyarrow.types.is_struct(images) and "binary" in str(images))):
        raise DetailFlowError(f"{file} has no images in its column {image_column!r}: that column holds {images}")
    labels = ""
    if label_column in columns:
        folder_label, labels = None, _kind(file, label_column, schema.field(label_column).type)
    names = _class_names(file, schema.metadata or {}, label_column) if labels else ()
    return ParquetFile(file, metadata.num_rows, images, labels, folder_label, names, largest)


def _is_binary(kind: Any) -> bool:
    from pyarrow import types

    return bool(types.is_binary(kind) or types.is_large_binary(kind))


def _kind(file: Path, column: str, kind: Any) -> str:
    from pyarrow import types

    value = kind.value_type if types.is_dictionary(kind) else kind
    if types.is_integer(value) or types.is_boolean(value):
        return "numbers"
    if types.is_string(value) or types.is_large_string(value):
        return "names"
    if types.is_null(value):
        return "hidden"
    raise DetailFlowError(f"{file} has no labels in its column {column!r}, but {kind}: give class numbers or names")


def _class_names(file: Path, metadata: dict[bytes, bytes], column: str) -> tuple[str, ...]:
    """Those that the Hugging Face metadata gives for a label column.

    `datasets` is not asked: it refuses names that occur twice, and ImageNet has two cranes.
    """
    try:
        found = json.loads(metadata.get(b"huggingface", b"{}"))
    except (ValueError, RecursionError) as error:
        raise DetailFlowError(f"{file} has damaged Hugging Face metadata: write the file again") from error
    for key in ("info", "features", column, "names"):
        found = found.get(key) if isinstance(found, dict) else None
    return check_names(str(file), found)


def _check_expansion(file: Path, metadata: Any, image_column: str) -> int:
    """Check that a file is not far larger as it is read than on the disk.

    Returns:
        The bytes of the images in its largest row group.

    Raises:
        DetailFlowError: for one that could fill the memory from a small file. Images, compressed already, hardly grow.
    """
    if metadata.num_rows > max(_ROWS, size := file.stat().st_size):
        raise DetailFlowError(f"{file} has {metadata.num_rows:,} rows in {size:,} bytes, which cannot be images")
    largest = 0
    for i in range(metadata.num_row_groups):
        group = metadata.row_group(i)
        columns = [group.column(j) for j in range(group.num_columns)]
        stored, read = sum(c.total_compressed_size for c in columns), sum(c.total_uncompressed_size for c in columns)
        if read > max(_EXPANDED, _MOST_EXPANSION * stored):
            raise DetailFlowError(
                f"{file} grows from {stored:,} bytes to {read:,} as it is read (row group {i}): store images as PNG or JPEG files"
            )
        images = [
            c for c in columns if c.path_in_schema == image_column or c.path_in_schema.startswith(f"{image_column}.")
        ]
        largest = max(largest, sum(c.total_uncompressed_size for c in images))
    return largest


# --- images --------------------------------------------------------------------------------------------------------------


class _ParquetRows:
    """Rows of parquet files, whose images are in Arrow files that are mapped into memory."""

    def __init__(self, footers: list[ParquetFile], column: str, copies: list[str]) -> None:
        self.files, self.column, self.copies = [str(footer.path) for footer in footers], column, copies
        self.ends = np.cumsum([footer.rows for footer in footers])
        self._listing = list_tables(footers)
        self._arrays: dict[int, Any] = {}

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getstate__(self) -> dict[str, Any]:
        """All but `_arrays`, which would travel to a worker process with all of its images."""
        return {**self.__dict__, "_arrays": {}}

    def _place(self, index: int) -> tuple[int, int]:
        file = int(np.searchsorted(self.ends, index, side="right"))
        return file, index - (int(self.ends[file - 1]) if file else 0)

    def name(self, index: int) -> str:
        file, row = self._place(index)
        return f"{self.files[file]} row {row}"

    def stored(self, index: int) -> str | bytes:
        file, row = self._place(index)
        if file not in self._arrays:
            try:
                self._arrays[file] = _mapped(self.copies[file])
            except (OSError, ValueError) as error:
                raise DetailFlowError(
                    f"{self.copies[file]} cannot be read, a copy of {self.files[file]}: start again"
                ) from error
        return stored_image(
            self._arrays[file][row].as_py(), self.name(index), [os.path.dirname(self.files[file]) or "."], False
        )

    def listing(self) -> Iterable[tuple[str | int, ...]]:
        return self._listing


def _mapped(copy: str) -> Any:
    import pyarrow

    with pyarrow.memory_map(copy) as mapped, pyarrow.ipc.open_stream(mapped) as batches:
        return batches.read_all().column(0)


def _copy(footer: ParquetFile, column: str) -> str:
    """Return the Arrow file with the images of a parquet file, which is made if there is none of this state of the file.

    Raises:
        DetailFlowError: if the file is damaged or the copy cannot be written.
    """
    from filelock import FileLock

    folder = Path(import_datasets().config.HF_DATASETS_CACHE) / "parquet-images"
    try:
        copy = folder / f"{_state(footer.path, column)}.arrow"
        if copy.exists():
            return str(copy)
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{copy}.lock"):  # of several processes one makes it
            if not copy.exists():
                with writing(copy) as temporary:
                    _write(footer, column, temporary)
    except OSError as error:
        raise DetailFlowError(f"{footer.path} cannot be copied into {folder} ({first_line(error)})") from error
    return str(copy)


def _state(file: Path, column: str) -> str:
    """Return a checksum that changes with a file: of its path, its footer and its times.

    The time of its last change of state counts, since that of its content may be set by whoever replaces it.
    """
    with file.open("rb") as opened:
        found = os.fstat(opened.fileno())
        opened.seek(-8, os.SEEK_END)
        opened.seek(-min(found.st_size, 8 + int.from_bytes(opened.read(4), "little")), os.SEEK_END)
        footer = hashlib.sha256(opened.read()).hexdigest()
    state = [os.path.realpath(file), column, footer, found.st_size, found.st_ino, found.st_mtime_ns, found.st_ctime_ns]
    return hashlib.sha256(json.dumps(state).encode()).hexdigest()


def _write(footer: ParquetFile, column: str, copy: Path) -> None:
    import pyarrow

    size, written, rows = footer.path.stat().st_size, 0, 0
    schema = pyarrow.schema([(column, footer.images)])
    with pyarrow.OSFile(str(copy), "wb") as file, pyarrow.ipc.new_stream(file, schema) as stream:
        for batch in _larger(_batches(footer, [column])):
            written, rows = written + batch.nbytes, rows + batch.num_rows
            if written > max(_EXPANDED, _MOST_EXPANSION * size):
                raise DetailFlowError(
                    f"{footer.path} grows from {size:,} bytes to more than {written:,} as it is read: its rows repeat each other"
                )
            stream.write_batch(pyarrow.record_batch(batch.columns, schema=schema))
    if rows != footer.rows:
        raise DetailFlowError(f"{footer.path} has {rows:,} rows, but says that it has {footer.rows:,}: it is damaged")


def _batches(footer: ParquetFile, columns: list[str]) -> Iterator[Any]:
    """Yield the rows, so few at a time that they fit in memory even if each is as large as all that holds them.

    Raises:
        DetailFlowError: if the file is damaged.
    """
    import pyarrow.parquet

    count = max(1, min(_BATCH_ROWS, _EXPANDED // max(1, footer.largest)))
    try:
        with pyarrow.parquet.ParquetFile(footer.path, buffer_size=2**20) as parquet:
            yield from parquet.iter_batches(count, columns=columns)
    except (OSError, ValueError) as error:
        raise DetailFlowError(f"{footer.path} cannot be read ({first_line(error)}): it is damaged") from error


def _larger(batches: Iterator[Any]) -> Iterator[Any]:
    """Yield the rows of batches in larger ones, of which reading a row then has fewer to look through."""
    some: list[Any] = []
    for batch in batches:
        some.append(batch)
        if sum(b.num_rows for b in some) >= _BATCH_ROWS or sum(b.nbytes for b in some) >= _BATCH:
            yield from _joined(some)
            some = []
    yield from _joined(some)


def _joined(batches: list[Any]) -> list[Any]:
    import pyarrow

    return batches if len(batches) < 2 else pyarrow.Table.from_batches(batches).combine_chunks().to_batches()  # a copy


def open_parquet(files: list[Path], image_column: str, label_column: str, notes: Notes | None = None) -> ImageSource:
    """Open parquet files as one set, in their order. `notes` gets a question if their folders may be classes.

    Raises:
        DetailFlowError: for files that cannot be read, have no such columns, or labels that cannot be.
    """
    footers = read_footers(files, image_column, label_column)
    values = _read_labels(footers, label_column)
    copies = [_copy(footer, image_column) for footer in _with_progress(footers)]
    rows = _ParquetRows(footers, image_column, copies)
    if values is not None:
        return labelled(rows, name_of(files), values, footers[0].class_names)
    folders = {file.parent.name for file in files}
    if len(folders) > 1 and notes is not None:
        notes.question = (
            f"its files are in folders ({some_names(folders)}), which give no labels: add a column {label_column!r}"
        )
    return unlabelled(rows)


def _with_progress(footers: list[ParquetFile]) -> Iterable[ParquetFile]:
    from tqdm import tqdm

    size = sum(footer.path.stat().st_size for footer in footers)
    return tqdm(footers, "copying", unit="file", leave=False, disable=None if size > _SHOW_PROGRESS_ABOVE else True)


def _read_labels(footers: list[ParquetFile], column: str) -> list[Any] | None:
    if not footers[0].labels:
        names = [[footer.folder_label] * footer.rows for footer in footers]
        return None if footers[0].folder_label is None else [name for some in names for name in some]
    return [value for footer in footers for value in _values(footer.path, column)]


def _values(file: Path, column: str) -> Iterator[Any]:
    import pyarrow.parquet
    from pyarrow import types

    try:
        # Texts stay in their dictionary: a long one that all rows share is in memory once.
        with pyarrow.parquet.ParquetFile(file, read_dictionary=[column]) as parquet:
            chunks = parquet.read(columns=[column]).column(column).chunks
        for chunk in chunks:
            if types.is_dictionary(chunk.type):
                texts = chunk.dictionary.to_pylist()
                yield from (None if place is None else texts[place] for place in chunk.indices.to_pylist())
            else:
                yield from chunk.to_pylist()
    except (OSError, ValueError) as error:
        raise DetailFlowError(f"{file} cannot be read: its labels are damaged ({first_line(error)})") from error


def stream_parquet(footers: list[ParquetFile], image_column: str, label_column: str | None) -> Any:
    """Return the rows as a stream of the `datasets` library, which does not open the files: it takes paths for patterns."""
    import pyarrow

    datasets = import_datasets()
    fields = [(image_column, footers[0].images)] + ([(label_column, pyarrow.int64())] if label_column else [])
    features = datasets.Features.from_arrow_schema(pyarrow.schema(fields))
    given = {
        "footers": footers,
        "columns": tuple(name for name, _ in fields),
    }  # a list would be shared out among processes
    return datasets.IterableDataset.from_generator(_stream, features=features, gen_kwargs=given)


def _stream(footers: list[ParquetFile], columns: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    for footer in footers:
        for batch in _batches(footer, list(columns)):
            yield from batch.to_pylist()
