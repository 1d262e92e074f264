"""Devices, dtypes and compilation."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

import torch

from detailflow.errors import DetailFlowError

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}
P = ParamSpec("P")
T = TypeVar("T")


def choose_device(device: torch.device | str | None = None) -> torch.device:
    """Return a device that works here; `None` is the GPU if there is one, else the CPU."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=device).tolist()
    except (RuntimeError, AssertionError, NotImplementedError):  # torch has one for each reason
        raise DetailFlowError(f"device {str(device)!r} cannot be used here: give another, such as cpu") from None
    return torch.device(device)


def choose_dtype(dtype: torch.dtype | str | None = None) -> torch.dtype:
    """Return a floating-point dtype, given as one or as text such as "bfloat16"; `None` is float32."""
    name = "float32" if dtype is None else str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise DetailFlowError(f"dtype must be one of {', '.join(DTYPES)}, not {name!r}")
    return DTYPES[name]


@contextmanager
def within_memory(what: str, advice: str) -> Iterator[None]:
    """Turn torch's errors about memory into a sentence."""
    try:
        yield
    except RuntimeError as error:  # torch has two kinds for memory
        if "allocate" not in str(error):
            raise
        raise DetailFlowError(f"{what} does not fit in memory, so {advice}") from error


def autocast(device: torch.device, precision: torch.dtype) -> torch.autocast:
    """Return the context in which networks of float32 weights compute in `precision`."""
    return torch.autocast(device.type, precision, enabled=precision != torch.float32)


def compiled(function: Callable[P, T], device: torch.device) -> Callable[P, T]:
    """Compile `function` for fixed shapes, at its first call with each; for inference only.

    On a CPU the weights become constants of the program ("freezing"), in the memory layout that suits matrix products.
    """
    try:
        torch.compile(lambda x: (x + 1).sin())(torch.zeros(8, device=device))
    except Exception as error:  # each thing that may be missing has its own
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        needed = "a C++ compiler" if device.type == "cpu" else "Triton"
        raise DetailFlowError(f"nothing can be compiled here, which needs {needed}: {reason}") from error
    program = torch.compile(function, dynamic=False)
    if device.type != "cpu":
        return program

    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        from torch._inductor import config

        with config.patch(freezing=True):
            return program(*args, **kwargs)

    return run
