"""The kernels of a decoding step without a GPU: what they compute, by Triton's interpreter, and that they compile.

Both need a process of their own: Triton is told before it is imported.
"""

import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from detailflow import DetailFlowGPT, GPTConfig
from detailflow import graphs as graphs_module
from detailflow.generation import TorchEngine

pytest.importorskip("triton", reason="Triton is not for this platform")

from detailflow import kernels

HERE = Path(__file__).parent
CONFIG = GPTConfig(10, 64, 2, 4, num_tokens=16, group_size=4, codebook_size=64)


def small(dtype: torch.dtype = torch.bfloat16) -> DetailFlowGPT:
    torch.manual_seed(0)
    return DetailFlowGPT(CONFIG).eval().to(dtype)


def run(*command: str, **environment: str) -> str:
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")} | environment
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=variables, timeout=300)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return done.stdout


def test_kernels_by_the_interpreter():
    tests = "-q", "-p", "no:cacheprovider", "--rootdir", str(HERE.parent), str(HERE / "interpreted_kernels.py")
    assert " passed" in run("-m", "pytest", *tests, TRITON_INTERPRET="1")


def test_kernels_compile(tmp_path: Path):
    """For NVIDIA's GPUs since Ampere, in the shared memory that they have: 86 are GeForce cards, which have least."""
    capabilities, names = ("80", "86", "90", "100"), ("begin", "qkv", "attend", "proj", "gate", "down", "head")
    compiled = run(str(HERE / "compiled_kernels.py"), *capabilities, TRITON_CACHE_DIR=str(tmp_path)).split()
    assert set(compiled) == {f"{capability}:{name}" for capability in capabilities for name in names}


def test_what_kernels_are_not_for():
    assert kernels.why_not(small(torch.float32)) == "kernels are for bfloat16"
    assert kernels.why_not(small()) == "kernels are for NVIDIA's GPUs from Ampere on"
    for sizes, problem in (
        (dict(mlp=48), "multiples of 32"),
        (dict(width=128, heads=1), None),
        (dict(width=96, heads=1), "a head must be"),
    ):
        config = GPTConfig(10, **(dict(width=64, heads=4, depth=1, codebook_size=64) | sizes))  # type: ignore[arg-type]
        found = kernels.why_not(DetailFlowGPT(config).to(torch.bfloat16))
        assert found and (problem or "NVIDIA") in found
    sequential, biased, patched = small(), small(), small()
    sequential.head = torch.nn.Sequential(sequential.head)  # type: ignore[assignment]
    biased.head = torch.nn.Linear(64, 64, dtype=torch.bfloat16)
    patched.norm.forward = lambda x: x  # type: ignore[method-assign]
    for replaced in (sequential, biased, patched):
        assert kernels.why_not(replaced) == "some of its layers were replaced"


def test_without_triton(monkeypatch: pytest.MonkeyPatch):
    """Which is not there, or finds no source to compile, as in a program that is packed into one file."""
    assert graphs_module._engines(small(), 1) == [TorchEngine]  # on a CPU
    monkeypatch.setattr(kernels, "why_not", lambda model: None)
    assert graphs_module._engines(small(), 1) == [kernels.TritonEngine, TorchEngine]
    monkeypatch.delitem(sys.modules, "detailflow.kernels")
    monkeypatch.delattr("detailflow.kernels")
    with monkeypatch.context() as patch:
        patch.setattr("inspect.getsourcelines", lambda _: (_ for _ in ()).throw(OSError("no source")))
        assert graphs_module._engines(small(), 1) == [TorchEngine]
    monkeypatch.setitem(sys.modules, "triton", None)
    assert graphs_module._engines(small(), 1) == [TorchEngine]


@pytest.mark.parametrize("engine, programs", [("graphs", 2), ("auto", 1)])
def test_kernels_that_cannot_start(
    engine: Any, programs: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """PyTorch takes the steps, captured or not, after one line that says why: here that there is no GPU."""
    monkeypatch.setattr("detailflow.native.why_not", lambda _: "not here")
    monkeypatch.setitem(graphs_module.CAPTURE, "cpu", lambda calls, device: [call() or call for call in calls])
    monkeypatch.setattr(kernels, "problems", {})
    monkeypatch.setattr(kernels, "why_not", lambda model: kernels.problems.get(model.device))
    gpt, ids = small(), torch.tensor([1, 2])
    gpt.engine = "torch"
    expected = gpt.generate(ids, temperature=0)
    gpt.engine = engine
    with caplog.at_level(logging.WARNING):
        for options in (dict(temperature=0.0), dict(temperature=0.0, guidance_scale=1.0), dict(temperature=0.0)):
            tokens = gpt.generate(ids, **options)  # type: ignore[arg-type]
    assert torch.equal(tokens, expected)
    assert len(caplog.messages) == 1 and "so PyTorch's are (" in caplog.messages[0]
    assert torch.device("cpu") in kernels.problems and len(gpt.graphs) == programs
