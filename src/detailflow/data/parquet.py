"""Parquet files, read by pyarrow (in the `train` extra): their footers, their labels and their images.

A row can only be read with its whole row group, 100 to 5,000 images. Training reads rows in random order, so the images
of each file are copied once into an Arrow file in the cache of the `datasets` library and mapped into memory.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

from detailflow.data.columns import ask_for_labels
from detailflow.data.folder import DataFiles, within
from detailflow.data.source import ImageSource, labelled
from detailflow.data.tables import TableRows, check_names, count_rows, import_datasets, mapped_column, require_columns
from detailflow.errors import DetailFlowError, explained
from detailflow.files import writing
from detailflow.progress import progress_bar
from detailflow.words import some_names

_EXPANDED = 256 * 2**20  # bytes that a row group or a file's images may always have
_MOST_EXPANSION = 20  # and how many times its compressed size if it is larger
_ROWS = 2**20  # that a file of any size may have
_BATCH_ROWS = 256  # images that are copied at once
_LISTS = ("list", "large_list", "fixed_size_list")  # as pyarrow names types
_NO_VALUE = "__HIVE_DEFAULT_PARTITION__"  # in the name of a folder of rows that have none


class ParquetFile(NamedTuple):
    """What the footer of a parquet file says.

    Attributes:
        images: the Arrow type of its image column.
        labels: what its label column has: "numbers", "names", "hidden" (all are missing), or "" if there is none.
        folder_label: the label in a path such as "label=cat/0.parquet", in place of a label column; "" is no label.
        class_names: those in its Hugging Face metadata, if any.
        largest: bytes, decompressed, of the images in its largest row group.
        columns: the names of its columns.
    """

    path: str
    rows: int
    images: Any
    labels: str
    folder_label: str | None
    class_names: tuple[str, ...]
    largest: int
    columns: tuple[str, ...]


def _read_footers(found: DataFiles, image_column: str, label_column: str) -> list[ParquetFile]:
    """Read the footers of parquet files that must have the same columns and class names."""
    import_datasets()
    # A set may be one folder of several of a table by folders, but those above it say nothing of it.
    top = os.path.dirname(os.path.normpath(found.where)) if os.path.isdir(found.where) else ""
    footers = [
        _read_footer(file, within(file, top) if top else file, image_column, label_column) for file in found.files
    ]
    first = footers[0]
    for other in footers[1:]:
        if other.class_names != first.class_names:
            named = [", ".join(f.class_names[:5]) + ", …" * (len(f.class_names) > 5) for f in (other, first)]
            has = f"names the classes {named[0]}" if named[0] else "names no classes"
            raise DetailFlowError(f"{other.path} {has}, and {first.path} {named[1] or 'some'}: give all the same names")
        if (other.labels, other.folder_label is None) != (first.labels, first.folder_label is None):
            kinds = [f.labels or ("no" if f.folder_label is None else "its folder's") for f in (other, first)]
            raise DetailFlowError(
                f"{other.path} has {kinds[0]} labels in column {label_column!r}, and {first.path} {kinds[1]}: "
                "give all the same"
            )
    if not any(footer.rows for footer in footers):
        raise DetailFlowError(f"{found.name} holds no images: it has no rows")
    return footers


def _read_footer(file: str, place: str, image_column: str, label_column: str) -> ParquetFile:
    """Read a file's footer; `place` is its path as far as its folders may be labels, the nearest one first."""
    import pyarrow.parquet

    if os.path.exists(file) and not os.path.isfile(file):  # reading a pipe may never end
        raise DetailFlowError(f"{file} is not a regular file: give the path of a parquet file")
    with explained(f"{file} is not a readable parquet file", _damage()):  # nor if its names are not UTF-8
        with pyarrow.parquet.ParquetFile(file) as parquet:
            metadata, schema = parquet.metadata, parquet.schema_arrow
        largest, columns = _check_expansion(file, metadata), schema.names
    folders = [part.partition("=") for part in reversed(Path(place).parent.parts)]
    folder_label = next((unquote(value) for key, _, value in folders if key == label_column and value), None)
    folder_label = "" if folder_label == _NO_VALUE else folder_label
    require_columns(file, columns, image_column, "label" if folder_label is not None else label_column)
    if twice := [column for column in (image_column, label_column) if columns.count(column) > 1]:
        raise DetailFlowError(f"{file} has {columns.count(twice[0])} columns {twice[0]!r}: give each a name of its own")
    images = schema.field(image_column).type
    if not _holds_bytes(images):
        raise DetailFlowError(f"{file} has no images in its column {image_column!r}: that column holds {images}")
    labels = ""
    names: tuple[str, ...] = ()
    if label_column in columns:
        folder_label, labels = None, _kind_of_labels(file, label_column, schema.field(label_column).type)
        names = _class_names(file, schema.metadata or {}, label_column)
    return ParquetFile(file, metadata.num_rows, images, labels, folder_label, names, largest, tuple(columns))


def _damage() -> tuple[type[Exception], ...]:
    """Return what pyarrow raises for damaged files."""
    import pyarrow

    return OSError, ValueError, IndexError, pyarrow.ArrowException


def _holds_bytes(kind: Any) -> bool:
    """Return whether a column of this type has bytes, or structs with an entry `bytes` or `path` and bytes at all."""
    if _is(kind, "struct"):
        names = {kind.field(i).name for i in range(kind.num_fields)}
        return not names.isdisjoint(("bytes", "path")) and "binary" in str(kind)
    return _is(kind, "binary", "large_binary", "binary_view")


def _kind_of_labels(file: str, column: str, kind: Any) -> str:
    value = kind
    for outer in (_LISTS, ("dictionary",)):
        value = value.value_type if _is(value, *outer) else value
    if _is(value, "integer", "boolean"):
        return "numbers"
    if _is(value, "string", "large_string", "string_view"):
        return "names"
    if _is(value, "null"):
        return "hidden"
    raise DetailFlowError(f"{file} has no labels in its column {column!r}, but {kind}: give class numbers or names")


def _is(kind: Any, *names: str) -> bool:
    """Return whether an Arrow type is one of these, of which an older pyarrow may lack some."""
    from pyarrow import types

    return any(getattr(types, f"is_{name}")(kind) for name in names if hasattr(types, f"is_{name}"))


def _class_names(file: str, metadata: dict[bytes, bytes], column: str) -> tuple[str, ...]:
    """Return the class names in the Hugging Face metadata.

    `datasets` is not asked: it refuses names that occur twice, and ImageNet has two cranes.
    """
    try:
        found = json.loads(metadata.get(b"huggingface", b"{}"))
    except (ValueError, RecursionError) as error:
        raise DetailFlowError(f"{file} has damaged Hugging Face metadata: write the file again") from error
    for key in ("info", "features", column, "names"):
        if key == "names" and isinstance(found, dict) and "feature" in found:  # of a list
            found = found["feature"]
        found = found.get(key) if isinstance(found, dict) else None
    return check_names(file, found)


def _check_expansion(file: str, metadata: Any) -> int:
    """Check that a small file cannot fill the memory; return the decompressed bytes of its largest row group.

    Images are compressed already and hardly grow as they are read: all groups together stay below `_MOST_EXPANSION`
    times the file. (What the footer says of single columns is not asked for: pyarrow ends the process at damage there.)
    """
    size = os.path.getsize(file)
    if metadata.num_rows > max(_ROWS, size):
        raise DetailFlowError(f"{file} has {metadata.num_rows:,} rows in {size:,} bytes, which cannot be images")
    groups = [metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups)]
    if (read := sum(groups)) > max(_EXPANDED, _MOST_EXPANSION * size):
        raise DetailFlowError(
            f"{file} grows from {size:,} bytes to {read:,} as it is read: store images as PNG or JPEG files"
        )
    return max(groups, default=0)


def open_parquet(found: DataFiles, image_column: str, label_column: str) -> ImageSource:
    """Open parquet files as one set, in their order."""
    files = found.files
    footers = _read_footers(found, image_column, label_column)
    labels = _read_labels(footers, label_column)
    copies = [_copy(f, image_column) for f in progress_bar(footers, desc="copying", unit="file")]
    rows = TableRows(files, [footer.rows for footer in footers], partial(mapped_column, copies, image_column))
    if labels is None:
        found.notes.ask(_ask_for_labels(files, label_column, set(footers[0].columns) - {image_column}))
    return labelled(rows, found.name, labels, footers[0].class_names)


def _ask_for_labels(files: list[str], label_column: str, others: set[str]) -> str:
    """Return what may be the labels of files that have none."""
    if question := ask_for_labels(files[0], label_column, others):
        return question
    folders = {os.path.basename(os.path.dirname(file)) for file in files}
    if len(folders) < 2:
        return ""
    return f"its files are in folders ({some_names(folders)}), which give no labels: add a column {label_column!r}"


def _read_labels(footers: list[ParquetFile], column: str) -> list[Any] | None:
    if footers[0].labels:
        return [value for footer in footers for value in _values(footer, column)]
    if footers[0].folder_label is not None:
        return [footer.folder_label for footer in footers for _ in range(footer.rows)]
    return None


def _values(footer: ParquetFile, column: str) -> list[Any]:
    import pyarrow.parquet

    file, values = footer.path, list[Any]()
    with explained(f"{file} cannot be read: its labels are damaged", _damage()):
        # Texts stay in their dictionary: a long one that all rows share is in memory once.
        schema = pyarrow.parquet.read_metadata(file).schema
        paths = [schema.column(i).path for i in range(len(schema))]
        texts = [path for path in paths if f"{path}.".startswith(f"{column}.")]  # of a list, that of its elements
        with pyarrow.parquet.ParquetFile(file, read_dictionary=texts) as parquet:
            for group in range(parquet.num_row_groups):  # of several, pyarrow makes no list of dictionaries
                for chunk in parquet.read_row_group(group, columns=[column]).column(column).chunks:
                    values += _plain(chunk)
    if len(values) != footer.rows:
        raise _wrong_rows(file, len(values), footer.rows)
    return values


def _wrong_rows(file: str, rows: int, said: int) -> DetailFlowError:
    return DetailFlowError(f"{file} has {rows:,} rows, but its footer says {said:,}: it is damaged")


def _plain(chunk: Any) -> Iterator[Any]:
    """Yield an Arrow array's values; equal texts are one."""
    from pyarrow import list_

    if _is(chunk.type, "fixed_size_list"):
        chunk = chunk.cast(list_(chunk.type.value_type))
    if _is(chunk.type, "dictionary"):
        texts = dict(enumerate(chunk.dictionary.to_pylist()))
        if wrong := {*chunk.indices.to_pylist()} - {None, *texts}:
            raise ValueError(f"it has no text {min(wrong)}")
        yield from map(texts.get, chunk.indices.to_pylist())
    elif _is(chunk.type, *_LISTS):
        values = _plain(chunk.flatten())
        yield from ([next(values) for _ in range(length or 0)] for length in chunk.value_lengths().to_pylist())
    else:
        yield from chunk.to_pylist()


def _copy(footer: ParquetFile, column: str) -> str:
    """Return an Arrow file with the images of a parquet file, made unless there is one of this state of the file."""
    from filelock import FileLock

    folder = Path(import_datasets().config.HF_DATASETS_CACHE) / "parquet-images"
    with explained(f"{footer.path} cannot be copied into {folder}", OSError, "set HF_HOME to a folder with room"):
        copy = folder / f"{_state(footer.path, column)}.arrow"
        if not _is_whole(copy, footer.rows):
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{copy}.lock"):  # of several processes one makes it
                if not _is_whole(copy, footer.rows):
                    with writing(copy) as temporary:
                        _write_copy(footer, column, temporary)
    return str(copy)


def _is_whole(copy: Path, rows: int) -> bool:
    """Return whether there is a copy of so many rows that can be read to its end."""
    with suppress(FileNotFoundError, *_damage()):
        return count_rows(str(copy)) == rows
    return False


def _state(file: str, column: str) -> str:
    """Return a checksum of a file's path, footer and times.

    They include the time of its last change of state, as that of its content may be set by whoever replaces it.
    """
    with open(file, "rb") as opened:
        found = os.fstat(opened.fileno())
        opened.seek(-8, os.SEEK_END)
        opened.seek(-min(found.st_size, 8 + int.from_bytes(opened.read(4), "little")), os.SEEK_END)
        footer = hashlib.sha256(opened.read()).hexdigest()
    state = [os.path.realpath(file), column, footer, found.st_size, found.st_ino, found.st_mtime_ns, found.st_ctime_ns]
    return hashlib.sha256(json.dumps(state).encode()).hexdigest()


def _write_copy(footer: ParquetFile, column: str, copy: Path) -> None:
    import pyarrow

    size, written, rows = os.path.getsize(footer.path), 0, 0
    schema = pyarrow.schema([(column, footer.images)])
    with pyarrow.OSFile(str(copy), "wb") as file, pyarrow.ipc.new_stream(file, schema) as stream:
        for batch in _batches(footer, column):
            written, rows = written + batch.nbytes, rows + batch.num_rows
            if written > max(_EXPANDED, _MOST_EXPANSION * size):
                raise DetailFlowError(
                    f"{footer.path} grows from {size:,} bytes to more than {written:,} as it is read: "
                    "its rows repeat each other"
                )
            stream.write_batch(pyarrow.record_batch(batch.columns, schema=schema))
    if rows != footer.rows:
        raise _wrong_rows(footer.path, rows, footer.rows)


def _batches(footer: ParquetFile, column: str) -> Iterator[Any]:
    """Yield the images, so few at a time that they fit in memory even if each is as large as its whole row group."""
    import pyarrow.parquet

    count = max(1, min(_BATCH_ROWS, _EXPANDED // max(1, footer.largest)))
    with (
        explained(f"{footer.path} cannot be read", _damage(), "it is damaged"),
        pyarrow.parquet.ParquetFile(footer.path, buffer_size=2**20) as parquet,
    ):
        yield from parquet.iter_batches(count, columns=[column])
