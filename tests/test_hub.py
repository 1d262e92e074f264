"""Finding, reading and writing models."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import httpx
import huggingface_hub.errors
import pytest
import torch

from detailflow import DetailFlowGPT, DetailFlowPipeline, DetailFlowTokenizer, hub
from detailflow.convert import convert
from detailflow.errors import DetailFlowError
from detailflow.evaluation.quoted import quotes
from detailflow.evaluation.report import Figure
from detailflow.files import replacing

TINY = Path(__file__).parent / "parity" / "tiny-32"
CONFIG = {"num_tokens": 32, "alpha": 1.5, "class_names": ["chien", "müde"], "encoder": {"width": 8}}


def some_tensors() -> dict[str, torch.Tensor]:
    return {"b": torch.arange(6.0).reshape(2, 3), "a": torch.ones(3, dtype=torch.bfloat16), "scalar": torch.tensor(2.0)}


def error_of(path_or_id: str | Path, kind: str = "tokenizer", **options: str) -> str:
    with pytest.raises(DetailFlowError) as caught:
        hub.load(path_or_id, kind, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    directory = tmp_path / "saved"
    hub.save(directory, "tokenizer", CONFIG, some_tensors())
    return directory


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """A hub that serves the tiny model under any name."""
    asked: list[str] = []

    def snapshot_download(repository: str, allow_patterns: list[str]) -> str:
        weights = {"config.json", "model.safetensors", "config.yaml", "checkpoints/*.pt"} <= set(allow_patterns)
        asked.append(repository if weights else f"{repository}: {allow_patterns}")
        return str(TINY / ("gpt" if repository.endswith("GPT-L") else "tokenizer"))

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(snapshot_download=snapshot_download))
    monkeypatch.chdir(tmp_path)
    return asked


def test_round_trip(saved: Path):
    config, tensors = hub.load(saved, "tokenizer")
    assert config == CONFIG
    assert tensors.keys() == some_tensors().keys()
    for name, tensor in some_tensors().items():
        assert torch.equal(tensors[name], tensor) and tensors[name].dtype == tensor.dtype
    assert sorted(path.name for path in saved.iterdir()) == ["config.json", "model.safetensors"]
    written = json.loads((saved / "config.json").read_text(encoding="utf-8"))
    assert (written["format"], written["kind"]) == ("detailflow", "tokenizer")
    assert len({path.stat().st_mode for path in saved.iterdir()}) == 1


def test_round_trip_of_views(tmp_path: Path):
    matrix = torch.arange(6.0).reshape(2, 3).requires_grad_()
    hub.save(tmp_path, "gpt", {}, {"transposed": matrix.T})
    assert torch.equal(hub.load(tmp_path, "gpt")[1]["transposed"], matrix.detach().T)


def test_loaded_tensors_survive_a_new_save(saved: Path):
    tensors = hub.load(saved, "tokenizer")[1]
    hub.save(saved, "tokenizer", {"new": 1}, {"b": torch.zeros(2, 3)})
    assert torch.equal(tensors["b"], some_tensors()["b"])
    config, new = hub.load(saved, "tokenizer")
    assert config == {"new": 1} and new.keys() == {"b"}


def test_a_failed_save_changes_nothing(saved: Path):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    with pytest.raises(RuntimeError), replacing(saved / "config.json") as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


def test_saving_where_a_file_lies(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DetailFlowError, match="could not write the model to .*file"):
        hub.save(tmp_path / "file", "gpt", {}, {})
    with pytest.raises(DetailFlowError, match="could not write the model to .*deeper"):
        hub.save(tmp_path / "file" / "deeper", "gpt", {}, {})


def test_published_model_converts(tmp_path: Path):
    for kind in ("tokenizer", "gpt"):
        config, tensors = hub.load(TINY, kind)
        hub.save(tmp_path / kind, kind, config, tensors)
        again, loaded = hub.load(tmp_path, kind)
        assert again == config
        assert hub.fingerprint(again, loaded) == hub.fingerprint(config, tensors)


def test_fingerprint_sees_every_part():
    def variant(**changes: torch.Tensor) -> str:
        return hub.fingerprint(CONFIG, some_tensors() | changes)

    reference = variant()
    assert len(reference) == 64
    assert reference == hub.fingerprint(dict(reversed(CONFIG.items())), dict(reversed(some_tensors().items())))
    tensors = some_tensors()
    others = [
        hub.fingerprint(CONFIG | {"alpha": 2.0}, tensors),
        hub.fingerprint(CONFIG, {("c" if name == "b" else name): tensor for name, tensor in tensors.items()}),
        variant(b=tensors["b"].reshape(3, 2)),
        variant(b=tensors["b"].view(torch.int32)),
        variant(b=tensors["b"].index_fill(1, torch.tensor([2]), 0.5)),
        variant(scalar=torch.tensor(3.0)),
    ]
    assert len({reference, *others}) == len(others) + 1


def test_fingerprint_takes_views():
    matrix = torch.arange(6.0).reshape(2, 3)
    assert hub.fingerprint({}, {"a": matrix.T}) == hub.fingerprint({}, {"a": matrix.T.contiguous()})


def test_folder_with_both_kinds():
    assert hub.resolve(TINY, "gpt") == TINY / "gpt"
    assert hub.resolve(TINY / "gpt", "gpt") == TINY / "gpt"
    assert hub.load(str(TINY), "gpt", variant="model")[0]["num_classes"] == 10


def test_the_shipped_model():
    assert hub.resolve(None, "gpt") == hub.resolve("shipped", "gpt") == hub.packaged_folder("gpt")
    assert hub.packaged_folder("gpt").parts[-4:] == ("detailflow", "weights", "shipped", "gpt")
    assert hub.resolve("emoji-64", "gpt") == hub.packaged_folder("gpt", "emoji-64")


@pytest.mark.parametrize("name", hub.PACKAGED)
def test_a_folder_of_ones_own_goes_before_a_model_in_the_package(
    name: str, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(saved, name)
    assert hub.resolve(name, "tokenizer") == Path(name)


@pytest.mark.parametrize("name", ["detailflow-16", "ByteFlow-AI/DetailFlow-16"])
def test_a_folder_by_the_name_of_a_published_model_is_not_that(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    ours = {"PSNR": Figure(20.0)}
    assert hub.zoo_model(name) and quotes(name, ours)
    convert(TINY, Path(name))
    assert hub.zoo_model(name) is None and not quotes(name, ours)
    fetched = []

    def fetch(repository: str, patterns: object, revision: str, advice: str) -> Path:
        fetched.append((repository, revision))
        return Path(TINY / "gpt")

    monkeypatch.setattr(hub.hub_client, "fetch", fetch)
    assert hub.resolve(f"{name}@v1", "gpt") == TINY / "gpt"  # only models on the hub have a revision
    assert fetched == [("ByteFlow-AI/DetailFlow-16-GPT-L", "v1")]
    assert hub.resolve(name, "gpt") == Path(name) / "gpt" and len(fetched) == 1
    convert(name, tmp_path / "copy")
    assert "base_model" not in (tmp_path / "copy" / "README.md").read_text()


def test_wrong_kind_names_both(saved: Path):
    assert "holds a tokenizer, not an AR model (gpt)" in error_of(saved, "gpt")
    assert "holds a tokenizer, not an AR model (gpt)" in error_of(TINY / "tokenizer", "gpt")


def test_unknown_kind(saved: Path):
    config = json.loads((saved / "config.json").read_text())
    for kind in ("discriminator", None, ["gpt"]):
        (saved / "config.json").write_text(json.dumps(config | {"kind": kind}))
        assert "not a tokenizer" in error_of(saved)


def test_bad_variant(saved: Path):
    for directory in (saved, TINY):
        assert "variant must be 'ema' or 'model', not 'best'" in error_of(directory, variant="best")


def test_typo_in_config(saved: Path):
    path = saved / "config.json"
    path.write_text(path.read_text().replace('"alpha": 1.5,', '"alpha": 1.5'))
    message = error_of(saved)
    assert "config.json is not valid JSON (Expecting ',' delimiter, line " in message
    assert message.endswith("): correct the file, or get it again from where it came")


@pytest.mark.parametrize("kind", ["tokenizer", "gpt"])
@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b'{"format": "detailflow", "kind', "config.json is not valid JSON (Unterminated string starting at, line 1"),
        (b"", "config.json is not valid JSON (Expecting value, line 1, column 1): correct the file, or get it again"),
        (b"\xff\xfe\x00", "config.json is not valid JSON (UTF-8 text with one object): correct the file, or get it"),
        (b"[1]", "config.json must hold a JSON object, not a list: correct the file, or get it again"),
        (
            b"{}",
            'config.json is not a DetailFlow config: it lacks "format": "detailflow", so give another model, or get',
        ),
    ],
)
def test_a_damaged_config_is_named_with_what_to_do(
    kind: str, content: bytes, problem: str, model: Path, tmp_path: Path
):
    """In a folder with both models."""
    folder = Path(shutil.copytree(model, tmp_path / "both"))
    (folder / kind / "config.json").write_bytes(content)
    with pytest.raises(DetailFlowError) as refused:
        DetailFlowPipeline.from_pretrained(folder)
    assert str(refused.value).startswith(f"{folder}/{kind}/{problem}")


@pytest.mark.parametrize("kind", ["tokenizer", "gpt"])
def test_a_wrong_value_is_named_with_its_config(kind: str, model: Path, tmp_path: Path):
    folder = Path(shutil.copytree(model, tmp_path / "both"))
    path = folder / kind / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_tokens": "many"}))
    with pytest.raises(
        DetailFlowError, match=f"the {kind} config of .*/both: num_tokens must be an integer, not 'many'"
    ):
        DetailFlowPipeline.from_pretrained(folder)


def test_config_of_something_else(saved: Path):
    (saved / "config.json").write_text('{"model_type": "bert"}')
    assert 'it lacks "format": "detailflow"' in error_of(saved)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_missing_file(saved: Path, file: str):
    (saved / file).unlink()
    message = error_of(saved)
    assert str(saved) in message and f"has no {file}" in message


@pytest.mark.parametrize("size", [0, 4, 60, -1])
def test_truncated_weights(saved: Path, size: int):
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    assert "model.safetensors: it is damaged or incomplete" in error_of(saved)


def test_weights_that_are_a_folder(saved: Path):
    (saved / "model.safetensors").unlink()
    (saved / "model.safetensors").mkdir()
    assert "could not read" in error_of(saved)


def test_empty_folder(tmp_path: Path):
    assert "expected a model folder, or one with tokenizer/ and gpt/ inside" in error_of(tmp_path)


@pytest.mark.parametrize(
    "path",
    ["./nowhere", "/nowhere", "../nowhere/else", "a/b/c", "~/nowhere-at-all", "~nobody/x", "runs/", "/" + "x" * 300],
)
def test_no_such_folder(path: str, downloads: list[str]):
    assert error_of(path) == f"there is no such folder: {path}"
    assert downloads == []


def test_a_path_object_is_never_downloaded(downloads: list[str]):
    assert "no such folder" in error_of(Path("owner/name"))
    assert "no such folder" in error_of(Path("detailflow-16"))
    assert downloads == []


@pytest.mark.parametrize("name", ["detailflow-17", ""])
def test_unknown_name(name: str, downloads: list[str]):
    assert f"unknown model {name!r}" in error_of(name) and "detailflow-16" in error_of(name)


def test_a_file_instead_of_its_folder(saved: Path):
    assert "is a file: give the folder" in error_of(saved / "model.safetensors")


def test_neither_a_file_nor_a_folder():
    assert error_of("/dev/null").startswith("/dev/null is no folder: give one that holds config.json")


def test_hub_name(downloads: list[str]):
    assert hub.load("someone/model", "tokenizer")[0]["num_tokens"] == 32
    assert downloads == ["someone/model: ['config.json', 'tokenizer/config.json']", "someone/model"]


def test_configs_are_downloaded_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, saved: Path):
    """A repository of another kind, named by mistake, may be very large; and some commands need no weights."""
    asked: list[list[str]] = []

    def snapshot_download(repository: str, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        return str(saved if repository == "me/mine" else tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    message = "'some/llm' on the Hugging Face hub holds no DetailFlow model"
    assert error_of("some/llm", "gpt") == message
    with pytest.raises(DetailFlowError, match=message):
        hub.find("some/llm")
    assert hub.load_config("me/mine", "tokenizer") == CONFIG
    assert len(asked) == 3 and not any("safetensors" in pattern for patterns in asked for pattern in patterns)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("RevisionNotFoundError", "'me/mine' on the Hugging Face hub has no revision 'v7'"),
        ("GatedRepoError", "'me/mine' on the Hugging Face hub is gated: accept its terms there, and log in"),
        ("RepositoryNotFoundError", "it is not there, or private; check the name (owner/name)"),
    ],
)
def test_why_a_download_failed(kind: str, message: str, monkeypatch: pytest.MonkeyPatch):
    def snapshot_download(*_: object, **__: object) -> str:
        response = httpx.Response(404, request=httpx.Request("GET", "https://huggingface.co/me/mine"))
        raise getattr(huggingface_hub.errors, kind)("404 Client Error.\nRequest ID: 1", response=response)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert message in error_of("me/mine@v7")


@pytest.mark.parametrize("name", ["detailflow-16", "detailflow-32", "detailflow-64"])
def test_zoo_shorthand(name: str, downloads: list[str]):
    hub.load(name, "tokenizer")
    hub.load(name, "gpt")
    hub_name = name.replace("detailflow", "ByteFlow-AI/DetailFlow")
    assert downloads == [hub_name, f"{hub_name}-GPT-L"]


def test_an_existing_folder_comes_first(downloads: list[str]):
    shutil.copytree(TINY, "detailflow-16")
    hub.load("detailflow-16", "gpt")
    assert downloads == []


@pytest.mark.parametrize(("num_tokens", "scale"), [(128, 1.45), (256, 1.5), (512, 1.32), (32, 1.5)])
def test_guidance_of_published_models(tmp_path: Path, num_tokens: int, scale: float):
    directory = Path(shutil.copytree(TINY / "gpt", tmp_path / "gpt"))
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"block_size": num_tokens}))
    assert hub.load(directory, "gpt")[0]["guidance_scale"] == scale


@pytest.mark.parametrize("failure", [OSError("no route\nto host."), ValueError(), KeyError("x")], ids=repr)
def test_failed_download(monkeypatch: pytest.MonkeyPatch, failure: Exception):
    def snapshot_download(*arguments: object, **options: object) -> str:
        raise failure

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(snapshot_download=snapshot_download))
    message = error_of("detailflow-16", "gpt")
    assert "could not download 'ByteFlow-AI/DetailFlow-16-GPT-L'" in message and "local folder" in message
    both = "https://huggingface.co/ByteFlow-AI/DetailFlow-16 and https://huggingface.co/ByteFlow-AI/DetailFlow-16-GPT-L"
    assert f"detailflow-16 is not a local folder, and stands for two repositories, {both}: " in message
    assert message.endswith("or give a local folder that holds copies of both")
    assert "two repositories" not in error_of("someone/model", "gpt")


def test_an_empty_download(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    nothing = SimpleNamespace(snapshot_download=lambda *arguments, **options: str(tmp_path))
    monkeypatch.setitem(sys.modules, "huggingface_hub", nothing)
    assert "holds no DetailFlow model" in error_of("someone/model")
    nothing.snapshot_download = lambda *arguments, **options: str(tmp_path / "never-made")
    assert "'someone/model' on the Hugging Face hub holds no such model" in error_of("someone/model")


def test_without_the_hub_client(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "could not download 'someone/model'" in error_of("someone/model")


def test_a_folder_with_two_models_of_any_name(tmp_path: Path):
    shutil.copytree(TINY / "tokenizer", tmp_path / "DetailFlow-16")
    shutil.copytree(TINY / "gpt", tmp_path / "DetailFlow-16-GPT-L")
    (tmp_path / "else").mkdir()
    assert hub.resolve(tmp_path, "tokenizer").name == "DetailFlow-16"
    assert hub.resolve(tmp_path, "gpt").name == "DetailFlow-16-GPT-L"
    shutil.copytree(TINY / "gpt", tmp_path / "GPT-XL")
    assert "holds several models of that kind (DetailFlow-16-GPT-L, GPT-XL): give one" in error_of(tmp_path, "gpt")


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """A folder with two published pairs, named as on the hub."""
    for name in ("DetailFlow-16", "DetailFlow-32"):
        shutil.copytree(TINY / "tokenizer", tmp_path / "all" / name)
        shutil.copytree(TINY / "gpt", tmp_path / "all" / f"{name}-GPT-L")
    return tmp_path / "all"


def test_either_half_of_a_pair_of_folders(pairs: Path, monkeypatch: pytest.MonkeyPatch):
    for given in (pairs / "DetailFlow-16", pairs / "DetailFlow-16-GPT-L"):
        assert hub.resolve(given, "tokenizer") == pairs / "DetailFlow-16"
        assert hub.resolve(given, "gpt") == pairs / "DetailFlow-16-GPT-L"
        assert list(hub.find(given).values()) == [given]  # what is converted is what was named
    monkeypatch.chdir(pairs / "DetailFlow-32")
    assert hub.resolve(".", "gpt") == pairs / "DetailFlow-32-GPT-L"
    (pairs / "DetailFlow-32-GPT-L" / "config.json").unlink()
    message = error_of(pairs / "DetailFlow-32", "gpt")
    assert message.endswith("not an AR model (gpt): give an AR model (gpt), or a folder that holds both")
    shutil.copytree(TINY / "tokenizer", pairs / "DetailFlow-64-GPT-L")  # of that name, but no AR model
    shutil.copytree(TINY / "tokenizer", pairs / "DetailFlow-64")
    assert hub.resolve(pairs / "DetailFlow-64", "gpt") == pairs / "DetailFlow-64"


def test_several_pairs_in_one_folder(pairs: Path):
    message = error_of(pairs)
    names = "(DetailFlow-16, DetailFlow-32): give one"
    assert message.startswith(f"{pairs} holds several models of that kind {names}, such as {pairs}")
    given = message.partition("such as ")[2].partition(";")[0]
    assert hub.resolve(given, "gpt") == pairs / "DetailFlow-16-GPT-L"
    (pairs / "DetailFlow-16").rename(pairs / "other")
    (pairs / "DetailFlow-32").rename(pairs / "another")
    assert error_of(pairs).endswith("give one AR model, and its tokenizer")


def test_a_pair_beside_published_ones(tmp_path: Path, model: Path):
    own = Path(shutil.copytree(model, tmp_path / "own"))
    shutil.copytree(own / "gpt", own / "gpt-large")  # of ours: those named tokenizer and gpt go before others
    assert hub.resolve(own, "gpt") == own / "gpt"
    shutil.copytree(TINY / "tokenizer", own / "DetailFlow-16")
    shutil.copytree(TINY / "gpt", own / "DetailFlow-16-GPT-L")
    assert "several models of that kind (tokenizer, DetailFlow-16): give one, such as" in error_of(own)
    assert "several models of that kind (gpt, DetailFlow-16-GPT-L): give one, such as" in error_of(own, "gpt")


def test_a_checkpoint_by_its_path(tmp_path: Path):
    gpt = Path(shutil.copytree(TINY / "gpt", tmp_path / "gpt"))
    first = gpt / "checkpoints" / "32.pt"
    first.rename(gpt / "checkpoints" / "early.pt")
    shutil.copy(gpt / "checkpoints" / "early.pt", gpt / "checkpoints" / "late.pt")
    assert "(early.pt, late.pt) but no 32.pt: give one of them by its path" in error_of(gpt, "gpt")
    chosen = gpt / "checkpoints" / "late.pt"
    assert hub.load(str(chosen), "gpt")[0]["num_tokens"] == 32
    assert "holds an AR model (gpt), not a tokenizer" in error_of(chosen, "tokenizer")
    assert "is a file: give the folder" in error_of(gpt / "config.json", "gpt")


def test_a_revision(monkeypatch: pytest.MonkeyPatch):
    asked = []

    def snapshot_download(repository: str, revision: str | None = None, **options: object) -> str:
        asked.append((repository, revision))
        return str(TINY / ("gpt" if "GPT" in repository else "tokenizer"))

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    DetailFlowPipeline.from_pretrained("detailflow-16", revision="v1", device="cpu")
    DetailFlowTokenizer.from_pretrained("someone/model", revision="abc")
    expected = [
        ("ByteFlow-AI/DetailFlow-16", "v1"),
        ("ByteFlow-AI/DetailFlow-16-GPT-L", "v1"),
        *[("someone/model", "abc")] * 2,  # configs first
    ]
    assert asked == expected
    for loader, place in ((DetailFlowGPT, TINY), (DetailFlowTokenizer, str(TINY)), (DetailFlowPipeline, None)):
        with pytest.raises(
            DetailFlowError, match="is on this machine, and only models on the hub have a revision: leave it out"
        ):
            loader.from_pretrained(place, revision="v1")


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("someone/model@v1", ("someone/model", "v1")),
        ("detailflow-16@refs/pr/1", ("detailflow-16", "refs/pr/1")),
        ("detailflow-16", ("detailflow-16", None)),
        ("someone/model@", ("someone/model@", None)),
        ("here@now", ("here@now", None)),
    ],
)
def test_a_revision_in_the_name(
    name: str, parts: tuple[str, str | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "here@now").mkdir()
    monkeypatch.chdir(tmp_path)
    assert hub.split_revision(name) == parts


class FakeHub:
    """Takes what is uploaded, as `huggingface_hub.HfApi` does."""

    calls: ClassVar[list[tuple]] = []
    files: ClassVar[set[str]] = set()

    def create_repo(self, repository: str, **options: object) -> None:
        self.calls.append(("repository", repository, options["private"]))

    def create_branch(self, repository: str, *, branch: str, exist_ok: bool) -> None:
        self.calls.append(("branch", branch))

    def list_repo_files(self, repository: str, *, revision: str | None) -> list[str]:
        return sorted(self.files)

    def upload_folder(self, *, repo_id: str, folder_path: str, revision: str | None, commit_message: str) -> str:
        self.files.update(str(p.relative_to(folder_path)) for p in Path(folder_path).rglob("*") if p.is_file())
        self.calls.append(("upload", repo_id, revision, commit_message))
        return f"https://hub/{repo_id}/commit/1"


def test_push_to_hub(pipeline: DetailFlowPipeline, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.HfApi", FakeHub)
    assert pipeline.push_to_hub("me/mine", private=True, revision="v2") == "https://hub/me/mine/commit/1"
    upload = ("upload", "me/mine", "v2", "Upload a DetailFlow model")
    assert FakeHub.calls == [("repository", "me/mine", True), ("branch", "v2"), upload]
    assert FakeHub.files == {f"{k}/{f}" for k in ("tokenizer", "gpt") for f in ("config.json", "model.safetensors")}
    assert pipeline.push_to_hub("me/mine") == "https://hub/me/mine/commit/1"
    monkeypatch.setattr(FakeHub, "files", {"config.json", "model.safetensors"})
    with pytest.raises(
        DetailFlowError,
        match="'me/mine' on the Hugging Face hub holds one model, which would hide a pair: push to another",
    ):
        pipeline.push_to_hub("me/mine")
    monkeypatch.setattr(FakeHub, "files", set[str]())
    with pytest.raises(DetailFlowError, match="revision must be text, not 3"):
        pipeline.push_to_hub("me/mine", revision=3)  # type: ignore[arg-type]
    with pytest.raises(DetailFlowError, match="a repository on the hub is named owner/name, not 'mine'"):
        pipeline.push_to_hub("mine")
    with pytest.raises(DetailFlowError, match="a repository on the hub is named owner/name, not 3"):
        pipeline.push_to_hub(3)  # type: ignore[arg-type]

    def refuse(self: object, **options: object) -> None:
        raise OSError("401 Client Error.\nlog in")

    monkeypatch.setattr(FakeHub, "upload_folder", refuse)
    with pytest.raises(DetailFlowError) as caught:
        pipeline.push_to_hub("me/mine")
    assert str(caught.value) == (
        "could not upload the model to 'me/mine' on the Hugging Face hub (401 Client Error): "
        "check the name, the connection and that you are logged in (hf auth login)"
    )


def test_either_half_of_a_zoo_pair_stands_for_both(monkeypatch: pytest.MonkeyPatch):
    asked = []

    def snapshot_download(repository: str, **options: object) -> str:
        asked.append(repository)
        return str(TINY / ("gpt" if "GPT" in repository else "tokenizer"))

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    for name in ("detailflow-32", "ByteFlow-AI/DetailFlow-32", "ByteFlow-AI/DetailFlow-32-GPT-L"):
        hub.load(name, "tokenizer")
        hub.load(name, "gpt")
    assert asked == ["ByteFlow-AI/DetailFlow-32", "ByteFlow-AI/DetailFlow-32-GPT-L"] * 3


def test_the_config_alone(saved: Path):
    assert hub.load_config(TINY, "gpt") == hub.load(TINY, "gpt")[0]
    assert hub.load_config(TINY, "tokenizer") == hub.load(TINY, "tokenizer")[0]
    (saved / "model.safetensors").unlink()
    assert hub.load_config(saved, "tokenizer") == CONFIG


def test_loading_imports_no_compiler():
    """Building a network on the meta device must not pull in what only torch.compile needs: a second of every start."""
    code = (
        "import sys, torch; before = set(sys.modules)\n"
        "from detailflow import DetailFlowPipeline\n"
        "DetailFlowPipeline.from_pretrained(device='cpu')\n"
        "print(sorted(({'torch._dynamo', 'sympy', 'torch._inductor'} & set(sys.modules)) - before))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


def test_the_shipped_model_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A local folder of that name comes first."""
    assert hub.resolve("shipped", "gpt") == hub.resolve(None, "gpt") and hub.find("shipped").keys() == {
        "tokenizer",
        "gpt",
    }
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shipped").mkdir()
    assert hub.resolve("shipped", "gpt") == Path("shipped")
