"""Servers: a process of the command, as a user starts it, and the same app in this process with other limits."""

import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from detailflow import DetailFlowPipeline
from detailflow.serving import server as serving
from detailflow.serving.app import create_app
from detailflow.serving.options import ServeConfig

sys.path.append(str(Path(__file__).parent))  # for `answers`, which the tests share
sys.path.append(str(Path(__file__).parents[1]))  # for `served`

from answers import KEY

from served import Process


@contextmanager
def _running(*options: str, **environment: str) -> Iterator[Process]:
    server = Process(*options, **environment)
    try:
        yield server
    finally:
        with suppress(ProcessLookupError):
            server.process.kill()
        server.process.communicate()


@pytest.fixture(scope="session")
def running() -> Callable[..., Any]:
    """`with running("--model", …) as process`."""
    return _running


@pytest.fixture(scope="session")
def server(model: Path) -> Iterator[Process]:
    """A server of the tests' model that asks for a key."""
    with _running("--model", str(model), "--model-name", "tests/tiny", DETAILFLOW_API_KEY=KEY) as process:
        yield process
        status, errors = process.end()
        assert (status, errors) == (0, ""), "no request of any test may leave a traceback"


@pytest.fixture(scope="session")
def client(server: Process) -> Iterator[openai.OpenAI]:
    """OpenAI's client of that server."""
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


@pytest.fixture(scope="session")
def http(server: Process) -> Iterator[httpx.Client]:
    """A plain client of that server."""
    with httpx.Client(base_url=server.url, headers={"Authorization": f"Bearer {KEY}"}, timeout=30) as client:
        yield client


class Here:
    """The service in a thread of this process."""

    def __init__(self, pipeline: DetailFlowPipeline, config: ServeConfig) -> None:
        self.listener: socket.socket = serving.listen("127.0.0.1", 0)
        self.url = serving.url(self.listener)
        self.app = create_app(pipeline, config)
        self.service = self.app.service
        self.server = serving.Server(self.app)
        self.thread = threading.Thread(target=self.server.run, args=([self.listener],))
        self.thread.start()

    def stop(self) -> None:
        """End it in order."""
        self.server.should_exit = True
        self.thread.join()
        self.listener.close()


@pytest.fixture
def here(shipped: DetailFlowPipeline) -> Iterator[Callable[..., Here]]:
    """Start a server of the shipped model with these limits."""
    with ExitStack() as stack:

        def start(**limits: Any) -> Here:
            result = Here(shipped, ServeConfig(**limits))
            stack.callback(result.stop)
            return result

        yield start
