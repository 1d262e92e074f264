"""Figures of reconstructions, against what the public API and NumPy say."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from detailflow import DetailFlowPipeline, DetailFlowTokenizer, hub
from detailflow.data.transforms import to_tensor, to_uint8
from detailflow.distributed import World
from detailflow.errors import DetailFlowError
from detailflow.evaluation.evaluate import Context
from detailflow.evaluation.features import Features
from detailflow.evaluation.report import Figure, Report, curves
from detailflow.evaluation.tokenizer import Span, TokenizerOptions, evaluate_tokenizer, find_lpips, parse_spans
from detailflow.psnr import psnr

COUNT = 40


class Blocks:
    """Features that NumPy can compute as well: means of an image's quarters and colours."""

    name, fingerprint, preprocessing = "blocks", "b" * 64, "none"

    def __call__(self, images: Tensor) -> Features:
        quarters = images.float().unflatten(1, (2, -1)).unflatten(3, (2, -1)).mean((2, 4)) / 255
        return Features(quarters.flatten(1), None, quarters.flatten(1)[:, :5] * 9)


def context(batch_size: int = 32) -> Context:
    return Context(World(), torch.device("cpu"), batch_size)


@pytest.fixture(scope="module")
def originals(cifar: Path) -> Tensor:
    """(COUNT, 32, 32, 3) bytes, those that are measured."""
    return torch.cat(list(context().open(str(cifar), 32, COUNT)))


def evaluated(
    tokenizer: DetailFlowTokenizer, cifar: Path, batch_size: int = 32, count: int = COUNT, **options: Any
) -> Report:
    where = context(batch_size)
    report = evaluate_tokenizer(tokenizer, where.open(str(cifar), 32, count), where, TokenizerOptions(**options))
    assert report is not None
    return report


def figures(report: Report, section: int = 0) -> list[tuple[dict[str, Any], Mapping[str, Figure]]]:
    return [(dict(row.setting), row.figures) for row in report.sections[section].rows]


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """By the formula, through the eigenvalues of the covariances' product."""
    roots = np.sqrt(np.clip(np.linalg.eigvals(np.cov(a, rowvar=False) @ np.cov(b, rowvar=False)).real, 0, None)).sum()
    spread = np.trace(np.cov(a, rowvar=False)) + np.trace(np.cov(b, rowvar=False)) - 2 * roots
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + spread)


def test_quality_by_tokens_is_what_the_pipeline_says_of_each_image(
    pipeline: DetailFlowPipeline, cifar: Path, originals: Tensor
):
    report = evaluated(pipeline.tokenizer, cifar, extractor=Blocks(), counts=[16, 2, 4])
    rows = figures(report)
    assert [setting for setting, _ in rows] == [
        {"tokens": 2, "side": 8},
        {"tokens": 4, "side": 16},
        {"tokens": 16, "side": 32},
    ]
    rebuilt = [pipeline.reconstruct(Image.fromarray(image.numpy()), counts=[2, 4, 16]) for image in originals]
    features = Blocks()(originals).pool.numpy()
    for i, (_, row) in enumerate(rows):
        values = np.array([stages[i].psnr for stages in rebuilt])
        assert row["PSNR"].value == pytest.approx(values.mean(), abs=0.01)
        assert row["PSNR"].spread == pytest.approx(values.std() / math.sqrt(COUNT), rel=0.15)
        pixels = torch.from_numpy(np.stack([np.asarray(stages[i].images[0]) for stages in rebuilt]))
        assert row["rFD"].value == pytest.approx(frechet(features, Blocks()(pixels).pool.numpy()), rel=1e-3)
    assert "Those of another side than 32×32 are resized to it first" in report.sections[0].note
    assert {"SSIM", "IS"} <= set(rows[0][1])
    assert "precision" not in rows[0][1]
    assert "LPIPS" not in rows[0][1]


def test_searched_codes(shipped: DetailFlowPipeline, cifar: Path, originals: Tensor):
    plain, better = (evaluated(shipped.tokenizer, cifar, counts=[48], search=steps) for steps in (0, 3))
    ids = shipped.tokenizer.encode(to_tensor(originals), search=3)
    psnrs = psnr(to_uint8(shipped.tokenizer.decode(ids)), originals)
    assert figures(better)[0][1]["PSNR"].value == pytest.approx(psnrs.mean().item(), abs=0.01)
    assert figures(better)[0][1]["PSNR"].value > figures(plain)[0][1]["PSNR"].value + 0.3
    assert better.provenance["settings"]["search"] == 3 and "search" not in plain.provenance["settings"]
    with pytest.raises(DetailFlowError, match="mistakes are planted in the encoder's own tokens"):
        evaluated(shipped.tokenizer, cifar, counts=[48], search=3, mistakes=[Span(0, 1)])
    with pytest.raises(DetailFlowError, match="search must be"):
        evaluated(shipped.tokenizer, cifar, counts=[48], search=-3)
    plain, better = (
        evaluated(shipped.tokenizer, cifar, counts=[48], search=steps, model="detailflow-16", count=8)
        for steps in (0, 1)
    )
    assert "Published figures beside ours" in [section.title for section in plain.sections]
    assert "Published figures beside ours" not in [section.title for section in better.sections]  # these are without


def test_any_side(pipeline: DetailFlowPipeline, cifar: Path, originals: Tensor):
    report = evaluated(pipeline.tokenizer, cifar, counts=[4, 16], sides=[8, 32])
    rows = figures(report)
    assert [(s["tokens"], s["side"]) for s, _ in rows] == [(4, 8), (4, 32), (16, 8), (16, 32)]
    pixels = to_uint8(pipeline.tokenizer.decode(pipeline.tokenizer.encode(to_tensor(originals), num_tokens=4), size=32))
    expected = np.mean([psnr(a.numpy(), b.numpy()) for a, b in zip(pixels, originals, strict=True)])
    assert rows[1][1]["PSNR"].value == pytest.approx(expected, abs=0.01)
    assert set(rows[0][1]) == {"PSNR", "SSIM"}  # resized, it has no edges of patches
    errors, patch = pixels.float() - originals.float(), pipeline.tokenizer.config.patch_size
    down, sideways = (np.abs(np.diff(errors.numpy(), axis=axis)) for axis in (1, 2))
    edge = np.arange(1, 32) % patch == 0
    across = sideways[:, :, edge].sum() + down[:, edge].sum()
    inside = sideways[:, :, ~edge].sum() + down[:, ~edge].sum()
    expected = across / edge.sum() / (inside / (~edge).sum())
    assert rows[1][1]["blockiness"].value == pytest.approx(expected, rel=1e-3)
    assert rows[1][1]["blockiness"].spread is None
    (plot,) = report.plots
    assert list(curves(plot.rows, plot.x, "PSNR")) == ["side 8", "side 32"]
    assert report.pictures[0].image.width > 4 * 128


def test_the_codebook(pipeline: DetailFlowPipeline, cifar: Path, originals: Tensor):
    setting, row = figures(evaluated(pipeline.tokenizer, cifar, counts=[16]), section=1)[0]
    counts = np.bincount(pipeline.tokenizer.encode(to_tensor(originals)).flatten().numpy(), minlength=64)
    p = counts[counts > 0] / counts.sum()
    assert setting == {"codes": 64, "tokens counted": COUNT * 16}
    assert row["usage"].value == pytest.approx((counts > 0).mean())
    assert row["perplexity"].value == pytest.approx(np.exp(-(p * np.log(p)).sum()))


def test_planted_mistakes_and_their_correction(pipeline: DetailFlowPipeline, cifar: Path, originals: Tensor):
    """The wrong tokens are drawn anew here, by each image's own generator; the rest is the public API."""
    from detailflow.generation import image_generator

    tokenizer = pipeline.tokenizer
    report = evaluated(tokenizer, cifar, extractor=Blocks(), counts=[16], mistakes=[Span(2, 3), Span(8, 12)], seed=3)
    rows = {(s["first wrong token"], s["later tokens"]): row for s, row in figures(report, section=1)}
    assert list(rows) == [("none", "clean"), (2, "clean"), (2, "corrected"), (8, "clean"), (8, "corrected")]
    assert [s["wrong tokens"] for s, _ in figures(report, section=1)] == [0, 1, 1, 4, 4]
    assert rows["none", "clean"] == figures(report)[0][1]
    x = to_tensor(originals)
    clean = tokenizer.encode(x)
    z = tokenizer.encode_latents(tokenizer.encode_patches(x), 16)
    wrong = torch.cat([tokenizer.plant_mistakes(z[i : i + 1], generator=image_generator(3, i)) for i in range(COUNT)])
    for start, end in ((2, 3), (8, 12)):
        planted = torch.cat((clean[:, :start], wrong[:, start:end], clean[:, end:]), 1)
        corrected = tokenizer.encode_correction(x, position=start, wrong_tokens=wrong[:, start:end])
        each: dict[str, np.ndarray] = {}
        for text, ids in (("clean", planted), ("corrected", corrected)):
            pixels = to_uint8(tokenizer.decode(ids))
            each[text] = np.array([psnr(a.numpy(), b.numpy()) for a, b in zip(pixels, originals, strict=True)])
            assert rows[start, text]["PSNR"].value == pytest.approx(each[text].mean(), abs=0.01)
            distance = frechet(Blocks()(originals).pool.numpy(), Blocks()(pixels).pool.numpy())
            assert rows[start, text]["rFD"].value == pytest.approx(distance, rel=1e-3)
        gain = each["corrected"] - each["clean"]
        assert rows[start, "corrected"]["gain of PSNR"].value == pytest.approx(gain.mean(), abs=0.01)
        assert rows[start, "corrected"]["gain of PSNR"].spread == pytest.approx(gain.std() / math.sqrt(COUNT), rel=0.2)
        assert "gain of PSNR" not in rows[start, "clean"]
    assert rows[8, "clean"]["PSNR"] != rows["none", "clean"]["PSNR"]
    assert [plot.name for plot in report.plots] == ["quality-by-tokens", "mistakes-by-position"]
    plot = report.plots[1]
    found = curves(plot.rows, plot.x, "PSNR")
    states = [f"wrong tokens {count}, later tokens {text}" for count in (1, 4) for text in ("clean", "corrected")]
    assert list(found) == ["first wrong token none, wrong tokens 0, later tokens clean", *states]
    assert [[x for x, _ in found[name]] for name in states] == [[2.0], [2.0], [8.0], [8.0]]


def test_mistakes_depend_on_the_seed_and_on_no_other_place(pipeline: DetailFlowPipeline, cifar: Path):
    def rows(*spans: Span, seed: int = 0) -> dict[str, Figure]:
        report = evaluated(pipeline.tokenizer, cifar, count=20, counts=[16], mistakes=spans, seed=seed)
        return {f"{s['first wrong token']}, {s['later tokens']}": row["PSNR"] for s, row in figures(report, section=1)}

    both, one, other = rows(Span(4, 8), Span(8, 12)), rows(Span(8, 12)), rows(Span(8, 12), seed=1)
    assert one["8, corrected"] == both["8, corrected"] != other["8, corrected"]


def test_the_batch_size_does_not_matter(pipeline: DetailFlowPipeline, cifar: Path):
    a, b = (
        evaluated(pipeline.tokenizer, cifar, size, extractor=Blocks(), counts=[4, 16], mistakes=[Span(4, 8)])
        for size in (7, 40)
    )
    assert a.provenance["data"] == b.provenance["data"]
    for ours, theirs in zip(a.sections, b.sections, strict=True):
        for one, other in zip(ours.rows, theirs.rows, strict=True):
            assert one.setting == other.setting
            for name in one.figures:
                assert one.figures[name].value == pytest.approx(other.figures[name].value, rel=1e-3), name


def test_what_the_report_says_of_its_data(pipeline: DetailFlowPipeline, cifar: Path):
    report = evaluated(pipeline.tokenizer, cifar, extractor=Blocks(), counts=[16])
    about = report.provenance["data"]["images"]
    assert (about["data"], about["images"], about["height"]) == (str(cifar), COUNT, 32)
    assert len(about["checksum"]) == 32
    assert report.provenance["features"] == {"network": "blocks", "fingerprint": "b" * 64}
    assert "resized" not in report.sections[0].note  # at their full side
    other = evaluated(pipeline.tokenizer, cifar, count=COUNT - 1, counts=[16]).provenance["data"]["images"]
    assert other["checksum"] != about["checksum"]
    assert any("FD is the Fréchet distance of the features of blocks" in note for note in report.notes)


def test_distances_to_a_reference(pipeline: DetailFlowPipeline, cifar: Path, originals: Tensor):
    reference = context().open(str(cifar), 32)
    report = evaluated(pipeline.tokenizer, cifar, extractor=Blocks(), counts=[16], reference=reference)
    pixels = to_uint8(pipeline.tokenizer.decode(pipeline.tokenizer.encode(to_tensor(originals))))
    real = torch.cat(list(reference))
    expected = frechet(Blocks()(real).pool.numpy(), Blocks()(pixels).pool.numpy())
    assert figures(report)[0][1]["rFD"].value == pytest.approx(expected, rel=1e-3)
    assert set(report.provenance["data"]) == {"images", "reference"}


def test_published_figures_stand_beside_a_zoo_models(pipeline: DetailFlowPipeline, cifar: Path):
    network = Blocks()
    network.name = "inception"  # type: ignore[misc]
    report = evaluated(pipeline.tokenizer, cifar, extractor=network, counts=[4, 16], model="detailflow-16")
    row = figures(report)[1][1]
    published = [(setting["measure"], found["ours"].value) for setting, found in figures(report, section=-1)]
    assert published == [("rFID", row["rFID"].value), ("rFID", row["rFID"].value), ("PSNR", row["PSNR"].value)]
    coarse = evaluated(pipeline.tokenizer, cifar, counts=[4], model="detailflow-16")  # not all tokens
    assert all(section.title != "Published figures beside ours" for section in coarse.sections)


@pytest.mark.parametrize(
    ("words", "spans"),
    [
        (["0"], [Span(0, 1)]),
        (["3", "5", "4"], [Span(3, 4), Span(4, 8)]),
        (["g0", "g3"], [Span(0, 4), Span(12, 16)]),
        (["all"], [Span(0, 4), Span(4, 8), Span(8, 12)]),
    ],
)
def test_where_mistakes_go(words: list[str], spans: list[Span], pipeline: DetailFlowPipeline):
    assert parse_spans(pipeline.tokenizer.schedule, words) == spans


@pytest.mark.parametrize("word", ["16", "g4", "-1", "g", "", "every"])
def test_where_mistakes_cannot_go(word: str, pipeline: DetailFlowPipeline):
    with pytest.raises(DetailFlowError, match="at token 0 to 15, in group g0 to g3, or all, not"):
        parse_spans(pipeline.tokenizer.schedule, [word])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"counts": [5]}, "num_tokens must be 1 to 4 or a multiple of 4 up to 16, not 5"),
        ({"sides": [12]}, "the side of a picture must be a positive multiple of 8, not 12"),
        ({"count": 1}, "too few images to measure: there are 1, and 2 are the least"),
        ({"mistakes": [Span(4, 8)], "seed": -1}, "seeds must be 0 to 2.64 - 1, not -1"),
        ({"mistakes": [Span(4, 8)], "seed": 2**64}, "seeds must be 0 to 2.64 - 1, not 18446744073709551616"),
    ],
)
def test_bad_input(options: dict[str, Any], message: str, pipeline: DetailFlowPipeline, cifar: Path):
    with pytest.raises(DetailFlowError, match=message):
        evaluated(pipeline.tokenizer, cifar, **options)


def test_a_reference_without_features(pipeline: DetailFlowPipeline, cifar: Path):
    with pytest.raises(DetailFlowError, match="a reference is for Fréchet distances: give features"):
        evaluated(pipeline.tokenizer, cifar, counts=[16], reference=context().open(str(cifar), 32))


def test_lpips_is_left_out_with_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    device = torch.device("cpu")

    def offline(*args: object, **kwargs: object) -> None:
        raise OSError("no connection")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    network, notes = find_lpips(None, 32, device)
    assert network is None
    start = "LPIPS is left out: LPIPS needs VGG-16's weights, which cannot be downloaded: get https://"
    assert len(notes) == 1 and notes[0].startswith(start) and notes[0].endswith(" and give its path as --lpips.")
    assert find_lpips(None, 8, device)[1] == [
        "LPIPS is left out: its network takes images of 16 pixels a side or more, not 8."
    ]
    assert find_lpips("none", 32, device) == (None, [])
    with pytest.raises(
        DetailFlowError, match="missing.pth does not exist: give VGG-16's weights, https://.*, or --lpips none"
    ):
        find_lpips(str(tmp_path / "missing.pth"), 32, device)


def test_lpips_is_each_images_own(pipeline: DetailFlowPipeline, cifar: Path, originals: Tensor):
    """A stand-in for the network."""

    class Distance(torch.nn.Linear):
        def distances(self, pixels: Tensor, target: Tensor) -> Tensor:
            return (pixels - target).square().mean((1, 2, 3)).sqrt()

    network = Distance(2, 1)
    report = evaluated(pipeline.tokenizer, cifar, counts=[16], lpips=network)
    wanted = {"network": "VGG-16 and its five heads", "fingerprint": hub.fingerprint({}, network.state_dict())}
    assert report.provenance["features"] == {"lpips": wanted}
    row = figures(report)[0][1]
    pixels = to_uint8(pipeline.tokenizer.decode(pipeline.tokenizer.encode(to_tensor(originals))))
    each = (to_tensor(pixels) - to_tensor(originals)).square().mean((1, 2, 3)).sqrt()
    assert row["LPIPS"].value == pytest.approx(each.mean().item(), abs=1e-3)
    assert row["LPIPS"].spread == pytest.approx(each.std().item() / math.sqrt(COUNT), rel=0.15)
