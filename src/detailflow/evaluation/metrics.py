"""The figures of this field: Fréchet distance, inception score, precision and recall, PSNR and SSIM.

What is summed over images is so in float64 and needs no second pass, so that batches of any size, and any number of processes,
give the same figures up to its rounding.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from detailflow.distributed import World
from detailflow.errors import DetailFlowError, missing_package

NEIGHBOURS = 3  # of precision and recall, as ADM's evaluation has them
IMAGES_PER_SPLIT = 5000  # of the inception score, as in ADM's evaluation: ten splits of 50,000 images
DRAWS = 20  # of the bootstrap over features: the deviation that they show is known to 16%
SMALLEST_SSIM_SIDE = 11  # pixels of its window: 3.5 σ on each side of the middle

_Part = tuple[Tensor, Tensor]  # features (b, D), and the origin (D,) that they are taken from


@dataclass(frozen=True)
class Gaussian:
    """The mean (D,) and the unbiased covariance (D, D) of features, float64 on the CPU, and of how many images they are."""

    mean: Tensor
    covariance: Tensor
    count: int | None = None  # unknown in most stored statistics


class Moments:
    """The running mean and covariance of rows, by the pairwise update of Chan et al. (1983)."""

    def __init__(self, dim: int, device: torch.device | str = "cpu") -> None:
        self.count = 0
        self.mean = torch.zeros(dim, dtype=torch.float64, device=device)
        self._scatter = torch.zeros(
            dim, dim, dtype=torch.float64, device=device
        )  # sum of outer products about the mean

    def update(self, x: Tensor) -> None:
        """Add the rows of `x` (B, D)."""
        if not len(x):
            return
        x = x.to(self.mean)
        mean = x.mean(0)
        total = self.count + len(x)
        centred, shift = x - mean, mean - self.mean
        self._scatter += centred.T @ centred + torch.outer(shift, shift) * (self.count * len(x) / total)
        self.mean += shift * (len(x) / total)
        self.count = total

    def merge(self, world: World) -> None:
        """Add what all other processes have seen; all must call it, and all hold the same afterwards."""
        if world.size == 1:
            return
        home, there = self.mean.device, world.device or self.mean.device
        mean, scatter = self.mean.to(there), self._scatter.to(there)
        count = torch.tensor(float(self.count), dtype=torch.float64, device=there)
        total = world.all_reduce(count)
        common = world.all_reduce(mean * (count / total))
        shift = mean - common
        self._scatter = world.all_reduce(scatter + torch.outer(shift, shift) * count).to(home)
        self.mean, self.count = common.to(home), int(total)

    @property
    def covariance(self) -> Tensor:
        """(D, D), unbiased.

        Raises:
            DetailFlowError: where fewer than two rows were seen.
        """
        if self.count < 2:
            raise DetailFlowError(f"a covariance needs the features of at least 2 images, not {self.count}")
        return self._scatter / (self.count - 1)

    def gaussian(self) -> Gaussian:
        """What was seen so far. Raises DetailFlowError as `covariance`."""
        return Gaussian(self.mean.cpu(), self.covariance.cpu(), self.count)


def frechet_distance(mean1: Tensor, covariance1: Tensor, mean2: Tensor, covariance2: Tensor) -> float:
    """‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2(Σ₁Σ₂)^½) of two Gaussians (Heusel et al. 2017), in float64.

    The root's trace is the sum of the singular values of Σ₁^½ Σ₂^½. That stays exact where covariances are singular, as those
    of fewer images than dimensions are: roots of the eigenvalues of Σ₁Σ₂ would turn its rounding, 1e-16, into 1e-8.

    Raises:
        DetailFlowError: for shapes that don't fit each other, or numbers that are not finite.
    """
    dims = len(mean1), len(mean2)
    if dims[0] != dims[1]:
        raise DetailFlowError(
            f"features of {dims[0]} and of {dims[1]} dimensions cannot be compared: use one network for both"
        )
    mean1, covariance1, mean2, covariance2 = (x.double() for x in (mean1, covariance1, mean2, covariance2))
    for mean, covariance in ((mean1, covariance1), (mean2, covariance2)):
        if covariance.shape != (dims[0], dims[0]):
            raise DetailFlowError(f"a mean of {dims[0]} numbers needs a covariance of as many rows and columns")
        if not (mean.isfinite().all() and covariance.isfinite().all()):
            raise DetailFlowError("the features' mean or covariance holds numbers that are not finite")
    cross = torch.linalg.svdvals(_root(covariance1) @ _root(covariance2)).sum()
    distance = (mean1 - mean2).square().sum() + covariance1.trace() + covariance2.trace() - 2 * cross
    return max(float(distance), 0.0)  # which rounding may miss by 1e-13


def frechet_deviation(reference: Gaussian, features: Tensor, count: int, draws: int = DRAWS) -> float:
    """How far the Fréchet distance of `count` images from a reference would vary with other images of the same kind.

    One standard deviation by bootstrap over `features` (n, D) of n of them, scaled by √(n / count). The reference stays as it is.
    """
    x = features.double()
    mean, root = reference.mean.to(x), _root(reference.covariance.to(x))
    generator, found = torch.Generator().manual_seed(0), []
    for _ in range(draws):
        times = torch.bincount(torch.randint(len(x), (len(x),), generator=generator), minlength=len(x)).to(x)
        middle = times @ x / len(x)
        centred = (x - middle) * times.sqrt()[:, None]
        covariance = centred.T @ centred / (len(x) - 1)
        cross = torch.linalg.eigvalsh(root @ covariance @ root).clamp(min=0).sqrt().sum()
        found.append((middle - mean).square().sum() + covariance.trace() - 2 * cross)
    return torch.stack(found).std().item() * (len(x) / count) ** 0.5


def _root(covariance: Tensor) -> Tensor:
    """The symmetric square root (D, D)."""
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


class InceptionScore:
    """The running exp E KL(p(y|x) ‖ p(y)) of `total` images (Salimans et al. 2016), the mean over splits, in float64.

    The images are dealt out to the splits in turn, so that a set that lies class by class is measured right. ADM's evaluation
    takes them in blocks; of images in no order that is the same but for chance.
    """

    def __init__(self, classes: int, total: int, splits: int | None = None, device: torch.device | str = "cpu") -> None:
        self.total, self.splits = total, splits or -(-total // IMAGES_PER_SPLIT)
        self._probabilities = torch.zeros(self.splits, classes, dtype=torch.float64, device=device)  # summed
        self._entropies = torch.zeros(self.splits, dtype=torch.float64, device=device)  # the negative ones, summed

    def update(self, logits: Tensor, first: int) -> None:
        """Add the images of numbers `first` and following, whose class logits are (B, C)."""
        logs = logits.to(self._probabilities).log_softmax(1)
        probabilities = logs.exp()
        split = torch.arange(first, first + len(logits), device=logs.device) % self.splits
        self._probabilities.index_add_(0, split, probabilities)
        self._entropies.index_add_(0, split, torch.special.xlogy(probabilities, probabilities).sum(1))

    def merge(self, world: World) -> None:
        """Add what all other processes have seen; all must call it."""
        if world.size > 1:
            there = world.device or self._entropies.device
            self._probabilities = world.all_reduce(self._probabilities.to(there))
            self._entropies = world.all_reduce(self._entropies.to(there))

    def score(self) -> tuple[float, float | None]:
        """Mean and standard deviation over the splits, which a single one has not."""
        counts = (self.total - torch.arange(self.splits) + self.splits - 1) // self.splits
        mean = self._probabilities.cpu() / counts[:, None]
        divergence = self._entropies.cpu() / counts - torch.special.xlogy(mean, mean).sum(1)
        scores = divergence.exp()
        return scores.mean().item(), scores.std(correction=0).item() if self.splits > 1 else None


def inception_score(logits: Tensor, splits: int | None = None) -> tuple[float, float | None]:
    """Mean and standard deviation over splits of images with class logits (n, C)."""
    score = InceptionScore(logits.shape[1], len(logits), splits, logits.device)
    score.update(logits, 0)
    return score.score()


def precision_recall(real: Tensor, fake: Tensor, k: int = NEIGHBOURS, batch: int = 2000) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019) of features (n, D) and (m, D), as ADM's evaluation has them.

    Precision is the share of fakes in the manifold of the real ones, the balls around each that reach its k-th nearest
    neighbour; recall is the share of real ones in that of the fakes. Exact, in float64, with (batch, batch) distances at once.

    Raises:
        DetailFlowError: for features of other sizes, or no more than k of them.
    """
    if real.shape[1] != fake.shape[1]:
        raise DetailFlowError(
            f"features of {real.shape[1]} and of {fake.shape[1]} dimensions cannot be compared: use one network for both"
        )
    if min(len(real), len(fake)) <= k:
        raise DetailFlowError(
            f"precision and recall need at least {k + 1} images in each set, not {len(real)} and {len(fake)}"
        )
    origin = real.double().mean(0)  # as distances lose fewer digits there
    real_parts, fake_parts = ([(part, origin) for part in x.split(batch)] for x in (real, fake))
    real_radii, fake_radii = (_radii(parts, k) for parts in (real_parts, fake_parts))
    covered = [torch.zeros(len(r), dtype=torch.bool, device=real.device) for r in real_radii]
    inside = 0
    for part, radii in zip(fake_parts, fake_radii, strict=True):
        found = torch.zeros(len(radii), dtype=torch.bool, device=real.device)
        for other, reach, hit in zip(real_parts, real_radii, covered, strict=True):
            distances = _squared_distances(part, other)
            found |= (distances <= reach).any(1)
            hit |= (distances <= radii[:, None]).any(0)
        inside += int(found.sum())
    return inside / len(fake), sum(int(hit.sum()) for hit in covered) / len(real)


def _radii(parts: list[_Part], k: int) -> list[Tensor]:
    """The squared distance from each row to its k-th nearest other one, part by part."""
    radii = []
    for part in parts:
        nearest = torch.empty(len(part[0]), 0, dtype=torch.float64, device=part[0].device)
        for other in parts:
            candidates = torch.cat((nearest, _squared_distances(part, other)), 1)
            nearest = candidates.topk(
                min(k + 1, candidates.shape[1]), largest=False
            ).values  # itself, at 0, is among them
        radii.append(nearest[:, -1])
    return radii


def _squared_distances(a: _Part, b: _Part) -> Tensor:
    """(b₁, b₂); zero where float32 features cannot tell rows apart, so that equal ones are."""
    x, y = a[0].double() - a[1], b[0].double() - b[1]
    scale = x.square().sum(1)[:, None] + y.square().sum(1)
    distances = scale - 2 * (x @ y.T)
    return distances.where(distances > 1e-12 * scale, 0.0)


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004) of each pair of images: uint8 (B, H, W, 3) twice → (B,) float64.

    On a CPU in float32, as 121 products for each pixel take 50 times longer in float64: within 5e-5 on photographs, and 1e-3
    where all is nearly white.

    The window is a Gaussian of σ = 1.5 pixels. The mean is over the places where it lies in the image, as in the paper and in
    scikit-image; torchmetrics' own mean takes in those where the image is mirrored at its edge.

    Raises:
        DetailFlowError: for images of other shapes, or smaller than the window, or without torchmetrics.
    """
    metric = _torchmetrics("structural_similarity_index_measure")
    a, b = (x if x.is_cuda else x.float() for x in _pairs(a, b))  # GPUs may round float32 convolutions to 10 bits
    if min(a.shape[-2:]) < SMALLEST_SSIM_SIDE:
        raise DetailFlowError(
            f"SSIM needs images of at least {SMALLEST_SSIM_SIDE} pixels a side, not {a.shape[-1]}×{a.shape[-2]}"
        )
    _, similarities = metric(a, b, data_range=255.0, return_full_image=True)  # (B, 3, H, W)
    edge = SMALLEST_SSIM_SIDE // 2
    return similarities[..., edge:-edge, edge:-edge].double().mean((1, 2, 3))


def _pairs(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """→ float64 (B, 3, H, W) twice."""
    if a.shape != b.shape or a.ndim != 4:
        raise DetailFlowError(f"images of shapes {tuple(a.shape)} and {tuple(b.shape)} cannot be compared one by one")
    return a.movedim(-1, 1).double(), b.movedim(-1, 1).double()


def _torchmetrics(name: str) -> Callable[..., Any]:
    try:
        from torchmetrics.functional import image
    except ImportError as error:
        raise missing_package("the measure of PSNR and SSIM", "torchmetrics") from error
    return getattr(image, name)


def bootstrap(values: Tensor, draws: int = 1000, seed: int = 0) -> tuple[float, float, float]:
    """The mean of `values` (n,), and the bounds of the middle 95% of the means of n values drawn from them with replacement.

    Raises:
        DetailFlowError: where there are none.
    """
    if not len(values):
        raise DetailFlowError("a mean needs at least one value")
    values = values.detach().double().cpu()
    generator = torch.Generator().manual_seed(seed)
    means = torch.stack(
        [values[torch.randint(len(values), values.shape, generator=generator)].mean() for _ in range(draws)]
    )
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return values.mean().item(), low, high
