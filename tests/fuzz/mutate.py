"""What is done to sound inputs: to bytes, to nested values, to archives, and to the place of a file."""

import io
import json
import os
import pickle
import shutil
import socket
import struct
import subprocess
import tarfile
import warnings
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

HUGE = (2**31 - 1, 2**32 - 1, 2**31, 65535, 32768, 2**24, 100_000, 0)
NUMBERS = (
    -1,
    0,
    1,
    2,
    3,
    7,
    7.5,
    1e-300,
    10**6,
    2**31,
    2**63,
    10**15,
    10**40,
    10**400,
    1e308,
    float("nan"),
    float("inf"),
)
TEXTS = (
    *(
        "",
        " ",
        "8",
        "none",
        "cat",
        "é",
        "\U0001f4a5",
        "\udcff",
        "../../secret.png",
        "/dev/zero",
        "~",
        "~nobody/x",
        "a/b",
        "-1",
    ),
    *("x" * 5000, "9" * 5000, "1e400", "nan", "inf", "0x10", "1_0", "٣", "%s", "{}", "a\nb", "\t", "bfloat16", "cpu"),
)
VALUES: tuple[Any, ...] = (None, True, False, *NUMBERS, *TEXTS, [], {}, [[1]], [None], {"a": 1}, {"": {}})


class Attack:
    """Pickles into a call."""

    def __init__(self, function: Callable, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple:
        return self.call


def attack(rng: Random, mark: Path) -> Attack:
    """A pickle that leaves `mark` when it is executed."""
    text = str(mark)
    return Attack(
        *rng.choice(
            (
                (os.system, f"touch {text}"),
                (exec, f"open({text!r}, 'w')"),
                (eval, f"open({text!r}, 'w')"),
                (open, text, "w"),
                (os.mkdir, text),
                (shutil.copy, __file__, text),
                (subprocess.Popen, ["touch", text]),
            )
        )
    )


# --- bytes -----------------------------------------------------------------------------------------------------------


def mutate_bytes(content: bytes, rng: Random, near: int | None = None) -> bytes:
    """Change some bytes, mostly of the first `near`."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        size = len(data)
        end = max(1, min(size, near) if near and rng.random() < 0.8 else size)
        at, way = rng.randrange(end), rng.randrange(10)
        if way <= 2:
            for _ in range(rng.choice((1, 1, 4, 30))):
                if size:
                    data[rng.randrange(end)] = rng.choice((0, 255, 127, 128, rng.randrange(256)))
        elif way == 3:
            data[at:] = b""
        elif way == 4:
            data[at:at] = data[at : at + rng.choice((1, 4, 64, 4096))] * rng.choice((1, 2, 50))
        elif way == 5:
            data[at : at + rng.choice((1, 4, 64, 4096))] = b""
        elif way == 6:
            form = rng.choice(("<I", ">I", "<H", ">H", "<Q", ">Q"))
            number = struct.pack(form, rng.choice(HUGE) % 256 ** struct.calcsize(form))
            data[at : at + len(number)] = number
        elif way == 7:
            data += rng.randbytes(rng.choice((1, 100, 5000)))
        elif way == 8:
            data[at:at] = rng.randbytes(rng.choice((1, 2, 8, 100)))
        else:
            length = rng.choice((1, 16, 1000))
            data[at : at + length] = bytes([rng.choice((0, 255, 32))]) * min(length, max(0, size - at))
    return bytes(data)


def mutate_file(path: Path, rng: Random, near: int | None = None) -> None:
    """Change some bytes of a file."""
    path.write_bytes(mutate_bytes(path.read_bytes(), rng, near))


# --- nested values ---------------------------------------------------------------------------------------------------


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """Where something is in nested containers."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, part in items for place in ((*path, key), *places(part, (*path, key)))]


def mutate_tree(tree: Any, rng: Random, values: tuple[Any, ...] = VALUES) -> Any:
    """Replace, remove, add or move some values of nested dictionaries and lists, in place."""
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        if not (found := places(tree)):
            return tree
        *above, last = rng.choice(found)
        inner = tree
        for key in above:
            inner = inner[key]
        way = rng.random()
        if way < 0.65:
            inner[last] = rng.choice(values)
        elif way < 0.75:
            del inner[last]
        elif way < 0.85 and isinstance(inner, dict):
            inner[rng.choice((f"{last}?", "", "a.b", "é", "x" * 300, "class", "self"))] = rng.choice(values)
        elif way < 0.92:
            inner[last] = [inner[last]] if rng.random() < 0.5 else {"a": inner[last]}
        else:
            inner[last] = str(inner[last])
    return tree


def nested(opening: str, closing: str, rng: Random) -> str:
    """Text that is nested deeply."""
    depth = rng.choice((50, 2_000, 100_000))
    return opening * depth + rng.choice(("", "1")) + closing * (depth if rng.random() < 0.7 else depth // 2)


def mutate_json(text: str, rng: Random) -> bytes:
    """JSON with other values, or with damaged text."""
    way, tree = rng.random(), None
    with suppress(ValueError, RecursionError):  # where something was done to it before
        tree = json.loads(text)
    if way < 0.75 and tree:
        return json.dumps(mutate_tree(tree, rng)).encode()
    if way < 0.85:
        return mutate_bytes(text.encode(), rng)
    if way < 0.9:
        return nested(*rng.choice((("[", "]"), ('{"a":', "}"))), rng).encode()
    odd = (
        '{"a": %s}' % ("9" * 10_000),
        text.replace("{", "[", 1),
        text + text,
        f"\ufeff{text}",
        '"\\ud800"',
        "NaN",
        "",
        "[]",
    )
    return rng.choice(
        (*(item.encode() for item in odd), text.encode("utf-16"), text.replace('"', '"\xe9').encode("latin-1"))
    )


# --- archives --------------------------------------------------------------------------------------------------------


def mutate_zip(content: bytes, rng: Random) -> bytes:
    """Write a zip again with members compressed, changed, renamed, missing or twice; or change its bytes."""
    if rng.random() < 0.35:
        size = len(content)
        tail = size - rng.choice((100, 1000, 4000)) if rng.random() < 0.5 else 0  # its table of contents is at the end
        return content[: max(0, tail)] + mutate_bytes(content[max(0, tail) :], rng, 4000)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    i, way = rng.randrange(len(members)), rng.randrange(7)
    name, data = members[i]
    compression = rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))
    if way == 0:
        members[i] = (name, mutate_bytes(data, rng, 4000))
    elif way == 1:
        del members[i]
    elif way == 2:
        members.append((rng.choice((name, f"../{name}", f"/{name}", "../../written", "x" * 300, "a/b")), data))
    elif way == 3:
        members[i] = (rng.choice((f"{name}x", name.upper(), f"é{name}", name.rpartition("/")[2])), data)
    elif way == 4:
        members[i] = (name, bytes(50_000_000))  # fifty kilobytes once compressed
        compression = zipfile.ZIP_DEFLATED
    elif way == 5:
        members[i] = (name, content)
    result = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(result, "w", compression) as archive:
        warnings.simplefilter("ignore")  # of names that occur twice
        for member, data in members:
            archive.writestr(member, data)
    return result.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]], rng: Random | None = None) -> None:
    """A tar file of (name, content), with `rng` one that has odd members too."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
        if rng is None:
            return
        names = (
            "../../written.png",
            "/tmp/written.png",
            "x.png",
            "x" * 400 + ".png",
            "b\udcff.png",
            "",
            ".",
            "a/b/c.png",
            "0001.cls",
        )
        entry = tarfile.TarInfo(rng.choice(names))
        kinds = (
            tarfile.SYMTYPE,
            tarfile.LNKTYPE,
            tarfile.FIFOTYPE,
            tarfile.CHRTYPE,
            tarfile.DIRTYPE,
            tarfile.REGTYPE,
            b"Z",
        )
        entry.type = rng.choice(kinds)
        entry.linkname = rng.choice(("../../secret.png", "/dev/zero", "x.png", "0000.png"))
        if entry.type == tarfile.REGTYPE:
            entry.size = rng.choice((0, 3, 10**12))
        with suppress(OSError):
            archive.addfile(entry, io.BytesIO(b"123"))


# --- places ----------------------------------------------------------------------------------------------------------


def misplace(path: Path, rng: Random) -> None:
    """Put something else in the place of a file or folder."""
    way = rng.choice(
        ("empty", "folder", "fifo", "loop", "dangling", "zero", "itself", "socket", "gone", "text", "above")
    )
    other = path.with_name(f"{path.name[:200]}.before")
    path.rename(other)
    if way == "empty":
        path.write_bytes(b"")
    elif way == "folder":
        path.mkdir()
    elif way == "fifo":
        os.mkfifo(path)
    elif way == "loop":
        path.symlink_to(path.name)
    elif way == "dangling":
        path.symlink_to("nowhere/at/all")
    elif way == "zero":
        path.symlink_to(rng.choice(("/dev/zero", "/dev/null", "/proc/self/mem", "/dev/full")))
    elif way == "itself":
        path.symlink_to(other.name)
    elif way == "socket":
        with suppress(OSError), socket.socket(socket.AF_UNIX) as opened:  # its name may be too long for one
            opened.bind(str(path))
    elif way == "text":
        path.write_text("no such thing\n" * rng.choice((1, 10_000)))
    elif way == "above":
        path.symlink_to("..")


def pickled(value: Any, rng: Random) -> bytes:
    """A pickle in any protocol."""
    return pickle.dumps(value, protocol=rng.choice((0, 1, 2, 3, 4, 5)))
