"""The tokenizer's loss terms (docs/method.md#losses), each a plain function of tensors."""

import torch.nn.functional as F
from torch import Tensor


def quantization_loss(z: Tensor, quantized: Tensor, commitment: float) -> Tensor:
    """Return L_VQ = ‖z_q − sg(z)‖² + β‖sg(z_q) − z‖², means over everything."""
    return F.mse_loss(quantized, z.detach()) + commitment * F.mse_loss(z, quantized.detach())


def straight_through(z: Tensor, quantized: Tensor) -> Tensor:
    """Return the value of `quantized` with the gradient of `z`."""
    return z + (quantized - z).detach()


def perceptual_loss(features: list[Tensor], targets: list[Tensor]) -> Tensor:
    """Return unweighted LPIPS: over maps (B, C, h, w), the sum of mean squared distances of normalised features."""
    total = features[0].new_zeros(())
    for a, b in zip(features, targets, strict=True):
        total = total + (F.normalize(a.float(), dim=1) - F.normalize(b.float(), dim=1)).square().sum(1).mean()
    return total


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Return the discriminator's hinge loss, of its logits."""
    return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2


def generator_loss(fake: Tensor) -> Tensor:
    """Return the generator's side of the hinge loss."""
    return -fake.mean()


def lecam_loss(real: Tensor, fake: Tensor, ema_real: Tensor, ema_fake: Tensor) -> Tensor:
    """Return LeCAM's regulariser (Tseng et al. 2021, arXiv 2104.03310, Eq. 3), of logits and their moving averages."""
    return (real - ema_fake).square().mean() + (fake - ema_real).square().mean()


def consistency_loss(logits: Tensor, other: Tensor) -> Tensor:
    """Return the mean squared difference of the discriminator's logits on two views of the same images."""
    return F.mse_loss(logits, other)


def alignment_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Return −cos of (B, width) predictions and a frozen teacher's features."""
    return -F.cosine_similarity(prediction.float(), target.float(), dim=-1).mean()
