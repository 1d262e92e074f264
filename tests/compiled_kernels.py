"""Run by test_kernels.py: compile the kernels of a step for a GPU of a given capability, and print their names.

There need be no GPU: what would start a kernel only compiles it.
"""

import sys
from types import SimpleNamespace
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from detailflow import DetailFlowGPT, GPTConfig, kernels

capability = int(sys.argv[1])
target = GPUTarget("cuda", capability, 32)
begin = kernels._begin


class Begin:
    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments, **options: compile("_begin", begin, grid, *arguments, **options)


class Compiling(kernels.Launch):
    def start(self, name: str, kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        compile(name, kernel, grid, *arguments, **options)


def compile(name: str, kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    compiled = kernel.warmup(*arguments, grid=grid, **options)
    assert "cubin" in compiled.asm and compiled.metadata.shared < 227 * 1024, name
    print(kernel.fn.__name__)


driver.set_active(
    SimpleNamespace(
        get_current_target=lambda: target, get_current_device=lambda: 0, get_current_stream=lambda device: 0
    )
)
kernels._begin, kernels.Launch = Begin(), Compiling  # type: ignore[misc]
config = GPTConfig(num_classes=10, depth=1, codebook_size=256)  # GPT-L but for these
gpt = DetailFlowGPT(config).eval().to(torch.bfloat16)
for images, start, end in ((1, 0, 1), (2, 8, 16)):
    kernels.FusedModel(gpt, torch.zeros(images, dtype=torch.int64), True).step(
        torch.zeros(images, 128, dtype=torch.int64), start, end
    )
