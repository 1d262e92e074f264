"""The paper's table 2: train and measure every variant with `detailflow` commands, then compare them in one table.

    python experiments/ablation/run.py --data cifar10 --output runs/ablation

The same line continues after an interruption: the commands resume, and a finished evaluation is not repeated.
"""

import argparse
import json
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import yaml
from scipy import stats

HERE = Path(__file__).parent
FEATURES = HERE.parent / "shipped-model" / "cifar10-features.safetensors"


class Variant(NamedTuple):
    """What a variant adds to those before it: options of `train tokenizer` and `train gpt`. And the paper's gFID."""

    tokenizer: str
    gpt: str
    paper: float


# Token by token, on whole images only, with queries that attend to all others.
BASELINE = "--model.group_size 1 --model.causal_tokens 1 --model.causal_encoder false"
VARIANTS = {
    "baseline": Variant(f"{BASELINE} --coarse_probability 0 --correction_share 0", "--planted_share 0", 3.97),
    "causal-encoder": Variant("--model.causal_encoder true", "", 3.66),
    "coarse-to-fine": Variant("--coarse_probability 0.3", "", 3.33),
    "parallel": Variant("--model.group_size 4 --model.causal_tokens 0", "", 4.11),
    "self-correction": Variant("--correction_share 1", "--planted_share 0.3", 3.68),
    "first-group-causal": Variant("--model.causal_tokens 4", "", 3.59),
    "alignment": Variant("--alignment 1", "", 3.35),  # with the classifier as the teacher
}


def options(name: str, stage: str) -> str:
    """Return a variant's options of a stage, those of the variants before it included."""
    result: dict[str, str] = {}
    for other in list(VARIANTS)[: list(VARIANTS).index(name) + 1]:
        words = getattr(VARIANTS[other], stage).split()
        result |= zip(words[::2], words[1::2], strict=True)
    return " ".join(f"{key} {value}" for key, value in result.items())


def commands(args: argparse.Namespace, name: str, seed: int) -> list[list[str]]:
    """Return a variant's commands in order, each with its output last; the first is the same for all variants."""
    model = yaml.safe_load((args.recipe / "tokenizer.yaml").read_text(encoding="utf-8"))["model"]
    recipe, data, features, out = (shlex.quote(str(x)) for x in (args.recipe, args.data, args.features, args.output))
    seeds, scales = (" ".join(map(str, values)) for values in (args.sample_seeds, args.guidance_scale))
    run, reference = f"{out}/{name}/seed-{seed}", f"{out}/reference.npz"
    device = f"--device {args.device}" if args.device else ""
    lines = (
        f"evaluate statistics {data} --size {model['image_size']} --features {features} {device} --output {reference}",
        f"train tokenizer --config {recipe}/tokenizer.yaml --data {data} {options(name, 'tokenizer')}"
        f" --loop.seed {seed} {device} --output {run}/tokenizer",
        f"extract --config {recipe}/extract.yaml --data {data} --tokenizer {run}/tokenizer"
        f" --seed {seed} {device} --output {run}/tokens",
        f"train gpt --config {recipe}/gpt.yaml --tokens {run}/tokens --tokenizer {run}/tokenizer {options(name, 'gpt')}"
        f" --loop.seed {seed} {device} --output {run}/gpt",
        f"evaluate tokenizer --model {run} --data {data} --split test --num-images {args.num_images}"
        f" --num-tokens {model['num_tokens']} --lpips none --reference {reference} --features {features} {device}"
        f" --output {run}/reconstructed",
        f"evaluate gpt --model {run} --num-samples {args.num_samples} --seeds {seeds} --guidance-scale {scales}"
        f" --reference {reference} --features {features} {device} --output {run}/generated",
    )
    return [["detailflow", *shlex.split(line)] for line in lines]


def finished(command: Sequence[str]) -> dict[str, Any] | None:
    """Return the report that this very command has written, if there is one."""
    path = Path(command[-1]) / "report.json"
    report = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return report if report.get("provenance", {}).get("command") == shlex.join(command) else None


def run(command: Sequence[str], args: argparse.Namespace) -> None:
    """Run a command unless what it writes is there; end with its status if it fails."""
    if Path(command[-1]).is_file() or finished(command):
        return
    print(shlex.join(command), flush=True)
    if not args.dry_run and (status := subprocess.run([*shlex.split(args.launch), "-m", *command]).returncode):
        sys.exit(status)


def measured(args: argparse.Namespace, name: str) -> dict[str, Any] | None:
    """Return a variant's figures at its best guidance scale, each as a value per seed; None if a report is missing."""
    reports = [[finished(command) for command in commands(args, name, seed)[-2:]] for seed in args.seeds]
    if not all(report for pair in reports for report in pair):
        return None
    reconstructed, generated = (
        [report["sections"][0]["rows"] for report in kind if report] for kind in zip(*reports, strict=True)
    )
    scales = {rows[0]["setting"]["guidance"]: over_seeds(rows) for rows in zip(*generated, strict=True)}
    scale, figures = min(scales.items(), key=lambda item: mean(item[1][distance(item[1])]))
    ours = over_seeds([rows[0] for rows in reconstructed])
    figures = {key: ours[key] for key in ("PSNR", "rFID", "rFD") if key in ours} | figures
    return {
        "guidance": scale,
        "figures": figures,
        "provenance": [r["provenance"] for pair in reports for r in pair if r],
    }


def over_seeds(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Return the figures of one row of each training run's report: of the sample seeds if there is one run only."""
    if len(rows) > 1:
        return {key: [float(row["figures"][key]["value"]) for row in rows] for key in rows[0]["figures"]}
    return {key: [*map(float, figure["values"] or [figure["value"]])] for key, figure in rows[0]["figures"].items()}


def distance(figures: Iterable[str]) -> str:
    """Return the name of the distance of generated images: gFID in Inception's features, gFD in others."""
    return next(name for name in figures if name in ("gFID", "gFD"))


def compare(before: Sequence[float], after: Sequence[float], paper: float) -> tuple[float, str]:
    """Return the change between two variants and its verdict: a t test at 95%, then the sign compared to the paper."""
    change = mean(after) - mean(before)
    if len(after) > 1 and stats.ttest_ind(before, after).pvalue > 0.05:
        return change, "no more than other seeds may differ"
    return change, "as in the paper" if (change < 0) == (paper < 0) else "the other way than in the paper"


def compare_all(results: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row of each variant that was measured, with the change from its neighbour if that was measured too."""
    rows = []
    for (name, variant), before in zip(VARIANTS.items(), ("", *VARIANTS), strict=False):
        if name in results:
            row = {"variant": name, "paper": variant.paper, "change": None, "verdict": "", **results[name]}
            if before in results:
                key, paper = distance(row["figures"]), variant.paper - VARIANTS[before].paper
                row["change"], row["verdict"] = compare(results[before]["figures"][key], row["figures"][key], paper)
            rows.append(row)
    return rows


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the table: means ± standard deviations over the seeds."""
    names = list(rows[0]["figures"])
    lines = [["variant", *names, "guidance", "gFID in the paper", f"change of {distance(names)}", ""]]
    lines.append(["---"] * len(lines[0]))
    for row in rows:
        figures = [mean_and_error(row["figures"][name]) for name in names]
        change = "" if row["change"] is None else f"{row['change']:+.3f}"
        lines.append([row["variant"], *figures, f"{row['guidance']:g}", f"{row['paper']:g}", change, row["verdict"]])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def mean_and_error(values: Sequence[float]) -> str:
    """Return the mean, ± the standard deviation if there are several values."""
    return f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def write_table(args: argparse.Namespace) -> None:
    """Write report.json and report.md with all variants that have been measured, and print the table."""
    rows = compare_all({name: found for name in VARIANTS if (found := measured(args, name))})
    samples = f"{len(args.sample_seeds)} sets of samples of one training"
    many = f"{len(args.seeds)} trainings" if len(args.seeds) > 1 else samples
    note = f"Means ± standard deviations over {many}. If there are several, a t test at 95% judges the changes."
    content = {"note": note, "settings": vars(args), "rows": rows}
    (args.output / "report.json").write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")
    (args.output / "report.md").write_text(f"# The paper's ablation\n\n{markdown(rows)}\n\n{note}\n", encoding="utf-8")
    print(markdown(rows), note, sep="\n\n", flush=True)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a folder with train and test images")
    parser.add_argument("--features", default=FEATURES, help="as of `detailflow evaluate` (default: CIFAR-10's)")
    parser.add_argument("--output", required=True, type=lambda text: Path(text).expanduser(), help="a folder")
    parser.add_argument("--recipe", type=Path, default=HERE, help="a folder with tokenizer, extract, gpt .yaml")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="every variant is trained from each")
    parser.add_argument("--sample-seeds", nargs="+", type=int, default=[0, 1], help="of the generated images")
    parser.add_argument("--guidance-scale", nargs="+", type=float, default=[2.0, 4.0], help="the best one counts")
    parser.add_argument("--num-samples", type=int, default=5000, help="generated images of each sample seed")
    parser.add_argument("--num-images", type=int, default=5000, help="test images to reconstruct")
    parser.add_argument("--device", help="cpu, cuda, … (default: the GPU if there is one)")
    parser.add_argument("--launch", default=shlex.quote(sys.executable), help="such as 'torchrun --nproc-per-node 8'")
    parser.add_argument("--dry-run", action="store_true", help="only print the commands")
    args = parser.parse_args(argv)
    args.seeds = list(dict.fromkeys(args.seeds))  # one given twice is no second training
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Run what the options ask for."""
    args = parse_args(argv)
    for name in args.variants:
        for seed in args.seeds:
            for command in commands(args, name, seed):
                run(command, args)
        if not args.dry_run:
            write_table(args)


if __name__ == "__main__":
    # Ctrl-C reaches the command, which saves a checkpoint and ends; then this script ends too.
    signal.signal(signal.SIGINT, lambda *_: None)
    main()
