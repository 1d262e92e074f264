"""PSNR, which training, the pipeline and evaluation share."""

import numpy as np
import torch
from torch import Tensor

from detailflow.errors import DetailFlowError


def psnr(a: np.ndarray | Tensor, b: np.ndarray | Tensor, peak: float = 255) -> Tensor:
    """Return the peak signal-to-noise ratio in dB of images or batches of them, without gradients.

    Args:
        a: images, whose last three dimensions are those of an image.
        b: images of the same shape.
        peak: the largest difference that a value can have.

    Returns:
        float32, one number per image, infinite if the two are equal.
    """
    x, y = (torch.tensor(z) if isinstance(z, np.ndarray) else z.detach() for z in (a, b))
    if x.shape != y.shape or x.ndim < 3:
        raise DetailFlowError(f"images of shapes {tuple(x.shape)} and {tuple(y.shape)} cannot be compared one by one")
    return 10 * torch.log10(peak**2 / (x.float() - y.float()).square().mean((-3, -2, -1)))
