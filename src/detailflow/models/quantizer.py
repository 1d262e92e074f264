"""The vector quantizer: nearest of K unit vectors in d dimensions (docs/method.md#quantizer)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class VectorQuantizer(nn.Module):
    """Projects latents to d dimensions, L2-normalises them and picks the nearest L2-normalised code.

    Args:
        width: of the latents that come in.
        size: K, number of codes.
        dim: d, dimensions of a code.
    """

    def __init__(self, width: int, size: int, dim: int) -> None:
        super().__init__()
        self.project = nn.Linear(width, dim)
        self.codebook = nn.Parameter(F.normalize(torch.empty(size, dim).normal_(), dim=-1))

    def codes(self) -> Tensor:
        """(K, d) unit vectors."""
        return F.normalize(self.codebook, dim=-1)

    def lookup(self, ids: Tensor) -> Tensor:
        """(…) int64 → (…, d) unit vectors."""
        return F.normalize(self.codebook[ids], dim=-1)

    def unit_latents(self, latents: Tensor) -> Tensor:
        """(B, n, width) → (B, n, d), projected and L2-normalised, always in float32."""
        with torch.autocast(latents.device.type, enabled=False):
            return F.normalize(F.linear(latents.float(), self.project.weight.float(), self.project.bias.float()), dim=-1)

    @torch.no_grad()
    def nearest(self, z: Tensor) -> Tensor:
        """(…, d) unit vectors → (…) int64, the nearest code: for unit vectors the one with the largest dot product."""
        with torch.autocast(z.device.type, enabled=False):
            return (z @ self.codes().to(z.dtype).T).argmax(-1)

    @torch.no_grad()
    def nearest_k(self, z: Tensor, k: int) -> Tensor:
        """(…, d) unit vectors → (…, min(k, K)) int64, the nearest codes, the nearest first."""
        with torch.autocast(z.device.type, enabled=False):
            return (z @ self.codes().to(z.dtype).T).topk(min(k, self.codebook.shape[0]), dim=-1).indices


def usage_and_perplexity(counts: Tensor) -> tuple[Tensor, Tensor]:
    """(K,) uses of each code → the share of codes that were used, and how many equally frequent ones are as hard to guess."""
    shares = counts / counts.sum()
    return (shares > 0).to(shares.dtype).mean(), torch.special.entr(shares).sum().exp()
