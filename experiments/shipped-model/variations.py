"""Measure variations: what of an image stays if its first k tokens are kept, and if the class follows.

    python experiments/shipped-model/variations.py --data test.parquet --features FILE.safetensors

Each image is varied once as its own class and once as another one (all others in turn). For each k, the table has

- PSNR: the variation against the original, both as coarse as k tokens are (area down to R(k), then at D(k)), and of
  new images of the same classes, nothing kept;
- class accuracy: the share of variations that the feature network assigns to the class that was asked for, and of those
  of another class the share that it still assigns to the original's class.

The last row is the reconstruction, from all tokens.
"""

import argparse
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from detailflow import DetailFlowError, DetailFlowPipeline
from detailflow.data.images import open_images
from detailflow.data.source import spread
from detailflow.data.transforms import coarse_target, to_tensor, to_uint8
from detailflow.errors import exit_on_error
from detailflow.evaluation.features import load_extractor
from detailflow.generation import image_generator
from detailflow.pipeline import encode_images, fit
from detailflow.progress import progress_bar
from detailflow.psnr import psnr

BATCH_SIZE = 32
HEAD = (
    "tokens kept",
    "D(k)",
    "PSNR, same class",
    "other class",
    "nothing kept",
    "accuracy, same class",
    "other class",
    "still original",
)


def vary(pipeline: DetailFlowPipeline, ids: Tensor, classes: Tensor, keep: int, seed: int) -> Tensor:
    """(B, N) codes and (B,) classes → bytes (B, R, R, 3) of variations that keep the first `keep` codes."""
    made = []
    for first in range(0, len(ids), BATCH_SIZE):
        some = ids[first : first + BATCH_SIZE]
        noise = [image_generator(seed, first + i) for i in range(len(some))]
        prefix = some[:, :keep] if keep else None
        codes = pipeline.gpt.generate(classes[first : first + BATCH_SIZE], prefix=prefix, generator=noise)
        made.append(to_uint8(pipeline.tokenizer.decode(codes)).cpu())
    return torch.cat(made)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="images with the model's classes as labels")
    parser.add_argument("--features", required=True, help="a feature network with the same classes")
    parser.add_argument("--model", help="default: the shipped model")
    parser.add_argument("--num", type=int, default=200, help="images, evenly spread (default: %(default)s)")
    parser.add_argument(
        "--keep", type=int, nargs="+", default=[4, 8, 16, 32], help="numbers of tokens (default: 4 8 16 32)"
    )
    parser.add_argument("--seed", type=int, default=0)
    measure(parser.parse_args())


def measure(options: argparse.Namespace) -> None:
    """Vary the images and print a row for each number of tokens."""
    pipeline, network = DetailFlowPipeline.from_pretrained(options.model), load_extractor(options.features)
    schedule, source = pipeline.tokenizer.schedule, open_images(options.data)
    rows = spread(len(source), min(options.num, len(source)))
    images = [fit(schedule, source.image(row)) for row in rows]
    originals = torch.stack([torch.from_numpy(np.array(image)) for image in images])
    same = torch.tensor([source.labels[row] for row in rows])
    count = pipeline.gpt.config.num_classes
    other = (same + 1 + torch.arange(len(same)) % (count - 1)) % count
    parts = [images[i : i + BATCH_SIZE] for i in range(0, len(images), BATCH_SIZE)]
    ids = torch.cat([encode_images(pipeline.tokenizer, part) for part in parts])

    def recognised(found: Tensor) -> Tensor:
        logits = network(found).logits
        if logits is None:
            raise DetailFlowError(f"{options.features} has no classes: give a network that has")
        return logits.argmax(-1).cpu()

    def decibels(pixels: Tensor, keep: int) -> Tensor:
        sizes = schedule.resolution(keep), schedule.decode_size(keep)
        shown, wanted = (to_uint8(coarse_target(to_tensor(x), *sizes)) for x in (pixels, originals))
        return psnr(shown, wanted).mean()

    accuracy = (recognised(originals) == same).float().mean()
    print(f"{len(images)} images of {options.data}; the network recognises {accuracy:.1%} of the originals")
    unrelated = vary(pipeline, ids, same, 0, options.seed)
    shares = [recognised(unrelated) == same, recognised(vary(pipeline, ids, other, 0, options.seed)) == other]
    print("of new images of the same classes {:.1%}, of others {:.1%}".format(*(x.float().mean() for x in shares)))
    print(row(HEAD))
    print(row(["---"] * len(HEAD)))
    for keep in progress_bar([*options.keep, schedule.num_tokens], desc="varying", unit="row"):
        alike, changed = (vary(pipeline, ids, labels, keep, options.seed) for labels in (same, other))
        classes = recognised(changed)
        shares = [recognised(alike) == same, classes == other, classes == same]
        cells = [f"{decibels(pixels, keep):.1f}" for pixels in (alike, changed, unrelated)]
        cells += [f"{share.float().mean():.1%}" for share in shares]
        print(row([str(keep), str(schedule.decode_size(keep)), *cells]), flush=True)


def row(cells: Sequence[str]) -> str:
    """Return a row of the table."""
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    with exit_on_error():
        main()
