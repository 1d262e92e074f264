"""What the AR model's stage does in corners: no groups, and weights of a model with the same classes."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from detailflow import DetailFlowGPT
from detailflow.errors import DetailFlowError
from detailflow.models.gpt import GPTConfig
from detailflow.training.config import GPTTraining, LoopConfig
from detailflow.training.gpt import GPTStage, initial_weights

LOOP = LoopConfig(steps=4, batch_size=4, learning_rate=1e-2, precision="fp32")


def stage(muon: float = 0.0, **sizes: int) -> GPTStage:
    torch.manual_seed(0)
    config = GPTTraining("tokens", "tokenizer", LOOP, width=32, depth=1, heads=2, muon=muon)
    given = dict(num_classes=3, width=32, depth=1, heads=2, num_tokens=16, codebook_size=32) | sizes
    return GPTStage(config, GPTConfig(**given), None, None, torch.device("cpu"))  # type: ignore[arg-type]


def batch(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(32, (4, 16), generator=draw)
    return torch.randint(3, (4,), generator=draw), ids, ids


@pytest.mark.parametrize("muon", [0.0, 1e-2])
@pytest.mark.parametrize("sizes", [dict(group_size=8, causal_tokens=16), dict(group_size=1), dict(group_size=4)])
def test_a_run_goes_on_whatever_the_groups(sizes: dict[str, int], muon: float):
    """c = N has no use for mask embeddings, and g = 1 has none: a checkpoint must hold what is there."""
    first, second = stage(muon, **sizes), stage(muon, **sizes)
    for step in range(2):
        torch.manual_seed(step)
        first.step(step, batch(step), 1e-2)
    second.restore(copy.deepcopy(first.state()))  # as from a file
    for made in (first, second):
        torch.manual_seed(7)
        made.step(2, batch(2), 1e-2)
    ours, theirs = first.model.state_dict(), second.model.state_dict()
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)
    assert not torch.equal(ours["head.weight"], stage(**sizes).model.state_dict()["head.weight"])


def test_muon_has_the_matrices_of_the_blocks():
    """AdamW has the others."""
    plain, made = stage(group_size=4), stage(1e-2, group_size=4)
    assert [type(o).__name__ for o in plain.updater.optimizers] == ["AdamW"]
    adam, muon = made.updater.optimizers
    (group,) = muon.param_groups
    assert sorted(tuple(p.shape) for p in group["params"]) == [(32, 32), (32, 256), (96, 32), (256, 32), (256, 32)]
    assert (type(muon).__name__, group["lr"], group["weight_decay"]) == ("Muon", 1e-2, 0.05)
    names = {id(p): name for name, p in made.model.named_parameters()}
    assert {names[id(p)] for p in adam.param_groups[0]["params"]} == {
        f"{name}.weight" for name in ("class_embedding", "token_embedding", "mask_embedding", "head")
    }
    assert {names[id(p)] for p in made.updater.parameters()} == set(names.values())


def test_muon_learns_by_heart_sooner():
    def loss(muon: float) -> float:
        made = stage(muon, group_size=4)
        torch.manual_seed(1)
        return [float(made.step(step, batch(0), 1e-2)["loss"]) for step in range(12)][-1]

    assert loss(3e-2) < loss(0.0)


def test_what_muon_is_not_for():
    with pytest.raises(DetailFlowError, match="muon trains whole matrices, which loop.shard has not: choose one"):
        GPTTraining("tokens", "tokenizer", replace(LOOP, shard=True), muon=1e-3)
    with pytest.raises(DetailFlowError, match="muon trains whole matrices, which lora has not: choose one"):
        GPTTraining("tokens", "tokenizer", LOOP, init="model", lora=2, muon=1e-3)


def test_the_same_classes_keep_their_rows(tmp_path: Path):
    """Also where two share a name, as ImageNet's cranes do."""
    sizes = GPTConfig(
        3, 32, 1, 2, num_tokens=16, group_size=4, codebook_size=32, class_names=("crane", "heron", "crane")
    )
    model = DetailFlowGPT(sizes)
    torch.nn.init.normal_(model.class_embedding.weight)
    model.save_pretrained(tmp_path / "gpt")
    again = initial_weights(str(tmp_path / "gpt"), sizes)
    assert torch.equal(again["class_embedding.weight"], model.class_embedding.weight)
