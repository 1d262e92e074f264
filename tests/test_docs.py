"""The documentation's messages are ones that the code has, and its links and paths lead somewhere."""

import ast
import re
from pathlib import Path

import pytest

from detailflow.settings import list_settings
from detailflow.training.config import Extraction, GPTTraining, TokenizerTraining

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("experiments/*/README.md")])
PATH = re.compile(r"\b(?:src|docs|tests|benchmarks|experiments|examples)/[\w./-]*\w")
FEWEST = 12  # letters that must be the code's own, and not a value's


def explained() -> list[str]:
    """The messages in the tables headed "message"."""
    found = []
    for page in sorted((ROOT / "docs").glob("*.md")):
        for table in re.findall(
            r"^\| message \|.*\n\|[-|]*\n((?:\|.*\n)+)", page.read_text(encoding="utf-8"), re.MULTILINE
        ):
            found += re.findall(r"^\| `([^`]*)` \|", table, re.MULTILINE)
    return found


def parts_of(node: ast.expr) -> list[str | None]:
    """The parts of a text in the code; `None` is a value within it."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return [node.value]
    if isinstance(node, ast.JoinedStr):
        return [part for value in node.values for part in parts_of(value)]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return [*parts_of(node.left), *parts_of(node.right)]
    return [None]


def texts() -> list[list[str | None]]:
    """Every text in the code that says enough to be known by it."""
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in sorted((ROOT / "src").rglob("*.py"))]
    nodes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.expr)]
    found = [parts_of(node) for node in nodes]
    for node in nodes:
        match node:
            case ast.Call(func=ast.Name(id="explained"), args=[problem, *_]):
                found.append([*parts_of(problem), " (", None, ")", None])
            case ast.Call(func=ast.Name(id="os_errors"), args=[problem]):
                found.append([*parts_of(problem), ": ", None])
    return [parts for parts in found if sum(len(part or "") for part in parts) >= FEWEST]


def begins(parts: list[str | None], message: str) -> bool:
    """Whether a message is such a text, or its beginning if the message ends in dots."""
    start = message.removesuffix("…").rstrip()
    for end in range(len(parts), 0, -1) if message.endswith("…") else (len(parts),):
        fixed = [part for part in parts[:end] if part]
        if sum(map(len, fixed)) < FEWEST or any(part.rstrip() not in start for part in fixed):
            continue
        pattern = "".join(".*" if part is None else re.escape(part) for part in parts[:end])
        if re.fullmatch(pattern, start, re.DOTALL) or re.fullmatch(pattern, f"{start} ", re.DOTALL):
            return True
    return False


def test_every_message_that_is_explained():
    messages, known = explained(), texts()
    assert len(messages) > 10
    assert [message for message in messages if not any(begins(parts, message) for parts in known)] == []


@pytest.mark.parametrize(
    ("kind", "heading"), [(TokenizerTraining, "Tokenizer"), (Extraction, "Extraction"), (GPTTraining, "AR model")]
)
def test_every_setting(kind: type, heading: str):
    """docs/train-in-steps.md has a row for each, below the heading of its command, or of `loop.`."""
    _, _, page = (ROOT / "docs" / "train-in-steps.md").read_text(encoding="utf-8").partition("\n## Every setting\n")
    parts = {part.partition("\n")[0]: part for part in page.partition("\n## ")[0].split("\n### ")}
    (loop,) = (part for title, part in parts.items() if title.startswith("`loop.`"))
    for setting in list_settings(kind):
        group, _, name = setting.name.rpartition(".")
        rows = re.findall(r"^\| (`[^|]*) \| (.*)", loop if group == "loop" else parts[heading], re.MULTILINE)
        inside = rf"`{group.rpartition('.')[2]}\.?`"  # such as the row of `encoder`, which says what `width` is
        texts = [head + rest * bool(re.search(inside, head)) for head, rest in rows]
        assert any(f"`{name}`" in text for text in texts), setting.name


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as a browser makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_and_path(page: Path):
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if not link.startswith(("http", "mailto:")):
            name, _, anchor = link.partition("#")
            target = page.parent / name if name else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link
    for path in PATH.findall(re.sub(r"https?://\S+|\]\([^)]*\)", "", text)):
        assert (ROOT / path).exists(), path
