"""WebDataset shards: tar files in which `KEY.jpg` stands beside `KEY.cls` or `KEY.json`, read at random without unpacking.

The headers of every shard are read once, when it is opened; after that an image is one read at its place in the file.
"""

import json
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from detailflow.data.decode import first_line, image_suffixes
from detailflow.data.folder import Notes
from detailflow.data.source import ImageSource, common_folder, file_sizes, labelled
from detailflow.errors import DetailFlowError

_READERS = 8  # shards whose headers are read at once, for storage that answers slowly
_SHOW_PROGRESS_ABOVE = 50  # shards


class _Shard(NamedTuple):
    keys: list[str]
    spans: list[tuple[int, int]]  # where each image begins in the file, and its bytes
    labels: list[Any]
    left_aside: list[str]  # images that belong to the image of their key, such as masks


class _ShardRows:
    # Arrays rather than lists of objects: those would be copied into every worker process as it touches them. A file is
    # opened for each read, so there is nothing to share between processes; that is 1% of the time that decoding takes.

    def __init__(self, files: list[Path], shards: list[_Shard]) -> None:
        self.files = [str(file) for file in files]
        self.ends = np.cumsum([len(shard.keys) for shard in shards])
        self.keys = np.array([_encoded(key) for shard in shards for key in shard.keys])
        self.spans = np.array([span for shard in shards for span in shard.spans], np.int64)

    def __len__(self) -> int:
        return len(self.keys)

    def _file(self, index: int) -> str:
        return self.files[int(np.searchsorted(self.ends, index, side="right"))]

    def name(self, index: int) -> str:
        return f"{self._file(index)} {self.keys[index].decode('utf-8', 'replace')}"

    def stored(self, index: int) -> bytes:
        start, size = self.spans[index].tolist()
        try:
            with open(self._file(index), "rb", buffering=0) as file:
                file.seek(start)
                return file.read(size)
        except OSError as error:
            raise DetailFlowError(f"{self.name(index)} cannot be read ({error.strerror})") from error

    def listing(self) -> Iterator[tuple[str | int, ...]]:
        # Keys and sizes, too: one shard may be replaced by another of the same size.
        yield from file_sizes(self.files, common_folder(self.files))
        yield from (
            (key.decode("utf-8", "replace"), size) for key, (_, size) in zip(self.keys.tolist(), self.spans.tolist(), strict=True)
        )


def open_shards(
    files: list[Path], image_column: str = "image", label_column: str = "label", notes: Notes | None = None
) -> ImageSource:
    """Open WebDataset shards as one set, in the order of `files` and of their members.

    An image's label is what its .cls file holds (a class number or name), else "label" in its .json file; another
    `label_column` is an entry of the .json file. Where a key has several images, `image_column` is the suffix of the one to
    take ("jpg"); "image" is the first. A key ends at the first dot of a name, but for images of which no other has that key
    ("b.1.jpg" without "b.jpg"): they are images of their own. `notes` gets what is left aside.

    Raises:
        DetailFlowError: for files that cannot be read, that hold no images, or in which only some have labels.
    """
    from tqdm import tqdm

    with ThreadPoolExecutor(_READERS) as pool:
        read = pool.map(lambda file: _read_headers(file, image_column, label_column), files)
        hidden = True if len(files) < _SHOW_PROGRESS_ABOVE else None
        shards = list(tqdm(read, desc="reading headers", total=len(files), unit="shard", disable=hidden))
    where = str(files[0]) if len(files) == 1 else f"{files[0].parent} ({len(files)} shards)"
    rows = _ShardRows(files, shards)
    if not len(rows):
        wanted = "images" if image_column == "image" else f".{image_column} images"
        raise DetailFlowError(f"{where} holds no {wanted}: a WebDataset shard has files such as 0001.jpg and 0001.cls")
    if notes is not None:
        for shard in shards:
            for name in shard.left_aside:
                notes.leave(f".{name.rpartition('/')[2].partition('.')[2].lower()}", name)
    labels = [label for shard in shards for label in shard.labels]
    if label_column != "label" and all(label is None for label in labels):  # asked for by name
        raise DetailFlowError(f"{where} has no label {label_column!r}: that is looked for in its .json files")
    return labelled(rows, where, _numbers(labels))


def _read_headers(file: Path, image_column: str, label_column: str) -> _Shard:
    suffixes = image_suffixes() if image_column == "image" else {f".{image_column.lower()}"}
    spans: dict[str, tuple[int, int]] = {}
    dotted: dict[str, tuple[int, int]] = {}  # images whose suffix is only the last part of what follows the key
    labels: dict[str, Any] = {}
    try:
        with tarfile.open(file, "r:") as archive:
            for member in archive:
                folder, slash, name = member.name.rpartition("/")
                stem, dot, suffix = name.partition(".")
                if not member.isreg() or not stem or "__MACOSX" in folder.split("/"):
                    continue
                key, suffix = folder + slash + stem, dot + suffix.lower()
                if suffix in suffixes:
                    spans.setdefault(key, (member.offset_data, member.size))
                elif suffix[suffix.rfind(".") :] in suffixes:
                    dotted[member.name] = (member.offset_data, member.size)
                elif suffix.endswith(".cls") and label_column == "label":
                    labels[member.name[:-4]] = _text(archive, member).strip()
                elif suffix.endswith(".json") and (key := member.name[:-5]) not in labels:
                    entries = json.loads(_text(archive, member))
                    if isinstance(entries, dict) and label_column in entries:
                        labels[key] = entries[label_column]
            # `tarfile` takes a header that it can't read for the end of the archive.
            assert archive.fileobj is not None  # it is open
            archive.fileobj.seek(archive.offset)
            if archive.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):
                raise tarfile.ReadError(f"no header at byte {archive.offset}")
    except (OSError, tarfile.TarError, ValueError, RecursionError) as error:
        raise DetailFlowError(
            f"{file} is not a readable WebDataset shard, an uncompressed tar file ({first_line(error)})"
        ) from error
    left_aside = []
    for name, span in dotted.items():
        if _first_key(name) in spans:
            left_aside.append(name)
        else:
            spans[name[: name.rindex(".")]] = span
    return _Shard(list(spans), list(spans.values()), [labels.get(key, labels.get(_first_key(key))) for key in spans], left_aside)


def _first_key(name: str) -> str:
    """b.1.jpg → b"""
    folder, slash, name = name.rpartition("/")
    return folder + slash + name.partition(".")[0]


def _encoded(key: str) -> bytes:
    return key.encode("utf-8", "surrogateescape")


def _text(archive: tarfile.TarFile, member: tarfile.TarInfo) -> str:
    assert archive.fileobj is not None  # it is open
    archive.fileobj.seek(member.offset_data)  # a third of the time that `extractfile` takes, a million times
    return archive.fileobj.read(member.size).decode()


def _numbers(labels: list[Any]) -> list[Any]:
    """Class numbers written as text, as .cls files hold them, as integers; names stay as they are."""
    if all(isinstance(label, str) and label.removeprefix("-").isdecimal() for label in labels if label is not None):
        return [label if label is None else int(label) for label in labels]
    return labels
