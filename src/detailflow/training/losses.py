"""The tokenizer's loss terms (method §4.4), each a plain function of tensors."""

import torch.nn.functional as F
from torch import Tensor


def quantization_loss(z: Tensor, quantized: Tensor, commitment: float) -> Tensor:
    """‖z_q − sg(z)‖² + β‖sg(z_q) − z‖², means over everything."""
    return F.mse_loss(quantized, z.detach()) + commitment * F.mse_loss(z, quantized.detach())


def straight_through(z: Tensor, quantized: Tensor) -> Tensor:
    """The value of `quantized` with the gradient of `z`."""
    return z + (quantized - z).detach()


def perceptual_loss(features: list[Tensor], targets: list[Tensor]) -> Tensor:
    """Sum over maps (B, C, h, w) of the mean squared distance of channel-normalised features: LPIPS without its weights."""
    total = features[0].new_zeros(())
    for a, b in zip(features, targets, strict=True):
        total = total + (F.normalize(a.float(), dim=1) - F.normalize(b.float(), dim=1)).square().sum(1).mean()
    return total


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Hinge loss of the discriminator's logits."""
    return (F.relu(1 - real) + F.relu(1 + fake)).mean() / 2


def generator_loss(fake: Tensor) -> Tensor:
    """The generator's side of the hinge loss."""
    return -fake.mean()
