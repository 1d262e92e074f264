"""People's own pictures stage by stage, and animations of tokens."""

import base64
import io
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest
from answers import opened, photograph, png, same
from PIL import Image

from detailflow import DetailFlowPipeline
from detailflow.data.image_files import load_rgb
from detailflow.pipeline import fit
from detailflow.serving import views
from detailflow.serving.views import MOST_PIXELS


def test_reconstruct_is_what_the_pipeline_shows(http: httpx.Client, pipeline: DetailFlowPipeline):
    answer = http.post("/v1/tokens/reconstruct", files={"image": png(photograph())}).json()
    expected = pipeline.reconstruct(photograph())
    assert [len(stage["tokens"]) for stage in answer["data"]] == [stage.num_tokens for stage in expected]
    assert [stage["psnr"] for stage in answer["data"]] == pytest.approx([s.psnr for s in expected], abs=0.05)
    original = fit(pipeline.tokenizer.schedule, photograph())
    assert (np.asarray(opened(answer["original"])) == np.asarray(original)).all()
    encoded = http.post("/v1/tokens/encode", files={"image": png(photograph())}).json()
    assert encoded == {key: answer[key] for key in encoded}


def test_reconstruct_at_certain_numbers_of_tokens(http: httpx.Client, pipeline: DetailFlowPipeline):
    answer = http.post(
        "/v1/tokens/reconstruct", files={"image": png(photograph())}, data={"num_tokens": ["8", "2"]}
    ).json()
    (first, second) = answer["data"]
    assert (len(first["tokens"]), len(second["tokens"])) == (8, 2)
    assert first["size"] == "{0}x{0}".format(pipeline.tokenizer.schedule.decode_size(8))
    refused = http.post("/v1/tokens/reconstruct", files={"image": png(photograph())}, data={"num_tokens": ["5"]})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "num_tokens")


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_a_photo_of_a_phone_held_upright_is_turned_once(form: str, http: httpx.Client, pipeline: DetailFlowPipeline):
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    photograph().save(file, form, exif=exif)
    answer = http.post("/v1/tokens/reconstruct", files={"image": file.getvalue()}).json()
    shown = load_rgb(file.getvalue())
    assert shown.size == (60, 90)
    expected = Image.fromarray(np.asarray(shown))  # the pixels and nothing else
    assert (np.asarray(opened(answer["original"])) == np.asarray(fit(pipeline.tokenizer.schedule, expected))).all()
    encoded = http.post("/v1/tokens/encode", files={"image": file.getvalue()}).json()
    assert encoded["tokens"] == answer["tokens"] == pipeline.tokens(expected).tolist()


def test_reconstruct_takes_pictures_only(http: httpx.Client):
    refused = http.post("/v1/tokens/reconstruct", files={"image": b"no picture"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "invalid_image")


@pytest.mark.parametrize("kind", ["gif", "webp"])
def test_an_animation_has_a_frame_for_every_stage(http: httpx.Client, kind: str):
    tokens = list(range(16))
    answer = http.post("/v1/tokens/animate", json={"tokens": tokens, "format": kind, "milliseconds": 100})
    assert answer.headers["Content-Type"] == f"image/{kind}"
    animation: Any = Image.open(io.BytesIO(answer.content))
    assert (animation.format, animation.size, animation.n_frames) == (kind.upper(), (256, 256), 7)
    animation.seek(6)
    animation.load()
    assert animation.info["duration"] == 400
    if kind == "webp":
        last = http.post("/v1/tokens/decode", json={"tokens": tokens}).json()["data"][0]["b64_json"]
        frame = base64.b64encode(png(animation.convert("RGB"))).decode()
        assert same(frame, opened(last).resize((256, 256), Image.Resampling.NEAREST))


def test_an_animation_of_no_size_given_is_as_large_as_it_may_be(
    here: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
):
    """As those of larger models would be refused for a size that nobody gave."""
    monkeypatch.setattr(views, "MOST_PIXELS", 40_000)
    url, tokens = f"{here().url}/v1/tokens/animate", [1, 2, 3, 4]
    answer = httpx.post(url, json={"tokens": tokens})
    assert answer.status_code == 200, answer.text
    animation: Any = Image.open(io.BytesIO(answer.content))
    assert animation.size == (100, 100) and animation.n_frames == len(tokens)
    refused = httpx.post(url, json={"tokens": tokens, "size": 101}).json()["error"]
    assert refused["message"] == "size must be at most 100 for 4 frames, not 101"


def test_animations_have_bounds(http: httpx.Client, pipeline: DetailFlowPipeline):
    stages = len(pipeline.tokenizer.schedule.valid_counts)
    assert stages * 2048**2 > MOST_PIXELS
    for body, param in (
        ({"tokens": list(range(16)), "size": 2048}, "size"),
        ({"tokens": [64]}, "tokens"),
        ({"tokens": [1] * 5}, "tokens"),  # no image is shown from so many
        ({"tokens": [1] * 60}, "tokens"),
        ({"tokens": [1], "format": "png"}, "format"),
    ):
        refused = http.post("/v1/tokens/animate", json=body)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, param), refused.text
