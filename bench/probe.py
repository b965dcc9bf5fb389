"""One measurement of a machine's ceilings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

SCALES = {"FLOP/s": (1e9, "GFLOP/s"), "B/s": (1e9, "GB/s"), "1/s": (1e9, "G/s"), "s": (1e-6, "us")}


@dataclass(frozen=True)
class Probe:
    """One row. measure(seconds) returns samples in the unit, taking about that many seconds; it
    raises if this machine or this torch does not support it."""

    primitive: str
    unit: str  # a key of SCALES
    measure: Callable[[float], list[float]]
    facts: dict[str, Any] = field(default_factory=dict)  # dtype, bytes, threads, how

    @property
    def title(self) -> str:
        facts = self.facts
        parts = [self.primitive, facts.get("dtype", "")]
        if "bytes" in facts:
            parts.append(size(facts["bytes"]))
        if "threads" in facts:
            parts.append(f"{facts['threads']} thread(s)")
        return " ".join([part for part in parts if part]) + (
            f", {facts['how']}" if "how" in facts else ""
        )


def size(count: int) -> str:
    """Size in binary units: "256 KiB"."""
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if count >= unit:
            return f"{count / unit:.4g} {name}"
    return f"{count} B"
