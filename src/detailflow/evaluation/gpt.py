"""Measure generated images: distances to a reference set, for each way to sample (docs/method.md#sampling)."""

import itertools
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from detailflow.data.source import spread
from detailflow.errors import DetailFlowError
from detailflow.evaluation.distances import (
    REFERENCE_KEPT,
    cautions,
    compare_sets,
    measure,
)
from detailflow.evaluation.evaluate import PICTURES, Context, at_side, data_entry, provenance, spread_note
from detailflow.evaluation.features import INCEPTION, Extractor
from detailflow.evaluation.quoted import quotes
from detailflow.evaluation.report import Figure, Picture, Plot, Report, Row, Section, in_words, shared_settings
from detailflow.evaluation.sets import ImageSet, Statistics, check_total, shard_range
from detailflow.labels import ClassId
from detailflow.pictures import grid
from detailflow.pipeline import DetailFlowPipeline
from detailflow.samples import SampleSet, generate_many
from detailflow.sampling import OFF, SamplingConfig
from detailflow.settings import Seed, require

LABELS = ("balanced", "random")
SAMPLES = "samples"  # the folder in the output folder for images that are kept
OUR_CROP = (
    "The reference's images are brought to their size by one bicubic resize. Published FIDs are to ADM's reference, "
    "for which large photographs were first halved by averaging, so they differ a little."
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

    def given(self) -> dict[str, Any]:
        """Return the setting as a call of the pipeline takes it, for which None would be the model's own best."""
        return {name: OFF if value is None else value for name, value in asdict(self.sampling).items()}

    def folder(self, seed: int) -> str:
        """Return the name of the folder of its images."""
        values = {key: f"{x:g}" if isinstance(x, float) else x for key, x in self.shown().items()}
        return "-".join([*(f"{key}-{x}" for key, x in values.items()), f"seed-{seed}"])


def sweep(pipeline: DetailFlowPipeline, **values: Sequence[Any]) -> list[Setting]:
    """Return all combinations of values of the sampling options and num_tokens, each once.

    None is the model's own best, and all N tokens; "off" is no top-k and no top-p.
    """
    result = []
    for combination in itertools.product(*values.values()):
        given = dict(zip(values, combination, strict=True))
        tokens = pipeline.tokenizer.schedule.check_count(given.pop("num_tokens", None))
        result.append(Setting(pipeline.gpt.sampling(**given), tokens))
    return list(dict.fromkeys(result))


@dataclass(frozen=True)
class GPTOptions:
    """What to generate and measure.

    Args:
        settings: ways to sample, as from `sweep`.
        folder: where the report goes, and in `folder`/samples the images that are kept.
        labels: "balanced" takes the classes in turn, "random" draws them by the seed.
        keep_samples: write the images there, as samples.npz in ADM's layout; an interrupted set is completed.
        model: as the user named it, to find published figures.
    """

    extractor: Extractor
    settings: Sequence[Setting]
    folder: Path
    num_samples: int
    labels: str = LABELS[0]
    seeds: Sequence[int] = (0,)
    keep_samples: bool = False
    model: str | None = None


def evaluate_gpt(
    pipeline: DetailFlowPipeline, reference: ImageSet, context: Context, options: GPTOptions
) -> Report | None:
    """Generate images in each setting, from each seed, and compare them with `reference`.

    Image i depends on the seed and i alone.

    Returns:
        In the main process a report whose provenance is not complete yet; None in others.
    """
    if options.labels not in LABELS:
        raise DetailFlowError(f"labels must be {' or '.join(LABELS)}, not {options.labels!r}")
    for seed in options.seeds:
        require(Seed, seeds=seed)
    check_total(options.num_samples, context.world)
    settings, seeds = options.settings, list(dict.fromkeys(options.seeds))
    wanted = measure(options.extractor, reference, keep=REFERENCE_KEPT)
    data = {"reference": data_entry(reference, wanted)}
    data["samples"] = {"images": options.num_samples, "labels": options.labels}
    run = _Run(pipeline, wanted, context, options)
    rows = [Row(setting.shown(), over_seeds([run.figures(setting, seed) for seed in seeds])) for setting in settings]
    if not context.world.is_main:
        return None
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
        self, pipeline: DetailFlowPipeline, reference: Statistics, context: Context, options: GPTOptions
    ) -> None:
        self.pipeline, self.reference, self.context, self.options = pipeline, reference, context, options
        self.common = shared_settings([setting.shown() for setting in options.settings])
        self.checksums: dict[str, str] = {}
        self.pictures: dict[Setting, list[Image.Image]] = {}  # of the first seed
        self.notes: list[str] = []

    def figures(self, setting: Setting, seed: int) -> dict[str, Figure]:
        """Generate one set of images and measure it at side R; empty in all but the main process."""
        world, options, config = self.context.world, self.options, self.pipeline.gpt.config
        labels = class_labels(len(self.pipeline.labels.ids), options.num_samples, options.labels, seed)
        made = (self._kept if options.keep_samples else self._made)(setting, seed, labels)
        images = (at_side(batch, self.pipeline.tokenizer.config.image_size) for batch in made)
        measured = measure(options.extractor, images, total=len(labels), world=world, labels=labels)
        with world.raise_together():
            if not world.is_main:
                return {}
            if setting not in self.pictures:
                chosen = spread(len(labels), min(PICTURES, len(labels)))
                self.pictures[setting] = [self._make(setting, seed, labels[i : i + 1], i)[0] for i in chosen]
            figures = compare_sets(self.reference, measured, prefix="g", device=self.context.device)
            if config.num_classes and measured.num_classes == config.num_classes:
                figures["recognised"] = Figure(measured.recognised)
        self.checksums[setting.folder(seed)] = measured.checksum
        self.notes = self.notes or cautions(self.reference, measured, "g")
        name, figure = next(iter(figures.items()))
        words = [*in_words(setting.shown(), self.common), f"seed {seed}"]
        _log.info("%s: %s %s", ", ".join(words), name, figure.text(name))
        return figures

    def _make(self, setting: Setting, seed: int, labels: Sequence[int], first: int) -> list[Image.Image]:
        options: dict[str, Any] = dict(seed=seed, first_image=first, num_tokens=setting.num_tokens)
        return self.pipeline([ClassId(i) for i in labels], batch_size=len(labels), **options, **setting.given())

    def _made(self, setting: Setting, seed: int, labels: Sequence[int]) -> Iterator[Tensor]:
        """Yield this rank's images, bytes (B, H, W, 3), as they are made."""
        own = shard_range(len(labels), self.context.world)
        for first in own[:: self.context.batch_size]:
            part = labels[first : min(first + self.context.batch_size, own.stop)]
            yield torch.from_numpy(np.stack(list(map(np.asarray, self._make(setting, seed, part, first)))))

    def _kept(self, setting: Setting, seed: int, labels: Sequence[int]) -> Iterator[Tensor]:
        """Yield them from a set on disk, which is made or completed first, and stays."""
        folder, world = self.options.folder / SAMPLES / setting.folder(seed), self.context.world
        samples = SampleSet(labels, "npz", seed, self.context.batch_size, setting.num_tokens)
        generate_many(self.pipeline, folder, samples, world, **setting.given())
        world.barrier()
        return iter(self.context.open(str(folder)))

    def picture(self) -> Picture:
        """Return a row of images for each setting, with what it has different from the others below the first."""
        settings = self.options.settings
        columns, images = len(self.pictures[settings[0]]), [image for row in self.pictures.values() for image in row]
        if len(settings) == 1:
            return Picture("samples", "Images spread over the set", grid(images, columns))
        own = ["\n".join(in_words(setting.shown(), self.common)) for setting in settings]
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
    count = f"{options.num_samples:,} images"
    if pipeline.labels.count:
        count += f" of {options.labels} classes"
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
