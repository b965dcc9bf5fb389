"""Counters as a table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from .findings import short_name

SUMMED = (
    ("instructions", "warp instructions"),
    ("lanes", "lanes"),
    ("instructions_without_moves", "without moves"),
    ("mma", "tensor-core products"),
    ("barriers", "barriers"),
    ("local_requests", "requests to local memory"),
)
MAX_OPCODES = 12


def table(launches: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Rows with the sums over the launches of each kernel."""
    kernels: dict[str, list[dict[str, Any]]] = {}
    for launch in launches:
        kernels.setdefault(launch["kernel"], []).append(launch)
    for group in kernels.values():
        yield short_name(group[0]["name"])
        yield from _shape(group)
        if cut := sum(not launch.get("complete", True) for launch in group):
            yield f"  ended by a fault, and counted up to it: {cut} of {len(group)}"
        for key, title in SUMMED:
            if total := sum(launch[key] for launch in group):
                yield f"  {title:<26}{_number(total):>18}"
        yield from _classes(group)
        yield from _traffic(group, "shared", "waves")
        yield from _traffic(group, "global", "sectors")
        yield from _operands(group)
        yield from _opcodes(group)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) else f"{value:,.2f}"


def _shape(group: Sequence[dict[str, Any]]) -> Iterator[str]:
    first = group[0]
    grids = {(tuple(launch["grid"]), tuple(launch["block"])) for launch in group}
    shape = " x ".join("(" + ", ".join(map(str, first[k])) + ")" for k in ("grid", "block"))
    times = f"{len(group)} launch{'es' if len(group) > 1 else ''}"
    yield f"  {times}, grid x block {shape}{' and others' if len(grids) > 1 else ''}"
    yield (
        f"  bytes of shared memory {first['static_shared']} + {first['dynamic_shared']} dynamic, "
        f"of local memory {first['local_bytes']}"
    )


def _classes(group: Sequence[dict[str, Any]]) -> Iterator[str]:
    yield f"  {'class':<26}{'instructions':>18}{'lanes':>18}"
    for name in group[0]["classes"]:
        sums = [sum(x["classes"][name][key] for x in group) for key in ("instructions", "lanes")]
        if sums[0]:
            yield f"    {name:<24}" + "".join(f"{_number(s):>18}" for s in sums)


def _traffic(group: Sequence[dict[str, Any]], memory: str, unit: str) -> Iterator[str]:
    keys = ("requests", "bytes", unit, "ideal")
    kinds = {kind: None for launch in group for kind in launch[memory]}
    rows = []
    for kind in kinds:
        sums = [sum(x[memory].get(kind, {}).get(key, 0) for x in group) for key in keys]
        if sums[0]:
            rows.append(f"    {kind:<24}" + "".join(f"{_number(s):>18}" for s in sums))
    if rows:
        yield f"  {memory + ' memory':<26}" + "".join(f"{key:>18}" for key in keys)
        yield from rows


def _operands(group: Sequence[dict[str, Any]]) -> Iterator[str]:
    for key, title in (("a_bytes", "bytes of A read by wgmma"), ("b_bytes", "bytes of B")):
        if total := sum(launch.get("wgmma", {}).get(key, 0) for launch in group):
            yield f"  {title:<26}{_number(total):>18}"


def _opcodes(group: Sequence[dict[str, Any]]) -> Iterator[str]:
    totals: dict[str, int] = {}
    for launch in group:
        for opcode, row in launch["opcodes"].items():
            totals[opcode] = totals.get(opcode, 0) + row["instructions"]
    ranked = sorted(totals.items(), key=lambda item: (-item[1], item[0]))
    yield f"  {'most frequent opcodes':<50}{'instructions':>12}"
    for opcode, times in ranked[:MAX_OPCODES]:
        yield f"    {opcode:<46}{_number(times):>14}"
