"""Models of random weights, small enough to run in milliseconds, and real images to train on."""

import argparse
import io
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from detailflow import DetailFlowGPT, DetailFlowPipeline, DetailFlowTokenizer, native
from detailflow.models.gpt import GPTConfig
from detailflow.models.layers import ViTConfig
from detailflow.models.tokenizer import TokenizerConfig

torch.set_num_threads(1)

IMAGES = Path(__file__).parent / "data" / "images"  # see the README there
CLASS_NAMES = ("airplane", "automobile", "bird", "cat", "Hot dog")


@pytest.fixture(autouse=True, scope="session")
def other_build() -> Iterator[None]:
    """With OTHER in the environment, the library that it names: for `test_other_builds`, which runs other tests."""
    with pytest.MonkeyPatch.context() as patch:
        if path := os.environ.get("OTHER"):
            library = native.opened(Path(path))
            patch.setattr(native, "library", lambda: library)
        yield


@pytest.fixture(scope="session")
def torchrun() -> list[str]:
    """The start of a command that two processes run, as users launch them; a file or `-m` and a module follow."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.fixture(scope="session")
def pipeline() -> DetailFlowPipeline:
    """N = 16 tokens in groups of 4, images of side 32 from patches of 8, 64 codes and five classes."""
    torch.manual_seed(0)
    schedule = dict(num_tokens=16, group_size=4, codebook_size=64)
    tokenizer = DetailFlowTokenizer(
        TokenizerConfig(
            encoder=ViTConfig(32, 1, 2),
            decoder=ViTConfig(32, 1, 2),
            image_size=32,
            patch_size=8,
            codebook_dim=4,
            **schedule,
        )
    )
    gpt = DetailFlowGPT(
        GPTConfig(num_classes=5, width=32, depth=2, heads=2, mlp=64, class_names=CLASS_NAMES, **schedule)
    )
    for parameter in gpt.parameters():  # as initialised all codes are about equally likely, whatever the class
        if parameter.ndim == 2:
            parameter.data.mul_(10)
    return DetailFlowPipeline(tokenizer.eval(), gpt.eval())


@pytest.fixture(scope="session")
def model(pipeline: DetailFlowPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of that pipeline."""
    folder = tmp_path_factory.mktemp("model")
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def shipped() -> DetailFlowPipeline:
    """The shipped model, an image of which takes long enough to be interrupted."""
    return DetailFlowPipeline.from_pretrained(device="cpu")


@pytest.fixture
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The AR model of tests/parity/tiny-32 with 1,000 classes instead of 10, beside its tokenizer."""
    folder = Path(
        shutil.copytree(Path(__file__).parent / "parity" / "tiny-32", tmp_path_factory.mktemp("published") / "tiny")
    )
    path = folder / "gpt" / "checkpoints" / "32.pt"
    with torch.serialization.safe_globals([argparse.Namespace]):
        checkpoint = torch.load(path, weights_only=True)
    for variant in ("model", "ema"):
        checkpoint[variant]["cls_embedding.embedding_table.weight"] = torch.randn(1001, 64)
    torch.save(checkpoint, path)
    config = json.loads((folder / "gpt" / "config.json").read_text())
    (folder / "gpt" / "config.json").write_text(json.dumps(config | {"num_classes": 1000}))
    return folder / "gpt"


@pytest.fixture(scope="session")
def cifar_table() -> Path:
    """A parquet file of 400 images of CIFAR-10, with class names."""
    return IMAGES / "cifar10.parquet"


@pytest.fixture(scope="session")
def photograph_table() -> Path:
    """A parquet file of 20 photographs of ImageNet, with class names."""
    return IMAGES / "photographs.parquet"


@pytest.fixture(scope="session")
def cifar(cifar_table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 200 of those images of CIFAR-10 as PNG files in class subfolders."""
    import pyarrow.parquet

    folder = tmp_path_factory.mktemp("cifar")
    rows = next(pyarrow.parquet.ParquetFile(cifar_table).iter_batches(batch_size=200)).to_pylist()
    for i, row in enumerate(rows):
        path = folder / f"class{row['label']}" / f"{i:03d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.open(io.BytesIO(row["image"]["bytes"])).save(path)
    return folder


@pytest.fixture(scope="session")
def feature_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A feature network with random weights: eight features and five classes of images with sides of 8 or more."""
    from detailflow.evaluation.features import ResidualFeatures

    torch.manual_seed(0)
    network = ResidualFeatures(width=2, num_classes=5)
    for parameter in network.parameters():
        if parameter.ndim > 1:  # or all images would look alike to it
            torch.nn.init.kaiming_normal_(parameter)
    file = tmp_path_factory.mktemp("network") / "tiny.safetensors"
    metadata = {"architecture": "detailflow/residual", "width": "2", "num_classes": "5"}
    save_file(network.state_dict(), file, metadata=metadata)
    return file


@pytest.fixture(scope="session")
def tokens(model: Path, cifar: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The token store of those images, two crops each, made by the tokenizer of `model`."""
    from detailflow.training.config import Extraction
    from detailflow.training.extract import extract

    folder = tmp_path_factory.mktemp("tokens") / "store"
    extract(Extraction(str(cifar), str(model), crops="two"), folder, "cpu")
    return folder


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], str]:
    """Stand in for the hub: give it a file or a folder of them, and get the name of a data set there."""
    import datasets
    import pyarrow.parquet

    load, known = datasets.load_dataset, dict[str, list[Path]]()

    def put(data: Path) -> str:
        name = f"someone/set-{len(known)}"
        known[name] = sorted(data.iterdir()) if data.is_dir() else [data]
        return name

    def load_dataset(name: str, split: str, streaming: bool) -> object:
        assert streaming and split == "train"
        files, shards = list(map(str, known[name])), known[name][0].suffix == ".tar"
        stream = load("webdataset" if shards else "parquet", data_files=files, split="train", streaming=True)
        if not shards:
            rows = sum(pyarrow.parquet.read_metadata(file).num_rows for file in files)
            stream.info.splits = datasets.SplitDict({"train": datasets.SplitInfo("train", num_examples=rows)})
        return stream

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return put
