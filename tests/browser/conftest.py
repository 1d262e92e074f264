"""A real Chromium in front of a real server: `make test-browser`."""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Error, Page, expect, sync_playwright

sys.path.append(str(Path(__file__).parent))  # for `server` and `studio`, which the tests share

from server import Server, launch
from studio import Studio

NEEDED = "make test-browser needs Chromium: apt-get install chromium, or set CHROMIUM to the path of one"
expect.set_options(timeout=30_000)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything here needs a browser."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("browser")


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Chromium: the one that CHROMIUM names, or that is installed."""
    with sync_playwright() as playwright:
        try:
            browser = launch(playwright)
        except Error as error:
            pytest.exit(f"{NEEDED} ({error.message.splitlines()[0]})", returncode=2)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def serve() -> Iterator[Callable[..., Server]]:
    """Start a server with these options."""
    with ExitStack() as stack:

        def start(*options: str, **environment: str) -> Server:
            server = Server(*options, **environment)
            stack.callback(lambda: server.process.poll() is None and server.kill(signal.SIGTERM))
            return server

        yield start


@pytest.fixture(scope="session")
def url(serve: Callable[..., Server]) -> str:
    """A server of the shipped model."""
    return serve().url


@pytest.fixture
def new_page(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Open a page for a new visitor; in the end, none has logged an error or asked another host."""
    contexts: list[BrowserContext] = []
    problems: list[str] = []

    def logged(message: ConsoleMessage) -> None:
        refused = message.text.startswith("Failed to load resource")  # the browser's own line for each status above 399
        if message.type in ("error", "warning") and not refused:
            problems.append(message.text)

    def create(url: str, wait: str = "html[data-ready]", script: str = "", **options: Any) -> Page:
        context = browser.new_context(
            **{"viewport": {"width": 1280, "height": 800}, "reduced_motion": "reduce"} | options
        )
        contexts.append(context)
        if script:  # before all others
            context.add_init_script(script)
        page = context.new_page()
        page.on("console", logged)
        page.on("pageerror", lambda error: problems.append(str(error)))
        host = urlsplit(url).netloc
        page.on("request", lambda request: _local(request.url, host) or problems.append(f"asked {request.url}"))
        page.goto(url)
        page.wait_for_selector(wait)
        return page

    yield create
    for context in contexts:
        context.close()
    assert problems == []


def _local(url: str, host: str) -> bool:
    parts = urlsplit(url)
    return parts.scheme in ("blob", "data") or parts.netloc == host


@pytest.fixture
def studio(new_page: Callable[..., Page], url: str) -> Studio:
    """The studio of the shipped model."""
    return Studio(new_page(url))
