"""Learning curves of training runs, from their log.jsonl.

python benchmarks/plot_training.py RUN/tokenizer RUN/gpt --scalars psnr loss,val_loss --output curves.png
"""

import argparse
import json
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt

WINDOW = 10  # logged points that one point of the thick line averages


def main() -> None:
    """Draw one panel per run, of the scalars given for it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--scalars", nargs="+", required=True, help="one per run, or several with commas")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    figure, axes = plt.subplots(1, len(options.runs), figsize=(5 * len(options.runs), 3.2), squeeze=False)
    for axis, run, scalars in zip(axes[0], options.runs, options.scalars, strict=True):
        lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        for scalar in scalars.split(","):
            steps, values = np.array([(line["step"], line[scalar]) for line in lines if scalar in line]).T
            if len(steps) > 4 * WINDOW:
                axis.plot(steps, values, color="0.8", linewidth=0.8)
                steps, values = steps[WINDOW - 1 :], np.convolve(values, np.ones(WINDOW) / WINDOW, "valid")
            axis.plot(steps, values, label=scalar)
        axis.set(xlabel="step", title=run.name)
        axis.legend()
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(options.output, dpi=120)


if __name__ == "__main__":
    main()
