"""The studio's files are served whole, from this package alone, under a strict policy."""

import re
from typing import Any

import httpx
import pytest

from detailflow.serving.studio import FILES

PAGE = (FILES / "index.html").read_text(encoding="utf-8")
MODULES = sorted(FILES.glob("*.js"))


def test_the_page_needs_no_key_and_allows_only_its_own_files(server: Any):
    answer = httpx.get(server.url)
    assert answer.text == PAGE
    policy = answer.headers["Content-Security-Policy"].split("; ")
    assert "default-src 'none'" in policy and "script-src 'self'" in policy and "frame-ancestors 'none'" in policy
    assert not any("unsafe" in part or "http" in part for part in policy)
    assert answer.headers["Cache-Control"] == "no-cache"
    assert httpx.head(server.url).status_code == 200


def test_every_file_that_the_page_names_is_there(server: Any):
    names = re.findall(r'(?:src|href)="studio/([^"]+)"', PAGE)
    assert {path.name for path in MODULES} | {"base.css", "layout.css", "images.css", "icon.svg"} == set(names)
    for name in names:
        answer = httpx.get(f"{server.url}/studio/{name}")
        assert answer.text == (FILES / name).read_text(encoding="utf-8")
        again = httpx.get(f"{server.url}/studio/{name}", headers={"If-None-Match": answer.headers["ETag"]})
        assert again.status_code == 304


@pytest.mark.parametrize("path", ["../app.py", "%2e%2e/app.py", "..%2fapp.py", "nothing.js", "/etc/passwd", ""])
def test_no_other_file_is_served(server: Any, path: str):
    assert httpx.get(f"{server.url}/studio/{path}").status_code in (401, 404)


@pytest.mark.parametrize("path", sorted(FILES.iterdir()), ids=lambda path: path.name)
def test_nothing_comes_from_elsewhere(path: Any):
    text = path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?://|[\"'(]//|@import", text)
    assert not re.search(r"innerHTML|eval\(|\sstyle=|\son\w+=", text), "the policy forbids these"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.name)
def test_modules_import_what_others_export(path: Any):
    for names, module in re.findall(r'import \{([^}]*)\} from "\./([\w.]+)"', path.read_text(encoding="utf-8")):
        other = (FILES / module).read_text(encoding="utf-8")
        for name in filter(None, (part.strip() for part in names.split(","))):
            assert re.search(rf"export (class|const|(async )?function\*?) {name}\b", other), (module, name)
