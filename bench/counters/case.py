"""Definition of a counter case, and the figures derived from its counters. A model of an H100 turns
counters into cycles: it knows only the throughput of each unit, so it compares kernels and does
not predict time."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tokenmill import _emulator

Launches = list[dict[str, Any]]

PEERS = Path(__file__).parents[1] / "peer_counters.json"
SECTOR_BYTES = 32

# Per cycle of one H100 SM: 4096 operations of 16-bit products (one m16n8k16), 16 special functions,
# 128 float32 and 64 integer, comparison or conversion lanes, one shared memory wave, four
# instructions, 64 bytes between L1 and L2.
UNITS = ("tensor", "special", "fp32", "alu", "shared", "issue", "l2")

# Figures of a row, with their column headings: cycles of the busiest on-chip unit (excludes L2),
# warp instructions without moves, bytes between L1 and L2 over the minimum, tensor-core work over
# the minimum, shared memory waves, and waves over the ideal.
FIGURES = {
    "binding_cycles": "cycles",
    "instructions": "instr.",
    "traffic_over_least": "bytes",
    "mma_over_least": "mma",
    "waves": "waves",
    "waves_over_ideal": "/ideal",
}


@dataclass(frozen=True)
class CounterCase:
    """One row. prepare draws the tensors and returns the call whose kernels are counted; figures
    are per `units`. Without min_mma, tensor cores are ignored. against: figures of the peers;
    held: whether they count in the verdict below the table."""

    title: str
    units: float
    min_bytes: float
    min_mma: float
    prepare: Callable[[], Callable[[], object]]
    against: Mapping[str, float] = field(default_factory=dict)
    held: bool = True
    with_moves: bool = False  # count moves too: the peers' instruction counts include them


def on_device(device: str, prepare: Callable[[], Callable[[], object]]) -> Callable[[], object]:
    """Wraps prepare and the call that it returns to run on a device of the PTX machine."""
    with _emulator.configured(f"device={device}"):
        call = prepare()

    def run() -> object:
        with _emulator.configured(f"device={device}"):
            return call()

    return run


@dataclass(frozen=True)
class Counted:
    """Cases of one operator."""

    per: str
    cases: Callable[[], Iterable[CounterCase]]
    peers: str = ""


def products(macs: float, dtype: torch.dtype) -> float:
    """Tensor-core work of a number of multiply-adds, in m16n8k16. float32 takes three tf32 products
    at half the speed."""
    return macs / 2048 * (6 if dtype == torch.float32 else 1)


def count(case: CounterCase) -> Launches:
    call = case.prepare()
    with _emulator.counting() as launches:
        call()
    return launches


def measure(case: CounterCase) -> dict[str, Any]:
    launches = count(case)
    units = cycles(launches, case.units)
    on_chip = {unit: c for unit, c in units.items() if unit != "l2"}
    waves, ideal = (sum(r[key] for r in _shared(launches)) for key in ("waves", "ideal"))
    instructions = "instructions" if case.with_moves else "instructions_without_moves"
    mma = sum(launch["mma"] for launch in launches)
    return {
        "binding_unit": max(on_chip, key=lambda unit: on_chip[unit]),
        "binding_cycles": max(on_chip.values()),
        "instructions": sum(launch[instructions] for launch in launches) / case.units,
        "traffic_over_least": traffic(launches) / case.min_bytes,
        "mma_over_least": mma / case.min_mma if case.min_mma else 0.0,
        "waves": waves / case.units,
        "waves_over_ideal": waves / ideal if ideal else 1.0,
        "local_requests": sum(launch["local_requests"] for launch in launches),
        "cycles": units,
    }


def cycles(launches: Launches, units: float) -> dict[str, float]:
    """Cycles of one SM, by unit."""

    def lanes(*classes: str) -> float:
        return sum(launch["classes"][c]["lanes"] for launch in launches for c in classes)

    totals = {
        "tensor": sum(launch["mma"] for launch in launches),
        "special": lanes("special") / 16,
        "fp32": lanes("fp32") / 128,
        "alu": lanes("integer", "select", "convert") / 64,
        "shared": sum(r["waves"] for r in _shared(launches)) + operands(launches) / 128,
        "issue": sum(launch["instructions_without_moves"] for launch in launches) / 4,
        "l2": traffic(launches) / 64,
    }
    return {unit: totals[unit] / units for unit in UNITS}


def operands(launches: Launches) -> int:
    """Bytes of shared memory that wgmma reads; 128 per cycle."""
    return sum(sum(launch.get("wgmma", {}).values()) for launch in launches)


def traffic(launches: Launches) -> int:
    """Bytes between L1 and L2, in whole sectors."""
    rows = [r for launch in launches for r in launch["global"].values()]
    return sum(r["sectors"] for r in rows) * SECTOR_BYTES


def _shared(launches: Launches) -> Iterator[dict[str, int]]:
    return (r for launch in launches for r in launch["shared"].values())


@functools.cache
def peer_rows(op: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(PEERS.read_text())[op]
    return rows
