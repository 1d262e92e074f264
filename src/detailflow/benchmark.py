"""How fast a model is on this machine: against a loop without a cache, and against what the machine can do at best.

Two ceilings bound every program: the bytes that memory hands over in a second, and the operations that matrix products do in
one. From a model's sizes follow the bytes it must read and the operations it must do; the larger of the two times is the limit.
"""

import gc
import math
import platform
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from detailflow import generation
from detailflow.device import choose_device
from detailflow.errors import DetailFlowError
from detailflow.hub import ZOO
from detailflow.models.gpt import DetailFlowGPT, GPTConfig
from detailflow.models.tokenizer import DetailFlowTokenizer, TokenizerConfig
from detailflow.models.vit import ViTConfig
from detailflow.pipeline import DetailFlowPipeline, image_generator
from detailflow.schedule import TokenSchedule

Images = Callable[[list[int]], object]  # class ids → images, in whatever form

READ_BYTES = 512 * 2**20  # more than any cache holds
PRODUCT_SIDES = (1024, 2048, 4096)
COLUMNS = ("what", "dtype", "images", "seconds", "s/image", "× naive", "× limit", "bound by", "peak MiB")


# --- the machine ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ceilings:
    """What the machine does at best: bytes read per second, and operations per second of matrix products in one dtype."""

    read: float
    products: float

    def limit(self, work: "Work") -> tuple[float, str]:
        """Seconds that `work` takes at least, and which ceiling says so."""
        by_bytes, by_products = work.bytes / self.read, work.operations / self.products
        return (by_bytes, "bytes") if by_bytes > by_products else (by_products, "products")


def measure_ceilings(device: torch.device, dtype: torch.dtype, repeats: int = 5) -> Ceilings:
    """Measure both, each at the best of several sizes and repeats."""
    data = torch.ones(READ_BYTES // 4, device=device)
    read = READ_BYTES / min(_seconds(data.sum, device) for _ in range(repeats))
    del data
    best = 0.0
    for side in PRODUCT_SIDES:
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        best = max(best, *(2 * side**3 / _seconds(lambda a=a, b=b: a @ b, device) for _ in range(repeats)))  # type: ignore[misc]
    return Ceilings(read, best)


def _seconds(function: Callable[[], object], device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    function()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class PeakMemory:
    """The most memory that was held since this was made: the GPU's own count, or on Linux the process's resident memory."""

    STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")

    def __init__(self, device: torch.device) -> None:
        self.device, self.known = device, True
        gc.collect()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            try:
                self.RESET.write_text("5")
            except OSError:
                self.known = False

    def mebibytes(self) -> float | None:
        """`None` where it can't be told."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**20
        if not self.known or not (match := re.search(r"VmHWM:\s*(\d+) kB", self.STATUS.read_text())):
            return None
        return int(match[1]) / 2**10


# --- the work ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """Bytes that must be read and operations that must be done."""

    bytes: float = 0.0
    operations: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.bytes + other.bytes, self.operations + other.operations)


def layers_work(matrices: nn.Module, width: int, depth: int, rows: int, queries: int, keys: int, itemsize: int) -> Work:
    """One pass of `rows` sequences of `queries` positions that see `keys` positions through the matrices of a transformer.

    Every matrix is read once and every cached key and value once; products are two operations a weight and position.
    """
    weights = sum(m.weight.numel() for m in matrices.modules() if isinstance(m, nn.Linear))
    cached = 2 * rows * (keys - queries) * width * depth
    attention = 4 * rows * queries * keys * width * depth
    return Work((weights + cached) * itemsize, 2.0 * weights * rows * queries + attention)


def generation_work(gpt: DetailFlowGPT, batch: int, guided: bool, num_tokens: int | None = None) -> Work:
    """All steps of `batch` images' tokens, with the cache."""
    config, itemsize = gpt.config, gpt.head.weight.itemsize
    n = gpt.schedule.check_count(num_tokens)
    steps = [step for step in gpt.schedule.steps if step[0] < n]
    return sum(
        (layers_work(gpt, config.width, config.depth, batch * (1 + guided), end - start, end, itemsize) for start, end in steps),
        Work(),
    )


def decoding_work(tokenizer: DetailFlowTokenizer, batch: int, num_tokens: int | None = None) -> Work:
    """`batch` images at side D(n) from their first n tokens."""
    config, schedule = tokenizer.config, tokenizer.schedule
    n = schedule.check_count(num_tokens)
    length = n + (schedule.decode_size(n) // config.patch_size) ** 2
    vit = config.decoder
    return layers_work(tokenizer.decoder, vit.width, vit.depth, batch, length, length, tokenizer.decoder.mask_token.itemsize)


def encoding_work(tokenizer: DetailFlowTokenizer, batch: int) -> Work:
    """All tokens of `batch` images of side R."""
    config = tokenizer.config
    length = config.num_tokens + (config.image_size // config.patch_size) ** 2
    vit = config.encoder
    return layers_work(tokenizer.encoder, vit.width, vit.depth, batch, length, length, tokenizer.decoder.mask_token.itemsize)


class RecomputingGPT:
    """A generation that keeps nothing: every step computes all positions so far again, as the published loop does."""

    def __init__(self, model: DetailFlowGPT, class_ids: Tensor, guided: bool) -> None:
        if guided:
            class_ids = torch.cat((class_ids, torch.full_like(class_ids, model.config.num_classes)))
        self.model, self.class_ids, self.guided = model, class_ids, guided

    @torch.inference_mode()
    def step(self, tokens: Tensor, start: int, end: int) -> Tensor:
        """(B, N) tokens, known before `start` → logits (B or 2B, end − start, K)."""
        if self.guided:
            tokens = tokens.repeat(2, 1)
        return self.model.logits_until(self.class_ids, tokens, end)[:, start:end]


def generate_naively(pipeline: DetailFlowPipeline, class_ids: Sequence[int], seed: int = 0) -> Tensor:
    """(B, 3, R, R) pixels of the images that the pipeline makes of the same classes and seed, without a cache."""
    gpt, ids = pipeline.gpt, torch.tensor(list(class_ids), device=pipeline.gpt.device)
    sampling = gpt.config.sampling
    noise = generation.image_noise([image_generator(seed, i) for i in range(len(ids))], gpt.config.num_tokens)
    model = RecomputingGPT(gpt, ids, sampling.guided)
    *_, tokens = generation.generate(model, gpt.schedule, sampling, noise, gpt.config.num_tokens, gpt.device)
    return pipeline.tokenizer.decode(tokens)


def generate_cached(pipeline: DetailFlowPipeline, class_ids: Sequence[int], seed: int = 0) -> Tensor:
    """(B, 3, R, R) pixels, by the engine."""
    generators = [image_generator(seed, i) for i in range(len(class_ids))]
    return pipeline.tokenizer.decode(pipeline.gpt.generate(torch.tensor(list(class_ids)), generator=generators))


def stream_cached(pipeline: DetailFlowPipeline, class_ids: Sequence[int], seed: int = 0) -> list[Tensor]:
    """The same, with a preview after every decoding step: pixels of side D(n) for every valid n."""
    generators = [image_generator(seed, i) for i in range(len(class_ids))]
    gpt = pipeline.gpt
    steps = gpt.stream(torch.tensor(list(class_ids)), gpt.config.sampling, generators)
    return [pipeline.tokenizer.decode(tokens) for tokens in steps]


# --- models --------------------------------------------------------------------------------------------------------------


def random_pipeline(name: str, device: torch.device, dtype: torch.dtype) -> DetailFlowPipeline:
    """A published pair's sizes with random weights, which take as long as the real ones (method §1, §3, §6).

    Raises:
        DetailFlowError: for a name that is not in the zoo.
    """
    if name not in ZOO:
        raise DetailFlowError(f"--random-weights is for {', '.join(ZOO)}, not {name}")
    n, scale = ZOO[name].num_tokens, ZOO[name].guidance_scale
    encoder, decoder = ViTConfig(width=1152, depth=12, heads=16, mlp=4304), ViTConfig(width=768, depth=12, heads=12)
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        with device:
            tokenizer = DetailFlowTokenizer(TokenizerConfig(encoder=encoder, decoder=decoder, num_tokens=n))
            gpt = DetailFlowGPT(GPTConfig(num_classes=1000, num_tokens=n, guidance_scale=scale))
    finally:
        torch.set_default_dtype(default)
    return DetailFlowPipeline(tokenizer.eval(), gpt.eval())


def load_pipeline(model: str | None, random_weights: bool, device: torch.device, dtype: torch.dtype) -> DetailFlowPipeline:
    """The pipeline to time.

    Raises:
        DetailFlowError: where it can't be had.
    """
    if random_weights:
        return random_pipeline(model or next(iter(ZOO)), device, dtype)
    return DetailFlowPipeline.from_pretrained(model, device, dtype)


# --- the table -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One measurement: `images` at once in `seconds`, its ratio to the naive loop's and to the limit (`None`: has none)."""

    what: str
    dtype: str
    images: int
    seconds: float
    naive_ratio: float | None = None
    limit_ratio: float | None = None
    bound: str | None = None
    peak_mib: float | None = None

    def cells(self) -> list[str]:
        """As a line of the table."""
        return [
            self.what,
            self.dtype,
            str(self.images),
            _short(self.seconds),
            _short(self.seconds / self.images),
            "" if self.naive_ratio is None else f"{self.naive_ratio:.2f}",
            "" if self.limit_ratio is None else f"{self.limit_ratio:.2f}",
            self.bound or "",
            "" if self.peak_mib is None else f"{self.peak_mib:.0f}",
        ]


@dataclass(frozen=True)
class Report:
    """All measurements of one run, and what they were made of."""

    machine: str
    model: str
    ceilings: dict[str, Ceilings]
    rows: list[Row]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"torch": torch.__version__, "threads": torch.get_num_threads(), **asdict(self)}

    def __str__(self) -> str:
        lines = [f"{self.machine}, torch {torch.__version__}, {torch.get_num_threads()} threads", self.model]
        lines += [
            f"ceilings, {dtype}: {c.read / 1e9:.1f} GB/s read, {c.products / 1e9:,.0f} GFLOP/s in matrix products"
            for dtype, c in self.ceilings.items()
        ]
        cells = [list(COLUMNS), *(row.cells() for row in self.rows)]
        widths = [max(len(line[i]) for line in cells) for i in range(len(COLUMNS))]
        table = [
            "  ".join(c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))).rstrip()
            for line in cells
        ]
        return "\n".join([*lines, "", *table])


def benchmark(
    model: str | None,
    batch_sizes: Sequence[int],
    dtypes: Sequence[str],
    device: str | None = None,
    random_weights: bool = False,
    compile: bool = False,
    naive: bool = True,
    repeats: int = 3,
    other: Images | None = None,
    progress: Callable[[str], object] = lambda what: None,
) -> Report:
    """Time everything; what is compared takes turns, and the best of `repeats` counts.

    Args:
        compile: time the compiled engine too, which takes minutes to compile on a CPU.
        naive: time the loop without a cache too.
        other: another implementation to time beside ours.
        progress: called with the name of what comes next.

    Raises:
        DetailFlowError: where the model can't be had or the device can't be used.
    """
    place, ceilings, rows, text = choose_device(device), {}, [], ""
    for name in dtypes:
        dtype = getattr(torch, name)
        progress(f"ceilings, {name}")
        ceilings[name] = measure_ceilings(place, dtype)
        pipeline = load_pipeline(model, random_weights, place, dtype)
        text = describe(pipeline, model, random_weights)
        for batch in batch_sizes:
            for row in _rows(pipeline, batch, name, ceilings[name], place, compile, naive, repeats, other, progress):
                rows.append(row)
        del pipeline
    return Report(machine_name(place), text, ceilings, rows)


def _rows(
    pipeline: DetailFlowPipeline,
    batch: int,
    dtype: str,
    ceilings: Ceilings,
    device: torch.device,
    compile: bool,
    naive: bool,
    repeats: int,
    other: Images | None,
    progress: Callable[[str], object],
) -> Iterator[Row]:
    gpt, tokenizer = pipeline.gpt, pipeline.tokenizer
    class_ids = [i % gpt.config.num_classes for i in range(batch)]
    whole = generation_work(gpt, batch, gpt.config.sampling.guided) + decoding_work(tokenizer, batch)
    codes = torch.zeros(batch, gpt.config.num_tokens, dtype=torch.int64, device=device)
    side = tokenizer.config.image_size
    images = torch.zeros(batch, 3, side, side, dtype=gpt.head.weight.dtype, device=device)
    previews = sum((decoding_work(tokenizer, batch, n) for n in tokenizer.schedule.valid_counts[:-1]), Work())
    contenders: dict[str, tuple[Callable[[], object], Work | None]] = {}
    if naive:
        contenders["naive"] = (lambda: generate_naively(pipeline, class_ids), whole)
    contenders["generate"] = (lambda: generate_cached(pipeline, class_ids), whole)
    contenders["stream"] = (lambda: stream_cached(pipeline, class_ids), whole + previews)
    if other is not None:
        contenders["other"] = (lambda: other(class_ids), None)
    contenders["decode"] = (lambda: tokenizer.decode(codes), decoding_work(tokenizer, batch))
    contenders["encode"] = (lambda: tokenizer.encode(images), encoding_work(tokenizer, batch))
    seconds, peaks = race({what: run for what, (run, _) in contenders.items()}, device, repeats, f"{batch} × {dtype}", progress)
    if compile:
        pipeline.compile(batch)
        compiled: dict[str, tuple[Callable[[], object], Work | None]] = {
            "generate, compiled": contenders["generate"],
            "decode, compiled": contenders["decode"],
        }
        runs = {what: run for what, (run, _) in compiled.items()}
        more = race(runs, device, repeats, f"{batch} × {dtype}", progress)
        seconds, peaks, contenders = seconds | more[0], peaks | more[1], contenders | compiled
    for what, (_, work) in contenders.items():
        limit, bound = (None, None) if work is None else ceilings.limit(work)
        whole_image = what in ("naive", "generate", "generate, compiled", "stream", "other")
        yield Row(
            what,
            dtype,
            batch,
            seconds[what],
            seconds[what] / seconds["naive"] if naive and whole_image else None,
            None if limit is None else seconds[what] / limit,
            bound,
            peaks[what],
        )


def race(
    runs: dict[str, Callable[[], object]],
    device: torch.device,
    repeats: int,
    label: str = "",
    progress: Callable[[str], object] = lambda what: None,
) -> tuple[dict[str, float], dict[str, float | None]]:
    """Seconds of each, the best of `repeats` after one that does not count, in turns; and each one's peak memory."""
    seconds = dict.fromkeys(runs, math.inf)
    peaks: dict[str, float | None] = {}
    for what, run in runs.items():
        progress(f"{what}, {label}")
        memory = PeakMemory(device)
        run()
        peaks[what] = memory.mebibytes()
    for _ in range(repeats):
        for what, run in runs.items():
            progress(f"{what}, {label}")
            seconds[what] = min(seconds[what], _seconds(run, device))
    return seconds, peaks


def describe(pipeline: DetailFlowPipeline, model: str | None, random_weights: bool) -> str:
    """The model in a line."""
    gpt, tokenizer = pipeline.gpt, pipeline.tokenizer
    millions = [sum(p.numel() for p in part.parameters()) / 1e6 for part in (gpt, tokenizer.encoder, tokenizer.decoder)]
    schedule: TokenSchedule = tokenizer.schedule
    return (
        f"{model or ('the first of the zoo' if random_weights else 'the shipped model')}"
        f"{', random weights' if random_weights else ''}: AR model {millions[0]:.1f}M, encoder {millions[1]:.1f}M, decoder "
        f"{millions[2]:.1f}M parameters; {tokenizer.config.image_size}×{tokenizer.config.image_size} pixels, N = "
        f"{gpt.config.num_tokens}, {len(schedule.steps)} steps, guidance {gpt.config.guidance_scale:g}"
    )


def machine_name(device: torch.device) -> str:
    """The GPU's or the processor's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with suppress(OSError):
        if match := re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text()):
            return match[1].strip()
    return platform.processor() or platform.machine()


def _short(seconds: float) -> str:
    return f"{seconds:.3g}" if seconds >= 0.001 else f"{seconds:.2e}"


def other_implementation(text: str) -> Images:
    """The callable of `FILE.py:NAME`, which takes a list of class ids and returns their images.

    Raises:
        DetailFlowError: where there is none.
    """
    from importlib.util import module_from_spec, spec_from_file_location

    file, _, name = text.rpartition(":")
    if not file or not name:
        raise DetailFlowError(f"--other must be FILE.py:FUNCTION, not {text}")
    spec = spec_from_file_location("detailflow_other", file) if Path(file).is_file() else None
    if spec is None or spec.loader is None:
        raise DetailFlowError(f"--other {text}: there is no Python file {file}")
    module = module_from_spec(spec)
    sys.path.insert(0, str(Path(file).resolve().parent))
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever somebody else's code raises
        raise DetailFlowError(f"--other {text}: {file} can't be imported: {error}") from error
    found = getattr(module, name, None)
    if not callable(found):
        raise DetailFlowError(f"--other {text}: {file} has no function {name}")
    return found
