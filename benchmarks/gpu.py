"""All that a GPU is needed for, in one run of at most eight minutes: tests, generation, training; writes one report.

    make gpu                                            # with the Python that `PYTHON` names; see docs/gpu.md
    python benchmarks/gpu.py --output reports
    python benchmarks/gpu.py --device cpu --small --patience 10   # the same code in small, to see that it runs

Each part runs in a process of its own, has its own limit of time, and writes its figures as it goes; so what fails or
takes too long costs only what is left of that part. Without the package installed, the sources beside this file are
used.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

Row = dict[str, Any]
Emit = Callable[[Row], None]


@dataclass(frozen=True)
class Options:
    """What a part is told."""

    device: str
    small: bool


# --- tests -----------------------------------------------------------------------------------------------------------


def run_tests(options: Options, emit: Emit, chosen: str) -> None:
    """Run the tests of tests/test_gpu.py with these words in their names; a row for each, and one of sums."""
    import pytest

    counts: dict[str, int] = {}

    class Watch:
        def pytest_runtest_logreport(self, report: Any) -> None:
            if report.when == "call" or not report.passed:
                counts[report.outcome] = counts.get(report.outcome, 0) + 1
                outcome = str(report.longrepr)[-600:] if report.failed else report.outcome
                emit({"what": report.nodeid.rpartition("::")[2], "outcome": outcome, "s": report.duration})

    os.environ["DETAILFLOW_GPU_TESTS"] = options.device
    words = f"({chosen}) and (recorded or automatic)" if options.small else chosen
    command = ["-q", "-rs", "-p", "no:cacheprovider", "--rootdir", str(ROOT), "-k", words]
    command.append(str(ROOT / "tests" / "test_gpu.py"))
    status = pytest.main(command, plugins=[Watch()])
    outcome = ", ".join(f"{count} {name}" for name, count in sorted(counts.items())) or "nothing ran"
    emit({"what": f"{sum(counts.values())} tests", "outcome": f"{outcome} (status {int(status)})"})


# --- generation ------------------------------------------------------------------------------------------------------


def generation(options: Options, emit: Emit, model: str) -> None:
    """Time whole images and the decoder by every engine, at each batch size, in turns."""
    import torch

    from detailflow.benchmark import UncachedEngine, decoding_cost, generation_costs
    from detailflow.generation import TorchEngine
    from detailflow.graphs import GraphEngine
    from detailflow.labels import ClassId
    from detailflow.machine import measure_ceilings

    class UnfusedModel(GraphEngine):
        """The same without kernels: captured steps that are PyTorch's own."""

        fused = False

    pipe = load_pipeline(options, model)
    device, gpt, tokenizer = pipe.device, pipe.gpt, pipe.tokenizer
    ceilings = measure_ceilings(device, torch.bfloat16, repeats=1 if options.small else 5)
    emit({"what": f"ceilings: {ceilings}"})

    for batch in (1, 2) if options.small else (1, 8, 32, 128):
        labels = [ClassId(i % gpt.config.num_classes) for i in range(batch)]
        gpt.graphs.clear()  # a model keeps four programs
        codes = torch.zeros(batch, gpt.config.num_tokens, dtype=torch.int64, device=device)

        def images(engine: type, labels: Sequence[int] = labels) -> object:
            return tokenizer.decode_bytes(tokens_of(gpt, labels, engine))

        cases: dict[str, Callable[[], object]] = {
            "naive": partial(images, UncachedEngine),
            "PyTorch": partial(images, TorchEngine),
            "graphs": partial(images, GraphEngine),
            "graphs, PyTorch's kernels": partial(images, UnfusedModel),
            "tokens alone, graphs": partial(tokens_of, gpt, labels, GraphEngine),
            "tokens alone, graphs, PyTorch's kernels": partial(tokens_of, gpt, labels, UnfusedModel),
            "pipeline, to PIL images": partial(pipe, labels, batch_size=batch),
            "decode, checked": partial(tokenizer.decode, codes),
            "decode to bytes, graphs": partial(tokenizer.decode_bytes, codes),
        }
        costs = [*generation_costs(gpt, batch), decoding_cost(tokenizer, codes)]
        limits = {"graphs": ceilings.limit(costs), "decode to bytes, graphs": ceilings.limit(costs[-1:])}
        timed = in_turns(cases, device, 1 if options.small else 9)
        for what, times in timed.items():
            median = statistics.median(times)
            row: Row = {"images": batch, "what": what, "ms": median * 1e3, "ms per image": median * 1e3 / batch}
            row["images per second"] = batch / median
            row["spread"] = (max(times) - min(times)) / median
            if "decode" not in what and "tokens" not in what and "naive" in timed:
                row["× naive"] = statistics.median(timed["naive"]) / median
            if what in limits:
                row["× limit"], row["bound by"] = median / limits[what][0], limits[what][1]
            emit(row)


def load_pipeline(options: Options, model: str) -> Any:
    """Load the shipped model, or one with random weights, in bfloat16 and with the graphs engine."""
    import torch

    from detailflow.benchmark import random_pipeline
    from detailflow.pipeline import DetailFlowPipeline

    if model == "shipped" or options.small:
        pipe = DetailFlowPipeline.from_pretrained(device=options.device, dtype="bfloat16")
    else:
        pipe = random_pipeline(model, torch.device(options.device), torch.bfloat16)
    pipe.gpt.engine = pipe.tokenizer.engine = "graphs"
    return pipe


def tokens_of(gpt: Any, labels: Sequence[int], engine: type) -> Any:
    """Generate tokens with an engine, whatever the model's own."""
    from detailflow.benchmark import stream

    *_, tokens = stream(gpt, labels, engine=engine)
    return tokens


def in_turns(cases: dict[str, Callable[[], object]], device: Any, repeats: int) -> dict[str, list[float]]:
    """Return each case's seconds, after two calls for warm-up and capture; one that fails is left out."""
    from detailflow.machine import seconds

    timed: dict[str, list[float]] = {}
    for repeat in range(repeats + 2):
        for what in list(cases):
            try:
                taken = seconds(cases[what], device)
            except Exception as error:
                print(f"{what} failed: {type(error).__name__}: {error}", file=sys.stderr)
                del cases[what]
                timed.pop(what, None)
                continue
            if repeat >= 2:
                timed.setdefault(what, []).append(taken)
    return timed


def compiled_generation(options: Options, emit: Emit) -> None:
    """Time `pipe.compile(batch)`: fused kernels, captured."""
    from detailflow.graphs import GraphEngine

    pipe = load_pipeline(options, "detailflow-16")
    for batch in (1, 2) if options.small else (1, 128):
        labels = [i % pipe.gpt.config.num_classes for i in range(batch)]
        if not options.small:  # minutes on a CPU
            pipe.compile(batch)

        def images(labels: Sequence[int] = labels) -> object:
            return pipe.tokenizer.decode_bytes(tokens_of(pipe.gpt, labels, GraphEngine))

        start = time.perf_counter()
        images()
        emit({"images": batch, "what": "compile and capture", "ms": (time.perf_counter() - start) * 1e3})
        cases = {"compiled graphs, to bytes": images}
        for what, times in in_turns(cases, pipe.device, 1 if options.small else 9).items():
            median = statistics.median(times)
            emit({"images": batch, "what": what, "ms": median * 1e3, "images per second": batch / median})


# --- training --------------------------------------------------------------------------------------------------------


class NoImages:
    """A set of images that is never read: batches are random numbers."""

    class_names = tuple("abcdefghij")

    def __len__(self) -> int:
        return 50_000


def tokenizer_training(
    options: Options, emit: Emit, recipe: str, batch: int, compile: bool, measure: Callable[..., None] | None = None
) -> None:
    """Measure steps of a tokenizer's recipe with all losses on; networks that it would download have random weights."""
    import torch
    import yaml

    from detailflow.settings import parse_settings
    from detailflow.training.config import TokenizerTraining
    from detailflow.training.tokenizer import TokenizerStage

    settings = yaml.safe_load((ROOT / recipe).read_text()) | {"data": "-"}
    if "freeze" in settings:
        settings["init"] = "-"
    settings["loop"] |= {"batch_size": batch, "compile": compile, "accumulate": 1, "trackers": []}
    if options.small:
        settings |= {"alignment": 0}
        settings["loop"] |= {"batch_size": 4, "compile": False}
        settings["model"] |= {name: {"width": 64, "depth": 1, "heads": 4} for name in ("encoder", "decoder")}
        settings["model"]["image_size"] = min(64, settings["model"]["image_size"])
    config = parse_settings(TokenizerTraining, settings, recipe)
    device, side = torch.device(options.device), config.model.image_size
    made: Any = NoImages()
    stage = TokenizerStage(config, made, Path("-"), device, "plan")  # which writes nothing
    size = config.loop.batch_size
    batches = [
        (torch.randint(256, (size, side, side, 3), dtype=torch.uint8), torch.zeros(size).long()) for _ in range(4)
    ]
    (measure or time_steps)(stage, batches, device, options, emit)


def ar_training(options: Options, emit: Emit, batch: int, compile: bool) -> None:
    """Time steps of GPT-L."""
    import torch

    from detailflow.models.gpt import GPTConfig
    from detailflow.training.config import GPTTraining, LoopConfig
    from detailflow.training.gpt import GPTStage

    sizes: dict[str, Any] = dict(width=1024, depth=24, heads=16)
    if options.small:
        batch, compile, sizes = 4, False, dict(width=64, depth=2, heads=4)
    loop = LoopConfig(steps=1000, batch_size=batch, learning_rate=1e-4, compile=compile, trackers=())
    config, device = GPTTraining("-", "-", loop, **sizes), torch.device(options.device)
    nothing: Any = None
    stage = GPTStage(config, GPTConfig(num_classes=1000, **sizes), nothing, nothing, device)
    batches = []
    for _ in range(4):
        ids = torch.randint(8192, (batch, 128))
        batches.append((torch.randint(1000, (batch,)), ids, ids))
    time_steps(stage, batches, device, options, emit)


def time_steps(stage: Any, batches: Sequence[Any], device: Any, options: Options, emit: Emit) -> None:
    """Emit the speed of a stage's last steps, in which all losses are on."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from detailflow.device import precision_dtype
    from detailflow.machine import measure_ceilings, seconds

    loop = stage.config.loop
    steps, first = (2, loop.steps - 20) if options.small else (12, loop.steps - 60)

    def run(count: int) -> None:
        for i in range(count):
            torch.manual_seed(i)  # the same draws each time, so that all shapes are known after the first
            stage.step(first + i, batches[i % len(batches)], 1e-9, log=False)

    start = time.perf_counter()
    run(steps)
    preparing = time.perf_counter() - start
    operations = 0.0
    if not loop.compile:
        with FlopCounterMode(display=False) as counter:
            run(steps)
        operations = counter.get_total_flops() / steps
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    step = min(seconds(lambda: run(steps), device) for _ in range(1 if options.small else 3)) / steps
    row: Row = {"images": loop.batch_size, "what": "compiled" if loop.compile else "not compiled", "ms": step * 1e3}
    row["images per second"] = loop.batch_size / step
    if operations:
        ceiling = measure_ceilings(device, precision_dtype(loop.precision, device), 1 if options.small else 5).flops
        row |= {"GFLOP per image": operations / loop.batch_size / 1e9, "of the ceiling": operations / step / ceiling}
    if device.type == "cuda":
        row["peak GiB"] = torch.cuda.max_memory_allocated() / 2**30
    row["s before"] = preparing
    emit(row)


def profile_steps(stage: Any, batches: Sequence[Any], device: Any, options: Options, emit: Emit) -> None:
    """Emit how busy the device is in a step, and which of its programs take longest."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    loop, steps = stage.config.loop, 2 if options.small else 10

    def run() -> None:
        for i in range(steps):
            torch.manual_seed(i)
            stage.step(loop.steps - 60 + i, batches[i % len(batches)], 1e-9, log=False)

    run()
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as profiled:
        start = time.perf_counter()
        run()
        if on_gpu:
            torch.cuda.synchronize()
        wall = (time.perf_counter() - start) * 1e6  # µs, as the profiler's

    def own(event: Any) -> float:
        return event.self_device_time_total if on_gpu else event.self_cpu_time_total

    events = [event for event in profiled.key_averages() if own(event) > 0]
    kernels = [event for event in events if not on_gpu or event.device_type.name == "CUDA"]
    busy, count = sum(map(own, kernels)), sum(event.count for event in kernels)
    emit({"what": "a step, while profiled", "ms": wall / steps / 1e3, "calls": count / steps, "busy": busy / wall})
    for event in sorted(kernels, key=own, reverse=True)[:15]:
        row = {"what": event.key[:80], "ms": own(event) / steps / 1e3, "calls": event.count / steps}
        emit(row | {"busy": own(event) / wall})


def loading(options: Options, emit: Emit) -> None:
    """Time the data of a small set on the CPU: its first pass, and later ones from memory."""
    import numpy as np
    from PIL import Image

    from detailflow.data.batches import ImageBatches
    from detailflow.data.images import open_images

    count, batch = (256, 64) if options.small else (4096, 256)
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        for i in range(count):
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(f"{folder}/{i}.png")
        for scale in (1.0, 1.25):
            batches = ImageBatches(open_images(folder), 32, batch, seed=0, max_scale=scale, keep=2**30).as_bytes()
            for what in ("first pass", "from memory"):
                start = time.perf_counter()
                for _ in range(count // batch):
                    next(batches)
                taken = time.perf_counter() - start
                shown = f"{what}{', with zoom' if scale > 1 else ''}"
                emit({"images": batch, "what": shown, "images per second": count / taken})


# --- the run ---------------------------------------------------------------------------------------------------------

CIFAR = "experiments/shipped-model/gpu/tokenizer.yaml"
DECODER = "experiments/shipped-model/gpu/decoder.yaml"
PAPER = "src/detailflow/recipes/imagenet/tokenizer.yaml"
PARTS: dict[str, tuple[int, Callable[[Options, Emit], None]]] = {  # name → most seconds, function
    "tests": (120, partial(run_tests, chosen="not compiled")),
    "generation, the shipped model": (70, partial(generation, model="shipped")),
    "generation, DetailFlow-16 with random weights": (110, partial(generation, model="detailflow-16")),
    "training, GPT-L": (50, partial(ar_training, batch=256, compile=False)),
    "training, a CIFAR-10 tokenizer": (40, partial(tokenizer_training, recipe=CIFAR, batch=512, compile=False)),
    "loading, 32×32 pixels": (20, loading),
    "training, the paper's tokenizer": (60, partial(tokenizer_training, recipe=PAPER, batch=32, compile=False)),
    "training, GPT-L, compiled": (90, partial(ar_training, batch=256, compile=True)),
    "training, a CIFAR-10 tokenizer, compiled": (
        110,
        partial(tokenizer_training, recipe=CIFAR, batch=512, compile=True),
    ),
    "profile, a CIFAR-10 tokenizer, compiled": (
        60,  # the compiler's cache has it
        partial(tokenizer_training, recipe=CIFAR, batch=512, compile=True, measure=profile_steps),
    ),
    "profile, its decoder with a discriminator": (
        60,
        partial(tokenizer_training, recipe=DECODER, batch=96, compile=True, measure=profile_steps),
    ),
    "generation, DetailFlow-16, compiled": (150, compiled_generation),
    "tests, compiled": (150, partial(run_tests, chosen="compiled")),
}


def main() -> int:
    """Run the parts and write the report after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny sizes: only to see that it runs")
    parser.add_argument("--minutes", type=float, default=7.5, help="for all parts (default: %(default)s)")
    parser.add_argument("--patience", type=float, default=1.0, help="factor for all limits of time, on a slow machine")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "reports", help="folder of the report")
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="parts whose names contain one of these")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    args = parser.parse_args()
    options = Options(args.device, args.small)
    if args.part:
        return run_part(args.part, options)
    facts = machine(options)
    args.output.mkdir(parents=True, exist_ok=True)
    others = earlier_parts(args.output, facts) if args.only else {}
    results: list[dict[str, Any]] = []
    end = time.monotonic() + args.minutes * 60 * args.patience
    for name, (limit, _) in PARTS.items():
        if args.only and not any(word in name for word in args.only):
            continue
        print(f"— {name}", flush=True)
        results.append(one_part(name, min(limit * args.patience, end - time.monotonic()), options))
        others.pop(name, None)
        found = others | {result["part"]: result for result in results}
        write_report(args.output, facts, [found[part] for part in PARTS if part in found])
    print((args.output / f"{report_name(facts)}.md").read_text())
    return 0 if all(result["problem"] is None for result in results) else 1


def run_part(name: str, options: Options) -> int:
    """Run a part in this process; each row is a line of JSON on the standard output."""
    if options.device == "cpu":  # plain calls in place of a capture
        from detailflow import graphs

        graphs.CAPTURE["cpu"] = lambda calls, device: list(calls)

    if options.small:
        from detailflow import machine

        machine.READ_BYTES, machine.MATRIX_SIDES = 2**20, (64,)

    def emit(row: Row) -> None:
        print("\nROW " + json.dumps(row), flush=True)  # pytest may be in the middle of a line

    try:
        PARTS[name][1](options, emit)
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def one_part(name: str, limit: float, options: Options) -> dict[str, Any]:
    """Run a part in a process of its own; return its rows, seconds and what went wrong."""
    result: dict[str, Any] = {"part": name, "rows": [], "seconds": 0.0, "problem": None}
    if limit < 5:
        return result | {"problem": "no time was left"}
    command = [sys.executable, __file__, "--part", name, "--device", options.device]
    command += ["--small"] if options.small else []
    start, environment = time.monotonic(), os.environ | {"PYTHONUNBUFFERED": "1"}
    path = [str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(path)
    with tempfile.TemporaryFile("w+", encoding="utf-8") as log:
        try:
            done = subprocess.run(command, stdout=log, stderr=log, env=environment, cwd=ROOT, timeout=limit)
            if done.returncode:
                result["problem"] = f"ended with status {done.returncode}"
        except subprocess.TimeoutExpired:
            result["problem"] = f"took longer than {limit:.0f} s"
        log.seek(0)
        lines = log.read().splitlines()
    result["rows"] = [json.loads(line[4:]) for line in lines if line.startswith("ROW ")]
    result["seconds"] = round(time.monotonic() - start, 1)
    result["log"] = [line for line in lines if not line.startswith("ROW ")][-40:]
    shown = result["problem"] or f"{len(result['rows'])} rows"
    print(f"  {shown}, {result['seconds']} s", flush=True)
    if result["problem"]:
        print("\n".join(f"  | {line}" for line in result["log"][-12:]), flush=True)
    return result


def machine(options: Options) -> dict[str, Any]:
    """Return what the figures were measured on."""
    import torch

    from detailflow.machine import device_name

    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit(
            "there is no GPU that PyTorch can use here: --device cpu --small shows whether the script runs"
        )
    facts = {"device": device_name(device), "torch": torch.__version__, "python": platform.python_version()}
    if device.type == "cuda":
        facts |= {"cuda": torch.version.cuda, "memory": f"{torch.cuda.mem_get_info()[1] / 2**30:.0f} GiB"}
    return facts | {"processors": os.cpu_count(), "small": options.small}


def report_name(facts: dict[str, Any]) -> str:
    """Return the report's file name without its ending."""
    words = "".join(c if c.isalnum() else "-" for c in facts["device"].lower())
    return "-".join(filter(None, words.split("-"))) + ("-small" if facts["small"] else "")


def earlier_parts(folder: Path, facts: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return what a report of the same machine and versions has, by part; parts that run again replace theirs."""
    path = folder / f"{report_name(facts)}.json"
    if not path.exists():
        return {}
    report = json.loads(path.read_text())
    return {result["part"]: result for result in report["parts"]} if report["machine"] == facts else {}


def write_report(folder: Path, facts: dict[str, Any], results: Sequence[dict[str, Any]]) -> None:
    """Write NAME.md and NAME.json."""
    path = folder / report_name(facts)
    path.with_suffix(".json").write_text(json.dumps({"machine": facts, "parts": results}, indent=1) + "\n")
    shown = ", ".join(f"{k} {v}" for k, v in facts.items())
    lines = [f"# {facts['device']}", "", f"`python benchmarks/gpu.py`: {shown}"]
    for result in results:
        lines += ["", f"## {result['part']}", ""]
        if result["problem"]:
            lines += [f"**{result['problem']}**", "", "```", *result.get("log", [])[-12:], "```", ""]
        lines += [*table(result["rows"]), "", f"{result['seconds']} s"]
    path.with_suffix(".md").write_text("\n".join(lines) + "\n")


def table(rows: Sequence[Row]) -> Iterator[str]:
    """Yield the lines of a Markdown table; rows may lack cells."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    if names:
        yield "| " + " | ".join(names) + " |"
        yield "|" + "---|" * len(names)
    for row in rows:
        cells = [row.get(name, "") for name in names]
        shown = [f"{cell:,.4g}" if isinstance(cell, float) else " ".join(str(cell).split()) for cell in cells]
        yield "| " + " | ".join(cell.replace("|", "¦") for cell in shown) + " |"


if __name__ == "__main__":
    sys.exit(main())
