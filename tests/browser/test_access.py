"""For everybody: keyboard, screen readers, all windows, dark and light, slow connections, a thousand classes."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import axe_playwright_python
import pytest
from playwright.sync_api import Page, expect
from studio import Studio, same

from detailflow import DetailFlowPipeline

AXE = Path(axe_playwright_python.__file__).with_name("axe.min.js")
RUN = "() => axe.run(document, { resultTypes: ['violations', 'incomplete'] })"
WIDTHS = (360, 768, 1280, 2560)
SLOW = {"offline": False, "latency": 400, "downloadThroughput": 50_000, "uploadThroughput": 50_000}  # bytes a second


def violations(page: Page) -> list[str]:
    """Return what axe-core finds wrong with the page as it is."""
    if not page.evaluate("'axe' in window"):
        page.evaluate(AXE.read_text(encoding="utf-8"))
    found = page.evaluate(RUN)["violations"]
    return [f"{one['id']}: {json.dumps([node['html'] for node in one['nodes']])}" for one in found]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(new_page: Callable[..., Page], url: str, scheme: str, tmp_path: Path):
    page = new_page(url, color_scheme=scheme)
    studio = Studio(page)
    assert violations(page) == []
    studio.classes.click()
    assert violations(page) == []
    page.get_by_text("More settings").click()
    studio.set(Top_k=0)
    studio.button("Generate").click()
    assert violations(page) == []
    studio.set(Top_k="")
    studio.generate("cat", number=4)
    assert violations(page) == []
    studio.vary(keep=8, name="dog")
    assert violations(page) == []
    picture = tmp_path / "picture.png"
    page.locator("#preview").screenshot(path=picture)
    page.locator("#file").set_input_files(picture)
    studio.finish()
    assert violations(page) == []
    page.evaluate("document.getElementById('key').showModal()")
    assert violations(page) == []


@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_is_wider_than_the_window(new_page: Callable[..., Page], url: str, width: int):
    page = new_page(url, viewport={"width": width, "height": 800})
    studio = Studio(page)

    def fits() -> bool:
        return page.evaluate("document.documentElement.scrollWidth") <= width

    assert fits()
    page.get_by_text("More settings").click()
    assert fits()
    expect(studio.button("Generate")).to_be_in_viewport(ratio=1)
    studio.generate("cat", number=16 if width == 360 else 4)
    assert fits()
    studio.vary(keep=8, name="dog")
    assert fits()
    sides = page.locator(".tile canvas.picture").evaluate_all("all => all.map((one) => one.clientWidth)")
    assert min(sides) >= 64 and all(side % 32 == 0 for side in sides), "whole multiples of the images' pixels"


def test_the_keyboard_is_enough(studio: Studio):
    page = studio.page
    press, focused = page.keyboard.press, "document.activeElement.id"
    press("Tab")
    expect(page.get_by_role("link", name="Skip to the images")).to_be_focused()

    def tab_to(element: str) -> None:
        for _ in range(40):
            if page.evaluate(focused) == element:
                return
            press("Tab")
        raise AssertionError(f"the tabulator does not lead to {element}")

    tab_to("class")
    page.keyboard.type("ho")
    expect(page.get_by_role("option", name="horse")).to_have_attribute("aria-selected", "true")
    press("ArrowDown")
    press("Enter")
    assert studio.classes.input_value() == "horse"
    press("Enter")
    studio.finish()
    expect(page.get_by_role("status")).to_have_text("Done: 4 images of horse")
    tab_to("position")
    press("Home")
    for _ in range(7):
        press("ArrowRight")
    assert studio.reading.startswith("8 of 48 tokens")
    tab_to("keep")
    expect(page.get_by_role("slider", name="Keep")).to_have_attribute("aria-valuetext", "8 tokens")
    tab_to("vary-class")
    page.keyboard.type("frog")
    press("Enter")
    press("Enter")
    expect(page.get_by_role("status")).to_have_text("Done: 4 images of frog")
    press("Control+Enter")
    expect(page.get_by_role("status")).to_have_text("Done: 4 images of horse")


def test_the_link_to_the_images_leaves_them_as_they_are(studio: Studio):
    studio.generate("cat", number=2, seed=5)
    before, address = studio.images, studio.page.url
    studio.page.get_by_role("link", name="Skip to the images").press("Enter")
    expect(studio.page.get_by_role("region", name="Images", exact=True)).to_be_focused()
    assert studio.page.url == address
    expect(studio.tiles).to_have_count(2)
    assert all((a == b).all() for a, b in zip(studio.images, before, strict=True))


def test_a_thousand_classes(new_page: Callable[..., Page], serve: Callable[..., Any], published: Path):
    server = serve("--model", str(published.parent), "--model-name", "thousand")
    studio = Studio(new_page(server.url))
    expect(studio.page.get_by_text("1,000 classes")).to_be_visible()
    studio.classes.click()
    options = studio.page.get_by_role("listbox", name="Classes", exact=True).get_by_role("option")
    expect(options.last).to_have_text("and 920 more: type to find one")
    studio.classes.fill("retriever")
    assert len(options.all()) >= 5
    studio.classes.fill("n02099601")
    expect(options).to_have_count(1)
    expect(options).to_have_text("golden retriever")
    studio.classes.fill("crane")
    expect(options.first).to_have_text("crane")
    studio.generate("207", number=1, seed=1)
    assert "class=n02099601" in studio.page.url


def test_a_class_that_is_written_exactly_is_taken(
    new_page: Callable[..., Page], serve: Callable[..., Any], model: Path, tmp_path: Path
):
    """Of two that differ in nothing but case."""
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    for path in folder.rglob("*.json"):
        path.write_text(path.read_text(encoding="utf-8").replace('"bird"', '"Cat"'), encoding="utf-8")
    studio = Studio(new_page(serve("--model", str(folder)).url))
    for name in ("Cat", "cat"):
        studio.generate(name, number=1, seed=1)
        expect(studio.page.get_by_role("status")).to_have_text(f"Done: 1 image of {name}")
        studio.classes.fill(name)
        studio.classes.blur()
        assert studio.classes.input_value() == name


def test_a_class_that_shares_its_name_is_asked_for_by_its_number(
    new_page: Callable[..., Page],
    serve: Callable[..., Any],
    pipeline: DetailFlowPipeline,
    model: Path,
    tmp_path: Path,
):
    """Even if that number is the name of another class."""
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    for path in folder.rglob("*.json"):
        text = path.read_text(encoding="utf-8")
        for name, other in (("airplane", "4"), ("cat", "twin"), ("Hot dog", "twin")):
            text = text.replace(f'"{name}"', f'"{other}"')
        path.write_text(text, encoding="utf-8")
    studio = Studio(new_page(serve("--model", str(folder)).url))
    studio.set(Images=1, Seed=1)
    for place, class_id in enumerate((3, 4)):
        studio.classes.fill("twin")
        options = studio.page.get_by_role("listbox", name="Classes", exact=True).get_by_role("option")
        options.nth(place).click()
        studio.button("Generate").click()
        studio.finish()
        assert same(studio.images, pipeline(class_id, seed=1))


def test_a_slow_connection(new_page: Callable[..., Page], url: str):
    page = new_page(url)
    studio = Studio(page)
    session = page.context.new_cdp_session(page)
    session.send("Network.enable")
    session.send("Network.emulateNetworkConditions", SLOW)
    studio.button("Generate").click()
    expect(studio.slider).to_have_attribute("aria-valuetext", re.compile("^([1-9]|1[0-6]) of 48"))
    studio.finish()
    assert studio.reading.startswith("48 of 48")


def test_the_theme_stays(studio: Studio):
    background = "getComputedStyle(document.body).backgroundColor"
    light = studio.page.evaluate(background)
    studio.button("Theme: auto").click()
    dark = studio.page.evaluate(background)
    assert dark != light
    studio.page.reload()
    expect(studio.button("Theme: dark")).to_be_visible()
    assert studio.page.evaluate(background) == dark
