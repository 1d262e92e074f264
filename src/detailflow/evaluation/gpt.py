"""Measure generated images: distances to a reference set, for each way to sample (docs/method.md#sampling)."""

import itertools
import logging
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image

from detailflow.errors import DetailFlowError
from detailflow.evaluation.distances import (
    REFERENCE_KEPT,
    SAMPLES_KEPT,
    Checksum,
    FeatureStatistics,
    cautions,
    compare_sets,
    measure,
)
from detailflow.evaluation.evaluate import PICTURES, Context, at_side, data_entry, provenance, spread_note
from detailflow.evaluation.features import INCEPTION, Extractor
from detailflow.evaluation.published import quotes
from detailflow.evaluation.report import Figure, Picture, Plot, Report, Row, Section, in_words, shared_settings
from detailflow.evaluation.sets import ImageSet, Statistics, check_total, shard_range
from detailflow.pictures import grid
from detailflow.pipeline import DetailFlowPipeline
from detailflow.samples import SampleSet, generate_many, remove_temporary
from detailflow.sampling import OFF, SamplingConfig
from detailflow.settings import Seed, require

LABELS = ("balanced", "random")
SAMPLES = "samples"  # the folder in the output folder where images are, for a while or for good
OUR_CROP = (
    "The reference's images are brought to their size by one bicubic resize. ADM's reference, which published FIDs are "
    "to, is of photographs that were first halved by averages where they were at least twice as large, so such figures "
    "differ a little."
)
RECOGNISED = (
    "Recognised is the share of images whose likeliest class, by the network of features, has the number of the class "
    "asked for: it means something only if that network's classes are the model's, in the same order, while only their "
    "count is checked."
)
_log = logging.getLogger(__name__)


class Setting(NamedTuple):
    """One way to sample; a top-k or top-p of None is off."""

    sampling: SamplingConfig
    num_tokens: int

    def shown(self) -> dict[str, Any]:
        """Return the setting of a table's row."""
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
        """Return the name of the folder of its images."""
        values = {key: f"{x:g}" if isinstance(x, float) else x for key, x in self.shown().items()}
        return "-".join([*(f"{key}-{x}" for key, x in values.items()), f"seed-{seed}"])


@dataclass(frozen=True)
class Sweep:
    """Values to try of each way to sample, in all combinations.

    None is the model's own best, and all N tokens; "off" is no top-k and no top-p.
    """

    guidance_scale: Sequence[float | None] = (None,)
    guidance_schedule: Sequence[str | None] = (None,)
    temperature: Sequence[float | None] = (None,)
    top_k: Sequence[int | Literal["off"] | None] = (None,)
    top_p: Sequence[float | Literal["off"] | None] = (None,)
    num_tokens: Sequence[int | None] = (None,)

    def settings(self, pipeline: DetailFlowPipeline) -> list[Setting]:
        """Return all combinations, each once."""
        result = []
        for values in itertools.product(*(getattr(self, name) for name in self.__dataclass_fields__)):
            given = dict(zip(self.__dataclass_fields__, values, strict=True))
            tokens = pipeline.tokenizer.schedule.check_count(given.pop("num_tokens"))
            result.append(Setting(pipeline.gpt.sampling(**given), tokens))
        return list(dict.fromkeys(result))


@dataclass(frozen=True)
class GPTOptions:
    """What to generate and measure.

    Args:
        folder: where the report goes; images are in `folder`/samples until they are measured.
        labels: "balanced" takes the classes in turn, "random" draws them by the seed.
        keep_samples: leave the images there, as samples.npz in ADM's layout.
        model: as the user named it, to find published figures.
    """

    extractor: Extractor
    folder: Path
    num_samples: int
    sweep: Sweep = Sweep()
    labels: str = LABELS[0]
    seeds: Sequence[int] = (0,)
    keep_samples: bool = False
    model: str | None = None


def evaluate_gpt(
    pipeline: DetailFlowPipeline, reference: ImageSet, context: Context, options: GPTOptions
) -> Report | None:
    """Generate images in each setting, from each seed, and compare them with `reference`.

    An interrupted set of images is completed. Image i depends on the seed and i alone.

    Returns:
        In the main process a report whose provenance is not complete yet; None in others.
    """
    if options.labels not in LABELS:
        raise DetailFlowError(f"labels must be {' or '.join(LABELS)}, not {options.labels!r}")
    for seed in options.seeds:
        require(Seed, seeds=seed)
    check_total(options.num_samples, context.world)
    settings, seeds = options.sweep.settings(pipeline), list(dict.fromkeys(options.seeds))
    wanted = measure(options.extractor, reference, keep=REFERENCE_KEPT)
    data = {"reference": data_entry(reference, wanted)}
    data["samples"] = {"images": options.num_samples, "labels": options.labels}
    run = _Run(pipeline, wanted, context, options, settings)
    rows = [Row(setting.shown(), over_seeds([run.figures(setting, seed) for seed in seeds])) for setting in settings]
    if not context.world.is_main:
        return None
    with suppress(OSError):  # it contains something
        (options.folder / SAMPLES).rmdir()
    sections = [Section("Quality by sampling", rows, _note(rows, options, seeds, pipeline))]
    if published := _quotes(options.model, settings, rows, pipeline.gpt.config.num_tokens):
        sections.append(Section("Published figures beside ours", published))
    own_crop = options.extractor.name == INCEPTION and reference.about["kind"] == "images"
    return Report(
        kind="gpt",
        title=f"Images generated by {options.model or 'the shipped model'}",
        sections=sections,
        provenance={
            **provenance(data, options.extractor, pipeline.tokenizer.config.image_size),
            "settings": {"seeds": seeds, "batch_size": context.batch_size},
            "samples": {"checksum": run.checksums},  # not data, which must be the same for figures to be compared
        },
        plots=_plots(rows),
        pictures=[run.picture()],
        notes=run.notes + [OUR_CROP] * own_crop,
    )


def class_labels(classes: int, count: int, how: str, seed: int) -> list[int]:
    """Return the class of every image."""
    if how == "balanced":
        return [i % classes for i in range(count)]
    draws: list[int] = np.random.default_rng(seed).integers(classes, size=count).tolist()
    return draws


class _Run:
    """Makes and measures one set of images after another."""

    def __init__(
        self,
        pipeline: DetailFlowPipeline,
        reference: Statistics,
        context: Context,
        options: GPTOptions,
        settings: Sequence[Setting],
    ) -> None:
        self.pipeline, self.reference, self.context, self.options = pipeline, reference, context, options
        self.settings, self.common = settings, shared_settings([setting.shown() for setting in settings])
        self.checksums: dict[str, str] = {}
        self.pictures: dict[Setting, list[Image.Image]] = {}  # of the first seed
        self.notes: list[str] = []

    def figures(self, setting: Setting, seed: int) -> dict[str, Figure]:
        """Generate one set of images, or complete it, and measure it at side R; empty in all but the main process."""
        world, folder = self.context.world, self.options.folder / SAMPLES / setting.folder(seed)
        classes = self.pipeline.gpt.config.num_classes
        labels = class_labels(classes, self.options.num_samples, self.options.labels, seed)
        # None would be the model's own best.
        given = {name: OFF if value is None else value for name, value in asdict(setting.sampling).items()}
        samples = SampleSet(
            labels, "npz", seed, self.context.batch_size, setting.num_tokens, temporary=not self.options.keep_samples
        )
        generate_many(self.pipeline, folder, samples, world, **given)
        world.barrier()
        images = self.context.open(str(folder))
        measured, recognised = self._measure(images, labels)
        with world.raise_together():
            if not world.is_main:
                return {}
            if setting not in self.pictures:
                self.pictures[setting] = [Image.fromarray(image) for image in images.some(PICTURES)]
            remove_temporary(folder)  # what was kept before stays
            figures = compare_sets(self.reference, measured, prefix="g", device=self.context.device)
            figures |= {} if recognised is None else {"recognised": Figure(recognised)}
        self.checksums[setting.folder(seed)] = measured.checksum
        self.notes = self.notes or cautions(self.reference, measured, "g")
        name, figure = next(iter(figures.items()))
        words = [*in_words(setting.shown(), self.common), f"seed {seed}"]
        _log.info("%s: %s %s", ", ".join(words), name, figure.text(name))
        return figures

    def _measure(self, images: ImageSet, labels: Sequence[int]) -> tuple[Statistics, float | None]:
        """Return the statistics at side R, and the share recognised, if the network has the model's classes."""
        extractor, total, world = self.options.extractor, len(images), self.context.world
        shard = shard_range(total, world)
        own = torch.tensor(labels[shard.start : shard.stop])
        statistics, checksum = FeatureStatistics(extractor, total, world, SAMPLES_KEPT), Checksum(total, world)
        hits, same_classes = 0, False
        for batch in images:
            batch = at_side(batch, self.pipeline.tokenizer.config.image_size)
            features = extractor(batch)
            checksum.update(batch)
            if features.logits is not None:
                same_classes = features.logits.shape[1] == self.pipeline.gpt.config.num_classes
                first = statistics.next - shard.start
                hits += int((features.logits.argmax(1).cpu() == own[first : first + len(batch)]).sum())
            statistics.update(features)
        found = world.all_reduce(torch.tensor(float(hits), dtype=torch.float64, device=world.device)).item()
        return statistics.compute(checksum.compute()), found / total if same_classes else None

    def picture(self) -> Picture:
        """Return a row of images for each setting, with what it has different from the others below the first."""
        columns = len(self.pictures[self.settings[0]])
        images = [image for setting in self.settings for image in self.pictures[setting]]
        if len(self.settings) == 1:
            return Picture("samples", "Images spread over the set", grid(images, columns))
        own = ["\n".join(in_words(setting.shown(), self.common)) for setting in self.settings]
        labels = [text if column == 0 else "" for text in own for column in range(columns)]
        return Picture("samples", "Images spread over the set, a row for each setting", grid(images, columns, labels))


def over_seeds(runs: Sequence[Mapping[str, Figure]]) -> dict[str, Figure]:
    """Return the mean of each figure over the seeds, with the standard deviation over them if there are several."""
    if len(runs) < 2:
        return dict(runs[0]) if runs else {}
    result = {}
    for name in runs[0]:
        values = np.array([run[name].value for run in runs])
        result[name] = Figure(float(values.mean()), float(values.std(ddof=1)), tuple(values.tolist()))
    return result


def _note(rows: Sequence[Row], options: GPTOptions, seeds: Sequence[int], pipeline: DetailFlowPipeline) -> str:
    count = f"{options.num_samples:,} images of {options.labels} classes"
    if len(seeds) > 1:
        parts = [f"Means over {len(seeds)} seeds, ± the standard deviation over them; {count} for each seed."]
    else:
        parts = [f"{count}, seed {seeds[0]}.", spread_note(rows[0].figures)]
    side = pipeline.tokenizer.config.image_size
    if any(pipeline.tokenizer.schedule.decode_size(row.setting["tokens"]) != side for row in rows):
        parts.append(
            f"Images of fewer tokens are smaller: they are enlarged to {side}×{side} (bicubic) to be measured."
        )
    if "recognised" in rows[0].figures:
        parts.append(RECOGNISED)
    return " ".join(filter(None, parts))


def _plots(rows: Sequence[Row]) -> list[Plot]:
    """Return a plot by each setting that has several numbers."""
    plots = []
    for key in rows[0].setting:
        if sum(isinstance(value, int | float) for value in {row.setting[key] for row in rows}) > 1:
            plots.append(Plot(f"by-{re.sub('[^a-z]', '-', key)}", f"Quality by {key}", key, rows))
    return plots


def _quotes(model: str | None, settings: Sequence[Setting], rows: Sequence[Row], full: int) -> list[Row]:
    """Return published figures, which are of all tokens and plain sampling at one guidance scale."""
    result = []
    for setting, row in zip(settings, rows, strict=True):
        plain = SamplingConfig(setting.sampling.guidance_scale)
        if setting == Setting(plain, full) and "gFID" in row.figures:
            result += quotes(model, row.figures, plain.guidance_scale)
    return result
