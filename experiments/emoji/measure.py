"""Measure a model of emoji: reconstructions of held-out emoji, samples, and how far samples are learnt by heart.

    python experiments/emoji/measure.py --train train.parquet --test test.parquet [--model MODEL] [--search STEPS]
        [--nearest FILE.png]

Prints PSNR by number of tokens, Fréchet distances by EfficientNet-Lite0 to the training images, and the distances of
samples and of held-out emoji to their nearest training images, all of them as the tokenizer rebuilds them, so that its
blur does not count. --nearest gets rows of samples, each row above one of the training images nearest to them.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from detailflow import DetailFlowPipeline
from detailflow.data.images import open_images
from detailflow.data.transforms import center_crop, to_tensor, to_uint8
from detailflow.errors import exit_on_error
from detailflow.evaluation.features import load_extractor
from detailflow.evaluation.metrics import Moments, edge_jumps, frechet_distance
from detailflow.pictures import grid
from detailflow.progress import progress_bar
from detailflow.psnr import psnr
from detailflow.training.nearest import nearer_share

BATCH = 50
COUNTS = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128)  # as far as the model has so many
COLUMNS, ROWS = 10, 2  # of the picture


def bytes_of(path: str, size: int) -> Tensor:
    """Return all images of a file, (n, size, size, 3) bytes."""
    source = open_images(path)
    return torch.from_numpy(np.stack([center_crop(source.image(i), size) for i in range(len(source))]))


def rebuilt(pipe: DetailFlowPipeline, images: Tensor, counts: tuple[int, ...], search: int = 0) -> dict[int, Tensor]:
    """Return the images from their first tokens at full size, by number of tokens."""
    size, made = pipe.tokenizer.config.image_size, {n: list[Tensor]() for n in counts}
    for some in progress_bar(images.split(BATCH), desc="rebuilding", total=-(-len(images) // BATCH)):
        ids = pipe.tokenizer.encode(to_tensor(some), search=search)
        for n in counts:
            made[n].append(to_uint8(pipe.tokenizer.decode(ids[:, :n], size=size)))
    return {n: torch.cat(parts) for n, parts in made.items()}


def decibels(a: Tensor, b: Tensor) -> float:
    """Return the mean over images of the PSNR of bytes (n, H, W, 3)."""
    return psnr(a.float(), b.float(), peak=255).mean().item()


def sampled(pipe: DetailFlowPipeline, count: int) -> list[Image.Image]:
    """Return samples of all classes in turn."""
    labels = [i % pipe.gpt.config.num_classes for i in range(count)]
    starts = progress_bar(range(0, count, BATCH), desc="samples", total=-(-count // BATCH))
    return [image for i in starts for image in pipe(labels[i : i + BATCH], first_image=i)]


def distance(a: Tensor, b: Tensor) -> float:
    """Return the Fréchet distance of features (n, D)."""
    gaussians = []
    for x in (a, b):
        moments = Moments(x.shape[1])
        moments.update(x)
        gaussians.append(moments.gaussian())
    return frechet_distance(*gaussians)


def report(pipe: DetailFlowPipeline, train: Tensor, test: Tensor, images: list[Image.Image]) -> Tensor:
    """Print the figures; return the index of the training image that is nearest to each sample."""
    config, network = pipe.tokenizer.config, load_extractor("efficientnet-lite0")
    every = config.num_tokens
    held = rebuilt(pipe, test, tuple(n for n in COUNTS if n <= every))
    print("held-out emoji, dB by tokens:", *(f"{n}: {decibels(made, test):.2f}" for n, made in held.items()))
    across, inside = edge_jumps(held[every], test, config.patch_size).sum(0).tolist()
    print(f"their errors across patch edges / inside: {across / inside:.3f}")
    learnt = rebuilt(pipe, train, (every,))[every]
    print(f"training emoji: {decibels(learnt, train):.2f} dB")

    def features(images: Tensor) -> Tensor:
        return torch.cat([network(some).pool for some in images.split(BATCH)])

    half = to_uint8(F.interpolate(F.avg_pool2d(to_tensor(train), 2), scale_factor=2.0, mode="bicubic"))
    samples = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    known, found, unseen = features(train), features(samples), features(held[every])
    rebuilt_known = features(learnt)
    sets = {"samples": found, "training emoji rebuilt": rebuilt_known, "at half the size": features(half)}
    for name, x in (sets | {"held-out emoji": features(test)}).items():
        print(f"Fréchet distance to the training emoji, {name}: {distance(known, x):.1f}")
    near, of = (torch.cdist(F.normalize(x), F.normalize(rebuilt_known)).min(1) for x in (found, unseen))
    medians = [x.values.median().item() for x in (near, of)]
    print("to the nearest training emoji, median: samples {:.3f}, held-out {:.3f}".format(*medians))
    print(f"a sample is nearer in {nearer_share(near.values, of.values):.0%} of pairs with a held-out emoji")
    print(f"{len(near.indices.unique())} training emoji are the nearest to one or more samples")
    return near.indices


def main() -> None:
    """Print the figures, and draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", required=True, help="the training emoji")
    parser.add_argument("--test", required=True, help="the held-out ones")
    parser.add_argument("--model", default="emoji-64")
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--search", type=int, default=20, help="steps, for held-out emoji once more (default: 20)")
    parser.add_argument("--nearest", type=Path, metavar="FILE.png")
    options = parser.parse_args()
    pipe = DetailFlowPipeline.from_pretrained(options.model)
    train, test = (bytes_of(path, pipe.tokenizer.config.image_size) for path in (options.train, options.test))
    images = sampled(pipe, options.samples)
    with torch.inference_mode():
        nearest = report(pipe, train, test, images)
        every = pipe.tokenizer.config.num_tokens
        found = decibels(rebuilt(pipe, test, (every,), options.search)[every], test)
        print(f"held-out emoji, tokens by a search of {options.search} steps: {found:.2f} dB")
    if options.nearest:
        rows: list[Image.Image] = []
        for start in range(0, COLUMNS * ROWS, COLUMNS):
            end = start + COLUMNS
            rows += images[start:end] + [Image.fromarray(train[i].numpy()) for i in nearest[start:end].tolist()]
        grid(rows, columns=COLUMNS).save(options.nearest, optimize=True)
        print(f"wrote {options.nearest}")


if __name__ == "__main__":
    with exit_on_error():
        main()
