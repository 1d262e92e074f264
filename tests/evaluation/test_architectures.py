"""Feature networks in safetensors files: what may stand in one, and what they give."""

import io
import json
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from detailflow.data.transforms import to_tensor
from detailflow.errors import DetailFlowError
from detailflow.evaluation.architectures import NetworkSettings, ResidualFeatures, build, load_network
from detailflow.evaluation.features import load_extractor

OURS = {"architecture": "detailflow/residual", "width": "2", "num_classes": "5"}


def pictures(count: int, side: int = 32) -> Tensor:
    return torch.randint(256, (count, side, side, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def of(library: str, name: str, classes: int) -> nn.Module:
    """A library's network with random weights."""
    torch.manual_seed(0)
    module = pytest.importorskip(library, reason="needs the packages of detailflow[train]")
    create = module.create_model if library == "timm" else module.models.get_model
    return create(name, num_classes=classes).eval()


def saved(network: nn.Module, file: Path, half: bool = False, **metadata: str) -> str:
    tensors = {name: x.half() if half and x.is_floating_point() else x for name, x in network.state_dict().items()}
    save_file(tensors, file, metadata=metadata)
    return str(file)


class TestResidual:
    def test_features_and_logits_of_any_batch_and_side(self, feature_file: Path):
        network = ResidualFeatures(2, 5).eval()
        network.load_state_dict(load_file(feature_file))
        extractor = load_extractor(str(feature_file))
        assert (
            extractor.name == "tiny.safetensors"
            and extractor.preprocessing == "bytes at their own size, scaled to [-1, 1]"
        )
        for count, side in ((1, 32), (2, 9), (70, 32)):
            with torch.inference_mode():
                features, logits = network(to_tensor(pictures(count, side)))
            found = extractor(pictures(count, side))
            assert found.pool.shape == (count, 8) and found.logits.shape == (count, 5) and found.spatial is None
            torch.testing.assert_close(found.pool, features)
            torch.testing.assert_close(found.logits, logits)

    def test_by_hand(self):
        """Two convolutions, halved; two more added, one, halved; one, halved, two more added; the mean."""
        torch.manual_seed(0)
        network, x = ResidualFeatures(2, 5).eval(), torch.randn(1, 3, 16, 16)

        def block(x: Tensor, name: str) -> Tensor:
            state = network.state_dict()
            mean, var, weight, bias = (
                state[f"{name}.1.{k}"] for k in ("running_mean", "running_var", "weight", "bias")
            )
            x = nn.functional.conv2d(x, state[f"{name}.0.weight"], padding=1)
            x = (x - mean[:, None, None]) / (var + 1e-5).sqrt()[:, None, None] * weight[:, None, None] + bias[
                :, None, None
            ]
            return nn.functional.gelu(x)

        def halved(x: Tensor) -> Tensor:
            return x.unflatten(-1, (-1, 2)).amax(-1).unflatten(-2, (-1, 2)).amax(-2)

        with torch.inference_mode():
            y = halved(block(block(x, "enter.0"), "enter.1"))
            y = halved(block(y + block(block(y, "refine.0.0"), "refine.0.1"), "enter.2"))
            y = halved(block(y, "enter.3"))
            y = (y + block(block(y, "refine.1.0"), "refine.1.1")).mean((2, 3))
            features, logits = network(x)
            torch.testing.assert_close(features, y)
            torch.testing.assert_close(logits, y @ network.head.weight.T + network.head.bias)

    def test_images_that_it_does_not_take(self, feature_file: Path):
        with pytest.raises(
            DetailFlowError, match="tiny.safetensors does not take images of 4×4 pixels: give size in its metadata"
        ):
            load_extractor(str(feature_file))(pictures(2, 4))

    def test_its_fingerprint_is_that_of_weights_and_metadata(self, feature_file: Path, tmp_path: Path):
        network = ResidualFeatures(2, 5)
        network.load_state_dict(load_file(feature_file))
        first = load_extractor(str(feature_file)).fingerprint
        assert load_extractor(saved(network, tmp_path / "a.safetensors", **OURS)).fingerprint == first
        assert load_extractor(saved(network, tmp_path / "b.safetensors", size="16", **OURS)).fingerprint != first
        network.head.bias.data[0] += 1
        assert load_extractor(saved(network, tmp_path / "c.safetensors", **OURS)).fingerprint != first


class TestLibraries:
    def test_timm(self, tmp_path: Path):
        """Pooled features before the last layer, in half precision, at the network's own side and normalisation."""
        network = of("timm", "resnet10t.c3_in1k", 7)
        stored = {"architecture": "timm/resnet10t.c3_in1k", "num_classes": "7", "size": "64"}
        stored |= {"mean": "0.485, 0.456, 0.406", "std": "0.229,0.224,0.225"}
        extractor = load_extractor(saved(network, tmp_path / "a.safetensors", half=True, **stored))
        assert "resized to 64×64" in extractor.preprocessing and "mean (0.485, 0.456, 0.406)" in extractor.preprocessing
        images = pictures(3)
        mean, std = (torch.tensor(x)[:, None, None] for x in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
        x = images.movedim(-1, 1) / 255
        x = (nn.functional.interpolate(x, (64, 64), mode="bicubic", antialias=True) - mean) / std
        with torch.inference_mode():
            maps = network.half().float().forward_features(x)
            logits = network(x)
        found = extractor(images)
        torch.testing.assert_close(found.pool, maps.mean((2, 3)), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.logits, logits, rtol=1e-4, atol=1e-4)

    def test_timm_without_classes(self, tmp_path: Path):
        network = of("timm", "test_vit", 0)
        file = saved(network, tmp_path / "a.safetensors", architecture="timm/test_vit", num_classes="0", size="160")
        found = load_extractor(file)(pictures(2))
        assert found.logits is None and found.pool.shape == (2, network.num_features)
        assert load_network(Path(file)).settings.num_classes == 0

    def test_torchvision(self, tmp_path: Path):
        """The input of the last linear layer."""
        network = of("torchvision", "shufflenet_v2_x0_5", 7)
        stored = {"architecture": "torchvision/shufflenet_v2_x0_5", "num_classes": "7"}
        found = load_extractor(saved(network, tmp_path / "a.safetensors", **stored))(pictures(3))
        with torch.inference_mode():
            logits = network(to_tensor(pictures(3)))
            torch.testing.assert_close(found.logits, logits)
            torch.testing.assert_close(found.pool @ network.fc.weight.T + network.fc.bias, logits)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, "names no architecture in its metadata, such as timm/resnet50"),
        ({"architecture": "resnet50"}, "the architecture must be like timm/resnet50, torchvision/.* not 'resnet50'"),
        (
            {"architecture": "timm/hf-hub:someone/network"},
            "timm has no classification network 'hf-hub:someone/network'",
        ),
        ({"architecture": "timm/local-dir:/tmp"}, "timm has no classification network 'local-dir:/tmp'"),
        ({"architecture": "timm/../resnet50"}, "timm has no classification network"),
        ({"architecture": "torchvision/fasterrcnn_resnet50_fpn"}, "torchvision has no classification network"),
        ({"architecture": "torchvision/squeezenet1_0"}, "cannot be built .it has no linear layer"),
        ({"architecture": "detailflow/large"}, "detailflow has no classification network 'large'"),
        ({**OURS, "width": "3"}, "enter.0.0.weight has shape .2, 3, 3, 3., where the config asks for .3, 3, 3, 3."),
        ({**OURS, "num_classes": "6"}, "head.* has shape .5.*, where the config asks for .6"),
        ({**OURS, "num_classes": "0"}, "num_classes in the metadata must be 1 or more for 'detailflow/residual'"),
        ({**OURS, "num_classes": "1000000000"}, "num_classes in the metadata must be from 0 to 100000, not 1000000000"),
        ({**OURS, "width": "-1"}, "width in the metadata must be from 1 to 1024, not -1"),
        ({**OURS, "width": "own"}, "width in the metadata must be from 1 to 1024, not 'own'"),
        ({**OURS, "width": "2.5"}, "width in the metadata must be from 1 to 1024, not '2.5'"),
        ({**OURS, "size": "5000"}, "size in the metadata must be from 8 to 1024 or own, not 5000"),
        ({**OURS, "size": "٣٢"}, "size in the metadata must be"),
        ({**OURS, "mean": "0.5"}, r"mean in the metadata must be like 0.5, 0.5, 0.5, not \(0.5,\)"),
        ({**OURS, "mean": "[" * 1000}, "mean in the metadata must be like 0.5, 0.5, 0.5"),
        ({**OURS, "std": "0.5, 0.5, nan"}, "std in the metadata must be like"),
        ({**OURS, "std": "0.5, 0.5, 0"}, "std in the metadata must be more than 0"),
        ({**OURS, "sizes": "32"}, "unknown setting 'sizes': did you mean size?"),
        ({"architecture": "timm/vit_giant_patch14_dinov2"}, "the checkpoint does not fit its config: it lacks"),
    ],
)
def test_metadata_that_cannot_be(metadata: dict[str, str], message: str, feature_file: Path, tmp_path: Path):
    save_file(load_file(feature_file), tmp_path / "a.safetensors", metadata=metadata)
    with pytest.raises(DetailFlowError, match=f"a.safetensors.*{message}"):
        load_extractor(str(tmp_path / "a.safetensors"))


def test_tensors_that_do_not_fit(feature_file: Path, tmp_path: Path):
    tensors, file = load_file(feature_file), tmp_path / "a.safetensors"
    for change, message in (
        ({"more": torch.zeros(2)}, "it should not have more"),
        (
            {"enter.0.1.num_batches_tracked": torch.zeros(())},
            "num_batches_tracked is of type torch.float32, and .*'s of torch.int64",
        ),
        ({"enter.0.1.running_mean": torch.zeros(2, dtype=torch.int64)}, "running_mean is of type torch.int64, and"),
        ({"head.bias": torch.zeros(5, dtype=torch.int32)}, "head.bias is of type torch.int32, and"),
    ):
        save_file(tensors | change, file, metadata=OURS)
        with pytest.raises(DetailFlowError, match=f"a.safetensors.*{message}"):
            load_extractor(str(file))
    del tensors["head.bias"]
    save_file(tensors, file, metadata=OURS)
    with pytest.raises(DetailFlowError, match="it lacks head.bias"):
        load_extractor(str(file))


def test_files_that_are_none(tmp_path: Path):
    with pytest.raises(DetailFlowError, match="none.safetensors does not exist or is no file"):
        load_extractor(str(tmp_path / "none.safetensors"))
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(DetailFlowError, match="folder.safetensors does not exist or is no file"):
        load_extractor(str(tmp_path / "folder.safetensors"))
    (tmp_path / "text.safetensors").write_text("no tensors")
    with pytest.raises(DetailFlowError, match="text.safetensors: it is damaged or incomplete"):
        load_extractor(str(tmp_path / "text.safetensors"))


def test_a_small_file_does_not_ask_for_a_large_network(tmp_path: Path):
    """1.1 billion parameters take no memory before tensors of their shapes are there."""
    pytest.importorskip("timm", reason="needs the packages of detailflow[train]")
    network, _ = build(NetworkSettings("timm/vit_giant_patch14_dinov2"), tmp_path / "a.safetensors")
    assert sum(x.numel() for x in network.parameters()) > 1.1e9
    assert all(x.is_meta for x in network.parameters())


class Mean(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c = torch.ones(3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.c).mean((2, 3))


def test_nothing_in_a_file_is_run(tmp_path: Path):
    """An exported program with a pickled constant, under a name at which torch's own loader unpickles: it would run."""
    marker = tmp_path / "executed"

    class Evil:
        def __reduce__(self):
            return Path.mkdir, (marker,)

    content = io.BytesIO()
    torch.export.save(torch.export.export(Mean(), (torch.zeros(2, 3, 8, 8),)), content)
    for name in ("opaque_obj_0", "custom_obj_0"):
        for file in (tmp_path / "evil.pt2", tmp_path / "evil.safetensors"):
            with zipfile.ZipFile(content) as old, zipfile.ZipFile(file, "w") as new:
                for item in old.namelist():
                    text = old.read(item)
                    if item.endswith("constants_config.json"):
                        config = json.loads(text)
                        for entry in config["config"].values():
                            entry["path_name"] = name
                        text = json.dumps(config).encode()
                    new.writestr(item, text)
                folder = old.namelist()[0].split("/")[0]
                new.writestr(f"{folder}/data/constants/{name}", pickle.dumps(Evil()))
        with pytest.raises(
            DetailFlowError, match="evil.pt2 is an exported program, which could run any code and is not read"
        ):
            load_extractor(str(tmp_path / "evil.pt2"))
        with pytest.raises(DetailFlowError, match="evil.safetensors: it is damaged or incomplete"):
            load_extractor(str(tmp_path / "evil.safetensors"))
    assert not marker.exists()
    pickle.loads(pickle.dumps(Evil()))
    assert marker.exists()  # the pickle works
