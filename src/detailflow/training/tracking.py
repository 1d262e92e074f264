"""Where a run's curves and pictures go: TensorBoard, and Weights & Biases where it is asked for."""

import hashlib
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from detailflow.errors import DetailFlowError

PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb"}  # tracker → what it needs


def check_trackers(names: Sequence[str]) -> None:
    """Check that these trackers exist and their packages are installed.

    Raises:
        DetailFlowError: if not.
    """
    for name in names:
        if name not in PACKAGES:
            raise DetailFlowError(f"trackers must be among {', '.join(PACKAGES)}, not {name!r}")
        if find_spec(PACKAGES[name]) is None:
            raise DetailFlowError(f"the tracker {name} needs its package: pip install {PACKAGES[name]}, or leave it out")


class Trackers:
    """All of a run's trackers, from `start_step` on; what was logged beyond it before is dropped."""

    def __init__(self, names: Sequence[str], output: Path, kind: str, config: Mapping[str, Any], start_step: int) -> None:
        self.board: Any = None
        self.wandb: Any = None
        if "tensorboard" in names:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(output / "tensorboard"), purge_step=start_step + 1 if start_step else None)
        if "wandb" in names:
            import wandb  # type: ignore[import-not-found, unused-ignore]

            run = hashlib.sha256(str(output.resolve()).encode()).hexdigest()[:16]  # the same one when the run goes on
            self.wandb = wandb.init(
                project=f"detailflow-{kind}", name=output.name, dir=str(output), id=run, resume="allow", config=dict(config)
            )

    def log(self, step: int, values: Mapping[str, float], pictures: Mapping[str, Image.Image] | None = None) -> None:
        """Numbers and pictures of a step."""
        pictures = pictures or {}
        if self.board:
            for name, value in values.items():
                self.board.add_scalar(name, value, step)
            for name, picture in pictures.items():
                self.board.add_image(name, np.asarray(picture), step, dataformats="HWC")
        if self.wandb:
            import wandb

            self.wandb.log({**values, **{name: wandb.Image(picture) for name, picture in pictures.items()}}, step=step)

    def __enter__(self) -> "Trackers":
        return self

    def __exit__(self, *_: object) -> None:
        if self.board:
            self.board.close()
        if self.wandb:
            self.wandb.finish()
