"""WebDataset shards: tar files in which `KEY.jpg` is beside `KEY.cls` or `KEY.json`, read at random without unpacking.

The headers of every shard are read once, when it is opened; after that an image is one read at its position in the
file.
"""

import io
import os
import posixpath
import re
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import IO, Any, BinaryIO, NamedTuple

import numpy as np

from detailflow.data.columns import ask_for_labels, parse_json, plain_name
from detailflow.data.folder import DataFiles, file_sizes
from detailflow.data.image_files import REMEDIES, image_suffixes
from detailflow.data.notes import Notes
from detailflow.data.source import ImageSource, labelled
from detailflow.errors import DetailFlowError, explained
from detailflow.progress import progress_bar
from detailflow.words import several, some_names

_READERS = 8  # shards whose headers are read at once, for storage that answers slowly
_LONGEST_NAME = 1024  # characters of a member's name, since every key takes the memory of the longest
_LARGEST_TEXT = 16 * 2**20  # bytes of a header or a label
_AFTER_END = 2**20  # bytes after the end of an archive in which another is looked for; tar fills up 10 KiB with zeros


class _ShardRows:
    # Arrays instead of lists of objects: those would be copied into every worker process as it touches them. A file is
    # opened for each read, so there is nothing to share between processes; that is 1% of the time that decoding takes.

    def __init__(self, files: Sequence[str], shards: Sequence["_Shard"]) -> None:
        self.files, self.states = list(files), [shard.state for shard in shards]
        self.ends = np.cumsum([len(shard.spans) for shard in shards])
        self.keys = np.array([key.encode("utf-8", "surrogateescape") for shard in shards for key in shard.spans])
        self.spans = np.array([span for shard in shards for span in shard.spans.values()], np.int64)

    def __len__(self) -> int:
        return len(self.keys)

    def _shard(self, index: int) -> int:
        return int(np.searchsorted(self.ends, index, side="right"))

    def name(self, index: int) -> str:
        return f"{self.files[self._shard(index)]} {self.keys[index].decode('utf-8', 'replace')}"

    def stored(self, index: int) -> bytes:
        shard, (start, size) = self._shard(index), self.spans[index].tolist()
        with explained(f"{self.name(index)} cannot be read"), open(self.files[shard], "rb", buffering=0) as file:
            file.seek(start)
            content, state = file.read(size), _state(file)
        if state != self.states[shard] or len(content) < size:  # another image may be there, and get this one's label
            raise DetailFlowError(f"{self.files[shard]} has changed since it was opened: start again")
        return content

    def listing(self) -> Iterator[tuple[str | int, ...]]:
        # Keys and sizes, too: one shard may be replaced by another of the same size.
        yield from file_sizes(self.files)
        sizes = self.spans[:, 1].tolist()
        yield from ((key.decode("utf-8", "replace"), size) for key, size in zip(self.keys.tolist(), sizes, strict=True))

    def stamps(self) -> np.ndarray:
        return self.spans[:, 1]


def open_shards(found: DataFiles, image_column: str, label_column: str) -> ImageSource:
    """Open WebDataset shards as one set, in the order of the files and of their members.

    An image's label is the content of its .cls file (a class number or name), else "label" in its .json file; another
    `label_column` is an entry of the .json file. If a key has several images, `image_column` is the suffix of the one
    to take ("jpg"); "image" is the first. A key ends at the first dot of a name, except for images without another of
    that key ("b.1.jpg" without "b.jpg"): they are images of their own.
    """
    files, notes = found.files, found.notes
    with ThreadPoolExecutor(_READERS) as pool:
        read = pool.map(lambda file: _read_headers(file, image_column, label_column), files)
        shards = list(progress_bar(read, desc="reading headers", total=len(files), unit="shard"))
    where, rows = found.name, _ShardRows(files, shards)
    if not len(rows):
        wanted = "images" if image_column == "image" else f".{image_column} images"
        raise DetailFlowError(f"{where} holds no {wanted}: a WebDataset shard has files such as 0001.jpg and 0001.cls")
    labels = [label for shard in shards for label in shard.labels]
    unlabelled = all(label is None for label in labels)
    if unlabelled and label_column != "label":  # asked for by name
        raise DetailFlowError(f"{where} has no label {label_column!r}: that is looked for in its .json files")
    for shard in shards:
        notes.warnings += shard.notes.warnings
        for kind, names in shard.notes.left_aside.items():
            notes.leave(kind, *names)
    if cut := [file for file, shard in zip(files, shards, strict=True) if not shard.ended]:
        others = f" and {several(len(cut) - 1, 'other shard')}" if len(cut) > 1 else ""
        notes.warnings.append(
            f"files may be missing from {cut[0]}{others}, as no mark of an archive's end follows: copy such a shard "
            "again, or write it again and close it"
        )
    if unlabelled:
        notes.ask(_ask_for_labels(where, shards))
    return labelled(rows, where, _numbers(labels))


def _ask_for_labels(where: str, shards: Sequence["_Shard"]) -> str:
    """Return what may be the labels of shards that have none."""
    if question := next((shard.question for shard in shards if shard.question), ""):
        return question
    parts = []
    keys = (_plain(key) for shard in shards for key in shard.spans)
    folders = sorted({key.partition("/")[0] for key in keys if "/" in key})
    if len(folders) > 1:
        some = ", ".join(folders[:3]) + ", …" * (len(folders) > 3)
        parts.append(f"its images are in the folders {some}: if these are their classes, unpack {where}")
    if beside := set().union(*(shard.beside for shard in shards)):
        parts.append(
            f"its {some_names(beside)} files give no labels: these are read from .cls files, and from the entry label "
            "of .json files"
        )
    return "; ".join(parts)


def _numbers(labels: list[Any]) -> list[Any]:
    """Return class numbers as integers if all labels are (.cls files have text); names and longer digits stay text."""
    if all(_is_number(label) for label in labels if label is not None):
        return [label if label is None else int(label) for label in labels]
    return labels


def _is_number(label: Any) -> bool:
    return isinstance(label, int) or (isinstance(label, str) and re.fullmatch("-?[0-9]{1,18}", label) is not None)


class _Shard(NamedTuple):
    spans: dict[str, tuple[int, int]]  # key → where the image begins in the file, and its bytes
    labels: list[Any]  # one for each of them
    notes: Notes
    ended: bool  # the archive has a mark of its end
    beside: set[str]  # suffixes of files beside images that give no label
    question: str  # whether labels are there by another name
    state: tuple[int, ...]  # of the file as its headers were read


class _BoundedReader(io.BufferedReader):
    """A file that is read in small parts: a tar header may claim any size, and memory is allocated before reading."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= _LARGEST_TEXT:
            raise tarfile.ReadError(f"a header claims {size} bytes for a name or label")
        return super().read(size)


def _read_headers(file: str, image_column: str, label_column: str) -> _Shard:
    kinds = (OSError, tarfile.TarError, ValueError, OverflowError, RecursionError)
    with (
        explained(f"{file} is not a readable WebDataset shard, an uncompressed tar file", kinds),
        _BoundedReader(open(file, "rb", buffering=0)) as opened,
        tarfile.open(fileobj=opened, mode="r:") as archive,
    ):
        state = _state(opened)
        members = _Members(
            file,
            archive,
            image_suffixes() if image_column == "image" else frozenset({f".{image_column.lower()}"}),
            label_column,
        )
        for member in archive:
            members.add(member)
        ended = _check_end(file, opened, archive.offset)
    return members.shard(ended, state)


def _state(file: IO[bytes]) -> tuple[int, ...]:
    """Return what changes if another file takes a file's place, or if it is written to."""
    # Not its number, which some network folders give again.
    found = os.fstat(file.fileno())
    return found.st_size, found.st_mtime_ns


def _check_end(file: str, opened: BinaryIO, end: int) -> bool:
    """Check that nothing follows the members; return whether the archive has a mark of its end, a block of zeros.

    There should be two, but not everyone writes them. `tarfile` takes the file's end for the archive's, too, and a
    header that it cannot read.
    """
    opened.seek(end)
    mark = opened.read(tarfile.BLOCKSIZE)
    if mark.strip(b"\0"):
        raise tarfile.ReadError(f"no header at byte {end}")
    after = opened.read(_AFTER_END)
    start = (len(after) - len(after.lstrip(b"\0"))) // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE
    with suppress(tarfile.HeaderError):  # no header of a member: what follows an archive is not looked at
        tarfile.TarInfo.frombuf(after[start : start + tarfile.BLOCKSIZE], tarfile.ENCODING, "surrogateescape")
        raise DetailFlowError(
            f"{file} is several archives in one, and only the first is read, up to byte {end:,}: "
            "unpack it with tar --ignore-zeros and pack its files again"
        )
    return bool(mark)


class _Members:
    """The images and labels among a shard's members."""

    def __init__(self, file: str, archive: tarfile.TarFile, suffixes: frozenset[str], label_column: str) -> None:
        self.file, self.archive, self.suffixes = file, archive, suffixes
        self.label_column, self.names = label_column, {plain_name(label_column)}
        self.images: dict[str, tuple[str, int, int]] = {}  # path → name, where it begins, and its bytes
        self.cls_labels: dict[str, Any] = {}  # by key
        self.json_labels: dict[str, Any] = {}
        self.others: dict[str, set[str]] = {}  # suffix → keys of files from which no label is read
        self.question: str | None = None  # whether another entry of the first .json file without a label is meant
        self.notes = Notes()
        self.replaced: list[str] = []  # whose name another member has later; as in unpacking, the last is taken

    def add(self, member: tarfile.TarInfo) -> None:
        if self.archive.offset <= member.offset:  # where the next is looked for
            raise tarfile.ReadError(f"{member.name} has the size {member.size}")
        if len(member.name) > _LONGEST_NAME:
            raise tarfile.ReadError(f"a name of {len(member.name):,} characters")
        path = _plain(member.name)
        folder, _, name = path.rpartition("/")
        stem, _, suffixes = name.lower().partition(".")
        if not stem or "__MACOSX" in folder.split("/"):
            return
        last = os.path.splitext(name.lower())[1]
        if member.islnk() or member.issym() or member.issparse():
            self.notes.leave("sparse file" if member.issparse() else "link", member.name)
        elif not member.isreg():
            return
        elif not self.suffixes.isdisjoint((f".{suffixes}", last)):
            self._put(self.images, member, path, (member.name, member.offset_data, member.size))
        elif last == ".cls" and self.label_column == "label":
            self._put(self.cls_labels, member, path[:-4], self._text(member).strip())
        elif last == ".json":
            self._put(self.json_labels, member, path[:-5], self._json_label(member, path, suffixes))
        elif last in REMEDIES:
            self.notes.leave(last, member.name)
        elif suffixes and last not in image_suffixes():
            self._give_no_label(path, suffixes)

    def _json_label(self, member: tarfile.TarInfo, path: str, suffixes: str) -> Any:
        name = f"{self.file} {member.name}"
        entries = parse_json(self._text(member), self.names, name)
        if not isinstance(entries, dict):
            entries = {}
        if self.label_column not in entries:
            self._give_no_label(path, suffixes)
            if self.question is None:
                self.question = ask_for_labels(name, self.label_column, entries, "entry")
        label = entries.get(self.label_column)
        if wrong := [one for one in (label if isinstance(label, list) else [label]) if isinstance(one, bool)]:
            raise DetailFlowError(f"{name} has the label {wrong[0]}, which is neither a class number nor a name")
        return label

    def _give_no_label(self, path: str, suffixes: str) -> None:
        self.others.setdefault(f".{suffixes}", set()).add(_first_key(path))

    def _put(self, members: dict[str, Any], member: tarfile.TarInfo, key: str, value: Any) -> None:
        if key in members:
            self.replaced.append(member.name)
        members[key] = value

    def _text(self, member: tarfile.TarInfo) -> str:
        assert self.archive.fileobj is not None  # it is open
        self.archive.fileobj.seek(member.offset_data)  # a third of the time that `extractfile` takes, a million times
        text = self.archive.fileobj.read(member.size)
        with explained(f"{self.file} {member.name} is not text in UTF-8", UnicodeDecodeError):
            return text.decode("utf-8-sig")

    def shard(self, ended: bool, state: tuple[int, ...]) -> _Shard:
        chosen: dict[str, str] = {}  # key → path of its image
        dotted = []  # images whose suffix is only the last part of what follows the key
        for path, (name, *_) in self.images.items():
            key = _first_key(path)
            if path[len(key) :].lower() not in self.suffixes:
                dotted.append(path)
            elif key in chosen:
                self.notes.leave("second image of a key", name)
            else:
                chosen[key] = path
        for path in dotted:
            key = _first_key(path)
            if key in chosen:
                self.notes.leave(path[len(key) :].lower(), self.images[path][0])
            else:
                chosen[path[: path.rindex(".")]] = path
        labels = {key: label for key, label in self.json_labels.items() if label is not None} | self.cls_labels
        of_keys = [labels.get(key, labels.get(_first_key(key))) for key in chosen]
        taken = {*chosen, *map(_first_key, chosen)}
        spans = {}
        for key, path in chosen.items():
            name, *span = self.images[path]
            spans[name[: len(name) - len(path) + len(key)]] = (span[0], span[1])  # named as the shard does
        unused = [f"{key}.{'cls' if key in self.cls_labels else 'json'}" for key in labels if key not in taken]
        self.notes.leave("label file without an image", *unused)
        if self.replaced:
            first = f"(the first: {self.replaced[0]}): the last of each name is taken"
            self.notes.warnings.append(f"{self.file} holds {several(len(self.replaced), 'file')} twice {first}")
        beside = {suffix for suffix, found in self.others.items() if not found.isdisjoint(taken)}
        return _Shard(spans, of_keys, self.notes, ended, beside, self.question or "", state)


def _plain(name: str) -> str:
    """Return a name by which files of one key are found: "./a.png" is beside "a.cls"."""
    return posixpath.normpath(name)


def _first_key(name: str) -> str:
    """Return "b" of "b.1.jpg"."""
    folder, slash, name = name.rpartition("/")
    return folder + slash + name.partition(".")[0]
