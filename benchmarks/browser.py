"""Time examples/browser in Chromium, in turns with the same steps by ONNX Runtime in Python with one thread.

First `npm install` and `detailflow export --onnx model` in examples/browser; then

python benchmarks/browser.py
"""

import argparse
import functools
import http.server
import json
import re
import statistics
import sys
import threading
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
from playwright.sync_api import Page, sync_playwright

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "browser"
sys.path.append(str(ROOT / "examples"))

from onnx_generate import Generator  # noqa: E402

DONE = "document.getElementById('status').textContent.includes(' ms')"


class Files(http.server.SimpleHTTPRequestHandler):
    """Serve files without a line for each."""

    def log_message(self, *_: object) -> None:
        """Print nothing."""


def page_ms(page: Page, precision: str) -> float:
    """Return the milliseconds that the page says it took for one image and all of its stages."""
    page.select_option("#precision", precision)
    page.evaluate("document.getElementById('status').textContent = ''")
    page.click("#generate")
    page.wait_for_function(DONE, timeout=300_000)
    found = re.search(r"in (\d+) ms", page.inner_text("#status"))
    assert found
    return float(found[1])


def python_ms(generator: Generator) -> float:
    """Return the milliseconds of the same in Python."""
    model, began = generator.model, time.perf_counter()
    tokens = generator.tokens(np.array([0]), 1, model["sampling"], model["num_tokens"])
    for n in model["counts"]:
        generator.images(tokens[:, :n])
    return (time.perf_counter() - began) * 1000


def main() -> None:
    """Print medians and ratios."""
    parser = argparse.ArgumentParser(description="Times of examples/browser in Chromium.")
    parser.add_argument("--chromium", default="/usr/bin/chromium", help="path of the browser")
    parser.add_argument("--repeats", type=int, default=12, help="the median counts")
    args = parser.parse_args()
    model = json.loads((EXAMPLE / "model" / "model.json").read_text())
    generators = {kind: Generator(EXAMPLE / "model", model, kind, threads=1) for kind in model["files"]}
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Files, directory=EXAMPLE))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    taken: dict[str, list[tuple[float, float]]] = defaultdict(list)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=args.chromium)
        page = browser.new_page()
        page.goto(f"http://127.0.0.1:{server.server_port}/?backend=wasm")
        page.wait_for_selector("#generate:enabled", timeout=300_000)
        page.fill("#images", "1")
        for _ in range(args.repeats + 1):
            for kind, generator in generators.items():
                taken[kind].append((page_ms(page, kind), python_ms(generator)))
        browser.close()
    for kind, pairs in taken.items():
        theirs, ours = (statistics.median(times) for times in zip(*pairs[1:], strict=True))  # the first is for warm-up
        print(f"{kind}: browser {theirs:.0f} ms, Python {ours:.0f} ms, ratio {theirs / ours:.1f}")


if __name__ == "__main__":
    main()
