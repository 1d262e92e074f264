"""Two reports side by side: what they have in common, what differs, and whether their figures' spread explains that."""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from detailflow.errors import DetailFlowError
from detailflow.evaluation.report import checksums, flattened, in_words, load, shared_settings, table, with_unit

NEEDED = (
    "features",
    "preprocessing",
)  # of the provenance: where these differ, figures mean different things; so does "data"
ROUNDING = 1e-6  # as a share, or of what is below 1 itself: another order of sums makes such differences
DEVIATIONS = 2  # a difference of so many standard deviations is called real

Figures = dict[tuple[str, str, str], Mapping[str, Any]]  # section, setting, measure → figure


def compare_reports(a: Path, b: Path) -> str:
    """The comparison as Markdown.

    Args:
        a, b: report.json files or their folders.

    Raises:
        DetailFlowError: if one cannot be read or they are of different kinds.
    """
    ours, theirs = load(a), load(b)
    if ours["kind"] != theirs["kind"]:
        raise DetailFlowError(
            f"{a} is a report of {ours['kind']} and {b} one of {theirs['kind']}: compare two of one kind"
        )
    lines = [f"A: {a}: {ours['title']}", f"B: {b}: {theirs['title']}", ""]
    left, right = (dict(flattened(report["provenance"])) for report in (ours, theirs))
    for difference in different_meaning(ours["provenance"], theirs["provenance"]):
        lines.append(f"Warning: {difference}. So the figures do not mean quite the same.")
    said = [report.get("notes", []) for report in (ours, theirs)]
    for note in dict.fromkeys((*said[0], *said[1])):
        who = [name for name, notes in zip("AB", said, strict=True) if note in notes]
        lines.append(f"{' and '.join(who)} {'say' if len(who) > 1 else 'says'}: {note}")
    lines += ["", "## Figures", "", *_figure_table(figures(ours), figures(theirs)), ""]
    lines += [
        "The spread is each report's own: on the same images, or from the same seeds, smaller differences can be real.",
        "",
    ]
    same = [name for name in left if name in right and left[name] == right[name]]
    differing = [name for name in dict.fromkeys((*left, *right)) if name not in same]
    lines += ["## What differs", ""]
    lines += table(["", "A", "B"], [[name, _text(left, name), _text(right, name)] for name in differing], right=False)
    lines += ["", "## What is equal", "", ", ".join(same) or "nothing", ""]
    return "\n".join(lines)


def different_meaning(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Iterator[str]:
    """Of two provenances: what differs and must not, if figures are to be compared. Data of one checksum is the same data."""
    left, right = (report.get("data", {}) for report in (ours, theirs))
    for name in dict.fromkeys((*left, *right)):
        a, b = (
            entry if isinstance(entry, Mapping) else {"data": entry}
            for entry in (left.get(name, {}), right.get(name, {}))
        )
        if a != b and (checksums(a) != checksums(b) or not checksums(a)):
            yield f"the data ({name}) differs: {_brief(a, b)} in A, {_brief(b, a)} in B"
    for subject in NEEDED:
        a, b = (dict(flattened(report.get(subject, {}))) for report in (ours, theirs))
        for name in dict.fromkeys((*a, *b)):
            if a.get(name) != b.get(name):
                yield f"{subject} ({name}) differ: {_text(a, name)} in A, {_text(b, name)} in B"


def _brief(entry: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """What an entry says otherwise than another."""
    return ", ".join(f"{key} {value}" for key, value in entry.items() if other.get(key) != value) or "not there"


def figures(report: Mapping[str, Any]) -> Figures:
    """All figures of a report by what they are of."""
    return {
        (section["title"], json.dumps(row["setting"], sort_keys=True), measure): figure
        for section in report["sections"]
        for row in section["rows"]
        for measure, figure in row["figures"].items()
    }


def _figure_table(left: Figures, right: Figures) -> list[str]:
    """A row for each figure; what is the same in all settings of a section stands below the table, not in it."""
    keys = list(dict.fromkeys((*left, *right)))
    settings: dict[str, dict[str, dict[str, Any]]] = {}
    for section, setting, _ in keys:
        settings.setdefault(section, {})[setting] = json.loads(setting)
    common = {section: shared_settings(list(found.values())) for section, found in settings.items()}
    rows = []
    for key in keys:
        section, setting, measure = key
        cells = [section, ", ".join(in_words(settings[section][setting], common[section])), with_unit(measure)]
        if key in left and key in right:
            rows.append([*cells, *_side_by_side(left[key], right[key])])
        else:
            only = [_with_spread(side[key]) if key in side else "–" for side in (left, right)]
            rows.append([*cells, *only, "–", f"only in {'A' if key in left else 'B'}"])
    lines = table(["section", "setting", "measure", "A", "B", "B − A", ""], rows, right=False)
    for section, shared in common.items():
        if shared:
            lines += ["", f"{section}, in all rows: {', '.join(in_words(shared))}."]
    return lines


def _side_by_side(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Both figures, their difference, and what the spread says of it."""
    difference = float(b["value"]) - float(a["value"])
    if a["value"] == b["value"]:
        verdict = "equal"
    elif math.isfinite(difference) and abs(difference) <= ROUNDING * max(abs(float(a["value"])), 1):
        verdict = "equal but for rounding"
    elif a["spread"] is None and b["spread"] is None:
        verdict = "no spread is known"
    else:
        deviation = math.hypot(*(float(figure["spread"] or 0) for figure in (a, b)))
        within = abs(difference) <= DEVIATIONS * deviation
        verdict = f"{'within' if within else 'beyond'} the spread"
        verdict += "" if not deviation else f" ({abs(difference) / deviation:.1f} deviations)"
    return [_with_spread(a), _with_spread(b), "0" if verdict == "equal" else f"{difference:+.4g}", verdict]


def _with_spread(figure: Mapping[str, Any]) -> str:
    spread = "" if figure["spread"] is None else f" ± {_number(figure['spread'])}"
    return f"{_number(figure['value'])}{spread}"


def _number(value: Any) -> str:
    return f"{float(value):.5g}"


def _text(values: Mapping[str, Any], name: str) -> str:
    return str(values.get(name, "–")).replace("|", "\\|")
