"""`detailflow train`: tokenizer, gpt and all in a row; a mistake gives one sentence and leaves nothing behind."""

import html
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from detailflow import DetailFlowGPT, DetailFlowPipeline, DetailFlowTokenizer
from detailflow.cli.main import main
from detailflow.data.images import open_images
from detailflow.machine import Ceilings
from detailflow.training.all_stages import describe_all
from detailflow.training.inputs import images_input
from detailflow.training.presets import AllStages

TINY = Path(__file__).parents[1] / "parity" / "tiny-32"
SETTINGS = {
    "model": {
        "image_size": 32,
        "patch_size": 16,
        "num_tokens": 8,
        "group_size": 4,
        "codebook_size": 32,
        "codebook_dim": 4,
        "encoder": {"width": 16, "depth": 1, "heads": 2},
        "decoder": {"width": 16, "depth": 1, "heads": 2},
    },
    "loop": {"steps": 2, "batch_size": 4, "learning_rate": 0.001},
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: a.yaml with settings for images/, a set of two tiny classes."""
    monkeypatch.chdir(tmp_path)
    for k in range(8):
        path = tmp_path / "images" / ("even", "odd")[k % 2] / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (30 * k, 100, 255 - 30 * k)).save(path)
    write("a.yaml", {"data": "images", **SETTINGS})
    return tmp_path


def write(name: str, values: object) -> None:
    Path(name).write_text(values if isinstance(values, str) else yaml.safe_dump(values))


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def complaint(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What the command says on its way out with status 2: one line, no traceback."""
    capsys.readouterr()
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" or (
        out.startswith("images") and out.endswith(", 32×32\n") and out.count("\n") == 1
    )  # what was read
    assert err.count("\n") == 1 and err.startswith("detailflow: error: ")
    return err.removeprefix("detailflow: error: ").rstrip()


TRAIN = ["train", "tokenizer", "--config", "a.yaml", "--output", "run", "--device", "cpu"]


def test_a_tokenizer(folder: Path, capsys: pytest.CaptureFixture[str]):
    assert main(TRAIN) == 0
    config = DetailFlowTokenizer.from_pretrained("run").config
    assert config.num_tokens == 8 and config.encoder.width == 16
    made = [f for f in files(folder / "run") if not f.startswith("tensorboard/")]
    pictures = "pictures", *(f"pictures/{name}-00000002.png" for name in ("mistakes", "reconstructions"))
    assert made == [
        "config.json",
        "curves.png",
        "log.jsonl",
        "mistakes.png",
        "model.safetensors",
        *pictures,
        "reconstructions.png",
        "report.md",
        "resume",
        "resume/step-00000002.pt",
        "run.yaml",
        "tensorboard",
    ]
    assert yaml.safe_load(Path("run/run.yaml").read_text())["loop"]["steps"] == 2
    for name, columns, lines in (("reconstructions", 5, 1), ("mistakes", 6, 2)):
        with Image.open(
            f"run/pictures/{name}-00000002.png"
        ) as picture:  # of all eight images, with captions below them
            assert picture.size == (columns * 132 + 4, 8 * (132 + 16 * lines) + 4)


def test_options_and_files_are_laid_over_one_another(folder: Path):
    write("b.yaml", {"loop": {"batch_size": 3, "seed": 7}})
    assert main([*TRAIN, "--config", "b.yaml", "--loop.steps=1", "--model.encoder.depth", "2", "--flip", "false"]) == 0
    run = yaml.safe_load(Path("run/run.yaml").read_text())
    assert (run["loop"]["steps"], run["loop"]["batch_size"], run["loop"]["seed"], run["flip"]) == (1, 3, 7, False)
    assert DetailFlowTokenizer.from_pretrained("run").config.encoder.depth == 2


def test_a_setting_of_several_values(folder: Path):
    write("b.yaml", {"loop": {"trackers": ["tensorboard"]}})
    one_step = ["--loop.steps", "1", "--config", "b.yaml"]
    assert main([*TRAIN, *one_step]) == 0
    assert yaml.safe_load(Path("run/run.yaml").read_text())["loop"]["trackers"] == ["tensorboard"]
    for output, given in (("none", "[]"), ("same", "[tensorboard]"), ("quoted", '["tensorboard"]')):
        assert main([*TRAIN, *one_step, "--output", output, "--loop.trackers", given]) == 0
        assert yaml.safe_load(Path(output, "run.yaml").read_text())["loop"]["trackers"] == yaml.safe_load(given)
    assert not Path("none/tensorboard").exists() and Path("same/tensorboard").exists()


def test_an_unreadable_image_among_the_first_is_not_the_end(cifar: Path, folder: Path):
    shutil.copytree(cifar, "many")
    Path("many/class0/000.png").write_text("not an image")
    with pytest.warns(UserWarning, match=r"class0/000\.png .* Another image takes its place"):
        assert main([*TRAIN, "--data", "many", "--loop.batch_size", "201"]) == 0
    with Image.open("run/pictures/reconstructions-00000002.png") as picture:
        assert picture.height > 8 * 32


def _of_another_run(state: dict[str, Any]) -> None:
    state["networks"].pop("model.quantizer.codebook")


def _of_other_shapes(state: dict[str, Any]) -> None:
    state["updater"]["optimizers"][0]["state"][0]["exp_avg"] = torch.zeros(3)


def _of_odd_settings(state: dict[str, Any]) -> None:
    state["updater"]["optimizers"][0]["param_groups"][0] |= {"betas": "x", "eps": None}


@pytest.mark.parametrize(
    ("change", "fits"), [(_of_another_run, False), (_of_other_shapes, False), (_of_odd_settings, True)]
)
def test_a_checkpoint_that_does_not_fit(
    change: Callable[[dict[str, Any]], None], fits: bool, folder: Path, capsys: pytest.CaptureFixture[str]
):
    assert main([*TRAIN, "--loop.checkpoint_minutes", "0"]) == 0
    for name in ("config.json", "model.safetensors", "resume/step-00000002.pt"):
        Path("run", name).unlink()
    path = Path("run/resume/step-00000001.pt")
    content = torch.load(path, weights_only=True)
    change(content["state"])
    torch.save(content, path)
    capsys.readouterr()
    assert main([*TRAIN, "--loop.checkpoint_minutes", "0"]) == (0 if fits else 2)
    err = capsys.readouterr().err
    assert ("run/resume: the checkpoint of step 1 does not fit this run (" in err) is not fits
    assert ("Error: " in err and "); move it to another folder to go on from the one before" in err) is not fits


@pytest.mark.parametrize("split", ["tokenizer", "gpt"])
def test_help_fits_a_screen(split: str, capsys: pytest.CaptureFixture[str]):
    for argv in (["train", split, "--help"], ["train", split], ["extract", "--help"]):
        assert main(argv) == 0
        lines = capsys.readouterr().out.splitlines()
        assert 10 < len(lines) <= 60 and max(map(len, lines)) <= 115
        assert f"a recipe such as own-64/{argv[1] if argv[0] == 'train' else 'extract'}\n" in "\n".join(lines)
        assert lines[0].endswith(" [--config FILE] --output DIR [options]")
        assert ("of a group: " in "".join(lines)) == ("  --dry-run " in "".join(lines)) == (argv[0] == "train")
    assert main(["train", split, "--help=loop"]) == 0
    assert capsys.readouterr().out.count("--loop.steps") == 1
    assert main(["train", split, "--help", "loop"]) == 0
    assert "--loop.learning_rate LEARNING_RATE" in (out := capsys.readouterr().out) and "--data" not in out
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--help"])
    assert stopped.value.code == 0
    assert len(capsys.readouterr().out.splitlines()) <= 45


CONFIG_CASES: list[tuple[dict | str | None, str]] = [
    ({"perceptul": 1}, "--config b.yaml: unknown setting 'perceptul': did you mean perceptual?"),
    (
        {"loop": {"lerning_rate": 1}},
        "--config b.yaml: unknown setting 'loop.lerning_rate': did you mean loop.learning_rate?",
    ),
    (
        {"model": {"encoder": {"dpth": 1}}},
        "--config b.yaml: unknown setting 'model.encoder.dpth': did you mean model.encoder.depth?",
    ),
    ({"model": {"group_size": 3}}, "group_size must divide num_tokens, and 3 does not divide 8"),
    ({"model": {"patch_size": 5}}, "patch_size must divide image_size, and 5 does not divide 32"),
    ({"model": {"encoder": {"heads": 3}}}, "heads must divide width, and 3 does not divide 16"),
    ({"loop": {"steps": "many"}}, "--config b.yaml: loop.steps must be a positive integer, not 'many'"),
    ({"model": {"group_size": 4.5}}, "--config b.yaml: model.group_size must be an integer, not 4.5"),
    ({"flip": "perhaps"}, "--config b.yaml: flip must be true or false, not 'perhaps'"),
    ({"loop": {"learning_rate": -1}}, "--config b.yaml: loop.learning_rate must be above 0, not -1.0"),
    ({"loop": {"learning_rate": float("inf")}}, "--config b.yaml: loop.learning_rate must be finite, not inf"),
    ({"pixel": float("inf")}, "--config b.yaml: pixel must be finite, not inf"),
    ({"loop": {"seed": -1}}, "--config b.yaml: loop.seed must be 0 to 2^64 - 1, not -1"),
    ({"loop": {"precision": "fp8"}}, "--config b.yaml: loop.precision must be auto, bf16, fp16 or fp32, not 'fp8'"),
    ({"max_scale": 0.5}, "--config b.yaml: max_scale must be 1 (no zoom) or more, not 0.5"),
    ({"perceptual": -1}, "--config b.yaml: perceptual must be 0 or more, not -1.0"),
    ({"coarse_probability": 2}, "--config b.yaml: coarse_probability must be 0 to 1, not 2.0"),
    (
        {"model": {"image_size": 4, "patch_size": 4}, "perceptual": 1},
        "the perceptual loss needs an image_size of 8 or more",
    ),
    ({"model": {"encoder": {"depth": 10**40}}}, "--config b.yaml: model.encoder.depth must be at most 1,000"),
    ({"model": {"codebook_dim": 10**15}}, "--config b.yaml: model.codebook_dim must be at most 2,147,483,647"),
    ({"loop": {"batch_size": 10**15}}, "--config b.yaml: loop.batch_size must be at most 1,000,000"),
    ({"loop": {"workers": 10**6}}, "--config b.yaml: loop.workers must be at most 1,000"),
    ("data: [a\nmodel: }", "--config b.yaml: this file is not valid YAML (expected ',' or ']', but got ':', line 2)"),
    ("a: 1\n---\nb: 2", "--config b.yaml: this file is not valid YAML (found another document, line 2)"),
    ("loop: {steps: 1}\nloop: {}", "--config b.yaml: this file is not valid YAML (loop is there twice, line 2)"),
    ("loop: {steps: 1}\nloop.steps: 2", "--config b.yaml: loop.steps is there twice, nested and with its dotted name"),
    ({"loop": {"steps": "0100"}}, "--config b.yaml: loop.steps must be a positive integer, not '0100'"),
    ("- a\n- b\n", "--config b.yaml: this file must have settings, each as KEY: VALUE"),
    ("", "--config b.yaml: this file must have settings, each as KEY: VALUE"),
    (None, "--config b.yaml: this file cannot be read: no such file, and unknown recipe 'b': the recipes are "),
]


@pytest.mark.parametrize(("values", "message"), CONFIG_CASES)
def test_bad_config_files(values: dict | str | None, message: str, folder: Path, capsys: pytest.CaptureFixture[str]):
    if values is not None:
        write("b.yaml", values)
    before = files(folder)
    assert complaint([*TRAIN, "--config", "b.yaml"], capsys).startswith(message)
    assert files(folder) == before


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--loop.stepz", "3"], "unknown option '--loop.stepz': did you mean --loop.steps?"),
        (["--dry-runs", "3"], "unknown option '--dry-runs': did you mean --dry-run?"),
        (["--loop.trackers", "tensorboard"], "--loop.trackers must be a list, such as [a, b], not 'tensorboard'"),
        (["--conf", "a.yaml"], "unknown option '--conf': did you mean --config?"),
        (["--data", "nowhere/at/all"], "nowhere/at/all does not exist: give a folder of images"),
        (["--data", "empty"], "empty holds no images"),
        (["--data", "a.yaml"], "a.yaml is neither a folder of images nor a .parquet"),
        (["--device", "quantum"], "device 'quantum' cannot be used here"),
        (["--output", "a.yaml"], "cannot write to a.yaml: "),
        (["--output", "a.yaml/deeper"], "cannot write to a.yaml/deeper: "),
        (["--output", "x" * 300], f"cannot write to {'x' * 300}: File name too long"),
        (["--config", "images"], "--config images: this file cannot be read (it is a folder, not a file)"),
        (["--data", "images/even", "--perceptual", "1"], "the perceptual loss learns its features from class labels"),
        (["--config"], "--config needs a value: --config FILE"),
    ],
)
def test_bad_options(argv: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]):
    (folder / "empty").mkdir()
    before = files(folder)
    assert complaint([*TRAIN, *argv], capsys).startswith(message)
    assert files(folder) == before


def test_more_than_any_memory(folder: Path, capsys: pytest.CaptureFixture[str]):
    assert main([*TRAIN, "--model.encoder.width", "2000000"]) == 2
    assert "there is not enough memory for this: choose smaller batches" in capsys.readouterr().err


def test_what_is_missing(folder: Path, capsys: pytest.CaptureFixture[str]):
    assert complaint(TRAIN[:4], capsys) == "the following arguments are required: --output"
    assert complaint(["train", "tokenizer", "--output", "run"], capsys).startswith("settings are missing: data, model.")
    assert complaint(["train", "gpt", "--output", "run", "--loop.steps", "3"], capsys).startswith(
        "settings are missing: tokens,"
    )
    assert not Path("run").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written_to(folder: Path, capsys: pytest.CaptureFixture[str]):
    Path("locked").mkdir(mode=0o500)
    assert complaint([*TRAIN, "--output", "locked/run"], capsys) == "cannot write to locked/run: Permission denied"


def test_too_many_unreadable_images(folder: Path, capsys: pytest.CaptureFixture[str]):
    for k in (0, 2):
        Path(f"images/even/{k}.png").write_text("not an image")
    with pytest.warns(UserWarning, match="Another image takes its place"):
        assert main(TRAIN) == 2
    assert "images cannot be read, more than 1%" in capsys.readouterr().err
    assert not list(Path("run").rglob("*.safetensors"))


# ------------------------------------------------------------------------------------------------- from another model


def from_scratch(output: str, *argv: str) -> list[str]:
    """A run of one step without a config file."""
    loop = ["--loop.steps", "1", "--loop.batch_size", "4", "--loop.learning_rate", "1e-9"]
    return ["train", "tokenizer", "--data", "images", "--output", output, "--device", "cpu", *loop, *argv]


def close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.allclose(a[name], b[name], atol=1e-6) for name in a)


@pytest.mark.parametrize("source", ["ours", "published"])
def test_a_tokenizer_from_another(source: str, folder: Path, model: Path, capsys: pytest.CaptureFixture[str]):
    start = model / "tokenizer" if source == "ours" else TINY / "tokenizer"
    assert main(from_scratch("run", "--init", str(start), "--revive_every", "0")) == 0
    before, after = DetailFlowTokenizer.from_pretrained(start), DetailFlowTokenizer.from_pretrained("run")
    assert after.config == before.config  # without a word about sizes
    assert close(after.state_dict(), before.state_dict())
    sizes = ["--config", "b.yaml", "--revive_every", "0", "--loop.seed", "5"]
    write("b.yaml", {"model": asdict(before.config)})
    assert main(from_scratch("other", *sizes)) == 0  # the same sizes without the weights
    assert not close(DetailFlowTokenizer.from_pretrained("other").state_dict(), before.state_dict())


def test_what_does_not_fit_the_weights_of_another(folder: Path, model: Path, capsys: pytest.CaptureFixture[str]):
    start = str(model / "tokenizer")
    message = complaint(from_scratch("run", "--init", start, "--model.num_tokens", "8"), capsys)
    assert (
        message
        == f"the weights of {start} do not fit: num_tokens is 16 there and 8 here, and a tokenizer can only grow"
    )
    assert "encoder is ViTConfig(" in complaint(
        from_scratch("run", "--init", start, "--model.encoder.depth", "2"), capsys
    )
    message = complaint(from_scratch("run", "--init", str(model / "gpt")), capsys)
    assert message.endswith(f"not a tokenizer: give {model}, which holds both")
    assert complaint(from_scratch("run", "--init", "nowhere"), capsys).startswith("unknown model 'nowhere'")
    both = ["--init", start, "--encoder_init", "nowhere"]
    assert complaint(from_scratch("run", *both), capsys).startswith("init and encoder_init exclude each other")
    assert not Path("run").exists()
    assert (
        main(from_scratch("run", "--init", start, "--model.image_size", "64")) == 0
    )  # the weights are those of any size
    assert DetailFlowTokenizer.from_pretrained("run").config.image_size == 64


def test_an_ar_model_from_another(folder: Path, model: Path, cifar: Path):
    """Classes that both know keep their rows, the others start from the null class."""
    pets = {"cat": "cat", "automobile": "automobile", "hamster": "class1"}
    for name, original in pets.items():
        shutil.copytree(cifar / original if (cifar / original).exists() else cifar / "class0", folder / "pets" / name)
    assert main(["extract", "--data", "pets", "--tokenizer", str(model), "--crops", "two", "--output", "t"]) == 0
    loop = ["--loop.steps", "1", "--loop.batch_size", "4", "--loop.learning_rate", "1e-9"]
    source = ["--tokens", "t", "--tokenizer", str(model), "--init", str(model)]
    assert main(["train", "gpt", "--output", "run", "--device", "cpu", *source, *loop]) == 0
    before, after = DetailFlowGPT.from_pretrained(model), DetailFlowGPT.from_pretrained("run")
    assert after.config.class_names == ("automobile", "cat", "hamster") and after.config.width == before.config.width
    old, new = before.state_dict(), after.state_dict()
    assert torch.allclose(new.pop("class_embedding.weight"), old.pop("class_embedding.weight")[[1, 3, 5, 5]], atol=1e-6)
    assert close(new, old)


# ------------------------------------------------------------------------------------------------- gpt


def gpt(model: Path, tokens: Path | str, *argv: str) -> list[str]:
    loop = ["--loop.steps", "1", "--loop.batch_size", "4", "--loop.learning_rate", "0.001"]
    sizes = ["--width", "32", "--depth", "1", "--heads", "2"]
    source = ["--tokens", str(tokens), "--tokenizer", str(model)]
    return ["train", "gpt", "--output", "run", "--device", "cpu", *source, *loop, *sizes, *argv]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--width", "33"], "width must be heads times a multiple of 4 (2-D rotary positions): 33 is not for 2 heads"),
        (["--dropout", "2"], "--dropout must be at least 0 and below 1, not 2.0"),
        (["--planted_share", "2"], "--planted_share must be 0 to 1, not 2.0"),
        (["--sampling.top_k", "-1"], "--sampling.top_k must be 0 or more (0 is off), not -1"),
        (
            ["--sampling.guidence_scale", "2"],
            "unknown option '--sampling.guidence_scale': did you mean --sampling.guidance_scale?",
        ),
        (
            ["--tokens", "nowhere"],
            "nowhere is not a token store (no manifest.json): make one with `detailflow extract`",
        ),
        (["--tokens", "images"], "images is not a token store"),
        (["--tokenizer", "nowhere/at/all"], "there is no such folder: nowhere/at/all"),
    ],
)
def test_bad_gpt_settings(
    argv: list[str], message: str, folder: Path, model: Path, tokens: Path, capsys: pytest.CaptureFixture[str]
):
    assert complaint(gpt(model, tokens, *argv), capsys).startswith(message)
    assert not Path("run").exists()


def test_tokens_of_another_tokenizer(folder: Path, tokens: Path, capsys: pytest.CaptureFixture[str]):
    assert main([*TRAIN, "--output", "other"]) == 0
    message = f"{tokens}: these tokens were made by another tokenizer than other; extract them again"
    assert complaint(gpt(Path("other"), tokens), capsys) == message
    assert complaint(gpt(tokens, tokens), capsys).startswith(f"{tokens} has no config.json")
    assert not Path("run").exists()


def test_gpt(folder: Path, model: Path, tokens: Path, capsys: pytest.CaptureFixture[str]):
    assert main(gpt(model, tokens, "--sampling.guidance_scale", "2")) == 0
    shutil.copytree(model / "tokenizer", "pair/tokenizer")
    shutil.copytree("run", "pair/gpt")
    pipeline = DetailFlowPipeline.from_pretrained("pair")
    assert pipeline.gpt.config.guidance_scale == 2 and pipeline.gpt.config.class_names == tuple(
        f"class{k}" for k in range(10)
    )


# ------------------------------------------------------------------------------------------------- what a run will cost


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that needs no measuring, and no network to fetch anything from."""
    monkeypatch.setattr("detailflow.training.plan.measure_ceilings", lambda *_, **__: Ceilings(1e10, 1e11))
    monkeypatch.setattr("detailflow.hub_client.fetch", None)


@pytest.mark.usefixtures("quick")
def test_a_dry_run_writes_nothing(folder: Path, capsys: pytest.CaptureFixture[str]):
    before = files(folder)
    assert main([*TRAIN, "--dry-run", "--output", "a.yaml"]) == 0  # where it would be written does not matter yet
    assert capsys.readouterr().out.startswith("a tokenizer, on 8 images of 2 classes\n")
    assert files(folder) == before


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_a_dry_run_of_the_papers_recipe(folder: Path, capsys: pytest.CaptureFixture[str]):
    recipe = Path(__file__).parents[2] / "src" / "detailflow" / "recipes" / "imagenet" / "tokenizer.yaml"
    before = files(folder)
    assert (
        main(["train", "tokenizer", "--config", str(recipe), "--data", "images", "--dry-run", "--device", "cpu"]) == 0
    )
    out = capsys.readouterr().out
    assert out.startswith("a tokenizer, on 8 images of 2 classes\n") and max(map(len, out.splitlines())) <= 80
    for line in (
        "encoder                           184.5M  trained",
        "VGG-16 (LPIPS)                     14.7M  frozen",
    ):
        assert line in out
    assert "the 100 GFLOP/s of bfloat16 products measured here on cpu" in out
    assert files(folder) == before


@pytest.mark.usefixtures("quick")
def test_a_dry_run_of_an_ar_model(folder: Path, model: Path, tokens: Path, capsys: pytest.CaptureFixture[str]):
    assert main(gpt(model, tokens, "--dry-run")) == 0
    out = capsys.readouterr().out
    assert out.startswith("an AR model, on 200 images of 10 classes, 2 crops of each\n")
    assert "1 step of 4 images: 0.0 epochs" in out and "KiB of tokens, which are there" in out
    assert not Path("run").exists()


@pytest.mark.usefixtures("quick")
def test_a_dry_run_before_there_are_tokens(folder: Path, model: Path, capsys: pytest.CaptureFixture[str]):
    argv = gpt(model, "none", "--dry-run")
    assert main(argv) == 0
    page = capsys.readouterr().out
    assert page.startswith("an AR model, on tokens that are still to come: their images and classes are not counted\n")
    assert "epochs" not in page and "tokens     16 of an image" in page and "of tokens, which are there" not in page
    small = [*argv, "--tokenizer", "imagenet/tokenizer-32"]  # which is laid over imagenet/tokenizer
    assert main(small) == 0
    assert "tokens     256 of an image" in capsys.readouterr().out
    message = complaint([*argv, "--tokenizer", "no/such/folder"], capsys)
    assert message == (
        "a plan needs the tokenizer's sizes (there is no such folder: no/such/folder): give --tokenizer a model, or "
        "the settings that it will be trained with, such as imagenet/tokenizer"
    )
    Path("odd.yaml").write_text("model: {num_tokens: 16}")
    assert complaint([*argv, "--tokenizer", "odd.yaml"], capsys).startswith("odd.yaml: settings are missing: encoder.")


@pytest.mark.usefixtures("quick")
def test_a_dry_run_for_several_processes(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main([*TRAIN, "--dry-run"]) == 0
    assert "2 processes: 2 images of a step for each" in capsys.readouterr().out
    monkeypatch.setenv("RANK", "1")
    assert main([*TRAIN, "--dry-run"]) == 0
    assert capsys.readouterr().out == ""
    monkeypatch.setenv("RANK", "0")
    message = "a batch of 4 cannot be divided evenly among 3 processes: choose a multiple"
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert complaint([*TRAIN, "--dry-run"], capsys) == message
    argv = ["train", "--data", str(folder), "--output", "../all", "--dry-run", "--device", "gpu"]
    assert complaint(argv, capsys) == "device 'gpu' cannot be used here: give another, such as cpu"


@pytest.mark.usefixtures("quick")
def test_mistakes_that_a_dry_run_finds(folder: Path, tokens: Path, model: Path, capsys: pytest.CaptureFixture[str]):
    assert complaint([*TRAIN, "--dry-run", "--data", "nowhere/at/all"], capsys).startswith(
        "nowhere/at/all does not exist"
    )
    assert complaint([*TRAIN, "--dry-run", "--loop.stepz", "3"], capsys).startswith("unknown option '--loop.stepz'")
    assert complaint(gpt(model, "images", "--dry-run"), capsys).startswith("images is not a token store")
    assert complaint([*TRAIN, "--dry-run", "--device", "quantum"], capsys).startswith("device 'quantum' cannot be used")
    extraction = ["extract", "--data", "images", "--tokenizer", str(model), "--output", "t", "--dry-run"]
    assert complaint(extraction, capsys).startswith("unknown option '--dry-run': see detailflow extract --help")


# ------------------------------------------------------------------------------------------------- all in a row


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--data", "images", "--output", "run", "--preset", "big"],
            "--preset must be small-32, own-64, own-128 or own-256, not 'big'",
        ),
        (
            ["--data", "images", "--output", "run", "--preset", "own-64", "--init", "shipped"],
            "--preset and --init exclude each other",
        ),
        (["--data", "images", "--output", "run", "--finetune-decoder"], "--finetune-decoder is for the tokenizer of a"),
        (
            ["--data", "images", "--output", "run", "--init", "shipped", "--tokenizer-steps", "3"],
            "--tokenizer-steps is for a tokenizer that is trained, and that of --init stays",
        ),
        (["--data", "images", "--output", "run", "--lora", "4"], "--lora is for the AR model of a trained model"),
        (["--data", "images", "--output", "run", "--init", "nowhere"], "unknown model 'nowhere'"),
        (["--data", "images", "--output", "run", "--init", "a.yaml"], "a.yaml is a file: give the folder"),
        (["--data", "images", "--output", "images"], "images is your data: choose another --output, such as runs/im"),
        (["--data", "images", "--output", "images/run", "--dry-run"], "images/run is in your data, images: choose"),
        (["tokenizer", "--config", "a.yaml", "--output", "images"], "images is your data: choose another --output"),
        (["tokenizer", "--config", "a.yaml", "--output", "images", "--dry-run"], "images is your data: choose"),
        (["--data", "images"], "the following arguments are required: --output"),
        (["--output", "run"], "the following arguments are required: --data"),
        (["--data", "nowhere/at/all", "--output", "run"], "nowhere/at/all does not exist"),
        (["--data", "images", "--output", "a.yaml"], "cannot write to a.yaml: "),
        (
            ["--data", "images", "--output", "run", "--gpt-steps", "0"],
            "--gpt-steps must be a positive integer, not 0",
        ),
        (
            ["--data", "images", "--output", "run", "--split", "val"],
            "images has no split 'val': it has no train, test or val subfolder, so leave out the split",
        ),
        (["--data", "images", "--output", "run", "--device", "quantum"], "device 'quantum' cannot be used here"),
        (["tokeniser", "--config", "a.yaml"], "unknown stage 'tokeniser': did you mean tokenizer?"),
        (["everything"], "unknown stage 'everything': give tokenizer or gpt, or --data DATA --output DIR"),
        (["--dta", "images", "--output", "run"], "unknown option '--dta': did you mean --data?"),
        (["--gpt-stpes", "3"], "unknown option '--gpt-stpes': did you mean --gpt-steps?"),
    ],
)
def test_bad_options_of_all_in_a_row(argv: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]):
    assert complaint(["train", *argv], capsys).startswith(message)
    assert not Path("run").exists()


def everything(data: str, *argv: str, count: str = "3") -> list[str]:
    steps = ["--tokenizer-steps", count, "--gpt-steps", count]
    return ["train", "--data", data, "--preset", "small-32", "--output", "run", "--device", "cpu", *steps, *argv]


def test_all_in_a_row_without_classes(folder: Path, cifar: Path, capsys: pytest.CaptureFixture[str]):
    """A flat folder: the losses need no classes."""
    Path("flat").mkdir()
    for path in sorted(cifar.rglob("*.png"))[::20]:
        shutil.copy(path, "flat")
    assert main(everything("flat", count="1")) == 0
    out = capsys.readouterr().out
    after = "next: detailflow generate --model run; detailflow serve --model run; open run/report.html\n"
    assert out.endswith(after) and Path("run/report.html").exists()
    assert "\n10 images are enough to see that everything works. A model stays noise" in out
    assert "held out for validation; which step is the best by fewer than 20 is partly chance\n" in out
    assert '"perceptual": ' in Path("run/tokenizer/log.jsonl").read_text()
    assert main(["generate", "--model", "run", "--output", "pictures", "--no-grid"]) == 0
    assert files(folder / "pictures") == ["0000-image.png"]
    capsys.readouterr()
    assert main(everything("flat", count="1")) == 0
    assert "run/tokens: these tokens are finished already\n" in capsys.readouterr().out
    shutil.rmtree("run/gpt")  # as after Ctrl-C in the tokenizer's training
    Path("run/tokenizer/config.json").unlink()
    assert main(["generate", "--model", "run", "--output", "pictures"]) == 2
    problem = (
        "run holds a tokenizer and no AR model, whose training has not begun: repeat the training command to go on\n"
    )
    assert capsys.readouterr().err.endswith(f"detailflow: error: {problem}")


@pytest.mark.usefixtures("quick")
def test_all_in_a_row_from_other_columns(folder: Path, cifar_table: Path, capsys: pytest.CaptureFixture[str]):
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(cifar_table).slice(0, 12).rename_columns({"image": "img", "label": "fine_label"})
    pyarrow.parquet.write_table(table, "a.parquet")
    assert "has no column 'image'" in complaint(everything("a.parquet", "--dry-run"), capsys)
    assert main(everything("a.parquet", "--image-column", "img", "--dry-run")) == 0
    question = (
        "without classes, 32×32; a.parquet has no column label: did you mean fine_label (label_column: fine_label)?"
    )
    assert question in capsys.readouterr().out
    columns = ["--image-column", "img", "--label-column", "fine_label"]
    assert main(everything("a.parquet", *columns, count="1")) == 0
    config = json.loads(Path("run/gpt/config.json").read_text())
    assert config["num_classes"] == 10
    assert "a.parquet --image-column img --model run" in html.unescape(Path("run/report.html").read_text())
    measured = ["evaluate", "tokenizer", "--data", "a.parquet", "--image-column", "img", "--model", "run"]
    measured += ["--features", "none", "--lpips", "none", "--num-tokens", "16", "--output", "report", "--device", "cpu"]
    assert main(measured) == 0


def test_a_folder_of_another_data_set(folder: Path, capsys: pytest.CaptureFixture[str]):
    """That is said at once, and of the folder that was given."""
    Path("run/tokenizer").mkdir(parents=True)
    known = images_input(open_images("images")).read()
    write("run/tokenizer/run.yaml", {"kind": "tokenizer", "known_by": {"data": known}})
    Path("images/odd/7.png").unlink()
    facts = "8 images in 2 classes then, 7 images in 2 classes now; changed: odd 4 → 3"
    advice = "choose another folder (--init run goes on from its models there), or give it the same again"
    said = f"run holds a run that was begun with other images ({facts}): {advice}"
    assert complaint(everything("images"), capsys) == said
    assert complaint(everything("images", "--dry-run"), capsys) == said


def test_a_folder_of_another_preset(folder: Path, capsys: pytest.CaptureFixture[str]):
    Path("run/tokenizer").mkdir(parents=True)
    write("run/tokenizer/run.yaml", {"kind": "tokenizer", "model": {"image_size": 64}})
    said = "run holds a run of preset own-64, not small-32: leave --preset out, or choose another folder"
    assert complaint(everything("images"), capsys) == said
    assert complaint(everything("images", "--dry-run"), capsys) == said


def tuned(model: Path | str, *argv: str) -> list[str]:
    return ["train", "--data", "images", "--init", str(model), "--output", "run", "--device", "cpu", *argv]


@pytest.mark.usefixtures("quick")
def test_a_plan_is_told_line_by_line(folder: Path, model: Path, monkeypatch: pytest.MonkeyPatch):
    """What is known at once need not wait for what has to be measured."""
    wanted = AllStages("images", init=str(model))
    lines = describe_all(wanted, Path("run"), "cpu")
    with monkeypatch.context() as patch:
        patch.setattr("detailflow.training.all_stages.ceiling_of", None)
        assert next(lines).startswith("images: 8 images in 2 classes")
        assert next(lines).startswith(f"from {model}: ")
        assert next(lines) == "timing a few steps on this machine, to say how long it will take"
    assert next(lines).startswith("tokens: ")


@pytest.mark.usefixtures("quick")
def test_from_a_trained_model(folder: Path, model: Path, capsys: pytest.CaptureFixture[str]):
    """Its tokenizer as it is; the same command again does nothing, more steps go on."""
    argv = tuned(model, "--gpt-steps", "2")
    assert main([*argv, "--dry-run"]) == 0
    dry = capsys.readouterr().out.splitlines()
    assert not Path("run").exists() and dry[0].startswith("images: 8 images in 2 classes")
    start = f"from {model}: its tokenizer of 32×32 pixels, as it is, and its AR model, which knows 0 of these 2 classes"
    start += " by name"
    assert dry[1] == start and dry[2].startswith("timing a few steps") and dry[3].startswith("tokens: 10 crops of each")
    assert "parameters, up to 2 steps of 32 images: up to" in dry[4] and dry[6].startswith("in all about ")
    assert dry[5].startswith("disk: about ") and dry[5].endswith("B for checkpoints, tokens and the model")
    assert len(dry) == 7
    assert main([*argv, "--crops", "two", "--dry-run"]) == 0
    assert "tokens: 2 crops of each image" in capsys.readouterr().out
    assert main([*argv, "--no-flip", "--dry-run"]) == 0
    assert "\ntokens: 5 crops of each image: " in capsys.readouterr().out

    assert main(argv) == 0
    out = capsys.readouterr().out
    assert start in out and "1 of the 8 images is held out for validation" in out
    before, after = (DetailFlowTokenizer.from_pretrained(place) for place in (model, "run"))
    assert after.fingerprint() == before.fingerprint() and close(after.state_dict(), before.state_dict())
    gpt = DetailFlowGPT.from_pretrained("run").config
    assert gpt.class_names == ("even", "odd") and (gpt.width, gpt.depth, gpt.dropout) == (32, 2, 0.1)
    assert main(["generate", "--model", "run", "--output", "pictures", "--no-grid"]) == 0
    assert files(folder / "pictures") == ["0000-even.png", "0001-odd.png"]

    content = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}
    capsys.readouterr()
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert out.count("finished already") == 3 and start not in out  # tokens, those held out, and the AR model
    assert {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()} == content
    kept = f"run holds a run that was begun with --init {model}, whose tokenizer stays as it is"
    told = complaint(["train", "--data", "images", "--output", "run", "--device", "cpu"], capsys)
    assert told == f"{kept}: give --init {model}, or choose another folder"
    told = complaint(tuned(model, "--finetune-decoder"), capsys)
    assert told == f"{kept}: leave --finetune-decoder out, or choose another folder"
    problem = "run/tokenizer holds another tokenizer than that of shipped: choose another folder"
    assert complaint(tuned("shipped", "--gpt-steps", "2"), capsys) == problem
    assert main(tuned(model, "--gpt-steps", "3")) == 0
    out = capsys.readouterr().out
    assert "run/gpt: going on from step 2" in out and "\ntokens: " not in out
    assert "parameters, up to 3 steps (1 left) of 32 images: up to" in out and "what is left takes" in out
    assert main(tuned(model)) == 0  # the steps that it was begun with, not the recipe's
    out = capsys.readouterr().out
    assert "run/gpt: 3 steps, as it was begun, and not the recipe's" in out and out.count("finished already") == 3
    Path("images/odd/7.png").rename("images/odd/8.png")
    assert main(tuned(model, "--gpt-steps", "4")) == 2
    assert "holds tokens of other images (as many, by other names): " in capsys.readouterr().err


def test_from_a_trained_model_into_its_own_folder(folder: Path, model: Path, capsys: pytest.CaptureFixture[str]):
    """That is said before its images are encoded."""
    shutil.copytree(model, "run")
    before = files(folder)
    said = "run/gpt holds a model that was not trained there: choose another folder"
    assert complaint(tuned("run", "--gpt-steps", "2"), capsys) == said
    assert files(folder) == before


def test_a_package_that_lora_lacks(
    folder: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """It is told before anything is timed."""
    monkeypatch.setattr("detailflow.training.presets.find_spec", lambda name: None)
    monkeypatch.setattr("detailflow.training.all_stages.ceiling_of", None)
    assert "lora needs the package peft" in complaint([*tuned(model, "--lora", "4"), "--dry-run"], capsys)


@pytest.mark.usefixtures("quick")
def test_from_a_trained_model_by_lora(folder: Path, model: Path, capsys: pytest.CaptureFixture[str]):
    """It says how few weights are trained, goes on exactly, can be used unfinished, and ends as an ordinary model."""
    argv = tuned(shutil.copytree(model, "start"), "--lora", "4", "--gpt-steps")
    assert main([*argv, "2"]) == 0
    tuned_gpt = DetailFlowGPT.from_pretrained("run")
    whole, classes = (sum(w.numel() for w in m.parameters()) for m in (tuned_gpt, tuned_gpt.class_embedding))
    thin = 4 * sum(sum(m.weight.shape) for m in tuned_gpt.blocks.modules() if isinstance(m, torch.nn.Linear))
    assert f"{thin + classes:,} of {thin + whole:,} parameters, up to 2 steps" in capsys.readouterr().out
    checkpoint = max(Path("run/gpt/resume").glob("step-*.pt"))
    assert main(["generate", "--model", "run", "--output", "pictures", "--no-grid"]) == 0
    assert main(["convert", str(checkpoint), "--output", "last", "--variant", "model"]) == 0
    capsys.readouterr()
    assert main([*argv, "3"]) == 0
    assert "run/gpt: going on from step 2" in capsys.readouterr().out
    before, after = (DetailFlowGPT.from_pretrained(place).state_dict() for place in (model, "run"))
    assert all(torch.equal(before[name], after[name]) for name in before if "block" not in name and "class" not in name)
    assert main(tuned("start", "--gpt-steps", "4")) == 2
    assert "run/gpt holds a run with another lora (4, not 0)" in capsys.readouterr().err
    changed = DetailFlowGPT.from_pretrained("start")
    torch.nn.init.normal_(changed.head.weight)
    changed.save_pretrained("start/gpt")  # the products belong to the matrices of before
    assert main([*argv, "4"]) == 2
    assert "init" in (message := capsys.readouterr().err), message


@pytest.mark.usefixtures("quick")
def test_from_a_trained_model_with_its_decoder(folder: Path, model: Path, capsys: pytest.CaptureFixture[str]):
    """Encoder and codebook stay, so the tokens keep their meaning; more steps of the decoder need no other tokens."""
    argv = tuned(model, "--finetune-decoder", "--gpt-steps", "1")
    assert main([*argv, "--tokenizer-steps", "2"]) == 0
    out = capsys.readouterr().out
    assert "its tokenizer of 32×32 pixels, whose decoder is trained, and its AR model" in out and "\ntokenizer: " in out
    before, after = (DetailFlowTokenizer.from_pretrained(place) for place in (model, "run"))
    assert after.fingerprint() == before.fingerprint()
    old, new = before.state_dict(), after.state_dict()
    changed = {name.partition(".")[0] for name in old if not torch.equal(old[name], new[name])}
    assert changed == {"decoder"}
    DetailFlowPipeline.from_pretrained("run")  # a warning is an error here
    assert main([*argv, "--tokenizer-steps", "3"]) == 0
    assert "run/tokenizer: going on from step 2" in capsys.readouterr().out
    problem = "run/tokenizer holds another tokenizer than that of"
    assert complaint(tuned(model, "--gpt-steps", "1"), capsys).startswith(problem)


@pytest.mark.parametrize(
    ("side", "gigabytes", "preset", "why"),
    [
        (32, 0, "small-32", "about 32 pixels (--"),
        (47, 80, "small-32", "about 47 pixels (--"),
        (48, 0, "own-64", "about 48 pixels (--"),
        (500, 0, "own-64", "about 500 pixels, and a CPU is too small for more (--"),
        (500, 80, "own-256", "about 500 pixels (--"),
        (500, 16, "own-128", "about 500 pixels, and this device is too small for more (--"),
        (500, 8, "own-64", "about 500 pixels, and this device is too small for more (--"),
        (8, 80, "small-32", "about 8 pixels (--"),
    ],
)
def test_a_preset_for_the_images_and_the_device(
    side: int, gigabytes: int, preset: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A GPU that is not here is said to have so much memory."""
    from detailflow.data.images import open_images
    from detailflow.training.presets import choose_preset

    memory = SimpleNamespace(total_memory=gigabytes * 10**9)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: memory)
    for k, size in enumerate(((side, side + 5), (side + 300, side), (1, 1), (2000, 1000))):
        Image.new("RGB", size).save(tmp_path / f"{k}.png")
    (tmp_path / "4.png").write_bytes(b"no image")
    source = open_images(tmp_path)
    chosen, sentence = choose_preset(source, torch.device("cuda" if gigabytes else "cpu"))
    assert chosen == preset and sentence.startswith(f"preset {preset}, as the images' shorter sides are {why}")


@pytest.mark.slow
def test_all_in_a_row(folder: Path, cifar: Path, capsys: pytest.CaptureFixture[str]):
    assert main(everything(str(cifar))) == 0
    assert not Path("run/tokenizer/features.pt").exists()  # the perceptual loss needs no classifier of these images
    before = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}
    capsys.readouterr()
    assert main(everything(str(cifar))) == 0  # what is finished stays
    assert [line for line in capsys.readouterr().out.splitlines() if "finished already" in line] == [
        "run/tokenizer: this tokenizer is finished already",
        "run/tokens/validation: these tokens are finished already",
        "run/tokens: these tokens are finished already",
        "run/gpt: this AR model is finished already",
    ]
    assert {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()} == before
    assert main(everything(str(cifar), "--gpt-steps", "2")) == 2
    assert "run/gpt holds a finished run of 3 steps, more than 2: give at least as many" in capsys.readouterr().err
    assert main(["generate", "--model", "run", "--output", "pictures"]) == 0
    assert len(files(folder / "pictures")) == 11


OWN = ("report.md", "log.jsonl", "curves.png", "model.safetensors", "reconstructions.png", "codes.bin")


@pytest.mark.parametrize("name", OWN)
def test_files_of_somebody_else_stay(name: str, folder: Path, capsys: pytest.CaptureFixture[str]):
    Path("run").mkdir()
    Path("run", name).write_text("mine")
    Path("run", "notes.txt").write_text("mine, too")
    other = f"run has {name} in it, which is not of a run: choose another folder, or move it elsewhere"
    assert complaint(TRAIN, capsys) == other
    assert files(folder / "run") == sorted([name, "notes.txt"]) and Path("run", name).read_text() == "mine"
    Path("run", name).unlink()
    assert main(TRAIN) == 0 and Path("run/notes.txt").read_text() == "mine, too"
    tokens = ["extract", "--data", "images", "--tokenizer", "run", "--device", "cpu", "--output"]
    other = "run has run.yaml in it, which is not of tokens: choose another folder, or move it elsewhere"
    assert complaint([*tokens, "run"], capsys) == other


@pytest.mark.parametrize("name", ["codes.bin", "labels.bin", "ids.jsonl"])
def test_extraction_leaves_files_of_somebody_else(
    name: str, folder: Path, model: Path, capsys: pytest.CaptureFixture[str]
):
    Path("store").mkdir()
    Path("store", name).write_text("mine")
    argv = ["extract", "--data", "images", "--tokenizer", str(model), "--device", "cpu", "--output", "store"]
    other = f"store has {name} in it, which is not of tokens: choose another folder, or move it elsewhere"
    assert complaint(argv, capsys) == other
    assert files(folder / "store") == [name] and Path("store", name).read_text() == "mine"


@pytest.mark.usefixtures("quick")
def test_a_page_of_somebody_else_stays(folder: Path, model: Path, capsys: pytest.CaptureFixture[str]):
    Path("run").mkdir()
    Path("run/report.html").write_text("mine")
    other = "run has report.html in it, which is not of a run: choose another folder, or move it elsewhere"
    for more in (["--dry-run"], []):
        assert complaint(tuned(model, *more), capsys) == other
    assert files(folder / "run") == ["report.html"]


@pytest.mark.parametrize("begun", [False, True])
def test_odd_things_in_the_folder_of_a_run(begun: bool, folder: Path, capsys: pytest.CaptureFixture[str]):
    if begun:
        assert main(TRAIN) == 0
        shutil.rmtree("run/resume")
        Path("run/config.json").unlink()
    Path("run/config.json").mkdir(parents=True)
    assert complaint(TRAIN, capsys) == "run/config.json must be a file of the run: move what is there elsewhere"
    Path("run/config.json").rmdir()
    Path("run/resume").write_text("mine")
    before = files(folder)
    assert complaint(TRAIN, capsys) == "run/resume must be a folder of the run: move what is there elsewhere"
    assert files(folder) == before and Path("run/resume").read_text() == "mine"


def test_a_model_of_the_other_kind_to_start_from(folder: Path, model: Path, capsys: pytest.CaptureFixture[str]):
    start = f"{shutil.copytree(model / 'tokenizer', 'start')} holds a tokenizer, not an AR model (gpt): "
    start += "give an AR model (gpt), or a folder that holds both"
    gpt = ["train", "gpt", "--tokens", "tokens", "--tokenizer", "start", "--output", "run"]
    assert complaint([*gpt, "--init", "start"], capsys) == start
    assert complaint(tuned("start"), capsys) == start
    shutil.copytree(model / "gpt", "other")
    told = complaint([*TRAIN, "--init", "other"], capsys)
    assert told == "other holds an AR model (gpt), not a tokenizer: give a tokenizer, or a folder that holds both"


def test_names_that_are_not_utf_8(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any):
    """Of the output it is said before the first step, as weights cannot be written there; images may have one."""
    name = os.fsdecode(b"caf\xe9")
    argv = [*TRAIN, "--output", name]
    refusal = "cannot write to caf\N{REPLACEMENT CHARACTER}: its path is not valid UTF-8"
    assert complaint(argv, capsys).startswith(refusal)
    monkeypatch.setattr("detailflow.cli.train.check_output", lambda *_, **__: None)
    assert complaint(argv, capsys).startswith(refusal)  # as from Python
    assert not Path(name).exists()
    shutil.copytree("images", name)
    argv = [*TRAIN, "--data", name]
    monkeypatch.setattr("sys.argv", ["detailflow", *argv])
    assert main(argv) == 0
    assert "--data 'caf\N{REPLACEMENT CHARACTER}'" in Path("run", "report.md").read_text("utf-8")
