"""Time a model on this machine, compared with a loop without a KV cache and with its limits (docs/speed.md)."""

import copy
import gc
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from functools import partial, reduce
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from detailflow import native
from detailflow.device import choose_device, within_memory
from detailflow.errors import DetailFlowError
from detailflow.generation import (
    Engine,
    TorchEngine,
    generate,
    image_generator,
    image_noise,
    with_null_class,
)
from detailflow.hub import ZOO
from detailflow.machine import (
    Ceilings,
    Cost,
    count_cost,
    device_name,
    measure_ceilings,
    seconds_and_peak,
    uses_processor_time,
)
from detailflow.models import layers
from detailflow.models.gpt import ENGINES, DetailFlowGPT, EngineUsed, GPTConfig
from detailflow.models.layers import ViTConfig
from detailflow.models.tokenizer import DetailFlowTokenizer, TokenizerConfig
from detailflow.native import blocks as native_blocks
from detailflow.pipeline import DetailFlowPipeline
from detailflow.sampling import EngineName
from detailflow.words import several

FIRST = next(iter(ZOO))
Begin = Callable[[DetailFlowGPT, Tensor, bool], Engine]  # an engine
Progress = Callable[[str], object]  # called with the name of what comes next


@dataclass(frozen=True)
class BenchmarkConfig:
    """What to time; `detailflow bench --help` says what each setting is, and its default."""

    model: str | None
    tokenizer: str | None
    random_weights: bool
    batch_sizes: Sequence[int]
    dtypes: Sequence[str]
    device: str | None
    compile: bool
    naive: bool
    repeats: int
    other: str | None
    engine: EngineName


class UncachedEngine(Engine):
    """Generation without a KV cache: every step computes all positions so far again, and the logits of the new ones."""

    def __init__(self, model: DetailFlowGPT, class_ids: Tensor, guided: bool) -> None:
        self.model, self.guided = model, guided
        self.class_ids = with_null_class(class_ids, model.config.num_classes) if guided else class_ids
        self.rotation, self.mask = model.tables()

    @torch.inference_mode()
    def step(self, tokens: Tensor, start: int, end: int) -> Tensor:
        """(B, N) tokens, known before `start` → logits (B or 2B, end − start, K)."""
        if self.guided:
            tokens = tokens.repeat(2, 1)
        x = self.model.inputs(self.class_ids, tokens, 0, end)
        for block in self.model.blocks:
            x = block(x, self.rotation[:end], self.mask[:end, :end])
        return self.model.head(self.model.norm(x[:, start:]))


def stream(
    gpt: DetailFlowGPT, class_ids: Sequence[int], seed: int = 0, engine: Begin = TorchEngine
) -> Iterator[Tensor]:
    """Yield the tokens (B, n) after each decoding step, with the KV cache or another engine."""
    ids, n, sampling = torch.tensor(class_ids, device=gpt.device), gpt.config.num_tokens, gpt.config.sampling
    noise = image_noise([image_generator(seed, i) for i in range(len(ids))], n)
    return generate(engine(gpt, ids, sampling.guided), gpt.schedule, sampling, noise, n, gpt.device)


def engines(gpt: DetailFlowGPT) -> dict[str, Begin]:
    """Return PyTorch's engine and the one that would be used here, by name."""
    names: tuple[EngineUsed, ...] = ("torch", gpt.engine_used)
    return {name: ENGINES[name] for name in names}


def generation_costs(gpt: DetailFlowGPT, batch: int) -> list[Cost]:
    """Count each decoding step's operations, and its bytes of weights and of earlier keys and values."""
    config, tokens = gpt.config, stream(gpt, [0] * batch)
    per_token = 2 * batch * (1 + config.sampling.guided) * config.width * config.depth * gpt.head.weight.itemsize
    costs = [(start, count_cost(lambda: next(tokens), gpt)) for start, _ in gpt.schedule.steps]
    return [Cost(step.bytes + start * per_token, step.flops) for start, step in costs]


def by_pytorch(tokenizer: DetailFlowTokenizer) -> DetailFlowTokenizer:
    """Return the same networks, run by PyTorch alone, which can count and be compared with."""
    result = copy.copy(tokenizer)
    result.engine = "torch"
    return result


def codecs(tokenizer: DetailFlowTokenizer, blocks: nn.ModuleList) -> dict[str, DetailFlowTokenizer]:
    """Return the tokenizer by what follows the name of a row: by PyTorch and by the native engine if it runs these."""
    weight = next(blocks.parameters())
    with torch.no_grad():
        runs = native_blocks.can_run(blocks, weight.new_zeros(1, 1, len(weight)), layers.__name__)
    if tokenizer.uses_native and runs:
        return {", torch": by_pytorch(tokenizer), ", native": tokenizer}
    return {"": tokenizer}


def decoding_cost(tokenizer: DetailFlowTokenizer, codes: Tensor) -> Cost:
    """Count decoding (B, n) codes at side D(n)."""
    counted = by_pytorch(tokenizer)
    return count_cost(lambda: counted.decode(codes), tokenizer.decoder)


def encoding_cost(tokenizer: DetailFlowTokenizer, images: Tensor) -> Cost:
    """Count encoding (B, 3, R, R) images."""
    encoder, counted = tokenizer.encoder, by_pytorch(tokenizer)
    return count_cost(lambda: counted.encode(images), encoder.blocks, encoder.patch_embed, tokenizer.quantizer.project)


@dataclass(frozen=True)
class Case:
    """A function to time, what it costs at least (None if unknown), and whether it generates whole images."""

    run: Callable[[], object]
    costs: Sequence[Cost] | None = None
    generates: bool = False


def make_cases(
    pipeline: DetailFlowPipeline, batch: int, config: BenchmarkConfig, other: Callable[..., object] | None
) -> dict[str, Case]:
    """Return everything that is timed for `batch` images at once, by name."""
    gpt, tokenizer = pipeline.gpt, pipeline.tokenizer
    class_ids = [i % gpt.config.num_labels for i in range(batch)]
    side, like = tokenizer.config.image_size, tokenizer.decoder.mask_token
    codes = torch.zeros(batch, gpt.config.num_tokens, dtype=torch.int64, device=like.device)
    images = torch.zeros(batch, 3, side, side, dtype=like.dtype, device=like.device)

    plain = by_pytorch(tokenizer)

    def images_of(engine: Begin, codec: DetailFlowTokenizer = plain, model: DetailFlowGPT = gpt) -> Tensor:
        *_, tokens = stream(model, class_ids, engine=engine)
        return codec.decode(tokens)

    def stages_of(engine: Begin, codec: DetailFlowTokenizer) -> list[Tensor]:
        return [codec.decode(tokens) for tokens in stream(gpt, class_ids, engine=engine)]

    def codec_of(engine: str) -> DetailFlowTokenizer:
        return plain if engine == "torch" else tokenizer

    *previews, decoding = (decoding_cost(tokenizer, codes[:, :n]) for n in tokenizer.schedule.valid_counts)
    whole = [*generation_costs(gpt, batch), decoding]
    cases = {"naive": Case(lambda: images_of(UncachedEngine), whole, generates=True)} if config.naive else {}
    for name, engine in engines(gpt).items():
        cases[f"generate, {name}"] = Case(partial(images_of, engine, codec_of(name)), whole, generates=True)
    if config.compile:
        fast = DetailFlowPipeline(copy.copy(tokenizer), copy.copy(gpt))  # the same weights
        fast.compile(batch)
        cases["generate, compiled"] = Case(
            lambda: images_of(TorchEngine, fast.tokenizer, fast.gpt), whole, generates=True
        )
        cases["decode, compiled"] = Case(lambda: fast.tokenizer.decode(codes), [decoding])
    if other:
        cases["other"] = Case(lambda: other(class_ids), generates=True)
    used = gpt.engine_used
    cases[f"stream, {used}"] = Case(partial(stages_of, ENGINES[used], codec_of(used)), whole + previews)
    encoding = encoding_cost(tokenizer, images)
    for name, codec in codecs(tokenizer, tokenizer.decoder.blocks).items():
        cases[f"decode{name}"] = Case(partial(codec.decode, codes), [decoding])
    for name, codec in codecs(tokenizer, tokenizer.encoder.blocks).items():
        cases[f"encode{name}"] = Case(partial(codec.encode, images), [encoding])
    return cases


def load_other(text: str) -> Callable[[list[int]], object]:
    """Load FILE.py:FUNCTION, a function from class ids to their images."""
    file, _, name = text.rpartition(":")
    if not file or not name:
        raise DetailFlowError(f"--other must be FILE.py:FUNCTION, not {text}")
    spec = spec_from_file_location("detailflow_other", file) if Path(file).is_file() else None
    if spec is None or spec.loader is None:
        raise DetailFlowError(f"--other {text}: there is no Python file {file}")

    def guarded(function: Callable[[Any], object], argument: object) -> object:
        try:
            return function(argument)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # whatever foreign code raises, sys.exit included
            raise DetailFlowError(f"--other {text} failed: {type(error).__name__}: {error}") from error

    module = sys.modules[spec.name] = module_from_spec(spec)
    sys.path.append(str(Path(file).resolve().parent))  # for what it imports from its own folder
    guarded(spec.loader.exec_module, module)
    if not callable(getattr(module, name, None)):
        raise DetailFlowError(f"--other {text}: {file} has no function {name}")
    return lambda class_ids: guarded(getattr(module, name), list(class_ids))  # a copy: foreign code may change the list


def random_pipeline(name: str, device: torch.device, dtype: torch.dtype) -> DetailFlowPipeline:
    """Return a published model's networks with random weights, which take as long as the real ones."""
    if name not in ZOO:
        raise DetailFlowError(f"--random-weights is for {', '.join(ZOO)}, not {name}")
    n, scale = ZOO[name].num_tokens, ZOO[name].guidance_scale
    encoder, decoder = ViTConfig(width=1152, depth=12, heads=16, mlp=4304), ViTConfig(width=768, depth=12, heads=12)
    with device:
        tokenizer = DetailFlowTokenizer(TokenizerConfig(encoder=encoder, decoder=decoder, num_tokens=n))
        gpt = DetailFlowGPT(GPTConfig(num_classes=1000, num_tokens=n, guidance_scale=scale))
    return DetailFlowPipeline(tokenizer.to(dtype).eval(), gpt.to(dtype).eval())


def describe(pipeline: DetailFlowPipeline, config: BenchmarkConfig) -> str:
    """Return the model's sizes in a line."""
    gpt, tokenizer = pipeline.gpt, pipeline.tokenizer
    parts = {"AR model": gpt, "encoder": tokenizer.encoder, "decoder": tokenizer.decoder}
    sizes = [f"{name} {sum(p.numel() for p in part.parameters()) / 1e6:.1f}M" for name, part in parts.items()]
    name = (
        f"{config.model or FIRST} with random weights" if config.random_weights else config.model or "the shipped model"
    )
    side = tokenizer.config.image_size
    return (
        f"{name}: {', '.join(sizes)} parameters; {side}×{side} pixels, N = {gpt.config.num_tokens}, "
        f"{len(gpt.schedule.steps)} steps, guidance {gpt.config.guidance_scale:g}"
    )


@dataclass(frozen=True)
class Times:
    """The seconds of a case in each round, and its peak memory in MiB (None if unknown)."""

    seconds: list[float]
    peak: float | None


@dataclass(frozen=True)
class Row:
    """One measurement, with its ratios to the naive loop and to the limit (None if there is none).

    `seconds` is the median of all rounds, `naive_ratio` that of the ratios within each round.
    """

    what: str
    dtype: str
    images: int
    seconds: float
    fastest: float
    slowest: float
    seconds_per_image: float
    naive_ratio: float | None
    limit_ratio: float | None
    bound: str | None
    peak_mib: float | None

    def cells(self) -> list[str]:
        """Return the cells of the table's row."""
        formats = ("", "", "", ".3g", ".3g", ".3g", ".3g", ".2f", ".2f", "", ".0f")
        return ["" if value is None else format(value, f) for value, f in zip(astuple(self), formats, strict=True)]


HEADER = ["what", "dtype", "images", "median s", "fastest", "slowest", "s/image", "× naive", "× limit"]


@dataclass(frozen=True)
class Report:
    """All measurements of one run.

    `native` says which instructions the native engine uses, or why it cannot be built; None on a GPU.
    """

    machine: str
    torch: str
    threads: int
    clock: str
    native: str | None
    model: str
    ceilings: dict[str, Ceilings]
    rows: list[Row]

    def __str__(self) -> str:
        cells = [[*HEADER, "bound by", "peak MiB"], *(row.cells() for row in self.rows)]
        threads = f"{several(self.threads, 'thread')}, {self.clock}"
        lines = [f"{self.machine}, torch {self.torch}, {threads}", self.model]
        lines += [f"native engine: {self.native}"] if self.native else []
        lines += [f"ceilings, {dtype}: {ceilings}" for dtype, ceilings in self.ceilings.items()]
        return "\n".join([*lines, "", *aligned(cells)])


def aligned(cells: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table whose first two columns are words and whose others are numbers."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    align = [str.ljust, str.ljust, *[str.rjust] * (len(widths) - 2)]
    return ["  ".join(f(c, w) for f, c, w in zip(align, row, widths, strict=True)).rstrip() for row in cells]


def benchmark(
    config: BenchmarkConfig, progress: Progress = lambda what: None, measured: Progress = lambda line: None
) -> Report:
    """Time everything; what is compared takes turns.

    Args:
        measured: called with a line on each median as soon as it is known.
    """
    device = choose_device(config.device)
    other = load_other(config.other) if config.other else None
    ceilings: dict[str, Ceilings] = {}
    rows: list[Row] = []
    model = ""
    for dtype in dict.fromkeys(config.dtypes):
        gc.collect()
        pipeline = load(config, device, dtype)
        model = describe(pipeline, config)
        progress(f"ceilings, {dtype}")
        before = best_ceilings(device, getattr(torch, dtype))
        found = {}
        for batch in dict.fromkeys(config.batch_sizes):
            label = f"{batch} × {dtype}"
            progress(f"counting operations, {label}")
            with within_memory(f"{label}: this", "give smaller batch sizes"):
                cases = make_cases(pipeline, batch, config, other)
            found[batch] = cases, (times := time_in_turns(cases, device, config.repeats, label, progress))
            for what, taken in times.items():
                measured(f"{what}, {label}: {median(taken.seconds):.3g} s")
            if config.compile:
                torch.compiler.reset()  # programs for many sizes would pass the compiler's limit, and run uncompiled
        ceilings[dtype] = before.best(best_ceilings(device, getattr(torch, dtype)))
        for batch, (cases, times) in found.items():
            rows += make_rows(cases, times, ceilings[dtype], dtype, batch)
        del pipeline, cases, found
    clock = "processor time" if uses_processor_time(device) else "wall time"
    built = native.instructions() if device.type == "cpu" else None
    return Report(device_name(device), torch.__version__, torch.get_num_threads(), clock, built, model, ceilings, rows)


def best_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Measure the ceilings, on a CPU in all ways that are known.

    Some multiply numbers of fewer bits faster by way of float32, and PyTorch's products are not the fastest everywhere.
    """
    if device.type != "cpu":
        return measure_ceilings(device, dtype)
    kinds = [dtype, torch.float32] if dtype in (torch.bfloat16, torch.float16) else [dtype]
    measured = [measure_ceilings(device, kind) for kind in kinds]
    if not isinstance(native.library(), str):
        measured += [measure_ceilings(device, kind, native.product) for kind in kinds if kind in native.TYPES]
    return reduce(Ceilings.best, measured)


def load(config: BenchmarkConfig, device: torch.device, dtype: str) -> DetailFlowPipeline:
    """Load the model to time, or make one of its sizes."""
    if config.random_weights:
        pipeline = random_pipeline(config.model or FIRST, device, getattr(torch, dtype))
    else:
        pipeline = DetailFlowPipeline.from_pretrained(
            config.model, device=device, dtype=dtype, tokenizer=config.tokenizer
        )
    pipeline.gpt.engine = pipeline.tokenizer.engine = config.engine
    return pipeline


def make_rows(
    cases: Mapping[str, Case], times: Mapping[str, Times], ceilings: Ceilings, dtype: str, batch: int
) -> Iterator[Row]:
    """Return the table's rows for one dtype and batch size."""
    for what, case in cases.items():
        taken = times[what].seconds
        middle, naive, limit, bound = median(taken), None, None, None
        if case.generates and "naive" in times:
            naive = median(a / b for a, b in zip(taken, times["naive"].seconds, strict=True))
        if case.costs:
            limit, bound = ceilings.limit(case.costs)
        kind = dtype if case.costs else "its own"
        ratios = naive, limit and middle / limit, bound
        yield Row(what, kind, batch, middle, min(taken), max(taken), middle / batch, *ratios, times[what].peak)


def time_in_turns(
    cases: Mapping[str, Case],
    device: torch.device,
    repeats: int,
    label: str = "",
    progress: Progress = lambda what: None,
) -> dict[str, Times]:
    """Time each case once in each of `repeats` rounds, after one for warm-up."""
    times = {what: Times([], None) for what in cases}
    for repeat in range(repeats + 1):
        for what, case in cases.items():
            progress(f"{what}, {label}, {f'round {repeat} of {repeats}' if repeat else 'warming up'}")
            with within_memory(f"{what}, {label}: this", "give smaller batch sizes"):
                taken, peak = seconds_and_peak(case.run, device)
            if repeat:
                times[what] = Times([*times[what].seconds, taken], peak)
    return times
