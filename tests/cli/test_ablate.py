"""`detailflow ablate`: the shipped recipe at a tiny size, from end to end."""

from pathlib import Path

import pytest
import yaml

from detailflow.cli.ablate import SETTINGS
from detailflow.cli.main import main
from detailflow.training.ablation import Ablation

RECIPE = Path(__file__).parents[2] / "src" / "detailflow" / "configs" / "ablation-cifar10.yaml"
LOOP = {"steps": 1, "batch_size": 2, "compile": False, "trackers": [], "precision": "fp32"}
VIT = {"width": 16, "depth": 1, "heads": 2}
TINY = {
    "num_samples": 12,
    "num_reconstructions": 12,
    "guidance_scales": [1.0],
    "seeds": [0],
    "tokenizer": {
        "model": {
            "image_size": 16,
            "patch_size": 8,
            "num_tokens": 8,
            "codebook_size": 16,
            "codebook_dim": 4,
            "encoder": VIT,
            "decoder": VIT,
        },
        "classifier_epochs": 1,
        "perceptual": 0.0,
        "loop": LOOP,
    },
    "extract": {"precision": "fp32"},
    "gpt": {"width": 16, "depth": 1, "heads": 2, "loop": LOOP},
}


@pytest.fixture(scope="module")
def material(cifar: Path, feature_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images/ in a train and a test split, and features.safetensors."""
    folder = tmp_path_factory.mktemp("material")
    for k, path in enumerate(sorted(cifar.rglob("*.png"))[::6]):
        copy = folder / "images" / ("train", "test")[k % 2] / path.parent.name / path.name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    (folder / "features.safetensors").write_bytes(feature_file.read_bytes())
    return folder


@pytest.fixture
def folder(material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: all that, and tiny.yaml."""
    monkeypatch.chdir(tmp_path)
    for name in ("images", "features.safetensors"):
        (tmp_path / name).symlink_to(material / name)
    Path("tiny.yaml").write_text(yaml.safe_dump(TINY))
    return tmp_path


ABLATE = ["ablate", "--config", str(RECIPE), "--config", "tiny.yaml", "--data", "images", "--features", "features.safetensors"]
ABLATE += ["--output", "out", "--device", "cpu"]


def test_the_recipe_from_end_to_end(folder: Path, capsys: pytest.CaptureFixture[str]):
    assert main([*ABLATE, "--variants", "baseline", "parallel", "--gpt.dropout=0.1"]) == 0
    out = capsys.readouterr().out
    assert "| 1 | baseline | 8 | " in out and "| 4 | parallel | 2 | " in out and "causal-encoder |" not in out
    assert "wrote out/report.md" in out and "parallel: tokenizer" in out and "Not measured with these settings" in out
    assert yaml.safe_load(Path("out/baseline/gpt/run.yaml").read_text())["dropout"] == 0.1

    assert main([*ABLATE, "--gpt.dropout", "0.1"]) == 0  # the others, and these are not done again
    out = capsys.readouterr().out
    assert "baseline: " not in out and "alignment: evaluation" in out and "The paper's ordering is" in out
    steps = [line.split("|")[3].strip() for line in out.splitlines() if line.startswith(("| 1 ", "| 2 ", "| 4 ", "| 6 ", "| 7 "))]
    assert steps == ["8", "8", "2", "5", "5"]
    text = Path("out/report.md").read_text()
    assert "3.97" in text and "3.35" in text and "![The variants: 1 baseline" in text and "ablation.png" in text
    assert main([*ABLATE, "--variants", "baseline"]) == 2  # with the recipe's own dropout
    err = capsys.readouterr().err.splitlines()[-1]
    assert "out/baseline/gpt holds a run with another dropout (0.1, not 0.0)" in err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--variants", "nothing"], "there is no variant 'nothing': the variants are baseline, causal-encoder, "),
        (["--features", "nowhere.safetensors"], "nowhere.safetensors does not exist"),
        (["--features", "vgg"], "features must be inception, dinov2 or "),
        (["--data", "nowhere/at/all"], "nowhere/at/all does not exist"),
        (["--config", "nowhere.yaml"], "--config nowhere.yaml: this file can't be read"),
        (["--gpt.loop.step", "1"], "variant baseline: unknown key 'step' in the config"),
        (["--tokenizer.loop.learning_rate", "1e-3", "--num_sample", "1"], "unknown key 'num_sample' in the config"),
        (["--gpt.width"], "--gpt.width needs a value"),
        (["--gpt.width", "--gpt.depth"], "--gpt.width needs a value"),
        (["images"], "unexpected word 'images': settings are given as --KEY VALUE"),
        (["--gpt..width", "1"], "unexpected word '--gpt..width'"),
        (["--seeds", "[0"], "'[0' is no valid value"),
        (["--seeds", "[0, -1]"], "seeds must be 0 or more, not -1"),
    ],
)
def test_bad_input(argv: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]):
    assert main([*ABLATE, *argv]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert err.startswith("detailflow: error: ") and message in err
    assert not Path("out").exists()


def test_help(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stopped:
        main(["ablate"])
    assert stopped.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 40 and max(map(len, lines)) <= 100
    assert {name.partition(".")[0] for name in SETTINGS} == set(Ablation.__dataclass_fields__) - {"variants"}
