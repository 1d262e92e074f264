"""Sound inputs, made once for all cases: images, data sets, models, runs, a token store, a report."""

import io
import shutil
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from os import chdir
from pathlib import Path

import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from detailflow.cli.main import main

TINY = Path(__file__).parents[1] / "parity" / "tiny-32"  # in the published layout
CLASSES = ("cat", "dog", "fish")
SCHEDULE = {"num_tokens": 8, "group_size": 4, "causal_tokens": 4, "codebook_size": 32}
LOOP = {
    "steps": 2,
    "batch_size": 4,
    "learning_rate": 0.001,
    "precision": "fp32",
    "trackers": [],
    "checkpoint_minutes": 0,
}
TOKENIZER = {
    "data": "in/photos",
    "model": {
        **SCHEDULE,
        "image_size": 16,
        "patch_size": 8,
        "codebook_dim": 4,
        "encoder": {"width": 16, "depth": 1, "heads": 2},
        "decoder": {"width": 16, "depth": 1, "heads": 2},
    },
    "adversarial": 0.1,
    "loop": LOOP,
}
EXTRACT = {"data": "in/photos", "tokenizer": "in/model", "crops": "two", "batch_size": 16}
GPT = {"tokens": "in/tokens", "tokenizer": "in/model", "width": 16, "depth": 1, "heads": 2, "loop": LOOP}


def photo(number: int, size: tuple[int, int] = (37, 29)) -> Image.Image:
    """A picture with edges, gradients and a colour for each class."""
    image = Image.linear_gradient("L").resize(size)
    ramp = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    image = Image.merge("RGB", [image, ramp, image.point(lambda v: (v * (number + 2)) % 256)])
    image.paste(
        (255 * (number % 3 == 0), 255 * (number % 3 == 1), 255 * (number % 3 == 2)), (4, 4, 16 + number % 8, 14)
    )
    return image


def encoded(image: Image.Image, form: str = "PNG") -> bytes:
    """The bytes of its file."""
    content = io.BytesIO()
    image.save(content, format=form)
    return content.getvalue()


def make_stock(folder: Path) -> None:
    """Write all of it below `folder`, which is complete once it has a file `done`."""
    if (folder / "done").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "in").mkdir(parents=True)
    with _working_in(folder), redirect_stdout(io.StringIO()):
        _data_sets(folder / "in")
        _models(folder / "in")
        _run("extract", EXTRACT, "in/tokens")
        _run("train tokenizer", TOKENIZER, "in/run-tokenizer")
        _run("train gpt", GPT, "in/run-gpt")
        common = ["--device", "cpu", "--output", "in/report", "--num-tokens", "4", "8"]
        data = ["--data", "in/photos", "--features", "none", "--lpips", "none"]
        _must(["evaluate", "tokenizer", "--model", "in/model", *data, *common])
    (folder / "done").touch()


@contextmanager
def _working_in(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    chdir(folder)
    try:
        yield
    finally:
        chdir(before)


def _must(argv: list[str]) -> None:
    if status := main(argv):
        raise RuntimeError(f"{argv} ended with status {status}")


def _run(command: str, settings: dict, output: str) -> None:
    file = Path("in") / f"{command.split()[-1]}.yaml"
    file.write_text(yaml.safe_dump(settings))
    _must([*command.split(), "--config", str(file), "--output", output, "--device", "cpu"])


def _data_sets(root: Path) -> None:
    import numpy as np
    import pyarrow
    import pyarrow.parquet

    members: list[tuple[str, bytes]] = []
    rows = []
    for number in range(12):
        name, form = CLASSES[number % 3], ("PNG", "JPEG")[number % 2]
        content = encoded(photo(number), form)
        path = root / "photos" / name / f"{number}.{form.lower().replace('e', '')}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        members += [(f"{number:04d}.cls", str(number % 3).encode()), (f"{number:04d}{path.suffix}", content)]
        rows.append({"image": {"bytes": content, "path": path.name}, "label": number % 3})
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), root / "photos.parquet")
    (root / "shards").mkdir()
    with tarfile.open(root / "shards" / "photos-000.tar", "w") as archive:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    pixels = np.stack([np.asarray(photo(number, (16, 16))) for number in range(12)])
    np.savez(root / "photos.npz", arr_0=pixels)


def _models(root: Path) -> None:
    from detailflow import DetailFlowGPT, DetailFlowPipeline, DetailFlowTokenizer
    from detailflow.evaluation.features import ResidualFeatures
    from detailflow.models.gpt import GPTConfig
    from detailflow.models.layers import ViTConfig
    from detailflow.models.tokenizer import TokenizerConfig

    torch.manual_seed(0)
    metadata = {"architecture": "detailflow/residual", "width": "2", "num_classes": "5"}
    save_file(ResidualFeatures(2, 5).state_dict(), root / "features.safetensors", metadata=metadata)
    tower = ViTConfig(16, 1, 2)
    sizes = dict(image_size=16, patch_size=8, codebook_dim=4)
    tokenizer = DetailFlowTokenizer(TokenizerConfig(encoder=tower, decoder=tower, **sizes, **SCHEDULE))
    gpt = DetailFlowGPT(GPTConfig(num_classes=3, width=16, depth=1, heads=2, mlp=32, class_names=CLASSES, **SCHEDULE))
    DetailFlowPipeline(tokenizer.eval(), gpt.eval()).save_pretrained(root / "model")
    shutil.copytree(TINY, root / "published", ignore=shutil.ignore_patterns("recorded*", "resolution*"))
