"""attention: out_i = sum_j P_ij v_j over the visible keys, with P = softmax(z), or the weights f(z)
of another kind, unnormalised, divided by their sum or by the number of visible keys.

    z_ij = softcap tanh(scale q_i . k_j / softcap) + bias_ij - slope |p_i - j| + score_bias

With post_decay z has no slope term, and P_ij is multiplied by e^(-slope |p_i - j|) instead. Query i
is at position p_i = i + Sk - Sq and sees key j if -right <= p_i - j <= left.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ._common import (
    cell_distance,
    decay,
    expand_heads,
    masked_pairs,
    normalized,
    scores,
    softmax,
    visible_pairs,
    weighted_sum,
    weights,
)


def attention(a: Any, *, upcast: bool = True) -> tuple[Tensor, Tensor]:
    """q [B, Sq, H, D], k [B, Sk, Hk, D], v [B, Sk, Hk, Dv] -> out [B, Sq, H, Dv], and lse or row
    sums [B, H, Sq]; packed q [Tq, H, D] -> [Tq, H, Dv] and [H, Tq]. upcast=False keeps 16-bit
    inputs in 16 bits throughout, as plain PyTorch code would: the baseline of the error budget.
    """
    wide = torch.promote_types(a.q.dtype, torch.float32)
    if a.cu_seqlens_q is None:
        out, lse = _one(a, upcast)
        return out, lse.to(wide)
    outs = [a.q.new_zeros(0, a.q.shape[1], a.v.shape[2])]
    lses = [a.q.new_zeros(a.q.shape[1], 0, dtype=wide)]
    ends_q, ends_k = a.cu_seqlens_q.tolist(), a.cu_seqlens_k.tolist()
    for b in range(len(ends_q) - 1):
        rows, keys = slice(*ends_q[b : b + 2]), slice(*ends_k[b : b + 2])
        out, lse = _one(_sequence(a, b, rows, keys), upcast)
        outs.append(out[0])
        lses.append(lse.to(wide)[0] if lse.dim() == 3 else lse)
    if a.kind != "softmax" and a.normalize == "none":
        return torch.cat(outs), a.q.new_empty(0, dtype=wide)
    return torch.cat(outs), torch.cat(lses, 1)


def _sequence(a: Any, b: int, rows: slice, keys: slice) -> Any:
    """The call of sequence b of a packed call, as a batch of 1."""
    q, k, v = a.q[None, rows], a.k[None, keys], a.v[None, keys]
    bias, ranges, q_spans, k_spans = a.bias, a.mask_ranges, a.mask_q_spans, a.mask_k_spans
    if bias is not None:
        bias = bias if bias.shape[0] == 1 else bias[b : b + 1]
        bias = bias[..., : max(q.shape[1], 1), : max(k.shape[1], 1)]
    return a._replace(
        q=q,
        k=k,
        v=v,
        bias=bias,
        score_bias=of_sequence(a.score_bias, b),
        alibi_slopes=of_sequence(a.alibi_slopes, b),
        mask_ranges=None if ranges is None else ranges[:, :, rows],
        mask_q_spans=None if q_spans is None else q_spans[:, rows],
        mask_k_spans=None if k_spans is None else k_spans[:, keys],
    )


def of_sequence(x: Tensor | None, b: int) -> Tensor | None:
    """[H] or [B, H] -> the same for a batch of sequence b."""
    return x if x is None or x.dim() == 1 else x[b : b + 1]


def _per_head(x: Tensor | None) -> Tensor | None:
    """[H] or [B, H] -> [1 or B, H, 1, 1]."""
    return None if x is None else (x[None] if x.dim() == 1 else x)[:, :, None, None]


def _one(a: Any, upcast: bool) -> tuple[Tensor, Tensor]:
    """A call whose sequences are not packed."""
    q, k, v = a.q, a.k, a.v
    rows, keys = q.shape[1], k.shape[1]
    constant = a.score_bias_value
    if a.score_bias_neg_log_n and keys > 0:
        constant -= math.log(keys)
    right = 0 if a.causal else a.window_right
    visible = visible_pairs(rows, keys, a.window_left, right, q.device)
    visible = masked_pairs(visible, a.mask_ranges, a.mask_q_spans, a.mask_k_spans)
    distance, near = None, None
    if a.grid_width > 0:
        distance = cell_distance(rows, keys, a.grid_width, a.grid_distance, q.device)
        near = distance <= a.grid_window if a.grid_window >= 0 else None
    slopes, per_head = _per_head(a.alibi_slopes), _per_head(a.score_bias)
    fade = None
    if a.post_decay and slopes is not None:
        fade, slopes = decay(slopes, distance, rows, keys), None
        fade = fade if near is None else torch.where(near, fade, 0.0)
    elif near is not None:
        visible = visible & near
    z = scores(q, k, a.scale, a.softcap, a.bias, slopes, per_head, constant, upcast, distance)
    if a.kind == "softmax":
        p, lse = softmax(z, visible, a.sink)
        p = p if fade is None else p * fade.to(p.dtype)
    else:
        if a.bias is not None:
            visible = visible & (a.bias != -math.inf)
        p, lse = normalized(weights(a.kind, z, visible), visible, a.kind, a.normalize)
    return weighted_sum(p, expand_heads(v, q.shape[2]).to(p.dtype)).to(q.dtype), lse
