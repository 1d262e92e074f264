"""The front door: help, exit statuses, and no torch before it is needed."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import detailflow
from detailflow import DetailFlowTokenizer
from detailflow.cli import main as front
from detailflow.cli.main import main
from detailflow.token_files import TokenFile


def run(*argv: str, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "detailflow", *argv]
    return subprocess.run(command, capture_output=True, text=True, **options)  # type: ignore[call-overload]


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]):
    assert main([]) == main(["--help"]) == main(["-h"]) == 0
    out = capsys.readouterr().out
    for command in ("generate", "reconstruct", "train", "extract"):
        assert command in out


MODES = {"train": ("tokenizer", "gpt"), "evaluate": ("tokenizer", "gpt", "samples", "statistics", "compare")}
PAGES = ["", *front.COMMANDS, *(f"{command} {mode}" for command, modes in MODES.items() for mode in modes)]


@pytest.mark.parametrize("argv", ["evaluate compare NAME NAME", "bench --json NAME", "encode x.png --output NAME.npz"])
def test_a_name_that_is_too_long(argv: str, capsys: pytest.CaptureFixture[str]):
    assert main(argv.replace("NAME", "a" * 300).split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("detailflow: error: cannot ") and line.endswith(": File name too long")


def test_a_name_that_the_locale_cannot_write(tmp_path: Path):
    fingerprint = DetailFlowTokenizer.from_pretrained().fingerprint()
    file = TokenFile(np.ones((1, 48), np.int64), np.full((1, 2), 32), ("日本",), fingerprint)
    file.write(tmp_path / "a.npz")
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = run("decode", "a.npz", "--output", "out", "--device", "cpu", cwd=tmp_path, env={**os.environ, **locale})
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "cannot be written in ascii, this system's encoding: set LC_ALL=C.UTF-8" in done.stderr


def test_another_text_that_cannot_be_encoded_is_no_matter_of_the_locale(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(front, "_run", lambda argv: "\udc80".encode())
    with pytest.raises(UnicodeEncodeError):
        main(["classes"])


STOPPED = """
import atexit, sys, time
from detailflow.cli import main as front

def run(argv):
    raise KeyboardInterrupt

front._run = run
atexit.register(lambda: (print("ending", flush=True), time.sleep(60)))  # as a download in a thread may take
sys.exit(front.main())
"""


def test_ctrl_c_again_ends_at_once():
    with subprocess.Popen([sys.executable, "-c", STOPPED], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"ending\n"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (130, b"detailflow: interrupted\n")


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("columns", ["80", "300"])
def test_help_fits_a_screen(
    page: str, columns: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", columns)
    with suppress(SystemExit):  # argparse's own way out
        assert main([*page.split(), "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert 8 <= len(lines) <= (50 if page == "train tokenizer" else 40)
    assert max(map(len, lines)) <= min(100, int(columns) - 1)


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


def test_help_as_a_command(capsys: pytest.CaptureFixture[str]):
    for words, same in ((["help"], []), (["help", "data"], ["data", "--help"]), (["help", "train", "gpt"], None)):
        with suppress(SystemExit):
            assert main(words) == 0
        out = capsys.readouterr().out
        assert out.startswith("usage: detailflow")
        if same is not None:
            with suppress(SystemExit):
                main(same)
            assert capsys.readouterr().out == out


def test_an_option_before_the_command(capsys: pytest.CaptureFixture[str]):
    assert main(["--seed", "1", "generate", "cat"]) == 2
    expected = "--seed is not a command: options come after the command, as in detailflow COMMAND --seed"
    assert capsys.readouterr().err == f"detailflow: error: {expected}\n"


@pytest.mark.parametrize(
    ("command", "advice"), [("generat", "did you mean generate?"), ("x", "the commands are generate, ")]
)
def test_unknown_command(command: str, advice: str, capsys: pytest.CaptureFixture[str]):
    assert main([command]) == 2
    assert f"detailflow: error: unknown command {command!r}: {advice}" in capsys.readouterr().err


def test_a_command_that_needs_more_packages(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "needy.py").write_text("import a_package_that_is_not_there")
    monkeypatch.setattr("detailflow.cli.__path__", [str(tmp_path)])
    monkeypatch.setitem(front.COMMANDS, "needy", "")
    assert main(["needy"]) == 2
    assert "needy needs the package a_package_that_is_not_there: install it with" in capsys.readouterr().err


WITHOUT_THE_EXTRA = """
import re, sys, tomllib
from importlib.abc import MetaPathFinder

EXTRA = tomllib.load(open(sys.argv[1], "rb"))["project"]["optional-dependencies"]["train"]
NAMES = {re.match(r"[\\w-]+", line)[0].replace("-", "_") for line in EXTRA} | {"pyarrow"}

class Hiding(MetaPathFinder):
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in NAMES else self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = [Hiding(finder) for finder in sys.meta_path]
from detailflow.cli.main import main

for line in sys.stdin:
    try:
        status = main(line.split())
    except SystemExit as stopped:
        status = stopped.code
    print("status", status, file=sys.stderr)
"""


def test_without_the_extra(tmp_path: Path, model: Path):
    """Each command says which package it lacks, and the extra that brings it, or does without; help is always there."""
    for k in range(2):
        (tmp_path / "images" / str(k)).mkdir(parents=True)
        Image.new("RGB", (32, 32), (90 * k, 100, 200)).save(tmp_path / "images" / str(k) / "a.png")
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    extra = "detailflow train needs the extra `train`"
    sets = "a folder of images, .parquet or .tar files, or a hub name"
    lacking = {
        "train tokenizer --data images --output run --config own-64/tokenizer": extra,
        "train gpt --tokens tokens --tokenizer run --output run --config own-64/gpt": extra,
        "train --data images --output run": extra,
        "data a.parquet": "a parquet file or hub data set needs the package datasets",
        "data fotos/cats": "fotos/cats is neither a file nor a folder here, and a hub data set needs the "
        "package datasets",
        f"evaluate tokenizer --data images --model {model} --output run": "needs the package matplotlib",
        "data fotos": f"fotos does not exist: give {sets} (owner/name)",
        "train --data fotos --output run": f"fotos does not exist: give {sets} (owner/name)",
        f"reconstruct bild --model {model}": f"bild does not exist: give an image file, {sets} (owner/name)",
        f"vary images/0/a.png kat --model {model}": f"kat does not exist: give an image file, {sets} (owner/name)",
    }
    helps = [*(f"{page} --help" for page in ("train", "train tokenizer", "train gpt", "extract", "evaluate gpt"))]
    plain = [f"generate --model {model}", "data images", f"reconstruct images --model {model}"]
    pyproject = Path(__file__).parents[2] / "pyproject.toml"
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_THE_EXTRA, str(pyproject)],
        input="\n".join([*lacking, *helps, *plain]), capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    said = done.stderr.splitlines()
    install = ": install it with pip install 'detailflow[train]' (from a clone: pip install '.[train]')"
    for i, message in enumerate(lacking.values()):
        assert said[2 * i].endswith(message if "does not exist" in message else message + install)
        assert said[2 * i + 1] == "status 2"
    assert [line for line in said[2 * len(lacking) :] if line.startswith("status")] == ["status 0"] * len(
        [*helps, *plain]
    )
    assert not (tmp_path / "run").exists()


def test_a_reader_that_leaves_gets_no_traceback():
    command = f"{sys.executable} -m detailflow --help | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.stderr == ""
    assert done.returncode in (0, 141)  # 0 where all was written before the reader left


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_output_that_is_closed(closed: str, tmp_path: Path):
    """The work is done, in silence."""
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    command = f"{sys.executable} -m detailflow reconstruct {tmp_path / 'a.png'} --output {tmp_path / 'out'} {closed}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr
    assert ("PSNR" in done.stdout) == (closed == "2>&-") and ("wrote" in done.stderr) == (closed == ">&-")
    assert "wrote" not in done.stdout and len(list((tmp_path / "out").iterdir())) == 2
    wrong = subprocess.run(["bash", "-c", f"{command} --numm 3"], capture_output=True, text=True)
    assert wrong.returncode == 2 and wrong.stdout == ""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device of Linux")
def test_a_full_disk_behind_the_output():
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "detailflow", "classes"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "the standard output cannot be written: No space left on device" in done.stderr


def test_ctrl_c(model: Path, tmp_path: Path):
    command = [sys.executable, "-m", "detailflow", "generate", "--num", "100000", "--model", str(model)]
    process = subprocess.Popen(
        [*command, "--output", str(tmp_path / "out")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.default_int_handler
        ),  # which shells ignore in background jobs
    )
    try:
        deadline = time.monotonic() + 300
        while not (tmp_path / "out" / "0000-airplane.png").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert (process.returncode, out, err) == (130, "", "detailflow: interrupted\n")
    assert not [path for path in (tmp_path / "out").iterdir() if path.suffix != ".png"]


DROPS = """
import signal, time
try:
    signal.raise_signal(signal.SIGINT)
    time.sleep(0.2)
except KeyboardInterrupt:  # as libraries in C do when they are imported
    pass
"""


def test_ctrl_c_within_an_import(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """It waits for the end of the import, and is not lost."""
    (tmp_path / "drops.py").write_text(f"{DROPS}\ndef main(argv):\n    time.sleep(5)\n    return 0")
    monkeypatch.setattr("detailflow.cli.__path__", [str(tmp_path)])
    monkeypatch.setitem(front.COMMANDS, "drops", "")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        assert main(["drops"]) == 130
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == "detailflow: interrupted\n"


@pytest.mark.parametrize("option", [["--max-pixels", "100"], ["--max-pixels=100"]])
def test_one_option_sets_the_limit_on_pixels(
    option: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys
):
    monkeypatch.setenv("DETAILFLOW_MAX_PIXELS", "1000")  # put back afterwards
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    assert main(["reconstruct", str(tmp_path / "a.png"), *option, "--output", str(tmp_path / "out")]) == 2
    assert "a.png is too large an image: it has 20×20 pixels, and 100 are the most" in capsys.readouterr().err
    for wrong in (["--max-pixels"], ["--max-pixels", "none"]):
        assert main(["classes", *wrong]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_names_that_no_terminal_shows_are_printed():
    code = (
        "from detailflow.cli import main; main._run = lambda argv: print('caf\\udce9'); raise SystemExit(main.main([]))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii"}
    )
    assert result.returncode == 0 and result.stdout == b"caf?\n"
