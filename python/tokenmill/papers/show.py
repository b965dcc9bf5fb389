"""The index as a table, as JSON and as a page: `python -m tokenmill papers [word]`."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import re
import sys
from collections.abc import Iterable, Sequence

from .. import _cli
from . import PAPERS, find
from .paper import BACKENDS, STATES, Paper

HEAD = """\
# The papers

The package began from 61 papers. This page says what each computes, what computes it here, and
which test holds that to a literal reading of the paper. `python -m tokenmill papers [word]` prints
the same, and `tokenmill.papers` is the table. Years are those of first versions. This page is made
from the table:

    python -m tokenmill papers --markdown > docs/papers.md
"""
IN = """
## In the package

Calls are in `tokenmill` and show the arguments that a paper or its released code sets. They run on
the backends {backends}, except where a row says that they are plain PyTorch.
"""
FIGURES = """
## What they claim, and what is measured here

Our figures are those of [performance.md](performance.md), on one thread of a CPU. Accuracy is a
claim about trained models, which nothing here trains; the tests show that the operators compute
what the papers say.
"""
OUT = """
## Not in the package
"""
NONE = """
## No computation of this kind

Nothing in these papers is a kernel: they analyse, train or tokenise, or their networks are
ordinary.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "word",
        nargs="?",
        metavar="WORD",
        help="rows that hold it (in name, title, authors, computation or call), or a number; all "
        "that is known of them (default: one line for each paper)",
    )
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--json", action="store_true", help="print the rows as JSON")
    kinds.add_argument("--markdown", action="store_true", help="print them as docs/papers.md")


def run(options: argparse.Namespace) -> int:
    papers = PAPERS if options.word is None else find(options.word)
    if not papers:
        rule = f"must be in a row of the index, or a number from 1 to {len(PAPERS)}"
        raise _cli.UsageError(f"word: {rule}; got '{options.word}'")
    if options.json:
        print(json.dumps([_record(paper) for paper in papers], indent=2))
    elif options.markdown:
        print(markdown(papers), end="")
    elif options.word is not None:
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
    """docs/papers.md, or the part of it that some papers have."""
    here, missing, none = ([paper for paper in papers if paper.state == s] for s in STATES)
    parts = [HEAD, f"\n{_summary(papers)}\n"]
    if here:
        rows = ((*_paper(p), _computes(p), "<br>".join(_code(c) for c in p.call), _files(p))
                for p in here)  # fmt: skip
        parts += [
            IN.format(backends=", ".join(BACKENDS)),
            _table("paper|computes|call|test, example", rows),
        ]
    if told := [p for p in papers if p.call and (p.claim or p.measured)]:
        figures = ((str(p.number), p.name, p.claim, p.measured) for p in told)
        parts += [FIGURES, _table("paper|the paper says|measured here", figures)]
    if missing:
        lacking = ((*_paper(p), _computes(p), p.claim) for p in missing)
        parts += [OUT, _table("paper|computes|the paper says", lacking)]
    if none:
        others = ((*_paper(p), _linked(p.note), p.claim) for p in none)
        parts += [NONE, _table("paper|what there is|the paper says", others)]
    return "".join(parts)


def _table(columns: str, rows: Iterable[Sequence[str]]) -> str:
    names = ["", *columns.split("|")]
    lines = [names, ["---"] * len(names), *([c.replace("|", "\\|") for c in row] for row in rows)]
    return "\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _paper(paper: Paper) -> tuple[str, str]:
    linked = f"[{paper.title}]({paper.link})"
    name = "" if paper.title.startswith(paper.name) else f"**{paper.name}**: "
    return str(paper.number), f"{name}{linked}, {paper.authors} {paper.year}"


def _code(call: str) -> str:
    return f"`{call.removeprefix('tokenmill.')}`"


def _computes(paper: Paper) -> str:
    formula = paper.computes.replace("*", "\\*").replace("_", "\\_")
    return f"{formula} ({_linked(paper.note)})" if paper.note else formula


def _linked(note: str) -> str:
    return re.sub(r"docs/(\w+\.md)", r"[\1](\1)", note)


def _files(paper: Paper) -> str:
    files = (path for path in (paper.test, paper.example) if path)
    return ", ".join(f"[{path.rsplit('/', 1)[1]}](../{path})" for path in files)


def _summary(papers: Sequence[Paper]) -> str:
    states = [paper.state for paper in papers]
    here, missing, none = map(states.count, STATES)
    return (
        f"{len(papers)} papers: {here} in the package, {missing} not in it, {none} without a "
        "computation of its kind."
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
        "test": [paper.test],
        "example": [paper.example],
        "backends": [", ".join(paper.backends)],
        "claims": [paper.claim],
        "measured": [paper.measured],
        "note": [paper.note],
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
