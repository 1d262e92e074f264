"""What a plan says: a counted step against the same step done, against closed forms, and the page itself."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from detailflow import DetailFlowGPT, DetailFlowTokenizer
from detailflow.data.images import open_images
from detailflow.device import to_device
from detailflow.distributed import World
from detailflow.errors import DetailFlowError
from detailflow.models.gpt import GPTConfig
from detailflow.models.layers import ViTConfig
from detailflow.models.quantizer import VectorQuantizer
from detailflow.models.siglip2 import SigLIP2
from detailflow.models.tokenizer import TokenizerConfig
from detailflow.native import training as in_cpp
from detailflow.published_names import vit_names
from detailflow.training.config import Extraction, GPTTraining, LoopConfig, TokenizerTraining
from detailflow.training.counting import Counter, StepCosts, Trial, counting
from detailflow.training.gpt import GPTStage
from detailflow.training.plan import (
    AUXILIARY,
    FROZEN,
    STAYING,
    TRAINED,
    Expected,
    Network,
    Plan,
    describe_duration,
    extraction_seconds,
    networks_of,
    plan_gpt,
    plan_tokenizer,
    planned_world,
    rough_bytes,
)
from detailflow.training.tokenizer import TokenizerStage

GIB = 2**30
CPU = torch.device("cpu")
SIZES = TokenizerConfig(ViTConfig(64, 2, 2), ViTConfig(48, 1, 2), 32, 4, 32, 8, 8, codebook_size=64)
GPT = GPTConfig(num_classes=4, width=64, depth=2, heads=2, num_tokens=32, codebook_size=256)
LOOP = LoopConfig(steps=100, batch_size=16, learning_rate=1e-3)
# What the paper's recipe trains with, in small.
PAPER: dict[str, Any] = dict(
    perceptual=1.0,
    perceptual_network="lpips",
    adversarial_network="dino",
    augment=True,
    lecam=0.001,
    consistency=4.0,
    adversarial_from=0.0,
    alignment=1.0,
)


def gpt_stage(loop: LoopConfig = LOOP, sizes: GPTConfig = GPT) -> GPTStage:
    return GPTStage(GPTTraining("tokens", "model", loop), sizes, None, None, CPU)  # type: ignore[arg-type]


def gpt_batch(sizes: GPTConfig = GPT, rows: int = 16) -> list[torch.Tensor]:
    return [
        torch.zeros(shape, dtype=torch.long) for shape in ((rows,), (rows, sizes.num_tokens), (rows, sizes.num_tokens))
    ]


def size_of(*modules: nn.Module) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


# ------------------------------------------------------------------------------------------------- counting


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_counted_step_is_the_step(precision: str, checkpointed: bool):
    """Operations and memory of tensors without data are those of the same step on real ones."""
    loop = replace(LOOP, precision=precision, checkpoint_activations=checkpointed)
    found = []
    for data in (False, True):
        mode: AbstractContextManager[Counter] = Counter() if data else counting()
        with mode as counter:
            stage, batch = gpt_stage(loop), gpt_batch()
            stage.step(0, batch, 1e-3)
            found.append(counter.of(lambda: stage.step(0, batch, 1e-3)))  # noqa: B023
        if data:
            with FlopCounterMode(display=False) as flops:
                stage.step(0, batch, 1e-3)
            assert flops.get_total_flops() == found[0][0]
    assert found[0] == found[1]


def test_what_is_held():
    with counting() as counter:
        kept = torch.zeros(1000)
        view = kept.view(10, 100)
        operations, peak = counter.of(partial(torch.matmul, view, torch.zeros(100, 5)))
        assert (operations, peak) == (2 * 10 * 100 * 5, 4 * 10 * 5)
        assert counter.bytes == 4000
        del kept  # a view holds all
        assert counter.bytes == 4000
        del view
        assert counter.bytes == 0


def test_an_ar_model_costs_what_is_known_of_it(monkeypatch: pytest.MonkeyPatch):
    """Six operations a weight and token, and the pairs that attend.

    Memory falls with depth times what a block keeps. (In C++ dropout keeps nothing, so a block's last product is not
    computed again.)
    """
    monkeypatch.setattr(in_cpp, "can_run", lambda *_: False)
    sizes = GPTConfig(num_classes=4, width=256, depth=4, heads=4, num_tokens=64, codebook_size=1024)
    costs, stage = Trial(lambda: gpt_stage(sizes=sizes), lambda: gpt_batch(sizes), CPU).costs()
    with torch.device("meta"):
        model = DetailFlowGPT(sizes)
    weights = size_of(model) - size_of(model.class_embedding, model.token_embedding, model.mask_embedding)
    pairs = 12 * sizes.depth * sizes.num_tokens**2 * sizes.width
    assert costs.first == costs.last == pytest.approx(16 * (6 * weights * sizes.num_tokens + pairs), rel=0.05)
    assert costs.recomputed == pytest.approx(16 * (2 * size_of(model.blocks) * sizes.num_tokens + pairs / 3), rel=0.05)
    assert networks_of(stage) == [Network("AR model", TRAINED, size_of(model), 4 * size_of(model))]
    assert costs.peak_recomputed < 0.5 * costs.peak


def test_a_tokenizer_costs_what_is_known_of_it(cifar: Path):
    config = TokenizerTraining(
        str(cifar), SIZES, replace(LOOP, precision="fp32"), adversarial=0.0, correction_share=0.0
    )
    plan = plan_tokenizer(config, World())
    with torch.device("meta"):
        model = DetailFlowTokenizer(SIZES)
    tokens = 64 + 32  # patches and tokens
    of_blocks = 2 * tokens * (size_of(model.encoder.blocks, model.decoder.blocks))
    pairs = 4 * (64 * (2 * (64**2 + 32 * tokens)) + 48 * tokens**2)
    known = 16 * 3 * (of_blocks + pairs)  # a little less: what the last block makes of patches gets no gradients
    assert 0.85 * known < plan.operations < 1.02 * known
    corrected = plan_tokenizer(replace(config, correction_share=1.0), World())
    assert 1.3 * plan.operations < corrected.operations < 2 * plan.operations
    assert corrected.costs.peak > 1.3 * plan.costs.peak


@pytest.mark.parametrize("settings", [{"muon": 1e-3}, {"freeze": "encoder"}, {"adversarial": 0.0}], ids=str)
def test_what_a_run_keeps_is_what_it_has_learnt_with(cifar: Path, tmp_path: Path, settings: dict[str, Any]):
    """Gradients of what is trained alone, and averages as its optimisers have them: a checkpoint is as large."""
    if "freeze" in settings:
        DetailFlowTokenizer(SIZES).save_pretrained(tmp_path)
        settings = settings | {"init": str(tmp_path)}
    loop = replace(LOOP, precision="fp32")
    config = TokenizerTraining(str(cifar), SIZES, loop, **{"adversarial_from": 0.0, **settings})
    plan = plan_tokenizer(config, World())
    stage = TokenizerStage(config, open_images(cifar), Path("nowhere"), CPU, "plan")
    stage.step(99, next(stage.batches(0)), 1e-3)
    kept = sum(tensor.nbytes for tensor in tree_leaves(stage.state()) if isinstance(tensor, torch.Tensor))
    assert plan.checkpoint_bytes == pytest.approx(kept, rel=0.02)  # a few weights never get gradients
    trained = [weight for weight in stage.updater.parameters() if weight.requires_grad]
    trained += list(stage.adversary.updater.parameters()) if stage.adversary else []
    assert plan.memory["gradients"] == 4 * sum(weight.numel() for weight in trained)
    roles = {network.name: network.role for network in plan.networks}
    assert (roles["encoder"], roles["quantizer"]) == (STAYING if "freeze" in settings else TRAINED,) * 2


def test_extraction_is_planned_with_its_search(cifar: Path, monkeypatch: pytest.MonkeyPatch):
    searches = []
    search = VectorQuantizer.search

    def noted(self: VectorQuantizer, *given: Any) -> Iterator[Tensor]:
        searches.append(given[3])
        return search(self, *given)

    monkeypatch.setattr(VectorQuantizer, "search", noted)
    for steps in (0, 2):
        config = Extraction(str(cifar), "tokenizer", search=steps)
        assert extraction_seconds(config, SIZES, 200, World(), CPU) > 0
        assert set(searches) == ({2} if steps else set())


def test_an_adversary_costs_its_share_of_the_steps(cifar: Path):
    config = TokenizerTraining(str(cifar), SIZES, LOOP, correction_share=0.0)
    never, late, always = (
        plan_tokenizer(replace(config, adversarial_from=k), World()).operations for k in (100.0, 40.0, 0.0)
    )
    assert late == pytest.approx(0.4 * never + 0.6 * always) and always > 1.1 * never


def test_parts_of_a_batch_take_less_memory():
    whole, _ = Trial(gpt_stage, gpt_batch, CPU).costs()
    parts, _ = Trial(lambda: gpt_stage(replace(LOOP, accumulate=4)), gpt_batch, CPU).costs()
    assert parts.last == whole.last and parts.peak < 0.5 * whole.peak


def test_a_step_is_counted_for_a_gpu_too():
    """Its batch goes there through pinned memory, which fake tensors do not have."""
    with counting() as counter:
        try:
            torch.zeros(1).to("cuda")
        except torch.AcceleratorError:
            pytest.skip("this PyTorch has no fake tensors on a GPU without one, as 2.9")
        tensor = to_device(torch.zeros(4, 4), torch.device("cuda"))
        assert tensor.device.type == "cuda"
        assert counter.of(lambda: tensor @ tensor)[0] == 2 * 4**3


def test_nothing_of_it_stays():
    """The networks of a training that follows in the same process are real, and so is what they attend with."""
    from detailflow.models import layers

    before = layers.SCORES
    with pytest.raises(ZeroDivisionError), counting():
        raise ZeroDivisionError
    assert before == layers.SCORES
    assert nn.Linear(2, 2).double().weight.dtype == torch.float64 and torch.ones(1).tolist() == [1.0]


# ------------------------------------------------------------------------------------------------- networks


@pytest.fixture
def tower(tmp_path: Path) -> Path:
    """The folder of a small SigLIP2."""
    model, stored = SigLIP2(ViTConfig(64, 2, 1), patch_size=8), {}
    for ours, theirs in vit_names("", "", 2):
        parts = model.state_dict()[ours].chunk(len(theirs))
        stored |= {name: part.clone() for name, part in zip(theirs, parts, strict=True)}
    save_file(stored, tmp_path / "model.safetensors")
    return tmp_path


def test_networks_that_would_be_downloaded(cifar: Path, tower: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("detailflow.hub_client.fetch", None)
    pytest.importorskip("torchvision.models")  # before, as it would keep the None for good
    monkeypatch.setattr("torch.hub.load_state_dict_from_url", None)
    config = TokenizerTraining(
        str(cifar), SIZES, replace(LOOP, precision="bf16"), **PAPER,
        encoder_init="owner/name", alignment_network=str(tower),
    )  # fmt: skip
    plan = plan_tokenizer(config, World(size=4))
    assert plan.epochs == 100 / (200 // 16) and plan.tokens == 32
    networks = {network.name: network for network in plan.networks}
    fates = [network.role for network in plan.networks]
    assert fates == [TRAINED, TRAINED, TRAINED, AUXILIARY, FROZEN, FROZEN, AUXILIARY, FROZEN]
    with torch.device("meta"):
        model, small = DetailFlowTokenizer(SIZES), SigLIP2(ViTConfig(64, 2, 1), patch_size=8)
    assert plan.parameters(TRAINED) == size_of(model)
    assert networks["SigLIP2"][2:4] == (size_of(small), 2 * size_of(small))
    downloaded = {name for name, network in networks.items() if network.downloaded}
    assert downloaded == {"DINO ViT-S/16", "VGG-16 (LPIPS)"}  # not a tower in a folder
    lines = plan.text(1e12, 0.5, "cpu").splitlines()
    assert sum(line.endswith("frozen, downloaded once") for line in lines) == 2 and max(map(len, lines)) <= 80
    assert networks["DINO ViT-S/16"].parameters == 21_665_664
    assert networks["VGG-16 (LPIPS)"].parameters == 14_714_688 + 64 + 128 + 256 + 512 + 512
    with pytest.raises(DetailFlowError, match="a batch of 16 cannot be divided evenly among 3 processes"):
        plan_tokenizer(config, World(size=3))


def test_networks_that_learn_from_scratch(cifar: Path):
    config = TokenizerTraining(str(cifar), SIZES, LOOP, perceptual=1.0, alignment=1.0, adversarial_from=40.0)
    plan = plan_tokenizer(config, World())
    names = [(network.name, network.role) for network in plan.networks[3:]]
    assert names == [("head of the alignment", AUXILIARY), ("classifier", FROZEN), ("discriminator", AUXILIARY)]
    source = open_images(cifar)
    stage = TokenizerStage(config, source, Path("nowhere"), CPU, "plan")
    sizes = [size_of(n) for n in (stage.networks.head, stage.teachers.features, stage.adversary.network)]  # type: ignore
    assert [network.parameters for network in plan.networks[3:]] == sizes


def test_networks_of_a_package(cifar: Path, monkeypatch: pytest.MonkeyPatch):
    """Their weights are not read."""
    monkeypatch.setattr("detailflow.models.efficientnet.find_weights", None)
    settings: dict[str, Any] = dict(perceptual_network="efficientnet-lite0", alignment_network="efficientnet-lite0")
    settings |= dict(perceptual=1.0, alignment=1.0, adversarial_network="projected", adversarial_from=0.0)
    plan = plan_tokenizer(TokenizerTraining(str(cifar), SIZES, LOOP, **settings), World())
    networks = {network.name: network for network in plan.networks}
    frozen = networks["EfficientNet-Lite0"]
    assert frozen.role == FROZEN and frozen.parameters == pytest.approx(4.65e6, rel=0.01)
    assert networks["heads of the discriminator"].role == AUXILIARY


def test_a_teacher_has_its_own_size(tower: Path):
    expected = SigLIP2(ViTConfig(64, 2, 1), patch_size=8).state_dict()
    made = SigLIP2.without_weights(str(tower), CPU, torch.bfloat16)
    assert {name: t.shape for name, t in made.state_dict().items()} == {name: t.shape for name, t in expected.items()}
    assert made.patch_size == 8 and {p.dtype for p in made.parameters()} == {torch.bfloat16}
    with torch.device("meta"):
        made = SigLIP2.without_weights("owner/name", "meta", torch.bfloat16)
    assert size_of(made) == pytest.approx(412e6, rel=0.01)


# ------------------------------------------------------------------------------------------------- sums


def of(loop: LoopConfig = LOOP, world: int = 1, ema: bool = False) -> Plan:
    """Networks of 1,000 weights that are trained, 100 thrown away and 10 frozen."""
    networks = (Network("a", TRAINED, 1000, 4000), Network("b", AUXILIARY, 100, 400), Network("c", FROZEN, 10, 20))
    return Plan("a test", loop, 2.0, 8, networks, world, StepCosts(500.0, 500.0, 6000, 100.0, 4700, 8 * 1100), ema=ema)


def test_sums():
    plan = of()
    assert plan.operations == 500 and plan.checkpoint_bytes == 12 * 1100
    assert plan.memory == {"weights": 4400, "gradients": 4400, "the optimiser's averages": 8800, "frozen weights": 20}
    assert plan.activations(False) == 2000 and plan.activations(True) == 700
    assert plan.seconds(1000.0, 0.5) == 100 * 500 / 500


def test_the_disk_that_a_run_takes():
    """Its last checkpoints, milestones, the best one by validation, and the model."""
    one, model = 12 * 1100, 4 * 1000
    assert of(replace(LOOP, keep=2, val_every=0)).disk_bytes == 2 * one + model
    assert of(replace(LOOP, keep=2, val_every=10)).disk_bytes == 3 * one + model
    assert of(replace(LOOP, keep=2, steps=100, val_every=10, milestone_every=25)).disk_bytes == 7 * one + model
    assert of(replace(LOOP, keep=2, steps=1, val_every=10)).disk_bytes == one + model


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "0.2 seconds"),
        (1.0, "1 second"),
        (119, "120 seconds"),
        (120, "2 minutes"),
        (4014, "67 minutes"),
        (62_640, "17 hours"),
    ],
)
def test_a_duration_in_two_digits(seconds: float, text: str):
    assert describe_duration(seconds) == text


@pytest.mark.parametrize(
    ("size", "text"),
    [(512, "510 bytes"), (1234, "1.2 kB"), (466.7e6, "470 MB"), (2e9, "2 GB"), (1.234e15, "1,200,000 GB")],
)
def test_bytes_in_two_digits(size: float, text: str):
    assert rough_bytes(size) == text


def test_sums_of_several_processes():
    plan = of(replace(LOOP, accumulate=2, checkpoint_activations=True, precision="fp32"), world=4, ema=True)
    assert plan.operations == 4 * 600 and plan.checkpoint_bytes == 16 * 1100
    assert plan.memory["gradients on their way"] == plan.memory["average of the weights"] == 4400
    assert plan.seconds(1000.0, 1.0) == 100 * 600 / 1000
    sharded = of(replace(LOOP, shard=True), world=4, ema=True)
    assert sharded.memory["weights"] == sharded.memory["average of the weights"] == 1100
    assert "gradients on their way" not in sharded.memory
    assert sharded.memory["the optimiser's averages"] == 8 * 1100 / 4


class Tried(Trial[Any]):
    """A step that takes two seconds."""

    def seconds(self) -> float:
        return 2.0


def test_the_time_by_steps_that_were_tried():
    plan = replace(of(replace(LOOP, patience=3)), trial=Tried(object, object, CPU))
    assert plan.seconds(1000.0, 0.5) == 100.0 and plan.expected_seconds(1000.0, 0.5) == 100 * 2.0
    assert plan.expected_seconds(10.0, 0.5) == plan.seconds(10.0, 0.5)  # 100 seconds a step are not tried
    assert of().expected_seconds(1000.0, 0.5) == 100.0
    memory = "20 kB of memory and PyTorch's own"
    assert plan.all_memory == 19_620
    assert plan.brief(200.0) == f"1,000 parameters, up to 100 steps of 16 images: up to 3.3 minutes, {memory}"
    assert of().brief(200.0).startswith("1,000 parameters, 100 steps of 16 images: 3.3 minutes")


def test_a_trial_takes_real_steps(monkeypatch: pytest.MonkeyPatch):
    """Of the run's last kind, on weights and a batch of the right shapes."""
    steps = []

    class Counted(GPTStage):
        def step(self, step: int, batch: Any, rate: float, log: bool = True) -> dict[str, Any]:
            steps.append(step)
            return super().step(step, batch, rate, log)

    config = GPTTraining("tokens", "model", LOOP)
    trial = Trial(lambda: Counted(config, GPT, None, None, CPU, True), gpt_batch, CPU)  # type: ignore[arg-type]
    assert trial.seconds() > 0 and steps == [99] * 3
    monkeypatch.setattr("detailflow.training.counting.TRIED_SECONDS", 0.0)
    assert trial.seconds() > 0 and steps == [99] * 4  # a slow step is tried once


# ------------------------------------------------------------------------------------------------- plans and pages


def test_of_an_ar_model(model: Path, tokens: Path):
    config = GPTTraining(str(tokens), str(model), LOOP, width=32, depth=2, heads=2)
    plan = plan_gpt(config, World())
    assert plan.of == "an AR model, on 200 images of 10 classes, 2 crops of each"
    assert (plan.tokens, plan.ema) == (16, True) and plan.store_bytes > 200 * 2 * 3 * 16 * 2
    sizes = GPTConfig(num_classes=10, width=32, depth=2, heads=2, num_tokens=16, group_size=4, codebook_size=64)
    assert plan.parameters(TRAINED) == size_of(DetailFlowGPT(sizes))
    known = DetailFlowTokenizer.from_pretrained(model / "tokenizer").config
    names = tuple(f"class{number}" for number in range(10))
    ahead = plan_gpt(replace(config, tokens="none"), World(), CPU, Expected(200, 2, names, known, plan.store_bytes))
    assert replace(ahead, trial=None) == replace(plan, trial=None)  # before there are tokens
    averages = plan_gpt(replace(config, muon=1e-3), World()).memory["the optimiser's averages"]
    of_one = 4 * 2 * (4 * 32 * 32 + 3 * 32 * 256)  # bytes of the matrices, of which Muon has one average
    assert averages == pytest.approx(8 * size_of(DetailFlowGPT(sizes)) - of_one, abs=100)  # and the numbers of steps
    several = plan_gpt(replace(config, loop=replace(LOOP, shard=True, compile=True)), World(size=4))
    assert several.operations == plan.operations and several.costs.peak < plan.costs.peak


def test_the_page():
    loop = replace(LOOP, steps=1_251_000, batch_size=256, accumulate=4, milestone_every=1000, keep=3)
    networks = (Network("AR model", TRAINED, 326_000_000, 4 * 326_000_000),)
    costs = StepCosts(32 * 250e9, 32 * 250e9, 3.2e9, 32 * 80e9, 2e9)
    page = Plan("a test", loop, 250.0, 128, networks, 8, costs, ema=True, store_bytes=10 * GIB).text(
        400e12, 0.4, "cuda"
    )
    lines = page.splitlines()
    assert max(map(len, lines)) <= 80 and len(lines) < 30
    assert "length     1,251,000 steps of 256 images: 250.0 epochs" in lines
    assert "tokens     128 of an image, 41.0G in all" in lines
    assert "processes  8 processes: 32 images of a step for each, in 4 parts of 8" in lines
    assert "products   64 TFLOP a step, 80.1 EFLOP in all" in lines
    assert "time       about 17 hours, if every process reaches 40% of" in lines  # 80.1e18 / 8 / 160e12
    assert "           the 400 TFLOP/s of bfloat16 products measured here on cuda" in lines
    assert any(line.endswith("for 1,254 checkpoints") for line in lines)
    assert "           10.0 GiB of tokens, which are there" in lines
    assert "activations, about" in page and "with checkpoint_activations" in page


def test_processes_that_need_not_be_there(monkeypatch: pytest.MonkeyPatch):
    assert planned_world() == World()
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("RANK", "3")
    assert planned_world() == World(3, 8)
    for name, value, message in (
        ("RANK", "8", "RANK in the environment must be below WORLD_SIZE, 8, not 8"),
        ("RANK", "main", "RANK in the environment must be a whole number, not 'main': unset it"),
        ("WORLD_SIZE", "-2", "WORLD_SIZE in the environment must be a whole number, not '-2': unset it"),
    ):
        monkeypatch.setenv(name, value)
        for world in (planned_world, World.from_launch):
            with pytest.raises(DetailFlowError, match=message):
                world()
