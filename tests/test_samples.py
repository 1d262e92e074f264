"""Many images on disk: the same whoever writes them, in every format, and gone on with where they stopped."""

import io
import json
import os
import subprocess
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from detailflow import DetailFlowPipeline
from detailflow.cli.main import main
from detailflow.errors import DetailFlowError
from detailflow.files import lock_folder
from detailflow.samples import SETTINGS_FILE, SampleSet, generate_many

LABELS = [3, 1] * 5 + [4]


def generate(
    pipeline: Any,
    labels: Sequence[int],
    folder: Path,
    form: str = "png",
    *,
    temperature: float | None = None,
    **options: Any,
) -> None:
    sampling = {} if temperature is None else {"temperature": temperature}
    generate_many(pipeline, folder, SampleSet(labels, form, **options), **sampling)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != SETTINGS_FILE}


def pixels(images: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images])


@pytest.fixture
def expected(pipeline: DetailFlowPipeline) -> np.ndarray:
    return pixels(pipeline(LABELS, seed=2, batch_size=4))


def test_png(pipeline: DetailFlowPipeline, expected: np.ndarray, tmp_path: Path):
    generate(pipeline, LABELS, tmp_path, seed=2, batch_size=4)
    names = ["cat", "automobile"] * 5 + ["Hot-dog"]
    paths = [tmp_path / f"{i:04d}-{name}.png" for i, name in enumerate(names)]
    assert sorted(contents(tmp_path)) == [path.name for path in paths]
    assert np.array_equal(pixels([Image.open(path) for path in paths]), expected)


def test_npz_in_the_layout_of_adm(pipeline: DetailFlowPipeline, expected: np.ndarray, tmp_path: Path):
    generate(pipeline, LABELS, tmp_path, "npz", seed=2, batch_size=4)
    assert list(contents(tmp_path)) == ["samples.npz"]
    (tmp_path / "part-000000.npy").write_bytes(b"")  # of a process that ended before it removed its parts
    generate(pipeline, LABELS, tmp_path, "npz", seed=2, batch_size=4)
    assert list(contents(tmp_path)) == ["samples.npz"]
    with np.load(tmp_path / "samples.npz") as stored:
        assert stored["arr_0"].dtype == np.uint8 and np.array_equal(stored["arr_0"], expected)
        assert stored["arr_1"].tolist() == LABELS


def test_webdataset(
    pipeline: DetailFlowPipeline, expected: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("detailflow.samples.SHARD_IMAGES", 8)
    generate(pipeline, LABELS, tmp_path, "webdataset", seed=2, batch_size=4)
    assert sorted(contents(tmp_path)) == ["samples-000000.tar", "samples-000001.tar"]
    images, labels = [], []
    for path in sorted(tmp_path.glob("*.tar")):
        with tarfile.open(path) as archive:
            for member in archive:
                content = archive.extractfile(member).read()
                (labels if member.name.endswith(".cls") else images).append(content)
    assert [int(label) for label in labels] == LABELS
    assert np.array_equal(pixels([Image.open(io.BytesIO(image)) for image in images]), expected)


@pytest.mark.parametrize("form", ["png", "npz", "webdataset"])
def test_what_is_there_stays(form: str, pipeline: DetailFlowPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("detailflow.samples.SHARD_IMAGES", 4)
    generate(pipeline, LABELS, tmp_path / "whole", form, seed=2, batch_size=4)
    calls = []

    class Stops:
        """A pipeline that is killed before its third batch."""

        def __getattr__(self, name: str):
            return getattr(pipeline, name)

        def __call__(self, labels: list[int], **options: object) -> list[Image.Image]:
            if len(calls) == 2:
                raise KeyboardInterrupt
            calls.append(options["first_image"])
            return pipeline(labels, **options)

    with pytest.raises(KeyboardInterrupt):
        generate(Stops(), LABELS, tmp_path / "part", form, seed=2, batch_size=4)
    assert calls == [0, 4]
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "part").iterdir() if path.name != SETTINGS_FILE}
    assert times
    more = lambda self, labels, **options: calls.append(options["first_image"]) or pipeline(labels, **options)  # noqa: E731
    monkeypatch.setattr(Stops, "__call__", more)
    generate(Stops(), LABELS, tmp_path / "part", form, seed=2, batch_size=4)
    assert calls == [0, 4, 8]
    assert contents(tmp_path / "part") == contents(tmp_path / "whole")
    if form != "npz":
        assert all(path.stat().st_mtime_ns == time for path, time in times.items())
    generate(Stops(), LABELS, tmp_path / "part", form, seed=2, batch_size=4)
    assert calls == [0, 4, 8]


@pytest.mark.parametrize("form", ["png", "npz", "webdataset"])
@pytest.mark.parametrize("first", [1, 4, 6, 8])
def test_a_set_grows(
    form: str, first: int, pipeline: DetailFlowPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """What is there of whole batches stays; the files are those of a set that was made at once."""
    monkeypatch.setattr("detailflow.samples.SHARD_IMAGES", 4)
    calls = []

    class Counts:
        def __getattr__(self, name: str):
            return getattr(pipeline, name)

        def __call__(self, labels: list[int], **options: object) -> list[Image.Image]:
            calls.append(options["first_image"])
            return pipeline(labels, **options)

    generate(pipeline, LABELS, tmp_path / "whole", form, seed=2, batch_size=4)
    generate(pipeline, LABELS[:first], tmp_path / "part", form, seed=2, batch_size=4)
    generate(Counts(), LABELS, tmp_path / "part", form, seed=2, batch_size=4)
    assert calls == [number for number in (0, 4, 8) if number >= first // 4 * 4]
    assert contents(tmp_path / "part") == contents(tmp_path / "whole")
    assert (tmp_path / "part" / SETTINGS_FILE).read_text() == (tmp_path / "whole" / SETTINGS_FILE).read_text()
    with pytest.raises(
        DetailFlowError, match="part has a set of 11 images, more than 6: ask for as many or more, or choose"
    ):
        generate(pipeline, LABELS[:6], tmp_path / "part", form, seed=2, batch_size=4)


@pytest.mark.parametrize("form", ["png", "npz", "webdataset"])
def test_only_the_same_set_grows(form: str, pipeline: DetailFlowPipeline, tmp_path: Path):
    generate(pipeline, LABELS[:6], tmp_path, form, seed=2, batch_size=4)
    before = contents(tmp_path) | {SETTINGS_FILE: (tmp_path / SETTINGS_FILE).read_bytes()}
    others = (
        ([1, *LABELS[1:]], {}, "of other labels: repeat its settings or choose"),
        (LABELS, {"seed": 3}, r"another seed \(2, not 3\)"),
        (LABELS, {"temperature": 0.5}, "another temperature"),
    )
    for labels, options, message in others:
        with pytest.raises(DetailFlowError, match=message):
            generate(pipeline, labels, tmp_path, form, **{"seed": 2, "batch_size": 4, **options})
    assert contents(tmp_path) | {SETTINGS_FILE: (tmp_path / SETTINGS_FILE).read_bytes()} == before
    if form == "npz":
        (tmp_path / "samples.npz").write_bytes(before["samples.npz"][:500])
        with pytest.raises(DetailFlowError, match=f"the samples in {tmp_path} are damaged: choose another folder"):
            generate(pipeline, LABELS, tmp_path, form, seed=2, batch_size=4)


@pytest.mark.parametrize("shape", [(16, 32, 3), (32, 32), (3,), ()])
def test_images_of_another_size_are_not_this_set(shape: tuple[int, ...], pipeline: DetailFlowPipeline, tmp_path: Path):
    """They were taken for it, and measured."""
    generate(pipeline, LABELS, tmp_path, "npz", seed=2, batch_size=4)
    np.savez(tmp_path / "samples.npz", arr_0=np.zeros((len(LABELS), *shape), np.uint8), arr_1=LABELS)
    before = contents(tmp_path)
    with pytest.raises(
        DetailFlowError, match=r"samples\.npz has images of shape \(.*\(32, 32, 3\): choose another folder"
    ):
        generate(pipeline, LABELS, tmp_path, "npz", seed=2, batch_size=4)
    assert contents(tmp_path) == before
    (tmp_path / "samples.npz").unlink()
    np.save(tmp_path / "part-000000.npy", np.zeros((4, *shape), np.uint8))
    generate(pipeline, LABELS, tmp_path, "npz", seed=2, batch_size=4)
    with np.load(tmp_path / "samples.npz") as stored:
        assert np.array_equal(stored["arr_0"], pixels(pipeline(LABELS, seed=2, batch_size=4)))


@pytest.mark.parametrize("form", ["png", "npz", "webdataset"])
def test_num_images_again_with_more(form: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    options = ["--format", form, "--model", str(model), "--device", "cpu"]
    for count, folder in ((2, "a"), (4, "a"), (4, "b")):
        assert main(["generate", "--num-images", str(count), *options, "--output", str(tmp_path / folder)]) == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    capsys.readouterr()
    assert main(["generate", "--num-images", "3", *options, "--output", str(tmp_path / "a")]) == 2
    assert "a has a set of 4 images, more than 3" in capsys.readouterr().err


def test_another_set_is_not_mixed_in(pipeline: DetailFlowPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    generate(pipeline, LABELS, tmp_path, seed=2, batch_size=4)
    for options, what in (({"seed": 3}, "seed (2, not 3)"), ({"temperature": 0.5}, "temperature (1.0, not 0.5)")):
        with pytest.raises(DetailFlowError, match="holds samples with another") as caught:
            generate(pipeline, LABELS, tmp_path, **{"seed": 2, "batch_size": 4, **options})
        assert what in str(caught.value)
    recorded = json.loads((tmp_path / SETTINGS_FILE).read_text())
    (tmp_path / SETTINGS_FILE).write_text(json.dumps(recorded | {"engine": "native"}))
    monkeypatch.setattr(pipeline.gpt, "engine", "torch")  # whose rounding is another
    with pytest.raises(DetailFlowError, match="holds samples of another engine"):
        generate(pipeline, LABELS, tmp_path, seed=2, batch_size=4)
    (tmp_path / SETTINGS_FILE).write_text("no JSON")
    with pytest.raises(DetailFlowError, match="samples.json is damaged"):
        generate(pipeline, LABELS, tmp_path, seed=2, batch_size=4)


@pytest.mark.parametrize("form", ["png", "npz", "webdataset"])
def test_samples_of_unknown_settings_are_not_taken_for_parts(form: str, pipeline: DetailFlowPipeline, tmp_path: Path):
    generate(pipeline, LABELS[:7], tmp_path, form, seed=2, batch_size=4)
    (tmp_path / SETTINGS_FILE).unlink()
    before = contents(tmp_path)
    with pytest.raises(
        DetailFlowError, match="no samples.json that says how it was made: choose another folder"
    ) as caught:
        generate(pipeline, LABELS, tmp_path, form, seed=3, batch_size=4)
    assert any(name in str(caught.value) for name in before)
    assert contents(tmp_path) == before
    assert not (tmp_path / SETTINGS_FILE).exists()
    if form == "npz":
        (tmp_path / "samples.npz").rename(tmp_path / "part-000000.npy")
        with pytest.raises(DetailFlowError, match="has part-000000.npy and no samples.json"):
            generate(pipeline, LABELS, tmp_path, form, seed=3, batch_size=4)


def test_a_bad_seed_claims_no_folder(pipeline: DetailFlowPipeline, tmp_path: Path):
    with pytest.raises(DetailFlowError, match="seeds must be 0 to 2.64 - 1, not -1"):
        generate(pipeline, LABELS, tmp_path / "x", seed=-1)
    assert not (tmp_path / "x").exists()


def test_one_process_and_several(model: Path, torchrun: list[str], tmp_path: Path):
    """Two processes as torchrun starts them write the files of one."""
    options = ["--num-images", "11", "--batch-size", "2", "--model", str(model)]
    if torch.accelerator.is_available():  # else it need not be said
        options += ["--device", "cpu"]
    assert main(["generate", "cat", "1", *options, "--output", str(tmp_path / "one")]) == 0
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*torchrun, "-m", "detailflow", "generate", "cat", "1", *options, "--output", str(tmp_path / "two")]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=120)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("wrote 11 images") == 1
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    assert json.loads((tmp_path / "two" / SETTINGS_FILE).read_text())["num_images"] == 11


@pytest.mark.parametrize("form", ["png", "npz", "webdataset"])
def test_one_at_a_time(form: str, pipeline: DetailFlowPipeline, tmp_path: Path):
    """Two at once would take each other's parts."""
    with (
        lock_folder(tmp_path, "generation"),
        pytest.raises(
            DetailFlowError, match="another generation is at work in .*: choose another folder, or wait for its end"
        ),
    ):
        generate(pipeline, [0, 1], tmp_path, form)
    assert list(tmp_path.iterdir()) == []


def test_bad_options(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for argv, message in (
        (["--format", "npz"], "--format npz is for --num-images"),
        (["--num-images", "5", "--progressive"], "--num-images counts all images and makes no strips"),
        (["--num-images", "0"], "must be a positive integer"),
        (["--num-images", "5", "--format", "gif"], "--format must be png, npz or webdataset, not 'gif'"),
    ):
        assert main(["generate", *argv, "--model", str(model), "--output", str(tmp_path / "x")]) == 2
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1
    assert not (tmp_path / "x").exists()
