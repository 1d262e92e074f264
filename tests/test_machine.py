"""What is asked of the system."""

import platform
import subprocess
import sys

import pytest

BLOCKS = """
import resource, torch
from detailflow.machine import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before = faults()
keep_freed_memory()
faults()
print(before, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be asked")
def test_freed_memory_is_used_again():
    """Blocks of 64 MiB are pages from the system each time, then no more."""
    done = subprocess.run([sys.executable, "-c", BLOCKS], capture_output=True, text=True, check=True, timeout=120)
    before, after = map(int, done.stdout.split())
    assert after < 100 < before
