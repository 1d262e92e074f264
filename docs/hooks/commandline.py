"""The parsers of `detailflow`, for the command-line reference and for the check of the commands in the docs."""

import argparse
import io
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout, suppress
from unittest.mock import patch

from detailflow.cli.common import Parser
from detailflow.cli.main import COMMANDS, main
from detailflow.settings import list_settings
from detailflow.training.config import Extraction, GPTTraining, TokenizerTraining

PARTS = {"train": ("tokenizer", "gpt"), "evaluate": ("tokenizer", "gpt", "samples", "statistics", "compare")}
SETTINGS = {("train", "tokenizer"): TokenizerTraining, ("train", "gpt"): GPTTraining, ("extract",): Extraction}


def commands() -> list[tuple[str, ...]]:
    """Return every command, and for those with parts each part as well, in the order of `detailflow --help`."""
    return [words for name in COMMANDS for words in ((name,), *((name, part) for part in PARTS.get(name, ())))]


def parser_of(*words: str) -> Parser | None:
    """Return the parser that prints the help of a command; `None` if it has none, as `evaluate` without a part."""
    made: list[Parser] = []

    def keep(parser: Parser) -> str:
        made.append(parser)
        return ""

    with patch.object(Parser, "format_help", keep), redirect_stdout(io.StringIO()), suppress(SystemExit):
        main([*words, "--help"])
    return made[-1] if made else None


def parse(words: Sequence[str]) -> None:
    """Parse a command line without `detailflow` itself, as the command does; raises what the command would raise."""
    for size in (2, 1):
        if tuple(words[:size]) in commands() and (parser := parser_of(*words[:size])):
            if not {"-h", "--help"} & set(words):  # which settings print for a topic: `--help loop`
                parser.parse_args(list(words[size:]))
            return
    if words and words[0] not in ("--help", "--version") and tuple(words) not in commands():
        main(list(words[:1]))  # which names the commands that there are
        raise AssertionError(f"detailflow {' '.join(words)}: no parser takes this")


def reference() -> str:
    """Return the command-line reference as Markdown."""
    lines = [
        "# Command line",
        "",
        "Made from the parsers of the commands. `detailflow COMMAND --help` shows the same.",
        "",
    ]
    lines += ["| command | what it does |", "|---|---|"]
    lines += [f"| [`{name}`](#detailflow-{name}) | {text} |" for name, text in COMMANDS.items()]
    lines += ["", "`--max-pixels N`, with any command: at most N pixels per image (default: 178,956,970).", ""]
    for words in commands():
        lines += [f"{'#' * (len(words) + 1)} detailflow {' '.join(words)}", ""]
        lines += _described(words)
    return "\n".join(lines)


def _described(words: tuple[str, ...]) -> Iterator[str]:
    """Yield what a parser says of its command: a summary, the usage, and a table for each group of options."""
    parser = parser_of(*words)
    if parser is None:  # it only lists its parts
        yield from (f"{COMMANDS[words[0]].capitalize()}:", "")
        return
    documentation = (
        {setting.name: setting.documentation for setting in list_settings(SETTINGS[words])}
        if (words in SETTINGS)
        else {}
    )
    yield from (_plain(parser.description or ""), "", "```text", (parser.usage or "").strip(), "```", "")
    for heading, actions in parser.sections.items():
        title, _, _ = heading.partition(";")
        rows = [(action, _plain(_help(parser, action))) for action in actions if action.dest != "help"]
        yield from (f"**{title[:1].upper()}{title[1:]}**", "")
        if title.startswith("settings"):
            yield from ("| setting | default | |", "|---|---|---|")
            for action, _ in rows:
                about = _plain(documentation[action.dest])
                yield f"| `{action.option_strings[0]}` | `{action.metavar}` | {about} |"
        else:
            yield from ("| option | |", "|---|---|", *(f"| {_name(action)} | {about} |" for action, about in rows))
        yield ""


def _help(parser: Parser, action: argparse.Action) -> str:
    return (action.help or "") % dict(vars(action), prog=parser.prog)


def _name(action: argparse.Action) -> str:
    """Return an option's names, and what stands for its value."""
    names = ", ".join(f"`{name}`" for name in action.option_strings) or f"`{action.metavar or action.dest}`"
    value = f" `{action.metavar or action.dest.upper()}`" if action.option_strings and action.nargs != 0 else ""
    return names + value + (" …" if action.nargs in ("+", "*") else "")


def _plain(text: str) -> str:
    """Return text of a parser for a cell of a table: on one line, and nothing in it is Markdown but code."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")
