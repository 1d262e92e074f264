"""Tokens, variations and uploads over HTTP."""

import itertools
import json
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from answers import opened, photograph, png, same
from PIL import Image

from detailflow import DetailFlowPipeline
from detailflow.serving import runner

# --- tokens ----------------------------------------------------------------------------------------------------


def test_tokens_there_and_back(http: httpx.Client, pipeline: DetailFlowPipeline):
    photo = photograph()
    encoded = http.post("/v1/tokens/encode", files={"image": ("../../etc/name.png", png(photo))}).json()
    expected = pipeline.reconstruct(photo)
    assert (encoded["height"], encoded["width"], len(encoded["tokens"])) == (32, 32, 16)
    counts = [stage.num_tokens for stage in expected]
    decoded = http.post("/v1/tokens/decode", json={"tokens": encoded["tokens"], "num_tokens": counts}).json()
    for data, stage in zip(decoded["data"], expected, strict=True):
        shown = opened(data["b64_json"])
        assert shown.size == (stage.size, stage.size) and data["size"] == f"{stage.size}x{stage.size}"
        assert data["tokens"] == encoded["tokens"][: stage.num_tokens]
        enlarged = np.asarray(shown.resize((32, 32), Image.Resampling.BICUBIC), int)
        assert abs(enlarged - np.asarray(stage.images[0], int)).max() <= 2
    (one,) = http.post("/v1/tokens/decode", json={"tokens": encoded["tokens"][:8]}).json()["data"]
    assert one["b64_json"] == next(d["b64_json"] for d in decoded["data"] if len(d["tokens"]) == 8)


def test_a_search(http: httpx.Client, pipeline: DetailFlowPipeline):
    photo, found = photograph(), pipeline.tokens(photograph(), search=3).tolist()
    assert found != pipeline.tokens(photo).tolist()
    for route in ("encode", "reconstruct"):
        answer = http.post(f"/v1/tokens/{route}", files={"image": png(photo)}, data={"search": "3"})
        assert answer.json()["tokens"] == found
        refused = http.post(f"/v1/tokens/{route}", files={"image": png(photo)}, data={"search": "21"})
        assert refused.status_code == 400 and refused.json()["error"]["param"] == "search"
    form = {"search": "3", "num_tokens": "8"}
    refused = http.post("/v1/tokens/encode", files={"image": png(photo)}, data=form)
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "num_tokens"


def test_a_search_that_nobody_waits_for_any_more(pipeline: DetailFlowPipeline):
    tasks = [SimpleNamespace(item=np.asarray(photograph().resize((32, 32))))] * 2
    steps = runner.run(pipeline, runner.Encode(32, 32, 20), tasks)  # type: ignore[arg-type]
    assert list(itertools.islice(steps, 15)) == [[]] * 15  # after each the batcher can leave
    assert len([*steps][-1]) == 2


@pytest.mark.parametrize("given", [{"num_tokens": 0}, {"height": 0, "width": 0}, {"num_tokens": [0]}])
def test_zero_is_not_all(given: dict[str, Any], http: httpx.Client):
    answer = http.post("/v1/tokens/decode", json={"tokens": [0] * 16, **given})
    assert answer.status_code == 400 and next(iter(given)) in answer.json()["error"]["message"]


def test_a_top_k_beyond_all_codes(http: httpx.Client):
    answer = http.post("/v1/images/generations", json={"prompt": "cat", "top_k": 2**64 + 1})
    assert answer.status_code == 400 and "top_k must be at most 2,147,483,647" in answer.json()["error"]["message"]
    assert http.get("/healthz").status_code == 200


def test_a_whole_image_in_its_own_shape(http: httpx.Client):
    photo = Image.new("RGB", (96, 48), "red")
    form = {"whole": "true", "num_tokens": "8"}
    encoded = http.post("/v1/tokens/encode", files={"image": png(photo)}, data=form).json()
    assert len(encoded["tokens"]) == 8 and encoded["width"] > encoded["height"]
    shape = {"height": encoded["height"], "width": encoded["width"]}
    (data,) = http.post("/v1/tokens/decode", json={"tokens": encoded["tokens"], **shape}).json()["data"]
    assert opened(data["b64_json"]).width > opened(data["b64_json"]).height
    refused = http.post("/v1/tokens/decode", json={"tokens": encoded["tokens"], "height": 9_999, "width": 8})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "height"
    for given, missing in (("height", "width"), ("width", "height")):
        refused = http.post("/v1/tokens/decode", json={"tokens": encoded["tokens"], given: shape[given]})
        error = refused.json()["error"]
        assert (refused.status_code, error["param"]) == (400, missing)
        assert error["message"].startswith(f"{missing} is missing: give both height and width")


def test_generated_tokens_are_those_of_the_image(http: httpx.Client):
    made = http.post("/v1/images/generations", json={"prompt": 3, "seed": 4}).json()["data"][0]
    shown = http.post("/v1/tokens/decode", json={"tokens": made["tokens"]}).json()["data"][0]
    assert shown["b64_json"] == made["b64_json"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"tokens": [64] * 4}, "tokens"),
        ({"tokens": [-1]}, "tokens"),
        ({"tokens": []}, "tokens"),
        ({"tokens": [1.5]}, "tokens"),
        ({"tokens": [1] * 5}, "tokens"),  # no image is shown from so many
        ({"tokens": [1] * 5, "num_tokens": 5}, "num_tokens"),
        ({"tokens": [1] * 17}, "tokens"),
        ({"tokens": [1] * 100_000, "num_tokens": 1}, "tokens"),
        ({"tokens": [1] * 4, "num_tokens": 8}, "num_tokens"),
        ({"tokens": [1] * 4, "num_tokens": []}, "num_tokens"),
        ({}, "tokens"),
    ],
)
def test_tokens_that_cannot_be(body: dict[str, Any], param: str, http: httpx.Client):
    refused = http.post("/v1/tokens/decode", json=body)
    assert refused.status_code == 400 and refused.json()["error"]["param"] == param


@pytest.mark.parametrize(
    ("route", "field", "advice"),
    [
        ("tokens/encode", "num_token", "did you mean num_tokens?"),
        ("tokens/reconstruct", "num_token", "did you mean num_tokens?"),
        ("images/variations", "whole", "see /docs"),  # another route has it
        ("tokens/reconstruct", "whole", "see /docs"),
    ],
)
def test_a_form_has_no_unknown_fields(route: str, field: str, advice: str, http: httpx.Client):
    """They would be left out without a word."""
    refused = http.post(f"/v1/{route}", files={"image": png(photograph())}, data={field: "4"})
    error = refused.json()["error"]
    assert (refused.status_code, error["param"]) == (400, field)
    assert error["message"] == f"unknown parameter {field!r}: {advice}"


def test_a_text_of_a_megabyte_in_a_form(http: httpx.Client):
    """As of a picture that was sent as text."""
    refused = http.post("/v1/tokens/encode", files={"image": (None, b"x" * (2**20 + 1))})
    error = refused.json()["error"]
    assert refused.status_code == 400
    assert error["message"].startswith("a text in the form has more than 1 MiB: if it is an image, send what the file")


@pytest.mark.parametrize(
    ("route", "name"),
    [
        ("tokens/encode", "image"),
        ("tokens/encode", "num_tokens"),
        ("tokens/reconstruct", "image"),
        ("images/variations", "image"),
        ("images/variations", "seed"),
        ("images/edits", "tokens"),
    ],
)
def test_a_form_has_no_field_twice(route: str, name: str, http: httpx.Client):
    """Which of the two would count?"""
    parts: list[tuple[str, Any]] = [("image", ("a.png", png(photograph())))]
    parts += [(name, (None, value)) for value in ("1", "2")] if name != "image" else parts
    refused = http.post(f"/v1/{route}", files=parts)
    error = refused.json()["error"]
    assert (refused.status_code, error["param"], error["code"]) == (400, name, "duplicate_parameter")
    assert error["message"] == f"{name} is given more than once: give it once"


def test_a_form_that_ends_early_is_refused(http: httpx.Client):
    """What was cut would be left out without a word, such as the seed."""
    files: dict[str, Any] = {"image": ("a.png", png(photograph())), "prompt": (None, "cat"), "seed": (None, "7")}
    form = httpx.Request("POST", http.base_url, files=files)
    content, headers = form.read(), {"Content-Type": form.headers["Content-Type"]}

    def edit(content: Any) -> httpx.Response:
        return http.post("/v1/images/edits", content=content, headers=headers)

    for end in (content.rindex(b"--"), content.rindex(b"7"), content.rindex(b"Content-"), content.index(b"IDAT"), 2, 0):
        refused = edit(content[:end])
        error = refused.json()["error"]
        assert (refused.status_code, error["code"]) == (400, "invalid_form"), end
        assert error["message"] == "the form ends before its last boundary: send all of it"
    pieces = (content[i : i + 7] for i in range(0, len(content), 7))
    for whole in (content, content.removesuffix(b"\r\n"), content + b"and more", pieces):
        assert edit(whole).json()["seed"] == 7


def test_a_list_of_images_of_openais_client(client: openai.OpenAI, http: httpx.Client):
    """Which sends them as `image[]`: one is an image as any other."""
    extra = {"seed": 1}
    listed = client.images.edit(image=[png(photograph())], prompt="cat", extra_body=extra)
    plain = client.images.edit(image=png(photograph()), prompt="cat", extra_body=extra)
    assert listed.data == plain.data
    with pytest.raises(openai.BadRequestError, match="image must be one image, not 2") as refused:
        client.images.edit(image=[png(photograph())] * 2, prompt="cat")
    assert refused.value.param == "image"
    both = http.post("/v1/tokens/encode", files={name: png(photograph()) for name in ("image", "image[]")})
    assert both.json()["error"]["message"] == "image is given more than once: give it once"
    text = http.post("/v1/tokens/encode", data={"image[]": "photo.png"})
    assert text.json()["error"]["message"].startswith("image must be a file, not text")


def test_what_openais_client_sends_for_others_is_ignored(client: openai.OpenAI):
    for quality in ("low", "high", "xhigh", "max", "auto", "standard"):
        ignored = {"safety_identifier": "one", "user": "one", "background": "opaque", "quality": quality}
        client.images.generate(prompt="cat", extra_body=ignored | {"moderation": "low"})  # as older clients lack some
        client.images.edit(prompt="cat", image=png(photograph()), extra_body=ignored)


@pytest.mark.parametrize(
    ("route", "name", "advice"),
    [
        ("images/variations", "seed", "leave it out or give it a value"),
        ("images/variations", "n", "leave it out or give it a value"),
        ("tokens/encode", "num_tokens", "leave it out or give it a value"),
        ("tokens/reconstruct", "num_tokens", "leave it out or give it a value"),
        ("tokens/reconstruct", "image", "give it a value"),
    ],
)
@pytest.mark.parametrize("multipart", [True, False])
def test_an_empty_field_is_not_taken_for_one_left_out(
    route: str, name: str, advice: str, multipart: bool, http: httpx.Client
):
    sent: dict[str, Any] = {"data": {name: ""}} | ({"files": {"mask": b""}} if multipart else {})
    error = http.post(f"/v1/{route}", **sent).json()["error"]
    assert (error["param"], error["message"]) == (name, f"{name} is empty: {advice}")


# --- variations ------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:deprecated")  # by OpenAI, whose client still has it
def test_variations_and_edits_by_openais_client(client: openai.OpenAI, pipeline: DetailFlowPipeline):
    extra: dict[str, Any] = {"keep": 8, "seed": 3, "temperature": 0.9, "prompt": "cat"}
    varied = client.images.create_variation(image=png(photograph()), n=2, model="tests/tiny", extra_body=extra)
    options: dict[str, Any] = dict(keep=8, num_images=2, seed=3)
    expected = pipeline.vary(photograph(), label="cat", temperature=0.9, **options)
    assert varied.data is not None and varied.model_extra is not None and varied.model_extra["seed"] == 3
    assert all(same(data.b64_json, image) for data, image in zip(varied.data, expected, strict=True))
    edited = client.images.edit(image=png(photograph()), prompt="Hot dog", n=2, extra_body={"keep": 8, "seed": 3})
    expected = pipeline.vary(photograph(), label="Hot dog", **options)
    assert edited.data is not None
    assert all(same(data.b64_json, image) for data, image in zip(edited.data, expected, strict=True))


def test_a_variation_of_no_class_keeps_a_quarter(http: httpx.Client, pipeline: DetailFlowPipeline):
    image = {"image": png(photograph())}
    (data,) = http.post("/v1/images/variations", files=image, data={"seed": "1"}).json()["data"]
    assert same(data["b64_json"], pipeline.vary(photograph(), keep=4, seed=1)[0])
    assert data["tokens"][:4] == pipeline.tokens(photograph())[:4].tolist()


def test_variations_of_tokens(http: httpx.Client):
    """An image that was generated becomes itself again with the same seed and class; all tokens kept are the image."""
    made = http.post("/v1/images/generations", json={"prompt": "bird", "seed": 7}).json()["data"][0]
    form = {"tokens": json.dumps(made["tokens"]), "prompt": "bird", "seed": "7"}
    for keep in (1, 4, 12, 16):
        again = http.post("/v1/images/variations", data=form | {"keep": str(keep)}, files={"a": ""}).json()
        assert "error" in again  # a form has no unknown parts
        again = http.post("/v1/images/variations", data=form | {"keep": str(keep)}).json()["data"][0]
        assert again["tokens"] == made["tokens"] and same(again["b64_json"], opened(made["b64_json"]))


def test_an_edit_as_a_stream(client: openai.OpenAI):
    extra = {"keep": 4, "seed": 3}
    with client.images.edit(
        image=png(photograph()), prompt="cat", stream=True, partial_images=2, extra_body=extra
    ) as stream:
        events = list(stream)
    assert [event.type for event in events] == ["image_edit.partial_image"] * 2 + ["image_edit.completed"]
    counts = [event.num_tokens for event in events]  # type: ignore[union-attr]
    assert counts[0] == 4 and counts[-1] == 16, "first what the kept tokens show"


@pytest.mark.parametrize(
    ("route", "fields"),
    [
        ("images/variations", "the field image, a file, or tokens"),
        ("images/edits", "the fields prompt and image, a file, or tokens in its place"),
        ("tokens/encode", "the field image, a file"),
        ("tokens/reconstruct", "the field image, a file"),
    ],
)
def test_routes_for_forms_refuse_json(route: str, fields: str, http: httpx.Client):
    refused = http.post(f"/v1/{route}", json={"prompt": "cat", "tokens": [1, 2]})
    error = refused.json()["error"]
    assert (refused.status_code, error["param"], error["code"]) == (400, "image", "invalid_form")
    wanted = f"the body must be a form (multipart/form-data) with {fields}, as curl -F image=@photo.png sends it"
    assert error["message"] == wanted


@pytest.mark.parametrize(
    ("route", "form", "param", "message"),
    [
        ("edits", {"tokens": "[1, 2]"}, "prompt", "prompt is missing"),
        ("edits", {"tokens": "[1, 2]", "prompt": "kat"}, "prompt", "unknown class 'kat': did you mean cat?"),
        ("variations", {}, "image", "give either image or tokens"),
        ("variations", {"tokens": "[1, 2]", "keep": "4"}, "keep", "keep must be at most the 2 tokens given, not 4"),
        ("variations", {"tokens": "[1, 2]"}, "keep", "not 4, a quarter of an image's, which stay if it is left out"),
        ("variations", {"image": "photo.png"}, "image", "image must be a file, not text: send what the file contains"),
        ("variations", {"tokens": "[1, 2]", "keep": "5"}, "keep", "keep must be 1 to 4 or a multiple of 4 up to 16"),
        ("variations", {"tokens": "[1, 2]", "keep": "x"}, "keep", "keep: input should be a valid integer"),
        ("variations", {"tokens": "[64]", "keep": "1"}, "tokens", "tokens must be 0 to 63, not 64"),
        ("variations", {"tokens": "[]"}, "tokens", "tokens must be a JSON list of whole numbers"),
        ("variations", {"tokens": "[1.5]"}, "tokens", "tokens must be a JSON list of whole numbers"),
        ("variations", {"tokens": "1, 2"}, "tokens", "tokens must be a JSON list of whole numbers"),
        ("variations", {"tokens": str([1] * 60), "keep": "4"}, "tokens", "tokens must be at most 16, as many as this"),
        ("variations", {"tokens": "[1, 2, 3, 4]", "num_tokens": "2"}, "num_tokens", "num_tokens must be at least keep"),
        ("variations", {"tokens": "[1]", "keep": "1", "n": "17"}, "n", "n must be 1 to 16, not 17"),
        ("variations", {"tokens": "[1]", "mask": "x"}, "mask", "unknown parameter 'mask'"),
    ],
)
def test_variations_that_cannot_be(route: str, form: dict[str, str], param: str, message: str, http: httpx.Client):
    refused = http.post(f"/v1/images/{route}", data=form)
    error = refused.json()["error"]
    assert (refused.status_code, error["param"]) == (400, param) and message in error["message"]


@pytest.mark.filterwarnings("ignore:deprecated")
@pytest.mark.parametrize("route", ["variations", "edits"])
def test_variations_of_what_is_no_image(route: str, client: openai.OpenAI):
    with pytest.raises(openai.BadRequestError, match="the upload is not an image"):
        if route == "edits":
            client.images.edit(image=b"no image", prompt="cat")
        else:
            client.images.create_variation(image=b"no image")


# --- uploads ---------------------------------------------------------------------------------------------------------


def bomb() -> bytes:
    """A small file of 64 million pixels."""
    return png(Image.new("1", (8000, 8000)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no image", "the upload is not an image"),
        (b"", "the upload is empty"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "the upload is not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "the upload is not an image"),
        (png(Image.new("RGB", (64, 64)))[:60], "the upload"),
        (bomb(), "the upload is too large: it has 8000×8000 pixels, and 25,000,000 are the most"),
    ],
)
def test_uploads_that_are_no_images(content: bytes, message: str, http: httpx.Client):
    refused = http.post("/v1/tokens/encode", files={"image": ("a.png", content)})
    assert refused.status_code == 400 and refused.json()["error"]["message"].startswith(message)
    assert refused.json()["error"]["param"] == "image"
