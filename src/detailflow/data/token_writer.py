"""Write a token store: each chunk of images is on disk as a whole or not at all, so a killed extraction can go on."""

import json
import os
import shutil
import zlib
from collections.abc import Collection, Iterable, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from detailflow.data.tokens import (
    BEGUN,
    CODE_TYPE,
    CODES,
    FORMAT,
    IDS,
    LABEL_TYPE,
    LABELS,
    MANIFEST,
    MORE,
    MORE_LABELS,
    STAMPS,
    STORE_FILES,
    UNFINISHED,
    UNREADABLE,
    VALIDATION,
    VERSION,
    TokenStore,
    TokenStoreInfo,
    checksum,
    checksums,
    read_manifest,
    read_record,
)
from detailflow.errors import DetailFlowError, explained
from detailflow.files import open_own, read_json, replacing
from detailflow.runs import RUN_FILE, RunFolder, as_plain

DECODER = "decoder"  # of the settings of a store whose codes were searched with a decoder: its checksum


class TokenWriter:
    """Write a store: any number of processes write its chunks, each once, in any order.

    A process may be killed at any moment and another go on: `lock_folder` removes the temporary files that it left. The
    store's bytes depend on nothing but what is written.

    Args:
        labels: (slots,) of all images in the source, or (slots, most) if they have several; see `ImageSource`.
        chunk_images: images of a chunk; the last chunk may have fewer.
        stamps: (slots,) integers that tell an image from another of its name.
    """

    def __init__(
        self,
        directory: Path,
        info: TokenStoreInfo,
        labels: np.ndarray,
        chunk_images: int,
        stamps: np.ndarray | None = None,
    ) -> None:
        first, more = (labels, labels[:, None][:, :0]) if labels.ndim == 1 else (labels[:, 0], labels[:, 1:])
        if len(labels) and (first.min() < 0 or labels.min() < -1 or labels.max() >= len(info.class_names)):
            raise DetailFlowError(f"labels must be 0 to {len(info.class_names) - 1}, the store's classes")
        self.directory, self.info, self.chunk_images = directory, info, chunk_images
        self.labels, self.more_labels = first.astype(LABEL_TYPE), more.astype(LABEL_TYPE)
        self.chunks = -(-len(labels) // chunk_images)
        self.stamps = np.zeros(len(labels), np.int64) if stamps is None else stamps

    def begin(self, ids: Iterable[str], settings: Mapping[str, Any]) -> None:
        """Make the folder this store's, or check that it is; one process does it, before any other writes.

        Chunks of an earlier run that are not on disk as recorded, or whose images are others now, are written again.

        Args:
            ids: the images' names.
            settings: what else the codes depend on.
        """
        lines = "".join(f"{json.dumps(name)}\n" for name in ids).encode()
        identity = as_plain(
            {
                "format": FORMAT,
                "version": VERSION,
                "images": len(self.labels),
                "ids_bytes": len(lines),
                "ids_crc32": zlib.crc32(lines),
                "source_labels_crc32": zlib.crc32(self.labels.tobytes() + self.more_labels.tobytes()),
                "chunk_images": self.chunk_images,
                **asdict(self.info),
                "settings": dict(settings),
            }
        )
        if self.directory.exists() and not self.directory.is_dir():
            raise DetailFlowError(f"{self.directory} is a file: choose a folder for the token store")
        with _writing(self.directory):
            if self.finished:
                _check_same(RunFolder(self.directory, "tokens", MANIFEST), read_manifest(self.directory), identity)
                store = TokenStore.open(self.directory)
                store.check_images(self.stamps[store.slots], "extract into another folder")
                self._remove_records()
                return
            folder, records = RunFolder(self.directory, "tokens", BEGUN), self._records()
            if records and (begun := read_record(self.directory, BEGUN)):
                _check_same(folder, begun, identity)
            else:  # nothing is written yet that other settings could contradict
                left = [name for name in STORE_FILES if (self.directory / name).exists()]
                if len(left) < 3 and not (self.directory / UNFINISHED).exists():  # three are a store without manifest
                    folder.require_free((*left, RUN_FILE))
                (self.directory / UNFINISHED).mkdir(parents=True, exist_ok=True)
                for chunk in records:
                    self.forget(chunk)
                folder.write(identity)
            with replacing(self.directory / IDS) as temporary:
                temporary.write_bytes(lines)
            with open_own(self.directory / CODES, os.O_RDWR) as file:  # sparse until it is written
                file.truncate(len(self.labels) * self.info.image_bytes)
            size = self.chunk_images * self.info.image_bytes
            for chunk, found in checksums(self.directory / CODES, size, records):
                stamp = self._stamp(chunk, records[chunk]["unreadable"])
                if found != records[chunk]["crc32"] or stamp != records[chunk].get(STAMPS, stamp):
                    self.forget(chunk)

    @property
    def finished(self) -> bool:
        """Whether nothing is left to be written."""
        return is_finished(self.directory)

    def slots(self, chunk: int) -> range:
        """Return the slots of a chunk."""
        return range(chunk * self.chunk_images, min((chunk + 1) * self.chunk_images, len(self.labels)))

    def written(self) -> set[int]:
        """Return the chunks that are on disk."""
        return set(self._records())

    def unreadable(self) -> dict[int, str]:
        """Return slot → what is wrong with its image, of the chunks that are on disk."""
        bad = {slot: problem for record in self._records().values() for slot, problem in record["unreadable"].items()}
        return dict(sorted(bad.items()))

    def write(self, chunk: int, codes: np.ndarray, unreadable: Mapping[int, str]) -> None:
        """Put one chunk on disk: `codes` (images, crops, 3, N) in [0, K), zeros if unreadable."""
        expected = (len(self.slots(chunk)), *self.info.codes_shape)
        if codes.shape != expected:
            raise DetailFlowError(f"codes of shape {codes.shape} do not fit the token store: it takes {expected}")
        if codes.min() < 0 or codes.max() >= self.info.codebook_size:
            raise DetailFlowError(f"codes must be 0 to {self.info.codebook_size - 1}, the store's codebook")
        content = codes.astype(CODE_TYPE).tobytes()
        record = {"crc32": zlib.crc32(content), "unreadable": dict(unreadable), STAMPS: self._stamp(chunk, unreadable)}
        with _writing(self.directory):
            # Not through a map: a full disk would kill the process.
            with open_own(self.directory / CODES, os.O_RDWR) as file:
                file.seek(self.slots(chunk).start * self.info.image_bytes)
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            with replacing(self._record(chunk)) as temporary:
                temporary.write_text(json.dumps(record))

    def forget(self, chunk: int) -> None:
        """Let a chunk be written again."""
        self._record(chunk).unlink(missing_ok=True)

    def finish(self) -> None:
        """Write labels and manifest, once every chunk is there; one process does it."""
        records, unreadable = self._records(), self.unreadable()
        if len(records) < self.chunks:
            missing = self.chunks - len(records)
            raise DetailFlowError(f"{self.directory} lacks {missing} of its chunks: extract again to go on")
        if len(unreadable) == len(self.labels):
            raise DetailFlowError(f"{self.directory} got no images: a token store needs at least one that can be read")
        labels = self.labels.copy()
        labels[list(unreadable)] = UNREADABLE
        manifest = {
            **read_record(self.directory, BEGUN),
            "labels_crc32": zlib.crc32(labels.tobytes()),
            "unreadable": unreadable,
            "chunks": [records[chunk]["crc32"] for chunk in range(self.chunks)],
            STAMPS: [records[chunk].get(STAMPS) for chunk in range(self.chunks)],
        }
        if (self.directory / VALIDATION / MANIFEST).exists():
            manifest["validation"] = TokenStore.open(self.directory / VALIDATION).fingerprint
        with _writing(self.directory):
            with replacing(self.directory / LABELS) as temporary:
                temporary.write_bytes(labels.tobytes())
            if most := self.more_labels.shape[1]:
                manifest |= dict(zip(MORE, (most, zlib.crc32(self.more_labels.tobytes())), strict=True))
                with replacing(self.directory / MORE_LABELS) as temporary:
                    temporary.write_bytes(self.more_labels.tobytes())
            with replacing(self.directory / MANIFEST) as temporary:
                temporary.write_text(json.dumps(manifest, indent=1) + "\n")
            self._remove_records()

    def _stamp(self, chunk: int, unreadable: Collection[int]) -> int:
        return checksum(self.stamps[[slot for slot in self.slots(chunk) if slot not in unreadable]])

    def _record(self, chunk: int) -> Path:
        return self.directory / UNFINISHED / f"chunk-{chunk:06d}.json"

    def _records(self) -> dict[int, dict[str, Any]]:
        """Return those of the chunks on disk; one that is damaged, as after a power cut, will be written again."""
        found = {}
        for chunk in range(self.chunks):
            with suppress(DetailFlowError, KeyError, TypeError, ValueError):
                record = read_json(self._record(chunk))
                unreadable = {int(slot): str(problem) for slot, problem in dict(record["unreadable"]).items()}
                if type(record["crc32"]) is int and unreadable.keys() <= set(self.slots(chunk)):
                    found[chunk] = record | {"unreadable": unreadable}
        return found

    def _remove_records(self) -> None:
        if (self.directory / UNFINISHED).exists():
            shutil.rmtree(self.directory / UNFINISHED)


def is_finished(directory: Path) -> bool:
    """Return whether a folder has a finished store."""
    return (directory / MANIFEST).exists()


def begun_store(directory: Path) -> dict[str, Any]:
    """Return the record of the store that is in a folder, or was begun there; empty if there is none."""
    found: dict[str, Any] = {}
    for record in (MANIFEST, BEGUN):
        with suppress(DetailFlowError):  # what uses the record will say so
            found = found or read_record(directory, record)
    return found


def _writing(directory: Path) -> AbstractContextManager[None]:
    hint = "repeat the command to go on once it can, or choose another folder"
    return explained(f"{directory} cannot be written", OSError, hint)


def _check_same(folder: RunFolder, recorded: dict[str, Any], identity: dict[str, Any]) -> None:
    """Check that a store has the settings, the tokenizer and the images that it should have."""
    folder.check(
        dict(recorded.get("settings", {})), identity["settings"], {DECODER: "another decoder, which searched them"}
    )
    counts = [f"{one.get('images')} in {len(one.get('class_names') or ())} classes" for one in (recorded, identity)]
    changed = "as many, by other names" if counts[0] == counts[1] else f"{counts[0]} then, {counts[1]} now"
    images = f"other images ({changed})"
    called = dict.fromkeys(("images", "ids_bytes", "ids_crc32"), images)
    called |= {"source_labels_crc32": "other labels", "class_names": "other classes"}
    rest = {name: value for name, value in identity.items() if name != "settings"}
    first = {"tokenizer_fingerprint": identity["tokenizer_fingerprint"]}
    folder.check(recorded, first | rest, called | {"tokenizer_fingerprint": "another tokenizer"})
