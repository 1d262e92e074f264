"""How the cost of generation grows with the sequence, the batch and the model, compared with what it should be.

A decoding step reads every weight once and does two operations per weight for each position that it adds. So its time
should be the larger of bytes over bandwidth and operations over speed (`detailflow.machine`). Earlier positions should
cost no more than reading their keys and values.

    python benchmarks/growth.py [--dtype bfloat16] [--device cpu] [--repeats 3]
"""

import argparse
from collections.abc import Callable
from statistics import median

import torch

from detailflow.benchmark import Case, UncachedEngine, generation_costs, time_in_turns
from detailflow.device import choose_device
from detailflow.generation import TorchEngine
from detailflow.machine import measure_ceilings
from detailflow.models.gpt import DetailFlowGPT, GPTConfig

BASE = dict(width=512, depth=8, heads=8, num_tokens=128)


def build(device: torch.device, dtype: torch.dtype, **sizes: int) -> DetailFlowGPT:
    """Return a model with random weights."""
    torch.manual_seed(0)
    config = GPTConfig(num_classes=1000, **(BASE | sizes))  # type: ignore[arg-type]
    return DetailFlowGPT(config).to(device, dtype).eval()


def a_step(gpt: DetailFlowGPT, start: int, kind: type[TorchEngine] | type[UncachedEngine]) -> Callable[[], object]:
    """Return the step that writes the group at `start`; earlier tokens are zeros, which cost the same."""
    state = kind(gpt, torch.zeros(1, dtype=torch.int64, device=gpt.device), guided=True)
    tokens = torch.zeros(1, gpt.config.num_tokens, dtype=torch.int64, device=gpt.device)
    return lambda: state.step(tokens, start, start + gpt.config.group_size)


def table(title: str, rows: list[tuple[str, float, float]]) -> None:
    """Print measured seconds and expected ones, each as a multiple of the first row's."""
    print(f"\n{title}\n{'':>16}  {'ms':>8}  {'× first':>8}  {'expected':>12}")
    for name, measured, expected in rows:
        print(f"{name:>16}  {measured * 1e3:8.1f}  {measured / rows[0][1]:8.2f}  {expected / rows[0][2]:12.2f}")


def main() -> None:
    """Print four tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    device, dtype = choose_device(args.device), getattr(torch, args.dtype)
    ceilings = measure_ceilings(device, dtype)
    print(f"{args.dtype}: {ceilings}")

    def generations(title: str, cases: list[tuple[str, int, dict[str, int]]]) -> None:
        models = {name: (build(device, dtype, **sizes), batch) for name, batch, sizes in cases}
        runs = {
            name: Case(lambda gpt=gpt, batch=batch: gpt.generate(torch.zeros(batch, dtype=torch.int64)))
            for name, (gpt, batch) in models.items()
        }
        measured = time_in_turns(runs, device, args.repeats)
        limits = {name: ceilings.limit(generation_costs(gpt, batch))[0] for name, (gpt, batch) in models.items()}
        table(title, [(name, median(measured[name].seconds), limits[name]) for name in models])

    generations("all tokens of one image", [(f"N = {n}", 1, {"num_tokens": n}) for n in (64, 128, 256, 512)])
    generations("all tokens of a batch", [(f"{b} images", b, {}) for b in (1, 2, 4, 8, 16, 32)])
    widths = [(f"width {w}", 1, {"width": w, "heads": w // 64}) for w in (256, 512, 768, 1024)]
    generations("all tokens of one image, by width", widths)
    gpt = build(device, dtype, num_tokens=512)
    for kind, expected in ((TorchEngine, lambda start: 1.0), (UncachedEngine, lambda start: start + 8.0)):
        starts = (8, 64, 128, 256, 504)
        measured = time_in_turns({f"after {s}": Case(a_step(gpt, s, kind)) for s in starts}, device, args.repeats)
        name = "with the cache" if kind is TorchEngine else "without a cache"
        table(
            f"one step of 8 tokens, {name}",
            [(f"after {s}", median(measured[f"after {s}"].seconds), expected(s)) for s in starts],
        )


if __name__ == "__main__":
    main()
