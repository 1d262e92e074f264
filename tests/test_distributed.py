"""What goes wrong in one of two processes ends both within seconds, and one of them says why."""

import multiprocessing
import shutil
import socket
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.append(str(Path(__file__).parent))  # which its processes get as well

import ranks
from detailflow.distributed import World
from detailflow.errors import DetailFlowError
from detailflow.files import lock_folder
from detailflow.training.checkpoints import save_checkpoint

IMPORTED = [
    *("accelerate", "torch.nn.parallel", "torch._dynamo"),
    *(
        f"detailflow.{name}"
        for name in ("training.gpt", "evaluation.evaluate", "evaluation.report", "samples", "pipeline")
    ),
]
SECONDS = 60  # for a machine that is busy with other things; in vain they would wait for hours


def launch(work: Callable[[int], int], folder: Path) -> list[tuple[int | None, str, str]]:
    """Call work(rank) in two processes as torchrun starts them: the exit status of each, and what it printed.

    They are forks of a server that has imported everything already, but has never trained: torch refuses to train in
    the fork of a process that has used threads for that, as this one may have in another test.

    Args:
        work: a function of a module, or a `partial` of one.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    processes = [context.Process(target=ranks.run, args=(work, folder, port, rank)) for rank in range(2)]
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
    work = partial(ranks.command_line, command, limits={0: 20000})
    (first, _, err), (second, _, other) = launch(work, tmp_path)
    assert (first, second) == (2, 2), err + other
    assert len(complaints(err)) == 1 and "the checkpoint cannot be written (File too large)" in err
    assert not complaints(other)


def test_the_folder_is_held(command: list[str], tmp_path: Path):
    with lock_folder(tmp_path / "run", "training run"):
        (first, _, err), (second, _, other) = launch(partial(ranks.command_line, command), tmp_path)
    assert (first, second) == (2, 2), err + other
    assert complaints(err)[0].startswith("detailflow: error: another training run is at work in") and not complaints(
        other
    )


def test_two_folders(command: list[str], model: Path, tmp_path: Path):
    """Of training and of images, as on two machines that share no disk: nothing is done, and nothing stays."""
    generate = ["generate", "--model", str(model), "--num-images=8", "--output", str(tmp_path / "images")]
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / ".lock").write_bytes(b"of a run that was killed")
    for argv in (command, generate):
        there = [*argv, "--output", str(tmp_path / "there")]
        (first, _, err), (second, _, other) = launch(partial(ranks.two_folders, [argv, there]), tmp_path)
        assert (first, second) == (2, 2) and not complaints(err), err + other
        assert f"process 1 of 2 does not see in {tmp_path / 'there'} what process 0 writes to" in other
        assert not [path for name in ("run", "images") for path in tmp_path.glob(f"{name}/*")]
        assert [path.name for path in (tmp_path / "there").iterdir()] == [".lock"]


def test_the_folder_is_another_runs(command: list[str], tmp_path: Path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.yaml").write_text("kind: tokenizer\n")
    (first, _, err), (second, _, other) = launch(partial(ranks.command_line, command), tmp_path)
    assert (first, second) == (2, 2), err + other
    assert "holds a run with another kind" in complaints(err)[0] and not complaints(other)


def test_what_both_find(command: list[str], tmp_path: Path):
    """One of them says it."""
    (first, _, err), (second, _, other) = launch(partial(ranks.command_line, [*command, "--tokens=nowhere"]), tmp_path)
    assert (first, second) == (2, 2), err + other
    assert len(complaints(err)) == 1 and "nowhere is not a token store" in err and not complaints(other)


def differ(commands: list[list[str]], what: str, folder: Path) -> None:
    """Check that processes with these commands end with one sentence."""
    (first, _, err), (second, _, other) = launch(partial(ranks.other_command_lines, commands), folder)
    assert (first, second) == (2, 2), err + other
    assert f"the 2 processes of this launch differ in {what}: start all" in complaints(err)[0]
    assert len(complaints(err)) == 1 and not complaints(other)


def test_other_settings(command: list[str], model: Path, tmp_path: Path):
    """Their weights would drift apart, or one would wait for the other."""
    differ([command, [*command, "--loop.steps=5", "--width=32"]], "loop.steps, width", tmp_path)
    assert not (tmp_path / "run").exists()
    many = [
        "generate",
        "--model",
        str(model),
        "--device",
        "cpu",
        "--num-images",
        "4",
        "--output",
        str(tmp_path / "set"),
    ]
    differ([[*many, "--seed", "0"], [*many, "--seed", "1"]], "seed", tmp_path)


def test_other_images(cifar: Path, model: Path, tmp_path: Path):
    """As on a node whose copy is not complete: codes of one image would be stored as another's."""
    copy = Path(shutil.copytree(cifar, tmp_path / "copy"))
    next(copy.rglob("*.png")).rename(next(copy.rglob("*.png")).with_name("zzz.png"))
    sets = [str(cifar), str(copy)]
    last = ["--device", "cpu", "--output", str(tmp_path / "made")]
    differ([["extract", "--tokenizer", str(model), "--data", one, *last] for one in sets], "their images", tmp_path)
    network = ["--features", "efficientnet-lite0"]
    differ([["evaluate", "samples", one, str(cifar), *network, *last] for one in sets], "their images", tmp_path)
    sizes = {f"model.{part}.{name}": 16 for part in ("encoder", "decoder") for name in ("width", "depth", "heads")}
    settings = {**sizes, "loop.steps": 2, "loop.batch_size": 4, "loop.learning_rate": 0.001, "val_share": 0.3}
    held_out = [["train", "tokenizer", "--data", str(cifar), *last, *(f"--{k}={v}" for k, v in settings.items())]] * 2
    differ([held_out[0], [*held_out[1], "--val_share=0.4"]], "val_share", tmp_path)
    others = [*held_out[0], "--val_share=0", "--val_data"]
    differ([[*others, one] for one in sets[::-1]], "their images for validation", tmp_path)
    training = ["train", "tokenizer", *(f"--{name}={value}" for name, value in settings.items()), *last]
    differ([[*training, "--data", one] for one in sets], "their images", tmp_path)
    assert not (tmp_path / "made").exists()


def test_unreadable_images_of_all_count(cifar: Path, tmp_path: Path):
    """One may be tolerated, but not one for each process."""
    copy = Path(shutil.copytree(cifar, tmp_path / "copy"))
    images = sorted(copy.rglob("*.png"))
    for one in (images[10], images[120], images[150]):
        one.write_bytes(b"no image")
    network = ["--features", "efficientnet-lite0", "--device", "cpu", "--output", str(tmp_path / "report")]
    work = partial(ranks.command_line, ["evaluate", "samples", str(copy), str(copy), *network])
    (first, _, err), (second, _, other) = launch(work, tmp_path)
    assert (first, second) == (2, 2), err + other
    assert "at least 3 of the 200 images" in complaints(err)[0] and not complaints(other)


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE in the environment is 2 and RANK is not set: start the processes with"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1"}, "2 and MASTER_PORT is not set"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "x"}, "MASTER_PORT .* whole"),
    ],
)
def test_no_launcher(given: dict[str, str], problem: str, monkeypatch: pytest.MonkeyPatch):
    for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(DetailFlowError, match=problem):
        World.from_launch(cpu=True)


def test_samples_of_one_do_not_fit(model: Path, tmp_path: Path):
    many = ["--num-images", "4", "--batch-size", "2", "--output", str(tmp_path / "samples")]
    command = ["generate", "--model", str(model), "--device", "cpu", *many]
    (first, _, err), (second, _, other) = launch(partial(ranks.command_line, command, limits={1: 500}), tmp_path)
    assert (first, second) == (2, 2), err + other
    assert (
        not complaints(err)
        and "cannot write" in complaints(other)[0]
        and complaints(other)[0].endswith("File too large")
    )


def test_a_report_of_something_else(cifar: Path, tmp_path: Path):
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "report.json").write_text("{}")

    command = ["evaluate", "samples", str(cifar), str(cifar), "--output", str(tmp_path / "report"), "--device", "cpu"]
    (first, _, err), (second, _, other) = launch(partial(ranks.command_line, command), tmp_path)
    assert (first, second) == (2, 2), err + other
    assert "has a report.json that is not a report of ours" in complaints(err)[0] and not complaints(other)


@pytest.mark.parametrize("bug", [False, True])
@pytest.mark.parametrize("wrong", [0, 1])
def test_a_step_of_one_process(bug: bool, wrong: int, command: list[str], tmp_path: Path):
    """The other one is in a collective call at that time."""
    ends = launch(partial(ranks.training_that_fails, command, bug, wrong), tmp_path)
    assert ends[wrong][0] == (1 if bug else 2) and "its own error" in ends[wrong][2]
    assert ends[1 - wrong][0] == 2, ends
    assert complaints(ends[1 - wrong][2]) == [
        "detailflow: error: another process of this launch has ended: its own message says why"
    ]


@pytest.mark.parametrize(("place", "wrong"), [("features", 1), ("generation", 0), ("generation", 1), ("figures", 0)])
def test_an_evaluation_of_one_process(
    place: str, wrong: int, model: Path, cifar: Path, feature_file: Path, tmp_path: Path
):
    """The other one is in a collective call, or waits for the figures, which the main one computes."""
    many = {"num-samples": 20, "batch-size": 4, "features": feature_file, "reference": cifar}
    options = many | {"model": model, "output": tmp_path / "report", "device": "cpu"}
    command = ["evaluate", "gpt", *(f"--{name}={value}" for name, value in options.items())]
    ends = launch(partial(ranks.evaluation_that_fails, command, place, wrong), tmp_path)
    assert [status for status, _, _ in ends] == [2, 2], ends
    assert complaints(ends[wrong][2]) == ["detailflow: error: its own error"]
    gone = "detailflow: error: another process of this launch has ended: its own message says why"
    assert complaints(ends[1 - wrong][2]) == ([] if place == "figures" else [gone])
    assert not (tmp_path / "report").exists()


def test_the_main_process_decides_which_step_is_the_best(command: list[str], tmp_path: Path):
    """Rounding may differ between ranks, and all of them must take part in a checkpoint."""
    output = tmp_path / "run"
    more = ["--loop.steps=3", "--loop.val_every=1", f"--output={output}"]
    (first, _, err), (second, _, other) = launch(partial(ranks.training_with_other_losses, [*command, *more]), tmp_path)
    assert (first, second) == (0, 0), err + other
    assert [path.name for path in (output / "best").iterdir()] == ["step-00000003.pt"]


def test_the_main_process_at_work(tmp_path: Path):
    """The other one waits for as long as it says that it works, and ends with it."""
    (first, out, err), (second, other, _) = launch(ranks.main_process_works, tmp_path)
    assert (first, second) == (0, 0), err
    assert out == "done\nDetailFlowError it cannot be done\n"
    assert other == "done\nReportedElsewhereError it cannot be done\n"


def test_all_go_on_from_the_main_ones_checkpoint(tmp_path: Path):
    """The newest one is damaged for it alone; then it has one that the other lacks."""
    for rank in range(2):
        (tmp_path / str(rank) / "resume").mkdir(parents=True)
        for step in (1, 2):
            save_checkpoint(tmp_path / str(rank), step, {"value": torch.tensor(float(step))})
    (tmp_path / "0" / "resume" / "step-00000002.pt").write_bytes(b"rubbish")

    (first, out, err), (second, other, _) = launch(partial(ranks.two_loads, tmp_path), tmp_path)
    assert (first, second) == (0, 0), err
    assert "this checkpoint cannot be read" in err
    assert out.splitlines()[0] == other.splitlines()[0] == "1 1.0"
    assert out.splitlines()[-1] == other.splitlines()[-1] and "1/resume/step-00000003.pt: No such file" in out


class Recorded(World):
    """Three ranks that have 3, 3 and 4 of ten values; this one is the last."""

    def all_gather(self, value: Tensor) -> Tensor:
        assert value.shape in ((1,), (4,))
        before = [3, 3] if len(value) == 1 else [0, 1, 2, 99, 3, 4, 5, 99]
        return torch.cat((torch.tensor(before).to(value), value))


def test_parts_of_unequal_size_are_put_together_in_order():
    assert Recorded(2, 3).all_gather_uneven(torch.tensor([6.0, 7, 8, 9])).tolist() == list(range(10))
