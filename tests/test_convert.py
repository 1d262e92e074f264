"""From the published layout to ours and back."""

import argparse
import errno
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from detailflow import DetailFlowGPT, DetailFlowPipeline, DetailFlowTokenizer, GPTConfig
from detailflow.cli.main import main
from detailflow.convert import convert
from detailflow.errors import DetailFlowError
from detailflow.hub import packaged_folder

TINY = Path(__file__).parent / "parity" / "tiny-32"


def checkpoint(folder: Path) -> dict:
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(folder / "checkpoints" / "32.pt", weights_only=True)


def error_of(*arguments: object, **options: object) -> str:
    with pytest.raises(DetailFlowError) as caught:
        convert(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    assert convert(TINY, tmp_path / "ours") == {k: tmp_path / "ours" / k for k in ("tokenizer", "gpt")}
    return tmp_path / "ours"


def test_there_and_back_bit_for_bit(ours: Path, tmp_path: Path):
    assert sorted(p.name for p in (ours / "gpt").iterdir()) == ["config.json", "model.safetensors"]
    convert(ours, tmp_path / "back", to="published")
    for kind, variant in (("tokenizer", "model"), ("gpt", "ema")):
        first, last = TINY / kind, tmp_path / "back" / kind
        before, after = checkpoint(first)[variant], checkpoint(last)["model"]
        kept = {name for name in before if name != "quantize.codebook_used"}
        assert after.keys() == kept
        for name in kept:
            assert after[name].dtype == before[name].dtype and torch.equal(after[name], before[name]), name
        assert json.loads((last / "config.json").read_text()) == json.loads((first / "config.json").read_text())
        assert (last / "config.yaml").read_text() == (first / "config.yaml").read_text()
    assert checkpoint(tmp_path / "back" / "gpt").keys() == {"model", "ema"}  # no optimizer
    convert(tmp_path / "back", tmp_path / "again")
    for kind in ("tokenizer", "gpt"):
        for file in ("config.json", "model.safetensors"):
            assert (tmp_path / "again" / kind / file).read_bytes() == (ours / kind / file).read_bytes()


def test_every_path_gives_the_same_tokens(ours: Path, tmp_path: Path):
    convert(ours, tmp_path / "shards", shard_size="100KB")
    assert len(list((tmp_path / "shards" / "gpt").glob("model-*-of-*.safetensors"))) > 2
    convert(ours, tmp_path / "back", to="published")
    convert(TINY / "gpt" / "checkpoints" / "32.pt", tmp_path / "single")
    images, classes = torch.rand(2, 3, 64, 64) * 2 - 1, torch.tensor([1, 10])
    codes = DetailFlowTokenizer.from_pretrained(TINY).encode(images)
    tokens = DetailFlowGPT.from_pretrained(TINY).generate(classes, temperature=0, guidance_scale=2.0)
    for folder in (ours, tmp_path / "shards", tmp_path / "back"):
        pipeline = DetailFlowPipeline.from_pretrained(folder, device="cpu")
        assert torch.equal(pipeline.tokenizer.encode(images), codes)
        assert torch.equal(pipeline.gpt.generate(classes, temperature=0, guidance_scale=2.0), tokens)
    single = DetailFlowGPT.from_pretrained(tmp_path / "single")
    assert torch.equal(single.generate(classes, temperature=0, guidance_scale=2.0), tokens)


def test_raw_weights_and_bfloat16(tmp_path: Path):
    convert(TINY / "gpt", tmp_path / "raw", variant="model", dtype=torch.bfloat16)
    half = DetailFlowGPT.from_pretrained(tmp_path / "raw", dtype=torch.bfloat16).head.weight
    assert torch.equal(half, checkpoint(TINY / "gpt")["model"]["output.weight"].bfloat16())
    assert (tmp_path / "raw" / "model.safetensors").stat().st_size < 420_000  # two bytes a weight


def test_a_model_that_never_was_published(pipeline: DetailFlowPipeline, model: Path, tmp_path: Path):
    convert(model / "gpt", tmp_path / "gpt", to="published")
    again = DetailFlowGPT.from_pretrained(tmp_path / "gpt")
    classes = torch.tensor([0, 4])
    wanted = pipeline.gpt.generate(classes, temperature=0, guidance_scale=2.0)
    assert torch.equal(again.generate(classes, temperature=0, guidance_scale=2.0), wanted)
    message = error_of(model / "tokenizer", tmp_path / "tokenizer", to="published")
    assert message == (
        "the published layout cannot hold this tokenizer: there, width 32 means 1 heads, and this encoder has 2"
    )
    assert not (tmp_path / "tokenizer").exists()


def test_what_the_published_layout_has_no_place_for(
    model: Path, ours: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    own = Path(shutil.copytree(model / "gpt", tmp_path / "own"))
    config = json.loads((own / "config.json").read_text())
    changes = {"class_names": [f"c{i}" for i in range(config["num_classes"])], "guidance_scale": 3.5, "top_k": 9}
    (own / "config.json").write_text(json.dumps(config | changes))
    convert(own, tmp_path / "lossy", to="published")
    lost = "class_names, guidance_scale (3.5), top_k (9)"
    message = f"{tmp_path / 'lossy'}: the published layout has no place for {lost}: keep the original for them"
    assert caplog.messages == [message]
    folder = tmp_path / "lossy"
    card, read = (folder / "README.md").read_text(), DetailFlowGPT.from_pretrained(folder).config
    assert "| gpt | top_k | null |" in card and f"| gpt | guidance_scale | {read.guidance_scale} |" in card
    caplog.clear()
    convert(ours, tmp_path / "back", to="published")  # what once was published loses nothing
    assert caplog.messages == []


def test_both_variants_of_the_weights(ours: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO")
    for variant, message in (
        ("ema", "of its two sets of weights the EMA ones are converted: --variant model takes the others"),
        ("model", "of its two sets of weights the raw ones are converted: --variant ema takes the others"),
    ):
        caplog.clear()
        convert(TINY / "gpt", tmp_path / variant, variant=variant)
        assert caplog.messages == [message]
    caplog.clear()
    convert(ours, tmp_path / "back", to="published")
    convert(tmp_path / "back", tmp_path / "again")  # one set, under both names
    convert(TINY / "tokenizer", tmp_path / "tokenizer")
    assert caplog.messages == []


def test_weights_on_no_device_are_no_second_set(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO")
    shutil.copytree(TINY / "gpt", tmp_path / "gpt")
    content = checkpoint(tmp_path / "gpt")
    content["model"] = {name: tensor.to("meta") for name, tensor in content["model"].items()}
    torch.save(content, tmp_path / "gpt" / "checkpoints" / "32.pt")
    convert(tmp_path / "gpt", tmp_path / "converted")
    assert caplog.messages == []
    assert "is not a tensor of floating-point weights" in error_of(tmp_path / "gpt", tmp_path / "raw", variant="model")


@pytest.mark.parametrize(
    ("kind", "changes", "what"),
    [
        ("tokenizer", {"causal_tokens": 0}, "causal_tokens of 0"),
        ("gpt", {"causal_tokens": 0}, "causal_tokens of 0"),
        ("tokenizer", {"causal_encoder": False}, "an encoder without a causal mask"),
    ],
)
def test_models_of_the_ablation_are_refused(kind: str, changes: dict, what: str, model: Path, tmp_path: Path):
    other = Path(shutil.copytree(model / kind, tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | changes))
    message = error_of(other, tmp_path / "x", to="published")
    assert message == f"the published layout cannot hold a model with {what}: keep it in ours"
    assert not (tmp_path / "x").exists()
    convert(other, tmp_path / "ours")
    written = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert {key: written[key] for key in changes} == changes


def test_a_model_without_classes_is_refused(tmp_path: Path):
    """It was written, and could not be read."""
    DetailFlowGPT(GPTConfig(num_classes=0, width=64, depth=1, heads=1, codebook_size=64)).save_pretrained(
        tmp_path / "a"
    )
    message = error_of(tmp_path / "a", tmp_path / "x", to="published")
    assert message == "the published layout cannot hold a model with no classes: keep it in ours"
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("to", ["detailflow", "published"])
def test_only_whole_models_are_converted(to: str, model: Path, tmp_path: Path):
    broken = Path(shutil.copytree(model / "gpt", tmp_path / "broken"))
    tensors = load_file(broken / "model.safetensors")
    del tensors["norm.weight"]
    save_file(tensors, broken / "model.safetensors")
    assert "it lacks norm.weight" in error_of(broken, tmp_path / "x", to=to)
    config = json.loads((model / "gpt" / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"codebook_size": 32}))
    shutil.copy(model / "gpt" / "model.safetensors", broken)
    assert "has shape (64, 32), and the config asks for (32, 32)" in error_of(broken, tmp_path / "x", to=to)
    assert not (tmp_path / "x").exists()


def test_a_config_with_defaults_left_out(model: Path, tmp_path: Path):
    short = Path(shutil.copytree(model / "gpt", tmp_path / "short"))
    config = json.loads((short / "config.json").read_text())
    for key in ("causal_tokens", "mlp", "rope_base", "dropout"):
        del config[key]
    (short / "config.json").write_text(json.dumps(config | {"mlp": 64, "published": "what?"}))
    convert(short, tmp_path / "published", to="published")
    assert DetailFlowGPT.from_pretrained(tmp_path / "published").config.causal_tokens == 4


def test_the_card(ours: Path, tmp_path: Path):
    from huggingface_hub import ModelCard

    card = ModelCard.load(ours / "README.md")
    assert card.data.library_name == "detailflow" and card.data.pipeline_tag == "unconditional-image-generation"
    assert f'DetailFlowPipeline.from_pretrained("OWNER/{ours.name}")' in card.text and "2505.21473" in card.text
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_text("my words")
    convert(TINY / "tokenizer", tmp_path / "mine")
    assert (tmp_path / "mine" / "README.md").read_text() == "my words"
    assert card.data.tags == ["detailflow", "image-tokenizer", "class-conditional"]
    convert(ours, ours, dtype=torch.bfloat16)
    assert (ours / "gpt" / "model.safetensors").stat().st_size < 420_000


def test_what_cannot_be_converted(ours: Path, tmp_path: Path):
    assert "already holds a model in the other layout" in error_of(TINY / "gpt", ours / "gpt", to="published")
    assert "holds an AR model (gpt), not a tokenizer" in error_of(TINY / "tokenizer", ours / "gpt")
    assert "already holds a model, which would hide a pair inside" in error_of(TINY, ours / "gpt")
    (tmp_path / "half" / "checkpoints").mkdir(parents=True)  # of a conversion that was interrupted
    assert "already holds a model in the other layout" in error_of(TINY / "gpt", tmp_path / "half")
    convert(TINY / "gpt", tmp_path / "half", to="published")
    assert error_of(TINY, tmp_path / "x", to="onnx") == "the layout must be detailflow or published, not 'onnx'"
    assert error_of(tmp_path / "nowhere", tmp_path / "x").startswith("there is no such folder")
    (tmp_path / "empty").mkdir()
    assert "has no config.json" in error_of(tmp_path / "empty", tmp_path / "x")
    (tmp_path / "file").write_text("")
    assert "could not write the model" in error_of(TINY, tmp_path / "file")
    assert "could not write the model" in error_of(TINY, tmp_path / "file", to="published")
    assert not (tmp_path / "x").exists()
    convert(TINY, tmp_path / "pair")
    config = (tmp_path / "pair" / "gpt" / "config.json").read_bytes()
    assert f"which another would hide: give {tmp_path / 'pair' / 'gpt'}" in error_of(TINY / "gpt", tmp_path / "pair")
    assert not (tmp_path / "pair" / "config.json").exists()
    (tmp_path / "pair" / "gpt" / "run.yaml").write_text("kind: gpt")  # as of a finished run
    (tmp_path / "pair" / "gpt" / "resume").mkdir()
    assert "holds a training run, whose model this would replace" in error_of(TINY, tmp_path / "pair")
    assert (tmp_path / "pair" / "gpt" / "config.json").read_bytes() == config


def content(folder: Path) -> dict[str, bytes]:
    """Return the names and bytes of all files in a folder and those inside."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("to", ["detailflow", "published"])
def test_of_a_pair_both_are_written_or_none(to: str, ours: Path, tmp_path: Path):
    broken, output = Path(shutil.copytree(ours, tmp_path / "broken")), tmp_path / "output"
    put(float("nan"), "head.weight", broken / "gpt")
    assert "head.weight has values that are not finite" in error_of(broken, output, to=to)
    assert not output.exists()
    convert(ours, output, to=to)
    before = content(output)
    assert "head.weight has values that are not finite" in error_of(broken, output, to=to)
    assert content(output) == before

    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "gpt").write_text("a file")
    assert f"could not write the model to {tmp_path / 'taken' / 'gpt'}: " in error_of(ours, tmp_path / "taken", to=to)
    assert content(tmp_path / "taken") == {"gpt": b"a file"} and len(list((tmp_path / "taken").iterdir())) == 1


def test_a_pair_is_saved_whole_or_not_at_all(pipeline: DetailFlowPipeline, tmp_path: Path):
    (tmp_path / "gpt").write_text("a file")
    with pytest.raises(DetailFlowError, match="could not write the model to .*gpt: "):
        pipeline.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["gpt"]


def test_a_full_disk_leaves_the_pair_that_was_there(ours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    output = Path(shutil.copytree(ours, tmp_path / "output"))
    before, real = content(output), save_file

    def full(tensors: dict, path: Path, **options: object) -> None:
        if "head.weight" in tensors:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(tensors, path, **options)

    monkeypatch.setattr("detailflow.tensors.save_file", full)
    assert "No space left on device" in error_of(TINY, output, dtype=torch.bfloat16)
    assert content(output) == before


@pytest.mark.parametrize("failing", range(4))  # two files of each model
def test_a_disk_that_turns_out_to_be_full(failing: int, ours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """All files are on the disk before the first is put in place."""
    output = Path(shutil.copytree(ours, tmp_path / "output"))
    before, real, calls = content(output), os.fsync, []

    def full(file: int) -> None:
        calls.append(file)
        if len(calls) > failing:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(file)

    monkeypatch.setattr(os, "fsync", full)
    assert "No space left on device" in error_of(TINY, output, dtype=torch.bfloat16)
    assert len(calls) == failing + 1 and content(output) == before


def test_a_folder_in_the_place_of_the_card(tmp_path: Path):
    (tmp_path / "out" / "README.md").mkdir(parents=True)
    message = f"cannot write {tmp_path / 'out' / 'README.md'}: it is a folder, not a file"
    assert error_of(TINY, tmp_path / "out") == message
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["README.md"]


NOT_UTF8 = os.fsdecode(b"q\xfe")  # no name of a folder on macOS


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
@pytest.mark.parametrize("to", ["detailflow", "published"])
def test_a_path_that_is_not_utf8(to: str, ours: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    why = "its path is not valid UTF-8, and PyTorch reads no weights there: rename it, or choose another folder"
    output, shown = tmp_path / NOT_UTF8, tmp_path / "q\N{REPLACEMENT CHARACTER}"
    assert main(["convert", str(ours), "--output", str(output), "--to", to]) == 2
    assert capsys.readouterr().err == f"detailflow: error: cannot write to {shown}: {why}\n"
    assert error_of(ours / "gpt", output, to=to) == f"could not write the model to {shown}: {why}"
    assert not output.exists()
    convert(ours, tmp_path / "sound", to=to)
    (tmp_path / "sound").rename(output)
    assert main(["generate", "--model", str(output), "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"detailflow: error: could not read {shown / 'tokenizer'}") and error.endswith(f": {why}\n")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_no_model_is_trained_where_it_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    data = Path(__file__).parent / "data" / "images"
    for command in (["train"], ["train", "tokenizer", "--config", "small-32/tokenizer"]):
        assert main([*command, "--data", str(data), "--output", str(tmp_path / NOT_UTF8)]) == 2
        assert "its path is not valid UTF-8" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("to", ["detailflow", "published"])
def test_half_a_character_in_a_config(to: str, model: Path, tmp_path: Path):
    own = Path(shutil.copytree(model / "gpt", tmp_path / "own"))
    config = json.loads((own / "config.json").read_text()) | {"tokenizer": "\ud800", "class_names": [*"abcd", "\udfff"]}
    (own / "config.json").write_text(json.dumps(config))
    convert(own, tmp_path / "out", to=to)
    if to == "detailflow":
        assert json.loads((tmp_path / "out" / "config.json").read_text()) == config


def put(value: float, name: str, folder: Path) -> None:
    """Write one number of a model's weights anew."""
    tensors = load_file(folder / "model.safetensors")
    tensors[name].view(-1)[0] = value
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("name", ["decoder.to_pixels.weight", "head.weight"])
def test_damaged_weights_are_not_used(name: str, ours: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Those of a decoder drew black images."""
    put(float("nan"), name, ours / ("gpt" if name.startswith("head") else "tokenizer"))
    assert main(["generate", "--model", str(ours), "--output", str(tmp_path / "out")]) == 2
    assert f"{name} has values that are not finite in float32: the weights are damaged" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_weights_too_large_for_a_type(ours: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    put(1e6, "decoder.to_pixels.bias", ours / "tokenizer")
    command = ["convert", str(ours / "tokenizer"), "--output", str(tmp_path / "out"), "--dtype"]
    assert main([*command, "float16"]) == 2
    assert "decoder.to_pixels.bias has values that are not finite in float16" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main([*command, "bfloat16"]) == 0


def test_damaged_weights_are_not_written(model: Path, tmp_path: Path):
    tokenizer = DetailFlowTokenizer.from_pretrained(model)
    with torch.no_grad():
        tokenizer.decoder.to_pixels.weight[0, 0] = float("nan")
    with pytest.raises(DetailFlowError, match="decoder.to_pixels.weight has values that are not finite"):
        tokenizer.save_pretrained(tmp_path / "bad")
    assert not (tmp_path / "bad").exists()


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "out"
    assert (
        main(["convert", str(TINY / "gpt"), "--output", str(out), "--dtype", "bfloat16", "--shard-size", "100KB"]) == 0
    )
    assert capsys.readouterr().out.startswith(f"wrote an AR model (gpt) to {out} (0.4 MB)")
    assert (out / "README.md").exists()
    assert main(["convert", str(TINY / "gpt"), "--output", str(out)]) == 0
    assert (
        capsys.readouterr().out == f"wrote an AR model (gpt) to {out} (0.8 MB), in place of the model that was there\n"
    )
    for argv, message in (
        (["convert", "nowhere"], "unknown model 'nowhere'"),
        (["convert", str(TINY), "--to", "onnx"], "--to must be detailflow or published, not 'onnx'"),
        (["convert", str(TINY), "--shard-size", "1X"], "the shard size must be like 5GB"),
        (["convert"], "the following arguments are required: SOURCE"),
    ):
        assert main([*argv, "--output", str(tmp_path / "bad")]) == 2
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1


def test_a_pair_that_does_not_fit_together(ours: Path, tmp_path: Path):
    shutil.copytree(ours / "gpt", tmp_path / "mixed" / "gpt")
    shutil.copytree(packaged_folder("tokenizer"), tmp_path / "mixed" / "tokenizer")
    message = (
        f"the tokenizer and the AR model of {tmp_path / 'mixed'} do not fit together: give one of them: num_tokens"
    )
    assert error_of(tmp_path / "mixed", tmp_path / "x").startswith(message) and not (tmp_path / "x").exists()
    convert(tmp_path / "mixed" / "gpt", tmp_path / "x")


@pytest.mark.parametrize("to", ["detailflow", "published"])
def test_no_card_of_another_model_stays(to: str, ours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """If the card cannot be written once the models are in place."""
    output = tmp_path / "output"
    convert(ours, output, to=to)
    assert (output / "README.md").exists()

    def full(*_: object) -> None:
        raise DetailFlowError("No space left on device")

    monkeypatch.setattr("detailflow.convert._write_card", full)
    assert error_of(TINY, output, to=to) == "No space left on device"
    assert not (output / "README.md").exists()
