"""Make the pictures of docs/studio.md and README.md: the studio in a real browser, with the shipped model.

    python tests/browser/screenshots.py [--output docs/images]

Needs Chromium, as `make test-browser` does.
"""

import argparse
import io
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright
from server import Server, launch
from studio import Studio

from detailflow.data.images import open_images

ROOT = Path(__file__).resolve().parents[2]
PHOTOGRAPHS = ROOT / "tests" / "data" / "images" / "cifar10.parquet"
PHOTOGRAPH = 1  # of them
LARGEST = 300_000  # bytes of a picture
DESK, PHONE = (1280, 800), (360, 740)
HORSES = "#class=horse&n=4&seed=7"


def shots(browser: Browser, url: str) -> Iterator[tuple[str, Page]]:
    """Yield the name of each picture and the page to be shown in it."""

    def studio(size: tuple[int, int], scheme: str, fragment: str = "") -> Studio:
        viewport = {"width": size[0], "height": size[1]}
        page = browser.new_page(viewport=viewport, color_scheme=scheme, reduced_motion="reduce")
        page.goto(f"{url}/{fragment}")
        page.wait_for_selector("html[data-ready]")
        if fragment:
            Studio(page).finish()
        return Studio(page)

    whole = studio(DESK, "light", HORSES)
    yield "studio", whole.page
    coarse = studio(DESK, "dark", HORSES)
    coarse.scrub(12)
    yield "studio-coarse", coarse.page
    whole.set(Seed=3)
    whole.vary(keep=8, name="horse")
    whole.button("Back").click()
    whole.vary(keep=8, name="dog")
    whole.tiles.nth(1).click()
    whole.vary(keep=12, name="deer")
    yield "studio-vary", whole.page
    own = studio(DESK, "dark")
    with tempfile.TemporaryDirectory() as folder:
        photograph = Path(folder) / "photograph.png"
        open_images(PHOTOGRAPHS).image(PHOTOGRAPH).save(photograph)
        own.page.locator("#file").set_input_files(photograph)
        own.finish()
    yield "studio-picture", own.page
    phone = studio(PHONE, "light", HORSES)
    phone.scrub(16)
    phone.page.locator("#stage").scroll_into_view_if_needed()
    yield "studio-phone", phone.page


def main() -> None:
    """Write the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "images")
    output: Path = parser.parse_args().output
    server = Server()
    try:
        with sync_playwright() as playwright:
            browser = launch(playwright)
            for name, page in shots(browser, server.url):
                page.mouse.move(0, 0)
                page.wait_for_timeout(500)
                page.evaluate("document.activeElement.blur()")
                file = output / f"{name}.png"
                Image.open(io.BytesIO(page.screenshot())).convert("RGB").save(file, optimize=True)
                print(f"{file}: {file.stat().st_size // 1000} kB")
                assert file.stat().st_size <= LARGEST
            browser.close()
    finally:
        server.kill(signal.SIGTERM)


if __name__ == "__main__":
    main()
