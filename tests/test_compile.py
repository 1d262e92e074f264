"""Compiled generation: the same tokens and pixels, for the number of images that it was compiled for."""

import shutil
from pathlib import Path

import pytest
import torch

from detailflow import DetailFlowPipeline
from detailflow.cli.main import main
from detailflow.errors import DetailFlowError

compiles = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "c++", "clang++"))), reason="compiling needs a C++ compiler"
)


@compiles
def test_compiled_generation(pipeline: DetailFlowPipeline, model: Path, monkeypatch: pytest.MonkeyPatch):
    """In float32: greedy tokens identical, logits within 1e-4 of what they are uncompiled, pixels within 1e-5."""
    compiled = DetailFlowPipeline.from_pretrained(model, device="cpu")
    compiled.compile(batch_size=2)
    gpt, classes = compiled.gpt, torch.tensor([1, 4])
    program, seen = gpt.program, []
    assert program is not None

    def spy(x: torch.Tensor, *rest: object) -> torch.Tensor:
        seen.append(program(x, *rest))
        return seen[-1]

    gpt.program = spy
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


@compiles
def test_compiled_generation_of_one_image(pipeline: DetailFlowPipeline, model: Path):
    """Its single tokens are computed twice over, as the library takes longer for two rows than for four."""
    gpt, classes = DetailFlowPipeline.from_pretrained(model, device="cpu").gpt, torch.tensor([3])
    gpt.compile_generation(1)
    program, shapes = gpt.program, []
    assert program is not None

    def spy(x: torch.Tensor, *rest: object) -> torch.Tensor:
        shapes.append(tuple(x.shape[:2]))
        return program(x, *rest)

    gpt.program = spy
    greedy = gpt.generate(classes, temperature=0.0, guidance_scale=2.0)
    assert torch.equal(greedy, pipeline.gpt.generate(classes, temperature=0.0, guidance_scale=2.0))
    assert shapes == [(2, 2)] * 4 + [(2, 4)] * 3


def test_where_nothing_can_be_compiled(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """One sentence, before anything is written."""

    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("No working C++ compiler found\nin many words")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: fails)
    argv = [
        "generate",
        "--model",
        str(model),
        "--device",
        "cpu",
        "--output",
        str(tmp_path / "new"),
        "--num-images",
        "4",
        "--compile",
    ]
    assert main([*argv, "--batch-size", "2"]) == 2
    assert (
        "nothing can be compiled here, which needs a C++ compiler: No working C++ compiler found\n"
        in capsys.readouterr().err
    )
    assert main([*argv, "--batch-size", "8"]) == 2
    assert "--compile is for batches of 8, and 4 images fill none" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    with pytest.raises(DetailFlowError, match="batch_size must be"):
        DetailFlowPipeline.from_pretrained(model, device="cpu").compile(0)


@compiles
@pytest.mark.slow
def test_commands_that_compile(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """The benchmark has rows for it, and a set of images keeps apart what was compiled and what was not."""
    place = ["--model", str(model), "--device", "cpu"]
    assert (
        main(
            ["bench", *place, "--compile", "--batch-sizes", "1", "--dtypes", "float32", "--repeats", "1", "--no-naive"]
        )
        == 0
    )
    assert {"generate, compiled", "decode, compiled"} <= {
        line[:18].strip() for line in capsys.readouterr().out.splitlines()
    }
    argv = ["generate", *place, "--num-images", "4", "--batch-size", "2", "--output", str(tmp_path / "set")]
    assert main([*argv, "--compile"]) == 0
    assert len(list((tmp_path / "set").glob("*.png"))) == 4
    assert main(argv) == 2
    assert main([*argv, "--compile"]) == 0
