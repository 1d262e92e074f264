"""WebDataset shards: tar files in which `KEY.jpg` stands beside `KEY.cls` or `KEY.json`, read at random without unpacking.

The headers of every shard are read once, when it is opened; after that an image is one read at its place in the file.
"""

import io
import json
import os
import re
import tarfile
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from detailflow.data.decode import PLUGINS, first_line, image_suffixes
from detailflow.data.folder import Notes
from detailflow.data.source import ImageSource, common_folder, file_sizes, labelled
from detailflow.errors import DetailFlowError

_READERS = 8  # shards whose headers are read at once, for storage that answers slowly
_SHOW_PROGRESS_ABOVE = 50  # shards
_LONGEST_NAME = 1024  # characters of a member's name, since every key takes the room of the longest
_LARGEST_TEXT = 16 * 2**20  # bytes of a header or a label


class _Shard(NamedTuple):
    keys: list[str]
    spans: list[tuple[int, int]]  # where each image begins in the file, and its bytes
    labels: list[Any]
    left_aside: list[
        tuple[str, str]
    ]  # kind and name: links, and images that belong to the image of their key, such as masks
    replaced: list[str]  # members whose name another has later


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
            (key.decode("utf-8", "replace"), size)
            for key, (_, size) in zip(self.keys.tolist(), self.spans.tolist(), strict=True)
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
    labels = [label for shard in shards for label in shard.labels]
    if label_column != "label" and all(label is None for label in labels):  # asked for by name
        raise DetailFlowError(f"{where} has no label {label_column!r}: that is looked for in its .json files")
    if notes is not None:
        _note(files, shards, notes)
        if all(label is None for label in labels):
            folders = sorted({key.partition("/")[0] for shard in shards for key in shard.keys if "/" in key})
            if len(folders) > 1:
                names = ", ".join(folders[:3]) + ", …" * (len(folders) > 3)
                notes.question = f"its images are in the folders {names}: if these are their classes, unpack {where}"
    return labelled(rows, where, _numbers(labels))


def _note(files: list[Path], shards: list[_Shard], notes: Notes) -> None:
    for file, shard in zip(files, shards, strict=True):
        for kind, name in shard.left_aside:
            notes.leave(kind, name)
        if twice := shard.replaced:
            count = f"{len(twice):,} file{'s' * (len(twice) > 1)}"
            notes.warnings.append(f"{file} holds {count} twice (the first: {twice[0]}): the last of each name is taken")


class _Bounded(io.BufferedReader):
    """A file that is read in small parts: the header of a tar file may claim any size, and memory is taken before it is read."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= _LARGEST_TEXT:
            raise tarfile.ReadError(f"a header claims {size} bytes for a name or label")
        return super().read(size)


@dataclass
class _Members:
    """What the members of a shard are. Of two of one name the last is taken, as unpacking would have it."""

    suffixes: Collection[str]  # of the images that are wanted
    label_column: str
    images: dict[str, tuple[int, int]] = field(default_factory=dict)  # name → where it begins, and its bytes
    numbers: dict[str, Any] = field(default_factory=dict)  # of .cls files
    entries: dict[str, Any] = field(default_factory=dict)  # of .json files
    left_aside: list[tuple[str, str]] = field(default_factory=list)
    replaced: list[str] = field(default_factory=list)

    def add(self, archive: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        if archive.offset <= member.offset:  # where the next is looked for
            raise tarfile.ReadError(f"{member.name} has the size {member.size}")
        if len(member.name) > _LONGEST_NAME:
            raise tarfile.ReadError(f"a name of {len(member.name):,} characters")
        folder, _, name = member.name.rpartition("/")
        stem, _, suffixes = name.lower().partition(".")
        if not stem or "__MACOSX" in folder.split("/"):
            return
        suffix, last = f".{suffixes}", os.path.splitext(name.lower())[1]
        if member.islnk() or member.issym() or member.issparse():
            self.left_aside.append(("sparse file" if member.issparse() else "link", member.name))
        elif not member.isreg():
            return
        elif suffix in self.suffixes or last in self.suffixes:
            self._put(self.images, member, member.name, (member.offset_data, member.size))
        elif last == ".cls" and self.label_column == "label":
            self._put(self.numbers, member, member.name[:-4], _text(archive, member).strip())
        elif last == ".json":
            entries = json.loads(_text(archive, member))
            label = entries.get(self.label_column) if isinstance(entries, dict) else None
            self._put(self.entries, member, member.name[:-5], label)
        elif last in PLUGINS:
            self.left_aside.append((last, member.name))

    def _put(self, members: dict[str, Any], member: tarfile.TarInfo, key: str, value: Any) -> None:
        if key in members:
            self.replaced.append(member.name)
        members[key] = value

    def shard(self) -> _Shard:
        spans: dict[str, tuple[int, int]] = {}
        dotted = []  # images whose suffix is only the last part of what follows the key
        aside = self.left_aside
        for name, span in self.images.items():
            key = _first_key(name)
            if name[len(key) :].lower() not in self.suffixes:
                dotted.append(name)
            elif key in spans:
                aside.append(("second image of a key", name))
            else:
                spans[key] = span
        for name in dotted:
            key = _first_key(name)
            if key in spans:
                aside.append((name[len(key) :].lower(), name))
            else:
                spans[name[: name.rindex(".")]] = self.images[name]
        labels = {key: label for key, label in self.entries.items() if label is not None} | self.numbers
        of_keys = [labels.get(key, labels.get(_first_key(key))) for key in spans]
        return _Shard(list(spans), list(spans.values()), of_keys, aside, self.replaced)


def _read_headers(file: Path, image_column: str, label_column: str) -> _Shard:
    members = _Members(image_suffixes() if image_column == "image" else {f".{image_column.lower()}"}, label_column)
    try:
        with _Bounded(open(file, "rb", buffering=0)) as opened, tarfile.open(fileobj=opened, mode="r:") as archive:
            for member in archive:
                members.add(archive, member)
            # `tarfile` takes a header that it cannot read for the end of the archive.
            opened.seek(archive.offset)
            if opened.read(tarfile.BLOCKSIZE).strip(b"\0"):
                raise tarfile.ReadError(f"no header at byte {archive.offset}")
    except (OSError, tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
        raise DetailFlowError(
            f"{file} is not a readable WebDataset shard, an uncompressed tar file ({first_line(error)})"
        ) from error
    return members.shard()


def _first_key(name: str) -> str:
    """b.1.jpg → b"""
    folder, slash, name = name.rpartition("/")
    return folder + slash + name.partition(".")[0]


def _encoded(key: str) -> bytes:
    return key.encode("utf-8", "surrogateescape")


def _text(archive: tarfile.TarFile, member: tarfile.TarInfo) -> str:
    assert archive.fileobj is not None  # it is open
    archive.fileobj.seek(member.offset_data)  # a third of the time that `extractfile` takes, a million times
    return archive.fileobj.read(member.size).decode("utf-8-sig")


def _numbers(labels: list[Any]) -> list[Any]:
    """Class numbers written as text, as .cls files hold them, as integers; names stay as they are, and so do longer digits."""
    if all(isinstance(label, str) and re.fullmatch("-?[0-9]{1,18}", label) for label in labels if label is not None):
        return [label if label is None else int(label) for label in labels]
    return labels
