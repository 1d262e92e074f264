"""What a machine can do at best, and what a model asks of it: bytes to read and operations of matrix products to do."""

import gc
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from detailflow.models.gpt import DetailFlowGPT
from detailflow.models.tokenizer import DetailFlowTokenizer

READ_BYTES = 512 * 2**20  # more than most caches hold
PRODUCT_SIDES = (1024, 2048, 4096)
CALLS = 10  # in one measurement of a GPU, whose launches would count otherwise


@dataclass(frozen=True)
class Work:
    """Bytes that must be read and operations that must be done before anything after it can begin."""

    bytes: float
    operations: float


@dataclass(frozen=True)
class Ceilings:
    """What the machine does at best: bytes read per second, and operations per second of matrix products in one dtype."""

    read: float
    products: float

    def limit(self, work: Sequence[Work]) -> tuple[float, str]:
        """Seconds that the parts take at least, one after the other, and which ceiling says so for most of them."""
        times = [(part.bytes / self.read, part.operations / self.products) for part in work]
        by_bytes = sum(a for a, b in times if a > b)
        by_products = sum(b for a, b in times if a <= b)
        return by_bytes + by_products, "bytes" if by_bytes > by_products else "products"


def measure_ceilings(device: torch.device, dtype: torch.dtype, repeats: int = 5) -> Ceilings:
    """Measure both: the best of several repeats, and of several sizes of square matrices."""
    calls = 1 if device.type == "cpu" else CALLS
    data = torch.ones(READ_BYTES // 4, device=device)
    read = READ_BYTES / min(seconds(data.sum, device, calls) for _ in range(repeats))
    del data
    best = 0.0
    for side in PRODUCT_SIDES:
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        times = [seconds(lambda a=a, b=b: a @ b, device, calls) for _ in range(repeats)]  # type: ignore[misc]
        best = max(best, 2 * side**3 / min(times))
    return Ceilings(read, best)


def seconds(function: Callable[[], object], device: torch.device, calls: int = 1) -> float:
    """The time that one call takes, of several in a row."""
    _wait(device)
    start = time.perf_counter()
    for _ in range(calls):
        function()
    _wait(device)
    return (time.perf_counter() - start) / calls


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


class PeakMemory:
    """The most memory that was held since this was made: the GPU's own count, or on Linux all that the process keeps resident."""

    STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")

    def __init__(self, device: torch.device) -> None:
        self.device, self.known = device, device.type in ("cpu", "cuda")
        gc.collect()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        elif self.known:
            try:
                self.RESET.write_text("5")
            except OSError:
                self.known = False

    def mebibytes(self) -> float | None:
        """`None` where it cannot be told."""
        if not self.known:
            return None
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**20
        match = re.search(r"VmHWM:\s*(\d+) kB", self.STATUS.read_text())
        return int(match[1]) / 2**10 if match else None


def _weights(*parts: nn.Module) -> int:
    """Weights of the matrices of some modules."""
    return sum(m.weight.numel() for part in parts for m in part.modules() if isinstance(m, nn.Linear))


def generation_work(gpt: DetailFlowGPT, batch: int, guided: bool, num_tokens: int | None = None) -> list[Work]:
    """Each step of `batch` images' tokens, with the cache: it reads every matrix and all earlier keys and values once, and
    does two operations for each weight and position that it adds, and four for each pair of those that attend.
    """
    config, rows = gpt.config, batch * (1 + guided)
    n, weights = gpt.schedule.check_count(num_tokens), _weights(gpt)
    result = []
    for start, end in gpt.schedule.steps:
        if start < n:
            cached = 2 * rows * start * config.width * config.depth
            attention = 4 * rows * (end - start) * end * config.width * config.depth
            result.append(
                Work((weights + cached) * gpt.head.weight.itemsize, 2 * weights * rows * (end - start) + attention)
            )
    return result


def decoding_work(tokenizer: DetailFlowTokenizer, batch: int, num_tokens: int | None = None) -> list[Work]:
    """`batch` images at side D(n) from their first n tokens."""
    decoder, schedule, config = tokenizer.decoder, tokenizer.schedule, tokenizer.config.decoder
    n = schedule.check_count(num_tokens)
    patches = (schedule.decode_size(n) // decoder.patch_size) ** 2
    products = (
        _weights(decoder.blocks) * (n + patches) + _weights(decoder.project) * n + _weights(decoder.to_pixels) * patches
    )
    attention = 2 * (n + patches) ** 2 * config.width * config.depth
    return [Work(_weights(decoder) * decoder.mask_token.itemsize, 2 * batch * (products + attention))]


def encoding_work(tokenizer: DetailFlowTokenizer, batch: int) -> list[Work]:
    """All tokens of `batch` images of side R: patches see patches, tokens see both."""
    encoder, project, config = tokenizer.encoder, tokenizer.quantizer.project, tokenizer.config
    n, patches, vit = config.num_tokens, (config.image_size // config.patch_size) ** 2, config.encoder
    products = (
        _weights(encoder.blocks) * (n + patches) + _weights(encoder.patch_embed) * patches + _weights(project) * n
    )
    products += config.codebook_size * config.codebook_dim * n  # the distances from all codes
    attention = 2 * (patches**2 + n * (n + patches)) * vit.width * vit.depth
    weights = _weights(encoder.blocks, encoder.patch_embed, project)
    return [Work(weights * encoder.pos_embed.itemsize, 2 * batch * (products + attention))]
