"""Training throughput on this machine: images per second, share of the machine's ceiling, and where a step's time goes.

    python benchmarks/training.py tokenizer --config own-64/tokenizer.yaml --data PHOTOS
    python benchmarks/training.py gpt --config own-64/gpt.yaml --num-tokens 64 --codebook-size 4096

All further options are those of `detailflow train tokenizer` and `train gpt`, such as --loop.batch_size 16. PyTorch
counts the operations of the timed steps (matrix products, convolutions and attention, forward and backward, frozen
networks included).
"""

import argparse
import tempfile
from collections import defaultdict
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from detailflow.cli.request import read_request
from detailflow.data.images import open_images
from detailflow.device import choose_device, precision_dtype
from detailflow.errors import exit_on_error
from detailflow.machine import device_name, keep_freed_memory, measure_ceilings, seconds
from detailflow.models.gpt import GPTConfig
from detailflow.training.config import GPTTraining, TokenizerTraining
from detailflow.training.gpt import GPTStage
from detailflow.training.tokenizer import TokenizerStage

KINDS = {  # of operation → words in the profiler's names; the first that fits counts
    "optimizer": ("adam", "_foreach", "clip_grad"),
    "attention": ("attention", "flash"),
    "convolutions": ("conv",),
    "matrix products": ("mm", "linear", "matmul", "addmm", "gemm", "mkldnn", "bmm"),
    "casts and copies": ("copy", "to_copy", "clone", "contiguous", "cat"),
    "norms, activations, sums": ("norm", "gelu", "silu", "softmax", "mul", "add", "sub", "div", "sum", "mean", "pow"),
    "fused operations": ("graph", "compiled", "inductor"),
}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("tokenizer", "gpt"))
    parser.add_argument("--steps", type=int, default=8, help="timed steps (default: %(default)s)")
    parser.add_argument("--num-tokens", type=int, default=128, help="of the AR model's sequences")
    parser.add_argument("--codebook-size", type=int, default=8192)
    parser.add_argument("--classes", type=int, default=1000)
    args, settings = parser.parse_known_args()
    keep_freed_memory()  # as a run does
    kind = TokenizerTraining if args.stage == "tokenizer" else GPTTraining
    known = ["--tokens", "-", "--tokenizer", "-"] if args.stage == "gpt" else []
    with tempfile.TemporaryDirectory() as folder:
        request = read_request(kind, f"train {args.stage}", "", [*settings, *known, "--output", folder])
        if request is None:
            return
        config, device = request.settings, choose_device(request.device)
        plain = replace(config, loop=replace(config.loop, compile=False))
        if args.stage == "tokenizer":
            source = open_images(config.data, split=config.split)
            counted, stage = (TokenizerStage(c, source, Path(folder), device) for c in (plain, config))
            data = stage.batches(0)
            next(data)
            loading = seconds(lambda: next(data), device, max(4, args.steps))
            batches = list(islice(data, args.steps))
        else:
            counted, stage = (gpt_stage(args, c, device) for c in (plain, config))
            loading, size = 0.0, (config.loop.batch_size, args.num_tokens)
            draws = [torch.randint(args.codebook_size, size) for _ in range(args.steps)]
            batches = [(torch.randint(args.classes, size[:1]), ids, ids) for ids in draws]
        report(args, config, device, loading, Steps(counted, batches, config), Steps(stage, batches, config))


class Steps:
    """The last steps of a run, in which all losses are on."""

    def __init__(self, stage: Any, batches: list[Any], config: Any) -> None:
        self.stage, self.batches, self.first = stage, batches, config.loop.steps - len(batches)

    def run(self, i: int) -> None:
        """Take step `i` of these."""
        torch.manual_seed(self.first + i)
        self.stage.step(self.first + i, self.batches[i], 1e-9)

    def run_all(self) -> None:
        """Take all of them."""
        for i in range(len(self.batches)):
            self.run(i)


def report(
    args: argparse.Namespace, config: Any, device: torch.device, loading: float, plain: Steps, steps: Steps
) -> None:
    """Count the operations of `plain`, time `steps`, and print both."""
    with FlopCounterMode(display=False) as counter:
        plain.run_all()
    for _ in range(2):  # compiles for every shape
        steps.run_all()
    times = [seconds(lambda i=i: steps.run(i), device) for i in range(args.steps)]  # type: ignore[misc]
    loop, step, operations = config.loop, sum(times) / args.steps, counter.get_total_flops() / args.steps
    dtype = precision_dtype(loop.precision, device)
    ceiling = measure_ceilings(device, dtype).flops
    print(f"{args.stage}: torch {torch.__version__}, {device_name(device)}, {torch.get_num_threads()} threads")
    print(f"{str(dtype).removeprefix('torch.')}, batch {loop.batch_size}, {'' if loop.compile else 'not '}compiled")
    print(f"ceiling {ceiling / 1e9:.0f} GFLOP/s\n")
    print(f"step                  {step * 1e3:10.1f} ms   (best {min(times) * 1e3:.1f})")
    print(f"images per second     {loop.batch_size / step:10.1f}")
    print(f"operations per image  {operations / loop.batch_size / 1e9:10.1f} GFLOP")
    print(f"share of the ceiling  {operations / step / ceiling:10.1%}")
    if loading:
        print(f"data alone            {loop.batch_size / loading:10.1f} images per second, {loop.workers} workers")
    print("\nwhere a step's time goes")
    for what, share in profile(steps, device):
        print(f"  {what:26} {share:6.1%}")


def gpt_stage(args: argparse.Namespace, config: GPTTraining, device: torch.device) -> GPTStage:
    """Return the AR model's stage, without token store and tokenizer."""
    sizes = GPTConfig(
        num_classes=args.classes,
        width=config.width,
        depth=config.depth,
        heads=config.heads,
        num_tokens=args.num_tokens,
        codebook_size=args.codebook_size,
        dropout=config.dropout,
    )
    return GPTStage(config, sizes, None, None, device)  # type: ignore[arg-type]


def profile(steps: Steps, device: torch.device) -> list[tuple[str, float]]:
    """Return each kind of operation's share of the time, the largest first."""
    activity = torch.profiler.ProfilerActivity
    cuda = device.type == "cuda"
    with torch.profiler.profile(activities=[activity.CPU, *([activity.CUDA] if cuda else [])]) as seen:
        for i in range(min(4, len(steps.batches))):
            steps.run(i)
    spent: dict[str, float] = defaultdict(float)
    for event in seen.key_averages():
        name = event.key.lower()
        what = next((kind for kind, words in KINDS.items() if any(word in name for word in words)), "the rest")
        spent[what] += event.self_device_time_total if cuda else event.self_cpu_time_total
    total = sum(spent.values())
    return sorted(((what, value / total) for what, value in spent.items()), key=lambda item: -item[1])


if __name__ == "__main__":
    with exit_on_error():
        main()
