"""Run cases one after another in this process.

`python -m fuzz.worker FOLDER STOCK`, numbers in, a line of JSON out for each.
"""

import faulthandler
import json
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

from detailflow import native

from .cases import kind_of, make
from .guard import MEMORY, Captured, Guard, forget_peak, limited_memory, peak_memory
from .stock import encoded, make_stock, photo


def serve(folder: Path, stock: Path) -> None:
    """Answer until no more numbers come."""
    commands, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1):  # a case finds nothing on its standard input, and cannot answer in our place
        os.dup2(null, standard)
    sys.dont_write_bytecode = True
    folder.mkdir(exist_ok=True)
    (folder / "secret.png").write_bytes(encoded(photo(0)))
    make_stock(stock)
    warm_up()
    native.library()  # is built, if it is not there yet: no case may start a compiler
    guard = Guard(folder / "home", folder / "secret.png")
    hang = open(folder / "hang.txt", "w")  # noqa: SIM115  # where the parent finds what a case was at when it asks
    faulthandler.register(signal.SIGUSR1, file=hang)
    print("ready", file=answers, flush=True)
    for line in commands:
        print(json.dumps(run(int(line), folder, stock, guard)), file=answers, flush=True)


def warm_up() -> None:
    """Import what cases need, as that takes seconds, and starts a process once: matplotlib looks for fonts."""
    for name in (
        "datasets",
        "matplotlib.font_manager",
        "tensorboard",
        "torchmetrics.image",
        "torchvision",
        "yaml",
    ):
        with suppress(ImportError):
            import_module(name)


def run(number: int, folder: Path, stock: Path, guard: Guard) -> dict[str, Any]:
    """Make a case, run it, and say what came of it; `faults` is empty if all is well."""
    case = folder / "case"
    os.chdir(folder)
    shutil.rmtree(case, ignore_errors=True)
    (case / "in").mkdir(parents=True)
    os.chdir(case)
    answer: dict[str, Any] = {
        "number": number,
        "kind": kind_of(number),
        "argv": [],
        "out": "",
        "err": "",
        "seconds": 0.0,
        "peak": 0,
        "resident": 0,
    }
    (folder / "case.json").write_text(json.dumps(answer))
    try:
        answer["argv"] = argv = make(number, stock)
    except Exception:
        return answer | {"status": traceback.format_exc(), "faults": ["cannot be made: the fuzzer itself is wrong"]}
    (folder / "case.json").write_text(json.dumps(answer))
    forget_peak()
    with limited_memory(MEMORY), guard.watching(case, Path("in"), _outputs(argv)) as found:
        started = time.monotonic()
        status, out, err = call(argv)
        seconds = time.monotonic() - started
    peak = peak_memory()
    forget_peak()
    resident = peak_memory()  # what the case has left behind, with all else
    if "not enough memory" in err and answer["kind"] in (
        "settings",
        "line",
    ):  # which may ask for any size, and were refused
        peak, err = 0, err.rpartition("\n")[0].rpartition("\n")[2]
    faults = [*dict.fromkeys(found)]
    if os.path.lexists(case / "executed"):
        faults.append("executed a pickle")
    if peak > MEMORY:
        faults.append(f"took {peak / 2**30:.1f} GiB")
    faults += judge(status, err)
    if "not enough memory" in err and answer["kind"] not in ("settings", "line"):
        faults.append(f"asked for more than {MEMORY / 2**30:.0f} GiB")
    answer |= {"status": status, "out": out, "err": err, "seconds": seconds}
    return answer | {"peak": peak, "resident": resident, "faults": faults}


def _outputs(argv: Sequence[str]) -> list[str]:
    """The places that a command line names to be written to."""
    named = [word.partition("=")[2] for word in argv if word.startswith(("--output=", "--json="))]
    return named + [value for option, value in pairwise(argv) if option in ("--output", "--json")]


def call(argv: Sequence[str]) -> tuple[int | str, str, str]:
    """The exit status of a command, or its traceback; and what it wrote to both streams."""
    from detailflow.cli.main import main

    kept, environment = (sys.stdout, sys.stderr), dict(os.environ)
    out, err = Captured("strict"), Captured("backslashreplace")  # as Python's own are
    sys.stdout, sys.stderr = out, err
    status: int | str
    try:
        status = main(argv)
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else f"SystemExit({stop.code!r})"
    except BaseException:
        status = traceback.format_exc()
    finally:
        sys.stdout, sys.stderr = kept
        os.environ.clear()
        os.environ.update(environment)
    return status, out.text(), err.text()


def judge(status: int | str, err: str) -> list[str]:
    """What is wrong with an ending."""
    if not isinstance(status, int):
        return [f"raised {signature(status)}"]
    faults = [
        f"wrote {word!r} to stderr"
        for word in ("Traceback (most recent", "Exception in thread", "Exception ignored")
        if word in err
    ]
    lines = err.splitlines()
    said = [line for line in lines if line.startswith("detailflow: error: ")]
    if status not in (0, 2):
        faults.append(f"ended with status {status}")
    if (status == 2) != bool(said) or (said and (len(said) > 1 or lines[-1] != said[0] or not said[0][19:].strip())):
        faults.append(f"status {status} with {len(said)} sentences")
    return faults


def signature(trace: str) -> str:
    """The last line of a traceback, and the last of our own lines in it."""
    lines = trace.strip().splitlines()
    ours = [line.strip() for line in lines if "/detailflow/" in line and line.strip().startswith("File")]
    where = ours[-1].partition("/detailflow/")[2].replace('"', "") if ours else "?"
    kind = next((line for line in reversed(lines) if line and not line[0].isspace()), "?")
    return f"{kind[:160]} [{where}]"


if __name__ == "__main__":
    serve(Path(sys.argv[1]), Path(sys.argv[2]))
