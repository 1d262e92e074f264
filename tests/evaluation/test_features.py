"""The networks of features, with random weights where theirs can't be had."""

import os
import pickle
import socket
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from detailflow.data.transforms import to_tensor
from detailflow.errors import DetailFlowError
from detailflow.evaluation import features
from detailflow.evaluation.features import load_extractor


class Tiny(nn.Module):
    """Six features and four logits of images of any size."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.head = nn.Conv2d(3, 6, 3), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        pool = self.convolution(x).relu().mean((2, 3))
        return pool, self.head(pool)


class Answers(nn.Module):
    """Whatever `answer` makes of the images."""

    def __init__(self, answer) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, x: Tensor):
        return self.answer(x)


def export(network: nn.Module, file: Path, side: int = 8) -> str:
    shapes = ({0: torch.export.Dim("batch")},)
    torch.export.save(torch.export.export(network.eval(), (torch.zeros(2, 3, side, side),), dynamic_shapes=shapes), file)
    return str(file)


def pictures(count: int, side: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (count, side, side, 3), generator=generator, dtype=torch.uint8)


@pytest.fixture(scope="module")
def tiny() -> Tiny:
    torch.manual_seed(0)
    return Tiny().eval()


@pytest.fixture(scope="module")
def program(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> str:
    return export(tiny, tmp_path_factory.mktemp("program") / "tiny.pt2")


class TestExported:
    def test_features_and_logits_of_any_batch(self, tiny: Tiny, program: str):
        extractor = load_extractor(program)
        assert extractor.name == "tiny.pt2"
        for count in (1, 2, 7):
            pool, logits = tiny(to_tensor(pictures(count)))
            found = extractor(pictures(count))
            assert found.spatial is None
            torch.testing.assert_close(found.pool, pool)
            torch.testing.assert_close(found.logits, logits)

    def test_its_fingerprint_is_that_of_the_weights(self, tiny: Tiny, program: str, tmp_path: Path):
        again = load_extractor(export(tiny, tmp_path / "again.pt2"))
        other = load_extractor(export(Tiny(), tmp_path / "other.pt2"))
        assert again.fingerprint == load_extractor(program).fingerprint != other.fingerprint

    def test_features_alone(self, tmp_path: Path):
        found = load_extractor(export(Answers(lambda x: x.mean((2, 3))), tmp_path / "mean.pt2"))(pictures(3))
        assert found.logits is None
        torch.testing.assert_close(found.pool, to_tensor(pictures(3)).mean((2, 3)))

    @pytest.mark.parametrize(
        ("answer", "shapes"),
        [
            (lambda x: x * 2, r"\(5, 3, 8, 8\)"),
            (lambda x: x.mean((0, 2, 3)), r"\(3,\)"),
            (lambda x: {"features": x.mean((2, 3))}, "a dict"),
            (lambda x: (x.mean((2, 3)),) * 3, r"a tuple of \(5, 3\), \(5, 3\), \(5, 3\)"),
        ],
        ids=["maps", "of the batch", "dict", "three"],
    )
    def test_other_outputs(self, answer, shapes: str, tmp_path: Path):
        extractor = load_extractor(export(Answers(answer), tmp_path / "odd.pt2"))
        with pytest.raises(DetailFlowError, match=f"odd.pt2 must map a batch of B images to .*, but gives {shapes} for 5 images"):
            extractor(pictures(5))

    def test_other_sizes(self, program: str):
        with pytest.raises(DetailFlowError, match="tiny.pt2 does not take 3 images of 9×9 pixels: give images of the size"):
            load_extractor(program)(pictures(3, 9))

    def test_files_that_are_none(self, tmp_path: Path):
        with pytest.raises(DetailFlowError, match="none.pt2 does not exist"):
            load_extractor(str(tmp_path / "none.pt2"))
        (tmp_path / "text.pt2").write_text("no zip file")
        with pytest.raises(DetailFlowError, match="text.pt2 is no exported program"):
            load_extractor(str(tmp_path / "text.pt2"))
        torch.save({"a": torch.zeros(3)}, tmp_path / "weights.pt2")
        with pytest.raises(DetailFlowError, match="weights.pt2 can't be read as an exported program"):
            load_extractor(str(tmp_path / "weights.pt2"))

    def test_no_pickle_in_it_is_executed(self, program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        """In the place of each tensor that is stored by torch.save, as a weight that says it is pickled, and as an object."""

        class Evil:
            def __reduce__(self):
                return os.mkdir, (str(tmp_path / "executed"),)

        def forged(name: str, change) -> str:
            path = tmp_path / name
            with zipfile.ZipFile(program) as old, zipfile.ZipFile(path, "w") as new:
                for item in old.namelist():
                    new.writestr(item, change(item, old.read(item)))
                extra = "tiny/data/constants/opaque_obj_0"
                if name == "object.pt2":
                    new.writestr(extra, pickle.dumps(Evil()))
            return str(path)

        torch.save(Evil(), tmp_path / "evil.pt")
        evil = (tmp_path / "evil.pt").read_bytes()
        inputs = forged("inputs.pt2", lambda name, content: evil if name.endswith("sample_inputs/model.pt") else content)
        weights = forged(
            "weights.pt2",
            lambda name, content: (
                evil if "/weights/weight_" in name else content.replace(b'"use_pickle": false', b'"use_pickle": true')
            ),
        )
        for file in (inputs, weights):
            with pytest.raises(DetailFlowError, match="can't be read as an exported program"):
                load_extractor(file)
        with pytest.raises(DetailFlowError, match="object.pt2 holds pickled objects"):
            load_extractor(forged("object.pt2", lambda name, content: content))
        assert not (tmp_path / "executed").exists()
        assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ
        with pytest.raises(FileExistsError):  # the pickle would have worked
            (tmp_path / "executed").mkdir()
            torch.load(tmp_path / "evil.pt", weights_only=False)

    def test_it_has_its_weights(self, program: str):
        with pytest.raises(DetailFlowError, match="holds its own weights: leave out --weights w.pth"):
            load_extractor(program, weights="w.pth")


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
                branch.conv(x), *(branch.bn.state_dict()[k] for k in ("running_mean", "running_var", "weight", "bias")), eps=1e-3
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
        with pytest.raises(DetailFlowError, match="w.pth does not hold .*inception-2015-12-05.*--weights FILE, or another"):
            load_extractor("inception", weights=str(tmp_path / "w.pth"))

        class Evil:
            def __reduce__(self):
                return os.mkdir, (str(tmp_path / "executed"),)

        torch.save({"fc.weight": Evil()}, tmp_path / "evil.pth")
        with pytest.raises(DetailFlowError, match="evil.pth can't be read as .*inception-2015-12-05"):
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
    monkeypatch.setattr("detailflow.hub.fetch", lambda *args: (_ for _ in ()).throw(DetailFlowError("could not download")))


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("name", ["inception", "dinov2"])
def test_weights_that_cannot_be_had(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(features, "DINOV2", "vit_small_patch14_dinov2.lvd142m")  # as nothing but its size differs
    source = "https://github.com/.*6726825d.pth" if name == "inception" else "model.safetensors of timm/vit_.*dinov2"
    with pytest.raises(DetailFlowError) as caught:
        load_extractor(name)
    assert caught.match(f"^--features {name} needs .* can't be downloaded: {source}.* --weights FILE, or .*--features FILE.pt2$")


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
        channels = [Image.fromarray(images[0, :, :, c].float().numpy()).resize((224, 224), Image.BICUBIC) for c in range(3)]
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
        with pytest.raises(DetailFlowError, match="w.pth does not hold model.safetensors of timm/vit_small"):
            load_extractor("dinov2", weights=str(tmp_path / "w.pth"))


def test_other_names():
    with pytest.raises(DetailFlowError, match="must be inception, dinov2 or the path of an exported program"):
        load_extractor("vgg")
