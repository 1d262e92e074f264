"""What a plan says against what real steps do: operations, what autograd keeps, networks' sizes; and the page itself."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from detailflow import DetailFlowGPT, DetailFlowTokenizer
from detailflow.errors import DetailFlowError
from detailflow.models.gpt import GPTConfig
from detailflow.models.siglip2 import SigLIP2
from detailflow.models.tokenizer import TokenizerConfig
from detailflow.models.vit import ViTConfig
from detailflow.processes import Processes
from detailflow.training.costs import (
    FROZEN,
    THROWN_AWAY,
    TRAINED,
    Network,
    alignment_networks,
    discriminator_networks,
    gpt_network,
    perceptual_network,
    tokenizer_networks,
    transformer_operations,
)
from detailflow.training.gpt import GPTTraining
from detailflow.training.loop import LoopConfig
from detailflow.training.networks import FeatureNetwork, PatchDiscriminator
from detailflow.training.passes import TokenizerNetworks
from detailflow.training.plan import Plan, plan_gpt, plan_tokenizer, processes_of_this_launch
from detailflow.training.tokenizer import TokenizerTraining
from detailflow.training.updates import recompute_activations

GIB = 2**30
SIZES = TokenizerConfig(ViTConfig(64, 6, 2), ViTConfig(48, 3, 2), 32, 4, 32, 8, 8, codebook_size=64)
GPT = GPTConfig(num_classes=4, width=64, depth=3, heads=2, num_tokens=32, codebook_size=256)
LOOP = LoopConfig(steps=100, batch_size=16, learning_rate=1e-3)


def tokenizer_step() -> Tensor:
    """Two images, clean and corrected, to pixels; a new network each time."""
    torch.manual_seed(0)
    networks = TokenizerNetworks(DetailFlowTokenizer(SIZES), 50, None)
    return networks(torch.rand(2, 3, 32, 32), 32, 8, torch.randint(50, (2, 8))).pixels.float()


def gpt_step(checkpointed: bool = False) -> Tensor:
    torch.manual_seed(0)
    model = DetailFlowGPT(GPT).train()
    if checkpointed:
        recompute_activations(model.blocks)
    ids = torch.randint(256, (2, 32))
    return F.cross_entropy(model(torch.arange(2), ids).flatten(0, 1).float(), ids.flatten())


# ------------------------------------------------------------------------------------------------- operations


def operations(function: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def test_operations_of_an_ar_model():
    network = gpt_network(GPT, half=False, on_cpu=True)
    assert operations(lambda: gpt_step().backward()) == 2 * network.operations
    assert operations(lambda: gpt_step(checkpointed=True).backward()) == 2 * (network.operations + network.again)
    assert operations(gpt_step) == 2 * network.operations / 3


def test_operations_of_a_tokenizer():
    networks = tokenizer_networks(SIZES, corrected=1.0, half=False, on_cpu=True)
    planned = 2 * sum(network.operations for network in networks)
    assert operations(tokenizer_step) == pytest.approx(planned / 3, rel=0.005)
    # a little less on the way back: nothing asks for gradients of pixels, or of what the last block makes of patches
    assert 0.94 * planned < operations(lambda: tokenizer_step().sum().backward()) < planned
    plain = tokenizer_networks(SIZES, corrected=0.0, half=False, on_cpu=True)
    assert plain[2].operations == networks[2].operations / 2 and plain[0].operations < 0.75 * networks[0].operations


def test_operations_of_frozen_networks():
    with torch.device("meta"):
        small, patch, tower = FeatureNetwork(1), PatchDiscriminator(), SigLIP2(ViTConfig(64, 2, 2))
        images = torch.empty(1, 3, 32, 32)
    once = operations(lambda: small.features(images))
    network = perceptual_network("classifier", 32, pictures=2.0, half=True)
    assert network.fate == FROZEN and network.operations == 5 * once  # one target, two pictures there and back
    assert alignment_networks("classifier", SIZES, half=True)[1].operations == once
    (judge,) = discriminator_networks("patch", 32, share=0.5, pictures=2.0, views=2, half=True)
    assert judge.fate == THROWN_AWAY and judge.operations == 0.5 * (2 * 3 + 2 * 2) * operations(lambda: patch(images))
    entering = 2 * 4 * 768 * 64  # of four patches, which the estimate leaves out
    assert operations(lambda: tower(images)) == transformer_operations(ViTConfig(64, 2, 2), 4) + entering


# ------------------------------------------------------------------------------------------------- known sizes


def test_vgg16_is_as_large_as_it_is():
    vgg16 = pytest.importorskip("torchvision").models.vgg16
    with torch.device("meta"):
        layers = vgg16(weights=None).features
    network = perceptual_network("lpips", 64, pictures=1.0, half=True)
    assert network.parameters == sum(p.numel() for p in layers.parameters()) + 64 + 128 + 256 + 512 + 512
    assert network.operations == 3 * operations(lambda: layers[:30](torch.empty(1, 3, 64, 64, device="meta")))


def test_dino_is_as_large_as_it_is(tmp_path: Path):
    timm = pytest.importorskip("timm")
    from detailflow.training.discriminator import DINODiscriminator

    model = timm.create_model("vit_small_patch16_224.dino", num_classes=0)
    save_file(model.state_dict(), tmp_path / "dino.safetensors")
    judge = DINODiscriminator(str(tmp_path / "dino.safetensors"))
    heads, backbone = discriminator_networks("dino", 256, share=1.0, pictures=1.0, views=2, half=True)
    assert backbone.parameters == sum(p.numel() for p in model.parameters())
    assert heads.parameters == sum(p.numel() for p in judge.parameters())
    with torch.no_grad():
        once = operations(lambda: judge(torch.zeros(1, 3, 224, 224)))
    assert (heads.operations / 8 + backbone.operations / 4) == pytest.approx(once, rel=0.02)


# ------------------------------------------------------------------------------------------------- memory


def kept(function: Callable[[], object], network: Callable[[], nn.Module], half: bool) -> int:
    """Bytes that autograd keeps of a step, but for weights and what autocast makes of them."""
    storages: dict[int, int] = {}
    held = []  # so that no other storage takes the place of one

    def note(tensor: Tensor) -> Tensor:
        held.append(tensor)
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autocast("cpu", torch.bfloat16, enabled=half), torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        result = function()
    del result
    matrices = sum(m.weight.numel() for m in network().modules() if isinstance(m, nn.Linear))
    return sum(storages.values()) - (2 if half else 4) * matrices


@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("on_cpu", [True, False])
def test_activations(half: bool, on_cpu: bool, monkeypatch: pytest.MonkeyPatch):
    if not on_cpu:  # as a GPU does it, whatever wants gradients
        for module in ("vit", "gpt"):
            monkeypatch.setattr(
                f"detailflow.models.{module}.attend", lambda q, k, v, m=None: F.scaled_dot_product_attention(q, k, v, m)
            )
    measured = kept(gpt_step, lambda: DetailFlowGPT(GPT), half)
    assert 2 * gpt_network(GPT, half, on_cpu).activations == pytest.approx(measured, rel=0.12)
    measured = kept(tokenizer_step, lambda: DetailFlowTokenizer(SIZES), half)
    planned = sum(network.activations for network in tokenizer_networks(SIZES, 1.0, half, on_cpu))
    assert 2 * planned == pytest.approx(measured, rel=0.12)


def test_checkpointing_saves_activations():
    network = gpt_network(replace(GPT, depth=24), half=True, on_cpu=False)
    assert network.kept is not None and network.kept < network.activations / 4
    encoder, _, decoder = tokenizer_networks(SIZES, 1.0, half=True, on_cpu=False)
    for part in (encoder, decoder):
        assert part.kept is not None and part.kept < part.activations / 2


def of(loop: LoopConfig = LOOP, processes: int = 1, ema: bool = False) -> Plan:
    """Networks of 1,000 weights that are trained, 100 thrown away and 10 frozen."""
    networks = (
        Network("a", 1000, TRAINED, operations=30.0, activations=600.0, again=10.0, kept=60.0),
        Network("b", 100, THROWN_AWAY, operations=3.0, activations=40.0),
        Network("c", 10, FROZEN, operations=1.0, weight_bytes=2),
    )
    return Plan("a test", loop, 2.0, 8, networks, processes, ema=ema)


def test_sums():
    plan = of()
    assert plan.operations == 16 * 34 and plan.checkpoint_bytes == 12 * 1100
    assert plan.memory == {
        "weights": 4400,
        "gradients": 4400,
        "Adam's averages": 8800,
        "bf16 copies": 2200,
        "frozen weights": 20,
    }
    assert plan.activations(False) == 16 * 640 and plan.activations(True) == 16 * 100
    assert plan.seconds(1000.0, 0.5) == 100 * 16 * 34 / 500


def test_sums_of_several_processes():
    plan = of(replace(LOOP, accumulate=2, checkpoint_activations=True, precision="fp32"), processes=4, ema=True)
    assert plan.operations == 16 * 44 and plan.checkpoint_bytes == 16 * 1100
    assert plan.memory["gradients on their way"] == plan.memory["average of the weights"] == 4400
    assert "fp32 copies" not in plan.memory
    assert plan.activations(True) == 2 * 100  # 16 images in 4 processes, in 2 parts
    assert plan.seconds(1000.0, 1.0) == 100 * 16 * 44 / 4 / 1000
    sharded = of(replace(LOOP, shard=True), processes=4, ema=True)
    assert sharded.memory["weights"] == sharded.memory["average of the weights"] == 1100
    assert "gradients on their way" not in sharded.memory


# ------------------------------------------------------------------------------------------------- plans and pages


def test_of_a_tokenizer(cifar: Path):
    paper = dict(perceptual=1.0, perceptual_network="lpips", adversarial_network="dino", consistency=4.0, adversarial_from=40.0)
    config = TokenizerTraining(str(cifar), SIZES, LOOP, **paper, alignment=1.0, alignment_network="owner/name")  # type: ignore[arg-type]
    plan = plan_tokenizer(config, Processes(count=4))
    assert plan.epochs == 100 / 12 and plan.tokens == 32  # 200 images make 12 batches of 16
    names = {network.name: network for network in plan.networks}
    fates = [network.fate for network in plan.networks]
    assert fates == [TRAINED, TRAINED, TRAINED, THROWN_AWAY, FROZEN, FROZEN, THROWN_AWAY, FROZEN]
    assert names["SigLIP2"].parameters == pytest.approx(412e6, rel=0.01) and names["SigLIP2"].weight_bytes == 2
    model = DetailFlowTokenizer(SIZES)
    assert plan.parameters(TRAINED) == sum(p.numel() for p in model.parameters())
    # of 100 steps 60 are adversarial: two pictures there and back, and four views that are learnt from
    one_way = transformer_operations(ViTConfig(384, 12, 6), 197)
    assert names["DINO ViT-S/16"].operations == pytest.approx(0.6 * (2 * 2 + 4) * one_way)
    with pytest.raises(DetailFlowError, match="a batch of 16 can't be shared evenly by 3 processes"):
        plan_tokenizer(config, Processes(count=3))


def test_of_an_ar_model(model: Path, tokens: Path):
    config = GPTTraining(str(tokens), str(model), LOOP, width=32, depth=2, heads=2)
    plan = plan_gpt(config, Processes())
    assert plan.of == "an AR model, on 200 images of 10 classes, 2 crops of each"
    assert (plan.tokens, plan.ema) == (16, True) and plan.store > 200 * 2 * 3 * 16 * 2
    sizes = GPTConfig(num_classes=10, width=32, depth=2, heads=2, num_tokens=16, group_size=4, codebook_size=64)
    assert plan.parameters(TRAINED) == sum(p.numel() for p in DetailFlowGPT(sizes).parameters())


def test_the_page():
    loop = replace(LOOP, steps=1_251_000, batch_size=256, accumulate=4, milestone_every=1000, keep=3)
    networks = (Network("AR model", 326_000_000, TRAINED, 250e9, 400e6, 80e9, 40e6),)
    page = Plan("a test", loop, 250.0, 128, networks, 8, ema=True, store=10 * GIB).text(400e12, 0.4, "cuda")
    lines = page.splitlines()
    assert max(map(len, lines)) <= 80 and len(lines) < 30
    assert "length     1,251,000 steps of 256 images: 250.0 epochs" in lines
    assert "tokens     128 of an image, 41.0G in all" in lines
    assert "processes  8 processes: 32 images of a step for each, in 4 parts of 8" in lines
    assert "products   64 TFLOP a step, 80.1 EFLOP in all" in lines
    assert "time       about 17.4 hours, if every process reaches 40% of" in lines  # 80.1e18 / 8 / 160e12
    assert "           the 400 TFLOP/s of bf16 products measured here on cuda" in lines
    assert any(line.endswith("for 1,254 checkpoints") for line in lines)
    assert "           10.0 GiB of tokens, which are there" in lines
    assert "activations, about" in page and "with checkpoint_activations" in page


def test_processes_that_need_not_be_there(monkeypatch: pytest.MonkeyPatch):
    assert processes_of_this_launch() == Processes()
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("RANK", "3")
    assert processes_of_this_launch() == Processes(3, 8)
