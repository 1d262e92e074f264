"""What goes wrong in one of two processes ends both within seconds, and one of them says why."""

import multiprocessing
import os
import resource
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from detailflow.cli.main import main
from detailflow.distributed import Processes
from detailflow.errors import DetailFlowError
from detailflow.files import held
from detailflow.training.checkpoints import load_checkpoint, save_checkpoint
from detailflow.training.gpt import GPTStage

SECONDS = 60  # for a machine that is busy with other things; in vain they would wait for hours


def launch(work: Callable[[int], int], folder: Path) -> list[tuple[int | None, str, str]]:
    """Call work(rank) in two processes as torchrun starts them: the exit status of each, and what it printed.

    They are forks of this process, which has imported everything already.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def run(rank: int) -> None:
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(folder / f"{rank}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in names.items()}, MASTER_ADDR="127.0.0.1")
        sys.exit(work(rank))

    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=run, args=(rank,)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(SECONDS)
        process.kill()
    said = [[_without_gloo((folder / f"{rank}.{name}").read_text()) for name in ("out", "err")] for rank in range(2)]
    return [(process.exitcode, out, err) for process, (out, err) in zip(processes, said, strict=True)]


def _without_gloo(text: str) -> str:
    """The text without the lines that torch 2.9 prints of its connections."""
    return "".join(line for line in text.splitlines(keepends=True) if not line.startswith("[Gloo]"))


def complaints(text: str) -> list[str]:
    assert "Traceback" not in text
    return [line for line in text.splitlines() if "error: " in line]


@pytest.fixture
def command(model: Path, tokens: Path, tmp_path: Path) -> list[str]:
    """A short training run of an AR model; a checkpoint after every step."""
    settings = {"tokens": tokens, "tokenizer": model, "width": 16, "depth": 1, "heads": 2, "output": tmp_path / "run"}
    loop = {"steps": 4, "batch_size": 4, "learning_rate": 0.001, "trackers": "[]", "checkpoint_minutes": 0}
    options = settings | {f"loop.{name}": value for name, value in loop.items()}
    return ["train", "gpt", "--device", "cpu", *(f"--{name}={value}" for name, value in options.items())]


def test_the_checkpoint_does_not_fit(command: list[str], tmp_path: Path):
    def work(rank: int) -> int:
        if rank == 0:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
        return main(command)

    (first, _, err), (second, _, other) = launch(work, tmp_path)
    assert (first, second) == (2, 2), err + other
    assert len(complaints(err)) == 1 and "the checkpoint can't be written (File too large)" in err
    assert not complaints(other)


def test_the_folder_is_held(command: list[str], tmp_path: Path):
    with held(tmp_path / "run", "training run"):
        (first, _, err), (second, _, other) = launch(lambda rank: main(command), tmp_path)
    assert (first, second) == (2, 2), err + other
    assert complaints(err)[0].startswith("detailflow: error: another training run is at work in") and not complaints(
        other
    )


def test_the_folder_is_another_runs(command: list[str], tmp_path: Path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.yaml").write_text("kind: tokenizer\n")
    (first, _, err), (second, _, other) = launch(lambda rank: main(command), tmp_path)
    assert (first, second) == (2, 2), err + other
    assert "holds a run with another kind" in complaints(err)[0] and not complaints(other)


def test_what_both_find(command: list[str], tmp_path: Path):
    """One of them says it."""
    (first, _, err), (second, _, other) = launch(lambda rank: main([*command, "--tokens=nowhere"]), tmp_path)
    assert (first, second) == (2, 2), err + other
    assert len(complaints(err)) == 1 and "nowhere is no token store" in err and not complaints(other)


def test_samples_of_one_do_not_fit(model: Path, tmp_path: Path):
    def work(rank: int) -> int:
        if rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))
        many = ["--num-images", "4", "--batch-size", "2", "--output", str(tmp_path / "samples")]
        return main(["generate", "--model", str(model), "--device", "cpu", *many])

    (first, _, err), (second, _, other) = launch(work, tmp_path)
    assert (first, second) == (2, 2), err + other
    assert (
        not complaints(err)
        and "cannot write" in complaints(other)[0]
        and complaints(other)[0].endswith("File too large")
    )


def test_a_report_of_something_else(cifar: Path, tmp_path: Path):
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "report.json").write_text("{}")

    def work(rank: int) -> int:
        return main(
            ["evaluate", "samples", str(cifar), str(cifar), "--output", str(tmp_path / "report"), "--device", "cpu"]
        )

    (first, _, err), (second, _, other) = launch(work, tmp_path)
    assert (first, second) == (2, 2), err + other
    assert "holds a report.json that is no report of ours" in complaints(err)[0] and not complaints(other)


@pytest.mark.parametrize("bug", [False, True])
@pytest.mark.parametrize("wrong", [0, 1])
def test_a_step_of_one_process(
    bug: bool, wrong: int, command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The other one is in a collective call at that time."""
    plain = GPTStage.step

    def work(rank: int) -> int:
        def step(self: GPTStage, number: int, *rest: object) -> object:
            if rank == wrong and number == 1:
                raise (ZeroDivisionError if bug else DetailFlowError)("its own error")
            return plain(self, number, *rest)

        GPTStage.step = step
        return main(command)

    ends = launch(work, tmp_path)
    assert ends[wrong][0] == (1 if bug else 2) and "its own error" in ends[wrong][2]
    assert ends[1 - wrong][0] == 2, ends
    assert complaints(ends[1 - wrong][2]) == [
        "detailflow: error: another process of this launch has ended: its own message says why"
    ]


def test_the_main_process_at_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The other one waits for as long as it says that it works, and ends with it."""
    monkeypatch.setattr("detailflow.distributed.BEAT_SECONDS", 0.0)

    def work(rank: int) -> int:
        processes = Processes.of_this_launch(cpu=True)
        for problem in (None, DetailFlowError("it can't be done")):
            try:
                with processes.together(), processes.main_at_work() as beat:
                    if processes.is_main:
                        for _ in range(3):
                            beat()
                        if problem:
                            raise problem
                print("done")
            except DetailFlowError as error:
                print(type(error).__name__, error)
        return 0

    (first, out, err), (second, other, _) = launch(work, tmp_path)
    assert (first, second) == (0, 0), err
    assert out == "done\nDetailFlowError it can't be done\n"
    assert other == "done\nReportedElsewhereError it can't be done\n"


def test_all_go_on_from_the_main_ones_checkpoint(tmp_path: Path):
    """The newest one is damaged for it alone; then it has one that the other lacks."""
    for rank in range(2):
        (tmp_path / str(rank) / "resume").mkdir(parents=True)
        for step in (1, 2):
            save_checkpoint(tmp_path / str(rank), step, {"value": torch.tensor(float(step))})
    (tmp_path / "0" / "resume" / "step-00000002.pt").write_bytes(b"rubbish")

    def work(rank: int) -> int:
        processes = Processes.of_this_launch(cpu=True)
        step, state = load_checkpoint(tmp_path / str(rank), processes)
        print(step, float(state["value"]), flush=True)
        if processes.is_main:
            save_checkpoint(tmp_path / "0", 3, {})
        try:
            load_checkpoint(tmp_path / str(rank), processes)
        except DetailFlowError as error:
            print(error)
        return 0

    (first, out, err), (second, other, _) = launch(work, tmp_path)
    assert (first, second) == (0, 0), err
    assert out.splitlines()[1] == other.splitlines()[0] == "1 1.0"
    assert out.splitlines()[-1] == other.splitlines()[-1] and "1/resume/step-00000003.pt: No such file" in out
