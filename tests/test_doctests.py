"""The examples in the docstrings of public names."""

import doctest
from types import ModuleType

import pytest

import detailflow
from detailflow import generation, hub, pipeline, schedule
from detailflow.models import gpt, layers, tokenizer


@pytest.mark.parametrize(
    "module", [generation, hub, pipeline, schedule, gpt, layers, tokenizer], ids=lambda module: module.__name__
)
def test_examples(module: ModuleType):
    results = doctest.testmod(module, optionflags=doctest.FAIL_FAST)
    assert results.attempted and not results.failed


def test_every_public_class_has_an_example():
    """The two exceptions need none: an error, and a version."""
    for name in set(detailflow.__all__) - {"DetailFlowError", "__version__"}:
        assert ">>> " in (getattr(detailflow, name).__doc__ or ""), name
