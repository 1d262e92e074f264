"""What the benchmark counts, the loop that it compares with, and its table. How fast anything is no test can say."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from detailflow import DetailFlowPipeline, benchmark, machine
from detailflow.cli.main import main
from detailflow.errors import DetailFlowError


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("n", [None, 4, 12])
def test_operations_are_those_that_torch_counts(pipeline: DetailFlowPipeline, batch: int, n: int | None):
    """torch counts products of matrices as they run, attention's as well where it is done by products."""
    gpt, tokenizer = pipeline.gpt, pipeline.tokenizer

    def counted(run: Callable[[], torch.Tensor]) -> tuple[int, torch.Tensor]:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            result = run()
        return counter.get_total_flops(), result

    def operations(work: list[machine.Work]) -> float:
        return sum(part.operations for part in work)

    classes = torch.zeros(batch, dtype=torch.int64)
    count, ids = counted(lambda: gpt.generate(classes, guidance_scale=1.0, num_tokens=n))
    assert operations(machine.generation_work(gpt, batch, False, n)) == count
    count, ids = counted(lambda: gpt.generate(classes, guidance_scale=2.0, num_tokens=n))
    assert operations(machine.generation_work(gpt, batch, True, n)) == count
    count, images = counted(lambda: tokenizer.decode(ids))
    assert operations(machine.decoding_work(tokenizer, batch, n)) == count
    if n is None:
        count, _ = counted(lambda: tokenizer.encode(images.clamp(-1, 1)))
        assert operations(machine.encoding_work(tokenizer, batch)) == count


def test_bytes_are_weights_and_cache(pipeline: DetailFlowPipeline):
    """Every step reads all matrices once, and the keys and values of both layers of the 2·3 rows that are there before it."""
    gpt = pipeline.gpt
    matrices = sum(p.numel() for name, p in gpt.named_parameters() if p.ndim == 2 and "embedding" not in name)
    expected = [4 * (matrices + 2 * 2 * 6 * start * 32) for start, _ in gpt.schedule.steps]
    assert [part.bytes for part in machine.generation_work(gpt, 3, True)] == expected
    names = {
        name: p.numel() for name, p in pipeline.tokenizer.named_parameters() if p.ndim == 2 and name.endswith("weight")
    }
    decoder = sum(size for name, size in names.items() if name.startswith("decoder"))
    assert [part.bytes for part in machine.decoding_work(pipeline.tokenizer, 3)] == [4 * decoder]
    encoder = sum(
        size for name, size in names.items() if name.startswith(("encoder", "quantizer")) and "refine" not in name
    )
    assert [part.bytes for part in machine.encoding_work(pipeline.tokenizer, 3)] == [4 * encoder]


def test_the_limit_is_the_nearer_ceiling_of_each_part():
    ceilings = machine.Ceilings(read=10.0, products=100.0)
    assert ceilings.limit([machine.Work(bytes=20, operations=100)]) == (2.0, "bytes")
    parts = [machine.Work(bytes=20, operations=100), machine.Work(bytes=20, operations=500)]
    assert ceilings.limit(parts) == (7.0, "products")


def test_ceilings_are_measured():
    """Of one thread reading memory and of one multiplying matrices: more than the slowest machine that anybody has does."""
    ceilings = machine.measure_ceilings(torch.device("cpu"), torch.float32, repeats=1)
    assert ceilings.read > 1e8 and ceilings.products > 1e8


def test_the_naive_loop_makes_the_same_images(pipeline: DetailFlowPipeline):
    classes = [0, 3, 4]
    naive = benchmark.generate_naively(pipeline, classes, seed=5)
    torch.testing.assert_close(benchmark.generate_cached(pipeline, classes, seed=5), naive, atol=1e-5, rtol=0)
    *_, last = benchmark.stream_cached(pipeline, classes, seed=5)
    torch.testing.assert_close(last, naive, atol=1e-5, rtol=0)
    other_seed = benchmark.generate_naively(pipeline, classes, seed=6)
    assert not torch.allclose(other_seed, naive, atol=1e-2)


def test_greedy_tokens_without_a_cache(pipeline: DetailFlowPipeline):
    gpt, ids = pipeline.gpt, torch.tensor([0, 1, 2, 5])
    stepper = benchmark.RecomputingGPT(gpt, ids, guided=True)
    sampling = replace(gpt.config.sampling, temperature=0.0, guidance_scale=2.0)
    noise = torch.zeros(4, 16, dtype=torch.float64)
    *_, naive = benchmark.generation.generate(stepper, gpt.schedule, sampling, noise, 16, gpt.device)
    assert torch.equal(gpt.generate(ids, temperature=0.0, guidance_scale=2.0), naive)


def test_turns_and_the_best_of_several():
    calls: list[str] = []
    contenders = {name: benchmark.Contender(lambda name=name: calls.append(name), None) for name in "ab"}
    measured = benchmark.race(contenders, torch.device("cpu"), 3)
    assert calls == ["a", "b"] + ["a", "b"] * 3  # one each that does not count
    assert set(measured) == {"a", "b"} and 0 < measured["a"][0] < math.inf


def test_too_little_memory():
    contender = benchmark.Contender(lambda: torch.empty(2**60, dtype=torch.uint8), None)
    with pytest.raises(
        DetailFlowError, match="huge, 8 × float32: this does not fit in memory, so give smaller batch sizes"
    ):
        benchmark.race({"huge": contender}, torch.device("cpu"), 1, "8 × float32")


def test_peak_memory_is_that_of_one_run():
    peak = machine.PeakMemory(torch.device("cpu"))
    before = peak.mebibytes()
    if before is None:
        pytest.skip("this system does not tell a process's peak memory")
    big = torch.ones(100 * 2**18)
    assert 90 < peak.mebibytes() - before < 130
    del big
    assert machine.PeakMemory(torch.device("cpu")).mebibytes() < before + 50


def test_the_command(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(machine, "PRODUCT_SIDES", (64,))
    monkeypatch.setattr(machine, "READ_BYTES", 2**20)
    other = tmp_path / "theirs.py"
    other.write_text("def images(class_ids):\n    return [f'image of {i}' for i in class_ids]\n")
    file = tmp_path / "new" / "speed.json"
    argv = ["bench", "--model", str(model), "--device", "cpu", "--repeats", "1", "--batch-sizes", "1", "2"]
    assert main([*argv, "--other", f"{other}:images", "--json", str(file)]) == 0
    lines = capsys.readouterr().out.splitlines()
    report = json.loads(file.read_text())
    assert [r["what"] for r in report["rows"]] == ["naive", "generate", "other", "stream", "decode", "encode"] * 4
    ours = [r for r in report["rows"] if r["what"] != "other"]
    assert {(r["dtype"], r["images"]) for r in ours} == {(d, b) for d in ("float32", "bfloat16") for b in (1, 2)}
    assert set(report["ceilings"]) == {"float32", "bfloat16"}
    assert sum(line.split()[:1] == ["generate"] for line in lines) == 4
    naive = {(r["dtype"], r["images"]): r["seconds"] for r in report["rows"] if r["what"] == "naive"}
    for r in report["rows"]:
        assert r["seconds"] > 0
        if r["what"] in ("stream", "decode", "encode"):
            assert r["naive_ratio"] is None
        elif r["what"] != "other":
            assert r["naive_ratio"] == r["seconds"] / naive[r["dtype"], r["images"]]
        assert (r["limit_ratio"] is None) == (r["what"] == "other")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--batch-sizes", "0"], "must be a positive integer, not '0'"),
        (["--dtypes", "int8"], "invalid choice: 'int8'"),
        (
            ["--random-weights", "--model", "mine"],
            "--random-weights is for detailflow-16, detailflow-32, detailflow-64, not mine",
        ),
        (["--other", "nothing.py:f"], "there is no Python file nothing.py"),
        (["--other", "nothing"], "must be FILE.py:FUNCTION"),
        (["--model", "no/such/folder"], "no/such/folder"),
        (["--device", "nowhere"], "device 'nowhere' cannot be used here"),
        (["--json", "."], "--json must be a file to write, and . is a folder"),
    ],
)
def test_wrong_options(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(machine, "PRODUCT_SIDES", (64,))
    monkeypatch.setattr(machine, "READ_BYTES", 2**20)
    assert main(["bench", "--no-naive", *argv]) == 2
    assert message in capsys.readouterr().err


def test_an_adapter_without_the_function(tmp_path: Path):
    (tmp_path / "theirs.py").write_text("images = 3\n")
    with pytest.raises(DetailFlowError, match="has no function images"):
        benchmark.other_implementation(f"{tmp_path}/theirs.py:images")
    (tmp_path / "broken.py").write_text("import a_package_that_is_not_here\n")
    with pytest.raises(
        DetailFlowError, match=r"broken.py:f: .*broken.py cannot be imported: No module named 'a_package"
    ):
        benchmark.other_implementation(f"{tmp_path}/broken.py:f")
    (tmp_path / "fails.py").write_text("def f(ids):\n    return ids[99]\n")
    with pytest.raises(DetailFlowError, match=r"fails.py:f failed: IndexError: list index out of range"):
        benchmark.other_implementation(f"{tmp_path}/fails.py:f")([0])


def test_random_weights_have_the_published_sizes():
    """326M, 184.5M and 85.9M parameters (docs/method.md#tokenizer, #ar-model); heads, masks and embeddings included."""
    pipeline = benchmark.random_pipeline("detailflow-16", torch.device("meta"), torch.bfloat16)
    count = [
        sum(p.numel() for p in m.parameters()) / 1e6
        for m in (pipeline.gpt, pipeline.tokenizer.encoder, pipeline.tokenizer.decoder)
    ]
    assert [round(c, 1) for c in count] == pytest.approx([326, 184.5, 85.9], rel=0.01)
