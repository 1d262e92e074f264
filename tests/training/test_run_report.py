"""The page that training all in a row ends with."""

import base64
import io
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image

from detailflow.cli.main import main
from detailflow.data.images import open_images
from detailflow.data.tokens import TokenStore
from detailflow.errors import DetailFlowWarning
from detailflow.models import efficientnet
from detailflow.training import nearest, run_report
from detailflow.training.run_report import Stage, expectations, write_run_report
from detailflow.training.run_report_text import hardly_trained, longer_tokenizer, with_options
from detailflow.training.tracking import read_history

HOSTILE = ("<script>alert(1)<'script>", '"><img src=x onerror=alert(2)>', "{{ 7 * 7 }} & <b>")
MAY_BE_EMPTY = {"meta", "link", "img", "source", "line", "circle"}


class Page(HTMLParser):
    """The elements of a page, its text, and what it would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text, self.loaded, self.attributes = "", [], []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]
        self.loaded += [value or "" for name, value in attrs if name in ("src", "srcset", "href")]
        if tag not in MAY_BE_EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.text += data


def read(folder: Path) -> Page:
    return Page((folder / "report.html").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def photos(cifar: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of three classes with names that would be markup."""
    folder = tmp_path_factory.mktemp("photos") / "<i>photos"
    for name, images in zip(HOSTILE, sorted(cifar.iterdir()), strict=False):
        (folder / name).mkdir(parents=True)
        for path in sorted(images.glob("*.png"))[:12]:
            shutil.copy(path, folder / name / f"<u>{path.name}")
    return folder


@pytest.fixture(scope="module")
def run(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on them, of two steps each."""
    output = tmp_path_factory.mktemp("runs") / "<b>run"
    options = ["--tokenizer-steps", "3", "--gpt-steps", "2", "--device", "cpu", "--preset", "small-32"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["detailflow", "train", "--data", str(photos), "--output", str(output), *options])
        assert main(["train", "--data", str(photos), "--output", str(output), *options]) == 0
    return output


def test_it_stands_alone(run: Path):
    page = read(run)
    assert not page.open and "script" not in page.tags and not [x for x in page.attributes if x.startswith("on")]
    assert page.loaded and all(address.startswith(("data:", "#words")) for address in page.loaded)
    assert "default-src 'none'" in (run / "report.html").read_text(encoding="utf-8")


def test_names_are_text(run: Path, photos: Path):
    page = read(run)
    assert not {"b", "i", "u", "script"} & set(page.tags)
    for name in (*HOSTILE, "<b>run", "<i>photos"):
        assert name in page.text
    commands = re.sub(r"\s+", " ", page.text)
    assert "detailflow train --data" in commands
    for command in (
        "generate --model",
        "vary photo.jpg",
        "reconstruct photo.jpg",
        "serve",
        "evaluate tokenizer",
        "convert",
    ):
        assert f"detailflow {command}" in commands


def test_the_figures_are_the_logged_ones(run: Path):
    text = read(run).text
    tokenizer, gpt = (read_history(run / kind)[-1] for kind in ("tokenizer", "gpt"))
    for record, names in ((tokenizer, ("val_loss", "val_psnr")), (gpt, ("val_loss", "val_accuracy"))):
        for name in names:
            assert f"{record[name]:.4g}" in text
    held, trained = TokenStore.open(run / "tokens").validation, TokenStore.open(run / "tokens")
    assert held is not None
    assert f"{len(trained):,} images are enough to see that everything works" in text
    assert f"{len(held):,} more held out" in text
    assert "Images that were held out" in text and "features of efficientnet-lite0" in text
    stage = Stage("gpt", run / "gpt")
    seconds = sum(r["step"] * stage.images / stage.steps / r["images_per_second"] for r in stage.history)
    assert len(stage.history) == 1 and stage.seconds == pytest.approx(seconds)
    assert stage.best[0] == 2 and stage.best[1]["val_loss"] == gpt["val_loss"]


def test_the_pictures(run: Path):
    pictures = [uri for uri in read(run).loaded if uri.startswith("data:image/png")]
    sizes = [Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).size for uri in pictures]
    samples, counts = 3 * 8, 7  # of three classes; 1, 2, 4, 8, 16, 32 and 48 tokens
    held = len(TokenStore.open(run / "tokens").validation or ())
    pairs = (4 + min(4, held)) * 4
    assert sizes.count((32, 32)) == samples + min(6, held) * (counts + 1) + pairs
    assert sizes.count((32, 32)) == len(sizes)  # no curves of so few points


def test_curves_and_commands_of_longer_runs(run: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Whose AR model has logged five times, and saw as many crops as a tokenizer needs."""
    longer = tmp_path / "run"
    shutil.copytree(run, longer)
    lines = [f'{{"step": {step}, "loss": {9 - step / 100}, "psnr": 10.0}}\n' for step in (100, 200, 300, 400, 500)]
    (longer / "gpt" / "log.jsonl").write_text("".join(lines))
    monkeypatch.setattr(run_report, "command_line", lambda: "detailflow train --data x --output y --gpt-steps 500")
    write_run_report(longer, open_images(photos), str(photos), "cpu")
    assert read(longer).text.count("Curves") == 1 and "AR model: loss" in read(longer).text
    assert "tokenizer: loss" not in read(longer).text
    short = re.sub(r"\s+", " ", read(longer).text)
    assert "longer --gpt-steps 500" not in short and "--gpt-steps 1000" not in short
    command = re.search(r"detailflow train --data x( --\S+ \S+)+", short.partition("in a folder of its own")[2])
    assert command and re.fullmatch(r".* x --gpt-steps 500 --output \S+run-longer", command[0])  # no --tokenizer-steps
    (longer / "tokenizer" / "log.jsonl").write_text("".join(lines))
    write_run_report(longer, open_images(photos), str(photos), "cpu")
    done = re.sub(r"\s+", " ", read(longer).text)
    assert (
        "--gpt-steps 1000" in done
        and "--tokenizer-steps" not in done
        and "Too early to say" not in done.replace("Too early to say: reconstructions", "")
    )


def test_what_a_short_run_says(run: Path):
    text = re.sub(r"\s+", " ", read(run).text)
    assert "in 3 steps, which is too short" in text and text.index("in 3 steps") < text.index("The AR model saw")
    assert "Too early to say: the tokenizer has hardly been trained" in text and "No sign of memorising" not in text
    assert "the studio" not in text and "samples cannot be sharper" in text  # the words


def test_it_is_made_again_and_never_fails_a_run(run: Path, photos: Path, monkeypatch: pytest.MonkeyPatch):
    """By the repeated command, which trains nothing."""
    path = run / "report.html"
    source, before = open_images(photos), path.read_bytes()
    path.unlink()
    monkeypatch.setattr(run_report, "command_line", lambda: None)
    write_run_report(run, source, str(photos), "cpu")
    again = path.read_bytes()
    assert again != before and b"detailflow train" not in again
    write_run_report(run, source, str(photos), "cpu")
    assert path.read_bytes() == again

    def broken(_: torch.device) -> None:
        raise RuntimeError("no features\ntoday")

    monkeypatch.setattr(run_report, "load_embedding", broken)
    with pytest.warns(
        DetailFlowWarning, match=r"report.html could not be made \(no features\); the models are finished"
    ):
        write_run_report(run, source, str(photos), "cpu")
    assert path.read_bytes() == again


def test_without_held_out_images_and_packages(
    model: Path, cifar: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Models that were taken as they are, with tokens of all images; no EfficientNet and no matplotlib."""
    shutil.copytree(model, tmp_path / "run")
    extraction = ["--data", str(cifar), "--tokenizer", str(model), "--crops", "two", "--device", "cpu"]
    assert main(["extract", *extraction, "--output", str(tmp_path / "run" / "tokens")]) == 0
    monkeypatch.setattr(efficientnet, "PACKAGE", "no-such-package")
    monkeypatch.setattr(run_report, "find_spec", lambda _: None)
    write_run_report(tmp_path / "run", open_images(cifar), str(cifar), "cpu")
    text = read(tmp_path / "run").text
    for part in (
        "Training images, as none were held out",
        "No images were held out",
        "by pixels, at 16×16",
        "none here",
    ):
        assert part in text
    assert "Curves" not in text


# ------------------------------------------------------------------------------------------------- is it memorising?


def test_nearest_images(cifar: Path):
    source = open_images(cifar)
    _, embed = nearest.load_embedding(torch.device("cpu"))
    images = [source.image(i) for i in range(0, 100, 5)]
    among = nearest.embed_images(images, 32, embed)
    mirrored = images[3].transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    found = nearest.find_nearest([images[7], mirrored, source.image(1)], among, 3, 32, embed)
    assert found.distances.shape == found.indices.shape == (3, 3)
    assert found.indices[:2, 0].tolist() == [7, 3]
    assert found.distances[:2, 0].tolist() == pytest.approx([0, 0], abs=1e-3)
    assert 0.05 < found.distances[2, 0] <= found.distances[2, 1] <= 1
    assert nearest.find_nearest(images[:1], among[:2], 3, 32, embed).indices.shape == (1, 2)


def test_distances_of_pixels(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(efficientnet, "PACKAGE", "no-such-package")
    what, embed = nearest.load_embedding(torch.device("cpu"))
    black, white = (Image.new("RGB", (40, 32), colour) for colour in ("black", "white"))
    found = nearest.find_nearest([black], nearest.embed_images([black, white], 32, embed), 2, 32, embed)
    assert what.startswith("pixels") and found.distances[0].tolist() == pytest.approx([0, 1], abs=1e-4)


def test_the_verdict_follows_from_the_distances():
    unseen = torch.linspace(0.2, 0.4, 30)
    assert nearest.nearer_share(unseen, unseen) == pytest.approx(0.5)
    assert nearest.verdict(unseen - 0.3, unseen).startswith(
        "This model repeats training images, at least in part: in 100%"
    )
    assert nearest.verdict(unseen, unseen).startswith("No sign of memorising")
    assert nearest.verdict(unseen + 0.3, unseen).startswith(
        "These samples are not copies, but not yet"
    ) and "hint" not in nearest.verdict(unseen, unseen)
    assert nearest.verdict(unseen, unseen[:1]).endswith("With only 1 held-out image, take that as a hint and no more.")
    assert nearest.verdict(unseen, None).startswith("No images were held out")
    assert nearest.verdict(unseen - 0.3, unseen, "why").startswith("Too early to say: why, so the samples are not yet")


# ------------------------------------------------------------------------------------------------- what is said


def test_what_a_run_can_be(tmp_path: Path):
    """Of a run that stopped early, at step 100."""
    (tmp_path / "run.yaml").write_text("loop: {steps: 1000, batch_size: 64}\n")

    def said(*losses: float, images: int = 100) -> str:
        lines = [f'{{"step": {100 * (i + 1) // len(losses)}, "val_loss": {loss}}}\n' for i, loss in enumerate(losses)]
        (tmp_path / "log.jsonl").write_text("".join(lines))
        return " ".join(expectations(images, [Stage("gpt", tmp_path)]))

    assert "saw each image 64.0 times, and its validation loss was lowest at step 20 of 100: more" in said(
        *[3, 1], *[2] * 8
    )
    assert "lowest at the end: more steps may still help" in said(*range(10, 0, -1))
    assert said(1.0).endswith("The AR model saw each image 64.0 times.")
    assert "saw each image 3.2 times, which is a short run" in said(1.0, images=2_000)
    texts = {said(images=number).partition(" images ")[2][:20] for number in (100, 1_000, 10_000, 100_000, 1_000_000)}
    assert len(texts) == 5
    (tmp_path / "run.yaml").write_text("init: my/<model>\nloop: {steps: 1000, batch_size: 64}\n")
    assert "It started from my/<model>, which was trained on others" in said(1.0, images=2_000)
    assert "short run" not in said(1.0, images=2_000)


def test_the_tokenizer_is_judged_first(tmp_path: Path):
    stages = [Stage(kind, tmp_path / kind) for kind in ("tokenizer", "gpt")]
    for stage, batch_size in zip(stages, (16, 64), strict=True):
        stage.folder.mkdir()
        (stage.folder / "run.yaml").write_text(f"loop: {{steps: 60, batch_size: {batch_size}}}\n")
        (stage.folder / "log.jsonl").write_text('{"step": 60, "loss": 1}\n')
    said = expectations(960, stages)
    assert said[1].startswith("The tokenizer saw each image 1.0 times in 60 steps, which is too short")
    assert "The AR model saw each image 4.0 times, which is a short run, too." in said[2]
    assert hardly_trained(9_999, 10) and not hardly_trained(10_000, 5_000) and hardly_trained(10_000, 5_001)


def test_options_are_found_however_they_are_written():
    command = "detailflow train --data d --tokenizer_steps 20 --gpt_steps=20 --output run"
    assert with_options(command, {"--tokenizer-steps": "900", "--gpt-steps": None}) == (
        "detailflow train --data d --output run --tokenizer-steps 900"
    )


def test_longer_commands():
    command = "detailflow train --data 'my photos' --gpt-steps 20 --output run --gpt-steps=30"
    assert (
        with_options(command, {"--gpt-steps": "60"})
        == "detailflow train --data 'my photos' --output run --gpt-steps 60"
    )
    changed = longer_tokenizer(command, Path("run"), 1_000, 16, short_gpt=True)
    assert changed == "detailflow train --data 'my photos' --output run-longer --tokenizer-steps 1300"
    assert "--gpt-steps 20" in longer_tokenizer(
        command.replace(" --gpt-steps=30", ""), Path("r"), 9, 16, short_gpt=False
    )
    assert "--tokenizer-steps 2500" in longer_tokenizer(command, Path("run"), 20_000, 32, short_gpt=True)
    short = f"{command} --tokenizer-steps 50"
    assert "--tokenizer-steps 2500" in longer_tokenizer(short, Path("run"), 20_000, 32, True, usual_steps=2400)
    assert "--tokenizer-steps" not in longer_tokenizer(short, Path("run"), 20_000, 32, True, usual_steps=2500)
