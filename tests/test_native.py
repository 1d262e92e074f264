"""The decoding step in C++ gives PyTorch's tokens, whatever the batch; where it cannot be built or used, PyTorch is."""

import copy
import ctypes
import mmap
import os
import pickle
import platform
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from detailflow import DetailFlowGPT, DetailFlowPipeline, GPTConfig, native
from detailflow.generation import SamplingConfig, TorchEngine, guidance_at, image_noise, sample
from detailflow.native.huge_pages import ALIGNMENT, gather
from detailflow.tensors import writing_tensors

pytestmark = pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="needs a C++ compiler")

SMALL = dict(num_classes=5, width=64, depth=2, heads=4, codebook_size=96, num_tokens=24, group_size=4, dropout=0.0)
SIZES = {
    "groups of 4": SMALL,
    "token by token": SMALL | {"causal_tokens": 24},
    "only groups": SMALL | {"causal_tokens": 0},
    "one group": SMALL | {"num_tokens": 4},
    "many positions": SMALL | {"num_tokens": 1040, "group_size": 8, "depth": 1},
    "wide": SMALL | {"width": 96, "heads": 2, "mlp": 160, "codebook_size": 32},
}
BORDER = 1e-5  # of a uniform number: 3 times what the rounding of logits does at guidance 4
ENGINES = (native.NativeEngine, TorchEngine)
SAMPLINGS = {
    "greedy": SamplingConfig(3.0, temperature=0.0),
    "guided": SamplingConfig(4.0),
    "linear": SamplingConfig(3.0, "linear", 0.9),
    "top-k": SamplingConfig(1.0, top_k=7),
    "top-p": SamplingConfig(2.0, top_p=0.8),
    "hot": SamplingConfig(1.0, temperature=1e30),
    "cold": SamplingConfig(1.0, temperature=1e-30),
}


@pytest.fixture(scope="module")
def shipped() -> DetailFlowGPT:
    return DetailFlowPipeline.from_pretrained(device="cpu").gpt


def random_gpt(**sizes: object) -> DetailFlowGPT:
    torch.manual_seed(0)
    gpt = DetailFlowGPT(GPTConfig(**sizes)).eval()
    for weight in gpt.parameters():
        torch.nn.init.normal_(weight, std=0.1 if weight.ndim > 1 else 1.0)  # far from uniform logits
    return gpt


def steps_of(gpt: DetailFlowGPT, sampling: SamplingConfig, images: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Draw the tokens of each step by the native engine and by PyTorch, after the same earlier ones.

    The third is True if PyTorch would not draw the native engine's code even by a number that differs by `BORDER`.
    """
    classes = torch.arange(images) % gpt.config.num_classes
    noise = image_noise([torch.Generator().manual_seed(i) for i in range(images)], gpt.config.num_tokens)
    ours, theirs = native.NativeEngine(gpt, classes, sampling.guided), TorchEngine(gpt, classes, sampling.guided)
    ids = torch.zeros(noise.shape, dtype=torch.int64)
    for start, end in gpt.schedule.steps:
        scale = guidance_at(sampling, gpt.schedule, start)
        assert ours.advance(ids, noise, start, end, sampling, scale)
        drawn, logits = ids[:, start:end].clone(), theirs.step(ids, start, end)
        if sampling.guided:
            logits = logits[images:] + scale * (logits[:images] - logits[images:])
        ids[:, start:end] = sample(logits, noise[:, start:end], sampling)
        least, most = (sample(logits, noise[:, start:end] + shift, sampling) for shift in (-BORDER, BORDER))
        yield drawn, ids[:, start:end].clone(), (drawn < least) | (drawn > most)


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
def test_tokens_of_the_shipped_model(sampling: SamplingConfig, shipped: DetailFlowGPT):
    """But for a few draws in a thousand, whose number is as near to the border of two codes as logits are rounded."""
    with torch.inference_mode():
        ours, theirs, beyond = (torch.cat(parts, 1) for parts in zip(*steps_of(shipped, sampling, 30), strict=True))
    assert not beyond.any()
    others = int((ours != theirs).sum())
    assert others <= (0 if sampling.temperature == 0 else 5), f"{others} of {ours.numel()}"


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_logits_of_other_sizes(sizes: dict[str, object]):
    gpt = random_gpt(**sizes)
    classes, ids = torch.tensor([0, 4, 5]), torch.randint(32, (3, gpt.config.num_tokens))
    ours, theirs = native.NativeEngine(gpt, classes, True), TorchEngine(gpt, classes, True)
    with torch.inference_mode():
        for step in gpt.schedule.steps[:40]:
            torch.testing.assert_close(ours.step(ids, *step), theirs.step(ids, *step), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("sizes", [SIZES["groups of 4"], SIZES["only groups"]], ids=str)
def test_known_tokens_in_one_pass(sizes: dict[str, object]):
    """Bit for bit as step after step, and so are the steps that follow."""
    gpt = random_gpt(**sizes)
    ids, known = torch.randint(96, (2, 24)), 8
    slow, fast = (native.NativeEngine(gpt, torch.tensor([1, 2]), True) for _ in range(2))
    *before, after = [slow.step(ids, *step) for step in gpt.schedule.steps if step[1] <= known + 4]
    assert torch.equal(fast.prefill(ids, known), torch.cat(before, 1))
    assert torch.equal(fast.step(ids, known, known + 4), after)


def test_bfloat16_errs_no_more_than_pytorch(shipped: DetailFlowGPT):
    """Root mean square of the difference to float32's logits, over all steps."""
    ids = torch.randint(2048, (10, 48), generator=torch.Generator().manual_seed(0))
    classes, errors = torch.arange(10), {"native": 0.0, "torch": 0.0}
    half = DetailFlowPipeline.from_pretrained(device="cpu", dtype="bfloat16").gpt
    with torch.inference_mode():
        exact = TorchEngine(shipped, classes, False)
        models = {"native": native.NativeEngine(half, classes, False), "torch": TorchEngine(half, classes, False)}
        for step in shipped.schedule.steps:
            wanted = exact.step(ids, *step)
            for name, model in models.items():
                errors[name] += (model.step(ids, *step).float() - wanted).square().mean().item()
    assert errors["native"] <= errors["torch"], errors


@pytest.mark.parametrize("dtype", native.TYPES, ids=str)
def test_logits_do_not_depend_on_the_batch(dtype: torch.dtype):
    """Bit for bit."""
    gpt = random_gpt(**SMALL).to(dtype)
    classes, ids = torch.arange(5), torch.randint(96, (5, 24))
    together = native.NativeEngine(gpt, classes, True)
    alone = [native.NativeEngine(gpt, classes[i : i + 1], True) for i in range(5)]
    for step in gpt.schedule.steps:
        logits = together.step(ids, *step)
        for i, one in enumerate(alone):
            assert torch.equal(one.step(ids[i : i + 1], *step), logits[[i, i + 5]])


def test_threads_change_nothing():
    gpt = random_gpt(**SMALL | {"width": 512, "mlp": 1024, "heads": 8, "codebook_size": 1024})
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            with torch.inference_mode():
                found.append(torch.cat([ours for ours, *_ in steps_of(gpt, SAMPLINGS["guided"], 4)], 1))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


def test_weights_are_held_once_in_one_block(tmp_path: Path):
    """The parameters are the same objects with the same numbers; they can be trained, converted, saved and copied."""
    gpt = random_gpt(**SMALL | {"group_size": 1})  # without mask embeddings
    before = {name: (weight, weight.detach().clone()) for name, weight in gpt.named_parameters()}
    places = []
    for _ in range(2):
        with torch.inference_mode():
            native.NativeEngine(gpt, torch.tensor([0]), True)
        places.append([weight.data_ptr() for weight in gpt.parameters() if weight.numel()])
    assert places[0] == places[1]
    size = sum(-(-weight.nbytes // ALIGNMENT) * ALIGNMENT for weight in gpt.parameters())
    if hasattr(mmap, "MADV_HUGEPAGE"):
        assert max(places[0]) - min(places[0]) < size
        assert not any(place % ALIGNMENT for place in places[0])
    assert len(pickle.dumps(gpt)) < 1.1 * size + 1e5  # each weight without the others
    with writing_tensors(tmp_path, gpt.state_dict(), "100KB"):
        pass
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    for name, weight in gpt.named_parameters():
        assert weight is before[name][0]
        assert torch.equal(weight, before[name][1])
    gpt(torch.tensor([1]), torch.zeros(1, 24, dtype=torch.int64)).sum().backward()
    gpt.save_pretrained(tmp_path)
    saved, copied = DetailFlowGPT.from_pretrained(tmp_path, device="cpu"), copy.deepcopy(gpt)
    for weights in zip(*(model.parameters() for model in (gpt, saved, copied)), strict=True):
        assert torch.equal(weights[0], weights[1])
        assert torch.equal(weights[0], weights[2])
    gpt.to(torch.bfloat16)
    assert native.NativeEngine(gpt, torch.tensor([0]), True).weights[0].dtype == torch.bfloat16


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="there are no huge pages")
def test_several_threads_move_the_weights_once():
    start, before = threading.Barrier(4), sys.getswitchinterval()
    weights = [torch.nn.Parameter(torch.zeros(2**16)) for _ in range(100)]

    def run(_: int) -> int:
        start.wait()
        gather(weights)
        return weights[0].data_ptr()

    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as threads:
            found = set(threads.map(run, range(4)))
    finally:
        sys.setswitchinterval(before)
    assert found == {weights[0].data_ptr()}
    assert [weight.data_ptr() - weights[0].data_ptr() for weight in weights] == [2**18 * i for i in range(100)]


def test_shared_weights_stay_shared():
    """With other processes, which would not see those of another place."""
    gpt = random_gpt(**SMALL).share_memory()
    gpt.generate(torch.tensor([0]))
    assert all(weight.is_shared() for weight in gpt.parameters())


def test_changed_weights_are_seen():
    """In place, and put in the place of others."""
    gpt, ids = random_gpt(**SMALL), torch.zeros(1, 24, dtype=torch.int64)
    native.NativeEngine(gpt, torch.tensor([0]), True)
    with torch.no_grad():
        gpt.head.weight.mul_(2)
        gpt.norm.weight = torch.nn.Parameter(gpt.norm.weight * 3)
        ours, theirs = (kind(gpt, torch.tensor([0]), True).step(ids, 0, 1) for kind in ENGINES)
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-4)


def test_logits_that_are_not_finite():
    gpt = random_gpt(**SMALL)
    gpt.head.weight.data[3, 5] = torch.nan
    noise, ids = torch.rand(1, 24, dtype=torch.float64), torch.zeros(1, 24, dtype=int)
    generation = native.NativeEngine(gpt, torch.tensor([0]), False)
    assert not generation.advance(ids, noise, 0, 1, SAMPLINGS["greedy"], 1.0)


@pytest.mark.parametrize(
    ("sizes", "dtype", "sentence"),
    [
        ({"width": 48}, torch.float32, "multiples of 32"),
        ({"codebook_size": 100}, torch.float32, "multiples of 32"),
        ({"heads": 8}, torch.float32, "a multiple of 16"),
        ({}, torch.float64, "float32 or bfloat16"),
    ],
)
def test_what_it_is_not_for(sizes: dict[str, int], dtype: torch.dtype, sentence: str):
    assert sentence in str(native.why_not(random_gpt(**SMALL | sizes).to(dtype)))


def test_replaced_layers():
    """Plain layers in the place of others, with a bias or of another size; a `forward` in the place of a layer's."""
    gpt = random_gpt(**SMALL)
    gpt.head = torch.nn.Linear(64, 96)
    assert native.why_not(gpt) == "some of its layers were replaced"
    gpt.head = torch.nn.Linear(64, 64, bias=False)
    assert native.why_not(gpt) == "some of its layers were replaced"
    gpt.head = torch.nn.Sequential(torch.nn.Linear(64, 96, bias=False))
    assert native.why_not(gpt) == "some of its layers were replaced, or have hooks"
    gpt = random_gpt(**SMALL)
    gpt.head.forward = lambda x: x  # type: ignore[method-assign]  # as hooks of other libraries do
    assert native.why_not(gpt) == "some of its layers were replaced, or have hooks"


@pytest.mark.parametrize("name", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_are_called(name: str):
    gpt, calls = random_gpt(**SMALL), list[object]()
    handle = getattr(gpt.head, name)(lambda *given: calls.append(given))
    assert native.why_not(gpt) == "some of its layers were replaced, or have hooks"
    gpt.generate(torch.tensor([0]))
    assert len(calls) == len(gpt.schedule.steps)
    handle.remove()
    assert native.why_not(gpt) is None


PRINT = "from detailflow import native; print(native.instructions())"


def instructions(first: str = "", **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", first + PRINT], env=os.environ | environment, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_several_processes_build_it_at_once(tmp_path: Path):
    command, environment = [sys.executable, "-c", PRINT], os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    processes = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert {process.communicate()[0].strip() for process in processes} == {native.instructions()}
    (built,) = (tmp_path / "detailflow" / "native").iterdir()  # and nothing temporary
    written = built.stat().st_mtime_ns
    assert instructions(XDG_CACHE_HOME=str(tmp_path)) == native.instructions()
    assert built.stat().st_mtime_ns == written


def test_without_a_compiler(tmp_path: Path):
    assert "no C++ compiler was found" in instructions(XDG_CACHE_HOME=str(tmp_path), PATH=str(tmp_path))
    (tmp_path / "c++").write_text("#!/bin/sh\necho wrong >&2\nexit 1\n")
    (tmp_path / "c++").chmod(0o755)
    assert "cannot be built" in instructions(XDG_CACHE_HOME=str(tmp_path), PATH=str(tmp_path))


def test_without_a_home_folder(monkeypatch: pytest.MonkeyPatch):
    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", home)
    native.library.cache_clear()
    try:
        assert "cannot be built (Could not determine home directory.)" in native.instructions()
    finally:
        native.library.cache_clear()


def test_a_cache_that_others_can_write_to(tmp_path: Path):
    folder = tmp_path / "detailflow" / "native"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    assert "can be written by others" in instructions(XDG_CACHE_HOME=str(tmp_path))


def test_a_cache_that_cannot_be_written_to(tmp_path: Path):
    """Nor made: it would be in a file. PyTorch generates then."""
    (tmp_path / "file").write_text("")
    code = "from detailflow import DetailFlowPipeline; p = DetailFlowPipeline.from_pretrained(device='cpu'); p('cat'); "
    found = instructions(code, XDG_CACHE_HOME=str(tmp_path / "file"))
    assert "the native engine cannot be built" in found and "Not a directory" in found


def test_loading_leaves_denormal_numbers_alone():
    assert isinstance(native.library(), ctypes.CDLL)
    assert float(torch.tensor(1e-39) * 0.5) > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags", [["-march=x86-64"], ["-march=x86-64-v3"], ["-march=x86-64-v4"], ["-fsanitize=address,undefined"]], ids=str
)
def test_other_builds(flags: list[str], tmp_path: Path):
    """Other instructions give the same tokens; with the sanitizers nothing is read or written that is not ours."""
    if "march" in flags[0] and platform.machine() != "x86_64":
        pytest.skip("instructions of another processor")
    if "v4" in flags[0] and "avx512vl" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this processor has no AVX-512")
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))))
    preload = ""
    if "sanitize" in flags[0]:
        flags = [*flags, "-fno-sanitize-recover=all", "-march=native"]
        found = [
            subprocess.check_output([compiler, f"-print-file-name={n}"], text=True)
            for n in ("libasan.so", "libubsan.so")
        ]
        preload = " ".join(name.strip() for name in found)
    library = tmp_path / "other.so"
    command = [compiler, "-std=c++17", "-O2", "-shared", "-fPIC", *flags, str(native.SOURCES / "native.cpp")]
    subprocess.run([*command, "-o", str(library)], check=True)
    environment = os.environ | {"LD_PRELOAD": preload, "ASAN_OPTIONS": "detect_leaks=0", "OTHER": str(library)}
    names = "tokens or other_sizes or batch or not_finite or values_and_gradients or cross_entropy"
    tests = ["-k", names, "--no-header", "-p", "no:cacheprovider"]
    others = "test_native_blocks.py", "test_native_training.py"
    files = [__file__, *(str(Path(__file__).with_name(name)) for name in others)]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *tests, *files], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_no_images():
    gpt = random_gpt(**SMALL)
    engine = native.NativeEngine(gpt, torch.zeros(0, dtype=torch.int64), guided=True)
    assert engine.step(torch.zeros(0, 24, dtype=torch.int64), 0, 1).shape == (0, 1, 96)
