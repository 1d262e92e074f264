"""Limits under load: the queue, time, clients that leave or do not read, and an end in order."""

import asyncio
import gc
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import httpx
import openai
import pytest
from answers import photograph, png
from PIL import Image

from detailflow import DetailFlowPipeline
from detailflow.data.image_files import load_rgb
from detailflow.errors import DetailFlowError
from detailflow.serving import uploads, views
from detailflow.serving.app import create_app
from detailflow.serving.options import ServeConfig
from detailflow.serving.server import is_loopback, listen

LONG = {"prompt": "cat", "n": 16, "seed": 1}
MANY = 3000


def ask(url: str, body: dict[str, Any] = LONG) -> httpx.Response:
    return httpx.post(f"{url}/v1/images/generations", json=body, timeout=60)


def openai_client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0)


def value(here: Any, name: str, **labels: str) -> float:
    return here.service.metrics.registry.get_sample_value(name, labels) or 0.0


def hold(server: Any, monkeypatch: pytest.MonkeyPatch, shown: int = 0) -> threading.Event:
    """Stop the model after it has shown so many images, partial ones included, until the event is set."""
    go_on, run = threading.Event(), server.service.batcher._run

    def held(*given: Any) -> Iterator[Any]:
        left = shown
        for results in run(*given):
            assert left > 0 or go_on.wait(60)
            left -= len(results)
            yield results

    monkeypatch.setattr(server.service.batcher, "_run", held)
    return go_on


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, "did not come true in 30 s"
        time.sleep(0.01)


def test_a_full_queue_health_and_a_client_that_leaves(here: Callable[..., Any], monkeypatch: pytest.MonkeyPatch):
    server = here(max_batch=1, max_queue=16)
    url, go_on = server.url, hold(server, monkeypatch, shown=1)
    with httpx.stream(
        "POST", f"{url}/v1/images/generations", json=LONG | {"stream": True, "partial_images": 1}
    ) as stream:
        lines = stream.iter_lines()
        assert next(lines) == "event: image_generation.partial_image"
        refused = ask(url)  # while the first image is computed, fifteen wait
        assert refused.status_code == 429 and 1 <= int(refused.headers["Retry-After"]) <= 60
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        with openai_client(url) as client, pytest.raises(openai.RateLimitError):
            client.images.generate(prompt="cat", n=16)
        for path in ("/healthz", "/readyz", "/metrics"):
            assert httpx.get(f"{url}{path}").status_code == 200
        assert value(server, "detailflow_queue_images") == 15, "health answered while the model computed"
    until(lambda: value(server, "detailflow_images_cancelled_total") == 16)
    assert value(server, "detailflow_queue_images") == 0
    go_on.set()
    assert ask(url, LONG | {"n": 1, "num_tokens": 1}).status_code == 200
    until(lambda: value(server, "detailflow_images_total") == 1)  # that one: none of those that were given up


def test_a_client_that_leaves_without_a_stream(here: Callable[..., Any], monkeypatch: pytest.MonkeyPatch):
    server = here(max_batch=1)
    go_on, body = hold(server, monkeypatch), json.dumps(LONG)
    head = f"Host: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    with socket.create_connection(server.listener.getsockname()) as client:
        client.sendall(f"POST /v1/images/generations HTTP/1.1\r\n{head}\r\n\r\n{body}".encode())
        until(lambda: value(server, "detailflow_queue_images") == 15)  # one is computed
    until(lambda: value(server, "detailflow_images_cancelled_total") == 16)
    assert value(server, "detailflow_queue_images") == 0
    until(lambda: value(server, "detailflow_requests_in_progress") == 0)
    assert value(server, "detailflow_requests_total", method="POST", path="/v1/images/generations", status="499") == 1
    go_on.set()


@pytest.mark.parametrize("route", ["encode", "reconstruct", "decode", "animate"])
def test_a_client_that_leaves_while_its_image_waits(
    here: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, route: str
):
    server = here()
    go_on = threading.Event()
    monkeypatch.setattr(server.service.batcher, "_run", lambda key, tasks: iter([[]] if go_on.wait(60) else []))
    sent: dict[str, Any] = {"json": {"tokens": [1, 2, 3, 4]}}
    if route in ("encode", "reconstruct"):
        sent = {"files": {"image": png(photograph())}}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/tokens/{route}", timeout=0.5, **sent)
    labels = {"method": "POST", "path": f"/v1/tokens/{route}", "status": "499"}
    until(lambda: value(server, "detailflow_requests_total", **labels) == 1)
    go_on.set()


def test_time_is_limited(here: Callable[..., Any], monkeypatch: pytest.MonkeyPatch):
    server = here(max_batch=1, timeout=0.3)
    go_on = hold(server, monkeypatch)
    late = ask(server.url)
    assert (late.status_code, late.json()["error"]["code"]) == (503, "timeout")
    body = LONG | {"stream": True}
    with httpx.stream("POST", f"{server.url}/v1/images/generations", json=body, timeout=30) as stream:
        text = stream.read().decode()
    name, data = text.strip().split("\n\n")[-1].split("\n")
    assert name == "event: error" and json.loads(data.removeprefix("data: "))["error"]["code"] == "timeout"
    with openai_client(server.url) as client, pytest.raises(openai.APIError, match="longer than the server allows"):
        list(client.images.generate(prompt="cat", n=16, stream=True))
    until(lambda: value(server, "detailflow_queue_images") == 0)
    go_on.set()


def test_who_does_not_read_or_does_not_write_is_cut_off(here: Callable[..., Any]):
    server = here(timeout=1.0)
    address = server.listener.getsockname()
    with socket.create_connection(address) as slow_writer, socket.socket() as slow_reader:
        slow_writer.sendall(b"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{")
        slow_reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow_reader.connect(address)
        slow_reader.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * MANY)  # more answers than buffers hold
        slow_writer.settimeout(20)
        assert b" 503 " in slow_writer.recv(1000)
        until(lambda: value(server, "detailflow_requests_in_progress") == 0)
        until(lambda: len(server.server.server_state.connections) <= 1)  # the one whose answer said why
        assert 0 < value(server, "detailflow_request_seconds_count", path="/openapi.json") < MANY


def test_a_second_interrupt_waits_for_nothing(running: Callable[..., Any]):
    """It was told in forty lines of an error in uvicorn."""
    many = [LONG | {"stream": True, "seed": seed} for seed in range(12)]
    with running("--max-batch", "1") as server, ExitStack() as stack:
        client = stack.enter_context(httpx.Client(base_url=server.url, timeout=60))
        for body in many:
            answer = stack.enter_context(client.stream("POST", "/v1/images/generations", json=body))
            next(answer.iter_lines())
        for _ in range(2):
            server.process.send_signal(signal.SIGINT)
            time.sleep(0.05)
        _, errors = server.process.communicate(timeout=30)
        assert errors.splitlines() == ["detailflow: interrupted"]
        assert server.process.returncode in (130, -signal.SIGINT)  # the latter if the second came at the very end


def test_what_signals_mean(here: Callable[..., Any], capsys: pytest.CaptureFixture[str]):
    server = here().server
    assert not server.interrupted
    server.handle_exit(signal.SIGINT, None)
    assert server.interrupted and server.should_exit and not server.force_exit
    server.handle_exit(signal.SIGINT, None)
    assert server.force_exit
    log = logging.getLogger("uvicorn.error")
    log.error("Traceback (most recent call last):\n …\nasyncio.exceptions.CancelledError: Task cancelled\n")
    log.error("another")
    assert capsys.readouterr().err == "ERROR:    another\n"


ADDRESSES = {"::ffff:127.0.0.1": True, "127.0.0.1": True, "::1": True, "::": False}


@pytest.mark.parametrize(("host", "known"), ADDRESSES.items())
def test_addresses_of_this_machine_alone(host: str, known: bool):
    try:
        with listen(host, 0) as listener:
            assert is_loopback(listener) == known
    except DetailFlowError as error:
        pytest.skip(f"there is no such address here: {error}")


def test_refusals_are_counted_by_their_route(here: Callable[..., Any]):
    server = here(api_key="secret")
    for path in ("/v1/tokens/encode", "/v1/tokens/nothing"):
        assert httpx.post(f"{server.url}{path}").status_code == 401
    path = "/v1/tokens/encode"
    assert value(server, "detailflow_requests_total", method="POST", path=path, status="401") == 1
    assert value(server, "detailflow_requests_total", method="POST", path="other", status="401") == 1


def test_sigterm_finishes_what_runs_and_refuses_what_comes(running: Callable[..., Any]):
    with running("--max-batch", "1") as server, httpx.Client(base_url=server.url, timeout=60) as client:
        answers: dict[str, httpx.Response] = {}

        def keep(name: str, n: int) -> None:
            answers[name] = ask(server.url, LONG | {"n": n})

        first = threading.Thread(target=keep, args=("running", 6))
        first.start()
        until(lambda: "detailflow_images_total 0.0" not in client.get("/metrics").text)
        second = threading.Thread(target=keep, args=("waiting", 1))
        second.start()
        until(lambda: "detailflow_requests_in_progress 3.0" in client.get("/metrics").text)
        server.process.terminate()
        first.join()
        second.join()
        _, errors = server.process.communicate(timeout=20)
        assert (server.process.returncode, errors) == (0, "")
        assert answers["running"].status_code == 200 and len(answers["running"].json()["data"]) == 6
        assert answers["waiting"].status_code == 503 and answers["waiting"].headers["Retry-After"]
        with pytest.raises(httpx.ConnectError):
            ask(server.url)


def test_at_the_end_a_body_that_does_not_come_is_refused(here: Callable[..., Any], capsys: pytest.CaptureFixture[str]):
    server = here(grace=1.0)
    with socket.create_connection(server.listener.getsockname()) as slow:
        slow.sendall(
            b"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: 99\r\n\r\n{"
        )
        until(lambda: value(server, "detailflow_requests_in_progress") == 1)
        server.stop()
        slow.settimeout(20)
        head, _, body = b"".join(iter(lambda: slow.recv(1000), b"")).partition(b"\r\n\r\n")
    assert b" 503 " in head and json.loads(body)["error"]["code"] == "stopping"
    assert "Traceback" not in capsys.readouterr().err


def test_uploads_that_take_long_are_two_at_a_time_and_keep_nobody_waiting(
    here: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
):
    """Also after their clients have left: a thread cannot be stopped."""
    go_on, begun = threading.Event(), []

    def slow(*given: Any) -> Any:
        begun.append(given)
        assert go_on.wait(60)
        return load_rgb(*given)

    monkeypatch.setattr(uploads, "load_rgb", slow)
    server = here()
    for _ in range(4):
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{server.url}/v1/tokens/encode", files={"image": png(photograph())}, timeout=0.3)
    until(lambda: value(server, "detailflow_requests_in_progress") == 0)
    assert len(begun) == uploads.AT_ONCE
    assert ask(server.url, LONG | {"n": 1}).status_code == 200
    go_on.set()
    until(lambda: httpx.post(f"{server.url}/v1/tokens/encode", files={"image": png(photograph())}).is_success)
    assert len(begun) == uploads.AT_ONCE + 1


def test_animations_that_take_long_are_two_at_a_time_and_keep_nobody_waiting(
    here: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
):
    go_on, begun, make = threading.Event(), [], views._animation

    def slow(*given: Any) -> bytes:
        begun.append(given)
        assert go_on.wait(60)
        return make(*given)

    def animate(_: int) -> int:
        return httpx.post(f"{server.url}/v1/tokens/animate", json={"tokens": [1, 2, 3, 4]}, timeout=60).status_code

    monkeypatch.setattr(views, "_animation", slow)
    server, clients = here(), 40  # more than the threads that the event loop has for other answers
    with ThreadPoolExecutor(clients) as pool:
        answers = pool.map(animate, range(clients))
        try:
            until(lambda: value(server, "detailflow_requests_in_progress") == clients)
            until(lambda: len(begun) == views.AT_ONCE)
            image = httpx.post(f"{server.url}/v1/images/generations", json=LONG | {"n": 1}, timeout=20)
            codes = httpx.post(f"{server.url}/v1/tokens/encode", files={"image": png(photograph())}, timeout=20)
            assert (image.status_code, codes.status_code, len(begun)) == (200, 200, views.AT_ONCE)
        finally:
            go_on.set()
        assert list(answers) == [200] * clients


def test_refused_uploads_leave_no_image_in_memory(here: Callable[..., Any]):
    """Nor do they wait for the garbage collector, which does not know how large they are."""
    server, content = here(), png(photograph())

    def images() -> set[int]:
        return {id(one) for one in gc.get_objects() if issubclass(type(one), Image.Image)}

    def refuse() -> None:
        refused = httpx.post(f"{server.url}/v1/tokens/encode", files={"image": content[: len(content) // 2]})
        assert refused.json()["error"]["code"] == "invalid_image"

    refuse()  # loads Pillow's plugins, one of which keeps an image
    gc.collect()
    gc.disable()
    try:
        before = images()
        for _ in range(5):
            refuse()
        until(lambda: images() <= before)
    finally:
        gc.enable()


def test_uploads_go_on_after_threads_could_not_start(here: Callable[..., Any], monkeypatch: pytest.MonkeyPatch):
    def refuse(thread: threading.Thread) -> None:
        if thread.name == "upload":
            raise RuntimeError("can't start new thread")
        start(thread)

    server, start = here(), threading.Thread.start

    def encode() -> httpx.Response:
        return httpx.post(f"{server.url}/v1/tokens/encode", files={"image": png(photograph())}, timeout=10)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        assert [encode().status_code for _ in range(uploads.AT_ONCE)] == [500] * uploads.AT_ONCE
    assert encode().status_code == 200


_STUCK = """
import sys, threading
from detailflow.cli.main import main
from detailflow.serving import uploads
uploads.load_rgb = lambda *given: threading.Event().wait()
sys.exit(main(["serve", "--device", "cpu", "--port", "0"]))
"""


def test_an_upload_that_takes_long_does_not_hold_the_end_up():
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", _STUCK], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    try:
        assert process.stdout is not None
        url = process.stdout.readline().split()[5].rstrip(",")
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{url}/v1/tokens/encode", files={"image": png(photograph())}, timeout=1)
        process.terminate()
        _, errors = process.communicate(timeout=30)
        assert (process.returncode, errors) == (0, "")
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("options", [[], ["--access-log"]])
def test_no_request_can_fill_the_log(running: Callable[..., Any], options: list[str]):
    requests = (
        b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n",
        b"no request\r\n\r\n",
    )
    with running(*options) as server:
        for request in requests:
            with socket.create_connection(("127.0.0.1", server.port)) as client:
                client.sendall(request)
                client.settimeout(20)
                assert client.recv(1000).startswith(b"HTTP/1.1 ")
        status, errors = server.end()
    assert status == 0 and "WARNING" not in errors and "Invalid" not in errors
    assert options or errors == ""


def test_below_another_path_the_key_is_needed_as_well(shipped: DetailFlowPipeline):
    """As behind a proxy that leaves a prefix in front; and methods that somebody makes up are counted as one."""
    app = create_app(shipped, ServeConfig(api_key="secret"))

    async def statuses() -> list[int]:
        transport = httpx.ASGITransport(app, root_path="/api")
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            paths = ("/api/v1/models", "/api/metrics", "/api/v1/images/generations", "/v1/models", "/api/healthz")
            found = [(await client.get(path)).status_code for path in paths]
            for i in range(3):
                await client.request(f"BREW{i}", "/api/healthz")
            metrics = await client.get("/api/metrics", headers={"Authorization": "Bearer secret"})
            assert "BREW" not in metrics.text and 'method="other"' in metrics.text
            assert "-H &#x27;" not in (page := (await client.get("/api/docs")).text)
            assert "curl -H 'Authorization: Bearer KEY' -H 'Content-Type: application/json' -d" in page
            return found

    assert asyncio.run(statuses()) == [401, 401, 401, 401, 503]  # the last is open, and not ready yet


@pytest.mark.parametrize(
    ("limits", "site", "status"),
    [
        ({}, "cross-site", 403),
        ({}, "same-origin", 200),
        ({}, "none", 200),
        ({}, None, 200),
        ({"cross_site": True}, "cross-site", 200),
        ({"api_key": "secret"}, "cross-site", 200),
    ],
)
def test_a_page_of_another_site_gets_no_work_done_without_a_key(
    limits: dict[str, Any], site: str | None, status: int, here: Callable[..., Any]
):
    headers = {"Authorization": "Bearer secret"} | ({"Sec-Fetch-Site": site} if site else {})
    with httpx.Client(base_url=here(**limits).url, headers=headers, timeout=30) as client:
        answer = client.post("/v1/images/variations", data={"tokens": "[1]", "keep": "1", "num_tokens": "1"})
        assert answer.status_code == status
        assert client.get("/").status_code == client.get("/v1/models").status_code == 200  # as by a link
    if status == 403:
        assert answer.json()["error"]["code"] == "cross_site"


def test_who_calls_the_app_can_cancel(shipped: DetailFlowPipeline):
    """A server that is not ending passes that on, and gives no answer to it."""
    app = create_app(shipped)  # whose batcher has not started: an answer takes as long as one waits for it

    async def cancelled() -> None:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:

            async def post() -> httpx.Response:
                return await client.post("/v1/images/generations", json=LONG)

            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.2):
                    await post()
            task = asyncio.create_task(post())
            await asyncio.sleep(0.2)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(cancelled())
    assert value(app, "detailflow_requests_in_progress") == value(app, "detailflow_queue_images") == 0
