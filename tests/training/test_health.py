"""Steps that go wrong: gradients that are not finite are not applied, and too many of them in a row end the run."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from detailflow.distributed import World
from detailflow.errors import DetailFlowError
from detailflow.training.config import LoopConfig
from detailflow.training.loop import Run
from detailflow.training.loop import train as train_stage
from detailflow.training.optimizer import Updater, recompute_activations


@dataclass(frozen=True)
class Settings:
    loop: LoopConfig


class Line:
    """A stage that fits one number to 3; its loss is not finite in the steps `bad`."""

    comparable_from, validation = 0.0, None

    def __init__(self, loop: LoopConfig, bad: tuple[int, ...] = ()) -> None:
        self.weight, self.bad, self.values = torch.zeros((), requires_grad=True), bad, []
        self.updater = Updater(torch.optim.Adam([self.weight], lr=1.0), loop, torch.device("cpu"))

    def batches(self, start_step: int) -> Iterator[int]:
        yield from range(start_step, 1000)

    def step(self, step: int, batch: int, rate: float, log: bool = True) -> dict[str, Any]:
        loss = (self.weight - 3).square() * (math.nan if batch in self.bad else 1.0)
        self.updater.backward(loss)
        norm = self.updater.step(rate)
        self.values.append(float(self.weight.detach()))
        return {"loss": loss.detach(), "gradient_norm": norm}

    def state(self) -> dict[str, Any]:
        return {"weight": self.weight.detach(), "updater": self.updater.state()}

    def restore(self, state: dict[str, Any]) -> None:
        self.weight.data.copy_(state["weight"])
        self.updater.restore(state["updater"])

    def validate(self) -> dict[str, float]:
        return {}

    def model_config(self) -> dict[str, Any]:
        return {}

    def pictures(self) -> dict[str, Image.Image]:
        return {}

    def export(self, directory: Path) -> None:
        (directory / "config.json").write_text("{}")


def loop(**settings: Any) -> LoopConfig:
    return LoopConfig(**({"steps": 60, "batch_size": 1, "learning_rate": 0.2, "precision": "fp32"} | settings))


def train(config: LoopConfig, output: Path, bad: tuple[int, ...] = ()) -> Line:
    stage = Line(config, bad)
    train_stage(lambda _: stage, Run("line", Settings(config), output, World(), torch.device("cpu")))
    return stage


def test_a_bad_step_changes_nothing(tmp_path: Path):
    stage = train(loop(), tmp_path / "run", bad=(7, 8, 30))
    assert stage.values[7] == stage.values[6] == stage.values[8] and stage.values[30] == stage.values[29]
    assert stage.values[-1] == pytest.approx(3, abs=0.1)
    assert all(math.isfinite(value) for value in stage.values)


def test_many_in_a_row_stop_the_run(tmp_path: Path):
    config = loop(checkpoint_minutes=0)
    with pytest.raises(DetailFlowError) as raised:
        train(config, tmp_path / "run", bad=tuple(range(20, 60)))
    newest = sorted((tmp_path / "run" / "resume").iterdir())[-1]
    assert "not finite in 5 steps in a row, up to step 25" in str(raised.value)
    assert str(raised.value).endswith(f"the last good checkpoint is {newest}")
    state = torch.load(newest, weights_only=True)["state"]
    assert math.isfinite(float(state["weight"])) and not (tmp_path / "run" / "config.json").exists()
    resumed = train(config, tmp_path / "run")  # what was wrong is mended
    assert len(resumed.values) < 60 and resumed.values[-1] == pytest.approx(3, abs=0.1)


def test_without_a_checkpoint(tmp_path: Path):
    with pytest.raises(DetailFlowError, match="there is no checkpoint yet"):
        train(loop(), tmp_path / "run", bad=tuple(range(60)))


def test_float16_looks_for_its_loss_scale(tmp_path: Path):
    """The first scales are too large for gradients in float16, which is nothing to stop for."""
    config = loop(precision="fp16")
    stage = Line(config)
    weight = torch.full((), 60000.0, dtype=torch.float16)

    def step(step: int, batch: int, rate: float, log: bool = True) -> dict[str, Any]:
        half = stage.weight.half()  # the gradient of the product below is ten times the scale
        stage.updater.backward((half * weight).float() / 6000 + (stage.weight - 3).square())
        norm = stage.updater.step(rate)
        stage.values.append(float(stage.weight.detach()))
        return {"loss": stage.weight.detach(), "gradient_norm": norm}

    stage.step = step  # type: ignore[method-assign]
    train_stage(lambda _: stage, Run("line", Settings(config), tmp_path / "run", World(), torch.device("cpu")))
    assert stage.updater.scaler.get_scale() < 65536
    assert stage.values[0] == 0 and stage.values[-1] == pytest.approx(-2, abs=0.2)  # the minimum of 10 w + (w − 3)²


def test_clipping_and_its_norm():
    weight = torch.tensor([3.0, 4.0], requires_grad=True)
    updater = Updater(torch.optim.SGD([weight], lr=1.0), loop(grad_clip=1.0), torch.device("cpu"))
    updater.backward((weight * torch.tensor([6.0, 8.0])).sum() / 2)
    updater.backward((weight * torch.tensor([6.0, 8.0])).sum() / 2)
    assert updater.step(0.5) == pytest.approx(10)  # of both together
    assert weight.tolist() == pytest.approx([3 - 0.5 * 0.6, 4 - 0.5 * 0.8])
    assert weight.grad is None


def test_recomputed_activations_give_the_same_gradients():
    torch.manual_seed(0)
    network = torch.nn.Sequential(*(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU()) for _ in range(3)))
    x, found, kept = torch.randn(4, 8), [], []
    for _ in range(2):
        network.zero_grad()
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t):
            loss = network(x).square().sum()
        loss.backward()
        found.append([p.grad.clone() for p in network.parameters()])
        kept.append(sum(sizes))
        recompute_activations(network)
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
    assert kept[1] < kept[0]
