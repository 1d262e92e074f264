"""A training run's folder: which run it belongs to, and the checkpoints in it, each written whole or not at all."""

import logging
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from itertools import islice
from os.path import isdir, isfile
from pathlib import Path
from typing import Any

from detailflow.data.image_files import image_suffixes
from detailflow.data.tokens import STORE_FILES
from detailflow.distributed import World
from detailflow.errors import DetailFlowError, explained
from detailflow.files import replacing
from detailflow.published import CONFIG_FILE
from detailflow.runs import (
    BEST,
    CHECKPOINTS,
    FEATURES_FILE,
    KNOWN_BY,
    MILESTONES,
    RUN_FILE,
    Checkpoint,
    RunFolder,
    as_plain,
    checkpoints,
    is_readable,
    newest_step,
    read_checkpoint,
    step_of,
)
from detailflow.tensors import INDEX_FILE, WEIGHTS_FILE
from detailflow.torch_files import save_torch
from detailflow.training.inputs import Input, difference
from detailflow.training.stage_report import CAPTIONS, CURVES_FILE, REPORT_FILE
from detailflow.training.tracking import HISTORY_FILE

_log = logging.getLogger(__name__)
LOOKED_AT = 100  # files of a folder in which a run is to begin
LONGER_FROM = "longer_from"  # in run.yaml: the step at which the run was last given more steps
# What a run writes into its folder, and so is not there before; and tokens, which have a folder of their own.
OVERWRITTEN = (
    *(HISTORY_FILE, REPORT_FILE, CURVES_FILE, WEIGHTS_FILE, INDEX_FILE, FEATURES_FILE),
    *(f"{name}.png" for name in CAPTIONS),
    *STORE_FILES,
)
# Settings of the loop that may change when a run goes on: they change how it is done, not what comes out.
FREE = {
    *(
        "workers",
        "image_memory",
        "log_every",
        "pictures_every",
        "trackers",
        "checkpoint_minutes",
        "keep",
        "milestone_every",
    ),
    *("accumulate", "checkpoint_activations", "shard", "compile", "val_every", "val_images", "patience"),
}


def run_folder(output: Path) -> RunFolder:
    """Return the folder of a training run."""
    return RunFolder(output, "a run", RUN_FILE)


def reserve_run(
    output: Path, kind: str, config: Mapping[str, Any], inputs: Mapping[str, Input] | None = None
) -> dict[str, Any] | None:
    """Make `output` this run's folder, or check that it already is; return `None` if the run is finished.

    A run that ended after its model and before its report goes on, if nothing of its loop was changed, which might
    change the model: it takes no steps, and writes both.

    Args:
        inputs: the settings that are known by the content of what they name, which may move.

    Returns:
        What `go_on` records once the run is about to go on; a run that starts is recorded already.
    """
    folder = run_folder(output)
    recorded, settings = folder.read(), {"kind": kind, **as_plain(config)}
    known = dict(recorded.get(KNOWN_BY) or {})
    settings[KNOWN_BY] = content = _read_inputs(output, inputs or {}, recorded, settings)
    for path, is_wrong, right in ((output / CONFIG_FILE, isdir, "file"), (output / CHECKPOINTS, isfile, "folder")):
        if is_wrong(path):
            raise DetailFlowError(f"{path} must be a {right} of the run: move what is there elsewhere")
    finished = isfile(output / CONFIG_FILE)  # which `export` writes last
    steps = of_loop(settings, "steps")
    done = newest_step(output) if recorded else 0
    before = of_loop(recorded, "steps")
    longer = before < steps
    if recorded:
        both = content.keys() & known.keys()
        folder.check(recorded, _identity(settings, {KNOWN_BY, *both}, {*FREE, "steps"}))
        if steps < (least := before if finished else min(done, before)):
            raise DetailFlowError(
                f"{output} holds {'a finished run of' if finished else 'a run that has taken'} {least:,} steps, "
                f"more than {steps:,}: give at least as many, or choose another folder"
            )
        for name in both:
            if changed := difference(name, known[name], content[name]):
                raise DetailFlowError(
                    f"{output} holds a run that was begun with {changed}: choose another folder, or give it the same "
                    "again"
                )
    elif finished:
        raise DetailFlowError(f"{not_trained_there(output)}: choose another folder")
    else:
        folder.require_free(OVERWRITTEN)
        _require_no_images(output)
    # Without a checkpoint the report cannot be written.
    reported = isfile(output / REPORT_FILE) or not done or settings["loop"] != recorded.get("loop")
    if finished and reported and not longer and not (done < steps and _more_patience(recorded, settings)):
        return None
    if finished and not done:
        raise DetailFlowError(
            f"{output} holds a finished model, but no checkpoint in {CHECKPOINTS}/ to go on from: choose another "
            f"folder (init: {output} starts from its weights)"
        )
    if not recorded:
        folder.write(settings)
    elif longer_from := done if longer else recorded.get(LONGER_FROM):
        settings[LONGER_FROM] = longer_from
    (output / CHECKPOINTS).mkdir(exist_ok=True)
    return settings


def go_on(output: Path, settings: Mapping[str, Any]) -> None:
    """Record that a run goes on with the settings that `reserve_run` returned."""
    (output / CONFIG_FILE).unlink(missing_ok=True)  # first, as the run is not finished any more
    folder = run_folder(output)
    if folder.read() != settings:
        folder.write(settings)


def _read_inputs(
    output: Path, inputs: Mapping[str, Input], recorded: Mapping[str, Any], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what the inputs are known by, without reading again those that only the start of a run needs."""
    begun, known = bool(recorded) and bool(checkpoints(output)), recorded.get(KNOWN_BY) or {}
    content = {}
    for name, one in inputs.items():
        needless = one.at_start and begun and name in known and recorded.get(name) == settings.get(name)
        content[name] = known[name] if needless else one.read()
    return content


def _require_no_images(output: Path) -> None:
    """Check that a new run's folder is no set of images: its own pictures would become a part of it."""
    with suppress(OSError):  # what cannot be read is no image, and what cannot be written to is said later
        below = [path for path in output.glob("[!.]*") if path.is_dir()]
        for path in (path for folder in (output, *below) for path in islice(folder.glob("[!.]*"), LOOKED_AT)):
            if path.suffix.lower() in image_suffixes() and path.is_file():
                raise DetailFlowError(f"{output} has images in it, such as {path}: choose another folder for the run")


def _more_patience(recorded: Mapping[str, Any], settings: Mapping[str, Any]) -> bool:
    before, now = of_loop(recorded, "patience"), of_loop(settings, "patience")
    return before > 0 and (now == 0 or now > before)


def not_trained_there(folder: Path) -> str:
    """Say, as the beginning of a message, that no training wrote the model of a folder."""
    return f"{folder} holds a model that was not trained there"


def of_loop(settings: Mapping[str, Any], name: str) -> int:
    """Return a number of the loop's from recorded settings; 0 if they have none."""
    loop = settings.get("loop")
    value = loop.get(name) if isinstance(loop, dict) else None
    return value if isinstance(value, int) else 0


def _identity(settings: Mapping[str, Any], ignored: Iterable[str], free: Iterable[str]) -> dict[str, Any]:
    """Return the settings that must be those of the record: without some, and without some of the loop's.

    The loop's are the last, as other settings may bring those of the loop with them.
    """
    identity = {name: value for name, value in settings.items() if name not in {*ignored, "loop"}}
    return identity | {"loop": {name: value for name, value in settings["loop"].items() if name not in free}}


def save_checkpoint(
    output: Path,
    step: int,
    state: Mapping[str, Any],
    keep: int = 2,
    milestone: bool = False,
    model: Mapping[str, Any] | None = None,
    best: tuple[float, Mapping[str, Any]] | None = None,
) -> Path:
    """Write resume/step-….pt whole or not at all, and before it copies of milestones and of the best one so far.

    Of this checkpoint and those before it, the last `keep` that can be read stay, all milestones and one best.

    Args:
        model: the "kind" and "config" of the model in it.
        best: the validation loss, if it is the lowest so far, and the settings that it depends on.
    """
    name = f"step-{step:08d}.pt"
    # resume/ last: a run that was killed between two of them goes on from before this step, and writes all again.
    folders = [*([MILESTONES] if milestone else []), *([BEST] if best is not None else []), CHECKPOINTS]
    first, *copies = [output / folder / name for folder in folders]
    path = output / CHECKPOINTS / name
    with explained(f"{path}: the checkpoint cannot be written", OSError):
        validation, comparable = best or (None, None)
        content = {"step": step, "validation": validation, "comparable": comparable, "state": state}
        first.parent.mkdir(exist_ok=True)
        save_torch(first, {**(model or {}), **content})
        for copy in copies:
            copy.parent.mkdir(exist_ok=True)
            with replacing(copy) as temporary:
                shutil.copyfile(first, temporary)
        for older in checkpoints(output, BEST) if best is not None else []:
            if older.name != name:
                older.unlink(missing_ok=True)
    left = keep - 1
    for older in [other for other in checkpoints(output) if step_of(other) < step]:  # a newer one is damaged
        if left < 1:
            older.unlink(missing_ok=True)
        elif is_readable(older):
            left -= 1
    return path


def load_checkpoint(output: Path, world: World = World()) -> Checkpoint | None:
    """Return the newest checkpoint that rank 0 can read, on all ranks; `None` if there is none."""
    name = world.from_main(lambda: _newest(output))
    if name is None:
        return None
    with world.raise_together():
        return read_checkpoint(output / CHECKPOINTS / name)


def _newest(output: Path) -> str | None:
    found = checkpoints(output)
    for path in found:
        if is_readable(path):
            return path.name
        _log.warning("%s: this checkpoint cannot be read, trying the one before", path)
    if found:
        raise DetailFlowError(
            f"{output / CHECKPOINTS}: none of the checkpoints can be read; remove the folder to start afresh"
        )
    return None
