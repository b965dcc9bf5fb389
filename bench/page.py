"""HTML report of result files: `python -m tokenmill report FILE ... [--out PAGE]`. A file is output
of `bench --json`, `bench primitives --json`, `check --json`, `bench --counters`,
`bench --launches` or `evaluate --json`, or the steps of `ci/gpu`. Machines are in separate columns,
never in one table. The page loads nothing and runs no script."""

from __future__ import annotations

import argparse
import base64
import contextlib
import io
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from tokenmill import _cli, registry
from tokenmill.evaluation import table as evaluation

from . import report
from .case import RECIPES, geometric_mean
from .ceilings import from_primitives, row_bound
from .roofline import Point, Roof, roofline

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 110em; padding: 0 1em; }
table { border-collapse: collapse; font-size: 13px; margin: .6em 0; }
th, td { border: 1px solid #ddd; padding: 2px 7px; text-align: right; }
th:first-child, td:first-child { text-align: left; }
th { background: #f3f4f6; }
.side { display: flex; flex-wrap: wrap; gap: 1em 2.5em; align-items: flex-start; }
.wide { overflow-x: auto; } .wide td { white-space: nowrap; }
.side > div { flex: 1 1 32em; min-width: 0; overflow-x: auto; }
td.why, th.why { text-align: left; } .none { color: #777; }
.ok { background: #e3f1e3; } .bad { background: #f7d4d0; }
.bar { display: inline-block; height: 9px; background: #4c78a8; } .slow { background: #c8553d; }
svg, img { max-width: 100%; height: auto; } pre { overflow-x: auto; }
svg text { font: 11px system-ui, sans-serif; }
"""
Rows = list[dict[str, Any]]


@dataclass
class Machine:
    """Results of one machine: a column of the page."""

    name: str
    facts: dict[str, str]
    bench: dict[str, Any] = field(default_factory=dict)
    checks: list[dict[str, Any]] = field(default_factory=list)
    measured: list[dict[str, Any]] = field(default_factory=list)  # documents of primitives

    @property
    def rows(self) -> Rows:
        rows: Rows = self.bench.get("rows", [])
        return rows

    @property
    def primitives(self) -> Rows:
        """Rows of separate primitives files, or else the primitives that the times were compared
        with."""
        own = [row for document in self.measured for row in document["rows"]]
        return own or self.bench.get("primitives", [])

    @property
    def ceilings(self) -> Rows:
        """Primitives of the timed device."""
        device = self.bench.get("device", "cpu")
        own = [row for d in self.measured if d.get("device") == device for row in d["rows"]]
        return own or self.bench.get("primitives", [])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "files",
        nargs="+",
        metavar="FILE",
        help="what bench --json, bench primitives --json, check --json or evaluate --json wrote",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("report.html"), metavar="PAGE",
        help="the page (default report.html)",
    )  # fmt: skip


def run(options: argparse.Namespace) -> int:
    judged, files = {}, []
    for name in options.files:
        if rows := evaluated(name):
            judged[Path(name).stem] = rows
        else:
            files.append((Path(name).stem, report.load(name, checks=True)))
    others = [(n, d) for n, d in files if "machine" not in d]
    if judged:
        _cli.check_plot("FILE: the picture of evaluate's rows", "models")
    text = page(machines(files), others, judged)
    _cli.writable_folder("--out", options.out.parent)
    _cli.write_text("--out", options.out, text)
    return 0


def evaluated(name: str) -> list[evaluation.Row] | None:
    """Rows that evaluate --json wrote; None if the file has none."""
    with contextlib.suppress(OSError, ValueError, TypeError, RecursionError):
        return evaluation.read_rows(Path(name))
    return None


def machines(files: list[tuple[str, dict[str, Any]]]) -> list[Machine]:
    """One machine per file of times. Two machines may have identical facts, so a check or
    primitives file joins the machine with its facts only if that machine is unique."""
    times = [(n, d) for n, d in files if "machine" in d and _joins(d) is None]
    found = [Machine(_title(name, d), d["machine"], d) for name, d in times]
    for name, document in files:
        if (what := _joins(document)) is not None:
            alike = [m for m in found if m.facts == document["machine"]]
            if len(alike) != 1:
                alike = [Machine(_title(name, document), document["machine"])]
                found += alike
            getattr(alike[0], what).append(document)
    return found


def _joins(document: dict[str, Any]) -> str | None:
    """Attribute of Machine that holds this kind of document; None for times."""
    if "checks" in document:
        return "checks"
    return "measured" if document.get("kind") == "primitives" else None


def _title(name: str, document: dict[str, Any]) -> str:
    gpu = document.get("device") == "cuda" or {"cuda", "triton"} & {*document.get("places", ())}
    facts = document["machine"]
    return f"{name}: {facts['gpu'] if gpu and facts['gpu'] != 'none' else facts['cpu']}"


def page(
    columns: list[Machine],
    counts: list[tuple[str, dict[str, Any]]],
    judged: dict[str, list[evaluation.Row]],
) -> str:
    sections = (
        ("Machines", _facts),
        ("Correct?", _checks),
        ("Roofline", _roofline),
        ("Primitives", _primitives),
        ("Ratio to peers", _peers),
        ("Times", _times),
        ("What could not run", _absent),
    )
    body = "".join(_section(title, make, columns) for title, make in sections)
    body = "".join(_steps(d) for _, d in counts if "steps" in d) + body
    body += "".join(_counts(name, document) for name, document in counts if "steps" not in document)
    body += "".join(_evaluation(name, rows) for name, rows in judged.items())
    names = ", ".join([*(m.name for m in columns), *(name for name, _ in counts), *judged])
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>tokenmill: {escape(names)}</title><style>{STYLE}</style></head>\n"
        f"<body><h1>tokenmill report</h1>\n{body}</body></html>\n"
    )


def _section(title: str, make: Any, columns: list[Machine]) -> str:
    """The parts of all machines in columns, if any part is not empty."""
    parts = [make(machine) for machine in columns]
    if not any(parts):
        return ""
    cells = "".join(
        f"<div><h3>{escape(m.name)}</h3>{part or '<p class=none>not in the files</p>'}</div>"
        for m, part in zip(columns, parts, strict=True)
    )
    return f'<h2>{title}</h2>\n<div class="side">{cells}</div>\n'


def table(header: list[str], rows: list[list[str]]) -> str:
    """HTML table. Cells are HTML; a cell that begins with a class in brackets, "[ok]1", gets that
    class. An empty header has no row."""

    def cell(text: str, tag: str = "td") -> str:
        kind, found, rest = text[1:].partition("]") if text.startswith("[") else ("", "", text)
        return f'<{tag} class="{kind}">{rest}</{tag}>' if found else f"<{tag}>{text}</{tag}>"

    head = "".join(cell(h, "th") for h in header)
    head = f"<tr>{head}</tr>\n" if any(header) else ""
    body = "".join(f"<tr>{''.join(map(cell, row))}</tr>\n" for row in rows)
    return f"<table>{head}{body}</table>\n"


def _evaluation(name: str, rows: list[evaluation.Row]) -> str:
    """Quality against speed of policies on a model: the picture and the table."""
    found = []
    for model in dict.fromkeys(row.model for row in rows):
        of_model = [row for row in rows if row.model == model]
        drawn = io.BytesIO()
        evaluation.picture(of_model, drawn)
        source = "data:image/png;base64," + base64.b64encode(drawn.getvalue()).decode()
        lines = [
            [escape(cell) for cell in evaluation.cells(summary)]
            for summary in evaluation.summaries(of_model)
        ]
        found += [
            f"<h3>{escape(model)}</h3>\n",
            f'<img alt="quality against tokens per second" src="{source}">\n',
            f'<div class="wide">{table(list(evaluation.HEADER), lines)}</div>',
        ]
    return f"<h2>Policies: {escape(name)}</h2>\n{''.join(found)}"


def _facts(machine: Machine) -> str:
    rows = [[escape(k), escape(str(v))] for k, v in machine.facts.items()]
    kinds = {
        "measured": [machine.bench], "primitives": machine.measured, "checked": machine.checks
    }  # fmt: skip
    for kind, documents in kinds.items():
        for document in filter(None, documents):
            threads = f", {document['threads']} thread(s)" if "threads" in document else ""
            made = f"{document['date']}, tokenmill {document['tokenmill']}{threads}"
            rows.append([kind, escape(made)])
    for name, state in machine.bench.get("peers", {}).items():
        if not state.startswith("absent"):
            rows.append([f"peer {escape(name)}", escape(state)])
    if machine.bench.get("sensors", "none") != "none":
        rows.append(["clocks and power", escape(_clocks(machine))])
    return table(["", ""], [row for n, row in enumerate(rows) if row not in rows[:n]])


def _clocks(machine: Machine) -> str:
    """Minimum and maximum clocks over all cases, and all reasons for lower clocks."""
    read = [row["sensors"] for row in machine.rows if "sensors" in row]
    parts = []
    for name, unit in (("sm_mhz", "MHz"), ("memory_mhz", "MHz, memory"), ("watts", "W"),
                       ("celsius", "C")):  # fmt: skip
        values = [value for one in read for value in one.get(name, ())]
        if values:
            parts.append(f"{min(values):.0f}-{max(values):.0f} {unit}")
    reasons = dict.fromkeys(text for one in read for text in one.get("throttled", ()))
    parts += [f"clocks lowered: {text}" for text in reasons]
    return ", ".join(parts) or machine.bench["sensors"]


def _primitives(machine: Machine) -> str:
    rows = [[escape(cell) for cell in report.primitive_cells(row)] for row in machine.primitives]
    return table(["primitive", "best", "unit", "95 % of the median"], rows) if rows else ""


def _checks(machine: Machine) -> str:
    """Operator x backend x dtype: the maximum share of an error budget over tensors."""
    checks = [check for document in machine.checks for check in document["checks"]]
    if not checks:
        return ""
    dtypes = list(dict.fromkeys(d for check in checks for d in check["shares"]))
    places = list(dict.fromkeys(check["place"] for check in checks))
    by = {(check["op"], check["place"]): check for check in checks}
    rows = []
    for op in dict.fromkeys(check["op"] for check in checks):
        cells = [_share(by.get((op, place)), dtype) for place in places for dtype in dtypes]
        rows.append([f"<code>{escape(op)}</code>", *cells])
    header = ["error / budget", *(f"{escape(p)}<br>{d}" for p in places for d in dtypes)]
    problems = "".join(
        f"<li><code>{escape(c['op'])}</code>, {escape(c['place'])}: {escape(text)}</li>"
        for c in checks
        for text in c["problems"]
    )
    return table(header, rows) + (f"<ul>{problems}</ul>" if problems else "")


def _share(check: dict[str, Any] | None, dtype: str) -> str:
    if check is None or check["verdict"] == "absent":
        return "[none]-"
    if dtype not in check["shares"]:
        return "[bad]failed" if check["verdict"] == "FAILED" else "[none]-"
    share = check["shares"][dtype]
    return "[bad]∞" if share is None else f"[{'ok' if share <= 1 else 'bad'}]{share:.2f}"


def _roofline(machine: Machine) -> str:
    """Fastest case of each operator below the measured peaks: operations per second, and a bar if
    it is memory-bound."""
    rows = [row for row in machine.rows if row.get("bytes_per_second")]
    peaks = {row["dtype"]: row["flops"] / row["peak_share"] for row in rows if row["peak_share"]}
    bandwidth = machine.bench.get("copy_bandwidth", 0.0)
    if rows and machine.ceilings:
        with contextlib.suppress(ValueError):
            device = machine.bench.get("device", "cpu")
            found = from_primitives(machine.ceilings, device, machine.bench["threads"])
            peaks = {dtype: found.flops.get(dtype, peak) for dtype, peak in peaks.items()}
            bandwidth = found.memory
    points, moves, bars = [], [], []
    for op in dict.fromkeys(row["op"] for row in rows):
        of_op = [row for row in rows if row["op"] == op]
        limited = [row for row in of_op if row_bound(row, machine.bench).of == "memory"]
        if limited:
            fastest = max(limited, key=lambda row: row_bound(row, machine.bench).share)
            bars.append(_bandwidth_bar(op, fastest, machine.bench))
        best = max(of_op, key=lambda row: (row["flops"], row["bytes_per_second"]))
        if not best["flops"]:
            moves.append(f"{op} {report.figure(best['bytes_per_second'] / 1e9)} GB/s")
            continue
        family = registry.ops()[op].family if op in registry.ops() else RECIPES.get(op, "")
        intensity = best["flops"] / best["bytes_per_second"]
        points.append(Point(op, f"{op}: {best['case']}", family, intensity, best["flops"]))
    roofs = [Roof(dtype, peak) for dtype, peak in peaks.items()]
    text = roofline(points, roofs, bandwidth) if points and roofs else ""
    if bars:
        header = ["bound by memory", "GB/s", "of the ceiling", "case", ""]
        text += table(header, bars)
    return text + (f"<p>Without operations: {escape(', '.join(moves))}.</p>" if moves else "")


def _bandwidth_bar(op: str, row: dict[str, Any], results: dict[str, Any]) -> list[str]:
    share = row_bound(row, results).share
    width = min(round(200 * share), 240)
    return [
        f"<code>{escape(op)}</code>",
        report.figure(row["bytes_per_second"] / 1e9),
        f"{share:.0%}",
        f"[why]{escape(row['case'])}",
        f'[why]<span class="bar" style="width:{width}px"></span>',
    ]


def _peers(machine: Machine) -> str:
    """Geometric means over the cases of an operator: peer time / our time."""
    rows = [row for row in machine.rows if row.get("peers")]
    lines = []
    for op in dict.fromkeys(row["op"] for row in rows):
        of_op = [row for row in rows if row["op"] == op]
        for name in dict.fromkeys(name for row in of_op for name in row["peers"]):
            ratios = [row["peers"][name]["ratio"] for row in of_op if name in row["peers"]]
            mean = geometric_mean(ratios)
            width = min(round(12 * mean), 240)
            kind = "bar" if mean >= 1 else "bar slow"
            bar = f'[why]<span class="{kind}" style="width:{width}px"></span>'
            cells = [f"{mean:.2f}", f"{min(ratios):.2f}", f"{max(ratios):.2f}", str(len(ratios))]
            lines.append([f"<code>{escape(op)}</code>", escape(name), *cells, bar])
    if not lines:
        return ""
    return table(["", "peer", "mean", "least", "most", "cases", "their time / ours"], lines)


def _times(machine: Machine) -> str:
    lines = []
    for row in machine.rows:
        if "error" in row:
            continue
        peers = ", ".join(f"{name} {peer['ratio']:.2f}" for name, peer in row["peers"].items())
        lines.append(
            [
                f"<code>{escape(row['op'])}</code> {escape(row['case'])}",
                *report.cells_of(row, machine.bench),
                escape(peers),
            ]
        )
    if not lines:
        return ""
    return table(["case", *report.columns(machine.bench), "their time / ours"], lines)


def _steps(document: dict[str, Any]) -> str:
    """Steps of a ci/gpu run."""
    rows = []
    for step in document["steps"]:
        kind = "ok" if step["status"] == "ok" else "bad"
        title = f'<span title="{escape(step["command"])}">{escape(step["title"])}</span>'
        cells = [escape(step["stage"]), f"[why]{title}", f"[{kind}]{escape(step['status'])}"]
        rows.append([*cells, f"{step['seconds']:.0f}", f"[why]{escape(step['last'])}"])
    made = f"{document['device']}, {document['date']}"
    header = ["stage", "[why]step", "status", "s", "[why]last line of its log"]
    body = table(header, rows)
    return f'<h2>Steps</h2>\n<p>{escape(made)}</p><div class="wide">{body}</div>\n'


def _counts(name: str, document: dict[str, Any]) -> str:
    """Tables of counters or launches, as in `bench report`."""
    text = report.markdown(name, document).partition("\n")[2].strip()
    return f"<h2>{escape(name)}</h2><pre>{escape(text)}</pre>\n"


def _absent(machine: Machine) -> str:
    """Missing backends, operators, samples, cases and peers, with reasons."""
    lines: dict[tuple[str, str], None] = {}
    for document in machine.checks:
        for backend, state in document["backends"].items():
            if not state.startswith(("available", "interpreter")):
                lines[f"backend {backend}", state] = None
        for check in document["checks"]:
            what = f"{check['op']} on {check['place']}"
            if check["verdict"] == "absent":
                lines[what, "no kernel in this build"] = None
            for sample, why in check["left_out"].items():
                lines[f"{what}: {sample}", why] = None
    for row in machine.primitives:
        if "absent" in row:
            lines[row["title"], row["absent"]] = None
    for name, state in machine.bench.get("peers", {}).items():
        if state.startswith("absent") and machine.bench.get("device") == "cuda":
            lines[f"peer {name}", state.removeprefix("absent ").strip("()")] = None
    for row in machine.rows:
        for method in report.METHODS:
            if "absent" in row.get(method, {}):
                lines[f"{row['op']}: {row['case']}, {method}", row[method]["absent"]] = None
        if "error" in row:
            lines[f"{row['op']}: {row['case']}", row["error"]] = None
        for name, why in row.get("absent", {}).items():
            lines[f"peer {name} of {row['op']}", why] = None
    rows = [[escape(what), f"[why]{escape(why)}"] for what, why in lines]
    return table(["what", "why"], rows) if rows else ""
