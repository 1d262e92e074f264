"""The files around the code: the site's navigation, workflows, issue forms and the citation are well formed."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import detailflow

ROOT = Path(__file__).parents[1]
FORMS = {
    "vendor.github-workflows": ".github/workflows/*.yml",
    "vendor.github-issue-forms": ".github/ISSUE_TEMPLATE/[!c]*.yml",
    "vendor.github-issue-config": ".github/ISSUE_TEMPLATE/config.yml",
    "vendor.citation-file-format": "CITATION.cff",
}


@pytest.mark.parametrize("schema", FORMS)
def test_schema(schema: str):
    pytest.importorskip("check_jsonschema")
    files = [str(file) for file in sorted(ROOT.glob(FORMS[schema]))]
    assert files
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, *files]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_versions_agree():
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["version"] == detailflow.__version__
    changes = re.findall(r"^## \[(\d+\.\d+\.\d+)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert detailflow.__version__ in changes


def test_every_page_is_in_the_navigation():
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    navigation = set(re.findall(r": ([\w/.-]+\.md)$", text, re.MULTILINE))
    pages = {page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").rglob("*.md")}
    assert pages - navigation == set(), "add these pages to mkdocs.yml"
    generated = {"reference/command-line.md", *(page for page in navigation if page.startswith("repository/"))}
    assert navigation - pages == generated


def test_make_targets_that_the_pages_name():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]:
        named = re.findall(r"(?:`|^)make ([\w-]+)", page.read_text(encoding="utf-8"), re.MULTILINE)
        assert set(named) <= targets, page.name


def test_sizes_of_the_code():
    """CONTRIBUTING.md's limits: files, functions, parameters (the kernels' are those of a GPU's programs)."""
    for file in sorted((ROOT / "src").rglob("*.py")):
        text = file.read_text(encoding="utf-8")
        assert text.count("\n") <= 450, file
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno - node.lineno < 60, f"{file} {node.name}"
                given = [one.arg for one in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
                assert file.name == "kernels.py" or len(set(given) - {"self", "cls"}) <= 7, f"{file} {node.name}"


def test_links_of_the_site(tmp_path: Path):
    import links

    (tmp_path / "a.html").write_text('<a href="b.html#there">b</a> <a href="https://example.org/x#y">x</a>')
    (tmp_path / "b.html").write_text('<h1 id="there">b</h1><script src="a.js"></script>')
    (tmp_path / "a.js").touch()
    assert links.problems(tmp_path) == ([], {"https://example.org/x"})
    links.page.cache_clear()
    (tmp_path / "b.html").write_text('<a href="c.html">c</a> <script src="https://example.org/a.js"></script>')
    assert sorted(links.problems(tmp_path)[0]) == [
        "a.html links to b.html#there: there is no such anchor",
        "b.html links to c.html: there is no such file",
        "b.html loads https://example.org/a.js",
    ]


def test_the_site_leaves_out_what_a_folder_ignores(tmp_path: Path):
    """As packages that an example needs, whose own pages have links that lead nowhere."""
    import folders

    (tmp_path / ".gitignore").write_text("model/\nnode_modules/\n")
    for name in ("node_modules", "model", "_hidden", "b"):
        (tmp_path / name).mkdir()
    (tmp_path / "a.js").touch()
    assert [entry.name for entry in folders.entries(tmp_path)] == ["a.js", "b"]
    assert ROOT / "docs" / "index.md" in folders.entries(ROOT / "docs")
