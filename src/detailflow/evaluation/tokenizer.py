"""How well a tokenizer rebuilds images: by number of tokens (Fig. 4b) and with planted mistakes (Fig. 4a)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from detailflow import hub
from detailflow.data.transforms import to_tensor, to_uint8
from detailflow.errors import DetailFlowError
from detailflow.evaluation.distances import (
    REFERENCE_KEPT,
    Checksum,
    FeatureStatistics,
    cautions,
    compare_sets,
    measure,
)
from detailflow.evaluation.evaluate import Context, at_side, data_entry, provenance, spread_note
from detailflow.evaluation.features import Extractor
from detailflow.evaluation.metrics import SMALLEST_SSIM_SIDE, edge_jumps, ssim
from detailflow.evaluation.quoted import quotes
from detailflow.evaluation.report import BLOCKINESS, GAIN, Figure, Picture, Plot, Report, Row, Section
from detailflow.evaluation.sets import ImageSet, Statistics, check_total, shard_range
from detailflow.generation import image_generator
from detailflow.models.lpips import LPIPS, SMALLEST_SIDE, VGG16_FILE
from detailflow.models.quantizer import usage_and_perplexity
from detailflow.models.tokenizer import DetailFlowTokenizer
from detailflow.pictures import grid
from detailflow.progress import progress_bar
from detailflow.psnr import psnr
from detailflow.schedule import TokenSchedule
from detailflow.settings import NotNegativeInt, Seed, require

PICTURES = 6  # images that the report shows
LPIPS_IMAGES = 8  # at once: VGG's maps of one are 30 MiB at 256×256
KEPT = 5000  # images of each view whose features the spread of a distance is estimated from
PLANTED = (
    "Each wrong token is drawn from the 50 codes nearest to its latent. Later tokens are those of the clean sequence, "
    "or those that the self-correction pass writes after the mistakes; what that gains is taken image by image."
)


class Span(NamedTuple):
    """Tokens from `start` to before `end`, that are wrong together."""

    start: int
    end: int


class View(NamedTuple):
    """One way to rebuild an image: from the first n tokens at `side`, of a sequence that may have mistakes."""

    setting: dict[str, Any]
    n: int
    side: int
    span: Span | None = None
    corrected: bool = False


@dataclass(frozen=True)
class TokenizerOptions:
    """What to measure.

    Args:
        extractor: for Fréchet distances; None leaves those out.
        reference: images that these distances are to; None is the originals.
        lpips: None leaves LPIPS out.
        counts: numbers of tokens; None is 1, 2, 4, … N.
        sides: those at which each is decoded; None is D(n). All pictures are then resized to side R.
        mistakes: where to plant them, each by itself, in otherwise clean sequences of N tokens.
        seed: of the mistakes, which depend on it, the image's index and their position alone.
        model: as the user named it, to find published figures.
        notes: what the report begins with.
        search: steps of the search for codes; not with mistakes, which are planted in the encoder's own.
    """

    extractor: Extractor | None = None
    reference: ImageSet | None = None
    lpips: LPIPS | None = None
    counts: Sequence[int] | None = None
    sides: Sequence[int] | None = None
    mistakes: Sequence[Span] = ()
    seed: int = 0
    model: str | None = None
    notes: Sequence[str] = ()
    search: int = 0


def evaluate_tokenizer(
    tokenizer: DetailFlowTokenizer, images: ImageSet, context: Context, options: TokenizerOptions
) -> Report | None:
    """Measure reconstructions of `images`, of side R, reading each once.

    Returns:
        In the main process a report whose provenance is not complete yet; None in others.
    """
    extractor, side, world = options.extractor, tokenizer.config.image_size, context.world
    _check(options)
    clean = views_by_count(tokenizer.schedule, options.counts, options.sides)
    views = clean + views_with_mistakes(tokenizer.schedule, options.mistakes)
    check_total(len(images), world)
    data, wanted = {}, None
    if options.reference is not None and extractor is not None:
        wanted = measure(extractor, options.reference, keep=REFERENCE_KEPT)
        data["reference"] = data_entry(options.reference, wanted)
    run = _Reconstruction(tokenizer, images, context, options, views)
    run.rebuild_all()
    data["images"] = images.description() | {"checksum": run.checksum.compute()}
    rows = run.rows(wanted)
    used = world.all_reduce(run.used)
    if not world.is_main:
        return None
    by_count, planted = rows[: len(clean)], rows[len(clean) :]
    sections = [Section("Quality by number of tokens", by_count, _note(by_count, side, wanted is not None))]
    plots = [Plot("quality-by-tokens", "Quality by number of tokens", "tokens", by_count)]
    if planted:
        sections.append(Section("Planted mistakes", planted, PLANTED))
    if len(planted) > 3:
        caption = "Quality with mistakes planted, by their position"
        plots.append(Plot("mistakes-by-position", caption, "first wrong token", planted))
    usage, perplexity = usage_and_perplexity(used.cpu().double())
    codes = {"usage": Figure(usage.item()), "perplexity": Figure(perplexity.item())}
    sections.append(Section("Codebook", [Row({"codes": len(used), "tokens counted": int(used.sum())}, codes)]))
    full = {"tokens": tokenizer.config.num_tokens, "side": side}  # which published figures are of
    ours = next((row.figures for row in by_count if row.setting == full), {})
    measures = ("PSNR",) if wanted else ("rFID", "PSNR")
    published = quotes(options.model, {m: ours[m] for m in measures if m in ours}) if not options.search else []
    if published:
        sections.append(Section("Published figures beside ours", published))
    origin = provenance(data, extractor, side)
    if options.lpips is not None:
        fingerprint = hub.fingerprint({}, options.lpips.state_dict())
        origin["features"]["lpips"] = {"network": "VGG-16 and its five heads", "fingerprint": fingerprint}
    settings = {"seed": options.seed, "batch_size": context.batch_size}
    if options.search:
        settings["search"] = options.search
    return Report(
        kind="tokenizer",
        title=f"Reconstruction by the tokenizer of {options.model or 'the shipped model'}",
        sections=sections,
        provenance=origin | {"settings": settings},
        plots=plots,
        pictures=[_picture(tokenizer, options, clean, images)],
        notes=[*options.notes, *run.cautions],
    )


def _check(options: TokenizerOptions) -> None:
    require(Seed, seeds=options.seed)
    require(NotNegativeInt, search=options.search)
    if options.search and options.mistakes:
        raise DetailFlowError("mistakes are planted in the encoder's own tokens: give mistakes or a search, not both")
    if options.reference is not None and options.extractor is None:
        raise DetailFlowError("a reference is for Fréchet distances: give features to measure them by, or no reference")


def views_by_count(schedule: TokenSchedule, counts: Sequence[int] | None, sides: Sequence[int] | None) -> list[View]:
    """Return every count of tokens at every side; None is 1, 2, 4, … N tokens, and D(n)."""
    for side in sides or ():
        if side < 1 or side % schedule.patch_size:
            raise DetailFlowError(
                f"the side of a picture must be a positive multiple of {schedule.patch_size}, not {side}"
            )
    numbers = schedule.stages() if counts is None else sorted({schedule.check_count(n) for n in counts})
    pairs = [(n, side) for n in numbers for side in dict.fromkeys(sides or (schedule.decode_size(n),))]
    return [View({"tokens": n, "side": side}, n, side) for n, side in pairs]


def views_with_mistakes(schedule: TokenSchedule, mistakes: Sequence[Span]) -> list[View]:
    """Return views of whole pictures: one without mistakes, then two for each span, without and with correction."""
    n, side = schedule.num_tokens, schedule.image_size

    def setting(first: int | str, wrong: int, later: str) -> dict[str, Any]:
        return {"first wrong token": first, "wrong tokens": wrong, "later tokens": later}

    views = [View(setting("none", 0, "clean"), n, side)] if mistakes else []
    for span in mistakes:
        for corrected, later in ((False, "clean"), (True, "corrected")):
            views.append(View(setting(span.start, span.end - span.start, later), n, side, span, corrected))
    return views


def parse_spans(schedule: TokenSchedule, words: Sequence[str]) -> list[Span]:
    """Return where mistakes go.

    "12" is what is decoded in one step with token 12, "g3" the whole group 3 (from 0), "all" each group but the last.
    """
    size, total = schedule.group_size, schedule.num_tokens
    spans = []
    for word in words:
        number = word.removeprefix("g")
        if word == "all":
            spans += [Span(start, start + size) for start in range(0, total - size, size)]
        elif number.isdecimal() and word.startswith("g") and int(number) < total // size:
            spans.append(Span(int(number) * size, (int(number) + 1) * size))
        elif word.isdecimal() and int(word) < total:
            spans.append(Span(schedule.group_start(int(word)), schedule.span_end(int(word))))
        else:
            raise DetailFlowError(
                f"mistakes can be planted at token 0 to {total - 1}, in group g0 to g{total // size - 1}, or all, "
                f"not {word!r}"
            )
    return sorted(set(spans))


class _Reconstruction:
    """One pass over a rank's images, and what is measured on it."""

    def __init__(
        self,
        tokenizer: DetailFlowTokenizer,
        images: ImageSet,
        context: Context,
        options: TokenizerOptions,
        views: Sequence[View],
    ) -> None:
        self.tokenizer, self.images, self.context = tokenizer, images, context
        self.options, self.views = options, views
        self.extractor, total, world = options.extractor, len(images), context.world
        self.checksum = Checksum(total, world)
        self.used = torch.zeros(tokenizer.config.codebook_size, dtype=torch.int64, device=tokenizer.device)
        self.distances: list[dict[str, list[Tensor]]] = [{} for _ in views]  # to the originals, by measure
        self.statistics, self.originals = list[FeatureStatistics](), None
        if self.extractor:
            self.statistics = [FeatureStatistics(self.extractor, total, world, KEPT) for _ in views]
            if options.reference is None:
                self.originals = FeatureStatistics(self.extractor, total, world)
        self.cautions: list[str] = []

    @torch.inference_mode()
    def rebuild_all(self) -> None:
        """Rebuild and measure this rank's images."""
        shard = shard_range(len(self.images), self.context.world)
        first, main = shard.start, self.context.world.is_main
        with progress_bar(desc="rebuilding", total=len(shard), unit="image", main=main) as bar:
            for read in self.images:
                self._rebuild(read.to(self.context.device), first)
                first += len(read)
                bar.update(len(read))
        self.images.gather_unreadable()

    def _rebuild(self, originals: Tensor, first: int) -> None:
        """Rebuild and measure a batch in all views; `first` is the index of its first image."""
        sequences = _sequences(self.tokenizer, originals, self.options, self.views, first)
        clean = sequences[None, False]
        self.checksum.update(originals)
        self.used += torch.bincount(clean.flatten(), minlength=len(self.used))
        if self.originals and self.extractor:
            self.originals.update(self.extractor(originals))
        for i, view in enumerate(self.views):
            pixels = rebuild(self.tokenizer, sequences[view.span, view.corrected][:, : view.n], view.side)
            for name, values in self._compare(pixels, originals, view.side).items():
                self.distances[i].setdefault(name, []).append(values.cpu().double())
            if self.extractor:
                self.statistics[i].update(self.extractor(pixels))

    def _compare(self, pixels: Tensor, originals: Tensor, side: int) -> dict[str, Tensor]:
        """Return measures of bytes (B, R, R, 3), decoded at `side`, against the originals: (B,), or jumps (B, 2)."""
        found, patch = {"PSNR": psnr(pixels, originals)}, self.tokenizer.config.patch_size
        if side == pixels.shape[1] and 1 < patch < side:
            found[BLOCKINESS] = edge_jumps(pixels, originals, patch)
        if min(pixels.shape[1:3]) >= SMALLEST_SSIM_SIDE:
            found["SSIM"] = ssim(pixels, originals)
        if self.options.lpips is not None:
            pairs = zip(*(to_tensor(x).split(LPIPS_IMAGES) for x in (pixels, originals)), strict=True)
            found["LPIPS"] = torch.cat([self.options.lpips.distances(a, b) for a, b in pairs])
        return found

    def rows(self, reference: Statistics | None) -> list[Row]:
        """Return the figures of all ranks' images by view; every rank must call it."""
        world = self.context.world
        values = [
            {name: world.all_gather_uneven(torch.cat(parts)) for name, parts in found.items()}
            for found in self.distances
        ]
        reference = self.originals.compute() if self.originals else reference
        measured = [statistics.compute() for statistics in self.statistics]
        rows = []
        for i, view in enumerate(self.views):
            if view.corrected:  # the view before is the same without correction
                values[i][GAIN] = values[i]["PSNR"] - values[i - 1]["PSNR"]
            jumps = values[i].pop(BLOCKINESS, None)
            figures = {name: _mean(each) for name, each in values[i].items()}
            if jumps is not None and jumps[:, 1].any():
                across, inside = jumps.sum(0).tolist()
                figures[BLOCKINESS] = Figure(across / inside)
            if measured and reference and world.is_main:
                device = self.context.device
                figures |= compare_sets(reference, measured[i], prefix="r", device=device, neighbours=False)
            rows.append(Row(view.setting, figures))
        if measured and reference:
            self.cautions = cautions(reference, measured[0], "r", neighbours=False)
        return rows


def _sequences(
    tokenizer: DetailFlowTokenizer,
    originals: Tensor,
    options: TokenizerOptions,
    views: Sequence[View] = (),
    first: int = 0,
) -> Mapping[tuple[Span | None, bool], Tensor]:
    """Return (B, N) codes by (span of mistakes, whether later tokens are corrected); (None, False) are clean."""
    images = to_tensor(originals).to(tokenizer.decoder.mask_token.dtype)
    patches = tokenizer.encode_patches(images)
    z = tokenizer.encode_latents(patches, tokenizer.config.num_tokens)
    clean = tokenizer.search(images, z, options.search)
    result: dict[tuple[Span | None, bool], Tensor] = {(None, False): clean}
    spans = dict.fromkeys(view.span for view in views if view.span)
    if spans:  # an image's mistakes at all positions, so that those of one span do not depend on the other spans
        generators = [image_generator(options.seed, first + i) for i in range(len(originals))]
        pairs = zip(z.split(1), generators, strict=True)
        wrong = torch.cat([tokenizer.plant_mistakes(one, generator=generator) for one, generator in pairs])
    for span in spans:
        planted = clean.clone()
        planted[:, span.start : span.end] = wrong[:, span.start : span.end]
        result[span, False] = planted
        result[span, True] = tokenizer.correct(patches, planted, span.end)
    return result


def rebuild(tokenizer: DetailFlowTokenizer, ids: Tensor, side: int) -> Tensor:
    """Decode (B, n) codes at `side` and resize to side R: bytes (B, R, R, 3)."""
    return at_side(to_uint8(tokenizer.decode(ids, size=side)), tokenizer.config.image_size)


def _mean(values: Tensor) -> Figure:
    mean = values.mean().item()
    return Figure(mean, values.std().item() / math.sqrt(len(values)) if math.isfinite(mean) else None)


def find_lpips(weights: str | None, side: int, device: torch.device) -> tuple[LPIPS | None, list[str]]:
    """Return LPIPS, or None and a note that says why it is left out.

    Args:
        weights: VGG-16's file; None is where torch.hub keeps it, or a download, and "none" no LPIPS.
    """
    if weights == "none":
        return None, []
    if side < SMALLEST_SIDE:
        return None, [
            f"LPIPS is left out: its network takes images of {SMALLEST_SIDE} pixels a side or more, not {side}."
        ]
    if weights is not None and not Path(weights).expanduser().exists():
        raise DetailFlowError(f"{weights} does not exist: give VGG-16's weights, {VGG16_FILE}, or --lpips none")
    try:
        return LPIPS(weights, named="--lpips").to(device), []
    except DetailFlowError as error:
        if weights is not None:
            raise
        return None, [f"LPIPS is left out: {error}."]


def _note(rows: Sequence[Row], side: int, referenced: bool) -> str:
    parts = ["Pictures are decoded at the side given and compared with the originals, in bytes."]
    if any(row.setting["side"] != side for row in rows):
        parts.append(f"Those of another side than {side}×{side} are resized to it first (bicubic), for every measure.")
    parts.append(
        "PSNR, SSIM and LPIPS are means over the images, ± their standard errors. Blockiness is how much errors jump "
        "across the edges of patches beside inside them: 1 is no grid. "
        f"Fréchet distances are to the {'reference' if referenced else 'originals'}."
    )
    return " ".join(filter(None, [*parts, spread_note(rows[0].figures)]))


@torch.inference_mode()
def _picture(
    tokenizer: DetailFlowTokenizer, options: TokenizerOptions, views: Sequence[View], source: ImageSet
) -> Picture:
    """Return images spread over the set, each a row that ends with the original."""
    originals = torch.from_numpy(np.stack(source.some(PICTURES)))
    codes = _sequences(tokenizer, originals.to(tokenizer.device), options)[None, False]
    columns = [(f"{v.n} at {v.side}", rebuild(tokenizer, codes[:, : v.n], v.side).cpu()) for v in views]
    columns.append(("original", originals))
    images = [Image.fromarray(pictures[i].numpy()) for i in range(len(originals)) for _, pictures in columns]
    labels = [label for _ in originals for label, _ in columns]
    caption = "Images spread over the set, by number of tokens and the side at which they are decoded"
    return Picture("reconstructions", caption, grid(images, len(columns), labels))
