"""The progress bar: on a terminal, and nowhere else."""

import os
import sys
from io import StringIO

import pytest

from detailflow.progress import bar_width, progress_bar


def test_a_terminal_that_does_not_say_how_wide_it_is(monkeypatch: pytest.MonkeyPatch):
    """As those of containers and of some editors: tqdm alone shows nothing there."""
    ours, theirs = os.openpty()
    os.set_blocking(ours, False)
    with os.fdopen(theirs, "w") as terminal:
        assert os.get_terminal_size(theirs).columns == 0
        monkeypatch.setattr(sys, "stderr", terminal)
        assert bar_width() == {"ncols": 80, "nrows": 24}
        assert list(progress_bar(range(3), desc="counting", delay=0)) == [0, 1, 2]
        assert b"counting" in os.read(ours, 10_000)
    os.close(ours)


def test_no_terminal(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "stderr", StringIO())
    assert bar_width() == {"dynamic_ncols": True}
    assert list(progress_bar(range(3), desc="counting", delay=0)) == [0, 1, 2]
    assert sys.stderr.getvalue() == ""  # type: ignore[attr-defined]
