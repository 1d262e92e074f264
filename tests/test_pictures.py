"""Grids and strips."""

import numpy as np
import pytest
from PIL import Image

from detailflow import DetailFlowPipeline
from detailflow.errors import DetailFlowError
from detailflow.pictures import check_ours, grid, strip, write_png


def test_a_grid_shows_every_image():
    colours = ["red", "lime", "blue", "yellow", "cyan"]
    sheet = grid([Image.new("RGB", (32, 32), colour) for colour in colours], columns=3)
    assert sheet.size == (3 * 132 + 4, 2 * 132 + 4)
    middles = [sheet.getpixel((4 + 64 + 132 * (i % 3), 4 + 64 + 132 * (i // 3))) for i in range(6)]
    assert middles == [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (0, 255, 255), (255, 255, 255)]


@pytest.mark.parametrize(("count", "columns"), [(1, 1), (2, 2), (4, 2), (5, 5), (7, 3), (10, 5), (12, 4), (100, 10)])
def test_a_grid_is_about_square(count: int, columns: int):
    sheet = grid([Image.new("RGB", (8, 8))] * count)
    assert (sheet.width - 4) // 132 == columns
    assert (sheet.height - 4) // 132 == -(-count // columns)


def test_labels_stay_below_their_image():
    images = [Image.new("RGB", (32, 32), "white")] * 4
    plain, labelled = grid(images), grid(images, labels=["cat", "x" * 500, "", "Müde 猫"])
    assert labelled.size == (plain.width, plain.height + 2 * 16)
    dark = np.asarray(labelled).min(axis=-1) < 128
    assert dark[132:148, 4:132].any()
    assert dark[132:148, 136:264].any()
    assert not dark[:132].any()
    assert not dark[:, 132:136].any()


def test_a_thin_image_has_room_for_its_caption():
    sheet = np.asarray(grid([Image.new("RGB", (4, 400), "white")] * 2, 2, ["16 tokens", "original"]))
    assert sheet.shape == (400 + 16 + 8, 2 * 76 + 4, 3)
    dark = (sheet[404:420].min(axis=-1) < 128).any(axis=0)
    assert all(np.ptp(np.flatnonzero(half)) > 30 for half in (dark[:78], dark[78:]))
    assert np.asarray(grid([Image.new("RGB", (4, 400))])).shape == (408, 12, 3)


@pytest.mark.parametrize(("side", "tile"), [(16, 128), (48, 144), (100, 200), (256, 256)])
def test_small_images_are_enlarged_without_smoothing(side: int, tile: int):
    image = Image.effect_noise((side, side), 100).convert("RGB")
    sheet = np.asarray(grid([image]))
    assert sheet.shape == (tile + 8, tile + 8, 3)
    np.testing.assert_array_equal(sheet[4:-4:, 4:-4][:: tile // side, :: tile // side], np.asarray(image))


def test_a_strip_runs_from_coarse_to_fine(pipeline: DetailFlowPipeline):
    stages = list(pipeline.stream(["cat", "bird"], counts=[1, 4, 16]))
    sheet = np.asarray(strip(stages, 1))
    assert sheet.shape == (128 + 16 + 8, 3 * 132 + 4, 3)
    np.testing.assert_array_equal(sheet[4:132, 268:396][::4, ::4], np.asarray(stages[-1].images[1]))
    assert (sheet[132:148] < 128).any()


def test_a_strip_of_a_reconstruction_ends_with_the_original(pipeline: DetailFlowPipeline):
    original = Image.radial_gradient("L").resize((32, 32)).convert("RGB")
    stages = pipeline.reconstruct(original)
    sheet = np.asarray(strip(stages, original=original))
    assert sheet.shape == (128 + 2 * 16 + 8, 6 * 132 + 4, 3)
    np.testing.assert_array_equal(sheet[4:132, -132:-4][::4, ::4], np.asarray(original))


def test_a_set_of_many_is_not_replaced(tmp_path):
    image = Image.new("RGB", (8, 8))
    write_png(image, tmp_path / "0000-cat.png", "sample")
    assert check_ours([tmp_path / "0000-cat.png", tmp_path / "0001-cat.png"], "generate") == 1
    write_png(image, tmp_path / "0001-cat.png", "set")
    with pytest.raises(DetailFlowError, match="0001-cat.png is of a set by `generate --num-images`: move it"):
        check_ours([tmp_path / "0000-cat.png", tmp_path / "0001-cat.png"], "generate")
