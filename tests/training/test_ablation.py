"""The ablation's settings and training; its figures and its report are in tests/evaluation/test_ablation.py."""

import time
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from detailflow import DetailFlowPipeline
from detailflow.errors import DetailFlowError
from detailflow.evaluation.published import published
from detailflow.training import teachers
from detailflow.training.ablation import Ablation, Spent, laid_over, spent, timed, train_variant

RECIPE = Path(str(files("detailflow") / "configs" / "ablation-cifar10.yaml"))
LOOP = {"steps": 1, "batch_size": 2, "learning_rate": 1e-3, "trackers": [], "precision": "fp32"}
VIT = {"width": 16, "depth": 1, "heads": 2}
TINY: dict[str, Any] = {
    "data": "images",
    "features": "features.safetensors",
    "test_split": None,
    "tokenizer": {
        "model": {
            "image_size": 16,
            "patch_size": 8,
            "num_tokens": 4,
            "group_size": 2,
            "codebook_size": 16,
            "codebook_dim": 4,
            "encoder": VIT,
            "decoder": VIT,
        },
        "adversarial": 0.0,
        "perceptual": 0.1,
        "classifier_epochs": 1,
        "loop": LOOP,
    },
    "extract": {"crops": "two"},
    "gpt": {"width": 16, "depth": 1, "heads": 2, "loop": LOOP},
    "variants": [{"name": "first"}, {"name": "second", "gpt": {"planted_share": 0.0}}],
}


def make(**changes: Any) -> Ablation:
    return Ablation.from_dict(laid_over(TINY, changes), "tiny.yaml")


def differing(a: Any, b: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted name → value in `b` of the settings that differ; paths are left out."""
    result = {}
    for key in a.__dataclass_fields__:
        x, y = getattr(a, key), getattr(b, key)
        if hasattr(x, "__dataclass_fields__"):
            result |= differing(x, y, f"{prefix}{key}.")
        elif x != y and key not in ("tokens", "tokenizer"):
            result[prefix + key] = y
    return result


# ------------------------------------------------------------------------------------------------- the recipe


def test_the_recipe_is_the_paper_s_table(tmp_path: Path):
    """Each variant adds one thing to the one before (method §8)."""
    text = RECIPE.read_text()
    assert text.startswith("# ") and max(map(len, text.splitlines())) <= 130
    config = Ablation.from_dict(yaml.safe_load(text), RECIPE)
    stages = config.stages(tmp_path)
    assert [s.variant.paper for s in stages] == [row["name"] for row in published()["ablation"]["rows"]]
    first = stages[0]
    assert (first.tokenizer.model.causal_encoder, first.tokenizer.coarse_probability) == (False, 0.0)
    assert (first.tokenizer.correction_share, first.gpt.planted_share, first.tokenizer.alignment) == (0.0, 0.0, 0.0)
    added = [differing(a.tokenizer, b.tokenizer, "tokenizer.") | differing(a.gpt, b.gpt, "gpt.") for a, b in pairwise(stages)]
    assert added == [
        {"tokenizer.model.causal_encoder": True},
        {"tokenizer.coarse_probability": 0.3},
        {"tokenizer.model.group_size": 4, "tokenizer.model.causal_tokens": 0},
        {"tokenizer.correction_share": 1.0, "gpt.planted_share": 0.3},
        {"tokenizer.model.causal_tokens": 4},
        {"tokenizer.alignment": 1.0},
    ]
    n = first.tokenizer.model.num_tokens
    steps = [len(s.tokenizer.model.schedule.steps) for s in stages]
    assert steps == [n, n, n, n // 4, n // 4, n // 4 + 3, n // 4 + 3]
    assert {s.tokenizer.alignment_network for s in stages} == {"classifier"}
    assert len({s.folders["tokenizer"] for s in stages}) == 7
    assert [s.model for s in stages] == [tmp_path / s.variant.name / "gpt" for s in stages]


# ------------------------------------------------------------------------------------------------- settings


def test_equal_stages_are_run_once(tmp_path: Path):
    config = make(
        variants=[
            {"name": "a"},
            {"name": "b", "gpt": {"planted_share": 0.0}},
            {"name": "c", "extract": {"mistakes": 3}},
            {"name": "d", "tokenizer": {"model": {"causal_tokens": 0}}},
            {"name": "e", "tokenizer": {"model": {"causal_tokens": None}}, "extract": {"mistakes": 50}},
        ]
    )
    folders = [[str(folder.relative_to(tmp_path)) for folder in stages.folders.values()] for stages in config.stages(tmp_path)]
    assert folders == [
        ["a/tokenizer", "a/tokens", "a/gpt"],
        ["a/tokenizer", "a/tokens", "b/gpt"],
        ["a/tokenizer", "c/tokens", "c/gpt"],
        ["d/tokenizer", "d/tokens", "d/gpt"],
        ["a/tokenizer", "a/tokens", "b/gpt"],
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variants": None}, "tiny.yaml: variants must be a list, each with a name"),
        ({"variants": []}, "variants must have one at least"),
        ({"variants": ["a"]}, "variants must be a list, each with a name"),
        ({"variants": [{"name": "a"}, {"name": "a"}]}, "two variants have the name a: give each its own"),
        ({"variants": [{"name": "../a"}]}, "a variant's name must be of letters, digits and hyphens, not '../a'"),
        ({"variants": [{"name": "classifier"}]}, "a variant's name must be"),
        ({"variants": [{"tokenizer": {}}]}, "tiny.yaml, variant 1: the config is incomplete"),
        ({"variants": [{"name": "a", "tokeniser": {}}]}, "tiny.yaml, variant 1: unknown key 'tokeniser'"),
        ({"variants": [{"name": "a", "tokenizer": {"corse": 1}}]}, "variant a: unknown key 'corse'"),
        (
            {"variants": [{"name": "a", "tokenizer": {"model": {"group_size": 3}}}]},
            "variant a: group_size must divide num_tokens",
        ),
        ({"gpt": {"loop": {"steps": "many"}}}, "variant first: steps must be int, not 'many'"),
        ({"tokenizer": None}, "tiny.yaml: tokenizer must be dict, not None"),
        ({"sample": 3}, "tiny.yaml: unknown key 'sample'"),
        ({"num_samples": 0}, "num_samples must be a positive integer, not 0"),
        ({"guidance_scales": []}, "guidance_scales must be a list of numbers, with one scale at least"),
        ({"guidance_scales": ["high"]}, "guidance_scales must be a list of numbers"),
        ({"seeds": [-1]}, "seeds must be 0 or more, not -1"),
    ],
)
def test_bad_settings(changes: dict[str, Any], message: str):
    with pytest.raises(DetailFlowError) as caught:
        make(**changes)
    assert message in str(caught.value) and "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------- running


def test_times_add_up(tmp_path: Path):
    def work(seconds: float = 0.05) -> None:
        until = time.process_time() + seconds
        while time.process_time() < until:
            pass

    for _ in range(2):
        with timed(tmp_path, tmp_path / "a" / "gpt", "a", tmp_path / "done"):
            work()
    with pytest.raises(KeyboardInterrupt), timed(tmp_path, tmp_path / "b", "b"):
        work()
        raise KeyboardInterrupt
    took = spent(tmp_path)
    assert took.keys() == {"a/gpt", "b"} and took["a/gpt"].cpu >= 0.08 and took["b"].cpu >= 0.03
    assert all(value.wall > 0 for value in took.values())
    (tmp_path / "done").touch()
    with timed(tmp_path, tmp_path / "a" / "gpt", "a", tmp_path / "done"):
        work()
    assert spent(tmp_path) == took
    assert spent(tmp_path / "nowhere") == {} and Spent(1, 2).wall == 2


def test_training_shares_and_resumes(cifar: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    small = tmp_path / "images"
    for path in sorted(cifar.rglob("*.png"))[:: 200 // 12]:
        copy = small / f"class{len(list(small.rglob('*.png'))) % 2}" / path.name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    trained = []
    real = teachers.train_classifier
    monkeypatch.setattr(teachers, "train_classifier", lambda *a: trained.append(a) or real(*a))
    output = tmp_path / "out"
    # Without a causal prefix and without a causal encoder, then with other groups: what only the ablation has.
    config = make(
        data=str(small),
        variants=[
            {"name": "odd", "tokenizer": {"model": {"causal_tokens": 0, "causal_encoder": False}, "coarse_probability": 1.0}},
            {"name": "single", "tokenizer": {"model": {"group_size": 1, "causal_tokens": 1}}},
            {"name": "alone", "tokenizer": {"perceptual": 0.0, "alignment": 0.0}},
        ],
    )
    everything = config.stages(output)
    for stages in everything:
        train_variant(config, stages, output, "cpu")
    assert len(trained) == 1
    shared = (output / "classifier" / "features.pt").read_bytes()
    for name in ("odd", "single"):
        assert (output / name / "tokenizer" / "features.pt").read_bytes() == shared
        pipeline = DetailFlowPipeline.from_pretrained(output / name, device="cpu")
        assert len(pipeline(0, num_images_per_class=2, guidance_scale=2.0)) == 2
        assert len(list(pipeline.stream(0))) == len(pipeline.gpt.schedule.steps) == (2 if name == "odd" else 4)
    assert not (output / "alone" / "tokenizer" / "features.pt").exists()
    took = spent(output)
    stages = [f"{name}/{stage}" for name in ("odd", "single", "alone") for stage in ("tokenizer", "tokens", "gpt")]
    assert took.keys() == {"classifier", *stages}
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    capsys.readouterr()
    for stages_again in everything:
        train_variant(config, stages_again, output, "cpu")
    assert capsys.readouterr().out.count("finished already") == 9
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before
    with pytest.raises(DetailFlowError, match="holds a run with another "):
        other = make(data=str(small), tokenizer={"model": {"codebook_dim": 2}}, variants=[{"name": "alone"}])
        train_variant(other, other.stages(output)[0], output, "cpu")
