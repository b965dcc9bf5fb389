"""The sources of the site: documents of the repository, and pages that name what the package has.

    python docs/site/stage.py FOLDER

Documents keep their places below docs/. A link to a file of the repository that is no document
leads to a page of its own, which shows the file.
"""

from __future__ import annotations

import inspect
import os
import re
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

from navigation import NAVIGATION

import tokenmill

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
FAMILIES = {
    "dense": "Attention to all keys that a mask leaves",
    "linear": "Recurrences",
    "sparse": "Attention to listed keys and blocks",
    "select": "Which keys",
    "tokens": "Gather, merge, scatter, pool",
}
PACKAGES = {
    "masks": "Masks without a matrix of pairs",
    "nn": "Modules with the defaults of their papers",
    "policies": "Policies of caches",
    "evaluation": "Policies judged on a model",
    "distributed": "Sequences on several ranks",
    "papers": "The index of papers",
    "testing": "Kernels against the float64 reference, and requests against their batch",
}
LANGUAGES = {".py": "python", ".cpp": "cpp", ".h": "cpp", ".cu": "cpp", ".cuh": "cpp"}
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)\s#]+)(#[^)\s]*)?(?=\))")
FENCE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)


def documents() -> dict[Path, str]:
    """The page of each document, by its path."""
    pages = {p: p.relative_to(DOCS).with_suffix("").as_posix() for p in DOCS.glob("**/*.md")}
    pages[ROOT / "CHANGELOG.md"] = "changes"
    pages[ROOT / "CONTRIBUTING.md"] = "contributing"
    pages[ROOT / "README.md"] = "index"
    return pages


class Stage:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pages = documents()
        self.shown: set[Path] = set()  # files and folders with a page of their own

    def write(self, page: str, text: str) -> None:
        path = self.folder / f"{page}.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def page_of(self, path: Path) -> str:
        """The staged file, from its folder, of a file or folder of the repository."""
        if path in self.pages:
            return f"{self.pages[path]}.md"
        if path.is_relative_to(DOCS / "images"):
            return path.relative_to(DOCS).as_posix()
        if not path.exists() or not path.is_relative_to(ROOT):
            raise SystemExit(f"docs/site: no such file: {path}")
        self.show(path)
        return f"source/{path.relative_to(ROOT).as_posix()}.md"

    def show(self, path: Path) -> None:
        """A page with the text of a file, or the list of a folder."""
        if path in self.shown:
            return
        self.shown.add(path)
        name = path.relative_to(ROOT).as_posix()
        if path.is_dir():
            entries = sorted(p for p in path.iterdir() if p.suffix in LANGUAGES)
            for entry in entries:
                self.show(entry)
            rows = "".join(f"- [{p.name}]({path.name}/{p.name}.md)\n" for p in entries)
            body = rows or "No sources here.\n"
        else:
            language = LANGUAGES.get(path.suffix, "text")
            fence = "`" * 8
            body = f"{fence}{language}\n{path.read_text()}{fence}\n"
        self.write(f"source/{name}", f"---\norphan: true\n---\n\n# {name}\n\n{body}")

    def lists_of(self, page: str) -> str:
        """Lists of pages behind a document, which make the side bar."""
        if page == "notebook/README":
            return "\n```{toctree}\n:hidden:\n:glob:\n\n*\n```\n"
        return toctrees(self.pages.values()) if page == "index" else ""

    def linked(self, path: Path, page: str, text: str) -> str:
        """The text of a document with the links of its page on the site."""
        here = os.path.dirname(page)

        def moved(match: re.Match[str]) -> str:
            target = Path(os.path.normpath(path.parent / match[1]))
            return os.path.relpath(self.page_of(target), here or ".") + (match[2] or "")

        parts = FENCE.split(text)
        parts[::2] = [LINK.sub(moved, part) for part in parts[::2]]
        return "".join(parts)

    def run(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(DOCS / "images", self.folder / "images")
        for path, page in self.pages.items():
            if path != ROOT / "README.md":
                text = self.linked(path, page, path.read_text())
                self.write(page, text + self.lists_of(page))
        for name, title in FAMILIES.items():
            self.write(f"api/{name}", api_page(title, f"tokenmill.{name}", functions(name)))
        for name, title in PACKAGES.items():
            module = __import__(f"tokenmill.{name}", fromlist=["_"])
            self.write(f"api/{name}", api_page(title, module.__name__, members(module)))
        tools = ["explain", "backends", "build_info", "InputError"]
        objects = [(f"tokenmill.{name}", getattr(tokenmill, name)) for name in tools]
        self.write("api/tools", api_page("The build and its backends", "tokenmill", objects))
        self.write("api/index", api_index())


def toctrees(pages: Iterable[str]) -> str:
    """The side bar. What is listed and not there is left out; what is there and not listed comes
    last."""
    there = [*pages, "api/index"]
    listed = {name for names in NAVIGATION.values() for name in names} | {"index"}
    more = [name for name in there if name not in listed and not name.startswith("notebook/")]
    text = ""
    for caption, names in {**NAVIGATION, "More": more}.items():
        if rows := "\n".join(name for name in names if name in there):
            text += f"\n```{{toctree}}\n:caption: {caption}\n:hidden:\n\n{rows}\n```\n"
    return text


def functions(family: str) -> list[tuple[str, object]]:
    """The public functions of a family, as the package names them."""
    found = []
    for name in tokenmill.__all__:
        value = getattr(tokenmill, name)
        if inspect.isfunction(value) and value.__module__.startswith(f"tokenmill.{family}."):
            found.append((f"tokenmill.{name}", value))
    return found


def members(module: ModuleType) -> list[tuple[str, object]]:
    names = getattr(module, "__all__", None) or [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", "") == module.__name__
    ]
    values = [(f"{module.__name__}.{name}", getattr(module, name)) for name in names]
    return [(name, v) for name, v in values if inspect.isfunction(v) or inspect.isclass(v)]


def api_page(title: str, module: str, objects: Iterable[tuple[str, object]]) -> str:
    text = f"# {title}\n\n```{{eval-rst}}\n.. currentmodule:: {module}\n"
    if module != "tokenmill" and module.split(".")[1] in PACKAGES:
        text += f"\n.. automodule:: {module}\n"
    for name, value in objects:
        kind = "autoclass" if inspect.isclass(value) else "autofunction"
        text += f"\n.. {kind}:: {name}\n"
        text += "   :members:\n" if kind == "autoclass" else ""
    return text + "```\n"


def api_index() -> str:
    titles = FAMILIES | {"tools": "The build and its backends"} | PACKAGES
    rows = "\n".join(titles)
    return (
        "# API\n\nFunctions are in `tokenmill`; *[source]* leads to their code. "
        "Every function also takes arrays of other libraries as `tokenmill.dlpack`.\n\n"
        f"```{{toctree}}\n:maxdepth: 2\n\n{rows}\n```\n"
    )


if __name__ == "__main__":
    Stage(Path(sys.argv[1]).resolve()).run()
