"""A decoding step in C++ for CPUs, built on this machine at first use (docs/speed.md#engines).

`blocks` has the blocks of the tokenizer's transformers, `training` what is done to activations in training. All work on
the numbers where PyTorch keeps them, so they are there once, and weights that change are seen.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from detailflow.errors import DetailFlowError
from detailflow.generation import Engine, SamplingConfig, layers_replaced, with_null_class
from detailflow.native.huge_pages import gather
from detailflow.processor import is_intel, processor_identity

GPT = Any  # DetailFlowGPT, which imports this module
log = logging.getLogger(__name__)
SOURCES = Path(__file__).parent
FLAGS = ("-std=c++17", "-O3", "-march=native", "-shared", "-fPIC")
OPENMP = "-fopenmp"  # several threads; Apple's compiler has none
BUILD_SECONDS = 300.0
TYPES = (torch.float32, torch.bfloat16)


class Sizes(ctypes.Structure):
    """`Sizes` of gpt.hpp."""

    _fields_ = [
        (name, ctypes.c_int32)
        for name in [
            "width",
            "depth",
            "heads",
            "hidden",
            "codebook_size",
            "num_tokens",
            "group_size",
            "causal_tokens",
            "null_class",
        ]
    ]


class Sampling(ctypes.Structure):
    """`Sampling` of sampling.hpp."""

    _fields_ = [(name, ctypes.c_double) for name in ("scale", "temperature", "top_p")] + [
        ("top_k", ctypes.c_int64),
        ("guided", ctypes.c_int32),
    ]


@cache
def library() -> ctypes.CDLL | str:
    """Load the library, after building it if this machine has none yet; a sentence if there cannot be one."""
    if not hasattr(os, "getuid"):
        return "the native engine is for Linux and macOS"
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX") or "c++", "g++", "clang++"))), None)
    if compiler is None:
        return "no C++ compiler was found: with one (g++ or clang++), generation on this CPU would be much faster"
    try:
        folder = _cache_folder()
        built = folder / f"{_key(compiler)}.so"
        if not built.exists():
            _build(compiler, built)
        return opened(built)
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:  # RuntimeError: there is no home folder
        return f"the native engine cannot be built ({' '.join(str(error).split())[:300]})"


def opened(path: Path) -> ctypes.CDLL:
    """Load a library that was built."""
    result = ctypes.CDLL(str(path))
    result.detailflow_instructions.restype = ctypes.c_char_p
    result.detailflow_begin.restype = ctypes.c_void_p
    result.detailflow_end.argtypes = [ctypes.c_void_p]
    return result


def _cache_folder() -> Path:
    """Make the folder for built libraries; nobody else may write to it, as what is in it is run."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(home) / "detailflow" / "native"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for path in (folder, folder.parent):
        status = path.stat()
        if status.st_uid != os.getuid() or status.st_mode & 0o022:
            raise OSError(f"{path} can be written by others: make it yours alone, as what is in it is run")
    return folder


def _flags() -> tuple[str, ...]:
    """Return the compiler's flags, without an instruction that is slower than two of float32 on Intel's processors."""
    return (*FLAGS, "-mno-avx512bf16") if is_intel() else FLAGS


def _key(compiler: str) -> str:
    """Name a build by all that decides it: sources, flags, compiler and processor."""
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=30).stdout
    sources = [path.name.encode() + path.read_bytes() for path in sorted(SOURCES.glob("*.[hc]pp"))]
    parts = [*sources, " ".join(_flags()).encode(), version, platform.machine().encode(), processor_identity().encode()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:32]


def _build(compiler: str, to: Path) -> None:
    """Compile into a temporary file and move it into its place, so that several processes may do it at once."""
    log.info("building the native engine: once on this machine, some seconds")
    with tempfile.TemporaryDirectory(dir=to.parent) as folder:
        output = Path(folder) / to.name
        for flags in ((*_flags(), OPENMP), _flags()):
            command = [compiler, *flags, str(SOURCES / "native.cpp"), "-o", str(output)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_SECONDS)
            if done.returncode == 0:
                os.replace(output, to)
                return
        raise OSError(f"{compiler}: {done.stderr.strip()}")


def instructions() -> str:
    """Say which instructions the built library uses, or why there is none."""
    found = library()
    return found if isinstance(found, str) else found.detailflow_instructions().decode()


def why_not(model: GPT) -> str | None:
    """Say why `model` cannot be run by the native engine; None if it can."""
    config, weights = model.config, list(model.parameters())
    if model.device.type != "cpu":
        return "it is for CPUs"
    dtype = weights[0].dtype
    if layers_replaced(model, type(model).__module__):
        return "some of its layers were replaced, or have hooks"
    if dtype not in TYPES or any(type(w) is not torch.nn.Parameter or w.dtype != dtype for w in weights):
        return "it needs plain weights of float32 or bfloat16, all of one type"
    if any(size % 32 for size in (config.width, config.hidden, config.codebook_size)):
        return "width, MLP and codebook must be multiples of 32"
    if config.width // config.heads % 16:
        return "the width of a head must be a multiple of 16"
    shapes = [tuple(weight.shape) for weight in _weights(model)]
    if shapes != _shapes(config) or len(weights) != len(shapes):
        return "some of its layers were replaced"
    found = library()
    return found if isinstance(found, str) else None


class NativeEngine(Engine):
    """One batch on its way through the native engine: its classes and its KV cache."""

    def __init__(self, model: GPT, class_ids: Tensor, guided: bool) -> None:
        """Begin sequences of (B,) class ids; with `guided` as many of the null class after them."""
        config, found = model.config, library()
        assert not isinstance(found, str)
        self.library, self.images, self.guided = found, len(class_ids), guided
        if guided:
            class_ids = with_null_class(class_ids, config.num_classes)
        self.classes = class_ids.to("cpu", torch.int64).contiguous()
        gather(list(model.parameters()))
        self.config, self.weights = config, _weights(model)  # kept, as the library has their addresses only
        self.rotation = model.tables()[0].to("cpu", torch.float32).contiguous()
        sizes = Sizes(
            config.width,
            config.depth,
            config.heads,
            config.hidden,
            config.codebook_size,
            config.num_tokens,
            config.group_size,
            config.schedule.num_causal,
            config.num_classes,
        )
        pointers = (ctypes.c_void_p * len(self.weights))(*(weight.data_ptr() for weight in self.weights))
        self._handle = self.library.detailflow_begin(
            ctypes.byref(sizes),
            int(self.weights[0].dtype == torch.bfloat16),
            pointers,
            address(self.rotation, torch.float32),
            address(self.classes, torch.int64),
            len(self.classes),
            torch.get_num_threads(),
        )
        self._check(bool(self._handle))

    def step(self, tokens: Tensor, start: int, end: int) -> Tensor:
        """(B, N) int64 tokens, known before `start` → logits (B or 2B, end − start, K) in float32."""
        shape = len(self.classes), end - start, self.config.codebook_size
        logits = torch.empty(shape, dtype=torch.float32, device="cpu")
        handle = ctypes.c_void_p(self._handle)
        given, found = address(tokens, torch.int64), address(logits, torch.float32)
        done = self.library.detailflow_step(handle, given, self.images, start, end, found)
        self._check(done)
        return logits

    def advance(
        self, tokens: Tensor, noise: Tensor, start: int, end: int, sampling: SamplingConfig, scale: float
    ) -> bool:
        """Draw tokens `start` to `end` into (B, N) `tokens` by (B, N) float64 `noise`; see `Engine.advance`."""
        options = Sampling(
            scale,
            sampling.temperature,
            1.0 if sampling.top_p is None else sampling.top_p,
            sampling.top_k or 0,
            self.guided,
        )
        done = self.library.detailflow_advance(
            ctypes.c_void_p(self._handle),
            address(tokens, torch.int64),
            address(noise, torch.float64),
            self.images,
            start,
            end,
            ctypes.byref(options),
        )
        self._check(done)
        return done > 0

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self.library.detailflow_end(self._handle)

    def _check(self, done: int) -> None:
        if not done:
            raise DetailFlowError(f"there is not enough memory for {self.images} images at once: choose fewer")


def _weights(model: GPT) -> list[Tensor]:
    """List the weights in the order that `GPT` of gpt.hpp takes them in."""
    found = [model.class_embedding.weight, model.token_embedding.weight, model.mask_embedding.weight]
    block: Any
    for block in model.blocks:
        found += [block.attn_norm.weight, block.attn.qkv.weight, block.attn.proj.weight, block.mlp_norm.weight]
        found += [block.mlp.gate.weight, block.mlp.up.weight, block.mlp.down.weight]
    return [weight.detach().contiguous() for weight in [*found, model.norm.weight, model.head.weight]]


def _shapes(config: Any) -> list[tuple[int, ...]]:
    """Return the shapes of `_weights`."""
    width, hidden, codes = config.width, config.hidden, config.codebook_size
    block = [(width,), (3 * width, width), (width, width), (width,), (hidden, width), (hidden, width), (width, hidden)]
    embeddings = [(config.num_classes + 1, width), (codes, width), (config.group_size - 1, width)]
    return [*embeddings, *block * config.depth, (width,), (codes, width)]


def is_plain(x: Tensor) -> bool:
    """Return whether the library can read `x`, and PyTorch does not follow it for a program or a transform."""
    if type(x) not in (Tensor, torch.nn.Parameter) or x.device.type != "cpu" or x.dtype not in TYPES:
        return False
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or forward_ad.unpack_dual(x).tangent is not None:
        return False
    try:
        x.data_ptr()
    except RuntimeError:  # inside of `vmap` and others of torch.func
        return False
    return True


def product(x: Tensor, weight: Tensor) -> Tensor:
    """(rows, in) · (out, in)ᵀ → (rows, out) in float32, of one type of `TYPES`; in and out are multiples of 32."""
    found = library()
    assert not isinstance(found, str)
    result = torch.empty(len(x), len(weight), dtype=torch.float32, device="cpu")
    numbers = address(x, x.dtype), len(x), address(weight, x.dtype), *weight.shape, address(result, torch.float32)
    if not found.detailflow_product(int(x.dtype == torch.bfloat16), *numbers, torch.get_num_threads()):
        raise MemoryError
    return result


def address(tensor: Tensor, dtype: torch.dtype) -> ctypes.c_void_p:
    """Return where a tensor's numbers are, after a check that they are as the library takes them to be."""
    assert tensor.is_contiguous() and tensor.dtype == dtype and tensor.device.type == "cpu"
    return ctypes.c_void_p(tensor.data_ptr())
