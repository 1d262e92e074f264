"""A server of its own process, and the browser in front of it."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time

import httpx
from playwright.sync_api import Browser, Playwright

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


def launch(playwright: Playwright) -> Browser:
    """Start the browser that CHROMIUM names, one that is installed, or Playwright's own."""
    path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    return playwright.chromium.launch(executable_path=path)


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
