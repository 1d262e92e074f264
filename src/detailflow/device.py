"""Where tensors live, and in which precision networks compute."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

import torch

from detailflow.errors import DetailFlowError

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}
P = ParamSpec("P")
T = TypeVar("T")


def choose_device(device: torch.device | str | None = None) -> torch.device:
    """A device that works here; `None` is the GPU where there is one, else the CPU.

    Raises:
        DetailFlowError: for a name that is no device, or a device that this machine lacks.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=device).tolist()
    except (RuntimeError, AssertionError, NotImplementedError):  # torch has one for each reason
        raise DetailFlowError(f"device {str(device)!r} cannot be used here: give another, such as cpu") from None
    return torch.device(device)


def choose_dtype(dtype: torch.dtype | str | None = None) -> torch.dtype:
    """Return a type that weights can have and networks compute in; it may be named, and `None` is float32.

    Raises:
        DetailFlowError: for any other type or name.
    """
    name = "float32" if dtype is None else str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise DetailFlowError(f"dtype must be one of {', '.join(DTYPES)}, not {name!r}")
    return DTYPES[name]


@contextmanager
def within_memory(what: str, advice: str) -> Iterator[None]:
    """Turn torch's errors about memory into a sentence.

    Raises:
        DetailFlowError: if something in the context does not fit in memory.
    """
    try:
        yield
    except RuntimeError as error:  # of which both of torch's ways to run out of memory are
        if "allocate" not in str(error):
            raise
        raise DetailFlowError(f"{what} does not fit in memory, so {advice}") from error


def autocast(device: torch.device, precision: torch.dtype) -> torch.autocast:
    """The context in which networks of float32 weights compute in `precision`; nothing changes for float32."""
    return torch.autocast(device.type, precision, enabled=precision != torch.float32)


def compiled(function: Callable[P, T], device: torch.device) -> Callable[P, T]:
    """`function` as a program for fixed shapes, made at its first call with each; for inference only.

    On a CPU the weights become constants of the program (PyTorch calls it freezing), laid out once as matrix products want them.

    Raises:
        DetailFlowError: where nothing can be compiled.
    """
    try:
        torch.compile(lambda x: (x + 1).sin())(torch.zeros(8, device=device))
    except Exception as error:  # there is one for each thing that may be missing
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
