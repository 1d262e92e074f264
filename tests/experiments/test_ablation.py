"""experiments/ablation/run.py: its commands, its table, and two variants from end to end at a tiny size."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev
from types import ModuleType
from typing import Any

import pytest
import yaml

from detailflow import DetailFlowPipeline
from detailflow.cli.main import main
from detailflow.cli.request import read_request
from detailflow.training.config import Extraction, GPTTraining, TokenizerTraining

SCRIPT = Path(__file__).parents[2] / "experiments" / "ablation" / "run.py"
VIT = {"width": 16, "depth": 1, "heads": 2}
LOOP = {"steps": 2, "batch_size": 4, "learning_rate": 1e-3, "trackers": [], "precision": "fp32"}
MODEL = {"image_size": 16, "patch_size": 8, "num_tokens": 8, "codebook_size": 16, "codebook_dim": 4}
TINY = {
    "tokenizer": {
        "model": MODEL | {"encoder": VIT, "decoder": VIT},
        "perceptual": 0.0,
        "adversarial": 0.0,
        "loop": LOOP,
    },
    "extract": {"crops": "two"},
    "gpt": VIT | {"loop": LOOP},
}


@pytest.fixture(scope="module")
def ablation(load_script: Callable[[Path], ModuleType]) -> ModuleType:
    return load_script(SCRIPT)


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


def test_each_variant_adds_one_thing(ablation: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """The commands are whole, and their settings are those of the paper's table 2."""
    ablation.main(["--data", "my images", "--output", str(tmp_path / "a run"), "--seeds", "3", "--dry-run"])
    lines = capsys.readouterr().out.splitlines()
    assert not list(tmp_path.iterdir()) and "--data 'my images'" in lines[1]
    kinds = {"train tokenizer": TokenizerTraining, "extract": Extraction, "train gpt": GPTTraining}
    asked: dict[str, list[Any]] = {kind: [] for kind in kinds}
    for line in lines:
        for command, kind in kinds.items():
            if line.startswith(f"detailflow {command} "):
                request = read_request(kind, command, "", ablation.shlex.split(line)[len(command.split()) + 1 :])
                assert request is not None
                asked[command].append(request.settings)
    tokenizers, extractions, models = asked.values()
    assert len(tokenizers) == len(extractions) == len(models) == len(ablation.VARIANTS) == 7
    assert {config.loop.seed for config in (*tokenizers, *models)} == {config.seed for config in extractions} == {3}
    first = tokenizers[0]
    assert (first.model.causal_encoder, first.coarse_probability, first.correction_share) == (False, 0.0, 0.0)
    assert (first.alignment, models[0].planted_share) == (0.0, 0.0)
    added = [differing(*pair) for pair in pairwise(tokenizers)]
    assert added == [
        {"model.causal_encoder": True},
        {"coarse_probability": 0.3},
        {"model.group_size": 4, "model.causal_tokens": 0},
        {"correction_share": 1.0},
        {"model.causal_tokens": 4},
        {"alignment": 1.0},
    ]
    assert [differing(*pair) for pair in pairwise(models)] == [{}, {}, {}, {"planted_share": 0.3}, {}, {}]
    n = first.model.num_tokens
    steps = [len(config.model.schedule.steps) for config in tokenizers]
    assert steps == [n, n, n, n // 4, n // 4, n // 4 + 3, n // 4 + 3]
    assert {config.alignment_network for config in tokenizers} == {"classifier"}


def test_the_paper_s_figures(ablation: ModuleType):
    text = (SCRIPT.parents[2] / "tests" / "data" / "published.md").read_text(encoding="utf-8")
    table = text.partition("\nAblation")[2].partition("\nGuidance")[0]
    assert [f"{variant.paper:.2f}" for variant in ablation.VARIANTS.values()] == re.findall(r"\d\.\d\d", table)


def result(*values: float) -> dict[str, Any]:
    return {"guidance": 2.0, "figures": {"PSNR": [20.0], "gFD": list(values)}}


def test_the_table(ablation: ModuleType):
    results = {
        "baseline": result(5.0, 5.1),
        "causal-encoder": result(4.0, 4.1),  # better, as in the paper
        "coarse-to-fine": result(4.5, 4.6),  # worse
        "parallel": result(4.6, 4.9),  # worse by as much as chance may make it
        "first-group-causal": result(4.0, 4.2),  # its neighbour was not measured
    }
    rows = ablation.compare_all(results)
    verdicts = ["", "as in the paper", "the other way than in the paper", "no more than other seeds may differ", ""]
    assert [row["verdict"] for row in rows] == verdicts
    assert [row["change"] for row in rows] == [None, pytest.approx(-1.0), pytest.approx(0.5), pytest.approx(0.2), None]
    header, _, first, second, *_ = ablation.markdown(rows).splitlines()
    assert header == "| variant | PSNR | gFD | guidance | gFID in the paper | change of gFD |  |"
    assert first == "| baseline | 20.000 | 5.050 ± 0.071 | 2 | 3.97 |  |  |"
    assert second == "| causal-encoder | 20.000 | 4.050 ± 0.071 | 2 | 3.66 | -1.000 | as in the paper |"


def test_seeds_are_those_of_training_if_there_are_several(ablation: ModuleType):
    runs = [
        {"figures": {"gFD": {"value": value, "spread": 1.0, "values": [value - 1, value + 1]}}} for value in (3.0, 5.0)
    ]
    assert ablation.over_seeds(runs) == {"gFD": [3.0, 5.0]}
    assert ablation.over_seeds(runs[:1]) == {"gFD": [2.0, 4.0]}
    assert ablation.over_seeds([{"figures": {"PSNR": {"value": 20.0, "spread": 0.1, "values": []}}}]) == {
        "PSNR": [20.0]
    }


def test_a_single_seed_is_not_tested(ablation: ModuleType):
    assert ablation.compare([5.0], [4.999], -0.3) == (pytest.approx(-0.001), "as in the paper")


def test_changes_are_judged_by_a_t_test(ablation: ModuleType):
    """Student's two-sided test at 95% with four degrees of freedom, whose critical value is 2.776."""
    before = [1.0, 1.2, 1.5]
    for shift in (0.1, 0.4, 0.5, 0.6, 0.7, 1.5):
        after = [value + shift for value in (0.9, 1.3, 1.4)]
        chance = ablation.compare(before, after, 1.0)[1] == "no more than other seeds may differ"
        error = ((stdev(before) ** 2 + stdev(after) ** 2) / 3) ** 0.5
        assert chance == (abs(mean(after) - mean(before)) / error < 2.776)


def make_material(cifar: Path, folder: Path) -> None:
    """Write images in two splits, and a tiny recipe."""
    for k, path in enumerate(sorted(cifar.rglob("*.png"))[::5]):
        copy = folder / "images" / ("train", "test")[k % 2] / path.parent.name / path.name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    for stage, settings in TINY.items():
        (folder / f"{stage}.yaml").write_text(yaml.safe_dump(settings))


@pytest.mark.parametrize(("name", "steps"), [("baseline", 8), ("parallel", 2)])
def test_variants_train_and_generate(name: str, steps: int, ablation: ModuleType, cifar: Path, tmp_path: Path):
    """Models without a causal encoder, and without a causal prefix, are trained by nothing else."""
    make_material(cifar, tmp_path)
    line = ["--data", tmp_path / "images", "--recipe", tmp_path, "--output", tmp_path / "out", "--device", "cpu"]
    for command in ablation.commands(ablation.parse_args([*map(str, line)]), name, 5)[1:4]:
        assert main(command[1:]) == 0
    pipeline = DetailFlowPipeline.from_pretrained(tmp_path / "out" / name / "seed-5", device="cpu")
    assert len(pipeline(0, num_images_per_class=2, guidance_scale=2.0)) == 2
    assert len(list(pipeline.stream(0))) == len(pipeline.gpt.schedule.steps) == steps


@pytest.mark.slow
def test_two_variants_from_end_to_end(cifar: Path, feature_file: Path, tmp_path: Path):
    make_material(cifar, tmp_path)

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        line = shlex.split(f"--data images --features {feature_file} --recipe . --output out --device cpu")
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(SCRIPT), *line, *words]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)

    few = "--variants coarse-to-fine parallel --num-samples 12 --num-images 10 --guidance-scale 1 2"
    done = run(*few.split())
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "report.md").read_text().count("\n| ") == 4
    content = json.loads((tmp_path / "out" / "report.json").read_text())
    first, second = content["rows"]
    assert (first["variant"], second["variant"]) == ("coarse-to-fine", "parallel")
    assert second["change"] == pytest.approx(sum(second["figures"]["gFD"]) / 2 - sum(first["figures"]["gFD"]) / 2)
    report = json.loads((tmp_path / "out" / "parallel" / "seed-0" / "generated" / "report.json").read_text())
    distances = {row["setting"]["guidance"]: row["figures"]["gFD"] for row in report["sections"][0]["rows"]}
    assert second["guidance"] == min(distances, key=lambda scale: distances[scale]["value"])
    assert second["figures"]["gFD"] == distances[second["guidance"]]["values"] and len(second["figures"]["PSNR"]) == 1

    # What is finished is not done again, and what was measured in another way is not taken for this.
    other = run("--variants", "parallel", "--num-samples", "13", "--num-images", "10")
    assert other.stdout.count("finished already") == 3 and "evaluate tokenizer" not in other.stdout
    assert other.returncode == 2 and "has the report of another evaluation" in other.stderr
