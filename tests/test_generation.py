"""The decoding loop: the cache against recomputing everything, guidance, and the distributions that are drawn from."""

import json
from collections import Counter

import numpy as np
import pytest
import torch

from detailflow import DetailFlowGPT
from detailflow.errors import DetailFlowError
from detailflow.generation import SamplingConfig, TorchEngine, guidance_at, image_noise, sample
from detailflow.models.gpt import GPTConfig

SHAPES = [(16, 4, 4), (16, 4, 12), (8, 1, 1), (8, 1, 3), (8, 4, 8), (12, 3, 6), (16, 4, 0), (8, 1, 0)]  # (N, g, c)
CLASSES = torch.tensor([0, 2, 1])


def make(n: int, g: int, c: int, **settings: object) -> DetailFlowGPT:
    torch.manual_seed(0)
    config = GPTConfig(
        num_classes=3, width=32, depth=2, heads=2, mlp=64, num_tokens=n, group_size=g, causal_tokens=c,
        codebook_size=32,
        **settings,  # type: ignore[arg-type]
    )  # fmt: skip
    model = DetailFlowGPT(config).eval()
    for parameter in model.parameters():  # as initialised all codes are about equally likely
        parameter.data.mul_(8 if parameter.ndim == 2 else 1)
    return model


def naive(model: DetailFlowGPT, classes: torch.Tensor, sampling: SamplingConfig, noise: torch.Tensor) -> torch.Tensor:
    """Sec. 3.4 without a cache: the whole sequence through `forward` for every step, on a double batch if guided."""
    n, g, c = model.config.num_tokens, model.config.group_size, model.schedule.num_causal
    ids = torch.zeros(len(classes), n, dtype=torch.int64)
    start = 0
    while start < n:
        end = start + (1 if start < c else g)
        with torch.no_grad():
            logits = model(classes, ids)[:, start:end]
            if sampling.guidance_scale != 1:
                null = model(torch.full_like(classes, model.config.num_classes), ids)[:, start:end]
                scale = sampling.guidance_scale
                if sampling.guidance_schedule == "linear" and start >= c:
                    scale *= (n // g - start // g + 1) / (n // g + 1)
                logits = null + scale * (logits - null)
        ids[:, start:end] = sample(logits, noise[:, start:end], sampling)
        start = end
    return ids


def seeds(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(100 + i) for i in range(count)]


@pytest.mark.parametrize(("n", "g", "c"), SHAPES)
@pytest.mark.parametrize(
    "sampling",
    [
        SamplingConfig(guidance_scale=1.0),
        SamplingConfig(guidance_scale=2.0),
        SamplingConfig(guidance_scale=3.0, guidance_schedule="linear", temperature=1.3),
        SamplingConfig(guidance_scale=1.5, temperature=0),
        SamplingConfig(guidance_scale=0.0, top_k=5, top_p=0.9),
    ],
    ids=str,
)
def test_the_cache_is_exact(n: int, g: int, c: int, sampling: SamplingConfig):
    model = make(n, g, c)
    values = dict(vars(sampling))
    ids = model.generate(CLASSES, generator=seeds(3), **values)
    assert ids.shape == (3, n) and ids.dtype == torch.int64
    assert torch.equal(ids, naive(model, CLASSES, sampling, image_noise(seeds(3), n)))
    for count in model.schedule.valid_counts:
        assert torch.equal(model.generate(CLASSES, generator=seeds(3), num_tokens=count, **values), ids[:, :count])


def test_guidance_1_makes_no_null_pass():
    model = make(16, 4, 4)
    model.engine = "torch"  # the native one calls no modules
    sizes: list[int] = []
    model.head.register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[0])))
    model.generate(CLASSES, guidance_scale=1.0)
    assert sizes == [3] * 7  # 4 single tokens and 3 groups
    sizes.clear()
    model.generate(CLASSES, guidance_scale=1.5)
    assert sizes == [6] * 7


def test_guidance_schedules():
    schedule = make(16, 4, 4).schedule
    linear = SamplingConfig(guidance_scale=1.5, guidance_schedule="linear")
    assert [guidance_at(linear, schedule, start) for start in (0, 1, 3)] == [1.5] * 3  # single tokens
    expected = [1.5 * (4 - i + 1) / 5 for i in (1, 2, 3)]  # M = 4 groups, of which the first is the single tokens
    assert [guidance_at(linear, schedule, start) for start in (4, 8, 12)] == expected == pytest.approx([1.2, 0.9, 0.6])
    constant = SamplingConfig(guidance_scale=1.5)
    assert {guidance_at(constant, schedule, start) for start in (0, 4, 12)} == {1.5}


def test_every_image_has_its_own_noise():
    model = make(16, 4, 4)
    together = model.generate(CLASSES, generator=seeds(3))
    for i in range(3):
        alone = model.generate(CLASSES[i : i + 1], generator=[torch.Generator().manual_seed(100 + i)])
        assert torch.equal(alone[0], together[i])
    one = torch.Generator().manual_seed(5)
    first = model.generate(CLASSES, generator=one)
    assert not torch.equal(first, model.generate(CLASSES, generator=one))  # a generator goes on
    assert torch.equal(first, model.generate(CLASSES, generator=torch.Generator().manual_seed(5)))
    torch.manual_seed(6)
    first = model.generate(CLASSES)
    assert not torch.equal(first, model.generate(CLASSES))
    torch.manual_seed(6)
    assert torch.equal(first, model.generate(CLASSES))
    with pytest.raises(DetailFlowError, match="a list of 3, one per image, not a list of 2"):
        model.generate(CLASSES, generator=seeds(2))


def test_temperature_0_is_argmax():
    model = make(16, 4, 4)
    ids = model.generate(CLASSES, temperature=0, guidance_scale=1.0)
    assert torch.equal(ids, model.generate(CLASSES, temperature=0, guidance_scale=1.0))
    with torch.no_grad():
        assert torch.equal(model(CLASSES, ids).argmax(-1), ids)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_logits_that_are_no_numbers(value: float, temperature: float):
    """They ended silently in the last code."""
    model = make(8, 4, 4)
    model.head.weight.data[3, 0] = value
    with pytest.raises(DetailFlowError, match="the AR model's logits are not finite: its weights are damaged"):
        model.generate(CLASSES, temperature=temperature)
    with pytest.raises(DetailFlowError, match="the AR model's logits are not finite"):
        model.generate(CLASSES, temperature=temperature, num_tokens=1)


def test_numpys_numbers_are_numbers():
    model = make(8, 1, 1)
    values = dict(guidance_scale=np.float32(1.5), temperature=np.float64(0.5), top_k=np.int64(3), top_p=np.float32(0.5))
    assert json.dumps(vars(SamplingConfig(**values)))
    ids = model.generate(CLASSES, generator=seeds(3), **values)
    assert torch.equal(
        ids, model.generate(CLASSES, generator=seeds(3), guidance_scale=1.5, temperature=0.5, top_k=3, top_p=0.5)
    )


def test_the_models_own_best_values():
    model = make(8, 1, 1, guidance_scale=2.5, temperature=0.7, top_k=4)
    explicit = model.generate(CLASSES, guidance_scale=2.5, temperature=0.7, top_k=4, generator=seeds(3))
    assert torch.equal(model.generate(CLASSES, generator=seeds(3)), explicit)


# ------------------------------------------------------------------------------------------------- one draw


def draws(logits: torch.Tensor, count: int, sampling: SamplingConfig) -> torch.Tensor:
    """(K,) logits → counts of each code."""
    noise = torch.rand(count, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return torch.bincount(sample(logits.expand(count, 1, -1), noise, sampling)[:, 0], minlength=len(logits)).double()


def allowed(probabilities: list[float], top_k: int | None, top_p: float | None) -> set[int]:
    """The codes that top-k and top-p leave, by their definitions: top-k first, top-p of what that left."""
    order = sorted(range(len(probabilities)), key=lambda i: -probabilities[i])[:top_k]
    if top_p is None:
        return set(order)
    total, kept = sum(probabilities[i] for i in order), 0.0
    nucleus = set()
    for i in order:
        if kept / total >= top_p:
            break
        nucleus.add(i)
        kept += probabilities[i]
    return nucleus


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize(
    ("top_k", "top_p"),
    [(None, None), (1, None), (5, None), (99, None), (None, 1.0), (None, 0.3), (None, 0.9), (8, 0.8)],
)
def test_the_distribution(temperature: float, top_k: int | None, top_p: float | None):
    logits = torch.randn(20, generator=torch.Generator().manual_seed(2)) * 1.5
    probabilities = (logits.double() / temperature).softmax(-1)
    kept = allowed(probabilities.tolist(), top_k, top_p)
    expected = torch.tensor(
        [p if i in kept else 0.0 for i, p in enumerate(probabilities.tolist())], dtype=torch.float64
    )
    expected *= 40000 / expected.sum()
    counts = draws(logits, 40000, SamplingConfig(temperature=temperature, top_k=top_k, top_p=top_p))
    assert counts.sum() == 40000
    assert float(counts[expected == 0].sum()) == 0
    likely = expected > 0
    statistic = float(((counts - expected)[likely] ** 2 / expected[likely]).sum())
    freedom = max(int(likely.sum()) - 1, 1)
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("noise", [0.0, 1 - 2**-53])
def test_the_ends_of_the_noise(noise: float):
    """Never a code of probability zero, at either end."""
    logits = torch.tensor([-torch.inf, 0.0, 1.0, -torch.inf])
    ids = sample(logits.expand(1, 1, 4), torch.full((1, 1), noise, dtype=torch.float64), SamplingConfig())
    assert ids.item() == (1 if noise == 0 else 2)


@pytest.mark.parametrize("temperature", [1e-40, 1e-300, 5e-324, 1e-38])
def test_a_tiny_temperature_is_argmax(temperature: float):
    logits = torch.randn(2, 3, 50, generator=torch.Generator().manual_seed(0)) * 10
    logits[0, 0, :5] = logits[0, 0].max() + 1  # ties are drawn from
    noise = torch.full((2, 3), 0.5, dtype=torch.float64)
    ids = sample(logits, noise, SamplingConfig(temperature=temperature))
    assert ids[0, 0] == 2
    assert torch.equal(ids.flatten()[1:], logits.argmax(-1).flatten()[1:])
    model = make(8, 1, 1)
    assert torch.equal(model.generate(CLASSES, temperature=temperature), model.generate(CLASSES, temperature=0))


@pytest.mark.parametrize("temperature", [1e38, 1e300, 1.7e308])
def test_a_huge_temperature_is_uniform(temperature: float):
    logits = torch.tensor([[[5.0, -5.0, 0.0, -torch.inf]]])
    for noise, code in ((0.1, 0), (0.5, 1), (0.9, 2)):
        ids = sample(logits, torch.full((1, 1), noise, dtype=torch.float64), SamplingConfig(temperature=temperature))
        assert ids.item() == code


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k", [1, 2, 3, 7])
def test_top_k_keeps_k_codes(k: int, dtype: torch.dtype):
    """Of equally likely codes the lowest stay, which bfloat16 nearly always has."""
    logits = torch.tensor([2.0, 1.0, 2.0, 1.0, 1.0, 0.0, 1.0, 0.0]).to(dtype)
    kept = draws(logits, 4000, SamplingConfig(top_k=k)).nonzero().flatten().tolist()
    assert kept == sorted([0, 2, 1, 3, 4, 6, 5][:k])


def test_top_p_keeps_the_lower_of_equally_likely_codes():
    assert draws(torch.zeros(100), 4000, SamplingConfig(top_p=0.035)).nonzero().flatten().tolist() == [0, 1, 2, 3]
    assert draws(torch.zeros(100), 10, SamplingConfig(top_p=1e-60)).nonzero().flatten().tolist() == [0]


def test_noise_of_1_is_the_last_code_that_can_be_drawn():
    logits = torch.tensor([[[0.0, 1.0, -torch.inf]]])
    assert sample(logits, torch.ones(1, 1), SamplingConfig()).item() == 1


def test_generated_tokens_follow_the_model():
    """The first token of many images of one class, against the softmax of the model's logits."""
    model = make(8, 1, 1)
    with torch.no_grad():
        logits = model(torch.tensor([1]), torch.zeros(1, 8, dtype=torch.int64))[0, 0]
    generator = torch.Generator().manual_seed(0)
    ids = model.generate(torch.full((5000,), 1), guidance_scale=1.0, num_tokens=1, generator=generator)[:, 0]
    expected = logits.double().softmax(-1) * 5000
    drawn = Counter(ids.tolist())
    common = [i for i in range(32) if expected[i] > 5]
    statistic = sum((drawn[i] - float(expected[i])) ** 2 / float(expected[i]) for i in common)
    assert len(common) > 3 and statistic < len(common) + 5 * (2 * len(common)) ** 0.5


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"guidance_scale": -1.0}, "guidance_scale must be 0 or more"),
        ({"guidance_scale": float("inf")}, "guidance_scale must be"),
        ({"guidance_scale": 1e300}, "guidance_scale must be 0 or more .*, at most 1e.06, not 1e.300"),
        ({"guidance_schedule": "cosine"}, "guidance_schedule must be constant or linear, not 'cosine'"),
        ({"temperature": -0.1}, "temperature must be 0"),
        ({"top_k": -1}, "top_k must be 0 or more .0 is off., not -1"),
        ({"top_k": 2.5}, "top_k must be an integer, 0 or more .0 is off., not 2.5"),
        ({"top_k": True}, "top_k must be an integer, 0 or more .0 is off., not True"),
        ({"top_p": "most"}, "top_p must be above 0 and at most 1 .1 is off., not 'most'"),
        ({"temperature": "hot"}, "temperature must be 0 .argmax. or more, not 'hot'"),
        ({"guidance_scale": float("nan")}, "guidance_scale must be 0 or more"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1 .1 is off., not 0.0"),
    ],
)
def test_values_out_of_range(values: dict, message: str):
    with pytest.raises(DetailFlowError, match=message):
        SamplingConfig(**values)
    with pytest.raises(DetailFlowError, match=message):
        make(8, 1, 1).generate(CLASSES, **values)


@pytest.mark.parametrize("off", [0, "off"])
def test_an_own_top_k_that_is_switched_off(off: int | str):
    own = SamplingConfig(top_k=5)
    assert own.updated(top_k=off).top_k is None and own.updated(top_k=None).top_k == 5
    assert SamplingConfig(top_k=0) == SamplingConfig()
    model = make(8, 1, 1)
    given = {"top_k": off, "temperature": 2.0}
    drawn = [
        model.generate(CLASSES, generator=torch.Generator().manual_seed(3), **given)
        for given in (given, {"temperature": 2.0})
    ]
    assert torch.equal(*drawn)


def test_an_argument_that_is_not_known():
    for given, way in (
        ({"cfg": 2}, "unknown argument 'cfg': the arguments are prefix, generator, num_tokens, guidance_scale, "),
        ({"temprature": 1.0}, "unknown argument 'temprature': did you mean temperature"),
        ({"num_token": 4}, "unknown argument 'num_token': did you mean num_tokens"),
    ):
        with pytest.raises(TypeError, match=way):
            make(8, 1, 1).generate(CLASSES, **given)
    with pytest.raises(TypeError, match="unknown argument 'guidance': did you mean guidance_scale"):
        make(8, 1, 1).sampling(guidance=3)


# --- known first tokens ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "g", "c"), SHAPES)
@pytest.mark.parametrize("static", [False, True], ids=["growing", "static"])
def test_a_prefix_enters_the_cache_in_one_pass(n: int, g: int, c: int, static: bool):
    """Its logits, and those of the next step, are those of step after step, with and without the null class."""
    model = make(n, g, c)
    if static:  # the cache of a compiled program, without the minutes of compiling
        model.compiled_logits, model.compiled_for = model.logits, len(CLASSES)
    ids = torch.randint(32, (len(CLASSES), n), generator=torch.Generator().manual_seed(1))
    stepwise = TorchEngine(model, CLASSES, guided=True)
    expected = torch.cat([stepwise.step(ids, start, end) for start, end in model.schedule.steps], 1)
    with torch.no_grad():
        null = torch.full_like(CLASSES, model.config.num_classes)
        torch.testing.assert_close(expected, torch.cat((model(CLASSES, ids), model(null, ids))), atol=1e-4, rtol=1e-4)
    for k, following in zip(model.schedule.valid_counts, [*model.schedule.steps[1:], None], strict=True):
        cached = TorchEngine(model, CLASSES, guided=True)
        torch.testing.assert_close(cached.prefill(ids, k), expected[:, :k], atol=1e-4, rtol=1e-4)
        if following:
            start, end = following
            torch.testing.assert_close(cached.step(ids, start, end), expected[:, start:end], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("n", "g", "c"), SHAPES)
def test_a_prefix_of_its_own_changes_nothing(n: int, g: int, c: int):
    model = make(n, g, c)
    whole = model.generate(CLASSES, generator=seeds(3), guidance_scale=2.0)
    for k in model.schedule.valid_counts:
        again = model.generate(CLASSES, prefix=whole[:, :k], generator=seeds(3), guidance_scale=2.0)
        assert torch.equal(again, whole)
        steps = list(model.stream(CLASSES, model.sampling(), seeds(3), prefix=whole[:, :k]))
        assert [ids.shape[1] for ids in steps] == [m for m in model.schedule.valid_counts if m >= k]
        assert torch.equal(steps[0], whole[:, :k])


def test_another_prefix_is_kept_and_gone_on_from():
    model = make(16, 4, 4)
    prefix = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]])
    made = model.generate(CLASSES, prefix=prefix, temperature=0, guidance_scale=1)
    assert torch.equal(made[:, :4], prefix)
    ids = torch.cat((prefix, torch.zeros(3, 12, dtype=torch.int64)), 1)
    for start in (4, 8, 12):  # the whole sequence through `forward` for every group
        with torch.no_grad():
            ids[:, start : start + 4] = model(CLASSES, ids)[:, start : start + 4].argmax(-1)
    assert torch.equal(made, ids)
    assert torch.equal(model.generate(CLASSES, prefix=prefix, num_tokens=4), prefix)


@pytest.mark.parametrize(
    ("prefix", "options", "message"),
    [
        (
            torch.zeros(3, 5, dtype=torch.int64),
            {},
            "the length of prefix must be 1 to 4 or a multiple of 4 up to 16, not 5",
        ),
        (torch.zeros(3, 0, dtype=torch.int64), {}, "the length of prefix must be 1 to 4"),
        (torch.zeros(2, 4, dtype=torch.int64), {}, "prefix must have a row for each of 3 images, not 2"),
        (torch.zeros(4, dtype=torch.int64), {}, "prefix must be integers in 2 dimension"),
        (torch.zeros(3, 4), {}, "prefix must be integers"),
        (torch.full((3, 4), 32), {}, "prefix must be 0 to 31"),
        (
            torch.zeros(3, 8, dtype=torch.int64),
            {"num_tokens": 4},
            "num_tokens must be at least the 8 tokens of prefix, not 4",
        ),
    ],
)
def test_prefixes_that_cannot_be(prefix: torch.Tensor, options: dict[str, int], message: str):
    with pytest.raises(DetailFlowError, match=message):
        make(16, 4, 4).generate(CLASSES, prefix=prefix, **options)
