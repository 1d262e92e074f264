"""experiments/learning/run.py from end to end, with two steps of each layout."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "experiments" / "learning" / "run.py"


@pytest.mark.slow
def test_both_layouts_from_two_seeds(cifar: Path, tmp_path: Path):
    command = [sys.executable, str(SCRIPT), "--data", str(cifar), "--held-out", str(cifar), "--preset", "small-32"]
    command += ["--steps", "3", "2", "--seeds", "0", "1", "--num-images", "4", "--output", str(tmp_path / "my runs")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in done.stdout.splitlines()[-4:]]
    assert table[0] == ["", "steps", "1 tokens, dB", "4 tokens, dB", "16 tokens, dB", "48 tokens, dB", "blockiness"]
    assert [row[:2] for row in table[2:]] == [["the paper's layout, Adam", "3"], ["the preset's", "2"]]
    assert all(" ± " in cell for row in table[2:] for cell in row[2:])
    again = subprocess.run(command, capture_output=True, text=True, check=False)  # reads the reports
    assert (again.returncode, again.stdout) == (0, "\n".join(done.stdout.splitlines()[-4:]) + "\n")
