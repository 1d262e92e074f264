"""The API does what its own OpenAPI description says, whatever it is sent."""

from typing import Any

import hypothesis
import pytest
import requests
import schemathesis
from answers import KEY
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


def examine(url: str, path: str, examples: int) -> int:
    """Send requests made from the description to an operation; return how many."""
    headers = {"Authorization": f"Bearer {KEY}"}
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    (method,) = schema.raw_schema["paths"][path]
    sent = 0

    with requests.Session() as session:

        @hypothesis.given(case=schema[path][method].as_strategy())
        @hypothesis.settings(
            max_examples=examples,
            database=None,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(hypothesis.HealthCheck),
            phases=[hypothesis.Phase.generate],
        )
        def run(case: schemathesis.Case) -> None:
            nonlocal sent
            sent += 1
            case.call_and_validate(session=session, headers=headers, checks=CHECKS)

        run()
    return sent


PATHS = (
    "/v1/images/generations",
    "/v1/images/variations",
    "/v1/images/edits",
    "/v1/tokens/encode",
    "/v1/tokens/decode",
    "/v1/tokens/reconstruct",
    "/v1/tokens/animate",
    "/v1/classes",
    "/v1/models/{model}",
)


@pytest.mark.parametrize("path", [path for path in PATHS if "/images/" in path])
def test_streams_are_described(path: str, server: Any):
    described = requests.get(f"{server.url}/openapi.json", timeout=30).json()["paths"][path]["post"]["responses"]["200"]
    assert set(described["content"]) == {"application/json", "text/event-stream"}


@pytest.mark.parametrize("path", PATHS)
def test_requests_from_the_description(path: str, server: Any):
    assert examine(server.url, path, 12) >= 8


@pytest.mark.slow
@pytest.mark.parametrize("path", PATHS)
def test_many_requests_from_the_description(path: str, server: Any):
    assert examine(server.url, path, 500 if "images" in path else 300) >= 100
