"""Files: replaced as a whole or not at all, and tensors in safetensors, in one file or in shards as the hub has them."""

import errno
import json
import math
import os
import re
import secrets
import stat
import unicodedata
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any, TypeVar

import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from detailflow.distributed import World
from detailflow.errors import DetailFlowError, printable
from detailflow.torch_zip import check_torch_zip

LOCK_FILE = ".lock"
_TEMPORARY = re.compile(r"\..+\.[0-9]+-[0-9a-f]{8}\.tmp")  # names that `replacing` makes up
LONGEST_NAME = 100  # bytes of a file's name that we make up; the least that a file system allows is about 140
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
TENSOR_FILES = (WEIGHTS_FILE, INDEX_FILE, "model-*-of-*.safetensors")  # as patterns
SHARD_SIZE = "5GB"  # the hub's convention
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
PIECE = 64 * 2**20  # bytes
LARGEST_TEXT = 32 * 2**20  # bytes of a file of settings or of what describes others
LARGEST_YAML = 2**18  # which takes seconds to read
MOST_VALUES = 100_000  # that the aliases of YAML may stand for

Key = TypeVar("Key")


def shortened(name: str, limit: int = LONGEST_NAME) -> str:
    """Return the beginning of a name that has at most `limit` bytes in UTF-8."""
    return printable(name).encode()[:limit].decode(errors="ignore")


def output_names(names: Iterable[str]) -> list[str]:
    """Return a name of a file for each of these, to which a suffix can be added, after what they say of an input.

    They are short enough for any file system and have no separators in them. All are different, even if upper and lower case or
    two ways to write an accent are the same.
    """
    taken: set[str] = set()
    numbers: dict[str, int] = {}  # the last one tried of names that were taken
    result: list[str] = []
    for name in names:
        plain = shortened(re.sub(r"[\x00-\x1f/\\]+", "-", name)) or "image"
        chosen = plain
        while (key := unicodedata.normalize("NFC", chosen).casefold()) in taken:
            numbers[plain] = numbers.get(plain, 1) + 1
            chosen = f"{plain}-{numbers[plain]}"
        taken.add(key)
        result.append(chosen)
    return result


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` to write to: it takes the place of `path` at the end, or vanishes on an error."""
    temporary = path.with_name(f".{shortened(path.name)}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        open_own(temporary, os.O_WRONLY | os.O_EXCL).close()
        mode = temporary.stat().st_mode  # what the umask allows; safetensors makes files for their owner only
        yield temporary
        temporary.chmod(mode)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def open_own(path: Path, flags: int) -> IO[bytes]:
    """Open a file of a folder that is ours to write to, made if it is missing; its content stays.

    A link in its place would lead to a file that nobody named, and a pipe would be waited for.

    Raises:
        OSError: if there is anything but a regular file, or it cannot be opened.
    """
    flags |= os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    if path.is_symlink():
        raise OSError(errno.ELOOP, f"{path.name} is a link", str(path))
    opened = os.open(path, flags, 0o666)
    if not stat.S_ISREG(os.fstat(opened).st_mode):
        os.close(opened)
        raise OSError(errno.EINVAL, f"{path.name} is no regular file", str(path))
    return os.fdopen(opened, "r+b" if flags & os.O_RDWR else "wb")


def remove_killed(folder: Path) -> None:
    """Remove what processes left in a folder that were killed in `replacing`; nobody else may be at work there."""
    with suppress(OSError):  # it is only in the way
        for entry in os.scandir(folder):
            if _TEMPORARY.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                os.unlink(entry.path)


def check_regular(path: Path) -> None:
    """Check that what is at `path`, if anything, is a regular file: reading a pipe or a device may never end.

    Raises:
        OSError: if not.
    """
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "it is no regular file", str(path))


def _sync(folder: Path) -> None:
    """Bring a folder's names to the disk; otherwise a power cut may undo a replacement after what came before it is gone."""
    with suppress(OSError):  # some systems cannot open folders, and some file systems cannot sync them
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


@contextmanager
def held(folder: Path, work: str, world: World | None = None) -> Iterator[None]:
    """Keep `folder` for this launch alone; it is made if it is missing, and goes again if it stays empty.

    Temporary files that a killed launch left in it are removed.

    Args:
        work: what is done there, for the message.
        processes: all of this launch, of which the main one holds the folder; `None` is this one alone.

    Raises:
        DetailFlowError: in all of them, if another process holds it, or it cannot be written to.
    """
    world = world or World()
    with ExitStack() as stack:
        with world.raise_together():
            if world.is_main:
                stack.enter_context(_held(folder, work))
        yield


@contextmanager
def _held(folder: Path, work: str) -> Iterator[None]:
    """Hold a folder for this process.

    Raises:
        DetailFlowError: if another process holds it, or it cannot be written to.
    """
    path = folder / LOCK_FILE
    try:
        made = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        file = open_own(path, os.O_RDWR)
    except FileExistsError:
        raise DetailFlowError(f"cannot write to {folder}: it is no folder") from None
    except OSError as error:
        raise DetailFlowError(f"cannot write to {folder}: {error.strerror or error}") from error
    with file:
        if not _locked(file):
            raise DetailFlowError(f"another {work} is at work in {folder}: choose another folder, or wait for its end")
        _HELD.add(file)
        try:
            remove_killed(folder)
            yield
        finally:
            _HELD.discard(file)
            path.unlink(missing_ok=True)
            if made:
                with suppress(OSError):  # something is in it
                    folder.rmdir()


def _let_go() -> None:
    """Close the locks in a process that was forked, which would keep them after this one is killed."""
    for file in _HELD:
        file.close()
    _HELD.clear()


_HELD: set[IO[bytes]] = set()  # by this process
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


def _locked(file: IO[bytes]) -> bool:
    """Lock a file until it is closed; False where another process has. Systems and file systems without locks lock nothing."""
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except (ImportError, OSError):
        return True
    return os.fstat(file.fileno()).st_nlink > 0  # else the one who had it has just removed it


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """`replacing`, in a folder that is made where it is missing.

    Raises:
        DetailFlowError: if the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            yield temporary
    except OSError as error:
        raise DetailFlowError(f"cannot write {path}: {error.strerror or error}") from error


def save_torch(path: Path, content: Any) -> None:
    """Write what `torch.save` takes, whole or not at all.

    Raises:
        OSError: if it cannot be written.
    """
    with replacing(path) as temporary, temporary.open("wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # of its writer, after what the file said
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """A JSON file, whole or not at all.

    Raises:
        DetailFlowError: if it cannot be written.
    """
    with writing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_text(path: str | os.PathLike[str], most: int = LARGEST_TEXT) -> str:
    """Return the UTF-8 text of a file, which must be a regular one of at most `most` bytes: a pipe or a device may never end.

    Raises:
        OSError: if it cannot be read, with the reason as its `strerror`.
        UnicodeDecodeError: if it is not UTF-8.
    """
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode) and not stat.S_ISDIR(found.st_mode):
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    with open(path, "rb") as file:
        content = file.read(min(most, found.st_size) + 1)  # Python takes as much memory as it is asked to read
    if len(content) > most:
        raise OSError(errno.EFBIG, f"it is larger than {most:,} bytes", str(path))
    return content.decode("utf-8")


def read_yaml(path: str | os.PathLike[str]) -> Any:
    """Return what a YAML file says, as plain values.

    Raises:
        OSError, UnicodeDecodeError: as `read_text`.
        yaml.YAMLError: if it is not valid YAML.
    """
    return load_yaml(read_text(path, LARGEST_YAML))


def load_yaml(text: str) -> Any:
    """Return what YAML says, as plain values.

    Raises:
        yaml.YAMLError: if it is not valid, nested too deeply, or a small text for very many values. PyYAML lets the errors of
            Python's own conversions through, as of a number of five thousand digits.
    """
    try:
        content = yaml.safe_load(text)
        count = _count_values(content, {})
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
        raise yaml.YAMLError(str(error)) from error
    if count > MOST_VALUES:
        raise yaml.YAMLError(f"its aliases stand for more than {MOST_VALUES:,} values")
    return content


def _count_values(value: Any, known: dict[int, int]) -> int:
    """Return how many values are in nested containers, one that stands in several places counted in each.

    Raises:
        RecursionError: if a container holds itself.
    """
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in known:
        parts = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_count_values(part, known) for part in parts)
    return known[id(value)]


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        DetailFlowError: if the file is missing or holds anything else.
    """
    try:
        content = json.loads(read_text(path))
    except FileNotFoundError:
        raise DetailFlowError(
            f"{path.parent} has no {path.name}: expected a model folder, or one with tokenizer/ and gpt/ inside"
        ) from None
    except OSError as error:
        raise DetailFlowError(f"could not read {path}: {error.strerror}") from error
    except json.JSONDecodeError as error:
        raise DetailFlowError(
            f"{path} is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        ) from error
    except (UnicodeDecodeError, RecursionError, ValueError) as error:
        raise DetailFlowError(f"{path} is not valid JSON: it must be UTF-8 text with one object") from error
    if not isinstance(content, dict):
        raise DetailFlowError(f"{path} must hold a JSON object, not a {type(content).__name__}")
    return content


def in_pieces(sizes: Mapping[Key, int]) -> Iterator[list[Key]]:
    """The keys in lists of about `PIECE` bytes.

    A file that is mapped into memory holds on to the pages that were read. Whoever copies its tensors maps it anew for
    each of these lists, so that no more than a piece of it is in memory at once.
    """
    piece: list[Key] = []
    held = 0
    for key, size in sizes.items():
        piece.append(key)
        held += size
        if held >= PIECE:
            yield piece
            piece, held = [], 0
    if piece:
        yield piece


def read_tensors(
    path: Path, dtype: torch.dtype | None = None, wanted: Container[str] | None = None, integers: bool = False
) -> dict[str, Tensor]:
    """Copies of the tensors in a folder's model.safetensors or its shards, or in one such file.

    Args:
        path: the folder or the file.
        dtype: of the tensors; `None` is as they are stored.
        wanted: names of those to read; `None` is all.
        integers: whether tensors may be no floating-point numbers, which keep their type.

    Raises:
        DetailFlowError: if a file is missing or damaged.
    """
    tensors: dict[str, Tensor] = {}
    for file in _files(path):
        shapes = {name: shape for name, (_, shape) in _header(file).items() if wanted is None or name in wanted}
        for names in in_pieces({name: 4 * math.prod(shape) for name, shape in shapes.items()}):
            with _opened(file) as opened:
                for name in names:
                    tensor = opened.get_tensor(name)
                    if not tensor.is_floating_point() and not integers:
                        raise DetailFlowError(
                            f"{name} in {file} is of type {tensor.dtype}, where weights are floating-point numbers"
                        )
                    try:
                        tensors[name] = tensor.to(dtype if tensor.is_floating_point() else None, copy=True)
                    except NotImplementedError as error:  # torch has types of four bits that it cannot copy
                        raise DetailFlowError(
                            f"{name} in {file} is of type {tensor.dtype}, which no model has"
                        ) from error
    return tensors


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a folder or safetensors file, as `read_tensors`, or of a state dict that `torch.save` wrote.

    Nothing in the file is executed, and it takes no more memory than about its own size.

    Raises:
        DetailFlowError: if it is missing or damaged, or holds anything but tensors by name.
    """
    if path.is_dir() or path.suffix == ".safetensors":
        return read_tensors(path)
    check_torch_zip(path)
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        raise DetailFlowError(f"{path} cannot be read: {''.join(str(error).splitlines()[:1])}") from error
    entries = tensors.items() if isinstance(tensors, dict) else [(None, tensors)]
    if any(not isinstance(name, str) or not isinstance(tensor, Tensor) for name, tensor in entries):
        raise DetailFlowError(f"{path} must hold tensors by name and nothing else: save the network's state_dict()")
    for name, tensor in entries:
        if (
            tensor.is_meta or tensor.nbytes > tensor.untyped_storage().nbytes()
        ):  # an expanded one would grow once it is used
            raise DetailFlowError(f"{name} in {path} has more numbers than the file: save the network's state_dict()")
    return dict(tensors)


def read_headers(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The stored type ("F32", "BF16", …) and shape of each tensor that `read_tensors` would read.

    Raises:
        DetailFlowError: if a file is missing or damaged.
    """
    return {name: header for file in _files(path) for name, header in _header(file).items()}


def read_metadata(file: Path) -> dict[str, str]:
    """Return the metadata of a safetensors file, empty if it has none.

    Raises:
        DetailFlowError: if the file is missing or damaged.
    """
    with _opened(file) as opened:
        return dict(opened.metadata() or {})


def _header(file: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    with _opened(file) as opened:
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118  # not a mapping
        return {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}


@contextmanager
def _opened(file: Path) -> Iterator[safe_open]:
    try:
        check_regular(file)
        with safe_open(file, "pt") as opened:
            yield opened
    except FileNotFoundError:
        raise DetailFlowError(f"{file.parent} has no {file.name}, which must lie beside config.json") from None
    except OSError as error:
        raise DetailFlowError(f"could not read {file}: {error.strerror or error}") from error
    except SafetensorError as error:
        raise DetailFlowError(f"could not read {file}: it is damaged or incomplete ({error})") from error


def _files(directory: Path) -> list[Path]:
    if directory.is_file():
        return [directory]
    index = directory / INDEX_FILE
    if (directory / WEIGHTS_FILE).exists() or not index.exists():
        return [directory / WEIGHTS_FILE]
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise DetailFlowError(f"{index} must name the file of each tensor under 'weight_map'")
    for name in shards.values():
        if not isinstance(name, str) or name != Path(name).name or not name.endswith(".safetensors"):
            raise DetailFlowError(f"{index} names {name!r}, which is no .safetensors file beside it")
    return [directory / name for name in sorted(set(shards.values()))]


def shard_bytes(size: str) -> int:
    """The bytes in "5GB", "200MB" or "1.5KB".

    Raises:
        DetailFlowError: if it is no such size.
    """
    match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?) ?([KMGT]B)", size.strip().upper())
    count = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    if count < 1:
        raise DetailFlowError(f"the shard size must be like 5GB or 200MB, not {size!r}")
    return count


def write_tensors(directory: Path, tensors: Mapping[str, Tensor], shard_size: str = SHARD_SIZE) -> None:
    """Write model.safetensors, or shards of at most `shard_size` ("5GB", "200MB") and their index.

    All are written first and then put in place; where that is interrupted among shards, there is no index.

    Raises:
        OSError, SafetensorError: if that fails.
        DetailFlowError: for a size that cannot be understood.
    """
    from huggingface_hub import split_torch_state_dict_into_shards

    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    split = split_torch_state_dict_into_shards(whole, max_shard_size=shard_bytes(shard_size))
    index = directory / INDEX_FILE
    with ExitStack() as stack:
        for name, members in split.filename_to_tensors.items():
            path = stack.enter_context(replacing(directory / name))
            save_file({member: whole[member] for member in members}, path, metadata={"format": "pt"})
        index.unlink(missing_ok=True)
    if split.is_sharded:
        with replacing(index) as path:
            content = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    digits = "[0-9]" * 5
    for path in (*directory.glob(f"model-{digits}-of-{digits}.safetensors"), directory / WEIGHTS_FILE):
        if path.name not in split.filename_to_tensors:
            path.unlink(missing_ok=True)
