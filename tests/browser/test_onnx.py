"""examples/browser generates with the exported model in a real browser: our tokens for a seed, from coarse to fine."""

import functools
import http.server
import json
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from playwright.sync_api import Page

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


@contextmanager
def changed(folder: Path, **entries: object) -> Iterator[None]:
    """The export with other entries in its model.json."""
    path = folder / "model" / "model.json"
    content = path.read_text()
    path.write_text(json.dumps(json.loads(content) | entries))
    try:
        yield
    finally:
        path.write_text(content)


def failed(page: Page) -> str:
    page.locator("#status", has_text="Error: ").wait_for()
    return page.inner_text("#status").removeprefix("Error: ")


def adapter(result: str) -> str:
    """A script that lets every request for a graphics processor end so."""
    return f"Object.defineProperty(navigator, 'gpu', {{value: {{requestAdapter: () => {result}}}}})"


ANSWER = "window.fetch = async () => new Response({})"


def test_only_the_two_backends_are_imported(address: str, new_page: Callable):
    page = new_page(f"{address}/?backend=../../../evil", "#status:has-text('Error')")
    assert failed(page) == "the backend must be wasm or webgpu, not ../../../evil"


@pytest.mark.parametrize("result", ["Promise.reject(new Error('lost'))", "{throw 1}", "Promise.resolve({})"])
def test_without_a_usable_graphics_processor_wasm_computes(result: str, address: str, new_page: Callable):
    page = new_page(address, READY, adapter(result))
    assert page.inner_text("#status") == "Ready (wasm)"


def test_a_backend_that_was_asked_for_is_not_replaced(address: str, new_page: Callable):
    page = new_page(f"{address}/?backend=webgpu", READY, adapter("Promise.resolve(null)"))
    assert failed(page) != "undefined"


def test_only_8_bit_weights(folder: Path, address: str, new_page: Callable):
    files = json.loads((folder / "model" / "model.json").read_text())["files"]
    with changed(folder, files={"int8": files["int8"]}):
        page = new_page(f"{address}/?backend=wasm", READY)
    assert page.locator("#precision option").all_inner_texts() == ["8 bits"]
    assert page.inner_text("#status") == "Ready (wasm)"


def test_other_weights_can_be_chosen_when_some_are_missing(folder: Path, address: str, new_page: Callable):
    step, aside = folder / "model" / "step.onnx", folder / "aside.onnx"
    step.rename(aside)
    try:
        page = new_page(f"{address}/?backend=wasm", READY)
    finally:
        aside.rename(step)
    assert failed(page) == "there is no model/step.onnx: run `detailflow export --onnx model` first"
    page.get_by_label("Weights").select_option("8 bits")
    page.get_by_role("button", name="Generate").click()
    page.get_by_text("4 images in").wait_for()


@pytest.mark.parametrize(
    ("entries", "wrong"),
    [
        ({"steps": [[0, 1], [2, 48]]}, "steps, counts"),
        ({"steps": None, "counts": None}, "steps, counts, sizes"),
        ({"sizes": [32]}, "sizes"),
        ({"class_names": ["cat"]}, "class_names"),
        ({"num_classes": "ten"}, "class_names, num_classes, null_class, code_row, mask_row"),
        ({"mask_row": 5}, "null_class, code_row, mask_row, codebook_size"),
        ({"sampling": {}}, "sampling"),
        ({"group_size": 0}, "heads, head_dim, group_size"),
        ({"files": {}}, "files, sha256"),
        ({"sha256": {}}, "files, sha256"),
        ({"sha256": None}, "files, sha256"),
    ],
)
def test_a_damaged_model_is_refused(entries: dict, wrong: str, folder: Path, address: str, new_page: Callable):
    with changed(folder, **entries):
        page = new_page(f"{address}/?backend=wasm", "#status:has-text('Error')")
    assert failed(page) == f"model/model.json is damaged, see {wrong}: repeat the export"
    assert page.get_by_role("button", name="Generate").is_disabled()


@pytest.mark.parametrize(
    ("name", "value"),
    [("guidance_scale", -1), ("guidance_schedule", "cosine"), ("temperature", None), ("top_k", 1.5), ("top_p", 0)],
)
def test_damaged_sampling_is_refused(name: str, value: object, folder: Path, address: str, new_page: Callable):
    sampling = json.loads((folder / "model" / "model.json").read_text())["sampling"] | {name: value}
    with changed(folder, sampling=sampling):
        page = new_page(f"{address}/?backend=wasm", "#status:has-text('Error')")
    assert failed(page) == "model/model.json is damaged, see sampling: repeat the export"


@contextmanager
def networks_of(other: Path, folder: Path, *names: str) -> Iterator[None]:
    """The export with these files of another one."""
    kept = {name: (folder / "model" / name).read_bytes() for name in names if (folder / "model" / name).exists()}
    for name in names:
        shutil.copy(other / name, folder / "model" / name)
    try:
        yield
    finally:
        for name in names:
            (folder / "model" / name).unlink()
        for name, content in kept.items():
            (folder / "model" / name).write_bytes(content)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The export of another model, with its weights in files of their own."""
    folder = tmp_path_factory.mktemp("small")
    tiny = DetailFlowPipeline.from_pretrained(Path(__file__).parents[1] / "parity" / "tiny-32", device="cpu")
    export(tiny, folder, "tiny", largest_file=50_000)
    return folder


def test_networks_of_another_model(folder: Path, small: Path, address: str, new_page: Callable):
    with networks_of(small, folder, "decoder.onnx"):
        page = new_page(f"{address}/?backend=wasm", READY)
        assert failed(page) == "model/decoder.onnx is not the file that model.json was written with: repeat the export"
        page.get_by_label("Weights").select_option("8 bits")  # which are the model's own
        page.get_by_role("button", name="Generate").click()
        page.get_by_text("4 images in").wait_for()


@pytest.mark.parametrize("entries", [{"depth": 10**12}, {"heads": 1}, {"head_dim": 8}])
def test_networks_that_do_not_fit(entries: dict, folder: Path, address: str, new_page: Callable):
    with changed(folder, **entries):
        page = new_page(f"{address}/?backend=wasm", READY)
    assert failed(page) == "the networks in model do not fit its model.json: repeat the export"


def test_without_checksums(folder: Path, tmp_path: Path, address: str, new_page: Callable):
    """A page by http:// from another machine: there the shapes must do."""
    shutil.copy(folder / "model" / "encoder.onnx", tmp_path / "step.onnx")
    with networks_of(tmp_path, folder, "step.onnx"):
        script = "Object.defineProperty(crypto, 'subtle', {value: undefined})"
        page = new_page(f"{address}/?backend=wasm", READY, script)
    assert failed(page) == "the networks in model do not fit its model.json: repeat the export"
    page.reload()
    page.get_by_text("Ready (wasm)").wait_for()


def test_weights_in_files_of_their_own(folder: Path, small: Path, address: str, new_page: Callable):
    names = [path.name for path in small.iterdir() if path.name != "README.md"]
    with networks_of(small, folder, *names):
        page = new_page(f"{address}/?backend=wasm", READY)
        assert page.inner_text("#status") == "Ready (wasm)"
        page.get_by_label("Seed").fill("54")
        page.get_by_label("Class").select_option("1")
        page.get_by_role("button", name="Generate").click()
        page.get_by_text("4 images in").wait_for()
    tokens = json.loads(page.locator("#tokens").text_content())
    pipeline = DetailFlowPipeline.from_pretrained(Path(__file__).parents[1] / "parity" / "tiny-32", device="cpu")
    generators = [image_generator(54, i) for i in range(4)]
    assert tokens == pipeline.gpt.generate(torch.tensor([1] * 4), generator=generators).tolist()


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (ANSWER.format("'', {status: 503}"), "could not read model/model.json: the server answered with status 503"),
        (ANSWER.format("'<p>'"), "model/model.json is not what `detailflow export` writes: repeat the export"),
        (ANSWER.format("'[]'"), "model/model.json is not what `detailflow export` writes: repeat the export"),
        ("window.fetch = () => Promise.reject('text')", "text"),
    ],
)
def test_other_trouble_is_said(script: str, said: str, address: str, new_page: Callable):
    assert failed(new_page(f"{address}/?backend=wasm", "#status:has-text('Error')", script)) == said


def test_seeds_and_classes_out_of_range(address: str, new_page: Callable):
    page = new_page(f"{address}/?backend=wasm", READY)
    seed, generate = page.get_by_label("Seed"), page.get_by_role("button", name="Generate")
    seed.fill(str(2**64 - 1))
    generate.click()
    page.get_by_text("4 images in").wait_for()
    seed.fill(str(2**64))
    generate.click()
    assert failed(page) == f"the seed must be a whole number from 0 to {2**64 - 1}, not {2**64}"
    assert page.locator("canvas").count() == 0 and page.locator("#tokens").text_content() == ""
    seed.fill("1.5")
    assert not seed.evaluate("input => input.checkValidity()")

    said = page.evaluate(
        """async () => {
            const { load } = await import('./detailflow.js');
            const generator = await load('model', 'float32', 'wasm');
            const refused = (...asked) => generator.generate(...asked).next().catch((error) => error.message);
            const wrong = [[[3], ''], [[3], '0x10'], [[3], -1], [[3], 2 ** 60], [[3], null]];
            const seeds = await Promise.all(wrong.map((asked) => refused(...asked)));
            const classes = [await refused([3, 10], 1), await refused([-1], 1), await refused([0.5], 1)];
            generator.model.num_classes = 0;
            return [seeds, [...classes, await refused([3], 1)]];
        }"""
    )
    assert all(str(text).startswith("the seed must be a whole number") for text in said[0])
    assert said[1][:3] == [f"the class number must be a whole number from 0 to 9, not {n}" for n in (10, -1, 0.5)]
    assert said[1][3] == "the class number of this model is always 10, not 3"


def test_what_is_said_while_tokens_come(folder: Path, address: str, new_page: Callable):
    """The status speaks at the end, not after each of the steps; the keyboard stays at the button."""
    with changed(folder, class_names=["crane", "cat", "crane", *map(str, range(7))]):
        page = new_page(f"{address}/?backend=wasm", READY)
    assert page.locator("#class option").all_inner_texts()[:3] == ["crane (0)", "cat", "crane (2)"]
    page.evaluate(
        """() => {
            window.said = [];
            const status = document.getElementById('status'), progress = document.getElementById('progress');
            new MutationObserver(() => window.said.push(status.textContent)).observe(status, {childList: true});
            window.shown = [];
            new MutationObserver(() => window.shown.push(progress.value)).observe(progress, {attributes: true});
        }"""
    )
    assert page.locator("#progress").is_hidden()
    page.get_by_role("button", name="Generate").press("Enter")
    page.get_by_text("4 images in").wait_for()
    said, shown = page.evaluate("[window.said, window.shown]")
    assert [text.split(" in ")[0] for text in said] == ["Generating …", "4 images"]
    assert shown[-1] == 48 and sorted(shown) == shown and len(set(shown)) >= 20
    assert page.locator("#progress").is_hidden()
    assert page.get_by_role("button", name="Generate").evaluate("button => button === document.activeElement")


def test_long_class_names_do_not_widen_the_page(folder: Path, address: str, new_page: Callable):
    with changed(folder, class_names=["a very long name of a class " * 9] * 10):
        page = new_page(f"{address}/?backend=wasm", READY, viewport={"width": 320, "height": 600})
    assert page.evaluate("document.documentElement.scrollWidth") <= 320


def test_what_the_page_needs_is_said_without_javascript(address: str, new_page: Callable):
    page = new_page(address, "#status", java_script_enabled=False)
    assert "needs JavaScript and a web server" in page.inner_text("#status")
