"""What an evaluation leaves behind: figures with their spread, plots, and what they were computed from, as JSON and Markdown."""

import json
import math
import platform
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from detailflow import hub
from detailflow.errors import DetailFlowError, missing_package, printable
from detailflow.files import read_json, replacing
from detailflow.machine import device_name
from detailflow.published import Kind

JSON_FILE, MARKDOWN_FILE = "report.json", "report.md"
FORMAT = "detailflow-report"
PACKAGES = (
    "torch",
    "torchvision",
    "torchmetrics",
    "torch-fidelity",
    "timm",
    "numpy",
    "pillow",
)  # that figures depend on
DIGITS = {
    "PSNR": 3,
    "gain of PSNR": 3,
    **dict.fromkeys(("SSIM", "LPIPS", "precision", "recall", "recognised", "usage"), 4),
}
SIGNIFICANT = 4  # digits of other measures
ACROSS = 3  # panels of a plot
UNITS = {"PSNR": "dB", "gain of PSNR": "dB"}


@dataclass(frozen=True)
class Figure:
    """A measured number; `spread` is one standard deviation of it, over what the section's note says, `None` where unknown."""

    value: float
    spread: float | None = None
    values: tuple[float, ...] = ()  # of each seed, where there are several

    def text(self, measure: str) -> str:
        """With as many digits as the measure deserves."""
        large = self.value and math.isfinite(self.value)
        digits = DIGITS.get(measure, max(0, SIGNIFICANT - 1 - math.floor(math.log10(abs(self.value))) if large else 3))
        spread = "" if self.spread is None else f" ± {self.spread:.{digits}f}"
        return f"{self.value:.{digits}f}{spread}"


@dataclass(frozen=True)
class Row:
    """The figures of one setting, such as {"tokens": 16, "side": 48}; names are those of the table's columns."""

    setting: Mapping[str, Any]
    figures: Mapping[str, Figure]


@dataclass(frozen=True)
class Section:
    """A table, and what its figures and their spread mean."""

    title: str
    rows: Sequence[Row]
    note: str = ""


Point = tuple[float | None, Figure]  # x and y; without an x it is a level line


def place(point: Point) -> float:
    """By which points are sorted."""
    return point[0] or 0.0


@dataclass(frozen=True)
class Panel:
    """One pair of axes with curves by name."""

    x: str
    measure: str
    curves: Mapping[str, Sequence[Point]]
    log_x: bool = False


@dataclass(frozen=True)
class Plot:
    """Panels, up to `ACROSS` side by side, in the file `name`.png."""

    name: str
    caption: str
    panels: Sequence[Panel]


@dataclass(frozen=True)
class Picture:
    """An image in the file `name`.png."""

    name: str
    caption: str
    image: Image.Image


@dataclass(frozen=True)
class Report:
    """The result of one evaluation.

    Args:
        kind: "tokenizer", "gpt" or "samples"; only reports of one kind can be compared.
        provenance: what the figures were computed from, nested by subject. Under "data", "features" and "preprocessing" stands
            all that must be the same for two reports' figures to mean the same.
        notes: what a reader should know first: what was left out, and why.
        published: figures of others to put beside these, as `published.quotes` returns them.
    """

    kind: str
    title: str
    sections: Sequence[Section]
    provenance: Mapping[str, Any]
    plots: Sequence[Plot] = ()
    pictures: Sequence[Picture] = ()
    notes: Sequence[str] = ()
    published: Sequence[Mapping[str, Any]] = ()

    def as_dict(self) -> dict[str, Any]:
        """For JSON, without plots and pictures; numbers that are not finite are strings."""
        parts: dict[str, Any] = dict(
            format=FORMAT,
            kind=self.kind,
            title=self.title,
            notes=list(self.notes),
            sections=[asdict(section) for section in self.sections],
            published=[dict(quote) for quote in self.published],
            provenance=dict(self.provenance),
        )
        return _finite(parts)

    def write(self, folder: Path) -> None:
        """Write report.json, report.md and the PNG files to `folder`: each whole or not at all, the JSON file last.

        Raises:
            DetailFlowError: if that fails.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with ExitStack() as stack:  # which puts the files in place in the opposite order, once all are written
                path = stack.enter_context(replacing(folder / JSON_FILE))
                path.write_text(
                    printable(json.dumps(self.as_dict(), indent=1, ensure_ascii=False)) + "\n", encoding="utf-8"
                )
                path = stack.enter_context(replacing(folder / MARKDOWN_FILE))
                path.write_text(printable(self.markdown()), encoding="utf-8")
                for plot in self.plots:
                    draw(plot, stack.enter_context(replacing(folder / f"{plot.name}.png")))
                for picture in self.pictures:
                    picture.image.save(stack.enter_context(replacing(folder / f"{picture.name}.png")), format="PNG")
        except OSError as error:
            raise DetailFlowError(f"cannot write the report to {folder}: {error.strerror or error}") from error

    def markdown(self) -> str:
        """The report to read."""
        lines = [f"# {self.title}", ""]
        for note in self.notes:
            lines += [note, ""]
        for section in self.sections:
            lines += [f"## {section.title}", "", *section_table(section), ""]
            lines += [section.note, ""] if section.note else []
        captions = {p.name: p.caption for p in self.plots} | {p.name: p.caption for p in self.pictures}
        for name, caption in captions.items():
            lines += [f"![{caption}]({name}.png)", ""]
        if self.published:
            lines += ["## Published figures beside ours", "", *_quote_table(self.published), ""]
        lines += ["## What this was computed from", ""]
        known = flattened(_finite(dict(self.provenance)))
        lines += table(["", ""], [[name, cell(value)] for name, value in known], right=False)
        return "\n".join(lines) + "\n"


# --- tables --------------------------------------------------------------------------------------------------------------


def table(header: Sequence[str], rows: Sequence[Sequence[str]], right: bool = True) -> list[str]:
    """Lines of a Markdown table; `right` sets all columns but the first flush right."""
    marks = ["---"] + ["---:" if right else "---"] * (len(header) - 1)
    return [f"| {' | '.join(line)} |" for line in (header, marks, *rows)]


def section_table(section: Section) -> list[str]:
    """Lines: what is the same in all of several rows stands below the table, not in it."""
    settings = list(dict.fromkeys(key for row in section.rows for key in row.setting))
    common = shared_settings([row.setting for row in section.rows])
    shown = [key for key in settings if key not in common]
    measures = list(dict.fromkeys(key for row in section.rows for key in row.figures))
    cells = [
        [
            *(cell(row.setting.get(key, "")) for key in shown),
            *(row.figures[m].text(m) if m in row.figures else "–" for m in measures),
        ]
        for row in section.rows
    ]
    lines = table([*shown, *map(with_unit, measures)], cells)
    if common:
        lines += ["", f"In all rows: {', '.join(in_words(common))}."]
    return lines


def shared_settings(settings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What is the same in all of several rows."""
    return {k: v for k, v in settings[0].items() if len(settings) > 1 and all(other.get(k) == v for other in settings)}


def in_words(setting: Mapping[str, Any], but: Container[str] = ()) -> list[str]:
    """What a setting says, such as "guidance 2", without the names in `but`."""
    return [f"{key} {cell(value)}" for key, value in setting.items() if key not in but]


def checksums(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Of the provenance's entry of some data: what tells whether it is the same."""
    return {key: value for key, value in entry.items() if key.startswith("checksum")}


def _quote_table(quotes: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines: a published figure in each row, ours beside it, and where it is from."""
    header = ["measure", "ours", "published", "conditions"]
    return table(
        header, [[str(q["measure"]), cell(q["ours"]), cell(q["published"]), str(q["conditions"])] for q in quotes]
    )


def with_unit(measure: str) -> str:
    """As a column's or an axis's title."""
    return f"{measure}, {UNITS[measure]}" if measure in UNITS else measure


def cell(value: Any) -> str:
    """A value as it stands in a table."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:g}"
    return str(value).replace("|", "\\|").replace("\n", " ")


def flattened(nested: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of everything in nested mappings."""
    for key, value in nested.items():
        if isinstance(value, Mapping):
            yield from flattened(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _finite(value: Any) -> Any:
    """JSON has no infinity: such numbers become strings, which float() reads."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


# --- plots ---------------------------------------------------------------------------------------------------------------


def draw(plot: Plot, path: Path) -> None:
    """Draw the panels into a PNG file."""
    from matplotlib.figure import Figure as Canvas

    rows = -(-len(plot.panels) // ACROSS)
    columns = -(-len(plot.panels) // rows)
    canvas = Canvas(figsize=(4.6 * columns, 3.4 * rows), layout="constrained")
    axes = list(canvas.subplots(rows, columns, squeeze=False).flat)
    explained: set[tuple[str, ...]] = set()
    for axis, panel in zip(axes, plot.panels, strict=False):
        for name, points in panel.curves.items():
            levels = [figure.value for x, figure in points if x is None]
            places = [(x, figure) for x, figure in points if x is not None]
            for level in levels:
                axis.axhline(level, label=name, color="0.4", linestyle="--", linewidth=1)
            if places:
                values = [figure.value for _, figure in places]
                spread = [figure.spread or 0.0 for _, figure in places]
                axis.errorbar(
                    [x for x, _ in places], values, yerr=spread, label=name, marker="o", markersize=3, capsize=2
                )
        if panel.log_x:
            axis.set_xscale("log", base=2)
            ticks = sorted({x for points in panel.curves.values() for x, _ in points if x is not None})
            axis.set_xticks(ticks, [f"{x:g}" for x in ticks])
            axis.minorticks_off()
        else:
            axis.locator_params(axis="x", nbins=6)  # more run together
        axis.set(xlabel=panel.x, ylabel=with_unit(panel.measure))
        axis.grid(alpha=0.3)
        if len(panel.curves) > 1 and tuple(panel.curves) not in explained:
            axis.legend(fontsize="small")
            explained.add(tuple(panel.curves))
    for axis in axes[len(plot.panels) :]:
        axis.set_axis_off()
    canvas.savefig(path, format="png", dpi=110)


# --- what was it computed from -------------------------------------------------------------------------------------------


def check_packages(*names: str) -> None:
    """Check, before long work, that what it will need is installed.

    Raises:
        DetailFlowError: if not.
    """
    for name in names:
        if find_spec(name) is None:
            raise missing_package("evaluation", name)


def versions() -> dict[str, str]:
    """Of the libraries that figures depend on, those that are installed."""
    from detailflow import __version__

    found = {"detailflow": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def circumstances(device: torch.device, world_size: int, dtype: str | None) -> dict[str, Any]:
    """On what an evaluation ran, for its provenance."""
    place = {"device": device_name(device), "processes": world_size, "threads": torch.get_num_threads()}
    return {"machine": place | ({"dtype": dtype} if dtype else {}), "versions": versions()}


def model_entry(source: str | None, kind: Kind) -> dict[str, str]:
    """A model's name as the user gave it (`None` is the shipped one), and the fingerprint of its config and its weights.

    Raises:
        DetailFlowError: if it cannot be loaded.
    """
    found = hub.load(source or hub.default_directory(kind), kind)
    return {"name": source or "the shipped model", "fingerprint": hub.fingerprint(*found)}


def claim(folder: Path, command: str, models: Mapping[str, Any]) -> None:
    """Check that no report of another evaluation lies in `folder`; the same command on the same models may replace its own.

    Raises:
        DetailFlowError: if one does.
    """
    if not (folder / JSON_FILE).exists():
        return
    try:
        provenance = load(folder)["provenance"]
    except DetailFlowError:
        raise DetailFlowError(
            f"{folder} holds a {JSON_FILE} that is no report of ours: choose another folder"
        ) from None
    if provenance.get("command") != command or provenance.get("models") != _finite(dict(models)):
        raise DetailFlowError(
            f"{folder} holds the report of another evaluation ({provenance.get('command')}): choose another folder, or remove it"
        )


def load(path: Path) -> dict[str, Any]:
    """The content of a report.json, given by its path or its folder's.

    Raises:
        DetailFlowError: if it cannot be read or is no report.
    """
    file = path / JSON_FILE if path.is_dir() else path
    if not file.exists():
        raise DetailFlowError(f"{path} holds no report: give the output folder of an evaluation, or its {JSON_FILE}")
    content = read_json(file)
    if content.get("format") != FORMAT or not all(
        isinstance(content.get(key), kind)
        for key, kind in (("sections", list), ("provenance", dict), ("kind", str), ("title", str), ("notes", list))
    ):
        raise DetailFlowError(f"{file} is no report of an evaluation")
    subjects = (content["provenance"].get(subject, {}) for subject in ("data", "features", "preprocessing"))
    sound = all(isinstance(note, str) for note in content["notes"]) and all(
        isinstance(subject, dict) for subject in subjects
    )
    if not sound or not all(map(_is_section, content["sections"])):
        raise DetailFlowError(
            f"{file} is damaged: its notes, sections or provenance are not as an evaluation writes them"
        )
    return content


def _is_section(section: Any) -> bool:
    """Whether a section is as `Report.write` has it: a title and rows of a setting and figures, each a value and its spread."""
    try:
        rows = section["rows"]
        figures = [figure for row in rows for figure in row["figures"].values()]
        numbers = [
            float(number) for figure in figures for number in (figure["value"], figure["spread"]) if number is not None
        ]
        named = isinstance(section["title"], str) and all(isinstance(row["setting"], dict) for row in rows)
        return named and all(figure["value"] is not None for figure in figures) and len(numbers) >= len(figures)
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError):
        return False
