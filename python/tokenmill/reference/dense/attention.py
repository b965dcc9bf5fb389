"""attention: out_i = sum_j P_ij v_j over the visible keys, with P = softmax(z), or the weights f(z)
of another kind, unnormalised, divided by their sum or by the number of visible keys.

    z_ij = softcap tanh(scale q_i . k_j / softcap) + bias_ij - slope |p_i - j| + score_bias

With post_decay z has no slope term, and P_ij is multiplied by e^(-slope |p_i - j|) instead. Query i
is at position p_i = i + Sk - Sq and sees key j if -right <= p_i - j <= left.
"""

from __future__ import annotations

import math

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


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kind: str,
    normalize: str,
    scale: float,
    score_bias: Tensor | None,
    score_bias_value: float,
    score_bias_neg_log_n: bool,
    bias: Tensor | None,
    mask_ranges: Tensor | None,
    mask_q_spans: Tensor | None,
    mask_k_spans: Tensor | None,
    alibi_slopes: Tensor | None,
    grid_width: int,
    grid_distance: str,
    grid_window: int,
    sink: Tensor | None,
    softcap: float,
    causal: bool,
    window_left: int,
    window_right: int,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    precision: str,
    post_decay: bool,
    *,
    upcast: bool = True,
) -> tuple[Tensor, Tensor]:
    """upcast=False keeps 16-bit inputs in 16 bits throughout, as plain PyTorch code would: the
    baseline of the error budget.
    """
    if cu_seqlens_q is None:
        n = 1
    else:
        assert cu_seqlens_k is not None
        n = len(cu_seqlens_q) - 1
        ends_q, ends_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()

    mask = (mask_ranges, mask_q_spans, mask_k_spans)

    def one(
        b: int | None, q: Tensor, k: Tensor, v: Tensor, mask: tuple[Tensor | None, ...]
    ) -> tuple[Tensor, Tensor]:
        pick = slice(None) if b is None else slice(b, b + 1)

        def rows(x: Tensor | None) -> Tensor | None:  # [H] | [B, H] -> [1 | B, H, 1, 1]
            if x is None:
                return None
            x = x[None] if x.dim() == 1 else x[pick]
            return x[:, :, None, None]

        constant = score_bias_value
        if score_bias_neg_log_n and k.shape[1] > 0:
            constant -= math.log(k.shape[1])
        bias_b = bias
        if bias is not None and b is not None:
            bias_b = bias[pick if bias.shape[0] > 1 else slice(None)]
            bias_b = bias_b[..., : max(q.shape[1], 1), : max(k.shape[1], 1)]
        right = 0 if causal else window_right
        visible = visible_pairs(q.shape[1], k.shape[1], window_left, right, q.device)
        visible = masked_pairs(visible, *mask)
        distance, near = None, None
        if grid_width > 0:
            distance = cell_distance(q.shape[1], k.shape[1], grid_width, grid_distance, q.device)
            near = distance <= grid_window if grid_window >= 0 else None
        slopes, per_head = rows(alibi_slopes), rows(score_bias)
        fade = None
        if post_decay and slopes is not None:
            fade, slopes = decay(slopes, distance, q.shape[1], k.shape[1]), None
            fade = fade if near is None else torch.where(near, fade, 0.0)
        elif near is not None:
            visible = visible & near
        z = scores(
            q, k, scale, softcap, bias_b, slopes, per_head, constant, upcast, distance=distance
        )
        if kind == "softmax":
            p, lse = softmax(z, visible, sink)
            p = p if fade is None else p * fade.to(p.dtype)
        else:
            if bias_b is not None:
                visible = visible & (bias_b != -math.inf)
            p, lse = normalized(weights(kind, z, visible), visible, kind, normalize)
        return weighted_sum(p, expand_heads(v, q.shape[2]).to(p.dtype)).to(q.dtype), lse

    wide = torch.promote_types(q.dtype, torch.float32)
    if cu_seqlens_q is None:
        out, lse = one(None, q, k, v, mask)
        return out, lse.to(wide)
    outs, lses = [q.new_zeros(0, q.shape[1], v.shape[2])], [q.new_zeros(q.shape[1], 0, dtype=wide)]
    for b in range(n):
        rows_q, rows_k = slice(ends_q[b], ends_q[b + 1]), slice(ends_k[b], ends_k[b + 1])
        mask_b = (
            None if mask_ranges is None else mask_ranges[:, :, rows_q],
            None if mask_q_spans is None else mask_q_spans[:, rows_q],
            None if mask_k_spans is None else mask_k_spans[:, rows_k],
        )
        out, lse = one(b, q[None, rows_q], k[None, rows_k], v[None, rows_k], mask_b)
        outs.append(out[0])
        lses.append(lse.to(wide)[0] if lse.dim() == 3 else lse)
    if kind != "softmax" and normalize == "none":
        return torch.cat(outs), q.new_empty(0, dtype=wide)
    return torch.cat(outs), torch.cat(lses, 1)
