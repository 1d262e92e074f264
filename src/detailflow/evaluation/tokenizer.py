"""How well a tokenizer rebuilds images: by number of tokens (the paper's figure 4b) and with planted mistakes (figure 4a)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from detailflow import hub
from detailflow.data.transforms import to_tensor, to_uint8
from detailflow.distributed import World
from detailflow.errors import DetailFlowError
from detailflow.evaluation.distances import REFERENCE_KEPT, Measured, Running, compare_sets
from detailflow.evaluation.features import Extractor
from detailflow.evaluation.metrics import SMALLEST_SSIM_SIDE, bootstrap, ssim
from detailflow.evaluation.published import quotes
from detailflow.evaluation.report import Figure, Panel, Picture, Plot, Point, Report, Row, Section, place
from detailflow.evaluation.samples import (
    Checksum,
    Work,
    at_side,
    data_entry,
    features_entry,
    measure_set,
    named,
    preprocessing_entry,
    spread_note,
    warnings_of,
)
from detailflow.evaluation.sets import ImageSet, check_total, share_of
from detailflow.evaluation.views import Span, View, views_by_count, views_with_mistakes
from detailflow.models.tokenizer import DetailFlowTokenizer, usage_and_perplexity
from detailflow.pictures import grid
from detailflow.pipeline import image_generator
from detailflow.psnr import psnr
from detailflow.seeds import check_seeds
from detailflow.training.losses import LPIPS, SMALLEST_SIDE, VGG16_FILE

PICTURES = 6  # images that the report shows
LPIPS_IMAGES = 8  # at once: VGG's maps of one are 30 MiB at 256×256
KEPT = 5000  # images of each view whose features the deviation of a distance is estimated from
NO_LPIPS = "none"  # in place of its weights
GAIN = "gain of PSNR"
INTERVAL = 2 * 1.96  # standard deviations in which 95% of a normal distribution lie


@dataclass(frozen=True)
class Measures:
    """What reconstructions are measured by; `None` is left out."""

    extractor: Extractor | None = None
    lpips: LPIPS | None = None


class Tally:
    """What adds up of one view: distances to each original, and statistics of features."""

    def __init__(self, measures: Measures, total: int, world: World) -> None:
        self.measures, self.total, self.world = measures, total, world
        self.distances: dict[str, list[Tensor]] = {}
        self.running = running(measures.extractor, total, world, min(KEPT, total))

    def add(self, pixels: Tensor, originals: Tensor) -> None:
        """A batch: uint8 (B, R, R, 3) twice."""
        extractor, lpips = self.measures.extractor, self.measures.lpips
        self._note("PSNR", psnr(pixels, originals))
        if min(pixels.shape[1:3]) >= SMALLEST_SSIM_SIDE:
            self._note("SSIM", ssim(pixels, originals))
        if lpips is not None:
            parts = zip(to_tensor(pixels).split(LPIPS_IMAGES), to_tensor(originals).split(LPIPS_IMAGES), strict=True)
            self._note("LPIPS", torch.cat([lpips.distances(a, b) for a, b in parts]))
        if extractor is not None and self.running is not None:
            self.running.update(extractor(pixels))

    def _note(self, measure: str, values: Tensor) -> None:
        self.distances.setdefault(measure, []).append(values.double().cpu())

    def values(self) -> dict[str, Tensor]:
        """Each measure of all processes' images; all must call it."""
        return {name: gather_shares(torch.cat(parts), self.total, self.world) for name, parts in self.distances.items()}


def running(extractor: Extractor | None, total: int, world: World, keep: int = 0) -> Running | None:
    """Statistics of a set's features that are added to batch by batch, for several sets in one go over the data."""
    share = share_of(total, world)
    return None if extractor is None else Running(extractor.name, share, total, keep)


def evaluate_tokenizer(
    tokenizer: DetailFlowTokenizer,
    images: ImageSet,
    work: Work,
    extractor: Extractor | None = None,
    reference: ImageSet | None = None,
    lpips: LPIPS | None = None,
    counts: Sequence[int] | None = None,
    sides: Sequence[int] | None = None,
    mistakes: Sequence[Span] = (),
    seed: int = 0,
    model: str | None = None,
    notes: Sequence[str] = (),
) -> Report | None:
    """Measure reconstructions of `images` (docs/method.md#tokenizer, #published-numbers), reading each image once.

    Args:
        images: of side R.
        extractor: of the features of Fréchet distances; `None` leaves those out.
        reference: images that these distances are to; `None` is the originals.
        counts: numbers of tokens; `None` is 1, 2, 4, … N.
        sides: those at which each is decoded; `None` is D(n). All pictures are then brought to side R.
        mistakes: where to plant them, each by itself, in otherwise clean sequences of N tokens.
        seed: of the mistakes, which depend on it, the image's number and their position alone.
        model: the name that the user gave, by which published figures are found.
        notes: what the report is to say first.

    Returns:
        In the main process a report whose provenance is not complete yet; `None` in others.

    Raises:
        DetailFlowError: for counts, sides, a seed or images that are not valid, fewer images than processes, or a reference
            without an extractor.
    """
    check_seeds(seed)
    if reference is not None and extractor is None:
        raise DetailFlowError("a reference is for Fréchet distances: give features to measure them by, or no reference")
    world, measures, total = work.world, Measures(extractor, lpips), len(images)
    views = views_by_count(tokenizer.schedule, counts, sides) + views_with_mistakes(tokenizer.schedule, mistakes)
    check_total(total, world)
    data: dict[str, Any] = {}
    if reference is not None and extractor is not None:
        wanted, data["reference"] = measure_set(extractor, reference, work, REFERENCE_KEPT)
    tallies = [Tally(measures, total, world) for _ in views]
    originals = Originals(tokenizer, extractor if reference is None else None, total, world)
    _rebuild_all(tokenizer, images, work, views, tallies, originals, seed)
    data = {"images": data_entry(images, originals.checksum, world), **data}
    rows = _means(views, [tally.values() for tally in tallies])
    used = world.all_reduce(originals.used)
    said = list(notes)
    if extractor is not None:
        made = [tally.running.finish(extractor, world, None) for tally in tallies if tally.running]
        wanted = originals.running.finish(extractor, world, None) if originals.running else wanted
        if world.is_main:
            said += warnings_of(wanted, made[0], extractor, "r", "r", kept=False)
            rows = [_with_distances(row, wanted, one, extractor, work) for row, one in zip(rows, made, strict=True)]
    if not world.is_main:
        return None
    side = tokenizer.config.image_size
    clean, planted = ([r for v, r in zip(views, rows, strict=True) if v.by_count == c] for c in (True, False))
    return Report(
        kind="tokenizer",
        title=f"Reconstruction by the tokenizer of {model or 'the shipped model'}",
        sections=_sections(side, clean, planted, used, reference is not None),
        provenance={
            "data": data,
            "features": {**(features_entry(extractor) if extractor else {}), **lpips_entry(lpips)},
            "preprocessing": preprocessing_entry(extractor, side),
            "settings": {"seed": seed, "batch_size": work.batch_size},
        },
        plots=_plots(views, rows),
        pictures=[_picture(tokenizer, views, images)],
        notes=said,
        published=_quotes(tokenizer, model, clean, reference is None),
    )


def _means(views: Sequence[View], values: Sequence[dict[str, Tensor]]) -> list[Row]:
    """The means over the images; after corrected mistakes also what correction gains, image by image."""

    def mean(each: Tensor) -> Figure:
        middle, low, high = bootstrap(each)
        return Figure(middle, (high - low) / INTERVAL if math.isfinite(middle) else None)

    rows = []
    for i, view in enumerate(views):
        figures = {name: mean(each) for name, each in values[i].items()}
        if view.corrected:
            figures[GAIN] = mean(
                values[i]["PSNR"] - values[i - 1]["PSNR"]
            )  # the view before is the same without correction
        rows.append(Row(view.setting, figures))
    return rows


def _with_distances(row: Row, reference: Measured, made: Measured, extractor: Extractor, work: Work) -> Row:
    figures = compare_sets(reference, made, work.device, neighbours=False)
    return Row(row.setting, {**row.figures, **named(figures, extractor, "r", "r")})


# --- what is rebuilt -----------------------------------------------------------------------------------------------------


class Originals:
    """What adds up of the originals: how often each code is used, statistics of features, and a checksum."""

    def __init__(self, tokenizer: DetailFlowTokenizer, extractor: Extractor | None, total: int, world: World) -> None:
        self.extractor, self.running = extractor, running(extractor, total, world)
        self.used = torch.zeros(tokenizer.config.codebook_size, dtype=torch.int64, device=tokenizer.device)
        self.checksum = Checksum(share_of(total, world).start)

    def add(self, images: Tensor, ids: Tensor) -> None:
        """A batch: uint8 (B, R, R, 3) and its clean codes (B, N)."""
        self.checksum.update(images)
        self.used += torch.bincount(ids.flatten(), minlength=len(self.used))
        if self.extractor is not None and self.running is not None:
            self.running.update(self.extractor(images))


@torch.inference_mode()
def _rebuild_all(
    tokenizer: DetailFlowTokenizer,
    images: ImageSet,
    work: Work,
    views: Sequence[View],
    tallies: Sequence[Tally],
    originals: Originals,
    seed: int,
) -> None:
    """Go through this process's images once."""
    numbers = share_of(len(images), work.world)
    number, hidden = numbers.start, None if work.world.is_main else True
    with tqdm(desc="rebuilding", total=len(numbers), unit="image", delay=2, leave=False, disable=hidden) as bar:
        for read in images:
            batch = read.to(work.device)
            sequences = _sequences(tokenizer, batch, views, range(number, number + len(batch)), seed)
            originals.add(batch, sequences[None, False])
            for view, tally in zip(views, tallies, strict=True):
                tally.add(rebuild(tokenizer, sequences[view.span, view.corrected][:, : view.n], view.side), batch)
            number += len(batch)
            bar.update(len(batch))


def _sequences(
    tokenizer: DetailFlowTokenizer, originals: Tensor, views: Sequence[View], numbers: range, seed: int
) -> dict[tuple[Span | None, bool], Tensor]:
    """The (B, N) codes of each span of mistakes, with the later tokens as they were and corrected; those of (None, False) are
    clean.
    """
    dtype = tokenizer.decoder.mask_token.dtype
    patches = tokenizer.encode_patches(to_tensor(originals).to(dtype))
    z = tokenizer.encode_latents(patches, tokenizer.config.num_tokens)
    clean = tokenizer.quantizer.nearest(z)
    result: dict[tuple[Span | None, bool], Tensor] = {(None, False): clean}
    spans = dict.fromkeys(view.span for view in views if view.span)
    if spans:  # mistakes of an image at all positions, so that those of one span depend on no other
        generators = [image_generator(seed, number) for number in numbers]
        wrong = torch.cat(
            [tokenizer.plant_mistakes(one, generator=g) for one, g in zip(z.split(1), generators, strict=True)]
        )
    for span in spans:
        planted = clean.clone()
        planted[:, span.start : span.end] = wrong[:, span.start : span.end]
        after = tokenizer.quantizer.nearest(tokenizer.correct_latents(patches, planted, span.end))[:, span.end :]
        result[span, False] = planted
        result[span, True] = torch.cat((planted[:, : span.end], after), 1)
    return result


def rebuild(tokenizer: DetailFlowTokenizer, ids: Tensor, side: int) -> Tensor:
    """(B, n) codes → uint8 (B, R, R, 3): decoded at `side`, then brought to side R."""
    return at_side(to_uint8(tokenizer.decode(ids, side)), tokenizer.config.image_size)


def gather_shares(values: Tensor, total: int, world: World) -> Tensor:
    """(share,) values of each process → (total,) of all, in the images' order."""
    lengths = [len(share_of(total, World(rank, world.size))) for rank in range(world.size)]
    return world.all_gather_uneven(values, lengths)


def find_lpips(weights: str | None, side: int, device: torch.device) -> tuple[LPIPS | None, list[str]]:
    """LPIPS, or the reason why it is left out.

    Args:
        weights: VGG-16's file; `None` is where torch.hub keeps it, or a download, and "none" no LPIPS.

    Raises:
        DetailFlowError: for a file that was given and cannot be used.
    """
    if weights == NO_LPIPS:
        return None, []
    if side < SMALLEST_SIDE:
        return None, [
            f"LPIPS is left out: its network takes images of {SMALLEST_SIDE} pixels a side or more, not {side}."
        ]
    if weights is not None and not Path(weights).expanduser().exists():
        raise DetailFlowError(f"{weights} does not exist: give VGG-16's weights, {VGG16_FILE}, or --lpips none")
    try:
        return LPIPS(weights).to(device), []
    except DetailFlowError:
        if weights is not None:
            raise
        return None, [
            f"LPIPS is left out, for want of VGG-16's weights: get {VGG16_FILE} and give its path with --lpips."
        ]


# --- what is said of it --------------------------------------------------------------------------------------------------


def lpips_entry(lpips: LPIPS | None) -> dict[str, Any]:
    """Of a report's provenance."""
    if lpips is None:
        return {}
    return {"lpips": {"network": "VGG-16 and its five heads", "fingerprint": hub.fingerprint({}, lpips.state_dict())}}


def _sections(side: int, clean: Sequence[Row], planted: Sequence[Row], used: Tensor, referenced: bool) -> list[Section]:
    usage, perplexity = usage_and_perplexity(used.cpu().double())
    codes = {"usage": Figure(usage.item()), "perplexity": Figure(perplexity.item())}
    others = any(row.setting["side"] != side for row in clean)
    resized = (
        f" Those of another side than {side}×{side} are resized to it first (bicubic), for every measure."
        if others
        else ""
    )
    quality = (
        f"Pictures are decoded at the side given and compared with the originals, in bytes.{resized} PSNR, SSIM and LPIPS are "
        "means over the images, ± the standard deviation of such a mean, by bootstrap over the images. Fréchet distances are to "
        f"the {'reference' if referenced else 'originals'}. {spread_note(clean[0].figures)}"
    ).strip()
    mistakes = (
        "Each wrong token is drawn from the 50 codes nearest to its latent. Later tokens are those of the clean sequence, or "
        "those that the self-correction pass writes after the mistakes; what that gains is taken image by image."
    )
    return [
        Section("Quality by number of tokens", clean, quality),
        *([Section("Planted mistakes", planted, mistakes)] if planted else []),
        Section("Codebook", [Row({"codes": len(used), "tokens counted": int(used.sum())}, codes)]),
    ]


def _plots(views: Sequence[View], rows: Sequence[Row]) -> list[Plot]:
    """Quality by n, with a curve for each side where sides were given; and quality by place of the mistakes."""
    clean = [(v, r.figures) for v, r in zip(views, rows, strict=True) if v.by_count]
    planted = [(v, r.figures) for v, r in zip(views, rows, strict=True) if not v.by_count]
    several = len(clean) > len({v.n for v, _ in clean})
    mixed = len({v.span.end - v.span.start for v, _ in planted if v.span}) > 1
    by_count, by_place = [], []
    for measure in rows[0].figures:
        curves: dict[str, list[Point]] = {}
        for view, figures in clean:
            name = f"side {view.side}" if several else "reconstructions"
            curves.setdefault(name, []).append((float(view.n), figures[measure]))
        by_count.append(Panel("tokens", measure, curves, log_x=True))
        lines: dict[str, list[Point]] = {}
        for view, figures in planted:
            name, x = "no mistakes", None
            if view.span:
                name, x = f"later tokens {'corrected' if view.corrected else 'clean'}", float(view.span.start)
                name += f", {view.span.end - view.span.start} wrong" if mixed else ""
            lines.setdefault(name, []).append((x, figures[measure]))
        by_place.append(
            Panel("first wrong token", measure, {name: sorted(points, key=place) for name, points in lines.items()})
        )
    plots = [Plot("quality-by-tokens", "Quality by number of tokens", by_count)]
    if len(planted) > 3:
        plots.append(Plot("mistakes-by-position", "Quality with mistakes planted, by their position", by_place))
    return plots


@torch.inference_mode()
def _picture(tokenizer: DetailFlowTokenizer, views: Sequence[View], source: ImageSet) -> Picture:
    """Return images spread over the set, each a row that ends with the original."""
    originals = torch.from_numpy(np.stack(source.some(PICTURES)))
    codes = _sequences(tokenizer, originals.to(tokenizer.device), (), range(0), 0)[None, False]
    shown = [(f"{v.n} at {v.side}", rebuild(tokenizer, codes[:, : v.n], v.side).cpu()) for v in views if v.by_count]
    columns = [*shown, ("original", originals)]
    images = [Image.fromarray(pictures[i].numpy()) for i in range(len(originals)) for _, pictures in columns]
    labels = [label for _ in originals for label, _ in columns]
    caption = "Images spread over the set, by number of tokens and the side at which they are decoded"
    return Picture("reconstructions", caption, grid(images, len(columns), labels))


def _quotes(tokenizer: DetailFlowTokenizer, model: str | None, rows: Sequence[Row], own: bool) -> list[dict[str, Any]]:
    """Published figures are of all tokens at the full side, and distances to the originals."""
    full = {"tokens": tokenizer.config.num_tokens, "side": tokenizer.config.image_size}
    measures = ("rFID", "PSNR") if own else ("PSNR",)
    ours = next((row.figures for row in rows if row.setting == full), {})
    return quotes(model, {m: ours[m].value for m in measures if m in ours})
