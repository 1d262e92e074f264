"""Make the pictures of README.md and docs/ with a model's schedule, samples and reconstructions.

    python benchmarks/make_pictures.py --data DATA [--model MODEL] [--output DIR] [--prefix TEXT] [--only NAME …]

Writes samples.png (images of every class), taking-shape.webp (the same as an animation, from coarse to fine),
coarse-to-fine.png (photographs and samples by number of tokens), masks.png (what attends to what), resolution.png
(what n tokens show) and variations.png (photographs whose first tokens stay, by number of tokens and class). All but
masks.png and resolution.png bear the prefix. These two need matplotlib, from the `train` extra.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image

from detailflow import DetailFlowPipeline, TokenSchedule
from detailflow.cli.vary import Subject, variation_tiles
from detailflow.data.images import open_images
from detailflow.errors import exit_on_error
from detailflow.pictures import GAP, grid, strip
from detailflow.pipeline import Stage, fit

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
VARIED = ("automobile", "bird", "cat", "horse", "ship")  # classes of variations.png
CLASSES = 10  # as many as a row of samples.png shows
MOVING_SIDE = 64  # pixels of an image in the animation, at least
FRAME_MS, LAST_MS = 160, 2500  # how long a frame of the animation stays, and the last one
DETAILFLOW_16 = TokenSchedule(num_tokens=128, group_size=8, causal_tokens=8, image_size=256, patch_size=16)


def samples(pipeline: DetailFlowPipeline, rows: int, seed: int) -> Image.Image:
    """Return a grid with `rows` images of each of the first classes, one class per column."""
    classes = list(range(min(CLASSES, pipeline.gpt.config.num_classes)))
    images = pipeline(classes, num_images_per_class=rows, seed=seed)
    by_row = [images[column * rows + row] for row in range(rows) for column in classes]
    return grid(by_row, columns=len(classes), labels=[pipeline.class_name(i) for i in classes] * rows)


def taking_shape(pipeline: DetailFlowPipeline, rows: int, seed: int) -> list[Image.Image]:
    """Return the frames of a grid with `rows` images of each of the first classes, from the first token to all."""
    classes = list(range(min(CLASSES, pipeline.gpt.config.num_classes)))
    counts, side = pipeline.tokenizer.schedule.stages(), max(MOVING_SIDE, pipeline.tokenizer.schedule.image_size)
    frames = []
    for stage in pipeline.stream(classes, num_images_per_class=rows, seed=seed, counts=counts):
        frame = Image.new("RGB", (len(classes) * (side + GAP) - GAP, rows * (side + GAP) - GAP), "white")
        for i, image in enumerate(stage.images):
            column, row = divmod(i, rows)
            large = image.resize((side, side), Image.Resampling.BICUBIC)
            frame.paste(large, (column * (side + GAP), row * (side + GAP)))
        frames.append(frame)
    return frames


def generated(pipeline: DetailFlowPipeline, count: int, seed: int) -> list[Image.Image]:
    """Return a strip from coarse to fine for one sample of each of `count` classes, spread over all."""
    classes = pipeline.gpt.config.num_classes
    labels = [i * classes // count for i in range(min(count, classes))]
    stages = list(pipeline.stream(labels, seed=seed, counts=pipeline.tokenizer.schedule.stages()))
    side = pipeline.tokenizer.schedule.image_size
    # Enlarged in the same way as `reconstruct` does, so that all strips can be compared.
    shown = [
        Stage(s.num_tokens, s.size, [i.resize((side, side), Image.Resampling.BICUBIC) for i in s.images])
        for s in stages
    ]
    return [strip(shown, i) for i in range(len(labels))]


def photographs(pipeline: DetailFlowPipeline, path: Path, count: int) -> list[Image.Image]:
    """Return a strip from coarse to fine, with the original, for the first image of each of `count` classes."""
    source = open_images(path)
    firsts = np.unique(source.labels, return_index=True)[1]
    rows = sorted(firsts.tolist())[:count]
    crops = [fit(pipeline.tokenizer.schedule, source.image(row)) for row in rows]
    return [strip(pipeline.reconstruct(crop), original=crop) for crop in crops]


def variations(pipeline: DetailFlowPipeline, path: Path, rows: list[int], seed: int) -> list[Image.Image]:
    """Return a sheet for each photograph of `rows`: by tokens kept (down) and class (across)."""
    schedule = pipeline.tokenizer.schedule
    names = [pipeline.class_name(i) for i in range(pipeline.gpt.config.num_classes)]
    classes = pipeline.class_ids([name for name in VARIED if name in names] or list(range(min(5, len(names)))))
    keeps = [n for n in schedule.stages() if 4 <= n < schedule.num_tokens]
    source, sheets = open_images(path), []
    for row in rows:
        image = fit(schedule, source.image(row))
        subject = Subject(pipeline.tokens(image), (image.height, image.width), image)
        tiles, _ = variation_tiles(pipeline, subject, keeps, classes, {"seed": seed})
        pictures, captions = zip(*tiles, strict=True)
        sheets.append(grid(pictures, len(tiles) // len(keeps), captions))
    return sheets


def stack(pictures: list[Image.Image]) -> Image.Image:
    """Return a sheet with pictures one below the other."""
    sheet = Image.new("RGB", (max(p.width for p in pictures), sum(p.height + GAP for p in pictures)), "white")
    top = 0
    for picture in pictures:
        sheet.paste(picture, (0, top))
        top += picture.height + GAP
    return sheet


def masks(schedule: TokenSchedule) -> Figure:
    """Plot the attention masks of the encoder and of the AR model: a row attends to the dark columns."""
    n, c, g = schedule.num_tokens, schedule.num_causal, schedule.group_size
    patches = (schedule.image_size // schedule.patch_size) ** 2
    own = schedule.attention_mask(n)
    encoder = torch.zeros(patches + n, patches + n, dtype=torch.bool)
    encoder[:, :patches] = True  # everything attends to the patches, and patches to nothing else
    encoder[patches:, patches:] = own
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 5.6), layout="constrained")
    _show_mask(left, encoder, f"tokenizer's encoder: {patches} patches, then {n} queries")
    left.axhline(patches - 0.5, color="tab:red", linewidth=1)
    left.axvline(patches - 0.5, color="tab:red", linewidth=1)
    _show_mask(right, own, f"AR model: {c} positions one by one, then groups of {g}")
    for start in range(c, n, g):
        right.axhline(start - 0.5, color="tab:red", linewidth=0.5)
    return figure


def _show_mask(axes: Axes, mask: torch.Tensor, title: str) -> None:
    axes.imshow(mask.numpy(), cmap="Blues", vmin=0, vmax=1.4, interpolation="nearest")
    axes.set(title=title, xlabel="key", ylabel="query")


def resolution(schedules: list[TokenSchedule]) -> Figure:
    """Plot R(n), and the side D(n) at which n tokens are decoded, for each schedule."""
    figure, panels = plt.subplots(
        1, len(schedules), figsize=(5.5 * len(schedules), 4), layout="constrained", squeeze=False
    )
    for axes, schedule in zip(panels[0], schedules, strict=True):
        every = range(1, schedule.num_tokens + 1)
        valid = schedule.valid_counts
        axes.plot(every, [schedule.resolution(n) for n in every], label="R(n), the resolution")
        axes.plot(valid, [schedule.decode_size(n) for n in valid], "o", markersize=3, label="D(n), the side decoded at")
        title = f"N = {schedule.num_tokens}, R = {schedule.image_size}, f = {schedule.patch_size}, α = {schedule.alpha}"
        axes.set(title=title, xlabel="tokens n", ylabel="pixels", ylim=(0, None))
        axes.legend(loc="lower right")
    return figure


def animate(frames: list[Image.Image], path: Path) -> None:
    """Write an animation that goes on for ever."""
    times = [FRAME_MS] * (len(frames) - 1) + [LAST_MS]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=times, loop=0, quality=85, method=6)


def main() -> None:
    """Write the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder with tokenizer/ and gpt/, or a name (default: the shipped model)")
    parser.add_argument("--data", type=Path, required=True, help="photographs with labels for coarse-to-fine.png")
    parser.add_argument("--output", type=Path, default=ROOT / "docs/images", help="default: docs/images")
    parser.add_argument("--prefix", default="", help="of the files' names")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="make these alone, such as samples")
    parser.add_argument("--rows", type=int, default=4, help="samples of each class (default: %(default)s)")
    parser.add_argument(
        "--strips", type=int, default=3, help="photographs, and samples, from coarse to fine (default: %(default)s)"
    )
    parser.add_argument("--varied", type=int, nargs="+", default=[6, 31], help="photographs to vary, by row")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    pipeline = DetailFlowPipeline.from_pretrained(options.model)
    schedule, seed, folder = pipeline.tokenizer.schedule, options.seed, options.output
    folder.mkdir(parents=True, exist_ok=True)
    makers: dict[str, Callable[[Path], object]] = {
        "samples.png": lambda path: samples(pipeline, options.rows, seed).save(path, optimize=True),
        "taking-shape.webp": lambda path: animate(taking_shape(pipeline, options.rows, seed), path),
        "coarse-to-fine.png": lambda path: stack(
            photographs(pipeline, options.data, options.strips) + generated(pipeline, options.strips, seed)
        ).save(path, optimize=True),
        "variations.png": lambda path: stack(variations(pipeline, options.data, options.varied, seed)).save(
            path, optimize=True
        ),
        "masks.png": lambda path: masks(schedule).savefig(path, dpi=100),
        "resolution.png": lambda path: resolution([schedule, DETAILFLOW_16]).savefig(path, dpi=100),
    }
    for name, make in makers.items():
        stem = name.partition(".")[0]
        if not options.only or stem in options.only:
            path = folder / (name if stem in ("masks", "resolution") else options.prefix + name)
            make(path)
            print(f"wrote {path}")


if __name__ == "__main__":
    with exit_on_error():
        main()
