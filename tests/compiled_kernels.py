"""Run by test_kernels.py: compile the kernels of a step for GPUs of given capabilities, and print their names.

There need be no GPU: what would start a kernel only compiles it.
"""

import sys
from types import SimpleNamespace
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from detailflow import DetailFlowGPT, GPTConfig, kernels

SHARED = {80: 163, 86: 99, 90: 227, 100: 227, 120: 99}  # KiB of shared memory that a program may have


class Compiling(kernels.Launch):
    def start(self, name: str, kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        compiled = kernel.warmup(*arguments, grid=grid, **options)
        assert "cubin" in compiled.asm and compiled.metadata.shared <= self.shared, (name, compiled.metadata.shared)
        print(f"{capability}:{name}")


kernels.Launch = Compiling  # type: ignore[misc]
config = GPTConfig(num_classes=10, depth=1, codebook_size=256)  # GPT-L but for these
gpt = DetailFlowGPT(config).eval().to(torch.bfloat16)
for capability in map(int, sys.argv[1:]):  # it also numbers the device
    given: dict[str, Any] = dict(
        get_current_target=lambda device=capability: GPUTarget("cuda", device, 32),
        get_current_device=lambda device=capability: device,
        get_current_stream=lambda _: 0,
        utils=SimpleNamespace(get_device_properties=lambda device: dict(max_shared_mem=SHARED[device] * 1024)),
    )
    driver.set_active(SimpleNamespace(**given))
    for images, start, end in ((1, 0, 1), (2, 8, 16)):
        kernels.TritonEngine(gpt, torch.zeros(images, dtype=torch.int64), True).step(
            torch.zeros(images, 128, dtype=torch.int64), start, end
        )
