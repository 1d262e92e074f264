"""Training throughput on this machine: a recipe's images per second, its share of the ceiling, where the rest goes.

    python benchmarks/training.py tokenizer --config own-64/tokenizer.yaml --data PHOTOS
    python benchmarks/training.py gpt --config own-64/gpt.yaml --num-tokens 64 --codebook-size 4096

Operations are counted by PyTorch in the very steps that are timed (matrix products, convolutions and attention, forward and
backward, frozen networks included); all other settings go in as with `detailflow train`.
"""

import argparse
import tempfile
import time
from collections import defaultdict
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode

from detailflow.data.images import open_images
from detailflow.device import choose_device
from detailflow.machine import measure_ceilings, seconds
from detailflow.models.gpt import GPTConfig
from detailflow.models.loading import config_from_dict
from detailflow.training.config import PRECISIONS, GPTTraining, TokenizerTraining
from detailflow.training.gpt import GPTStage
from detailflow.training.tokenizer import TokenizerStage

KINDS = {  # of operation → words in the profiler's names, the first that fits counts
    "optimiser": ("adam", "_foreach", "clip_grad"),
    "attention": ("attention", "flash"),
    "convolutions": ("conv",),
    "matrix products": ("mm", "linear", "matmul", "addmm", "gemm", "mkldnn", "bmm"),
    "casts and copies": ("copy", "to_copy", "clone", "contiguous", "cat"),
    "norms, activations, sums": (
        "norm",
        "gelu",
        "silu",
        "softmax",
        "mul",
        "add",
        "sub",
        "div",
        "sum",
        "mean",
        "native",
        "pow",
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("tokenizer", "gpt"))
    parser.add_argument("--config", action="append", type=Path, required=True, help="recipes, laid over one another")
    parser.add_argument("--data", help="images for the tokenizer")
    parser.add_argument("--num-tokens", type=int, default=128, help="of the AR model's sequences")
    parser.add_argument("--codebook-size", type=int, default=8192)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, help="in place of the recipe's")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="or not, whatever the recipe says")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--device")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a setting in place of the recipe's"
    )
    args = parser.parse_args()
    device = choose_device(args.device)
    settings: dict[str, Any] = {}
    for path in args.config:
        settings = merged(settings, yaml.safe_load(path.read_text()))
    for item in args.set:
        key, _, value = item.partition("=")
        settings[key] = yaml.safe_load(value)
    kind = TokenizerTraining if args.stage == "tokenizer" else GPTTraining
    missing = {"tokenizer": {"data": str(args.data)}, "gpt": {"tokens": "-", "tokenizer": "-"}}[args.stage]
    config = config_from_dict(kind, {**settings, **missing}, args.config[-1])
    loop = replace(config.loop, batch_size=args.batch_size or config.loop.batch_size)
    if args.compile is not None:
        loop = replace(loop, compile=args.compile)
    config = replace(config, loop=loop)

    made, data_seconds = (tokenizer_stage if args.stage == "tokenizer" else gpt_stage)(args, config, device)
    first = loop.steps - args.steps  # the last steps: all losses are on
    stage, make_batches = made(loop)
    batches = make_batches()
    operations = count(made(replace(loop, compile=False))[0], batches, first)
    times = timed(stage, batches, first, device)
    ceiling = measure_ceilings(device, PRECISIONS[loop.precision])
    step, batch = sum(times) / len(times), loop.batch_size
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{args.stage}, {', '.join(map(str, args.config))}: torch {torch.__version__}, {name}, {loop.precision}")
    print(
        f"batch {batch}, {'compiled' if loop.compile else 'not compiled'}; ceiling {ceiling.flops / 1e9:.0f} GFLOP/s\n"
    )
    print(f"step                  {step * 1e3:10.1f} ms   (best {min(times) * 1e3:.1f})")
    print(f"images per second     {batch / step:10.1f}")
    print(f"operations per image  {operations / len(times) / batch / 1e9:10.1f} GFLOP")
    print(f"share of the ceiling  {operations / sum(times) / ceiling.flops:10.1%}")
    if data_seconds:
        print(f"data alone            {batch / data_seconds:10.1f} images per second with {loop.workers} workers")
    print("\nwhere a step's time goes")
    for what, share in profile(stage, batches, first, device):
        print(f"  {what:26} {share:6.1%}")


def merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Settings with others laid over them."""
    both = {
        k: merged(below[k], v) if isinstance(v, dict) and isinstance(below.get(k), dict) else v
        for k, v in above.items()
    }
    return {**below, **both}


def tokenizer_stage(args: argparse.Namespace, config: TokenizerTraining, device: torch.device) -> Any:
    source = open_images(args.data)
    folder = Path(tempfile.mkdtemp())

    def make(loop: Any) -> Any:
        stage = TokenizerStage(replace(config, loop=loop), source, folder, device)
        return stage, lambda: list(islice(stage.batches(0), args.steps + 2))

    batches = make(config.loop)[0].batches(0)
    next(batches)
    start = time.perf_counter()
    count = max(4, args.steps)
    for _ in islice(batches, count):
        pass
    return make, (time.perf_counter() - start) / count


def gpt_stage(args: argparse.Namespace, config: GPTTraining, device: torch.device) -> Any:
    sizes = GPTConfig(
        num_classes=args.classes,
        width=config.width,
        depth=config.depth,
        heads=config.heads,
        num_tokens=args.num_tokens,
        codebook_size=args.codebook_size,
        dropout=config.dropout,
    )

    def batch(size: int) -> Any:
        ids = torch.randint(args.codebook_size, (size, args.num_tokens))
        return torch.randint(args.classes, (size,)), ids, ids

    def make(loop: Any) -> Any:
        stage = GPTStage(replace(config, loop=loop), sizes, None, None, device)  # type: ignore[arg-type]
        return stage, lambda: [batch(loop.batch_size) for _ in range(args.steps + 2)]

    return make, 0.0


def count(stage: Any, batches: list[Any], first: int) -> int:
    """Operations of the steps that are timed."""
    total = 0
    for step, batch in enumerate(batches[2:], first):
        torch.manual_seed(step)
        with FlopCounterMode(display=False) as counter:
            stage.step(step, batch, 1e-9)
        total += counter.get_total_flops()
    return total


def timed(stage: Any, batches: list[Any], first: int, device: torch.device) -> list[float]:
    """Seconds of each step, after the programs have been made."""

    def run(step: int, batch: Any) -> None:
        torch.manual_seed(step)
        stage.step(step, batch, 1e-9)

    for _ in range(2):
        for step, batch in enumerate(batches[2:], first):
            run(step, batch)  # every shape that will come has come
    return [seconds(lambda s=step, b=batch: run(s, b), device) for step, batch in enumerate(batches[2:], first)]  # type: ignore[misc]


def profile(stage: Any, batches: list[Any], first: int, device: torch.device) -> list[tuple[str, float]]:
    """Shares of the time that each kind of operation itself takes."""
    from torch.profiler import ProfilerActivity

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with torch.profiler.profile(activities=activities) as seen:
        for step, batch in enumerate(batches[2:6], first):
            torch.manual_seed(step)
            stage.step(step, batch, 1e-9)
    spent: dict[str, float] = defaultdict(float)
    for event in seen.key_averages():
        own = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        name = event.key.lower()
        what = "fused programs" if "graph" in name or "compiled" in name or "inductor" in name else "the rest"
        what = next((kind for kind, words in KINDS.items() if any(word in name for word in words)), what)
        spent[what] += own
    total = sum(spent.values())
    return sorted(((what, value / total) for what, value in spent.items()), key=lambda item: -item[1])


if __name__ == "__main__":
    main()
