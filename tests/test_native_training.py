"""What C++ does to activations in training is what PyTorch does, backward passes included."""

import copy
import shutil
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from detailflow import DetailFlowGPT, native
from detailflow.device import autocast
from detailflow.models import operations
from detailflow.models.gpt import GPTConfig
from detailflow.models.layers import Block, ViTConfig
from detailflow.native import training as in_cpp

pytestmark = pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="needs a C++ compiler")

CPU = torch.device("cpu")
SIZES = GPTConfig(
    num_classes=3,
    width=64,
    depth=2,
    heads=4,
    num_tokens=16,
    group_size=4,
    causal_tokens=8,
    codebook_size=48,
    dropout=0.0,
)


def needs_threads() -> None:
    found = native.library()
    assert not isinstance(found, str)
    if not found.detailflow_has_threads():
        pytest.skip("this build has one thread")


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    if request.param > 1:
        needs_threads()
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def numbers(*shape: int, seed: int = 0, scale: float = 2) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def turn(qkv: Tensor) -> tuple[Tensor, ...]:
    return operations.split_heads(qkv, 2, numbers(qkv.shape[1], qkv.shape[2] // 12, 2, seed=9))


FUNCTIONS: dict[str, tuple[Callable[..., Tensor | tuple[Tensor, ...]], list[tuple[int, ...]]]] = {
    "gelu": (operations.gelu, [(3, 7, 48)]),
    "gelu of many": (operations.gelu, [(64, 33, 32)]),
    "swiglu": (operations.swiglu, [(5, 80), (5, 80)]),
    "swiglu of many": (operations.swiglu, [(600, 80), (600, 80)]),
    "rms_norm": (operations.rms_norm, [(2, 3, 48), (48,)]),
    "rms_norm of many": (operations.rms_norm, [(701, 64), (64,)]),
    "split_heads": (lambda x: operations.split_heads(x, 2), [(3, 5, 96)]),
    "split_heads, turned": (turn, [(3, 5, 192)]),
    "split_heads of many": (turn, [(40, 9, 96)]),
}


def with_gradients(function: Callable[..., Tensor | tuple[Tensor, ...]], given: list[Tensor]) -> list[Tensor]:
    """Results, and what a sum of them by other weights gives back to each input."""
    given = [tensor.detach().clone().requires_grad_() for tensor in given]
    result = function(*given)
    results = [result] if isinstance(result, Tensor) else [*result]
    total = torch.stack([(y.double() * numbers(*y.shape, seed=5 + i)).sum() for i, y in enumerate(results)]).sum()
    return [y.detach() for y in results] + list(torch.autograd.grad(total, given))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_values_and_gradients_are_pytorchs(name: str, threads: int, monkeypatch: pytest.MonkeyPatch):
    """In float32; in bfloat16 nearer to them than PyTorch's own, or as near."""
    function, shapes = FUNCTIONS[name]
    given = [numbers(*shape, seed=i) for i, shape in enumerate(shapes)]
    halves = [tensor.bfloat16() for tensor in given]
    if name.startswith("rms_norm"):  # it is of float32, and gives bfloat16 under autocast
        halves = [tensor.float() for tensor in halves]
    with torch.autocast("cpu", enabled=name.startswith("rms_norm")):
        ours_of_halves = with_gradients(function, halves)
    ours = with_gradients(function, given)
    monkeypatch.setattr(in_cpp, "can_run", lambda *_: False)
    torch.testing.assert_close(ours, with_gradients(function, given), atol=2e-5, rtol=2e-5)
    exact = with_gradients(function, [tensor.float() for tensor in halves])
    theirs_of_halves = with_gradients(function, [tensor.bfloat16() for tensor in halves])
    assert ours_of_halves[0].dtype == torch.bfloat16
    for a, b, c in zip(ours_of_halves, theirs_of_halves, exact, strict=True):
        ours_error, theirs_error = (float((x.float() - c).square().mean()) for x in (a, b))
        assert ours_error <= theirs_error * 1.02


@pytest.mark.parametrize("dtype", native.TYPES, ids=str)
def test_cross_entropy(dtype: torch.dtype, threads: int):
    logits, wanted = numbers(40, 3, 112, scale=5).to(dtype), torch.randint(112, (40, 3))
    logits[0, 0, 7] = -torch.inf
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss, expected = (
        operations.cross_entropy(ours, wanted),
        F.cross_entropy(theirs.float().flatten(0, 1), wanted.flatten()),
    )
    torch.testing.assert_close(loss, expected)
    (loss * 3).backward(), (expected * 3).backward()
    assert ours.grad is not None and theirs.grad is not None and ours.grad.dtype == dtype
    tolerance = 1e-7 if dtype == torch.float32 else 2e-4
    torch.testing.assert_close(ours.grad, theirs.grad, atol=tolerance, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5)


def test_cross_entropy_of_bad_numbers():
    logits = numbers(2, 3, 32).requires_grad_()
    with pytest.raises(IndexError):
        operations.cross_entropy(logits, torch.full((2, 3), 32))
    for bad in (torch.nan, torch.inf):
        broken = logits.detach().clone()
        broken[1, 2, 20] = bad
        loss = operations.cross_entropy(broken.requires_grad_(), torch.zeros(2, 3, dtype=torch.int64))
        loss.backward()
        assert not loss.isfinite() and broken.grad is not None and not broken.grad.isfinite().all()


def test_dropout(threads: int):
    """The share that is kept, its scale, its gradient, and what the mask depends on."""
    x, onto = torch.ones(300, 512, requires_grad=True), torch.full((300, 512), 10.0, requires_grad=True)
    torch.manual_seed(3)
    y = operations.dropout(x, 0.3, onto)
    kept = y.detach() != 10
    assert abs(float(kept.float().mean()) - 0.7) < 0.005
    torch.testing.assert_close(y.detach(), 10 + kept / 0.7)
    y.backward(torch.full_like(y, 2))
    assert x.grad is not None and onto.grad is not None
    torch.testing.assert_close(x.grad, 2 * kept / 0.7)
    torch.testing.assert_close(onto.grad, torch.full_like(onto, 2))
    torch.manual_seed(3)
    assert torch.equal(operations.dropout(x, 0.3, onto), y)
    torch.manual_seed(3)
    assert torch.equal(operations.dropout(x.bfloat16(), 0.3, onto) != 10, kept)
    centred = kept.float() - 0.7
    for shift in (1, 2, 16, 512):  # neighbours, lanes and rows have nothing to do with one another
        assert abs(float((centred.flatten()[shift:] * centred.flatten()[:-shift]).mean())) < 0.003
    others = [operations.dropout(x, 0.3).detach() > 0 for _ in range(8)]
    shares = torch.stack([(a == b).float().mean() for a in others for b in others if a is not b])
    assert float((shares - 0.58).abs().max()) < 0.01  # 0.7² + 0.3²


def test_mask_of_dropout_does_not_depend_on_threads():
    needs_threads()
    x, masks = torch.ones(300, 512, requires_grad=True), []
    before = torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        torch.manual_seed(0)
        masks.append(operations.dropout(x, 0.1).detach())
    torch.set_num_threads(before)
    assert torch.equal(masks[0], masks[1]) and torch.equal(masks[0], masks[2])


def test_where_pytorch_is_used(monkeypatch: pytest.MonkeyPatch):
    x = numbers(4, 32).requires_grad_()
    assert in_cpp.can_run(x)
    for other in (numbers(4, 40), numbers(0, 32), x.double(), x.half(), x.to("meta")):
        assert not in_cpp.can_run(other)
    with torch.no_grad():
        assert not in_cpp.can_run(x)
    with torch.autocast("cpu", dtype=torch.float16):
        assert not in_cpp.can_run(x)
    assert torch.func.vmap(operations.gelu)(x).shape == (4, 32)
    with monkeypatch.context() as patch:  # what a compiler traces calls nothing of it
        patch.setattr(in_cpp, "call", None)
        compiled = torch.compile(operations.gelu, backend="eager", fullgraph=True)(x)
    torch.testing.assert_close(compiled, F.gelu(x, approximate="tanh"))
    monkeypatch.setattr(native, "library", lambda: "there is no compiler")
    assert not in_cpp.can_run(x)
    torch.testing.assert_close(operations.gelu(x), F.gelu(x, approximate="tanh"))


def test_what_does_not_fit_together_is_pytorchs():
    """Types that it promotes, shapes that it broadcasts, and what it refuses."""
    gate, up = numbers(4, 32).requires_grad_(), numbers(4, 32, seed=1)
    torch.testing.assert_close(operations.swiglu(gate, up.bfloat16()), F.silu(gate) * up.bfloat16())
    torch.testing.assert_close(operations.swiglu(gate, up[:1]), F.silu(gate) * up[:1])
    assert operations.dropout(gate, 0.5, up[:1]).shape == (4, 32)
    with pytest.raises(RuntimeError):
        operations.rms_norm(gate, torch.ones(16))
    logits = numbers(2, 3, 32).requires_grad_()
    for wrong in (torch.zeros(2, 3, dtype=torch.int32), torch.zeros(2, 2, dtype=torch.int64)):
        with pytest.raises((RuntimeError, ValueError)):
            operations.cross_entropy(logits, wrong)
    with pytest.raises(RuntimeError):
        operations.split_heads(numbers(2, 5, 96).requires_grad_(), 2, numbers(4, 8, 2))
    with torch.device("meta"):  # the device of what is made without one
        assert operations.dropout(gate, 0.5).device.type == "cpu"


def second(function: Callable[..., Tensor | tuple[Tensor, ...]], given: list[Tensor]) -> list[Tensor]:
    """The gradient of a norm of the gradient."""
    given = [tensor.detach().clone().requires_grad_() for tensor in given]
    made = function(*given)
    results = [made] if isinstance(made, Tensor) else made
    total = torch.stack([(y * numbers(*y.shape, seed=5)).square().sum() for y in results]).sum()
    first = torch.autograd.grad(total, given, create_graph=True)
    return list(torch.autograd.grad(torch.stack([x.square().sum() for x in first]).sum(), given))


@pytest.mark.parametrize("name", [*FUNCTIONS, "cross_entropy"])
def test_derivatives_of_derivatives(name: str, monkeypatch: pytest.MonkeyPatch):
    def entropy(x: Tensor) -> Tensor:
        return operations.cross_entropy(x, torch.arange(6).view(2, 3))

    function, shapes = (entropy, [(2, 3, 32)]) if name == "cross_entropy" else FUNCTIONS[name]
    given = [numbers(*shape, seed=i) for i, shape in enumerate(shapes)]
    ours = second(function, given)
    monkeypatch.setattr(in_cpp, "can_run", lambda *_: False)
    theirs = second(function, given)
    for a, b in zip(ours, theirs, strict=True):
        assert float((a - b).norm()) <= 1e-4 * float(b.norm())


def test_derivatives_of_derivatives_of_dropout():
    x, onto = numbers(8, 32).requires_grad_(), numbers(8, 32, seed=1).requires_grad_()
    y = operations.dropout(x, 0.5, onto)
    kept = (y - onto).detach().abs() > 1e-6
    first, _ = torch.autograd.grad(y.square().sum(), (x, onto), create_graph=True)
    torch.testing.assert_close(torch.autograd.grad(first.sum(), x)[0], kept * 8.0)


def test_many_gradients_at_once():
    x = numbers(2, 32).requires_grad_()
    y, wanted = operations.gelu(x), F.gelu(x, approximate="tanh")
    several = torch.eye(64).view(64, 2, 32)
    ours, theirs = (torch.autograd.grad(z, x, several, is_grads_batched=True)[0] for z in (y, wanted))
    torch.testing.assert_close(ours, theirs)


def gradients(network: torch.nn.Module, loss: Tensor) -> list[Tensor]:
    network.zero_grad()
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in network.parameters() if p.grad is not None)]


@pytest.mark.parametrize("precision", [None, torch.bfloat16], ids=str)
def test_a_training_step_of_the_ar_model(precision: torch.dtype | None, monkeypatch: pytest.MonkeyPatch):
    """Loss and all gradients; and that C++ has its part in them."""
    torch.manual_seed(0)
    model, wanted, labels = DetailFlowGPT(SIZES).train(), torch.randint(48, (5, 16)), torch.tensor([0, 1, 2, 3, 0])
    calls: list[str] = []
    call = in_cpp.call
    monkeypatch.setattr(in_cpp, "call", lambda name, *more: (calls.append(name), call(name, *more))[1])

    def step() -> list[Tensor]:
        with autocast(CPU, precision or torch.float32):
            logits = model(labels, wanted)
        return gradients(model, operations.cross_entropy(logits, wanted))

    ours = step()
    assert set(calls) >= {"rms_norm", "swiglu", "split_heads", "cross_entropy"} and len(calls) == 2 * (5 + 2 + 2 + 1)
    monkeypatch.setattr(in_cpp, "can_run", lambda *_: False)
    theirs = step()
    if precision is None:
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)
    else:
        for a, b in zip(ours, theirs, strict=True):
            assert float((a - b).norm()) <= 0.03 * float(b.norm())


def test_a_training_step_of_a_tokenizer_block(monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    block, x = Block(ViTConfig(64, 1, 4)), numbers(3, 10, 64)
    past = numbers(3, 4, 6, 16, seed=1), numbers(3, 4, 6, 16, seed=2)
    ours = gradients(block, block(x, past)[0].square().mean())
    monkeypatch.setattr(in_cpp, "can_run", lambda *_: False)
    torch.testing.assert_close(ours, gradients(block, block(x, past)[0].square().mean()), atol=1e-6, rtol=1e-4)


def test_activations_that_are_computed_again_have_the_same_dropout():
    torch.manual_seed(0)
    model = DetailFlowGPT(GPTConfig(**{**vars(SIZES), "dropout": 0.2})).train()
    again, wanted, labels = copy.deepcopy(model), torch.randint(48, (5, 16)), torch.tensor([0, 1, 2, 3, 0])
    for block in again.blocks:
        forward = block.forward
        block.forward = lambda *given, forward=forward: checkpoint(forward, *given, use_reentrant=False)  # type: ignore[method-assign]
    results = []
    for one in (model, again):
        torch.manual_seed(1)
        results.append(gradients(one, operations.cross_entropy(one(labels, wanted), wanted)))
    torch.testing.assert_close(results[0], results[1])
