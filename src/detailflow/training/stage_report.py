"""The report that each stage of training leaves in its folder, report.md: figures, curves, pictures and the command."""

import io
import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from PIL import Image

from detailflow.files import writing
from detailflow.pictures import write_png
from detailflow.training.tracking import Record
from detailflow.words import printable

REPORT_FILE, CURVES_FILE = "report.md", "curves.png"
ACROSS = 3  # panels of the curves
TITLES = {"tokenizer": "tokenizer", "gpt": "AR model"}
CAPTIONS = {
    "reconstructions": "{images} spread over the data, and their reconstructions from more and more tokens",
    "mistakes": "The same with planted mistakes, and with the tokens after them corrected",
    "samples": "Samples, a row for each of some classes spread over all",
}


def command_line() -> str | None:
    """Return the command that started this process; `None` if that was a program of somebody's own."""
    program = Path(sys.argv[0])
    if program.name != "detailflow" and program.parts[-2:] != ("detailflow", "__main__.py"):
        return None
    return printable(shlex.join(["detailflow", *sys.argv[1:]]))


def write_report(
    output: Path,
    kind: str,
    facts: Sequence[str],
    history: Sequence[Record],
    pictures: Mapping[str, Image.Image],
    held_out: bool = False,
) -> None:
    """Write report.md, its curves and its pictures.

    Args:
        facts: sentences on the run, such as which step was exported.
        held_out: whether the images that are shown were held out.
    """
    images = "Held-out images" if held_out else "Training images"
    lines = [f"# Training report: {TITLES.get(kind, kind)}", "", *(f"- {fact}" for fact in facts), ""]
    if _names(history):
        lines += ["## Figures", "", *_table(history), ""]
        if find_spec("matplotlib") is not None:
            draw_curves(history, output / CURVES_FILE)
            lines += ["## Curves", "", f"![Curves]({CURVES_FILE})", ""]
    for name, picture in pictures.items():
        write_png(picture, output / f"{name}.png")
        lines += [
            f"## {name.capitalize()}",
            "",
            f"![{name}]({name}.png)",
            "",
            CAPTIONS.get(name, "").format(images=images),
            "",
        ]
    lines += [
        "## Settings",
        "",
        "All settings are in [run.yaml](run.yaml), all logged values in [log.jsonl](log.jsonl).",
    ]
    if command := command_line():
        lines += ["", "```sh", command, "```"]
    with writing(output / REPORT_FILE) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _table(history: Sequence[Record]) -> list[str]:
    """Return the last value of each figure, and the best ones of validation."""
    rows = ["| figure | last | lowest | highest |", "|---|---:|---:|---:|"]
    for name in _names(history):
        values = [record[name] for record in history if name in record]
        rows.append(f"| {name} | {values[-1]:.4g} | {min(values):.4g} | {max(values):.4g} |")
    return rows


def _names(history: Sequence[Record]) -> list[str]:
    return [name for name in dict.fromkeys(key for record in history for key in record) if name != "step"]


def draw_curves(history: Sequence[Record], path: Path) -> None:
    """Draw a panel for each figure over the steps; a figure of validation shares the panel of its training figure."""
    from matplotlib.figure import Figure

    names = [name for name in _names(history) if not name.startswith("val_") or name[4:] not in _names(history)]
    rows = math.ceil(len(names) / ACROSS)
    figure = Figure(figsize=(4 * ACROSS, 2.6 * rows), layout="constrained")
    panels: Any = figure.subplots(rows, ACROSS, squeeze=False)
    for axes in panels.flat[len(names) :]:
        axes.set_axis_off()
    for axes, name in zip(panels.flat, names, strict=False):
        _draw_panel(axes, history, name)
    with writing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)


def curve_png(history: Sequence[Record], name: str, ink: str) -> bytes:
    """Return a transparent PNG of one figure over the steps, with that of validation, in a colour of lines and text."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    colors: Any = dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), ink)
    with rc_context(colors | {"legend.framealpha": 0.0}):
        figure, picture = Figure(figsize=(4, 2.6), layout="constrained"), io.BytesIO()
        axes = figure.subplots()
        _draw_panel(axes, history, name)
        axes.set(title="", xlabel="step")
        figure.savefig(picture, format="png", dpi=180, transparent=True)
    return picture.getvalue()


def _draw_panel(axes: Any, history: Sequence[Record], name: str) -> None:
    for curve in (name, f"val_{name}"):
        points = [(record["step"], record[curve]) for record in history if curve in record]
        if points:
            marker = "." if curve != name or len(points) == 1 else None  # a line of one point is not seen
            axes.plot(*zip(*points, strict=True), label="validation" if curve != name else "training", marker=marker)
    if any(f"val_{name}" in record for record in history):
        axes.legend()
    axes.set_title(name, fontsize=10, parse_math=False)
