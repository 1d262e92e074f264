"""The measures of this field: Fréchet distance, inception score, precision and recall, SSIM (PSNR is in `psnr`).

Sums over images are in float64 and need one pass, so that any batch size and any number of processes give the same
values up to rounding.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from detailflow.device import exact_device
from detailflow.distributed import World
from detailflow.errors import DetailFlowError

NEIGHBOURS = 3  # of precision and recall, as in ADM's evaluation
IMAGES_PER_SPLIT = 5000  # of the inception score, as in ADM's evaluation: ten splits of 50,000 images
DRAWS = 20  # of the bootstrap over features: enough to know the standard deviation to 16%
SMALLEST_SSIM_SIDE = 11  # pixels of its window: 3.5 σ on each side of the middle


@dataclass(frozen=True)
class Gaussian:
    """The mean (D,) and the unbiased covariance (D, D) of features, float64 on the CPU."""

    mean: Tensor
    covariance: Tensor
    count: int | None = None  # of images; unknown in most stored statistics


class Moments:
    """The running mean and covariance of rows, by the pairwise update of Chan et al. (1983)."""

    def __init__(self, dim: int, device: torch.device | str = "cpu") -> None:
        self.count = 0
        self.mean = torch.zeros(dim, dtype=torch.float64, device=device)
        self._scatter = torch.zeros(dim, dim, dtype=torch.float64, device=device)  # Σ (x − mean)(x − mean)ᵀ

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
        """Add the rows of all other ranks; every rank must call it and gets the same result."""
        if world.size == 1:
            return
        total = int(world.all_reduce(torch.tensor(self.count)))
        common = world.all_reduce(self.mean * (self.count / total))
        shift = self.mean - common
        self._scatter = world.all_reduce(self._scatter + torch.outer(shift, shift) * self.count)
        self.mean, self.count = common, total

    def gaussian(self) -> Gaussian:
        """Return the mean and the covariance so far."""
        if self.count < 2:
            raise DetailFlowError(f"a covariance needs the features of at least 2 images, not {self.count}")
        return Gaussian(self.mean.cpu(), (self._scatter / (self.count - 1)).cpu(), self.count)


def check_dimensions(a: int, b: int) -> None:
    """Check that features have as many dimensions as others."""
    if a != b:
        raise DetailFlowError(f"features of {a} and of {b} dimensions cannot be compared: use one network for both")


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """Return ‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2(Σ₁Σ₂)^½) of two Gaussians (Heusel et al. 2017), in float64.

    The root's trace is the sum of the singular values of Σ₁^½ Σ₂^½. That stays exact if covariances are singular, as
    those of fewer images than dimensions are; roots of the eigenvalues of Σ₁Σ₂ would turn an error of 1e-16 into 1e-8.
    """
    check_dimensions(len(a.mean), len(b.mean))
    for x in (a, b):
        if x.covariance.shape != (len(a.mean), len(a.mean)):
            raise DetailFlowError(f"a mean of {len(a.mean)} numbers needs a covariance of as many rows and columns")
        if not (x.mean.isfinite().all() and x.covariance.isfinite().all()):
            raise DetailFlowError("the features' mean or covariance contains numbers that are not finite")
    cross = torch.linalg.svdvals(_root(a.covariance) @ _root(b.covariance)).sum()
    distance = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * cross
    return max(float(distance), 0.0)  # rounding may miss 0 by 1e-13


def frechet_deviation(reference: Gaussian, features: Tensor, count: int, draws: int = DRAWS) -> float:
    """Return the standard deviation of the Fréchet distance of `count` images over other images of the same kind.

    By bootstrap over `features` (n, D) of n of them, scaled by √(n / count). The reference stays as it is.
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
    """Return the symmetric square root (D, D)."""
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


class InceptionScore:
    """The running exp E KL(p(y|x) ‖ p(y)) of `total` images (Salimans et al. 2016), the mean over splits, in float64.

    The images are dealt out to the splits in turn, so that a set in the order of its classes is measured right. ADM's
    evaluation takes blocks; for images in random order that is the same but for chance.
    """

    def __init__(self, classes: int, total: int, splits: int | None = None, device: torch.device | str = "cpu") -> None:
        self.classes, self.total, self.splits = classes, total, splits or -(-total // IMAGES_PER_SPLIT)
        self._probabilities = torch.zeros(self.splits, classes, dtype=torch.float64, device=device)  # summed
        self._entropies = torch.zeros(self.splits, dtype=torch.float64, device=device)  # negative, summed

    def update(self, logits: Tensor, first: int) -> None:
        """Add the images of index `first` and following, with class logits (B, C)."""
        logs = logits.to(self._probabilities).log_softmax(1)
        probabilities = logs.exp()
        split = torch.arange(first, first + len(logits), device=logs.device) % self.splits
        self._probabilities.index_add_(0, split, probabilities)
        self._entropies.index_add_(0, split, torch.special.xlogy(probabilities, probabilities).sum(1))

    def merge(self, world: World) -> None:
        """Add the images of all other ranks; every rank must call it."""
        self._probabilities = world.all_reduce(self._probabilities)
        self._entropies = world.all_reduce(self._entropies)

    def score(self) -> tuple[float, float | None]:
        """Return the mean and the standard deviation over the splits, None for a single one."""
        counts = (self.total - torch.arange(self.splits) + self.splits - 1) // self.splits
        mean = self._probabilities.cpu() / counts[:, None]
        divergence = self._entropies.cpu() / counts - torch.special.xlogy(mean, mean).sum(1)
        scores = divergence.exp()
        return scores.mean().item(), scores.std(correction=0).item() if self.splits > 1 else None


def precision_recall(real: Tensor, fake: Tensor, k: int = NEIGHBOURS, batch: int = 500) -> tuple[float, float]:
    """Return improved precision and recall (Kynkäänniemi et al. 2019) of features (n, D) and (m, D), by torch-fidelity.

    Precision is the fraction of fakes in the manifold of the real ones, the balls around each that reach its k-th
    nearest neighbour; recall is the fraction of real ones in that of the fakes. Distances are in float64.
    """
    from torch_fidelity.metric_prc import prc_features_to_metric

    check_dimensions(real.shape[1], fake.shape[1])
    if min(len(real), len(fake)) <= k:
        raise DetailFlowError(
            f"precision and recall need at least {k + 1} images in each set, not {len(real)} and {len(fake)}"
        )
    origin = real.double().mean(0)  # near which distances lose fewer digits
    found = prc_features_to_metric(
        fake.double() - origin, real.double() - origin,
        prc_neighborhood=k, prc_batch_size=batch, save_cpu_ram=True, verbose=False,
    )  # fmt: skip
    # They are means in float32: the counts are exact.
    return round(found["precision"] * len(fake)) / len(fake), round(found["recall"] * len(real)) / len(real)


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Return the structural similarity (Wang et al. 2004), (B,) float64, of pairs of images, bytes (B, H, W, 3).

    On a CPU in float32, as 121 products for each pixel take 50 times longer in float64: within 5e-5 on photographs, and
    1e-3 if all is nearly white. The window is a Gaussian of σ = 1.5 pixels. The mean is over its positions inside the
    image, as in the paper and in scikit-image; torchmetrics' own mean includes those at which the image is mirrored.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    if a.shape != b.shape or a.ndim != 4:
        raise DetailFlowError(f"images of shapes {tuple(a.shape)} and {tuple(b.shape)} cannot be compared one by one")
    if min(a.shape[1:3]) < SMALLEST_SSIM_SIDE:
        raise DetailFlowError(
            f"SSIM needs images of at least {SMALLEST_SSIM_SIDE} pixels a side, not {a.shape[2]}×{a.shape[1]}"
        )
    a, b = (z.to(exact_device(z.device)) for z in (a, b))
    # GPUs may round float32 convolutions to 10 bits.
    x, y = (z.movedim(-1, 1).to(torch.float64 if z.is_cuda else torch.float32) for z in (a, b))
    _, similarities = structural_similarity_index_measure(x, y, data_range=255.0, return_full_image=True)
    edge = SMALLEST_SSIM_SIDE // 2
    return similarities[..., edge:-edge, edge:-edge].double().mean((1, 2, 3))


def edge_jumps(a: Tensor, b: Tensor, patch: int) -> Tensor:
    """Return how much a − b changes between neighbours across the edges of patches, and inside them: (B, 2) float64.

    Of pairs of images, bytes (B, H, W, 3), the mean over rows and columns. The ratio of the two is blockiness: 1 if
    patches fit together, and more if one sees their grid.
    """
    a, b = (z.to(exact_device(z.device)) for z in (a, b))
    error, sums, counts = a.float() - b.float(), torch.zeros(len(a), 2, dtype=torch.float64, device=a.device), [0, 0]
    for dim in (1, 2):
        jumps = error.diff(dim=dim).abs().double().movedim(dim, 1)  # (B, neighbours, others, 3)
        across = torch.arange(1, jumps.shape[1] + 1, device=a.device) % patch == 0
        for i, chosen in enumerate((across, ~across)):
            sums[:, i] += jumps[:, chosen].sum((1, 2, 3))
            counts[i] += jumps[0, chosen].numel()
    return sums / torch.tensor(counts, dtype=torch.float64, device=a.device)
