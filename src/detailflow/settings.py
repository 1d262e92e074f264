"""Settings: dataclasses whose field types say what is valid, checked here wherever a value comes from.

Python, YAML files, checkpoints and the command line all go through `checked`, so a mistake gives the same sentence.
"""

import inspect
import operator
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from numbers import Integral, Real
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from detailflow.errors import DetailFlowError, MissingPackageError
from detailflow.words import listed, shown, unknown

Config = TypeVar("Config")


class Must(NamedTuple):
    """A condition in `Annotated[type, Must(…)]`; `what` completes the sentence "NAME must be …"."""

    what: str
    holds: Callable[[Any], bool]


def at_most(most: int) -> Must:
    """Return the condition that a number is not larger."""
    return Must(f"at most {most:,}", lambda value: value <= most)


_POSITIVE = Must("a positive integer", lambda value: value >= 1)
_HOME = "a path, in which ~ is the home folder"
PositiveInt = Annotated[int, _POSITIVE, at_most(2**31 - 1)]
BatchSize = Annotated[int, _POSITIVE, at_most(10**6)]
Depth = Annotated[int, _POSITIVE, at_most(1000)]
Workers = Annotated[int, Must("0 or more", lambda value: value >= 0), at_most(1000)]
NotNegativeInt = Annotated[int, Must("0 or more", lambda value: value >= 0)]
_FINITE = Must("finite", lambda value: value < float("inf"))
NotNegative = Annotated[float, Must("0 or more", lambda value: value >= 0), _FINITE]
Positive = Annotated[float, Must("above 0", lambda value: value > 0), _FINITE]
Share = Annotated[float, Must("0 to 1", lambda value: 0 <= value <= 1)]
ShareBelowOne = Annotated[float, Must("at least 0 and below 1", lambda value: 0 <= value < 1)]
Seed = Annotated[int, Must("0 to 2^64 - 1", lambda value: 0 <= value < 2**64)]
Location = Annotated[str, _HOME]  # a path or a name


class Setting(NamedTuple):
    """A field of a settings class; nested ones have dotted names, such as loop.steps. `default` may be `MISSING`."""

    name: str
    type: Any
    default: Any
    documentation: str


class Settings:
    """Base of the settings classes: checks every field by its type."""

    def __post_init__(self) -> None:
        for name, kind in field_types(cast(Any, type(self))).items():
            object.__setattr__(self, name, checked(name, getattr(self, name), kind))


def parse_settings(kind: type[Config], values: Mapping[str, Any], source: object = "", advice: str = "") -> Config:
    """Return a settings class made from plain values; nested ones may be mappings or have dotted names.

    Args:
        source: what errors begin with, such as a file's name.
        advice: what the error about missing settings ends with.
    """
    with named(source):
        found = check_settings(kind, dict(flat(values)))
        missing = [s.name for s in list_settings(kind) if s.default is MISSING and s.name not in found]
        if missing:
            raise DetailFlowError(f"settings are missing: {', '.join(missing)}{advice}")
        return _build(kind, found, "")


@contextmanager
def named(source: object) -> Iterator[None]:
    """Begin errors with what is wrong, such as a file's name; not those of missing packages, which it cannot help."""
    try:
        yield
    except MissingPackageError:
        raise
    except DetailFlowError as error:
        raise DetailFlowError(f"{source}: {error}" if source else error) from None


def check_settings(kind: type[Config], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return some of a class's settings, by dotted names, as their types have them; others may be missing."""
    known, found = {setting.name: setting for setting in list_settings(kind)}, {}
    for name, value in values.items():
        if any(key.startswith(f"{name}.") for key in known):
            raise DetailFlowError(f"{name} must be settings, each as KEY: VALUE, not {shown(value)}")
        if name not in known:
            more = ", …" if len(known) > 12 else ""
            first = sorted(known, key=lambda key: (key.startswith("loop."), "." in key))
            some = f"the settings are {', '.join(first[:12])}{more}"
            raise DetailFlowError(unknown("setting", name, known, some))
        found[name] = checked(name, value, known[name].type)
    return found


def _build(kind: type[Config], given: Mapping[str, Any], prefix: str) -> Config:
    arguments = {}
    for field, hint in field_types(cast(Any, kind)).items():
        name = prefix + field
        if name in given:
            arguments[field] = given[name]
        elif is_dataclass(hint) and any(key.startswith(f"{name}.") for key in given):
            arguments[field] = _build(hint, given, f"{name}.")  # type: ignore[arg-type]
    return kind(**arguments)


def flat(values: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted name, value) of every setting in nested ones."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def list_settings(kind: Any, prefix: str = "") -> Iterator[Setting]:
    """Yield every setting of a class, nested ones included."""
    hints, documentation = field_types(kind), _documentation(kind)
    for field in fields(kind):
        if is_dataclass(hints[field.name]):
            yield from list_settings(hints[field.name], f"{prefix}{field.name}.")
        else:
            yield Setting(prefix + field.name, hints[field.name], field.default, documentation.get(field.name, ""))


@cache
def field_types(kind: Any) -> dict[str, Any]:
    """Return the type of each field, with its conditions."""
    hints = get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in fields(kind)}


def _documentation(kind: Any) -> dict[str, str]:
    """Return what the "Attributes:" parts of the docstrings of a class and its bases say of each field."""
    result: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        _, _, block = inspect.cleandoc(base.__doc__ or "").partition("Attributes:\n")
        for names, text in re.findall(r"^    ([\w, ]+): ((?:.|\n {8})*)", block.partition("\n\n")[0], re.MULTILINE):
            result |= dict.fromkeys(names.split(", "), " ".join(text.split()))
    return result


def require(kind: Any, **values: Any) -> None:
    """Raise a `DetailFlowError` that names the first value which is not of this type."""
    for name, value in values.items():
        checked(name, value, kind)


def checked(name: str, value: Any, kind: Any, text: bool = False) -> Any:
    """Return `value` as `kind` has it, or raise a `DetailFlowError` that says what `name` must be.

    Args:
        text: whether it was typed on the command line, so that numbers and lists are text.
    """
    try:
        return _convert(value, kind, text)
    except _InvalidError as error:
        raise DetailFlowError(f"{name} must be {error.what}, not {shown(error.value)}") from None


class _InvalidError(Exception):
    """`value` is not `what` it must be."""

    def __init__(self, what: str, value: Any) -> None:
        super().__init__(what)
        self.what, self.value = what, value


def _convert(value: Any, kind: Any, text: bool) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _conditioned(value, *arguments, text=text)
    if origin in (Union, UnionType):
        return _one_of(value, arguments, text)
    if origin is tuple:
        return _converted_list(value, arguments[0], text)
    if origin is Literal:
        valid, what = value in arguments, listed(arguments)
    elif origin is Callable:
        valid, what = callable(value), "a function"
    elif is_dataclass(kind):
        valid, what = isinstance(value, kind), getattr(kind, "__name__", str(kind))  # type: ignore[arg-type]
    elif kind in _READERS:
        if kind is Path and value == "":  # which would be the current folder
            raise _InvalidError("a path", value)
        if isinstance(value, str):
            value = _read(value, kind, text)
        if kind is int and "bool" not in str(getattr(value, "dtype", type(value))):  # nor one of NumPy's or torch's
            with suppress(TypeError):
                value = operator.index(value)  # also a tensor of one integer
        types, what = _READERS[kind]
        valid = isinstance(value, types) and (kind is bool or not isinstance(value, bool))
        try:
            value = kind(value) if valid else value
        except OverflowError:  # an integer beyond float
            raise _InvalidError("a number below 1e308", value) from None
    else:
        return value
    if not valid:
        raise _InvalidError(what, value)
    return value


# 1e-4 and 1.5e4 are text in YAML.
_EXPONENTIAL = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)e[-+]?\d+", re.IGNORECASE | re.ASCII)
_READERS: dict[Any, tuple[Any, str]] = {  # the types that are taken, and their name in a sentence
    bool: (bool, "true or false"),
    int: (Integral, "an integer"),
    float: (Real, "a number"),
    str: (str, "text"),
    Path: (str | os.PathLike, "a path"),
}


def _read(value: str, kind: Any, text: bool) -> Any:
    """Return what typed text stands for, or the text if it is none of this kind."""
    if kind is Path:
        return os.path.expanduser(value)
    if text and kind is bool:
        return {"true": True, "false": False}.get(value.lower(), value)
    if (text and kind in (int, float)) or (kind is float and _EXPONENTIAL.fullmatch(value)):
        try:
            return kind(value)
        except ValueError:
            return value
    return value


def _conditioned(value: Any, kind: Any, *conditions: Any, text: bool) -> Any:
    first = conditions[0]
    if text and first is _HOME and value == "":
        raise _InvalidError("a path or a name", value)
    try:
        value = _convert(value, kind, text)
    except _InvalidError as error:
        what = first.what if isinstance(first, Must) else error.what
        if error.what == _READERS[int][1] and "integer" not in what:
            what = f"{error.what}, {what}"  # or 1.5 would be said not to be 0 or more
        raise _InvalidError(what, error.value) from None
    for condition in conditions:
        if isinstance(condition, Must) and not condition.holds(value):
            raise _InvalidError(condition.what, value)
    return os.path.expanduser(value) if first is _HOME else value


def _one_of(value: Any, kinds: Iterable[Any], text: bool) -> Any:
    if NoneType in kinds and (value is None or (text and value == "null")):
        return None
    problems = []
    for kind in kinds:
        if kind is not NoneType:
            try:
                return _convert(value, kind, text)
            except _InvalidError as error:
                problems.append(error)
    raise _InvalidError(" or ".join(error.what for error in problems), problems[0].value)


def _converted_list(value: Any, kind: Any, text: bool) -> Any:
    if text and isinstance(value, str) and value.startswith("["):
        import yaml

        from detailflow.plain_yaml import load_yaml

        with suppress(yaml.YAMLError):
            value = load_yaml(value)
    if not isinstance(value, list | tuple):
        raise _InvalidError("a list, such as [a, b]", value)
    try:
        return tuple(_convert(item, kind, text) for item in value)
    except _InvalidError as error:
        raise _InvalidError(f"a list in which each item is {error.what}", error.value) from None


def check_arguments(given: Iterable[str], known: Iterable[str]) -> None:
    """Raise a `TypeError` that names the first argument which is not known, as Python does for others."""
    for name in given:
        if name not in (names := list(known)):
            raise TypeError(unknown("argument", name, names, f"the arguments are {', '.join(names)}"))
