"""The folder of real images as shards and as parquet files."""

import io
import tarfile
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep what `datasets` caches out of the user's home, and from waiting five seconds at each end of a stream."""
    with pytest.MonkeyPatch.context() as patch:
        if find_spec("datasets"):
            patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
            patch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)
        yield


def write_tar(file: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    """A tar file of (name, content)."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return file


@pytest.fixture(scope="session")
def shards(cifar: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The 200 images in four shards, the number of the class beside each."""
    folder, files = tmp_path_factory.mktemp("shards"), sorted(cifar.rglob("*.png"), key=lambda file: file.name)
    for shard in range(4):
        members = []
        for file in files[shard * 50 : shard * 50 + 50]:
            label = file.parent.name.removeprefix("class").encode()
            members += [(f"{file.stem}.cls", label), (f"{file.stem}.png", file.read_bytes())]
        write_tar(folder / f"cifar-train-{shard:03d}.tar", members)
    return folder


@pytest.fixture(scope="session")
def tables(cifar: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The 200 images in four parquet files with the names of ten classes."""
    datasets = pytest.importorskip("datasets", reason="needs detailflow[train]")
    folder, files = tmp_path_factory.mktemp("tables"), sorted(cifar.rglob("*.png"), key=lambda file: file.name)
    names = [f"class{k}" for k in range(10)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    bars = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    for part in range(4):
        chosen = files[part * 50 : part * 50 + 50]
        rows = {
            "image": [{"bytes": file.read_bytes(), "path": file.name} for file in chosen],
            "label": [names.index(file.parent.name) for file in chosen],
        }
        datasets.Dataset.from_dict(rows, features).to_parquet(str(folder / f"train-{part:05d}-of-00004.parquet"))
    if not bars:
        datasets.enable_progress_bars()
    return folder
