"""The index as a list, as JSON and as a page: `python -m tokenmill papers [words]`."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import re
import sys
from collections.abc import Iterable, Sequence

from .. import _cli
from . import FAMILIES, PAPERS, find, nearest
from .paper import BACKENDS, STATES, Paper

HEAD = """\
# Papers

The package began from 61 papers. This page says, family by family, what each computes, what
computes it here, and what the test of that call was checked against: the code that the authors
released, or the text of the paper. `python -m tokenmill papers linear attention` searches it, and
`tokenmill.papers` is the table. Years are of first versions. The page is made from the table:

    python -m tokenmill papers --markdown > docs/papers.md
"""
READING = """\
"Whole" means that all of the paper's computation is here; "in part" rows say what is missing and
why. Calls are in `tokenmill` and show the arguments that the paper or its released code sets. They
run on the backends {backends} unless a row names others; CUDA kernels are tested
on the [PTX machine](emulated.md). What a paper says about accuracy is a claim about trained models,
which nothing here trains. Figures under "measured" are those of [performance.md](performance.md),
on one thread of a CPU; figures under "counted" are counted by the test of the row, on any machine.
"""
NONE = """
These papers analyse, train or tokenise, or their networks are ordinary.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "words",
        nargs="*",
        metavar="WORD",
        help="words of a method, title, author, computation or call, a number, or an address at "
        "arXiv; all that is known of the papers that hold all words, best matches first (default: "
        "one line for each paper)",
    )
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--json", action="store_true", help="print the rows as JSON")
    kinds.add_argument("--markdown", action="store_true", help="print them as docs/papers.md")


def run(options: argparse.Namespace) -> int:
    query = " ".join(options.words)
    papers = find(query) if query else PAPERS
    if not papers:
        close = nearest(PAPERS, query)
        hint = f"; near to it: {', '.join(close)}" if close else ""
        raise _cli.UsageError(f"papers: no paper of the index holds '{query}'{hint}")
    if options.json:
        print(json.dumps([_record(paper) for paper in papers], indent=2))
    elif options.markdown:
        print(markdown(papers), end="")
    elif query:
        print("\n\n".join(_details(paper) for paper in papers))
    elif sys.stdout.isatty() and importlib.util.find_spec("rich"):
        _print_table(papers)
    else:
        for paper in papers:
            head = f"{paper.number:>2}  {paper.name:<31}"
            print("\n".join(f"{head if not i else '':<35}{x}" for i, x in enumerate(_calls(paper))))
        print(f"\n{_summary(papers)}")
    return 0


def markdown(papers: Sequence[Paper] = PAPERS) -> str:
    """docs/papers.md, or its part on some papers."""
    parts = [HEAD, f"\n{_summary(papers)}\n\n", READING.format(backends=", ".join(BACKENDS))]
    for family, title in FAMILIES.items():
        rows = [paper for paper in papers if paper.family == family]
        if rows and family == "none":
            others = ((_linked_title(p), _linked(p.note), p.claim) for p in rows)
            parts += [f"\n## {title}\n", NONE, _table("paper|what there is|it says", others)]
        elif rows:
            parts += [f"\n## {title}\n", *map(_section, rows)]
    return "".join(parts)


def _section(paper: Paper) -> str:
    """The section of the page on one paper."""
    state = f"in part: {paper.missing}" if paper.missing else paper.state
    backends = "" if paper.backends == BACKENDS else ", ".join(paper.backends)
    items = {
        "state": state,
        "checked against": paper.checked,
        "text and release": paper.differs,
        "backends": backends,
        "note": paper.note,
        "calls": ", ".join(map(_code, paper.call)),
        "the paper says": paper.claim,
        "measured": paper.measured,
        "counted": paper.counted,
        "tests": ", ".join(map(_file, (*paper.test, *filter(None, [paper.example])))),
    }
    lines = [f"- {name}: {_linked(text)}" for name, text in items.items() if text]
    formula = paper.computes.replace("*", "\\*").replace("_", "\\_")
    snippet = f"\n\n```python\n{paper.snippet}```" if paper.snippet else ""
    head = f"\n### {paper.number}. {paper.name}\n\n{_linked_title(paper)}.\n\n{formula}."
    return f"{head}{snippet}\n\n" + "\n".join(lines) + "\n"


def _table(columns: str, rows: Iterable[Sequence[str]]) -> str:
    names = columns.split("|")
    lines = [names, ["---"] * len(names), *([c.replace("|", "\\|") for c in row] for row in rows)]
    return "\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _linked_title(paper: Paper) -> str:
    return f"[{paper.title}]({paper.link}), {paper.authors} {paper.year}"


def _code(call: str) -> str:
    return f"`{call.removeprefix('tokenmill.')}`"


def _linked(text: str) -> str:
    """Text in which names of pages in docs are links."""
    return re.sub(r"docs/([\w-]+\.md)", r"[\1](\1)", text)


def _file(path: str) -> str:
    return f"[{path.rsplit('/', 1)[1]}](../{path})"


def _summary(papers: Sequence[Paper]) -> str:
    states = [paper.state for paper in papers]
    whole, part, none = map(states.count, STATES)
    released = sum(paper.checked.startswith("released code") for paper in papers)
    return (
        f"{len(papers)} papers: {whole} whole, {part} in part, {none} without a computation for a "
        f"kernel; {released} checked against code that their authors released."
    )


def _record(paper: Paper) -> dict[str, object]:
    more = {"year": paper.year, "link": paper.link, "state": paper.state}
    return dataclasses.asdict(paper) | more


def _calls(paper: Paper) -> tuple[str, ...]:
    return paper.call or (paper.state,)


def _details(paper: Paper) -> str:
    fields = {
        "computes": [paper.computes],
        "call": _calls(paper),
        "state": [paper.state],
        "missing": [paper.missing],
        "checked": [paper.checked],
        "differs": [paper.differs],
        "test": paper.test,
        "example": [paper.example],
        "backends": [", ".join(paper.backends)],
        "claims": [paper.claim],
        "measured": [paper.measured],
        "counted": [paper.counted],
        "note": [paper.note],
        "try": paper.snippet.splitlines(),
    }
    lines = [f"{paper.number}  {paper.name} ({paper.authors} {paper.year})", f"  {paper.title}"]
    lines.append(f"  {paper.link}")
    for name, values in fields.items():
        shown = [value for value in values if value]
        lines += [f"  {name if not i else '':<10}{value}" for i, value in enumerate(shown)]
    return "\n".join(lines)


def _print_table(papers: Sequence[Paper]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(caption=_summary(papers))
    for name in ("", "paper", "computes", "call"):
        table.add_column(name)
    for paper in papers:
        name = f"[link={paper.link}]{escape(paper.name)}[/link]\n{paper.authors} {paper.year}"
        what = paper.computes or paper.note
        table.add_row(str(paper.number), name, escape(what), escape("\n".join(_calls(paper))))
    Console().print(table)
