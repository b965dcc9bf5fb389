"""Helpers for attention operators with gradients of queries, keys and values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._call.attach import register
from .._call.autocast import Autocast
from .._call.autograd import Gradients, kept
from .._call.operator import TorchOp


def register_pair(op: str, autocast: Autocast) -> tuple[TorchOp, TorchOp]:
    """Forward and backward of an operator (q, k, v, ...) -> (out, lse)."""

    def backward(ops: Any, ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> Gradients:
        a, (out, lse) = kept(ctx)
        dout, dlse = cotangents(dout, dlse, out)
        run = getattr(ops, f"{op}_backward")
        dq, dk, dv = run(dout, dlse, out, lse, *a)
        return {"q": dq, "k": dk, "v": dv}

    forward = register(
        TorchOp(
            op,
            autocast=autocast,
            fake=_fake,
            triton=f"sparse.{op}:{op}",
            backward=backward,
            saves=("out", "lse"),
        )
    )
    gradients = register(
        TorchOp(
            f"{op}_backward",
            fake=_fake_gradients,
            triton=f"sparse.{op}_backward:{op}_backward",
        )
    )
    return forward, gradients


def _fake(a: Any) -> tuple[Tensor, Tensor]:
    """out [B, ..., H, Dv] and lse [B, H, ...] of q [B, ..., H, D]."""
    batch, *places, heads, _ = a.q.shape
    return (
        a.q.new_empty((batch, *places, heads, a.v.shape[-1])),
        a.q.new_empty((batch, heads, *places), dtype=torch.float32),
    )


def _fake_gradients(a: Any) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(t.shape) for t in (a.q, a.k, a.v))


def cotangents(
    dout: Tensor | None, dlse: Tensor | None, out: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Cotangents in the layout that the operators take."""
    if dout is None:
        dout = torch.zeros_like(out)
    if dout.stride(-1) != 1:  # e.g. the expanded gradient of a sum
        dout = dout.contiguous()
    return dout, None if dlse is None else dlse.contiguous()
