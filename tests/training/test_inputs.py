"""What a run was begun with: the same command goes on wherever it is now, and not if it is something else."""

import shutil
from pathlib import Path

import pytest
import yaml
from PIL import Image

from detailflow.cli.main import main
from detailflow.data.images import open_images
from detailflow.errors import DetailFlowError
from detailflow.training.checkpoints import go_on, reserve_run
from detailflow.training.inputs import difference, files_input, images_input

NETWORK = {"width": 16, "depth": 1, "heads": 2}
SIZES = dict(image_size=32, patch_size=16, num_tokens=8, group_size=4, codebook_size=32, codebook_dim=4)
LOOP = {"steps": 2, "batch_size": 2, "learning_rate": 0.001, "trackers": [], "checkpoint_minutes": 0}


def add_class(folder: Path, name: str, count: int = 3) -> None:
    for i in range(count):
        path = folder / name / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((32 + i, 32), 60).save(path)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: photos/ with two classes, and a.yaml for a tokenizer."""
    monkeypatch.chdir(tmp_path)
    for name in ("cat", "dog"):
        add_class(Path("photos"), name)
    model = {**SIZES, "encoder": NETWORK, "decoder": NETWORK}
    Path("a.yaml").write_text(yaml.safe_dump({"data": "photos", "model": model, "adversarial": 0, "loop": LOOP}))
    return tmp_path


TOKENIZER = ["train", "tokenizer", "--config", "a.yaml", "--output", "run", "--device", "cpu"]


def stop(output: str) -> None:
    """What a run looks like that was stopped after its last checkpoint."""
    for name in ("config.json", "model.safetensors"):
        Path(output, name).unlink()


def complaint(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("detailflow: error: ")
    return err.removeprefix("detailflow: error: ").rstrip()


def goes_on(argv: list[str], capsys: pytest.CaptureFixture[str]) -> bool:
    capsys.readouterr()
    assert main(argv) == 0
    return "going on from step" in capsys.readouterr().out


def test_images_are_known_by_their_listing(here: Path, capsys: pytest.CaptureFixture[str]):
    assert main(TOKENIZER) == 0
    shutil.move("photos", "moved")
    for data in ("moved", "moved/", str(here / "moved"), "run/../moved", "./moved"):
        stop("run")
        assert goes_on([*TOKENIZER, "--data", data], capsys)
        assert yaml.safe_load(Path("run/run.yaml").read_text())["data"] == data
    stop("run")
    add_class(Path("moved"), "fox")
    said = complaint([*TOKENIZER, "--data", "moved"], capsys)
    assert said.startswith(
        "run holds a run that was begun with other images (6 images in 2 classes then, 9 images in 3 classes now; "
        "changed: fox 0 → 3): choose another folder, or give it the same again"
    )
    shutil.rmtree("moved/fox")
    Image.new("RGB", (40, 40), "red").save("moved/cat/0.png")
    assert "as many of each class, in other files" in complaint([*TOKENIZER, "--data", "moved"], capsys)


def test_a_finished_run_and_other_images(here: Path, capsys: pytest.CaptureFixture[str]):
    assert main(TOKENIZER) == 0
    add_class(Path("photos"), "dog", 4)
    assert "changed: dog 3 → 4" in complaint(TOKENIZER, capsys)


def test_models_and_tokens_are_known_by_their_content(here: Path, capsys: pytest.CaptureFixture[str]):
    """A tokenizer to start from, the tokens, and the tokenizer that made them."""
    assert main(TOKENIZER) == 0
    second = [*TOKENIZER, "--output", "second", "--init"]
    assert main([*second, "run"]) == 0
    extraction = ["extract", "--data", "photos", "--crops", "two", "--output", "tokens", "--device", "cpu"]
    assert main([*extraction, "--tokenizer", "second"]) == 0
    settings = {"width": 16, "depth": 1, "heads": 2, "loop": LOOP}
    Path("b.yaml").write_text(yaml.safe_dump(settings))
    gpt = ["train", "gpt", "--config", "b.yaml", "--output", "gpt", "--device", "cpu"]
    assert main([*gpt, "--tokens", "tokens", "--tokenizer", "second"]) == 0

    shutil.copytree("run", "copy")
    stop("second")
    assert goes_on([*second, "copy"], capsys)
    shutil.rmtree("copy")
    stop("second")
    assert complaint([*second, "copy"], capsys)  # it is not known what that was, unless it is called as before:
    shutil.move("run", "elsewhere")
    assert goes_on([*second, "elsewhere"], capsys)

    shutil.move("photos", "pictures")
    capsys.readouterr()
    again = ["extract", "--data", str(here / "pictures"), *extraction[3:], "--tokenizer", str(here / "second")]
    assert main(again) == 0 and "finished already" in capsys.readouterr().out
    shutil.move("tokens", "store")
    stop("gpt")
    assert goes_on([*gpt, "--tokens", str(here / "store"), "--tokenizer", "second/"], capsys)
    add_class(Path("pictures"), "fox")
    again[again.index("tokens")] = "store"
    assert "holds tokens of other images (6 in 2 classes" in complaint(again, capsys)
    again[again.index("store")] = "more"
    assert main(again) == 0
    said = complaint([*gpt, "--tokens", "more", "--tokenizer", "second"], capsys)
    assert "begun with other tokens (6 images in 2 classes then, 9 images in 3 classes now; changed: fox 0 → 3" in said


def test_a_run_of_an_earlier_version(here: Path):
    """It did not note what its images are known by.

    They are known by their path once more, and by content from then on.
    """
    config = {"data": "photos", "loop": {}}
    assert reserve_run(here / "run", "tokenizer", config)
    inputs = {"data": images_input(open_images("photos"))}
    with pytest.raises(DetailFlowError, match="another data"):
        reserve_run(here / "run", "tokenizer", config | {"data": "photos/"}, inputs)
    settings = reserve_run(here / "run", "tokenizer", config, inputs)
    assert settings
    go_on(here / "run", settings)
    assert reserve_run(here / "run", "tokenizer", config | {"data": "photos/"}, inputs)


def test_networks_in_files(here: Path):
    Path("vgg.pth").write_bytes(b"weights")
    Path("tower").mkdir()
    Path("tower/model.safetensors").write_bytes(b"weights")

    def read(path: str) -> dict:
        found = files_input(path)
        assert found
        return found.read()

    first, tower = read("vgg.pth"), read("tower")
    assert first == read(str(here / "vgg.pth")) and first != tower == read("tower/")
    Path("vgg.pth").write_bytes(b"others")
    message = difference("perceptual_network", first, read("vgg.pth"))
    assert message and message.startswith("another perceptual_network (its fingerprint was ")
    assert files_input("google/siglip2") is None is files_input(None)


def test_stores_of_files_are_known_by_content(
    here: Path, cifar_table: Path, model: Path, capsys: pytest.CaptureFixture[str]
):
    """The images' names in the store are those within their folder, be it given as a folder, a file or a pattern."""
    Path("a").mkdir()
    shutil.copy(cifar_table, "a/images.parquet")
    extraction = [
        "extract",
        "--tokenizer",
        str(model),
        "--crops",
        "two",
        "--device",
        "cpu",
        "--output",
        "tokens",
        "--data",
    ]
    assert main([*extraction, "a/images.parquet"]) == 0
    shutil.move("a", "b")
    for data in ("b/images.parquet", str(here / "b" / "*.parquet"), "b"):
        capsys.readouterr()
        assert main([*extraction, data]) == 0, data
        assert "finished already" in capsys.readouterr().out
