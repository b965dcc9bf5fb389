"""What the compiled CUDA kernels of attention do, counted exactly on the PTX machine, beside the
counters of peer kernels (peer_counters.json). A model of an H100 turns counters into cycles: it
knows the throughput of each unit and nothing else, so it compares kernels and predicts no time.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import tokenmill as tm
from tokenmill import emulator, library

from .progress import progress

PEERS = Path(__file__).parent / "peer_counters.json"
COMPARED = ("FlashAttention-2", "FlashSigmoid")
SECTOR_BYTES = 32

# Per cycle of one SM of an H100: 4096 operations of 16-bit products (one m16n8k16), 16 special
# functions, 128 float32 and 64 integer, comparison or conversion lanes, one wave of shared memory,
# four instructions, 64 bytes between L1 and L2.
UNITS = ("tensor", "special", "fp32", "alu", "shared", "issue", "l2")
PEER_UNITS = ("tensor", "mufu", "fp32", "alu", "shared", "issue")  # l2 is not an on-chip bound


@dataclass(frozen=True)
class Shape:
    """One row: batch 1, float16, inputs N(0, 1)."""

    backward: bool
    head_dim: int
    seqlen: int
    heads: int
    kv_heads: int
    causal: bool

    @property
    def title(self) -> str:
        group = f" H{self.heads}/{self.kv_heads}" if self.heads != self.kv_heads else ""
        mask = "causal" if self.causal else "full"
        name = "backward" if self.backward else "forward"
        return f"{name} D{self.head_dim} S{self.seqlen}{group} {mask}"

    @property
    def scores(self) -> int:
        """Pairs of a query and a key that it sees."""
        s = self.seqlen
        return self.heads * (s * (s + 1) // 2 if self.causal else s * s)

    @property
    def least_mma(self) -> float:
        """Of m16n8k16, for the visible pairs alone: 2 products forward, 5 backward."""
        return (10 if self.backward else 4) * self.head_dim * self.scores / 4096

    def least_bytes(self, kind: str) -> int:
        """Every tensor once."""
        query = self.heads * self.seqlen * self.head_dim * 2
        key = self.kv_heads * self.seqlen * self.head_dim * 2
        lse = self.heads * self.seqlen * 4
        softmax = kind == "softmax"
        if not self.backward:
            return 2 * query + 2 * key + (lse if softmax else 0)
        return 3 * query + 4 * key + (query + lse if softmax else 0)


@dataclass(frozen=True)
class Variant:
    kind: str
    precision: str
    bias: bool  # score_bias -log S, as models use it; else 0

    @property
    def title(self) -> str:
        if self.kind == "softmax":
            return "softmax"
        return f"sigmoid {self.precision}" + ("" if self.bias else ", bias 0")

    @property
    def map_peer(self) -> str:
        """The peer with the same score map, hence with the same tensors to read and write."""
        return "FlashAttention-2" if self.kind == "softmax" else "FlashSigmoid"

    @property
    def instruction_peer(self) -> str:
        return "FlashSigmoid" if self.precision == "fast" else "FlashAttention-2"


VARIANTS = (
    Variant("softmax", "accurate", False),
    Variant("sigmoid", "accurate", True),
    Variant("sigmoid", "fast", True),
    Variant("sigmoid", "accurate", False),
)


def shapes() -> Iterator[Shape]:
    for backward in (False, True):
        for head_dim in (64, 128):
            for seqlen in (512, 1024):
                for causal in (True, False):
                    yield Shape(backward, head_dim, seqlen, 1, 1, causal)
                    if (head_dim, seqlen, causal) == (64, 512, True):
                        yield Shape(backward, head_dim, seqlen, 2, 1, causal)


def launches_of(shape: Shape, variant: Variant) -> list[dict[str, Any]]:
    """Counters of the kernels that one pass launches."""
    generator = torch.Generator().manual_seed(0)

    def draw(heads: int) -> torch.Tensor:
        size = (1, shape.seqlen, heads, shape.head_dim)
        return torch.randn(size, generator=generator).half().requires_grad_(shape.backward)

    q, k, v = draw(shape.heads), draw(shape.kv_heads), draw(shape.kv_heads)
    options: dict[str, Any] = {"kind": variant.kind, "causal": shape.causal}
    options |= {"precision": variant.precision, "backend": "emulated"}
    if variant.bias:
        options["score_bias"] = -math.log(shape.seqlen)
    if not shape.backward:
        with emulator.counting() as launches:
            tm.attention(q, k, v, **options)
        return launches
    out = tm.attention(q, k, v, **options)
    assert isinstance(out, torch.Tensor)
    cotangent = torch.randn(out.shape, generator=generator).half()
    with emulator.counting() as launches:
        torch.autograd.grad(out, (q, k, v), cotangent)
    return launches


def cycles(launches: list[dict[str, Any]], scores: int) -> dict[str, float]:
    """Of one SM, per 1000 scores, by unit."""

    def lanes(*classes: str) -> float:
        return sum(launch["classes"][c]["lanes"] for launch in launches for c in classes)

    waves = sum(r["waves"] for launch in launches for r in launch["shared"].values())
    totals = {
        "tensor": sum(launch["mma"] for launch in launches),
        "special": lanes("special") / 16,
        "fp32": lanes("fp32") / 128,
        "alu": lanes("integer", "select", "convert") / 64,
        "shared": waves,
        "issue": sum(launch["instructions_without_moves"] for launch in launches) / 4,
        "l2": traffic(launches) / 64,
    }
    return {unit: totals[unit] * 1000 / scores for unit in UNITS}


def traffic(launches: list[dict[str, Any]]) -> int:
    """Bytes between L1 and L2, whole sectors."""
    rows = [r for launch in launches for r in launch["global"].values()]
    return sum(r["sectors"] for r in rows) * SECTOR_BYTES


def measure(shape: Shape, variant: Variant) -> dict[str, Any]:
    launches = launches_of(shape, variant)
    units = cycles(launches, shape.scores)
    on_chip = {unit: c for unit, c in units.items() if unit != "l2"}
    shared = [r for launch in launches for r in launch["shared"].values()]
    ideal = sum(r["ideal"] for r in shared)
    return {
        "case": shape.title,
        "variant": variant.title,
        "binding_unit": max(on_chip, key=lambda unit: on_chip[unit]),
        "binding_cycles": max(on_chip.values()),
        "instructions": units["issue"] * 4,
        "mma_over_least": sum(launch["mma"] for launch in launches) / shape.least_mma,
        "traffic_over_least": traffic(launches) / shape.least_bytes(variant.kind),
        "waves_over_ideal": sum(r["waves"] for r in shared) / ideal if ideal else 1.0,
        "local_requests": sum(launch["local_requests"] for launch in launches),
        "cycles": units,
    }


@functools.cache
def _peer_rows() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(PEERS.read_text())["rows"]
    return rows


def bounds(shape: Shape, variant: Variant) -> dict[str, float]:
    """The figures of the peers that a row is held against."""
    rows = {
        row["peer"]: row
        for row in _peer_rows()
        if row["peer"] in COMPARED
        and row["dtype"] == "float16"
        and (row["pass"] == "backward") == shape.backward
        and all(
            row[key] == getattr(shape, key)
            for key in ("head_dim", "seqlen", "heads", "kv_heads", "causal")
        )
    }

    def binding(row: dict[str, Any]) -> float:
        return max(row["cycles"][unit] for unit in PEER_UNITS)

    def traffic_share(row: dict[str, Any]) -> float:
        return (row["read_kib"] + row["write_kib"] + row["atomic_kib"]) / row["floor_kib"]

    return {
        "binding_cycles": min(map(binding, rows.values())),
        "instructions": rows[variant.instruction_peer]["lean_per_1000_scores"],
        "traffic_over_least": traffic_share(rows[variant.map_peer]),
    }


def run(options: argparse.Namespace) -> int:
    if not library.emulated_built():
        print("tokenmill bench: --counters: needs a development build (TOKENMILL_PTXVM=1)")
        return 2
    print(
        "per 1000 useful scores, against FlashAttention-2 and FlashSigmoid (docs/performance.md)\n"
    )
    header = ("unit", "cycles", "against", "instr.", "against", "bytes", "against", "mma", "waves")
    print(f"{'case':<32}{'variant':<26}" + "".join(f"{h:>9}" for h in header))
    chosen = [
        (s, v)
        for s in shapes()
        for v in VARIANTS
        if re.search(options.filter, f"{s.title} {v.title}")
    ]
    rows = []
    with progress(len(chosen)) as advance:
        for shape, variant in chosen:
            row, peers = measure(shape, variant), bounds(shape, variant)
            rows.append(row | {"against": peers})
            advance(done=True)
            print(_line(row, peers), flush=True)
    held = [r for r in rows if "bias 0" not in r["variant"]]
    for key in ("binding_cycles", "instructions", "traffic_over_least"):
        good = sum(round(r[key], 2) <= round(r["against"][key], 2) for r in held)
        print(f"{key}: at or below the peers in {good} of {len(held)} rows")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
        print(f"wrote {options.json}")
    return 0


def _line(row: dict[str, Any], peers: dict[str, float]) -> str:
    cells = [
        row["binding_unit"],
        f"{row['binding_cycles']:.0f}",
        f"{peers['binding_cycles']:.0f}",
        f"{row['instructions']:.0f}",
        f"{peers['instructions']:.0f}",
        f"{row['traffic_over_least']:.2f}",
        f"{peers['traffic_over_least']:.2f}",
        f"{row['mma_over_least']:.2f}",
        f"{row['waves_over_ideal']:.2f}",
    ]
    return f"{row['case']:<32}{row['variant']:<26}" + "".join(f"{c:>9}" for c in cells)
