"""What the compiled CUDA kernels do, counted exactly on the PTX machine: `python -m tokenmill bench
--counters [op ...]`."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from typing import Any

from tokenmill import library

from ..progress import progress
from . import attention, decode, linear, select, sparse, tokens
from .case import FIGURES, Counted, CounterCase, measure

OPS: dict[str, Counted] = {
    "attention": attention.COUNTED,
    "attention_decode": decode.DENSE,
    "kv_block_scores": select.SCORES,
    "linear_attention": linear.COUNTED,
    "sparse_decode_attention": decode.SPARSE,
    "topk_select": select.TOPK,
    **sparse.COUNTED,
    **tokens.COUNTED,
}
CASE_WIDTH = 60


def run(options: argparse.Namespace) -> int:
    if not library.emulated_built():
        print("tokenmill bench: --counters: needs a development build (TOKENMILL_PTXVM=1)")
        return 2
    if unknown := sorted(set(options.ops) - set(OPS)):
        print(f"tokenmill bench: --counters: {', '.join(unknown)}: not one of {', '.join(OPS)}")
        return 2
    chosen = {
        op: [c for c in counted.cases() if re.search(options.filter, c.title)]
        for op, counted in OPS.items()
        if op in options.ops or not options.ops
    }
    if not any(chosen.values()):
        print("tokenmill bench: --counters: no case matches")
        return 2
    rows: list[dict[str, Any]] = []
    with progress(sum(map(len, chosen.values()))) as advance:
        for op, cases in chosen.items():
            if cases:
                rows += _count(op, OPS[op], cases, advance)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
        print(f"wrote {options.json}")
    return 0


def _count(op: str, counted: Counted, cases: Sequence[CounterCase], advance: Any) -> list[Any]:
    compared = [key for key in FIGURES if any(key in c.against for c in cases)]
    print(f"{op}, per {counted.per}" + (f"; against {counted.peers}" if compared else ""))
    header = ["unit"]
    for key, name in FIGURES.items():
        header += [name, "against"] if key in compared else [name]
    print(_line("case", header))
    rows = []
    for case in cases:
        row = measure(case)
        rows.append({"op": op, "case": case.title} | row | {"against": case.against})
        cells = [row["binding_unit"]]
        for key in FIGURES:
            cells.append(_number(row[key]))
            if key in compared:
                cells.append(_number(case.against[key]) if key in case.against else "-")
        advance(done=True)
        print(_line(case.title, cells), flush=True)
    for key in compared:
        held = [
            round(row[key], 2) <= round(case.against[key], 2)
            for row, case in zip(rows, cases, strict=True)
            if case.held and key in case.against
        ]
        print(f"{FIGURES[key]}: at or below the peers in {sum(held)} of {len(held)} rows")
    print()
    return rows


def _number(x: float) -> str:
    return f"{x:.0f}" if x >= 100 else f"{x:.1f}" if x >= 10 else f"{x:.2f}"


def _line(case: str, cells: Sequence[str]) -> str:
    return f"{case:<{CASE_WIDTH}}" + "".join(f"{cell:>9}" for cell in cells)
