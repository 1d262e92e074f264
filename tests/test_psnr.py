"""PSNR beside scikit-image's."""

import math

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio

from detailflow.errors import DetailFlowError
from detailflow.psnr import psnr


def test_psnr():
    black, white = np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 255, np.uint8)
    assert psnr(black, white) == 0
    assert psnr(black, black) == math.inf
    assert psnr(black, black + np.uint8(1)) == pytest.approx(48.13, abs=0.01)


def test_as_scikit_image():
    draws = np.random.default_rng(0)
    a = draws.integers(256, size=(12, 32, 48, 3)).astype(np.uint8)
    noise = draws.normal(0, 1, a.shape) * np.linspace(1, 60, 12)[:, None, None, None]
    b = (a + noise).clip(0, 255).astype(np.uint8)
    expected = [peak_signal_noise_ratio(x, y) for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(psnr(torch.from_numpy(a), torch.from_numpy(b)), expected, rtol=1e-6)
    floats = (torch.from_numpy(x).movedim(-1, 1) / 127.5 - 1 for x in (a, b))
    np.testing.assert_allclose(psnr(*floats, peak=2), expected, rtol=1e-5)


def test_images_of_other_shapes():
    with pytest.raises(DetailFlowError, match="cannot be compared one by one"):
        psnr(np.zeros((2, 4, 4, 3)), np.zeros((1, 4, 4, 3)))
