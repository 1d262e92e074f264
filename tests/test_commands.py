"""The commands and the Python of the documentation: all parse, and what is marked `<!-- run -->` runs."""

import os
import re
import shlex
from pathlib import Path

import commandline
import pytest
from PIL import Image

from detailflow.cli.main import main

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("experiments/*/README.md")])
BLOCK = re.compile(r"^( *)(<!-- run -->\n *)?```(\w+)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"(?<!`)`(detailflow [^`\n]*)`")


def name(page: Path) -> str:
    """Return a page's name in the names of tests."""
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str) -> list[tuple[bool, str]]:
    """Return a page's blocks in a language, each with whether it is marked to be run."""
    found = BLOCK.findall(page.read_text(encoding="utf-8"))
    return [(bool(run), text) for _, run, kind, text in found if kind == language]


def lines(block: str) -> list[list[str]]:
    """Return the words of each line of a shell block; a backslash goes on with the next line."""
    return [words for line in block.replace("\\\n", " ").splitlines() if (words := shlex.split(line, comments=True))]


def command(words: list[str]) -> list[str] | None:
    """Return what follows `detailflow` in a line, `torchrun … -m detailflow` included."""
    return words[words.index("detailflow") + 1 :] if "detailflow" in words else None


def check_options(words: list[str]) -> None:
    """Check that a command exists, unless it is `COMMAND`, and has the options that a text mentions."""
    words = words[1:] if words[0] == "help" else words
    known = [known for known in commandline.commands() if tuple(words[: len(known)]) == known]
    assert known or words[0] in ("COMMAND", "--help", "--version"), words
    parser = commandline.parser_of(*known[-1]) if known else None
    for word in words:
        if parser and word.startswith("--") and word.partition("=")[0] not in ("--max-pixels", "--help", "--version"):
            assert parser._spelled(word).partition("=")[0] in parser.known_options, words


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_command_parses(page: Path):
    for _, block in blocks(page, "sh"):
        for words in lines(block):
            given = command(words)
            if given and "…" in given:
                check_options(given)
            elif given:
                commandline.parse(given)
    for span in SPAN.findall(page.read_text(encoding="utf-8")):
        check_options(span.replace("|", " ").split()[1:])


def test_the_commands_are_found():
    found = [command(words) for page in PAGES for _, block in blocks(page, "sh") for words in lines(block)]
    assert len([words for words in found if words]) > 50


def test_a_wrong_command_is_noticed():
    with pytest.raises(ValueError, match="unknown option '--guidance': did you mean --guidance-scale"):
        commandline.parse(["generate", "cat", "--guidance", "2"])
    with pytest.raises(ValueError, match="unknown option '--loop.step'"):
        commandline.parse(["train", "gpt", "--loop.step", "2"])
    for words in (["generate", "--guidance"], ["generates", "cat"], ["Generate", "cat"], ["--versions"]):
        with pytest.raises(AssertionError):
            check_options(words)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=name)
def test_every_python_block_is_python(page: Path):
    """Or compiling it raises a SyntaxError; and it does something."""
    for _, block in blocks(page, "python"):
        assert compile(block, page.name, "exec").co_names, block


@pytest.mark.parametrize(
    "page", [page for page in PAGES if "<!-- run -->" in page.read_text(encoding="utf-8")], ids=name
)
def test_what_is_marked_runs(page: Path, cifar: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """In a folder with the photo.jpg and the photos/ that the pages speak of."""
    monkeypatch.chdir(tmp_path)
    os.symlink(cifar, "photos")
    Image.open(next(cifar.rglob("*.png"))).resize((96, 64)).save("photo.jpg")
    names: dict[str, object] = {}
    for _, run, kind, text in BLOCK.findall(page.read_text(encoding="utf-8")):
        if run and kind == "python":
            exec(compile(text, page.name, "exec"), names)
        elif run:
            assert kind == "sh"
            for words in lines(text):
                assert words[0] == "detailflow" and main(words[1:]) == 0, words


def test_the_reference_has_every_option():
    text = commandline.reference()
    for words in commandline.commands():
        assert f" detailflow {' '.join(words)}\n" in text
        parser = commandline.parser_of(*words)
        for option in parser.known_options if parser else ():
            assert option in ("-h", "--help") or f"`{option}`" in text, option
    assert "**Positional arguments**" in text and "| `IMAGE` … |" in text and "| `FILE` |" in text
    assert text.count("| |") < 60  # rows without a word on what they mean are only heads of tables
