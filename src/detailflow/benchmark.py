"""Time a model on this machine, compared with a loop without a KV cache and with its limits (docs/speed.md)."""

import gc
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from detailflow import native
from detailflow.device import choose_device, within_memory
from detailflow.errors import DetailFlowError
from detailflow.generation import CachedModel, Engine, generate, image_noise, with_null_class
from detailflow.graphs import GraphedModel
from detailflow.hub import ZOO
from detailflow.machine import Ceilings, Work, count_work, device_name, measure_ceilings, seconds_and_peak
from detailflow.models.gpt import DetailFlowGPT, GPTConfig
from detailflow.models.layers import ViTConfig
from detailflow.models.tokenizer import DetailFlowTokenizer, TokenizerConfig
from detailflow.pipeline import DetailFlowPipeline, image_generator
from detailflow.sampling import EngineName

FIRST = next(iter(ZOO))
Progress = Callable[[str], object]  # called with the name of what comes next


@dataclass(frozen=True)
class BenchmarkConfig:
    """What to time; see `detailflow bench --help`."""

    model: str | None = None
    tokenizer: str | None = None
    random_weights: bool = False
    batch_sizes: Sequence[int] = (1, 8)
    dtypes: Sequence[str] = ("float32", "bfloat16")
    device: str | None = None
    compile: bool = False
    naive: bool = True
    repeats: int = 3
    other: str | None = None
    engine: EngineName = "auto"


class RecomputingGPT(Engine):
    """Generation without a KV cache: every step computes all positions so far again, and the logits of the new ones."""

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

    def prefill(self, tokens: Tensor, end: int) -> Tensor:
        """Return the logits of known tokens."""
        return self.step(tokens, 0, end)


def stream(gpt: DetailFlowGPT, class_ids: Sequence[int], seed: int = 0, engine: type = CachedModel) -> Iterator[Tensor]:
    """Yield the tokens (B, n) after each decoding step, with the KV cache or another engine."""
    ids, n, sampling = torch.tensor(class_ids, device=gpt.device), gpt.config.num_tokens, gpt.config.sampling
    noise = image_noise([image_generator(seed, i) for i in range(len(ids))], n)
    return generate(engine(gpt, ids, sampling.guided), gpt.schedule, sampling, noise, n, gpt.device)


def generation_work(gpt: DetailFlowGPT, batch: int) -> list[Work]:
    """Count each decoding step's operations, and its bytes of weights and of earlier keys and values."""
    config, tokens = gpt.config, stream(gpt, [0] * batch)
    per_token = 2 * batch * (1 + config.sampling.guided) * config.width * config.depth * gpt.head.weight.itemsize
    work = [(start, count_work(lambda: next(tokens), gpt)) for start, _ in gpt.schedule.steps]
    return [Work(step.bytes + start * per_token, step.flops) for start, step in work]


def decoding_work(tokenizer: DetailFlowTokenizer, codes: Tensor) -> Work:
    """Count decoding (B, n) codes at side D(n)."""
    return count_work(lambda: tokenizer.decode(codes), tokenizer.decoder)


def encoding_work(tokenizer: DetailFlowTokenizer, images: Tensor) -> Work:
    """Count encoding (B, 3, R, R) images."""
    encoder = tokenizer.encoder
    return count_work(
        lambda: tokenizer.encode(images), encoder.blocks, encoder.patch_embed, tokenizer.quantizer.project
    )


@dataclass(frozen=True)
class Case:
    """A function to time, the work that it cannot avoid (None if unknown), and whether it generates whole images."""

    run: Callable[[], object]
    work: Sequence[Work] | None = None
    generates: bool = False


def make_cases(
    pipeline: DetailFlowPipeline, batch: int, naive: bool, other: Callable[..., object] | None
) -> dict[str, Case]:
    """Return everything that is timed for `batch` images at once, by name."""
    gpt, tokenizer = pipeline.gpt, pipeline.tokenizer
    class_ids = [i % gpt.config.num_classes for i in range(batch)]
    side, like = tokenizer.config.image_size, tokenizer.decoder.mask_token
    codes = torch.zeros(batch, gpt.config.num_tokens, dtype=torch.int64, device=like.device)
    images = torch.zeros(batch, 3, side, side, dtype=like.dtype, device=like.device)

    def images_of(engine: type) -> Tensor:
        *_, tokens = stream(gpt, class_ids, engine=engine)
        return tokenizer.decode(tokens)

    *previews, decoding = (decoding_work(tokenizer, codes[:, :n]) for n in tokenizer.schedule.valid_counts)
    whole = [*generation_work(gpt, batch), decoding]
    cases = {"naive": Case(lambda: images_of(RecomputingGPT), whole, generates=True)} if naive else {}
    cases["generate"] = Case(lambda: images_of(CachedModel), whole, generates=True)
    if gpt.uses_native(batch):
        cases["generate, native"] = Case(lambda: images_of(native.NativeGeneration), whole, generates=True)
    if gpt.uses_graphs:
        cases["generate, graphs"] = Case(lambda: images_of(GraphedModel), whole, generates=True)
    if other:
        cases["other"] = Case(lambda: other(class_ids), generates=True)
    cases["stream"] = Case(lambda: [tokenizer.decode(tokens) for tokens in stream(gpt, class_ids)], whole + previews)
    cases["decode"] = Case(lambda: tokenizer.decode(codes), [decoding])
    cases["encode"] = Case(lambda: tokenizer.encode(images), [encoding_work(tokenizer, images)])
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
        except Exception as error:  # whatever foreign code raises
            raise DetailFlowError(f"--other {text} failed: {type(error).__name__}: {error}") from error

    module = sys.modules[spec.name] = module_from_spec(spec)
    sys.path.append(str(Path(file).resolve().parent))  # for what it imports from its own folder
    guarded(spec.loader.exec_module, module)
    if not callable(getattr(module, name, None)):
        raise DetailFlowError(f"--other {text}: {file} has no function {name}")
    return lambda class_ids: guarded(getattr(module, name), class_ids)


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
class Row:
    """One measurement, with its ratios to the naive loop and to the limit (None if there is none)."""

    what: str
    dtype: str
    images: int
    seconds: float
    seconds_per_image: float
    naive_ratio: float | None
    limit_ratio: float | None
    bound: str | None
    peak_mib: float | None

    def cells(self) -> list[str]:
        """Return the cells of the table's row."""
        formats = ("", "", "", ".3g", ".3g", ".2f", ".2f", "", ".0f")
        return ["" if value is None else format(value, f) for value, f in zip(astuple(self), formats, strict=True)]


@dataclass(frozen=True)
class Report:
    """All measurements of one run."""

    machine: str
    torch: str
    threads: int
    model: str
    ceilings: dict[str, Ceilings]
    rows: list[Row]

    def __str__(self) -> str:
        header = ["what", "dtype", "images", "seconds", "s/image", "× naive", "× limit", "bound by", "peak MiB"]
        cells = [header, *(row.cells() for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = [f"{self.machine}, torch {self.torch}, {self.threads} threads", self.model]
        lines += [f"ceilings, {dtype}: {ceilings}" for dtype, ceilings in self.ceilings.items()]
        for line in [[], *cells]:
            padded = [c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=False))]
            lines.append("  ".join(padded).rstrip())
        return "\n".join(lines)


def benchmark(config: BenchmarkConfig, progress: Progress = lambda what: None) -> Report:
    """Time everything; what is compared takes turns, and the best of several repeats counts."""
    device = choose_device(config.device)
    other = load_other(config.other) if config.other else None
    ceilings, rows, model = {}, [], ""
    for dtype in dict.fromkeys(config.dtypes):
        gc.collect()
        if config.random_weights:
            pipeline = random_pipeline(config.model or FIRST, device, getattr(torch, dtype))
        else:
            pipeline = DetailFlowPipeline.from_pretrained(
                config.model, device=device, dtype=dtype, tokenizer=config.tokenizer
            )
        pipeline.gpt.engine = config.engine
        model = describe(pipeline, config)
        progress(f"ceilings, {dtype}")
        ceilings[dtype] = measure_ceilings(device, getattr(torch, dtype))
        for batch in dict.fromkeys(config.batch_sizes):
            label = f"{batch} × {dtype}"
            progress(f"counting operations, {label}")
            with within_memory(f"{label}: this", "give smaller batch sizes"):
                cases = make_cases(pipeline, batch, config.naive, other)
            times = time_in_turns(cases, device, config.repeats, label, progress)
            if config.compile:
                pipeline.compile(batch)
                fast = {f"{what}, compiled": cases[what] for what in ("generate", "decode")}
                times |= time_in_turns(fast, device, config.repeats, label, progress)
                cases |= fast
                torch.compiler.reset()  # programs for many sizes would pass the compiler's limit, and run uncompiled
            for what, case in cases.items():
                taken, peak = times[what]
                naive = taken / times["naive"][0] if case.generates and "naive" in times else None
                limit, bound = ceilings[dtype].limit(case.work) if case.work else (None, None)
                kind = dtype if case.work else "its own"
                rows.append(Row(what, kind, batch, taken, taken / batch, naive, limit and taken / limit, bound, peak))
        del pipeline, cases
    return Report(device_name(device), torch.__version__, torch.get_num_threads(), model, ceilings, rows)


def time_in_turns(
    cases: Mapping[str, Case],
    device: torch.device,
    repeats: int,
    label: str = "",
    progress: Progress = lambda what: None,
) -> dict[str, tuple[float, float | None]]:
    """Return each case's seconds, the best of `repeats` after one for warm-up, and its peak memory in MiB."""
    best: dict[str, tuple[float, float | None]] = {}
    for repeat in range(repeats + 1):
        for what, case in cases.items():
            progress(f"{what}, {label}")
            with within_memory(f"{what}, {label}: this", "give smaller batch sizes"):
                taken, peak = seconds_and_peak(case.run, device)
            if repeat:
                best[what] = min(best.get(what, (math.inf,))[0], taken), peak
    return best
