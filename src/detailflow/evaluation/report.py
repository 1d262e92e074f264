"""What an evaluation writes: tables of figures, plots, and what they were computed from, as JSON and Markdown."""

import json
import math
import os
import platform
import re
from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

from detailflow import hub
from detailflow.errors import DetailFlowError, os_errors
from detailflow.files import read_json, read_text, reading, replacing
from detailflow.machine import device_name
from detailflow.published import Kind
from detailflow.words import printable

JSON_FILE, MARKDOWN_FILE = "report.json", "report.md"
ORIGIN = "## What this was computed from"  # a heading of every report
PICTURES = ("samples", "reconstructions")  # names of PNG files
FORMAT = "detailflow-report"
PACKAGES = (
    "torch",
    "torchvision",
    "torchmetrics",
    "torch-fidelity",
    "timm",
    "numpy",
    "pillow",
)  # which compute figures
GAIN = "gain of PSNR"
BLOCKINESS = "blockiness"
DIGITS = dict.fromkeys(("PSNR", GAIN, BLOCKINESS), 3)
DIGITS |= dict.fromkeys(("SSIM", "LPIPS", "precision", "recall", "recognised", "usage"), 4)
SIGNIFICANT = 4  # digits of other measures
UNITS = {"PSNR": "dB", GAIN: "dB"}
PANELS = 3  # of a plot, side by side


@dataclass(frozen=True)
class Figure:
    """A measured number and its standard deviation, over what the section's note says; None if that is unknown."""

    value: float
    spread: float | None = None
    values: tuple[float, ...] = ()  # of each seed if there are several

    def text(self, measure: str) -> str:
        """Return the number with as many digits as suit the measure."""
        known = self.value and math.isfinite(self.value)
        digits = DIGITS.get(measure, max(0, SIGNIFICANT - 1 - math.floor(math.log10(abs(self.value))) if known else 3))
        spread = "" if self.spread is None else f" ± {self.spread:.{digits}f}"
        return f"{self.value:.{digits}f}{spread}"


@dataclass(frozen=True)
class Row:
    """The figures of one setting, such as {"tokens": 16, "side": 48}; both by the names of the table's columns."""

    setting: Mapping[str, Any]
    figures: Mapping[str, Figure]


@dataclass(frozen=True)
class Section:
    """A table, and what its figures mean."""

    title: str
    rows: Sequence[Row]
    note: str = ""


class Plot(NamedTuple):
    """Every measure of the rows by their setting `x`, in the file `name`.png."""

    name: str
    caption: str
    x: str
    rows: Sequence[Row]


class Picture(NamedTuple):
    """An image in the file `name`.png."""

    name: str
    caption: str
    image: Image.Image


@dataclass(frozen=True)
class Report:
    """The result of one evaluation.

    Args:
        kind: "tokenizer", "gpt" or "samples"; only reports of one kind can be compared.
        provenance: what the figures were computed from, nested by subject. Two reports' figures mean the same only if
            "data", "features" and "preprocessing" are the same.
        notes: what a reader should know first, such as what was left out, and why.
    """

    kind: str
    title: str
    sections: Sequence[Section]
    provenance: Mapping[str, Any]
    plots: Sequence[Plot] = ()
    pictures: Sequence[Picture] = ()
    notes: Sequence[str] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return the content of the JSON file; numbers that are not finite are strings."""
        parts = {"format": FORMAT, "kind": self.kind, "title": self.title, "notes": list(self.notes)}
        sections = [asdict(section) for section in self.sections]
        result: dict[str, Any] = _for_json(parts | {"sections": sections, "provenance": dict(self.provenance)})
        return result

    def write(self, folder: Path) -> None:
        """Write report.json, report.md and the PNG files to `folder`: each whole or not at all, the JSON file last.

        The Markdown file comes first: an interrupted report is known by it as ours.
        """
        content = json.dumps(self.as_dict(), indent=1, ensure_ascii=False) + "\n"
        with os_errors(f"cannot write the report to {folder}"):
            folder.mkdir(parents=True, exist_ok=True)
            with ExitStack() as stack:  # which puts the files in place in the opposite order, once all are written
                stack.enter_context(replacing(folder / JSON_FILE)).write_text(content, encoding="utf-8")
                for plot in self.plots:
                    draw(plot, stack.enter_context(replacing(folder / f"{plot.name}.png")))
                for picture in self.pictures:
                    picture.image.save(stack.enter_context(replacing(folder / f"{picture.name}.png")), format="PNG")
                text = printable(self.markdown())
                stack.enter_context(replacing(folder / MARKDOWN_FILE)).write_text(text, encoding="utf-8")

    def markdown(self) -> str:
        """Return the report as Markdown."""
        parts = [f"# {self.title}", *self.notes]
        for section in self.sections:
            parts += [f"## {section.title}", "\n".join(section_table(section)), section.note]
        parts += [f"![{plot.caption}]({plot.name}.png)" for plot in self.plots]
        parts += [f"![{picture.caption}]({picture.name}.png)" for picture in self.pictures]
        known = flattened(_for_json(dict(self.provenance)))
        origin = table(["", ""], [[name, cell(value)] for name, value in known], right=False)
        return "\n\n".join(filter(None, [*parts, ORIGIN, "\n".join(origin)])) + "\n"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], right: bool = True) -> list[str]:
    """Return the lines of a Markdown table; `right` aligns all columns but the first to the right."""
    marks = ["---"] + ["---:" if right else "---"] * (len(header) - 1)
    return [f"| {' | '.join(line)} |" for line in (header, marks, *rows)]


def section_table(section: Section) -> list[str]:
    """Return the lines of a section's table; settings that are the same in all of several rows are below it."""
    common = shared_settings([row.setting for row in section.rows])
    shown = [key for key in dict.fromkeys(key for row in section.rows for key in row.setting) if key not in common]
    measures = list(dict.fromkeys(key for row in section.rows for key in row.figures))
    rows = []
    for row in section.rows:
        texts = [row.figures[m].text(m) if m in row.figures else "–" for m in measures]
        rows.append([*(cell(row.setting.get(key, "")) for key in shown), *texts])
    lines = table([*shown, *map(with_unit, measures)], rows)
    return [*lines, "", f"In all rows: {', '.join(in_words(common))}."] if common else lines


def shared_settings(settings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what is the same in all of several settings."""
    return {k: v for k, v in settings[0].items() if len(settings) > 1 and all(other.get(k) == v for other in settings)}


def in_words(setting: Mapping[str, Any], but: Container[str] = ()) -> list[str]:
    """Return a setting as words such as "guidance 2", without the names in `but`."""
    return [f"{key} {cell(value)}" for key, value in setting.items() if key not in but]


def with_unit(measure: str) -> str:
    """Return the title of a measure's column or axis."""
    return f"{measure}, {UNITS[measure]}" if measure in UNITS else measure


def cell(value: Any) -> str:
    """Return a value as text in a table."""
    if value is None:
        return "–"
    return f"{value:g}" if isinstance(value, float) else str(value).replace("|", "\\|").replace("\n", " ")


def flattened(nested: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted name, value) of everything in nested mappings."""
    for key, value in nested.items():
        if isinstance(value, Mapping):
            yield from flattened(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _for_json(value: Any) -> Any:
    """Make strings, which float() reads, of numbers that are not finite: JSON has none. Text becomes printable."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, Mapping):
        return {printable(str(key)): _for_json(item) for key, item in value.items()}
    return [_for_json(item) for item in value] if isinstance(value, list | tuple) else value


def curves(rows: Sequence[Row], x: str, measure: str) -> dict[str, list[tuple[float | None, Figure]]]:
    """Return the points of each curve by x, one for every combination of the other settings that vary.

    If no value of x comes twice, all is one curve. A value that is not a number, such as "off", is a level line. Rows
    without the measure are left out.
    """
    rows = [row for row in rows if measure in row.figures]
    values = [row.setting[x] for row in rows]
    others = [key for key in rows[0].setting if key != x and len({row.setting[key] for row in rows}) > 1]
    if len(set(values)) == len(values):
        others = []
    result: dict[str, list[tuple[float | None, Figure]]] = {}
    for row in rows:
        value, words = row.setting[x], in_words({key: row.setting[key] for key in others})
        number = float(value) if isinstance(value, int | float) else None
        name = ", ".join(words if number is not None else [f"{x} {value}", *words])
        result.setdefault(name, []).append((number, row.figures[measure]))
    return {name: sorted(points, key=lambda point: point[0] or 0.0) for name, points in result.items()}


def draw(plot: Plot, path: Path) -> None:
    """Draw a panel for each measure into a PNG file."""
    from matplotlib.figure import Figure as Canvas

    counts = Counter(measure for row in plot.rows for measure in row.figures)
    least = min(2, len(plot.rows))  # one of several rows is no curve
    measures = [measure for measure, count in counts.items() if count >= least]
    rows = -(-len(measures) // PANELS)
    columns = -(-len(measures) // rows)
    canvas = Canvas(figsize=(4.6 * columns, 3.4 * rows), layout="constrained")
    axes = list(canvas.subplots(rows, columns, squeeze=False).flat)
    for axis, measure in zip(axes, measures, strict=False):
        lines = curves(plot.rows, plot.x, measure)
        for name, points in lines.items():
            for level in (figure.value for x, figure in points if x is None):
                axis.axhline(level, label=name, color="0.4", linestyle="--", linewidth=1)
            if found := [(x, figure.value, figure.spread or 0.0) for x, figure in points if x is not None]:
                x, y, spread = zip(*found, strict=True)
                axis.errorbar(x, y, yerr=spread, label=name, marker="o", markersize=3, capsize=2)
        if plot.x == "tokens":
            axis.set_xscale("log", base=2)
            ticks = sorted({x for points in lines.values() for x, _ in points if x is not None})
            axis.set_xticks(ticks, [f"{x:g}" for x in ticks])
            axis.minorticks_off()
        else:
            axis.locator_params(axis="x", nbins=6)  # more would overlap
        axis.set(xlabel=plot.x, ylabel=with_unit(measure))
        axis.grid(alpha=0.3)
        if len(lines) > 1 and measure == measures[0]:
            canvas.legend(loc="outside lower center", fontsize="small")  # beside the panels, where it hides nothing
    for axis in axes[len(measures) :]:
        axis.set_axis_off()
    canvas.savefig(path, format="png", dpi=110)


def versions() -> dict[str, str]:
    """Return the versions of Python, this package and the installed libraries that figures depend on."""
    from detailflow import __version__

    found = {"detailflow": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def machine_entry(device: torch.device, world_size: int, dtype: str | None) -> dict[str, Any]:
    """Return what an evaluation ran on, for its provenance."""
    machine = {"device": device_name(device), "processes": world_size, "threads": torch.get_num_threads()}
    return {"machine": machine | ({"dtype": dtype} if dtype else {}), "versions": versions()}


def model_entry(source: str | None, kind: Kind) -> dict[str, str]:
    """Return a model's name as the user gave it (None is the shipped one), and its fingerprint, for the provenance."""
    found = hub.load(source, kind)
    return {"name": source or "the shipped model", "fingerprint": hub.fingerprint(*found)}


def check_folder(folder: Path, command: str, models: Mapping[str, Any], kept_samples: int = 0) -> None:
    """Check that `folder` has no report but one of the same command on the same models, which may be replaced.

    Without a report, it must have no files of other origin under the names of ours.

    Args:
        kept_samples: number of images that the command keeps there, which may be more than it was; 0 if it keeps none.
    """
    if not (folder / JSON_FILE).exists():
        if taken := _taken(folder):
            raise DetailFlowError(f"{taken} is not of a report of ours: move it, or choose another folder")
        return
    try:
        provenance = load(folder)["provenance"]
    except DetailFlowError:
        raise DetailFlowError(
            f"{folder} has a {JSON_FILE} that is not a report of ours: choose another folder"
        ) from None
    before, count = str(provenance.get("command")), dict(flattened(provenance)).get("data.samples.images")
    goes_on = isinstance(count, int) and count < kept_samples and _without_count(before) == _without_count(command)
    if not (before == command or goes_on) or provenance.get("models") != _for_json(dict(models)):
        raise DetailFlowError(
            f"{folder} has the report of another evaluation ({before}): choose another folder, or remove {JSON_FILE}"
        )


def _taken(folder: Path) -> Path | None:
    """Return a file that a report would replace, if its text is not that of a report whose JSON file was removed."""
    markdown = folder / MARKDOWN_FILE
    if os.path.lexists(markdown):
        with reading(markdown):
            return None if ORIGIN in read_text(markdown, errors="replace") else markdown
    return next((path for name in PICTURES if os.path.lexists(path := folder / f"{name}.png")), None)


def _without_count(command: str) -> str:
    return re.sub(r" --num-samples[ =]\S+", "", command)


def load(path: Path) -> dict[str, Any]:
    """Load a report.json, given by its path or its folder's."""
    file = path / JSON_FILE if path.is_dir() else path
    if not file.exists():
        raise DetailFlowError(f"{path} has no report: give the output folder of an evaluation, or its {JSON_FILE}")
    content = read_json(file)
    kinds = {"sections": list, "provenance": dict, "kind": str, "title": str, "notes": list}
    if content.get("format") != FORMAT or not all(isinstance(content.get(key), kind) for key, kind in kinds.items()):
        raise DetailFlowError(f"{file} is not a report of an evaluation")
    texts = all(isinstance(note, str) for note in content["notes"])
    subjects = all(isinstance(content["provenance"].get(x, {}), dict) for x in ("data", "features", "preprocessing"))
    if not texts or not subjects or not all(map(_is_section, content["sections"])):
        raise DetailFlowError(
            f"{file} is damaged: its notes, sections or provenance are not as an evaluation writes them"
        )
    return content


def _is_section(section: Any) -> bool:
    """Return whether a section is as `Report.write` writes it."""
    try:
        for row in section["rows"]:
            for figure in row["figures"].values():
                float(figure["value"])
                if figure["spread"] is not None:
                    float(figure["spread"])
        return isinstance(section["title"], str) and all(isinstance(row["setting"], dict) for row in section["rows"])
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError):
        return False
