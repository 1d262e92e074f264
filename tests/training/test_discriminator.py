import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detailflow.errors import DetailFlowError
from detailflow.training.adversary import BACKBONE, BLOCKS, CROP_DRAWS, BatchNorm, DINODiscriminator


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of the backbone's weights, random, in the form of DINO's own."""
    timm = pytest.importorskip("timm", reason="needs the packages of detailflow[train]")
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("dino") / "dino_deitsmall16_pretrain.pth"
    state = timm.create_model(BACKBONE, num_classes=0).state_dict()
    for name, value in state.items():  # as initialised the blocks would hardly change their input
        if name.endswith(("qkv.weight", "fc1.weight", "fc2.weight", "attn.proj.weight", "token")):
            value.mul_(3)
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def made(weights: Path) -> DINODiscriminator:
    """In evaluation mode, with running statistics that are not the initial ones."""
    torch.manual_seed(1)
    network = DINODiscriminator(str(weights))
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2)
            module.weight.data.uniform_(0.5, 2)
            module.bias.data.normal_(std=0.1)
    return network.eval()


def pixels(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def plain_head(x: Tensor, head: nn.Module) -> Tensor:
    """(B, C, L) → (B, L), docs/method.md#losses word for word."""
    convolutions = [m for m in head.modules() if isinstance(m, nn.Conv1d)]
    norms = [m for m in head.modules() if isinstance(m, nn.BatchNorm1d)]
    assert [c.kernel_size for c in convolutions] == [(1,), (9,), (1,)] and len(norms) == 2

    def block(x: Tensor, number: int) -> Tensor:
        convolution, norm = convolutions[number], norms[number]
        kernel = convolution.weight
        x = torch.cat((x[..., -4:], x, x[..., :4]), -1) if kernel.shape[-1] == 9 else x
        x = F.conv1d(x, kernel, convolution.bias)
        mean, variance, scale, bias = (
            v[:, None] for v in (norm.running_mean, norm.running_var, norm.weight, norm.bias)
        )
        x = (x - mean) / (variance + 1e-5).sqrt() * scale + bias
        return x.clamp_min(0) + 0.2 * x.clamp_max(0)

    x = block(x, 0)
    x = (x + block(x, 1)) / 2**0.5
    return torch.einsum("ck,bcl->bl", convolutions[2].weight[0], x) + convolutions[2].bias


def test_logits_are_what_the_method_says(made: DINODiscriminator, weights: Path):
    """Timm's own network gives the features; those before the first block are the input of that block."""
    import timm

    vit = timm.create_model(BACKBONE, num_classes=0).eval()
    vit.load_state_dict(torch.load(weights, weights_only=True))
    entered: list[Tensor] = []
    vit.blocks[0].register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0]))
    images = pixels(2, 3, 224, 224)
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    normalised = ((images + 1) / 2 - mean[:, None, None]) / deviation[:, None, None]
    with torch.no_grad():
        found = vit.forward_intermediates(
            normalised, [2, 5, 8, 11], return_prefix_tokens=True, output_fmt="NLC", intermediates_only=True
        )
        features = [entered[0][:, 1:] + entered[0][:, :1], *(patches + token for patches, token in found)]
        expected = torch.cat([plain_head(x.mT, head) for x, head in zip(features, made.heads, strict=True)], 1)
        logits = made(images)
    assert logits.shape == (2, 5 * 196) and BLOCKS == (2, 5, 8, 11)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    per_head = logits.view(2, 5, 196)
    assert bool((per_head.std(2) > 1e-3).all()) and bool(((per_head[0] - per_head[1]).abs().amax(1) > 1e-3).all())


def test_how_images_come_to_224(made: DINODiscriminator):
    entered: list[Tensor] = []
    hook = made.backbone.patch_embed.register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0]))

    def same(images: Tensor, draws: Tensor | None, expected: Tensor) -> bool:
        """Whether that is what the backbone sees."""
        with torch.no_grad():
            made(images, draws)
        seen = entered.pop() * torch.tensor([0.229, 0.224, 0.225])[:, None, None]
        seen = seen + torch.tensor([0.485, 0.456, 0.406])[:, None, None]
        return expected.shape == (1, 3, 224, 224) and torch.allclose(2 * seen - 1, expected, atol=1e-5)

    def resized(images: Tensor) -> Tensor:
        return F.interpolate(images, (224, 224), mode="bicubic", antialias=True)

    large, long, small = pixels(1, 3, 240, 256), pixels(1, 3, 224, 256), pixels(1, 3, 32, 32)
    crop, whole = torch.tensor([0.49, 0.0, 1 - 2**-24]), torch.tensor([0.5, 0.0, 0.0])
    assert len(crop) == CROP_DRAWS
    assert same(large, crop, large[..., :224, 32:])
    assert same(large, torch.tensor([0.0, 10.5 / 17, 20.5 / 33]), large[..., 10:234, 20:244])
    assert same(large, whole, resized(large)) and same(large, None, resized(large))
    assert same(small, crop, resized(small))
    assert same(long, crop, resized(long))  # which has no room to crop from
    hook.remove()


def test_the_backbone_is_frozen_and_known_to_nobody(weights: Path):
    made = DINODiscriminator(str(weights)).train().requires_grad_(True)
    names = list(made.state_dict())
    assert names and all(name.startswith("heads.") for name in names)
    assert {name.split(".")[1] for name, _ in made.named_parameters()} == {"0", "1", "2", "3", "4"}
    before = {k: v.clone() for k, v in made.backbone.state_dict().items()}
    assert not made.backbone.training and not any(p.requires_grad for p in made.backbone.parameters())
    images = pixels(1, 3, 32, 32).requires_grad_()
    optimizer = torch.optim.SGD(made.parameters(), lr=1.0)
    made(images).square().mean().backward()
    optimizer.step()
    assert float(images.grad.abs().max()) > 0
    assert all(p.grad is not None for p in made.parameters())
    assert all(torch.equal(v, before[k]) for k, v in made.backbone.state_dict().items())
    made.requires_grad_(False).zero_grad()
    made(images).mean().backward()
    assert all(p.grad is None for p in made.parameters())

    copy = DINODiscriminator(str(weights))
    copy.load_state_dict(made.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(copy.eval()(images), made.eval()(images))


def test_it_works_under_autocast(made: DINODiscriminator):
    images = pixels(1, 3, 32, 32).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        logits = made(images).float()
    logits.mean().backward()
    logits = logits.detach()
    assert bool(images.grad.isfinite().all())
    with torch.no_grad():
        exact = made(images)
    assert float((logits - exact).abs().mean()) < 0.1 * float(exact.std())


def test_weights_have_spectral_norm_one(made: DINODiscriminator):
    """After the power iteration of some training steps."""
    head = made.heads[0]
    assert isinstance(head, nn.Module)
    head.train()
    x = torch.randn(2, 384, 16, generator=torch.Generator().manual_seed(0))
    for _ in range(100):
        head(x)
    head.eval()
    for module in head.modules():
        if isinstance(module, nn.Conv1d):
            assert float(torch.linalg.matrix_norm(module.weight.detach().flatten(1), 2)) == pytest.approx(1, abs=0.03)


def test_both_forms_of_the_file_hold_the_same(weights: Path, tmp_path: Path):
    from safetensors.torch import save_file

    save_file(torch.load(weights, weights_only=True), tmp_path / "model.safetensors")
    expected = DINODiscriminator(str(weights)).backbone.state_dict()
    for path in (tmp_path / "model.safetensors", tmp_path):
        state = DINODiscriminator(str(path)).backbone.state_dict()
        assert all(torch.equal(v, expected[k]) for k, v in state.items())


def test_what_is_missing_is_said_in_one_sentence(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    damaged, other = tmp_path / "damaged.pth", tmp_path / "other.pth"
    damaged.write_bytes(weights.read_bytes()[:1000])
    torch.save({"cls_token": torch.zeros(1, 1, 384)}, other)
    for path in (tmp_path / "none.pth", tmp_path / "none.safetensors", damaged, other):
        with pytest.raises(DetailFlowError, match="adversarial loss.*DINO ViT-S/16's weights") as caught:
            DINODiscriminator(str(path))
        message = str(caught.value)
        assert path.name in message and "model.safetensors of timm/vit_small_patch16_224.dino" in message
        assert "adversarial_network: patch" in message and "\n" not in message

    def fail(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(
        DetailFlowError, match=r"get model.safetensors of timm/.*adversarial_network: patch \(.*no route to host"
    ):
        DINODiscriminator()
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.setitem(sys.modules, "timm.data", None)
    with pytest.raises(
        DetailFlowError, match=r"needs the package timm: install it with pip install 'detailflow\[train\]'"
    ):
        DINODiscriminator(str(weights))


def network(large: float = 300) -> nn.Sequential:
    """Two batch norms between convolutions, one of them over large values."""
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Conv1d(3, 4, 1), BatchNorm(4), nn.LeakyReLU(0.2), nn.Conv1d(4, 5, 3), BatchNorm(5), nn.Conv1d(5, 2, 1)
    )
    layers[0].bias.data += large
    return layers


def batch() -> Tensor:
    return torch.randn(6, 3, 8, generator=torch.Generator().manual_seed(2))


def run_step(layers: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """One loss, its gradients and what is left in the buffers."""
    x = x.clone().requires_grad_()
    out = layers(x)
    (out.sin() * torch.arange(1, 9)[: out.shape[-1]]).mean().backward()
    state = {k: v for k, v in layers.state_dict().items() if "running" in k}
    gradients = {f"{k}.grad": p.grad for k, p in layers.named_parameters()}
    return state | gradients | {"out": out.detach(), "x.grad": x.grad}


def test_batch_norm_alone_is_torchs():
    ours = network()
    theirs = nn.Sequential(*(nn.BatchNorm1d(m.num_features) if isinstance(m, BatchNorm) else m for m in network()))
    mine, expected = run_step(ours, batch()), run_step(theirs, batch())
    assert mine.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(mine[name], value, rtol=1e-5, atol=1e-6, msg=name)
    ours.eval(), theirs.eval()
    torch.testing.assert_close(ours(batch()), theirs(batch()))


PROCESS = """
import sys
import importlib.util
import torch
import torch.distributed as dist

torch.set_num_threads(1)
path, folder, rank, large = sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
spec = importlib.util.spec_from_file_location("here", path)
here = importlib.util.module_from_spec(spec)
spec.loader.exec_module(here)
dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
layers = here.network(large)
half = here.batch().chunk(2)[rank]
result = here.run_step(layers, half)
for name, value in result.items():
    if name.endswith(".grad") and name != "x.grad":  # as DistributedDataParallel does
        dist.all_reduce(value)
        value /= 2
with torch.no_grad():
    result["eval"] = layers.eval()(half)
torch.save(result, f"{folder}/{rank}.pt")
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("large, atol", [(30, 1e-5), (300, 1e-4)])  # float32 has steps of 2e-6 and 3e-5 there
def test_two_processes_have_the_statistics_of_both_halves(large: float, atol: float, tmp_path: Path):
    whole = network(large)
    expected = run_step(whole, batch())
    expected["eval"] = whole.eval()(batch()).detach()
    world = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, __file__, str(tmp_path), str(rank), str(large)],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=90)[1] for process in world]
    finally:
        for process in world:
            process.kill()
    assert [process.returncode for process in world] == [0, 0], errors
    halves = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for rank, half in enumerate(halves):
        assert half.keys() == expected.keys()
        for name, value in expected.items():
            if name in ("out", "eval", "x.grad"):
                value = value.chunk(2)[rank]
            if name == "x.grad":  # of the sum of two means over halves, which is twice the mean over all
                value = 2 * value
            torch.testing.assert_close(half[name], value, rtol=1e-4, atol=atol, msg=f"{name} of process {rank}")
    assert not torch.allclose(
        run_step(network(large), batch()[:3])["out"], expected["out"][:3], atol=1e-2
    )  # as one half alone gives
