"""Trackers: which run of Weights & Biases is ours."""

import shutil
from pathlib import Path

from detailflow.training.tracking import run_id


def test_a_run_keeps_its_id_and_no_other_has_it(tmp_path: Path):
    """Wherever its folder is: in two containers two runs may have the same path."""
    (tmp_path / "run").mkdir()
    first = run_id(tmp_path / "run")
    assert run_id(tmp_path / "run") == first and len(first) == 16
    shutil.move(tmp_path / "run", tmp_path / "moved")
    (tmp_path / "run").mkdir()
    assert run_id(tmp_path / "moved") == first != run_id(tmp_path / "run")
