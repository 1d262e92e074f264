"""A server of its own process, and the browser in front of it."""

import os
import shutil
import signal
import sys
import time
from pathlib import Path

import httpx
from playwright.sync_api import Browser, Playwright

sys.path.append(str(Path(__file__).parents[1]))  # for `served`

from served import Process

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


def launch(playwright: Playwright) -> Browser:
    """Start the browser that CHROMIUM names, one that is installed, or Playwright's own."""
    path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    return playwright.chromium.launch(executable_path=path)


class Server(Process):
    """A server that is ready once it is started, and can be killed."""

    errors = None  # to the terminal

    def start(self) -> None:
        """Start it, and wait until it is ready."""
        super().start()
        while not httpx.get(f"{self.url}/readyz").is_success:
            time.sleep(0.05)

    def kill(self, sig: int = signal.SIGKILL) -> None:
        """End it."""
        self.process.send_signal(sig)
        self.process.communicate(timeout=30)
