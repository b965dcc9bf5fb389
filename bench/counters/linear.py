"""Cases of linear_attention, next to the Triton kernels of lightning-attention and
flash-linear-attention, each compiled for 8.0 and for 9.0; on sm_90a the sm_90a forward."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

import tokenmill as tm

from ..linear_attention import useful_work
from .case import Counted, CounterCase, on_device, peer_rows

LENGTH, HEADS = 1024, 2  # shape of the peers
FILLING = 132  # number of sequences from which none is split, on the machine's H100


@dataclass(frozen=True)
class Shape:
    """One row: sequences of 1024 tokens, two heads, inputs N(0, 1)."""

    head_dim: int
    backward: bool = False
    gates: str = ""  # decay per "tokens" or "channels", with its gradient, instead of per head
    dtype: torch.dtype = torch.float16
    batch: int = 1
    sm90: bool = False

    @property
    def title(self) -> str:
        parts = ["sm_90a"] if self.sm90 else []
        parts += [
            "backward" if self.backward else "forward",
            f"D{self.head_dim} S{LENGTH} H{HEADS}",
        ]
        parts += [f"B{self.batch}"] if self.batch > 1 else []
        parts += [str(self.dtype)[6:]] if self.dtype != torch.float16 else []
        return " ".join(parts) + (f", gates of {self.gates}" if self.gates else ", decay of a head")

    @property
    def tokens(self) -> int:
        """Tokens of all heads."""
        return self.batch * HEADS * LENGTH

    @property
    def min_mma(self) -> float:
        """Minimum for chunks of 64 tokens, visible pairs only: two pair products and two state
        products forward, five of each backward."""
        forward = useful_work(LENGTH, HEADS, self.head_dim, self.head_dim) * self.batch / 4096
        return forward * (2.5 if self.backward else 1)

    @property
    def min_bytes(self) -> float:
        """Minimum traffic: every tensor once."""
        numbers = {"": 0, "tokens": 1, "channels": self.head_dim}[self.gates]
        gates = 4 * (self.backward + 1) * numbers
        return self.tokens * ((7 if self.backward else 4) * self.head_dim * 2 + gates)


def prepare(shape: Shape) -> Callable[[], object]:
    generator = torch.Generator().manual_seed(0)
    size = (LENGTH, HEADS, shape.head_dim)

    def draw() -> torch.Tensor:
        x = torch.randn(size, generator=generator).to(shape.dtype).expand(shape.batch, *size)
        if shape.sm90:
            x = x.contiguous()  # tensor maps do not support stride 0
        return x.detach().requires_grad_(shape.backward)

    q, k, v = draw(), draw(), draw()
    if shape.gates:
        of_channels = (shape.head_dim,) if shape.gates == "channels" else ()
        gates = torch.randn(LENGTH, HEADS, *of_channels, generator=generator) * 3 + 2
        log_decay = torch.nn.functional.logsigmoid(gates).expand(shape.batch, *gates.shape)
        log_decay = log_decay.detach().requires_grad_(shape.backward)
    else:
        log_decay = -tm.lightning_slopes(HEADS)
    leaves = (q, k, v, log_decay) if shape.gates else (q, k, v)

    def forward() -> Any:
        return tm.linear_attention(q, k, v, log_decay=log_decay, backend="emulated")

    if not shape.backward:
        return forward
    out = forward()
    cotangent = torch.randn(size, generator=generator).to(shape.dtype).expand_as(out)
    return lambda: torch.autograd.grad(out, leaves, cotangent)


def bounds(head_dim: int) -> dict[str, float]:
    """Best of the peers for each figure: forward, chunks of 64 tokens. Operand reads of wgmma on
    9.0 count as waves."""
    kernels: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in peer_rows("linear_attention"):
        if row["head_dim"] == head_dim:
            kernels.setdefault((row["peer"], row["capability"]), []).append(row)
    if not kernels:
        return {}
    peers = [_figures(rows) for rows in kernels.values()]
    return {key: min(p[key] for p in peers) for key in peers[0]}


def _figures(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Sum over consecutive kernels."""
    units = {unit: sum(row["cycles"][unit] for row in rows) for unit in rows[0]["cycles"]}
    waves = sum(row["bank_waves"] for row in rows)
    shape = Shape(rows[0]["head_dim"])
    return {
        "binding_cycles": max(c for unit, c in units.items() if unit != "l2"),
        "instructions": 4 * units["issue"],
        "traffic_over_least": sum(row["traffic_kib"] for row in rows) / rows[0]["floor_kib"],
        "mma_over_least": sum(row["mma"] for row in rows) / shape.min_mma,
        "waves": units["shared"],
        "waves_over_ideal": waves / sum(r["bank_waves"] / r["waves_over_ideal"] for r in rows),
    }


def shapes() -> Iterator[Shape]:
    for head_dim in (64, 128):
        for backward in (False, True):
            for gates in ("", "tokens"):
                yield Shape(head_dim, backward, gates)
            yield Shape(head_dim, backward, batch=FILLING)
    for head_dim in (64, 128):
        yield Shape(head_dim, dtype=torch.bfloat16)
    yield Shape(256, batch=FILLING)
    for backward in (False, True):
        yield Shape(128, backward, "channels")
    for gates in ("", "tokens"):
        yield Shape(128, gates=gates, sm90=True)
    for dtype in (torch.float16, torch.bfloat16):
        for head_dim in (128, 256):
            yield Shape(head_dim, dtype=dtype, batch=FILLING, sm90=True)


def cases() -> Iterator[CounterCase]:
    for shape in shapes():
        call = functools.partial(prepare, shape)
        yield CounterCase(
            shape.title,
            shape.tokens,
            shape.min_bytes,
            shape.min_mma,
            functools.partial(on_device, "sm_90a", call) if shape.sm90 else call,
            {} if shape.backward or shape.gates == "channels" else bounds(shape.head_dim),
        )


COUNTED = Counted(
    "token and head", cases, "the best of lightning-attention and flash-linear-attention"
)
