"""How fast a model is on this machine: against a loop without a cache, and against what the machine can do at best."""

import gc
import math
import platform
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from detailflow import generation
from detailflow.device import choose_device, within_memory
from detailflow.errors import DetailFlowError
from detailflow.generation import with_null_class
from detailflow.hub import ZOO
from detailflow.machine import (
    Ceilings,
    PeakMemory,
    Work,
    decoding_work,
    encoding_work,
    generation_work,
    measure_ceilings,
    seconds,
)
from detailflow.models.gpt import DetailFlowGPT, GPTConfig
from detailflow.models.layers import ViTConfig
from detailflow.models.tokenizer import DetailFlowTokenizer, TokenizerConfig
from detailflow.pipeline import DetailFlowPipeline, image_generator

Images = Callable[[list[int]], object]  # class ids → images, in whatever form

FIRST = next(iter(ZOO))
COLUMNS = ("what", "dtype", "images", "seconds", "s/image", "× naive", "× limit", "bound by", "peak MiB")


# --- what is timed -------------------------------------------------------------------------------------------------------


class RecomputingGPT:
    """A generation that keeps nothing: every step computes all positions so far again, and the logits of the new ones."""

    def __init__(self, model: DetailFlowGPT, class_ids: Tensor, guided: bool) -> None:
        self.model, self.guided = model, guided
        self.class_ids = with_null_class(class_ids, model.config.num_classes) if guided else class_ids
        self.rotation = model.rotary_table().to(model.device)
        self.mask = model.schedule.attention_mask(model.config.num_tokens, model.device)

    @torch.inference_mode()
    def step(self, tokens: Tensor, start: int, end: int) -> Tensor:
        """(B, N) tokens, known before `start` → logits (B or 2B, end − start, K)."""
        if self.guided:
            tokens = tokens.repeat(2, 1)
        x = self.model.inputs(self.class_ids, tokens, 0, end)
        for block in self.model.blocks:
            x = block(x, self.rotation[:end], self.mask[:end, :end])
        return self.model.head(self.model.norm(x[:, start:]))


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
    *_, tokens = _steps(pipeline, class_ids, seed)
    return pipeline.tokenizer.decode(tokens)


def stream_cached(pipeline: DetailFlowPipeline, class_ids: Sequence[int], seed: int = 0) -> list[Tensor]:
    """The same, with a preview after every decoding step: pixels of side D(n) for every valid n."""
    return [pipeline.tokenizer.decode(tokens) for tokens in _steps(pipeline, class_ids, seed)]


def _steps(pipeline: DetailFlowPipeline, class_ids: Sequence[int], seed: int) -> Iterator[Tensor]:
    """The engine's codes after each decoding step."""
    generators = [image_generator(seed, i) for i in range(len(class_ids))]
    return pipeline.gpt.stream(torch.tensor(list(class_ids)), pipeline.gpt.config.sampling, generators)


# --- models --------------------------------------------------------------------------------------------------------------


def random_pipeline(name: str, device: torch.device, dtype: torch.dtype) -> DetailFlowPipeline:
    """Make a published pair's networks with random weights, which take as long as the real ones (docs/method.md).

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


def load_pipeline(
    model: str | None, tokenizer: str | None, random_weights: bool, device: torch.device, dtype: torch.dtype
) -> DetailFlowPipeline:
    """The pipeline to time.

    Raises:
        DetailFlowError: where it cannot be had.
    """
    if random_weights:
        return random_pipeline(model or FIRST, device, dtype)
    return DetailFlowPipeline.from_pretrained(model, device=device, dtype=dtype, tokenizer=tokenizer)


# --- the table -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contender:
    """Something to time: the work that it cannot do without (`None`: not known), and whether it makes whole images."""

    run: Callable[[], object]
    work: list[Work] | None
    images: bool = False


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
            "  ".join(
                c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in cells
        ]
        return "\n".join([*lines, "", *table])


def benchmark(
    model: str | None,
    batch_sizes: Sequence[int],
    dtypes: Sequence[str],
    device: str | None = None,
    tokenizer: str | None = None,
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
        DetailFlowError: where the model cannot be had, the device cannot be used or the images do not fit in memory.
    """
    place, ceilings, rows, text = choose_device(device), {}, [], ""
    for dtype in dict.fromkeys(dtypes):
        gc.collect()
        pipeline = load_pipeline(model, tokenizer, random_weights, place, getattr(torch, dtype))
        text = describe(pipeline, model, random_weights)
        progress(f"ceilings, {dtype}")
        ceilings[dtype] = measure_ceilings(place, getattr(torch, dtype))
        for batch in dict.fromkeys(batch_sizes):
            label = f"{batch} × {dtype}"
            contenders = contenders_of(pipeline, batch, naive, other)
            measured = race(contenders, place, repeats, label, progress)
            if compile:
                pipeline.compile(batch)
                fast = {f"{what}, compiled": contenders[what] for what in ("generate", "decode")}
                contenders, measured = contenders | fast, measured | race(fast, place, repeats, label, progress)
                torch.compiler.reset()  # or the programs of many sizes would pass the compiler's limit, and run uncompiled
            for what, contender in contenders.items():
                rows.append(row_of(what, contender, dtype, batch, measured, ceilings[dtype]))
        del pipeline, contenders
    return Report(machine_name(place), text, ceilings, rows)


def contenders_of(pipeline: DetailFlowPipeline, batch: int, naive: bool, other: Images | None) -> dict[str, Contender]:
    """All that is timed for `batch` images at once, by name."""
    gpt, tokenizer = pipeline.gpt, pipeline.tokenizer
    class_ids = [i % gpt.config.num_classes for i in range(batch)]
    side, like = tokenizer.config.image_size, tokenizer.decoder.mask_token
    codes = torch.zeros(batch, gpt.config.num_tokens, dtype=torch.int64, device=like.device)
    images = torch.zeros(batch, 3, side, side, dtype=like.dtype, device=like.device)
    decoding = decoding_work(tokenizer, batch)
    whole = generation_work(gpt, batch, gpt.config.sampling.guided) + decoding
    previews = [work for n in tokenizer.schedule.valid_counts[:-1] for work in decoding_work(tokenizer, batch, n)]
    result = {"naive": Contender(lambda: generate_naively(pipeline, class_ids), whole, images=True)} if naive else {}
    result["generate"] = Contender(lambda: generate_cached(pipeline, class_ids), whole, images=True)
    if other is not None:
        result["other"] = Contender(lambda: other(class_ids), None, images=True)
    result["stream"] = Contender(lambda: stream_cached(pipeline, class_ids), whole + previews)
    result["decode"] = Contender(lambda: tokenizer.decode(codes), decoding)
    result["encode"] = Contender(lambda: tokenizer.encode(images), encoding_work(tokenizer, batch))
    return result


def race(
    contenders: Mapping[str, Contender],
    device: torch.device,
    repeats: int,
    label: str = "",
    progress: Callable[[str], object] = lambda what: None,
) -> dict[str, tuple[float, float | None]]:
    """Seconds of each, the best of `repeats` after one that does not count, in turns; and each one's peak memory in MiB.

    Raises:
        DetailFlowError: where something does not fit in memory.
    """
    best = dict.fromkeys(contenders, math.inf)
    peaks: dict[str, float | None] = {}
    for repeat in range(repeats + 1):
        for what, contender in contenders.items():
            progress(f"{what}, {label}")
            with within_memory(f"{what}, {label}: this", "give smaller batch sizes"):
                memory = PeakMemory(device)
                taken = seconds(contender.run, device)
            if repeat:
                best[what], peaks[what] = min(best[what], taken), memory.mebibytes()
    return {what: (best[what], peaks[what]) for what in contenders}


def row_of(
    what: str,
    contender: Contender,
    dtype: str,
    batch: int,
    measured: Mapping[str, tuple[float, float | None]],
    ceilings: Ceilings,
) -> Row:
    """A line of the table. Another implementation has a dtype of its own, and its least work is not known."""
    time, peak = measured[what]
    naive = measured["naive"][0] if contender.images and "naive" in measured else None
    limit, bound = (None, None) if contender.work is None else ceilings.limit(contender.work)
    return Row(
        what,
        "its own" if contender.work is None else dtype,
        batch,
        time,
        None if naive is None else time / naive,
        None if limit is None else time / limit,
        bound,
        peak,
    )


def describe(pipeline: DetailFlowPipeline, model: str | None, random_weights: bool) -> str:
    """The model in a line."""
    gpt, tokenizer = pipeline.gpt, pipeline.tokenizer
    millions = [sum(p.numel() for p in part.parameters()) / 1e6 for part in (gpt, tokenizer.encoder, tokenizer.decoder)]
    name = f"{model or FIRST} with random weights" if random_weights else model or "the shipped model"
    side = tokenizer.config.image_size
    return (
        f"{name}: AR model {millions[0]:.1f}M, encoder {millions[1]:.1f}M, decoder {millions[2]:.1f}M parameters; {side}×{side} "
        f"pixels, N = {gpt.config.num_tokens}, {len(gpt.schedule.steps)} steps, guidance {gpt.config.guidance_scale:g}"
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
    module = sys.modules[spec.name] = module_from_spec(spec)
    sys.path.append(str(Path(file).resolve().parent))  # for what lies beside it
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever somebody else's code raises, here and below
        raise DetailFlowError(f"--other {text}: {file} cannot be imported: {error}") from error
    found = getattr(module, name, None)
    if not callable(found):
        raise DetailFlowError(f"--other {text}: {file} has no function {name}")

    def run(class_ids: list[int]) -> object:
        try:
            return found(class_ids)
        except Exception as error:
            raise DetailFlowError(f"--other {text} failed: {type(error).__name__}: {error}") from error

    return run
