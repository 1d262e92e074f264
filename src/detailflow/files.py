"""Files: replaced whole or not at all, locked, read as text, YAML or JSON."""

import errno
import json
import os
import re
import secrets
import stat
import time
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from detailflow.errors import DetailFlowError, os_errors
from detailflow.plain_yaml import load_yaml
from detailflow.words import printable

if TYPE_CHECKING:
    from detailflow.distributed import World

LOCK_FILE = ".lock"
LEFT_SECONDS = 3600.0  # a temporary file that nobody changes for so long is nobody's; a lock says so at once
APPEARS_SECONDS = 90.0  # a disk of the network may show a new file so much later
_TEMPORARY = re.compile(r"\..+\.([0-9]+)-[0-9a-f]{8}\.tmp")  # names that `replacing` makes up
LONGEST_NAME = 100  # bytes of a file name that we make up; some file systems allow no more than 140
LARGEST_TEXT = 32 * 2**20  # bytes of a settings or metadata file
LARGEST_YAML = 2**18  # bytes; reading so many takes seconds
_MOST_SIMILAR = 10_000  # entries of a folder that are compared with a name that is not there
_REMEDY = "correct the file, or get it again from where it came"


# --- errors ----------------------------------------------------------------------------------------------------------


def reading(path: str | os.PathLike[str]) -> AbstractContextManager[None]:
    """Turn an `OSError` while `path` is read into a `DetailFlowError`."""
    return os_errors(f"could not read {path}")


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Write `path` through `replacing`: folders are made, and an `OSError` becomes a `DetailFlowError`."""
    with os_errors(f"cannot write {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            yield temporary


def similar(path: str) -> str:
    """Return "did you mean photos?" of "photoz" if there is a folder or file of a similar name; else ""."""
    folder, name = os.path.split(path.rstrip("/" + os.sep))
    with suppress(OSError, ValueError), os.scandir(folder or ".") as entries:
        names = [entry.name for entry in islice(entries, _MOST_SIMILAR) if not entry.name.startswith(".")]
        if close := get_close_matches(name, names, n=1, cutoff=0.75):
            return f"did you mean {printable(os.path.join(folder, close[0]))}?"
    return ""


# --- writing ---------------------------------------------------------------------------------------------------------


def shortened(name: str, limit: int = LONGEST_NAME) -> str:
    """Return the beginning of a name that has at most `limit` bytes in UTF-8."""
    return printable(name).encode()[:limit].decode(errors="ignore")


def output_names(names: Iterable[str]) -> list[str]:
    """Return a file name, without suffix, for each input name: short, without separators, and all different.

    They differ by more than case or the way an accent is encoded, so that they differ on any file system.
    """
    taken: set[str] = set()
    suffixes: dict[str, int] = {}  # the last one tried for a name that was taken
    result: list[str] = []
    for name in names:
        plain = shortened(re.sub(r"[\x00-\x1f/\\]+", "-", name)) or "image"
        chosen = plain
        while (key := unicodedata.normalize("NFC", chosen).casefold()) in taken:
            suffixes[plain] = suffixes.get(plain, 1) + 1
            chosen = f"{plain}-{suffixes[plain]}"
        taken.add(key)
        result.append(chosen)
    return result


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary file beside `path` that takes its place at the end, or vanishes on an error.

    Only a regular file, or a link to one, is replaced; a folder, a pipe or a device is an `OSError`.
    """
    check_regular(path)
    temporary = path.with_name(f".{shortened(path.name)}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        open_own(temporary, os.O_WRONLY | os.O_EXCL).close()
        mode = temporary.stat().st_mode  # what the umask allows; safetensors makes files for their owner only
        yield temporary
        temporary.chmod(mode)
        sync(temporary)
        os.replace(temporary, path)
        _sync_names(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Flush a file's content to the disk, where a full one may show itself only now."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


@contextmanager
def making(folder: Path) -> Iterator[None]:
    """Make a folder and its parents; on an error those that were made are removed again if they are empty.

    What a process that was killed an hour ago or more has left there of `replacing` is removed.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_temporary(folder, within=False, seconds=LEFT_SECONDS)
        yield
    except BaseException:
        for path in made:
            with suppress(OSError):  # it is not empty, or was never made
                path.rmdir()
        raise


def open_own(path: Path, flags: int) -> IO[bytes]:
    """Open or create a file in a folder that is ours to write to; its content stays.

    A link would lead to a file that nobody named, and opening a pipe may never end, so both are an `OSError`.
    """
    flags |= os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    if path.is_symlink():
        raise OSError(errno.ELOOP, f"{path.name} is a link", str(path))
    opened = os.open(path, flags, 0o666)
    if not stat.S_ISREG(os.fstat(opened).st_mode):
        os.close(opened)
        raise OSError(errno.EINVAL, f"{path.name} is not a regular file", str(path))
    return os.fdopen(opened, "r+b" if flags & os.O_RDWR else "wb")


def _sync_names(folder: Path) -> None:
    """Flush a folder's names to the disk, so that a power cut does not undo a replacement."""
    with suppress(OSError):  # some systems cannot open folders, and some file systems cannot sync them
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file, whole or not at all."""
    with writing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


# --- locks -----------------------------------------------------------------------------------------------------------


@contextmanager
def lock_folder(folder: Path, work: str, world: "World | None" = None) -> Iterator[None]:
    """Lock `folder` for this launch; it is made if it is missing, and removed again if it stays empty.

    Temporary files of a killed launch are removed.

    Args:
        work: what is done in the folder, for the message if another process has the lock.
        world: the ranks of this launch, the main one takes the lock and all see it, or it is not one folder; `None` is
            this process alone.
    """
    with ExitStack() as stack:
        if world is None:
            stack.enter_context(_lock(folder, work))
        else:
            mark = world.from_main(lambda: stack.enter_context(_lock(folder, work)))
            with world.raise_together():
                if not _appears(folder / LOCK_FILE, mark):
                    raise DetailFlowError(
                        f"process {world.rank} of {world.size} does not see in {folder} what process 0 writes to its "
                        "output folder: give all of them the same one, on a disk that they share"
                    )
        yield


def _appears(path: Path, mark: bytes) -> bool:
    """Return whether a file that another machine may have written is there; disks of networks may show it later."""
    until = time.monotonic() + APPEARS_SECONDS
    while time.monotonic() < until:
        with suppress(OSError):
            if path.read_bytes() == mark:
                return True
        time.sleep(0.2)
    return False


@contextmanager
def _lock(folder: Path, work: str) -> Iterator[bytes]:
    """Yield what is in the file that has the lock."""
    path = folder / LOCK_FILE
    with os_errors(f"cannot write to {folder}"):
        made = not folder.exists()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            raise OSError("it is not a folder") from None
        file = open_own(path, os.O_RDWR)
    with file:
        if not _flock(file):
            raise DetailFlowError(f"another {work} is at work in {folder}: choose another folder, or wait for its end")
        _LOCKS.add(file)
        try:
            _remove_temporary(folder)
            mark = secrets.token_bytes(16)
            with os_errors(f"cannot write to {folder}"):
                file.truncate()
                file.write(mark)
                file.flush()
            yield mark
        finally:
            _LOCKS.discard(file)
            with suppress(OSError):  # Windows removes no open file; or the folder has become read-only
                path.unlink()
            if made:
                with suppress(OSError):  # it is not empty
                    folder.rmdir()


def _flock(file: IO[bytes]) -> bool:
    """Lock a file until it is closed, or return False if another process has; some systems have no locks."""
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except (ImportError, OSError):
        return True
    return os.fstat(file.fileno()).st_nlink > 0  # else its owner has just removed it


def _close_locks() -> None:
    """Close the locks in a forked process, which would keep them after this one is killed."""
    for file in _LOCKS:
        file.close()
    _LOCKS.clear()


_LOCKS: set[IO[bytes]] = set()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_locks)


def _remove_temporary(folder: Path, within: bool = True, seconds: float = 0.0) -> None:
    """Remove temporary files of processes that ended inside of `replacing`; if `within`, also in free subfolders.

    Without a lock only those that have not changed for some `seconds`: they may be another machine's, or a thread's.
    """
    with suppress(OSError):  # they are only in the way
        for entry in os.scandir(folder):
            path = Path(entry.path)
            if (made := _TEMPORARY.fullmatch(entry.name)) and entry.is_file(follow_symlinks=False):
                if not _is_running(int(made[1])) and entry.stat().st_mtime <= time.time() - seconds:
                    path.unlink()
            elif within and entry.is_dir(follow_symlinks=False) and not (path / LOCK_FILE).exists():
                _remove_temporary(path, within=False)


def _is_running(process: int) -> bool:
    """Return whether a process of this number runs here; False if asking would end it."""
    if os.name != "posix":
        return False
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # it is somebody else's
        pass
    return process != os.getpid()  # whoever cleans up is not writing


# --- reading ---------------------------------------------------------------------------------------------------------


def check_regular(path: str | os.PathLike[str]) -> None:
    """Raise an `OSError` if `path` is there and not a regular file, which must be neither read nor replaced.

    Reading a pipe or a device may never end.
    """
    if os.path.isdir(path):
        raise OSError(errno.EISDIR, "it is a folder, not a file", str(path))
    if os.path.exists(path) and not os.path.isfile(path):
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))


def check_utf8(path: Path) -> None:
    """Raise an `OSError` if a path is not valid UTF-8, as a file of weights must have it."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        reason = "its path is not valid UTF-8, and PyTorch reads no weights there: rename it, or choose another folder"
        raise OSError(errno.EILSEQ, reason, str(path)) from None


def read_text(path: str | os.PathLike[str], most: int = LARGEST_TEXT, errors: str = "strict") -> str:
    """Return the UTF-8 text of a regular file of at most `most` bytes.

    Raises:
        OSError: if it cannot be read, with the reason as its `strerror`.
        UnicodeDecodeError: if it is not UTF-8 and `errors` is "strict".
    """
    check_regular(path)
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        content = file.read(min(most, size) + 1)  # Python takes as much memory as it is asked to read
    if len(content) > most:
        raise OSError(errno.EFBIG, f"it is larger than {most:,} bytes", str(path))
    return content.decode("utf-8", errors)


def read_yaml(path: str | os.PathLike[str]) -> Any:
    """Return the plain values in a YAML file; errors are those of `read_text` and `load_yaml`."""
    return load_yaml(read_text(path, LARGEST_YAML))


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file."""
    if not os.path.lexists(path):
        raise DetailFlowError(
            f"{path.parent} has no {path.name}: expected a model folder, or one with tokenizer/ and gpt/ inside"
        )
    try:
        with reading(path):
            content = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        where = f"{error.msg}, line {error.lineno}, column {error.colno}"
        raise DetailFlowError(f"{path} is not valid JSON ({where}): {_REMEDY}") from error
    except (UnicodeDecodeError, RecursionError, ValueError) as error:
        if isinstance(error, DetailFlowError):
            raise
        raise DetailFlowError(f"{path} is not valid JSON (UTF-8 text with one object): {_REMEDY}") from error
    if not isinstance(content, dict):
        raise DetailFlowError(f"{path} must hold a JSON object, not a {type(content).__name__}: {_REMEDY}")
    return content
