"""What the benchmark counts, the loop that it compares with, and its table. How fast anything is no test can say."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from detailflow import DetailFlowPipeline, benchmark, machine, native
from detailflow.accuracy import differences
from detailflow.cli.main import main
from detailflow.errors import DetailFlowError
from detailflow.generation import TorchEngine, generate, image_generator


def matrices(pipeline: DetailFlowPipeline, *prefixes: str) -> int:
    """The weights of all linear layers of modules of the tokenizer whose names begin so."""
    modules = pipeline.tokenizer.named_modules()
    return sum(m.weight.numel() for name, m in modules if isinstance(m, nn.Linear) and name.startswith(prefixes))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_each_step_s_operations_and_bytes(pipeline: DetailFlowPipeline, batch: int, guidance: float):
    """Two operations for each weight and new position, four for each pair of positions that attend.

    Every matrix is read once, and so are the earlier keys and values of all layers and rows.
    """
    gpt, config = pipeline.gpt, pipeline.gpt.config
    weights = sum(m.weight.numel() for m in gpt.modules() if isinstance(m, nn.Linear))
    rows = batch if guidance == 1 else 2 * batch
    expected = [
        (
            4 * (weights + 2 * rows * start * config.width * config.depth),
            2 * rows * (end - start) * (weights + 2 * end * config.width * config.depth),
        )
        for start, end in gpt.schedule.steps
    ]
    with_scale = copy.copy(gpt)
    with_scale.config = replace(config, guidance_scale=guidance)
    assert benchmark.generation_costs(with_scale, batch) == expected


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("n", [4, 12, 16])
def test_operations_and_bytes_of_the_decoder(pipeline: DetailFlowPipeline, batch: int, n: int):
    decoder, vit = pipeline.tokenizer.decoder, pipeline.tokenizer.config.decoder
    patches = (pipeline.tokenizer.schedule.decode_size(n) // decoder.patch_size) ** 2
    operations = matrices(pipeline, "decoder.blocks") * (n + patches) + matrices(pipeline, "decoder.project") * n
    operations += matrices(pipeline, "decoder.to_pixels") * patches + 2 * (n + patches) ** 2 * vit.width * vit.depth
    cost = benchmark.decoding_cost(pipeline.tokenizer, torch.zeros(batch, n, dtype=torch.int64))
    assert cost == (4 * matrices(pipeline, "decoder"), 2 * batch * operations)


@pytest.mark.parametrize("batch", [1, 3])
def test_operations_and_bytes_of_the_encoder(pipeline: DetailFlowPipeline, batch: int):
    """Patches attend to patches, tokens to both; and a token is compared with all codes."""
    config = pipeline.tokenizer.config
    n, patches, vit = config.num_tokens, (config.image_size // config.patch_size) ** 2, config.encoder
    blocks, embed, project = (
        matrices(pipeline, name) for name in ("encoder.blocks", "encoder.patch_embed", "quantizer.project")
    )
    operations = blocks * (n + patches) + embed * patches + project * n + config.codebook_size * config.codebook_dim * n
    operations += 2 * (patches**2 + n * (n + patches)) * vit.width * vit.depth
    images = torch.zeros(batch, 3, config.image_size, config.image_size)
    cost = benchmark.encoding_cost(pipeline.tokenizer, images)
    assert cost == (4 * (blocks + embed + project), 2 * batch * operations)


def test_the_limit_is_the_nearer_ceiling_of_each_part():
    ceilings = machine.Ceilings(bandwidth=10.0, flops=100.0)
    assert ceilings.limit([machine.Cost(bytes=20, flops=100)]) == (2.0, "memory")
    parts = [machine.Cost(bytes=20, flops=100), machine.Cost(bytes=20, flops=500)]
    assert ceilings.limit(parts) == (7.0, "compute")


def test_ceilings_are_measured():
    """Even the slowest machine that anybody has does more."""
    ceilings = machine.measure_ceilings(torch.device("cpu"), torch.float32, repeats=1)
    assert ceilings.bandwidth > 1e8 and ceilings.flops > 1e8


def test_the_limit_counts_what_the_machine_can_do_in_any_way(monkeypatch: pytest.MonkeyPatch):
    """Some processors multiply bfloat16 at half the speed of float32, and for some PyTorch's products are slow."""
    speeds = {(torch.float32, False): 4.0, (torch.bfloat16, False): 2.0, (torch.float16, False): 8.0}
    speeds |= {(torch.float32, True): 3.0, (torch.bfloat16, True): 5.0}

    def measure(device: torch.device, dtype: torch.dtype, multiply: object = None) -> machine.Ceilings:
        return machine.Ceilings(1.0, speeds[dtype, multiply is native.product])

    monkeypatch.setattr(benchmark, "measure_ceilings", measure)
    cpu, dtypes = torch.device("cpu"), (torch.float32, torch.bfloat16, torch.float16)
    assert [benchmark.best_ceilings(cpu, dtype).flops for dtype in dtypes] == [4.0, 5.0, 8.0]
    monkeypatch.setattr(native, "library", lambda: "not here")
    assert [benchmark.best_ceilings(cpu, dtype).flops for dtype in dtypes] == [4.0, 4.0, 8.0]
    assert benchmark.best_ceilings(torch.device("cuda"), torch.bfloat16).flops == 2.0


def test_the_naive_loop_makes_the_same_tokens(pipeline: DetailFlowPipeline):
    gpt, classes = pipeline.gpt, [0, 3, 4]
    naive = list(benchmark.stream(gpt, classes, 5, benchmark.UncachedEngine))
    cached = list(benchmark.stream(gpt, classes, 5))
    assert len(naive) == len(cached) == len(gpt.schedule.steps)
    assert all(map(torch.equal, cached, naive))
    generators = [image_generator(5, i) for i in range(3)]
    assert torch.equal(gpt.generate(torch.tensor(classes), generator=generators), cached[-1])
    *_, other_seed = benchmark.stream(gpt, classes, 6, benchmark.UncachedEngine)
    assert not torch.equal(other_seed, naive[-1])


def test_greedy_tokens_without_a_cache(pipeline: DetailFlowPipeline):
    gpt, ids = pipeline.gpt, torch.tensor([0, 1, 2, 5])
    stepper = benchmark.UncachedEngine(gpt, ids, guided=True)
    sampling = replace(gpt.config.sampling, temperature=0.0, guidance_scale=2.0)
    noise = torch.zeros(4, 16, dtype=torch.float64)
    *_, naive = generate(stepper, gpt.schedule, sampling, noise, 16, gpt.device)
    assert torch.equal(gpt.generate(ids, temperature=0.0, guidance_scale=2.0), naive)


def test_turns():
    calls: list[str] = []
    cases = {name: benchmark.Case(lambda name=name: calls.append(name)) for name in "ab"}
    measured = benchmark.time_in_turns(cases, torch.device("cpu"), 3)
    assert calls == ["a", "b"] + ["a", "b"] * 3  # one each that does not count
    assert set(measured) == {"a", "b"} and all(len(times.seconds) == 3 for times in measured.values())


def test_medians_and_ratios():
    """Of three rounds; the ratio to the naive loop is that of each round, as a busy machine changes between them."""
    costs = [machine.Cost(bytes=0, flops=2.0)]
    cases = {name: benchmark.Case(lambda: None, costs, generates=True) for name in ("naive", "generate")}
    times = {
        "naive": benchmark.Times([10.0, 20.0, 80.0], 7.0),
        "generate": benchmark.Times([5.0, 4.0, 8.0], None),
    }
    _, row = benchmark.make_rows(cases, times, machine.Ceilings(bandwidth=1.0, flops=2.0), "float32", 2)
    assert (row.seconds, row.fastest, row.slowest, row.seconds_per_image) == (5.0, 4.0, 8.0, 2.5)
    assert (row.naive_ratio, row.limit_ratio, row.bound, row.peak_mib) == (0.2, 5.0, "compute", None)


def test_processor_time_with_one_thread(monkeypatch: pytest.MonkeyPatch):
    """Waiting counts only if there are more: here each call computes for one second and waits for two."""
    calls: list[int] = []
    clocks = SimpleNamespace(process_time=lambda: 1.0 * len(calls), perf_counter=lambda: 3.0 * len(calls))
    monkeypatch.setattr(machine, "time", clocks)
    for threads, expected in ((1, 1.0), (2, 3.0)):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert machine.seconds(lambda: calls.append(1), torch.device("cpu"), calls=4) == expected
    assert len(calls) == 8


def test_too_little_memory():
    case = benchmark.Case(lambda: torch.empty(2**60, dtype=torch.uint8))
    with pytest.raises(
        DetailFlowError, match="huge, 8 × float32: this does not fit in memory, so give smaller batch sizes"
    ):
        benchmark.time_in_turns({"huge": case}, torch.device("cpu"), 1, "8 × float32")


def test_peak_memory_is_that_of_one_run():
    cpu = torch.device("cpu")
    _, before = machine.seconds_and_peak(lambda: None, cpu)
    if before is None:
        pytest.skip("this system does not tell a process's peak memory")
    _, peak = machine.seconds_and_peak(lambda: torch.ones(100 * 2**18), cpu)
    assert 90 < peak - before < 130
    assert machine.seconds_and_peak(lambda: None, cpu)[1] < before + 50


def test_the_command(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("detailflow.native.blocks.has_amx", lambda: False)  # with it bfloat16 is left to PyTorch
    monkeypatch.setattr(machine, "MATRIX_SIDES", (64,))
    monkeypatch.setattr(machine, "READ_BYTES", 2**20)
    other = tmp_path / "theirs.py"
    other.write_text("def images(class_ids):\n    return [f'image of {i}' for i in class_ids]\n")
    file = tmp_path / "new" / "speed.json"
    argv = ["bench", "--model", str(model), "--device", "cpu", "--repeats", "1", "--batch-sizes", "1", "2"]
    assert main([*argv, "--other", f"{other}:images", "--json", str(file)]) == 0
    out, err = capsys.readouterr()
    lines, early = out.splitlines(), err.splitlines()
    report = json.loads(file.read_text())
    for r in report["rows"]:  # said as soon as it was known
        label = f"{r['images']} × {r['dtype'] if r['what'] != 'other' else ''}"
        assert any(line.startswith(f"{r['what']}, {label}") and f": {r['seconds']:.3g} s" in line for line in early)
    assert [r["what"] for r in report["rows"]] == [
        "naive",
        "generate, torch",
        "generate, native",
        *("other", "stream, native", "decode, torch", "decode, native", "encode, torch", "encode, native"),
    ] * 4
    ours = [r for r in report["rows"] if r["what"] != "other"]
    assert {(r["dtype"], r["images"]) for r in ours} == {(d, b) for d in ("float32", "bfloat16") for b in (1, 2)}
    assert set(report["ceilings"]) == {"float32", "bfloat16"}
    assert sum(line.startswith("generate, native") for line in lines) == 4
    assert f"native engine: {native.instructions()}" == f"native engine: {report['native']}" in lines
    naive = {(r["dtype"], r["images"]): r["seconds"] for r in report["rows"] if r["what"] == "naive"}
    for r in report["rows"]:
        assert r["seconds"] > 0
        if r["what"].startswith(("stream", "decode", "encode")):
            assert r["naive_ratio"] is None
        elif r["what"] != "other":
            assert r["naive_ratio"] == r["seconds"] / naive[r["dtype"], r["images"]]
        assert (r["limit_ratio"] is None) == (r["what"] == "other")


def test_rows_of_an_engine_use_its_tokenizer(pipeline: DetailFlowPipeline):
    config = benchmark.BenchmarkConfig(None, None, False, (1,), ("float32",), "cpu", False, True, 1, None, "auto")
    cases = benchmark.make_cases(pipeline, 1, config, None)
    codecs = {name: case.run.args[1] for name, case in cases.items() if name.startswith(("generate", "stream"))}  # type: ignore[attr-defined]
    assert list(codecs) == ["generate, torch", "generate, native", "stream, native"]
    assert codecs["generate, torch"].engine == "torch" and codecs["stream, native"] is pipeline.tokenizer


def test_rows_of_the_tokenizer_are_named_by_what_runs_it(pipeline: DetailFlowPipeline, monkeypatch: pytest.MonkeyPatch):
    tokenizer = pipeline.tokenizer
    found = benchmark.codecs(tokenizer, tokenizer.decoder.blocks)
    assert list(found) == [", torch", ", native"] and found[", native"] is tokenizer
    assert found[", torch"].engine == "torch" != tokenizer.engine
    monkeypatch.setattr("detailflow.native.blocks.can_run", lambda *_: False)
    assert benchmark.codecs(tokenizer, tokenizer.decoder.blocks) == {"": tokenizer}


def test_accuracy(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Of every engine and dtype but the one that all are compared with; bfloat16 errs, float32 only by rounding."""
    file = tmp_path / "accuracy.json"
    assert main(["bench", "--model", str(model), "--device", "cpu", "--accuracy", "--json", str(file)]) == 0
    report = json.loads(file.read_text())
    errors = {(row["engine"], row["dtype"]): row["error"] for row in report["rows"]}
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()[4:]] == list(map(list, errors))
    assert set(errors) == {("native", "float32"), ("torch", "bfloat16"), ("native", "bfloat16")}
    assert errors["native", "float32"] < 1e-5 < errors["native", "bfloat16"] < 0.1 * report["deviation"]
    assert [row["greedy"] for row in report["rows"] if row["dtype"] == "float32"] == [1.0]


def test_accuracy_of_a_model_that_differs(pipeline: DetailFlowPipeline):
    """The error is that of all logits, by hand."""
    gpt, other = pipeline.gpt, copy.deepcopy(pipeline.gpt)
    other.head.weight.data[3] += 1.0
    error, greedy, deviation = differences(gpt, other, TorchEngine)
    assert error > 0.01 * deviation and greedy < 1
    assert differences(gpt, gpt, TorchEngine) == (0.0, 1.0, deviation)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--batch-sizes", "0"], "--batch-sizes must be a positive integer, not 0"),
        (["--dtypes", "int8"], "--dtypes must be float32, bfloat16 or float16, not 'int8'"),
        (
            ["--random-weights", "--model", "mine"],
            "--random-weights is for detailflow-16, detailflow-32, detailflow-64, not mine",
        ),
        (["--other", "nothing.py:f"], "there is no Python file nothing.py"),
        (["--other", "nothing"], "must be FILE.py:FUNCTION"),
        (["--model", "no/such/folder"], "no/such/folder"),
        (["--device", "nowhere"], "device 'nowhere' cannot be used here"),
        (["--json", "."], "cannot write .: it is a folder, not a file"),
        (["--json", __file__], "is not a report of `detailflow bench`: give another file, or remove it first"),
        (["--json", "/dev/null"], "cannot write /dev/null: it is not a regular file"),
        (["--accuracy", "--other", "nothing.py:f"], "--other does not go with --accuracy: leave out one of them"),
        (["--accuracy", "--compile"], "--compile does not go with --accuracy: leave out one of them"),
        (
            ["--accuracy", "--device", "cpu", "--engine", "torch", "--dtypes", "float32"],
            "accuracy compares with PyTorch in float32: name another dtype, or another engine, too",
        ),
        (["--random-weights", "--tokenizer", "mine"], "--tokenizer does not go with --random-weights: leave out one"),
    ],
)
def test_wrong_options(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(machine, "MATRIX_SIDES", (64,))
    monkeypatch.setattr(machine, "READ_BYTES", 2**20)
    assert main(["bench", "--no-naive", *argv]) == 2
    assert message in capsys.readouterr().err


def test_an_adapter_without_the_function(tmp_path: Path):
    (tmp_path / "theirs.py").write_text("images = 3\n")
    with pytest.raises(DetailFlowError, match="has no function images"):
        benchmark.load_other(f"{tmp_path}/theirs.py:images")
    (tmp_path / "broken.py").write_text("import a_package_that_is_not_here\n")
    with pytest.raises(DetailFlowError, match=r"broken.py:f failed: ModuleNotFoundError: No module named 'a_package"):
        benchmark.load_other(f"{tmp_path}/broken.py:f")
    (tmp_path / "fails.py").write_text("def f(ids):\n    return ids[99]\n")
    with pytest.raises(DetailFlowError, match=r"fails.py:f failed: IndexError: list index out of range"):
        benchmark.load_other(f"{tmp_path}/fails.py:f")([0])


def test_an_adapter_that_ends_the_program(tmp_path: Path):
    """As a script without `if __name__ == "__main__"` does: it would look as if all had been timed."""
    (tmp_path / "script.py").write_text("import sys\nsys.exit(0)\n")
    with pytest.raises(DetailFlowError, match=r"script.py:f failed: SystemExit: 0"):
        benchmark.load_other(f"{tmp_path}/script.py:f")
    (tmp_path / "stops.py").write_text("def f(ids):\n    raise KeyboardInterrupt\n")
    with pytest.raises(KeyboardInterrupt):
        benchmark.load_other(f"{tmp_path}/stops.py:f")([0])


def test_an_adapter_that_changes_its_class_ids(tmp_path: Path):
    (tmp_path / "takes.py").write_text("def f(ids):\n    ids.clear()\n")
    class_ids = [0, 3]
    benchmark.load_other(f"{tmp_path}/takes.py:f")(class_ids)
    assert class_ids == [0, 3]


def test_json_of_somebody_else_is_not_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Rows are in many files of JSON."""
    file = tmp_path / "rows.json"
    file.write_text('{"rows": [{"row": 1}], "features": []}')
    assert main(["bench", "--json", str(file)]) == 2
    assert "is not a report of `detailflow bench`" in capsys.readouterr().err
    assert "features" in file.read_text()


def test_random_weights_have_the_published_sizes():
    """326M, 184.5M and 85.9M parameters (docs/method.md#tokenizer, #ar-model); heads, masks and embeddings included."""
    pipeline = benchmark.random_pipeline("detailflow-16", torch.device("meta"), torch.bfloat16)
    count = [
        sum(p.numel() for p in m.parameters()) / 1e6
        for m in (pipeline.gpt, pipeline.tokenizer.encoder, pipeline.tokenizer.decoder)
    ]
    assert [round(c, 1) for c in count] == pytest.approx([326, 184.5, 85.9], rel=0.01)
