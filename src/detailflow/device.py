"""Where tensors live, and in which precision networks compute."""

import torch

from detailflow.errors import DetailFlowError


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


def autocast(device: torch.device, precision: torch.dtype) -> torch.autocast:
    """The context in which networks of float32 weights compute in `precision`; nothing changes for float32."""
    return torch.autocast(device.type, precision, enabled=precision != torch.float32)
