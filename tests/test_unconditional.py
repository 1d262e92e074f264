"""A model without classes, from unlabelled images to generating, varying, serving, measuring, timing and exporting."""

import html
import json
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from detailflow import DetailFlowError, DetailFlowGPT, DetailFlowPipeline, GPTConfig
from detailflow.benchmark import BenchmarkConfig, make_cases
from detailflow.cli import bench
from detailflow.cli.main import main
from detailflow.distributed import World
from detailflow.generation import image_generator
from detailflow.serving.app import create_app
from detailflow.training.config import Extraction, GPTTraining, LoopConfig
from detailflow.training.extract import extract
from detailflow.training.gpt import train_gpt
from detailflow.training.plan import plan_gpt

SIZES = dict(num_tokens=16, group_size=4, codebook_size=64)


@pytest.fixture(scope="module")
def unlabelled(cifar: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 20 images without classes."""
    folder = tmp_path_factory.mktemp("unlabelled")
    for i, path in enumerate(sorted(cifar.rglob("*.png"))[:20]):
        (folder / f"{i:02d}.png").write_bytes(path.read_bytes())
    return folder


@pytest.fixture(scope="module")
def free(pipeline: DetailFlowPipeline) -> DetailFlowPipeline:
    """The tests' tokenizer with an AR model without classes."""
    torch.manual_seed(1)
    gpt = DetailFlowGPT(GPTConfig(num_classes=0, width=32, depth=2, heads=2, mlp=64, **SIZES))
    for parameter in gpt.parameters():
        if parameter.ndim == 2:
            parameter.data.mul_(10)
    return DetailFlowPipeline(pipeline.tokenizer, gpt.eval())


@pytest.fixture(scope="module")
def folder(free: DetailFlowPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of that pipeline."""
    path = tmp_path_factory.mktemp("free")
    free.save_pretrained(path)
    return path


def run(folder: Path, *argv: str) -> int:
    return main([*argv, "--model", str(folder), "--device", "cpu"])


def same(images: list[Image.Image], others: list[Image.Image]) -> bool:
    return [image.tobytes() for image in images] == [image.tobytes() for image in others]


def test_a_call_needs_no_label(free: DetailFlowPipeline):
    images = free(num_images=3, seed=1)
    assert len(images) == 3 and same(images[:1], free(seed=1)) and not same(images[:1], images[1:2])
    *_, last = free.stream(num_images=3, seed=1)
    assert same(last.images, images)
    assert same(free.vary(images[0], keep=16), free.vary(images[0], keep=16, num_images=1))


def test_no_null_class_is_computed_beside(free: DetailFlowPipeline, monkeypatch: pytest.MonkeyPatch):
    rows, logits = [], free.gpt.logits
    monkeypatch.setattr(free.gpt, "logits", lambda x, *rest: (rows.append(len(x)), logits(x, *rest))[1])
    monkeypatch.setattr(free.gpt, "engine", "torch")
    free(num_images=3)
    assert set(rows) == {3}, "half the rows of a guided model"
    assert not free.gpt.config.sampling.guided


@pytest.mark.parametrize("engine", ["native", "torch"])
def test_every_engine_draws_the_same(free: DetailFlowPipeline, engine: str, monkeypatch: pytest.MonkeyPatch):
    wanted = free.gpt.generate(torch.zeros(2, dtype=torch.int64), temperature=0)
    monkeypatch.setattr(free.gpt, "engine", engine)
    assert torch.equal(free.gpt.generate(torch.zeros(2, dtype=torch.int64), temperature=0), wanted)


def test_a_class_or_guidance_is_refused(
    free: DetailFlowPipeline, pipeline: DetailFlowPipeline, folder: Path, capsys: Any
):
    refusals: list[tuple[Any, str]] = [
        (lambda: free("cat"), "this model has no classes: leave out 'cat'"),
        (lambda: free(0), "this model has no classes: leave out 0"),
        (lambda: free.vary([1] * 16, keep=4, label="cat"), "this model has no classes: leave out 'cat'"),
        (lambda: free(guidance_scale=2), "no classes, so nothing to guide by: leave out guidance_scale"),
        (lambda: free(num_images=0), "num_images must be"),
        (lambda: pipeline(), "this model makes images of classes: give a label or several"),
        (lambda: pipeline("cat", num_images=2), "num_images is for a model without classes"),
    ]
    for call, message in refusals:
        with pytest.raises(DetailFlowError, match=message):
            call()
    for command in (["generate", "cat"], ["vary", str(folder), "--class", "cat"]):
        assert run(folder, *command) == 2
        assert "this model has no classes: leave out 'cat'" in capsys.readouterr().err
    assert run(folder, "generate", "--guidance-scale", "2") == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_generate(free: DetailFlowPipeline, folder: Path, tmp_path: Path, capsys: Any):
    assert run(folder, "generate", "--num", "4", "--output", str(tmp_path / "few")) == 0
    names = sorted(path.name for path in (tmp_path / "few").iterdir())
    assert names == [*(f"000{i}-image.png" for i in range(4)), "grid.png"]
    with Image.open(tmp_path / "few" / "0003-image.png") as image:
        assert same([image], free(num_images=4)[3:])
    output = ["--format", "npz", "--output", str(tmp_path / "many")]
    assert run(folder, "generate", "--num-images", "5", *output) == 0
    assert np.load(tmp_path / "many" / "samples.npz")["arr_0"].shape == (5, 32, 32, 3)
    assert main(["classes", "--model", str(folder)]) == 0
    assert capsys.readouterr().out.endswith("this model has no classes: `detailflow generate` takes none\n")


def test_vary(folder: Path, unlabelled: Path, tmp_path: Path):
    assert run(folder, "vary", str(unlabelled / "00.png"), "--num", "2", "--output", str(tmp_path)) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "00-4-any-0.png", "00-4-any-1.png", "00-variations.png"
    ]  # fmt: skip


def test_evaluate(folder: Path, unlabelled: Path, feature_file: Path, tmp_path: Path):
    argv = ["--reference", str(unlabelled), "--num-samples", "20", "--features", str(feature_file)]
    assert run(folder, "evaluate", "gpt", *argv, "--output", str(tmp_path / "report")) == 0
    text = (tmp_path / "report" / "report.md").read_text()
    assert "20 images, seed 0." in text and "recognised" not in text.lower()


def test_bench(free: DetailFlowPipeline, folder: Path, capsys: Any):
    args = bench.parser().parse_args([])
    config = BenchmarkConfig(**{field.name: getattr(args, field.name) for field in fields(BenchmarkConfig)})
    for case in make_cases(free, 2, config, other=None).values():
        case.run()
    assert run(folder, "bench", "--accuracy", "--dtypes", "float32") == 0
    assert "float32" in capsys.readouterr().out


def test_export(
    free: DetailFlowPipeline,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    pytest.importorskip("onnxruntime", reason="needs the packages of detailflow[onnx]")
    assert main(["export", str(folder), "--onnx", str(tmp_path / "onnx")]) == 0
    model = json.loads((tmp_path / "onnx" / "model.json").read_text())
    assert (model["num_classes"], model["class_names"], model["null_class"]) == (0, None, 0)
    assert "no classes" in (tmp_path / "onnx" / "README.md").read_text()
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "examples")
    import onnx_generate

    argv = ["onnx_generate.py", str(tmp_path / "onnx"), "--num", "2", "--output", str(tmp_path / "images")]
    monkeypatch.setattr("sys.argv", argv)
    onnx_generate.main()
    wanted = free.gpt.generate(torch.zeros(1, dtype=torch.int64), generator=[image_generator(0, 0)])
    assert json.loads((tmp_path / "images" / "tokens.json").read_text())[0] == wanted[0].tolist()
    monkeypatch.setattr("sys.argv", [*argv, "cat"])
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        onnx_generate.main()
    assert capsys.readouterr().err == "error: this model has no classes: leave out cat\n"


# --- serving ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def http(free: DetailFlowPipeline) -> Iterator[httpx.Client]:
    from fastapi.testclient import TestClient

    with TestClient(create_app(free)) as client:
        yield client


@pytest.mark.parametrize("body", [{}, {"prompt": ""}, {"prompt": None}])
def test_served_without_a_prompt(body: dict[str, Any], http: httpx.Client):
    answer = http.post("/v1/images/generations", json={**body, "n": 2, "seed": 1})
    assert answer.status_code == 200 and len(answer.json()["data"]) == 2
    kept = answer.json()["data"][0]["tokens"]
    form = {"tokens": json.dumps(kept), "keep": "4", "seed": "1", **({"prompt": ""} if body else {})}
    assert http.post("/v1/images/variations", data=form, files={}).json()["data"][0]["tokens"] == kept


def test_what_is_served(http: httpx.Client):
    assert http.get("/v1/classes").json() == {"object": "list", "total": 0, "data": []}
    assert http.get("/v1/classes", params={"search": "cat"}).json()["total"] == 0
    model = http.get("/v1/models").json()["data"][0]
    assert model["num_classes"] == 0 and model["sampling"]["guidance_scale"] == 1
    example = html.unescape(http.get("/docs").text).partition(" -d '")[2].partition("'")[0]
    assert http.post("/v1/images/generations", json=json.loads(example)).status_code == 200


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"prompt": "cat"}, "prompt", "this model has no classes: leave out 'cat'"),
        ({"guidance_scale": 2.0}, "guidance_scale", "nothing to guide by: leave out guidance_scale"),
    ],
)
def test_what_is_refused(body: dict[str, Any], param: str, message: str, http: httpx.Client):
    answer = http.post("/v1/images/generations", json=body)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param
    assert message in answer.json()["error"]["message"]


def test_a_model_of_classes_needs_a_prompt(pipeline: DetailFlowPipeline):
    from fastapi.testclient import TestClient

    with TestClient(create_app(pipeline)) as client:
        for body in ({}, {"prompt": None}, {"prompt": ""}):
            answer = client.post("/v1/images/generations", json=body)
            assert answer.status_code == 400 and answer.json()["error"]["param"] == "prompt"


# --- training --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store(unlabelled: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokens") / "store"
    extract(Extraction(str(unlabelled), str(model), crops="two", val_share=0.2), path, "cpu")
    return path


def training(store: Path, model: Path, **settings: Any) -> GPTTraining:
    loop = LoopConfig(steps=4, batch_size=4, learning_rate=1e-3, precision="fp32", trackers=(), pictures_every=4)
    return GPTTraining(str(store), str(model), loop, width=32, depth=2, heads=2, **settings)


def test_training_on_unlabelled_images(store: Path, model: Path, tmp_path: Path, capsys: Any):
    config = training(store, model)
    assert plan_gpt(config, World()).of.endswith("images without classes, 2 crops of each")
    train_gpt(config, tmp_path / "gpt", "cpu")
    gpt = DetailFlowGPT.from_pretrained(tmp_path / "gpt", device="cpu")
    assert (gpt.config.num_classes, gpt.config.class_names, gpt.config.guidance_scale) == (0, None, 1.0)
    assert gpt.class_embedding.weight.shape == (1, 32)
    assert (tmp_path / "gpt" / "pictures").is_dir()


@pytest.mark.parametrize("to_classes", [True, False])
def test_between_models_with_and_without_classes(
    to_classes: bool, store: Path, tokens: Path, model: Path, folder: Path, tmp_path: Path
):
    """An AR model of either kind starts the other: every class begins as no class, and no class as itself."""
    source, target = (folder, tokens) if to_classes else (model, store)
    config = training(target, model, init=str(source))
    frozen = replace(config, loop=replace(config.loop, steps=1, learning_rate=1e-12))
    train_gpt(frozen, tmp_path / "gpt", "cpu")
    before = DetailFlowGPT.from_pretrained(source, device="cpu").class_embedding.weight
    after = DetailFlowGPT.from_pretrained(tmp_path / "gpt", device="cpu").class_embedding.weight
    assert len(after) == (11 if to_classes else 1)
    assert torch.allclose(after, before[-1:].expand_as(after), atol=1e-5)
