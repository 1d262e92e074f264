"""What the processes of test_distributed.py do: a module of its own, which they can import."""

import os
import resource
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from detailflow import distributed, files
from detailflow.cli.main import main
from detailflow.distributed import World
from detailflow.errors import DetailFlowError
from detailflow.training.checkpoints import load_checkpoint, save_checkpoint
from detailflow.training.gpt import GPTStage


def run(work: Callable[[int], int], folder: Path, port: int, rank: int) -> None:
    """Be one of the processes of `launch`."""
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{rank}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()}, MASTER_ADDR="127.0.0.1")
    sys.exit(work(rank))


def command_line(argv: list[str], rank: int, limits: Mapping[int, int] = {}) -> int:
    """Run a command; `limits` are the largest files, in bytes, that some ranks can write."""
    if rank in limits:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limits[rank], limits[rank]))
    return main(argv)


def other_command_lines(argvs: Sequence[list[str]], rank: int) -> int:
    """Run each rank's own command."""
    return main(argvs[rank])


def two_folders(argvs: Sequence[list[str]], rank: int) -> int:
    """Run each rank's own command, whose folder is none that they share."""
    files.APPEARS_SECONDS = 0.5
    return main(argvs[rank])


def training_that_fails(command: list[str], bug: bool, wrong: int, rank: int) -> int:
    """Train, with an error in the second step of rank `wrong`."""
    plain = GPTStage.step

    def step(self: GPTStage, number: int, *rest: object) -> object:
        if rank == wrong and number == 1:
            raise (ZeroDivisionError if bug else DetailFlowError)("its own error")
        return plain(self, number, *rest)

    GPTStage.step = step
    return main(command)


def evaluation_that_fails(command: list[str], place: str, wrong: int, rank: int) -> int:
    """Evaluate, with an error of rank `wrong` in one place."""
    from detailflow.evaluation import features, gpt

    def fail(*_: object, **__: object) -> object:
        raise DetailFlowError("its own error")

    owner, name = {
        "features": (features, "load_extractor"),
        "generation": (gpt._Run, "_make"),
        "figures": (gpt, "compare_sets"),
    }[place]
    if rank == wrong:
        setattr(owner, name, fail)
    return main(command)


def training_with_other_losses(command: list[str], rank: int) -> int:
    """Train; the validation losses fall on rank 0 and rise on the other."""
    losses = iter((1.0, 2.0, 3.0) if rank else (3.0, 2.0, 1.0))
    GPTStage.validate = lambda self: {"val_loss": next(losses)}
    return main(command)


def main_process_works(rank: int) -> int:
    """Let rank 0 work while the other waits, first with success and then in vain."""
    distributed.HEARTBEAT_SECONDS = 0.0
    world = World.from_launch(cpu=True)
    for problem in (None, DetailFlowError("it cannot be done")):
        try:
            with world.raise_together(), world.others_wait() as heartbeat:
                if world.is_main:
                    for _ in range(3):
                        heartbeat()
                    if problem:
                        raise problem
            print("done")
        except DetailFlowError as error:
            print(type(error).__name__, error)
    return 0


def two_loads(folder: Path, rank: int) -> int:
    """Load the newest checkpoint that all have, twice; the second time rank 0 has one more."""
    world = World.from_launch(cpu=True)
    found = load_checkpoint(folder / str(rank), world)
    assert found
    print(found.step, float(found.state["value"]), flush=True)
    if world.is_main:
        save_checkpoint(folder / "0", 3, {})
    try:
        load_checkpoint(folder / str(rank), world)
    except DetailFlowError as error:
        print(error)
    return 0
