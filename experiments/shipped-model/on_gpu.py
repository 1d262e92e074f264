"""Train a tokenizer, an AR model and the decoder again on one GPU in a given time, each stage measured first.

    python experiments/shipped-model/on_gpu.py --data train.tar --output runs/gpu --minutes 9

The data may be anything that `detailflow train` reads. Each stage is a `detailflow` command, which is printed.
Where speeds are known, `--steps tokenizer=4000 gpt=9000` saves the measuring, a minute or two of each stage.
"""

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

RECIPE = Path(__file__).parent / "gpu"
TRIAL_STEPS = 240  # of a stage, to measure it; the last quarter has all losses
SHARES = {"tokenizer": 0.5, "gpt": 0.3, "decoder": 0.2}  # of the time for training
RESERVE = 45.0  # seconds for what follows the training: extraction, pictures, checkpoints


class Clock:
    """What is left of the time."""

    def __init__(self, minutes: float) -> None:
        self.end = time.monotonic() + minutes * 60

    @property
    def left(self) -> float:
        """Seconds."""
        return self.end - time.monotonic()


def run(*words: Any) -> None:
    """Run a `detailflow` command, or end with its status."""
    command = [sys.executable, "-m", "detailflow", *map(str, words)]
    print(shlex.join(["detailflow", *command[3:]]), flush=True)
    if status := subprocess.run(command).returncode:
        sys.exit(status)


def seconds_per_step(output: Path, batch: int) -> float:
    """Return a step's seconds by a run's log, without what came before the first line."""
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    speeds = [line["images_per_second"] for line in lines if "images_per_second" in line][1:]
    return sum(batch / speed for speed in speeds) / len(speeds)


def train(stage: str, words: Sequence[Any], args: argparse.Namespace, seconds: float) -> None:
    """Try a stage, choose its steps so that it takes `seconds` from now on, and run it."""
    recipe = args.recipe / f"{stage}.yaml"
    batch = yaml.safe_load(recipe.read_text())["loop"]["batch_size"]
    if args.batch_size:
        batch = args.batch_size
    command = [
        "train",
        "gpt" if stage == "gpt" else "tokenizer",
        "--config",
        recipe,
        *words,
        "--loop.batch_size",
        batch,
        *device(args),
    ]
    trial, output, start = args.output / f"{stage}-trial", args.output / stage, time.monotonic()
    if steps := args.steps.get(stage):
        run(*command, "--output", output, "--loop.steps", steps)
        return
    few = ["--loop.steps", args.trial_steps, "--loop.log_every", args.trial_steps // 6, "--loop.pictures_every", 10**6]
    run(*command, "--output", trial, *few)
    step, spent = seconds_per_step(trial, batch), time.monotonic() - start
    beginning = max(0.0, spent - step * args.trial_steps) / 2  # of the run: its compiler has most in its cache
    steps = max(args.trial_steps, int((seconds - spent - beginning) / step))
    print(f"{stage}: {batch / step:,.0f} images per second, so {steps:,} steps", flush=True)
    if (features := trial / "features.pt").exists():  # the classifier need not learn again
        output.mkdir(parents=True, exist_ok=True)
        shutil.copy(features, output / features.name)
    shutil.rmtree(trial)
    run(*command, "--output", output, "--loop.steps", steps)


def stage_and_steps(text: str) -> tuple[str, int]:
    """Parse STAGE=STEPS."""
    stage, _, steps = text.partition("=")
    if stage not in SHARES or not steps.isdecimal() or not int(steps):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no stage ({', '.join(SHARES)}) with a number of steps, as gpt=9000"
        )
    return stage, int(steps)


def device(args: argparse.Namespace) -> list[str]:
    """Return the option for it."""
    return ["--device", args.device] if args.device else []


def main() -> None:
    """Train, extract, train, and write both models to OUTPUT/shipped."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="training images with labels")
    parser.add_argument("--output", required=True, type=lambda text: Path(text).expanduser(), help="a new folder")
    parser.add_argument(
        "--recipe", type=Path, default=RECIPE, help="folder of the settings (default: gpu, beside this)"
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="for all of it (default: %(default)s)")
    names = [*SHARES]
    parser.add_argument("--stages", nargs="+", choices=names, default=names, help="the first of them (default: all)")
    parser.add_argument("--device", help="cuda, cpu, … (default: the GPU, if any)")
    parser.add_argument("--batch-size", type=int, help="another one than the recipes'")
    parser.add_argument(
        "--trial-steps", type=int, default=TRIAL_STEPS, help="to measure a stage (default: %(default)s)"
    )
    parser.add_argument(
        "--steps",
        nargs="+",
        type=stage_and_steps,
        default=[],
        metavar="STAGE=N",
        help="of stages that need no measuring",
    )
    args = parser.parse_args()
    args.steps = dict(args.steps)
    if args.output.exists():
        sys.exit(f"{args.output} exists already: give a new folder")
    if args.stages != names[: len(args.stages)]:
        parser.error(f"--stages are the first of: {', '.join(names)}")
    clock = Clock(args.minutes)
    tokenizer, tokens, shipped = args.output / "tokenizer", args.output / "tokens", args.output / "shipped"

    def share(stage: str) -> float:
        rest = names[names.index(stage) : len(args.stages)]
        return SHARES[stage] / sum(SHARES[name] for name in rest)

    train("tokenizer", ["--data", args.data], args, (clock.left - RESERVE) * share("tokenizer"))
    run("convert", tokenizer, "--dtype", "bfloat16", "--output", shipped / "tokenizer")
    if "gpt" not in args.stages:
        return
    extraction = ["--data", args.data, "--tokenizer", tokenizer, "--output", tokens]
    run("extract", "--config", args.recipe / "extract.yaml", *extraction, *device(args))
    gpt, decoder = args.output / "gpt", args.output / "decoder"
    train("gpt", ["--tokens", tokens, "--tokenizer", tokenizer], args, (clock.left - 10) * share("gpt"))
    run("convert", gpt, "--dtype", "bfloat16", "--output", shipped / "gpt")
    if "decoder" not in args.stages:
        return
    rows = ["--data", args.data, "--init", tokenizer, "--tokens", tokens, "--gpt", gpt]
    train("decoder", rows, args, clock.left - 10)
    shutil.rmtree(shipped / "tokenizer")
    run("convert", decoder, "--dtype", "bfloat16", "--output", shipped / "tokenizer")
    print(f"{args.minutes * 60 - clock.left:.0f} s in all: {shipped}", flush=True)


if __name__ == "__main__":
    main()
