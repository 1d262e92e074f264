"""Files for `torch.load`: those that could fill the memory are told from what `torch.save` writes."""

import os
import stat
import struct
import zipfile
from pathlib import Path
from typing import IO

from detailflow.errors import DetailFlowError
from detailflow.torch_pickle import LARGEST_PICKLE, check_pickle

_ZIP_TAIL = 56 + 20 + 22  # bytes of the three records that end a zip file
_PICKLE = "data.pkl"


def check_torch_zip(path: Path) -> None:
    """Check that what `torch.load` will read from a file is plain values and tensors, and no larger than the file.

    `torch.save` stores every member of its zip file once and as it is. A compressed member, or one that several names share,
    could fill the memory from a small file; so could a pickle that asks for a large object, in a zip file or, as torch wrote
    them long ago, not in one.

    Raises:
        DetailFlowError: for a file with such members or such a pickle, or one that is damaged or cannot be read.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe would be waited for
            raise OSError("it is no regular file")
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            if file.read(4) == b"PK\3\4":
                _check_zip(file, size, path)
            else:
                file.seek(0)
                check_pickle(file.read(LARGEST_PICKLE), size, path, whole=False)
    except OSError as error:
        raise DetailFlowError(f"could not read {path}: {error.strerror or error}") from error
    except (
        zipfile.BadZipFile,
        NotImplementedError,
        struct.error,
        RuntimeError,
    ) as error:  # the last for an encrypted member
        raise _damaged(path) from error
    except ValueError as error:
        if isinstance(error, DetailFlowError):
            raise
        raise _damaged(path) from error


def _damaged(path: Path) -> DetailFlowError:
    return DetailFlowError(
        f"could not read {path}: it is damaged, incomplete or no PyTorch checkpoint, so fetch it again"
    )


def _check_zip(file: IO[bytes], size: int, path: Path) -> None:
    with zipfile.ZipFile(file) as archive:
        members, start = archive.infolist(), archive.start_dir
        tail = file.seek(max(0, size - _ZIP_TAIL)) and file.read()
        expands = any(member.compress_type != zipfile.ZIP_STORED for member in members)
        if (
            expands
            or sum(member.file_size for member in members) > size
            or not _one_directory(tail or b"", size, start)
        ):
            raise DetailFlowError(
                f"refused to load {path}: its members are compressed or overlap, so write it with torch.save"
            )
        names = [member.filename.lower() for member in members]  # torch's reader takes upper for lower case
        pickles = [member for member in members if member.filename.lower().rpartition("/")[2] == _PICKLE]
        if len(set(names)) < len(names) or len(pickles) != 1:
            raise _damaged(path)
        if pickles[0].file_size > LARGEST_PICKLE:
            raise DetailFlowError(
                f"refused to load {path}: what it says of its tensors is larger than {LARGEST_PICKLE:,} bytes, "
                "so write it with torch.save"
            )
        check_pickle(archive.read(pickles[0]), size, path)


def _one_directory(tail: bytes, size: int, start: int) -> bool:
    """Whether every reader of a zip file finds the list of its members at `start`, as Python's does.

    The file must end with a record that says so: nothing after it, nothing before the first member.
    """
    end = tail[-22:]
    if end[:4] != b"PK\5\6":
        return False
    if tail[-42:-38] != b"PK\6\7":  # no second record with sizes of 64 bits
        return int.from_bytes(end[16:20], "little") == start
    record = int.from_bytes(tail[-34:-26], "little")
    return record == size - _ZIP_TAIL and tail[:4] == b"PK\6\6" and int.from_bytes(tail[48:56], "little") == start
