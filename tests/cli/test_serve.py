"""`detailflow serve`: what its options refuse. tests/serving has what it serves."""

import socket
import sys
from pathlib import Path

import pytest

from detailflow.cli.main import main
from detailflow.cli.serve import _model_name
from detailflow.errors import DetailFlowError
from detailflow.serving.options import ServeConfig


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch):
    for name in ("DETAILFLOW_API_KEY", "DETAILFLOW_MAX_PIXELS"):
        monkeypatch.setenv(name, "")  # so that it is put back whatever a command sets
        monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            "--host 0.0.0.0",
            "0.0.0.0 can be reached by others: set a key in the environment variable DETAILFLOW_API_KEY",
        ),
        ("--host ::", ":: can be reached by others"),
        ("--api-key MY_KEY", "--api-key names the environment variable 'MY_KEY', which is not set"),
        ("--api-key=", "--api-key is empty: name the environment variable that has the key, or leave it out"),
        ("--api-key= --no-auth", "--api-key and --no-auth contradict each other"),
        ("--host=", "--host is empty: give an address of this machine, such as 127.0.0.1"),
        ("--timeout inf", "--timeout must be a finite number of seconds, not inf"),
        ("--api-key MY_KEY --no-auth", "--api-key and --no-auth contradict each other"),
        ("--host 256.0.0.1", "cannot listen on 256.0.0.1 port 0"),
        ("--port 70000", "--port must be 0 to 65535, not 70000"),
        ("--model ./nowhere/model", "nowhere/model"),
        ("--device cpu --engine graphs", "the graphs engine cannot run this model"),
        ("--device cpu --engine native --dtype float16", "the native engine cannot run this model: it needs plain"),
        ("--model-name a?b", "'a?b' cannot be a model's name"),
        ("--batch-window -1", "--batch-window must be 0 or more, not -1.0"),
        ("--timeout 0", "--timeout must be above 0 seconds, not 0.0"),
        ("--max-upload 2048", "--max-upload must be at most 2,047, not 2048"),
        ("--max-queue 8", "--max-queue must be at least --max-images, or a request of 16 images"),
        ("--max-batch 0", "--max-batch must be a positive integer, not 0"),
        ("--max-pixels 0", "the limit on pixels"),
    ],
)
def test_what_cannot_be_served(argv: str, message: str, capsys: pytest.CaptureFixture[str]):
    try:
        assert main(["serve", *(["--port", "0"] if "--port" not in argv else []), *argv.split()]) == 2
    except OSError:
        pytest.fail("this machine has no IPv6")
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("detailflow: error: ") and message in err and err.count("\n") == 1


@pytest.mark.parametrize("key", ["schlüssel\n", "schluessel ", " schluessel"])
def test_a_key_is_characters_of_a_header(key: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Spaces at its ends do not arrive: no client could ever send it."""
    monkeypatch.setenv("DETAILFLOW_API_KEY", key)
    assert main(["serve", "--port", "0"]) == 2
    out, err = capsys.readouterr()
    assert "the API key must be printable ASCII characters" in err and "schl" not in out + err


@pytest.mark.parametrize(
    ("options", "advice"),
    [
        ([], "give it the key, or unset it to ask for none\n"),
        (["--api-key", "DETAILFLOW_API_KEY"], "give it the key\n"),
    ],
)
def test_an_empty_key_is_not_no_key(
    options: list[str], advice: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """As of a variable that should have been filled in."""
    monkeypatch.setenv("DETAILFLOW_API_KEY", "")
    assert main(["serve", "--port", "0", *options, "--model", "./nowhere"]) == 2
    assert f"the environment variable DETAILFLOW_API_KEY is empty: {advice}" in capsys.readouterr().err


def test_a_port_that_is_taken(capsys: pytest.CaptureFixture[str]):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", "--port", str(port)]) == 2
    assert f"cannot listen on 127.0.0.1 port {port} (Address already in use)" in capsys.readouterr().err


def test_the_name_of_a_model_is_no_path(tmp_path: Path):
    (tmp_path / "photos").mkdir()
    assert _model_name(None, str(tmp_path / "photos")) == "photos"
    assert _model_name(None, "detailflow-16") == "detailflow-16"
    assert _model_name(None, "someone/model") == "someone/model"
    assert _model_name("mine", str(tmp_path)) == "mine"
    assert _model_name(None, None) == "detailflow-cifar10"


def test_without_its_extra(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    for name in [name for name in sys.modules if name.startswith("detailflow.serving")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    assert main(["serve"]) == 2
    assert "serve needs the package fastapi: install it with pip install 'detailflow[serve]'" in capsys.readouterr().err


def test_a_service_in_python_is_told_of_its_own_arguments():
    with pytest.raises(DetailFlowError, match="max_queue must be at least max_images, .*; it is 4"):
        ServeConfig(max_queue=4)
