"""DetailFlow-16 and GPT-L at their real size, with random weights, in the published layout (about 7 GB of
disk, some minutes)."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageOps

from detailflow import DetailFlowTokenizer
from detailflow.data.images import open_images
from detailflow.data.transforms import center_crop, to_tensor
from detailflow.published_names import tensor_names

pytestmark = pytest.mark.slow

LOAD = Path(__file__).with_name("load_gpt.py")

TOKENIZER = {
    "image_size": 256,
    "enc_patch_size": 16,
    "dec_patch_size": 16,
    "num_latent_tokens": 128,
    "group_size": 8,
    "causal_num": 8,
    "codebook_size": 8192,
    "codebook_embed_dim": 8,
    "encoder_model": "siglip2_base",
}
GPT = {
    "dim": 1024,
    "n_layer": 24,
    "n_head": 16,
    "block_size": 128,
    "group_size": 8,
    "causal_num": 8,
    "vocab_size": 8192,
    "num_classes": 1000,
    "token_dropout_p": 0.1,
    "rope_base": 10000,
}
ENCODER, DECODER = (1152, 12, 4304), (768, 12, 3072)  # width, depth, MLP


def vit_shapes(prefix: str, width: int, depth: int, mlp: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {f"{prefix}embeddings.position_embedding.weight": (256, width)}
    linears = {f"self_attn.{x}_proj": (width, width) for x in ("q", "k", "v", "out")} | {
        "mlp.fc1": (mlp, width),
        "mlp.fc2": (width, mlp),
        "layer_norm1": (width,),
        "layer_norm2": (width,),
    }
    for i in range(depth):
        for name, shape in linears.items():
            shapes[f"{prefix}encoder.layers.{i}.{name}.weight"] = shape
            shapes[f"{prefix}encoder.layers.{i}.{name}.bias"] = shape[:1]
    return shapes | {f"{prefix}post_layernorm.{part}": (width,) for part in ("weight", "bias")}


def tokenizer_shapes() -> dict[str, tuple[int, ...]]:
    wide, narrow = ENCODER[0], DECODER[0]
    shapes: dict[str, tuple[int, ...]] = {
        "encoder.latent_tokens": (1, 128, wide),
        "encoder.refined_tokens": (1, 128, wide),
        "encoder.latent_pos_embed": (1, 128, wide),
        "decoder.latent_pos_embed": (1, 128, narrow),
        "decoder.mask_token": (1, 1, narrow),
        "quantize.embedding.weight": (8192, 8),
        "quantize.codebook_used": (65536,),
    }
    linears = {
        "encoder.visual_model.embeddings.patch_embedding": (wide, 768),
        "quant_conv": (8, wide),
        "post_quant_conv": (narrow, 8),
        "refine_conv": (wide, 8),
        "decoder.to_pixel.model": (768, narrow),
    }
    for name, shape in linears.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    teacher = vit_shapes("repa_model.", 1152, 27, 4304)
    return (
        shapes | vit_shapes("encoder.visual_model.", *ENCODER) | vit_shapes("decoder.visual_model.", *DECODER) | teacher
    )


def gpt_shapes() -> dict[str, tuple[int, ...]]:
    width, mlp = 1024, 2816
    shapes: dict[str, tuple[int, ...]] = {
        "cls_embedding.embedding_table.weight": (1001, width),
        "tok_embeddings.weight": (8192, width),
        "spe_tok_embeddings.special_embeddings.weight": (7, width),
        "norm.weight": (width,),
        "output.weight": (8192, width),
    }
    layer = {
        "attention.wqkv": (3 * width, width),
        "attention.wo": (width, width),
        "feed_forward.w1": (mlp, width),
        "feed_forward.w3": (mlp, width),
        "feed_forward.w2": (width, mlp),
        "attention_norm": (width,),
        "ffn_norm": (width,),
    }
    return shapes | {f"layers.{i}.{name}.weight": shape for i in range(24) for name, shape in layer.items()}


def random_state(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    def draw(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        if len(shape) == 1:
            return torch.ones(shape) if "norm" in name and name.endswith("weight") else torch.zeros(shape)
        return torch.randn(shape) * shape[-1] ** -0.5

    return {name: draw(name, shape) for name, shape in shapes.items()}


def write(folder: Path, config: dict, checkpoint: dict) -> None:
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "config.yaml").write_text("degradation_power: 1.5\n")
    torch.save(checkpoint, folder / "checkpoints" / "128.pt")


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published")
    torch.manual_seed(0)
    write(
        folder / "DetailFlow-16",
        TOKENIZER,
        {"model": random_state(tokenizer_shapes()), "args": argparse.Namespace(a=1)},
    )
    ema, raw = random_state(gpt_shapes()), random_state(gpt_shapes())
    moments = {i: {"exp_avg": tensor, "exp_avg_sq": tensor.clone()} for i, tensor in enumerate(raw.values())}
    write(folder / "DetailFlow-16-GPT-L", GPT, {"model": raw, "ema": ema, "optimizer": {"state": moments}, "steps": 9})
    return folder


def run(*argv: object) -> None:
    """Run a command in a process of its own."""
    command = [sys.executable, "-m", "detailflow", *map(str, argv)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def photograph(photograph_table: Path) -> Image.Image:
    """192×320 pixels of a real photograph."""
    return ImageOps.fit(open_images(str(photograph_table)).image(0), (320, 192))


def test_a_round_trip(published: Path, photograph: Image.Image, tmp_path: Path):
    assert sum(torch.Size(s).numel() for s in gpt_shapes().values()) > 320e6
    assert set(gpt_shapes()) == {theirs for names in tensor_names("gpt", [24]).values() for theirs in names}
    run("convert", published, "--output", tmp_path / "ours", "--shard-size", "500MB")
    run("convert", tmp_path / "ours", "--output", tmp_path / "back", "--to", "published")
    photo = to_tensor(center_crop(photograph, 256))[None]
    codes = [DetailFlowTokenizer.from_pretrained(path).encode(photo) for path in (published, tmp_path / "ours")]
    assert torch.equal(*codes)
    images = {}
    for name, model in {"published": published, "ours": tmp_path / "ours", "back": tmp_path / "back"}.items():
        options = ["--seed", 3, "--output", tmp_path / name, "--device", "cpu"]
        run("generate", "golden retriever", "n01440764", "517", "7", "--model", model, *options)
        images[name] = {path.name: path.read_bytes() for path in (tmp_path / name).glob("0*.png")}
    assert len(images["published"]) == 4
    assert images["ours"] == images["published"] == images["back"]


def test_memory_while_loading(published: Path):
    run = subprocess.run([sys.executable, LOAD, published], capture_output=True, text=True, check=True)
    size, held = map(int, run.stdout.split())
    print(f"{size / 1e6:.0f} MB of weights, {held / 1e6:.0f} MB held at once")
    assert 600e6 < size < 700e6 and held < size + 200e6  # a piece of the file, and what is imported


def test_bfloat16_and_reconstruction(published: Path, photograph: Image.Image, tmp_path: Path):
    photograph.save(tmp_path / "wide.png")
    out = ["--output", tmp_path / "out", "--device", "cpu", "--dtype", "bfloat16", "--model", published]
    run("generate", "207", *out)
    run("reconstruct", tmp_path / "wide.png", "--whole", *out)
    with Image.open(tmp_path / "out" / "wide-strip.png") as strip:
        assert strip.size == (9 * 324 + 4, 192 + 32 + 8)
