"""CUDA graphs without a GPU: calls are recorded operation by operation and played again on the same tensors.

So a replay sees nothing that Python would do between operations: a number that should have come from a buffer stays
what it was, and a tensor that was made anew instead of being changed in place is missed.
"""

import copy
import gc
import pickle
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from detailflow import DetailFlowGPT, DetailFlowPipeline, SamplingConfig, benchmark
from detailflow import graphs as graphs_module
from detailflow.device import choose_dtype, to_device, to_host
from detailflow.errors import DetailFlowError
from detailflow.generation import TorchEngine, generate, image_noise
from detailflow.graphs import MOST, STALE, Decoding, GraphEngine, Graphs

HOST_READS = (
    torch.ops.aten._local_scalar_dense,
    torch.ops.aten.item,
    torch.ops.aten.nonzero,
    torch.ops.aten.is_nonzero,
    torch.ops.aten.equal,
    torch.ops.aten.masked_select,
    torch.ops.aten.unique_dim,
    torch.ops.aten._unique2,
)


class NoHostReads(TorchDispatchMode):
    """Raise an error for what would make the program wait for a GPU: values read, shapes that depend on values."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in HOST_READS:
            raise AssertionError(f"{func} waits for the GPU")
        out = func(*args, **(kwargs or {}))
        devices = {leaf.device for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)}
        if len(devices) > 1:
            raise AssertionError(f"{func} copies between {devices}")
        return out


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in HOST_READS:
            raise AssertionError(f"{func} cannot be captured")
        out = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, [x for x in tree_leaves(out) if isinstance(x, Tensor)]))
        return out

    @torch.inference_mode()
    def replay(self) -> None:
        for func, args, kwargs, outputs in self.operations:
            again = [x for x in tree_leaves(func(*args, **kwargs)) if isinstance(x, Tensor)]
            for old, new in zip(outputs, again, strict=True):
                if old.data_ptr() != new.data_ptr():  # neither a view nor changed in place
                    old.copy_(new)


def record(calls: Sequence[Callable[[], object]], device: torch.device) -> list[Callable[[], object]]:
    """Take the place of `graphs.capture`."""
    replays = []
    for call in calls:
        recorder = _Recorder()
        with recorder:
            call()
        replays.append(recorder.replay)
    return replays


@pytest.fixture
def graphed(model, monkeypatch: pytest.MonkeyPatch) -> DetailFlowPipeline:
    """The tiny pipeline, whose steps are recorded as a GPU would capture them."""
    monkeypatch.setitem(graphs_module.CAPTURE, "cpu", record)
    monkeypatch.setattr(
        "detailflow.native.blocks.can_run", lambda *_: False
    )  # or the pixels of `pipeline` differ by rounding
    return DetailFlowPipeline.from_pretrained(model, device="cpu", engine="graphs")


def seeds(*numbers: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(number) for number in numbers]


def spied(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each batch that begins, whether it has a program."""
    begun: list[bool] = []
    start = GraphEngine.start

    def spy(self: GraphEngine, *args: object) -> object:
        result = start(self, *args)  # type: ignore[arg-type]
        begun.append(self.program is not None)
        return result

    monkeypatch.setattr(GraphEngine, "start", spy)
    return begun


CASES = [
    dict(class_ids=[1, 4], seeds=(1, 2)),
    dict(class_ids=[0, 3], seeds=(1, 2)),  # another class, other noise, another guidance and temperature
    dict(class_ids=[1, 4], seeds=(8, 9)),
    dict(class_ids=[1, 4], seeds=(8, 9), guidance_scale=4.0),
    dict(class_ids=[1, 4], seeds=(8, 9), guidance_scale=4.0, guidance_schedule="linear"),
    dict(class_ids=[1, 4], seeds=(8, 9), temperature=0.3),
    dict(class_ids=[1, 4], seeds=(8, 9), temperature=0.0),
    dict(class_ids=[1, 4], seeds=(8, 9), guidance_scale=1.0),
    dict(class_ids=[2, 2], seeds=(3, 4), guidance_scale=1.0, temperature=1.7),
    dict(class_ids=[1, 4], seeds=(8, 9), top_k=5),
    dict(class_ids=[1, 4, 0], seeds=(8, 9, 3)),
    dict(class_ids=[1, 4], seeds=(1, 2)),
]


def test_tokens_are_those_of_the_eager_engine(
    graphed: DetailFlowPipeline, pipeline: DetailFlowPipeline, monkeypatch: pytest.MonkeyPatch
):
    """A second class, samplings, guidance on and off and other batch sizes, in one run of the same buffers."""
    begun = spied(monkeypatch)
    monkeypatch.setattr(pipeline.gpt, "engine", "torch")
    for case in CASES:
        options = dict(case)
        ids, numbers = torch.tensor(options.pop("class_ids")), options.pop("seeds")
        ours = graphed.gpt.generate(ids, generator=seeds(*numbers), **options)
        assert torch.equal(ours, pipeline.gpt.generate(ids, generator=seeds(*numbers), **options)), case
    programs = 4  # sampled, greedy, unguided, top-k; the fifth, of three images, finds no place
    assert len(graphed.gpt.graphs) == programs == MOST
    assert begun == [True] * 10 + [False] + [True]


def test_prefixes_and_fewer_tokens(graphed: DetailFlowPipeline, pipeline: DetailFlowPipeline):
    ids = torch.tensor([1, 4])
    for kept, count in ((4, 16), (8, 12), (0, 8), (16, 16), (0, 16)):
        prefix = torch.randint(64, (2, kept)) if kept else None
        options = dict(prefix=prefix, num_tokens=count)
        ours = graphed.gpt.generate(ids, generator=seeds(1, 2), **options)
        assert torch.equal(ours, pipeline.gpt.generate(ids, generator=seeds(1, 2), **options))
    assert len(graphed.gpt.graphs) == 1


def test_streams_share_no_buffers(
    graphed: DetailFlowPipeline, pipeline: DetailFlowPipeline, monkeypatch: pytest.MonkeyPatch
):
    """Two at once, and one that nobody takes to its end; what was yielded stays."""
    begun = spied(monkeypatch)
    stages = list(graphed.stream(["cat"], seed=3))
    expected = list(pipeline.stream(["cat"], seed=3))
    assert [s.images[0].tobytes() for s in stages] == [s.images[0].tobytes() for s in expected]
    assert stages[-1].images[0].tobytes() == graphed(["cat"], seed=3)[0].tobytes()

    both = list(zip(graphed.stream(["cat"], seed=3), graphed.stream(["bird"], seed=4), strict=True))
    assert both[-1][0].images[0].tobytes() == stages[-1].images[0].tobytes()
    assert both[-1][1].images[0].tobytes() == pipeline(["bird"], seed=4)[0].tobytes()
    left = graphed.stream(["bird"], seed=4)
    next(left)
    assert graphed(["cat"], seed=3)[0].tobytes() == stages[-1].images[0].tobytes()
    del left
    gc.collect()
    assert graphed(["cat"], seed=3)[0].tobytes() == stages[-1].images[0].tobytes()
    assert begun == [True, True, True, False, True, False, True]


def test_images_are_those_of_the_pipeline(graphed: DetailFlowPipeline, pipeline: DetailFlowPipeline):
    for labels, count in ((["cat", 1], None), ([0, 4], None), ([0, 4], 8), (["cat"], None)):
        ours, theirs = graphed(labels, seed=2, num_tokens=count), pipeline(labels, seed=2, num_tokens=count)
        assert [image.tobytes() for image in ours] == [image.tobytes() for image in theirs]
    assert len(graphed.tokenizer.graphs) == 2  # whole images of two and of one
    assert [i.tobytes() for i in graphed.vary([3] * 16, keep=8, label=1)] == [
        i.tobytes() for i in pipeline.vary([3] * 16, keep=8, label=1)
    ]


def test_auto_captures_what_comes_up_again(
    graphed: DetailFlowPipeline, pipeline: DetailFlowPipeline, monkeypatch: pytest.MonkeyPatch
):
    graphed.gpt.engine = graphed.tokenizer.engine = "auto"
    monkeypatch.setattr(pipeline.gpt, "engine", "torch")
    monkeypatch.setattr("detailflow.native.why_not", lambda _: "not here")
    begun = spied(monkeypatch)
    for _ in range(3):
        assert graphed(["cat"], seed=3)[0].tobytes() == pipeline(["cat"], seed=3)[0].tobytes()
    assert begun == [False, True, True]
    assert len(graphed.gpt.graphs) == len(graphed.tokenizer.graphs) == 1


def test_programs_follow_the_weights(graphed: DetailFlowPipeline, pipeline: DetailFlowPipeline, model):
    """Weights that change in place are seen; weights elsewhere, and a copy of the model, are captured again."""
    gpt, ids = graphed.gpt, torch.tensor([1, 4])
    first = gpt.generate(ids, generator=seeds(1, 2))
    other = DetailFlowGPT.from_pretrained(model, device="cpu")
    other.engine = "torch"
    for change in (lambda w: w.mul_(-0.5), lambda w: w.set_(w.clone().mul_(3))):
        for network in (gpt, other):
            with torch.no_grad():
                change(network.head.weight)
        changed = gpt.generate(ids, generator=seeds(1, 2))
        assert torch.equal(changed, other.generate(ids, generator=seeds(1, 2)))
        assert not torch.equal(changed, first)
        assert len(gpt.graphs) == 1
    copied = copy.deepcopy(gpt)
    assert len(copied.graphs) == 0 and len(pickle.loads(pickle.dumps(gpt.graphs))) == 0
    assert torch.equal(copied.generate(ids, generator=seeds(1, 2)), changed)
    gpt.forget_compiled()
    assert len(gpt.graphs) == 0


def test_a_model_and_its_programs_are_freed_together(graphed: DetailFlowPipeline):
    graphed(["cat"])
    watched = weakref.ref(graphed.gpt), weakref.ref(graphed.tokenizer)
    gc.collect()
    gc.disable()
    try:
        graphed.gpt = graphed.tokenizer = None  # type: ignore[assignment]
        assert watched[0]() is None and watched[1]() is None
    finally:
        gc.enable()


def test_places():
    """A program makes room once it was not used for long; until then others are done without."""
    graphs: Graphs[object] = Graphs()
    network = torch.nn.Linear(2, 2)

    def lend(key: int) -> object:
        return graphs.lend(key, network, object, at_once=True)

    first = [lend(key) for key in range(MOST)]
    assert len(set(map(id, first))) == MOST and None not in first
    assert lend(MOST) is None
    for _ in range(STALE):
        assert [lend(key) for key in range(1, MOST)] == first[1:]
    assert lend(MOST) is not None and len(graphs) == MOST
    assert lend(0) is None  # its place is taken


def test_one_capture_at_a_time():
    """All captures of a device use one stream, also those of several models in several threads."""
    at_work, most, start = [0], [0], threading.Barrier(4)

    def make() -> object:
        at_work[0] += 1
        most[0] = max(most[0], at_work[0])
        time.sleep(0.01)
        at_work[0] -= 1
        return object()

    def run(_: int) -> None:
        start.wait()
        Graphs[object]().lend(0, torch.nn.Linear(2, 2), make, at_once=True)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(run, range(4)))
    assert most == [1]


def test_too_little_memory(graphed: DetailFlowPipeline, monkeypatch: pytest.MonkeyPatch):
    """For the buffers, which is found out once; without them the batch fits."""
    calls: list[object] = []

    def out_of_memory(*given: object) -> object:
        calls.append(given)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    expected = graphed.gpt.generate(torch.tensor([1, 2]), generator=seeds(1, 2))
    graphed.gpt.forget_compiled()
    monkeypatch.setitem(graphs_module.CAPTURE, "cpu", out_of_memory)
    for _ in range(2):
        assert torch.equal(graphed.gpt.generate(torch.tensor([1, 2]), generator=seeds(1, 2)), expected)
    assert len(calls) == 1 and len(graphed.gpt.graphs) == 0


def test_what_cannot_be_captured(graphed: DetailFlowPipeline, model):
    gpt, ids = graphed.gpt, torch.tensor([1])
    gpt.train()
    with pytest.raises(DetailFlowError, match="the graphs engine cannot run this model: it is in training mode"):
        gpt.generate(ids)
    gpt.eval()
    hook = gpt.head.register_forward_hook(lambda *_: None)
    with pytest.raises(DetailFlowError, match="it has forward hooks"):
        gpt.generate(ids)
    hook.remove()
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(DetailFlowError, match="autocast is on"):
        gpt.generate(ids)

    class Adapter(torch.nn.Linear):
        pass

    gpt.head.__class__ = Adapter
    with pytest.raises(DetailFlowError, match="some of its layers were replaced"):
        gpt.generate(ids)


def test_a_cpu_has_no_graphs(model):
    gpt = DetailFlowGPT.from_pretrained(model, device="cpu")
    gpt.engine = "graphs"
    with pytest.raises(DetailFlowError, match="the graphs engine cannot run this model: it is for CUDA GPUs"):
        gpt.generate(torch.tensor([1]))
    with pytest.raises(DetailFlowError, match="the graphs engine cannot run this model: it is for CUDA GPUs"):
        benchmark.engines(gpt)


def test_logits_that_are_no_numbers(graphed: DetailFlowPipeline):
    """Of one batch; the next one with the same buffers is sound."""
    gpt, ids = graphed.gpt, torch.tensor([1, 2])
    expected = gpt.generate(ids, generator=seeds(1, 2))
    weight = gpt.head.weight[3, 0].item()
    gpt.head.weight.data[3, 0] = float("nan")
    with pytest.raises(DetailFlowError, match="the AR model's logits are not finite"):
        gpt.generate(ids, generator=seeds(1, 2))
    gpt.head.weight.data[3, 0] = weight
    assert torch.equal(gpt.generate(ids, generator=seeds(1, 2)), expected)


@pytest.mark.parametrize("engine", [TorchEngine, GraphEngine])
@pytest.mark.parametrize(
    "sampling", [SamplingConfig(), SamplingConfig(temperature=0), SamplingConfig(1.0, top_k=5, top_p=0.9)]
)
def test_the_loop_reads_nothing_from_the_gpu(
    graphed: DetailFlowPipeline, engine: type[TorchEngine], sampling: SamplingConfig
):
    """But once, at its end."""
    gpt, ids = graphed.gpt, torch.tensor([1, 2])
    noise = image_noise(seeds(1, 2), 16)
    *_, warm = generate(engine(gpt, ids, sampling.guided), gpt.schedule, sampling, noise, 16, gpt.device)
    steps = generate(engine(gpt, ids, sampling.guided), gpt.schedule, sampling, noise, 16, gpt.device)
    with NoHostReads():
        for _ in gpt.schedule.steps[:-1]:
            next(steps)
    *_, tokens = steps
    assert torch.equal(tokens, warm)


def test_a_step_on_the_meta_device_knows_no_values(graphed: DetailFlowPipeline):
    """Nor does the decoder: both would raise an error."""
    gpt, tokenizer = copy.deepcopy(graphed.gpt).to("meta"), copy.deepcopy(graphed.tokenizer).to("meta")
    engine = TorchEngine(gpt, torch.zeros(2, dtype=torch.int64, device="meta"), guided=True)
    sampling = SamplingConfig(top_k=5)
    tokens, noise = engine.start(torch.zeros(2, 16, dtype=torch.float64, device="meta"), sampling, gpt.device)
    with NoHostReads():
        for start, end in gpt.schedule.steps:
            finite = engine.advance(tokens, noise, start, end, sampling, 1.5)
            assert isinstance(finite, torch.Tensor) and finite.is_meta
        assert tokenizer.decode_bytes(tokens).shape == (2, 32, 32, 3)


def test_a_number_from_python_would_be_noticed(graphed: DetailFlowPipeline, monkeypatch: pytest.MonkeyPatch):
    """The recording itself: a temperature that is not a buffer stays that of the first batch."""
    draw = graphs_module.draw
    monkeypatch.setattr(graphs_module, "draw", lambda *args: draw(*args[:4]))
    gpt, ids = graphed.gpt, torch.tensor([1, 2])
    warm = gpt.generate(ids, generator=seeds(1, 2), temperature=1.0)
    assert torch.equal(gpt.generate(ids, generator=seeds(1, 2), temperature=0.01), warm)


def test_compiling_drops_what_was_captured(graphed: DetailFlowPipeline, monkeypatch: pytest.MonkeyPatch):
    """And the compiled step is captured instead."""
    monkeypatch.setattr("detailflow.models.pretrained.compiled", lambda function, device: function)
    ids = torch.tensor([1, 2])
    expected = graphed.gpt.generate(ids, generator=seeds(1, 2))
    graphed.compile(2)
    assert len(graphed.gpt.graphs) == 0
    assert torch.equal(graphed.gpt.generate(ids, generator=seeds(1, 2)), expected)
    program = next(iter(graphed.gpt.graphs._programs.values()))[0]
    assert isinstance(program, Decoding) and program.engine.compiled is not None
    graphed.to("cpu")
    assert len(graphed.gpt.graphs) == 0


def test_what_is_asked_of_cuda(monkeypatch: pytest.MonkeyPatch):
    """Every call runs once before all captures, which share a pool and a stream; an error ends its capture."""
    events: list[object] = []

    class Graph:
        def capture_begin(self, *, pool: object, capture_error_mode: str) -> None:
            events.append(f"begin {pool} {capture_error_mode}")

        def capture_end(self) -> None:
            events.append("end")

        def replay(self) -> None:
            events.append("replay")

    class Stream:
        def wait_stream(self, other: object) -> None:
            events.append("wait")

    cuda: dict[str, object] = dict(
        device=lambda _: nullcontext(), stream=lambda _: nullcontext(), synchronize=lambda _: events.append("sync")
    )
    cuda |= dict(empty_cache=lambda: None, graph_pool_handle=lambda: "pool", current_stream=lambda _: Stream())
    for name, value in {**cuda, "Stream": lambda _: Stream(), "CUDAGraph": Graph}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    graphs_module._capture_stream.cache_clear()
    replays = graphs_module.capture([lambda: events.append("a"), lambda: events.append("b")], torch.device("cuda:0"))
    begin = "begin pool thread_local"
    assert events == ["a", "b", "sync", begin, "a", "end", begin, "b", "end", "wait"]
    replays[1]()
    assert events[-1] == "replay" and gc.isenabled()

    def fails() -> None:
        if begin in events[10:]:
            raise RuntimeError("not in a capture")

    with pytest.raises(RuntimeError, match="not in a capture"):
        graphs_module.capture([fails], torch.device("cuda:0"))
    assert events[-1] == "end" and gc.isenabled()
    graphs_module._capture_stream.cache_clear()


def test_bfloat16_is_the_default_on_a_gpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    assert choose_dtype(None, torch.device("cuda")) == torch.bfloat16
    assert choose_dtype("float32", torch.device("cuda")) == torch.float32
    assert choose_dtype(None, torch.device("cpu")) == torch.float32
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    assert choose_dtype(None, torch.device("cuda")) == torch.float32


def test_to_a_device_and_back():
    values = torch.arange(3)
    assert to_host(to_device(values, torch.device("cpu"))) is values
    assert to_device(values, torch.device("meta")).is_meta
