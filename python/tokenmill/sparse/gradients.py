"""Helpers for attention operators with gradients of queries, keys and values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._call.attach import register
from .._call.autocast import Autocast
from .._call.autograd import keep, kept
from .._call.operator import TorchOp


def register_pair(
    op: str, check: Callable[..., None], autocast: Autocast
) -> tuple[TorchOp, TorchOp]:
    """Forward and backward of an operator (q, k, v, ...) -> (out, lse); check has its rules."""

    def backward(ops: Any, ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
        lowered, (out, lse) = kept(ctx)
        dout, dlse = cotangents(dout, dlse, out)
        run = getattr(ops, f"{op}_backward")
        dq, dk, dv = run(dout, dlse, out, lse, *lowered)
        return forward.gradients(q=dq, k=dk, v=dv)

    def check_backward(
        dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, *lowered: Any
    ) -> None:
        check(*lowered)

    forward = register(
        TorchOp(
            op,
            autocast=autocast,
            fake=_fake,
            triton=f"sparse.{op}:{op}",
            backward=backward,
            setup_context=_setup_context,
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


def _fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """out [B, ..., H, Dv] and lse [B, H, ...] of q [B, ..., H, D]."""
    batch, *places, heads, _ = q.shape
    return (
        q.new_empty((batch, *places, heads, v.shape[-1])),
        q.new_empty((batch, heads, *places), dtype=torch.float32),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    keep(ctx, inputs, *output)


def cotangents(
    dout: Tensor | None, dlse: Tensor | None, out: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Cotangents in the layout that the operators take."""
    if dout is None:
        dout = torch.zeros_like(out)
    if dout.stride(-1) != 1:  # e.g. the expanded gradient of a sum
        dout = dout.contiguous()
    return dout, None if dlse is None else dlse.contiguous()


def _fake_gradients(
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
