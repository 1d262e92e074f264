"""The published checkpoint layout: safe reading and translation (docs/method.md#published-layout)."""

import argparse
import copy
import json
import os
import shutil
import tracemalloc
import zipfile
from pathlib import Path

import pytest
import torch

from detailflow import DetailFlowGPT, DetailFlowPipeline, DetailFlowTokenizer, hub
from detailflow.convert import convert
from detailflow.errors import DetailFlowError
from detailflow.published import is_published, load_published

TINY = Path(__file__).parent / "parity" / "tiny-32"


class Malicious:
    """Pickles into a call of `os.system`."""

    def __init__(self, command: str):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    return Path(shutil.copytree(TINY / "tokenizer", tmp_path / "tokenizer"))


@pytest.fixture
def gpt(tmp_path: Path) -> Path:
    return Path(shutil.copytree(TINY / "gpt", tmp_path / "gpt"))


def stored(directory: Path) -> dict:
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(directory / "checkpoints" / "32.pt", weights_only=True)


def edit_config(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def error_of(directory: Path, kind: str, variant: str = "ema") -> str:
    with pytest.raises(DetailFlowError) as caught:
        load_published(directory, kind, variant)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def tower_shapes(prefix: str, width: int, mlp: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {f"{prefix}.pos_embed": (256, width)}
    norms = [f"{prefix}.norm"] + [f"{prefix}.blocks.{i}.norm{j}" for i in (0, 1) for j in (1, 2)]
    shapes |= {f"{norm}.{part}": (width,) for norm in norms for part in ("weight", "bias")}
    linears = {
        "attn.qkv": (3 * width, width),
        "attn.proj": (width, width),
        "mlp.fc1": (mlp, width),
        "mlp.fc2": (width, mlp),
    }
    for i in (0, 1):
        for name, shape in linears.items():
            shapes[f"{prefix}.blocks.{i}.{name}.weight"] = shape
            shapes[f"{prefix}.blocks.{i}.{name}.bias"] = shape[:1]
    return shapes


def test_tokenizer_in_our_names():
    config, tensors = load_published(TINY / "tokenizer", "tokenizer")
    assert config == {
        "image_size": 64,
        "patch_size": 16,
        "num_tokens": 32,
        "group_size": 8,
        "causal_tokens": 8,
        "alpha": 1.5,
        "codebook_size": 512,
        "codebook_dim": 8,
        "encoder": {"width": 128, "depth": 2, "heads": 2, "mlp": 344},
        "decoder": {"width": 64, "depth": 2, "heads": 1, "mlp": 256},
    }
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        **tower_shapes("encoder", 128, 344),
        **tower_shapes("decoder", 64, 256),
        "encoder.patch_embed.weight": (128, 768),
        "encoder.patch_embed.bias": (128,),
        "encoder.query_tokens": (32, 128),
        "encoder.refined_tokens": (32, 128),
        "encoder.query_pos_embed": (32, 128),
        "encoder.refine.weight": (128, 8),
        "encoder.refine.bias": (128,),
        "quantizer.project.weight": (8, 128),
        "quantizer.project.bias": (8,),
        "quantizer.codebook": (512, 8),
        "decoder.project.weight": (64, 8),
        "decoder.project.bias": (64,),
        "decoder.latent_pos_embed": (32, 64),
        "decoder.mask_token": (64,),
        "decoder.to_pixels.weight": (768, 64),
        "decoder.to_pixels.bias": (768,),
    }
    model = stored(TINY / "tokenizer")["model"]
    layer = "encoder.visual_model.encoder.layers.1."
    key = model[f"{layer}self_attn.k_proj.weight"]
    assert torch.equal(tensors["encoder.blocks.1.attn.qkv.weight"][128:256], key)
    assert torch.equal(tensors["encoder.blocks.1.norm2.bias"], model[f"{layer}layer_norm2.bias"])
    assert torch.equal(tensors["encoder.query_tokens"], model["encoder.latent_tokens"][0])
    assert torch.equal(tensors["encoder.query_pos_embed"], model["encoder.latent_pos_embed"][0])


def test_gpt_in_our_names():
    config, tensors = load_published(TINY / "gpt", "gpt")
    assert config == {
        "num_classes": 10,
        "num_tokens": 32,
        "group_size": 8,
        "causal_tokens": 8,
        "codebook_size": 512,
        "width": 64,
        "depth": 2,
        "heads": 2,
        "mlp": 256,
        "dropout": 0.1,
        "rope_base": 10000.0,
        "class_names": None,
        "guidance_scale": 1.5,
        "guidance_schedule": "constant",
        "temperature": 1.0,
        "top_k": None,
        "top_p": None,
    }
    expected: dict[str, tuple[int, ...]] = {
        "class_embedding.weight": (11, 64),
        "token_embedding.weight": (512, 64),
        "mask_embedding.weight": (7, 64),
        "norm.weight": (64,),
        "head.weight": (512, 64),
    }
    for i in (0, 1):
        expected |= {
            f"blocks.{i}.attn_norm.weight": (64,),
            f"blocks.{i}.attn.qkv.weight": (192, 64),
            f"blocks.{i}.attn.proj.weight": (64, 64),
            f"blocks.{i}.mlp_norm.weight": (64,),
            f"blocks.{i}.mlp.gate.weight": (256, 64),
            f"blocks.{i}.mlp.up.weight": (256, 64),
            f"blocks.{i}.mlp.down.weight": (64, 256),
        }
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == expected
    ema = stored(TINY / "gpt")["ema"]
    assert torch.equal(tensors["blocks.0.mlp.gate.weight"], ema["layers.0.feed_forward.w1.weight"])
    assert torch.equal(tensors["blocks.0.mlp.up.weight"], ema["layers.0.feed_forward.w3.weight"])


def test_variants():
    ema = load_published(TINY / "gpt", "gpt", "ema")[1]
    model = load_published(TINY / "gpt", "gpt", "model")[1]
    assert torch.equal(model["head.weight"] * 2, ema["head.weight"])


def test_model_weights_where_there_is_no_ema(gpt: Path):
    checkpoint = stored(gpt)
    del checkpoint["ema"]
    torch.save(checkpoint, gpt / "checkpoints" / "32.pt")
    assert torch.equal(load_published(gpt, "gpt", "ema")[1]["head.weight"], checkpoint["model"]["output.weight"])


def test_training_leftovers_are_dropped(tokenizer: Path):
    checkpoint = stored(tokenizer)
    checkpoint["model"]["repa_model.layers.0.weight"] = torch.zeros(2)
    checkpoint["model"]["global_token_proj.0.bias"] = torch.zeros(2)
    checkpoint["model"]["quantize.codebook_used"] = torch.zeros(5, dtype=torch.int64)
    torch.save(checkpoint, tokenizer / "checkpoints" / "32.pt")
    config, tensors = load_published(tokenizer, "tokenizer")
    expected_config, expected = load_published(TINY / "tokenizer", "tokenizer")
    assert config == expected_config and tensors.keys() == expected.keys()


def test_tensors_do_not_depend_on_the_file(tokenizer: Path):
    tensors = load_published(tokenizer, "tokenizer")[1]
    expected = load_published(TINY / "tokenizer", "tokenizer")[1]
    path = tokenizer / "checkpoints" / "32.pt"
    path.write_bytes(b"\xff" * path.stat().st_size)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in expected.items())


def test_layout_is_recognised(tmp_path: Path):
    assert is_published(TINY / "gpt")
    assert not is_published(tmp_path)


@pytest.mark.parametrize("stray", ["empty", "checkpoint"])
def test_our_layout_with_a_folder_called_checkpoints(stray: str, model: Path, tmp_path: Path):
    """The config says which layout it is."""
    for kind in ("tokenizer", "gpt"):
        folder = shutil.copytree(model / kind, tmp_path / kind) / "checkpoints"
        folder.mkdir()
        if stray == "checkpoint":
            shutil.copy(TINY / kind / "checkpoints" / "32.pt", folder / "16.pt")
        assert not is_published(tmp_path / kind)
    loaded = DetailFlowPipeline.from_pretrained(tmp_path, device="cpu")
    assert loaded.gpt.config.num_tokens == 16
    convert(tmp_path, tmp_path / "converted")
    assert hub.load_config(tmp_path / "converted" / "gpt", "gpt")["num_tokens"] == 16
    with pytest.raises(DetailFlowError, match="already holds a model in the other layout"):
        convert(TINY / "gpt", tmp_path / "gpt", to="published")


def test_a_config_of_another_format_beside_checkpoints(gpt: Path):
    edit_config(gpt, format="other")
    with pytest.raises(
        DetailFlowError, match='config.json is not a DetailFlow config: it lacks "format": "detailflow"'
    ):
        hub.load(gpt, "gpt")


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("place", ["args", "model"])
def test_code_in_a_pickle_is_refused_by_name(gpt: Path, zipped: bool, place: str):
    evidence = gpt / "executed"
    checkpoint = stored(gpt)
    checkpoint[place] = Malicious(f"touch {evidence}")
    torch.save(checkpoint, gpt / "checkpoints" / "32.pt", _use_new_zipfile_serialization=zipped)
    message = error_of(gpt, "gpt")
    assert f"{os.name}.system" in message and "32.pt" in message
    assert not evidence.exists()


def test_a_namespace_cannot_smuggle_code(gpt: Path):
    evidence = gpt / "executed"
    checkpoint = stored(gpt)
    checkpoint["args"] = argparse.Namespace(nested=[Malicious(f"touch {evidence}")])
    torch.save(checkpoint, gpt / "checkpoints" / "32.pt")
    assert "system" in error_of(gpt, "gpt")
    assert not evidence.exists()


def test_a_namespace_with_special_attributes_is_inert_data(gpt: Path):
    checkpoint = stored(gpt)
    vars(checkpoint["args"]).update(__setstate__="a", __class__="b", __getattr__="c", __del__="d")
    torch.save(checkpoint, gpt / "checkpoints" / "32.pt")
    assert load_published(gpt, "gpt")[1].keys() == load_published(TINY / "gpt", "gpt")[1].keys()


@pytest.mark.parametrize("size", [0, 100, 200_000, 1_590_000])
def test_truncated_checkpoint(gpt: Path, size: int):
    path = gpt / "checkpoints" / "32.pt"
    path.write_bytes(path.read_bytes()[:size])
    assert "32.pt: it is damaged" in error_of(gpt, "gpt")


@pytest.mark.parametrize("content", [b"hello world" * 20, b"<html>404</html>", b"\x80\x05K\x01."])
def test_a_file_that_is_no_checkpoint(gpt: Path, content: bytes):
    (gpt / "checkpoints" / "32.pt").write_bytes(content)
    assert "32.pt: it is damaged" in error_of(gpt, "gpt")


def test_a_zip_that_is_no_checkpoint(gpt: Path):
    with zipfile.ZipFile(gpt / "checkpoints" / "32.pt", "w") as archive:
        archive.writestr("readme.txt", "hello")
    assert "32.pt: it is damaged" in error_of(gpt, "gpt")


@pytest.mark.parametrize("member", ["data.pkl", "data/0"])
def test_compressed_members_are_not_unpacked(gpt: Path, member: str):
    """A file of a few kilobytes that would take 64 MB of memory."""
    path = gpt / "checkpoints" / "32.pt"
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            packed = name.endswith(member)
            content += bytes(2**26) if packed else b""
            archive.writestr(name, content, zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED)
    tracemalloc.start()
    try:
        assert "32.pt: its members are compressed or overlap" in error_of(gpt, "gpt")
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()


def test_members_that_share_their_bytes_are_not_read(gpt: Path):
    path = gpt / "checkpoints" / "32.pt"
    with zipfile.ZipFile(path, "a") as archive:
        largest = max(archive.infolist(), key=lambda member: member.file_size)
        for i in range(100):
            again = copy.copy(largest)
            again.filename = f"archive/data/{1000 + i}"
            archive.filelist.append(again)
        archive._didModify = True
    assert "32.pt: its members are compressed or overlap" in error_of(gpt, "gpt")


@pytest.mark.parametrize("content", [{"steps": 3}, {"model": {}}, {"model": [1]}, [1, 2], 7], ids=str)
def test_a_checkpoint_without_weights(gpt: Path, content: object):
    torch.save(content, gpt / "checkpoints" / "32.pt")
    assert "holds no model weights" in error_of(gpt, "gpt")


@pytest.mark.parametrize("value", ["text", torch.zeros(3, dtype=torch.int64), torch.zeros(3, device="meta")], ids=repr)
def test_a_state_dict_with_something_else_inside(gpt: Path, value: object):
    checkpoint = stored(gpt)
    checkpoint["ema"]["norm.weight"] = value
    torch.save(checkpoint, gpt / "checkpoints" / "32.pt")
    assert "norm.weight in" in error_of(gpt, "gpt")


def test_missing_and_unexpected_tensors(gpt: Path):
    checkpoint = stored(gpt)
    del checkpoint["ema"]["norm.weight"], checkpoint["ema"]["layers.1.attention.wo.weight"]
    torch.save(checkpoint, gpt / "checkpoints" / "32.pt")
    assert "lacks layers.1.attention.wo.weight, norm.weight" in error_of(gpt, "gpt")
    checkpoint = stored(TINY / "gpt")
    checkpoint["ema"] |= {f"extra{i}": torch.zeros(1) for i in range(5)}
    torch.save(checkpoint, gpt / "checkpoints" / "32.pt")
    assert "has the unexpected extra0, extra1, extra2 and 2 more" in error_of(gpt, "gpt")


def test_a_gap_in_the_layers(gpt: Path):
    checkpoint = stored(gpt)
    checkpoint["ema"] = {
        name.replace("layers.1.", "layers.9.", 1): tensor for name, tensor in checkpoint["ema"].items()
    }
    torch.save(checkpoint, gpt / "checkpoints" / "32.pt")
    assert "lacks layers.1." in error_of(gpt, "gpt")


def test_queries_and_keys_of_different_shapes(tokenizer: Path):
    checkpoint = stored(tokenizer)
    checkpoint["model"]["encoder.visual_model.encoder.layers.0.self_attn.k_proj.weight"] = torch.zeros(3, 4)
    torch.save(checkpoint, tokenizer / "checkpoints" / "32.pt")
    assert "k_proj.weight (3, 4)" in error_of(tokenizer, "tokenizer")


def test_wrong_kind_names_both():
    message = error_of(TINY / "tokenizer", "gpt")
    assert "holds a tokenizer, not an AR model" in message
    message = error_of(TINY / "gpt", "tokenizer")
    assert "holds an AR model (gpt), not a tokenizer" in message


def test_choice_among_checkpoints(gpt: Path):
    folder = gpt / "checkpoints"
    (folder / "7.pt").write_bytes(b"not looked at")
    load_published(gpt, "gpt")
    (folder / "32.pt").rename(folder / "other.pt")
    assert "several checkpoints (7.pt, other.pt)" in error_of(gpt, "gpt")
    (folder / "7.pt").unlink()
    load_published(gpt, "gpt")
    (folder / "other.pt").unlink()
    assert "expected 32.pt" in error_of(gpt, "gpt")


def test_alpha_comes_from_the_training_arguments(tokenizer: Path):
    (tokenizer / "config.yaml").write_text("degradation_power: 2\n")
    assert load_published(tokenizer, "tokenizer")[0]["alpha"] == 2.0
    (tokenizer / "config.yaml").unlink()
    assert load_published(tokenizer, "tokenizer")[0]["alpha"] == 1.5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("degradation_power: steep\n", "degradation_power in"),
        ("a: b: c\n", "not valid YAML"),
        ("a: !!python/object/apply:os.system ['false']\n", "not valid YAML"),
        ("- 1\n", "'name: value' lines"),
    ],
)
def test_bad_training_arguments(tokenizer: Path, text: str, message: str):
    (tokenizer / "config.yaml").write_text(text)
    assert message in error_of(tokenizer, "tokenizer")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1,}', "is not valid JSON"),
        ("", "is not valid JSON"),
        ("[1]", "must hold a JSON object"),
        ("[" * 100_000, "is not valid JSON"),
        ('{"a": 1}', "neither num_latent_tokens nor block_size"),
    ],
    ids=["comma", "empty", "list", "deep", "other"],
)
def test_bad_config(tokenizer: Path, text: str, message: str):
    (tokenizer / "config.json").write_text(text)
    assert message in error_of(tokenizer, "tokenizer")


def test_config_that_is_not_text(tokenizer: Path):
    (tokenizer / "config.json").write_bytes(b'{"a": "\xff"}')
    assert "is not valid JSON (UTF-8 text" in error_of(tokenizer, "tokenizer")


@pytest.mark.parametrize("value", ["32", 0, True, None, 1.5])
def test_bad_number_in_config(tokenizer: Path, value: object):
    edit_config(tokenizer, num_latent_tokens=value)
    assert "num_latent_tokens in" in error_of(tokenizer, "tokenizer")


@pytest.mark.parametrize(
    ("kind", "key", "value", "ours"),
    [("tokenizer", "num_latent_tokens", 64, "num_tokens"), ("tokenizer", "codebook_size", 16, "codebook_size"),
     ("gpt", "group_size", 4, "group_size"), ("gpt", "vocab_size", 16, "codebook_size"),
     ("gpt", "num_classes", 9, "num_classes")],
)  # fmt: skip
def test_a_number_in_the_config_that_is_not_that_of_the_weights(
    tmp_path: Path, kind: str, key: str, value: int, ours: str
):
    folder = Path(shutil.copytree(TINY / kind, tmp_path / kind))
    edit_config(folder, **{key: value})
    loader = {"tokenizer": DetailFlowTokenizer, "gpt": DetailFlowGPT}[kind]
    with pytest.raises(DetailFlowError) as caught:
        loader.from_pretrained(folder)
    name = ours if key == ours else f"{ours} (in the published layout {key})"
    assert str(caught.value).endswith(f" by its {name}")


def test_missing_config(tokenizer: Path):
    (tokenizer / "config.json").unlink()
    assert "has no config.json" in error_of(tokenizer, "tokenizer")


def test_missing_number_in_config(gpt: Path):
    path = gpt / "config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "n_head"}))
    assert "lacks 'n_head'" in error_of(gpt, "gpt")
