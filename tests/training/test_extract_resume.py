"""Extractions that are killed at random moments and shared by processes: the store's bytes are always the same."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from detailflow.data.token_writer import TokenWriter
from detailflow.data.tokens import TokenStore
from detailflow.errors import DetailFlowError
from detailflow.files import lock_folder
from detailflow.training import extract as extraction
from detailflow.training.config import Extraction
from detailflow.training.extract import extract

CHUNK = 2  # of 200 images
COMMAND = f"""
import sys
import torch
from detailflow.cli.main import main
from detailflow.training import extract
extract.CHUNK_IMAGES = {CHUNK}
torch.set_num_threads(1)
"""
KILLER = f"""{COMMAND}
import multiprocessing, random, time
from pathlib import Path

output, kills, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
argv, rng = sys.argv[4:], random.Random(seed)

def written():
    return len(list(output.glob("unfinished/chunk-*.json")))

def run(workers):
    options = ["--workers", str(workers), "--batch_size", str(rng.choice((2, 4, 250)))]
    sys.exit(main([*argv, "--output", str(output), *options]))

for attempt in range(kills + 1):
    process = multiprocessing.get_context("fork").Process(target=run, args=(attempt % 2,))
    enough = written() + rng.randrange(3)
    process.start()
    while attempt < kills and process.is_alive() and written() < enough:
        time.sleep(0.001)
    if attempt < kills:
        time.sleep(rng.random() * 0.03)
        process.kill()
    process.join()
    print("exit", process.exitcode, flush=True)
"""


def extract_command(data: Path, model: Path) -> list[str]:
    return ["extract", "--data", str(data), "--tokenizer", str(model), "--crops", "two", "--device", "cpu"]


@pytest.fixture(scope="module")
def argv(cifar: Path, model: Path) -> list[str]:
    return extract_command(cifar, model)


@pytest.fixture(scope="module")
def whole(cifar: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The store that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole") / "store"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extraction, "CHUNK_IMAGES", CHUNK)
        extract(Extraction(str(cifar), str(model), crops="two"), folder, "cpu")
    return files_in(folder)


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def python(*argv: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *argv], capture_output=True, text=True, env=environment, timeout=300)


@pytest.mark.parametrize("kills", [3, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_at_random_moments(kills: int, argv: list[str], whole: dict[str, bytes], tmp_path: Path):
    """SIGKILL, again and again; the same command ends with the same bytes and leaves nothing else behind."""
    done = python("-c", KILLER, str(tmp_path / "store"), str(kills), str(kills), *argv)
    exits = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("exit")]
    assert exits == ["-9"] * kills + ["0"], done.stderr
    assert "going on after" in done.stdout
    assert files_in(tmp_path / "store") == whole
    TokenStore.open(tmp_path / "store").verify()


@pytest.mark.slow
def test_two_processes(cifar: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """They stop together where images cannot be read, go on once these are put right, and make the store
    that one makes."""
    images = Path(shutil.copytree(cifar, tmp_path / "images"))
    monkeypatch.setattr(extraction, "CHUNK_IMAGES", CHUNK)
    extract(Extraction(str(images), str(model), crops="two"), tmp_path / "whole", "cpu")
    bad = sorted(images.rglob("*.png"))[120:123]  # two chunks, one of each process: neither knows of all three
    kept = [path.read_bytes() for path in bad]
    for path in bad:
        path.write_text("not an image")
    script = tmp_path / "command.py"
    script.write_text(f"{COMMAND}\nsys.exit(main(sys.argv[1:]))\n")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    command = [*launch, *extract_command(images, model), "--output", str(tmp_path / "store")]
    stopped = python(*command)
    assert (
        stopped.returncode != 0
        and f"3 images cannot be read, more than 1%: remove or replace them (the first: {bad[0]}" in (stopped.stderr)
    )
    for path, content in zip(bad, kept, strict=True):
        path.write_bytes(content)
    done = python(*command)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("going on after 120 of 200 images") == done.stdout.count("200 images, 2 crops each") == 1
    assert files_in(tmp_path / "store") == files_in(tmp_path / "whole")


def test_other_images_of_the_same_names(cifar: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A stopped extraction writes what changed again; a finished one is of other images, and says so."""
    monkeypatch.setattr(extraction, "CHUNK_IMAGES", CHUNK)
    images = Path(shutil.copytree(cifar, tmp_path / "images"))
    config = Extraction(str(images), str(model), crops="two")
    write, written = TokenWriter.write, []

    def stop_after_two(writer: TokenWriter, chunk: int, *rest: Any) -> None:
        write(writer, chunk, *rest)
        written.append(chunk)
        if len(written) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(TokenWriter, "write", stop_after_two)
    with pytest.raises(KeyboardInterrupt):
        extract(config, tmp_path / "store", "cpu")
    changed = sorted(images.rglob("*.png"))[CHUNK + 1]
    Image.new("RGB", (40, 32), "red").save(changed)
    store = extract(config, tmp_path / "store", "cpu")
    assert written[:4] == [0, 1, 1, 2]
    assert files_in(store.directory) == files_in(extract(config, tmp_path / "whole", "cpu").directory)
    Image.new("RGB", (50, 32), "red").save(changed)
    before = files_in(store.directory)
    with pytest.raises(DetailFlowError, match="store holds tokens of other images of the same names: extract into"):
        extract(config, store.directory, "cpu")
    assert files_in(store.directory) == before


def test_one_at_a_time(cifar: Path, model: Path, tmp_path: Path):
    """Two at once would take each other's records."""
    config = Extraction(data=str(cifar), tokenizer=str(model), crops="two")
    with lock_folder(tmp_path, "extraction"), pytest.raises(DetailFlowError, match="another extraction is at work in "):
        extract(config, tmp_path, "cpu")
    assert list(tmp_path.iterdir()) == []
