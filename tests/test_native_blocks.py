"""The blocks of the tokenizer in C++ do what PyTorch's do; where they cannot, PyTorch's are used."""

import copy
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from detailflow import DetailFlowTokenizer, native
from detailflow.benchmark import by_pytorch
from detailflow.errors import DetailFlowError
from detailflow.models.layers import Block, ViTConfig, run_blocks
from detailflow.models.tokenizer import TokenizerConfig
from detailflow.native import blocks as native_blocks

pytestmark = pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="needs a C++ compiler")

HOME = Block.__module__
SIZES = {
    "heads of 16": ViTConfig(64, 2, 4),
    "heads of 48": ViTConfig(96, 2, 2, 160),
    "one head": ViTConfig(32, 1, 1),
    "rows beyond a block": ViTConfig(64, 1, 2, 2144),
    "as published": ViTConfig(768, 1, 12),
}


@pytest.fixture(scope="module")
def tokenizer() -> DetailFlowTokenizer:
    return DetailFlowTokenizer.from_pretrained(device="cpu")


def blocks_of(config: ViTConfig) -> torch.nn.ModuleList:
    """Blocks whose norms and biases are no ones and zeros."""
    torch.manual_seed(0)
    blocks = torch.nn.ModuleList(Block(config) for _ in range(config.depth)).eval()
    for parameter in blocks.parameters():
        matrix = parameter.ndim == 2
        torch.nn.init.normal_(parameter, float(not matrix), config.width**-0.5 if matrix else 0.3)
    return blocks


def images(count: int, side: int = 32) -> Tensor:
    coarse = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return torch.nn.functional.interpolate(coarse, side, mode="bilinear")


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many sequences the native engine took each time."""
    taken: list[int] = []
    run = native_blocks.run
    monkeypatch.setattr(native_blocks, "run", lambda blocks, x, *more: (taken.append(len(x)), run(blocks, x, *more))[1])
    return taken


@pytest.mark.parametrize("length", [1, 7, 16, 23, 70, 530])
@pytest.mark.parametrize("config", SIZES.values(), ids=SIZES)
def test_other_sizes(config: ViTConfig, length: int):
    """Positions that fill registers or not, with and without others to attend to and a mask; keys and values, too."""
    blocks = blocks_of(config)
    x, later = torch.randn(3, length, config.width), torch.randn(3, 9, config.width)
    mask = torch.rand(9, length + 9) > 0.6
    mask[:, length] = True
    with torch.no_grad():
        theirs, kept = run_blocks(blocks, x, keep=True)
        assert native_blocks.can_run(blocks, x, HOME)
        ours, own = native_blocks.run(blocks, x, keep=True)
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=2e-5)
        torch.testing.assert_close(own, kept, atol=2e-5, rtol=2e-5)
        for allowed in (mask, None):
            expected, _ = run_blocks(blocks, later, kept, allowed)
            torch.testing.assert_close(
                native_blocks.run(blocks, later, kept, allowed)[0], expected, atol=2e-5, rtol=2e-5
            )


def test_bfloat16_errs_no_more_than_pytorch():
    blocks = blocks_of(ViTConfig(128, 4, 4)).bfloat16()
    x = torch.randn(4, 50, 128).bfloat16()
    with torch.no_grad():
        ours, own = native_blocks.run(blocks, x, keep=True)
        theirs, _ = run_blocks(blocks, x)
        exact, _ = run_blocks(copy.deepcopy(blocks).float(), x.float())
    assert ours.dtype == own[0][0].dtype == torch.bfloat16
    error, largest = ((result - exact).square().mean().sqrt().item() for result in (ours, theirs))
    assert 0 < error <= largest


@pytest.mark.parametrize("dtype", native.TYPES, ids=str)
def test_images_do_not_depend_on_the_batch(dtype: torch.dtype):
    """Bit for bit: more images than go through at a time, and each alone, after others or not."""
    blocks = blocks_of(SIZES["heads of 48"]).to(dtype)
    x, later = torch.randn(9, 112, 96).to(dtype), torch.randn(9, 21, 96).to(dtype)
    with torch.no_grad():
        together, kept = native_blocks.run(blocks, x, keep=True)
        after, _ = native_blocks.run(blocks, later, kept)
        for i in range(9):
            alone, own = native_blocks.run(blocks, x[i : i + 1], keep=True)
            assert torch.equal(alone[0], together[i])
            assert torch.equal(native_blocks.run(blocks, later[i : i + 1], own)[0][0], after[i])


def test_tokens_and_images_are_pytorchs(tokenizer: DetailFlowTokenizer, runs: list[int]):
    """Of every number of tokens, of another shape of image, and of the pass that corrects mistakes."""
    plain, pictures = by_pytorch(tokenizer), images(6)
    ids = plain.encode(pictures)
    assert torch.equal(tokenizer.encode(pictures), ids)
    wide = torch.nn.functional.interpolate(pictures, (24, 40))
    assert torch.equal(tokenizer.encode(wide, num_tokens=24), plain.encode(wide, num_tokens=24))
    wrong = (ids[:, 16:24] + 1) % 2048
    mistakes = [t.encode_correction(pictures, position=16, wrong_tokens=wrong) for t in (tokenizer, plain)]
    assert torch.equal(*mistakes) and not torch.equal(mistakes[0], ids)
    assert len(runs) == 7
    for n in tokenizer.schedule.valid_counts:
        torch.testing.assert_close(tokenizer.decode(ids[:, :n]), plain.decode(ids[:, :n]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        tokenizer.decode(ids, size=(24, 40)), plain.decode(ids, size=(24, 40)), atol=1e-5, rtol=0
    )
    assert len(runs) == 8 + len(tokenizer.schedule.valid_counts)


def test_weights_that_change_are_seen(tokenizer: DetailFlowTokenizer):
    model = copy.deepcopy(tokenizer)
    ids = model.encode(images(2))
    before = model.decode(ids)
    with torch.no_grad():
        model.decoder.blocks[0].mlp.fc2.weight *= 2
    assert not torch.allclose(model.decode(ids), before, atol=1e-3)
    torch.testing.assert_close(model.decode(ids), by_pytorch(model).decode(ids), atol=1e-5, rtol=1e-5)


def test_in_many_threads(tokenizer: DetailFlowTokenizer):
    ids = tokenizer.encode(images(24)).split(3)
    expected = [tokenizer.decode(some) for some in ids]
    with ThreadPoolExecutor(8) as pool:
        for found, image in zip(pool.map(tokenizer.decode, ids), expected, strict=True):
            assert torch.equal(found, image)


def test_with_several_threads(tokenizer: DetailFlowTokenizer):
    """Bit for bit as with one."""
    ids = tokenizer.encode(images(9))
    one = tokenizer.decode(ids)
    try:
        torch.set_num_threads(3)
        assert torch.equal(tokenizer.encode(images(9)), ids) and torch.equal(tokenizer.decode(ids), one)
    finally:
        torch.set_num_threads(1)


def test_training_is_left_to_pytorch(runs: list[int]):
    vit = ViTConfig(32, 1, 2)
    model = DetailFlowTokenizer(TokenizerConfig(vit, vit, image_size=32, patch_size=8, num_tokens=16, group_size=4))
    latents = model.encode_latents(model.encode_patches(images(2)), 16)
    model.decode_quantized(latents, 32).square().mean().backward()
    assert not runs and all(weight.grad is not None for weight in model.decoder.blocks.parameters())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model.decode_quantized(latents, 32)
    assert not runs
    with torch.no_grad():
        model.decode_quantized(latents, 32)
    assert runs == [2]


def tied(blocks: torch.nn.ModuleList) -> None:
    blocks[1].mlp.fc1.weight = blocks[0].mlp.fc1.weight


def transposed(blocks: torch.nn.ModuleList) -> None:
    blocks[0].attn.proj.weight.data = blocks[0].attn.proj.weight.data.T.contiguous().T


def without_a_bias(blocks: torch.nn.ModuleList) -> None:
    blocks[1].attn.proj.bias = None


def replaced(blocks: torch.nn.ModuleList) -> None:
    blocks[0] = torch.nn.Identity()


def adapted(blocks: torch.nn.ModuleList) -> None:
    blocks[1].mlp.fc1 = torch.nn.Sequential(blocks[1].mlp.fc1)


def hooked(blocks: torch.nn.ModuleList) -> None:
    blocks[1].mlp.register_forward_hook(lambda *_: None)


def another_epsilon(blocks: torch.nn.ModuleList) -> None:
    blocks[1].norm2.eps = 1e-5


def other_heads(blocks: torch.nn.ModuleList) -> None:
    blocks[1].attn.heads = 2


def elsewhere(blocks: torch.nn.ModuleList) -> None:
    blocks[1].mlp.fc1.to("meta")


def sparse(blocks: torch.nn.ModuleList) -> None:
    blocks[1].mlp.fc1.weight = torch.nn.Parameter(blocks[1].mlp.fc1.weight.to_sparse_csr(), requires_grad=False)


CHANGES = (tied, transposed, without_a_bias, replaced, adapted, hooked, another_epsilon, other_heads, elsewhere, sparse)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("change", CHANGES)
def test_changed_blocks(change: Callable[[torch.nn.ModuleList], None]):
    blocks, x = blocks_of(SIZES["heads of 16"]), torch.randn(2, 5, 64)
    with torch.no_grad():
        assert native_blocks.can_run(blocks, x, HOME)
        change(blocks)
        assert not native_blocks.can_run(blocks, x, HOME)


@pytest.mark.parametrize("config", [ViTConfig(48, 1, 1), ViTConfig(64, 1, 8), ViTConfig(64, 1, 4, 100)], ids=str)
def test_sizes_that_do_not_fit(config: ViTConfig):
    with torch.no_grad():
        assert not native_blocks.can_run(blocks_of(config), torch.randn(2, 5, config.width), HOME)


def test_what_else_is_left_to_pytorch(monkeypatch: pytest.MonkeyPatch):
    """Other types, a processor that multiplies bfloat16 by a unit of its own, no compiler."""
    blocks, x = blocks_of(SIZES["heads of 16"]), torch.randn(2, 5, 64)
    half = copy.deepcopy(blocks).bfloat16()
    with torch.no_grad():
        assert not native_blocks.can_run(blocks, x.bfloat16(), HOME) and not native_blocks.can_run(half, x, HOME)
        assert not native_blocks.can_run(copy.deepcopy(blocks).double(), x.double(), HOME)
        monkeypatch.setattr(native_blocks, "has_amx", lambda: True)
        assert native_blocks.can_run(blocks, x, HOME)
        assert native_blocks.can_run(half, x.bfloat16(), HOME) == (native.instructions() == "AMX")
        monkeypatch.setattr(native, "library", lambda: "there is none")
        assert not native_blocks.can_run(blocks, x, HOME)
        assert run_blocks(blocks, x, native=True)[0].shape == x.shape


@pytest.mark.filterwarnings("ignore:There is a performance drop", "ignore:`torch.jit.script` is deprecated")
def test_transforms_and_programs_see_all_operations(tokenizer: DetailFlowTokenizer):
    """Whole programs, exports, maps over images, and derivatives in forward mode."""
    quantized = tokenizer.quantizer.lookup(tokenizer.encode(images(2))).detach()
    plain = by_pytorch(tokenizer)

    def decode(numbers: Tensor) -> Tensor:
        return tokenizer.decode_quantized(numbers, 32)

    with torch.no_grad():
        expected = plain.decode_quantized(quantized, 32)
        found = [
            torch.compile(decode, fullgraph=True, backend="eager")(quantized),
            torch.func.vmap(decode)(quantized[:, None])[:, 0],
        ]
        for result in found:
            torch.testing.assert_close(result, expected, atol=1e-5, rtol=0)
        half = copy.deepcopy(tokenizer).bfloat16()
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(quantized.bfloat16(), torch.ones_like(quantized).bfloat16())
            assert torch.autograd.forward_ad.unpack_dual(half.decode_quantized(dual, 32)).tangent.abs().max() > 0.01


def test_a_library_without_threads(monkeypatch: pytest.MonkeyPatch):
    class Library:
        def detailflow_has_threads(self) -> int:
            return 0

    blocks, x = blocks_of(SIZES["heads of 16"]), torch.randn(2, 5, 64)
    monkeypatch.setattr(native, "library", Library)
    with torch.no_grad():
        assert native_blocks.can_run(blocks, x, HOME)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
        assert not native_blocks.can_run(blocks, x, HOME)


def test_it_can_be_stopped_between_images(monkeypatch: pytest.MonkeyPatch):
    """Images go to the library in parts, and Python looks for Ctrl-C in between."""
    called: list[int] = []

    class Library:
        def detailflow_transform(self, *given: object) -> int:
            called.append(given[4])  # type: ignore[arg-type]  # images
            raise KeyboardInterrupt

    monkeypatch.setattr(native, "library", Library)
    with pytest.raises(KeyboardInterrupt):
        native_blocks.run(blocks_of(SIZES["heads of 16"]), torch.randn(40, 100, 64))
    assert called == [5]


def test_defaults_of_a_notebook(tokenizer: DetailFlowTokenizer):
    ids = tokenizer.encode(images(2))
    expected = tokenizer.decode(ids)
    try:
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("meta"):
            assert torch.equal(tokenizer.decode(ids), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_no_images(tokenizer: DetailFlowTokenizer):
    assert tokenizer.decode(torch.zeros(0, 48, dtype=torch.int64)).shape == (0, 3, 32, 32)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), 3e38])
def test_not_finite(number: float, tokenizer: DetailFlowTokenizer, runs: list[int]):
    """Weights that overflow are seen in what comes out."""
    model = copy.deepcopy(tokenizer)
    ids = model.encode(images(1))
    model.decoder.blocks[3].mlp.fc2.weight.data.fill_(number)
    model.encoder.blocks[2].mlp.fc2.weight.data.fill_(number)
    for call in (lambda: model.decode_bytes(ids), lambda: model.encode(images(1))):
        with pytest.raises(DetailFlowError, match="not finite|finite"):
            call()
    assert len(runs) == 5


def test_too_little_memory(tokenizer: DetailFlowTokenizer, monkeypatch: pytest.MonkeyPatch):
    class Library:
        def detailflow_transform(self, *_: object) -> int:
            return 0

    ids = tokenizer.encode(images(2))
    monkeypatch.setattr(native, "library", Library)
    with pytest.raises(DetailFlowError, match="a batch of 2 images at a size of 32 does not fit in memory"):
        tokenizer.decode(ids)
