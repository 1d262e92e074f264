"""The adversarial loss's regularisers and the alignment's parts, against their formulas."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from detailflow.training.classifier import FEATURE_WIDTHS, FeatureNetwork
from detailflow.training.losses import alignment_loss, consistency_loss, discriminator_loss, generator_loss, lecam_loss
from detailflow.training.passes import AlignmentHead


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_lecam():
    """Real logits are held near the fake ones' average and the other way round; the averages are only read."""
    real, fake = noise(4, 7).requires_grad_(), noise(4, 7, seed=1).requires_grad_()
    anchors = torch.tensor([0.6, -0.3])
    loss = lecam_loss(real, fake, *anchors)
    r, f = real.detach().numpy(), fake.detach().numpy()
    assert loss.item() == pytest.approx(((r + 0.3) ** 2).mean() + ((0.6 - f) ** 2).mean(), rel=1e-6)
    loss.backward()
    np.testing.assert_allclose(real.grad, 2 * (r + 0.3) / r.size, rtol=1e-5)
    np.testing.assert_allclose(fake.grad, 2 * (f - 0.6) / f.size, rtol=1e-5)
    assert anchors.tolist() == pytest.approx([0.6, -0.3])


def test_consistency():
    a, b = noise(3, 5).requires_grad_(), noise(3, 5, seed=1).requires_grad_()
    loss = consistency_loss(a, b)
    difference = (a - b).detach().numpy()
    assert loss.item() == pytest.approx((difference**2).mean(), rel=1e-6)
    loss.backward()
    np.testing.assert_allclose(a.grad, 2 * difference / difference.size, rtol=1e-5)
    np.testing.assert_allclose(b.grad, -2 * difference / difference.size, rtol=1e-5)


def test_the_hinge():
    """Logits beyond the margin teach the discriminator nothing; the generator always learns."""
    real, fake = torch.tensor([-2.0, 0.5, 3.0], requires_grad=True), torch.tensor([-3.0, 0.5, 2.0], requires_grad=True)
    loss = discriminator_loss(real, fake)
    assert loss.item() == pytest.approx((3 + 0.5 + 0 + 0 + 1.5 + 3) / 6)
    loss.backward()
    assert (real.grad * 6).tolist() == pytest.approx([-1, -1, 0]) and (fake.grad * 6).tolist() == pytest.approx(
        [0, 1, 1]
    )
    fake.grad = None
    generator_loss(fake).backward()
    assert fake.grad.tolist() == pytest.approx([-1 / 3] * 3)


def test_the_discriminators_terms_leave_a_detached_image_alone():
    """As the training step does it: images detached, so the logits' gradients reach the discriminator and end there."""
    images, weight = noise(2, 6).requires_grad_(), noise(6, 4, seed=1).requires_grad_()
    real, fake = noise(2, 6, seed=2) @ weight, images.detach() @ weight
    (discriminator_loss(real, fake) + lecam_loss(real, fake, *torch.zeros(2)) + consistency_loss(fake, real)).backward()
    assert images.grad is None and float(weight.grad.abs().max()) > 0


def test_alignment():
    prediction, target = noise(4, 9).requires_grad_(), noise(4, 9, seed=1)
    loss = alignment_loss(prediction, target)
    p, t = prediction.detach().double().numpy(), target.double().numpy()
    norms = np.linalg.norm(p, axis=1), np.linalg.norm(t, axis=1)
    cosines = (p * t).sum(1) / norms[0] / norms[1]
    assert loss.item() == pytest.approx(-cosines.mean(), rel=1e-6)
    loss.backward()
    tangent = t / norms[1][:, None] - cosines[:, None] * p / norms[0][:, None]
    np.testing.assert_allclose(prediction.grad, -tangent / norms[0][:, None] / 4, rtol=1e-4, atol=1e-7)
    assert alignment_loss(target, 3 * target).item() == pytest.approx(-1)


def test_alignment_is_computed_in_float32():
    prediction, target = noise(4, 512).bfloat16(), noise(4, 512, seed=1).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        loss = alignment_loss(prediction, target)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(alignment_loss(prediction.float(), target.float()).item(), abs=1e-7)


def test_the_alignment_head():
    """d → 1024 → 1024 → width with SiLU between, by hand."""
    torch.manual_seed(0)
    head = AlignmentHead(8, 1152)
    shapes = [tuple(p.shape) for p in head.parameters() if p.ndim == 2]
    assert shapes == [(1024, 8), (1024, 1024), (1152, 1024)]
    small = AlignmentHead(4, 6, hidden=5)
    x = noise(3, 4)
    h = x.numpy()
    for i, (weight, bias) in enumerate(zip(*[iter(small.parameters())] * 2, strict=True)):
        h = h / (1 + np.exp(-h)) if i else h
        h = h @ weight.detach().numpy().T + bias.detach().numpy()
    np.testing.assert_allclose(small(x).detach(), h, rtol=1e-5, atol=1e-6)


def test_the_stand_in_teacher():
    """Its features' means, float32 whatever the autocast, frozen."""
    torch.manual_seed(0)
    network = FeatureNetwork(3).eval()
    images = noise(2, 3, 16, 16).requires_grad_()
    target = network.alignment_target(images)
    assert target.shape == (2, FEATURE_WIDTHS[-1]) and target.dtype == torch.float32 and not target.requires_grad
    np.testing.assert_allclose(target, network.features(images)[-1].detach().numpy().mean((2, 3)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(F.linear(target, network.head.weight, network.head.bias), network(images))
    with torch.autocast("cpu", torch.bfloat16):
        coarse = network.alignment_target(images)
    assert coarse.dtype == torch.float32
    torch.testing.assert_close(coarse, target, rtol=0.05, atol=0.05)
