"""Settings: the same checks and sentences for values from Python, mappings and typed text."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from detailflow.errors import DetailFlowError
from detailflow.settings import (
    BatchSize,
    Location,
    NotNegative,
    PositiveInt,
    Settings,
    Share,
    checked,
    flat,
    list_settings,
    parse_settings,
)
from detailflow.words import unknown


@dataclass(frozen=True)
class Inner(Settings):
    """Nested settings.

    Attributes:
        depth, width: of the network; both
            over two lines.
    """

    depth: PositiveInt
    width: PositiveInt = 8


@dataclass(frozen=True)
class Outer(Settings):
    """Settings.

    Attributes:
        data: images.
        rate: a share.
    """

    data: Location
    inner: Inner
    rate: Share = 0.5
    weight: NotNegative | None = None
    form: Literal["png", "npz"] = "png"
    names: tuple[str, ...] = ()
    fast: bool = False


WHOLE = {"data": "x", "inner": {"depth": 2}}
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"rate": 2}, "rate must be 0 to 1, not 2.0"),
    ({"rate": float("nan")}, "rate must be 0 to 1, not nan"),
    ({"weight": "much"}, "weight must be 0 or more, not 'much'"),
    ({"inner": {"depth": 0}}, "inner.depth must be a positive integer, not 0"),
    ({"inner": {"depth": True}}, "inner.depth must be a positive integer, not True"),
    ({"inner.depth": 2**31}, "inner.depth must be at most 2,147,483,647, not 2147483648"),
    ({"inner": {"depth": 10**5000}}, "inner.depth must be at most 2,147,483,647, not a number of thousands of digits"),
    ({"inner": 3}, "inner must be settings, each as KEY: VALUE, not 3"),
    ({"form": "gif"}, "form must be png or npz, not 'gif'"),
    ({"names": "a"}, "names must be a list, such as [a, b], not 'a'"),
    ({"names": ["a", 3]}, "names must be a list in which each item is text, not 3"),
    ({"fast": "true"}, "fast must be true or false, not 'true'"),
    ({"data": None}, "data must be text, not None"),
    ({"inner": {"dpth": 2}}, "unknown setting 'inner.dpth': did you mean inner.depth?"),
    ({"depht": 2}, "unknown setting 'depht': did you mean inner.depth?"),
    (
        {"zzz": 2},
        "unknown setting 'zzz': the settings are data, rate, weight, form, names, fast, inner.depth, inner.width",
    ),
]


@pytest.mark.parametrize(("values", "message"), WRONG)
def test_mistakes(values: dict[str, Any], message: str):
    with pytest.raises(DetailFlowError) as error:
        parse_settings(Outer, {**WHOLE, **values}, "a.yaml")
    assert str(error.value) == f"a.yaml: {message}"


def test_python_gives_the_same_sentences():
    with pytest.raises(DetailFlowError, match="^rate must be 0 to 1, not 2.0$"):
        Outer("x", Inner(2), rate=2)
    with pytest.raises(DetailFlowError, match="^inner must be Inner, not None$"):
        Outer("x", None)  # type: ignore[arg-type]


def test_values_become_what_their_types_say(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", "/home/me")
    found = parse_settings(
        Outer, {"data": "~/x", "inner.depth": np.int64(3), "rate": 1, "weight": "1e-4", "names": ["a"]}
    )
    assert found == Outer("/home/me/x", Inner(3), rate=1.0, weight=1e-4, names=("a",))
    assert type(found.rate) is float and type(found.inner.depth) is int


@pytest.mark.parametrize("text", ["1e4", "1.5e4", "-1.e+4", ".5E-4"])
def test_numbers_that_are_text_in_yaml(text: str):
    assert checked("x", text, float) == float(text)


def test_what_is_missing():
    with pytest.raises(DetailFlowError, match=r"^settings are missing: data, inner\.depth \(here\)$"):
        parse_settings(Outer, {"rate": 0.1}, advice=" (here)")


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("3", PositiveInt, 3),
        ("3", str, "3"),
        ("1e-4", NotNegative, 1e-4),
        ("true", bool, True),
        ("null", float | None, None),
        ("null", str, "null"),
        ("[a, b]", tuple[str, ...], ("a", "b")),
        ("[]", tuple[str, ...], ()),
        ("[010, 8]", tuple[PositiveInt, ...], (10, 8)),
        ("off", PositiveInt | Literal["off"], "off"),
        ("a/b", Path, Path("a/b")),
    ],
)
def test_typed_text(text: str, kind: Any, value: Any):
    assert checked("--x", text, kind, text=True) == value


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ("3.5", PositiveInt, "--x must be a positive integer, not '3.5'"),
        ("2000000", BatchSize, "--x must be at most 1,000,000, not 2000000"),
        ("", Path, "--x must be a path, not ''"),
        ("", Location, "--x must be a path or a name, not ''"),
        ("yes", bool, "--x must be true or false, not 'yes'"),
        ("[a", tuple[str, ...], "--x must be a list, such as [a, b], not '[a'"),
        ("on", PositiveInt | Literal["off"], "--x must be a positive integer or off, not 'on'"),
    ],
)
def test_wrong_text(text: str, kind: Any, message: str):
    with pytest.raises(DetailFlowError) as error:
        checked("--x", text, kind, text=True)
    assert str(error.value) == message


def test_documentation_comes_from_docstrings():
    documentation = {setting.name: setting.documentation for setting in list_settings(Outer)}
    assert documentation["inner.width"] == documentation["inner.depth"] == "of the network; both over two lines."
    assert documentation["data"] == "images." and documentation["fast"] == ""


def test_small_parts():
    assert dict(flat({"a": {"b": 1, "c": {}}, "d": 2})) == {"a.b": 1, "a.c": {}, "d": 2}
    assert unknown("word", "catt", ["cat", "dog"], "no") == "unknown word 'catt': did you mean cat?"
    assert unknown("word", "zebra", ["cat", "dog"], "none") == "unknown word 'zebra': none"
