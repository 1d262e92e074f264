"""What the commands share: the parser, the options of a model, and output folders."""

import argparse
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import chain, takewhile
from pathlib import Path
from typing import Any, Literal, NoReturn, cast, get_args, get_origin

from detailflow.errors import DetailFlowError, os_errors
from detailflow.sampling import OFF, EngineName, SamplingConfig
from detailflow.settings import Location, checked, list_settings
from detailflow.words import unknown

Dtype = Literal["float32", "bfloat16", "float16"]  # names in torch, the default first
DTYPES = get_args(Dtype)
SETS = "a folder, parquet or WebDataset files, or a hub name"
MODEL = "a folder, hub name[@revision], emoji-64 or detailflow-16"


_IMAGE_NAME = re.compile(r"-[^-].*\.(?:png|jpe?g|webp|gif|bmp|tiff?|npz)", re.IGNORECASE)  # taken for an option


class Parser(argparse.ArgumentParser):
    """A parser of one command, whose mistakes are `DetailFlowError`s and whose help fits a screen.

    Attributes:
        sections: what was added below each heading, in the order of the help.
    """

    def __init__(self, command: str, operands: str, description: str, add_help: bool = True, column: int = 30) -> None:
        width = min(shutil.get_terminal_size().columns - 2, 98)
        super().__init__(
            prog=f"detailflow {command}",
            usage=" ".join(filter(None, ("detailflow", command, operands, "[options]"))),
            description=description,
            formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=column, width=width),
            allow_abbrev=False,
            add_help=add_help,
            exit_on_error=False,
        )
        self.sections: dict[str, list[argparse.Action]] = {}
        self._group, self._title = cast(Any, self), ""

    def heading(self, title: str) -> None:
        """Begin a group of options."""
        self._group, self._title = self.add_argument_group(title), title

    def add(self, name: str, *others: str, **options: Any) -> None:
        """Add an argument of argparse's own kind below the last heading."""
        action = self._group.add_argument(name, *others, **options)
        title = self._title or ("options" if name.startswith("-") else "positional arguments")  # as argparse has it
        self.sections.setdefault(title, []).append(action)

    def option(
        self, name: str, kind: Any = str, default: Any = None, help: str = "", metavar: str | None = None, **more: Any
    ) -> None:
        """Add an option, or an operand if the name has no dashes, that is checked as a setting of type `kind` is.

        Args:
            kind: bool is a flag (--name, or --no-name if the default is true), and a tuple takes several values.
        """
        if kind is bool:
            action = argparse.BooleanOptionalAction if default else "store_true"
            self.add(name, action=action, default=bool(default), help=help)
            return
        if get_origin(kind) is tuple:
            kind = get_args(kind)[0]
            more["nargs"] = "+" if name.startswith("-") or default is None else "*"
        if "(default: " not in help and default:
            help += " (default: %(default)s)"
        read = reader(name if name.startswith("-") else metavar or name, kind)
        self.add(name, type=read, default=default, metavar=metavar, help=help, **more)

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """Return the options; underscores and dashes in their names are the same."""
        self._words = [self._spelled(word) for word in (sys.argv[1:] if args is None else args)]
        _, taken = self._operands_first()
        for name in filter(os.path.isfile, taken):
            self.error(f"{name} is taken for a value of {taken[name]}")
        after = self._words[len(self._before_dashes) :]
        for name in (word.partition("=")[0] for word in after):
            if name in self.known_options:
                self.error(f"{name} comes after --, where nothing is an option: put -- and what follows it last")
        try:
            result, rest = self.parse_known_args(self._words, namespace)
        except argparse.ArgumentError as error:
            ours = isinstance(error.__context__, argparse.ArgumentTypeError)
            named = error.argument_name is None or ours
            message = error.message if named else f"{error.argument_name}: {error.message}"
            if error.message in ("expected one argument", "expected at least one argument"):
                action = self.known_options[str(error.argument_name)]
                message = f"{error.argument_name} needs a value: {error.argument_name} {action.metavar or 'VALUE'}"
            self.error(message)
        if rest:
            self.error(f"{' '.join(rest)} is more than this command takes: see {self.prog} --help")
        return result

    @property
    def _before_dashes(self) -> list[str]:
        """The words before --, which alone may be options."""
        return list(takewhile(lambda word: word != "--", self._words))

    @property
    def known_options(self) -> dict[str, argparse.Action]:
        """All options but --help, by their names."""
        return {
            name: action for actions in self.sections.values() for action in actions for name in action.option_strings
        }

    @property
    def _operands(self) -> list[str]:
        """What is given without an option, as the help names it."""
        actions = chain.from_iterable(self.sections.values())
        return [str(action.metavar) for action in actions if not action.option_strings]

    def _operands_first(self) -> tuple[str, dict[str, str]]:
        """Return the order in which to give operands, and what options of several values took that looks like a file.

        A value may be a class that is called as a folder or a file is, but hardly one with a suffix.
        """
        operands, known, options, taken = self._operands, self.known_options, list[str](), dict[str, str]()
        for i, word in enumerate(self._words if operands else ()):
            action = known.get(word)
            if action is not None and action.nargs == "+":
                options.append(word)
                values = takewhile(lambda value: not value.startswith("-"), self._words[i + 1 :])
                taken |= {value: word for value in values if re.search(r"\.\w*[a-zA-Z]\w*$", value)}
        return f": put {operands[0]} before {' and '.join(options)}" if options else "", taken

    def _spelled(self, word: str) -> str:
        name, equals, value = word.partition("=")
        if name.startswith("--") and name not in (known := self.known_options):
            for other in (f"--{name[2:].replace('_', '-')}", f"--{name[2:].replace('-', '_')}"):
                if other in known:
                    return other + equals + value
        return word

    def error(self, message: str) -> NoReturn:
        """Raise a `DetailFlowError`, about a misspelled option if there is one: it may be why others are missing."""
        options = self._before_dashes
        known = [*self.known_options, "--help"]
        for word in options:
            if word.startswith("-") and (os.path.isfile(word) or _IMAGE_NAME.fullmatch(word)):
                raise DetailFlowError(f"{word} begins with a dash, as options do: write ./{word}")
        for word in (word.partition("=")[0] for word in options if word.startswith("--")):
            if word not in known:
                self._check_operand(word)
                raise DetailFlowError(unknown("option", word, [*known, "--max-pixels"], f"see {self.prog} --help"))
        advice, taken = self._operands_first()
        lacking = message.startswith("the following arguments are required")
        raise DetailFlowError(message + advice if taken or lacking else message)

    def _check_operand(self, word: str) -> None:
        """Raise an error for an option that is called as what is given without one: `generate --class cat`."""
        for operand in self._operands:
            if operand.lower() == word.lstrip("-"):
                raise DetailFlowError(f"unknown option {word!r}: give {operand} without it, before the options")


def reader(name: str, kind: Any) -> Callable[[str], Any]:
    """Return the argparse type of an option whose text is checked as a setting of type `kind` is."""

    def read(text: str) -> Any:
        try:
            return checked(name, text, kind, text=True)
        except DetailFlowError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return read


def add_device_option(parser: Parser) -> None:
    """Add --device."""
    parser.option("--device", help="cpu, cuda, cuda:1, … (default: the GPU, if any)")


def add_model_options(parser: Parser, tokenizer: bool = False, dtype: bool = True, measures: bool = False) -> None:
    """Add --model and --device, and if asked for --tokenizer (with --engine) and --dtype; what measures is exact."""
    parser.heading("model")
    parser.option("--model", Location, help=f"{MODEL} (default: the shipped one)")
    if tokenizer:
        parser.option("--tokenizer", Location, metavar="MODEL", help="where the tokenizer is, if not with the model")
        parser.option(
            "--engine", EngineName, "auto", "native (C++, for CPUs), graphs (CUDA), torch or auto", metavar="NAME"
        )
    add_device_option(parser)
    if dtype:
        default = DTYPES[0] if measures else f"{DTYPES[1]} on a GPU, else {DTYPES[0]}"
        shown = f"{', '.join(DTYPES)} (default: {default})"
        parser.option("--dtype", Dtype, DTYPES[0] if measures else None, shown, metavar="TYPE")


def add_output_option(parser: Parser) -> None:
    """Add --output."""
    parser.option("--output", Path, Path("outputs"), "where to write", "DIR")


def add_sampling_options(parser: Parser, several: bool = False) -> None:
    """Add the settings of `SamplingConfig`, each with one value or several; a model has best values of its own."""
    combinations = "all combinations; " if several else ""
    parser.heading(f"sampling ({combinations}default: the model's own)")
    for setting in list_settings(SamplingConfig):
        name = f"--{setting.name.replace('_', '-')}"
        read = reader(name, setting.type)
        off = {"top_k": (OFF, "0"), "top_p": (OFF, "1")}.get(setting.name, ())  # a model may have values of its own

        def read_or_off(text: str, read: Callable[[str], Any] = read, off: tuple[str, ...] = off) -> Any:
            return OFF if text in off else read(text)

        values: dict[str, Any] = {"nargs": "+", "default": [None]} if several else {}
        metavar = setting.name.rpartition("_")[2][0].upper()
        parser.add(name, type=read_or_off, metavar=metavar, help=setting.documentation.rstrip("."), **values)


def sampling_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the sampling settings that were given; raises for one out of range before a large model is loaded."""
    given = {setting.name: getattr(args, setting.name) for setting in list_settings(SamplingConfig)}
    given = {name: value for name, value in given.items() if value is not None}
    SamplingConfig().updated(**given)
    return given


def check_output(folder: Path, models: bool = False) -> None:
    """Prove that `folder` exists or can be made, and can be written to, also `models`; leaves nothing behind."""
    from detailflow.files import check_utf8

    with os_errors(f"cannot write to {folder}"):
        if models:
            check_utf8(folder)
        with suppress(FileNotFoundError, NotADirectoryError):
            folder.lstat()  # raises for a name that cannot be
        existing = folder.absolute()
        while not os.path.lexists(existing):
            existing = existing.parent
        if not existing.is_dir():
            raise DetailFlowError(f"cannot write to {folder}: {existing} is not a folder")
        tempfile.TemporaryFile(dir=existing).close()


def check_apart(output: Path, data: str | None) -> None:
    """Check that `output` is not in the folder `data`, where what is written would be read as images and classes."""
    folder = os.path.expanduser(data or "")
    if not data or not os.path.isdir(folder):
        return
    place = Path(os.path.realpath(output))
    inside = next((at for at in (place, *place.parents) if os.path.exists(at) and at.samefile(folder)), None)
    if inside is None:
        return
    here = Path.cwd()
    home = os.path.relpath(inside.parent) if inside in (here, *here.parents) else ""
    what = f"{output} is your data" if inside == place else f"{output} is in your data, {data}"
    raise DetailFlowError(f"{what}: choose another --output, such as {Path(home, 'runs', inside.name)}")
