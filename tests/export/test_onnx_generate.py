"""examples/onnx_generate.py draws the tokens of `detailflow generate`, with neither torch nor detailflow."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from detailflow import DetailFlowPipeline
from detailflow.pipeline import image_generator

pytest.importorskip("onnx", reason="needs the packages of detailflow[onnx]")
pytest.importorskip("onnxruntime", reason="needs the packages of detailflow[onnx]")

from detailflow.export.folder import export

ROOT = Path(__file__).parents[2]
TINY = ROOT / "tests" / "parity" / "tiny-32"


@pytest.fixture(scope="module")
def shipped() -> DetailFlowPipeline:
    return DetailFlowPipeline.from_pretrained(device="cpu", engine="torch")


@pytest.fixture(scope="module")
def exported(shipped: DetailFlowPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    export(shipped, folder, "shipped")
    return folder


def run(folder: Path, output: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run the example where importing torch or this package fails."""
    without = output / "without"
    without.mkdir(parents=True)
    for name in ("torch", "detailflow"):
        (without / f"{name}.py").write_text("raise ImportError('not here')")
    command = [sys.executable, str(ROOT / "examples" / "onnx_generate.py"), str(folder), "--output", str(output)]
    environment = os.environ | {"PYTHONPATH": str(without)}
    return subprocess.run([*command, *options], capture_output=True, text=True, env=environment)


def tokens_of(folder: Path, output: Path, *options: str) -> np.ndarray:
    done = run(folder, output, *options)
    assert done.returncode == 0, done.stderr
    return np.array(json.loads((output / "tokens.json").read_text()))


def ours(pipeline: DetailFlowPipeline, classes: list[int], seed: int, **sampling: object) -> np.ndarray:
    generators = [image_generator(seed, i) for i in range(len(classes))]
    return pipeline.gpt.generate(torch.tensor(classes), generator=generators, **sampling).numpy()


# Seeds whose draws are 1e-5 or more away from a border between two codes: nearer ones are decided by rounding.
@pytest.mark.parametrize(
    ("seed", "options", "sampling"),
    [
        (30, "", {}),
        (9223372036854775850, "--guidance-scale 1", {"guidance_scale": 1.0}),
        (0, "--temperature 0", {"temperature": 0.0}),
        (10, "--top-k 50 --top-p 0.9 --temperature 1.2", {"top_k": 50, "top_p": 0.9, "temperature": 1.2}),
    ],
    ids=["sampled", "not guided", "greedy", "top-k and top-p"],
)
def test_the_same_tokens(
    seed: int, options: str, sampling: dict, shipped: DetailFlowPipeline, exported: Path, tmp_path: Path
):
    found = tokens_of(exported, tmp_path, "cat", "--seed", str(seed), *options.split(), "9")
    assert (found == ours(shipped, [3, 9], seed, **sampling)).all()


def test_images_from_coarse_to_fine(shipped: DetailFlowPipeline, exported: Path, tmp_path: Path):
    tokens_of(exported, tmp_path, "cat", "--seed", "61")
    stages = {stage.num_tokens: stage.images[0] for stage in shipped.stream("cat", seed=61)}
    written = sorted(path.name for path in tmp_path.glob("*.png"))
    assert written == [f"0000-cat-{n:03d}.png" for n in (1, 2, 4, 8, 16, 32, 48)]
    for name in written:
        image = Image.open(tmp_path / name)
        wanted = stages[int(name[9:12])]
        assert image.size == wanted.size
        assert np.abs(np.asarray(image, int) - np.asarray(wanted, int)).max() <= 1  # a rounding apart


def test_in_8_bits(exported: Path, shipped: DetailFlowPipeline, tmp_path: Path):
    tokens = tokens_of(exported, tmp_path, "cat", "--seed", "1", "--precision", "int8", "--num-tokens", "16")
    assert tokens.shape == (1, 16) and len(list(tmp_path.glob("*.png"))) == 5
    assert (tokens == ours(shipped, [3], 1, num_tokens=16)).mean() > 0.1  # later ones follow from earlier ones


@pytest.mark.parametrize(("schedule", "seed"), [("constant", 54), ("linear", 61)])
def test_the_published_layout(schedule: str, seed: int, tmp_path: Path):
    pipeline = DetailFlowPipeline.from_pretrained(TINY, device="cpu")
    export(pipeline, tmp_path / "exported", "tiny")
    path = tmp_path / "exported" / "model.json"
    model = json.loads(path.read_text())
    model["sampling"]["guidance_schedule"] = schedule
    path.write_text(json.dumps(model))
    assert model["class_names"] is None
    found = tokens_of(tmp_path / "exported", tmp_path / "out", "1", "7", "--seed", str(seed))
    assert (found == ours(pipeline, [1, 7], seed, guidance_schedule=schedule)).all()


def test_mistakes_are_one_sentence(exported: Path, tmp_path: Path):
    for i, (options, message) in enumerate(
        (
            (["cow"], "unknown class cow: the classes are airplane, automobile, "),
            (["10"], "unknown class 10: the classes are airplane, automobile, "),
            (["--num-tokens", "17"], "--num-tokens must be one of [1, 2, "),
        )
    ):
        done = run(exported, tmp_path / str(i), *options)
        assert done.returncode == 1 and done.stderr.startswith(message) and done.stderr.count("\n") == 1
    assert run(tmp_path / "none", tmp_path / "y").stderr.startswith(f"there is no {tmp_path / 'none' / 'model.json'}: ")
    assert "--seed: must be 0 or more, not -1" in run(exported, tmp_path / "z", "--seed", "-1").stderr
    (tmp_path / "model.json").write_text(json.dumps({"format": "detailflow-onnx"}))
    assert run(tmp_path, tmp_path / "x").stderr == f"{tmp_path}: the export is not complete: repeat it\n"
