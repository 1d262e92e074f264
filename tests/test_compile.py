"""Compiled generation for one number of images, with static caches: on a CPU by the same steps, uncompiled."""

from pathlib import Path
from typing import Any

import pytest
import torch

from detailflow import DetailFlowPipeline
from detailflow.cli.main import main
from detailflow.device import compiled
from detailflow.errors import DetailFlowError


def test_steps_of_fixed_shapes(pipeline: DetailFlowPipeline, model: Path):
    """In float32: greedy tokens identical, logits within 1e-4 of teacher forcing; other numbers of images as before."""
    fixed = DetailFlowPipeline.from_pretrained(model, device="cpu", engine="torch")
    gpt, classes, seen = fixed.gpt, torch.tensor([1, 4]), []

    def spy(x: torch.Tensor, *rest: object) -> torch.Tensor:
        seen.append(gpt.logits(x, *rest))
        return seen[-1]

    gpt.program, gpt.compiled_for = spy, 2
    fixed.tokenizer.program, fixed.tokenizer.compiled_for = fixed.tokenizer.decoder, 2
    greedy = gpt.generate(classes, temperature=0.0, guidance_scale=2.0)
    assert torch.equal(greedy, pipeline.gpt.generate(classes, temperature=0.0, guidance_scale=2.0))
    assert [logits.shape[:2] for logits in seen] == [(4, 1)] * 4 + [(4, 4)] * 3  # both classes twice, for guidance
    with torch.no_grad():
        expected = pipeline.gpt(torch.tensor([1, 4, 5, 5]), greedy.repeat(2, 1))
    torch.testing.assert_close(torch.cat(seen, 1), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(fixed.tokenizer.decode(greedy), pipeline.tokenizer.decode(greedy), atol=1e-5, rtol=0)

    seen.clear()
    assert [i.tobytes() for i in fixed([1, 4], seed=3)] == [i.tobytes() for i in pipeline([1, 4], seed=3)]
    assert len(seen) == 7
    assert [i.tobytes() for i in fixed([1], seed=3)] == [i.tobytes() for i in pipeline([1], seed=3)]
    assert len(seen) == 7


def test_one_block_is_compiled_for_all_layers(
    model: Path, pipeline: DetailFlowPipeline, monkeypatch: pytest.MonkeyPatch
):
    """Once for one token and once for a group; the tokens are as before."""
    graphs = []

    def compile_one(function: Any, device: torch.device) -> Any:
        def keep(graph: torch.fx.GraphModule, inputs: object) -> Any:
            graphs.append(graph)
            return graph.forward

        return torch.compile(function, backend=keep, dynamic=False, fullgraph=True)

    monkeypatch.setattr("detailflow.models.pretrained.compiled", compile_one)
    fixed = DetailFlowPipeline.from_pretrained(model, device="cpu", engine="torch")
    assert len(fixed.gpt.blocks) > 1
    fixed.gpt.compile_generation(2)
    greedy = fixed.gpt.generate(torch.tensor([1, 4]), temperature=0.0, guidance_scale=2.0)
    assert torch.equal(greedy, pipeline.gpt.generate(torch.tensor([1, 4]), temperature=0.0, guidance_scale=2.0))
    assert len(graphs) == 2


def test_what_cannot_be_compiled(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """One sentence, before anything is written."""

    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("Cannot find a working triton installation.\nin many words")

    place = ["--model", str(model), "--device", "cpu"]
    argv = ["generate", *place, "--output", str(tmp_path / "new"), "--num-images", "4", "--compile"]
    assert main([*argv, "--batch-size", "2"]) == 2
    assert "compiling is for GPUs: on a CPU the native engine is faster" in capsys.readouterr().err
    assert main([*argv, "--batch-size", "8"]) == 2
    assert "--compile is for batches of 8, and 4 images fill none" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    assert main(["bench", *place, "--compile"]) == 2
    with pytest.raises(DetailFlowError, match="batch_size must be"):
        DetailFlowPipeline.from_pretrained(model, device="cpu").compile(0)
    monkeypatch.setattr(torch, "compile", lambda *_, **__: fails)
    with pytest.raises(DetailFlowError, match=r"needs Triton: Cannot find a working triton installation$"):
        compiled(torch.sin, torch.device("meta"))
