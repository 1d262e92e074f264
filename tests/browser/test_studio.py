"""Generate, watch, scrub, vary, share, and people's own pictures."""

import base64
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Page, Route, expect
from studio import Studio, pixels, same

from detailflow import DetailFlowPipeline
from detailflow.pipeline import fit

WATCH = """() => {
  window.readings = [];
  const note = () => window.readings.push(document.getElementById("reading").textContent);
  new MutationObserver(note).observe(document.getElementById("reading"), { childList: true });
}"""
# Events arrive one by one, with frames between them, however fast the server and slow the browser.
ONE_BY_ONE = """() => {
  const send = window.fetch;
  const frame = () => new Promise((resolve) => requestAnimationFrame(resolve));
  window.fetch = async (...request) => {
    const response = await send(...request);
    if (!response.headers.get("Content-Type").startsWith("text/event-stream")) return response;
    const events = new TransformStream({
      async transform(text, controller) {
        for (const part of text.split(/(?<=\\n\\n)/)) {
          controller.enqueue(part);
          await frame();
          await frame();
        }
      },
    });
    const body = response.body.pipeThrough(new TextDecoderStream()).pipeThrough(events);
    return new Response(body.pipeThrough(new TextEncoderStream()), response);
  };
}"""
GIVE = """([name, base64]) => {
  const bytes = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
  const data = new DataTransfer();
  data.items.add(new File([bytes], "picture.png", { type: "image/png" }));
  const options = { bubbles: true, cancelable: true };
  const event = name === "paste" ? new ClipboardEvent(name, { ...options, clipboardData: data })
                                 : new DragEvent(name, { ...options, dataTransfer: data });
  document.body.dispatchEvent(event);
}"""


@pytest.fixture(scope="session")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture that is not square."""
    path = tmp_path_factory.mktemp("picture") / "picture.png"
    Image.effect_mandelbrot((90, 60), (-3, -2.5, 2, 2.5), 100).convert("RGB").save(path)
    return path


def test_images_are_those_of_the_pipeline(studio: Studio, shipped: DetailFlowPipeline):
    studio.generate("cat", number=3, seed=5)
    assert same(studio.images, shipped("cat", num_images_per_class=3, seed=5))
    assert studio.reading == "48 of 48 tokens, 32 × 32 pixels, 66 bytes"


def test_images_take_shape_as_tokens_arrive(studio: Studio):
    studio.page.evaluate(ONE_BY_ONE)
    studio.page.evaluate(WATCH)
    studio.generate("ship", number=4, seed=1)
    counts = [int(reading.split()[0]) for reading in studio.page.evaluate("readings")]
    assert counts == sorted(counts)
    assert len(set(counts)) >= 4 and counts[0] < 16 and counts[-1] == 48


def test_a_new_click_interrupts_the_old_one(studio: Studio, shipped: DetailFlowPipeline):
    studio.set(Images=16, Seed=3)
    studio.button("Generate").click()
    expect(studio.button("Stop")).to_be_visible()
    expect(studio.slider).to_have_attribute("aria-valuetext", re.compile("^[1-9]"))
    expect(studio.page.locator("button.tile canvas.blank")).to_have_count(0)
    studio.generate("truck", number=1, seed=4)
    assert same(studio.images, shipped("truck", seed=4))
    expect(studio.trail.get_by_role("button")).to_have_count(2)
    studio.set(Images=16)
    studio.button("Generate").click()
    studio.button("Stop").click()
    expect(studio.page.get_by_role("status")).to_have_text("Stopped")


def test_scrubbing_needs_no_server(studio: Studio, shipped: DetailFlowPipeline):
    studio.generate("horse", seed=2)
    studio.page.context.set_offline(True)
    for count in (1, 8, 32):
        studio.scrub(count)
        (stage,) = shipped.stream("horse", num_images_per_class=2, seed=2, counts=[count])
        assert same(studio.images, stage.images)
    assert studio.reading == "32 of 48 tokens, 28 × 28 pixels, 44 bytes"


def test_playing_goes_from_the_first_token_to_the_last(studio: Studio):
    studio.generate("dog")
    studio.page.evaluate(WATCH)
    studio.button("Play").click()
    expect(studio.button("Pause")).to_be_visible()
    expect(studio.button("Play")).to_be_visible()
    counts = [int(reading.split()[0]) for reading in studio.page.evaluate("readings")]
    assert counts[0] == 1 and counts[-1] == 48 and len(counts) > 15


def test_images_can_be_taken_away(studio: Studio, shipped: DetailFlowPipeline):
    studio.generate("frog", number=2, seed=6)
    studio.tiles.nth(1).click()
    expected = shipped("frog", num_images_per_class=2, seed=6)[1]

    def saved(button: str) -> Image.Image:
        with studio.page.expect_download() as download:
            studio.button(button).click()
        assert download.value.suggested_filename.startswith("frog-6-2")
        return Image.open(io.BytesIO(Path(download.value.path()).read_bytes()))

    assert same([np.asarray(saved("PNG 32 × 32"), int)], [expected])
    large = saved("PNG 1024 × 1024").convert("RGB")
    assert same([np.asarray(large, int)], [expected.resize((1024, 1024), Image.Resampling.NEAREST)])
    animation: Any = saved("Animation GIF")
    assert (animation.size, animation.n_frames) == ((256, 256), 20)


def test_an_animation_is_named_after_its_image(studio: Studio):
    """Not after the one that is shown once it is made."""
    studio.generate("frog", number=2, seed=6)
    studio.generate("horse", number=1, seed=3)
    held: list[Route] = []
    studio.page.route("**/v1/tokens/animate*", lambda route: held.append(route))
    with studio.page.expect_download() as download:
        studio.button("Animation GIF").click()
        expect(studio.button("Animation GIF")).to_have_attribute("aria-busy", "true")
        studio.page.go_back()
        expect(studio.tiles).to_have_count(2)
        held[0].continue_()
    assert download.value.suggested_filename == "horse-3.gif"


def test_variations_keep_the_first_tokens_and_lead_back(studio: Studio, shipped: DetailFlowPipeline):
    studio.generate("cat", number=2, seed=8)
    original = studio.images
    studio.tiles.nth(1).click()
    studio.set(Seed=9)
    studio.vary(keep=8, name="dog")
    kept = [int(code, 36) for code in parse_qs(urlsplit(studio.page.url).fragment)["keep"][0].split(".")]
    varied = studio.images
    assert same(varied, shipped("dog", num_images_per_class=2, seed=9, prefix=kept))
    studio.scrub(8)
    held = studio.images
    studio.button("Back").click()
    expect(studio.button("Back")).to_be_hidden()
    assert all((a == b).all() for a, b in zip(studio.images, original, strict=True))
    studio.scrub(8)
    assert all(abs(image - studio.images[1]).max() <= 1 for image in held)
    studio.page.go_back()
    expect(studio.button("Back")).to_be_visible()
    assert all((a == b).all() for a, b in zip(studio.images, varied, strict=True))
    studio.trail.get_by_role("button", name="cat, seed 8").click()
    expect(studio.button("Back")).to_be_hidden()


@pytest.mark.parametrize("way", ["choose", "paste", "drop"])
def test_a_picture_of_ones_own(studio: Studio, shipped: DetailFlowPipeline, picture: Path, way: str):
    if way == "choose":
        with studio.page.expect_file_chooser() as chooser:
            studio.button("Your own picture …").click()
        chooser.value.set_files(picture)
    else:
        studio.page.evaluate(GIVE, [way, base64.b64encode(picture.read_bytes()).decode()])
    studio.finish()
    expected = shipped.reconstruct(Image.open(picture))
    shown = studio.page.get_by_role("region", name="Stages").get_by_role("button")
    names = [button.get_attribute("aria-label") for button in shown.all()]
    assert names == [f"{stage.num_tokens} of its tokens, {stage.psnr:.1f} dB" for stage in expected]
    shown.nth(3).click()
    expect(studio.slider).to_have_attribute("aria-valuetext", re.compile(rf"^8 of 48.* {expected[3].psnr:.1f} dB$"))
    original = pixels(studio.page.get_by_role("img", name="Your picture, as it was encoded"))
    assert same([original], [fit(shipped.tokenizer.schedule, Image.open(picture))])
    studio.set(Images=1, Seed=1)
    studio.vary(keep=8, name="frog")
    assert same(studio.images, shipped.vary(Image.open(picture), keep=8, label="frog", seed=1))


def test_a_link_shows_the_same_images(studio: Studio, new_page: Callable[..., Page], picture: Path):
    def opened() -> list[np.ndarray]:
        other = Studio(new_page(studio.page.url))
        other.finish()
        expect(other.slider).to_have_attribute("aria-valuetext", re.compile("^48"))
        return other.images

    def agree() -> bool:
        return all((a == b).all() for a, b in zip(studio.images, opened(), strict=True))

    studio.set(Guidance=2.5)
    studio.generate("deer", number=2)
    assert agree()
    studio.vary(keep=12, name="horse")
    assert agree()
    studio.page.locator("#file").set_input_files(picture)
    expect(studio.page).to_have_url(re.compile("picture="))
    expect(studio.slider).to_have_attribute("aria-valuetext", re.compile("^48"))
    assert agree()


def test_the_link_is_copied(new_page: Callable[..., Page], url: str):
    page = new_page(url, permissions=["clipboard-read", "clipboard-write"])
    Studio(page).generate("bird", number=1, seed=2)
    page.get_by_role("button", name="Copy link").click()
    expect(page.get_by_role("alert")).to_contain_text("The link is copied.")
    assert page.evaluate("navigator.clipboard.readText()") == page.url
    assert "class=bird" in page.url and "seed=2" in page.url


def test_a_large_transparent_picture_is_over_white(
    new_page: Callable[..., Page], serve: Callable[..., Any], tmp_path: Path
):
    """As a small one is, which is sent as it is."""
    Image.new("RGBA", (64, 48), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    page = new_page(serve(DETAILFLOW_MAX_PIXELS="1000").url)
    page.locator("#file").set_input_files(tmp_path / "clear.png")
    Studio(page).finish()
    original = pixels(page.get_by_role("img", name="Your picture, as it was encoded"))
    assert original.min() >= 254
