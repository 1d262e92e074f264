from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image

from detailflow.data import transforms


def photo(width: int, height: int) -> Image.Image:
    """A smooth picture whose red runs with x and whose green runs with y."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, np.full_like(x, 128)], axis=-1).astype(np.uint8))


@pytest.mark.parametrize("shape", [(32, 32), (50, 32), (32, 77), (16, 9), (200, 1), (500, 300)])
def test_random_crop_shape_and_repeatability(shape):
    image = photo(*shape)
    for seed in range(5):
        crop = transforms.random_crop(image, 32, np.random.default_rng(seed).random(4))
        assert crop.shape == (32, 32, 3) and crop.dtype == np.uint8
        np.testing.assert_array_equal(crop, transforms.random_crop(image, 32, np.random.default_rng(seed).random(4)))


def test_random_crop_covers_the_image_at_all_scales_and_mirrors_half_of_the_time():
    image, rng = photo(64, 64), np.random.default_rng(0)
    crops = np.stack([transforms.random_crop(image, 32, rng.random(4)) for _ in range(400)]).astype(int)
    across = crops[:, 16, -1, 0] - crops[:, 16, 0, 0]  # red from left to right: negative where mirrored
    assert 0.4 < (across < 0).mean() < 0.6
    spans = np.abs(across)  # a crop of the whole image spans it all, one at the largest scale 4/5 of it
    assert spans.max() >= 250 and 195 <= spans.min() <= 205
    left = crops[:, 16, :, 0].min(axis=1)
    assert left.min() <= 2 and left.max() >= 45


def test_random_crop_without_flip_or_scale_is_the_image():
    image = photo(32, 32)
    for seed in range(8):
        crop = transforms.random_crop(image, 32, np.random.default_rng(seed).random(4), max_scale=1.0, flip=False)
        np.testing.assert_array_equal(crop, np.asarray(image))


def test_a_crop_equals_resizing_the_whole_image_first():
    image = photo(100, 75)
    whole = np.asarray(image.resize((128, 96), Image.Resampling.BICUBIC)).astype(int)  # 4/3 exactly on both sides
    crop = transforms._crop_of_resized(image, 96, 20, 30, 32)
    assert np.abs(crop.astype(int) - whole[30:62, 20:52]).max() <= 1


def test_center_crop():
    np.testing.assert_array_equal(transforms.center_crop(photo(32, 32), 32), np.asarray(photo(32, 32)))
    wide = transforms.center_crop(photo(64, 32), 32)
    np.testing.assert_array_equal(wide, np.asarray(photo(64, 32))[:, 16:48])
    assert transforms.center_crop(photo(3, 500), 32).shape == (32, 32, 3)


def test_ten_crops_are_corners_centre_and_their_mirror_images():
    image = photo(70, 70)
    large = transforms.center_crop(image, 70)
    crops = transforms.ten_crops(image, 64)  # int(1.1 · 64) = 70
    assert crops.shape == (10, 64, 64, 3) and crops.dtype == np.uint8
    for crop, (top, left) in zip(crops, [(0, 0), (0, 6), (6, 0), (6, 6), (3, 3)], strict=False):
        np.testing.assert_array_equal(crop, large[top : top + 64, left : left + 64])
    np.testing.assert_array_equal(crops[5:], crops[:5, :, ::-1])


def test_two_crops():
    crops = transforms.two_crops(photo(40, 32), 32)
    np.testing.assert_array_equal(crops[0], transforms.center_crop(photo(40, 32), 32))
    np.testing.assert_array_equal(crops[1], crops[0][:, ::-1])


def test_six_crops_are_the_centre_moved_along_the_diagonal_and_their_mirror_images():
    centre = transforms.center_crop(photo(40, 32), 32)
    crops = transforms.six_crops(photo(40, 32), 32)
    assert crops.shape == (6, 32, 32, 3) and crops.dtype == np.uint8
    np.testing.assert_array_equal(crops[0], centre)
    np.testing.assert_array_equal(crops[1][:30, :30], centre[2:, 2:])  # what is shown moves up and left by 2 pixels
    np.testing.assert_array_equal(crops[2][2:, 2:], centre[:30, :30])
    np.testing.assert_array_equal(crops[1][31, :30], centre[29, 2:])  # mirrored at the edge
    np.testing.assert_array_equal(crops[2][:2, 2:], centre[2:0:-1, :30])
    np.testing.assert_array_equal(crops[3:], crops[:3, :, ::-1])
    np.testing.assert_array_equal(
        transforms.six_crops(photo(8, 8), 8), np.repeat(transforms.two_crops(photo(8, 8), 8), 3, 0)
    )


@pytest.mark.parametrize("make", [transforms.ten_crops, transforms.six_crops, transforms.two_crops])
def test_half_of_the_crops_are_those_that_are_not_mirrored(make: Callable[[Image.Image, int], np.ndarray]):
    crops = make(photo(40, 32), 32)
    np.testing.assert_array_equal(transforms.crops_of(photo(40, 32), 32, len(crops)), crops)
    np.testing.assert_array_equal(transforms.crops_of(photo(40, 32), 32, len(crops) // 2), crops[: len(crops) // 2])


def test_bytes_to_floats_and_back():
    values = np.arange(256, dtype=np.uint8)
    pixels = np.stack([values, values[::-1], values], axis=-1).reshape(1, 16, 16, 3)
    x = transforms.to_tensor(pixels)
    assert x.shape == (1, 3, 16, 16) and x.dtype == torch.float32 and x.min() == -1 and x.max() == 1
    assert x[0, 0, 0, 1] == pytest.approx(1 / 127.5 - 1)
    np.testing.assert_array_equal(transforms.to_uint8(x).numpy(), pixels)
    np.testing.assert_array_equal(transforms.to_tensor(pixels[0, :, ::-1]).numpy(), x[0].flip(-1).numpy())
    assert torch.equal(transforms.to_tensor(torch.from_numpy(pixels)), x)


def test_to_uint8_clamps_and_truncates():
    x = torch.tensor([-3.0, -1.0, 0.0, 0.499 / 127.5, 1.0, 3.0]).view(1, 1, 1, 6).expand(1, 3, 1, 6)
    assert transforms.to_uint8(x)[0, 0, :, 0].tolist() == [0, 0, 128, 128, 255, 255]
    assert transforms.to_uint8(x.bfloat16()).shape == (1, 1, 6, 3)


def test_coarse_target():
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert transforms.coarse_target(x, 32, 32) is x
    flat = transforms.coarse_target(x, 1, 16)  # one pixel: the mean, everywhere
    assert flat.shape == (2, 3, 16, 16)
    torch.testing.assert_close(flat, x.mean(dim=(2, 3), keepdim=True).expand_as(flat))
    half = transforms.coarse_target(x, 16, 16)
    torch.testing.assert_close(half, x.unflatten(3, (16, 2)).unflatten(2, (16, 2)).mean(dim=(3, 5)))
    assert transforms.coarse_target(x, 21, 24).shape == (2, 3, 24, 24)
