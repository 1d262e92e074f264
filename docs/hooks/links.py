"""Check the built site: every link and anchor leads somewhere, and no page loads anything from another host.

    python docs/hooks/links.py build/site [--external]

With --external the addresses on other hosts are asked for, too.
"""

import argparse
import sys
import urllib.error
import urllib.request
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LOADED = {("script", "src"), ("img", "src"), ("link", "href"), ("iframe", "src"), ("source", "src"), ("video", "src")}
NOT_LOADED = {"canonical", "prev", "next", "alternate", "edit"}  # <link rel=…> that are not resources


class Page(HTMLParser):
    """What a page links to, what it loads, and the anchors that it has."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links, self.loads, self.anchors = list[str](), list[str](), set[str]()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note one element."""
        values = {name: value or "" for name, value in attrs}
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        for name, value in values.items():
            if (tag, name) in LOADED and values.get("rel") not in NOT_LOADED:
                self.loads.append(value)
            elif (tag, name) == ("a", "href"):
                self.links.append(value)


@cache
def page(file: Path) -> Page:
    """Return a page, parsed once."""
    return Page(file.read_text(encoding="utf-8"))


def problems(site: Path) -> tuple[list[str], set[str]]:
    """Return what is wrong with a site, and the addresses on other hosts that it links to."""
    found, external = [], set()
    for file in sorted(site.rglob("*.html")):
        where = file.relative_to(site)
        for address in page(file).loads:
            if urlsplit(address).netloc:
                found.append(f"{where} loads {address}")
        for address in {*page(file).links, *page(file).loads}:
            parts = urlsplit(address)
            if parts.scheme in ("http", "https"):
                external.add(address.partition("#")[0])
            elif not parts.scheme and not (file.name == "404.html" and address.startswith("/")):
                target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
                target = target / "index.html" if target.is_dir() else target
                if not target.is_file():
                    found.append(f"{where} links to {address}: there is no such file")
                elif not _has_anchor(target, unquote(parts.fragment)):
                    found.append(f"{where} links to {address}: there is no such anchor")
    return found, external


def _has_anchor(file: Path, anchor: str) -> bool:
    """Return whether a page has an anchor; those of the theme's own controls begin with two underscores."""
    return not anchor or anchor.startswith("__") or file.suffix != ".html" or anchor in page(file).anchors


def unreachable(address: str) -> str | None:
    """Return why an address cannot be reached; some hosts refuse robots, which proves nothing."""
    if urlsplit(address).hostname in ("127.0.0.1", "localhost"):
        return None
    try:
        with urllib.request.urlopen(urllib.request.Request(address, headers={"User-Agent": "Mozilla/5.0"}), timeout=30):
            return None
    except urllib.error.HTTPError as error:
        return f"{address}: {error}" if error.code in (404, 410) else None
    except OSError as error:
        return f"{address}: {error}"


def main() -> int:
    """Print the problems; the exit status is 1 if there are any."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("site", type=Path)
    parser.add_argument("--external", action="store_true")
    args = parser.parse_args()
    found, external = problems(args.site)
    if args.external:
        found += [problem for address in sorted(external) if (problem := unreachable(address))]
    print(*found, sep="\n")
    pages = len(list(args.site.rglob("*.html")))
    print(f"{pages} pages, {len(external)} addresses on other hosts, {len(found)} problems")
    return 1 if found or not pages else 0


if __name__ == "__main__":
    sys.exit(main())
