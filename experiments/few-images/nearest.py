"""Are samples of AR models nearer to the training images than images that no model has seen?

    python experiments/few-images/nearest.py --data train --held-out val run-a run-b

All of them as the tokenizer rebuilds them, so that its blur does not count. 0.5 is no memorising, 1 is all by heart.
"""

import argparse
from collections.abc import Iterator

import torch
from PIL import Image

from detailflow import DetailFlowPipeline
from detailflow.data.images import open_images
from detailflow.data.source import spread
from detailflow.errors import exit_on_error
from detailflow.pipeline import decode_images, encode_images, fit
from detailflow.progress import progress_bar
from detailflow.training.nearest import embed_images, find_nearest, load_embedding, nearer_share

MOST, BATCH = 5000, 50  # training images that are compared; images at once


@torch.inference_mode()
def rebuilt(pipe: DetailFlowPipeline, path: str, most: int) -> Iterator[Image.Image]:
    """Yield images of a set after they went through the tokenizer."""
    source = open_images(path)
    chosen = spread(len(source), min(len(source), most))
    for start in progress_bar(range(0, len(chosen), BATCH), desc=path, total=-(-len(chosen) // BATCH)):
        images = [fit(pipe.tokenizer.schedule, source.image(i)) for i in chosen[start : start + BATCH]]
        yield from decode_images(pipe.tokenizer, encode_images(pipe.tokenizer, images))


def main() -> None:
    """Print a line for each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL", help="AR models of one tokenizer")
    parser.add_argument("--data", required=True, help="the training images")
    parser.add_argument("--held-out", required=True, help="images that were not trained on")
    parser.add_argument("--tokenizer", default="shipped", help="of all models (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--guidance-scale", type=float, default=2.0)
    args = parser.parse_args()
    what, embed = load_embedding(torch.device("cpu"))
    pipe = DetailFlowPipeline.from_pretrained(args.models[0], tokenizer=args.tokenizer)
    size = pipe.tokenizer.config.image_size
    known = embed_images(rebuilt(pipe, args.data, MOST), size, embed)
    unseen = find_nearest(list(rebuilt(pipe, args.held_out, MOST)), known, 1, size, embed).distances[:, 0]
    print(
        f"distances of {what} to {len(known):,} training images; of {len(unseen):,} held-out ones {unseen.median():.3f}"
    )
    for model in args.models:
        pipe = DetailFlowPipeline.from_pretrained(model, tokenizer=args.tokenizer)
        labels = [i % pipe.gpt.config.num_labels for i in range(args.samples)]
        starts = progress_bar(range(0, args.samples, BATCH), desc=model, total=-(-args.samples // BATCH))
        options = {"guidance_scale": args.guidance_scale}
        images = [image for i in starts for image in pipe(labels[i : i + BATCH], first_image=i, **options)]
        found = find_nearest(images, known, 1, size, embed).distances[:, 0]
        share = nearer_share(found, unseen)
        print(f"{model}: {len(found):,} samples {found.median():.3f}, nearer in {share:.0%} of pairs", flush=True)


if __name__ == "__main__":
    with exit_on_error():
        main()
