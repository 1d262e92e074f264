"""Devices, dtypes and compilation."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from detailflow.errors import DetailFlowError, first_line
from detailflow.processor import multiplies_bfloat16_fast

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}
_PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
P = ParamSpec("P")
T = TypeVar("T")


def choose_device(device: torch.device | str | None = None) -> torch.device:
    """Return a device that works here; `None` is the GPU if there is one, else the CPU."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=device).tolist()
    except (RuntimeError, AssertionError, NotImplementedError, TypeError, ImportError):  # torch has one for each reason
        raise DetailFlowError(f"device {str(device)!r} cannot be used here: give another, such as cpu") from None
    return torch.device(device)


def choose_dtype(dtype: torch.dtype | str | None, device: torch.device) -> torch.dtype:
    """Return a floating-point dtype, given as one or as text such as "bfloat16".

    `None` is bfloat16 on a GPU that has it, else float32.
    """
    if dtype is None:
        return torch.bfloat16 if has_bfloat16(device) else torch.float32
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise DetailFlowError(f"dtype must be one of {', '.join(DTYPES)}, not {name!r}")
    return DTYPES[name]


def exact_device(device: torch.device | str) -> torch.device:
    """Return a device that has float64: the CPU in place of Apple's GPUs, otherwise `device`."""
    device = torch.device(device)
    return torch.device("cpu") if device.type == "mps" else device


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on `device`; a copy from the CPU to a GPU takes place while the program goes on."""
    if tensor.device.type == "cpu" and device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def to_host(tensor: Tensor) -> Tensor:
    """Return a tensor on the CPU, after waiting for it."""
    if tensor.device.type != "cuda":
        return tensor.cpu()
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)  # several times as fast as other memory
    host.copy_(tensor, non_blocking=True)
    torch.cuda.current_stream(tensor.device).synchronize()
    return host


@contextmanager
def within_memory(what: str, advice: str) -> Iterator[None]:
    """Turn errors about memory into a sentence."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch has three kinds for memory
        of_torch = any(part in str(error) for part in ("allocate", "Storage size calculation overflowed"))
        if not of_torch and not isinstance(error, MemoryError):
            raise
        raise DetailFlowError(f"{what} does not fit in memory, so {advice}") from error


def precision_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Return the dtype of "bf16", "fp16" or "fp32", or the faster one of bf16 and fp32 on this device for "auto"."""
    if precision == "auto":
        if device.type == "cuda":
            fast = has_bfloat16(device) or not torch.cuda.is_available()  # as in a plan for another machine
        else:
            fast = device.type != "cpu" or multiplies_bfloat16_fast()
        precision = "bf16" if fast else "fp32"
    return _PRECISIONS[precision]


def has_bfloat16(device: torch.device) -> bool:
    """Return whether this is a GPU with bfloat16 of its own; older ones imitate it, slowly."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def autocast(device: torch.device, precision: torch.dtype) -> torch.autocast:
    """Return the context in which networks of float32 weights compute in `precision`."""
    return torch.autocast(device.type, precision, enabled=precision != torch.float32)


def compiled(function: Callable[P, T], device: torch.device) -> Callable[P, T]:
    """Compile `function` for fixed shapes, at its first call with each; for inference on a GPU."""
    if device.type == "cpu":
        raise DetailFlowError("compiling is for GPUs: on a CPU the native engine is faster (docs/speed.md#engines)")
    try:
        torch.compile(lambda x: (x + 1).sin())(torch.zeros(8, device=device))
    except Exception as error:  # each thing that may be missing has its own
        raise DetailFlowError(f"nothing can be compiled here, which needs Triton: {first_line(error)}") from error
    return torch.compile(function, dynamic=False)
