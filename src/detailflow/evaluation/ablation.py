"""The paper's table 2 at a size of one's own: every variant trained, measured and put beside the paper's figures."""

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from detailflow.data.images import find
from detailflow.errors import DetailFlowError
from detailflow.evaluation.distances import REFERENCE_KEPT, save_statistics
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
    checksums,
    circumstances,
    load,
    model_entry,
)
from detailflow.evaluation.samples import (
    INCEPTION,
    Checksum,
    Work,
    data_entry,
    features_entry,
    measure_set,
    naming_note,
    preprocessing_entry,
    spread_note,
)
from detailflow.evaluation.sets import ImageSet, share_of
from detailflow.evaluation.tokenizer import evaluate_tokenizer
from detailflow.models.tokenizer import DetailFlowTokenizer
from detailflow.pipeline import DetailFlowPipeline
from detailflow.published import Kind
from detailflow.storage import held, read_json, write_json, writing
from detailflow.training.ablation import Ablation, Spent, Stages, spent, timed, train_variant

KIND = "ablation"
FIGURES_FILE = "evaluation.json"
STATISTICS = "reference.npz"
MODELS: tuple[Kind, ...] = ("tokenizer", "gpt")
PAPER = "gFID in the paper"
# Quantiles that chance leaves at 5%, on both sides: of Student's t for two variants of 2, 3, … 11 seeds each, and the normal one.
STUDENT = (4.303, 2.776, 2.447, 2.306, 2.228, 2.179, 2.145, 2.120, 2.101, 2.086)
NORMAL = 1.960


class Result(NamedTuple):
    """What was measured of one variant."""

    models: dict[Kind, str]  # the fingerprints of its tokenizer and its AR model
    rebuilt: dict[str, Figure]
    generated: list[tuple[float, dict[str, Figure]]]  # by guidance scale
    notes: list[str]  # what a reader of its figures should know

    def best(self, measure: str) -> tuple[float, dict[str, Figure]]:
        """The guidance scale with the smallest distance, and its figures."""
        return min(self.generated, key=lambda one: one[1][measure].value)


class _Measuring(NamedTuple):
    """What all variants are measured with."""

    work: Work
    extractor: Extractor
    test: ImageSet
    reference: ImageSet  # statistics alone
    data: dict[str, Any]  # a report's entries of the test images and of those that the statistics are of

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
    work, report = Work.here(device, config.batch_size), None
    with held(output, "ablation", work.processes):
        using = _prepare(config, everything[0], output, work)
        for stages in everything:
            if names and stages.variant.name not in names:
                continue
            train_variant(config, stages, output, device)
            _measure_variant(config, stages, output, using)
            with work.processes.together():
                if work.processes.is_main:
                    report = _report(config, everything, output, using, command)
                    report.write(output)
    return report


def _prepare(config: Ablation, first: Stages, output: Path, work: Work) -> _Measuring:
    """Open all that training does not need, before it takes hours; sets are read once, as long as their files stay the same."""
    extractor, side = load_extractor(config.features, work.device), first.tokenizer.model.image_size
    tested, test_split, count = config.test_data or config.data, config.test_split, config.num_reconstructions
    where, split = (config.reference, config.reference_split) if config.reference else (config.data, config.split)
    test, real, statistics = work.open(tested, side, count, test_split), work.open(where, side, None, split), output / STATISTICS

    def read_test() -> dict[str, Any]:
        checksum = Checksum(share_of(len(test), work.processes).start)
        for images in test:
            checksum.update(images)
        return data_entry(test, checksum, work.processes)

    def measure_reference() -> dict[str, Any]:
        measured, entry, _ = measure_set(extractor, real, work, REFERENCE_KEPT)
        with work.processes.together():
            if work.processes.is_main:
                save_statistics(statistics, measured)
        return entry

    of_test = _digest(_files(tested, test_split), side, count)
    of_reference = _digest(_files(where, split), side, extractor.fingerprint)
    data = {
        "test": _once(output / "test.json", of_test, work, read_test),
        "reference": _once(statistics.with_suffix(".json"), of_reference, work, measure_reference, statistics),
    }
    return _Measuring(work, extractor, test, work.open(str(statistics)), data)


def _files(data: str, split: str | None) -> list[Any]:
    """What changes when a set's files do and is known without reading them: names, sizes and times; for the hub its name."""
    place = Path(data).expanduser()
    stored = place if place.suffix == ".npz" else place / "samples.npz"  # as `open_set` looks for them
    files = [stored] if stored.is_file() else find(data, split).files
    facts = ((file.name, file.stat()) for file in files)
    return [[name, fact.st_size, fact.st_mtime_ns] for name, fact in facts] or [data, split]


def _digest(*facts: Any) -> str:
    """Short for values that JSON has."""
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _once(path: Path, of: str, work: Work, read: Callable[[], dict[str, Any]], also: Path | None = None) -> dict[str, Any]:
    """What `read` says of a set, kept at `path` until `of` changes, as long as the file `also` is there; for the main process."""
    main = work.processes.is_main
    known = _content(path) if main and (also is None or also.exists()) else {}
    if work.processes.any(main and known.get("of") != of):
        with timed(path.parent, path.with_suffix(""), f"{path.stem} images", of=of):
            with work.processes.together():
                if main:
                    write_json(path, {})  # of no set, until all is written
            known = {"of": of, "entry": read()}
            with work.processes.together():
                if main:
                    write_json(path, known)
    return dict(known.get("entry", {}))


def _content(path: Path) -> dict[str, Any]:
    """Of a JSON file; nothing where it is missing or damaged."""
    try:
        return read_json(path)
    except DetailFlowError:
        return {}


# --- one variant ---------------------------------------------------------------------------------------------------------


def _measure_variant(config: Ablation, stages: Stages, output: Path, using: _Measuring) -> None:
    """Write a variant's evaluation.json, unless it is there and of the same models and settings."""
    place, work, name = output / stages.variant.name, using.work, stages.variant.name
    folders, of = stages.folders, _subject(config, using)
    models = {kind: model_entry(str(folders[kind]), kind)["fingerprint"] for kind in MODELS}
    if work.processes.from_main(lambda: _read(place, of, models) is not None):
        return
    with timed(output, place / "evaluation", f"{name}: evaluation", of=_digest(of, models)):
        tokenizer = DetailFlowTokenizer.from_pretrained(folders["tokenizer"], device=work.device)
        pipeline = DetailFlowPipeline.from_pretrained(folders["gpt"], device=work.device, tokenizer=folders["tokenizer"])
        n = tokenizer.config.num_tokens
        rebuilt = evaluate_tokenizer(tokenizer, using.test, work, using.extractor, using.reference, counts=[n])
        made = evaluate_gpt(
            pipeline, using.reference, work, using.extractor, place, config.num_samples, Sweep(config.guidance_scales),
            seeds=config.seeds,
        )  # fmt: skip
    with work.processes.together():
        if rebuilt is not None and made is not None:
            _keep(place, of, models, rebuilt, made)


def _keep(place: Path, of: Mapping[str, Any], models: Mapping[Kind, str], rebuilt: Report, made: Report) -> None:
    """Write a variant's pictures and figures, the figures last."""
    for picture in (*rebuilt.pictures, *made.pictures):
        with writing(place / f"{picture.name}.png") as path:
            picture.image.save(path, format="PNG")
    content = {
        "of": of,
        "models": models,
        "notes": list(dict.fromkeys((*made.notes, *rebuilt.notes))),
        "rebuilt": _plain(rebuilt.sections[0].rows[0].figures),
        "generated": [[row.setting["guidance"], _plain(row.figures)] for row in made.sections[0].rows],
    }
    write_json(place / FIGURES_FILE, content)


def _subject(config: Ablation, using: _Measuring) -> dict[str, Any]:
    """All that a variant's figures depend on beside its models, as JSON has it; the same wherever the files lie."""
    subject = {
        "features": using.extractor.fingerprint,
        **{name: checksums(entry) for name, entry in using.data.items()},
        "samples": [config.num_samples, config.guidance_scales, config.seeds],
    }
    plain: dict[str, Any] = json.loads(json.dumps(subject))
    return plain


def _plain(figures: Mapping[str, Figure]) -> dict[str, Any]:
    return {name: asdict(figure) for name, figure in figures.items()}


def _read(place: Path, of: Mapping[str, Any], models: Mapping[Kind, str] | None = None) -> Result | None:
    """A variant's figures, where there are any of that subject, and of these models if they are given."""
    content = _content(place / FIGURES_FILE)

    def figures(plain: Mapping[str, Any]) -> dict[str, Figure]:
        return {name: Figure(one["value"], one["spread"], tuple(one["values"])) for name, one in plain.items()}

    if content.get("of") != of or models not in (None, content.get("models")):
        return None
    try:
        generated = [(scale, figures(plain)) for scale, plain in content["generated"]]
        models_of = {kind: content["models"][kind] for kind in MODELS}
        return Result(models_of, figures(content["rebuilt"]), generated, [str(note) for note in content.get("notes", [])])
    except (KeyError, TypeError, ValueError, AttributeError):  # damaged: it is measured anew
        return None


# --- all of them ---------------------------------------------------------------------------------------------------------


def _report(config: Ablation, everything: Sequence[Stages], output: Path, using: _Measuring, command: str) -> Report:
    """One table and one plot of the variants that have figures."""
    paper = {row["name"]: row for row in published()["ablation"]["rows"]}
    distance, took, of = f"g{using.distance}", spent(output), _subject(config, using)
    rows, times, models = list[Row](), list[Row](), dict[str, Any]()
    seen: dict[str, tuple[Figure | None, float | None]] = {}  # our distance of generated images, and the paper's
    warnings: list[str] = []
    points: list[tuple[float, Row]] = []
    missing: list[str] = []
    for number, stages in enumerate(everything, 1):
        name, theirs = stages.variant.name, paper.get(stages.variant.paper or "", {})
        result = _read(output / name, of)
        if result is None:
            missing.append(name)
            seen[name] = None, theirs.get("gFID")
            continue
        scale, figures = result.best(distance)
        setting = {
            "#": number,
            "variant": name,
            "steps": len(stages.tokenizer.model.schedule.steps),
            "steps in the paper": theirs.get("steps"),
            PAPER: theirs.get("gFID"),
        }
        rebuilt = {m: result.rebuilt[m] for m in ("PSNR", f"r{using.distance}")}
        row = Row(setting, {"guidance": Figure(scale), **rebuilt, **figures})  # it comes out, and is no setting of the row
        rows.append(row)
        points.append((float(number), row))
        seen[name] = figures[distance], theirs.get("gFID")
        warnings += result.notes
        times.append(Row({"variant": name}, _minutes(stages, output, took)))
        models[name] = {kind: {"name": str(stages.folders[kind]), "fingerprint": result.models[kind]} for kind in MODELS}
    notes = comparisons(seen, distance)
    if missing:
        notes.append(f"Not measured with these settings, so not in the table: {', '.join(missing)}.")
    return Report(
        kind=KIND,
        title="The paper's ablation at this size",
        sections=[
            Section("Variants", rows, _table_note(config, rows)),
            Section("What it took", times, _times_note(took)),
        ],
        provenance={
            "command": command,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "models": models,
            "data": {"training": {"data": config.data, "split": config.split}, **using.data},
            "features": features_entry(using.extractor),
            "preprocessing": preprocessing_entry(using.extractor, everything[0].tokenizer.model.image_size),
            "settings": _settings(config, everything),
            **circumstances(using.work.device, using.work.processes.count, None),
        },
        plots=[_plot(points, distance)],
        notes=[*notes, *dict.fromkeys((*warnings, *naming_note(using.extractor)))],
    )


def comparisons(seen: Mapping[str, tuple[Figure | None, float | None]], distance: str) -> list[str]:
    """Paragraphs on what each variant changes in the paper and here, which begin with where the paper's ordering is not seen.

    Args:
        seen: our distance of each variant, in the paper's order, and the paper's; a step has two neighbours with both.
        distance: its name.
    """
    known = [(name, ours, theirs) for name, (ours, theirs) in seen.items() if theirs is not None]
    measured: Figure | None = None
    lines: list[str] = []
    contrary: list[str] = []
    unsure: list[str] = []
    for (_, before, paper_before), (name, ours, theirs) in itertools.pairwise(known):
        if before is None or ours is None:
            continue
        measured = ours
        agrees = (ours.value < before.value) == (theirs < paper_before)
        chance = by_chance(before, ours)
        if chance is not None and abs(ours.value - before.value) <= chance:
            unsure.append(name)
            verdict = "no more than other samples may differ"
        elif agrees:
            verdict = "as in the paper"
        else:
            contrary.append(name)
            verdict = "the other way than in the paper"
        lines.append(
            f"- {name}: gFID {paper_before:g} → {theirs:g} in the paper, {distance} {before.value:.3f} → {ours.value:.3f} here: "
            f"{verdict}."
        )
    if measured is None:
        return []
    summary = f"The paper's ordering is seen in {len(lines) - len(contrary) - len(unsure)} of {len(lines)} steps at this scale."
    if contrary:
        summary += f" It is not seen, as figures move the other way, in: {', '.join(contrary)}."
    if unsure:
        summary += f" It can't be told, as other samples may differ as much, in: {', '.join(unsure)}."
    once = (
        "Each variant was trained once, from one seed; how far runs of other seeds would lie apart was not measured. The paper's "
        f"figures are of {published()['ablation']['conditions']}, on ImageNet at 256×256."
    )
    return [f"{summary} {_rule(measured)}", "\n".join(lines), once]


def by_chance(a: Figure, b: Figure) -> float | None:
    """The largest difference of two variants' figures that their samples may make by chance at a level of 5%, on both sides: by
    Student's t where there are several seeds, as many of each; `None` where no spread is known.
    """
    if a.spread is None or b.spread is None:
        return None
    deviation, seeds = math.hypot(a.spread, b.spread), len(a.values)
    return deviation * NORMAL if seeds < 2 else deviation / math.sqrt(seeds) * STUDENT[min(seeds, len(STUDENT) + 1) - 2]


def _rule(figure: Figure) -> str:
    """By what `by_chance` tells, where one variant's figure is such."""
    if figure.spread is None:
        return "Only directions are compared: how far the figures of other samples lie from these is not known."
    if len(figure.values) < 2:
        return "A step is told by a normal test at 95%, with the deviations over other samples that bootstrap finds."
    seeds = f"{len(figure.values)} seeds of samples of each variant"
    return f"A step is told by a two-sided t test at 95%, of {seeds}, their variances taken as equal."


def _minutes(stages: Stages, output: Path, took: Mapping[str, Spent]) -> dict[str, Figure]:
    """CPU minutes of each stage, and of all, by the CPU and by the clock; without those that are not known."""
    parts = {**stages.folders, "evaluation": output / stages.variant.name / "evaluation"}
    keys = {name: str(folder.relative_to(output)) for name, folder in parts.items()}
    found = {name: took[key] for name, key in keys.items() if key in took}
    minutes = {f"{name}, CPU min": Figure(value.cpu / 60) for name, value in found.items()}
    if len(found) < len(parts):
        return minutes
    minutes["all, CPU min"] = Figure(sum(value.cpu for value in found.values()) / 60)
    return {**minutes, "all, min": Figure(sum(value.wall for value in found.values()) / 60)}


def _table_note(config: Ablation, rows: Sequence[Row]) -> str:
    several = len(config.seeds) > 1
    seeds = f", means over {len(config.seeds)} seeds, ± the standard deviation over them" if several else ""
    of_samples = {name: figure for name, figure in rows[0].figures.items() if name != "PSNR"}
    scales = ", ".join(f"{scale:g}" for scale in config.guidance_scales)
    choice = f"Of the guidance scales {scales} the one of the smallest distance is shown. " if "," in scales else ""
    return (
        "Every variant adds something to the one before it. PSNR is of the test images rebuilt from all tokens, ± the standard "
        f"deviation of the mean. {config.num_samples:,} generated images, classes in turn{seeds}. {choice}"
        f"Distances are to the reference. {'' if several else spread_note(of_samples)}"
    ).strip()


def _times_note(took: Mapping[str, Spent]) -> str:
    if not took:
        return "It is not known, as times.json is missing."
    cpu, wall = (sum(getattr(value, clock) for value in took.values()) / 60 for clock in ("cpu", "wall"))
    shared = ", ".join(f"{name} {value.cpu / 60:.1f}" for name, value in took.items() if "/" not in name)
    once = f" For all variants at once, in CPU minutes: {shared}." if shared else ""
    return f"Together {cpu:.1f} CPU minutes, {wall:.1f} by the clock.{once} Of several processes the main one's time counts."


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
    ticks = {x: str(row.setting["variant"]) for x, row in points}
    ours = {m: [(x, row.figures[m]) for x, row in points] for m in ("PSNR", rebuilt, distance)}
    panels = [Panel("variant", m, {"ours": found}, ticks=ticks) for m, found in ours.items()]
    known = [(x, row.setting[PAPER]) for x, row in points if row.setting[PAPER] is not None]
    panels += [Panel("variant", PAPER, {"paper": [(x, Figure(value)) for x, value in known]}, ticks=ticks)] if known else []
    names = ", ".join(f"{row.setting['#']} {row.setting['variant']}" for _, row in points)
    return Plot("ablation", f"The variants: {names}", panels)
