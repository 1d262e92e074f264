"""docs/method.md names files and functions that exist, and docstrings cite sections that it has."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "method.md"
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
    where = re.findall(r"^\*(?:Sec\.|\[`)[^*]+\*", text, re.MULTILINE)  # the line below a heading
    assert len(where) >= 10
    code = "\n".join(path.read_text(encoding="utf-8") for path in SOURCES)
    for name in {name for line in where for name in re.findall(r"`([A-Za-z_.]+)`", line) if "/" not in name}:
        if not name.endswith((".py", ".pt", ".json", ".safetensors")):
            *_, last = name.split(".")
            assert re.search(rf"\b(?:def|class) {last}\b", code), name


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
