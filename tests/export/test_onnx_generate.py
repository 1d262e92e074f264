"""examples/onnx_generate.py draws the tokens of `detailflow generate`, with neither torch nor detailflow."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from detailflow import DetailFlowPipeline
from detailflow.generation import image_generator

pytest.importorskip("onnx", reason="needs the packages of detailflow[onnx]")
pytest.importorskip("onnxruntime", reason="needs the packages of detailflow[onnx]")

from detailflow.export.write import export

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


@pytest.mark.parametrize(
    ("names", "label", "message"),
    [
        (["1", "10", "2"], "0", "unknown class 0: the classes are 1, 10, 2"),
        (["dup", "dup", "cat"], "dup", "2 classes are called dup: give the number of one"),
        (
            ["a", "b", "c"],
            "\N{ARABIC-INDIC DIGIT TWO}",
            "unknown class \N{ARABIC-INDIC DIGIT TWO}: the classes are a, b, c",
        ),
    ],
)
def test_classes_are_what_the_commands_take(names: list[str], label: str, message: str, exported: Path, tmp_path: Path):
    folder = Path(shutil.copytree(exported, tmp_path / "exported"))
    model = json.loads((folder / "model.json").read_text())
    (folder / "model.json").write_text(json.dumps(model | {"class_names": names, "num_classes": 3}))
    assert sentence(folder, tmp_path / "out", label) == message


def test_a_long_name_in_a_file_name(exported: Path, tmp_path: Path):
    folder = Path(shutil.copytree(exported, tmp_path / "exported"))
    model, letter = json.loads((folder / "model.json").read_text()), "\u6f22"
    (folder / "model.json").write_text(json.dumps(model | {"class_names": [letter * 90, *model["class_names"][1:]]}))
    tokens_of(folder, tmp_path / "out", "0", "--num-tokens", "1")
    assert [path.name for path in (tmp_path / "out").glob("*.png")] == [f"0000-{letter * 33}-001.png"]


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


def sentence(folder: Path, output: Path, *options: str) -> str:
    """Return the one line that a call ends with."""
    done = run(folder, output, *options)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    *usage, line = done.stderr.splitlines()
    assert not usage or usage[0].startswith("usage: ")
    return line.partition("error: ")[2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("cow", "unknown class cow: the classes are airplane, automobile, "),
        ("10", "unknown class 10: the classes are airplane, automobile, "),
        (5000 * "9", "unknown class 9999"),
        ("--num-tokens 17", "--num-tokens must be one of [1, 2, "),
        ("--num 0", "argument --num: must be a positive integer, not 0"),
        ("--num 100000", "1000000 images are too many: make at most 100000 at once"),
        ("--seed -1", "argument --seed: must be 0 to 2^64 - 1, not -1"),
        (f"--seed {2**64}", f"argument --seed: must be 0 to 2^64 - 1, not {2**64}"),
        ("--temperature -1", "argument --temperature: must be 0 (argmax) or more, not -1"),
        ("--temperature nan", "argument --temperature: must be 0 (argmax) or more, not nan"),
        ("--guidance-scale nan", "argument --guidance-scale: must be 0 or more (1 is no guidance), at most 1e+06, not"),
        ("--guidance-scale -5", "argument --guidance-scale: must be 0 or more (1 is no guidance), at most 1e+06, not"),
        ("--top-p -1", "argument --top-p: must be above 0 and at most 1 (1 is off), not -1"),
        ("--top-p 7", "argument --top-p: must be above 0 and at most 1 (1 is off), not 7"),
        ("--top-k -1", "argument --top-k: must be 0 or more (0 is off), not -1"),
        ("--threads 100000", f"argument --threads: must be 0 to {4 * (os.cpu_count() or 1)}, not 100000"),
    ],
)
def test_mistakes_are_one_sentence(options: str, message: str, exported: Path, tmp_path: Path):
    assert sentence(exported, tmp_path, *options.split()).startswith(message)
    assert [path.name for path in tmp_path.iterdir()] == ["without"]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model's export, of 3 MB."""
    folder = tmp_path_factory.mktemp("small")
    export(DetailFlowPipeline.from_pretrained(TINY, device="cpu"), folder, "tiny")
    return folder


def check_misfit(folder: Path, output: Path) -> None:
    """Check that a call says that the networks do not fit model.json, and writes nothing."""
    line = sentence(folder, output, "9", "--seed", "1")
    assert line.startswith(f"the networks in {folder} do not fit its model.json")
    assert line.endswith(": repeat the export")
    assert [path.name for path in output.iterdir()] == ["without"]


@pytest.mark.parametrize("name", ["step.onnx", "decoder.onnx", "decoder.onnx.data"])
def test_networks_of_another_model(name: str, tmp_path: Path):
    """Of the same sizes, so that only the numbers differ: after more training, say."""
    pipeline = DetailFlowPipeline.from_pretrained(TINY, device="cpu")
    export(pipeline, tmp_path / "mixed", "tiny", largest_file=50_000)
    with torch.no_grad():
        for parameter in (*pipeline.gpt.parameters(), *pipeline.tokenizer.parameters()):
            parameter += 0.01
    export(pipeline, tmp_path / "other", "tiny", largest_file=50_000)
    shutil.copy(tmp_path / "other" / name, tmp_path / "mixed" / name)
    line = sentence(tmp_path / "mixed", tmp_path / "out", "9", "--seed", "1")
    assert line == f"{tmp_path / 'mixed' / name} is not the file that model.json was written with: repeat the export"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["without"]
    assert tokens_of(tmp_path / "other", tmp_path / "more", "9").shape == (1, 32)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: {"heads": model["heads"] + 1},
        lambda model: {"head_dim": 10**30},
        lambda model: {"depth": 10**12},
        lambda model: {"code_row": model["code_row"] + 1},
        lambda model: {"mask_row": model["mask_row"] - 1},
        lambda model: {name: model[name] + 1000 for name in ("code_row", "mask_row")},  # beyond the table
        lambda model: {"sizes": [*model["sizes"][:-1], 1000]},  # fits but for the last stage
        lambda model: {"sizes": [10**30 for _ in model["sizes"]]},
    ],
    ids=["heads", "head_dim", "depth", "code_row", "mask_row", "both rows", "last size", "sizes"],
)
def test_a_model_that_does_not_fit_its_networks(
    change: Callable[[dict], dict[str, object]], small: Path, tmp_path: Path
):
    folder = Path(shutil.copytree(small, tmp_path / "changed"))
    model = json.loads((folder / "model.json").read_text())
    (folder / "model.json").write_text(json.dumps(model | change(model)))
    check_misfit(folder, tmp_path / "out")


def test_more_tokens_than_memory_holds(small: Path, tmp_path: Path):
    """All else fits: steps, counts and sizes."""
    folder, many = Path(shutil.copytree(small, tmp_path / "many")), 10**9
    model = json.loads((folder / "model.json").read_text())
    changed = {"num_tokens": many, "counts": [*model["counts"][:-1], many]}
    changed["steps"] = [*model["steps"][:-1], [model["steps"][-1][0], many]]
    (folder / "model.json").write_text(json.dumps(model | changed))
    line = sentence(folder, tmp_path / "out", "9")
    assert line == f"{folder / 'model.json'} is damaged, see num_tokens: repeat the export"


def test_files_that_are_none(exported: Path, tmp_path: Path):
    (tmp_path / "file").write_text("")
    line = sentence(exported, tmp_path / "out", "cat", "--output", str(tmp_path / "file"))
    assert line == f"cannot write to {tmp_path / 'file'}: File exists"
    folder, path = tmp_path / "model", tmp_path / "model" / "model.json"
    assert sentence(folder, tmp_path / "a").startswith(f"there is no {path}: write it with `detailflow export --onnx ")
    folder.mkdir()
    model = json.loads((exported / "model.json").read_text())
    contents = (
        ("{", f"{path} is not what `detailflow export` writes: repeat the export"),
        ("[1]", f"{path} is not what `detailflow export` writes: repeat the export"),
        ('{"format": "detailflow-onnx"}', f"{folder}: the export is not complete: repeat it"),
        (json.dumps(model | {"steps": 3, "heads": None}), f"{path} is damaged, see heads, steps: repeat the export"),
        (json.dumps(model | {"sampling": {}}), f"{path} is damaged, see sampling: repeat the export"),
        (json.dumps(model | {"steps": []}), f"{path} is damaged, see steps: repeat the export"),
        (json.dumps(model | {"steps": ["a"]}), f"{path} is damaged, see steps: repeat the export"),
        (json.dumps(model | {"steps": model["steps"][:-1]}), f"{path} is damaged, see steps: repeat the export"),
        (json.dumps(model | {"sizes": []}), f"{path} is damaged, see sizes: repeat the export"),
        (json.dumps(model | {"class_names": [1]}), f"{path} is damaged, see class_names: repeat the export"),
        (json.dumps(model | {"group_size": 0}), f"{path} is damaged, see heads, head_dim, group_size: repeat"),
        *(
            (json.dumps(model | {"sampling": model["sampling"] | changed}), f"{path} is damaged, see sampling: repeat")
            for changed in (
                {"guidance_scale": "1.5"},
                {"guidance_scale": True},
                {"guidance_scale": None},
                {"temperature": [1]},
                {"temperature": -1},
                {"top_k": 1.5},
                {"top_k": -3},
                {"top_p": "0.9"},
                {"top_p": 7},
                {"guidance_schedule": "cosine"},
                {"guidance_schedule": []},
            )
        ),
        *(
            (json.dumps(model | {name: value}), f"{path} is damaged, see null_class, code_row, mask_row: repeat")
            for name, value in (("null_class", -5), ("null_class", 0), ("code_row", 10**30), ("mask_row", 2**40))
        ),
        (json.dumps(model | {"heads": True}), f"{path} is damaged, see heads: repeat the export"),
        (json.dumps(model | {"causal_tokens": -1}), f"{path} is damaged, see causal_tokens: repeat the export"),
        *(
            (json.dumps(model | changed), f"{path} is damaged, see files, sha256: repeat the export")
            for changed in (
                {"sha256": {}},
                {"files": {"float32": {"step": "../step.onnx", "decoder": "decoder.onnx"}}},
                {"files": {"float32": {"step": "step.onnx"}}},
                {"files": {"float32": "step.onnx"}},
            )
        ),
        (json.dumps(model | {"files": {}}), f"the export in {folder} has no float32 networks"),
        (json.dumps(model), f"could not read {folder / 'step.onnx'}: No such file or directory"),
    )
    for i, (content, message) in enumerate(contents):
        path.write_text(content)
        assert sentence(folder, tmp_path / "b" / str(i)).startswith(message)


def test_batches_go_on_with_the_noise(exported: Path, shipped: DetailFlowPipeline, tmp_path: Path):
    """40 images are two batches."""
    tokens = tokens_of(exported, tmp_path, "cat", "--num", "40", "--num-tokens", "1", "--precision", "float32")
    assert len(tokens) == 40
    wanted = ours(shipped, [3] * 40, 0, num_tokens=1)
    assert (tokens == wanted).mean() > 0.9  # but for draws within rounding of a border
