"""How near the logits of each engine and dtype come to PyTorch's in float32."""

import copy
from dataclasses import dataclass

import torch

from detailflow.benchmark import Begin, BenchmarkConfig, Progress, aligned, describe, engines, load
from detailflow.device import choose_device
from detailflow.errors import DetailFlowError
from detailflow.generation import TorchEngine, draw, guidance_at, image_generator, image_noise
from detailflow.models.gpt import DetailFlowGPT

IMAGES = 16  # whose logits are compared


@dataclass(frozen=True)
class Accuracy:
    """How near the logits of an engine come to PyTorch's in float32, with the same earlier tokens.

    `error` is the root mean square of the differences, `greedy` the share of tokens whose likeliest code, with
    guidance, is the same.
    """

    engine: str
    dtype: str
    error: float
    greedy: float


@dataclass(frozen=True)
class AccuracyReport:
    """The accuracy of all engines and dtypes, and the standard deviation of the logits of a position."""

    model: str
    tokens: int
    deviation: float
    rows: list[Accuracy]

    def __str__(self) -> str:
        cells = [["engine", "dtype", "rms error", "greedy"]]
        cells += [[row.engine, row.dtype, f"{row.error:.2g}", f"{row.greedy:.2%}"] for row in self.rows]
        measured = (
            f"logits of {self.tokens} tokens, of standard deviation {self.deviation:.3g}, beside PyTorch's float32"
        )
        return "\n".join([self.model, measured, "", *aligned(cells)])


@torch.inference_mode()
def accuracy(config: BenchmarkConfig, progress: Progress = lambda what: None) -> AccuracyReport:
    """Compare the logits of every engine and dtype with those of PyTorch in float32."""
    device, rows, deviation = choose_device(config.device), [], 0.0
    torch.manual_seed(0)  # of random weights
    exact = load(config, device, "float32")
    for dtype in dict.fromkeys(config.dtypes):
        gpt = copy.deepcopy(exact.gpt).to(getattr(torch, dtype))
        for name, engine in engines(gpt).items():
            if (name, dtype) == ("torch", "float32"):
                continue
            progress(f"accuracy, {name}, {dtype}")
            error, greedy, deviation = differences(exact.gpt, gpt, engine)
            rows.append(Accuracy(name, dtype, error, greedy))
    if not rows:
        raise DetailFlowError("accuracy compares with PyTorch in float32: name another dtype, or another engine, too")
    return AccuracyReport(describe(exact, config), IMAGES * exact.gpt.config.num_tokens, deviation, rows)


def differences(exact: DetailFlowGPT, gpt: DetailFlowGPT, engine: Begin) -> tuple[float, float, float]:
    """Return an engine's rms error, its share of equal greedy codes, and the standard deviation of the logits."""
    sampling, schedule, n = exact.config.sampling, exact.schedule, exact.config.num_tokens
    ids = torch.arange(IMAGES, device=exact.device) % exact.config.num_labels
    noise = image_noise([image_generator(0, i) for i in range(IMAGES)], n).to(exact.device)
    tokens = torch.zeros(IMAGES, n, dtype=torch.int64, device=exact.device)
    ours, theirs = engine(gpt, ids, sampling.guided), TorchEngine(exact, ids, sampling.guided)
    likeliest = sampling.updated(temperature=0.0)
    squares, variances, same = [], [], []
    for start, end in schedule.steps:
        scale, numbers = guidance_at(sampling, schedule, start), noise[:, start:end]
        found, wanted = (e.step(tokens, start, end).float() for e in (ours, theirs))
        squares.append((found - wanted).square().mean((0, 2)))
        variances.append(wanted.var(-1).mean(0))
        greedy = [draw(logits, numbers, likeliest, scale)[0] for logits in (found, wanted)]
        same.append((greedy[0] == greedy[1]).float().mean(0))
        tokens[:, start:end] = draw(wanted, numbers, sampling, scale)[0]
    error, variance, share = (torch.cat(parts).mean().item() for parts in (squares, variances, same))
    return error**0.5, share, variance**0.5
