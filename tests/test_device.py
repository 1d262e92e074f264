"""Which dtype training computes in."""

from pathlib import Path

import pytest
import torch

from detailflow.device import choose_device, choose_dtype, exact_device, precision_dtype
from detailflow.errors import DetailFlowError
from detailflow.processor import processor_lines

CPU = torch.device("cpu")


def test_a_dtype_is_no_device():
    """As `pipe.to(torch.float16)` has it."""
    with pytest.raises(DetailFlowError, match=r"device 'torch.float16' cannot be used here: give another"):
        choose_device(torch.float16)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "flags, dtype",
    [
        ("vendor_id : GenuineIntel\nflags : avx512_bf16 amx_bf16 amx_tile", torch.bfloat16),
        ("vendor_id : AuthenticAMD\nflags : avx2 avx512_bf16", torch.bfloat16),
        ("vendor_id : GenuineIntel\nflags : avx512f avx512_bf16", torch.float32),
        ("vendor_id : AuthenticAMD\nflags : avx2", torch.float32),
        (None, torch.float32),  # no Linux
    ],
)
def test_auto_is_the_faster_one(flags: str | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    def read_text(path: Path, encoding: str) -> str:
        if flags is None:
            raise FileNotFoundError
        return flags

    monkeypatch.setattr(Path, "read_text", read_text)
    processor_lines.cache_clear()
    try:
        assert precision_dtype("auto", CPU) == dtype
        assert precision_dtype("auto", torch.device("cuda")) == precision_dtype("bf16", CPU) == torch.bfloat16
        assert precision_dtype("auto", torch.device("mps")) == torch.bfloat16
        assert precision_dtype("fp16", CPU) == torch.float16 and precision_dtype("fp32", CPU) == torch.float32
    finally:
        processor_lines.cache_clear()


@pytest.mark.parametrize("has, dtype", [(True, torch.bfloat16), (False, torch.float32)])
def test_a_gpu_without_bfloat16(has: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    """As a T4, which only imitates it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: has or including_emulation)
    gpu = torch.device("cuda")
    assert precision_dtype("auto", gpu) == choose_dtype(None, gpu) == dtype
    assert precision_dtype("bf16", gpu) == torch.bfloat16


def test_sums_in_float64_are_where_it_exists():
    """Apple's GPUs have no float64."""
    assert exact_device("mps").type == "cpu"
    assert all(exact_device(name) == torch.device(name) for name in ("cpu", "cuda:0"))
