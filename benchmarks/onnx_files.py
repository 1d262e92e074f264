"""Compare exported ONNX files with the PyTorch and the native engine: sizes, times in turns, and accuracy.

python benchmarks/onnx_files.py --threads 1
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import Tensor

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "examples"))

from onnx_generate import Generator  # noqa: E402

from detailflow import DetailFlowPipeline  # noqa: E402
from detailflow.data import open_images  # noqa: E402
from detailflow.data.transforms import center_crop, to_tensor  # noqa: E402
from detailflow.errors import exit_on_error  # noqa: E402
from detailflow.export.write import PRECISIONS, export  # noqa: E402
from detailflow.generation import image_generator, with_null_class  # noqa: E402
from detailflow.psnr import psnr  # noqa: E402

PHOTOS = ROOT / "tests" / "data" / "images" / "cifar10.parquet"


def parse() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description="Sizes, times and accuracy of exported ONNX files.")
    parser.add_argument("--model", help="as of `detailflow export` (default: the shipped one)")
    parser.add_argument("--images", default=str(PHOTOS), help="to encode and decode (default: 400 of CIFAR-10)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=20, help="of each time; the median counts")
    parser.add_argument("--samples", type=int, default=100, help="images whose tokens are compared")
    return parser.parse_args()


def sizes(folder: Path) -> None:
    """Print the size of each file in MB."""
    print("file, MB: " + ", ".join(f"{p.name} {p.stat().st_size / 1e6:.1f}" for p in sorted(folder.glob("*.onnx*"))))


def times(pipeline: DetailFlowPipeline, generators: dict[str, Generator], repeats: int) -> None:
    """Print the median time of one image, tokens and pixels, by each way in turn."""

    def ours(engine: str) -> None:
        pipeline.gpt.engine = pipeline.tokenizer.engine = engine
        pipeline(0, seed=0)

    def theirs(generator: Generator) -> None:
        tokens = generator.tokens(np.array([0]), 0, generator.model["sampling"], generator.model["num_tokens"])
        generator.images(tokens)

    ways: dict[str, Callable[[], None]] = {"PyTorch": lambda: ours("torch"), "native": lambda: ours("native")}
    for kind, generator in generators.items():
        ways[f"ONNX Runtime, {kind}"] = lambda generator=generator: theirs(generator)
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats + 1):
        for name, run in ways.items():
            began = time.perf_counter()
            run()
            taken[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(seconds[1:]) for name, seconds in taken.items()}  # the first is for warm-up
    for name, median in medians.items():
        spread = np.percentile(taken[name][1:], [10, 90]) * 1000
        ratio = median / medians["PyTorch"]
        print(f"one image, {name}: {median * 1000:.0f} ms ({spread[0]:.0f} to {spread[1]:.0f}), ratio {ratio:.2f}")


def step_logits(generator: Generator, classes: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Return the logits (B, N, K) after known tokens (B, N)."""
    model, outputs = generator.model, [output.name for output in generator.step.get_outputs()]
    empty = np.zeros((len(classes), model["heads"], 0, model["head_dim"]), np.float32)
    cache, found = {name: empty for name in outputs if name != "logits"}, []
    for start, end in model["steps"]:
        feeds = {name.replace("present", "past_key_values"): value for name, value in cache.items()}
        feeds["inputs"] = generator.inputs(classes, tokens, start, end)
        cache = dict(zip(outputs, generator.step.run(outputs, feeds), strict=True))
        found.append(cache.pop("logits"))
    return np.concatenate(found, 1)


def mean_psnr(images: np.ndarray, wanted: np.ndarray) -> float:
    """Return the mean PSNR in dB of images with values in [-1, 1]."""
    return psnr(np.clip(images, -1, 1), np.clip(wanted, -1, 1), peak=2).mean().item()


@torch.inference_mode()
def accuracy(
    pipeline: DetailFlowPipeline,
    generator: Generator,
    encoder: onnxruntime.InferenceSession,
    photos: Tensor,
    samples: int,
) -> None:
    """Print how far logits, codes and pixels are from PyTorch's in float32."""
    gpt, tokenizer = pipeline.gpt, pipeline.tokenizer
    gpt.engine = tokenizer.engine = "torch"
    classes = torch.arange(samples) % gpt.config.num_classes
    ids = gpt.generate(classes, generator=[image_generator(0, i) for i in range(samples)])
    rows = with_null_class(classes, gpt.config.num_classes)
    wanted = gpt(rows, ids.repeat(2, 1)).numpy()
    found = step_logits(generator, rows.numpy(), np.tile(ids.numpy(), (2, 1)))
    error, spread = np.sqrt(np.square(found - wanted).mean()), wanted.std()
    print(f"  logits: rms error {error:.2g}, of a standard deviation of {spread:.2f}")
    print(f"  most likely code the same: {(found.argmax(-1) == wanted.argmax(-1)).mean():.2%} of positions")
    drawn = generator.tokens(classes.numpy(), 0, generator.model["sampling"], gpt.config.num_tokens)
    print(f"  all tokens the same for a seed: {(drawn == ids.numpy()).all(1).sum()} of {samples} images")
    codes = tokenizer.encode(photos)
    (encoded,) = encoder.run(["ids"], {"images": photos.numpy()})
    print(f"  codes of {len(photos)} photographs the same: {(encoded == codes.numpy()).mean():.2%}")
    size = {"size": np.array([tokenizer.config.image_size])}
    pixels = tokenizer.decode(codes).numpy()
    (decoded,) = generator.decoder.run(["pixels"], size | {"ids": codes.numpy()})
    print(f"  images decoded from the same codes: {mean_psnr(decoded, pixels):.1f} dB from ours")
    (rebuilt,) = generator.decoder.run(["pixels"], size | {"ids": encoded})
    ours, theirs = mean_psnr(pixels, photos.numpy()), mean_psnr(rebuilt, photos.numpy())
    print(f"  photographs encoded and decoded: {theirs:.2f} dB from the original, ours {ours:.2f} dB")


def main() -> None:
    """Print everything."""
    args = parse()
    torch.set_num_threads(args.threads)
    pipeline = DetailFlowPipeline.from_pretrained(args.model, device="cpu")
    side, source = pipeline.tokenizer.config.image_size, open_images(args.images)
    photos = torch.stack([to_tensor(center_crop(source.image(i), side)) for i in range(min(len(source), 400))])
    print(f"torch {torch.__version__}, onnxruntime {onnxruntime.__version__}, {args.threads} thread(s)")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = args.threads
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        export(pipeline, folder, "model")
        sizes(folder)
        model = json.loads((folder / "model.json").read_text())
        generators = {kind: Generator(folder, model, kind, args.threads) for kind in PRECISIONS}
        times(pipeline, generators, args.repeats)
        for kind, generator in generators.items():
            print(kind)
            encoder = onnxruntime.InferenceSession(folder / model["files"][kind]["encoder"], options)
            accuracy(pipeline, generator, encoder, photos, args.samples)


if __name__ == "__main__":
    with exit_on_error():
        main()
