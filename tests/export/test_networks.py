"""The exported graphs compute what the models do, for all sizes that a config can ask for."""

from typing import Any

import numpy as np
import pytest
import torch

from detailflow import DetailFlowGPT, DetailFlowPipeline, DetailFlowTokenizer
from detailflow.generation import TorchEngine, with_null_class
from detailflow.models.gpt import GPTConfig
from detailflow.models.layers import ViTConfig
from detailflow.models.tokenizer import TokenizerConfig

onnx = pytest.importorskip("onnx", reason="needs the packages of detailflow[onnx]")
ort = pytest.importorskip("onnxruntime", reason="needs the packages of detailflow[onnx]")

from detailflow.export import networks  # noqa: E402

SHARED = dict(num_tokens=12, group_size=4, codebook_size=48)
SIZES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # of both models, and of the tokenizer alone
    "as in the paper": ({}, {}),
    "no single tokens": ({"causal_tokens": 0}, {}),
    "more single tokens": ({"causal_tokens": 8}, {}),
    "single tokens alone": ({"group_size": 1, "causal_tokens": 12}, {}),
    "one group": ({"num_tokens": 4}, {}),
    "queries that see all": ({}, {"causal_encoder": False}),
    "beyond the paper": ({}, {"linear_path": True, "pixel_channels": 7, "absent_token": True}),
    "a long side": ({}, {"image_size": 72, "patch_size": 4, "linear_path": True}),
}


def session(model: Any) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def make_tokenizer(**sizes: Any) -> DetailFlowTokenizer:
    torch.manual_seed(0)
    defaults = dict(image_size=24, patch_size=4, codebook_dim=4)
    vit = ViTConfig(24, 2, 2)
    tokenizer = DetailFlowTokenizer(TokenizerConfig(encoder=vit, decoder=vit, **defaults | SHARED | sizes)).eval()
    for parameter in tokenizer.parameters():  # no biases of zero, no convolution that does nothing
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return tokenizer


def make_gpt(**sizes: Any) -> DetailFlowGPT:
    torch.manual_seed(0)
    gpt = DetailFlowGPT(GPTConfig(num_classes=5, width=24, depth=2, heads=2, mlp=40, **SHARED | sizes)).eval()
    for parameter in gpt.parameters():
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    return gpt


def step_logits(gpt: DetailFlowGPT, classes: torch.Tensor, ids: torch.Tensor, bits: int = 32) -> list[np.ndarray]:
    """The logits of each step that the exported graph computes, its cache passed on."""
    config, schedule = gpt.config, gpt.schedule
    model = session(networks.step(gpt, bits))
    names = [output.name for output in model.get_outputs()]
    empty = np.zeros((len(classes), config.heads, 0, config.width // config.heads), np.float32)
    cache = {name: empty for name in names if name != "logits"}
    c, g, codes = schedule.num_causal, schedule.group_size, ids + config.num_classes + 1
    masks = (torch.arange(g - 1) + config.num_classes + 1 + config.codebook_size).expand(len(classes), -1)
    sequence = torch.cat((classes[:, None], codes[:, :c], masks, codes[:, c:-g]), 1)[:, : config.num_tokens].numpy()
    found = []
    for start, end in schedule.steps:
        feeds = {name.replace("present", "past_key_values"): value for name, value in cache.items()}
        cache = dict(zip(names, model.run(names, feeds | {"inputs": sequence[:, start:end]}), strict=True))
        found.append(cache.pop("logits"))
    return found


@pytest.mark.parametrize("sizes", [sizes for sizes, _ in SIZES.values()], ids=list(SIZES))
def test_step(sizes: dict[str, Any]):
    gpt = make_gpt(**sizes)
    for images in (1, 3):
        classes = torch.arange(images) % gpt.config.num_classes
        ids = torch.randint(gpt.config.codebook_size, (images, gpt.config.num_tokens))
        engine = TorchEngine(gpt, classes, guided=True)
        doubled = with_null_class(classes, gpt.config.num_classes)
        found = step_logits(gpt, doubled, ids.repeat(2, 1))
        for (start, end), logits in zip(gpt.schedule.steps, found, strict=True):
            torch.testing.assert_close(torch.from_numpy(logits), engine.step(ids, start, end), atol=1e-4, rtol=0)


@pytest.mark.parametrize("sizes", [shared | own for shared, own in SIZES.values()], ids=list(SIZES))
def test_tokenizer(sizes: dict[str, Any]):
    tokenizer = make_tokenizer(**sizes)
    encoder, decoder = session(networks.encode(tokenizer, 32)), session(networks.decode(tokenizer, 32))
    side, patch = tokenizer.config.image_size, tokenizer.config.patch_size
    for batch in (1, 3):
        images = torch.rand(batch, 3, side, side) * 2 - 1
        ids = tokenizer.encode(images)
        assert len(ids.unique()) > 1  # else the comparison would say little
        (found,) = encoder.run(["ids"], {"images": images.numpy()})
        assert (found == ids.numpy()).all()
        for n in tokenizer.schedule.valid_counts:
            for size in {tokenizer.schedule.decode_size(n), patch, side}:
                feeds = {"ids": ids[:, :n].numpy(), "size": np.array([size])}
                (pixels,) = decoder.run(["pixels"], feeds)
                wanted = tokenizer.decode(ids[:, :n], size=size)
                torch.testing.assert_close(torch.from_numpy(pixels), wanted, atol=1e-4, rtol=0)


def test_the_shipped_model():
    pipeline = DetailFlowPipeline.from_pretrained(device="cpu")
    gpt, tokenizer = pipeline.gpt, pipeline.tokenizer
    classes = torch.tensor([3, gpt.config.num_classes])
    ids = gpt.generate(classes[:1], temperature=0)
    pixels = tokenizer.decode(ids)
    wanted = gpt(classes, ids.repeat(2, 1)).detach()
    for bits, error in ((32, 1e-5), (8, 0.03)):
        found = torch.from_numpy(np.concatenate(step_logits(gpt, classes, ids.repeat(2, 1), bits), 1))
        assert (found - wanted).square().mean().sqrt() < error * wanted.std()
        assert (found.argmax(-1) == wanted.argmax(-1)).float().mean() > (0.9 if bits == 8 else 0.999)
        (encoded,) = session(networks.encode(tokenizer, bits)).run(["ids"], {"images": pixels.numpy()})
        assert (encoded == tokenizer.encode(pixels).numpy()).mean() > (0.8 if bits == 8 else 0.999)
        feeds = {"ids": ids.numpy(), "size": np.array([32])}
        (decoded,) = session(networks.decode(tokenizer, bits)).run(["pixels"], feeds)
        assert np.abs(decoded - pixels.numpy()).max() < (0.1 if bits == 8 else 1e-4)


@pytest.mark.parametrize("bits", [32, 8])
def test_files_are_valid_and_small(bits: int):
    gpt, tokenizer = make_gpt(), make_tokenizer(linear_path=True, pixel_channels=7, absent_token=True)
    for model in (networks.step(gpt, bits), networks.encode(tokenizer, bits), networks.decode(tokenizer, bits)):
        if bits == 32:
            onnx.checker.check_model(model, full_check=True)
        domains = {node.domain for node in model.graph.node}
        assert domains == ({""} if bits == 32 else {"", "com.microsoft"})
    whole, small = (networks.step(gpt, b).ByteSize() for b in (32, 8))
    assert small < 0.7 * whole  # embeddings are not smaller
