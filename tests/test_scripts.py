"""The scripts in benchmarks/ and experiments/ find what they import from the package, and explain themselves."""

import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted([*ROOT.glob("benchmarks/*.py"), *ROOT.glob("experiments/*/*.py")])


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_help(script: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    monkeypatch.syspath_prepend(script.parent)  # as Python does for a script
    monkeypatch.setattr("signal.signal", lambda *_: None)  # Ctrl-C stays as it is here
    try:
        with pytest.raises(SystemExit, match="0"):
            runpy.run_path(str(script), run_name="__main__")
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("detailflow"):
            raise
        pytest.skip(f"{script.name} needs {error.name}")
    assert "usage: " in capsys.readouterr().out


def test_a_report_of_a_gpu_keeps_parts_that_do_not_run_again(tmp_path: Path):
    gpu = runpy.run_path(str(ROOT / "benchmarks" / "gpu.py"))
    facts = {"device": "Some GPU", "torch": "2.11", "small": False}
    part = {"part": "tests", "rows": [{"what": "one"}], "seconds": 1.0, "problem": None}
    assert gpu["earlier_parts"](tmp_path, facts) == {}
    gpu["write_report"](tmp_path, facts, [part])
    assert gpu["earlier_parts"](tmp_path, facts) == {"tests": part}
    assert gpu["earlier_parts"](tmp_path, facts | {"torch": "2.12"}) == {}
