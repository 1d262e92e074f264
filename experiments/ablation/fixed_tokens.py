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

from run import FEATURES, HERE, compare, finished, mean_and_error, over_seeds, run

from detailflow.hub import packaged_folder
from detailflow.training.extract import codes_fingerprint

# What each adds to the one before it: causal_tokens of the first group, the share of sequences with planted mistakes,
# and the paper's gFID.
VARIANTS = {"parallel": (0, 0.0, 4.11), "self-correction": (0, 0.3, 3.68), "first-group-causal": (16, 0.3, 3.59)}


def copy_with(causal_tokens: int, output: Path) -> tuple[Path, Path]:
    """Return a copy of the shipped tokenizer and of its token store for AR models with another first group."""
    tokenizer, tokens = (output / f"{name}-c{causal_tokens}" for name in ("tokenizer", "tokens"))
    if not (tokens / "manifest.json").exists():
        shutil.copytree(packaged_folder("tokenizer"), tokenizer, dirs_exist_ok=True)
        config = json.loads((tokenizer / "config.json").read_text(encoding="utf-8"))
        (tokenizer / "config.json").write_text(json.dumps(config | {"causal_tokens": causal_tokens}), encoding="utf-8")
        shutil.copytree(output / "tokens", tokens, dirs_exist_ok=True, ignore=lambda *_: ["manifest.json"])
        manifest = json.loads((output / "tokens" / "manifest.json").read_text(encoding="utf-8"))
        manifest["tokenizer_fingerprint"] = codes_fingerprint(str(tokenizer))
        (tokens / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")  # last: the copy is whole
    return tokenizer, tokens


def command(line: str) -> list[str]:
    """Return a `detailflow` command as words."""
    return ["detailflow", *shlex.split(line)]


def evaluation(args: argparse.Namespace, name: str, seed: int) -> list[str]:
    """Return the command that measures a variant's samples."""
    model, scales = args.output / name / f"seed-{seed}", " ".join(map(str, args.guidance_scale))
    return command(
        f"evaluate gpt --model {model} --num-samples {args.num_samples} --seeds 0 --guidance-scale {scales}"
        f" --reference {args.output}/reference.npz --features {args.features} --output {model}/generated"
    )


def measure(args: argparse.Namespace, name: str, seed: int) -> None:
    """Train a variant from one seed, and measure its samples."""
    causal, share, _ = VARIANTS[name]
    tokenizer, tokens = copy_with(causal, args.output)
    model = args.output / name / f"seed-{seed}"
    run(
        command(
            f"train gpt --config {args.recipe} --tokens {tokens} --tokenizer {tokenizer} --planted_share {share}"
            f" --loop.seed {seed} --output {model}/gpt"
        ),
        args,
    )
    shutil.copytree(tokenizer, model / "tokenizer", dirs_exist_ok=True)
    run(evaluation(args, name, seed), args)


def table(args: argparse.Namespace) -> str:
    """Return the figures of all variants that are measured from every seed, at each guidance scale."""
    lines = ["| guidance | variant | gFD | recall | recognised | change | |", "|---|---|---|---|---|---|---|"]
    for at, scale in enumerate(args.guidance_scale):
        before: tuple[list[float], float] | None = None
        for name, (_, _, paper) in VARIANTS.items():
            reports = [finished(evaluation(args, name, seed)) for seed in args.seeds]
            if not all(reports):
                before = None
                continue
            figures = over_seeds([report["sections"][0]["rows"][at] for report in reports if report])
            shown = [mean_and_error(figures[key]) for key in ("gFD", "recall", "recognised")]
            change, verdict = compare(before[0], figures["gFD"], paper - before[1]) if before else (0.0, "")
            shown += [f"{change:+.3f}", verdict] if before else ["", ""]
            lines.append(f"| {scale:g} | {name} | {' | '.join(shown)} |")
            before = figures["gFD"], paper
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Run what the options ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="the training images")
    parser.add_argument("--features", default=FEATURES, help="as of `detailflow evaluate` (default: CIFAR-10's)")
    parser.add_argument("--output", required=True, type=Path, help="a folder")
    parser.add_argument("--recipe", default=HERE / "gpt.yaml", help="settings of the AR models")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="every variant is trained from each")
    parser.add_argument("--guidance-scale", nargs="+", type=float, default=[2.0, 4.0])
    parser.add_argument("--num-samples", type=int, default=5000)
    args = parser.parse_args(argv)
    args.dry_run, args.launch = False, shlex.quote(sys.executable)
    tokens = "--tokenizer shipped --crops two --precision fp32 --batch_size 500"
    run(command(f"extract --data {args.data} {tokens} --output {args.output}/tokens"), args)
    reference = f"--size 32 --features {args.features} --output {args.output}/reference.npz"
    run(command(f"evaluate statistics {args.data} {reference}"), args)
    for seed in args.seeds:
        for name in VARIANTS:
            measure(args, name, seed)
    print(table(args))


if __name__ == "__main__":
    main()
