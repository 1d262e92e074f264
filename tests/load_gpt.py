"""Run by tests: load an AR model in bfloat16.

Print its size, and how much more memory was held at once than before, in bytes.
"""

import sys
from pathlib import Path

import torch

from detailflow import DetailFlowGPT


def peak() -> int:
    """This process's largest memory so far, pages of mapped files included."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024


before = peak()
model = DetailFlowGPT.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
print(sum(parameter.nbytes for parameter in model.parameters()), peak() - before)
