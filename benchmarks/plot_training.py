"""Learning curves from the TensorBoard files of training runs.

python benchmarks/plot_training.py RUN/tokenizer RUN/gpt --scalars psnr loss --output docs/images/shipped-training.png
"""

import argparse
from pathlib import Path

import matplotlib
import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

matplotlib.use("Agg")
from matplotlib import pyplot as plt

WINDOW = 10  # logged points that one point of the thick line averages


def main() -> None:
    """Draw one panel per run, of the scalar given for it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--scalars", nargs="+", required=True, help="one per run")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    figure, axes = plt.subplots(1, len(options.runs), figsize=(5 * len(options.runs), 3.2), squeeze=False)
    for axis, run, scalar in zip(axes[0], options.runs, options.scalars, strict=True):
        events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
        events.Reload()
        steps, values = np.array([(e.step, e.value) for e in events.Scalars(scalar)]).T
        axis.plot(steps, values, color="0.8", linewidth=0.8)
        smooth = np.convolve(values, np.ones(WINDOW) / WINDOW, "valid")
        axis.plot(steps[WINDOW - 1 :], smooth, color="tab:blue")
        axis.set(xlabel="step", ylabel=scalar, title=run.name)
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(options.output, dpi=120)


if __name__ == "__main__":
    main()
