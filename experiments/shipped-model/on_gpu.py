"""Train a tokenizer on one GPU in a given time, and on its tokens an AR model and, beside it, the decoder again.

    python experiments/shipped-model/on_gpu.py --data train.tar --output runs/gpu --minutes 9

The data may be anything that `detailflow train` reads. Each stage is a `detailflow` command, which is printed. It
begins with the steps of its recipe, or with `--steps tokenizer=4000`; once its speed is known, it goes on with as many
as fit. To go on takes half a minute, so the right steps are worth giving.
"""

import argparse
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml

from detailflow.training.tokenizer import count_of_steps
from detailflow.training.tracking import read_history

RECIPE = Path(__file__).parent / "gpu"
STAGES = ("tokenizer", "gpt", "decoder")
TOKENIZER_SHARE = 0.62  # of the time
LAST = 8.0  # seconds after a run's last step: pictures, the checkpoint
RESTART = 30.0  # seconds that a run takes to go on
WATCHED = 0.3  # of a stage's time, after which its steps are chosen
TOLERATED = 0.93, 1.25  # steps that fit, by those that were meant: within these a run is left alone


def start(*words: Any) -> subprocess.Popen[bytes]:
    """Start a `detailflow` command."""
    command = [sys.executable, "-m", "detailflow", *map(str, words)]
    print(shlex.join(["detailflow", *command[3:]]), flush=True)
    return subprocess.Popen(command)


def run(*words: Any) -> None:
    """Run a `detailflow` command, or end with its status."""
    if status := start(*words).wait():
        sys.exit(status)


def speed(output: Path, batch: int, full: float = 0.0) -> tuple[int, float] | None:
    """Return how many steps a run has logged and the seconds of one with all losses, if there are enough lines.

    The first lines are of steps that the compiler makes slow, of this run or of another beside it.

    Args:
        full: the step from which on all losses are trained.
    """
    timed = [line for line in read_history(output) if "images_per_second" in line]
    later = [line for line in timed[3:] if line["step"] > full]
    if len(later) < 5:
        return None
    return int(timed[-1]["step"]), batch / statistics.median(line["images_per_second"] for line in later[-10:])


def all_losses_from(settings: dict[str, Any], steps: int) -> float:
    """Return the step from which on a tokenizer's discriminator is trained, too: such steps take much longer."""
    return count_of_steps(settings.get("adversarial_from", 0.0), steps) if settings.get("adversarial") else 0.0


def train(stage: str, words: Sequence[Any], args: argparse.Namespace, end: float) -> None:
    """Run a stage, with as many steps as fit until `end` (of `time.monotonic`)."""
    recipe = args.recipe / f"{stage}.yaml"
    settings = yaml.safe_load(recipe.read_text())
    loop = settings["loop"]
    steps, batch = args.steps.get(stage, loop["steps"]), args.batch_size or loop["batch_size"]
    output, kind = args.output / stage, "gpt" if stage == "gpt" else "tokenizer"
    command = ["train", kind, "--config", recipe, *words, "--output", output, "--loop.batch_size", batch]
    command += ["--device", args.device] if args.device else []
    begun, full = time.monotonic(), all_losses_from(settings, steps)
    process = start(*command, "--loop.steps", steps)
    while process.poll() is None:
        time.sleep(0.2)
        now = time.monotonic()
        if now > begun + 2 * WATCHED * (end - begun):
            full = 0.0  # better a speed that is too high than none
        known = speed(output, batch, full) if now > begun + WATCHED * (end - begun) else None
        if known is None:
            continue
        done, step = known
        fit = done + (end - now - LAST) / step
        print(f"{stage}: {batch / step:,.0f} images per second, so {int(fit):,} steps fit", flush=True)
        if not TOLERATED[0] < fit / steps < TOLERATED[1]:
            process.send_signal(signal.SIGINT)  # it keeps a checkpoint
            process.wait()
            fewest = done + args.fewest_steps
            process = start(*command, "--loop.steps", max(fewest, int(fit - RESTART / step)))
        break
    if status := process.wait():
        sys.exit(status)


def stage_and_steps(text: str) -> tuple[str, int]:
    """Parse STAGE=STEPS."""
    stage, _, steps = text.partition("=")
    if stage not in STAGES or not steps.isdecimal() or not int(steps):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a stage ({', '.join(STAGES)}) with a number of steps, as gpt=9000"
        )
    return stage, int(steps)


def main() -> None:
    """Train, extract, train, and write both models to OUTPUT/shipped."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="training images with labels")
    parser.add_argument("--output", required=True, type=lambda text: Path(text).expanduser(), help="a new folder")
    parser.add_argument(
        "--recipe", type=Path, default=RECIPE, help="folder of the settings (default: gpu, beside this)"
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="for all of it (default: %(default)s)")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES, help="the first of them (default: all)")
    parser.add_argument("--device", help="cuda, cpu, … (default: the GPU, if any)")
    parser.add_argument("--batch-size", type=int, help="another one than the recipes'")
    parser.add_argument("--steps", nargs="+", type=stage_and_steps, default=[], metavar="STAGE=N", help="to begin with")
    parser.add_argument("--fewest-steps", type=int, default=100, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.steps = dict(args.steps)
    if args.output.exists():
        sys.exit(f"{args.output} exists already: give a new folder")
    if tuple(args.stages) != STAGES[: len(args.stages)]:
        parser.error(f"--stages are the first of: {', '.join(STAGES)}")
    begun = time.monotonic()
    end = begun + args.minutes * 60
    tokenizer, tokens, shipped = args.output / "tokenizer", args.output / "tokens", args.output / "shipped"
    gpt, decoder, alone = args.output / "gpt", args.output / "decoder", len(args.stages) == 1

    train("tokenizer", ["--data", args.data], args, end if alone else begun + (end - begun) * TOKENIZER_SHARE)
    run("convert", tokenizer, "--dtype", "bfloat16", "--output", shipped / "tokenizer")
    if alone:
        return
    extraction = ["--data", args.data, "--tokenizer", shipped / "tokenizer", "--output", tokens]
    device = ["--device", args.device] if args.device else []
    run("extract", "--config", args.recipe / "extract.yaml", *extraction, *device)
    words = {
        "gpt": ["--tokens", tokens, "--tokenizer", shipped / "tokenizer"],
        "decoder": ["--data", args.data, "--init", shipped / "tokenizer", "--tokens", tokens],
    }
    with ThreadPoolExecutor() as side_by_side:
        trained = {stage: side_by_side.submit(train, stage, words[stage], args, end) for stage in args.stages[1:]}
    trained["gpt"].result()  # ends the script if it failed
    run("convert", gpt, "--dtype", "bfloat16", "--output", shipped / "gpt")
    if "decoder" in args.stages:
        trained["decoder"].result()
        shutil.rmtree(shipped / "tokenizer")
        run("convert", decoder, "--dtype", "bfloat16", "--output", shipped / "tokenizer")
    print(f"{time.monotonic() - begun:.0f} s in all: {shipped}", flush=True)


if __name__ == "__main__":
    main()
