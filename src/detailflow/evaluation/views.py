"""The ways in which a tokenizer's reconstructions are looked at: numbers of tokens, sides, and places of planted mistakes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from detailflow.errors import DetailFlowError
from detailflow.pipeline import stage_counts
from detailflow.schedule import TokenSchedule


@dataclass(frozen=True)
class Span:
    """Tokens from `start` to before `end`, that are wrong together."""

    start: int
    end: int

    def __str__(self) -> str:
        return str(self.start) if self.end == self.start + 1 else f"{self.start}–{self.end - 1}"


@dataclass(frozen=True)
class View:
    """One way to rebuild an image: from its first n tokens at `side`, of a sequence that may have mistakes."""

    setting: dict[str, Any]
    n: int
    side: int
    span: Span | None = None
    corrected: bool = False
    by_count: bool = True  # whether it belongs to the table by number of tokens, or to that of mistakes


def views_by_count(schedule: TokenSchedule, counts: Sequence[int] | None, sides: Sequence[int] | None) -> list[View]:
    """Every count of tokens at every side; `None` is 1, 2, 4, … N tokens, and D(n).

    Raises:
        DetailFlowError: for counts or sides that are not valid.
    """
    for side in sides or ():
        if side < 1 or side % schedule.patch_size:
            raise DetailFlowError(
                f"the side of a picture must be a positive multiple of {schedule.patch_size}, not {side}"
            )
    numbers = stage_counts(schedule) if counts is None else sorted({schedule.check_count(n) for n in counts})
    pairs = [(n, side) for n in numbers for side in dict.fromkeys(sides or (schedule.decode_size(n),))]
    return [View({"tokens": n, "side": side}, n, side) for n, side in pairs]


def views_with_mistakes(schedule: TokenSchedule, mistakes: Sequence[Span]) -> list[View]:
    """Whole pictures: one without mistakes, then two for each place of them."""
    n, side = schedule.num_tokens, schedule.image_size
    result = (
        [View({"mistakes in tokens": "none", "later tokens": "clean"}, n, side, by_count=False)] if mistakes else []
    )
    for span in mistakes:
        for corrected, text in ((False, "clean"), (True, "corrected")):
            result.append(
                View({"mistakes in tokens": str(span), "later tokens": text}, n, side, span, corrected, False)
            )
    return result


def parse_spans(schedule: TokenSchedule, words: Sequence[str]) -> list[Span]:
    """Where mistakes go: "12" is what is decoded in one step with token 12, "g3" the whole group 3 (from 0 on), and "all" each
    group that others follow.

    Raises:
        DetailFlowError: for anything else.
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
                f"mistakes can be planted at token 0 to {total - 1}, in group g0 to g{total // size - 1}, or all, not {word!r}"
            )
    return sorted(set(spans), key=lambda span: (span.start, span.end))
