"""Steps that the device itself leaves out."""

import copy
import math
from dataclasses import replace

import pytest
import torch

from detailflow.training.config import LoopConfig
from detailflow.training.optimizer import Updater

LOOP = LoopConfig(steps=1, batch_size=1, learning_rate=0.1, precision="fp32")


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_gradients_that_are_not_finite_change_nothing(fused: bool, kind: type[torch.optim.Adam]):
    """Neither weights nor averages nor the number of steps; the next good one is as if there had been none."""

    def take(*losses: float) -> tuple[torch.Tensor, dict]:
        weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        updater = Updater(kind([weight], lr=0.1, fused=fused), LOOP, torch.device("cpu"))
        norms = []
        for factor in losses:
            updater.backward((weight * weight).sum() * factor)
            norms.append(updater.step(0.1))
        assert [bool(norm.isfinite()) for norm in norms] == [math.isfinite(factor) for factor in losses]
        return weight.detach(), copy.deepcopy(updater.state()["optimizers"][0]["state"][0])

    (bad, bad_state), (good, good_state) = take(1.0, math.nan, math.inf, 2.0), take(1.0, 2.0)
    assert torch.equal(bad, good)
    for name in ("step", "exp_avg", "exp_avg_sq"):
        assert torch.equal(bad_state[name], good_state[name])


@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_one_optimizer_s_gradients_stop_the_others_too(precision: str, value: float):
    """Muon's matrix overflows, Adam's vector does not: clipping by the norm of both would spread it to Adam."""
    vector, matrix = torch.nn.Parameter(torch.ones(4)), torch.nn.Parameter(torch.ones(4, 4))
    optimizers = [torch.optim.Adam([vector], lr=0.1, fused=True), torch.optim.Muon([matrix], lr=0.1)]
    updater = Updater(optimizers, replace(LOOP, precision=precision), torch.device("cpu"))

    def step(bad: bool) -> None:
        updater.backward((vector.sum() + matrix.sum()) ** 2)
        if bad:
            matrix.grad[0, 0] = value  # type: ignore[index]
        updater.step(0.1)

    step(bad=False)
    before = vector.detach().clone(), matrix.detach().clone()
    assert not torch.equal(before[0], torch.ones(4))
    step(bad=True)
    assert torch.equal(vector, before[0]) and torch.equal(matrix, before[1])
    step(bad=False)
    assert not torch.equal(vector, before[0]) and not torch.equal(matrix, before[1])
    assert vector.isfinite().all() and matrix.isfinite().all()
