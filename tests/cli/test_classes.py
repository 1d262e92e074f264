"""`detailflow classes`, and ImageNet's labels in `detailflow generate`."""

import json
import shutil
from pathlib import Path

import pytest

from detailflow.cli.main import main


def lines(capsys: pytest.CaptureFixture[str], *argv: str) -> list[str]:
    assert main(["classes", *argv]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out.splitlines()


def test_the_shipped_models_by_default(capsys: pytest.CaptureFixture[str]):
    shown = lines(capsys)
    assert len(shown) == 10 and shown[0] == "0  airplane" and shown[9] == "9  truck"


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch):
    def refuse(*args: object, **options: object) -> None:
        raise AssertionError("a download")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("name", ["detailflow-16", "detailflow-32", "detailflow-64"])
def test_the_zoos_without_a_download(name: str, capsys: pytest.CaptureFixture[str]):
    shown = lines(capsys, "--model", name)
    assert len(shown) == 1000
    assert shown[0] == "  0  n01440764  tench, Tinca tinca" and shown[207] == "207  n02099601  golden retriever"


def test_a_search(capsys: pytest.CaptureFixture[str]):
    assert lines(capsys, "--model", "detailflow-16", "--search", "CRANE") == [
        "134  n02012849  crane",
        "517  n03126707  crane",
    ]
    assert lines(capsys, "--model", "detailflow-16", "--search", "n02099601") == ["207  n02099601  golden retriever"]


def test_a_folder_of_ones_own(model: Path, capsys: pytest.CaptureFixture[str]):
    assert lines(capsys, "--model", str(model), "--search", "o") == ["1  automobile", "4  Hot dog"]


def renamed(model: Path, folder: Path, names: list[str]) -> Path:
    """The model with other names of its five classes."""
    shutil.copytree(model, folder)
    config = folder / "gpt" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"class_names": names}))
    return folder


def test_a_model_on_imagenets_folders(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    own = renamed(model, tmp_path / "own", ["n01440764", "n02099601", "n02510455", "mine", "n15075141"])
    shown = lines(capsys, "--model", str(own))
    assert shown[0] == "0  n01440764  tench, Tinca tinca" and shown[1] == "1  n02099601  golden retriever"
    assert shown[3] == "3             mine"
    options = [
        "--model",
        str(own),
        "--num-tokens",
        "1",
        "--device",
        "cpu",
        "--no-grid",
        "--output",
        str(tmp_path / "out"),
    ]
    assert main(["generate", "golden retriever", "n02510455", *options]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "0000-golden-retriever.png",
        "0001-giant-panda.png",
    ]


def test_names_that_a_terminal_would_obey(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    own = renamed(model, tmp_path / "own", ["\x1b[2Jcat", "\ud800", "c", "d", "e"])
    assert lines(capsys, "--model", str(own))[:2] == ["0  \\x1b[2Jcat", "1  \N{REPLACEMENT CHARACTER}"]


def test_classes_that_are_called_by_numbers(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    own = renamed(model, tmp_path / "own", ["0", "1", "10", "2", "UPPER"])
    options = ["--model", str(own), "--num-tokens", "1", "--device", "cpu", "--no-grid"]
    assert main(["generate", "2", *options, "--output", str(tmp_path / "two")]) == 0
    assert [path.name for path in (tmp_path / "two").iterdir()] == ["0000-2.png"]
    assert main(["generate", *options, "--output", str(tmp_path / "all")]) == 0  # all of them
    assert sorted(path.name for path in (tmp_path / "all").iterdir())[2:4] == ["0002-10.png", "0003-2.png"]
    many = ["--num-images", "4", "--output", str(tmp_path / "many")]
    assert main(["generate", "2", "10", *options, *many]) == 0
    assert sorted(path.name for path in (tmp_path / "many").glob("*.png"))[:2] == ["0000-2.png", "0001-10.png"]
    capsys.readouterr()
    assert main(["generate", "3", *options, "--output", str(tmp_path / "three")]) == 2
    error = capsys.readouterr().err
    assert (
        error == "detailflow: error: unknown class '3': numbers in text are names here, and "
        "the classes are 0, 1, 10, 2, UPPER\n"
    )


def test_only_the_config_is_read(published: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert lines(capsys, "--model", str(published))[207] == "207  n02099601  golden retriever"
    (tmp_path / "config.json").write_bytes((model / "gpt" / "config.json").read_bytes())
    assert len(lines(capsys, "--model", str(tmp_path))) == 5


def test_a_model_without_names(capsys: pytest.CaptureFixture[str]):
    tiny = Path(__file__).parents[1] / "parity" / "tiny-32"
    assert lines(capsys, "--model", str(tiny)) == [str(i) for i in range(10)]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--search", "catt"], "unknown class 'catt': did you mean cat?"),
        (["--search", "retreiver", "--model", "detailflow-16"], "unknown class 'retreiver': did you mean "),
        (["--model", "nowhere/at/all"], "there is no such folder: nowhere/at/all"),
        (["--model", "TOKENIZER"], "TOKENIZER holds a tokenizer, not an AR model (gpt)"),
        (["--model", "EMPTY"], "EMPTY has no config.json"),
        (["cat"], "cat is more than this command takes: see detailflow classes --help"),
    ],
)
def test_bad_input(argv: list[str], message: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    places = {"TOKENIZER": str(model / "tokenizer"), "EMPTY": str(tmp_path)}
    assert main(["classes", *(places.get(text, text) for text in argv)]) == 2
    out, err = capsys.readouterr()
    for name, place in places.items():
        message = message.replace(name, place)
    assert out == "" and err.startswith(f"detailflow: error: {message}") and err.count("\n") == 1


def test_generate_takes_imagenets_names(published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    def generate(*labels: str) -> int:
        options = ["--num-tokens", "1", "--device", "cpu", "--output", str(tmp_path)]
        return main(["generate", *labels, "--model", str(published.parent), *options])

    assert generate("golden retriever", "n02099601", "207", "Tinca tinca") == 0
    retrievers = [f"{i:04d}-golden-retriever.png" for i in range(3)]
    assert sorted(path.name for path in tmp_path.iterdir()) == [*retrievers, "0003-tench.png", "grid.png"]
    assert generate("panda") == 2
    assert "2 classes are called 'panda': give the number or WordNet id, one of 387 (" in capsys.readouterr().err
