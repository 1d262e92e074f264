"""The same images from every kind of set, in order, whatever the batch and the number of processes; and bad ones."""

import io
import os
import shutil
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from detailflow.data.source import spread
from detailflow.distributed import World
from detailflow.errors import DetailFlowError
from detailflow.evaluation.sets import ImageSet, open_set, shard_range


@pytest.fixture(scope="module")
def folder(cifar: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty-five photographs."""
    folder = tmp_path_factory.mktemp("few")
    for file in sorted(cifar.rglob("*.png"), key=lambda file: file.name)[:25]:
        shutil.copy(file, folder)
    return folder


@pytest.fixture(scope="module")
def images(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(file)) for file in sorted(folder.iterdir())])


def pixels(found: ImageSet) -> np.ndarray:
    return torch.cat(list(found)).numpy()


def make_npz(folder: Path, images: np.ndarray, compressed: bool = False) -> Path:
    (np.savez_compressed if compressed else np.savez)(
        folder / "set.npz", arr_0=images, arr_1=np.zeros(len(images), np.int64)
    )
    return folder / "set.npz"


def make_tar(folder: Path, source: Path) -> Path:
    with tarfile.open(folder / "set.tar", "w") as archive:
        for file in sorted(source.iterdir()):
            archive.add(file, file.name)
    return folder / "set.tar"


def make_parquet(folder: Path, source: Path) -> Path:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pytest.importorskip("datasets", reason="needs detailflow[train]")
    rows = [{"bytes": file.read_bytes(), "path": file.name} for file in sorted(source.iterdir())]
    parquet.write_table(arrow.table({"image": rows}), folder / "set.parquet")
    return folder / "set.parquet"


@pytest.mark.parametrize("kind", ["folder", "npz", "compressed npz", "folder of npz", "tar", "parquet"])
def test_every_kind_is_the_same(
    kind: str, folder: Path, images: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    if kind == "parquet":
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    make = {
        "folder": lambda: folder,
        "npz": lambda: make_npz(tmp_path, images),
        "compressed npz": lambda: make_npz(tmp_path, images, compressed=True),
        "folder of npz": lambda: make_npz(tmp_path, images).rename(tmp_path / "samples.npz").parent,
        "tar": lambda: make_tar(tmp_path, folder),
        "parquet": lambda: make_parquet(tmp_path, folder),
    }
    path = make[kind]()
    found = open_set(path, batch_size=4)
    assert len(found) == 25 and found.side == (32, 32) and found.statistics is None
    assert [len(batch) for batch in found] == [4] * 6 + [1]
    np.testing.assert_array_equal(pixels(found), images)
    np.testing.assert_array_equal(pixels(found), images)  # a second time
    parts = [pixels(open_set(path, world=World(rank, 3), batch_size=7)) for rank in range(3)]
    np.testing.assert_array_equal(np.concatenate(parts), images)
    np.testing.assert_array_equal(pixels(open_set(path, count=4)), images[[6, 12, 18, 24]])
    about = found.description()
    assert about["data"] == str(path) and about["images"] == 25 and (about["height"], about["width"]) == (32, 32)


def test_some_are_spread_over_the_set(folder: Path, images: np.ndarray):
    np.testing.assert_array_equal(open_set(folder, world=World(1, 2)).some(3), images[[8, 16, 24]])  # by any process
    assert len(open_set(folder).some(100)) == 25


def test_shares_follow_one_another():
    for total in (0, 1, 7, 10_000):
        for count in (1, 2, 3, 8):
            shares = [shard_range(total, World(rank, count)) for rank in range(count)]
            assert [i for share in shares for i in share] == list(range(total))
            assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert spread(10, 10) == list(range(10)) and spread(10, 3) == [3, 6, 9] and spread(5, 0) == []


def test_many_more_than_are_read_ahead(cifar: Path):
    files = sorted(cifar.rglob("*.png"))
    expected = np.stack([np.asarray(Image.open(file)) for file in files])
    np.testing.assert_array_equal(pixels(open_set(cifar)), expected)


def test_cropped_to_a_size(folder: Path, tmp_path: Path):
    Image.open(min(folder.iterdir())).resize((60, 40)).save(tmp_path / "a.png")
    Image.open(max(folder.iterdir())).save(tmp_path / "b.jpg")
    found = open_set(tmp_path, size=24)
    assert pixels(found).shape == (2, 24, 24, 3)
    assert "24 pixels" in found.description()["preprocessing"] and found.description()["height"] == 24


def test_grey_images_become_rgb(images: np.ndarray, folder: Path, tmp_path: Path):
    grey = images.mean(3).astype(np.uint8)
    for shape in (grey, grey[..., None]):
        np.testing.assert_array_equal(pixels(open_set(make_npz(tmp_path, shape))), np.repeat(grey[..., None], 3, 3))
    (tmp_path / "pngs").mkdir()
    Image.fromarray(grey[0]).save(tmp_path / "pngs" / "a.png")
    np.testing.assert_array_equal(pixels(open_set(tmp_path / "pngs"))[0], np.repeat(grey[0][..., None], 3, 2))


class TestBadImages:
    def test_another_size(self, folder: Path, tmp_path: Path):
        shutil.copytree(folder, tmp_path / "set")
        Image.new("RGB", (30, 32)).save(tmp_path / "set" / "zebra.png")
        with pytest.raises(
            DetailFlowError, match="zebra.png has 30×32 pixels and .*000.png 32×32: give images of one size"
        ):
            pixels(open_set(tmp_path / "set"))

    @pytest.mark.parametrize("number", [0, 10, 24])
    def test_up_to_one_percent_may_be_unreadable(self, folder: Path, tmp_path: Path, number: int):
        """As in training: named, counted, and the next one takes its place."""
        shutil.copytree(folder, tmp_path / "set")
        bad = tmp_path / "set" / f"{number:03d}.png"
        bad.write_bytes((folder / bad.name).read_bytes()[:500])
        with pytest.warns(UserWarning, match=f"{bad.name} is damaged .* Another image takes its place") as caught:
            found = open_set(tmp_path / "set")
            read = pixels(found)
            pixels(found)
        assert len([warning for warning in caught if "takes its place" in str(warning.message)]) == 1
        expected = pixels(open_set(folder))
        expected[number] = expected[(number + 1) % 25]
        np.testing.assert_array_equal(read, expected)
        assert len(found.description()["unreadable"]) == 1 and "unreadable" not in open_set(folder).description()

    @pytest.mark.filterwarnings("ignore:.*Another image takes its place")
    @pytest.mark.parametrize("numbers", [[3, 17], range(25)])
    def test_more_stop_it(self, folder: Path, tmp_path: Path, numbers: Sequence[int]):
        shutil.copytree(folder, tmp_path / "set")
        for number in numbers:
            (tmp_path / "set" / f"{number:03d}.png").write_text("no image")
        with pytest.raises(DetailFlowError, match="at least 2 of the 25 images of .*set cannot be read, more than 1%"):
            pixels(open_set(tmp_path / "set"))

    def test_no_such_place(self, tmp_path: Path):
        for name in ("none", "none.npz"):
            with pytest.raises(DetailFlowError, match=f"{name} does not exist"):
                open_set(tmp_path / name)
        with pytest.raises(DetailFlowError, match="holds no images"):
            open_set(tmp_path)

    def test_more_than_there_are(self, folder: Path):
        with pytest.raises(DetailFlowError, match="has 25 images: 26 cannot be taken from it"):
            open_set(folder, count=26)


class TestBadNpz:
    @pytest.mark.parametrize(
        ("entries", "message"),
        [
            ({"images": np.zeros(3)}, r"has neither images \(arr_0\) nor statistics \(mu and sigma\), only images"),
            (
                {"arr_0": np.zeros((2, 8, 8, 4), np.uint8)},
                r"has uint8 \(2, 8, 8, 4\) as arr_0, where images are uint8",
            ),
            ({"arr_0": np.zeros((2, 8, 8, 3))}, r"has float64 \(2, 8, 8, 3\) as arr_0"),
            ({"arr_0": np.zeros((0, 8, 8, 3), np.uint8)}, "has no images: arr_0 is empty"),
            (
                {"arr_0": np.asfortranarray(np.zeros((2, 8, 8, 3), np.uint8))},
                r"has uint8 \(2, 8, 8, 3\) in Fortran order",
            ),
            ({"arr_0": np.array([{}, {}], object)}, "has pickled objects as arr_0, which are not read"),
            ({"mu": np.array([{}, {}], object), "sigma": np.eye(2)}, "has pickled objects as mu, which are not read"),
            ({"mu": np.zeros(3), "sigma": np.eye(2)}, r"has float64 \(2, 2\) as sigma, where statistics"),
            (
                {"mu": np.full(2, np.nan), "sigma": np.eye(2)},
                r"has float64 \(2,\) as mu, where statistics have finite",
            ),
            ({"mu": np.zeros(2), "sigma": np.eye(2), "kept": np.zeros((4, 3))}, r"has float64 \(4, 3\) as kept"),
            (
                {"mu": np.zeros(3), "sigma": np.zeros((3, 2))},
                r"has float64 \(3, 2\) as sigma, where statistics have finite floating-point numbers \(3, 3\): measure",
            ),
            (
                {"mu": np.zeros(2), "sigma": np.eye(2), "count": np.float64(3)},
                r"has float64 \(\) as count, where statistics have a whole number: measure the statistics again$",
            ),
            (
                {"mu": np.zeros(2), "sigma": np.eye(2), "height": np.arange(2, dtype=np.int64), "width": 32},
                r"has int64 \(2,\) as height, where statistics have a whole number: measure",
            ),
            (
                {"mu": np.zeros(2), "sigma": np.eye(2), "features": np.int64(3)},
                r"has int64 \(\) as features, where statistics have a text: measure",
            ),
            (
                {"mu": np.zeros(2), "sigma": np.eye(2), "fingerprint": np.int64(3)},
                r"has int64 \(\) as fingerprint, where statistics have a text: measure",
            ),
            (
                {"mu": np.zeros(2), "sigma": -np.eye(2)},
                "has a matrix as sigma that is no covariance, which is symmetric",
            ),
            (
                {"mu": np.zeros(2), "sigma": np.triu(np.ones((2, 2)))},
                "has a matrix as sigma that is no covariance, which",
            ),
            (
                {"mu": np.zeros(2), "sigma": np.eye(2), "mu_s": np.zeros(2), "sigma_s": np.diag([1.0, -0.1])},
                "has a matrix as sigma_s that is no covariance, which is symmetric",
            ),
        ],
    )
    def test_contents(self, entries: dict[str, np.ndarray], message: str, tmp_path: Path):
        np.savez(tmp_path / "bad.npz", **entries)
        with pytest.raises(DetailFlowError, match=f"^{tmp_path / 'bad.npz'} {message}"):
            open_set(tmp_path / "bad.npz")

    def test_its_pickles_are_not_executed(self, tmp_path: Path):
        class Evil:
            def __reduce__(self):
                return os.mkdir, (str(tmp_path / "executed"),)

        for name in ("arr_0", "mu"):
            np.savez(tmp_path / "evil.npz", **{name: np.array([Evil()], object), "sigma": np.eye(2)})
            with pytest.raises(DetailFlowError, match="has pickled objects"):
                open_set(tmp_path / "evil.npz")
        assert not (tmp_path / "executed").exists()

    def test_statistics_that_would_fill_the_memory(self, tmp_path: Path):
        np.savez_compressed(tmp_path / "zeros.npz", mu=np.zeros(2**25), sigma=np.eye(2))
        with pytest.raises(DetailFlowError, match=r"zeros.npz grows from .* bytes to 268,435,584 as mu.npy is read"):
            open_set(tmp_path / "zeros.npz")
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (2**45,)})
        with zipfile.ZipFile(tmp_path / "lie.npz", "w") as archive:
            archive.writestr("mu.npy", header.getvalue())
            archive.writestr("sigma.npy", header.getvalue())
        with pytest.raises(DetailFlowError, match=r"lie.npz is damaged, or no .npz file"):
            open_set(tmp_path / "lie.npz")

    def test_millions_of_tiny_images(self, tmp_path: Path):
        np.savez_compressed(tmp_path / "tiny.npz", arr_0=np.zeros((3_000_000, 1, 1, 3), np.uint8))
        with pytest.raises(
            DetailFlowError, match=r"tiny.npz has 3,000,000 images in .* bytes: no real images are as small"
        ):
            open_set(tmp_path / "tiny.npz")

    def test_a_pipe(self, tmp_path: Path):
        os.mkfifo(tmp_path / "pipe.npz")
        with pytest.raises(DetailFlowError, match="pipe.npz"):
            open_set(tmp_path / "pipe.npz")

    def test_damaged(self, images: np.ndarray, tmp_path: Path):
        whole = make_npz(tmp_path, images).read_bytes()
        for name, content in (("text.npz", b"text"), ("half.npz", whole[: len(whole) // 2])):
            (tmp_path / name).write_bytes(content)
            with pytest.raises(DetailFlowError, match=f"{name} is damaged, or no .npz file"):
                open_set(tmp_path / name)
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (25, 32, 32, 3)})
        with zipfile.ZipFile(tmp_path / "short.npz", "w") as archive:
            archive.writestr("arr_0.npy", header.getvalue() + images[:20].tobytes())
        with pytest.raises(DetailFlowError, match=r"short.npz is damaged and cannot be read \(it ends at image 20\)"):
            pixels(open_set(tmp_path / "short.npz"))

    def test_it_is_not_cropped_and_has_no_splits(self, images: np.ndarray, tmp_path: Path):
        file = make_npz(tmp_path, images)
        with pytest.raises(DetailFlowError, match="set.npz has images of 32×32 pixels, and not of 16×16"):
            open_set(file, size=16)
        np.testing.assert_array_equal(pixels(open_set(file, size=32)), images)
        with pytest.raises(DetailFlowError, match="set.npz has no splits: leave out the split"):
            open_set(file, split="train")


def test_stored_statistics_of_adm(images: np.ndarray, tmp_path: Path):
    """Without its images as well, as pytorch-fid writes them."""
    draws = np.random.default_rng(0)
    mu, sigma = draws.normal(size=6), np.cov(draws.normal(size=(40, 6)), rowvar=False)
    np.savez(tmp_path / "both.npz", arr_0=images, mu=mu, sigma=sigma, mu_s=mu[:2], sigma_s=sigma[:2, :2])
    rounded = sigma.astype(np.float32)
    rounded[0, 1] *= 1 + 1e-5
    np.savez(tmp_path / "alone.npz", mu=mu.astype(np.float32), sigma=rounded)
    both, alone = open_set(tmp_path / "both.npz"), open_set(tmp_path / "alone.npz")
    assert both.statistics is not None and alone.statistics is not None
    np.testing.assert_array_equal(both.statistics.pool.covariance, sigma)
    assert both.statistics.pool.count is None and both.statistics.fingerprint is None
    assert both.statistics.spatial is not None and both.statistics.spatial.mean.tolist() == mu[:2].tolist()
    assert len(both) == 25 and len(alone) == 0 and alone.side is None and list(alone) == []
    assert alone.statistics.spatial is None and alone.statistics.pool.mean.dtype == torch.float64
    assert open_set(tmp_path / "both.npz", count=5).statistics is None  # which are those of all
    assert both.description()["stored_statistics"] == "inception (ADM)"
