"""Every loss term against NumPy, where its gradients stop, and one whole step against the public contract."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from detailflow.data.images import open_images
from detailflow.data.transforms import center_crop, coarse_target, to_tensor
from detailflow.models.layers import ViTConfig
from detailflow.models.tokenizer import TokenizerConfig
from detailflow.training.adversary import AugmentationNoise
from detailflow.training.config import LoopConfig, TokenizerTraining
from detailflow.training.losses import (
    discriminator_loss,
    generator_loss,
    perceptual_loss,
    quantization_loss,
    straight_through,
)
from detailflow.training.passes import draw_count, draw_position
from detailflow.training.tokenizer import TokenizerStage


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def as_bytes(images: torch.Tensor) -> torch.Tensor:
    """(B, 3, R, R) in [-1, 1] → (B, R, R, 3), as the loader gives them."""
    return ((images + 1) * 127.5).round().to(torch.uint8).movedim(1, -1)


# ------------------------------------------------------------------------------------------------- the terms


def test_quantization_loss():
    z, q = noise(3, 5, 4, seed=1).requires_grad_(), noise(3, 5, 4, seed=2).requires_grad_()
    loss = quantization_loss(z, q, 0.25)
    difference = (q - z).detach().numpy()
    assert float(loss.detach()) == pytest.approx(1.25 * (difference**2).mean(), rel=1e-6)
    loss.backward()
    np.testing.assert_allclose(q.grad, 2 * difference / difference.size, rtol=1e-5)  # moves the codes with weight 1
    np.testing.assert_allclose(z.grad, -0.25 * 2 * difference / difference.size, rtol=1e-5)  # and the latents with 0.25


def test_straight_through():
    z, q = noise(3, 4, seed=1).requires_grad_(), noise(3, 4, seed=2).requires_grad_()
    out = straight_through(z, q)
    torch.testing.assert_close(out, q)
    weight = noise(3, 4, seed=3)
    (out * weight).sum().backward()
    assert torch.equal(z.grad, weight)
    assert q.grad is None


def test_perceptual_loss():
    ours = [noise(2, 6, 4, 4, seed=1), noise(2, 8, 2, 2, seed=2)]
    theirs = [noise(2, 6, 4, 4, seed=3), noise(2, 8, 2, 2, seed=4)]
    expected = 0.0
    for a, b in zip(ours, theirs, strict=True):
        a, b = a.numpy(), b.numpy()
        a, b = a / np.linalg.norm(a, axis=1, keepdims=True), b / np.linalg.norm(b, axis=1, keepdims=True)
        expected += ((a - b) ** 2).sum(1).mean()
    assert float(perceptual_loss(ours, theirs)) == pytest.approx(expected, rel=1e-5)
    assert float(perceptual_loss(ours, [3 * a for a in ours])) == pytest.approx(
        0, abs=1e-6
    )  # directions count, lengths don't


def test_hinge_losses():
    real, fake = noise(2, 1, 8, 8, seed=1) * 2, noise(2, 1, 8, 8, seed=2) * 2
    expected = (np.maximum(0, 1 - real.numpy()) + np.maximum(0, 1 + fake.numpy())).mean() / 2
    assert float(discriminator_loss(real, fake)) == pytest.approx(expected, rel=1e-6)
    assert float(discriminator_loss(real, torch.cat((fake, fake)))) == pytest.approx(
        expected, rel=1e-6
    )  # whatever their number
    assert float(generator_loss(fake)) == pytest.approx(-fake.numpy().mean(), rel=1e-5)


# ------------------------------------------------------------------------------------------------- one step


@pytest.fixture(scope="module")
def images(cifar: Path) -> torch.Tensor:
    source = open_images(cifar)
    return torch.stack([to_tensor(center_crop(source.image(i * 10), 32)) for i in range(6)])


def stage(cifar: Path, output: Path, **settings: object) -> TokenizerStage:
    """A step changes nothing that is looked at afterwards: the learning rate is as good as 0."""
    model = TokenizerConfig(
        ViTConfig(32, 2, 2), ViTConfig(32, 1, 2), image_size=32, patch_size=4, num_tokens=16, group_size=4,
        causal_tokens=8, codebook_size=64, codebook_dim=4,
    )  # fmt: skip
    loop = LoopConfig(steps=10, batch_size=6, learning_rate=1e-30, precision="fp32")
    values: dict = dict(adversarial=0.0, revive_every=0) | settings
    return TokenizerStage(
        TokenizerTraining("images", model, loop, **values), open_images(cifar), output, torch.device("cpu")
    )


def find_seed(made: TokenizerStage, t: int, position: int | None) -> int:
    """A seed whose draws are `t` and `position`."""
    schedule = made.model.schedule
    for seed in range(20000):
        torch.manual_seed(seed)
        if draw_count(schedule, made.config.coarse_probability) == t and draw_position(schedule, t) == position:
            return seed
    raise AssertionError("no such draw")


@pytest.mark.parametrize(("t", "position"), [(16, 0), (16, 5), (16, 8), (12, 7), (8, 7), (3, 2), (1, None)])
def test_a_step_is_what_the_public_contract_says(
    t: int, position: int | None, cifar: Path, images: torch.Tensor, tmp_path: Path
):
    """docs/method.md#losses, the pixel and quantization terms: clean and corrected, both decoded from t tokens."""
    made = stage(cifar, tmp_path, coarse_probability=0.9)
    model, schedule = made.model, made.model.schedule
    seed = find_seed(made, t, position)

    sequences = [model.encode(images)]
    z = model.encode_latents(model.encode_patches(images), 16).detach()
    pairs = [(z, model.quantizer.lookup(sequences[0]).detach())]
    if position is not None:
        end = position + 1 if position < 8 else position + 4
        torch.manual_seed(seed)
        draw_count(schedule, 0.9), draw_position(schedule, t)
        wrong = model.plant_mistakes(z[:, position:end])
        sequences.append(model.encode_correction(images, position=position, wrong_tokens=wrong))
        latents = model.correct_latents(model.encode_patches(images), sequences[1], end).detach()[:, end:]
        pairs.append((latents, model.quantizer.lookup(sequences[1][:, end:]).detach()))
    side, resolution = schedule.decode_size(t), schedule.resolution(t)
    target = coarse_target(images, resolution, side).numpy()
    made_pixels = [model.decode(ids[:, :t], size=side).numpy() for ids in sequences]
    pixel = np.mean([((p - target) ** 2).mean() for p in made_pixels])
    squares = np.concatenate([((q - a) ** 2).numpy().ravel() for a, q in pairs])  # joined: weighted by token counts

    torch.manual_seed(seed)
    scalars = made.step(0, (as_bytes(images), torch.zeros(6)), 1e-30)
    assert float(scalars["pixel"].detach()) == pytest.approx(pixel, rel=1e-4)
    assert float(scalars["quantization"].detach()) == pytest.approx(1.25 * squares.mean(), rel=1e-4)
    assert float(scalars["loss"]) == pytest.approx(pixel + 1.25 * squares.mean(), rel=1e-4)
    psnr = (10 * np.log10(4 / ((made_pixels[0].clip(-1, 1) - target) ** 2).mean((1, 2, 3)))).mean()
    assert float(scalars["psnr"]) == pytest.approx(psnr, rel=1e-4)


def test_the_coarse_target():
    """Area means by hand where the resolution divides the size, and the image itself at full resolution."""
    x = noise(2, 3, 8, 8)
    assert torch.equal(coarse_target(x, 8, 8), x)
    means = x.numpy().reshape(2, 3, 2, 4, 2, 4).mean((3, 5))
    np.testing.assert_allclose(coarse_target(x, 2, 2), means, atol=1e-6)
    flat = coarse_target(x, 1, 4)
    np.testing.assert_allclose(flat, np.broadcast_to(x.numpy().mean((2, 3), keepdims=True), flat.shape), atol=1e-6)


def test_where_the_correction_pass_stops_gradients(cifar: Path, images: torch.Tensor, tmp_path: Path):
    made = stage(cifar, tmp_path)
    model, position = made.model, 8
    encoder, codebook = model.encoder, model.quantizer.codebook

    def gradients(of: torch.Tensor) -> dict[str, bool]:
        """Which weights `of` depends on."""
        weights = {
            "query_tokens": encoder.query_tokens,
            "refined_tokens": encoder.refined_tokens,
            "refine": encoder.refine.weight,
            "patch_embed": encoder.patch_embed.weight,
            "codebook": codebook,
        }
        if not of.requires_grad:
            return dict.fromkeys(weights, False)
        found = torch.autograd.grad(
            of.square().mul(noise(*of.shape)).sum(), list(weights.values()), retain_graph=True, allow_unused=True
        )
        return {name: g is not None and bool(g.abs().max() > 0) for name, g in zip(weights, found, strict=True)}

    encoded = made.networks.encode(images, position, torch.zeros(6, 4, dtype=torch.int64))
    clean, sequence = encoded.sequences
    of_clean = dict(query_tokens=True, refined_tokens=False, refine=False, patch_embed=True, codebook=False)
    assert gradients(clean) == gradients(sequence[:, :position]) == of_clean
    assert not any(gradients(sequence[:, position : position + 4]).values())  # the wrong tokens are given
    corrected = sequence[:, position + 4 :]
    # nothing goes back through the codes that the correction pass is given
    assert gradients(corrected) == dict(
        query_tokens=False, refined_tokens=True, refine=True, patch_embed=True, codebook=False
    )
    assert gradients(encoded.codes[0])["codebook"] and gradients(encoded.codes[1])["codebook"]
    assert gradients(encoded.latents[1]) == gradients(corrected)


@pytest.mark.parametrize("mistakes", [1, 5, 64])
def test_mistakes_are_of_so_many_nearest_codes(mistakes: int, cifar: Path, images: torch.Tensor, tmp_path: Path):
    """Of one, the token stays as it is; of K, any code comes up."""
    made = stage(cifar, tmp_path, mistakes=mistakes, coarse_probability=0.0)
    model, seen = made.model, []
    clean = model.encode(images)
    z = model.encode_latents(model.encode_patches(images), 16).detach()
    allowed = model.quantizer.nearest_k(z, mistakes)
    correct_latents = model.correct_latents

    def spy(patches: object, given: torch.Tensor, end: int) -> torch.Tensor:
        seen.append(given)
        return correct_latents(patches, given, end)

    model.correct_latents = spy
    for seed in range(40):
        torch.manual_seed(seed)
        made.step(0, (as_bytes(images), torch.zeros(6)), 1e-30)
    assert all((allowed == given[..., None]).any(-1).all() for given in seen)
    changed = torch.stack([given != clean for given in seen]).float().mean()
    assert bool(changed) == (mistakes > 1)
    ranks = {int(r) for given in seen for r in (allowed == given[..., None]).int().argmax(-1).flatten()}
    assert max(ranks) >= mistakes * 0.8 - 1


def test_a_share_of_the_batch_is_corrected(cifar: Path, images: torch.Tensor, tmp_path: Path):
    seen = []
    for share in (0.5, 0.0):
        made = stage(cifar, tmp_path, correction_share=share)
        torch.manual_seed(find_seed(made, 16, 4))
        made.networks.register_forward_hook(lambda _, given, passes: seen.append(passes))
        made.step(0, (as_bytes(images), torch.zeros(6)), 1e-30)
    half, none = seen
    assert half.corrected == 3 and len(half.pixels) == 9 and none.corrected == 0 and len(none.pixels) == 6
    assert [tuple(z.shape) for z in half.latents] == [(6, 16, 4), (3, 11, 4)]


def test_the_other_terms_enter_with_their_weights(cifar: Path, images: torch.Tensor, tmp_path: Path):
    made = stage(cifar, tmp_path, perceptual=0.3, classifier_epochs=1, adversarial=0.7, adversarial_from=0.5, pixel=2.0)
    assert (tmp_path / "features.pt").exists()
    early, late = ({k: float(v) for k, v in made.step(s, (as_bytes(images), None), 1e-30).items()} for s in (4, 5))
    assert "adversarial" not in early and "discriminator" not in early
    for scalars in (early, late):
        total = 2 * scalars["pixel"] + scalars["quantization"] + 0.3 * scalars["perceptual"]
        assert scalars["loss"] == pytest.approx(total + 0.7 * scalars.get("adversarial", 0.0), rel=1e-5)
    assert late["discriminator"] == pytest.approx(1.0, abs=0.3)  # untrained: it says about 0 to everything


def test_the_whole_objective(cifar: Path, images: torch.Tensor, tmp_path: Path):
    """All terms of docs/method.md#losses with their weights, the perceptual one while it rises; alignment by hand."""
    stand_ins = dict(perceptual=0.3, perceptual_warmup=8, classifier_epochs=1, alignment=0.4)
    adversarial = dict(adversarial=0.7, adversarial_from=3, augment=True, lecam=0.1, consistency=2.0)
    made = stage(cifar, tmp_path, coarse_probability=0.0, **stand_ins, **adversarial)
    teacher, head, model = made.teachers.features, made.networks.head, made.model
    assert teacher is made.teachers.alignment and head is not None
    first = model.quantizer.lookup(model.encode(images)[:, 0])  # the straight-through value is the code's
    made_of_it, wanted = (
        head(first).detach().double().numpy(),
        teacher.features(images)[-1].mean((2, 3)).double().numpy(),
    )
    cosine = (made_of_it * wanted).sum(1) / np.linalg.norm(made_of_it, axis=1) / np.linalg.norm(wanted, axis=1)
    for step in (2, 6, 9):
        scalars = {k: float(v) for k, v in made.step(step, (as_bytes(images), None), 1e-30).items()}
        assert scalars["alignment"] == pytest.approx(-cosine.mean(), rel=1e-4)
        weights = dict(pixel=1.0, quantization=1.0, perceptual=0.3 * min(1, step / 8), alignment=0.4, adversarial=0.7)
        total = sum(weight * scalars.get(name, 0.0) for name, weight in weights.items())
        assert scalars["loss"] == pytest.approx(total, rel=1e-5)
        later = {"adversarial", "discriminator", "lecam", "consistency", "discriminator_gradient_norm"}
        assert (later <= scalars.keys()) == (step >= 3) and math.isfinite(scalars["gradient_norm"])


def test_the_codebook_is_counted(cifar: Path, images: torch.Tensor, tmp_path: Path):
    made = stage(cifar, tmp_path)
    scalars = made.step(0, (as_bytes(images), None), 1e-30)
    counts = np.bincount(made.model.encode(images).flatten(), minlength=64)
    shares = counts[counts > 0] / counts.sum()
    assert float(scalars["codebook_usage"]) == pytest.approx((counts > 0).mean())
    assert float(scalars["codebook_perplexity"]) == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-5)


def test_the_feature_network_stays_frozen_and_the_judge_learns_apart(cifar: Path, images: torch.Tensor, tmp_path: Path):
    made = stage(cifar, tmp_path, perceptual=0.3, classifier_epochs=1, adversarial=0.7, adversarial_from=0.0)
    frozen = made.teachers.features
    assert frozen is not None and not any(p.requires_grad for p in frozen.parameters())
    features = {k: v.clone() for k, v in frozen.state_dict().items()}
    judge = {k: v.clone() for k, v in made.adversary.network.named_parameters()}
    model = {k: v.clone() for k, v in made.model.named_parameters()}
    made.step(0, (as_bytes(images), None), 1e-2)
    assert all(torch.equal(v, features[k]) for k, v in frozen.state_dict().items())
    assert any(not torch.equal(v, judge[k]) for k, v in made.adversary.network.named_parameters())
    assert any(not torch.equal(v, model[k]) for k, v in made.model.named_parameters())
    before = {k: v.clone() for k, v in made.model.named_parameters()}
    made.adversary.step([(images, torch.cat((images.flip(0), images[:4])), AugmentationNoise.make(6))], 1e-2)
    assert all(torch.equal(v, before[k]) and v.grad is None for k, v in made.model.named_parameters())


def test_unused_codes_move_to_latents(cifar: Path, images: torch.Tensor, tmp_path: Path):
    made = stage(cifar, tmp_path, revive_every=2)
    codebook = made.model.quantizer.codebook
    before = codebook.detach().clone()
    made.counts[:10] = 1
    z, norm = F.normalize(noise(2, 16, 4), dim=-1), torch.tensor(1.0)
    assert [made._counts_end(step) for step in range(4)] == [False, True, False, True]  # every second step
    made._revive(0, [z], norm)
    assert torch.equal(codebook, before)
    made._revive(1, [z], norm)
    assert torch.equal(codebook[:10], before[:10])
    distance = (codebook[10:, None].detach() - z.reshape(1, -1, 4)).norm(dim=-1).amin(1)
    assert float(distance.max()) < 1e-6 and not made.counts.any()
    moved = codebook.detach().clone()
    made._revive(9, [z], norm)  # the second half of the run leaves them alone
    assert torch.equal(codebook, moved)
