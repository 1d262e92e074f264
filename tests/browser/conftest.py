"""A real Chromium in front of a real server: `make test-browser`."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Error, Page, expect, sync_playwright

from detailflow import DetailFlowPipeline

sys.path.append(str(Path(__file__).parent))  # for `studio`, which the tests share

from studio import Studio

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
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
    path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    with sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=path)
        except Error as error:
            pytest.exit(f"{NEEDED} ({error.message.splitlines()[0]})", returncode=2)
        yield browser
        browser.close()


class Server:
    """`detailflow serve` on one port, which can be killed and started again."""

    def __init__(self, *options: str, **environment: str) -> None:
        self.options, self.environment, self.port = options, environment, 0
        self.start()

    def start(self) -> None:
        """Start it, on its old port if it had one."""
        command = [sys.executable, "-m", "detailflow", "serve", "--device", "cpu", "--port", str(self.port)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", **self.environment}
        self.process = subprocess.Popen([*command, *self.options], stdout=subprocess.PIPE, text=True, env=environment)
        assert self.process.stdout is not None
        found = re.search(r"http://\S+:(\d+)", self.process.stdout.readline())
        assert found, "the server does not start"
        self.url, self.port = found[0], int(found[1])
        while not httpx.get(f"{self.url}/readyz").is_success:
            time.sleep(0.05)

    def kill(self, sig: int = signal.SIGKILL) -> None:
        """End it."""
        self.process.send_signal(sig)
        self.process.communicate(timeout=30)


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


@pytest.fixture(scope="session")
def shipped() -> DetailFlowPipeline:
    """The shipped model in this process, to compare with."""
    return DetailFlowPipeline.from_pretrained(device="cpu")


@pytest.fixture
def new_page(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Open a page for a new visitor; in the end, none has logged an error or asked another host."""
    contexts: list[BrowserContext] = []
    problems: list[str] = []

    def logged(message: ConsoleMessage) -> None:
        refused = message.text.startswith("Failed to load resource")  # the browser's own line for each status above 399
        if message.type in ("error", "warning") and not refused:
            problems.append(message.text)

    def create(url: str, wait: str = "html[data-ready]", **options: Any) -> Page:
        context = browser.new_context(
            **{"viewport": {"width": 1280, "height": 800}, "reduced_motion": "reduce"} | options
        )
        contexts.append(context)
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
