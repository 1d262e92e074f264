"""Generate images with exported ONNX files. Needs NumPy and ONNX Runtime only: no PyTorch, no detailflow.

    detailflow export --onnx exported
    python examples/onnx_generate.py exported cat dog --num 2 --seed 1

writes each image as it takes shape, from its first token to all of them, as NUMBER-CLASS-TOKENS.png. The same seed
gives the same images as `detailflow generate`. The README in the exported folder explains every step.
"""

import argparse
import hashlib
import json
import math
import os
import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import numpy as np
import onnxruntime

BATCH_SIZE = 32
PARTS = ("step", "decoder")
LARGEST_CALL = 100_000  # images
LONGEST_NAME = 100  # bytes of a class in a file name
LARGEST_INTEGER = 2**31 - 1
MOST_TOKENS = 2**13  # of an image; published models have 512 at most
CONTENT = {  # of model.json
    **dict.fromkeys(("num_tokens", "group_size", "causal_tokens", "depth", "heads", "head_dim", "num_classes"), (int,)),
    **dict.fromkeys(("null_class", "code_row", "mask_row"), (int,)),
    **dict.fromkeys(("steps", "counts", "sizes"), (list,)),
    "class_names": (list, type(None)),
    **dict.fromkeys(("files", "sha256", "sampling"), (dict,)),
}
SAMPLING = {  # what each option may be
    "guidance_scale": ((int, float), lambda value: 0 <= value <= 1e6),
    "guidance_schedule": ((str,), lambda value: value in ("constant", "linear")),
    "temperature": ((int, float), lambda value: 0 <= value < math.inf),
    "top_k": ((int, type(None)), lambda value: value is None or 0 <= value <= LARGEST_INTEGER),
    "top_p": ((int, float, type(None)), lambda value: value is None or 0 < value <= 1),
}


class Generator:
    """The exported AR model and decoder."""

    def __init__(self, folder: Path, model: dict, precision: str, threads: int = 0) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads  # 0 is all processors
        options.log_severity_level = 4  # what fails is said below
        self.folder, self.model = folder, model
        if precision not in model["files"]:
            fail(f"the export in {folder} has no {precision} networks")
        names = [model["files"][precision][part] for part in PARTS]
        for name in names:
            self.check(name)
        try:
            self.step, self.decoder = (onnxruntime.InferenceSession(folder / name, options) for name in names)
        except Exception as error:  # ONNX Runtime has an exception type for each cause
            fail(f"could not load the networks in {folder} ({first_line(error)}): repeat the export")
        if not self.fits():
            fail(f"the networks in {folder} do not fit its model.json: repeat the export")

    def check(self, name: str) -> None:
        """Fail if a network, or the file of weights beside it, is not the one that model.json was written with."""
        for path in (self.folder / name, self.folder / f"{name}.data"):
            if (digest := self.model["sha256"].get(path.name)) is None:
                continue
            try:
                with path.open("rb") as file:
                    same = hashlib.file_digest(file, "sha256").hexdigest() == digest
            except OSError as error:
                fail(f"could not read {path}: {error.strerror}")
            if not same:
                fail(f"{path} is not the file that model.json was written with: repeat the export")

    def fits(self) -> bool:
        """Return whether the networks have the inputs and outputs that model.json speaks of, where sizes are fixed."""
        model, step = self.model, shapes(self.step)
        caches = [step.pop(name) for name in list(step) if "." in name]  # past and present keys and values
        return (
            step == {"inputs": [None, None], "logits": [None, None, model["mask_row"] - model["code_row"]]}
            and len(caches) == 4 * model["depth"]
            and all(cache == [None, model["heads"], None, model["head_dim"]] for cache in caches)
            and shapes(self.decoder) == {"ids": [None, None], "size": [1], "pixels": [None, 3, None, None]}
        )

    def run(self, network: onnxruntime.InferenceSession, outputs: list[str], inputs: dict) -> list[np.ndarray]:
        """Return outputs of a network; fail if it does not take these inputs, as another export's may not."""
        try:
            return network.run(outputs, inputs)
        except Exception as error:
            cause = first_line(error)
            fail(f"the networks in {self.folder} do not fit its model.json ({cause}): repeat the export")

    def tokens(self, classes: np.ndarray, seed: int, sampling: dict, num_tokens: int, first: int = 0) -> np.ndarray:
        """Draw the first `num_tokens` tokens of an image for each class number, (B,) → (B, n); `first` is its index."""
        model, guided = self.model, sampling["guidance_scale"] != 1
        tokens = np.zeros((len(classes), model["num_tokens"]), np.int64)
        noise = np.stack([image_noise(seed, first + i, model["num_tokens"]) for i in range(len(classes))])
        if guided:
            classes = np.concatenate((classes, np.full_like(classes, model["null_class"])))
        outputs = [output.name for output in self.step.get_outputs()]
        empty = np.zeros((len(classes), model["heads"], 0, model["head_dim"]), np.float32)
        cache = {name: empty for name in outputs if name != "logits"}
        for start, end in model["steps"]:
            if start >= num_tokens:
                break
            feeds = {name.replace("present", "past_key_values"): value for name, value in cache.items()}
            feeds["inputs"] = self.inputs(classes, np.tile(tokens, (1 + guided, 1)), start, end)
            cache = dict(zip(outputs, self.run(self.step, outputs, feeds), strict=True))
            logits = cache.pop("logits")
            if guided:
                conditional, unconditional = np.split(logits, 2)
                logits = unconditional + np.float32(self.scale(sampling, start)) * (conditional - unconditional)
            tokens[:, start:end] = sample(logits, noise[:, start:end], sampling)
        return tokens[:, :num_tokens]

    def inputs(self, classes: np.ndarray, tokens: np.ndarray, start: int, end: int) -> np.ndarray:
        """Return what positions `start` to `end` hold: the class, c tokens, g − 1 masks, then the other tokens."""
        c, g = self.model["causal_tokens"], self.model["group_size"]
        codes, columns = tokens + self.model["code_row"], []
        for i in range(start, end):
            if i == 0:
                columns.append(classes)
            elif i <= c:
                columns.append(codes[:, i - 1])
            elif i < c + g:
                columns.append(np.full_like(classes, self.model["mask_row"] + i - c - 1))
            else:
                columns.append(codes[:, i - g])
        return np.stack(columns, 1)

    def scale(self, sampling: dict, start: int) -> float:
        """Return the guidance scale of the tokens from `start` on."""
        if sampling["guidance_schedule"] == "constant" or start < self.model["causal_tokens"]:
            return sampling["guidance_scale"]
        groups = self.model["num_tokens"] // self.model["group_size"]
        return sampling["guidance_scale"] * (groups - start // self.model["group_size"] + 1) / (groups + 1)

    def images(self, tokens: np.ndarray) -> np.ndarray:
        """Decode the first n tokens: (B, n) → (B, side, side, 3) bytes."""
        side = self.model["sizes"][self.model["counts"].index(tokens.shape[1])]
        (pixels,) = self.run(self.decoder, ["pixels"], {"ids": tokens, "size": np.array([side])})
        return np.clip(127.5 * pixels + 128, 0, 255).astype(np.uint8).transpose(0, 2, 3, 1)


def shapes(network: onnxruntime.InferenceSession) -> dict[str, list[int | None]]:
    """Return the shape of each input and output; None where any size will do."""
    values = (*network.get_inputs(), *network.get_outputs())
    return {value.name: [size if isinstance(size, int) else None for size in value.shape] for value in values}


def image_noise(seed: int, image: int, count: int) -> np.ndarray:
    """Return the uniform numbers of one image, as PyTorch's generator draws them from the same seed."""
    state = int(np.random.SeedSequence(seed, spawn_key=(image,)).generate_state(1, np.uint64)[0])
    twister = np.random.RandomState(state & 0xFFFFFFFF)  # MT19937
    words = np.frombuffer(twister.bytes(8 * count), "<u4").astype(np.uint64).reshape(count, 2)
    bits = words[:, 0] << np.uint64(32) | words[:, 1]
    return (bits & np.uint64(2**53 - 1)) * 2.0**-53


def sample(logits: np.ndarray, noise: np.ndarray, sampling: dict) -> np.ndarray:
    """Draw a code at each position: (B, m, K) logits and (B, m) uniform numbers → (B, m) codes."""
    if sampling["temperature"] == 0:
        return logits.argmax(-1)
    tiny = np.finfo(np.float32).tiny  # no temperature is 0 in float32
    logits = (logits - logits.max(-1, keepdims=True)) / np.float32(max(sampling["temperature"], tiny))
    top_k, top_p = sampling["top_k"], sampling["top_p"]
    if top_k or (top_p and top_p < 1):
        order = np.argsort(-logits, -1, kind="stable")  # of equally likely codes the lower ones stay
        likely = np.take_along_axis(logits, order, -1)
        if top_k:
            likely[..., top_k:] = -np.inf
        if top_p and top_p < 1:
            probabilities = softmax(likely)
            outside = probabilities.cumsum(-1) - probabilities >= top_p
            outside[..., 0] = False
            likely[outside] = -np.inf
        np.put_along_axis(logits, order, likely, -1)
    cumulative = softmax(logits).cumsum(-1, dtype=np.float64)
    return (cumulative <= noise[..., None] * cumulative[..., -1:]).sum(-1)


def softmax(logits: np.ndarray) -> np.ndarray:
    """Return probabilities of logits whose largest is 0."""
    weights = np.exp(logits)
    return weights / weights.sum(-1, keepdims=True)


def write_png(path: Path, image: np.ndarray) -> None:
    """Write (height, width, 3) bytes."""
    height, width, _ = image.shape
    rows = b"".join(b"\0" + row.tobytes() for row in image)  # 0: not filtered
    header = struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0)  # 8 bits, RGB
    file = b"\x89PNG\r\n\x1a\n"
    for kind, content in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        file += struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    write_whole(path, file)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file whole or, as on a full disk, not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def fail(message: str) -> NoReturn:
    """Print one sentence on what is wrong, and end with status 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def first_line(error: Exception) -> str:
    """Return what an error says, but for the places in ONNX Runtime that follow."""
    return str(error).partition("\n")[0]


def class_number(model: dict, label: str) -> int:
    """Return the number of a class that is given by its name or number."""
    if not model["num_classes"]:
        fail(f"this model has no classes: leave out {label}")
    names = model["class_names"] or []
    if names.count(label) > 1:
        fail(f"{names.count(label)} classes are called {label}: give the number of one")
    is_number = label.isascii() and label.isdecimal() and len(label) < 10 and not any(map(str.isdecimal, names))
    index = names.index(label) if label in names else int(label) if is_number else -1
    if not 0 <= index < model["num_classes"]:
        some = ", ".join(names[:10]) or f"0 to {model['num_classes'] - 1}"
        fail(f"unknown class {label}: the classes are {some}{', …' if len(names) > 10 else ''}")
    return index


def number(kind: type, what: str, holds: Callable) -> Callable[[str], int | float]:
    """Return a reader of one option that takes only numbers which hold."""

    def read(text: str) -> int | float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not holds(value):
            raise argparse.ArgumentTypeError(f"must be {what}, not {text}")
        return value

    return read


def read_model(folder: Path) -> dict:
    """Return what the folder's model.json says."""
    path = folder / "model.json"
    if not path.exists():
        fail(f"there is no {path}: write it with `detailflow export --onnx {folder}`")
    try:
        model = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        fail(f"could not read {path}: {error.strerror}")
    except (ValueError, RecursionError):
        model = None
    if not isinstance(model, dict) or model.get("format") != "detailflow-onnx":
        fail(f"{path} is not what `detailflow export` writes: repeat the export")
    if "files" not in model:
        fail(f"{folder}: the export is not complete: repeat it")
    wrong = [name for name, kinds in CONTENT.items() if type(model.get(name, ...)) not in kinds]  # true is no number
    if wrong or (wrong := misfits(model)):
        fail(f"{path} is damaged, see {', '.join(wrong)}: repeat the export")
    return model


def misfits(model: dict) -> list[str]:
    """Return which entries do not fit the others: steps must go from 0 to all tokens, and each count has a size."""
    steps, counts, sizes, names = (model[key] for key in ("steps", "counts", "sizes", "class_names"))
    total, is_step = model["num_tokens"], all(isinstance(s, list) and [type(n) for n in s] == [int, int] for s in steps)
    named = [
        files.get(part) if isinstance(files, dict) else None for files in model["files"].values() for part in PARTS
    ]
    ends = [0, *(end for _, end in steps)] if is_step else []
    holds = {
        "files, sha256": all(
            type(name) is str and name in model["sha256"] and Path(name).name == name for name in named
        ),
        "num_tokens": 1 <= total <= MOST_TOKENS,
        "steps": is_step and ends[-1] == total and all(a == s < b for a, (s, b) in zip(ends[:-1], steps, strict=True)),
        "counts": all(type(n) is int and 1 <= n <= total for n in counts) and total in counts,
        "sizes": len(sizes) == len(counts) and all(type(side) is int and side > 0 for side in sizes),
        "class_names": names is None or (len(names) == model["num_classes"] and all(type(n) is str for n in names)),
        "num_classes": model["num_classes"] >= 0,
        "null_class, code_row, mask_row": model["num_classes"] <= model["null_class"] < model["code_row"]
        and model["code_row"] < model["mask_row"] <= LARGEST_INTEGER,
        "causal_tokens": 0 <= model["causal_tokens"] <= total,
        "sampling": all(
            type(value := model["sampling"].get(name, ...)) in kinds and fits(value)
            for name, (kinds, fits) in SAMPLING.items()
        ),
        "heads, head_dim, group_size": min(model[key] for key in ("heads", "head_dim", "group_size")) >= 1,
    }
    return [name for name, fits in holds.items() if not fits]


def parser() -> argparse.ArgumentParser:
    """Return the parser; sampling options that are not given are the model's own."""
    result = argparse.ArgumentParser(description="Generate images with exported ONNX files.")
    result.add_argument("folder", type=Path, help="what `detailflow export` wrote")
    result.add_argument("classes", nargs="*", metavar="CLASS", help="names or numbers (default: all)")
    count = number(int, "a positive integer", lambda value: 1 <= value <= LARGEST_CALL)
    seed = number(int, "0 to 2^64 - 1", lambda value: 0 <= value < 2**64)
    most = 4 * (os.cpu_count() or 1)
    threads = number(int, f"0 to {most}", lambda value: 0 <= value <= most)
    scale = number(float, "0 or more (1 is no guidance), at most 1e+06", SAMPLING["guidance_scale"][1])
    temperature = number(float, "0 (argmax) or more", SAMPLING["temperature"][1])
    top_k = number(int, "0 or more (0 is off)", SAMPLING["top_k"][1])
    top_p = number(float, "above 0 and at most 1 (1 is off)", SAMPLING["top_p"][1])
    result.add_argument("--num", type=count, default=1, help="images per class")
    result.add_argument("--seed", type=seed, default=0)
    result.add_argument("--num-tokens", type=int, help="stop after so many, for coarse images")
    result.add_argument("--output", type=Path, default=Path("outputs"), help="where to write")
    result.add_argument("--precision", choices=("float32", "int8"), default="float32")
    result.add_argument("--threads", type=threads, default=0, help="small models are fastest with one (default: all)")
    result.add_argument("--guidance-scale", type=scale, help="1 is no guidance")
    result.add_argument("--temperature", type=temperature, help="0 always takes the most likely code")
    result.add_argument("--top-k", type=top_k, help="0 keeps all codes")
    result.add_argument("--top-p", type=top_p, help="1 keeps all codes")
    return result


def write(generator: Generator, classes: np.ndarray, seed: int, sampling: dict, num_tokens: int, folder: Path) -> None:
    """Write an image of each class, from 1, 2, 4, … and all tokens, and the tokens."""
    counts, names = generator.model["counts"], generator.model["class_names"]
    all_tokens = []
    for first in range(0, len(classes), BATCH_SIZE):
        tokens = generator.tokens(classes[first : first + BATCH_SIZE], seed, sampling, num_tokens, first)
        all_tokens += tokens.tolist()
        shown = [n for n in counts if n < num_tokens and n.bit_count() == 1] + [num_tokens]
        stages = [generator.images(tokens[:, :n]) for n in shown]  # all of them before any is written
        for n, images in zip(shown, stages, strict=True):
            for i, image in enumerate(images, first):
                name = names[classes[i]] if names else str(classes[i])
                safe = "".join(letter if letter.isalnum() else "-" for letter in name)[:50]
                safe = safe.encode()[:LONGEST_NAME].decode(errors="ignore")
                write_png(folder / f"{i:04d}-{safe}-{n:03d}.png", image)
    write_whole(folder / "tokens.json", json.dumps(all_tokens).encode())


def main() -> None:
    """Write the images, and their tokens as tokens.json."""
    args = parser().parse_intermixed_args()
    model = read_model(args.folder)
    sampling = {name: getattr(args, name, None) for name in SAMPLING}
    sampling = {name: model["sampling"][name] if value is None else value for name, value in sampling.items()}
    last = model["num_tokens"] if args.num_tokens is None else args.num_tokens
    if last not in model["counts"]:
        fail(f"--num-tokens must be one of {model['counts']}, not {last}")
    given = [class_number(model, label) for label in args.classes]
    numbers = given or range(model["num_classes"]) or [model["null_class"]]
    if len(numbers) * args.num > LARGEST_CALL:
        fail(f"{len(numbers) * args.num} images are too many: make at most {LARGEST_CALL} at once")
    classes = np.repeat(numbers, args.num)
    generator = Generator(args.folder, model, args.precision, args.threads)
    try:
        args.output.mkdir(parents=True, exist_ok=True)
        write(generator, classes, args.seed, sampling, last, args.output)
    except OSError as error:
        fail(f"cannot write to {args.output}: {error.strerror}")
    print(f"wrote {len(classes)} image{'' if len(classes) == 1 else 's'}, from coarse to fine, to {args.output}")


if __name__ == "__main__":
    main()
