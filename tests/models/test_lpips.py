import copy
import sys
import weakref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detailflow.errors import DetailFlowError
from detailflow.models.lpips import LPIPS, MAPS, SMALLEST_SIDE

WIDTHS = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)
LAYERS = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)  # of those convolutions in torchvision's numbering


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file in the form of torchvision's, with random numbers, and a classifier that takes no room on the disk."""
    pytest.importorskip("torchvision", reason="needs the packages of detailflow[train]")
    pytest.importorskip("torchmetrics", reason="needs the packages of detailflow[train]")
    generator = torch.Generator().manual_seed(0)
    state = {}
    for layer, inputs, outputs in zip(LAYERS, (3, *WIDTHS), WIDTHS, strict=False):
        noise = torch.randn(outputs, inputs, 3, 3, generator=generator)
        state[f"features.{layer}.weight"] = noise * (2 / (9 * inputs)) ** 0.5
        state[f"features.{layer}.bias"] = torch.randn(outputs, generator=generator) * 0.1
    for layer, outputs, inputs in ((0, 4096, 25088), (3, 4096, 4096), (6, 1000, 4096)):
        state[f"classifier.{layer}.weight"] = torch.zeros(1, 1).expand(outputs, inputs)
        state[f"classifier.{layer}.bias"] = torch.zeros(1).expand(outputs)
    folder = tmp_path_factory.mktemp("hub") / "checkpoints"
    folder.mkdir()
    torch.save(state, folder / "vgg16-397923af.pth")
    return folder / "vgg16-397923af.pth"


@pytest.fixture(scope="module")
def lpips(weights: Path) -> LPIPS:
    return LPIPS(str(weights))


def images(*shape: int, seed: int = 0) -> Tensor:
    """Some pixels lie beyond [-1, 1], as those of a decoder do."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.6


def plain(pixels: Tensor, target: Tensor, weights: Path) -> Tensor:
    """LPIPS as its paper's equation 1 has it, one image pair at a time, in float64."""
    import torchmetrics

    state = torch.load(weights, weights_only=True)
    heads = Path(torchmetrics.__file__).parent / "functional" / "image" / "lpips_models" / "vgg.pth"
    linear = torch.load(heads, map_location="cpu", weights_only=True)

    def maps(image: Tensor) -> list[Tensor]:
        shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
        x = ((image - shift.double()[:, None, None]) / scale.double()[:, None, None])[None]
        found = []
        for number, count in enumerate((2, 2, 3, 3, 3)):
            x = F.max_pool2d(x, 2) if number else x
            for layer in LAYERS[sum((2, 2, 3, 3, 3)[:number]) :][:count]:
                kernel, bias = (state[f"features.{layer}.{part}"].double() for part in ("weight", "bias"))
                x = F.conv2d(x, kernel, bias, padding=1).clamp_min(0)
            found.append(x[0])
        return found

    total = torch.zeros((), dtype=torch.float64)
    for a, b in zip(pixels.double(), target.double(), strict=True):
        for number, (p, q) in enumerate(zip(maps(a), maps(b), strict=True)):
            unit = [f / (f.square().sum(0) + 1e-8).sqrt() for f in (p, q)]
            weight = linear[f"lin{number}.model.1.weight"].double().flatten()
            total = total + torch.einsum("chw,c->hw", (unit[0] - unit[1]) ** 2, weight).mean()
    return total / len(pixels)


@pytest.mark.parametrize("side", [SMALLEST_SIDE, 24])
def test_it_is_lpips_in_value_and_gradient(side: int, lpips: LPIPS, weights: Path):
    x, y = images(2, 3, side, side).requires_grad_(), images(2, 3, side, side, seed=1).requires_grad_()
    distance = lpips(x, y)
    distance.backward()
    distance = distance.detach()
    assert distance.ndim == 0 and distance.dtype == torch.float32 and float(distance) > 0.01
    exact = images(2, 3, side, side).requires_grad_()
    expected = plain(exact, y.detach(), weights)
    expected.backward()
    assert float(distance) == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(x.grad, exact.grad, rtol=1e-3, atol=1e-4 * float(exact.grad.abs().max()))
    assert y.grad is None
    assert lpips(x, x).item() == 0


def test_torchmetrics_says_the_same_of_pixels_that_it_takes(lpips: LPIPS, weights: Path):
    from torchmetrics.functional.image.lpips import learned_perceptual_image_patch_similarity

    x, y = images(3, 3, 32, 32).clamp(-1, 1), images(3, 3, 32, 32, seed=1).clamp(-1, 1)
    before = torch.hub.get_dir()
    torch.hub.set_dir(weights.parents[1])
    try:
        theirs = learned_perceptual_image_patch_similarity(x, y, net_type="vgg", normalize=False)
    finally:
        torch.hub.set_dir(before)
    assert float(lpips(x, y)) == pytest.approx(float(theirs), rel=1e-5)


def test_corrected_images_have_the_targets_of_the_clean_ones(lpips: LPIPS):
    x, y = images(5, 3, 16, 16), images(3, 3, 16, 16, seed=1)
    assert float(lpips(x, y)) == pytest.approx(float(lpips(x, torch.cat((y, y[:2])))), rel=1e-6)
    assert float(lpips(x, y)) != pytest.approx(float(lpips(x, torch.cat((y, y[1:])))), rel=1e-4)


def test_each_images_own_distance(lpips: LPIPS):
    x, y = torch.rand(2, 3, 3, 32, 32) * 2 - 1
    each = torch.stack([lpips(a, b) for a, b in zip(x.split(1), y.split(1), strict=True)])
    torch.testing.assert_close(lpips.distances(x, y), each)
    torch.testing.assert_close(lpips(x, y), each.mean())


def test_it_is_frozen_and_keeps_nothing_of_a_step(lpips: LPIPS):
    before = {k: v.clone() for k, v in lpips.state_dict().items()}
    x, y = images(1, 3, 16, 16).requires_grad_(), images(1, 3, 16, 16, seed=9)
    lpips(x, y).backward()
    kept = [weakref.ref(x), weakref.ref(y)]
    del x, y
    assert [k() for k in kept] == [None, None]
    assert not any(p.requires_grad or p.grad is not None for p in lpips.parameters()) and not lpips.training
    assert all(torch.equal(v, before[k]) for k, v in lpips.state_dict().items())
    assert sum(v.numel() for v in lpips.state_dict().values()) == 14_714_688 + 64 + 128 + 256 + 512 + 512


def test_under_autocast_only_the_features_are_coarse(lpips: LPIPS):
    """The rest is computed in float32: nearby images would drown in rounding otherwise."""
    x = images(2, 3, 16, 16).requires_grad_()
    y = x.detach() + 0.03 * images(2, 3, 16, 16, seed=1)
    maps: list[Tensor] = []
    hooks = [lpips.layers[i].register_forward_hook(lambda _, __, out: maps.append(out.detach().double())) for i in MAPS]
    with torch.autocast("cpu", torch.bfloat16):
        distance = lpips(x, y)
    for hook in hooks:
        hook.remove()
    distance.backward()
    expected = 0.0
    for b, a, head in zip(maps[:5], maps[5:], lpips.heads, strict=True):  # the target comes first
        unit = [f / (f.square().sum(1, keepdim=True) + 1e-8).sqrt() for f in (a, b)]
        expected += ((unit[0] - unit[1]) ** 2 * head.double()).sum(1).mean().item()
    assert all(torch.equal(f, f.bfloat16().double()) for f in maps)
    assert distance.dtype == torch.float32 and distance.item() == pytest.approx(expected, rel=1e-5)
    assert x.grad.dtype == torch.float32 and bool(x.grad.isfinite().all()) and float(x.grad.abs().max()) > 0


def test_features_that_are_all_zero_have_a_finite_gradient(lpips: LPIPS):
    dead = copy.deepcopy(lpips)
    with torch.no_grad():
        for layer in dead.layers:
            if isinstance(layer, nn.Conv2d):
                layer.bias.fill_(-100)
    x = images(1, 3, 16, 16).requires_grad_()
    distance = dead(x, images(1, 3, 16, 16, seed=1))
    distance.backward()
    assert distance.item() == 0 and float(x.grad.abs().max()) == 0


def test_what_is_missing_is_said_in_one_sentence(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    damaged, other, short = (tmp_path / name for name in ("damaged.pth", "other.pth", "short.pth"))
    damaged.write_bytes(weights.read_bytes()[:1000])
    torch.save({"features.0.weight": torch.zeros(3)}, other)
    torch.save([1, 2], short)
    for path in (tmp_path / "none.pth", damaged, other, short, tmp_path):
        with pytest.raises(DetailFlowError, match="LPIPS needs VGG-16's weights") as caught:
            LPIPS(str(path), instead="or go without")
        message = str(caught.value)
        assert str(path) in message and "vgg16-397923af.pth" in message and "\n" not in message
        assert message.endswith(", or go without")

    def fail(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    before = torch.hub.get_dir()
    torch.hub.set_dir(tmp_path / "hub")
    try:
        with pytest.raises(
            DetailFlowError, match="cannot be downloaded: get https.*vgg16-397923af.pth and give its path as weights$"
        ):
            LPIPS()
    finally:
        torch.hub.set_dir(before)


def test_without_a_file_it_comes_from_the_hub_cache(weights: Path, lpips: LPIPS):
    before = torch.hub.get_dir()
    torch.hub.set_dir(weights.parents[1])
    try:
        ours = LPIPS()
    finally:
        torch.hub.set_dir(before)
    assert all(torch.equal(v, lpips.state_dict()[k]) for k, v in ours.state_dict().items())


@pytest.mark.parametrize("package", ["torchvision", "torchmetrics"])
def test_a_missing_package_is_named(package: str, weights: Path, monkeypatch: pytest.MonkeyPatch):
    for name in {package, f"{package}.models"}:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        DetailFlowError, match=rf"needs the package {package}: install it with pip install 'detailflow\[train\]'"
    ):
        LPIPS(str(weights))
