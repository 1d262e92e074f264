"""The exception for what a user can put right, how other errors become one, and how its messages name things."""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from detailflow.words import also, printable

_NUL = re.compile(".*embedded null (byte|character).*")  # what Python says before the system sees such a path

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
    error = MissingPackageError(f"{what} needs the package {package}: {get}{also(instead)}" if package else as_a_whole)
    error.extra = extra
    return error


class ReportedElsewhereError(DetailFlowError):
    """A `DetailFlowError` of another rank, which reports it: the command line prints nothing more."""
