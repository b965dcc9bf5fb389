"""What a reader of the built site relies on: links, titles, images, formulas, search.

    python docs/site/check.py out/docs [--shots]

Every internal link must lead to a file and every fragment to an element of it. Pages must load
nothing from other hosts. --shots opens pages in headless Chromium, if there is one, and writes
pictures to shots/ inside the folder; with it the search page must find an operator.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import urllib.parse
from html.parser import HTMLParser
from pathlib import Path

LOADED = {"script": "src", "img": "src", "link": "href"}
DESK, PHONE = (1280, 1400), (390, 1400)  # windows in CSS pixels
SHOTS = dict.fromkeys(("index", "choose", "papers", "dense", "generate", "api/dense"), DESK)
SHOTS |= {"index-phone": PHONE, "dense-phone": PHONE}
SEARCHES = {"topk_select": "api/select", "sliding window": "dense", "dropout": "faq"}
LISTS = ("_modules", "genindex.html", "py-modindex.html", "search.html")  # made by Sphinx


class Page(HTMLParser):
    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.ids: set[str] = set()
        self.links: list[str] = []  # that a reader follows
        self.loaded: list[str] = []  # that a browser loads
        self.headings = self.formulas = 0
        self.nameless: list[str] = []  # images without a text
        self.viewport = False
        self.title = ""
        self._in_title = False
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        has = {name: value or "" for name, value in attributes}
        if "id" in has:
            self.ids.add(has["id"])
        if tag == "a" and "href" in has:
            self.links.append(has["href"])
        canonical = tag == "link" and has.get("rel") in ("next", "prev", "index", "search")
        if (name := LOADED.get(tag)) and name in has and not canonical:
            self.loaded.append(has[name])
        if tag == "img" and not has.get("alt"):
            self.nameless.append(has.get("src", ""))
        self.headings += tag == "h1"
        self.formulas += tag == "math"
        self.viewport |= tag == "meta" and has.get("name") == "viewport"
        self._in_title |= tag == "title"

    def handle_endtag(self, tag: str) -> None:
        self._in_title &= tag != "title"

    def handle_data(self, data: str) -> None:
        if self._in_title:
            self.title += data


def faults(site: Path) -> list[str]:
    paths = [p for p in site.glob("**/*.html") if "shots" not in p.parts]
    pages = {path: Page(path) for path in paths}
    found = [] if pages else ["no pages"]
    for path, page in pages.items():
        name = path.relative_to(site)
        if not page.title.strip():
            found.append(f"{name}: no title")
        if not page.viewport:
            found.append(f"{name}: no viewport")
        if page.headings != 1 and name.parts[0] not in LISTS:
            found.append(f"{name}: {page.headings} headings of the first level")
        found += [f"{name}: no text for {src}" for src in page.nameless]
        found += [f"{name}: loads {url}" for url in page.loaded if outside(url)]
        for url in {*page.links, *page.loaded}:
            if not outside(url) and not leads_somewhere(url, path, pages):
                found.append(f"{name}: dead link {url}")
    index = site / "searchindex.js"
    if not index.exists() or "attention_decode" not in index.read_text():
        found.append("searchindex.js: does not know attention_decode")
    for name in ("dense", "linear", "sparse", "select", "tokens"):
        page = pages.get(site / f"{name}.html")
        if not page or not (page.formulas and any("images/" in url for url in page.loaded)):
            found.append(f"{name}.html: no formula or no picture")
    return found


def outside(url: str) -> bool:
    return bool(re.match(r"(\w+:|//)", url))


def leads_somewhere(url: str, path: Path, pages: dict[Path, Page]) -> bool:
    file, _, fragment = urllib.parse.unquote(url).partition("#")
    file = file.partition("?")[0]
    target = (path.parent / file).resolve() if file else path
    if target.is_dir():
        target /= "index.html"
    if not target.exists():
        return False
    return not fragment or target not in pages or fragment in pages[target].ids


def chromium(*words: str) -> str:
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    assert program
    command = [program, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    done = subprocess.run([*command, *words], capture_output=True, text=True, timeout=120)
    if done.returncode:
        raise SystemExit(f"docs/site: {program} failed: {done.stderr.strip()[-400:]}")
    return done.stdout


def take_shots(site: Path) -> list[str]:
    """Pictures of pages on a desk and on a phone; what is wrong with the search."""
    shots = site / "shots"
    shots.mkdir(exist_ok=True)
    for name, (width, height) in SHOTS.items():
        shot = shots / f"{name.replace('/', '-')}.png"
        address = (site / f"{name.removesuffix('-phone')}.html").as_uri()
        chromium(f"--window-size={width},{height}", f"--screenshot={shot}", address)
        if not shot.exists():
            raise SystemExit(f"docs/site: no picture of {name}")
    return [fault for words, page in SEARCHES.items() if (fault := search(site, words, page))]


def search(site: Path, words: str, page: str) -> str:
    """What is wrong with the search for words, which must find a page before the changelog."""
    address = (site / "search.html").as_uri() + "?q=" + urllib.parse.quote_plus(words)
    results = chromium("--virtual-time-budget=8000", "--dump-dom", address)
    listed = results[results.find('id="search-results"') :]
    pages = re.findall(r'href="(?:\./)?([^"?#]+)\.html', listed)
    if page not in pages:
        return f"search.html: {words} does not find {page}"
    first = "changes" in pages and pages.index("changes") < pages.index(page)
    return f"search.html: {words} finds changes first" if first else ""


def main(words: list[str]) -> int:
    site = Path(words[0]).resolve()
    found = faults(site)
    if "--shots" in words:
        if shutil.which("chromium") or shutil.which("chromium-browser"):
            found += take_shots(site)
        else:
            print("no chromium: no pictures; the pages were parsed")
    print("\n".join(found) or f"{len(list(site.glob('**/*.html')))} pages, no dead link")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
