"""Images that are held out: never trained on, measured at intervals, the same for any number of ranks; longer runs."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from detailflow.cli.main import main
from detailflow.data.images import open_images
from detailflow.data.tokens import TokenStore
from detailflow.data.transforms import to_uint8
from detailflow.distributed import World
from detailflow.errors import DetailFlowError
from detailflow.runs import read_checkpoint
from detailflow.training.config import Extraction, LoopConfig, TokenizerTraining
from detailflow.training.extract import extract
from detailflow.training.tokenizer import TokenizerStage
from detailflow.training.tracking import read_history
from detailflow.training.validation import held_out, sample_crops, split

NETWORK = {"width": 16, "depth": 1, "heads": 2}
SIZES = dict(image_size=32, patch_size=16, num_tokens=8, group_size=4, codebook_size=32, codebook_dim=4)
LOOP = {
    "steps": 8,
    "batch_size": 4,
    "learning_rate": 1e-2,
    "precision": "fp32",
    "trackers": [],
    "log_every": 2,
    "val_every": 2,
    "val_images": 50,
    "checkpoint_minutes": 0,
}
TOKENIZER = {
    "model": {**SIZES, "encoder": NETWORK, "decoder": NETWORK},
    "adversarial": 0,
    "val_share": 0.3,
    "loop": LOOP,
}
GPT = {"width": 16, "depth": 1, "heads": 2, "ema": 0.5, "loop": LOOP}


@pytest.fixture(scope="module")
def validated_tokens(model: Path, cifar: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A token store with a part for validation."""
    folder = tmp_path_factory.mktemp("tokens") / "store"
    extract(Extraction(str(cifar), str(model), crops="two", val_share=0.3), folder, "cpu")
    return folder


@pytest.fixture(scope="module")
def commands(stage_commands: Callable[..., dict[str, list[str]]], validated_tokens: Path) -> dict[str, list[str]]:
    """The command line of each stage, but for its output."""
    made = stage_commands(TOKENIZER, GPT)
    return {"tokenizer": made["tokenizer"], "gpt": [*made["gpt"], "--tokens", str(validated_tokens)]}


@pytest.fixture(scope="module")
def finished(commands: dict[str, list[str]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each stage's run that nothing happened to."""
    outputs = {stage: tmp_path_factory.mktemp("whole") / stage for stage in commands}
    for stage, command in commands.items():
        assert main([*command, "--output", str(outputs[stage])]) == 0
    return outputs


def losses(output: Path) -> dict[int, float]:
    return {int(record["step"]): record["val_loss"] for record in read_history(output) if "val_loss" in record}


# ------------------------------------------------------------------------------------------------- what is held out


def test_a_share_by_content(cifar: Path, tmp_path: Path):
    """Wherever the images are and whatever their names; copies of an image are on the same side."""
    source = open_images(cifar)
    chosen = held_out(source, 0.3)
    assert 35 <= len(chosen) <= 85 and chosen == sorted(set(chosen))
    copy = Path(shutil.copytree(cifar, tmp_path / "copy"))
    for number, path in enumerate(sorted(copy.rglob("*.png"), reverse=True)):
        shutil.copy(path, path.with_name(f"copy-{number:03d}.png"))
        path.rename(path.with_name(f"renamed-{number:03d}.png"))
    again = open_images(copy)
    contents = sorted(source.stored_bytes(index) for index in chosen)
    assert sorted(again.stored_bytes(index) for index in held_out(again, 0.3)) == sorted([*contents, *contents])


@pytest.mark.parametrize(("share", "verb"), [(1e-9, "is"), (0.3, "are")])
def test_how_many_are_held_out_is_said(share: float, verb: str, cifar: Path, caplog: pytest.LogCaptureFixture):
    with caplog.at_level("INFO"):
        split(Extraction(str(cifar), "model", val_share=share), open_images(cifar), World())
    assert f" images {verb} held out for validation" in caplog.text


def test_one_at_least_and_never_all_of_a_class(cifar: Path, tmp_path: Path):
    assert len(held_out(open_images(cifar), 1e-9)) == 1
    source = open_images(cifar)
    train, validation = source.subset([0, 1, 2]), held_out(source, 1.0)
    assert len(source) - len(validation) == len(source.class_names)
    assert train.class_names == source.class_names and train.name(2) == source.name(2)
    assert len({source.fingerprint, train.fingerprint, source.subset([0, 1, 3]).fingerprint}) == 3


def test_copies_stay_on_one_side_if_a_class_gets_one_back(tmp_path: Path):
    for name, colours in (("a", ("red", "red", "blue", "blue")), ("b", ("red", "green", "blue"))):
        (tmp_path / name).mkdir()
        for number, colour in enumerate(colours):
            Image.new("RGB", (8, 8), colour).save(tmp_path / name / f"{number}.png")
    source = open_images(tmp_path)
    chosen = held_out(source, 1.0)
    out, kept = (
        {source.stored_bytes(i) for i in range(len(source)) if (i in chosen) == side} for side in (True, False)
    )
    assert not out & kept and set(source.labels[sorted(set(range(len(source))) - set(chosen))]) == {0, 1}


def test_another_set(cifar: Path, tmp_path: Path):
    shutil.copytree(cifar, others := tmp_path / "others")
    first = next((others / "class0").iterdir())
    Image.new("RGB", (8, 8), "red").save(first)
    config = Extraction(str(cifar), "model", val_data=str(others))
    source = open_images(cifar)
    train, validation = split(config, source, World())
    assert train is source and validation is not None and validation.name(0) == str(first) and len(validation) == 1
    shutil.copytree(cifar / "class0", tmp_path / "images" / "class0")
    with pytest.raises(DetailFlowError, match="must have the same classes as the images to train on"):
        split(Extraction(str(cifar), "model", val_data=str(tmp_path / "images")), source, World())


@pytest.mark.parametrize("stored", ["folder", "parquet"])
def test_images_that_are_trained_on_are_no_validation(
    stored: str, cifar: Path, cifar_table: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """Whatever they are called: they are known by their stored bytes."""
    source = open_images(cifar if stored == "folder" else cifar_table)
    for index, name in enumerate(source.class_names):
        (tmp_path / "val" / name).mkdir(parents=True)
        (tmp_path / "val" / name / "renamed.png").write_bytes(source.stored_bytes(source.labels.tolist().index(index)))
    config = Extraction("data", "model", val_data=str(tmp_path / "val"))
    with pytest.raises(DetailFlowError, match=r"val_data .*val has the images to train on: give others"):
        split(config, source, World())
    first = tmp_path / "val" / source.class_names[0]
    Image.new("RGB", (8, 8), "red").save(first / "one.png")
    (first / "other.png").write_text("not an image")
    _, validation = split(config, source, World())
    assert validation is not None and len(validation) == 2 and validation.class_names == source.class_names
    count = len(source.class_names)
    assert f"{count} of the {count + 2} images of val_data {tmp_path / 'val'} are among the images" in caplog.text


def test_a_split_of_the_same_set(cifar: Path, tmp_path: Path):
    """Without its name it would be the split that is trained on."""
    shutil.copytree(cifar, tmp_path / "train")
    for folder in cifar.iterdir():
        (tmp_path / "val" / folder.name).mkdir(parents=True)
        Image.new("RGB", (8, 8), "red").save(tmp_path / "val" / folder.name / "1.png")
    source = open_images(tmp_path)
    for data in (tmp_path, tmp_path / "train"):
        with pytest.raises(DetailFlowError, match="has the images to train on: give others, or a split of it by"):
            split(Extraction(str(tmp_path), "model", val_data=str(data)), source, World())
    train, validation = split(
        Extraction(str(tmp_path), "model", val_data=str(tmp_path), val_split="val"), source, World()
    )
    assert train is source and validation is not None and len(validation) == len(source.class_names) < len(source)
    with pytest.raises(DetailFlowError, match="val_split is a split of val_data, which is not set"):
        split(Extraction(str(tmp_path), "model", val_split="val"), source, World())


def test_a_stream_has_no_share(cifar_table: Path, hub: Callable[[Path], str]):
    from detailflow.data.streams import open_stream

    with pytest.raises(DetailFlowError, match="val_share needs images that are not streamed: give val_data"):
        split(Extraction("someone/set-0", "model", val_share=0.1), open_stream(hub(cifar_table)), World())


def test_never_in_training_batches(cifar: Path, tmp_path: Path):
    """Whole images, unchanged: every one of the training part comes, none of the other."""
    from detailflow.models.layers import ViTConfig
    from detailflow.models.tokenizer import TokenizerConfig

    sizes = TokenizerConfig(ViTConfig(**NETWORK), ViTConfig(**NETWORK), **SIZES)
    loop = LoopConfig(steps=50, batch_size=10, learning_rate=0.1)
    config = TokenizerTraining(str(cifar), sizes, loop, adversarial=0.0, flip=False, max_scale=1.0, val_share=0.3)
    source = open_images(cifar)
    train, validation = split(config, source, World())
    assert validation is not None and len(train) + len(validation) == 200
    stage = TokenizerStage(config, train, tmp_path, torch.device("cpu"), validation=validation)
    batches = stage.batches(0)
    seen = {image.numpy().tobytes() for _ in range(30) for image in next(batches)[0]}
    kept, out = ({np.asarray(one.image(i)).tobytes() for i in range(len(one))} for one in (train, validation))
    assert seen == kept and not seen & out


def test_pictures_show_what_is_held_out(cifar: Path, tmp_path: Path):
    """Whole images, unchanged: those that are shown are of the part for validation, if there is one."""
    from detailflow.models.layers import ViTConfig
    from detailflow.models.tokenizer import TokenizerConfig

    sizes = TokenizerConfig(ViTConfig(**NETWORK), ViTConfig(**NETWORK), **SIZES)
    config = TokenizerTraining(str(cifar), sizes, LoopConfig(1, 4, 0.1), adversarial=0.0, val_share=0.3)
    train, validation = split(config, open_images(cifar), World())
    assert validation is not None
    for held, shown in ((validation, validation), (None, train)):
        stage = TokenizerStage(config, train, tmp_path, torch.device("cpu"), validation=held)
        assert set(stage.pictures()) == {"reconstructions", "mistakes"} and stage.shown is not None
        wanted = {np.asarray(shown.image(index)).tobytes() for index in range(len(shown))}
        assert len(stage.shown) == 8 and {x.numpy().tobytes() for x in to_uint8(stage.shown)} <= wanted


def test_validation_images_that_cannot_be_read(tmp_path: Path):
    (tmp_path / "a").mkdir()
    Image.new("RGB", (8, 8)).save(path := tmp_path / "a" / "0.png")
    source = open_images(tmp_path)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(DetailFlowError, match="none of the 1 images for validation or pictures can be read"):
        sample_crops(source, 8, 32)


def test_the_token_store_has_two_parts(validated_tokens: Path, cifar: Path, model: Path, tmp_path: Path):
    """The same command goes on if one of them is missing, and removes what a killed one left in either."""
    store, source = TokenStore.open(validated_tokens), open_images(cifar)
    validation = store.validation
    assert validation is not None
    chosen = held_out(source, 0.3)
    names = [str(Path(source.name(index)).relative_to(cifar)) for index in range(len(source))]
    assert validation.ids() == [names[index] for index in chosen]
    assert store.ids() == [name for index, name in enumerate(names) if index not in chosen]
    copy = Path(shutil.copytree(validated_tokens, tmp_path / "copy"))
    (copy / "manifest.json").unlink()
    for folder in (copy, copy / "validation"):
        (folder / ".manifest.json.99999999-0123abcd.tmp").touch()
    again = extract(Extraction(str(cifar), str(model), crops="two", val_share=0.3), copy, "cpu")
    assert again.fingerprint == store.fingerprint and not list(copy.rglob("*.tmp"))
    assert json.loads((copy / "manifest.json").read_text())["validation"] == validation.fingerprint
    with pytest.raises(DetailFlowError, match="holds tokens of other images"):
        extract(Extraction(str(cifar), str(model), crops="two"), copy, "cpu")


def test_the_validation_store_is_the_one_of_its_manifest(validated_tokens: Path, tokens: Path, tmp_path: Path):
    copy = Path(shutil.copytree(validated_tokens, tmp_path / "copy"))
    shutil.rmtree(copy / "validation")
    with pytest.raises(DetailFlowError, match="validation is not a token store"):
        _ = TokenStore.open(copy).validation
    shutil.copytree(tokens, copy / "validation")
    with pytest.raises(DetailFlowError, match="validation is not the validation store of .*copy: remove .*copy"):
        _ = TokenStore.open(copy).validation


def test_what_was_held_out_is_not_trained_on(validated_tokens: Path, cifar: Path, model: Path, tmp_path: Path):
    """The validation store of an extraction that was killed, and the command without its val_share."""
    (tmp_path / "store").mkdir()
    shutil.copytree(validated_tokens / "validation", tmp_path / "store" / "validation")
    with pytest.raises(DetailFlowError, match="is left from an extraction that held out images"):
        extract(Extraction(str(cifar), str(model), crops="two"), tmp_path / "store", "cpu")
    assert [path.name for path in (tmp_path / "store").iterdir()] == ["validation"]


# ------------------------------------------------------------------------------------------------- runs


@pytest.mark.parametrize("stage", ["tokenizer", "gpt"])
def test_the_best_is_exported(stage: str, finished: dict[str, Path]):
    output = finished[stage]
    found = losses(output)
    assert list(found) == [2, 4, 6, 8] and all(np.isfinite(loss) for loss in found.values())
    best = min(found, key=lambda step: found[step])
    (path,) = (output / "best").iterdir()
    checkpoint = read_checkpoint(path)
    assert checkpoint.step == best and checkpoint.validation == found[best]
    weights = checkpoint.state["ema"] if stage == "gpt" else checkpoint.state["networks"]
    exported = load_file(output / "model.safetensors")
    assert "other images are held out for validation" in (output / "report.md").read_text()
    assert all(torch.equal(weights[name if stage == "gpt" else f"model.{name}"], exported[name]) for name in exported)


def test_an_earlier_step_is_exported(
    commands: dict[str, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Steps so large that they only do harm."""
    command = [*commands["gpt"], "--loop.learning_rate", "3", "--loop.warmup", "0.5", "--output", str(tmp_path / "run")]
    assert main(command) == 0
    found = losses(tmp_path / "run")
    best = min(found, key=lambda step: found[step])
    assert best < 8 and [path.name for path in (tmp_path / "run" / "best").iterdir()] == [f"step-{best:08d}.pt"]
    assert f"the exported model is that of step {best}, the best by validation (val_loss " in capsys.readouterr().out
    exported, last = load_file(tmp_path / "run" / "model.safetensors"), tmp_path / "run" / "resume" / "step-00000008.pt"
    assert not torch.equal(exported["head.weight"], read_checkpoint(last).state["ema"]["head.weight"])


def test_the_best_is_one_with_all_losses(commands: dict[str, list[str]], tmp_path: Path):
    """Whatever the loss before the discriminator starts."""
    more = ["--adversarial", "0.1", "--adversarial_from", "5", "--output", str(tmp_path / "run")]
    assert main([*commands["tokenizer"], *more]) == 0
    found = losses(tmp_path / "run")
    best = min((6, 8), key=lambda step: found[step])
    assert [path.name for path in (tmp_path / "run" / "best").iterdir()] == [f"step-{best:08d}.pt"]


@pytest.mark.parametrize("stage", ["tokenizer", "gpt"])
def test_what_is_logged_and_reported(stage: str, finished: dict[str, Path], commands: dict[str, list[str]]):
    output = finished[stage]
    last = read_history(output)[-1]
    assert last["step"] == 8 and last["peak_memory_gib"] > 0.01 and last["images_per_second"] > 0
    assert ("val_psnr" if stage == "tokenizer" else "val_accuracy") in last
    page = (output / "report.md").read_text()
    picture = {"tokenizer": "reconstructions", "gpt": "samples"}[stage]
    assert ("Held-out images spread over the data, and their reconstructions" in page) == (stage == "tokenizer")
    for part in ("the exported model is that of step", "| val_loss |", "![Curves](curves.png)", f"({picture}.png)"):
        assert part in page
    assert (output / "curves.png").stat().st_size > 1000 and (output / f"{picture}.png").is_file()


@pytest.mark.parametrize("stage", ["tokenizer", "gpt"])
def test_a_stopped_run_is_an_uninterrupted_one(
    stage: str, finished: dict[str, Path], commands: dict[str, list[str]], tmp_path: Path
):
    """As it was at its checkpoint of step 7, without the model: the same weights, log and best step."""
    output = Path(shutil.copytree(finished[stage], tmp_path / "run"))
    for name in ("config.json", "model.safetensors", "resume/step-00000008.pt", "report.md"):
        (output / name).unlink()
    shutil.rmtree(output / "best")
    best = min(losses(output), key=lambda step: losses(output)[step])
    if best < 8:
        (output / "best").mkdir()
        shutil.copy(finished[stage] / "best" / f"step-{best:08d}.pt", output / "best")
    assert main([*commands[stage], "--output", str(output)]) == 0
    assert (output / "model.safetensors").read_bytes() == (finished[stage] / "model.safetensors").read_bytes()
    assert losses(output) == losses(finished[stage])
    assert [path.name for path in (output / "best").iterdir()] == [p.name for p in (finished[stage] / "best").iterdir()]


def test_two_ranks_find_the_same_figures(
    commands: dict[str, list[str]], finished: dict[str, Path], torchrun: list[str], tmp_path: Path
):
    """Also with sharded weights."""
    for stage, more in (("tokenizer", []), ("gpt", []), ("gpt", ["--loop.shard", "true"])):
        output = tmp_path / f"{stage}{len(more)}"
        done = subprocess.run(
            [*torchrun, "-m", "detailflow", *commands[stage], "--output", str(output), *more],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        ours, theirs = losses(finished[stage]), losses(output)
        assert theirs == pytest.approx(
            ours, rel=1e-4 if stage == "tokenizer" else 2e-2
        )  # each rank has its own dropout


# ------------------------------------------------------------------------------------------------- longer runs


@pytest.mark.parametrize("stage", ["tokenizer", "gpt"])
def test_a_finished_run_goes_on_for_more_steps(
    stage: str, commands: dict[str, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """From 4 to 8, by the rates of the new length; not to fewer."""
    output = tmp_path / "run"
    command = [*commands[stage], "--output", str(output), "--loop.log_every", "1", "--loop.steps"]
    assert main([*command, "4"]) == 0
    short = {record["step"]: record["learning_rate"] for record in read_history(output)}
    first = (output / "model.safetensors").read_bytes()
    capsys.readouterr()
    assert main([*command, "8"]) == 0
    assert "going on from step 4" in capsys.readouterr().out
    rates = {record["step"]: record["learning_rate"] for record in read_history(output)}
    loop = LoopConfig(steps=8, batch_size=4, learning_rate=1e-2)
    assert list(rates) == list(range(1, 9)) and [rates[step] for step in range(1, 5)] == list(short.values())
    assert [rates[step] for step in range(5, 9)] == [loop.rate_at(step) for step in range(4, 8)]
    assert (output / "resume" / "step-00000008.pt").is_file() and (output / "config.json").is_file()
    assert (output / "model.safetensors").read_bytes() != first or list(losses(output).values())[-1] > min(
        losses(output).values()
    )
    assert main([*command, "8"]) == 0 and "is finished already" in capsys.readouterr().out
    assert main([*command, "6"]) == 2
    assert "holds a finished run of 8 steps, more than 6: give at least as many" in capsys.readouterr().err


def test_a_stopped_run_goes_on_for_more_steps(commands: dict[str, list[str]], tmp_path: Path):
    output = tmp_path / "run"
    command = [sys.executable, "-m", "detailflow", *commands["gpt"], "--output", str(output), "--loop.steps"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*command, "1000000"], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while not (output / "resume" / "step-00000003.pt").exists():
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(300) == 130
    step = max(int(path.stem[-8:]) for path in (output / "resume").iterdir())
    record = json.loads((output / "log.jsonl").read_text().splitlines()[-1])
    assert record["step"] <= step
    process = subprocess.Popen([*command, "1000001"], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while not (output / "resume" / f"step-{step + 1:08d}.pt").exists():
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(300) == 130
