"""Cases of attention, next to FlashAttention-2 and FlashSigmoid, and of its sm_90a kernels, next to
FlashAttention-3."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

import tokenmill as tm

from .case import Counted, CounterCase, on_device, peer_rows

COMPARED = ("FlashAttention-2", "FlashSigmoid")
COMPARED_SM90 = ("FlashAttention-3",)
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
        """Visible pairs of query and key."""
        s = self.seqlen
        return self.heads * (s * (s + 1) // 2 if self.causal else s * s)

    @property
    def min_mma(self) -> float:
        """Minimum number of m16n8k16, for visible pairs only: 2 products forward, 5 backward."""
        return (10 if self.backward else 4) * self.head_dim * self.scores / 4096

    def min_bytes(self, kind: str) -> int:
        """Minimum traffic: every tensor once."""
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
        if self.kind != "sigmoid":
            return self.kind
        return f"sigmoid {self.precision}" + ("" if self.bias else ", bias 0")

    @property
    def has_peers(self) -> bool:
        return self.kind in ("softmax", "sigmoid")

    @property
    def map_peer(self) -> str:
        """Peer with the same score map, hence the same tensors to read and write."""
        return "FlashAttention-2" if self.kind == "softmax" else "FlashSigmoid"

    @property
    def instruction_peer(self) -> str:
        return "FlashSigmoid" if self.precision == "fast" else "FlashAttention-2"


VARIANTS = (
    Variant("softmax", "accurate", False),
    Variant("sigmoid", "accurate", True),
    Variant("sigmoid", "fast", True),
    Variant("sigmoid", "accurate", False),
    Variant("relu", "accurate", False),
)


def shapes() -> Iterator[Shape]:
    for backward in (False, True):
        for head_dim in (64, 128):
            for seqlen in (512, 1024):
                for causal in (True, False):
                    yield Shape(backward, head_dim, seqlen, 1, 1, causal)
                    if (head_dim, seqlen, causal) == (64, 512, True):
                        yield Shape(backward, head_dim, seqlen, 2, 1, causal)


def shapes_of_sm90() -> Iterator[Shape]:
    """Shapes with one head, and head_dims without a counted peer."""
    yield from (shape for shape in shapes() if shape.heads == 1)
    for backward in (False, True):
        for head_dim in (96, 192, 256):
            for causal in (True, False):
                yield Shape(backward, head_dim, 1024, 1, 1, causal)


def prepare(shape: Shape, variant: Variant) -> Callable[[], object]:
    """Prepares one pass."""
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
        return lambda: tm.attention(q, k, v, **options)
    out = tm.attention(q, k, v, **options)
    assert isinstance(out, torch.Tensor)
    cotangent = torch.randn(out.shape, generator=generator).half()
    return lambda: torch.autograd.grad(out, (q, k, v), cotangent)


def bounds(
    shape: Shape, variant: Variant, compared: tuple[str, ...] = COMPARED
) -> dict[str, float]:
    """Peer figures that a row is compared with."""
    if not variant.has_peers:
        return {}
    rows = {
        row["peer"]: row
        for row in peer_rows("attention")
        if row["peer"] in compared
        and row["dtype"] == "float16"
        and (row["pass"] == "backward") == shape.backward
        and all(
            row[key] == getattr(shape, key)
            for key in ("head_dim", "seqlen", "heads", "kv_heads", "causal")
        )
    }

    if not rows:
        return {}

    def binding(row: dict[str, Any]) -> float:
        return max(row["cycles"][unit] for unit in PEER_UNITS)

    def traffic_share(row: dict[str, Any]) -> float:
        return (row["read_kib"] + row["write_kib"] + row["atomic_kib"]) / row["floor_kib"]

    def row_of(peer: str) -> dict[str, Any]:
        return rows[peer if len(compared) > 1 else compared[0]]

    return {
        "binding_cycles": min(map(binding, rows.values())),
        "instructions": row_of(variant.instruction_peer)["lean_per_1000_scores"],
        "traffic_over_least": traffic_share(row_of(variant.map_peer)),
    }


def cases() -> Iterator[CounterCase]:
    for shape in shapes():
        for variant in VARIANTS:
            yield CounterCase(
                f"{shape.title} {variant.title}",
                shape.scores / 1000,
                shape.min_bytes(variant.kind),
                shape.min_mma,
                functools.partial(prepare, shape, variant),
                bounds(shape, variant),
                held=variant.bias or variant.kind == "softmax",
            )
    for shape in shapes_of_sm90():
        for variant in VARIANTS:
            if not variant.has_peers:
                continue
            yield CounterCase(
                f"sm_90a {shape.title} {variant.title}",
                shape.scores / 1000,
                shape.min_bytes(variant.kind),
                shape.min_mma,
                functools.partial(on_device, "sm_90a", functools.partial(prepare, shape, variant)),
                bounds(shape, variant, COMPARED_SM90),
                held=variant.bias or variant.kind == "softmax",
            )


COUNTED = Counted(
    "1000 useful scores",
    cases,
    "FlashAttention-2 and FlashSigmoid, on sm_90a FlashAttention-3",
)
