"""LoRA: what it trains and what it leaves, runs that go on, checkpoints and exports as ordinary models, its plan."""

import copy
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from detailflow import DetailFlowGPT
from detailflow.errors import DetailFlowError
from detailflow.models.gpt import GPTConfig
from detailflow.training.config import GPTTraining, LoopConfig
from detailflow.training.gpt import GPTStage
from detailflow.training.plan import STAYING, TRAINED, networks_of

SIZES = GPTConfig(3, 32, 2, 2, num_tokens=16, codebook_size=32, dropout=0.1)
LOOP = LoopConfig(steps=4, batch_size=4, learning_rate=1e-2, precision="fp32")
CPU = torch.device("cpu")
CLASSES, IDS = torch.tensor([0, 2]), torch.arange(32).view(2, 16)


@pytest.fixture
def start(tmp_path: Path) -> DetailFlowGPT:
    torch.manual_seed(3)
    model = DetailFlowGPT(SIZES)
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.1)
    model.save_pretrained(tmp_path / "start")
    return model.eval()


def stage(folder: Path, resuming: bool = False) -> GPTStage:
    torch.manual_seed(0)
    config = GPTTraining("tokens", "tokenizer", LOOP, init=str(folder / "start"), lora=2, width=32, depth=2, heads=2)
    return GPTStage(config, SIZES, None, None, CPU, resuming)  # type: ignore[arg-type]


def take_steps(made: GPTStage, steps: range) -> dict[str, Any]:
    for step in steps:
        torch.manual_seed(step)
        ids = torch.randint(32, (4, 16))
        logged = made.step(step, (torch.randint(3, (4,)), ids, ids), 1e-2)
    return logged


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_it_begins_as_the_model_and_changes_matrices_and_classes_only(start: DetailFlowGPT, tmp_path: Path):
    made = stage(tmp_path)
    assert torch.equal(made.model.eval()(CLASSES, IDS), start(CLASSES, IDS))
    made.model.train()
    take_steps(made, range(3))
    before, after = start.state_dict(), made.lora.merged().state_dict()  # type: ignore[union-attr]
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys()
    assert changed == {"class_embedding.weight"} | {
        name for name in before if name.split(".")[-2] in ("qkv", "proj", "gate", "up", "down")
    }
    difference = after["blocks.0.attn.qkv.weight"] - before["blocks.0.attn.qkv.weight"]
    assert torch.linalg.matrix_rank(difference, atol=1e-6) == 2


def test_it_learns(start: DetailFlowGPT, tmp_path: Path):
    made = stage(tmp_path)
    ids = IDS[:1].expand(4, 16)
    losses = []
    for step in range(30):
        losses.append(float(made.step(step, (torch.zeros(4, dtype=torch.long), ids, ids), 1e-2)["loss"]))
    assert losses[-1] < 0.5 * losses[0]


def test_the_average_has_no_copy_of_what_stays(start: DetailFlowGPT, tmp_path: Path):
    made = stage(tmp_path)
    take_steps(made, range(2))
    ours, average = dict(made.model.named_parameters()), dict(made.ema.named_parameters())
    shared = {name for name in ours if ours[name] is average[name]}
    assert shared == {name for name, weight in ours.items() if not weight.requires_grad}
    assert not torch.equal(average["class_embedding.weight"], ours["class_embedding.weight"])


def test_a_run_goes_on_exactly(start: DetailFlowGPT, tmp_path: Path):
    first = stage(tmp_path)
    take_steps(first, range(2))
    second = stage(tmp_path, resuming=True)
    second.restore(copy.deepcopy(first.state()))
    for made in (first, second):
        take_steps(made, range(2, 4))
    assert same(first.model.state_dict(), second.model.state_dict())
    assert same(first.ema.state_dict(), second.ema.state_dict())


def test_the_best_step_comes_back_without_the_start(start: DetailFlowGPT, tmp_path: Path):
    """Which the run has read once, and may be gone by then; a run that goes on needs it again."""
    made = stage(tmp_path)
    take_steps(made, range(2))
    best, weights = copy.deepcopy(made.state()), copy.deepcopy(made.model.state_dict())
    take_steps(made, range(2, 4))
    shutil.rmtree(tmp_path / "start")
    made.restore(best)
    assert same(made.model.state_dict(), weights)
    with pytest.raises(DetailFlowError, match="start"):
        stage(tmp_path, resuming=True).restore(best)


def test_a_checkpoint_of_other_matrices(start: DetailFlowGPT, tmp_path: Path):
    made = stage(tmp_path)
    state = made.state()
    state["model_lora"].popitem()
    with pytest.raises(ValueError, match="LoRA matrices of another model"):
        made.restore(state)


def test_checkpoint_and_export_are_ordinary_models(start: DetailFlowGPT, tmp_path: Path):
    made = stage(tmp_path)
    take_steps(made, range(2))
    made.export(tmp_path / "model")
    exported = DetailFlowGPT.from_pretrained(tmp_path / "model", device="cpu", dtype=torch.float32)
    state = made.state()
    assert same(exported.state_dict(), state["ema"])
    assert torch.allclose(exported(CLASSES, IDS), made.ema(CLASSES, IDS), atol=1e-5)
    assert state["model"].keys() == start.state_dict().keys()


def test_its_plan_counts_what_is_trained(start: DetailFlowGPT, tmp_path: Path):
    made = stage(tmp_path)
    learnt, rest = networks_of(made)
    assert (learnt.role, rest.role) == (TRAINED, STAYING)
    assert learnt.parameters == sum(w.numel() for w in made.model.parameters() if w.requires_grad)
    assert learnt.parameters + rest.parameters == sum(w.numel() for w in made.model.parameters())


def test_it_needs_a_model_and_its_package(tmp_path: Path, start: DetailFlowGPT, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(DetailFlowError, match="lora trains a small addition to a trained model"):
        GPTTraining("tokens", "tokenizer", LOOP, lora=2)
    with pytest.raises(DetailFlowError, match="choose one"):
        GPTTraining("tokens", "tokenizer", replace(LOOP, shard=True), init="model", lora=2)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(
        DetailFlowError, match=r"lora needs the package peft: install it with pip install 'detailflow\[lora\]'"
    ):
        stage(tmp_path)
