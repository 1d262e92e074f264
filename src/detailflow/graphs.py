"""CUDA graphs: work that is captured once and then starts with a single call (docs/gpu.md#cuda-graphs).

A decoding step of GPT-L is about 470 kernels, which Python starts more slowly than a GPU runs them. A captured step
always works in the same memory: what changes from call to call is copied into the buffers of its program.
"""

import gc
import logging
import threading
import weakref
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, cached_property, partial
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from detailflow.device import to_device
from detailflow.errors import first_line
from detailflow.generation import SamplingConfig, TorchEngine, draw, guidance_at, temperature_of

log = logging.getLogger(__name__)
MOST = 4  # programs that a model keeps; each holds a KV cache
STALE = 100  # batches after which a program that none of them used makes room for another
REMEMBERED = 256  # keys that came up lately
LARGEST = 1 / 8  # of a GPU's memory for the KV cache of a program: kernels of larger batches outlast their start
_MAKING = threading.Lock()  # all captures use one stream, and disturb each other
Call = Callable[[], object]
P = TypeVar("P")


def capture(calls: Sequence[Call], device: torch.device) -> list[Call]:
    """Make a CUDA graph of each call, all in one pool of memory; return what starts them."""
    with torch.cuda.device(device):
        for call in calls:  # loads kernels and libraries, which a capture must not
            call()
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        pool, stream, graphs = torch.cuda.graph_pool_handle(), _capture_stream(device), []
        with _no_collection(), torch.cuda.stream(stream):
            for call in calls:
                graph = torch.cuda.CUDAGraph()
                graph.capture_begin(pool=pool, capture_error_mode="thread_local")  # other threads may go on
                try:
                    call()
                finally:
                    graph.capture_end()
                graphs.append(graph)
        torch.cuda.current_stream(device).wait_stream(stream)
    return [graph.replay for graph in graphs]


@cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream of all captures: libraries keep a workspace of tens of megabytes for each stream."""
    return torch.cuda.Stream(device)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Let Python free nothing by itself, as memory that is freed during a capture could disturb it."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


CAPTURE: dict[str, Callable[[Sequence[Call], torch.device], list[Call]]] = {"cuda": capture}  # by type of device


def why_not(model: nn.Module) -> str | None:
    """Say why nothing of `model` can be captured; None if it can."""
    device = next(model.parameters()).device
    if device.type not in CAPTURE:
        return "it is for CUDA GPUs"
    if model.training:
        return "it is in training mode"
    if torch.is_autocast_enabled(device.type):
        return "autocast is on"
    for module in model.modules():
        if not type(module).__module__.startswith(("detailflow.", "torch.nn.")):
            return "some of its layers were replaced"
        if module._forward_hooks or module._forward_pre_hooks:
            return "it has forward hooks, which a graph would not call"
    if any(type(weight) is not nn.Parameter for weight in model.parameters()):
        return "it needs plain weights"
    return None


class Graphs(Generic[P]):
    """The programs of one model, by key. They work on its weights, and are dropped if these move elsewhere."""

    def __init__(self) -> None:
        self._programs: dict[Hashable, tuple[P, int]] = {}  # and the batch that used it last
        self._owners: dict[Hashable, weakref.ref[object]] = {}
        self._seen: deque[Hashable] = deque(maxlen=REMEMBERED)
        self._too_large: set[Hashable] = set()
        self._addresses: list[int] = []
        self._batch, self._lock = 0, threading.RLock()

    def __reduce__(self) -> tuple[type, tuple[()]]:  # a copy of the model captures its own
        return Graphs, ()

    def __len__(self) -> int:
        return len(self._programs)

    def clear(self) -> None:
        """Drop all programs."""
        with self._lock:
            self._programs, self._owners, self._too_large = {}, {}, set()

    def lend(
        self, key: Hashable, model: nn.Module, make: Callable[[], P], owner: object = None, at_once: bool = False
    ) -> P | None:
        """Return the program of `key`, reserved for `owner` while that lives; None is to do the work without a graph.

        It is None if another owner has the program, if the key comes up for the first time (unless `at_once`), as
        capturing pays off later, if all places are taken by programs in use, and if it does not fit in memory.
        """
        with self._lock:
            self._batch += 1
            addresses = [weight.data_ptr() for weight in model.parameters()]
            if addresses != self._addresses:
                self.clear()
                self._addresses = addresses
            if key in self._owners and self._owners[key]() is not None:
                return None  # its buffers hold another batch
            if key not in self._programs:
                if not at_once and key not in self._seen:
                    self._seen.append(key)
                    return None
                if key in self._too_large or not self._make_room():
                    return None
                try:
                    with _MAKING:
                        self._programs[key] = make(), 0
                except torch.OutOfMemoryError:
                    self._too_large.add(key)
                    return None
            if owner is not None:
                self._owners[key] = weakref.ref(owner)
            program = self._programs[key][0]
            self._programs[key] = program, self._batch
            return program

    def _make_room(self) -> bool:
        if len(self._programs) < MOST:
            return True
        oldest = min(self._programs, key=lambda key: self._programs[key][1])
        if self._batch - self._programs[oldest][1] <= STALE:
            return False
        del self._programs[oldest]
        self._owners.pop(oldest, None)
        return True


# --- the decoding loop -----------------------------------------------------------------------------------------------


class Decoding:
    """All decoding steps of batches of one size, captured. Class, noise, guidance and temperature are in buffers.

    They are taken by the kernels of `kernels.py` if these can run the model, and by PyTorch otherwise.
    """

    engine: TorchEngine

    def __init__(self, model: Any, images: int, sampling: SamplingConfig, fused: bool = True) -> None:
        device, steps, n = model.device, model.schedule.steps, model.config.num_tokens
        with torch.inference_mode(False):  # buffers that may be changed in any mode
            self.tokens = torch.zeros(images, n, dtype=torch.int64, device=device)
            self.noise = torch.zeros(images, n, dtype=torch.float64, device=device)
            self.scales = torch.ones(len(steps), dtype=torch.float32, device=device)
            self.temperature = torch.ones((), dtype=torch.float32, device=device)
            self.finite = torch.ones((), dtype=torch.bool, device=device)
            class_ids = torch.zeros(images, dtype=torch.int64, device=device)
        self.sampling, self.schedule, self.device = sampling, model.schedule, device
        calls = [partial(self._advance, index, *step) for index, step in enumerate(steps)]
        for engine in _engines(model, images) if fused else (TorchEngine,):
            self.engine = engine(weakref.proxy(model), class_ids, sampling.guided)  # or both would live on
            try:
                self.replay = dict(zip(steps, CAPTURE[device.type](calls, device), strict=True))
                return
            except Exception as error:
                if engine is TorchEngine or isinstance(error, torch.OutOfMemoryError):
                    raise
                _give_up_kernels(device, error)

    @torch.inference_mode()
    def _advance(self, index: int, start: int, end: int) -> None:
        logits, noise = self.engine.step(self.tokens, start, end), self.noise[:, start:end]
        codes, finite = draw(logits, noise, self.sampling, self.scales[index], self.temperature)
        self.tokens[:, start:end] = codes
        self.finite.logical_and_(finite)

    @torch.inference_mode()
    def load(self, class_ids: Tensor, noise: Tensor, sampling: SamplingConfig) -> None:
        """Put a batch into the buffers: class ids (B or 2B,) on the device, noise (B, N)."""
        self.engine.class_ids.copy_(class_ids)
        self.noise.copy_(to_device(noise, self.device))
        scales = [guidance_at(sampling, self.schedule, start) for start, _ in self.schedule.steps]
        self.scales.copy_(to_device(torch.tensor(scales, dtype=torch.float32), self.device))
        self.temperature.fill_(temperature_of(sampling))
        self.finite.fill_(True)
        self.tokens.zero_()


def _engines(model: Any, images: int) -> list[type[TorchEngine]]:
    """List the engines whose steps may be captured, the fastest first."""
    if images == model.compiled_for:
        return [TorchEngine]
    try:
        from detailflow import kernels
    except (ImportError, ValueError):  # there is no Triton for this platform, or no source that it could compile
        return [TorchEngine]
    return [TorchEngine] if kernels.why_not(model) else [kernels.TritonEngine, TorchEngine]


def _give_up_kernels(device: torch.device, error: Exception) -> None:
    """Leave all steps on this device to PyTorch from now on, and say so."""
    from detailflow import kernels

    kernels.problems[device] = f"{type(error).__name__}: {first_line(error)}"
    log.warning("the kernels of a decoding step cannot be used, so PyTorch's are (%s)", kernels.problems[device])


class GraphEngine(TorchEngine):
    """The PyTorch engine with captured steps; those of a batch that is not captured it takes one by one."""

    program: Decoding | None = None
    fused = True  # whether kernels may take the steps

    def start(self, noise: Tensor, sampling: SamplingConfig, device: torch.device) -> tuple[Tensor, Tensor]:
        """Begin with (B, N) noise; see `Engine.start`. The tokens are the program's, if there is one."""
        kind, program = _kind(sampling), None
        if _fits(self.model, len(self.class_ids)):
            make = partial(Decoding, self.model, len(noise), kind, self.fused)
            key, at_once = (len(noise), kind, self.fused), self.model.engine == "graphs"
            program = self.model.graphs.lend(key, self.model, make, self, at_once)
        if program is None:
            return super().start(noise, sampling, device)
        program.load(self.class_ids, noise, sampling)
        self.program, self.caches = program, program.engine.caches
        return program.tokens, program.noise

    @cached_property
    def uncaptured(self) -> TorchEngine | None:
        """The kernels, which take steps that are not captured, too: the same seed gives the same image."""
        images = len(self.class_ids) // (1 + self.guided)
        kind = _engines(self.model, images)[0] if self.fused else TorchEngine
        if kind is TorchEngine:
            return None
        engine = kind(self.model, self.class_ids[:images], self.guided)
        engine.caches = self.caches
        return engine

    def step(self, tokens: Tensor, start: int, end: int) -> Tensor:
        """(B, N) tokens, known before `start` → logits (B or 2B, end − start, K)."""
        if self.uncaptured is not None:
            try:
                return self.uncaptured.step(tokens, start, end)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                _give_up_kernels(self.model.device, error)
                self.uncaptured = None
        return super().step(tokens, start, end)

    def advance(
        self, tokens: Tensor, noise: Tensor, start: int, end: int, sampling: SamplingConfig, scale: float
    ) -> Tensor | bool:
        """Draw the tokens from `start` to `end`; see `Engine.advance`."""
        if self.program is None:
            return super().advance(tokens, noise, start, end, sampling, scale)
        self.program.replay[start, end]()
        return self.program.finite


def _kind(sampling: SamplingConfig) -> SamplingConfig:
    """Return what captured steps depend on; the rest is in their buffers."""
    scale, temperature = 1.5 if sampling.guided else 1.0, float(sampling.temperature > 0)
    return replace(sampling, guidance_scale=scale, guidance_schedule="constant", temperature=temperature)


def _fits(model: Any, rows: int) -> bool:
    """Return whether the KV cache of so many rows may be kept."""
    if model.device.type != "cuda":
        return True
    config, memory = model.config, torch.cuda.get_device_properties(model.device).total_memory
    cache = 2 * rows * config.num_tokens * config.width * config.depth * model.head.weight.itemsize
    return bool(cache <= LARGEST * memory)


# --- one function ----------------------------------------------------------------------------------------------------


class Function:
    """A function of one tensor, captured for inputs like `example`."""

    def __init__(self, function: Callable[[Tensor], Tensor], example: Tensor) -> None:
        with torch.inference_mode(False):
            self.input = example.clone()
        self.function, self.output, self._lock = function, example, threading.Lock()
        (self.replay,) = CAPTURE[example.device.type]([self._run], example.device)

    @torch.inference_mode()
    def _run(self) -> None:
        self.output = self.function(self.input)

    @torch.inference_mode()
    def __call__(self, value: Tensor) -> Tensor:
        """Return the function's value."""
        with self._lock:
            self.input.copy_(value)
            self.replay()
            return self.output.clone()
