"""Rules for calls of titans_memory and titans_memory_decode. csrc/linear/titans_memory/host.cpp has
the same rules in the same order and words; the contract test compares the two.
"""

from __future__ import annotations

from torch import Tensor

from .._check import (
    as_int,
    check,
    check_cu_seqlens,
    check_device_of_q,
    check_dtype,
    check_dtype_of,
    check_last_contiguous,
    check_wide,
    fail,
    show,
)
from .rules import rows_lie_together

TITANS_MEMORY = "titans_memory"
PAIR = "must be a pair of tensors (M, S) or None"


def check_titans_memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor,
    eta: Tensor,
    theta: Tensor,
    chunk_size: int,
    initial_memory: Tensor | None,
    initial_momentum: Tensor | None,
    return_final_state: bool,
    cu_seqlens: Tensor | None,
    *,
    float64: bool = False,
) -> None:
    op, packed = TITANS_MEMORY, cu_seqlens is not None
    check_queries(op, q, k, v, packed=packed, float64=float64)
    for name, t in (("q", q), ("k", k), ("v", v)):
        check_last_contiguous(op, name, t)
    check_gates(op, {"alpha": alpha, "eta": eta, "theta": theta}, q, wide=True)
    check(chunk_size > 0, op, "chunk_size", "must be at least 1", chunk_size)
    sequences = q.shape[0]
    if cu_seqlens is not None:
        check_cu_seqlens(op, "cu_seqlens", cu_seqlens, q)
        sequences = cu_seqlens.shape[0] - 1
    if (initial_memory is None) != (initial_momentum is None):
        fail(op, "initial_state", PAIR, None)
    shape = (sequences, q.shape[-2], q.shape[-1], v.shape[-1])
    for state in (initial_memory, initial_momentum):
        if state is None:
            continue
        if tuple(state.shape) != shape:
            fail(op, "initial_state", f"must have shape {show(shape)}", state.shape)
        check_wide(op, "initial_state", state, q)
        gaps = "must have the rows of a head without gaps; strides"
        check(rows_lie_together(state), op, "initial_state", gaps, state.stride())
        check_device_of_q(op, "initial_state", state, q)


def check_queries(
    op: str, q: Tensor, k: Tensor, v: Tensor, *, packed: bool = False, float64: bool
) -> None:
    layout = "3 dimensions [T, H, D] (packed)" if packed else "4 dimensions [B, S, H, D]"
    check(q.dim() == (3 if packed else 4), op, "q", f"must have {layout}", q.dim())
    check_dtype(op, "q", q, float64=float64)
    check(q.shape[-1] > 0, op, "q", "must have a head dimension of at least 1", q.shape[-1])
    for name, t in (("k", k), ("v", v)):
        check_dtype_of(op, name, t, "q", q)
        check_device_of_q(op, name, t, q)
    if k.shape != q.shape:
        fail(op, "k", f"must have the shape of q, {show(q.shape)}", k.shape)
    if v.dim() != q.dim() or v.shape[:-1] != q.shape[:-1]:
        rule = f"must have the shape of q up to the head dimension, {show(q.shape)}"
        fail(op, "v", rule, v.shape)
    check(v.shape[-1] > 0, op, "v", "must have a head dimension of at least 1", v.shape[-1])


def check_gates(op: str, gates: dict[str, Tensor], q: Tensor, *, wide: bool) -> None:
    for name, t in gates.items():
        check(t.is_floating_point(), op, name, "must be a floating-point tensor", t.dtype)
        if wide:
            check_wide(op, name, t, q)
        if t.shape != q.shape[:-1]:
            fail(op, name, f"must have shape {show(q.shape[:-1])}", t.shape)
        check_device_of_q(op, name, t, q)


def check_chunk_size(op: str, chunk_size: int) -> int:
    chunk_size = as_int(op, "chunk_size", chunk_size)
    check(chunk_size > 0, op, "chunk_size", "must be at least 1", chunk_size)
    return chunk_size
