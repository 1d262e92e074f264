"""experiments/ablation/fixed_tokens.py from end to end, with two steps of tiny AR models."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

SCRIPT = Path(__file__).parents[2] / "experiments" / "ablation" / "fixed_tokens.py"
LOOP = {"steps": 2, "batch_size": 4, "learning_rate": 1e-3, "trackers": []}


@pytest.mark.slow
def test_three_variants(cifar: Path, tmp_path: Path):
    recipe = tmp_path / "gpt.yaml"
    recipe.write_text(yaml.safe_dump({"width": 32, "depth": 1, "heads": 2, "loop": LOOP}))
    command = [
        sys.executable,
        str(SCRIPT),
        "--data",
        str(cifar),
        "--output",
        str(tmp_path / "my runs"),
        "--num-samples",
        "20",
    ]
    command += ["--recipe", str(recipe), "--guidance-scale", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = [line.split(" | ") for line in done.stdout.splitlines()[-3:]]  # after those of the reports
    assert [row[0] for row in rows] == ["| parallel", "| self-correction", "| first-group-causal"]
    changes = [row[-2] for row in rows]
    assert [bool(change.strip()) for change in changes] == [False, True, True]
