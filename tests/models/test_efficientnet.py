"""EfficientNet-Lite0 from its package: the same numbers as other implementations, and the classes of photographs."""

import re
from importlib import metadata
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from detailflow.data.images import open_images
from detailflow.data.transforms import center_crop, to_tensor
from detailflow.errors import DetailFlowError
from detailflow.models.efficientnet import (
    CHANNELS,
    DEPTHS,
    PACKAGE,
    SMALLEST_SIDE,
    STAGES,
    EfficientNetLite0,
    find_weights,
    fold_batch_norms,
    layer_names,
)
from detailflow.torch_files import load_torch

IMAGES = Path(__file__).parents[1] / "data" / "images" / "photographs.parquet"


@pytest.fixture(scope="module")
def network() -> EfficientNetLite0:
    try:
        return EfficientNetLite0.from_package("a test")
    except DetailFlowError:
        pytest.skip("needs the packages of detailflow[train]")


@pytest.fixture(scope="module")
def photographs() -> Tensor:
    """(20, 3, 224, 224), the centre of every 50th class of ImageNet's."""
    pytest.importorskip("datasets", reason="needs the packages of detailflow[train]")
    source = open_images(IMAGES)
    return torch.stack([to_tensor(center_crop(source.image(i), 256))[:, 16:240, 16:240] for i in range(len(source))])


def timm_names(name: str) -> str:
    """Return timm's name for one of the package's tensors."""
    for theirs, timms in (("_conv_stem", "conv_stem"), ("_conv_head", "conv_head"), ("_fc", "classifier")):
        if name.startswith(theirs):
            return name.replace(theirs, timms)
    if match := re.fullmatch(r"_bn([01])\.(\w+)", name):
        return f"bn{int(match[1]) + 1}.{match[2]}"
    _, number, layer, rest = name.split(".")
    places = [(stage, block) for stage, (repeats, *_) in enumerate(STAGES) for block in range(repeats)]
    stage, block = places[int(number)]
    layers = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2"}
    layers |= {"_project_conv": "conv_pwl", "_bn2": "bn3"}
    if not stage:  # which does not expand
        layers |= {"_project_conv": "conv_pw", "_bn1": "bn1", "_bn2": "bn2"}
    return f"blocks.{stage}.{block}.{layers[layer]}.{rest}"


@torch.no_grad()
def test_features_are_those_of_timms_network(network: EfficientNetLite0, photographs: Tensor):
    timm = pytest.importorskip("timm", reason="needs the packages of detailflow[train]")
    theirs = timm.create_model("tf_efficientnet_lite0").eval()
    stored = load_torch(find_weights("a test"))
    theirs.load_state_dict({timm_names(name): tensor for name, tensor in stored.items()})
    for x in (photographs[:4], photographs[:2, :, :150, :97]):
        assert all(
            torch.allclose(a, b, rtol=1e-3, atol=1e-3)
            for a, b in zip(network.features(x), theirs.forward_intermediates(x)[1], strict=True)
        )
        torch.testing.assert_close(network.pool(x), theirs.forward_head(theirs.forward_features(x), True))
        torch.testing.assert_close(network(x), theirs(x), rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_features_are_those_of_the_packages_authors(network: EfficientNetLite0, photographs: Tensor):
    package = pytest.importorskip("efficientnet_lite_pytorch", reason="the package of the authors' network")
    theirs = package.EfficientNet.from_name("efficientnet-lite0").eval()
    theirs.load_state_dict(load_torch(find_weights("a test")))
    x = photographs[:4]
    torch.testing.assert_close(network.pool(x), theirs.extract_features(x).mean((2, 3)), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(network(x), theirs(x), rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_it_recognises_photographs(network: EfficientNetLite0, photographs: Tensor):
    right = network(photographs).topk(5).indices == torch.arange(0, 1000, 50)[:, None]
    assert int(right[:, 0].sum()) >= 14 and int(right.any(1).sum()) >= 17  # 75% and 92% of all validation images


def test_maps_of_any_size(network: EfficientNetLite0, photographs: Tensor):
    for side in (8, 32, SMALLEST_SIDE, 80):
        x = F.interpolate(photographs[:2], (side, side), mode="area")
        large = max(side, SMALLEST_SIDE)
        shapes = [(2, c, -(-large // 2**i), -(-large // 2**i)) for i, c in enumerate(CHANNELS, 1)]
        assert [tuple(m.shape) for m in network.features(x)] == shapes and len(DEPTHS) == len(CHANNELS)
    x = F.interpolate(photographs[:2], (32, 32), mode="area")
    enlarged = F.interpolate(x, (SMALLEST_SIDE, SMALLEST_SIDE), mode="bicubic")
    assert all(torch.equal(a, b) for a, b in zip(network.features(x), network.features(enlarged), strict=True))
    target = network.alignment_target(x)
    assert target.shape == (2, network.width) and target.dtype == torch.float32
    torch.testing.assert_close(target, network.features(x)[-1].mean((2, 3)))


def test_it_is_frozen_and_images_get_gradients(network: EfficientNetLite0, photographs: Tensor):
    x = photographs[:1, :, :64, :64].clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        maps = network.features(x)
    assert {m.dtype for m in maps} == {torch.float32}  # slower in bfloat16 on a CPU
    sum(m.square().mean() for m in maps).backward()
    assert float(x.grad.abs().max()) > 0 and not network.training
    assert all(p.grad is None and not p.requires_grad for p in network.parameters())


def test_what_is_missing_is_said_in_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def missing(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "files", missing)
    with pytest.raises(
        DetailFlowError, match=f"^the loss needs the package {PACKAGE}: .*detailflow\\[train\\].*, or not$"
    ):
        EfficientNetLite0.from_package("the loss", "or not")
    assert EfficientNetLite0.from_package("the loss", load=False).classifier.out_features == 1000
    monkeypatch.setattr(metadata, "files", lambda name: [])
    with pytest.raises(DetailFlowError, match="which has none: install it again"):
        find_weights("the loss")


def test_damaged_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "weights.pth"
    monkeypatch.setattr("detailflow.models.efficientnet.find_weights", lambda *_: path)
    for content in (b"PK\3\4", b"", b"\x80\x02cos\nsystem\n(S'touch executed'\ntR."):
        path.write_bytes(content)
        with pytest.raises(DetailFlowError, match=f"{re.escape(str(path))} is damaged: install {PACKAGE} again"):
            EfficientNetLite0.from_package("a test")
    torch.save({"_fc.weight": torch.zeros(2, 2)}, path)
    with pytest.raises(DetailFlowError, match=r"weights.pth is damaged"):
        EfficientNetLite0.from_package("a test")


def test_batch_norms_are_folded():
    """Of a layer with numbers that show a mistake."""
    generator = torch.Generator().manual_seed(0)
    network = EfficientNetLite0()
    stored = {}
    for ours, convolution, norm in layer_names():
        shape = network.state_dict()[f"{ours}.weight"].shape
        stored[f"{convolution}.weight"] = torch.randn(shape, generator=generator)
        for name in ("weight", "bias", "running_mean", "running_var"):
            stored[f"{norm}.{name}"] = torch.rand(shape[0], generator=generator) + 0.5
    stored |= {"_fc.weight": torch.zeros(1000, 1280), "_fc.bias": torch.zeros(1000)}
    folded = fold_batch_norms(stored)
    assert folded.keys() == network.state_dict().keys()
    x = torch.randn(1, 3, 8, 8, generator=generator)
    y = F.batch_norm(
        F.conv2d(x, stored["_conv_stem.weight"]),
        *(stored[f"_bn0.{name}"] for name in ("running_mean", "running_var", "weight", "bias")),
        eps=1e-3,
    )
    torch.testing.assert_close(F.conv2d(x, folded["stem.weight"], folded["stem.bias"]), y, rtol=1e-4, atol=1e-4)
