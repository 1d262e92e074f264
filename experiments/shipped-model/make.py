"""Make the shipped CIFAR-10 model: train, extract, convert, and with --test measure it.

    python experiments/shipped-model/make.py --data train.parquet --output runs/cifar10 [--test test.parquet]

Each stage is a `detailflow` command, which is printed. The same line continues after an interruption.
"""

import argparse
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent

MAKE = """
train tokenizer --config {recipe}/tokenizer.yaml --data {data} --output {output}/first
train tokenizer --config {recipe}/tokenizer-correction.yaml --init {output}/first --data {data} \
--output {output}/tokenizer
extract --config {recipe}/extract.yaml --data {data} --tokenizer {output}/tokenizer --output {output}/tokens
train gpt --config {recipe}/gpt.yaml --tokens {output}/tokens --tokenizer {output}/tokenizer --output {output}/gpt
train tokenizer --config {recipe}/decoder.yaml --init {output}/tokenizer --gpt {output}/gpt --data {data} \
--output {output}/decoder
convert {output}/decoder --dtype bfloat16 --output {output}/shipped/tokenizer
convert {output}/gpt --dtype bfloat16 --output {output}/shipped/gpt
"""
MEASURE = """
evaluate statistics {data} --size 32 --features {features} --output {output}/train.npz
evaluate tokenizer --model {output}/shipped --data {test} --num-images {images} --reference {output}/train.npz \
--features {features} --num-tokens 1 2 4 8 16 24 32 40 48 --mistakes-at g1 g2 --lpips none \
--output {output}/reconstruction
evaluate gpt --model {output}/shipped --reference {output}/train.npz --features {features} --num-samples {images} \
--guidance-scale 1 2 3 4 --output {output}/samples
evaluate samples {test} {output}/train.npz --num-images {images} --features {features} --output {output}/real
"""


def commands(args: argparse.Namespace) -> list[list[str]]:
    """Return the commands in order, each with its output last."""
    values = {name: shlex.quote(str(value)) for name, value in vars(args).items()}
    lines = (MAKE + MEASURE if args.test else MAKE).splitlines()
    return [["detailflow", *shlex.split(line.format(**values))] for line in lines if line]


def measured(command: Sequence[str]) -> bool:
    """Return True if an evaluation is finished; training and extraction see for themselves."""
    output = Path(command[-1])
    return command[1] == "evaluate" and (output.is_file() or (output / "report.json").exists())


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="CIFAR-10's training images with labels")
    parser.add_argument("--test", help="its test images, to measure the model with")
    parser.add_argument("--output", required=True, type=lambda text: Path(text).expanduser(), help="a folder")
    parser.add_argument("--recipe", type=Path, default=HERE, help="the folder with the settings (default: this one)")
    parser.add_argument("--features", default=HERE / "cifar10-features.safetensors", help="as of `detailflow evaluate`")
    parser.add_argument("--images", type=int, default=10000, help="images in each measurement (default: %(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="only print the commands")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Run every command that is not finished; end with its status if one fails."""
    args = parse_args(argv)
    for command in commands(args):
        if measured(command):
            continue
        print(shlex.join(command), flush=True)
        if not args.dry_run and (status := subprocess.run([sys.executable, "-m", *command]).returncode):
            sys.exit(status)


if __name__ == "__main__":
    # Ctrl-C reaches the command, which saves a checkpoint and ends; then this script ends too.
    signal.signal(signal.SIGINT, lambda *_: None)
    main()
