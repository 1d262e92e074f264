"""Compiled generation: the same tokens and pixels, for the number of images that it was compiled for."""

import shutil
from pathlib import Path

import pytest
import torch

from detailflow import DetailFlowPipeline

pytestmark = pytest.mark.skipif(not any(map(shutil.which, ("g++", "c++", "clang++"))), reason="compiling needs a C++ compiler")


def test_compiled_generation(pipeline: DetailFlowPipeline, model: Path, monkeypatch: pytest.MonkeyPatch):
    """In float32: greedy tokens identical, logits within 1e-4 of what they are uncompiled, pixels within 1e-5."""
    compiled = DetailFlowPipeline.from_pretrained(model, "cpu")
    compiled.compile(batch_size=2)
    gpt, classes = compiled.gpt, torch.tensor([1, 4])
    program, seen = gpt._compiled, []
    assert program is not None

    def spy(x: torch.Tensor, *rest: object) -> torch.Tensor:
        seen.append(program(x, *rest))
        return seen[-1]

    gpt._compiled = spy
    greedy = gpt.generate(classes, temperature=0.0, guidance_scale=2.0)
    assert torch.equal(greedy, pipeline.gpt.generate(classes, temperature=0.0, guidance_scale=2.0))
    assert [logits.shape[:2] for logits in seen] == [(4, 1)] * 4 + [(4, 4)] * 3  # both classes twice, for guidance
    with torch.no_grad():
        expected = pipeline.gpt(torch.tensor([1, 4, 5, 5]), greedy.repeat(2, 1))
    torch.testing.assert_close(torch.cat(seen, 1), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(compiled.tokenizer.decode(greedy), pipeline.tokenizer.decode(greedy), atol=1e-5, rtol=0)

    seen.clear()  # sampled images are the same as well, and any other number of images is made as before
    assert [i.tobytes() for i in compiled([1, 4], seed=3)] == [i.tobytes() for i in pipeline([1, 4], seed=3)]
    assert len(seen) == 7
    assert [i.tobytes() for i in compiled([1], seed=3)] == [i.tobytes() for i in pipeline([1], seed=3)]
    assert len(seen) == 7
