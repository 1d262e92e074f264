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
from detailflow.evaluation.features import ResidualFeatures, load_extractor

OURS = {"architecture": "detailflow/residual"}


def pictures(count: int, side: int = 32) -> Tensor:
    return torch.randint(256, (count, side, side, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def saved(network: nn.Module, file: Path, **metadata: str) -> str:
    save_file(network.state_dict(), file, metadata=metadata)
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
            DetailFlowError, match="the feature network takes images of 8 pixels a side or more, not 4×4"
        ):
            load_extractor(str(feature_file))(pictures(2, 4))

    def test_its_fingerprint_is_that_of_weights_and_metadata(self, feature_file: Path, tmp_path: Path):
        network = ResidualFeatures(2, 5)
        network.load_state_dict(load_file(feature_file))
        first = load_extractor(str(feature_file)).fingerprint
        stored = {**OURS, "width": "2", "num_classes": "5"}
        assert load_extractor(saved(network, tmp_path / "a.safetensors", **stored)).fingerprint == first
        assert load_extractor(saved(network, tmp_path / "b.safetensors", **OURS)).fingerprint != first
        network.head.bias.data[0] += 1
        assert load_extractor(saved(network, tmp_path / "c.safetensors", **stored)).fingerprint != first


def test_half_precision_is_computed_in_float32(feature_file: Path, tmp_path: Path):
    tensors = {name: x.half() if x.is_floating_point() else x for name, x in load_file(feature_file).items()}
    save_file(tensors, tmp_path / "a.safetensors", metadata=OURS)
    found, whole = (load_extractor(str(file))(pictures(3)) for file in (tmp_path / "a.safetensors", feature_file))
    assert found.pool.dtype == torch.float32
    torch.testing.assert_close(found.pool, whole.pool, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    "metadata",
    [{}, {"architecture": "timm/resnet50"}, {**OURS, "size": "64"}, {**OURS, "mean": "0.5"}, {**OURS, "std": "[" * 99}],
)
def test_metadata_that_cannot_be(metadata: dict[str, str], feature_file: Path, tmp_path: Path):
    save_file(load_file(feature_file), tmp_path / "a.safetensors", metadata=metadata)
    with pytest.raises(
        DetailFlowError, match="a.safetensors is not a feature network that is known: its metadata must"
    ):
        load_extractor(str(tmp_path / "a.safetensors"))


def test_tensors_that_do_not_fit(feature_file: Path, tmp_path: Path):
    tensors, file = load_file(feature_file), tmp_path / "a.safetensors"
    for change, message in (
        ({"more": torch.zeros(2)}, "it should not have more"),
        ({"head.bias": torch.zeros(6)}, "head.weight has shape .5, 8., and the config asks for .6, 8."),
        ({"enter.0.1.weight": torch.zeros(10**6)}, "has shape"),  # whose network would have 10^14 numbers
        ({"enter.0.1.weight": torch.zeros(())}, "has shape"),
    ):
        save_file(tensors | change, file, metadata=OURS)
        with pytest.raises(DetailFlowError, match=f"a.safetensors.*{message}"):
            load_extractor(str(file))
    del tensors["head.bias"]
    save_file(tensors, file, metadata=OURS)
    with pytest.raises(DetailFlowError, match="it lacks head.bias"):
        load_extractor(str(file))


def test_files_that_are_none(tmp_path: Path):
    with pytest.raises(DetailFlowError, match="none.safetensors does not exist or is not a file"):
        load_extractor(str(tmp_path / "none.safetensors"))
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(DetailFlowError, match="folder.safetensors does not exist or is not a file"):
        load_extractor(str(tmp_path / "folder.safetensors"))
    (tmp_path / "text.safetensors").write_text("no tensors")
    with pytest.raises(DetailFlowError, match="text.safetensors: it is damaged or incomplete"):
        load_extractor(str(tmp_path / "text.safetensors"))


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
