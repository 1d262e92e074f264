"""Runs of both stages on real images, as a user starts them."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml


@pytest.fixture(scope="session")
def stage_commands(
    cifar: Path, model: Path, tokens: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., dict[str, list[str]]]:
    """The command line of each stage with the settings given for it, but for --output."""

    def write(tokenizer: Mapping[str, Any], gpt: Mapping[str, Any]) -> dict[str, list[str]]:
        folder = tmp_path_factory.mktemp("settings")
        settings = {
            "tokenizer": {"data": str(cifar), **tokenizer},
            "gpt": {"tokens": str(tokens), "tokenizer": str(model), **gpt},
        }
        for stage, values in settings.items():
            (folder / f"{stage}.yaml").write_text(yaml.safe_dump(values))
        return {s: ["train", s, "--config", str(folder / f"{s}.yaml"), "--device", "cpu"] for s in settings}

    return write
