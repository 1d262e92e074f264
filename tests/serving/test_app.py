"""The service as clients see it: a process of the command, OpenAI's own client, and plain HTTP."""

import asyncio
import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from answers import KEY, same
from PIL import Image

from detailflow import DetailFlowGPT, DetailFlowPipeline, DetailFlowTokenizer, GPTConfig, TokenizerConfig, ViTConfig
from detailflow.serving.app import create_app
from detailflow.serving.runner import warm_up

# --- OpenAI's client -------------------------------------------------------------------------------------------


def test_images_are_those_of_the_pipeline(client: openai.OpenAI, pipeline: DetailFlowPipeline):
    answer = client.images.generate(prompt="cat", n=3, extra_body={"seed": 5, "guidance_scale": 2.5, "top_k": 20})
    expected = pipeline("cat", num_images_per_class=3, guidance_scale=2.5, top_k=20, seed=5)
    assert answer.data is not None
    assert [same(data.b64_json, image) for data, image in zip(answer.data, expected, strict=True)] == [True] * 3
    assert (answer.output_format, answer.size, answer.background) == ("png", "32x32", "opaque")
    assert answer.usage is not None and answer.usage.output_tokens == 3 * 16
    assert answer.model_extra is not None and (answer.model_extra["seed"], answer.model_extra["model"]) == (
        5,
        "tests/tiny",
    )


@pytest.mark.parametrize(
    ("prompt", "extra", "options"),
    [
        ("4", {}, {}),
        ("HOT DOG", {"temperature": 0}, {"temperature": 0.0}),
        ("bird", {"num_tokens": 4}, {"num_tokens": 4}),
        (
            "bird",
            {"top_p": 0.5, "top_k": "off", "guidance_schedule": "linear"},
            {"top_p": 0.5, "guidance_schedule": "linear"},
        ),
    ],
)
def test_classes_and_sampling(
    prompt: str, extra: dict[str, Any], options: dict[str, Any], client: openai.OpenAI, pipeline: DetailFlowPipeline
):
    answer = client.images.generate(
        prompt=prompt,
        model="tests/tiny",
        response_format="b64_json",
        size="auto",
        user="u",
        extra_body={"seed": 1, **extra},
    )
    assert answer.data is not None and same(answer.data[0].b64_json, pipeline(prompt, seed=1, **options)[0])


def test_a_seed_of_its_own_is_told(client: openai.OpenAI, pipeline: DetailFlowPipeline):
    answers = [client.images.generate(prompt="cat") for _ in range(2)]
    seeds = [answer.model_extra["seed"] for answer in answers if answer.model_extra]
    assert seeds[0] != seeds[1]
    for seed, answer in zip(seeds, answers, strict=True):
        assert answer.data is not None and same(answer.data[0].b64_json, pipeline("cat", seed=seed)[0])


def test_a_stream_shows_images_as_they_take_shape(client: openai.OpenAI, pipeline: DetailFlowPipeline):
    with client.images.generate(prompt="cat", stream=True, partial_images=3, extra_body={"seed": 2}) as stream:
        events = list(stream)
    assert [event.type for event in events] == ["image_generation.partial_image"] * 3 + ["image_generation.completed"]
    assert [event.partial_image_index for event in events[:3]] == [0, 1, 2]  # type: ignore[union-attr]
    stages = {stage.num_tokens: stage.images[0] for stage in pipeline.stream("cat", seed=2)}
    counts = [event.num_tokens for event in events]  # type: ignore[union-attr]
    assert counts[0] <= 2 and counts == sorted(counts) and counts[-1] == 16
    assert all(same(event.b64_json, stages[n]) for event, n in zip(events, counts, strict=True))
    assert events[-1].usage.output_tokens == 16  # type: ignore[union-attr]


def test_a_stream_of_several_images_and_all_stages(client: openai.OpenAI, pipeline: DetailFlowPipeline):
    with client.images.generate(prompt="bird", n=2, stream=True, partial_images=100, extra_body={"seed": 2}) as stream:
        events = [event.model_dump() for event in stream]
    expected = pipeline("bird", num_images_per_class=2, seed=2)
    for i in range(2):
        mine = [event for event in events if event["image_index"] == i]
        assert [event["num_tokens"] for event in mine] == list(pipeline.tokenizer.schedule.valid_counts)
        assert mine[-1]["type"] == "image_generation.completed" and same(mine[-1]["b64_json"], expected[i])


def test_a_stream_without_partial_images(client: openai.OpenAI):
    with client.images.generate(prompt="bird", stream=True) as stream:
        assert [event.type for event in stream] == ["image_generation.completed"]


def test_an_unknown_class_is_refused_with_a_suggestion(client: openai.OpenAI):
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match="unknown class 'brid': did you mean bird?") as refused:
            client.images.generate(prompt="brid", stream=stream)
        assert (refused.value.param, refused.value.code) == ("prompt", "unknown_class")
        assert refused.value.type == "invalid_request_error"


@pytest.mark.parametrize(
    ("options", "param", "message"),
    [
        ({"n": 17}, "n", "n must be 1 to 16, not 17"),
        ({"n": 0}, "n", "n: input should be greater than or equal to 1"),
        ({"n": "many"}, "n", "n: input should be a valid integer"),
        ({"size": "64x64"}, "size", "size must be auto or 32x32, not '64x64'"),
        ({"response_format": "url"}, "response_format", "response_format: input should be 'b64_json'"),
        (
            {"extra_body": {"num_tokens": 5}},
            "num_tokens",
            "num_tokens must be 1 to 4 or a multiple of 4 up to 16, not 5",
        ),
        ({"extra_body": {"temperature": -1}}, "temperature", "temperature must be 0 (argmax) or more"),
        ({"extra_body": {"top_p": 2}}, "top_p", "top_p must be above 0 and at most 1 (1 is off), not 2"),
        ({"extra_body": {"top_k": -1}}, "top_k", "top_k must be 0 or more (0 is off), not -1"),
        ({"extra_body": {"seed": -1}}, "seed", "seed: input should be greater"),
        (
            {"extra_body": {"guidence_scale": 1}},
            "guidence_scale",
            "unknown parameter 'guidence_scale': did you mean guidance_scale?",
        ),
        ({"model": "gpt-image-1"}, "model", "there is no model 'gpt-image-1' here: this server has 'tests/tiny'"),
    ],
)
def test_errors_name_what_is_wrong(options: dict[str, Any], param: str, message: str, client: openai.OpenAI):
    with pytest.raises(openai.APIStatusError) as refused:
        client.images.generate(prompt="cat", **options)
    assert refused.value.status_code == (404 if param == "model" else 400)
    assert refused.value.param == param and message in refused.value.message


def test_a_key_is_asked_for(server: Any):
    for key in ("wrong", KEY[:-1], f"{KEY}x", "ä"):
        with httpx.Client(base_url=server.url, headers={"Authorization": f"Bearer {key}".encode()}) as stranger:
            assert stranger.get("/v1/models").status_code == 401
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0) as stranger:
        with pytest.raises(openai.AuthenticationError) as refused:
            stranger.images.generate(prompt="cat")
        assert refused.value.code == "invalid_api_key"
    for path, status in (("/metrics", 401), ("/v1/nothing", 401), ("/healthz", 200), ("/readyz", 200), ("/docs", 200)):
        assert httpx.get(f"{server.url}{path}").status_code == status


def test_models(client: openai.OpenAI, pipeline: DetailFlowPipeline, tmp_path: Path):
    (model,) = client.models.list()
    assert model.id == "tests/tiny" and client.models.retrieve("tests/tiny") == model
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("another")
    known = model.model_dump()
    assert (known["num_classes"], known["image_size"], known["codebook_size"]) == (5, 32, 64)
    assert known["fingerprint"] == pipeline.tokenizer.fingerprint()
    assert known["gpt_fingerprint"] == pipeline.gpt.fingerprint()
    assert all(isinstance(known["limits"][name], int) for name in ("n", "upload_bytes", "upload_pixels"))
    schedule = pipeline.tokenizer.schedule
    assert known["stages"] == [{"num_tokens": n, "size": schedule.decode_size(n)} for n in schedule.valid_counts]
    assert str(tmp_path.parents[1]) not in json.dumps(known)


def test_classes(http: httpx.Client):
    listed = http.get("/v1/classes").json()
    assert listed["total"] == 5 and listed["data"][3] == {"id": 3, "name": "cat", "names": "cat", "wordnet_id": None}
    found = http.get("/v1/classes", params={"search": "DOG"}).json()["data"]
    assert [entry["name"] for entry in found] == ["Hot dog"]
    assert http.get("/v1/classes", params={"search": "zebra"}).json() == {"object": "list", "total": 0, "data": []}
    assert len(http.get("/v1/classes", params={"limit": 2}).json()["data"]) == 2
    assert http.get("/v1/classes", params={"limit": 0}).json()["error"]["param"] == "limit"


def test_requests_of_many_clients_share_batches(
    http: httpx.Client, client: openai.OpenAI, pipeline: DetailFlowPipeline
):
    """Different classes, seeds, numbers of images and of tokens, with each image as if it were alone."""
    cases = [(("cat", "bird", "airplane")[i % 3], i % 4 + 1, i, (16, 8, 4)[i % 3]) for i in range(24)]

    def ask(case: tuple[str, int, int, int]) -> Any:
        label, n, seed, num_tokens = case
        return client.images.generate(prompt=label, n=n, extra_body={"seed": seed, "num_tokens": num_tokens}).data

    def batches() -> tuple[float, float]:
        lines = dict(line.rsplit(" ", 1) for line in http.get("/metrics").text.splitlines() if line[0] != "#")
        return float(lines["detailflow_batch_images_count"]), float(lines["detailflow_batch_images_sum"])

    before = batches()
    with ThreadPoolExecutor(len(cases)) as pool:
        answers = list(pool.map(ask, cases))
    count, images = (after - start for after, start in zip(batches(), before, strict=True))
    assert images == sum(n for _, n, _, _ in cases) and count < images / 2
    for (label, n, seed, num_tokens), data in zip(cases, answers, strict=True):
        expected = pipeline(label, num_images_per_class=n, seed=seed, num_tokens=num_tokens)
        assert all(same(shown.b64_json, image) for shown, image in zip(data, expected, strict=True))


# --- bodies ----------------------------------------------------------------------------------------------------------


def test_bodies_are_bounded(http: httpx.Client):
    """By what they say of their length, and, where they say nothing, by what comes."""
    large = b"x" * (11 * 2**20)
    assert http.post("/v1/tokens/encode", files={"image": large}).status_code == 413

    def parts() -> Iterator[bytes]:
        yield b'{"prompt": "'
        for _ in range(40):
            yield b"x" * 2**16

    headers = {"Content-Type": "application/json"}
    for body in (b"[" * 2**21, parts()):
        refused = http.post("/v1/images/generations", content=body, headers=headers)
        assert (refused.status_code, refused.json()["error"]["code"]) == (413, "too_large")
    form = {"Content-Type": "multipart/form-data; boundary=x"}
    photograph = b"--x\r\nContent-Disposition: form-data; name=image; filename=a\r\n\r\n" + b"x" * 2**21 + b"\r\n--x--"
    for kind in ("multipart/form-data", "Multipart/Form-Data"):  # no image, but not too large for one
        headers = {"Content-Type": f"{kind}; boundary=x"}
        assert http.post("/v1/tokens/encode", content=photograph, headers=headers).status_code == 400
    endless = (b"--x\r\nContent-Disposition: form-data; name=image; filename=a\r\n\r\n", *[b"x" * 2**18] * 48)
    assert http.post("/v1/tokens/encode", content=iter(endless), headers=form).status_code == 413


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b'{"prompt": NaN}', b"\xff", b"[" * 100_000, b'{"prompt":"\\ud800"}']
)
def test_bodies_that_are_no_requests(content: bytes, http: httpx.Client):
    refused = http.post("/v1/images/generations", content=content, headers={"Content-Type": "application/json"})
    assert refused.status_code == 400 and refused.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"prompt": "\xff"}', "the body is not valid JSON: it is not UTF-8 at byte 12"),
        (b"[" * 100_000, "the body is not valid JSON: it is nested too deeply"),
        (b'{"n": %s}' % (b"1" * 5000), "the body is not valid JSON: a number in it has thousands of digits"),
        (b'{"prompt": "\n"}', "the body is not valid JSON: Invalid control character at character 12"),
        (b'{"prompt": "cat"', "the body is not valid JSON: Expecting ',' delimiter at character 16"),
    ],
)
def test_json_that_cannot_be_read_is_told_why(content: bytes, message: str, http: httpx.Client):
    refused = http.post("/v1/images/generations", content=content, headers={"Content-Type": "application/json"})
    error = refused.json()["error"]
    assert (refused.status_code, error["code"], error["message"]) == (400, "invalid_json", message)


@pytest.mark.parametrize(
    "body",
    [
        {"n": 10**4000},
        {"num_tokens": 10**4000},
        {"top_k": -(10**4000)},
        {"guidance_schedule": "g " * 9000},
        {"seed": 1, "x" * 5000: 1},
        {"- " * 20_000: 1},
        {"model": "m" * 5000},
        {"model": "m " * 20_000},
        {"size": "x " * 9000},
        {"prompt": "c" * 999},
        {"prompt": "c'" * 499},
        {"prompt": "1" * 999},
        {"prompt": 10**4000},
    ],
)
def test_what_a_client_made_up_does_not_fill_an_answer(body: dict[str, Any], http: httpx.Client):
    refused = http.post("/v1/images/generations", json={"prompt": "cat", **body})
    assert refused.status_code in (400, 404) and len(refused.content) < 600


def test_nor_does_it_where_it_is_part_of_an_address_or_is_there_twice(http: httpx.Client):
    twice = f'{{"{"- " * 9000}": 1, "{"- " * 9000}": 2}}'
    headers = {"Content-Type": "application/json"}
    for refused in (
        http.get("/v1/models", params={"- " * 9000: 1}),
        http.post("/v1/images/generations", content=twice, headers=headers),
        http.post("/v1/tokens/decode", json={"tokens": [1], "height": 10**4000, "width": 10**4000}),
        http.post("/v1/tokens/decode", json={"tokens": [1], "num_tokens": [1, 10**4000]}),
    ):
        assert refused.status_code == 400 and len(refused.content) < 600


def test_what_the_server_says_itself_is_whole(model: Path, tmp_path: Path):
    """Such as class names of any length."""
    name = "Llanfairpwllgwyngyllgogerychwyrndrobwllllantysiliogogogoch_" * 3
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    for path in folder.rglob("*.json"):
        path.write_text(path.read_text(encoding="utf-8").replace('"bird"', f'"{name}"'), encoding="utf-8")
    app = create_app(DetailFlowPipeline.from_pretrained(folder, device="cpu"))

    async def message(prompt: str) -> str:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            refused = await client.post("/v1/images/generations", json={"prompt": prompt})
            return str(refused.json()["error"]["message"])

    assert asyncio.run(message(name[1:])).endswith(f"did you mean {name}?")
    assert name in asyncio.run(message("unicorn"))


def test_json_has_no_name_twice(http: httpx.Client):
    odd = http.post(
        "/v1/images/generations", content=b'{"\\ud800": 1, "\\ud800": 2}', headers={"Content-Type": "application/json"}
    )
    assert odd.status_code == 400
    content = b'{"prompt": "cat", "seed": 1, "seed": 2}'
    refused = http.post("/v1/images/generations", content=content, headers={"Content-Type": "application/json"})
    error = refused.json()["error"]
    assert (refused.status_code, error["param"], error["code"]) == (400, "seed", "duplicate_parameter")
    assert error["message"] == "seed is given more than once: give it once"


@pytest.mark.parametrize(
    ("method", "path", "name", "message"),
    [
        ("POST", "/v1/images/generations?seed=1", "seed", "in the address: this route takes none there"),
        ("GET", "/v1/models?limit=1", "limit", "in the address: this route takes none there"),
        ("GET", "/v1/classes?searching=dog", "searching", "in the address: did you mean search?"),
        ("GET", "/v1/classes?search=dog&search=cat", "search", "search is given more than once"),
    ],
)
def test_an_address_has_no_unknown_parameter_and_none_twice(
    method: str, path: str, name: str, message: str, http: httpx.Client
):
    refused = http.request(method, path, json={"prompt": "cat"} if method == "POST" else None)
    error = refused.json()["error"]
    assert (refused.status_code, error["param"]) == (400, name) and message in error["message"]
    assert http.get("/healthz?from=probe").status_code == http.get("/?from=link").status_code == 200


def test_what_the_readme_pipes_an_answer_into(http: httpx.Client, tmp_path: Path):
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    (line,) = [line for line in readme.splitlines() if line.lstrip().startswith("python3 -c")]
    code = shlex.split(line)[2]
    answer = http.post("/v1/images/generations", json={"prompt": "cat", "seed": 1})
    subprocess.run([sys.executable, "-c", code], input=answer.content, cwd=tmp_path, check=True)
    with Image.open(tmp_path / "cat.png") as image:
        assert image.size == (32, 32) and same(answer.json()["data"][0]["b64_json"], image)


def test_only_json_is_taken_for_json(http: httpx.Client):
    """What a page of another site can send without asking is refused."""
    for kind in ("text/plain", "application/x-www-form-urlencoded"):
        answer = http.post("/v1/images/generations", content=b'{"prompt": "cat"}', headers={"Content-Type": kind})
        assert answer.status_code == 400
        assert answer.json()["error"]["message"].endswith(": send it with the header Content-Type: application/json")
        assert not [name for name in answer.headers if name.startswith("access-control")]


def test_routes_that_are_not_there(http: httpx.Client):
    error = http.get("/v1/nothing").json()["error"]
    assert error["code"] == "not_found"
    assert error["message"] == "there is no /v1/nothing here: /docs lists what there is"
    error = http.get("/v1/images/generations").json()["error"]
    assert error["code"] == "method_not_allowed"
    assert error["message"] == "/v1/images/generations takes POST, not GET"
    for path in ("/docs/", "/v1/classes/", "/studio"):  # a redirection would lead to what the client calls this host
        assert http.get(path, headers={"Host": "evil.example"}).status_code == 404
    for path in ("/", "/studio/main.js"):  # parts of files are not needed, and mistakes in asking for them are none
        for wanted in ("bytes=5-1", "bytes=99999999-", "bytes=0-9"):
            answer = http.get(path, headers={"Range": wanted})
            assert answer.status_code == 200 and answer.content == http.get(path).content
    assert http.post("/studio/main.js").json()["error"]["message"].startswith("/studio/main.js takes ")
    assert len(http.get(f"/v1/{'x' * 5000}").content) < 600


@pytest.mark.parametrize(
    "path",
    ["/", "/docs", "/openapi.json", "/studio/main.js", "/healthz", "/readyz", "/metrics", "/v1/models", "/v1/classes"],
)
def test_head_is_get_without_a_body(path: str, http: httpx.Client):
    head, get = http.head(path, headers={"Range": "bytes=0-9"}), http.get(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"] == get.headers["content-type"]
    if path != "/metrics":  # which count this
        assert head.headers["content-length"] == str(len(get.content))
    assert http.head("/v1/images/generations").status_code == 405


# --- operations ------------------------------------------------------------------------------------------------


def test_metrics(http: httpx.Client):
    http.post("/v1/images/generations", json={"prompt": "cat", "n": 2})
    answer = http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    lines = dict(line.rsplit(" ", 1) for line in answer.text.splitlines() if line[0] != "#")
    http.head("/v1/models")
    assert 'detailflow_requests_total{method="HEAD",path="/v1/models",status="200"}' in http.get("/metrics").text
    route = 'method="POST",path="/v1/images/generations",status="200"'
    assert float(lines[f"detailflow_requests_total{{{route}}}"]) >= 1
    assert float(lines['detailflow_request_seconds_count{path="/v1/images/generations"}']) >= 1
    assert float(lines["detailflow_images_total"]) >= 2
    assert lines["detailflow_queue_images"] == "0.0"


class Links(HTMLParser):
    """What a page loads or refers to."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.found += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action")]


def test_docs_load_nothing_from_elsewhere(http: httpx.Client):
    page = http.get("/docs")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    links = Links()
    links.feed(page.text)
    assert links.found == ["openapi.json"] and not links.tags & {"script", "link", "img", "iframe"}
    assert "@import" not in page.text and "url(" not in page.text
    description = http.get("/openapi.json").json()
    for path in description["paths"]:
        assert path in page.text
    for name in ("guidance_scale", "partial_images", "num_tokens", "Retry-After"):
        assert name in page.text
    assert "422" not in json.dumps(description)
    assert "The API key is missing or wrong: Failure<" in page.text and "Successful Response: Images<" in page.text


def test_a_model_whose_first_group_comes_at_once_is_warmed_up():
    """It has no first token alone."""
    vit, sizes = ViTConfig(16, 1, 2), dict(num_tokens=8, group_size=4, causal_tokens=0, codebook_size=16)
    tokenizer = DetailFlowTokenizer(TokenizerConfig(vit, vit, image_size=16, patch_size=4, codebook_dim=4, **sizes))
    gpt = DetailFlowGPT(GPTConfig(num_classes=2, width=16, depth=1, heads=2, **sizes))
    warm_up(DetailFlowPipeline(tokenizer.eval(), gpt.eval()))
