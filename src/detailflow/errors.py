"""The exception for what a user can put right, how other errors become one, and how its messages name things."""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# Control characters, which a terminal would obey, and those that change the direction of text.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_NUL = re.compile(".*embedded null (byte|character).*")  # what Python says before the system sees such a path
_SURROGATES = re.compile("[\ud800-\udfff]")

Errors = type[Exception] | tuple[type[Exception], ...]


class DetailFlowError(ValueError):
    """Bad input: a file, config, flag, checkpoint or image. The message says what is wrong and what would be right."""

    def __init__(self, message: object = "") -> None:
        super().__init__(printable(str(message)))


class NotThereError(DetailFlowError):
    """No set of images exists at this path or name."""


class MissingPackageError(DetailFlowError):
    """A package that is not installed; `extra` brings it."""

    extra = ""


class DetailFlowWarning(UserWarning):
    """Probably a mistake, in one sentence, such as an image that cannot be read."""


@contextmanager
def explained(problem: str, kinds: Errors = (OSError, ValueError), hint: str = "") -> Iterator[None]:
    """Turn errors of these kinds into a `DetailFlowError`: "PROBLEM (what the error says): HINT"."""
    try:
        yield
    except DetailFlowError:
        raise
    except kinds as error:
        raise DetailFlowError(f"{problem} ({reason_of(error)}){hint and ': '}{hint}") from error


@contextmanager
def os_errors(problem: str) -> Iterator[None]:
    """Turn an `OSError`, or that of a path with a NUL, into a `DetailFlowError`: "PROBLEM: what the error says"."""
    try:
        yield
    except (OSError, ValueError) as error:
        if not (isinstance(error, OSError) or _NUL.fullmatch(str(error))):
            raise
        raise DetailFlowError(f"{problem}: {reason_of(error)}") from error


@contextmanager
def exit_on_error() -> Iterator[None]:
    """For scripts: print a `DetailFlowError` as one line and end with status 2, as the commands do."""
    try:
        yield
    except DetailFlowError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


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


def first_line(error: BaseException) -> str:
    """Return the first line of a library's error message, to be part of a sentence."""
    text = str(error).strip()
    return text.splitlines()[0].rstrip(".") if text else type(error).__name__


def reason_of(error: BaseException) -> str:
    """Return why something failed, to be part of a sentence: of an `OSError` in the system's words."""
    return getattr(error, "strerror", None) or first_line(error)


def not_finite(what: str) -> DetailFlowError:
    """Return the error for numbers of a network, such as "the AR model's logits", that are infinite or NaN."""
    return DetailFlowError(f"{what} are not finite: its weights are damaged, or too large for its dtype")


def missing_package(what: str, package: str | None, instead: str = "", extra: str = "train") -> MissingPackageError:
    """Return the error that `what` needs a package which is not installed: it names the extra that brings it.

    Without `package`, it is the extra as a whole that is needed.
    """
    get = f"install it with pip install 'detailflow[{extra}]' (from a clone: pip install '.[{extra}]')"
    as_a_whole = f"{what} needs the extra `{extra}`: {get}"
    error = MissingPackageError(
        f"{what} needs the package {package}: {get}{instead and ', '}{instead}" if package else as_a_whole
    )
    error.extra = extra
    return error


class ReportedElsewhereError(DetailFlowError):
    """A `DetailFlowError` of another rank, which reports it: the command line prints nothing more."""


def some_names(names: set[str]) -> str:
    """Return the first few of many names, for a message."""
    first = sorted(names)[:3]
    return ", ".join(first) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
