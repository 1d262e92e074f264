"""What cannot be, a server that goes away, is busy or wants a key: the page says so and goes on."""

import json
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, Route, expect
from studio import Studio, same

from detailflow import DetailFlowPipeline

KEY = "a-key-of-the-tests"
FORBID = """for (const name of ["localStorage", "sessionStorage"])
  Object.defineProperty(window, name, { get() { throw new DOMException("forbidden", "SecurityError"); } });"""

FILL = """Storage.prototype.setItem = () => { throw new DOMException("full", "QuotaExceededError"); };"""


def test_values_that_cannot_be_are_said_beside_their_fields(studio: Studio):
    guidance = studio.page.get_by_role("spinbutton", name="Guidance")
    for value, said in (("0.5", "Guidance must be from 1 to 20."), ("", "Guidance must be from 1 to 20.")):
        guidance.fill(value)
        studio.button("Generate").click()
        expect(guidance).to_have_attribute("aria-invalid", "true")
        expect(guidance).to_have_accessible_description(re.compile(re.escape(said)))
        expect(guidance).to_be_focused()
    studio.set(Guidance=4, Images=99)
    studio.button("Generate").click()
    expect(studio.page.get_by_text("Images must be a whole number from 1 to 16.")).to_be_visible()
    studio.set(Images=1)
    studio.classes.fill("unicorn")
    studio.button("Generate").click()
    expect(studio.page.get_by_text("No class is called “unicorn”.")).to_be_visible()
    expect(studio.tiles).to_have_count(0)
    studio.generate("ship", number=1)


@pytest.mark.parametrize(
    "own",
    [{"guidance_scale": 25, "temperature": 3, "top_k": 100, "top_p": 0.005}, {"guidance_scale": 0.5, "top_p": None}],
)
def test_a_model_whose_own_sampling_is_beyond_the_usual(
    own: dict[str, Any], new_page: Callable[..., Page], serve: Callable[..., Any], model: Path, tmp_path: Path
):
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    for path in folder.rglob("config.json"):
        config = json.loads(path.read_text(encoding="utf-8"))
        if "guidance_scale" in config:
            path.write_text(json.dumps(config | own), encoding="utf-8")
    page = new_page(serve("--model", str(folder)).url)
    guidance = page.get_by_role("spinbutton", name="Guidance")
    expect(guidance).to_have_value(str(own["guidance_scale"]))
    Studio(page).generate("cat", number=1, seed=1)
    guidance.fill("26")
    Studio(page).button("Generate").click()
    least, most = min(1, own["guidance_scale"]), max(20, own["guidance_scale"])
    expect(page.get_by_text(f"Guidance must be from {least} to {most}.")).to_be_visible()


def test_what_the_server_refuses_is_said_beside_its_field(studio: Studio):
    studio.generate("cat", number=1)
    studio.page.get_by_text("More settings").click()
    studio.page.get_by_label("Tokens", exact=True).select_option("8")
    studio.button("Rewrite the rest").click()
    expect(studio.page.get_by_text("Tokens must be at least keep, which is 12, not 8.")).to_be_visible()
    expect(studio.trail).to_be_hidden()  # nothing came of it
    expect(studio.tiles).to_have_count(1)


def test_a_file_that_is_no_picture(studio: Studio, tmp_path: Path):
    text = tmp_path / "notes.txt"
    text.write_text("no picture")
    studio.page.locator("#file").set_input_files(text)
    expect(studio.banner).to_contain_text("“notes.txt” is not a picture")
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    studio.page.locator("#file").set_input_files(broken)
    expect(studio.banner).to_contain_text("its contents are in no raster format that is read")
    studio.button("Close").click()
    expect(studio.banner).to_be_hidden()


@pytest.mark.parametrize(
    ("fragment", "said"),
    [
        ("#class=unicorn&seed=1", "The link’s class “unicorn” is none of this model’s."),
        ("#class=cat&seed=1&keep=1.2.zzzzz", "The link’s tokens are incomplete, or another model’s"),
        ("#class=cat&seed=one", "Seed cannot be one."),
        ("#class=cat&seed=1&model=0123456789ab", "This link was made with another model"),
        ("#class=cat&seed=1&gpt=0123456789ab", "This link was made with another model"),
    ],
)
def test_links_that_cannot_be(new_page: Callable[..., Page], url: str, fragment: str, said: str):
    expect(new_page(f"{url}/{fragment}").get_by_role("alert")).to_contain_text(said)


def test_a_server_that_restarts(
    new_page: Callable[..., Page], serve: Callable[..., Any], shipped: DetailFlowPipeline
) -> None:
    server = serve("--max-batch", "1")  # one image after the other
    studio = Studio(new_page(server.url))
    studio.generate("cat", number=1, seed=1)
    before = studio.images
    studio.set(Images=16, Seed=2)
    studio.button("Generate").click()
    expect(studio.tiles).to_have_count(16)
    expect(studio.page.locator("button.tile canvas.picture:not(.blank)")).not_to_have_count(0)
    server.kill()
    expect(studio.banner).to_contain_text("The server does not answer.")
    studio.trail.get_by_role("button", name="cat, seed 1").click()
    expect(studio.tiles).to_have_count(1)
    assert all((a == b).all() for a, b in zip(studio.images, before, strict=True))
    studio.page.go_back()
    server.start()
    expect(studio.banner).to_contain_text("The server is back.")
    studio.finish()
    assert same(studio.images, shipped("cat", num_images_per_class=16, seed=2))


def test_stopping_while_the_server_is_away(new_page: Callable[..., Page], serve: Callable[..., Any]):
    server = serve()
    studio = Studio(new_page(server.url))
    server.kill()
    studio.button("Generate").click()
    expect(studio.banner).to_contain_text("The server does not answer.")
    studio.button("Stop").click()
    expect(studio.page.get_by_role("heading", name="Watch an image take shape")).to_be_visible()
    server.start()
    expect(studio.banner).to_contain_text("The server is back.")
    expect(studio.banner).to_be_hidden()
    studio.generate("ship", number=1)


def test_a_server_that_hangs(new_page: Callable[..., Page], serve: Callable[..., Any], shipped: DetailFlowPipeline):
    """It keeps its connections and says nothing: as when a machine sleeps."""
    sooner = """const [every, within] = [setInterval, AbortSignal.timeout];
        window.setInterval = (work, milliseconds) => every(work, milliseconds / 30);
        AbortSignal.timeout = (milliseconds) => within(milliseconds / 30);"""
    server = serve("--max-batch", "1")
    studio = Studio(new_page(server.url, "#generate:enabled", sooner))
    studio.classes.fill("cat")
    studio.set(Images=16, Seed=2)
    studio.button("Generate").click()
    expect(studio.page.locator("button.tile canvas.picture:not(.blank)")).not_to_have_count(0)
    server.process.send_signal(signal.SIGSTOP)
    expect(studio.banner).to_contain_text("The server does not answer.")
    server.process.send_signal(signal.SIGCONT)
    expect(studio.banner).to_contain_text("The server is back.")
    studio.finish()
    assert same(studio.images, shipped("cat", num_images_per_class=16, seed=2))


def test_a_server_that_returns_with_another_model(
    new_page: Callable[..., Page], serve: Callable[..., Any], model: Path
) -> None:
    server = serve()
    studio = Studio(new_page(server.url))
    server.kill()
    studio.button("Generate").click()
    expect(studio.banner).to_contain_text("The server does not answer.")
    server.options = ("--model", str(model), "--model-name", "another")
    server.start()
    expect(studio.page.get_by_text("another", exact=True)).to_be_visible()
    expect(studio.banner).to_contain_text("The server is back, with another model: generate again.")
    studio.set(Seed=1)
    studio.button("Generate").click()
    studio.finish()
    assert studio.reading.startswith("16 of 16 tokens")


@pytest.mark.parametrize("work", ["Generate", "Rewrite the rest", "Animation"])
def test_another_model_behind_an_outage_that_nobody_saw(
    new_page: Callable[..., Page], serve: Callable[..., Any], model: Path, work: str
) -> None:
    """Old tokens would be given to another tokenizer, and links made that others cannot open."""
    server = serve()
    studio = Studio(new_page(server.url))
    studio.generate("cat", number=1, seed=1)
    server.kill()
    server.options = ("--model", str(model), "--model-name", "another")
    server.start()
    studio.page.get_by_role("button", name=re.compile(work)).click()
    expect(studio.banner).to_contain_text("The server is back, with another model: generate again.")
    expect(studio.page.get_by_text("another", exact=True)).to_be_visible()
    studio.generate("cat", number=1, seed=1)
    assert studio.reading.startswith("16 of 16 tokens")


def test_a_slow_server_is_no_other_model(browser: Browser, url: str):
    """Two looks at it at once made two of one, and what one had drawn the other would not animate."""
    page = browser.new_page()

    def late(route: Route) -> None:
        time.sleep(0.6)
        route.continue_()

    page.route("**/v1/classes", late)
    page.goto(f"{url}/#class=dog&seed=3")
    page.evaluate("setTimeout(() => document.dispatchEvent(new Event('visibilitychange', { bubbles: true })), 100)")
    studio = Studio(page)
    studio.finish()
    with page.expect_download(timeout=30_000):
        page.get_by_role("button", name="Animation").click()
    assert not studio.banner.is_visible()
    page.close()


def test_another_model_is_noticed_without_any_work(
    new_page: Callable[..., Page], serve: Callable[..., Any], model: Path
) -> None:
    sooner = "const every = setInterval; window.setInterval = (work, wait) => every(work, wait / 30);"
    server = serve()
    studio = Studio(new_page(server.url, "#generate:enabled", sooner))
    server.kill()
    server.options = ("--model", str(model), "--model-name", "another")
    server.start()
    expect(studio.banner).to_contain_text("The server is back, with another model.")


def test_a_picture_before_the_server_has_answered(browser: Browser, url: str, tmp_path: Path):
    page = browser.new_page()
    page.route("**/v1/models", lambda route: None)  # no answer
    page.goto(url)
    picture = tmp_path / "a.png"
    Image.new("RGB", (40, 30), "teal").save(picture)
    page.locator("#file").set_input_files(picture)
    expect(page.get_by_role("alert")).to_contain_text("The server has not answered yet: try again in a moment.")
    page.close()


def test_a_picture_becomes_as_small_as_the_limit(
    new_page: Callable[..., Page], serve: Callable[..., Any], tmp_path: Path
):
    """Its pixels alone do not tell how large a file they make."""
    picture = tmp_path / "noise.jpg"
    Image.effect_noise((1500, 1500), 200).save(picture, quality=100)
    assert picture.stat().st_size > 2**20
    studio = Studio(new_page(serve("--max-upload", "1").url))
    studio.page.locator("#file").set_input_files(picture)
    studio.finish()
    assert studio.reading.startswith("48 of 48 tokens")


def test_a_server_that_is_busy(new_page: Callable[..., Page], serve: Callable[..., Any]):
    server = serve("--max-queue", "16", "--max-batch", "1")
    studio = Studio(new_page(server.url))
    studio.set(Images=16)
    other = threading.Thread(
        target=httpx.post,
        args=(f"{server.url}/v1/images/generations",),
        kwargs={"json": {"prompt": "cat", "n": 16}, "timeout": 120},
    )
    other.start()
    while not re.search(r"^detailflow_queue_images 1[0-9]", httpx.get(f"{server.url}/metrics").text, re.MULTILINE):
        assert other.is_alive(), "the queue has never been full"
    studio.button("Generate").click()
    expect(studio.banner).to_contain_text("Many people are making images.")
    studio.button("Stop").click()
    expect(studio.banner).to_be_hidden()
    studio.button("Generate").click()
    other.join()
    studio.finish()
    expect(studio.banner).to_be_hidden()


def test_a_key_that_no_request_can_carry_is_not_taken(new_page: Callable[..., Page], serve: Callable[..., Any]):
    page = new_page(serve(DETAILFLOW_API_KEY=KEY).url, wait="dialog[open]")
    dialog = page.get_by_role("dialog", name="This server wants a key")
    field = dialog.get_by_label("API key")
    for key in ("schlüssel", "ключ", "key…"):
        field.fill(key)
        dialog.get_by_role("button", name="Use it").click()
        assert field.evaluate(
            "(field) => field.matches(':invalid') && field.title.startsWith('A key has only letters')"
        )
        expect(dialog).to_be_visible()
    field.fill(KEY)
    dialog.get_by_role("button", name="Use it").click()
    page.wait_for_selector("html[data-ready]")
    Studio(page).generate("dog", number=1)


@pytest.mark.parametrize("script", [FORBID, FILL], ids=["forbidden", "full"])
@pytest.mark.parametrize("key", [None, KEY])
def test_a_browser_that_remembers_nothing(
    new_page: Callable[..., Page], serve: Callable[..., Any], key: str | None, script: str
):
    """As with cookies forbidden, when reading its storage is an error, or with a storage that is full."""
    server = serve(**{"DETAILFLOW_API_KEY": key} if key else {})
    page = new_page(server.url, wait="dialog[open]" if key else "html[data-ready]", script=script)
    if key:
        page.get_by_label("API key").fill(key)
        page.get_by_role("button", name="Use it").click()
        page.wait_for_selector("html[data-ready]")
    studio = Studio(page)
    studio.button("Theme: auto").click()
    expect(studio.button("Theme: dark")).to_be_visible()
    studio.generate("dog", number=1)


def test_a_page_of_another_site_gets_nothing_done(browser: Browser, url: str):
    """Nor can it read why; the page itself works, as all other tests show."""
    other = url.replace("127.0.0.1", "localhost")
    ask = "url => fetch(url, { method: 'POST', mode: 'no-cors', body: new FormData() }).then(() => {})"
    with browser.new_context(bypass_csp=True) as context:
        page = context.new_page()
        page.goto(f"{other}/docs")
        with page.expect_response("**/variations") as answer:
            page.evaluate(ask, f"{url}/v1/images/variations")
        assert answer.value.status == 403
        with page.expect_response("**/variations") as answer:
            page.evaluate(ask, f"{other}/v1/images/variations")
        assert answer.value.status == 400


def test_a_key_that_the_server_wants(new_page: Callable[..., Page], serve: Callable[..., Any]):
    server = serve(DETAILFLOW_API_KEY=KEY)
    page = new_page(server.url, wait="dialog[open]")
    dialog = page.get_by_role("dialog", name="This server wants a key")
    for key in ("wrong", KEY):
        dialog.get_by_label("API key").fill(key)
        dialog.get_by_role("button", name="Use it").click()
        if key != KEY:
            expect(dialog).to_contain_text("That was not the right one.")
    expect(dialog).to_be_hidden()
    page.wait_for_selector("html[data-ready]")  # the model is known
    studio = Studio(page)
    studio.generate("dog", number=1)
    assert KEY not in page.url
    page.reload()
    studio.finish()
