"""What the commands share: the parser, the options of a model, and output folders."""

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

from detailflow.errors import DetailFlowError

OFF = "off"  # for --top-k and --top-p
DTYPES = ("float32", "bfloat16", "float16")  # names in torch, the default first


class Parser(argparse.ArgumentParser):
    """A parser of one command, whose mistakes are `DetailFlowError`s and whose help fits a screen."""

    def __init__(self, command: str, operands: str, description: str) -> None:
        width = min(shutil.get_terminal_size().columns - 2, 98)
        super().__init__(
            prog=f"detailflow {command}",
            usage=f"detailflow {command} {operands} [options]",
            description=description,
            formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=30, width=width),
            allow_abbrev=False,
        )

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        self._words = list(sys.argv[1:] if args is None else args)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Raise a `DetailFlowError`: of a misspelled option if there is one, as argparse may complain of what it left missing."""
        options = self._words[: self._words.index("--")] if "--" in self._words else self._words
        known = self._option_string_actions
        for word in (word.partition("=")[0] for word in options if word.startswith("--")):
            if word not in known:
                raise DetailFlowError(unknown("option", word, [*known, "--max-pixels"], f"see {self.prog} --help"))
        unexpected = "unrecognized arguments: "
        if message.startswith(unexpected):
            message = f"{message.removeprefix(unexpected)} is more than this command takes: see {self.prog} --help"
        raise DetailFlowError(message)


def unknown(what: str, word: str, known: Iterable[str], otherwise: str) -> str:
    """Return the sentence for a word that is none of those known: the closest of them, or what to do `otherwise`."""
    by_name = {name.strip("-"): name for name in known}
    parts = {name.rpartition(".")[2]: name for name in reversed(by_name)}  # loop.steps is found by steps, too
    close = get_close_matches(word.strip("-"), [*by_name, *(part for part in parts if part not in by_name)], n=1)
    if not close:
        return f"unknown {what} {word!r}: {otherwise}"
    return f"unknown {what} {word!r}: did you mean {by_name.get(close[0]) or by_name[parts[close[0]]]}?"


def add_model_options(parser: argparse.ArgumentParser, tokenizer: bool = False, dtype: bool = True) -> None:
    """--model and --device, and where asked for --tokenizer and --dtype."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model", type=expanded, help="a folder, hub name or zoo name like detailflow-16 (default: the shipped one)"
    )
    if tokenizer:
        group.add_argument(
            "--tokenizer", type=expanded, metavar="MODEL", help="where the tokenizer is, if not with the model"
        )
    group.add_argument("--device", help="cpu, cuda, cuda:1, … (default: the GPU where there is one)")
    if dtype:
        group.add_argument(
            "--dtype", choices=DTYPES, default=DTYPES[0], metavar="TYPE", help=f"one of {', '.join(DTYPES)}"
        )


def add_output_option(parser: argparse.ArgumentParser) -> None:
    """--output."""
    parser.add_argument(
        "--output",
        type=expanded_path,
        default=Path("outputs"),
        metavar="DIR",
        help="where to write (default: %(default)s)",
    )


def expanded(text: str) -> str:
    """Return the path with a leading `~` or `~user` replaced by the home folder; the type of an option that may be no path.

    A shell leaves the `~` of `--output=~/x` and of quoted words as it is.
    """
    return os.path.expanduser(text)


def expanded_path(text: str) -> Path:
    """Return `expanded` as a path; the type of an option that names a file or folder."""
    return Path(expanded(text))


def positive(text: str) -> int:
    """The type of an option that is a positive integer."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer, not {text!r}")
    return value


def or_off(kind: Callable[[str], Any], off: Any) -> Callable[[str], Any]:
    """Return the type of an option that can be turned off: by "off", or by the number that means the same."""

    def read(text: str) -> Any:
        value = text if text == OFF else kind(text)
        return OFF if value == off else value

    read.__name__ = f"{kind.__name__} or {OFF}"  # which argparse's message names
    return read


TOP_K, TOP_P = or_off(int, off=0), or_off(float, off=1)


def check_output(folder: Path) -> None:
    """Prove that `folder` exists or can be made, and can be written to; leaves nothing behind.

    Raises:
        DetailFlowError: if not.
    """
    existing = folder.absolute()
    while not os.path.lexists(existing):
        existing = existing.parent
    if not existing.is_dir():
        raise DetailFlowError(f"cannot write to {folder}: {existing} is not a folder")
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise DetailFlowError(f"cannot write to {folder}: {error.strerror or error}") from error


def make_output(folder: Path) -> None:
    """Make `folder` and those above it where they are missing.

    Raises:
        DetailFlowError: if that fails.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DetailFlowError(f"cannot write to {folder}: {error.strerror or error}") from error
