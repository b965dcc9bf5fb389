"""Results as Markdown tables: `python -m tokenmill bench report FILE ... [--update PAGE]`. A file
has times or primitives of one machine, or counts of `bench --counters` or `bench --launches`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from tokenmill import _cli

from .case import geometric_mean
from .ceilings import row_bound
from .plot import label
from .probe import SCALES

BEGIN = "<!-- bench report: begin -->"
END = "<!-- bench report: end -->"
METHODS = {"graph": "graph ms", "kernels": "kernels ms"}  # GPU columns in addition to the call
LAUNCH_COLUMNS = 4  # calls per line
# Headings of counters that are too short on the command line.
HEADINGS = {
    "instructions": "instructions",
    "traffic_over_least": "bytes / least",
    "mma_over_least": "mma / least",
    "waves_over_ideal": "waves / ideal",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "files",
        nargs="+",
        metavar="FILE",
        help="results that bench --json or bench primitives --json wrote: of one machine each, of "
        "--counters or --launches",
    )
    parser.add_argument(
        "--rates",
        action="store_true",
        help="print TFLOP/s of every case and its peers, and nothing else",
    )
    parser.add_argument(
        "--update",
        metavar="PAGE",
        help=f"rewrite the lines of this page between '{BEGIN}' and '{END}', instead of printing",
    )


def run(options: argparse.Namespace) -> int:
    show = rates if options.rates else markdown
    tables = "\n".join(show(Path(name).stem, load(name)) for name in options.files)
    if options.update is None:
        print(tables, end="")
        return 0
    page = Path(options.update)
    try:
        page.write_text(update(page.read_text(), tables))
    except (OSError, ValueError) as error:
        rule = f"must be a page with the lines '{BEGIN}' and '{END}'"
        raise _cli.UsageError(f"--update: {rule}; got '{page}' ({error})") from None
    return 0


def update(page: str, tables: str) -> str:
    """The page with the tables between its two markers. ValueError if a marker is missing."""
    head, rest = page[: page.index(BEGIN)], page[page.index(BEGIN) :]
    return f"{head}{BEGIN}\n\n{tables}\n{rest[rest.index(END) :]}"


def markdown(name: str, results: dict[str, Any]) -> str:
    """Section of one file: the measurement, and a table per operator."""
    rows = results["rows"]
    if "multiprocessors" in results:
        return "\n".join([f"### {name}", "", *_launches(results)]) + "\n"
    if results.get("kind") == "primitives":
        return "\n".join([f"### {name}", "", *_primitives(results)]) + "\n"
    lines = [f"### {name}", "", *(_counted if "per" in results else _measured)(results)]
    for op in dict.fromkeys(row["op"] for row in rows):
        of_op = [row for row in rows if row["op"] == op]
        lines += ["", *(_counters if "per" in results else _times)(op, of_op, results)]
    return "\n".join(lines) + "\n"


def _counted(results: dict[str, Any]) -> list[str]:
    made = f"CUDA {results['cuda']}; tokenmill {results['tokenmill']}, {results['date']}"
    return [f"Exact counts on the PTX machine, PTX of {made}. Bold: above the peer."]


def _measured(results: dict[str, Any]) -> list[str]:
    rows = results["rows"]
    # Results from before --device have none: they are CPU results.
    machine = label(results["machine"], results.get("device", "cpu"), results["threads"])
    peaks = {r["dtype"]: r["flops"] / r["peak_share"] for r in rows if r.get("peak_share")}
    ceilings = [f"{dtype} {figure(peak / 1e9)} GFLOP/s" for dtype, peak in peaks.items()]
    ceilings += [f"copy {figure(results['copy_bandwidth'] / 1e9)} GB/s"]
    return [
        f"{machine}; tokenmill {results['tokenmill']}, {results['date']}.",
        f"Measured ceilings: {', '.join(ceilings)}.",
    ]


def _primitives(results: dict[str, Any]) -> list[str]:
    machine = label(results["machine"], results["device"], None)
    made = f"{machine}; tokenmill {results['tokenmill']}, {results['date']}."
    header = ["primitive", "best", "unit", "95 % of the median"]
    lines = [made, "", _line(header), _line(["---"] * len(header))]
    return lines + [_line([*primitive_cells(row)]) for row in results["rows"]]


def primitive_cells(row: dict[str, Any]) -> tuple[str, str, str, str]:
    """Title, value, unit, and interval of the median of a primitive's row."""
    scale, unit = SCALES[row["unit"]]
    if "absent" in row:
        return row["title"], "-", unit, f"absent: {row['absent']}"
    low, high = (figure(x / scale) for x in row["interval"])
    return row["title"], figure(row["value"] / scale), unit, f"{low}-{high}"


def _counters(op: str, rows: list[dict[str, Any]], results: dict[str, Any]) -> list[str]:
    from .counters.case import FIGURES

    compared = [key for key in FIGURES if any(key in row["against"] for row in rows)]
    header = [f"`{op}`, per {results['per'][op]}", "unit"]
    for key, name in FIGURES.items():
        header += [HEADINGS.get(key, name)] + (["peer"] if key in compared else [])
    lines = [_line(header), _line(["---"] * len(header))]
    for row in rows:
        if "error" in row:
            cells = [f"failed: {row['error']}"] + [""] * (len(header) - 2)
        else:
            cells = [row["binding_unit"]]
            for key in FIGURES:
                peer = row["against"].get(key)
                above = peer is not None and round(row[key], 2) > round(peer, 2)
                cells.append(f"**{figure(row[key])}**" if above else figure(row[key]))
                if key in compared:
                    cells.append("" if peer is None else figure(peer))
        lines.append(_line([row["case"], *cells]))
    return lines + (["", f"Peers: {results['counted_peers'][op]}."] if compared else [])


def _launches(results: dict[str, Any]) -> list[str]:
    """Several calls per line, in columns from top to bottom."""
    cells = [
        [f"`{row['op']}` {row['case']}", ", ".join(map(str, row["blocks"]))]
        for row in results["rows"]
    ]
    height = -(-len(cells) // LAUNCH_COLUMNS)
    columns = [cells[i : i + height] for i in range(0, len(cells), height)]
    header = ["call", "blocks"] * len(columns)
    lines = [_line(header), _line(["---"] * len(header))]
    for i in range(height):
        shown = [column[i] if i < len(column) else ["", ""] for column in columns]
        lines.append(_line([text for pair in shown for text in pair]))
    made = f"CUDA {results['cuda']}; tokenmill {results['tokenmill']}, {results['date']}"
    count = results["multiprocessors"]
    rule = f"Blocks of each launch of a call for one request, of {count} multiprocessors ({made})."
    return [rule, "", *lines]


def columns(results: dict[str, Any]) -> list[str]:
    """Headings of the figures of a row: results of schema 1 have no intervals, CPU results no other
    times."""
    found = ["ms"]
    if results.get("schema", 1) > 1:
        found.append("95 % of the median")
    found += ["GFLOP/s", "% of peak", "GB/s"]
    return found + ([*METHODS.values()] if results.get("device") == "cuda" else [])


def cells_of(row: dict[str, Any], results: dict[str, Any]) -> list[str]:
    """Figures of a row, in these columns. The peak is the binding one: arithmetic, or bandwidth,
    marked GB/s."""
    nearer = row_bound(row, results)
    cells = {
        "ms": figure(row["seconds"] * 1e3),
        "95 % of the median": interval(row) if "interval" in row else "",
        "GFLOP/s": figure(row["flops"] / 1e9) if row["flops"] else "",
        "GB/s": figure(row["bytes_per_second"] / 1e9),
        "% of peak": f"{nearer.share:.0%}" + (" GB/s" if nearer.of == "memory" else ""),
    }
    for method, heading in METHODS.items():
        timed = row.get(method, {})
        cells[heading] = figure(timed["seconds"] * 1e3) if "seconds" in timed else ""
    return [cells[heading] for heading in columns(results)]


def interval(row: dict[str, Any]) -> str:
    """Interval of the median, in ms: "4.75-4.93", and the coverage if it is below 95 %. One
    repetition has none."""
    if not row["coverage"]:
        return "-"
    low, high = (figure(seconds * 1e3) for seconds in row["interval"])
    covered = "" if row["coverage"] >= 0.95 else f" ({100 * row['coverage']:.0f} %)"
    return f"{low}-{high}{covered}"


def _times(op: str, rows: list[dict[str, Any]], results: dict[str, Any]) -> list[str]:
    peers = list(dict.fromkeys(name for row in rows for name in row.get("peers", ())))
    headings = columns(results)
    width = len(headings)
    lines = [_line([f"`{op}`", *headings, *peers]), _line(["---"] * (1 + width + len(peers)))]
    for row in rows:
        if "error" in row:
            cells = [f"failed: {row['error']}"] + [""] * (width - 1 + len(peers))
        else:
            cells = cells_of(row, results)
            shown = {name: figure(peer["ratio"]) for name, peer in row["peers"].items()}
            cells += [shown.get(name, "") for name in peers]
        lines.append(_line([row["case"], *cells]))
    means = []
    for name in peers:
        ratios = [row["peers"][name]["ratio"] for row in rows if name in row.get("peers", ())]
        means.append(figure(geometric_mean(ratios)) if len(ratios) > 1 else "")
    if any(means):
        lines.append(_line(["geometric mean", *[""] * width, *means]))
    absent = {(n, why): None for row in rows for n, why in row.get("absent", {}).items()}
    if absent:
        lines += ["", f"Absent: {'; '.join(f'{name} ({why})' for name, why in absent)}."]
    return lines


def rates(name: str, results: dict[str, Any]) -> str:
    """TFLOP/s of the rows of one file, one line per row: ours and the peers'."""
    rows = [row for row in results["rows"] if "error" in row or row.get("flops")]
    peers = list(dict.fromkeys(name for row in rows for name in row.get("peers", ())))
    found = [[f"{name}: TFLOP/s", "tokenmill", *peers]]
    for row in rows:
        if "error" in row:
            cells = [f"failed: {row['error']}"]
        else:
            others = (row["peers"].get(peer, {}).get("flops", 0) for peer in peers)
            cells = [figure(flops / 1e12) if flops else "" for flops in (row["flops"], *others)]
        found.append([row["case"], *cells])
    columns = max(len(cells) for cells in found)
    widths = [max(len(cells[i]) for cells in found if i < len(cells)) for i in range(columns)]
    lines = ("  ".join(c.ljust(w) for c, w in zip(cells, widths, strict=False)) for cells in found)
    return "\n".join(line.rstrip() for line in lines) + "\n"


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def figure(value: float) -> str:
    """Three significant digits, or all digits of a longer integer."""
    return f"{value:#.3g}".rstrip(".") if value < 999.5 else f"{value:.0f}"


def load(name: str, *, checks: bool = False) -> dict[str, Any]:
    """Contents of a bench --json file; with checks also of check --json, and the steps of
    ci/gpu."""
    try:
        results: dict[str, Any] = json.loads(Path(name).read_text())
        checked = checks and (results.keys() >= {"checks", "machine"} or "steps" in results)
        if not checked and (
            "rows" not in results or not results.keys() & {"machine", "per", "multiprocessors"}
        ):
            raise ValueError("no rows, or no machine")
        if not all(isinstance(row, dict) for row in results.get("rows", ())):
            raise ValueError("a row is no object")
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        wrote = "bench --json, check --json or evaluate --json" if checks else "bench --json"
        rule = f"must be results that {wrote} wrote"
        raise _cli.UsageError(f"FILE: {rule}; got '{name}' ({_cli.one_line(error)})") from None
    return results
