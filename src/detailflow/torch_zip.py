"""Files for `torch.load`: zip files whose members could fill the memory are told from what `torch.save` writes."""

import os
import struct
import zipfile
from pathlib import Path

from detailflow.errors import DetailFlowError

_ZIP_TAIL = 56 + 20 + 22  # bytes of the three records that end a zip file


def check_torch_zip(path: Path) -> None:
    """Check that what `torch.load` will read from a file is no larger than the file.

    `torch.save` stores every member of its zip file once and as it is. A compressed member, or one that several names share,
    could fill the memory from a small file. Files that are no zip files, as torch wrote them long ago, pass.

    Raises:
        DetailFlowError: for a zip file with such members, or one that is damaged or cannot be read.
    """
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise OSError("it is no regular file")
        with path.open("rb") as file:
            if file.read(4) != b"PK\3\4":
                return
            with zipfile.ZipFile(file) as archive:
                members, start = archive.infolist(), archive.start_dir
            size = file.seek(0, os.SEEK_END)
            tail = file.seek(max(0, size - _ZIP_TAIL)) and file.read()
    except OSError as error:
        raise DetailFlowError(f"could not read {path}: {error.strerror or error}") from error
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error) as error:
        raise DetailFlowError(
            f"could not read {path}: it is damaged, incomplete or no PyTorch checkpoint, so fetch it again"
        ) from error
    expands = any(member.compress_type != zipfile.ZIP_STORED for member in members)
    if expands or sum(member.file_size for member in members) > size or not _one_directory(tail or b"", size, start):
        raise DetailFlowError(f"refused to load {path}: its members are compressed or overlap, so write it with torch.save")


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
