"""The last rows of the paper's table 2 on the same tokens: AR models alone, of the shipped tokenizer's codes.

    python experiments/ablation/fixed_tokens.py --data cifar10 --output runs/fixed-tokens --seeds 0 1 2

So a change is the AR model's doing, and a run takes minutes. The codes were made with 16 queries one by one; an AR
model that writes the first groups in parallel, too, gets copies of tokenizer and tokens with causal_tokens 0.
"""

import argparse
import json
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from run import FEATURES, HERE, compare_all, finished, markdown, over_seeds, run

from detailflow.hub import packaged_folder
from detailflow.training.extract import codes_fingerprints

# Of run.py's variants these: causal_tokens of the first group, and the share of sequences with planted mistakes.
VARIANTS = {"parallel": (0, 0.0), "self-correction": (0, 0.3), "first-group-causal": (16, 0.3)}


def tokens_with(causal_tokens: int, output: Path) -> tuple[Path, Path]:
    """Return the shipped tokenizer and its token store, or copies of both for AR models with another first group."""
    shipped = packaged_folder("tokenizer")
    config = json.loads((shipped / "config.json").read_text(encoding="utf-8"))
    if config["causal_tokens"] == causal_tokens:
        return shipped, output / "tokens"
    tokenizer, tokens = (output / f"{name}-c{causal_tokens}" for name in ("tokenizer", "tokens"))
    if not (tokens / "manifest.json").exists():
        shutil.copytree(shipped, tokenizer, dirs_exist_ok=True)
        (tokenizer / "config.json").write_text(json.dumps(config | {"causal_tokens": causal_tokens}), encoding="utf-8")
        shutil.copytree(output / "tokens", tokens, dirs_exist_ok=True, ignore=lambda *_: ["manifest.json"])
        manifest = json.loads((output / "tokens" / "manifest.json").read_text(encoding="utf-8"))
        manifest["tokenizer_fingerprint"] = next(codes_fingerprints(str(tokenizer)))
        (tokens / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")  # last: the copy is whole
    return tokenizer, tokens


def command(*words: Any) -> list[str]:
    """Return a `detailflow` command as words."""
    return ["detailflow", *map(str, words)]


def evaluation(args: argparse.Namespace, name: str, seed: int) -> list[str]:
    """Return the command that measures a variant's samples."""
    model, features = args.output / name / f"seed-{seed}", ("--features", args.features)
    what = ("--num-samples", args.num_samples, "--seeds", 0, "--guidance-scale", *args.guidance_scale)
    reference = ("--reference", args.output / "reference.npz")
    return command("evaluate", "gpt", "--model", model, *what, *reference, *features, "--output", model / "generated")


def measure(args: argparse.Namespace, name: str, seed: int) -> None:
    """Train a variant from one seed, and measure its samples."""
    causal, share = VARIANTS[name]
    tokenizer, tokens = tokens_with(causal, args.output)
    model = args.output / name / f"seed-{seed}"
    inputs = ("--config", args.recipe, "--tokens", tokens, "--tokenizer", tokenizer)
    settings = ("--planted_share", share, "--loop.seed", seed)
    run(command("train", "gpt", *inputs, *settings, "--output", model / "gpt"), args)
    shutil.copytree(tokenizer, model / "tokenizer", dirs_exist_ok=True)
    run(evaluation(args, name, seed), args)


def table(args: argparse.Namespace) -> str:
    """Return the figures of all variants that are measured from every seed, in a table for each guidance scale."""
    reports = {name: [finished(evaluation(args, name, seed)) for seed in args.seeds] for name in VARIANTS}
    rows = {name: [r["sections"][0]["rows"] for r in found if r] for name, found in reports.items() if all(found)}
    tables = []
    for at, scale in enumerate(args.guidance_scale):
        figures = {name: over_seeds([of_seed[at] for of_seed in found]) for name, found in rows.items()}
        results = {name: {"guidance": scale, "figures": found} for name, found in figures.items()}
        tables.append(markdown(compare_all(results)))
    return "\n\n".join(tables)


def main(argv: Sequence[str] | None = None) -> None:
    """Run what the options ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="the training images")
    parser.add_argument("--features", default=FEATURES, help="as of `detailflow evaluate` (default: CIFAR-10's)")
    parser.add_argument("--output", required=True, type=Path, help="a folder")
    parser.add_argument("--recipe", default=HERE / "gpt.yaml", help="settings of the AR models")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="every variant is trained from each")
    parser.add_argument("--guidance-scale", nargs="+", type=float, default=[1.0, 1.5, 2.0, 4.0])
    parser.add_argument("--num-samples", type=int, default=5000)
    args = parser.parse_args(argv)
    args.dry_run, args.launch = False, shlex.quote(sys.executable)
    tokens = ("--tokenizer", "shipped", "--crops", "two", "--precision", "fp32", "--batch_size", 500)
    run(command("extract", "--data", args.data, *tokens, "--output", args.output / "tokens"), args)
    reference = ("--size", 32, "--features", args.features, "--output", args.output / "reference.npz")
    run(command("evaluate", "statistics", args.data, *reference), args)
    for seed in args.seeds:
        for name in VARIANTS:
            measure(args, name, seed)
    print(table(args))


if __name__ == "__main__":
    main()
