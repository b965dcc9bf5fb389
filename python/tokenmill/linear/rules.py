"""Rules for calls of the linear family. csrc/linear/*/host.cpp has the same rules in the same order
and words; the contract test compares the two.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._call.operator import record_of
from .._check import (
    check,
    check_cu_seqlens,
    check_device_of_q,
    check_last_contiguous,
    check_qkv,
    check_scale,
    check_wide,
    fail,
    is_any,
    show,
)
from .._written import check_out, check_written

LINEAR_ATTENTION = "linear_attention"
DECODE = "linear_attention_decode"
Arguments = record_of(LINEAR_ATTENTION)
FEATURE_MAPS = ("identity", "elu1", "relu", "silu", "taylor2")
MAX_TAYLOR_HEAD_DIM = 32


def feature_dim(feature_map: str, head_dim: int) -> int:
    """Rows of the state; with taylor2 the moments 1, k_i and k_i k_j (i <= j) of a key."""
    if feature_map != "taylor2":
        return head_dim
    return 1 + head_dim + head_dim * (head_dim + 1) // 2


def check_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    feature_map: str,
    scale: float,
    normalize: bool,
    initial_state: Tensor | None,
    return_final_state: bool,
    cu_seqlens: Tensor | None,
    chunk_size: int | None,
    *,
    float64: bool = False,
) -> None:
    op = LINEAR_ATTENTION
    _check_inputs(op, q, k, v, log_decay, feature_map, scale, cu_seqlens is not None, float64)
    batch = q.shape[0]
    if cu_seqlens is not None:
        check_cu_seqlens(op, "cu_seqlens", cu_seqlens, q)
        batch = cu_seqlens.shape[0] - 1
    if initial_state is not None:
        shape = (batch, *_head_state(q, v, feature_map, normalize))
        if tuple(initial_state.shape) != shape:
            fail(op, "initial_state", f"must have shape {show(shape)}", initial_state.shape)
        _check_state(op, "initial_state", initial_state, q)
    if chunk_size is not None:
        power = chunk_size in (16, 32, 64, 128, 256)
        check(power, op, "chunk_size", "must be a power of two from 16 to 256", chunk_size)


def check_linear_attention_out(*lowered: Any, float64: bool = False) -> None:
    *arguments, out = lowered
    check_linear_attention(*arguments, float64=float64)
    a = Arguments(*arguments)
    check_out(LINEAR_ATTENTION, out, (*a.q.shape[:-1], a.v.shape[-1]), a)


def check_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    log_decay: Tensor | None,
    feature_map: str,
    scale: float,
    normalize: bool,
    state_indices: Tensor | None,
    *,
    float64: bool = False,
) -> None:
    op = DECODE
    _check_inputs(op, q, k, v, log_decay, feature_map, scale, False, float64)
    head = _head_state(q, v, feature_map, normalize)
    if state.dim() != 4 or tuple(state.shape[1:]) != head:
        rule = f"must have shape [slots, {', '.join(map(str, head))}]"
        fail(op, "state", rule, state.shape)
    _check_state(op, "state", state, q)
    check_slots(op, "state", state, state_indices, q)
    read = {"q": q, "k": k, "v": v, "log_decay": log_decay, "state_indices": state_indices}
    check_written(op, "state", state, read)


def check_slots(
    op: str, argument: str, state: Tensor, state_indices: Tensor | None, q: Tensor
) -> None:
    """Checks the state slots and state_indices."""
    batch = q.shape[0]
    if state_indices is None:
        if state.shape[0] < batch:
            rule = f"must have a slot for each sequence, {batch}, without state_indices"
            fail(op, argument, rule, state.shape[0])
        return
    dtype = state_indices.dtype
    check(dtype == torch.int32, op, "state_indices", "must be int32", dtype)
    if tuple(state_indices.shape) != (batch,):
        fail(op, "state_indices", f"must have shape [{batch}]", state_indices.shape)
    check_last_contiguous(op, "state_indices", state_indices)
    check_device_of_q(op, "state_indices", state_indices, q)


def _check_inputs(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    feature_map: str,
    scale: float,
    packed: bool,
    float64: bool,
) -> None:
    check_qkv(op, q, k, v, 3 if packed else 4, float64)
    length = q.shape[-3]
    if k.shape[-3] != length:
        fail(op, "k", f"must have the length of q, {length}", k.shape[-3])
    maps = "must be 'identity', 'elu1', 'relu', 'silu' or 'taylor2'"
    check(feature_map in FEATURE_MAPS, op, "feature_map", maps, feature_map)
    if feature_map == "taylor2" and q.shape[-1] > MAX_TAYLOR_HEAD_DIM:
        rule = f"must have a head dimension of 1 to {MAX_TAYLOR_HEAD_DIM} with 'taylor2'"
        fail(op, "q", rule, q.shape[-1])
    check_scale(op, scale)
    if log_decay is not None:
        heads = q.shape[-2]
        token = tuple(q.shape[:-1])
        if not is_any(tuple(log_decay.shape), (heads,), token):
            fail(op, "log_decay", f"must have shape [{heads}] or {show(token)}", log_decay.shape)
        check_wide(op, "log_decay", log_decay, q)
        check_device_of_q(op, "log_decay", log_decay, q)


def _head_state(q: Tensor, v: Tensor, feature_map: str, normalize: bool) -> tuple[int, int, int]:
    """[H, F, Dv], with normalize [H, F, Dv + 1]."""
    return q.shape[-2], feature_dim(feature_map, q.shape[-1]), v.shape[-1] + int(normalize)


def _check_state(op: str, name: str, t: Tensor, q: Tensor) -> None:
    check_wide(op, name, t, q)
    check(
        rows_lie_together(t),
        op,
        name,
        "must have the rows of a head without gaps; strides",
        t.stride(),
    )
    check_device_of_q(op, name, t, q)


def rows_lie_together(t: Tensor) -> bool:
    last = t.shape[-1] == 1 or t.stride(-1) == 1
    return t.numel() == 0 or (last and (t.shape[-2] == 1 or t.stride(-2) == t.shape[-1]))


def check_slot_values(op: str, state_indices: Tensor, slots: int) -> None:
    found = state_indices.tolist()
    for i in found:
        if not -1 <= i < slots:
            fail(op, "state_indices", f"must be -1 (skip) or a slot below {slots}", i)
    used = [i for i in found if i >= 0]
    check(len(set(used)) == len(used), op, "state_indices", "must not repeat a slot", found)


def check_decay_values(op: str, log_decay: Tensor | None) -> None:
    """Checks log_decay values. NaN is allowed: it propagates."""
    if log_decay is None:
        return
    positive = log_decay[log_decay > 0]
    if positive.numel() > 0:
        fail(op, "log_decay", "must not be positive; largest", positive.max().item())
