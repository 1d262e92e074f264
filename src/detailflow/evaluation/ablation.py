"""The paper's table 2 at a size of one's own: every variant trained, measured and put beside the paper's figures."""

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from detailflow.errors import DetailFlowError
from detailflow.evaluation.distances import REFERENCE_KEPT, measure, save_statistics
from detailflow.evaluation.features import Extractor, load_extractor
from detailflow.evaluation.gpt import Sweep, evaluate_gpt
from detailflow.evaluation.published import published
from detailflow.evaluation.report import (
    JSON_FILE,
    Figure,
    Panel,
    Plot,
    Report,
    Row,
    Section,
    check_packages,
    circumstances,
    load,
    model_entry,
)
from detailflow.evaluation.samples import INCEPTION, Work, features_entry, naming_note, preprocessing_entry
from detailflow.evaluation.sets import ImageSet
from detailflow.evaluation.tokenizer import evaluate_tokenizer
from detailflow.models.tokenizer import DetailFlowTokenizer
from detailflow.pipeline import DetailFlowPipeline
from detailflow.storage import read_json, replacing
from detailflow.training.ablation import Ablation, Spent, Stages, spent, timed, train_variant

KIND = "ablation"
FIGURES_FILE = "evaluation.json"
PAPER = "gFID in the paper"
SURE = 2  # standard deviations: a smaller difference may be the samples' alone


class Result(NamedTuple):
    """What was measured of one variant."""

    models: dict[str, Any]  # the entries of its tokenizer and its AR model
    rebuilt: dict[str, Figure]
    generated: list[tuple[float, dict[str, Figure]]]  # by guidance scale

    def best(self, measure: str) -> tuple[float, dict[str, Figure]]:
        """The guidance scale with the smallest distance, and its figures."""
        return min(self.generated, key=lambda one: one[1][measure].value)


class _Measuring(NamedTuple):
    """What all variants are measured with."""

    work: Work
    extractor: Extractor
    test: ImageSet
    reference: ImageSet
    about_reference: dict[str, Any]  # the images that its statistics are of

    @property
    def distance(self) -> str:
        """What a Fréchet distance is called."""
        return "FID" if self.extractor.name == INCEPTION else "FD"


def run_ablation(
    config: Ablation, output: Path, names: Sequence[str] = (), device: str | None = None, command: str = "detailflow ablate"
) -> Report | None:
    """Train and measure the variants in `output`, or go on with it; the report there grows with each of them.

    Args:
        names: of the variants to run; none means all. Those that were run before are in the report as well.
        command: for the report.

    Returns:
        The report, in the main process.

    Raises:
        DetailFlowError: for unknown variants, data or features that can't be had, a folder that holds something else, or as the
            stages do.
    """
    everything = config.stages(output)
    known = [stages.variant.name for stages in everything]
    if unknown := [name for name in names if name not in known]:
        raise DetailFlowError(f"there is no variant {unknown[0]!r}: the variants are {', '.join(known)}")
    if (output / JSON_FILE).exists() and load(output)["kind"] != KIND:
        raise DetailFlowError(f"{output} holds the report of another evaluation: choose another folder")
    check_packages("matplotlib")
    using = _prepare(config, everything[0], output, device)
    report = None
    for stages in everything:
        if names and stages.variant.name not in names:
            continue
        train_variant(config, stages, output, device)
        _measure_variant(config, stages, output, using)
        if using.work.processes.is_main:
            report = _report(config, everything, output, using, command)
            report.write(output)
    return report


def _prepare(config: Ablation, first: Stages, output: Path, device: str | None) -> _Measuring:
    """Open all that training does not need, before it takes hours; the reference's statistics are measured once."""
    work, side = Work.here(device, config.batch_size), first.tokenizer.model.image_size
    extractor = load_extractor(config.features, work.device)
    test = work.open(config.test_data or config.data, side, config.num_reconstructions, config.test_split)
    where, split = (config.reference, config.reference_split) if config.reference else (config.data, config.split)
    name = hashlib.sha256(json.dumps([where, split, side, extractor.fingerprint]).encode()).hexdigest()[:12]
    path, real = output / f"reference-{name}.npz", work.open(where, side, None, split)
    if work.processes.any(not path.exists()):
        with timed(output, path, "reference", path):
            measured = measure(extractor, real, work.processes, REFERENCE_KEPT)
            if work.processes.is_main:
                save_statistics(path, measured)
        work.processes.wait()
    return _Measuring(work, extractor, test, work.open(str(path)), real.description())


# --- one variant ---------------------------------------------------------------------------------------------------------


def _measure_variant(config: Ablation, stages: Stages, output: Path, using: _Measuring) -> None:
    """Write a variant's evaluation.json, unless it is there and of the same models and settings."""
    place, work, name = output / stages.variant.name, using.work, stages.variant.name
    folders = stages.folders
    of = _subject(config, {kind: model_entry(str(folders[kind]), kind) for kind in ("tokenizer", "gpt")}, using)
    if work.processes.any(work.processes.is_main and _read(place, of) is not None):
        return
    with timed(output, place / "evaluation", f"{name}: evaluation"):
        tokenizer = DetailFlowTokenizer.from_pretrained(folders["tokenizer"], work.device)
        pipeline = DetailFlowPipeline.from_pretrained(folders["gpt"], work.device, tokenizer=folders["tokenizer"])
        n = tokenizer.config.num_tokens
        rebuilt = evaluate_tokenizer(tokenizer, using.test, work, using.extractor, using.reference, counts=[n])
        made = evaluate_gpt(
            pipeline, using.reference, work, using.extractor, place, config.num_samples, Sweep(config.guidance_scales),
            seeds=config.seeds,
        )  # fmt: skip
    if rebuilt is None or made is None:
        return
    for picture in (*rebuilt.pictures, *made.pictures):
        picture.image.save(place / f"{picture.name}.png")
    content = {
        "of": of,
        "rebuilt": _plain(rebuilt.sections[0].rows[0].figures),
        "generated": [[row.setting["guidance"], _plain(row.figures)] for row in made.sections[0].rows],
    }
    with replacing(place / FIGURES_FILE) as path:
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _subject(config: Ablation, models: Mapping[str, Any], using: _Measuring) -> dict[str, Any]:
    """All that a variant's figures depend on, as JSON has it."""
    subject = {
        "models": models,
        "features": features_entry(using.extractor),
        "test": using.test.description(),
        "reference": using.about_reference,
        "samples": [config.num_samples, config.guidance_scales, config.seeds],
    }
    plain: dict[str, Any] = json.loads(json.dumps(subject))
    return plain


def _plain(figures: Mapping[str, Figure]) -> dict[str, Any]:
    return {name: asdict(figure) for name, figure in figures.items()}


def _read(place: Path, of: Mapping[str, Any] | None = None) -> Result | None:
    """A variant's figures, where there are any, and of that subject if one is given."""
    path = place / FIGURES_FILE
    if not path.exists():
        return None
    content = read_json(path)
    if of is not None and content.get("of") != of:
        return None

    def figures(plain: Mapping[str, Any]) -> dict[str, Figure]:
        return {name: Figure(one["value"], one["spread"], tuple(one["values"])) for name, one in plain.items()}

    generated = [(scale, figures(plain)) for scale, plain in content["generated"]]
    return Result(content["of"]["models"], figures(content["rebuilt"]), generated)


# --- all of them ---------------------------------------------------------------------------------------------------------


def _report(config: Ablation, everything: Sequence[Stages], output: Path, using: _Measuring, command: str) -> Report:
    """One table and one plot of the variants that have figures."""
    paper = {row["name"]: row for row in published()["ablation"]["rows"]}
    distance, took = f"g{using.distance}", spent(output)
    rows, times, models = list[Row](), list[Row](), dict[str, Any]()
    seen: dict[str, tuple[Figure, float | None]] = {}  # our distance of generated images, and the paper's
    points: list[tuple[float, Row]] = []
    for number, stages in enumerate(everything, 1):
        name, theirs = stages.variant.name, paper.get(stages.variant.paper or "", {})
        result = _read(output / name)
        if result is None:
            continue
        scale, figures = result.best(distance)
        setting = {
            "#": number,
            "variant": name,
            "steps": len(stages.tokenizer.model.schedule.steps),
            "steps in the paper": theirs.get("steps"),
            PAPER: theirs.get("gFID"),
            "guidance": scale,
        }
        wanted = ("PSNR", f"r{using.distance}")
        row = Row(setting, {**{m: result.rebuilt[m] for m in wanted}, **figures})
        rows.append(row)
        points.append((float(number), row))
        seen[name] = figures[distance], theirs.get("gFID")
        times.append(Row({"variant": name}, _minutes(stages, output, took)))
        models[name] = result.models
    return Report(
        kind=KIND,
        title="The paper's ablation at this size",
        sections=[
            Section("Variants", rows, _table_note(config)),
            Section("What it took", times, _times_note(took)),
        ],
        provenance={
            "command": command,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "models": models,
            "data": {"training": config.data, "test": using.test.description(), "reference": using.about_reference},
            "features": features_entry(using.extractor),
            "preprocessing": preprocessing_entry(using.extractor, everything[0].tokenizer.model.image_size),
            "settings": _settings(config, everything),
            **circumstances(using.work.device, using.work.processes.count, None),
        },
        plots=[_plot(points, distance)],
        notes=[*comparisons(seen, distance), *naming_note(using.extractor)],
    )


def comparisons(seen: Mapping[str, tuple[Figure, float | None]], distance: str) -> list[str]:
    """Paragraphs on what each variant changes in the paper and here, which begin with where the paper's ordering is not seen.

    Args:
        seen: our distance of each variant, in the table's order, and the paper's.
        distance: its name.
    """
    known = [(name, ours, theirs) for name, (ours, theirs) in seen.items() if theirs is not None]
    lines: list[str] = []
    contrary: list[str] = []
    unsure: list[str] = []
    for (_, before, paper_before), (name, ours, theirs) in itertools.pairwise(known):
        agrees = (ours.value < before.value) == (theirs < paper_before)
        sure = abs(ours.value - before.value) > SURE * ((ours.spread or 0.0) ** 2 + (before.spread or 0.0) ** 2) ** 0.5
        verdict = "as in the paper" if agrees else "the other way than in the paper"
        if not sure:
            verdict = "no more than samples of other seeds differ"
        if not (agrees and sure):
            (contrary if sure else unsure).append(name)
        lines.append(
            f"- {name}: gFID {paper_before:g} → {theirs:g} in the paper, {distance} {before.value:.3f} → {ours.value:.3f} here: "
            f"{verdict}."
        )
    if not lines:
        return []
    summary = f"The paper's ordering is seen in {len(lines) - len(contrary) - len(unsure)} of {len(lines)} steps at this scale."
    if contrary:
        summary += f" It is not seen, as figures move the other way, in: {', '.join(contrary)}."
    if unsure:
        summary += f" It is not seen, as figures hardly move, in: {', '.join(unsure)}."
    once = (
        "Each variant was trained once, from one seed; how far runs of other seeds would lie apart was not measured. The paper's "
        f"figures are of {published()['ablation']['conditions']}, on ImageNet at 256×256."
    )
    return [summary, "\n".join(lines), once]


def _minutes(stages: Stages, output: Path, took: Mapping[str, Spent]) -> dict[str, Figure]:
    """CPU minutes of each stage, and of all, by the CPU and by the clock."""
    parts = {**stages.folders, "evaluation": output / stages.variant.name / "evaluation"}
    found = {name: took.get(str(folder.relative_to(output)), Spent(0, 0)) for name, folder in parts.items()}
    minutes = {f"{name}, CPU min": Figure(value.cpu / 60) for name, value in found.items()}
    minutes["all, CPU min"] = Figure(sum(value.cpu for value in found.values()) / 60)
    return {**minutes, "all, min": Figure(sum(value.wall for value in found.values()) / 60)}


def _table_note(config: Ablation) -> str:
    seeds = f", means over {len(config.seeds)} seeds, ± the standard deviation over them" if len(config.seeds) > 1 else ""
    scales = ", ".join(f"{scale:g}" for scale in config.guidance_scales)
    choice = f"Of the guidance scales {scales} the one of the smallest distance is shown. " if "," in scales else ""
    return (
        "Every variant adds something to the one before it. PSNR is of the test images rebuilt from all tokens, ± the standard "
        f"deviation of the mean. {config.num_samples:,} generated images, classes in turn{seeds}. {choice}"
        "Distances are to the reference."
    )


def _times_note(took: Mapping[str, Spent]) -> str:
    cpu, wall = (sum(values) / 60 for values in zip(*took.values(), strict=True))
    shared = {name.partition("-")[0]: value.cpu / 60 for name, value in took.items() if "/" not in name}
    once = ", ".join(f"{name} {minutes:.1f}" for name, minutes in shared.items())
    return f"Together {cpu:.1f} CPU minutes, {wall:.1f} by the clock. For all variants at once, in CPU minutes: {once}."


def _settings(config: Ablation, everything: Sequence[Stages]) -> dict[str, Any]:
    """What a reader needs to judge the size of it; the runs' folders have the rest."""
    first = everything[0]
    model = first.tokenizer.model
    return {
        "image_size": model.image_size,
        "tokens": model.num_tokens,
        "codebook": model.codebook_size,
        "tokenizer_steps": first.tokenizer.loop.steps,
        "tokenizer_batch_size": first.tokenizer.loop.batch_size,
        "gpt_steps": first.gpt.loop.steps,
        "gpt_batch_size": first.gpt.loop.batch_size,
        "seeds": list(config.seeds),
        "guidance_scales": list(config.guidance_scales),
        "batch_size": config.batch_size,
    }


def _plot(points: Sequence[tuple[float, Row]], distance: str) -> Plot:
    """Ours and the paper's distances beside each other, by the variant's number in the table."""
    rebuilt = distance.replace("g", "r", 1)
    panels = [Panel("variant", m, {"ours": [(x, row.figures[m]) for x, row in points]}) for m in ("PSNR", rebuilt, distance)]
    known = [(x, row.setting[PAPER]) for x, row in points if row.setting[PAPER] is not None]
    panels += [Panel("variant", PAPER, {"paper": [(x, Figure(value)) for x, value in known]})] if known else []
    names = ", ".join(f"{row.setting['#']} {row.setting['variant']}" for _, row in points)
    return Plot("ablation", f"The variants: {names}", panels)
