"""Numbers, names and lists as messages and pages say them."""

import re
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

# Control characters, which a terminal would obey, and those that change the direction of text.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_SURROGATES = re.compile("[\ud800-\udfff]")


def several(number: int, word: str) -> str:
    """Return "1 crop", "2,000 crops" or "3 classes"."""
    return f"{number:,} {word}" + ("" if number == 1 else "es" if word.endswith("s") else "s")


def listed(names: Iterable[Any]) -> str:
    """Return "a, b or c"."""
    *others, last = map(str, names)
    return f"{', '.join(others)} or {last}" if others else last


def some_names(names: set[str]) -> str:
    """Return the first few of many names, for a message."""
    first = sorted(names)[:3]
    return ", ".join(first) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def shown(value: object, limit: int = 100) -> str:
    """Return the beginning of a value as Python prints it, on one line."""
    try:
        text = " ".join(repr(value).split())
    except ValueError:  # Python prints no integer of thousands of digits
        return "a number of thousands of digits"
    return text if len(text) <= limit else f"{text[:limit]}…"


def also(instead: str) -> str:
    """Return what else would help, if anything, as the end of a sentence."""
    return f", {instead}" if instead else ""


def unknown(what: str, word: str, known: Iterable[str], otherwise: str) -> str:
    """Return the sentence for a word that is none of those known: the closest of them, or what to do `otherwise`."""
    known = list(known)
    by_name = {name.strip("-"): name for name in known}
    parts = {name.rpartition(".")[2]: name for name in reversed(by_name)}  # loop.steps is found by steps, too
    close = get_close_matches(word.strip("-"), [*by_name, *(part for part in parts if part not in by_name)], n=1)
    if alike := [name for name in by_name.values() if name.endswith(f"-{word.strip('-')}")]:
        return f"unknown {what} {word!r}: did you mean {listed(alike)}?"
    if not close:
        return f"unknown {what} {word!r}: {otherwise}"
    return f"unknown {what} {word!r}: did you mean {by_name.get(close[0]) or by_name[parts[close[0]]]}?"


def printable(name: str) -> str:
    """Return a name that is safe to print.

    Bytes that are not UTF-8 become the replacement character, control characters their escape sequence, such as \\x1b.
    """
    name = _SURROGATES.sub("\N{REPLACEMENT CHARACTER}", name)
    return _CONTROLS.sub(_escaped, name)


def one_line(text: str) -> str:
    """Return what `printable` does, with newlines and tabs escaped, too: a line of a table."""
    return re.sub("[\n\t]", _escaped, printable(text))


def _escaped(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
