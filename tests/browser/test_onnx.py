"""examples/browser generates with the exported model in a real browser: our tokens for a seed, from coarse to fine."""

import functools
import http.server
import json
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from detailflow import DetailFlowPipeline
from detailflow.export.write import export
from detailflow.generation import image_generator

EXAMPLE = Path(__file__).parents[2] / "examples" / "browser"
RUNTIME = "node_modules/onnxruntime-web"
# Seeds whose draws are 1e-5 or more away from a border between two codes: nearer ones are decided by rounding.
CAT, SEED = 3, 62
READY = "#generate:enabled"


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


def install(folder: Path) -> None:
    """Put onnxruntime-web into the folder: what `npm install` left in the example, or what it brings now."""
    if (EXAMPLE / RUNTIME / "dist").is_dir():
        (folder / "node_modules").symlink_to(EXAMPLE / "node_modules")
        return
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("needs npm, which brings onnxruntime-web")
    command = [npm, "install", "--ignore-scripts", "--no-audit", "--no-fund", "--no-package-lock"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)
    if done.returncode:
        pytest.skip(f"npm install cannot bring onnxruntime-web: {done.stderr.strip().splitlines()[-1:]}")


@pytest.fixture(scope="module")
def folder(shipped: DetailFlowPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example as its README sets it up."""
    folder = tmp_path_factory.mktemp("example")
    for name in ("index.html", "style.css", "page.js", "detailflow.js", "package.json"):
        shutil.copy(EXAMPLE / name, folder)
    install(folder)
    export(shipped, folder / "model", "shipped")
    return folder


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    """Static files and nothing else."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def ours(pipeline: DetailFlowPipeline, images: int, **sampling: object) -> list[list[int]]:
    generators = [image_generator(SEED, i) for i in range(images)]
    return pipeline.gpt.generate(torch.tensor([CAT] * images), generator=generators, **sampling).tolist()


def test_the_page(address: str, new_page: Callable, shipped: DetailFlowPipeline):
    page = new_page(f"{address}/?backend=wasm", READY)
    page.evaluate(
        """() => {
            window.stages = [];
            const watch = () => window.stages.push(document.querySelector('#result canvas').width);
            new MutationObserver(watch).observe(document.getElementById('tokens'), {childList: true});
        }"""
    )
    page.get_by_label("Class").select_option("cat")
    page.get_by_label("Images").fill("2")
    page.get_by_label("Seed").fill(str(SEED))
    page.get_by_role("button", name="Generate").click()
    page.get_by_text("2 images in").wait_for()
    assert json.loads(page.locator("#tokens").text_content()) == ours(shipped, 2)
    sizes = page.evaluate("window.stages")
    assert len(sizes) == 20 and sizes == sorted(sizes) and (sizes[0], sizes[-1]) == (4, 32)  # coarse to fine
    shown = page.evaluate(
        """() => [...document.querySelectorAll('canvas')].map((canvas) =>
            [...canvas.getContext('2d').getImageData(0, 0, 32, 32).data])"""
    )
    wanted = shipped("cat", num_images_per_class=2, seed=SEED)
    for pixels, image in zip(shown, wanted, strict=True):
        found = np.array(pixels).reshape(32, 32, 4)
        assert np.abs(found[..., :3] - np.asarray(image, int)).max() <= 1 and (found[..., 3] == 255).all()

    page.get_by_label("Weights").select_option("8 bits")
    page.get_by_role("button", name="Generate").click()
    page.get_by_text("2 images in").wait_for()
    tokens = np.array(json.loads(page.locator("#tokens").text_content()))
    assert tokens.shape == (2, 48) and (tokens[:, 0] == np.array(ours(shipped, 2))[:, 0]).all()


@pytest.mark.parametrize(
    "sampling",
    [{"temperature": 0.0}, {"top_k": 50, "top_p": 0.9, "temperature": 1.2}, {"guidance_schedule": "linear"}],
    ids=["greedy", "top-k and top-p", "linear guidance"],
)
def test_other_sampling(sampling: dict, address: str, new_page: Callable, shipped: DetailFlowPipeline):
    page = new_page(f"{address}/?backend=wasm", READY)
    tokens = page.evaluate(
        """async ([label, seed, options]) => {
            const { load } = await import('./detailflow.js');
            const generator = await load('model', 'float32', 'wasm');
            for await (const stage of generator.generate([label], seed, options)) window.last = stage.tokens;
            return window.last;
        }""",
        [CAT, SEED, sampling],
    )
    assert tokens == ours(shipped, 1, **sampling)


def test_noise(address: str, new_page: Callable):
    page = new_page(f"{address}/?backend=wasm", READY)
    for seed, image in ((0, 0), (1, 7), (2**32, 1), (2**64 - 1, 2**31)):
        found = page.evaluate(
            "async ([seed, image]) => (await import('./detailflow.js')).imageNoise(BigInt(seed), image, 700)",
            [str(seed), image],
        )
        assert found == torch.rand(700, generator=image_generator(seed, image), dtype=torch.float64).tolist()


def test_what_is_missing_is_said(folder: Path, address: str, new_page: Callable):
    model, aside = folder / "model" / "model.json", folder / "aside"
    content = model.read_text()
    model.rename(aside)
    try:
        page = new_page(f"{address}/?backend=wasm", "#status:has-text('Error')")
        assert "there is no model/model.json: run `detailflow export --onnx model` first" in page.inner_text("#status")
        model.write_text(json.dumps({"format": "detailflow-onnx"}))
        page.reload()
        page.get_by_text("the export in model is not complete: repeat it").wait_for()
        assert page.get_by_role("button", name="Generate").is_disabled()
    finally:
        model.write_text(content)
        aside.unlink()
