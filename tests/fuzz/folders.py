"""Cases of data sets: folders, parquet, shards, .npz, folders of `datasets`, with odd files, names, links and rows."""

import csv
import io
import json
import os
import shutil
import struct
import zipfile
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from .images import write_image
from .mutate import TEXTS, VALUES, misplace, mutate_bytes, mutate_file, mutate_zip, write_tar
from .stock import CLASSES, encoded, photo

NAMES = (
    *(
        "train",
        "Train",
        "test",
        "val",
        "unlabeled",
        "@eaDir",
        "__MACOSX",
        "lost+found",
        ".hidden",
        "0",
        "1",
        "10",
        "007",
        "é",
    ),
    *(
        "x" * 200,
        "caf\udce9",
        "a b",
        "UPPER",
        "upper",
        "-",
        "--help",
        "none",
        "\U0001f4a5",
        "new\nline",
        " ",
        "metadata.csv",
        "tokenizer",
    ),
)
SECRET = ("../../secret.png", "../secret.png", "file://{root}/secret.png", "{root}/secret.png", "secret.png")


def data(rng: Random) -> list[str]:
    """A data set that something was done to, and a command that reads it."""
    kind = rng.choice(("folder", "folder", "folder", "metadata", "parquet", "parquet", "shards", "saved", "npz"))
    path = {
        "folder": _folder,
        "metadata": _metadata,
        "parquet": _parquet,
        "shards": _shards,
        "saved": _saved,
        "npz": _npz,
    }[kind](rng)
    if rng.random() < 0.03 and os.path.exists(path):
        misplace(Path(path), rng)
    return _command(path, kind, rng)


def _command(path: str, kind: str, rng: Random) -> list[str]:
    """Something that reads all of a data set."""
    split = ["--split", rng.choice(("train", "val", "test", "Train", "", "é"))] if rng.random() < 0.15 else []
    rest = ["--device", "cpu", "--output", "out"]
    network = ["--features", "none", "--lpips", "none"]
    settings = ["--batch_size", "16", *(item.replace("--split", "--split") for item in split)]
    commands = [
        *2 * [["extract", "--data", path, "--tokenizer", "in/model", "--crops", "two", *settings, *rest]],
        *2
        * [
            [
                "evaluate",
                "tokenizer",
                "--data",
                path,
                "--model",
                "in/model",
                *network,
                "--num-tokens",
                "8",
                *split,
                *rest,
            ]
        ],
        ["train", "tokenizer", "--config", "in/tokenizer.yaml", "--data", path, "--loop.steps", "1", *split, *rest],
        ["evaluate", "samples", path, "in/photos.npz", "--size", "16", "--features", "in/features.safetensors", *rest],
        [
            "evaluate",
            "statistics",
            path,
            "--size",
            "16",
            "--features",
            "in/features.safetensors",
            "--output",
            "out.npz",
        ],
        *3 * [["data", path, *split, *rng.choice(([], ["--json"]))]],
    ]
    if kind == "shards":
        stream = ["--streaming", "true", "--loop.workers", "0"]
        commands.append(
            ["train", "tokenizer", "--config", "in/tokenizer.yaml", "--data", path, *stream, "--loop.steps", "1", *rest]
        )
    if kind == "folder":
        commands.append(["reconstruct", path, "--model", "in/model", *rest])
    return rng.choice(commands)


# --- kinds of data sets ----------------------------------------------------------------------------------------------


def _folder(rng: Random) -> str:
    root = Path("in/photos")
    for _ in range(rng.choice((1, 1, 2, 4))):
        _disturb(root, rng)
    return (
        str(root)
        if rng.random() < 0.9
        else rng.choice(("in/photos/", "in/./photos", "in", "in/photos/cat", "in/photos/*/*.tar"))
    )


def _disturb(root: Path, rng: Random) -> None:
    """One thing that people have in their folders."""
    folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.is_symlink()) or [root]
    folder = rng.choice((root, *folders))
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    way, name = rng.randrange(13), rng.choice(NAMES)
    if way == 0:
        write_image(folder / f"odd{rng.randrange(10)}", rng)
    elif way == 1 and files:
        mutate_file(rng.choice(files), rng, 100)
    elif way == 2 and files:
        misplace(rng.choice(files), rng)
    elif way == 3 and folder != root:
        misplace(folder, rng)
    elif way == 4:
        target = rng.choice(("..", ".", "../..", "cat", "dog", "nowhere", "/dev", "loop", "/proc/self/fd"))
        _link(folder / rng.choice(("loop", "link.png", "b")), target)
    elif way == 5 and folder != root and not (root / name).exists():
        folder.rename(root / name)
    elif way == 6 and not (folder / name).exists():
        (folder / name).mkdir()
        if rng.random() < 0.6:
            (folder / name / "1.png").write_bytes(encoded(photo(1)))
    elif way == 7:
        write_tar(folder / "backup.tar", [("1.png", encoded(photo(1))), ("1.cls", b"1")], rng)
    elif way == 8 and files and len(name) < 100:
        rng.choice(files).rename(
            folder / f"{name}{rng.choice(('.png', '.jpg', '.jfif', '.avif', '.JPEG', '.heic', '.txt'))}"
        )
    elif way == 9:
        (
            folder / rng.choice(("metadata.csv", "metadata.jsonl", "Thumbs.db", "labels.txt", "a.parquet", "a.tar"))
        ).write_text(rng.choice(("", "file_name,label\n", "{}", "no,such\nthing", "x" * 1000)))
    elif way == 10:
        os.mkfifo(folder / f"pipe{rng.randrange(100)}.png") if not list(folder.glob("pipe*")) else None
    elif way == 11 and folder != root:
        deep = folder.joinpath(*["d"] * rng.choice((3, 50)))
        deep.mkdir(parents=True, exist_ok=True)
        (deep / "1.png").write_bytes(encoded(photo(1)))
    elif files:
        rng.choice(files).chmod(0)


def _link(path: Path, target: str) -> None:
    if not path.is_symlink() and not path.exists():
        path.symlink_to(target)


def _metadata(rng: Random) -> str:
    """Images in one folder, and a table of their labels."""
    root = Path("in/flat")
    root.mkdir()
    rows: list[dict[str, Any]] = []
    for k in range(6):
        (root / f"{k}.png").write_bytes(encoded(photo(k)))
        rows.append({"file_name": f"{k}.png", "label": CLASSES[k % 3]})
    for _ in range(rng.choice((0, 1, 2))):
        row = rng.choice(rows)
        row[rng.choice(("file_name", "label", "extra"))] = rng.choice((*VALUES, *map(_rooted, SECRET)))
    if rng.random() < 0.5:
        content = "".join(json.dumps(row) + "\n" for row in rows).encode()
        file = root / "metadata.jsonl"
    else:
        text = io.StringIO()
        writer = csv.DictWriter(text, ["file_name", "label", "extra"])
        writer.writeheader()
        writer.writerows(rows)
        content = text.getvalue().encode("utf-8", "surrogateescape")
        file = root / "metadata.csv"
    file.write_bytes(mutate_bytes(content, rng) if rng.random() < 0.4 else content)
    return str(root)


def _rooted(text: str) -> str:
    return text.format(root=Path.cwd().parent)


def _parquet(rng: Random) -> str:
    import pyarrow
    import pyarrow.parquet

    path = Path("in/photos.parquet")
    if rng.random() < 0.35:
        content = path.read_bytes()
        end = rng.choice((0, max(0, len(content) - 1500)))  # its table of contents is at the end
        path.write_bytes(content[:end] + mutate_bytes(content[end:], rng, 1500))
        return str(path)
    rows = pyarrow.parquet.read_table(path).to_pylist()
    way = rng.randrange(7)
    for row in rng.sample(rows, rng.choice((1, 2, len(rows)))):
        if way == 0:
            row["image"] = {"bytes": None, "path": _rooted(rng.choice(SECRET))}
        elif way == 1:
            row["image"] = {
                "bytes": None,
                "path": rng.choice((*TEXTS[:4], "/dev/zero", "https://localhost:1/x.png", "in/photos/cat/0.png")),
            }
        elif way == 2:
            row["image"]["bytes"] = mutate_bytes(row["image"]["bytes"], rng, 100)
        elif way == 3:
            row["label"] = rng.choice((None, -1, 3, 2**40, -(2**40)))
        elif way == 4:
            row["image"] = None
    if way == 5:
        wrong = rng.choice(("a", 1.5, None, [1], "é", {"a": 1}))
        rows = (
            [{**row, rng.choice(("image", "label")): wrong} for row in rows]
            if wrong != 1.5
            else [{**row, "label": 1.5} for row in rows]
        )
    names = rng.choice((CLASSES, (), CLASSES[:1], ("cat", "cat", "cat"), ("é", "", "x" * 1000), ("a/b", "..", "c")))
    info = json.dumps(
        {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}, "image": {"_type": "Image"}}}}
    )
    keep = rng.random() < 0.5
    try:
        table = pyarrow.Table.from_pylist(rows)
    except (pyarrow.ArrowException, OverflowError):
        return str(path)
    table = table.replace_schema_metadata(
        {"huggingface": info if keep else rng.choice(("", "{}", "[", '{"info": 1}', info[:60]))}
    )
    if rng.random() < 0.15:
        table = table.rename_columns(rng.choice((["img", "label"], ["image", "y"], ["image", "image"])))
    pyarrow.parquet.write_table(table[: 0 if rng.random() < 0.05 else 12], path)
    return str(path)


def _shards(rng: Random) -> str:
    root = Path("in/shards")
    file = next(root.glob("*.tar"))
    way = rng.randrange(5)
    if way == 0:
        mutate_file(file, rng, 2000)
    elif way == 1:
        members = [(f"{k:04d}.png", encoded(photo(k))) for k in range(4)]
        write_tar(file, [*members, ("0000.cls", b"1")], rng)
    elif way == 2:
        odd = (
            "a.b.png",
            "a/../../0.png",
            "0.cls",
            "0.json",
            "0.txt",
            "0.jpg",
            "0.PNG",
            "",
            "x" * 300 + ".png",
            "0.png",
        )
        content = (
            b"",
            b"\xff",
            b"1",
            b"-1",
            b"9" * 5000,
            "é".encode(),
            encoded(photo(1)),
            b'{"label": 1}',
            b"[" * 100_000,
        )
        write_tar(file, [(rng.choice(odd), rng.choice(content)) for _ in range(5)])
    elif way == 3:
        write_tar(root / "more-001.tar", [(f"{k}.png", encoded(photo(k))) for k in range(3)])
    else:
        shutil.copy(file, root / rng.choice(("train-0.tar", "val-0.tar", "a.tar.gz", "b.tgz", "train-{0..1}.tar")))
    return rng.choice(
        (
            str(root),
            str(file),
            f"{root}/photos-{{000..{rng.choice(('000', '003', '999999999999'))}}}.tar",
            f"{root}/*.tar",
        )
    )


def _saved(rng: Random) -> str:
    """A folder as `save_to_disk` of the `datasets` library writes it."""
    import pyarrow

    root = Path("in/saved")
    root.mkdir()
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    images = [{"bytes": encoded(photo(k)), "path": None} for k in range(6)]
    if rng.random() < 0.4:
        images[1] = {"bytes": None, "path": _rooted(rng.choice(SECRET))}
    table = pyarrow.table({"image": pyarrow.array(images, kind), "label": pyarrow.array([k % 3 for k in range(6)])})
    with (
        pyarrow.OSFile(str(root / "data-00000-of-00001.arrow"), "wb") as sink,
        pyarrow.ipc.new_stream(sink, table.schema) as writer,
    ):
        writer.write_table(table)
    label = {"names": list(CLASSES), "_type": "ClassLabel"}
    info = {"features": {"image": {"_type": "Image"}, "label": label}}
    state = {
        "_data_files": [{"filename": "data-00000-of-00001.arrow"}],
        "_fingerprint": "1",
        "_split": None,
        "_format_type": None,
    }
    state |= {"_format_columns": None, "_format_kwargs": {}, "_output_all_columns": False}
    (root / "dataset_info.json").write_text(json.dumps(info))
    (root / "state.json").write_text(json.dumps(state))
    if rng.random() < 0.3:
        state["_data_files"] = [
            {"filename": rng.choice(("../photos.parquet", _rooted(SECRET[3]), "", "nowhere.arrow"))}
        ]
        (root / "state.json").write_text(json.dumps(state))
    elif rng.random() < 0.5:
        mutate_file(rng.choice(sorted(root.iterdir())), rng, 500)
    return str(root)


def _npz(rng: Random) -> str:
    path = Path("in/photos.npz")
    way = rng.randrange(4)
    if way == 0:
        path.write_bytes(mutate_zip(path.read_bytes(), rng))
    elif way == 1:
        shapes = ((0, 16, 16, 3), (3, 16, 16), (2, 16, 16, 4), (1, 1, 1, 3), (2, 16, 16, 3), ())
        kinds = (np.uint8, np.float32, np.int64, np.float64, bool, "U3")
        np.savez(
            path, **{rng.choice(("arr_0", "mu", "sigma", "x", "é")): np.zeros(rng.choice(shapes), rng.choice(kinds))}
        )
    elif way == 2:
        np.savez(path, arr_0=np.array([{"a": 1}, None], dtype=object), mu=np.zeros(4), sigma=np.full((4, 4), np.nan))
    elif rng.random() < 0.1:
        np.savez_compressed(path, mu=np.zeros(40_000_000), sigma=np.zeros(3))
    else:
        shape = rng.choice(((10**9, 10**9), (2**40,), (-1, 3), (10**6, 256, 256, 3)))
        header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}"
        with zipfile.ZipFile(path, "w") as archive:
            content = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + bytes(100)
            archive.writestr(rng.choice(("arr_0.npy", "mu.npy")), content)
            archive.writestr("sigma.npy", content)
    return str(path)
