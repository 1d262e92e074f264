"""mkdocs hook: adds the command-line reference and every file of the repository that a page links to."""

import json
import posixpath
import re
import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

sys.path.insert(0, str(Path(__file__).parent))

from commandline import reference
from folders import entries

ROOT = Path(__file__).parents[2]
LINK = re.compile(r"(?<=\]\()([^)\s#:]+)(?=(?:#[^)\s]*)?\))")  # the file that a relative link leads to
HTML = re.compile(r'(?<=\bsrc=")([^":]+)(?=")')
LANGUAGES = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".json": "json", ".cff": "yaml"}
# Files beyond docs/ that mkdocs.yml has in its navigation.
NAVIGATION = ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "experiments/ablation/README.md", "examples")

_origin: dict[str, str] = {}  # a page or picture of the site → its path in the repository
_place: dict[str, str] = {}  # the other way round


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages and pictures that are not in docs/, those to which they link included."""
    _origin.clear(), _place.clear()
    for file in files:
        _note(file.src_uri, f"docs/{file.src_uri}")
    files.append(File.generated(config, "reference/command-line.md", content=reference()))
    waiting = [*NAVIGATION, *(link for file in files if file.is_documentation_page() for link in _links(file))]
    while waiting:
        path = waiting.pop()
        if path not in _place and (ROOT / path).exists():
            file = _published(path, config)
            _note(file.src_uri, path)
            files.append(file)
            waiting += _links(file)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links to files of the repository lead to their pages."""
    folder = posixpath.dirname(page.file.src_uri)

    def moved(match: re.Match[str]) -> str:
        place = _place.get(_target(page.file.src_uri, match[1]))
        return posixpath.relpath(place, folder or ".") if place else match[1]

    return HTML.sub(moved, LINK.sub(moved, markdown))


def _note(place: str, path: str) -> None:
    _origin[place], _place[path] = path, place


def _target(place: str, link: str) -> str:
    """Return the path in the repository to which a link of a page leads."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(_origin.get(place, place)), link))


def _links(file: File) -> list[str]:
    """Return the paths of the repository to which a page links."""
    if not file.is_documentation_page():
        return []
    text = file.content_string
    return [_target(file.src_uri, match[1]) for form in (LINK, HTML) for match in form.finditer(text)]


def _published(path: str, config: MkDocsConfig) -> File:
    """Return the site's file for one of the repository: a page for text and folders, any other file as it is."""
    source, place = ROOT / path, f"repository/{path}"
    if source.is_dir():
        listing = "\n".join(f"- [{entry.name}]({source.name}/{entry.name})" for entry in entries(source))
        return File.generated(config, f"{place}.md", content=f"# {path}/\n\n{listing}\n")
    if source.suffix == ".md":
        return File.generated(config, place, content=source.read_text(encoding="utf-8"))
    if source.suffix == ".ipynb":
        return File.generated(config, f"{place}.md", content=_notebook(source))
    if source.suffix in LANGUAGES:
        text = f"---\nsearch:\n  exclude: true\n---\n\n# {path}\n\n~~~~{LANGUAGES[source.suffix]}\n"
        return File.generated(config, f"{place}.md", content=f"{text}{source.read_text(encoding='utf-8')}\n~~~~\n")
    return File.generated(config, place, abs_src_path=str(source))


def _notebook(source: Path) -> str:
    """Return a notebook as Markdown, with the pictures that it keeps."""
    parts = []
    for cell in json.loads(source.read_text(encoding="utf-8"))["cells"]:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"~~~~python\n{text}\n~~~~")
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "image/png" in data:
                picture = "".join(data["image/png"]).replace("\n", "")
                parts.append(f'<img alt="output of the cell above" src="data:image/png;base64,{picture}">')
            elif text := "".join(output.get("text", data.get("text/plain", ""))):
                parts.append(f"~~~~text\n{text.rstrip()}\n~~~~")
    return "\n\n".join(parts) + "\n"
