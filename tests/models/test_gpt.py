"""The AR model's own properties.

The published model's outputs are in test_parity.py, generation in test_generation.py.
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from detailflow import DetailFlowGPT
from detailflow.errors import DetailFlowError
from detailflow.models.gpt import GPTConfig, rotary_table
from detailflow.models.operations import rotate

CONFIG = GPTConfig(
    num_classes=3, width=32, depth=2, heads=2, num_tokens=16, group_size=4, causal_tokens=8, codebook_size=32
)


@pytest.fixture(scope="module")
def gpt() -> DetailFlowGPT:
    torch.manual_seed(0)
    return DetailFlowGPT(CONFIG).eval()


def test_a_token_sees_only_earlier_steps(gpt: DetailFlowGPT):
    """Changing a token changes no logits of its own decoding step or of earlier ones, and all later ones."""
    classes, ids = torch.tensor([0, 2]), torch.randint(32, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = gpt(classes, ids)
        assert before.shape == (2, 16, 32)
        for position in range(16):
            changed = ids.clone()
            changed[:, position] = (changed[:, position] + 1) % 32
            differs = (gpt(classes, changed) != before).any(-1).any(0)
            end = position + 1 if position < 8 else position // 4 * 4 + 4
            assert not differs[:end].any() and differs[end:].all()
        assert (gpt(torch.tensor([1, 2]), ids)[0] != before[0]).any(-1).all()  # the class counts everywhere


def test_rotary_positions():
    table = rotary_table(CONFIG)
    assert table.shape == (16, 8, 2)
    assert not table[0].any()  # the class: its query and key vanish
    for i in range(1, 16):
        row, column = (i - 1) // 4, (i - 1) % 4
        for k in range(4):
            for place, offset in ((row, 0), (column, 4)):
                angle = torch.tensor(place * 10000 ** (-2 * k / 8))
                torch.testing.assert_close(table[i, offset + k], torch.stack((angle.cos(), angle.sin())))
    x = torch.randn(1, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    (a, b), (cos, sin) = x.unflatten(-1, (8, 2)).unbind(-1), table.unbind(-1)
    turned = torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)
    torch.testing.assert_close(rotate(x, table), turned)
    torch.testing.assert_close(
        torch.compile(rotate, backend="eager")(x, table), turned
    )  # the form that a compiler sees


def test_dropout_only_in_training(gpt: DetailFlowGPT):
    classes, ids = torch.tensor([0]), torch.zeros(1, 16, dtype=torch.int64)
    with torch.no_grad():
        assert torch.equal(gpt(classes, ids), gpt(classes, ids))
        try:
            gpt.train()
            assert not torch.equal(gpt(classes, ids), gpt(classes, ids))
        finally:
            gpt.eval()


def test_groups_of_one(tmp_path: Path):
    """g = 1 has no mask embeddings at all: the sequence is next-token prediction throughout."""
    torch.manual_seed(0)
    gpt = DetailFlowGPT(replace(CONFIG, group_size=1, causal_tokens=1)).eval()
    gpt.save_pretrained(tmp_path)
    again = DetailFlowGPT.from_pretrained(tmp_path)
    classes = torch.tensor([0, 1])
    assert torch.equal(gpt.generate(classes, temperature=0), again.generate(classes, temperature=0))


def test_without_a_causal_prefix():
    """With c = 0 the input is [class, m_1 … m_{g−1}, z_1 … z_{N−g}]: the first group sees the class and no token."""
    torch.manual_seed(0)
    gpt = DetailFlowGPT(replace(CONFIG, group_size=4, causal_tokens=0)).eval()
    ids = torch.randint(gpt.config.codebook_size, (1, 16))
    x = gpt.inputs(torch.tensor([1]), ids, 0, 16)
    parts = (gpt.class_embedding.weight[1:2], gpt.mask_embedding.weight, gpt.token_embedding(ids[0, :12]))
    assert torch.equal(x[0], torch.cat(parts))
    changed = ids.clone()
    changed[:, :4] = (changed[:, :4] + 1) % gpt.config.codebook_size
    with torch.no_grad():
        a, b = gpt(torch.tensor([1]), ids), gpt(torch.tensor([1]), changed)
    assert torch.equal(a[:, :4], b[:, :4]) and not torch.isclose(a[:, 4:], b[:, 4:]).all(-1).any()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"heads": 3}, "width must be heads times a multiple of 4"),
        ({"width": 34}, "width must be heads times a multiple of 4"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1, not 1.0"),
        ({"num_classes": -1}, "num_classes must be 0 or more, not -1"),
        ({"class_names": ("a",)}, "class_names has 1 names for num_classes 3"),
        ({"class_names": ("a", "b", 3)}, "class_names must be a list in which each item is text, not 3"),
        ({"group_size": 3}, "group_size must divide num_tokens"),
        ({"top_k": -1}, "top_k must be 0 or more"),
        ({"mlp": 0}, "mlp must be a positive integer"),
    ],
)
def test_wrong_configs(values: dict, message: str):
    with pytest.raises(DetailFlowError, match=message):
        replace(CONFIG, **values)


def test_the_mlp_is_rounded_up():
    assert [GPTConfig(num_classes=1, width=w).mlp for w in (1024, 768, 1280, 1536)] == [2816, 2048, 3584, 4096]


def test_wrong_inputs(gpt: DetailFlowGPT):
    with pytest.raises(DetailFlowError, match=r"codes must have shape \(1, 16\), not \(1, 8\)"):
        gpt(torch.tensor([0]), torch.zeros(1, 8, dtype=torch.int64))
    ids = torch.zeros(1, 16, dtype=torch.int64)
    for name, classes, codes in (
        ("class_ids must be 0 to 3, not 4 to 4", torch.tensor([4]), ids),
        ("class_ids must be 0 to 3, not -1 to -1", torch.tensor([-1]), ids),
        (r"class_ids must be integers in 1 dimension\(s\)", torch.tensor(1), ids),
        (f"codes must be 0 to {CONFIG.codebook_size - 1}, not ", torch.tensor([3]), ids + CONFIG.codebook_size),
        (r"codes must be integers in 2 dimension\(s\)", torch.tensor([3]), ids.float()),
        (r"class_ids must be a tensor of integers, as torch.tensor makes it, not \[3\]", [3], ids),
        (r"codes must be a tensor of integers, as torch.tensor makes it, not \[\[1\]\]", torch.tensor([3]), [[1]]),
    ):
        with pytest.raises(DetailFlowError, match=name):
            gpt(classes, codes)
    for classes in (torch.tensor([3 + 1]), torch.tensor([-1]), torch.tensor([], dtype=torch.int64)):
        with pytest.raises(DetailFlowError, match="class_ids must"):
            gpt.generate(classes)
    with pytest.raises(DetailFlowError, match="class_ids must be a tensor of integers"):
        gpt.generate([3])  # type: ignore[arg-type]
    with pytest.raises(DetailFlowError, match="num_tokens must be 1 to 8 or a multiple of 4 up to 16, not 9"):
        gpt.generate(torch.tensor([0]), num_tokens=9)


@pytest.mark.parametrize(
    ("kind", "changed"),
    [
        ("meta", lambda tensor: tensor.to("meta")),
        ("sparse_coo", lambda tensor: tensor.to_sparse()),
        ("nested", lambda tensor: torch.nested.nested_tensor(list(tensor) if tensor.ndim > 1 else [tensor])),
    ],
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_tensors_without_all_numbers(gpt: DetailFlowGPT, kind: str, changed: Callable[[torch.Tensor], torch.Tensor]):
    classes, ids = torch.tensor([0]), torch.zeros(1, 16, dtype=torch.int64)
    for call in (
        lambda: gpt(changed(classes), ids),
        lambda: gpt(classes, changed(ids)),
        lambda: gpt.generate(changed(classes)),
        lambda: gpt.generate(classes, prefix=changed(ids[:, :4])),
    ):
        with pytest.raises(DetailFlowError, match=f"must be a dense tensor that holds numbers, not a {kind} one"):
            call()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32])
def test_classes_and_codes_of_any_integers(gpt: DetailFlowGPT, dtype: torch.dtype):
    classes, ids = torch.tensor([0, 3]), torch.arange(32).view(2, 16) % CONFIG.codebook_size
    assert torch.equal(gpt(classes.to(dtype), ids.to(dtype)), gpt(classes, ids))
    given = [gpt.generate(classes.to(kind), prefix=ids[:, :4].to(kind), temperature=0) for kind in (dtype, torch.int64)]
    assert torch.equal(*given)


def test_one_can_train_on_what_it_generates(gpt: DetailFlowGPT):
    classes, gpt = torch.tensor([0, 3]), copy.deepcopy(gpt)
    gpt(classes, gpt.generate(classes, temperature=0)).sum().backward()
    assert gpt.head.weight.grad is not None


@pytest.mark.parametrize("engine", ["torch", "native"])
def test_dropout_is_for_training_alone(gpt: DetailFlowGPT, engine: str):
    """A model in training mode generates what it does otherwise, whatever the engine."""
    classes, gpt = torch.tensor([0, 3]), copy.deepcopy(gpt)
    gpt.engine = engine
    wanted = gpt.generate(classes, temperature=0)
    gpt.train()
    assert torch.equal(gpt.generate(classes, temperature=0), wanted)
    assert not torch.equal(gpt(classes, wanted), gpt(classes, wanted))


def test_teacher_forcing_compiles_as_one_graph(gpt: DetailFlowGPT):
    """The check of the input breaks no compiled training step."""
    classes, ids = torch.tensor([0, 3]), torch.zeros(2, 16, dtype=torch.int64)
    whole = torch.compile(gpt, backend="eager", fullgraph=True, dynamic=False)
    torch.testing.assert_close(whole(classes, ids), gpt(classes, ids))


def test_bfloat16(model: Path):
    half = DetailFlowGPT.from_pretrained(model, dtype=torch.bfloat16)
    whole = DetailFlowGPT.from_pretrained(model)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    ids = half.generate(torch.tensor([0, 1]), temperature=0)
    assert ids.shape == (2, 16)
    with torch.no_grad():
        a, b = half(torch.tensor([0, 1]), ids).float(), whole(torch.tensor([0, 1]), ids)
    assert float((a - b).abs().mean() / b.abs().mean()) < 0.05


def test_a_fingerprint_is_of_the_weights_and_of_no_dtype(gpt: DetailFlowGPT):
    known = gpt.fingerprint()
    assert copy.deepcopy(gpt).bfloat16().fingerprint() == known != DetailFlowGPT(gpt.config).fingerprint()
