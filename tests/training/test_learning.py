"""That both stages learn something, on 64 real images and in seconds."""

import math
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from detailflow import DetailFlowGPT, DetailFlowTokenizer
from detailflow.data.images import open_images
from detailflow.data.tokens import CLEAN
from detailflow.data.transforms import center_crop, to_tensor
from detailflow.models.layers import ViTConfig
from detailflow.models.tokenizer import TokenizerConfig
from detailflow.training.config import Extraction, GPTTraining, LoopConfig, TokenizerTraining
from detailflow.training.extract import extract
from detailflow.training.gpt import train_gpt
from detailflow.training.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def images(cifar: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sixty-four")
    for path in sorted(cifar.rglob("*.png"))[::3][:64]:
        (folder / path.parent.name).mkdir(exist_ok=True)
        shutil.copy(path, folder / path.parent.name)
    return folder


@pytest.fixture(scope="module")
def tokenizer(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tokenizer after 300 steps."""
    sizes = TokenizerConfig(
        ViTConfig(64, 1, 2), ViTConfig(64, 1, 2), 32, 8, num_tokens=16, group_size=4, codebook_size=256, codebook_dim=4
    )
    loop = LoopConfig(steps=300, batch_size=16, learning_rate=1e-2, precision="fp32", log_every=1000)
    config = TokenizerTraining(
        str(images), sizes, loop, flip=False, max_scale=1.0, correction_share=0.25, adversarial=0.0, revive_every=10
    )
    output = tmp_path_factory.mktemp("learnt") / "tokenizer"
    train_tokenizer(config, output, "cpu")
    return output


def test_the_tokenizer(tokenizer: Path, images: Path):
    """Closer than the images' mean colour, by far; and closer with all tokens than with the first few."""
    source = open_images(images)
    x = torch.stack([to_tensor(center_crop(source.image(i), 32)) for i in range(64)])
    model = DetailFlowTokenizer.from_pretrained(tokenizer)
    ids = model.encode(x)

    def psnr(pixels: torch.Tensor) -> float:
        return float(10 * torch.log10(4 / F.mse_loss(pixels.clamp(-1, 1), x)))

    mean_colour = psnr(x.mean((0, 2, 3), keepdim=True).expand_as(x))
    all_tokens = psnr(model.decode(ids))
    assert all_tokens > mean_colour + 1.2
    assert all_tokens > psnr(model.decode(ids[:, :1], size=32)) + 0.5
    assert len(ids.unique()) > 20  # of 256 codes: they have not collapsed
    assert (tokenizer / "pictures" / "reconstructions-00000300.png").exists()


def test_the_ar_model(tokenizer: Path, images: Path, tmp_path: Path):
    """What follows what in 64 images can be learnt by heart; chance is log K."""
    store = extract(Extraction(str(images), str(tokenizer), crops="two"), tmp_path / "tokens", "cpu")
    loop = LoopConfig(steps=150, batch_size=64, learning_rate=5e-3, precision="fp32", log_every=1000)
    config = GPTTraining(
        str(tmp_path / "tokens"), str(tokenizer), loop, width=64, depth=2, heads=2, dropout=0.0, ema=0.9
    )
    train_gpt(config, tmp_path / "gpt", "cpu")
    ids, labels = torch.from_numpy(store.codes[:, 0, CLEAN].astype("int64")), torch.from_numpy(store.labels)
    model = DetailFlowGPT.from_pretrained(tmp_path / "gpt")

    def loss(classes: torch.Tensor) -> float:
        with torch.no_grad():
            return float(F.cross_entropy(model(classes, ids).flatten(0, 1), ids.flatten()))

    assert loss(labels) < 0.5 * math.log(256)
    assert loss(labels) < loss((labels + 1) % 10)  # the class tells something
