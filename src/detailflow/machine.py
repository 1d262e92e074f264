"""Measure what a machine can do at best, and count what a computation needs of it."""

import ctypes
import gc
import platform
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from detailflow.processor import processor_name

READ_BYTES = 512 * 2**20  # larger than most caches
MATRIX_SIDES = (1024, 2048, 4096)
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
GPU_CALLS = 10  # per measurement, so that the launch of a kernel hardly counts

Multiply = Callable[[torch.Tensor, torch.Tensor], object]  # of square matrices


class Cost(NamedTuple):
    """Bytes to read and floating-point operations to do before anything that follows can begin."""

    bytes: float
    flops: float


@dataclass(frozen=True)
class Ceilings:
    """The machine at its best: bytes read per second, and operations per second of matrix products in one dtype."""

    bandwidth: float
    flops: float

    def limit(self, costs: Sequence[Cost]) -> tuple[float, str]:
        """Return the least seconds for parts that run one after the other, and what most of them wait for."""
        times = [(part.bytes / self.bandwidth, part.flops / self.flops) for part in costs]
        memory = sum(a for a, b in times if a > b)
        compute = sum(b for a, b in times if a <= b)
        return memory + compute, "memory" if memory > compute else "compute"

    def best(self, other: "Ceilings") -> "Ceilings":
        """Return the better of two measurements."""
        return Ceilings(max(self.bandwidth, other.bandwidth), max(self.flops, other.flops))

    def __str__(self) -> str:
        return f"{self.bandwidth / 1e9:.1f} GB/s read, {self.flops / 1e9:,.0f} GFLOP/s in matrix products"


def keep_freed_memory() -> None:
    """Let this process use memory again that it has freed, in place of new pages from the system.

    Glibc gives blocks above 32 MiB, and often smaller ones, back at once; the next step asks for the same ones again,
    and the system fills them with zeros first: a tenth of a training step, a third of an extraction. Elsewhere nothing
    changes.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    # Before 2.35 it takes no larger block than 32 MiB; to set the second limit alone would make all blocks new ones.
    if libc.mallopt(M_MMAP_THRESHOLD, 2**30) or libc.mallopt(M_MMAP_THRESHOLD, 2**25):
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def measure_ceilings(
    device: torch.device, dtype: torch.dtype, multiply: Multiply = torch.matmul, repeats: int = 5
) -> Ceilings:
    """Measure both, taking the best of several repeats and matrix sizes."""
    calls = 1 if device.type == "cpu" else GPU_CALLS
    data = torch.ones(READ_BYTES // 4, device=device)
    bandwidth = READ_BYTES / min(seconds(data.sum, device, calls) for _ in range(repeats))
    del data
    flops = 0.0
    for side in MATRIX_SIDES:
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        times = [seconds(lambda a=a, b=b: multiply(a, b), device, calls) for _ in range(repeats)]  # type: ignore[misc]
        flops = max(flops, 2 * side**3 / min(times))
    return Ceilings(bandwidth, flops)


def count_cost(function: Callable[[], object], *modules: nn.Module) -> Cost:
    """Call a function; count its operations, and the bytes of all weight matrices of the modules that it uses."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # other kernels may not be counted
        function()
    weights = [m.weight for module in modules for m in module.modules() if isinstance(m, nn.Linear)]
    return Cost(sum(weight.nbytes for weight in weights), counter.get_total_flops())


def uses_processor_time(device: torch.device) -> bool:
    """Return whether `seconds` measures processor time: with one thread, so that other programs do not count."""
    return device.type == "cpu" and torch.get_num_threads() == 1


def seconds(function: Callable[[], object], device: torch.device, calls: int = 1) -> float:
    """Return the seconds that one call takes, averaged over `calls` in a row."""
    synchronize = (lambda: None) if device.type == "cpu" else partial(torch.accelerator.synchronize, device)
    clock = time.process_time if uses_processor_time(device) else time.perf_counter
    synchronize()
    start = clock()
    for _ in range(calls):
        function()
    synchronize()
    return (clock() - start) / calls


def seconds_and_peak(function: Callable[[], object], device: torch.device) -> tuple[float, float | None]:
    """Return the seconds of a call, and the peak memory in MiB (None if unknown).

    The memory is the tensors' on a GPU, and everything that the process has resident on a CPU, which only Linux tells.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return seconds(function, device), torch.cuda.max_memory_allocated(device) / 2**20
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # resets the peak
        known = device.type == "cpu"
    except OSError:
        known = False
    taken = seconds(function, device)
    match = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text("latin-1")) if known else None
    return taken, int(match[1]) / 2**10 if match else None


def device_name(device: torch.device) -> str:
    """Return the name of the GPU or the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return processor_name()
