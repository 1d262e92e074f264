"""The codebook (Sec. 3.1), and a search in it for codes that rebuild an image better (docs/method.md#code-search)."""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detailflow.models.ids import all_finite

SEARCH_RATE = 0.025  # how far the first step of a search moves each number of an image's latents, as a root mean square


class VectorQuantizer(nn.Module):
    """Project latents to `dim` dimensions, normalize them and pick the nearest of `size` normalized codes."""

    def __init__(self, width: int, size: int, dim: int) -> None:
        super().__init__()
        self.project = nn.Linear(width, dim)
        self.codebook = nn.Parameter(F.normalize(torch.empty(size, dim).normal_(), dim=-1))

    def codes(self) -> Tensor:
        """Return the codes, (K, d) unit vectors."""
        return F.normalize(self.codebook, dim=-1)

    def lookup(self, ids: Tensor) -> Tensor:
        """(…) int64 → (…, d) unit vectors."""
        return F.normalize(self.codebook[ids], dim=-1)

    def unit_latents(self, latents: Tensor) -> Tensor:
        """(B, n, width) → (B, n, d) unit vectors, always in float32."""
        with torch.autocast(latents.device.type, enabled=False):
            projected = F.linear(latents.float(), self.project.weight.float(), self.project.bias.float())
            return F.normalize(projected, dim=-1)

    @torch.no_grad()
    def nearest(self, z: Tensor) -> Tensor:
        """(…, d) unit vectors → (…) int64, the nearest code: for unit vectors the one with the largest dot product."""
        return self._similarities(z).argmax(-1)

    @torch.no_grad()
    def nearest_k(self, z: Tensor, k: int) -> Tensor:
        """(…, d) unit vectors → (…, min(k, K)) int64, the nearest codes, the nearest first."""
        return self._similarities(z).topk(min(k, self.codebook.shape[0]), dim=-1).indices

    def _similarities(self, z: Tensor) -> Tensor:
        with torch.autocast(z.device.type, enabled=False):
            return z @ self.codes().to(z.dtype).T

    def search(
        self, z: Tensor, target: Tensor, decode: Callable[[Tensor], Tensor], steps: int, given: Tensor | None = None
    ) -> Iterator[Tensor]:
        """Yield codes that rebuild images better than those nearest to their latents (docs/method.md#code-search).

        Each step decodes the nearest codes and moves the latents against the gradient of the pixels' squared error, as
        training does: straight through to the codes. Each image keeps the best codes of all steps, so none gets worse.

        Args:
            z: (B, n, d) unit vectors, the encoder's.
            target: (B, 3, H, W), what the codes should show.
            decode: (B, n, d) unit vectors → (B, 3, H, W); its weights need no gradients.
            steps: how many.
            given: (B, n) codes that stay, negative where they are searched; `None` searches all.

        Yields:
            (B, n) int64, steps + 1 times: the best so far. An image's depend on the others by rounding only.
        """
        with torch.inference_mode(False):
            z, target = z.detach().clone(), target.detach().clone()  # as those of inference mode cannot have gradients
            free = torch.ones_like(z[..., :1]) if given is None else (given < 0)[..., None].to(z.dtype)
            least, found = z.new_full((len(z),), torch.inf), self.nearest(z)
        for step in range(steps + 1):
            with torch.inference_mode(False), torch.enable_grad():
                ids = self.nearest(z) if given is None else torch.where(given < 0, self.nearest(z), given)
                codes = self.lookup(ids).detach().clone().requires_grad_()
                errors = (decode(codes).float() - target).square().sum((1, 2, 3))
                better = errors.detach() < least
                least, found = torch.where(better, errors.detach(), least), torch.where(better[:, None], ids, found)
                if step < steps:
                    gradient = torch.autograd.grad(errors.sum(), codes)[0].float() * free
                    size = (gradient.square().mean(2).sum(1) / free.sum((1, 2)).clamp(min=1)).sqrt()[:, None, None]
                    z = F.normalize(z - SEARCH_RATE * (1 - step / steps) * gradient / (size + 1e-12), dim=-1)
            if step == steps:
                all_finite("the decoder's pixels", least)
            yield found


def usage_and_perplexity(counts: Tensor) -> tuple[Tensor, Tensor]:
    """(K,) uses of each code → the fraction of codes that were used, and the perplexity of their distribution."""
    frequencies = counts / counts.sum()
    return (frequencies > 0).to(frequencies.dtype).mean(), torch.special.entr(frequencies).sum().exp()
