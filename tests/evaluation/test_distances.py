"""What is measured of sets: the same for any batch and any number of processes, and sensible on photographs."""

import io
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from safetensors.torch import load_file
from torch import Tensor

from detailflow.data.images import open_images
from detailflow.distributed import World
from detailflow.errors import DetailFlowError
from detailflow.evaluation.distances import cautions, compare_sets, measure
from detailflow.evaluation.features import Extractor, Features, load_extractor
from detailflow.evaluation.metrics import Gaussian, InceptionScore, frechet_distance, precision_recall
from detailflow.evaluation.report import Figure
from detailflow.evaluation.sets import Statistics, open_set, save_statistics, shard_range

ROOT = Path(__file__).parents[2]


class Projection:
    """A fixed random projection of the pixels, with all three kinds of features."""

    name, fingerprint, preprocessing = "projection", "0" * 64, "none"

    def __call__(self, images: Tensor) -> Features:
        x = images.double().flatten(1) / 255
        weights = torch.randn(x.shape[1], 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        y = x @ weights
        return Features(y[:, :12].float(), y[:, 12:20].float(), y[:, 20:].float())


def batches(images: Tensor, batch: int, world: World | None = None) -> Iterator[Tensor]:
    shard = shard_range(len(images), world or World())
    yield from images[shard.start : shard.stop].split(batch)


def values(figures: Mapping[str, Figure]) -> dict[str, float]:
    spread = {f"{name} ±": figure.spread for name, figure in figures.items() if figure.spread is not None}
    return {name: figure.value for name, figure in figures.items()} | spread


def noise(count: int, seed: int = 0, level: int = 256) -> Tensor:
    return torch.randint(level, (count, 4, 4, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def assert_same(a: Statistics, b: Statistics) -> None:
    for x, y in ((a.pool, b.pool), (a.spatial, b.spatial)):
        assert x is not None and y is not None and x.count == y.count
        torch.testing.assert_close(x.mean, y.mean, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(x.covariance, y.covariance, rtol=1e-10, atol=1e-12)
    assert a.inception_score is not None and b.inception_score is not None
    assert a.inception_score[0] == pytest.approx(b.inception_score[0], rel=1e-12)
    assert a.kept is not None and b.kept is not None
    torch.testing.assert_close(a.kept, b.kept, rtol=0, atol=0)


@pytest.mark.parametrize("batch", [1, 9, 500])
def test_as_in_two_passes(batch: int):
    images = noise(200)
    whole = Projection()(images)
    assert whole.spatial is not None and whole.logits is not None
    found = measure(Projection(), batches(images, batch), total=200, keep=30)
    assert found.pool.count == 200 and found.spatial is not None
    for moments, x in ((found.pool, whole.pool), (found.spatial, whole.spatial)):
        np.testing.assert_allclose(moments.mean, x.double().numpy().mean(0), rtol=1e-6)
        np.testing.assert_allclose(moments.covariance, np.cov(x.double().numpy(), rowvar=False), rtol=1e-6)
    score = InceptionScore(10, 200)
    score.update(whole.logits, 0)
    assert found.inception_score == (pytest.approx(score.score()[0], rel=1e-9), None)
    assert found.kept is not None and torch.equal(
        found.kept, whole.pool[[(i + 1) * 200 // 30 - ((i + 1) * 200 % 30 == 0) for i in range(30)]]
    )


SETS = ((101, 256, 30), (77, 200, 50_000))  # images, levels of grey, and how many features are kept


def work(folder: Path) -> None:
    """What one of several processes does: it measures its share of two sets, and writes what it finds."""
    torch.set_num_threads(1)
    world = World.from_launch(cpu=True)
    result = [
        measure(Projection(), batches(noise(total, level=level), 16, world), keep=keep, total=total, world=world)
        for total, level, keep in SETS
    ]
    for name, measured in zip("ab", result, strict=True):
        save_statistics(folder / f"{world.rank}-{name}.npz", measured)
    torch.save([[x.inception_score for x in result], values(compare_sets(*result))], folder / f"{world.rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_as_one(torchrun: list[str], tmp_path: Path):
    """Sets of uneven shares, through the statistics' file."""
    done = subprocess.run(
        [*torchrun, __file__, str(tmp_path)], env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    alone = [measure(Projection(), batches(noise(n, level=m), 20), keep=k, total=n) for n, m, k in SETS]
    for rank in range(2):
        scores, figures = torch.load(tmp_path / f"{rank}.pt")
        for name, one, score in zip("ab", alone, scores, strict=True):
            stored = open_set(tmp_path / f"{rank}-{name}.npz").statistics
            assert stored is not None
            both = replace(stored, inception_score=score)
            assert_same(one, both)
        assert figures == pytest.approx(values(compare_sets(*alone)), rel=1e-6)
        assert figures.keys() == {"FD", "sFD", "IS", "FD ±", "precision", "recall"}


class TestStored:
    def test_written_and_read_again(self, tmp_path: Path):
        real, fake = (measure(Projection(), batches(noise(60, s), 20), total=60) for s in (0, 1))
        save_statistics(tmp_path / "new" / "real.npz", real)
        again = measure(Projection(), open_set(tmp_path / "new" / "real.npz"))
        assert again.pool.count == 60 and again.inception_score is None
        assert compare_sets(again, fake) == compare_sets(real, fake)
        few = measure(Projection(), open_set(tmp_path / "new" / "real.npz"), keep=7)
        assert few.kept is not None and len(few.kept) == 7
        assert measure(Projection(), open_set(tmp_path / "new" / "real.npz"), keep=0).kept is None

    def test_of_another_network(self, tmp_path: Path):
        measured = measure(Projection(), batches(noise(20), 20), total=20)
        save_statistics(tmp_path / "real.npz", measured)

        class Other(Projection):
            fingerprint = "1" * 64

        with pytest.raises(
            DetailFlowError, match="has statistics of the features projection with other weights and no images"
        ):
            measure(Other(), open_set(tmp_path / "real.npz"))
        np.savez(tmp_path / "adm.npz", mu=np.zeros(2048), sigma=np.eye(2048))
        with pytest.raises(DetailFlowError, match="adm.npz has statistics of the features inception and no images"):
            measure(Other(), open_set(tmp_path / "adm.npz"))
        with pytest.raises(
            DetailFlowError, match=r"by projection \(00000000\) and the samples by projection \(11111111\)"
        ):
            compare_sets(measured, measure(Other(), batches(noise(20), 20), total=20))

    def test_adms_reference(self, tmp_path: Path):
        """Its statistics replace those of its images, which give precision and recall; other networks read images."""

        class Inception(Projection):
            name = "inception"

        images = noise(40)
        mu, sigma = np.arange(12.0), np.eye(12)
        np.savez(tmp_path / "adm.npz", arr_0=images.numpy(), mu=mu, sigma=sigma, mu_s=mu[:8], sigma_s=sigma[:8, :8])
        found = measure(Inception(), open_set(tmp_path / "adm.npz", batch_size=7))
        assert found.pool.count is None and found.spatial is not None
        np.testing.assert_array_equal(found.pool.mean, mu)
        np.testing.assert_array_equal(found.spatial.covariance, sigma[:8, :8])
        assert found.kept is not None and torch.equal(found.kept, Projection()(images).pool)
        samples = measure(Inception(), batches(noise(50, 1), 20), total=50)
        figures = values(compare_sets(found, samples))
        x = Projection()(noise(50, 1))
        assert figures["FID"] == pytest.approx(
            frechet_distance(
                Gaussian(torch.from_numpy(mu), torch.from_numpy(sigma)),
                Gaussian(x.pool.double().mean(0), x.pool.double().T.cov()),
            )
        )
        assert (figures["precision"], figures["recall"]) == precision_recall(Projection()(images).pool, x.pool)
        assert_same(
            measure(Projection(), open_set(tmp_path / "adm.npz")), measure(Projection(), batches(images, 9), total=40)
        )
        assert any(
            "precision, recall: of 40 images of the reference and 50" in line for line in cautions(found, samples)
        )


class TestTooFew:
    def test_for_anything(self):
        with pytest.raises(DetailFlowError, match="too few images to measure: there are 1, and 2 are the least"):
            measure(Projection(), batches(noise(1), 1), total=1)
        with pytest.raises(DetailFlowError, match="there are 2, and 3 are the least"):
            measure(Projection(), batches(noise(2), 1), world=World(0, 3), total=2)

    def test_for_some_figures(self):
        """What cannot be had is left out, and said."""
        real, few = (measure(Projection(), batches(noise(n), 20), total=n) for n in (50, 3))
        figures = values(compare_sets(real, few))
        assert figures.keys() == {"FD", "sFD", "IS"} and all(np.isfinite(x) for x in figures.values())
        text = "\n".join(cautions(real, few))
        assert "FD: the 3 images of the samples are too few for the covariance of 12 features" in text
        assert "precision, recall: there are none" in text
        assert values(compare_sets(real, real)).keys() == {"FD", "FD ±", "sFD", "IS", "precision", "recall"}
        assert values(compare_sets(real, real, neighbours=False)).keys() == {"FD", "FD ±", "sFD", "IS"}
        first, second = cautions(real, real)
        assert first.startswith("FD is the Fréchet distance of the features of projection: it cannot be compared")
        assert second == "IS: it is of 50 images, and usual splits have 5,000, and lower the fewer they are."

    def test_shares_that_are_not_whole(self):
        with pytest.raises(ValueError, match="30 images came, and this rank's part is 40"):
            measure(Projection(), batches(noise(30), 7), total=40)
        with pytest.raises(ValueError, match="give their total"):
            measure(Projection(), batches(noise(30), 7))


def test_features_that_are_not_finite():
    class Broken(Projection):
        def __call__(self, images: Tensor) -> Features:
            return Features(torch.full((len(images), 3), torch.nan))

    with pytest.raises(
        DetailFlowError, match="projection gives features that are not finite numbers for images 0 to 6"
    ):
        measure(Broken(), batches(noise(30), 7), total=30)


@pytest.fixture(scope="module")
def network() -> Extractor:
    """The CIFAR-10 features that docs/shipped-model.md measures by."""
    return load_extractor(str(ROOT / "experiments" / "shipped-model" / "cifar10-features.safetensors"))


@pytest.fixture(scope="module")
def photographs(cifar: Path) -> Tensor:
    return torch.from_numpy(np.stack([np.asarray(image) for image in open_images(cifar).some(200)]))


def of(images: Tensor, network: Extractor) -> Statistics:
    return measure(network, batches(images, 50), total=len(images))


@pytest.fixture(scope="module")
def original(network: Extractor, photographs: Tensor) -> Statistics:
    return of(photographs[:100], network)


def each(images: Tensor, change: Callable[[Image.Image], Image.Image]) -> Tensor:
    return torch.from_numpy(np.stack([np.asarray(change(Image.fromarray(image))) for image in images.numpy()]))


def blurred(images: Tensor, radius: float) -> Tensor:
    return each(images, lambda image: image.filter(ImageFilter.GaussianBlur(radius)))


def noisy(images: Tensor, deviation: float) -> Tensor:
    draws = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return (images + deviation * draws).round().clamp(0, 255).byte()


def compressed(images: Tensor, quality: float) -> Tensor:
    def change(image: Image.Image) -> Image.Image:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=int(quality))
        return Image.open(file)

    return each(images, change)


def test_the_network_in_half_precision_is_the_one_that_was_trained(network: Extractor, cifar_table: Path):
    """Features, logits and a distance, as the weights in float32 gave them before they were rounded."""
    recorded = load_file(cifar_table.parents[1] / "recorded-features.safetensors")
    source = open_images(cifar_table)
    images = torch.from_numpy(np.stack([np.asarray(source.image(i)) for i in range(200)]))
    found = network(images[:20])
    assert found.logits is not None
    torch.testing.assert_close(found.pool, recorded["pool"], rtol=0, atol=2e-3)  # of up to 3
    torch.testing.assert_close(found.logits, recorded["logits"], rtol=0, atol=1e-2)  # and 7
    halves = [of(part, network) for part in images.split(100)]
    assert compare_sets(*halves)["FD"].value == pytest.approx(float(recorded["distance"]), rel=1e-3)


@pytest.mark.parametrize(
    ("damage", "levels"),
    [(blurred, (0.5, 0.8, 1.5)), (noisy, (6, 16, 40)), (compressed, (90, 50, 10))],
    ids=["blur", "noise", "JPEG"],
)
def test_distance_grows_with_damage(
    damage, levels: tuple[float, ...], network: Extractor, photographs: Tensor, original: Statistics
):
    distances = [compare_sets(original, original)["FD"].value]
    assert distances[0] <= 1e-9
    distances += [compare_sets(original, of(damage(photographs[:100], level), network))["FD"].value for level in levels]
    assert all(b > a + 0.01 for a, b in pairwise(distances)), distances


def test_removed_classes(network: Extractor, cifar: Path, photographs: Tensor):
    """Real photographs as their own fakes, one half beside the other.

    Without half of the classes in the fakes recall falls and precision does not; without them in the real ones, the
    other way round.
    """
    labels = torch.from_numpy(open_images(cifar).labels)
    real, fake = (of(photographs[half::2], network) for half in range(2))
    assert real.kept is not None and fake.kept is not None
    few_real, few_fake = (x.kept[labels[half::2] < 5] for half, x in enumerate((real, fake)))
    precision, recall = precision_recall(real.kept, fake.kept)
    without = precision_recall(real.kept, few_fake)
    assert without[1] < recall - 0.15 and without[0] > precision - 0.1
    lacking = precision_recall(few_real, fake.kept)
    assert lacking[0] < precision - 0.15 and lacking[1] > recall - 0.1


if __name__ == "__main__":  # a process of `test_two_processes_as_one`
    work(Path(sys.argv[1]))
