"""experiments/shipped-model/make.py: its settings are the shipped model's, and its commands run at a tiny size."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from detailflow import DetailFlowPipeline
from detailflow.cli.main import main
from detailflow.cli.request import read_request
from detailflow.training.config import Extraction, GPTTraining, TokenizerTraining

FOLDER = Path(__file__).parents[2] / "experiments" / "shipped-model"
VIT = {"width": 16, "depth": 1, "heads": 2}
LOOP = {"steps": 2, "batch_size": 4, "learning_rate": 1e-3, "trackers": [], "precision": "fp32"}
SIZES = {
    "patch_size": 8,
    "num_tokens": 48,
    "group_size": 8,
    "causal_tokens": 16,
    "codebook_size": 16,
    "codebook_dim": 4,
}
TOKENIZER = {
    "model": SIZES | {"image_size": 32, "encoder": VIT, "decoder": VIT},
    "perceptual": 0.0,
    "adversarial": 0.0,
    "loop": LOOP,
}
TINY = {
    "tokenizer": TOKENIZER,
    "tokenizer-correction": TOKENIZER,
    "extract": {"crops": "six", "val_share": 0.1},
    "gpt": VIT | {"loop": LOOP},
    "decoder": TOKENIZER
    | {
        "model": TOKENIZER["model"] | {"decoder": VIT | {"depth": 2}, "pixel_channels": 4},
        "freeze": "encoder",
        "adversarial": 0.1,
        "adversarial_from": 0.0,
    },
}


@pytest.fixture(scope="module")
def make(load_script: Callable[[Path], ModuleType]) -> ModuleType:
    return load_script(FOLDER / "make.py")


def test_the_settings_are_those_of_the_shipped_model(
    make: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    make.main(["--data", "my train.parquet", "--output", str(tmp_path / "out"), "--dry-run"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 7 and not list(tmp_path.iterdir())
    kinds = {"train tokenizer": TokenizerTraining, "extract": Extraction, "train gpt": GPTTraining}
    settings = []
    for line in lines[:5]:
        command = next(name for name in kinds if line.startswith(f"detailflow {name} "))
        request = read_request(kinds[command], command, "", make.shlex.split(line)[len(command.split()) + 1 :])
        assert request is not None
        settings.append(request.settings)
    first, second, tokens, gpt, last = settings
    shipped = DetailFlowPipeline.from_pretrained(device="cpu")
    assert first.model == second.model and last.model == shipped.tokenizer.config
    assert first.data == second.data == tokens.data == "my train.parquet"
    assert first.perceptual > 0 and second.perceptual > 0
    assert second.init == str(tmp_path / "out" / "first")
    assert gpt.tokenizer == tokens.tokenizer == last.init and last.gpt == str(tmp_path / "out" / "gpt")
    sizes = shipped.gpt.config
    assert (gpt.width, gpt.depth, gpt.heads) == (sizes.width, sizes.depth, sizes.heads)
    assert gpt.sampling == sizes.sampling


def test_the_commands_run(make: ModuleType, cifar: Path, feature_file: Path, tmp_path: Path):
    for stage, settings in TINY.items():
        (tmp_path / f"{stage}.yaml").write_text(yaml.safe_dump(settings))
    line = ["--data", cifar, "--test", cifar, "--output", tmp_path / "out", "--recipe", tmp_path, "--images", "10"]
    args = make.parse_args([*map(str, line), "--features", str(feature_file)])
    for command in make.commands(args):
        assert not make.measured(command)
        assert main(command[1:]) == 0
        assert make.measured(command) == (command[1] == "evaluate")
    pipeline = DetailFlowPipeline.from_pretrained(tmp_path / "out" / "shipped", device="cpu")
    assert len(pipeline(["class3"])) == 1
