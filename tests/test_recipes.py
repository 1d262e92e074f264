"""The recipes of the package: each is whole, and ImageNet's are the paper's, whose constants stand here again."""

from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from detailflow import DetailFlowGPT, DetailFlowTokenizer
from detailflow.cli.request import read_request, recipe_file
from detailflow.errors import DetailFlowError
from detailflow.models.gpt import GPTConfig
from detailflow.models.growing import grow_tokenizer
from detailflow.settings import flat, parse_settings
from detailflow.training.all_stages import train_all
from detailflow.training.config import Extraction, GPTTraining, TokenizerTraining, count_of_steps
from detailflow.training.presets import FINE_TUNE, PRESETS, SIDES, AllStages, load_settings, tokenizer_sizes

FOLDER = Path(str(files("detailflow") / "recipes"))
RECIPES = sorted(path.relative_to(FOLDER).with_suffix("").as_posix() for path in FOLDER.glob("*/*.yaml"))
IMAGENET = 1_281_167
SIGLIP2 = "google/siglip2-so400m-patch16-naflex"
USER_GIVES = {"tokenizer": ["data"], "extract": ["data", "tokenizer"], "gpt": ["tokens", "tokenizer"]}
KINDS = {"tokenizer": TokenizerTraining, "extract": Extraction, "gpt": GPTTraining}


def read(*names: str) -> Any:
    """The recipe of these files, laid over one another as on the command line."""
    stage = Path(names[0]).name.partition("-")[0]
    contents = [yaml.safe_load((FOLDER / f"{name}.yaml").read_text()) for name in names]
    missing = [key for key in USER_GIVES[stage] if not any(key in content for content in contents)]
    argv = [item for name in names for item in ("--config", str(FOLDER / f"{name}.yaml"))]
    if names[0] == f"{FINE_TUNE}/tokenizer":  # whose sizes come from another model
        argv += ["--init", "shipped"]
    argv += ["--output", "no/where", *(f"--{key}=x" for key in missing)]
    request = read_request(KINDS[stage], stage, "", argv, tokenizer_sizes if stage == "tokenizer" else None)
    assert request is not None
    return request.settings


def base(name: str) -> list[str]:
    """What a recipe is laid over, if it is not whole alone."""
    folder, _, stage = name.partition("/")
    return [f"{folder}/{stage.partition('-')[0]}", name] if "-" in stage else [name]


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_whole(name: str):
    settings = read(*base(name))
    if isinstance(settings, TokenizerTraining | GPTTraining):
        assert settings.loop.rate_at(0) < settings.loop.learning_rate
    text = (FOLDER / f"{name}.yaml").read_text()
    assert text.startswith("# ") and max(map(len, text.splitlines())) <= 130


def test_a_recipe_goes_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """--config imagenet/tokenizer is the package's, unless there is such a file; no other file of the package is."""
    monkeypatch.chdir(tmp_path)
    known = str((FOLDER / "imagenet" / "tokenizer.yaml").resolve())
    assert recipe_file("imagenet/tokenizer") == recipe_file("imagenet/tokenizer.yaml") == known
    for name in ("../weights/shipped/gpt/config", "imagenet", "imagenet/none", "x" * 5000, "a\0b", ""):
        assert recipe_file(name) == name
    (tmp_path / "imagenet").mkdir()
    (tmp_path / "imagenet" / "tokenizer").write_text("data: mine")
    assert recipe_file("imagenet/tokenizer") == "imagenet/tokenizer"
    argv = ["--config", "own-64/tokenizer", "--config=own-64/tokenizer.yaml", "--data", "x", "--output", "no/where"]
    request = read_request(TokenizerTraining, "train tokenizer", "", argv)
    assert request is not None and request.settings.model.num_tokens == 64


def test_recipes_are_there():
    stages = {f"{preset}/{stage}" for preset in (*PRESETS, FINE_TUNE, "imagenet") for stage in KINDS}
    assert stages <= set(RECIPES)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_fit_together(preset: str):
    """Read as `stage_settings` reads them."""
    first = parse_settings(TokenizerTraining, {"data": "x", **load_settings(preset, "tokenizer")}, preset)
    parse_settings(Extraction, {"data": "x", "tokenizer": "y", **load_settings(preset, "extract")}, preset)
    last = parse_settings(GPTTraining, {"tokens": "x", "tokenizer": "y", **load_settings(preset, "gpt")}, preset)
    assert (
        str(first.model.image_size) in preset
        and first.model.image_size == SIDES[preset]
        and first.loop.steps > last.loop.batch_size
    )
    assert max(first.model.schedule.valid_counts) == first.model.num_tokens


def test_a_preset_keeps_the_tokenizer_of_its_tokens(cifar: Path, tmp_path: Path):
    """More steps would make another one, and its tokens would have to be made again."""
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "run.yaml").write_text("kind: tokenizer\nloop: {steps: 10}\n")
    (tmp_path / "tokens").mkdir()
    with pytest.raises(
        DetailFlowError, match="is of a tokenizer that was trained for 10 steps, not 20: choose another"
    ):
        train_all(AllStages(str(cifar), tokenizer_steps=20), tmp_path, "cpu")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokenizer", "tokens"]


# ------------------------------------------------------------------------------------------------- the paper's scale


@pytest.mark.parametrize(
    ("size", "overlay"), [(16, []), (32, ["imagenet/tokenizer-32"]), (64, ["imagenet/tokenizer-64"])]
)
def test_imagenet_tokenizers(size: int, overlay: list[str]):
    config = read("imagenet/tokenizer", *overlay)
    model = config.model
    assert model.num_tokens == {16: 128, 32: 256, 64: 512}[size] == size * 8
    assert (model.group_size, model.causal_tokens, model.image_size, model.patch_size, model.alpha) == (
        8,
        8,
        256,
        16,
        1.5,
    )
    assert (model.codebook_size, model.codebook_dim) == (8192, 8)
    assert asdict(model.encoder) == {"width": 1152, "depth": 12, "heads": 16, "mlp": 4304}
    assert asdict(model.decoder) == {"width": 768, "depth": 12, "heads": 12, "mlp": 3072}
    assert (config.encoder_init, config.init) == (SIGLIP2, None)
    assert (config.pixel, config.quantization, config.commitment) == (1.0, 1.0, 0.25)
    assert (config.perceptual, config.perceptual_network) == (1.0, "lpips")
    assert (config.adversarial, config.adversarial_network, config.augment) == (0.2, "dino", True)
    assert (config.lecam, config.consistency) == (0.001, 4.0)
    assert (config.alignment, config.alignment_network) == (1.0, SIGLIP2)
    assert count_of_steps(config.perceptual_warmup, config.loop.steps) == 10_000
    assert count_of_steps(config.adversarial_from, config.loop.steps) == 40_000
    assert (config.coarse_probability, config.correction_share, config.mistakes) == (0.2, 1.0, 50)
    assert (config.flip, config.max_scale, config.revive_every) == (True, 1 / 0.8, 0)
    loop = config.loop
    assert (loop.batch_size, loop.precision, loop.grad_clip) == (256, "bf16", 1.0)
    epoch = IMAGENET // 256
    assert loop.steps == 250 * epoch
    peak = 1e-4 * 256 / 256
    assert loop.rate_at(0) < 1e-3 * peak
    assert loop.rate_at(epoch // 2) == pytest.approx(peak / 2, rel=1e-3)
    assert loop.rate_at(epoch) == pytest.approx(peak, rel=1e-3) == max(loop.rate_at(epoch + k) for k in range(-9, 9))
    assert loop.rate_at(epoch + (loop.steps - epoch) // 2) == pytest.approx(
        0.55 * peak, rel=1e-3
    )  # half-way down to a tenth
    assert loop.rate_at(loop.steps - 1) == pytest.approx(0.1 * peak, rel=1e-3)
    fast = read("imagenet/tokenizer", *overlay, "imagenet/tokenizer-fast")
    assert fast.loop.steps == 50 * epoch and fast.model == model
    assert fast.loop.rate_at(epoch) == pytest.approx(peak, rel=1e-3) and fast.loop.rate_at(epoch // 2) < 0.51 * peak


@pytest.mark.parametrize(
    ("size", "overlay", "guidance"), [(16, [], 1.45), (32, ["imagenet/gpt-32"], 1.5), (64, ["imagenet/gpt-64"], 1.32)]
)
def test_imagenet_ar_models(size: int, overlay: list[str], guidance: float):
    config = read("imagenet/gpt", *overlay)
    assert (config.tokens, config.tokenizer) == (f"runs/detailflow-{size}/tokens", f"runs/detailflow-{size}/tokenizer")
    assert (config.width, config.depth, config.heads, config.dropout) == (1024, 24, 16, 0.1)
    assert (config.planted_share, config.label_dropout, config.weight_decay, config.ema) == (0.3, 0.1, 0.05, 0.9999)
    assert asdict(config.sampling) == {
        "guidance_scale": guidance,
        "guidance_schedule": "constant",
        "temperature": 1.0,
        "top_k": None,
        "top_p": None,
    }
    loop = config.loop
    assert (loop.batch_size, loop.precision, loop.grad_clip, loop.learning_rate) == (256, "bf16", 1.0, 1e-4)
    assert loop.steps == 300 * (IMAGENET // 256)
    rising = round(0.05 * loop.steps)
    assert loop.rate_at(0) == pytest.approx(0.005 * 1e-4, rel=0.01)
    assert loop.rate_at(rising // 2) == pytest.approx(1e-4 * (0.005 + 1) / 2, rel=1e-3)
    assert loop.rate_at(rising) == pytest.approx(1e-4, rel=1e-3)
    assert loop.rate_at(loop.steps - 1) == pytest.approx(0.01 * 1e-4, rel=1e-3)
    comment = (FOLDER / "imagenet" / "gpt.yaml").read_text()
    assert f"--loop.batch_size 512 --loop.steps {300 * (IMAGENET // 512)}" in comment


def test_imagenet_extraction():
    config = read("imagenet/extract")
    assert config.crops == "ten"
    sizes = [round(IMAGENET * (10 * 3 * n * 2 + 8) / 1e9) for n in (128, 256, 512)]
    assert (
        f"takes {sizes[0]} GB for DetailFlow-16, {sizes[1]} for -32 and {sizes[2]} for -64"
        in (FOLDER / "imagenet" / "extract.yaml").read_text()
    )


def test_sizes_of_the_paper_s_models():
    """The published sizes, on the meta device."""
    config = read("imagenet/tokenizer")
    last = read("imagenet/gpt")
    with torch.device("meta"):
        tokenizer = DetailFlowTokenizer(config.model)
        gpt = DetailFlowGPT(GPTConfig(num_classes=1000, width=last.width, depth=last.depth, heads=last.heads))
    count = {name: sum(p.numel() for p in module.parameters()) for name, module in tokenizer.named_children()}
    assert count["encoder"] / 1e6 == pytest.approx(184.5, abs=0.05)
    assert count["decoder"] / 1e6 == pytest.approx(85.9, abs=0.05)
    assert sum(p.numel() for p in gpt.parameters()) / 1e6 == pytest.approx(326, abs=2)
    assert len(read("imagenet/tokenizer").model.schedule.steps) == 23
    assert len(read("imagenet/tokenizer", "imagenet/tokenizer-32").model.schedule.steps) == 39
    assert len(read("imagenet/tokenizer", "imagenet/tokenizer-64").model.schedule.steps) == 71


# ------------------------------------------------------------------------------------------------- growing


def test_own_256_grows_from_own_128():
    small, large = read("own-128/tokenizer"), read("own-256/tokenizer", "own-256/tokenizer-grown")
    assert large.encoder_init is None and large.loop.steps == read("own-256/tokenizer").loop.steps // 4
    with torch.device("meta"):
        before, after = DetailFlowTokenizer(small.model), DetailFlowTokenizer(large.model)
        grown = grow_tokenizer(before.state_dict(), small.model, after, "small")
    assert {name: tensor.shape for name, tensor in grown.items()} == {
        name: tensor.shape for name, tensor in after.state_dict().items()
    }


def test_own_256_is_own_128_but_for_its_size():
    """Each file is whole, so that one can be read and copied alone; what the two share stays the same in both."""
    small, large = (dict(flat(asdict(read(f"own-{side}/tokenizer")))) for side in (128, 256))
    others = {name for name in small if small[name] != large[name]}
    assert others == {"model.image_size", "model.num_tokens", "loop.accumulate"}
