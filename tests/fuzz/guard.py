"""Watch what a case does: processes started, files written, hosts called, memory. For Linux."""

import io
import os
import resource
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

MEMORY = 2 * 2**30  # bytes that a case may take
SECONDS = 30.0  # and how long
_PROCESSES = {
    *(
        "subprocess.Popen",
        "os.system",
        "os.exec",
        "os.fork",
        "os.forkpty",
        "os.posix_spawn",
        "os.spawn",
        "os.startfile",
    ),
    *("os.kill", "os.killpg", "pty.spawn"),
}
_CALLS = {"socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"}
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGES = {  # how many of the first arguments are paths that change
    **dict.fromkeys(
        ("os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.chown", "os.truncate", "os.utime", "os.setxattr"), 1
    ),
    **dict.fromkeys(("os.rename",), 2),
}
DEVICES = ("/dev/null", "/dev/shm/", "/proc/self/clear_refs")


class Guard:
    """An audit hook, which cannot be taken out again and so is switched on for each case.

    Args:
        scratch: where libraries may keep caches and temporary files.
        secret: a file that no input may lead to.
    """

    def __init__(self, scratch: Path, secret: Path) -> None:
        self._scratch, self._secret = f"{os.path.realpath(scratch)}/", os.path.realpath(secret)
        self._allowed: tuple[str, ...] = ()
        self._forbidden = ""
        self._watching = False
        self.found: list[str] = []
        sys.addaudithook(self._heard)

    @contextmanager
    def watching(self, folder: Path, inputs: Path, outputs: Sequence[str]) -> Iterator[list[str]]:
        """Collect what must not be done by a case in `folder`.

        Its inputs stay as they are, but for `outputs` among them.
        """
        free = any(f"{os.path.realpath(path)}/".startswith(f"{os.path.realpath(inputs)}/") for path in outputs)
        before = _listing(inputs)
        self.found = []
        named = (f"{os.path.realpath(path)}/" for path in outputs if path)
        self._allowed = (f"{os.path.realpath(folder)}/", self._scratch, *DEVICES, *named)
        self._forbidden = "\0" if free else f"{os.path.realpath(inputs)}/"
        self._watching = True
        try:
            yield self.found
        finally:
            self._watching = False
            if not free and _listing(inputs) != before:
                self.found.append("changed its inputs")

    def _heard(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._watching:
            return
        if event == "open":
            self._opened(*arguments[:3])
        elif event in _PROCESSES:
            self.found.append(f"{event} {arguments[:2]!r}"[:300])
        elif event in _CHANGES:
            for path in arguments[: _CHANGES[event]]:
                self._written(path, event, follow=event in ("os.truncate", "os.chmod", "os.utime"))
        elif event in ("os.symlink", "os.link"):
            self._written(arguments[1], event)
        elif event in _CALLS:
            raise OSError("no network while inputs are fuzzed")

    def _opened(self, path: Any, mode: str | None, flags: int) -> None:
        if isinstance(path, int):
            return
        if flags & _WRITING if mode is None else set(mode) & set("wax+"):
            self._written(path, "open for writing")
        elif os.fsdecode(path).endswith(os.path.basename(self._secret)) and os.path.realpath(path) == self._secret:
            self.found.append(f"read {os.fsdecode(path)}, which nobody named")

    def _written(self, path: Any, how: str, follow: bool = True) -> None:
        """Note a change of `path`; of what it leads to if `follow`, else of a link itself."""
        if isinstance(path, int):
            return
        folder, name = os.path.split(os.fsdecode(path))
        real = os.path.realpath(os.fsdecode(path)) if follow or not name else f"{os.path.realpath(folder)}/{name}"
        if real.startswith(self._forbidden) or (not f"{real}/".startswith(self._allowed) and real not in DEVICES):
            self.found.append(f"{how}: {real!r}"[:300])


def _listing(folder: Path) -> list[tuple[str, int, int]]:
    """Every path below, with its size and time of change."""
    found = []
    for root, folders, files in os.walk(folder):
        for name in (*folders, *files):
            status = os.lstat(os.path.join(root, name))
            found.append(
                (os.path.join(root, name), status.st_size * (name in files), status.st_mtime_ns * (name in files))
            )
    return sorted(found)


def forget_peak() -> None:
    """Start to measure the largest memory again."""
    with suppress(OSError):  # not every kernel lets us: then it is the largest of all cases so far
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """Bytes: the largest since `forget_peak`, without pages of files that can be dropped at any time."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return (int(status["VmHWM"].split()[0]) - int(status["RssFile"].split()[0])) * 1024


def processor_seconds(process: int) -> float:
    """What a process has used of the processors."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def limited_memory(more: int) -> Iterator[None]:
    """Have the system refuse more than `more` bytes beyond what is mapped now."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more, most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


class Captured(io.TextIOWrapper):
    """A stream like a real one: what cannot be written to that cannot be written to this."""

    def __init__(self, errors: str) -> None:
        self._bytes = io.BytesIO()
        super().__init__(self._bytes, encoding="utf-8", errors=errors, write_through=True)

    def text(self) -> str:
        """What was written."""
        return self._bytes.getvalue().decode("utf-8", "replace")
