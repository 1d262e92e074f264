"""Write a pipeline as a folder of ONNX files with all that a program without PyTorch must know (docs/export.md)."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from onnx import ModelProto
from onnx.external_data_helper import set_external_data

from detailflow.errors import DetailFlowError
from detailflow.export import networks
from detailflow.files import lock_folder, read_json, write_json, writing
from detailflow.pipeline import DetailFlowPipeline
from detailflow.progress import progress_bar

FORMAT = "detailflow-onnx"
MODEL_FILE, README_FILE = "model.json", "README.md"
PRECISIONS = {"float32": ("", 32), "int8": ("-int8", 8)}  # suffix of the files, bits of a weight
LARGEST_FILE = 2**30  # bytes; a file of ONNX cannot have 2^31, so weights beyond go to a file of their own
ALIGNMENT = 4096  # of weights there, so that they can be mapped into memory

Parts = dict[str, Callable[[int], ModelProto]]


def export(pipeline: DetailFlowPipeline, folder: Path, title: str, largest_file: int = LARGEST_FILE) -> list[Path]:
    """Write encoder, decoder and decoding step in float32 and in 8 bits, README.md and model.json; return the files.

    An earlier export in `folder` is replaced; a folder with other files of these names is left as it is. model.json
    is written whole at the very end: without its "files" the export was interrupted, and its "sha256" tell whether
    they are those that it was written with.
    """
    gpt, tokenizer = pipeline.gpt, pipeline.tokenizer
    parts: Parts = {
        "encoder": lambda bits: networks.encode(tokenizer, bits),
        "decoder": lambda bits: networks.decode(tokenizer, bits),
        "step": lambda bits: networks.step(gpt, bits),
    }
    content = describe(pipeline)
    files: dict[str, dict[str, str]] = {kind: {} for kind in PRECISIONS}
    with lock_folder(folder, "export"):
        _reserve(folder, list(_names(parts)))
        jobs = [(kind, part) for kind in PRECISIONS for part in parts]
        for kind, part in progress_bar(jobs, desc="exporting", unit="file", total=len(jobs)):
            suffix, bits = PRECISIONS[kind]
            files[kind][part] = f"{part}{suffix}.onnx"
            _write(parts[part](bits), folder / files[kind][part], largest_file)
        with writing(folder / README_FILE) as path:
            path.write_text(_guide(title, content), encoding="utf-8")
        written = [folder / name for name in _names(parts) if (folder / name).exists()]
        write_json(
            folder / MODEL_FILE, content | {"files": files, "sha256": {path.name: _sha256(path) for path in written}}
        )
    return [*written, folder / README_FILE, folder / MODEL_FILE]


def describe(pipeline: DetailFlowPipeline) -> dict[str, Any]:
    """Return sizes, schedule, classes, rows of the input table and the sampling that suits the model."""
    config, codec = pipeline.gpt.config, pipeline.tokenizer.config
    schedule = pipeline.tokenizer.schedule
    code_row = config.num_classes + 1
    names = [pipeline.class_name(i) for i in range(config.num_classes)] if pipeline.labels.names else None
    return {
        "format": FORMAT,
        "image_size": codec.image_size,
        "patch_size": codec.patch_size,
        "num_tokens": config.num_tokens,
        "group_size": config.group_size,
        "causal_tokens": schedule.num_causal,
        "codebook_size": config.codebook_size,
        "depth": config.depth,
        "heads": config.heads,
        "head_dim": config.width // config.heads,
        "num_classes": config.num_classes,
        "class_names": names,
        "null_class": config.num_classes,
        "code_row": code_row,
        "mask_row": code_row + config.codebook_size,
        "steps": schedule.steps,
        "counts": schedule.valid_counts,
        "sizes": [schedule.decode_size(n) for n in schedule.valid_counts],
        "sampling": asdict(config.sampling),
    }


def _guide(title: str, content: dict[str, Any]) -> str:
    """Return the README: the files, and the decoding loop in words."""
    text = Path(__file__).with_name("guide.md").read_text(encoding="utf-8")
    last = {"last_code": content["codebook_size"] - 1, "last_layer": content["depth"] - 1}
    classes = f"{content['num_classes']} classes" if content["num_classes"] else "no classes"
    return text.format(title=title, classes=classes, num_steps=len(content["steps"]), **last, **content)


def _names(parts: Parts) -> Iterator[str]:
    """Yield the names that files of weights and graphs may have."""
    for suffix, _ in PRECISIONS.values():
        for part in parts:
            yield from (f"{part}{suffix}.onnx", f"{part}{suffix}.onnx.data")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _reserve(folder: Path, names: list[str]) -> None:
    """Mark the folder as an unfinished export; refuse one with files that no export wrote."""
    path = folder / MODEL_FILE
    remedy = "move it, or choose another folder"
    if path.exists():
        try:
            ours = read_json(path).get("format") == FORMAT
        except DetailFlowError:
            ours = False
        if not ours:
            raise DetailFlowError(f"{path} is not what `detailflow export` writes: {remedy}")
    elif taken := next((folder / name for name in [*names, README_FILE] if (folder / name).exists()), None):
        raise DetailFlowError(f"{taken} is there, without the {MODEL_FILE} of an export: {remedy}")
    write_json(path, {"format": FORMAT})


def _write(model: ModelProto, path: Path, largest: int) -> None:
    """Write a model, its weights in a file beside it if they are large."""
    data = path.with_name(f"{path.name}.data")
    weights = model.graph.initializer
    if sum(len(weight.raw_data) for weight in weights) > largest:
        with writing(data) as temporary, temporary.open("wb") as file:
            _move_weights(weights, file, data.name)
    else:
        data.unlink(missing_ok=True)  # of an earlier export
    with writing(path) as temporary:
        temporary.write_bytes(model.SerializeToString())


def _move_weights(weights: Any, file: IO[bytes], name: str) -> None:
    for weight in weights:
        if len(weight.raw_data) < ALIGNMENT:
            continue
        file.write(bytes(-file.tell() % ALIGNMENT))
        set_external_data(weight, name, offset=file.tell(), length=len(weight.raw_data))
        file.write(weight.raw_data)
        weight.ClearField("raw_data")
