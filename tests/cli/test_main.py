"""The front door: help, exit statuses, and no torch before it is needed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

import detailflow
from detailflow.cli import main as front
from detailflow.cli.main import main


def run(*argv: str, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "detailflow", *argv]
    return subprocess.run(command, capture_output=True, text=True, **options)  # type: ignore[call-overload]


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]):
    assert main([]) == main(["--help"]) == main(["-h"]) == 0
    out = capsys.readouterr().out
    for command in ("generate", "reconstruct", "train", "extract"):
        assert command in out


@pytest.mark.parametrize("argv", [["--help"], ["generate", "--help"], ["reconstruct", "--help"]])
@pytest.mark.parametrize("columns", ["80", "300"])
def test_help_fits_a_screen(argv: list[str], columns: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", columns)
    if len(argv) == 1:
        main(argv)
    else:
        with pytest.raises(SystemExit) as stopped:  # argparse's own way out
            main(argv)
        assert stopped.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= min(100, int(columns))


def test_help_does_not_wait_for_torch():
    code = (
        "import sys, detailflow; from detailflow.cli.main import main; main(['--help'])\n"
        "try: main(['generate', '--help'])\n"
        "finally: assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_version():
    done = run("--version")
    assert (done.returncode, done.stdout) == (0, f"detailflow {detailflow.__version__}\n")


def test_the_package_exports_its_names():
    for name in detailflow.__all__:
        assert getattr(detailflow, name) is not None
        assert name in dir(detailflow)
    with pytest.raises(AttributeError, match="no attribute 'DetailFlow'"):
        detailflow.DetailFlow  # noqa: B018


@pytest.mark.parametrize(("command", "advice"), [("generat", "did you mean generate?"), ("x", "the commands are generate, ")])
def test_unknown_command(command: str, advice: str, capsys: pytest.CaptureFixture[str]):
    assert main([command]) == 2
    assert f"detailflow: error: unknown command {command!r}: {advice}" in capsys.readouterr().err


def test_a_command_that_needs_more_packages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "needy.py").write_text("import a_package_that_is_not_there")
    monkeypatch.setattr("detailflow.cli.__path__", [str(tmp_path)])
    monkeypatch.setitem(front.COMMANDS, "needy", "")
    assert main(["needy"]) == 2
    assert "needy needs the package a_package_that_is_not_there: install it with" in capsys.readouterr().err


def test_a_reader_that_leaves_gets_no_traceback():
    command = f"{sys.executable} -m detailflow --help | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.stderr == ""
    assert done.returncode in (0, 141)  # 0 where all was written before the reader left


def test_ctrl_c(model: Path, tmp_path: Path):
    command = [sys.executable, "-m", "detailflow", "generate", "--num", "100000", "--model", str(model)]
    process = subprocess.Popen(
        [*command, "--output", str(tmp_path / "out")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # which shells ignore in background jobs
    )
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "out" / "0000-airplane.png").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert (process.returncode, out, err) == (130, "", "detailflow: interrupted\n")
    assert not [path for path in (tmp_path / "out").iterdir() if path.suffix != ".png"]


@pytest.mark.parametrize("option", [["--max-pixels", "100"], ["--max-pixels=100"]])
def test_one_option_sets_the_limit_on_pixels(option: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys):
    monkeypatch.setenv("DETAILFLOW_MAX_PIXELS", "1000")  # put back afterwards
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    assert main(["reconstruct", str(tmp_path / "a.png"), *option, "--output", str(tmp_path / "out")]) == 2
    assert "a.png is too large an image: it has 20×20 pixels, and 100 are the most" in capsys.readouterr().err
    for wrong in (["--max-pixels"], ["--max-pixels", "none"]):
        assert main(["classes", *wrong]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_names_that_no_terminal_shows_are_printed():
    code = "import sys; from detailflow.cli import main; main._run = lambda argv: print('caf\\udce9'); sys.exit(main.main([]))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert result.returncode == 0 and result.stdout == b"caf?\n"
