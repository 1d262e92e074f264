"""Cases of settings files and of command lines."""

from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import Any

import yaml

from .mutate import misplace, mutate_bytes, mutate_tree, nested
from .stock import EXTRACT, GPT, TOKENIZER

WORDS = (
    *(
        "",
        " ",
        "0",
        "1",
        "2",
        "-1",
        "3",
        "0.5",
        "1e400",
        "-1e400",
        "nan",
        "inf",
        "-inf",
        "9" * 30,
        "-" + "9" * 30,
        "9" * 5000,
    ),
    *(
        "1e3",
        "1_0",
        "0x10",
        "٣",
        "½",
        "é",
        "\U0001f4a5",
        "\udcff",
        "caf\udce9",
        "x" * 5000,
        "cat",
        "CAT",
        "ca",
        "dog,cat",
        "none",
    ),
    *(
        "null",
        "true",
        "off",
        "constant",
        "linear",
        "[1, 2",
        "[1, 2]",
        "{a: b}",
        "{",
        "!!python/object/apply:os.system [touch executed]",
    ),
    *(
        "&a [*a, *a]",
        "*a",
        "- a",
        "~",
        "~nobody/x",
        "-",
        "--",
        "--help",
        "-h",
        "@file",
        "a=b",
        "a\nb",
        "\t",
        "%s",
        "%(prog)s",
        "{}",
    ),
    *(
        "nowhere",
        "in/model",
        "in/photos",
        "in/photos.parquet",
        "in/tokens",
        "in/tokenizer.yaml",
        "in/photos/cat/0.png",
        "in/run-gpt",
    ),
    *(
        "/dev/zero",
        "/dev/null",
        "/dev/random",
        "/dev/stdin",
        "/dev/full",
        "/proc/self/mem",
        "/proc/self/environ",
        "/etc/passwd",
        "/proc",
    ),
    *(
        "../../secret.png",
        "in/photos/cat/0.png/x",
        "in/photos/",
        "cpu",
        "cuda",
        "cuda:99",
        "cpu:-1",
        "quantum",
        "meta",
        "mps",
        "xla",
    ),
    *(
        "float32",
        "bfloat16",
        "float16",
        "float64",
        "5GB",
        "1KB",
        "0GB",
        "9" * 9 + "TB",
        "png",
        "npz",
        "webdataset",
        "g1",
        "all",
        "gP",
    ),
)
SMALL = (
    "1",
    "2",
    "3",
    "0",
    "-1",
    "",
    "x",
    "0.5",
    "nan",
    "9" * 30,
    "9" * 5000,
    "-" + "9" * 30,
    "1e3",
    "٣",
    "[1]",
)  # of what takes time
TREES: dict[str, Mapping[str, Any]] = {"tokenizer": TOKENIZER, "gpt": GPT, "extract": EXTRACT}


def settings(rng: Random) -> list[str]:
    """A settings file that something was done to, and its command."""
    name = rng.choice(("tokenizer", "gpt", "extract"))
    path = Path("in/odd.yaml")
    path.write_bytes(_yaml(TREES[name], rng))
    if rng.random() < 0.05:
        misplace(path, rng)
    command = ["extract"] if name == "extract" else ["train", name]
    plan = ["--dry-run"] if name != "extract" and rng.random() < 0.2 else []
    more = (
        ["--config", "in/odd.yaml"]
        if rng.random() < 0.8
        else ["--config", f"in/{name}.yaml", "--config", "in/odd.yaml"]
    )
    return [*command, *more, *plan, "--output", "out", "--device", "cpu"]


SLOW = {
    "steps",
    "batch_size",
    "workers",
    "classifier_epochs",
    "depth",
    "width",
    "image_size",
    "num_tokens",
    "codebook_size",
    "mlp",
}
SAFE = (
    None,
    True,
    -1,
    0,
    1,
    2,
    3,
    4,
    7.5,
    10**15,
    10**40,
    10**400,
    float("nan"),
    float("inf"),
    "",
    "8",
    "x",
    [],
    [1],
    {},
    {"a": 1},
)


def _yaml(tree: Mapping[str, Any], rng: Random) -> bytes:
    way = rng.random()
    sound = yaml.safe_dump(dict(tree))
    if way < 0.6:
        values = _changed(yaml.safe_load(sound), rng)
        for part in (values, values.get("loop")):  # what asks for processes gets them
            if isinstance(part, dict) and isinstance(part.get("workers"), int) and 0 < part["workers"] < 1000:
                part["workers"] = 0
        return yaml.safe_dump(values, allow_unicode=True).encode("utf-8", "surrogateescape")
    if way < 0.75:
        return mutate_bytes(sound.encode(), rng)
    if way < 0.8:
        bomb = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
            f"{chr(98 + k)}: &{chr(98 + k)} [{','.join([f'*{chr(97 + k)}'] * 9)}]\n" for k in range(9)
        )
        return (bomb + rng.choice(("data: *j\n", f"{sound}model: *j\n", sound, "loop: {steps: *j}\n"))).encode()
    if way < 0.85:
        return nested(*rng.choice((("[", "]"), ("{a: ", "}"), ("- ", ""), ("? ", ""), ("!a ", ""))), rng).encode()
    odd = (
        *(
            "",
            "[]",
            "a",
            "null",
            "---\n---\n",
            "data: !!python/object/apply:os.system [touch executed]\n",
            "!!binary x",
            "\ttab: 1",
        ),
        *(
            "data: &a *a",
            "? [a]\n: b",
            "data: 2020-13-45",
            "data: 2001-01-01",
            "<<: 1",
            "data: !!int x",
            "data: !!float ''",
            f"{sound}data: again\n",
        ),
        *(
            "1: 2",
            "null: 1",
            "data: 0o999999999999999999",
            "data: 1:60:60",
            "data: " + "9" * 5000,
            f"\ufeff{sound}",
            "%YAML 9.9\n---\na: 1",
            "data: !!set {a}",
        ),
    )
    text = rng.choice(odd)
    return rng.choice(
        (text.encode(), text.encode(), sound.encode("utf-16"), b"\xff" + sound.encode(), sound.encode() + b"\0")
    )


def _changed(tree: Any, rng: Random) -> Any:
    """Other values; but none that only ask for more work than a case may do."""
    if rng.random() < 0.5:
        branches = [part for part in (tree, tree.get("model"), tree.get("loop")) if isinstance(part, dict)]
        branch = rng.choice(branches)
        names = (
            *branch,
            "split",
            "seed",
            "init",
            "flip",
            "max_scale",
            "perceptual",
            "adversarial_network",
            "perceptual_network",
            "keep",
        )
        names += (
            "precision",
            "trackers",
            "warmup",
            "dropout",
            "ema",
            "planted_share",
            "mistakes",
            "streaming",
            "alignment",
            "crops",
            "workers",
        )
        branch[rng.choice(names)] = rng.choice(SAFE)
        return tree
    return mutate_tree(tree, rng, SAFE)


# --- command lines ---------------------------------------------------------------------------------------------------

OUTPUTS = (
    *("out", "out/", "a/b/c", "x" * 300, "in/photos/cat/0.png", "in/photos/cat/0.png/x", "/dev/null", "/dev/null/x"),
    *("/etc/passwd/x", "~/x", "", "é", "\udcff", "-", "."),
)
NETWORKS = (
    *("none", "inception", "dinov2", "efficientnet-lite0", "in/features.safetensors", "in/none.safetensors"),
    *("in/photos/cat/0.png", "x.pt2", "/dev/zero", "", "é"),
)
VALUES = {  # of the options that take time or write; others get any of `WORDS`
    **dict.fromkeys(("--output", "--json"), OUTPUTS),
    **dict.fromkeys(
        ("--num", "--num-images", "--num-samples", "--batch-size", "--batch-sizes", "--size", "--repeats"), SMALL
    ),
    "--loop.steps": ("0", "-1", "x", "1", ""),
    "--features": NETWORKS,
}
FLAGS = ("--grid", "--no-grid", "--progressive", "--whole", "--json", "--dry-run", "--keep-samples")
SAMPLING = "--guidance-scale --guidance-schedule --temperature --top-k --top-p --num-tokens"
# Each command: words that are sound, and options to add. `bench` is only given what cannot be right, as it would take
# minutes.
COMMANDS = {
    "generate": (
        "--model in/model --num-tokens 1 --device cpu --output out",
        "--model --device --dtype --output --tokenizer --num --seed --num-images --format --batch-size --grid "
        "--no-grid --progressive " + SAMPLING,
    ),
    "classes": ("--model in/model", "--search --model"),
    "reconstruct": (
        "in/photos/cat/0.png --model in/model --device cpu --output out",
        "--model --device --dtype --output --whole --num --max-pixels",
    ),
    "data": ("in/photos", "--json --split --image-column --label-column --max-pixels"),
    "train": ("--data in/photos --preset none", "--output --data --device --split"),
    "train tokenizer": (
        "--config in/tokenizer.yaml --loop.steps 1 --device cpu --output out",
        "--output --config --data --device --init --loop.steps --loop.learning_rate --loop.precision --loop.trackers "
        "--loop.seed --split "
        "--model.encoder.heads --model.alpha --mistakes --perceptual_network --encoder_init --adversarial_network "
        "--streaming --flip "
        "--image_column --model --loop --dry-run",
    ),
    "train gpt": (
        "--config in/gpt.yaml --loop.steps 1 --device cpu --output out",
        "--output --config --tokens --tokenizer --init --device --dropout --ema --planted_share --loop.warmup "
        "--sampling.top_k "
        "--loop.keep --dry-run",
    ),
    "extract": (
        "--config in/extract.yaml --device cpu --output out",
        "--output --config --data --tokenizer --crops --seed --precision --split",
    ),
    "convert": ("in/model --output out", "--output --to --dtype --variant --shard-size"),
    "evaluate": ("", "--data"),
    "evaluate tokenizer": (
        "--data in/photos --model in/model --features none --lpips none --num-tokens 8 --device cpu --output out",
        "--model --device --dtype --output --features --weights --data --split --num-images --num-tokens --size "
        "--mistakes-at --seed "
        "--reference --lpips --batch-size",
    ),
    "evaluate gpt": (
        "--reference in/photos --model in/model --num-samples 3 --features in/features.safetensors --device cpu "
        "--output out",
        "--model --device --dtype --output --features --weights --reference --num-samples --labels --seeds "
        "--keep-samples " + SAMPLING,
    ),
    "evaluate samples": (
        "in/photos in/photos.npz --size 16 --features in/features.safetensors --device cpu --output out",
        "--output --features --weights --size --num-images --batch-size --device --max-pixels",
    ),
    "evaluate statistics": (
        "in/photos --features in/features.safetensors --device cpu --output out.npz",
        "--output --features --weights --size --num-images --split",
    ),
    "evaluate compare": ("in/report in/report", "--output"),
    "bench": ("--model nowhere/at/all --no-naive", "--batch-sizes --dtypes --device --other --json --repeats"),
    "vary": ("in/photos/cat/0.png --model in/model --device cpu --output out", "--model --output --keep --label"),
    "nonsense": ("", "--x"),
    "--version": ("", "--x"),
    "": ("", "--x"),
}


def line(rng: Random) -> list[str]:
    """A command line with odd words, options that are missing, twice or unknown, or values of another option."""
    command = rng.choice(list(COMMANDS))
    sound, options = COMMANDS[command]
    argv = sound.split()
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        way = rng.random()
        if way < 0.7:
            option = rng.choice(options.split())
            value = rng.choice(VALUES.get(option, WORDS))
            argv += (
                [option]
                if option in FLAGS and rng.random() < 0.8
                else rng.choice(([option, value], [f"{option}={value}"]))
            )
        elif way < 0.8:
            argv.insert(rng.randrange(len(argv) + 1), rng.choice(WORDS))
        elif way < 0.86 and argv:
            del argv[rng.randrange(len(argv))]
        elif way < 0.92:
            argv += rng.choice(
                (["--nonsense"], ["--nonsense", "x"], ["--help"], ["-h"], ["--"], ["-x"], ["--é=1"], ["--\udcff"])
            )
        else:
            rng.shuffle(argv)
    return [*command.split(), *argv]
