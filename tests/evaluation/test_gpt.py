"""Figures of generated images, against what the pipeline's own images give."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from detailflow import DetailFlowPipeline
from detailflow.distributed import World
from detailflow.errors import DetailFlowError
from detailflow.evaluation import gpt
from detailflow.evaluation.distances import Checksum, compare_sets, measure
from detailflow.evaluation.evaluate import Context
from detailflow.evaluation.features import Features
from detailflow.evaluation.gpt import GPTOptions, class_labels, evaluate_gpt, over_seeds, sweep
from detailflow.evaluation.report import Figure, Report, Row, curves
from detailflow.evaluation.sets import open_set

COUNT = 23


class Blocks:
    """Means of an image's quarters and colours; the class is the brightest of five of them."""

    name, fingerprint, preprocessing = "blocks", "b" * 64, "none"

    def __call__(self, images: Tensor) -> Features:
        quarters = images.float().unflatten(1, (2, -1)).unflatten(3, (2, -1)).mean((2, 4)).flatten(1) / 255
        return Features(quarters, None, quarters[:, :5] * 9)


def evaluated(
    pipeline: DetailFlowPipeline,
    cifar: Path,
    folder: Path,
    batch_size: int = 8,
    count: int = COUNT,
    values: Any = None,
    **options: Any,
) -> Report:
    context = Context(World(), torch.device("cpu"), batch_size)
    settings = sweep(pipeline, **(values or {}))
    wanted = GPTOptions(Blocks(), settings, folder, count, **options)
    report = evaluate_gpt(pipeline, context.open(str(cifar), 32), context, wanted)
    assert report is not None
    return report


def expected(pixels: Tensor, cifar: Path) -> dict[str, float]:
    """What comparing the images themselves says."""
    made = measure(Blocks(), [pixels], total=len(pixels))
    figures = compare_sets(measure(Blocks(), open_set(cifar, size=32)), made, prefix="g")
    return {name: figure.value for name, figure in figures.items()}


def test_one_setting(pipeline: DetailFlowPipeline, cifar: Path, tmp_path: Path):
    report = evaluated(pipeline, cifar, tmp_path, seeds=[7])
    labels = [i % 5 for i in range(COUNT)]
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in pipeline(labels, seed=7, batch_size=8)]))
    wanted = expected(pixels, cifar)
    (row,) = report.sections[0].rows
    best = pipeline.gpt.config.guidance_scale
    assert row.setting == {
        "guidance": best, "schedule": "constant", "temperature": 1.0, "top-k": "off", "top-p": "off", "tokens": 16,
    }  # fmt: skip
    assert set(row.figures) == {"gFD", "IS", "precision", "recall", "recognised"}
    for name in ("gFD", "IS", "precision", "recall"):
        assert row.figures[name].value == pytest.approx(wanted[name], rel=1e-6)
    said = Blocks()(pixels).logits.argmax(1)
    assert row.figures["recognised"].value == pytest.approx((said == torch.tensor(labels)).double().mean().item())
    assert not (tmp_path / "samples").exists()
    assert report.provenance["data"]["samples"] == {"images": COUNT, "labels": "balanced"}
    assert len(report.provenance["data"]["reference"]["checksum"]) == 32
    checksum = Checksum(COUNT, World())
    checksum.update(pixels)
    assert list(report.provenance["samples"]["checksum"].values()) == [checksum.compute()]
    note = report.sections[0].note
    assert "only if that network's classes are the model's" in note
    assert "enlarged" not in note
    (picture,) = report.pictures
    assert picture.image.size == (8 * 132 + 4, 132 + 4)


def test_coarse_images_are_measured_at_the_full_side_and_can_be_kept(
    pipeline: DetailFlowPipeline, cifar: Path, tmp_path: Path
):
    report = evaluated(pipeline, cifar, tmp_path, values={"num_tokens": [4, 16]}, keep_samples=True)
    labels = [i % 5 for i in range(COUNT)]
    coarse = [np.asarray(image) for image in pipeline(labels, num_tokens=4, batch_size=8)]
    assert report.pictures[0].image.size == (8 * 132 + 4, 2 * (128 + 16 + 4) + 4)  # a line of text below each row
    (folder,) = (tmp_path / "samples").glob("*tokens-4-seed-0")
    with np.load(folder / "samples.npz") as stored:
        np.testing.assert_array_equal(stored["arr_0"], np.stack(coarse))
        assert stored["arr_1"].tolist() == labels
    large = [np.asarray(Image.fromarray(image).resize((32, 32), Image.Resampling.BICUBIC)) for image in coarse]
    rows = {row.setting["tokens"]: row.figures for row in report.sections[0].rows}
    assert rows[4]["gFD"].value == pytest.approx(expected(torch.from_numpy(np.stack(large)), cifar)["gFD"], rel=1e-6)
    assert rows[16]["gFD"].value != rows[4]["gFD"].value
    assert [plot.name for plot in report.plots] == ["by-tokens"]
    assert "they are enlarged to 32×32" in report.sections[0].note
    assert list(report.provenance["samples"]["checksum"]) == [
        f"guidance-{pipeline.gpt.config.guidance_scale:g}-schedule-constant-temperature-1-top-k-off-top-p-off-tokens-{n}-seed-0"
        for n in (4, 16)
    ]


def test_several_seeds_show_the_spread(
    pipeline: DetailFlowPipeline, cifar: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    alone = [
        evaluated(pipeline, cifar, tmp_path, seeds=[seed]).sections[0].rows[0].figures["gFD"] for seed in (0, 1, 2)
    ]
    with caplog.at_level("INFO", "detailflow.evaluation"):
        report = evaluated(pipeline, cifar, tmp_path, seeds=[0, 1, 2])
    assert [line.rpartition(", ")[2] for line in caplog.messages] == [
        f"seed {i}: gFD {x.text('gFD')}" for i, x in enumerate(alone)
    ]
    values = [figure.value for figure in alone]
    figure = report.sections[0].rows[0].figures["gFD"]
    assert figure.values == pytest.approx(values, rel=1e-6)
    assert figure.value == pytest.approx(np.mean(values))
    assert figure.spread == pytest.approx(np.std(values, ddof=1))
    assert "Means over 3 seeds" in report.sections[0].note
    assert over_seeds([]) == {}


def test_a_sweep_is_all_combinations_once(pipeline: DetailFlowPipeline):
    values = {"guidance_scale": [1.0, 2.0, 1.0], "temperature": [0.5, None], "top_k": [None, 10]}
    settings = sweep(pipeline, **values, num_tokens=[None, 16])
    found = [(s.sampling.guidance_scale, s.sampling.temperature, s.sampling.top_k, s.num_tokens) for s in settings]
    assert found == [(g, t, k, 16) for g in (1.0, 2.0) for t in (0.5, 1.0) for k in (None, 10)]
    assert len({setting.folder(0) for setting in settings}) == 8
    with pytest.raises(DetailFlowError, match="temperature must be"):
        sweep(pipeline, temperature=[-1.0])
    with pytest.raises(DetailFlowError, match="num_tokens must be"):
        sweep(pipeline, num_tokens=[5])


def test_off_is_off_where_the_models_own_best_is_not(pipeline: DetailFlowPipeline, cifar: Path, tmp_path: Path):
    narrow = copy.copy(pipeline.gpt)
    narrow.config = replace(narrow.config, top_k=2, top_p=0.9)
    values = {"top_k": ["off", None, 2], "top_p": ["off"]}
    report = evaluated(
        DetailFlowPipeline(pipeline.tokenizer, narrow), cifar, tmp_path, values=values, keep_samples=True
    )
    rows = [(row.setting["top-k"], row.setting["top-p"]) for row in report.sections[0].rows]
    assert rows == [("off", "off"), (2, "off")]
    labels = [i % 5 for i in range(COUNT)]
    for name, top_k in (("off", None), ("2", 2)):
        (file,) = (tmp_path / "samples").glob(f"*top-k-{name}-top-p-off*/samples.npz")
        wanted = np.stack([np.asarray(image) for image in pipeline(labels, top_k=top_k, batch_size=8)])
        with np.load(file) as stored:
            np.testing.assert_array_equal(stored["arr_0"], wanted)


def test_a_plot_has_a_curve_for_each_of_the_other_settings():
    def row(guidance: float, k: int | str, value: float) -> Row:
        return Row({"guidance": guidance, "top-k": k, "tokens": 16}, {"gFD": Figure(value)})

    def values(rows: list[Row], x: str) -> dict[str, list[tuple[float | None, float]]]:
        found = curves(rows, x, "gFD").items()
        return {name: [(x, figure.value) for x, figure in points] for name, points in found}

    rows = [row(2.0, 5, 0.1), row(1.0, 5, 0.2), row(1.0, "off", 0.3), row(2.0, "off", 0.4)]
    assert values(rows, "guidance") == {"top-k 5": [(1.0, 0.2), (2.0, 0.1)], "top-k off": [(1.0, 0.3), (2.0, 0.4)]}
    found = values([*rows, row(1.0, 9, 0.5)], "top-k")
    assert found["guidance 1"] == [(5.0, 0.2), (9.0, 0.5)]
    assert found["top-k off, guidance 1"] == [(None, 0.3)]
    assert [plot.x for plot in gpt._plots(rows)] == ["guidance"]  # one number and "off" make no curve
    assert [plot.x for plot in gpt._plots([*rows, row(1.0, 9, 0.5)])] == ["guidance", "top-k"]


def test_labels():
    assert class_labels(3, 7, "balanced", 0) == [0, 1, 2, 0, 1, 2, 0]
    drawn = class_labels(3, 3000, "random", 0)
    assert drawn == class_labels(3, 3000, "random", 0) != class_labels(3, 3000, "random", 1)
    assert all(900 < drawn.count(label) < 1100 for label in range(3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": "all"}, "labels must be balanced or random, not 'all'"),
        ({"seeds": [0, -1]}, "seeds must be 0 to 2.64 - 1, not -1"),
        ({"values": {"top_p": [2.0]}}, "top_p must be above 0 and at most 1 .1 is off., not 2.0"),
        ({"count": 1}, "too few images to measure: there are 1, and 2 are the least"),
    ],
)
def test_bad_input(options: dict[str, Any], message: str, pipeline: DetailFlowPipeline, cifar: Path, tmp_path: Path):
    with pytest.raises(DetailFlowError, match=message):
        evaluated(pipeline, cifar, tmp_path, **options)
    assert not list(tmp_path.iterdir())


def test_a_folder_with_other_samples_is_left_alone(pipeline: DetailFlowPipeline, cifar: Path, tmp_path: Path):
    evaluated(pipeline, cifar, tmp_path, keep_samples=True)
    with pytest.raises(DetailFlowError, match="holds samples of other labels"):
        evaluated(pipeline, cifar, tmp_path, labels="random", keep_samples=True)
    evaluated(pipeline, cifar, tmp_path, labels="random")
    assert len(list((tmp_path / "samples").glob("*/samples.npz"))) == 1


def test_a_reference_of_photographs_is_not_adms(pipeline: DetailFlowPipeline, cifar: Path, tmp_path: Path):
    def notes(reference: Path, name: str) -> str:
        context, network = Context(World(), torch.device("cpu"), 50), Blocks()
        network.name = name  # type: ignore[misc]
        wanted = GPTOptions(network, sweep(pipeline), tmp_path, 5)
        report = evaluate_gpt(pipeline, context.open(str(reference), 32), context, wanted)
        assert report is not None
        return " ".join(report.notes)

    np.savez(
        tmp_path / "set.npz",
        arr_0=torch.cat(list(open_set(cifar, size=32))).numpy(),
    )
    assert "one bicubic resize" in notes(cifar, "inception")
    assert "one bicubic resize" not in notes(cifar, "blocks") + notes(tmp_path / "set.npz", "inception")
