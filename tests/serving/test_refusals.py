"""What messages suggest."""

from typing import Any

import httpx
import pytest


@pytest.mark.parametrize(
    ("route", "body", "advice"),
    [
        ("tokens/decode", {"tokens": [1], "format": "png"}, "unknown parameter 'format': see /docs"),
        ("tokens/decode", {"tokens": [1], "token": 1}, "unknown parameter 'token': did you mean tokens?"),
        ("tokens/animate", {"tokens": [1], "formet": "gif"}, "unknown parameter 'formet': did you mean format?"),
        ("images/generations", {"prompt": "cat", "keeps": 4}, "unknown parameter 'keeps': see /docs"),
        ("images/generations", {"prompt": "cat", "num_token": 4}, "unknown parameter 'num_token': did you mean num_to"),
    ],
)
def test_what_is_suggested_is_a_parameter_of_the_same_route(
    route: str, body: dict[str, Any], advice: str, http: httpx.Client
):
    assert http.post(f"/v1/{route}", json=body).json()["error"]["message"].startswith(advice)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"top_k": "OFF"}, "top_k: input should be a valid integer or 'off'"),
        ({"top_p": "OFF"}, "top_p: input should be a valid number or 'off'"),
        ({"prompt": 1.5}, "prompt: input should be a valid string or a valid integer"),
        ({"seed": "x"}, "seed: input should be a valid integer"),
    ],
)
def test_all_that_a_value_may_be_is_told(body: dict[str, Any], message: str, http: httpx.Client):
    error = http.post("/v1/images/generations", json={"prompt": "cat", **body}).json()["error"]
    assert (error["param"], error["message"]) == (next(iter(body)), message)


@pytest.mark.parametrize("route", ["decode", "animate"])
def test_one_item_of_a_list_is_enough(route: str, http: httpx.Client):
    error = http.post(f"/v1/tokens/{route}", json={"tokens": ["a"] * 1000}).json()["error"]
    assert (error["param"], error["message"]) == ("tokens", "tokens: input should be a valid integer")
