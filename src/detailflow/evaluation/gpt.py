"""Measure generated images: distances to a reference set, for each way to sample (docs/method.md#sampling)."""

import itertools
import re
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from detailflow.errors import DetailFlowError
from detailflow.evaluation.distances import REFERENCE_KEPT, SAMPLES_KEPT, Measured, compare_sets, measure
from detailflow.evaluation.features import Extractor
from detailflow.evaluation.published import quotes
from detailflow.evaluation.report import (
    Figure,
    Panel,
    Picture,
    Plot,
    Point,
    Report,
    Row,
    Section,
    cell,
    in_words,
    place,
    shared_settings,
)
from detailflow.evaluation.samples import (
    INCEPTION,
    PICTURES,
    Watching,
    Work,
    at_side,
    features_entry,
    measure_set,
    named,
    preprocessing_entry,
    spread_note,
    warnings_of,
)
from detailflow.evaluation.sets import ImageSet, check_total, share_of
from detailflow.generation import OFF, SamplingConfig
from detailflow.pictures import grid
from detailflow.pipeline import DetailFlowPipeline
from detailflow.samples import generate_many, remove_temporary
from detailflow.seeds import check_seeds

LABELS = ("balanced", "random")
SAMPLES = "samples"  # the folder in the output folder where images are, for a while or for good

OUR_CROP = (
    "The reference's images are brought to their size by one bicubic resize. ADM's reference, which published FIDs are to, is of "
    "photographs that were first halved by averages where they were at least twice as large, so such figures differ a little."
)
RECOGNISED = (
    "Recognised is the share of images whose likeliest class, by the network of features, has the number of the class asked for: "
    "it means something only where that network's classes are the model's, in the same order, of which just the count is checked."
)


@dataclass(frozen=True)
class Sweep:
    """Values to try of each way to sample; all their combinations are.

    `None` is the model's own best, and all N tokens; "off" is no top-k and no top-p.
    """

    guidance_scale: Sequence[float | None] = (None,)
    guidance_schedule: Sequence[str | None] = (None,)
    temperature: Sequence[float | None] = (None,)
    top_k: Sequence[int | Literal["off"] | None] = (None,)
    top_p: Sequence[float | Literal["off"] | None] = (None,)
    num_tokens: Sequence[int | None] = (None,)

    def settings(self, pipeline: DetailFlowPipeline) -> "list[Setting]":
        """All combinations, without those that are the same.

        Raises:
            DetailFlowError: for a value out of range.
        """
        result = []
        for values in itertools.product(*(getattr(self, name) for name in self.__dataclass_fields__)):
            given = dict(zip(self.__dataclass_fields__, values, strict=True))
            tokens = pipeline.tokenizer.schedule.check_count(given.pop("num_tokens"))
            result.append(Setting(pipeline.gpt.sampling(**given), tokens))
        return list(dict.fromkeys(result))


@dataclass(frozen=True)
class Setting:
    """One way to sample; a top-k or top-p of `None` is off."""

    sampling: SamplingConfig
    num_tokens: int

    def shown(self) -> dict[str, Any]:
        """For a table's row."""
        s = self.sampling
        return {
            "guidance": s.guidance_scale,
            "schedule": s.guidance_schedule,
            "temperature": s.temperature,
            "top-k": OFF if s.top_k is None else s.top_k,
            "top-p": OFF if s.top_p is None else s.top_p,
            "tokens": self.num_tokens,
        }

    def folder(self, seed: int) -> str:
        """A name for the folder of its images."""
        words = [
            f"{key}-{value:g}" if isinstance(value, float) else f"{key}-{value}" for key, value in self.shown().items()
        ]
        return "-".join([*words, f"seed-{seed}"])

    def given(self) -> dict[str, Any]:
        """Return the sampling as a pipeline's call takes it, where `None` is the model's own best."""
        return {name: OFF if value is None else value for name, value in asdict(self.sampling).items()}


def evaluate_gpt(
    pipeline: DetailFlowPipeline,
    reference: ImageSet,
    work: Work,
    extractor: Extractor,
    folder: Path,
    num_samples: int,
    sweep: Sweep | None = None,
    labels: str = LABELS[0],
    seeds: Sequence[int] = (0,),
    keep_samples: bool = False,
    model: str | None = None,
    say: Callable[[str], object] = lambda text: None,
) -> Report | None:
    """Generate images in each setting, from each seed, and compare them with `reference`.

    Each set of images is written to `folder`/samples, where one that was interrupted is gone on with, and removed once it is
    measured. Image i depends on the seed and i alone.

    Args:
        labels: "balanced" takes the classes in turn, "random" draws them by the seed.
        keep_samples: leave them there, as samples.npz in ADM's layout.
        model: the name that the user gave, by which published figures are found.
        say: called, in the main process, with a line on each set of images as it is measured.

    Returns:
        In the main process a report whose provenance is not complete yet; `None` in others.

    Raises:
        DetailFlowError: for values out of range, too few images, sets that cannot be compared or a folder that cannot be written
            to or has other samples.
    """
    if labels not in LABELS:
        raise DetailFlowError(f"labels must be {' or '.join(LABELS)}, not {labels!r}")
    check_seeds(*seeds)
    check_total(num_samples, work.world)
    seeds, settings = list(dict.fromkeys(seeds)), (sweep or Sweep()).settings(pipeline)
    wanted, reference_entry = measure_set(extractor, reference, work, REFERENCE_KEPT)
    common = shared_settings([setting.shown() for setting in settings])
    rows: list[Row] = []
    checksums: dict[str, str] = {}
    pictures: list[Tensor] = []
    notes: list[str] = []
    for setting in settings:
        runs = []
        for seed in seeds:
            classes = class_labels(pipeline.gpt.config.num_classes, num_samples, labels, seed)
            watching = Watching(extractor, share_of(num_samples, work.world).start, PICTURES)
            made = _measure_samples(pipeline, setting, classes, seed, work, watching, folder / SAMPLES, keep_samples)
            hits = recognised(watching, classes, pipeline.gpt.config.num_classes, work)
            checksums[setting.folder(seed)] = watching.checksum.text(work.world)
            with work.world.raise_together():
                if not work.world.is_main:
                    continue
                runs.append(named(compare_sets(wanted, made, work.device), extractor, "g") | hits)
                name, figure = next(iter(runs[-1].items()))
                say(f"{', '.join([*in_words(setting.shown(), common), f'seed {seed}'])}: {name} {figure.text(name)}")
                pictures += watching.shown if len(runs) == 1 else []
                notes = notes or warnings_of(wanted, made, extractor, "g")
        rows.append(Row(setting.shown(), over_seeds(runs)))
    if not work.world.is_main:
        return None
    if not keep_samples:
        with suppress(OSError):  # where others lie there
            (folder / SAMPLES).rmdir()
    if extractor.name == INCEPTION and reference_entry["kind"] == "images":
        notes = [*notes, OUR_CROP]
    side, count = pipeline.tokenizer.config.image_size, f"{num_samples:,} images of {labels} classes"
    enlarged = any(pipeline.tokenizer.schedule.decode_size(setting.num_tokens) != side for setting in settings)
    return Report(
        kind="gpt",
        title=f"Images generated by {model or 'the shipped model'}",
        sections=[Section("Quality by sampling", rows, _note(rows, count, seeds, side if enlarged else None))],
        provenance={
            "data": {"reference": reference_entry, "samples": {"images": num_samples, "labels": labels}},
            "features": features_entry(extractor),
            "preprocessing": preprocessing_entry(extractor, side),
            "settings": {"seeds": seeds, "batch_size": work.batch_size},
            "samples": {"checksum": checksums},  # not among the data, which must be the same for figures to be compared
        },
        plots=[plot for key in rows[0].setting if (plot := sweep_plot(key, rows))],
        pictures=[_picture(pictures, settings, common)] if pictures else [],
        notes=notes,
        published=_quotes(model, settings, rows, pipeline.gpt.config.num_tokens),
    )


def class_labels(classes: int, count: int, how: str, seed: int) -> list[int]:
    """The class of every image."""
    if how == "balanced":
        return [i % classes for i in range(count)]
    draws: list[int] = np.random.default_rng(seed).integers(classes, size=count).tolist()
    return draws


def _measure_samples(
    pipeline: DetailFlowPipeline,
    setting: Setting,
    labels: Sequence[int],
    seed: int,
    work: Work,
    extractor: Extractor,
    folder: Path,
    keep: bool,
) -> Measured:
    """Generate one set of images, or go on with it, and measure it at the models' full side."""
    place, world = folder / setting.folder(seed), work.world
    generate_many(
        pipeline, labels, place, "npz", seed, work.batch_size, world, setting.num_tokens, temporary=not keep,
        **setting.given(),
    )  # fmt: skip
    world.barrier()
    made = measure(extractor, _full_size(work.open(str(place)), pipeline), world, SAMPLES_KEPT, len(labels))
    world.barrier()
    if world.is_main:
        remove_temporary(place)  # what was kept before stays
    return made


def _full_size(images: ImageSet, pipeline: DetailFlowPipeline) -> Iterator[Tensor]:
    """Bytes (B, R, R, 3); coarse images are brought to that side by Pillow, as everywhere in the project."""
    for batch in images:
        yield at_side(batch, pipeline.tokenizer.config.image_size)


def recognised(watching: Watching, labels: Sequence[int], classes: int, work: Work) -> dict[str, Figure]:
    """The share of images whose class the network recognised, where its classes are as many as the model's; `RECOGNISED` says
    what that takes for granted.
    """
    share = share_of(len(labels), work.world)
    said = torch.cat(watching.recognised) if watching.recognised else torch.zeros(0)
    hits = (
        (said == torch.tensor(labels[share.start : share.stop])).sum() if len(said) == len(share) else torch.tensor(0)
    )
    total = work.world.all_reduce(hits.double().to(work.world.device))
    return {"recognised": Figure(total.item() / len(labels))} if watching.classes == classes else {}


def over_seeds(runs: Sequence[Mapping[str, Figure]]) -> dict[str, Figure]:
    """The mean of each figure over the seeds, with the standard deviation over them where there are several."""
    if len(runs) < 2:
        return dict(runs[0]) if runs else {}
    result = {}
    for measure_name in runs[0]:
        values = np.array([run[measure_name].value for run in runs])
        result[measure_name] = Figure(float(values.mean()), float(values.std(ddof=1)), tuple(values.tolist()))
    return result


def _note(rows: Sequence[Row], count: str, seeds: Sequence[int], enlarged: int | None) -> str:
    if len(seeds) > 1:
        said = [f"Means over {len(seeds)} seeds, ± the standard deviation over them; {count} for each seed."]
    else:
        said = [f"{count}, seed {seeds[0]}.", spread_note(rows[0].figures)]
    if enlarged:
        said.append(
            f"Images of fewer tokens, which are smaller, are enlarged to {enlarged}×{enlarged} (bicubic) to be measured."
        )
    if "recognised" in rows[0].figures:
        said.append(RECOGNISED)
    return " ".join(filter(None, said))


def sweep_plot(key: str, rows: Sequence[Row]) -> Plot | None:
    """Each measure by one setting, with a curve for every combination of the others; `None` where it has one value only."""
    values = list(dict.fromkeys(row.setting[key] for row in rows))
    if sum(isinstance(value, int | float) for value in values) < 2:
        return None
    others = [k for k in rows[0].setting if k != key and len({row.setting[k] for row in rows}) > 1]
    panels = []
    for name in rows[0].figures:
        curves: dict[str, list[Point]] = {}
        for row in rows:
            curve, x = ", ".join(f"{k} {cell(row.setting[k])}" for k in others), row.setting[key]
            label = curve if x != "off" else f"{key} off, {curve}".removesuffix(", ")
            curves.setdefault(label, []).append((None if x == "off" else float(x), row.figures[name]))
        panels.append(
            Panel(key, name, {label: sorted(points, key=place) for label, points in curves.items()}, key == "tokens")
        )
    return Plot(f"by-{re.sub('[^a-z]', '-', key)}", f"Quality by {key}", panels)


def _picture(images: Sequence[Tensor], settings: Sequence[Setting], common: Container[str]) -> Picture:
    """A row for each setting, with what it has otherwise than the others below its first image."""
    columns, pictures = len(images) // len(settings), [Image.fromarray(image.numpy()) for image in images]
    if len(settings) == 1:
        return Picture("samples", "The first images", grid(pictures, columns))
    own = ["\n".join(in_words(setting.shown(), common)) for setting in settings]
    labels = [text if column == 0 else "" for text in own for column in range(columns)]
    return Picture("samples", "The first images, a row for each setting", grid(pictures, columns, labels))


def _quotes(model: str | None, settings: Sequence[Setting], rows: Sequence[Row], full: int) -> list[dict[str, Any]]:
    """Published figures are of all tokens and plain sampling at one guidance scale."""
    result = []
    for setting, row in zip(settings, rows, strict=True):
        plain = SamplingConfig(setting.sampling.guidance_scale)
        if setting == Setting(plain, full) and "gFID" in row.figures:
            result += quotes(model, {name: figure.value for name, figure in row.figures.items()}, plain.guidance_scale)
    return result
