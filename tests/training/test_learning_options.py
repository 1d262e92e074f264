"""Training with nested dropout and Muon, which are not in the paper."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from detailflow import DetailFlowTokenizer
from detailflow.data.images import open_images
from detailflow.errors import DetailFlowError
from detailflow.models.layers import ViTConfig
from detailflow.models.tokenizer import TokenizerConfig
from detailflow.schedule import TokenSchedule
from detailflow.training.config import LoopConfig, TokenizerTraining
from detailflow.training.passes import TokenizerNetworks, draw_present
from detailflow.training.tokenizer import TokenizerStage, tokenizer_optimizers

VIT = ViTConfig(32, 2, 2)
SIZES = dict(
    image_size=32, patch_size=8, num_tokens=16, group_size=4, causal_tokens=8, codebook_size=64, codebook_dim=4
)
MODEL = TokenizerConfig(VIT, VIT, **SIZES, linear_path=True, pixel_channels=8, absent_token=True)  # type: ignore[arg-type]


def training(cifar: Path, **settings: object) -> TokenizerTraining:
    loop = LoopConfig(steps=20, batch_size=8, learning_rate=2e-3, precision="fp32", trackers=())
    given = dict(adversarial=0.0, coarse_probability=0.0, muon=4e-3, nested_probability=0.5) | settings
    return TokenizerTraining(str(cifar), MODEL, loop, **given)  # type: ignore[arg-type]


def test_how_many_tokens_stay():
    torch.manual_seed(0)
    present = draw_present(TokenSchedule(48, 8, 16, 32, 4), 4000)
    counts = Counter(present.sum(1).tolist())
    assert present.shape == (4000, 48) and set(counts) == {1, 2, 4, 8, 16, 32}
    assert all(abs(n - 4000 / 6) < 130 for n in counts.values())
    assert bool((present.long().diff(dim=1) <= 0).all())  # the first ones


def test_muon_has_the_matrices_of_the_blocks(cifar: Path):
    config = training(cifar)
    networks = TokenizerNetworks(DetailFlowTokenizer(MODEL), 50, None)
    adam, muon = tokenizer_optimizers(networks, config)
    shapes = sorted(tuple(p.shape) for p in muon.param_groups[0]["params"])
    assert shapes == sorted([(96, 32), (32, 32), (128, 32), (32, 128)] * 4)  # qkv, proj and MLP of four blocks
    ours = sum(p.numel() for group in (adam, muon) for p in group.param_groups[0]["params"])
    assert ours == sum(p.numel() for p in networks.parameters())
    assert [type(o).__name__ for o in tokenizer_optimizers(networks, training(cifar, muon=0.0))] == ["Adam"]


def test_a_run_learns_and_goes_on_exactly(cifar: Path, tmp_path: Path):
    config, source = training(cifar), open_images(cifar)
    stage = TokenizerStage(config, source, tmp_path, torch.device("cpu"))
    batches = stage.batches(0)
    losses = []
    for step in range(20):
        batch = next(batches)
        torch.manual_seed(step)
        if step == 10:
            torch.save(stage.state(), tmp_path / "state.pt")
        losses.append(stage.step(step, batch, config.loop.rate_at(step)))
    nested = [x for x in losses if "psnr_nested" in x]
    assert 4 <= len(nested) <= 16 and all(("psnr" in x) != ("psnr_nested" in x) for x in losses)
    plain = [float(x["pixel"]) for x in losses if "psnr" in x]
    assert plain[-1] < 0.8 * plain[0]
    other = TokenizerStage(config, source, tmp_path, torch.device("cpu"))
    other.restore(torch.load(tmp_path / "state.pt", weights_only=True))
    batches = other.batches(10)
    for step in range(10, 20):
        batch = next(batches)
        torch.manual_seed(step)
        again = other.step(step, batch, config.loop.rate_at(step))
        assert float(again["loss"]) == float(losses[step]["loss"])


def test_what_does_not_fit(cifar: Path):
    with pytest.raises(DetailFlowError, match="nested_probability needs a model with an absent token"):
        replace(training(cifar), model=replace(MODEL, absent_token=False))
    with pytest.raises(DetailFlowError, match="of this model's groups none ends there: set nested_probability to 0"):
        replace(training(cifar), model=replace(MODEL, num_tokens=12, group_size=6, causal_tokens=0))
    with pytest.raises(DetailFlowError, match="muon must be 0 or more"):
        training(cifar, muon=-1.0)
