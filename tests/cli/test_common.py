"""What the commands share: options, suggestions, `~` for the home folder, and model names with a revision."""

import shutil
from pathlib import Path

import pytest
import yaml
from PIL import Image

from detailflow.cli import bench, classes, convert, data, evaluate, generate, reconstruct, serve, train
from detailflow.cli import request as cli_settings
from detailflow.cli.common import Parser, check_apart
from detailflow.cli.main import main
from detailflow.errors import DetailFlowError
from detailflow.sampling import SamplingConfig, SamplingOptions
from detailflow.settings import list_settings, parse_settings
from detailflow.training.config import Extraction, GPTTraining, TokenizerTraining

PARSERS = (
    *(module.parser for module in (bench, classes, convert, generate, reconstruct)),
    *(getattr(evaluate, f"{name}_parser") for name in ("tokenizer", "gpt", "samples", "statistics", "compare")),
)
PATHS = {
    "DIR",
    "FILE",
    "MODEL",
    "IMAGE",
    "SOURCE",
    "SAMPLES",
    "REFERENCE",
    "DATA",
    "SET",
    "A",
    "B",
}  # as their values are called


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("make", PARSERS, ids=lambda make: make().prog)
def test_every_option_that_names_a_path(make, home: Path):
    parser: Parser = make()
    every = [action for actions in parser.sections.values() for action in actions]
    actions = [a for a in every if a.dest == "model" or str(a.metavar).removesuffix(".npz") in PATHS]
    read = {a.dest: Path(a.type("~/x")) for a in actions if a.type}
    assert read.keys() == {a.dest for a in actions}
    assert set(read.values()) == {home / "x"}


def test_settings(home: Path, capsys: pytest.CaptureFixture[str]):
    """In the file, beside it, after `=`, and in the name of the file."""
    for k in range(2):
        path = home / "images" / f"class{k}" / "0.png"
        path.parent.mkdir(parents=True)
        Image.new("RGB", (32, 32), (90 * k, 100, 200)).save(path)
    network = {"width": 16, "depth": 1, "heads": 2}
    sizes = dict(image_size=32, patch_size=16, num_tokens=8, group_size=4, codebook_size=32, codebook_dim=4)
    loop = {"steps": 1, "batch_size": 2, "learning_rate": 0.001, "trackers": []}
    settings = {
        "data": "~/images",
        "model": {**sizes, "encoder": network, "decoder": network},
        "loop": loop,
        "adversarial": 0,
    }
    (home / "a.yaml").write_text(yaml.safe_dump(settings))
    assert main(["train", "tokenizer", "--config=~/a.yaml", "--output=~/first", "--device", "cpu"]) == 0
    again = [
        "train",
        "tokenizer",
        "--config",
        "~/a.yaml",
        "--output",
        "~/second",
        "--init",
        "~/first",
        "--device",
        "cpu",
    ]
    assert main(again) == 0
    extraction = ["extract", "--data=~/images", "--tokenizer=~/second", "--crops", "two", "--output", "~/tokens"]
    assert main([*extraction, "--device", "cpu"]) == 0
    sizes_of_gpt = ["--width", "16", "--depth", "1", "--heads", "2", "--loop.steps", "1", "--loop.batch_size", "2"]
    more = ["--loop.learning_rate", "0.001", "--loop.trackers", "[]", "--device", "cpu"]
    assert (
        main(
            ["train", "gpt", "--tokens", "~/tokens", "--tokenizer", "~/second", "--output=~/gpt", *sizes_of_gpt, *more]
        )
        == 0
    )
    assert (home / "gpt" / "model.safetensors").exists() and not Path("~").exists()


# ------------------------------------------------------------------------------------------------- misspelled options


def settings_parser(kind: type, command: str) -> Parser:
    return cli_settings.make_parser(kind, command, "", can_plan=True)


EVERY_PARSER = [
    *(make() for make in PARSERS),
    *(module.parser() for module in (data, serve)),
    train.preset_parser(),
    settings_parser(TokenizerTraining, "train tokenizer"),
    settings_parser(GPTTraining, "train gpt"),
    settings_parser(Extraction, "extract"),
]


@pytest.mark.parametrize("parser", EVERY_PARSER, ids=lambda parser: parser.prog)
def test_a_suggestion_is_always_an_option(parser: Parser):
    """Each option with a letter twice is recognised, and what is suggested exists."""
    options = [name for name in parser.known_options if name.startswith("--")]
    assert len(options) > 1 or parser.prog.endswith("compare")
    for option in options:
        for wrong in (option + option[-1], option[:-1] if len(option) > 6 else option + "x"):
            if wrong in options:
                continue
            with pytest.raises(DetailFlowError) as error:
                parser.parse_args([wrong, "1"])
            problem, _, suggestion = str(error.value).partition(": did you mean ")
            assert problem == f"unknown option {wrong!r}" and suggestion.removesuffix("?") in [*options, "--max-pixels"]


@pytest.mark.parametrize("kind", [TokenizerTraining, GPTTraining, Extraction])
def test_a_suggestion_is_always_a_setting(kind: type):
    """In files and from Python, too; a misspelled setting suggests the setting itself."""
    names = [setting.name for setting in list_settings(kind)]
    for name in names:
        with pytest.raises(DetailFlowError) as error:
            parse_settings(kind, {name + name[-1]: 1}, "a.yaml")
        assert str(error.value) == f"a.yaml: unknown setting {name + name[-1]!r}: did you mean {name}?"


def test_every_setting_is_documented():
    for kind in (TokenizerTraining, GPTTraining, Extraction, SamplingConfig):
        assert not [setting.name for setting in list_settings(kind) if not setting.documentation]
    assert list(SamplingOptions.__annotations__) == [setting.name for setting in list_settings(SamplingConfig)]


def test_dashes_and_underscores_are_the_same(capsys: pytest.CaptureFixture[str]):
    parser = settings_parser(TokenizerTraining, "train tokenizer")
    assert vars(parser.parse_args(["--loop.batch-size", "3"]))["loop.batch_size"] == 3
    assert bench.parser().parse_args(["--batch_sizes=3"]).batch_sizes == [3]


@pytest.mark.parametrize(
    "argv",
    ["generate --seed -1", "evaluate tokenizer --data x --output y --seed -1", "extract --data x --seed -1",
     "evaluate gpt --reference x --output y --seed -1"],
)  # fmt: skip
def test_the_same_mistake_gives_the_same_sentence(argv: str, capsys: pytest.CaptureFixture[str]):
    assert main(argv.split()) == 2
    assert capsys.readouterr().err.replace("--seeds", "--seed").endswith(": --seed must be 0 to 2^64 - 1, not -1\n")


# ------------------------------------------------------------------------------------------------- revisions


def test_a_revision_of_a_model(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked = []

    def snapshot_download(repository: str, revision: str | None = None, **options: object) -> str:
        asked.append((repository, revision))
        return str(model)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (32, 32)).save("a.png")
    shutil.copytree(model, "me@home")
    few = ["cat", "--num-tokens", "1", "--device", "cpu"]
    assert main(["generate", *few, "--model", "me@home"]) == 0 and not asked
    assert main(["generate", *few, "--model", "me/model@v1"]) == 0
    assert main(["reconstruct", "a.png", "--model", "me/model@refs/pr/1"]) == 0
    assert main(["classes", "--model", "me/model@v2"]) == 0
    assert main(["convert", "me/model@v3", "--output", "converted"]) == 0
    assert {revision for _, revision in asked} == {"v1", "refs/pr/1", "v2", "v3"}
    assert {repository for repository, _ in asked} == {"me/model"}


@pytest.mark.parametrize(
    ("data", "output", "message"),
    [
        ("photos", "photos", "photos is your data: choose another --output, such as runs/photos"),
        ("photos/", "./photos/../photos", "photos/../photos is your data: choose another --output, such as runs/"),
        ("photos", "photos/runs/a", "photos/runs/a is in your data, photos: choose another --output, such as runs/p"),
        ("~/photos", "photos/new", "photos/new is in your data, ~/photos: choose another --output, such as runs/photo"),
        ("photos", "link/new", "link/new is in your data, photos: choose another --output, such as runs/photos"),
        ("photos", "runs/photos", ""),
        ("photos", "photos-run", ""),
        ("photos/cat", "photos", ""),
        ("owner/name", "owner/name", ""),
        ("photos/a.tar", "photos", ""),
    ],
)
def test_no_output_in_the_data(data: str, output: str, message: str, home: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(home)
    (home / "photos" / "cat").mkdir(parents=True)
    (home / "photos" / "a.tar").write_text("")
    (home / "link").symlink_to("photos")
    if message:
        with pytest.raises(DetailFlowError) as caught:
            check_apart(Path(output), data)
        assert str(caught.value).startswith(message)
    else:
        check_apart(Path(output), data)


def test_the_folder_that_is_suggested_is_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "photos" / "cat").mkdir(parents=True)
    for where, named in (("photos", "../runs/photos"), ("photos/cat", "../../runs/photos")):
        monkeypatch.chdir(tmp_path / where)
        with pytest.raises(DetailFlowError, match=f"such as {named}$"):
            check_apart(Path("run"), str(tmp_path / "photos"))
        check_apart(Path(named), str(tmp_path / "photos"))
