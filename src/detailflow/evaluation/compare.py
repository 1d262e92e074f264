"""Two reports side by side: what is the same, what differs, and whether their figures' spread explains it."""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from detailflow.errors import DetailFlowError
from detailflow.evaluation.report import cell, flattened, in_words, load, shared_settings, table, with_unit

ROUNDING = 1e-6  # relative, absolute below 1: another order of sums makes such differences
DEVIATIONS = 2  # a difference of so many standard deviations is called real
SPREAD = "The spread is each report's own: on the same images, or from the same seeds, smaller differences can be real."


def compare_reports(a: Path, b: Path) -> str:
    """Return the comparison of two report.json files, or their folders, as Markdown."""
    ours, theirs = load(a), load(b)
    if ours["kind"] != theirs["kind"]:
        raise DetailFlowError(
            f"{a} is a report of {ours['kind']} and {b} one of {theirs['kind']}: compare two of one kind"
        )
    lines = [f"A: {a}: {ours['title']}", f"B: {b}: {theirs['title']}", ""]
    for difference in _data_differences(ours["provenance"], theirs["provenance"]):
        lines.append(f"Warning: {difference}. So the figures do not mean quite the same.")
    for note in dict.fromkeys((*ours["notes"], *theirs["notes"])):
        who = [name for name, report in (("A", ours), ("B", theirs)) if note in report["notes"]]
        lines.append(f"{' and '.join(who)} {'say' if len(who) > 1 else 'says'}: {note}")
    lines += ["", "## Figures", "", *_figure_table(ours, theirs), "", SPREAD, ""]
    left, right = (dict(flattened(report["provenance"])) for report in (ours, theirs))
    same = [name for name in left if name in right and left[name] == right[name]]
    rows = [[name, cell(left.get(name)), cell(right.get(name))] for name in left | right if name not in same]
    lines += ["## What differs", "", *(table(["", "A", "B"], rows, right=False) if rows else ["nothing"])]
    return "\n".join([*lines, "", "## What is equal", "", ", ".join(same) or "nothing", ""])


def _data_differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Iterator[str]:
    """Yield what differs in the provenance and must not, if figures are to mean the same.

    Data with the same checksum is the same data.
    """
    left, right = (report.get("data", {}) for report in (ours, theirs))
    for name in left | right:
        a, b = ({"data": x} if not isinstance(x, Mapping) else x for x in (left.get(name, {}), right.get(name, {})))
        sums = [{key: value for key, value in x.items() if key.startswith("checksum")} for x in (a, b)]
        if a != b and (sums[0] != sums[1] or not sums[0]):
            mine, other = (
                ", ".join(f"{key} {value}" for key, value in x.items() if y.get(key) != value) or "not there"
                for x, y in ((a, b), (b, a))
            )
            yield f"the data ({name}) differs: {mine} in A, {other} in B"
    for subject in ("features", "preprocessing"):
        a, b = (dict(flattened(report.get(subject, {}))) for report in (ours, theirs))
        for name in a | b:
            if a.get(name) != b.get(name):
                yield f"{subject} ({name}) differ: {cell(a.get(name))} in A, {cell(b.get(name))} in B"


def _figure_table(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """Return the lines of a table with a row for each figure; settings that a section's rows share are below it."""
    figures = [
        {
            (section["title"], json.dumps(row["setting"], sort_keys=True), measure): figure
            for section in report["sections"]
            for row in section["rows"]
            for measure, figure in row["figures"].items()
        }
        for report in (ours, theirs)
    ]
    keys = list(figures[0] | figures[1])
    settings: dict[str, dict[str, Any]] = {}
    for title, setting, _ in keys:
        settings.setdefault(title, {})[setting] = json.loads(setting)
    common = {title: shared_settings(list(found.values())) for title, found in settings.items()}
    rows = []
    for title, setting, measure in keys:
        pair = [found.get((title, setting, measure)) for found in figures]
        words = ", ".join(in_words(settings[title][setting], common[title]))
        rows.append([title, words, with_unit(measure), *map(_text, pair), *_difference(*pair)])
    lines = table(["section", "setting", "measure", "A", "B", "B − A", ""], rows, right=False)
    for title, shared in common.items():
        lines += ["", f"{title}, in all rows: {', '.join(in_words(shared))}."] if shared else []
    return lines


def _difference(a: Mapping[str, Any] | None, b: Mapping[str, Any] | None) -> tuple[str, str]:
    """Return the difference of two figures, and what their spread says about it."""
    if a is None or b is None:
        return "–", f"only in {'B' if a is None else 'A'}"
    if a["value"] == b["value"]:
        return "0", "equal"
    difference = float(b["value"]) - float(a["value"])
    text = f"{difference:+.4g}"
    if math.isfinite(difference) and abs(difference) <= ROUNDING * max(abs(float(a["value"])), 1):
        return text, "equal but for rounding"
    if a["spread"] is None and b["spread"] is None:
        return text, "no spread is known"
    deviation = math.hypot(*(float(figure["spread"] or 0) for figure in (a, b)))
    verdict = f"{'within' if abs(difference) <= DEVIATIONS * deviation else 'beyond'} the spread"
    return text, verdict + (f" ({abs(difference) / deviation:.1f} deviations)" if deviation else "")


def _text(figure: Mapping[str, Any] | None) -> str:
    if figure is None:
        return "–"
    spread = "" if figure["spread"] is None else f" ± {float(figure['spread']):.5g}"
    return f"{float(figure['value']):.5g}{spread}"
