"""The state of a recurrence: its size, its layout, its slots and its decay."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .._check import check, fail

MAX_TAYLOR_HEAD_DIM = 32


def feature_dim(feature_map: str, head_dim: int) -> int:
    """Rows of the state; with taylor2 the moments 1, k_i and k_i k_j (i <= j) of a key."""
    if feature_map != "taylor2":
        return head_dim
    return 1 + head_dim + head_dim * (head_dim + 1) // 2


def rows_lie_together(t: Tensor) -> bool:
    last = t.shape[-1] == 1 or t.stride(-1) == 1
    return t.numel() == 0 or (last and (t.shape[-2] == 1 or t.stride(-2) == t.shape[-1]))


def with_rows_together(state: Tensor | None) -> Tensor | None:
    """A state as kernels read it: copied if there are gaps between its rows."""
    if state is None or state.dim() != 4 or rows_lie_together(state):
        return state
    return state.contiguous()


def with_channels_together(log_decay: Tensor | None, rank: int) -> Tensor | None:
    """A decay as kernels read it: one per channel, which has this rank, is copied if there are gaps
    between its channels.
    """
    if log_decay is None or log_decay.dim() != rank or log_decay.stride(-1) == 1:
        return log_decay
    return log_decay.contiguous()


def with_heads_of_queries(fields: dict[str, Any]) -> None:
    """Repeats k and v for each head of q in a call whose log_decay is per channel, if they fit."""
    q, k, v, log_decay = (fields[name] for name in ("q", "k", "v", "log_decay"))
    if log_decay is None or not (log_decay.dim() == q.dim() == k.dim() == v.dim() > 2):
        return
    heads, kv_heads = q.shape[-2], k.shape[-2]
    if v.shape[-2] != kv_heads or kv_heads in (0, heads) or heads % kv_heads:
        return
    for name, t in (("k", k), ("v", v)):
        fields[name] = t.repeat_interleave(heads // kv_heads, -2)


def cotangents(a: Any, dout: Tensor | None, *dstates: Tensor | None) -> tuple[Tensor | None, ...]:
    """Cotangents as kernels read them; none of states that the call did not return."""
    if dout is not None and dout.stride(-1) != 1:  # e.g. the expanded gradient of a sum
        dout = dout.contiguous()
    kept = dstates if a.return_final_state else (None,) * len(dstates)
    return dout, *(t if t is None else t.contiguous() for t in kept)


def check_slot_values(op: str, state_indices: Tensor, slots: int) -> None:
    found = state_indices.tolist()
    for i in found:
        if not -1 <= i < slots:
            fail(op, "state_indices", f"must be -1 (skip) or a slot below {slots}", i)
    used = [i for i in found if i >= 0]
    check(len(set(used)) == len(used), op, "state_indices", "must not repeat a slot", found)


def check_request_values(op: str, a: Any, tokens: int) -> None:
    """Checks the values of state_indices and accepted of a decode step."""
    for n in [] if a.accepted is None else a.accepted.tolist():
        if not 0 <= n <= tokens:
            fail(op, "accepted", f"must be 0 to the number of tokens, {tokens}", n)
    if a.state_indices is not None:
        check_slot_values(op, a.state_indices, a.state.shape[0])


def check_decay_values(op: str, log_decay: Tensor | None) -> None:
    """Checks log_decay values. NaN is allowed: it propagates."""
    if log_decay is None:
        return
    positive = log_decay[log_decay > 0]
    if positive.numel() > 0:
        fail(op, "log_decay", "must not be positive; largest", positive.max().item())
