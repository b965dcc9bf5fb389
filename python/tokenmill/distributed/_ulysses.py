"""Ulysses attention: each rank has whole sequences of some heads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dense.attention import attention
from ._call import Call
from ._group import Group
from .sequence import as_held, in_order


def heads_divide(heads: int, kv_heads: int, ranks: int) -> str | None:
    """The reason why the heads cannot be divided among the ranks, or None."""
    if heads % ranks:
        return f"{ranks} ranks do not divide {heads} query heads"
    if kv_heads % ranks and ranks % kv_heads:
        return f"{ranks} ranks and {kv_heads} key heads do not divide each other"
    return None


def head_attention(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    group, where = call.group, call.where
    options = call.options | {"return_lse": call.return_lse}
    for name in ("score_bias", "sink", "alibi_slopes"):
        if isinstance(options.get(name), Tensor):  # [..., H]
            options[name] = options[name].chunk(group.size, -1)[group.rank]
    copies = max(group.size // k.shape[-2], 1)  # copies of a KV head, on neighbouring ranks
    whole = [in_order(_by_heads(group, t, where.sizes, n), -3, where)
             for t, n in ((q, 1), (k, copies), (v, copies))]  # fmt: skip
    if call.cu_seqlens is not None:
        options["cu_seqlens_q"] = call.cu_seqlens.to(q.device)
    window = (-1 if call.left is None else call.left, -1 if call.right is None else call.right)
    q, k, v = whole
    found: Any = attention(q, k, v, window=window, **options)
    out, lse = found if call.return_lse else (found, None)
    out = _by_tokens(group, as_held(out, -3, where), where.sizes)
    if lse is None:
        return out, q.new_empty(0, dtype=torch.float32)
    rows = as_held(lse.transpose(-2, -1)[..., None], -3, where)  # [..., S, h, 1]
    rows = _by_tokens(group, rows, where.sizes)
    return out, rows[..., 0].transpose(-2, -1)


def _by_heads(group: Group, x: Tensor, sizes: tuple[int, ...], copies: int) -> Tensor:
    """[..., n, H, D] of all heads -> [..., S, H copies / P, D] of all tokens."""
    if group.size == 1:
        return x
    if copies > 1:
        x = x[..., None, :].expand(*x.shape[:-1], copies, x.shape[-1]).flatten(-3, -2)
    heads = x.shape[-2] // group.size
    parts = x.unflatten(-2, (group.size, heads)).movedim(-3, 0).movedim(-3, 1)  # [P, n, ..., h, D]
    rest = parts.shape[2:]
    each = rest.numel()
    received = [size * each for size in sizes]
    sent = [parts.shape[1] * each] * group.size
    found = group.exchange(parts.flatten(), sent, received)
    return found.view(sum(sizes), *rest).movedim(0, -3)


def _by_tokens(group: Group, x: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """The inverse: [..., S, h, D] -> [..., n, P h, D]."""
    if group.size == 1:
        return x
    rows = x.movedim(-3, 0)  # [S, ..., h, D]
    rest = rows.shape[1:]
    each, own = rest.numel(), sizes[group.rank]
    sent = [size * each for size in sizes]
    found = group.exchange(rows.flatten(), sent, [own * each] * group.size)
    parts = found.view(group.size, own, *rest)  # [P, n, ..., h, D]
    return parts.movedim(1, -3).movedim(0, -3).flatten(-3, -2)
