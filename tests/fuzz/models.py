"""Cases of what was learnt and what training leaves: models in both layouts, checkpoints, token stores, reports."""

import io
import json
import pickle
import shutil
import struct
import zipfile
from pathlib import Path
from random import Random
from typing import Any

import torch
import yaml

from .mutate import attack, misplace, mutate_bytes, mutate_file, mutate_json, mutate_tree, mutate_zip, pickled

RECONSTRUCTION = ("evaluate", "tokenizer", "--data", "in/photos", "--model", "in/model")
DTYPES = ("F32", "F64", "BF16", "F16", "I8", "U8", "I64", "BOOL", "F8_E4M3", "F4", "X")


def model(rng: Random) -> list[str]:
    """A model that something was done to, and a command that reads it."""
    folder = Path(rng.choice(("in/model", "in/model", "in/published")))
    for _ in range(rng.choice((1, 1, 2))):
        _damage(folder / rng.choice(("tokenizer", "gpt")), rng)
    source = str(folder)
    if rng.random() < 0.15:
        source = rng.choice(
            (
                f"{folder}/gpt",
                f"{folder}/tokenizer",
                f"{folder}/tokenizer/checkpoints/32.pt",
                f"{folder}/gpt/config.json",
            )
        )
    rest = ["--device", "cpu", "--output", "out"]
    size = ["--num-tokens", "1"] if rng.random() < 0.7 else []
    return rng.choice(
        (
            ["classes", "--model", source],
            *2 * [["generate", "--model", source, "0", "--no-grid", *size, *rest]],
            *2 * [["reconstruct", "in/photos/cat/0.png", "--model", source, *rest]],
            ["convert", source, "--output", "out", *rng.choice(([], ["--to", "published"], ["--dtype", "bfloat16"]))],
            ["train", "tokenizer", "--config", "in/tokenizer.yaml", "--init", source, "--loop.steps", "1", *rest],
            ["train", "gpt", "--config", "in/gpt.yaml", "--init", source, "--loop.steps", "1", *rest],
            ["extract", "--config", "in/extract.yaml", "--tokenizer", source, *rest],
            ["train", "gpt", "--config", "in/gpt.yaml", "--tokenizer", source, "--loop.steps", "1", *rest],
        )
    )


def _damage(folder: Path, rng: Random) -> None:
    """Change one file of a model."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.is_symlink()]
    if not files:
        return
    path, way = rng.choice(files), rng.random()
    if way < 0.08:
        misplace(rng.choice((path, folder)), rng)
    elif way < 0.12:
        shutil.copy("in/photos/cat/0.png", path)
    elif way < 0.15:
        other = rng.choice(files)
        path.write_bytes(other.read_bytes())
    elif way < 0.2:
        name = rng.choice(("checkpoints", "resume", "tokenizer", "gpt", "model.safetensors.index.json", "run.yaml"))
        (folder / name).mkdir() if not (folder / name).exists() else None
    elif path.suffix == ".json":
        path.write_bytes(mutate_json(path.read_text("utf-8", "replace"), rng))
    elif path.suffix == ".safetensors":
        damage_safetensors(path, rng)
    elif path.suffix == ".pt":
        damage_checkpoint(path, rng)
    else:
        mutate_file(path, rng)


def damage_safetensors(path: Path, rng: Random) -> None:
    """Change its header as JSON, its bytes, or write it in shards with an odd index."""
    content = path.read_bytes()
    way = rng.random()
    if way < 0.3 or len(content) < 8:
        path.write_bytes(mutate_bytes(content, rng, 400))
        return
    (length,) = struct.unpack("<Q", content[:8])
    try:
        header = json.loads(content[8 : 8 + length])
    except ValueError:
        return
    if way < 0.85:
        names = sorted(name for name in header if name != "__metadata__")
        entry = header[rng.choice(names)]
        change = rng.randrange(6)
        if change == 0:
            entry["dtype"] = rng.choice(DTYPES)
        elif change == 1:
            entry["shape"] = rng.choice(
                ([], [0], [2**62, 4], [1] * 1000, [-1], entry["shape"][::-1], [1, *entry["shape"]], ["a"])
            )
        elif change == 2:
            entry["data_offsets"] = rng.choice(([0, 2**63], [-1, 4], [10, 0], [0, 0], [0], [1e9, 2e9]))
        elif change == 3:
            header.pop(rng.choice(names))
        elif change == 4:
            header[rng.choice((f"{names[0]}.x", "", "é", "x" * 10_000))] = entry
        else:
            mutate_tree(header, rng)
        text = json.dumps(header).encode()
        path.write_bytes(
            struct.pack("<Q", rng.choice((len(text), len(text), len(text), 2**40, 2**64 - 1, 0)))
            + text
            + content[8 + length :]
        )
        return
    shards = dict.fromkeys(header, "model-00001-of-00001.safetensors")
    shards[rng.choice(sorted(shards))] = rng.choice(
        ("../../secret.png", "/dev/zero", "nowhere.safetensors", "", 1, None, "../tokenizer/model.safetensors")
    )
    path.rename(path.with_name("model-00001-of-00001.safetensors"))
    path.with_name("model.safetensors.index.json").write_text(
        json.dumps({"weight_map": rng.choice((shards, [], {}, shards))})
    )


def damage_checkpoint(path: Path, rng: Random) -> None:
    """Change a file of `torch.save`: its zip, its pickle, or what it holds; or put a call into it."""
    content, way = path.read_bytes(), rng.random()
    if way < 0.45:
        try:
            path.write_bytes(mutate_zip(content, rng))
        except zipfile.BadZipFile:
            path.write_bytes(mutate_bytes(content, rng))
        return
    mark = Path.cwd() / "executed"
    if way < 0.65:
        _poison(path, rng, mark)
        return
    with torch.serialization.safe_globals([__import__("argparse").Namespace]):
        try:
            value = torch.load(io.BytesIO(content), weights_only=True)
        except Exception:  # damaged already
            return
    odd = (
        None,
        1,
        "x",
        torch.zeros(()),
        torch.zeros(3),
        torch.zeros(0),
        torch.full((4, 4), float("nan")),
        torch.zeros(2, dtype=torch.int64),
    )
    odd += (
        torch.zeros(2, 2).to_sparse(),
        torch.zeros(1).expand(10**9),
        torch.zeros(2, device="meta"),
        torch.zeros(2, dtype=torch.complex64),
    )
    for _ in range(rng.choice((1, 1, 3))):
        _put_odd(value, rng, odd)
    try:
        torch.save(value, path, pickle_protocol=rng.choice((2, 4)), _use_new_zipfile_serialization=rng.random() < 0.8)
    except Exception:  # what cannot be saved
        path.write_bytes(pickled({"model": {}}, rng))


def _put_odd(value: Any, rng: Random, odd: tuple[Any, ...]) -> None:
    """Replace or remove something in nested dictionaries and lists."""
    while True:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        if not keys:
            return
        key = rng.choice(keys)
        if isinstance(value[key], dict | list) and len(value[key]) and rng.random() < 0.85:
            value = value[key]
            continue
        if rng.random() < 0.2:
            del value[key]
        elif isinstance(value[key], torch.Tensor) and rng.random() < 0.5:
            part = value[key]
            value[key] = rng.choice(
                (
                    part.flatten()[:0],
                    part.double(),
                    part.half(),
                    part.flatten(),
                    part[None],
                    torch.cat([part.flatten()] * 2),
                )
            )
        else:
            value[key] = rng.choice(odd)
        return


def _poison(path: Path, rng: Random, mark: Path) -> None:
    call = attack(rng, mark)
    value: Any = rng.choice(
        ({"model": {"norm.weight": call}}, call, [call], {"model": {}, "args": call}, {"step": 1, "state": call})
    )
    way = rng.random()
    if way < 0.4:
        torch.save(value, path, pickle_protocol=rng.choice((2, 3, 4)))
    elif way < 0.6:
        torch.save(value, path, _use_new_zipfile_serialization=False)
    elif way < 0.8:
        path.write_bytes(pickled(value, rng))
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps(value, protocol=2))
            archive.writestr("archive/version", "3\n")


METADATA = {
    "architecture": (
        *("", "detailflow/residual", "detailflow/x", "timm/resnet10t", "timm/../x", "timm/", "torchvision/alexnet"),
        *(
            "torchvision/get_model",
            "os/system",
            "timm/vit_giant_patch14_dinov2",
            "torchvision/detection",
            "timm/hf-hub:a/b",
        ),
        *("timm/local-dir:in", "é", "x" * 5000),
    ),
    "num_classes": ("0", "1", "5", "-1", "1e3", "9" * 5000, "99999", "٣", ""),
    "width": ("0", "1", "2", "1024", "1025", "-2", "x", " 2"),
    "size": ("own", "8", "7", "1024", "1025", "0", "299", ""),
    "mean": ("0,0,0", "nan,0,0", "inf,inf,inf", "1,2", "1e6,1e6,1e6", ",,", "a,b,c"),
    "std": ("0,0,0", "1,1,1", "-1,1,1", "1e-300,1,1", "nan,nan,nan", "1"),
    "format": ("pt", "tf"),
    "é": ("1",),
}


def network(rng: Random) -> list[str]:
    """A feature network that something was done to, or weights of a known one that are others, and what
    computes with it."""
    path = Path("in/features.safetensors")
    rest = ["--device", "cpu", "--output", "out"]
    if rng.random() < 0.3:
        return _weights(rng, rest)
    if rng.random() < 0.5:
        content = path.read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        for key in rng.sample(sorted(METADATA), rng.choice((1, 1, 2, 3))):
            header["__metadata__"][key] = rng.choice(METADATA[key])
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
    else:
        damage_safetensors(path, rng)
    if rng.random() < 0.05 and path.exists():
        misplace(path, rng)
    source = rng.choice(
        ("in/features.safetensors",) * 8 + ("in/model/gpt/model.safetensors", "in/model", "in/features.pt2")
    )
    return rng.choice(
        (
            ["evaluate", "samples", "in/photos", "in/photos.npz", "--size", "16", "--features", source, *rest],
            ["evaluate", "statistics", "in/photos", "--features", source, "--device", "cpu", "--output", "out.npz"],
            [*RECONSTRUCTION, "--lpips", "none", "--features", source, *rest],
        )
    )


def _weights(rng: Random, rest: list[str]) -> list[str]:
    path = Path("in/odd" + rng.choice((".pt", ".pth", ".safetensors")))
    shutil.copy("in/features.safetensors", path)
    if path.suffix == ".safetensors":
        damage_safetensors(path, rng)
    else:
        torch.save({"features.0.weight": torch.zeros(4, 3, 3, 3), "pos_embed": torch.zeros(1, 5, 8)}, path)
        damage_checkpoint(path, rng)
    train = ["train", "tokenizer", "--config", "in/tokenizer.yaml", "--loop.steps", "1"]
    options = ("--perceptual_network", "--adversarial_network", "--encoder_init", "--alignment_network")
    return rng.choice(
        [
            *([*train, option, str(path), "--perceptual", "0.1", "--alignment", "0.1", *rest] for option in options),
            ["evaluate", "samples", "in/photos", "in/photos", "--features", "inception", "--weights", str(path), *rest],
            ["evaluate", "samples", "in/photos", "in/photos", "--features", "dinov2", "--weights", str(path), *rest],
            [*RECONSTRUCTION, "--features", "none", "--lpips", str(path), *rest],
        ]
    )


def run(rng: Random) -> list[str]:
    """A run that is gone on with, or used as a model, whose folder was changed."""
    stage = rng.choice(("tokenizer", "gpt"))
    folder = Path("out")
    shutil.copytree(f"in/run-{stage}", folder)
    if rng.random() < 0.8:  # it was stopped, not finished
        for name in ("config.json", "model.safetensors"):
            (folder / name).unlink()
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in rng.sample(files, min(len(files), rng.choice((1, 1, 2)))):
        if rng.random() < 0.08:
            misplace(path, rng)
        elif path.suffix == ".pt":
            damage_checkpoint(path, rng)
        elif path.suffix == ".yaml":
            _damage_yaml(path, rng)
        elif path.suffix == ".json":
            path.write_bytes(mutate_json(path.read_text(), rng))
        elif path.suffix == ".safetensors":
            damage_safetensors(path, rng)
        else:
            mutate_file(path, rng)
    if rng.random() < 0.2:
        odd = (
            "resume/step-99999999.pt",
            "resume/step-x.pt",
            "resume/.step-1.tmp",
            "resume/step-00000003.pt",
            ".lock",
            "tensorboard",
            "pictures",
        )
        place = folder / rng.choice(odd)
        place.parent.mkdir(exist_ok=True)
        if not place.exists():
            place.mkdir() if rng.random() < 0.3 else place.write_bytes(rng.randbytes(100))
    if rng.random() < 0.75:
        return ["train", stage, "--config", f"in/{stage}.yaml", "--output", "out", "--device", "cpu"]
    rest = ["--device", "cpu", "--output", "elsewhere"]
    if stage == "gpt":
        return ["generate", "--model", "out", "--tokenizer", "in/model", "--num-tokens", "1", "--no-grid", *rest]
    return rng.choice(
        (["reconstruct", "in/photos/cat/0.png", "--model", "out", *rest], ["convert", "out", "--output", "elsewhere"])
    )


def _damage_yaml(path: Path, rng: Random) -> None:
    tree = yaml.safe_load(path.read_text())
    if rng.random() < 0.6:
        path.write_bytes(yaml.safe_dump(mutate_tree(tree, rng), allow_unicode=True).encode("utf-8", "surrogateescape"))
    else:
        mutate_file(path, rng)


def tokens(rng: Random) -> list[str]:
    """A token store that something was done to, and the training of an AR model on it.

    Or an extraction that goes on.
    """
    if rng.random() < 0.3:
        folder = Path(shutil.copytree("in/tokens", "out"))
        if rng.random() < 0.5:
            (folder / "manifest.json").rename(folder / "kept.json")
            (folder / "unfinished").mkdir()
            shutil.move(folder / "kept.json", folder / "unfinished" / rng.choice(("begun.json", "chunk-000000.json")))
        argv = ["extract", "--config", "in/extract.yaml", "--output", "out", "--device", "cpu"]
    else:
        folder = Path("in/tokens")
        argv = ["train", "gpt", "--config", "in/gpt.yaml", "--loop.steps", "1", "--output", "out", "--device", "cpu"]
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    path = rng.choice(files)
    if rng.random() < 0.1:
        misplace(path, rng)
    elif path.suffix == ".json":
        path.write_bytes(mutate_json(path.read_text(), rng))
    else:
        mutate_file(path, rng)
    return argv


def report(rng: Random) -> list[str]:
    """A report that something was done to, and what reads it."""
    path = Path("in/report/report.json")
    path.write_bytes(mutate_json(path.read_text(), rng))
    if rng.random() < 0.1:
        misplace(path, rng)
    if rng.random() < 0.7:
        shutil.copytree("in/report", "in/other", symlinks=True, ignore=shutil.ignore_patterns("report.json"))
        return [
            "evaluate",
            "compare",
            "in/report",
            rng.choice(("in/report", "in/report/report.json", "in/other", "in/sound")),
        ]
    shutil.copytree("in/report", "out", symlinks=True, ignore_dangling_symlinks=True, copy_function=_copy_plain)
    network = ["--features", "none", "--lpips", "none", "--num-tokens", "8", "--device", "cpu"]
    return ["evaluate", "tokenizer", "--model", "in/model", "--data", "in/photos", *network, "--output", "out"]


def _copy_plain(source: str, target: str) -> None:
    if Path(source).is_file() and not Path(source).is_symlink():
        shutil.copy(source, target)
