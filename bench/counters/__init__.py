"""Exact counters of the compiled CUDA kernels on the PTX machine: `python -m tokenmill bench
--counters [op ...]`."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any, TextIO

from tokenmill import _cli, _info
from tokenmill._call import library
from tokenmill._version import __version__

from ..progress import progress
from ..results import Results
from . import (
    additive,
    attention,
    caches,
    conv,
    decode,
    delta,
    linear,
    select,
    sparse,
    titans,
    tokens,
)
from .case import FIGURES, Counted, CounterCase, measure

OPS: dict[str, Counted] = {
    "attention": attention.COUNTED,
    "additive_attention": additive.COUNTED,
    "attention_column_scores": select.COLUMNS_OF_WEIGHTS,
    "attention_decode": decode.DENSE,
    "attention_row_scores": select.ROWS,
    "delta_attention": delta.COUNTED,
    "indexer_topk_select": select.INDEXER,
    "kv_block_scores": select.SCORES,
    "linear_attention": linear.COUNTED,
    "sparse_decode_attention": decode.SPARSE,
    "titans_memory": titans.COUNTED,
    "topk_select": select.TOPK,
    **caches.COUNTED,
    **conv.COUNTED,
    **sparse.COUNTED,
    **tokens.COUNTED,
}
CASE_WIDTH = 60


def run(options: argparse.Namespace, stdout: TextIO) -> int:
    """Returns the exit status: 0, or 1 if a case failed."""
    if not library.emulated_built():
        raise _cli.UsageError("--counters: needs a development build (TOKENMILL_PTXVM=1)")
    if options.plot:
        raise _cli.UsageError("--plot: draws no counters; leave it out with --counters")
    if unknown := sorted(set(options.ops) - set(OPS)):
        raise _cli.UsageError(
            f"ops: must be of {', '.join(OPS)} with --counters; got {', '.join(unknown)}"
        )
    chosen = {
        op: [c for c in counted.cases() if options.filter.search(c.title)]
        for op, counted in OPS.items()
        if op in options.ops or not options.ops
    }
    if not any(chosen.values()):
        raise _cli.UsageError(f"--filter: no case matches; got '{options.filter.pattern}'")
    if options.list:
        print("\n".join(f"{op}: {c.title}" for op, found in chosen.items() for c in found))
        return 0
    results = Results(options.json, stdout)
    results.begin(
        {
            "tokenmill": __version__,
            "cuda": _info.build_info().get("cuda_version", ""),
            "date": time.strftime("%Y-%m-%d"),
            "per": {op: OPS[op].per for op in chosen if chosen[op]},
            "counted_peers": {op: OPS[op].peers for op in chosen if chosen[op]},
        }
    )
    with progress(sum(map(len, chosen.values())), "counting") as advance:
        for op, cases in chosen.items():
            if cases:
                _count(op, OPS[op], cases, results, advance)
    results.end()
    return 1 if any("error" in row for row in results.rows) else 0


def _count(
    op: str, counted: Counted, cases: Sequence[CounterCase], results: Results, advance: Any
) -> None:
    compared = [key for key in FIGURES if any(key in c.against for c in cases)]
    print(f"{op}, per {counted.per}" + (f"; against {counted.peers}" if compared else ""))
    header = ["unit"]
    for key, name in FIGURES.items():
        header += [name, "against"] if key in compared else [name]
    print(_line("case", header))
    counts: list[tuple[CounterCase, dict[str, Any]]] = []
    for case in cases:
        named = {"op": op, "case": case.title}
        try:
            row = measure(case)
        except Exception as error:
            row = {"error": _cli.one_line(error)}
        else:
            counts.append((case, row))
        advance(done=True)
        results.add(named | row | {"against": case.against})
        print(_line(case.title, _cells(row, case, compared)), flush=True)
    for key in compared:
        held = [
            round(row[key], 2) <= round(case.against[key], 2)
            for case, row in counts
            if case.held and key in case.against
        ]
        print(f"{FIGURES[key]}: at or below the peers in {sum(held)} of {len(held)} rows")
    print()


def _cells(row: dict[str, Any], case: CounterCase, compared: Sequence[str]) -> list[str]:
    if "error" in row:
        return [f"failed: {row['error']}"]
    cells = [row["binding_unit"]]
    for key in FIGURES:
        cells.append(_number(row[key]))
        if key in compared:
            cells.append(_number(case.against[key]) if key in case.against else "-")
    return cells


def _number(x: float) -> str:
    return f"{x:.0f}" if x >= 100 else f"{x:.1f}" if x >= 10 else f"{x:.2f}"


def _line(case: str, cells: Sequence[str]) -> str:
    return f"{case:<{CASE_WIDTH}}" + "".join(f"{cell:>9}" for cell in cells)
