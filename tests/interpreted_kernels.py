"""Run by test_kernels.py in a process with Triton's interpreter: the kernels on a CPU against PyTorch."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from detailflow import DetailFlowGPT, GPTConfig, kernels
from detailflow import graphs as graphs_module
from detailflow.generation import TorchEngine
from detailflow.graphs import Decoding
from detailflow.kernels import TritonEngine

TINY = Path(__file__).parent / "parity" / "tiny-32"
RECORDED = load_file(TINY / "recorded.safetensors")
# A head of 32, an MLP of 5 times 32: no power of two but 32 divides the sizes.
CONFIG = GPTConfig(10, 96, 2, 3, mlp=160, num_tokens=32, group_size=8, codebook_size=64)


def model(dtype: torch.dtype = torch.float32, config: GPTConfig = CONFIG) -> DetailFlowGPT:
    """Make a model whose layers change what they are given."""
    torch.manual_seed(0)
    made = DetailFlowGPT(config).eval()
    for weight in made.parameters():
        weight.data.mul_(4) if weight.ndim == 2 else weight.data.add_(torch.randn(weight.shape) / 4)
    return made.to(torch.bfloat16).to(dtype)


def begun(kind: type[TorchEngine], network: DetailFlowGPT, images: int, guided: bool, known: int) -> TorchEngine:
    """Begin a batch with a prefix, which PyTorch's prefill puts into the cache."""
    made = kind(network, torch.arange(images) % 10, guided)
    if known:
        made.prefill(tokens(images), known)
    return made


def tokens(images: int) -> Tensor:
    return torch.randint(64, (images, 32), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "images, guided, start, end",
    [
        (1, False, 0, 1),  # 1 row
        (1, True, 3, 4),  # 2 rows
        (9, False, 7, 8),  # 9
        (1, True, 8, 16),  # 16
        (17, False, 5, 6),  # 17
        (33, False, 0, 1),  # 33
        (3, True, 24, 32),  # 48
        (5, True, 16, 24),  # 80, in two programs' rows
    ],
)
def test_a_step(images: int, guided: bool, start: int, end: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kernels, "MOST", 80)
    fused, expected = (begun(kind, model(), images, guided, start) for kind in (TritonEngine, TorchEngine))
    found = fused.step(tokens(images), start, end)
    torch.testing.assert_close(found, expected.step(tokens(images), start, end), atol=2e-5, rtol=2e-5)
    for ours, theirs in zip(fused.caches, expected.caches, strict=True):
        torch.testing.assert_close(ours.keys[:, :, :end], theirs.keys[:, :, :end], atol=2e-5, rtol=2e-5)
        torch.testing.assert_close(ours.values[:, :, :end], theirs.values[:, :, :end], atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(
    "sizes, start",
    [
        (dict(width=64, heads=4, num_tokens=36, group_size=12), 24),  # heads of 16, tokens that are no power of two
        (dict(width=128, heads=1, mlp=64, num_tokens=160, group_size=32), 128),  # two blocks of keys
        (dict(width=160, heads=5, mlp=96, num_tokens=5, group_size=1), 3),
        (dict(width=96, heads=3, mlp=32, num_tokens=16, group_size=8, causal_tokens=0), 0),  # the class in a group
    ],
)
def test_other_sizes(sizes: dict[str, int], start: int):
    """Of models without classes."""
    config = GPTConfig(0, **(dict(depth=1, codebook_size=32) | sizes))  # type: ignore[arg-type]
    network, end = model(config=config), start + config.group_size
    ids = torch.randint(32, (1, config.num_tokens), generator=torch.Generator().manual_seed(1))
    fused, expected = (kind(network, torch.tensor([0]), False) for kind in (TritonEngine, TorchEngine))
    for one in (fused, expected) if start else ():
        one.prefill(ids, start)
    found = fused.step(ids, start, end)
    torch.testing.assert_close(found, expected.step(ids, start, end), atol=2e-5, rtol=2e-5)


def test_bfloat16():
    """As near to float32 as PyTorch's, but for the interpreter, which rounds towards zero."""
    networks = {TritonEngine: torch.bfloat16, TorchEngine: torch.bfloat16}
    exact = begun(TorchEngine, model(), 2, True, 8).step(tokens(2), 8, 16)
    errors = [
        (begun(kind, model(dtype), 2, True, 8).step(tokens(2), 8, 16).float() - exact).square().mean().sqrt().item()
        for kind, dtype in networks.items()
    ]
    assert errors[0] < 2 * errors[1] < 0.1 * exact.std().item()


@pytest.fixture
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a program compute many outputs: the interpreter takes as long for one as for 64."""
    monkeypatch.setattr(kernels, "TILES", {key: tiles._replace(outputs=64) for key, tiles in kernels.TILES.items()})


@pytest.mark.usefixtures("few_programs")
def test_recorded_tokens(monkeypatch: pytest.MonkeyPatch):
    """Of three classes, after three others with the same buffers; more rows than `MOST` are left to PyTorch."""
    monkeypatch.setitem(graphs_module.CAPTURE, "cpu", lambda calls, device: list(calls))
    monkeypatch.setattr(kernels, "why_not", lambda _: None)
    gpt = DetailFlowGPT.from_pretrained(TINY / "gpt", device="cpu", dtype="float32")
    gpt.engine = "graphs"
    monkeypatch.setattr("detailflow.native.why_not", lambda _: "not here")
    monkeypatch.setattr(kernels, "MOST", 16)  # the single tokens
    gpt.generate(torch.tensor([7, 8, 9]), temperature=0.0, guidance_scale=1.5, num_tokens=2)
    ids = gpt.generate(RECORDED["gpt.class_ids"].long(), temperature=0.0, guidance_scale=1.5)
    assert (ids == RECORDED["gpt.greedy.cfg1.5"].long()).float().mean() >= 0.99
    program = next(iter(gpt.graphs._programs.values()))[0]
    assert isinstance(program, Decoding) and isinstance(program.engine, TritonEngine)


@pytest.mark.usefixtures("few_programs")
def test_captured_or_not(monkeypatch: pytest.MonkeyPatch):
    """The same tokens: the first batch of its size is not captured."""
    monkeypatch.setitem(graphs_module.CAPTURE, "cpu", lambda calls, device: list(calls))
    monkeypatch.setattr(kernels, "why_not", lambda _: None)
    monkeypatch.setattr("detailflow.native.why_not", lambda _: "not here")
    taken: list[int] = []
    monkeypatch.setattr(TritonEngine, "run", lambda *a, run=TritonEngine.run: [taken.append(a[2]), run(*a)][1])
    gpt, tokens = model(torch.bfloat16), []
    for _ in range(2):
        seeds = [torch.Generator().manual_seed(5)]
        tokens.append(gpt.generate(torch.tensor([4]), generator=seeds, num_tokens=3))
        assert taken == [0, 1, 2]
        taken.clear()
    assert torch.equal(*tokens) and len(gpt.graphs) == 1
