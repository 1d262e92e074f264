"""Where a run's curves and pictures go: TensorBoard, and Weights & Biases where it is asked for."""

import secrets
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from detailflow.distributed import World
from detailflow.errors import DetailFlowError, missing_package
from detailflow.files import read_text, writing

TRACKERS = ("tensorboard", "wandb")  # each is named as the package that it needs
WANDB_ID_FILE = "wandb-id.txt"


def check_trackers(names: Sequence[str]) -> None:
    """Check that these trackers exist and their packages are installed.

    Raises:
        DetailFlowError: if not.
    """
    for name in names:
        if name not in TRACKERS:
            raise DetailFlowError(f"trackers must be among {', '.join(TRACKERS)}, not {name!r}")
        if find_spec(name) is None and name == "wandb":  # which no extra brings
            raise DetailFlowError("the tracker wandb needs the package wandb: pip install wandb")
        if find_spec(name) is None:
            raise missing_package(f"the tracker {name}", name)


class Trackers:
    """All of a run's trackers, from `start_step` on; what was logged beyond it before is dropped.

    Args:
        names: none but in the main process.

    Raises:
        DetailFlowError: if they cannot write, in all processes; so in `log`, and at the end of the context.
    """

    def __init__(
        self,
        names: Sequence[str],
        output: Path,
        kind: str,
        config: Mapping[str, Any],
        start_step: int,
        world: World | None = None,
    ) -> None:
        self.output, self.world = output, world or World()
        self.board: Any = None
        self.wandb: Any = None
        self._hook, threading.excepthook = threading.excepthook, _without_tensorboard(threading.excepthook)
        try:
            with self.world.raise_together():
                if "tensorboard" in names:
                    with _writing("TensorBoard's log", output):
                        self._open_board(start_step)
                if "wandb" in names:
                    with _writing("Weights & Biases' log", output):
                        self._open_wandb(kind, config)
        except DetailFlowError:
            threading.excepthook = self._hook
            raise

    def _open_board(self, start_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.board = SummaryWriter(str(self.output / "tensorboard"), purge_step=start_step + 1 if start_step else None)
        self.board.flush()

    def _open_wandb(self, kind: str, config: Mapping[str, Any]) -> None:
        import wandb  # type: ignore[import-not-found, unused-ignore]

        self.wandb = wandb.init(
            project=f"detailflow-{kind}",
            name=self.output.resolve().name,
            dir=str(self.output),
            id=run_id(self.output),
            resume="allow",
            config=dict(config),
        )

    def log(self, step: int, values: Mapping[str, float], pictures: Mapping[str, Image.Image] | None = None) -> None:
        """Log the numbers and pictures of a step, if there are any; they are on the disk afterwards.

        Raises:
            DetailFlowError: if they cannot be written.
        """
        pictures = pictures or {}
        if not values and not pictures:
            return
        if self.board:
            with _writing("TensorBoard's log", self.output):
                for name, value in values.items():
                    self.board.add_scalar(name, value, step)
                for name, picture in pictures.items():
                    self.board.add_image(name, np.asarray(picture), step, dataformats="HWC")
                self.board.flush()  # now, when what goes wrong can be said
        if self.wandb:
            import wandb

            with _writing("Weights & Biases' log", self.output):
                self.wandb.log(
                    {**values, **{name: wandb.Image(picture) for name, picture in pictures.items()}}, step=step
                )

    def __enter__(self) -> "Trackers":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if self.board:
                with _writing("TensorBoard's log", self.output):
                    self.board.close()
            if self.wandb:
                with _writing("Weights & Biases' log", self.output):
                    self.wandb.finish()
        except DetailFlowError:
            if kind is None:  # else what went wrong first is the news
                raise
        finally:
            threading.excepthook = self._hook


def run_id(output: Path) -> str:
    """Return the name by which Weights & Biases knows the run in `output`: drawn once and kept in its folder.

    Raises:
        DetailFlowError: if it cannot be written or read.
    """
    path = output / WANDB_ID_FILE
    if not path.exists():
        with writing(path) as temporary:
            temporary.write_text(f"{secrets.token_hex(8)}\n", encoding="ascii")
    try:
        return read_text(path).strip()
    except (OSError, UnicodeDecodeError) as error:
        raise DetailFlowError(f"could not read {path}: remove it to begin another run there ({error})") from error


@contextmanager
def _writing(what: str, output: Path) -> Iterator[None]:
    """Turn the errors of a tracker into a sentence; each has its own kinds of them."""
    try:
        yield
    except DetailFlowError:
        raise
    except Exception as error:
        reason = error.strerror if isinstance(error, OSError) else None
        raise DetailFlowError(f"cannot write {what} to {output}: {reason or error or type(error).__name__}") from error


def _without_tensorboard(hook: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Print no traceback of TensorBoard's writing thread: its error comes again in `Trackers.log`."""

    def quiet(args: Any) -> None:
        if not type(args.thread).__module__.startswith("tensorboard"):
            hook(args)

    return quiet
