"""Compare how fast tokenizers learn: the paper's layout with Adam, and the presets' (docs/method.md#beyond-the-paper).

    python experiments/learning/run.py --data train.parquet --held-out test.parquet --preset own-64 --steps 1100 720 \
        --output runs/learning

Both are trained for the mean squared error and self-correction alone, from each seed, and measured on held-out images
at full size. --steps are those of each: choose them so that both take as long. Prints means ± standard deviations over
the seeds. The same line continues after an interruption.
"""

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

from detailflow.training.presets import load_settings

LAYOUTS = {  # options beside the preset's
    "the paper's layout, Adam": "--model.linear_path false --model.pixel_channels 3 --model.absent_token false"
    " --nested_probability 0 --coarse_probability 0.3 --muon 0 --loop.learning_rate 1e-3",
    "the preset's": "",
}
ALONE = "--perceptual 0 --adversarial 0 --val_share 0 --loop.trackers [] --loop.pictures_every 1000000"


def trained(args: argparse.Namespace, layout: str, steps: int, seed: int) -> dict[str, float]:
    """Train and measure one tokenizer, or read its report; return its figures."""
    model = load_settings(args.preset, "tokenizer")["model"]
    size = args.size or model["image_size"]
    folder = args.output / f"{list(LAYOUTS).index(layout)}-{steps}-{seed}"
    run, report, data, test = map(shlex.quote, map(str, (folder / "run", folder / "report", args.data, args.held_out)))
    counts = [n for n in (1, 4, 16) if n < model["num_tokens"]] + [model["num_tokens"]]
    some = f"--num-images {args.num_images}" if args.num_images else ""
    lines = (
        f"train tokenizer --config {args.preset}/tokenizer --data {data} {ALONE} {LAYOUTS[layout]}"
        f" --model.image_size {size} --model.patch_size {size * model['patch_size'] // model['image_size']}"
        f" --loop.steps {steps} --loop.seed {seed} --output {run}",
        f"evaluate tokenizer --model {run} --data {test} {some} --features none --lpips none"
        f" --num-tokens {' '.join(map(str, counts))} --size {size} --output {report}",
    )
    if not (folder / "report" / "report.json").exists():
        for line in lines:
            if status := subprocess.run([sys.executable, "-m", "detailflow", *shlex.split(line)]).returncode:
                sys.exit(status)
    rows = json.loads((folder / "report" / "report.json").read_text(encoding="utf-8"))["sections"][0]["rows"]
    figures = {f"{row['setting']['tokens']} tokens, dB": float(row["figures"]["PSNR"]["value"]) for row in rows}
    return figures | {"blockiness": float(rows[-1]["figures"]["blockiness"]["value"])}


def main(argv: Sequence[str] | None = None) -> None:
    """Train, measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="the images to learn from")
    parser.add_argument("--held-out", required=True, help="others, which measure")
    parser.add_argument("--output", required=True, type=Path, help="a folder")
    parser.add_argument("--preset", default="own-64", choices=["own-64", "small-32"])
    parser.add_argument("--size", type=int, help="of the images, with as many patches (default: the preset's)")
    parser.add_argument("--steps", nargs=2, type=int, required=True, help="of the paper's layout, of the preset's")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--num-images", type=int, help="held-out images that are measured (default: all)")
    args = parser.parse_args(argv)
    lines = []
    for layout, steps in zip(LAYOUTS, args.steps, strict=True):
        found = [trained(args, layout, steps, seed) for seed in args.seeds]
        if not lines:
            lines = [["", "steps", *found[0]], ["---"] * (2 + len(found[0]))]
        values = [[one[name] for one in found] for name in found[0]]
        lines.append([layout, str(steps), *map(mean_and_deviation, values)])
    print("\n".join(f"| {' | '.join(line)} |" for line in lines))


def mean_and_deviation(values: Sequence[float]) -> str:
    """Return the mean, ± the standard deviation if there are several values."""
    return f"{mean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")


if __name__ == "__main__":
    main()
