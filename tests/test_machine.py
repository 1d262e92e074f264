"""What is asked of the system."""

import ctypes
import platform
import subprocess
import sys

import pytest

from detailflow import machine

BLOCKS = """
import resource, torch
from detailflow.machine import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.ones(2**22)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before = faults()
keep_freed_memory()
faults()
print(before, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be asked")
def test_freed_memory_is_used_again():
    """Blocks of 16 MiB are pages from the system each time, then no more."""
    done = subprocess.run([sys.executable, "-c", BLOCKS], capture_output=True, text=True, check=True, timeout=120)
    before, after = map(int, done.stdout.split())
    assert after < 100 < before


@pytest.mark.parametrize(
    ("name", "refused", "asked"),
    [
        ("", 0, []),  # Windows, macOS, musl
        ("glibc", 0, [(-3, 2**30), (-1, 2**31 - 1)]),
        ("glibc", 2**25 + 1, [(-3, 2**30), (-3, 2**25), (-1, 2**31 - 1)]),  # before 2.35
        ("glibc", 1, [(-3, 2**30), (-3, 2**25)]),
    ],
)
def test_what_glibc_is_asked(name: str, refused: int, asked: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch):
    """The second limit alone would make every block a new one."""
    calls: list[tuple[int, int]] = []

    class Libc:
        def mallopt(self, what: int, value: int) -> bool:
            calls.append((what, value))
            return not (refused and what == -3 and value >= refused)

    monkeypatch.setattr(platform, "libc_ver", lambda: (name, ""))
    monkeypatch.setattr(ctypes, "CDLL", lambda path: Libc())
    machine.keep_freed_memory()
    assert calls == asked
