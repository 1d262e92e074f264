"""Measure images: those that a model generates, and those that it rebuilds.

Shows: two sets compared by the features of a network that needs no download, and PSNR by number of tokens. A few
hundred images give only a rough distance; published ones are of 50,000.

    python examples/evaluate.py
"""

import argparse
from pathlib import Path

import numpy as np

from detailflow import DetailFlowPipeline
from detailflow.evaluation.evaluate import Context, evaluate_samples
from detailflow.evaluation.features import load_extractor
from detailflow.psnr import psnr

parser = argparse.ArgumentParser()
parser.add_argument("--images", type=int, default=100, help="in each set")
count = parser.parse_args().images

pipe = DetailFlowPipeline.from_pretrained()
classes = [i % 10 for i in range(count)]
sets = {"reference": dict(seed=1), "other seed": dict(seed=2), "no guidance": dict(seed=2, guidance_scale=1)}
for name, options in sets.items():
    folder = Path("outputs/sets") / name
    folder.mkdir(parents=True, exist_ok=True)
    images = pipe(classes, **options)
    np.savez(folder.with_suffix(".npz"), arr_0=np.stack([np.asarray(image) for image in images]))

extractor = load_extractor("efficientnet-lite0")  # its weights are in a package of the extra `train`
context = Context.launch(device=None)
for name in ("other seed", "no guidance"):
    report = evaluate_samples(
        context.open(f"outputs/sets/{name}.npz"), context.open("outputs/sets/reference.npz"), extractor, context
    )
    report.write(Path("outputs/reports") / name)
    print(f"{name}: see outputs/reports/{name}/report.md")
    print(report.markdown().split("\n\n")[1])

image = images[0]
for n in (1, 8, 16, 48):
    rebuilt = pipe.reconstruct(image, counts=[n])[0]
    assert abs(rebuilt.psnr - psnr(np.asarray(rebuilt.images[0]), np.asarray(image)).item()) < 1e-3
    print(f"{n:2d} tokens: {rebuilt.psnr:.1f} dB")
