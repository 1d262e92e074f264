"""benchmarks/soak.py for seconds: all kinds of clients at once, and a server that is killed under them."""

import base64
import runpy
from pathlib import Path
from typing import Any

import pytest
from answers import png

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "soak.py"


@pytest.fixture(scope="module")
def soak() -> dict[str, Any]:
    return runpy.run_path(str(SCRIPT))


@pytest.mark.slow
def test_nothing_is_lost(soak: dict[str, Any], model: Path, capsys: pytest.CaptureFixture[str]):
    status = soak["main"](["--model", str(model), "--clients", "16", "--seconds", "10"])
    out, err = capsys.readouterr()
    assert status == 0, err
    for outcome in ("completed", "streamed", "completed, slowly", "left", "bad request", "compared"):
        assert outcome in out
    assert "detailflow_queue_images 0.0" in out


@pytest.mark.slow
def test_a_server_that_is_killed_gives_no_half_images(
    soak: dict[str, Any], model: Path, capsys: pytest.CaptureFixture[str]
):
    status = soak["main"](["--model", str(model), "--clients", "8", "--seconds", "20", "--kill-every", "3"])
    out, err = capsys.readouterr()
    assert status == 0, err
    assert "failed" in out and "completed" in out


def test_a_wrong_image_is_noticed(soak: dict[str, Any], pipeline: Any):
    """The check itself can fail: another seed, half a file, an image too few."""

    def image(seed: int) -> str:
        return base64.b64encode(png(pipeline(1, seed=seed)[0])).decode()

    found = soak["Soak"]("", {"num_classes": 5, "stages": []}, False)
    body = {"prompt": "1", "n": 1, "seed": 3}
    assert found.check(body, [image(3)], "completed") == "completed"
    assert found.compare(pipeline) == 1 and not found.problems
    assert found.check(body, [image(4)], "completed") == "completed"
    assert found.compare(pipeline) == 2 and "is not the pipeline's" in found.problems[0]
    assert found.check(body, [], "completed") == "problem"
    whole = base64.b64decode(image(3))
    for half in (whole[: len(whole) // 2], whole[:-20]):
        with pytest.raises((OSError, SyntaxError)):
            soak["whole"](base64.b64encode(half).decode())
