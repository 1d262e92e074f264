"""Each figure beside an independent computation of it."""

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from detailflow.data.images import open_images
from detailflow.errors import DetailFlowError
from detailflow.evaluation.metrics import (
    Gaussian,
    InceptionScore,
    Moments,
    edge_jumps,
    frechet_deviation,
    frechet_distance,
    precision_recall,
    ssim,
)
from detailflow.psnr import psnr


def covariance(seed: int, dim: int, rank: int | None = None) -> torch.Tensor:
    x = torch.randn(dim, rank or dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x @ x.T / dim


def distance(mean1: torch.Tensor, covariance1: torch.Tensor, mean2: torch.Tensor, covariance2: torch.Tensor) -> float:
    a, b = Gaussian(mean1.double(), covariance1.double()), Gaussian(mean2.double(), covariance2.double())
    return frechet_distance(a, b)


class TestFrechet:
    def test_diagonal_covariances(self):
        """‖μ₁ − μ₂‖² + Σ (√a − √b)²."""
        generator = torch.Generator().manual_seed(0)
        m1, m2, a, b = torch.rand(4, 64, generator=generator, dtype=torch.float64)
        expected = (m1 - m2).square().sum() + (a.sqrt() - b.sqrt()).square().sum()
        assert distance(m1, a.diag(), m2, b.diag()) == pytest.approx(expected.item(), rel=1e-12)

    def test_commuting_covariances(self):
        """The same eigenvectors Q: their roots commute, so that the distance is that of the eigenvalues."""
        generator = torch.Generator().manual_seed(0)
        q = torch.linalg.qr(torch.randn(48, 48, generator=generator, dtype=torch.float64)).Q
        m1, m2, a, b = torch.rand(4, 48, generator=generator, dtype=torch.float64)
        expected = (m1 - m2).square().sum() + (a.sqrt() - b.sqrt()).square().sum()
        found = distance(m1, q @ a.diag() @ q.T, m2, q @ b.diag() @ q.T)
        assert found == pytest.approx(expected.item(), rel=1e-12)

    def test_general_covariances(self):
        """tr (Σ₁Σ₂)^½ from the eigenvalues of the product, which is not symmetric, by NumPy."""
        a, b = covariance(0, 40), covariance(1, 40)
        m1, m2 = torch.randn(2, 40, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        root = np.sqrt(np.linalg.eigvals(a.numpy() @ b.numpy()).real).sum()
        expected = (m1 - m2).square().sum() + a.trace() + b.trace() - 2 * root
        assert distance(m1, a, m2, b) == pytest.approx(expected.item(), rel=1e-9)

    def test_two_dimensions_by_hand(self):
        """tr (Σ₁Σ₂)^½ = √(tr Σ₁Σ₂ + 2 √det Σ₁Σ₂) in two dimensions."""
        a = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
        b = torch.tensor([[1.0, -0.3], [-0.3, 3.0]], dtype=torch.float64)
        root = ((a @ b).trace() + 2 * (a @ b).det().sqrt()).sqrt()
        expected = a.trace() + b.trace() - 2 * root
        assert distance(torch.zeros(2), a, torch.zeros(2), b) == pytest.approx(expected.item(), rel=1e-12)

    @pytest.mark.parametrize("rank", [5, 300])
    def test_zero_from_itself_even_where_singular(self, rank: int):
        sigma, mu = covariance(3, 300, rank), torch.randn(300)
        assert distance(mu, sigma, mu, sigma) <= 1e-11 * float(sigma.trace())

    def test_singular_ones_in_separate_spaces(self):
        """Nothing in common: the distance is the sum of both traces."""
        a, b = torch.zeros(20, 20, dtype=torch.float64), torch.zeros(20, 20, dtype=torch.float64)
        a[:10, :10], b[10:, 10:] = covariance(4, 10, 4), covariance(5, 10, 4)
        expected = float(a.trace() + b.trace())
        assert distance(torch.zeros(20), a, torch.zeros(20), b) == pytest.approx(expected, rel=1e-12)

    def test_what_cannot_be_compared(self):
        with pytest.raises(DetailFlowError, match="features of 3 and of 4 dimensions cannot be compared"):
            distance(torch.zeros(3), torch.eye(3), torch.zeros(4), torch.eye(4))
        with pytest.raises(DetailFlowError, match="a mean of 3 numbers needs a covariance"):
            distance(torch.zeros(3), torch.eye(3), torch.zeros(3), torch.eye(2))
        with pytest.raises(DetailFlowError, match="not finite"):
            distance(torch.zeros(2), torch.eye(2), torch.full((2,), torch.nan), torch.eye(2))


def test_the_bootstrap_knows_how_far_distances_vary():
    """Beside the deviation of 200 sets of the same kind; a third of the features, scaled, says the same."""
    rng = np.random.default_rng(0)
    reference = Gaussian(torch.zeros(6, dtype=torch.float64), torch.eye(6, dtype=torch.float64))

    def draw(count: int) -> torch.Tensor:
        return torch.from_numpy(rng.normal(0.3, np.linspace(0.7, 1.3, 6), (count, 6)))

    sets = [draw(900) for _ in range(200)]
    found = [distance(reference.mean, reference.covariance, x.mean(0), x.T.cov()) for x in sets]
    assert frechet_deviation(reference, draw(900), 900, draws=200) == pytest.approx(np.std(found), rel=0.2)
    assert frechet_deviation(reference, draw(300), 900, draws=200) == pytest.approx(np.std(found), rel=0.3)


class TestMoments:
    @pytest.mark.parametrize("batches", [[1000], [1] * 1000, [7, 300, 1, 692]])
    def test_as_in_two_passes(self, batches: list[int]):
        """At means a thousand times the deviation, where sums of squares would lose most digits."""
        x = np.random.default_rng(0).normal(1000, np.linspace(0.1, 1, 24), (1000, 24)).astype(np.float32)
        moments = Moments(24)
        for part in torch.from_numpy(x).split(batches):
            moments.update(part)
        assert moments.count == 1000
        np.testing.assert_allclose(moments.mean, x.astype(np.float64).mean(0), rtol=1e-12)
        np.testing.assert_allclose(
            moments.gaussian().covariance, np.cov(x.astype(np.float64), rowvar=False), rtol=1e-6, atol=1e-9
        )

    def test_fewer_than_two(self):
        moments = Moments(3)
        moments.update(torch.ones(1, 3))
        with pytest.raises(DetailFlowError, match="at least 2 images, not 1"):
            moments.gaussian()


def inception_score(logits: torch.Tensor, splits: int | None = None) -> tuple[float, float | None]:
    score = InceptionScore(logits.shape[1], len(logits), splits)
    score.update(logits, 0)
    return score.score()


class TestInceptionScore:
    def test_sure_and_balanced_is_the_number_of_classes(self):
        assert inception_score(1000 * torch.eye(7).repeat(40, 1)) == (pytest.approx(7), None)
        by_class = 1000 * torch.eye(7).repeat_interleave(40, 0)  # as class folders are read
        assert inception_score(by_class, splits=10) == pytest.approx((7, 0))

    def test_one_class_or_no_idea_is_one(self):
        assert inception_score(torch.zeros(50, 7)) == (pytest.approx(1), None)
        assert inception_score(1000 * torch.eye(7)[[2] * 50]) == (pytest.approx(1), None)

    def test_splits_differ(self):
        """Even images of one class, odd ones of both: 1 and 2 in two splits."""
        logits = 1000 * torch.eye(2)[[0, 0, 0, 1] * 4]
        assert inception_score(logits, splits=2) == pytest.approx((1.5, 0.5))

    def test_a_split_has_5000_images(self):
        assert [InceptionScore(2, count).splits for count in (1, 5000, 5001, 50_000)] == [1, 1, 2, 10]

    @pytest.mark.parametrize("count", [10, 57, 300])
    @pytest.mark.parametrize("batch", [1, 13, 300])
    def test_as_in_two_passes(self, count: int, batch: int):
        """NumPy's, over every tenth image."""
        logits = torch.randn(count, 12, generator=torch.Generator().manual_seed(0)) * 3
        p = logits.double().softmax(1).numpy()
        scores = []
        for s in range(10):
            part = p[s::10]
            scores.append(np.exp((part * (np.log(part) - np.log(part.mean(0)))).sum(1).mean()))
        running = InceptionScore(12, count, splits=10)
        for first in range(0, count, batch):
            running.update(logits[first : first + batch], first)
        assert running.score() == pytest.approx((np.mean(scores), np.std(scores)), rel=1e-12)


class TestPrecisionRecall:
    @staticmethod
    def by_force(real: np.ndarray, fake: np.ndarray, k: int) -> tuple[float, float]:
        def distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
            return np.array([np.linalg.norm(b - row, axis=1) for row in a])

        def share_inside(points: np.ndarray, manifold: np.ndarray) -> float:
            among = distances(manifold, manifold)
            np.fill_diagonal(among, np.inf)
            radii = np.sort(among, 1)[:, k - 1]
            return float((distances(points, manifold) <= radii).any(1).mean())

        return share_inside(fake, real), share_inside(real, fake)

    @pytest.mark.parametrize("batch", [64, 2000])
    @pytest.mark.parametrize("k", [1, 3])
    def test_as_by_brute_force(self, k: int, batch: int):
        draws = np.random.default_rng(0)
        real = draws.normal(5, 1, (500, 6)).astype(np.float32)
        fake = draws.normal(5.6, 0.8, (450, 6)).astype(np.float32)
        expected = self.by_force(real.astype(np.float64), fake.astype(np.float64), k)
        assert 0.1 < expected[1] < expected[0] < 0.95  # where a mistake would show
        assert precision_recall(torch.from_numpy(real), torch.from_numpy(fake), k, batch) == expected

    def test_the_same_images_and_distant_ones(self):
        x = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
        assert precision_recall(x, x) == (1, 1)
        assert precision_recall(x, x + 100) == (0, 0)

    def test_copies_of_one_image(self):
        """Their balls have no extent, yet hold each other."""
        x = torch.rand(1, 2048, generator=torch.Generator().manual_seed(0)).expand(9, -1) * 30
        assert precision_recall(x, x) == (1, 1)
        assert precision_recall(x, x + 0.01) == (0, 0)

    def test_what_cannot_be_measured(self):
        with pytest.raises(DetailFlowError, match="at least 4 images in each set, not 9 and 3"):
            precision_recall(torch.zeros(9, 2), torch.zeros(3, 2))
        with pytest.raises(DetailFlowError, match="features of 2 and of 3 dimensions"):
            precision_recall(torch.zeros(9, 2), torch.zeros(9, 3))


@pytest.fixture(scope="module")
def pairs(cifar) -> tuple[torch.Tensor, torch.Tensor]:
    """Twelve photographs, and the same with noise of growing strength."""
    images = np.stack([np.asarray(open_images(cifar).image(i)) for i in range(12)])
    noise = np.random.default_rng(0).normal(0, 1, images.shape) * np.linspace(1, 60, 12)[:, None, None, None]
    return torch.from_numpy(images), torch.from_numpy((images + noise).clip(0, 255).astype(np.uint8))


class TestPairs:
    def test_psnr_as_scikit_image(self, pairs):
        a, b = pairs
        expected = [peak_signal_noise_ratio(x, y) for x, y in zip(a.numpy(), b.numpy(), strict=True)]
        np.testing.assert_allclose(psnr(a, b), expected, rtol=1e-6)
        assert psnr(a, a).isinf().all()

    def test_ssim_as_scikit_image(self, pairs):
        a, b = pairs
        settings = dict(gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255, channel_axis=-1)
        expected = [structural_similarity(x, y, **settings) for x, y in zip(a.numpy(), b.numpy(), strict=True)]
        np.testing.assert_allclose(ssim(a, b), expected, atol=5e-5)
        torch.testing.assert_close(ssim(a, a), torch.ones(12, dtype=torch.float64))
        white = [255 - x // 128 for x in (a, b)]  # where float32 is at its worst
        expected = [structural_similarity(x, y, **settings) for x, y in zip(*(x.numpy() for x in white), strict=True)]
        np.testing.assert_allclose(ssim(*white), expected, atol=5e-4)
        torch.testing.assert_close(ssim(a[:1], b[:1]), ssim(a, b)[:1])  # one image alone

    def test_jumps_across_edges_of_patches(self):
        images = torch.full((2, 8, 12, 3), 100, dtype=torch.uint8)
        grid = images.clone()
        grid[1, :, 4:8] += 30  # a patch column that is too bright: two edges of eleven neighbours, one direction of two
        jumps = edge_jumps(grid, images, 4)
        assert jumps[0].tolist() == [0, 0]
        # Across: 8 rows of 2 edges at 30, beside 1 edge of 12 columns without; inside there is none.
        assert jumps[1].tolist() == [pytest.approx(30 * 8 * 2 / (8 * 2 + 12)), 0]
        noise = images + torch.randint(0, 50, images.shape, generator=torch.Generator().manual_seed(0))
        across, inside = edge_jumps(noise.to(torch.uint8), images, 4).sum(0).tolist()
        assert across / inside == pytest.approx(1, abs=0.1)

    def test_what_cannot_be_compared(self):
        a = torch.zeros(2, 10, 12, 3, dtype=torch.uint8)
        with pytest.raises(DetailFlowError, match="SSIM needs images of at least 11 pixels a side, not 12×10"):
            ssim(a, a)
        for metric in (psnr, ssim):
            with pytest.raises(DetailFlowError, match="cannot be compared one by one"):
                metric(a, a[:1])
