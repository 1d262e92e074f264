"""What the AR model's stage does in corners: no groups, and weights of a model with the same classes."""

import copy
from pathlib import Path

import pytest
import torch

from detailflow import DetailFlowGPT
from detailflow.models.gpt import GPTConfig
from detailflow.training.config import GPTTraining, LoopConfig
from detailflow.training.gpt import GPTStage, initial_weights

LOOP = LoopConfig(steps=4, batch_size=4, learning_rate=1e-2, precision="fp32")


def stage(**sizes: int) -> GPTStage:
    torch.manual_seed(0)
    config = GPTTraining("tokens", "tokenizer", LOOP, width=32, depth=1, heads=2)
    given = dict(num_classes=3, width=32, depth=1, heads=2, num_tokens=16, codebook_size=32) | sizes
    return GPTStage(config, GPTConfig(**given), None, None, torch.device("cpu"))  # type: ignore[arg-type]


def batch(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(32, (4, 16), generator=draw)
    return torch.randint(3, (4,), generator=draw), ids, ids


@pytest.mark.parametrize("sizes", [dict(group_size=8, causal_tokens=16), dict(group_size=1), dict(group_size=4)])
def test_a_run_goes_on_whatever_the_groups(sizes: dict[str, int]):
    """c = N has no use for mask embeddings, and g = 1 has none: a checkpoint must hold what is there."""
    first, second = stage(**sizes), stage(**sizes)
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
