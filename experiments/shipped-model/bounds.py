"""Print what docs/shipped-model.md compares the tokenizer with: images of one colour, and a rate-distortion bound.

    python experiments/shipped-model/bounds.py --data test.parquet

No code of so many bits for Gaussian images of the same covariance is closer to them (reverse water-filling).
"""

import argparse

import numpy as np

from detailflow.data.images import open_images
from detailflow.errors import exit_on_error


def decibels(error: float) -> float:
    """Return the PSNR of a mean squared error of bytes."""
    return float(10 * np.log10(255**2 / error))


def mean_colour(images: np.ndarray) -> float:
    """Return the mean PSNR of images (B, H, W, 3) that are replaced by their mean colour in bytes."""
    colours = images.mean((1, 2), keepdims=True).round()
    errors = np.square(images - colours).mean((1, 2, 3))
    return float(np.mean([decibels(error) for error in errors.clip(1e-6)]))


def bound(variances: np.ndarray, bits: int) -> float:
    """Return the PSNR that `bits` for an image allow, given the eigenvalues of the images' covariance."""
    low, high = 1e-12, float(variances.max())
    for _ in range(200):  # the water level at which the rates add up to `bits`
        level = (low * high) ** 0.5
        rate = 0.5 * np.log2(variances / np.minimum(variances, level)).sum()
        low, high = (low, level) if rate < bits else (level, high)
    return decibels(float(np.minimum(variances, level).mean()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="images, all of one size")
    parser.add_argument("--bits", type=int, nargs="+", default=[88, 176, 352, 528])
    options = parser.parse_args()
    source = open_images(options.data)
    images = np.stack([np.asarray(source.image(i), np.float32) for i in range(len(source))])
    print(f"mean colour: {mean_colour(images):.2f} dB")
    variances = np.linalg.eigvalsh(np.cov(images.reshape(len(images), -1), rowvar=False)).clip(1e-9)
    for bits in options.bits:
        print(f"{bits} bits: at most {bound(variances, bits):.1f} dB")


if __name__ == "__main__":
    with exit_on_error():
        main()
