"""examples/ray_serve.py on a Ray of this machine with two replicas; `make ray` runs this."""

import base64
import os
import re
import runpy
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from answers import KEY, png, same

from detailflow import DetailFlowPipeline

pytestmark = pytest.mark.ray
EXAMPLE = Path(__file__).parents[2] / "examples" / "ray_serve.py"
REQUESTS = 17  # odd, so that two replicas have not computed as many


@pytest.fixture(scope="module")
def url(model: Path) -> Iterator[str]:
    """The address of two replicas of the tests' model."""
    for name in ("READY_CHECK", "HEALTH_CHECK"):  # a busy machine starts Ray's processes slowly
        os.environ.setdefault(f"RAY_SERVE_PROXY_{name}_TIMEOUT_S", "60")
    import ray
    from ray import serve
    from ray.serve.config import HTTPOptions

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    environment = {"env_vars": {"DETAILFLOW_API_KEY": KEY}}
    ray.init(num_cpus=4, include_dashboard=False, object_store_memory=100 * 2**20, runtime_env=environment)
    try:
        serve.start(http_options=HTTPOptions(host="127.0.0.1", port=port))
        options = {"model": str(model), "min_replicas": "2", "max_replicas": "2"}
        serve.run(runpy.run_path(str(EXAMPLE))["application"](options), name="detailflow")
        (deployment,) = serve.status().applications["detailflow"].deployments.values()
        assert deployment.replica_states == {"RUNNING": 2}
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()


@pytest.fixture
def http(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=120, headers={"Authorization": f"Bearer {KEY}"}) as client:
        yield client


def test_two_replicas_answer_as_one_server(http: httpx.Client, pipeline: DetailFlowPipeline):
    def ask(seed: int) -> dict[str, Any]:
        answer = http.post("/v1/images/generations", json={"prompt": "cat", "seed": seed})
        return answer.raise_for_status().json()

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, range(REQUESTS)))
    for seed, answer in enumerate(answers):
        assert same(answer["data"][0]["b64_json"], pipeline("cat", seed=seed)[0])
    shares = set[float]()
    for _ in range(200):
        found = re.search(r"^detailflow_images_total (\S+)", http.get("/metrics").text, re.MULTILINE)
        assert found
        shares.add(float(found[1]))
        if len(shares) == 2:
            break
    assert sum(shares) == REQUESTS and min(shares) > 0


def test_a_stream_and_an_edit(http: httpx.Client, pipeline: DetailFlowPipeline):
    body = {"prompt": "cat", "seed": 1, "stream": True, "partial_images": 2}
    with http.stream("POST", "/v1/images/generations", json=body) as answer:
        kinds = [line.removeprefix("event: ") for line in answer.iter_lines() if line.startswith("event: ")]
    assert kinds == ["image_generation.partial_image"] * 2 + ["image_generation.completed"]
    image = png(pipeline("bird", seed=2)[0])
    form = {"prompt": "cat", "keep": "8", "seed": "3"}
    (edited,) = http.post("/v1/images/edits", data=form, files={"image": image}).json()["data"]
    assert base64.b64decode(edited["b64_json"]).startswith(b"\x89PNG")


def test_refusals(url: str, http: httpx.Client):
    assert httpx.get(f"{url}/v1/models", timeout=60).status_code == 401
    refused = http.post("/v1/images/generations", json={"prompt": "no such class"})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "prompt"
    assert http.get("/healthz").json() == {"status": "ok"}
