"""Rotary embedding of keys that are cached unrotated."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .._check import check, check_device_of_q, check_dtype
from ..reference.sparse.sparse_decode_attention import rotate

Rope = tuple[Tensor, Tensor]


def check_rope(name: str, rope: Rope, q: Tensor, positions: int, what: str) -> None:
    """Checks (cos, sin) for queries [B, S, H, D] and the required number of positions; what: the
    reason for this number.
    """
    pair = isinstance(rope, tuple | list) and len(rope) == 2
    pair = pair and all(isinstance(t, Tensor) and t.dim() == 2 for t in rope)
    rule = "must be None or a pair of tensors [positions, pairs]"
    check(pair and rope[0].shape == rope[1].shape, name, "rope", rule, rope)
    few = f"must have a position for {what}, {positions}"
    check(len(rope[0]) >= positions, name, "rope", few, rope[0].shape)
    maximum = q.shape[3] // 2
    rule = f"must have up to {maximum} pairs of columns"
    check(rope[0].shape[1] <= maximum, name, "rope", rule, rope[0].shape)
    for t in rope:
        check_dtype(name, "rope", t, float64=True)
        check_device_of_q(name, "rope", t, q)


def by_rank(rope: Rope | None, interleaved: bool) -> dict[str, Any]:
    """Arguments of sparse_decode_attention that rotate keys by their rank among those attended to;
    none without rope.
    """
    return {} if rope is None else {"pos_mode": "cache", "rope": rope, "interleaved": interleaved}


def rotated(x: Tensor, rope: Rope, at: Tensor, interleaved: bool) -> Tensor:
    """x [B, S, H, D] rotated to positions [S] or [B, S]."""
    cos, sin = (t[at].unsqueeze(-2).float() for t in rope)
    return rotate(x.float(), cos, sin, interleaved).to(x)
