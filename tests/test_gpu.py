"""On a GPU (`make gpu`): the recordings, CUDA graphs against PyTorch, no waiting, training, FSDP2 and the compiler.

DETAILFLOW_GPU_TESTS=cpu in the environment runs the same tests on a CPU, where nothing is captured or waited for.
"""

import gc
import math
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from detailflow import DetailFlowGPT, DetailFlowPipeline, DetailFlowTokenizer, GPTConfig, SamplingConfig, ViTConfig
from detailflow import graphs as graphs_module
from detailflow.generation import TorchEngine, generate, image_noise
from detailflow.graphs import GraphEngine
from detailflow.models.tokenizer import TokenizerConfig
from detailflow.training.config import GPTTraining, LoopConfig, TokenizerTraining
from detailflow.training.gpt import GPTStage, _shard
from detailflow.training.tokenizer import TokenizerStage

DEVICE = torch.device(os.environ.get("DETAILFLOW_GPU_TESTS", "cuda"))
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE.type == "cuda" and not torch.cuda.is_available(), reason="there is no GPU here"),
]
TINY = Path(__file__).parent / "parity" / "tiny-32"
RECORDED = load_file(TINY / "recorded.safetensors")
TOLERANCE = dict(atol=1e-3, rtol=1e-3)  # a GPU adds up in another order than the CPU that recorded


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Compute float32 as float32; capture on a GPU only."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    monkeypatch.setitem(graphs_module.CAPTURE, "cpu", lambda calls, device: list(calls))
    yield
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()


@contextmanager
def no_waiting() -> Iterator[None]:
    """Raise an error for whatever waits for the GPU."""
    if DEVICE.type != "cuda":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def shipped(**options: Any) -> DetailFlowPipeline:
    return DetailFlowPipeline.from_pretrained(device=DEVICE, **options)


def seeds(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(100 + i) for i in range(count)]


def agreement(a: Tensor, b: Tensor) -> float:
    return (a == b).float().mean().item()


# --- the recordings of the published implementation -------------------------------------------------------------------


def test_recorded_codes_and_pixels():
    tokenizer = DetailFlowTokenizer.from_pretrained(TINY / "tokenizer", device=DEVICE, dtype="float32")
    images = (RECORDED["images_uint8"].permute(0, 3, 1, 2) / 127.5 - 1).to(DEVICE)
    for key in [k for k in RECORDED if re.fullmatch(r"encode\.n\d+\.indices", k)]:
        n = int(key.split(".")[1][1:])
        assert agreement(tokenizer.encode(images, num_tokens=n).cpu(), RECORDED[key].long()) >= 0.99, key
    for key in [k for k in RECORDED if re.fullmatch(r"decode\.t\d+\.s\d+\.pixels", k)]:
        t, side = (int(part[1:]) for part in key.split(".")[1:3])
        ids = RECORDED["encode.n32.indices"].long()[:, :t].to(DEVICE)
        torch.testing.assert_close(tokenizer.decode(ids, size=side).cpu(), RECORDED[key], **TOLERANCE)


@pytest.mark.parametrize("engine", ["torch", "graphs"])
def test_recorded_logits_and_greedy_tokens(engine: Any):
    gpt = DetailFlowGPT.from_pretrained(TINY / "gpt", device=DEVICE, dtype="float32")
    gpt.engine = engine
    classes, tokens = RECORDED["gpt.class_ids"].long(), RECORDED["gpt.tokens"].long()
    with torch.no_grad():
        torch.testing.assert_close(gpt(classes, tokens).cpu(), RECORDED["gpt.logits"], **TOLERANCE)
    for key in [k for k in RECORDED if k.startswith("gpt.greedy.")]:
        found = re.fullmatch(r"gpt\.greedy\.cfg([\d.]+?)(\.gradual)?", key)
        assert found
        options: dict[str, Any] = dict(guidance_schedule="linear" if found[2] else "constant", temperature=0.0)
        ids = gpt.generate(classes, guidance_scale=float(found[1]), **options)
        assert agreement(ids.cpu(), RECORDED[key].long()) >= 0.99, key


# --- CUDA graphs against PyTorch --------------------------------------------------------------------------------------

CASES: list[dict[str, Any]] = [
    dict(classes=[3, 5]),
    dict(classes=[7, 0]),
    dict(classes=[3, 5], guidance_scale=2.0, temperature=0.7),
    dict(classes=[3, 5], guidance_scale=3.0, guidance_schedule="linear"),
    dict(classes=[3, 5], temperature=0.0),
    dict(classes=[3, 5], guidance_scale=1.0),
    dict(classes=[3, 5], top_k=50, top_p=0.9),
    dict(classes=[1] * 9),
    dict(classes=[3, 5]),
    dict(classes=[3, 5], num_tokens=24),
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tokens_of_both_engines(dtype: str, monkeypatch: pytest.MonkeyPatch):
    """Equal, whatever changes between batches: PyTorch's kernels run on the same numbers, captured or not."""
    monkeypatch.setattr(GraphEngine, "fused", False)
    eager, graphed = shipped(dtype=dtype, engine="torch").gpt, shipped(dtype=dtype, engine="graphs").gpt
    for case in CASES:
        options = dict(case)
        ids = torch.tensor(options.pop("classes"))
        expected = eager.generate(ids, generator=seeds(len(ids)), **options)
        assert torch.equal(graphed.generate(ids, generator=seeds(len(ids)), **options), expected), case
    prefix = expected[:, :16]
    kept = [one.generate(ids, prefix=prefix, generator=seeds(2)) for one in (eager, graphed)]
    assert torch.equal(*kept) and torch.equal(kept[0][:, :16], prefix)


@pytest.mark.parametrize("images, guided", [(1, False), (1, True), (3, True), (4, True)])
def test_logits_of_kernels(images: int, guided: bool):
    """Along sampled tokens: no further from float32's than PyTorch's in bfloat16, and the same each time."""
    kernels = pytest.importorskip("detailflow.kernels", reason="there is no Triton")
    model, exact = shipped(dtype="bfloat16").gpt, shipped(dtype="float32").gpt
    if (problem := kernels.why_not(model)) is not None:
        pytest.skip(problem)
    ids, n = torch.arange(images, device=DEVICE), model.config.num_tokens
    tokens = exact.generate(ids, generator=seeds(images))

    def logits(kind: type[TorchEngine], network: DetailFlowGPT) -> Tensor:
        engine = kind(network, ids, guided)
        steps = [engine.step(tokens, *step).float() for step in network.schedule.steps]
        return torch.cat(steps, 1)

    expected = logits(TorchEngine, exact)
    fused, again, eager = (logits(kind, model) for kind in (kernels.TritonEngine, kernels.TritonEngine, TorchEngine))
    assert fused.shape == (images * (1 + guided), n, model.config.codebook_size)
    assert torch.equal(fused, again)
    errors = [(found - expected).square().mean().sqrt().item() for found in (fused, eager)]
    assert errors[0] <= 1.05 * errors[1], errors
    greedy = [agreement(found.argmax(-1), expected.argmax(-1)) for found in (fused, eager)]
    assert greedy[0] >= greedy[1] - 0.02, greedy


def test_graphs_of_kernels():
    """The same tokens each time, whatever came between; the first is PyTorch's but for a draw near a border."""
    kernels = pytest.importorskip("detailflow.kernels", reason="there is no Triton")
    graphed, eager = shipped(dtype="bfloat16", engine="graphs").gpt, shipped(dtype="bfloat16", engine="torch").gpt
    if (problem := kernels.why_not(graphed)) is not None:
        pytest.skip(problem)
    before = None
    for classes in ([3, 5], [7, 0], [3, 5]):
        ids = torch.tensor(classes)
        tokens = graphed.generate(ids, generator=seeds(2))
        assert agreement(tokens[:, :1], eager.generate(ids, generator=seeds(2), num_tokens=1)) >= 0.5
        assert before is None or classes == [7, 0] or torch.equal(tokens, before)
        before = tokens if classes == [3, 5] else before
    kept = graphed.generate(ids, prefix=before[:, :16], generator=seeds(2))
    assert torch.equal(kept[:, :16], before[:, :16])
    program = next(iter(graphed.graphs._programs.values()))[0]
    assert isinstance(program.engine, kernels.TritonEngine) and not kernels.problems


def test_images_and_streams_of_both_engines():
    eager, graphed = shipped(dtype="float32", engine="torch"), shipped(dtype="float32", engine="graphs")
    for labels in (["cat"], ["dog"], ["cat", "ship"], ["dog"]):
        images = [[image.tobytes() for image in pipe(labels, seed=4)] for pipe in (eager, graphed)]
        assert images[0] == images[1]
        assert [image.tobytes() for image in list(graphed.stream(labels, seed=4))[-1].images] == images[0]
    both = list(zip(graphed.stream("cat", seed=1), graphed.stream("cat", seed=2), strict=True))
    assert [stage.images[0].tobytes() for stage in both[-1]] == [
        eager("cat", seed=seed)[0].tobytes() for seed in (1, 2)
    ]


def test_automatic_engine_and_dtype():
    pipe = shipped()
    if DEVICE.type == "cuda":
        assert pipe.gpt.head.weight.dtype == pipe.tokenizer.decoder.mask_token.dtype == torch.bfloat16
        for _ in range(3):
            pipe("cat")
        assert len(pipe.gpt.graphs) == len(pipe.tokenizer.graphs) == 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_search_for_codes(dtype: str):
    tokenizer = shipped(dtype=dtype).tokenizer
    images = tokenizer.decode(torch.arange(4 * 48, device=DEVICE).view(4, 48) * 9 % 2048).clamp(-1, 1)
    errors = [
        (tokenizer.decode(tokenizer.encode(images, search=steps)).float() - images.float()).square().mean((1, 2, 3))
        for steps in (0, 6)
    ]
    assert (errors[1] < 0.95 * errors[0]).all()


def test_tokens_are_those_of_a_cpu():
    """But for draws within rounding of a border between two codes."""
    ids = torch.arange(10)
    cpu = DetailFlowPipeline.from_pretrained(device="cpu", engine="torch").gpt.generate(ids, generator=seeds(10))
    assert agreement(shipped(dtype="float32").gpt.generate(ids, generator=seeds(10)).cpu(), cpu) > 0.9


@pytest.mark.parametrize("engine", [TorchEngine, GraphEngine])
@pytest.mark.parametrize(
    "sampling", [SamplingConfig(4.0), SamplingConfig(4.0, temperature=0), SamplingConfig(1.0, top_k=50, top_p=0.9)]
)
def test_the_loop_waits_once(engine: type[TorchEngine], sampling: SamplingConfig):
    pipe = shipped(engine="graphs")
    gpt, tokenizer = pipe.gpt, pipe.tokenizer
    ids, n = torch.arange(4, device=DEVICE), gpt.config.num_tokens
    for _ in range(2):  # the first loads kernels and captures
        noise = image_noise(seeds(4), n)
        steps = generate(engine(gpt, ids, sampling.guided), gpt.schedule, sampling, noise, n, DEVICE)
        next(steps)
    with no_waiting():
        for _ in gpt.schedule.steps[1:-1]:
            next(steps)
    *_, tokens = steps
    tokenizer.decode_bytes(tokens)  # captures
    with no_waiting():
        pixels = tokenizer.decode_bytes(tokens)
    assert pixels.shape == (4, 32, 32, 3)


def test_memory_is_given_back():
    if DEVICE.type != "cuda":
        pytest.skip("counts a GPU's memory")
    gc.collect()
    before = torch.cuda.memory_allocated()
    pipe = shipped(engine="graphs")
    pipe(["cat"] * 4)
    del pipe
    assert torch.cuda.memory_allocated() - before < 80 * 2**20  # workspaces of libraries stay


def test_compiled_and_captured():
    eager, compiled = shipped(dtype="float32", engine="torch"), shipped(dtype="float32")
    if DEVICE.type == "cuda":
        compiled.compile(2)
    ids = torch.tensor([3, 5])
    for _ in range(3):
        tokens = compiled.gpt.generate(ids, temperature=0.0)
    assert agreement(tokens, eager.gpt.generate(ids, temperature=0.0)) > 0.9
    difference = compiled.tokenizer.decode_bytes(tokens).int() - eager.tokenizer.decode_bytes(tokens).int()
    assert difference.abs().max() <= 1


# --- training --------------------------------------------------------------------------------------------------------

LOOP: dict[str, Any] = dict(steps=1000, batch_size=16, learning_rate=1e-3, warmup=0.0, trackers=())
VIT = ViTConfig(64, 2, 4)
SIZES = TokenizerConfig(VIT, VIT, image_size=32, patch_size=4, num_tokens=16, group_size=4, codebook_size=256)


class NoImages:
    class_names = ("a", "b")

    def __len__(self) -> int:
        return 16


def tokenizer_stage(tmp_path: Path, **loop: Any) -> TokenizerStage:
    options: dict[str, Any] = dict(perceptual=0.1, adversarial=0.1, adversarial_from=0, augment=True, lecam=0.001)
    config = TokenizerTraining("-", SIZES, LoopConfig(**LOOP | loop), **options)
    return TokenizerStage(config, NoImages(), tmp_path, DEVICE, "plan")  # type: ignore[arg-type]


def ar_stage(**loop: Any) -> GPTStage:
    sizes = GPTConfig(10, 64, 2, 4, num_tokens=16, group_size=4, codebook_size=256)
    config = GPTTraining("-", "-", LoopConfig(**LOOP | loop), width=64, depth=2, heads=4)
    return GPTStage(config, sizes, None, None, DEVICE)  # type: ignore[arg-type]


def losses(stage: TokenizerStage | GPTStage, batch: Sequence[Tensor], count: int = 12) -> list[float]:
    """Take steps on one batch; only those that log may wait for the GPU, after their end."""
    found = []
    for step in range(count):
        torch.manual_seed(step)
        if step < 2 or stage.config.loop.compile:  # loads kernels
            scalars = stage.step(step, batch, 1e-3)
        else:
            with no_waiting():
                scalars = stage.step(step, batch, 1e-3)
        found.append(float(scalars["loss"]))
    return found


def images() -> tuple[Tensor, Tensor]:
    pixels = torch.from_numpy(RECORDED["images_uint8"].numpy())
    side = F.interpolate(pixels.permute(0, 3, 1, 2).float(), (32, 32)).permute(0, 2, 3, 1).to(torch.uint8)
    return side.repeat(-(-16 // len(side)), 1, 1, 1)[:16].contiguous(), torch.zeros(16, dtype=torch.int64)


def codes() -> tuple[Tensor, Tensor, Tensor]:
    ids = torch.randint(256, (16, 16), generator=torch.Generator().manual_seed(0))
    return torch.arange(16) % 10, ids, ids


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_tokenizer_training(tmp_path: Path, precision: str):
    found = losses(tokenizer_stage(tmp_path, precision=precision), images())
    assert all(map(math.isfinite, found))


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_ar_training(precision: str):
    found = losses(ar_stage(precision=precision), codes(), 30)
    assert found[-1] < found[0] - 0.5


@pytest.mark.skipif(DEVICE.type != "cuda", reason="compiling for a CPU is tested elsewhere")
def test_compiled_training(tmp_path: Path):
    assert losses(ar_stage(compile=True), codes(), 30)[-1] < 5
    assert all(map(math.isfinite, losses(tokenizer_stage(tmp_path, compile=True), images(), 4)))


def test_fsdp2_with_one_process(tmp_path: Path):
    """Sharded over one process, the loss and the gradients are those of the whole model."""
    backend = "nccl" if DEVICE.type == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        torch.manual_seed(0)
        sizes = GPTConfig(10, 64, 2, 4, num_tokens=16, group_size=4, codebook_size=256, dropout=0.0)
        whole, sharded = DetailFlowGPT(sizes), DetailFlowGPT(sizes)
        sharded.load_state_dict(whole.state_dict())
        whole.to(DEVICE)
        _shard(sharded, DEVICE)
        labels, ids, _ = (tensor.to(DEVICE) for tensor in codes())
        values = []
        for network in (whole, sharded):
            loss = F.cross_entropy(network(labels, ids).flatten(0, 1), ids.flatten())
            loss.backward()
            gradient: Any = network.head.weight.grad
            values.append((loss.detach(), gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient))
        torch.testing.assert_close(*values, **TOLERANCE)
    finally:
        torch.distributed.destroy_process_group()
