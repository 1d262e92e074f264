"""The report of a run in a real browser: nothing is refused or asked for, and it fits a phone."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page

from detailflow.cli.main import main
from detailflow.data.images import open_images
from detailflow.training.run_report import write_run_report


@pytest.fixture(scope="module")
def report(model: Path, cifar: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The address of the report of models that were taken as they are, of a folder with a long name."""
    run = tmp_path_factory.mktemp("runs") / ("a-long-name-" * 8)
    shutil.copytree(model, run)
    settings = ["--data", str(cifar), "--tokenizer", str(model), "--crops", "two", "--val_share", "0.1"]
    assert main(["extract", *settings, "--output", str(run / "tokens"), "--device", "cpu"]) == 0
    write_run_report(run, open_images(cifar), str(cifar), "cpu")
    return (run / "report.html").as_uri()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_the_report(report: str, scheme: str, width: int, new_page: Callable[..., Page]):
    page = new_page(report, "main", viewport={"width": width, "height": 740}, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("[...document.images].every(image => image.naturalWidth > 0)")
    found = Axe().run(page).response["violations"]
    assert [(rule["id"], [node["html"] for node in rule["nodes"]][:2]) for rule in found] == []
