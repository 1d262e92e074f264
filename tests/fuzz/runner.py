"""Workers, one or several: each gets number after number.

One that hangs or dies is replaced, and its case has failed.
"""

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from threading import Lock
from typing import Any

from .guard import SECONDS, processor_seconds

START = 300.0  # seconds for a worker to import torch, and the first one to make the stock
LIFE = 1000  # cases that one process runs, so that what one leaves behind ends sometime,
KEPT = 2**30  # as it does once that are so many bytes
ROOT = Path(__file__).parents[2]


class Worker:
    """A process that runs cases below `folder`."""

    def __init__(self, folder: Path, stock: Path) -> None:
        self.folder, self.stock = folder, stock
        self._process: subprocess.Popen[str] | None = None
        self._since = 0  # cases since its start

    def run(self, number: int) -> dict[str, Any]:
        """What came of a case."""
        if self._process is None:
            self._start()
        process = self._process
        assert process is not None and process.stdin is not None
        process.stdin.write(f"{number}\n")
        process.stdin.flush()
        line = self._line_of_case(process)
        if line:
            self._since += 1
            answer = json.loads(line)
            if self._since == LIFE or answer["faults"] or answer["resident"] > KEPT:
                self.stop()
            return answer
        if hung := line is None:
            process.send_signal(signal.SIGUSR1)  # has it write what it is at
            time.sleep(1)
        else:
            process.wait()
        code = process.returncode
        self.stop()
        said = (self.folder / ("hang.txt" if hung else "stderr.txt")).read_text(errors="replace")[-3000:]
        fault = f"took over {SECONDS:.0f} seconds" if hung else f"ended the process ({code})"
        where = next(
            (part.partition("/detailflow/")[2] for part in said.splitlines() if "/src/detailflow/" in part), "?"
        )
        answer = json.loads((self.folder / "case.json").read_text())
        return answer | {"faults": [f"{fault} [{where}]"], "status": said, "seconds": SECONDS * hung}

    def _start(self) -> None:
        home = self.folder / "home"
        (home / "tmp").mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "fuzz.worker", str(self.folder), str(self.stock)]
        with open(self.folder / "stderr.txt", "w") as stderr:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                cwd=ROOT,
                env=environment(home),
            )
        self._since = 0
        if not self._line(START):
            raise RuntimeError(f"no worker could start: {(self.folder / 'stderr.txt').read_text()[-3000:]}")

    def _line(self, seconds: float) -> str | None:
        """The next line, or `None` if none comes in time; empty at the process's end."""
        assert self._process is not None and self._process.stdout is not None
        return self._process.stdout.readline() if select.select([self._process.stdout], [], [], seconds)[0] else None

    def _line_of_case(self, process: subprocess.Popen) -> str | None:
        """Its answer, for which it may take longer by the clock where others keep the processors busy, but
        not sleep."""
        line, before = self._line(SECONDS), 0.0
        started = processor_seconds(process.pid)
        while line is None and processor_seconds(process.pid) - before > 0.2:
            before = processor_seconds(process.pid)
            if before - started > SECONDS:
                break
            line = self._line(5)
        return line

    def stop(self) -> None:
        """End the process, whatever it does."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


def environment(home: Path) -> dict[str, str]:
    """This one's, with every cache below `home`, no network, no GPU, one thread."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "XDG_", "TORCH", "WANDB"))}
    caches = dict.fromkeys(
        ("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "HF_HOME", "TORCH_HOME", "MPLCONFIGDIR"), str(home)
    )
    paths = os.pathsep.join(filter(None, (str(ROOT / "src"), str(ROOT / "tests"), os.environ.get("PYTHONPATH"))))
    switches = {
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "MPLBACKEND": "agg",
    }
    return (
        kept
        | caches
        | switches
        | {"TMPDIR": str(home / "tmp"), "PYTHONPATH": paths, "COLUMNS": "100", "HF_DATASETS_OFFLINE": "1"}
    )


def run_cases(numbers: Iterable[int], folder: Path | None = None, workers: int = 1) -> Iterator[dict[str, Any]]:
    """What came of each case, in the order that they end in."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as temporary:
        root = folder or Path(temporary)
        root.mkdir(parents=True, exist_ok=True)
        started = [Worker(root / f"worker{k}", root / "stock") for k in range(workers)]
        try:
            yield from _shared(iter(numbers), started)
        finally:
            for worker in started:
                worker.stop()


def _shared(numbers: Iterator[int], workers: list[Worker]) -> Iterator[dict[str, Any]]:
    first = next(numbers, None)
    if first is None:
        return
    yield workers[0].run(first)  # alone, as it makes the stock
    if len(workers) == 1:
        yield from map(workers[0].run, numbers)
        return
    free, lock = list(workers), Lock()

    def one(number: int) -> dict[str, Any]:
        with lock:
            worker = free.pop()
        try:
            return worker.run(number)
        finally:
            with lock:
                free.append(worker)

    with ThreadPoolExecutor(len(workers)) as pool:
        for ended in as_completed([pool.submit(one, number) for number in numbers]):
            yield ended.result()
