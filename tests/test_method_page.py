"""docs/method.md names files and functions that exist, and docstrings cite sections that it has."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "method.md"
SUFFIXES = (".py", ".pt", ".json", ".safetensors")
SOURCES = sorted((ROOT / "src").rglob("*.py"))


def sections() -> set[str]:
    """The anchors of the page's headings, as a browser makes them."""
    headings = re.findall(r"^#+ (.+)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_file_and_function_that_the_page_names_exists():
    text = PAGE.read_text(encoding="utf-8")
    links = re.findall(r"\]\((\.\./[^)#]+|[\w./-]+\.(?:md|png))\)", text)
    assert len(links) > 30
    for link in links:
        assert (PAGE.parent / link).exists(), link
    for name, link in [*names_of_headings(text), *names_in_sentences(text)]:
        code = (PAGE.parent / link).read_text(encoding="utf-8")
        for part in name.split("."):
            assert re.search(rf"\b(?:def|class) {part}\b", code), (name, link)


def names_of_headings(text: str) -> list[tuple[str, str]]:
    """Return (name, file) of what stands in italics below the headings: a name's file is the next one, or the last."""
    found = []
    where = re.findall(r"^\*(?:Sec\.|Options|Not in|\[`)[^*]+\*", text, re.MULTILINE)
    assert len(where) >= 12
    for lines in where:
        pieces = re.split(r"\[`[^`]+`\]\(([^)]+)\)", lines)  # words, file, words, file, words
        for i, words in enumerate(pieces[::2]):
            names = [name for name in re.findall(r"`([A-Za-z_.]+)`", words) if not name.endswith(SUFFIXES)]
            found += [(name, pieces[min(2 * i + 1, len(pieces) - 2)]) for name in names]
    assert len(found) > 30
    return found


def names_in_sentences(text: str) -> list[tuple[str, str]]:
    """Return (name, file) of each "`name` in [`file`](…)" and "`name` and `name` in …"."""
    found = re.findall(r"(?:`([\w.]+)` and )?`([\w.]+)` in\s+\[`[^`]+`\]\(([^)]+\.py)\)", text)
    assert len(found) > 20
    return [(name, link) for *names, link in found for name in names if name]


def test_every_citation_of_the_page_is_a_section_of_it():
    known = sections()
    cited = [
        (path.relative_to(ROOT), section)
        for path in [*SOURCES, *sorted((ROOT / "tests").rglob("*.py"))]
        for section in re.findall(r"docs/method\.md#([\w-]+)", path.read_text(encoding="utf-8"))
    ]
    assert len(cited) > 30
    assert [(str(path), section) for path, section in cited if section not in known] == []


def test_links_inside_the_page_lead_somewhere():
    links = re.findall(r"\]\(#([\w-]+)\)", PAGE.read_text(encoding="utf-8"))
    assert links
    assert set(links) <= sections()
