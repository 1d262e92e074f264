"""Check and tune the kernels of a decoding step (src/detailflow/kernels.py) on an NVIDIA GPU, in about a minute.

    python benchmarks/kernels.py                 # GPT-L with random weights, in bfloat16
    python benchmarks/kernels.py --seconds 30    # at most so long for the tiles
    python benchmarks/kernels.py --only check image

Prints as it goes: each kernel's error; its time by tiles, alone in a CUDA graph of all layers, so that no weights are
in the L2 cache from before; the best tiles, to be written into `TILES`; and the time of whole images.
"""

import argparse
import gc
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import torch
import torch.nn.functional as F
from torch import Tensor

from detailflow import DetailFlowGPT, GPTConfig, SamplingConfig, kernels
from detailflow.generation import TorchEngine
from detailflow.graphs import Decoding, capture
from detailflow.kernels import Launch, Tiles, TritonEngine
from detailflow.models.operations import rotate

DEVICE = torch.device("cuda")
GPT_L = GPTConfig(num_classes=1000)
SHARED = 200 * 2**10  # bytes of shared memory for what a program loads ahead
WORKERS = 8  # processes that compile ahead
ROWS = {16: (1, 8, 16), 32: (2, 8, 16)}  # of a program → images with guidance, start and end
NAMES = ("qkv", "proj", "gate", "down", "head")


def candidates(name: str, rows: int) -> Iterator[Tiles]:
    """Yield tiles to measure."""
    yield kernels.TILES[name, rows]
    few = rows == 16
    outputs = {"qkv": (8, 16, 32), "proj": (8, 16), "gate": (8, 16, 32), "down": (8, 16), "head": (16, 32, 64)}[name]
    shapes = [(128, 4, 4), (256, 4, 3), (256, 8, 3), (64, 4, 5)]
    if few:
        shapes = [(256, 4, 3), (256, 4, 5), (512, 4, 3), (512, 8, 3), (512, 8, 4), (128, 4, 6)]
    for out in outputs:
        for inputs, warps, stages in shapes[: 2 if name == "head" else None]:
            read = rows + out * (2 if name == "gate" else 1)
            if 2 * read * inputs * stages <= SHARED and (few or out > 8 or name in ("proj", "down")):
                yield Tiles(out, inputs, warps, stages)


def settings() -> list[tuple[tuple[str, int], Tiles]]:
    """List what is measured, of every kernel, the few rows first; each once."""
    found = [((name, rows), tiles) for rows in ROWS for name in NAMES for tiles in candidates(name, rows)]
    return list(dict.fromkeys(found))


class Some(Launch):
    """Starts, or only compiles, the kernels of one name."""

    only: str | None = None
    compile = False

    def start(self, name: str, kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        if self.only not in (None, name):
            return
        if self.compile:
            kernel.warmup(*arguments, grid=grid, **options)
        else:
            super().start(name, kernel, grid, *arguments, **options)


def load(depth: int, dtype: torch.dtype = torch.bfloat16) -> DetailFlowGPT:
    """Make GPT-L with random weights of `depth` layers; the same for the same depth."""
    torch.manual_seed(0)
    with DEVICE:
        model = DetailFlowGPT(replace(GPT_L, depth=depth)).to(torch.bfloat16)
    return model.eval().to(dtype)


def engine(kind: type[TorchEngine], model: DetailFlowGPT, images: int, guided: bool = True) -> Any:
    """Begin a batch, with random keys and values in the cache."""
    made = kind(model, torch.arange(images, device=DEVICE), guided)
    torch.manual_seed(1)
    for cache in made.caches:
        for tensor in (cache.keys, cache.values):
            tensor.copy_(torch.randn(tensor.shape, device=DEVICE).to(torch.bfloat16))
    return made


def say(*words: object) -> None:
    print(*words, flush=True)


# --- errors ----------------------------------------------------------------------------------------------------------


def error(found: Tensor, expected: Tensor) -> float:
    """Return the rms error relative to the rms of what is expected."""
    return ((found.float() - expected).square().mean() / expected.square().mean()).sqrt().item()


@torch.inference_mode()
def check() -> None:
    """Print the error of all that a layer computes, against float32, kernel by kernel."""
    model, exact = load(1), load(1, torch.float32)
    for images, guided, start, end in (
        (1, False, 0, 1),
        (1, True, 0, 1),
        (1, True, 3, 4),
        (1, True, 8, 16),
        (9, True, 3, 4),
        (1, True, 120, 128),
        (8, True, 120, 128),
    ):
        fused, reference = (
            engine(kind, network, images, guided) for kind, network in ((TritonEngine, model), (TorchEngine, exact))
        )
        rows = len(fused.class_ids) * (end - start)
        try:
            tokens = torch.randint(GPT_L.codebook_size, (len(fused.class_ids), 128), device=DEVICE)
            embedded = model.inputs(fused.class_ids, tokens, start, end).flatten(0, 1)
            logits = fused.run(embedded, start, end)
            again = fused.run(embedded, start, end)
            errors = layer_errors(fused, reference, embedded.float(), logits, start, end)
            shown = "  ".join(f"{name} {value:.4f}" for name, value in errors.items())
            repeats = torch.equal(logits, again)
            verdict = "" if repeats and max(errors.values()) < 0.02 else f"  WRONG (repeats: {repeats})"
            say(f"rows {rows:3} {start:3}–{end:3}: {shown}{verdict}")
        except Exception as problem:
            say(f"rows {rows}: FAILED {type(problem).__name__}: {str(problem)[:300]}")


def layer_errors(fused: Any, reference: Any, x: Tensor, logits: Tensor, start: int, end: int) -> dict[str, float]:
    """Compare the buffers of a model of one layer with the same layer in float32."""
    config, block, norm = reference.model.config, reference.model.blocks[0], reference.model.norm
    rows, width, length = len(x), config.width, end - start
    found_x, _, _, found_q, found_mixed, found_hidden = fused.buffers
    qkv = block.attn.qkv(block.attn_norm(x)).view(-1, length, 3, config.heads, width // config.heads)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    q, k = rotate(q, reference.rotation[start:end]), rotate(k, reference.rotation[start:end])
    keys, values = reference.caches[0].append(start, k, v)
    mixed = F.scaled_dot_product_attention(q, keys, values).transpose(1, 2).reshape(rows, width)
    x = x + block.attn.proj(mixed)
    normed = block.mlp_norm(x)
    hidden = F.silu(block.mlp.gate(normed)) * block.mlp.up(normed)
    x = x + block.mlp.down(hidden)
    own = fused.caches[0]
    pairs = {
        "k": (own.keys[:, :, start:end], k),
        "v": (own.values[:, :, start:end], v),
        "q": (found_q[: rows * width].view(rows, width), q.transpose(1, 2).reshape(rows, width)),
        "attention": (found_mixed[: rows * width].view(rows, width), mixed),
        "hidden": (found_hidden[: rows * config.hidden].view(rows, -1), hidden),
        "x": (found_x[: rows * width].view(rows, width), x),
        "logits": (logits, reference.model.head(norm(x))),
    }
    # The class position's q and k are zeros, which have no relative error.
    return {name: error(*pair) for name, pair in pairs.items() if pair[1].any()}


@torch.inference_mode()
def check_model() -> None:
    """Print the error of all layers' logits, and PyTorch's own, along a sequence of given tokens."""
    model = load(GPT_L.depth)
    tokens = torch.randint(GPT_L.codebook_size, (1, 128), device=DEVICE)
    exact = load(GPT_L.depth, torch.float32)
    kinds = {"float32": (TorchEngine, exact), "PyTorch": (TorchEngine, model), "kernels": (TritonEngine, model)}
    logits = {}
    for name, (kind, network) in kinds.items():
        run = kind(network, torch.zeros(1, dtype=torch.int64, device=DEVICE), True)
        logits[name] = torch.cat([run.step(tokens, *step).float() for step in model.schedule.steps], 1)
    for name in ("PyTorch", "kernels"):
        agree = (logits[name].argmax(-1) == logits["float32"].argmax(-1)).float().mean()
        say(f"logits by {name}: rms error {error(logits[name], logits['float32']):.5f}, greedy codes equal {agree:.4f}")


# --- tiles -----------------------------------------------------------------------------------------------------------


def compile_share(worker: int) -> None:
    """Compile every `WORKERS`th setting, into Triton's cache on this machine."""
    Some.compile, kernels.Launch = True, Some
    model = load(1)
    begun = {rows: TritonEngine(model, torch.arange(ROWS[rows][0], device=DEVICE), True) for rows in ROWS}
    given = dict(kernels.TILES)
    for (name, rows), tiles in settings()[worker::WORKERS]:
        Some.only = name
        kernels.TILES.update(given)  # the sums of squares that a kernel reads depend on the tiles of another
        kernels.TILES[name, rows] = tiles
        try:
            launch_all(begun[rows], rows)
        except Exception as problem:
            say(f"  {name} {rows} rows {tuple(tiles)}: {type(problem).__name__} in compiling: {str(problem)[:200]}")


@torch.inference_mode()
def launch_all(fused: TritonEngine, rows: int) -> None:
    _, start, end = ROWS[rows]
    embedded = torch.zeros(rows, fused.model.config.width, dtype=torch.bfloat16, device=DEVICE)
    fused.run(embedded, start, end)


def microseconds(call: Callable[[], object], repeats: int = 20) -> float:
    """Return the median time of a call, in µs."""
    for _ in range(3):
        call()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    for event in events[:-1]:
        event.record()
        call()
    events[-1].record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in pairwise(events)) * 1e3


def tune(seconds: float, workers: Sequence["subprocess.Popen[str]"]) -> dict[tuple[str, int], Tiles]:
    """Print each kernel's time by tiles, alone and in its place in a step; leave and return the best of the latter."""
    begin = time.monotonic()
    await_compiled(workers, seconds / 2)
    kernels.Launch = Some  # type: ignore[misc]
    model = load(GPT_L.depth)
    gc.collect()
    gc.freeze()  # each capture collects what is left
    config = model.config
    weights = dict(qkv=3 * config.width**2, proj=config.width**2, gate=2 * config.width * config.hidden)
    weights |= dict(down=config.width * config.hidden, head=config.width * config.codebook_size)
    best: dict[tuple[str, int], Tiles] = {}
    for rows in ROWS:
        fused = engine(TritonEngine, model, ROWS[rows][0])
        for name in NAMES:
            times = {}
            for tiles in (tiles for key, tiles in settings() if key == (name, rows)):
                if time.monotonic() - begin > seconds:
                    say("no time for more settings")
                    break
                before, kernels.TILES[name, rows] = kernels.TILES[name, rows], tiles
                try:
                    taken, step = graphed(fused, rows, name), graphed(fused, rows)
                    if name != "head":
                        taken /= config.depth
                    times[tiles] = step
                    shown = f"{taken:7.2f} µs {2 * weights[name] / taken / 1e3:6.0f} GB/s, a step {step:7.1f} µs"
                    say(f"  {name:5} {rows:2} rows {tuple(tiles)!s:18} {shown}")
                except Exception as problem:
                    say(f"  {name:5} {rows:2} rows {tuple(tiles)}: {type(problem).__name__}: {str(problem)[:200]}")
                kernels.TILES[name, rows] = before
            if times:
                best[name, rows] = kernels.TILES[name, rows] = min(times, key=times.__getitem__)
        for warps in (2, 8, 4):
            kernels.ATTEND_WARPS = warps
            taken, step = graphed(fused, rows, "attend") / config.depth, graphed(fused, rows)
            say(f"  attend {rows:2} rows, {warps} warps: {taken:7.2f} µs, a step {step:7.1f} µs")
    Some.only = None
    say("\nTILES = {")
    for (name, rows), tiles in best.items():
        say(f'    ("{name}", {rows}): Tiles{tuple(tiles)},')
    say("}")
    return best


def compile_ahead() -> list["subprocess.Popen[str]"]:
    """Begin to compile all settings in several processes."""
    command, output = [sys.executable, __file__, "--compile"], subprocess.PIPE
    return [
        subprocess.Popen([*command, str(worker)], stdout=output, stderr=output, text=True) for worker in range(WORKERS)
    ]


def await_compiled(workers: Sequence["subprocess.Popen[str]"], seconds: float) -> None:
    """Wait until all settings are compiled, and print what could not be."""
    begin = time.monotonic()
    for worker in workers:
        try:
            output, errors = worker.communicate(timeout=max(1.0, begin + seconds - time.monotonic()))
        except subprocess.TimeoutExpired:
            worker.kill()
            output, errors = worker.communicate()
        print(output, end="")
        if worker.returncode:
            say(f"  a process that compiles failed: {errors[-300:]}")
    say(f"waited {time.monotonic() - begin:.1f} s for the compiler")


@torch.inference_mode()
def graphed(fused: TritonEngine, rows: int, only: str | None = None) -> float:
    """Return the µs of a step, or of the calls of one of its kernels, from a graph."""
    Some.only = only
    (replay,) = capture([lambda: launch_all(fused, rows)], DEVICE)
    return microseconds(replay)


# --- images ----------------------------------------------------------------------------------------------------------


def images(best: dict[tuple[str, int], Tiles]) -> None:
    """Print the time of whole images' tokens: PyTorch's steps, kernels as they are in the table, the best tiles."""
    model = load(GPT_L.depth)

    def timed(label: str, count: int, fused: bool = True) -> None:
        try:
            begun = time.monotonic()
            program = Decoding(model, count, SamplingConfig(), fused)
            ready = time.monotonic() - begun
            steps = model.schedule.steps
            taken = microseconds(lambda: [program.replay[step]() for step in steps], 9) / 1e3
            one, group = (microseconds(program.replay[step]) for step in (steps[4], steps[-4]))
            used = type(program.engine).__name__
            say(*kernels.problems.values()) if kernels.problems else None
            say(f"{count:4} images, {label:32} {taken:8.2f} ms  a token {one:6.0f} µs  a group {group:6.0f} µs"
                f"  {used}, ready in {ready:.1f} s")  # fmt: skip
        except Exception as problem:
            say(f"{count:4} images, {label}: {type(problem).__name__}: {str(problem)[:300]}")

    for count in (1, 2, 4, 8):
        timed("PyTorch's kernels", count, fused=False)
        for most in (16, 32, 64, 128):
            if count * 16 <= most or most == 16:
                kernels.MOST = most
                timed(f"kernels, up to {most} rows", count)
                if count * 16 <= most:
                    break
    kernels.TILES.update(best)
    for count in (1, 2, 4) if best else ():
        kernels.MOST = 16 * count
        timed("kernels, best tiles", count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=35.0, help="for the tiles (default: %(default)s)")
    parser.add_argument("--only", nargs="+", default=["check", "tiles", "image"], choices=["check", "tiles", "image"])
    parser.add_argument("--compile", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.compile is not None:
        compile_share(args.compile)
        return
    say(torch.cuda.get_device_name(), torch.__version__)
    kernels.MOST = 128  # for all rows that are checked
    best: dict[tuple[str, int], Tiles] = {}
    given = dict(kernels.TILES)
    workers = compile_ahead() if "tiles" in args.only else []
    if "check" in args.only:
        check()
        check_model()
    if "tiles" in args.only:
        best = tune(args.seconds, workers)
    if "image" in args.only:
        kernels.TILES.update(given)
        images(best)


if __name__ == "__main__":
    main()
