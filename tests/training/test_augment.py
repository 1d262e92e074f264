import numpy as np
import pytest
import torch

from detailflow.training.augment import DRAWS, diff_augment


def uniform(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def pixels(*shape: int, seed: int = 0) -> torch.Tensor:
    return uniform(*shape, seed=seed) * 2 - 1


def plain(image: np.ndarray, draws: np.ndarray, cutout: float, probability: float) -> np.ndarray:
    """One image (3, H, W), as DiffAugment's authors do it: paper section 3 and the policies of their table 5."""
    colour, translation, cut = draws[:3] < probability
    u = draws[3:]
    _, height, width = image.shape
    image = image.astype(np.float64)
    if colour:
        image = image + (u[0] - 0.5)
        grey = image.mean(0)
        image = (image - grey) * (2 * u[1]) + grey
        image = (image - image.mean()) * (u[2] + 0.5) + image.mean()
    if translation:
        most = [int(size / 8 + 0.5) for size in (height, width)]
        dy, dx = (int(u[3 + i] * (2 * most[i] + 1)) - most[i] for i in range(2))
        padded = np.pad(image, ((0, 0), (height, height), (width, width)))
        image = padded[:, height + dy : 2 * height + dy, width + dx : 2 * width + dx]
    if cut:
        image = image.copy()
        ends = []
        for i, size in enumerate((height, width)):
            length = int(size * cutout + 0.5)
            start = int(u[5 + i] * (size + 1 - length % 2)) - length // 2
            ends.append(slice(max(start, 0), max(start + length, 0)))
        image[:, ends[0], ends[1]] = 0
    return image


@pytest.mark.parametrize(("cutout", "probability"), [(0.2, 0.5), (0.5, 1.0), (0.2, 0.0)])
@pytest.mark.parametrize("shape", [(32, 32), (17, 40)])
def test_each_image_by_hand(shape: tuple[int, int], cutout: float, probability: float):
    images, draws = pixels(24, 3, *shape), uniform(24, DRAWS, seed=1)
    made = diff_augment(images, draws, cutout, probability)
    expected = [plain(i, d, cutout, probability) for i, d in zip(images.numpy(), draws.numpy(), strict=True)]
    np.testing.assert_allclose(made, np.stack(expected), atol=2e-6)
    if not probability:
        assert torch.equal(made, images)


def test_the_defaults_are_the_papers():
    images, draws = pixels(8, 3, 32, 32), uniform(8, DRAWS, seed=1)
    assert torch.equal(diff_augment(images, draws), diff_augment(images, draws, cutout=0.2, probability=0.5))
    assert not torch.equal(diff_augment(images, draws), diff_augment(images, draws, cutout=0.5, probability=0.5))


@pytest.mark.parametrize("policy", range(3))
def test_each_policy_comes_half_of_the_time_and_alone(policy: int):
    draws = torch.full((1000, DRAWS), 0.9)
    draws[:, policy] = uniform(1000)
    images = pixels(1, 3, 16, 16).expand(1000, -1, -1, -1)
    changed = (diff_augment(images, draws) != images).any(3).any(2).any(1)
    assert torch.equal(changed, draws[:, policy] < 0.5)
    assert 0.45 < float(changed.float().mean()) < 0.55


def test_the_ends_of_the_ranges():
    """Shifts reach 4 of 32 both ways and no further; a draw just below 1 stays inside."""
    ramp = torch.arange(1, 33).float().expand(1, 3, 32, 32) / 32
    draws = torch.tensor([[1.0, 0, 1, 0, 0, 0, 0.5, 0, 0, 0]]).repeat(2, 1)
    draws[1, 6:8] = torch.tensor([0.5, 1 - 2**-24])
    left, right = diff_augment(ramp.expand(2, -1, -1, -1), draws)[:, 0, 16] * 32
    assert left.tolist() == [0] * 4 + list(range(1, 29)) and right.tolist() == [*range(5, 33)] + [0] * 4
    corner = torch.tensor([[1.0, 1, 0, 0, 0, 0, 0, 0, 1 - 2**-24, 0]])
    cut = diff_augment(torch.ones(1, 3, 32, 32), corner)[0, 0] == 0
    assert cut.nonzero().amin(0).tolist() == [29, 0] and cut.nonzero().amax(0).tolist() == [
        31,
        2,
    ]  # 6 wide, 3 of it outside


def test_a_share_of_the_batch_is_made_as_in_the_whole():
    images, draws = pixels(8, 3, 16, 16), uniform(8, DRAWS, seed=3)
    whole = diff_augment(images, draws)
    assert torch.equal(torch.cat([diff_augment(images[s], draws[s]) for s in (slice(3), slice(3, 8))]), whole)


def test_gradients_go_back_to_the_images():
    images = pixels(5, 3, 6, 5).double().requires_grad_()
    draws = uniform(5, DRAWS, seed=4).double()
    draws[:, :3] = torch.tensor([[0, 0, 0], [0, 1, 1], [1, 0, 1], [1, 1, 0], [1, 1, 1]])
    assert torch.autograd.gradcheck(lambda x: diff_augment(x, draws), images)
    (gradient,) = torch.autograd.grad(diff_augment(images, draws).sum(), images)
    assert bool((gradient[3] == 0).any()) and bool(
        (gradient[4] == 1).all()
    )  # none through the cut, all through the plain


def test_it_keeps_the_precision():
    images, draws = pixels(4, 3, 16, 16), uniform(4, DRAWS)
    made = diff_augment(images.bfloat16(), draws)
    assert made.dtype == torch.bfloat16
    torch.testing.assert_close(made.float(), diff_augment(images, draws), atol=0.03, rtol=0.03)
