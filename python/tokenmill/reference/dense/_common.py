"""The parts of attention: scores, their softmax or other weights, and weighted sums of values. For
p_i = i + Sk - Sq,

z_ij = softcap tanh(scale q_i . k_j / softcap) + bias_ij - slope |p_i - j| + score_bias
P_ij = e^(z_ij - lse_i),    lse_i = log(sum_j e^z_ij + e^sink) over visible keys j, or
P_ij = f(z_ij), or f(z_ij) / (s_i + 1e-8) with s_i = sum_j f(z_ij), or f(z_ij) / n_i
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

NEG_INF = float("-inf")


def expand_heads(x: Tensor, heads: int) -> Tensor:
    """[B, S, Hk, D] -> [B, S, H, D]: query head h reads head h // (H // Hk)."""
    return x if x.shape[2] in (0, heads) else x.repeat_interleave(heads // x.shape[2], dim=2)


def visible_pairs(sq: int, sk: int, left: int, right: int, device: torch.device) -> Tensor:
    """[Sq, Sk]: query i, at key position i + Sk - Sq, sees keys from left before to right after it
    (-1: no limit)."""
    distance = relative_position(sq, sk, device)
    visible = torch.ones(sq, sk, dtype=torch.bool, device=device)
    if left >= 0:
        visible &= distance <= left
    if right >= 0:
        visible &= distance >= -right
    return visible


def masked_pairs(
    visible: Tensor, ranges: Tensor | None, q_spans: Tensor | None, k_spans: Tensor | None
) -> Tensor:
    """[Sq, Sk], or [B | 1, H | 1, Sq, Sk] with a mask: the visible pairs under the mask. A query
    sees key j if begin <= j < end for one of its ranges [B | 1, H | 1, Sq, R, 2], and if the id
    spans, [B | 1, Sq | Sk, 2], of query and key meet.
    """
    if ranges is not None:
        begin, end = ranges[..., None, :, :].unbind(-1)
        j = torch.arange(visible.shape[-1], device=visible.device)[:, None]
        visible = visible & ((begin <= j) & (j < end)).any(-1)
    if q_spans is not None and k_spans is not None:
        first_q, last_q = q_spans[:, None, :, None].unbind(-1)
        first_k, last_k = k_spans[:, None, None].unbind(-1)
        visible = visible & (first_q <= last_k) & (first_k <= last_q)
    return visible


def relative_position(sq: int, sk: int, device: torch.device) -> Tensor:
    """[Sq, Sk]: position of query i minus position of key j, bottom-right aligned."""
    i = torch.arange(sq, device=device)[:, None]
    return i + (sk - sq) - torch.arange(sk, device=device)


def cell_distance(sq: int, sk: int, width: int, kind: str, device: torch.device) -> Tensor:
    """[Sq, Sk]: distance between cells of a grid with rows of `width`."""
    i, j = torch.arange(sq, device=device)[:, None], torch.arange(sk, device=device)
    dy, dx = (i // width - j // width).abs(), (i % width - j % width).abs()
    return dy.maximum(dx) if kind == "chebyshev" else dy + dx


def decay(slopes: Tensor, distance: Tensor | None, sq: int, sk: int) -> Tensor:
    """[1 | B, H, Sq, Sk]: e^(-slope distance); distance None: between positions."""
    if distance is None:
        distance = relative_position(sq, sk, slopes.device).abs()
    return torch.exp(-slopes * distance)


def scores(
    q: Tensor,
    k: Tensor,
    scale: float,
    softcap: float,
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    score_bias: Tensor | None,
    constant: float,
    upcast: bool,
    distance: Tensor | None = None,
) -> Tensor:
    """[B, H, Sq, Sk]: scale q.k, capped, plus bias, distance penalty and score bias, in order."""
    dtype = torch.promote_types(q.dtype, torch.float32) if upcast else q.dtype
    z = torch.einsum("bihd,bjhd->bhij", q.to(dtype), expand_heads(k, q.shape[2]).to(dtype)) * scale
    if softcap > 0:
        z = softcap * torch.tanh(z / softcap)
    if bias is not None:
        # A bias of +inf is clamped to the largest finite logit: one such key takes all of a softmax
        # row.
        z, maximum = z + bias.to(dtype), torch.finfo(dtype).max
        z = torch.where(z > maximum, maximum, z)
    if alibi_slopes is not None:
        if distance is None:
            distance = relative_position(q.shape[1], k.shape[1], q.device).abs()
        z = z - alibi_slopes.to(dtype) * distance
    if score_bias is not None:
        z = z + score_bias.to(dtype)
    return z + constant if constant != 0 else z


def softmax(z: Tensor, visible: Tensor, sink: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rows of P and their log-sum-exp. sink [H] is a logit that adds to the row sum and has no
    value. A row without a visible key is 0, with lse -inf (with a sink: the sink).
    """
    z = torch.where(visible, z, NEG_INF)
    nothing = z.new_full((*z.shape[:-1], 1), NEG_INF)
    extra = nothing if sink is None else sink.to(z.dtype)[:, None, None].expand_as(nothing)
    row_max = torch.cat([z, extra], -1).detach().amax(-1, keepdim=True)
    row_max = torch.where(row_max == NEG_INF, 0.0, row_max)
    e = torch.exp(z - row_max)
    # A sink of +inf takes all weight; inf - inf must not be formed.
    everything = extra == math.inf
    relative = torch.where(everything, 0.0, extra) - torch.where(row_max == math.inf, 0.0, row_max)
    sink_weight = torch.where(everything, 1.0, torch.exp(relative))
    total = e.sum(-1, keepdim=True) + sink_weight
    empty = total == 0
    total = torch.where(empty, 1.0, total)
    lse = torch.where(empty, NEG_INF, row_max + torch.log(total))
    return e / total, lse.squeeze(-1)


def elu1(x: Tensor) -> Tensor:
    """e^x itself for x < 0, because elu(x) + 1 cancels. The derivative at 0 is 1; torch.clamp's at
    a bound is 0 or 1, depending on the version of torch.
    """
    return torch.where(x > 0, x + 1, torch.exp(torch.where(x > 0, 0.0, x)))


def weights(kind: str, z: Tensor, visible: Tensor) -> Tensor:
    """f(z), 0 for masked pairs. A logit of -inf masks its pair, whatever the kind."""
    visible = visible & (z != NEG_INF)
    z = torch.where(visible, z, 0.0)  # avoids a gradient of 0 times infinity
    if kind == "sigmoid":
        f = torch.sigmoid(z)
    elif kind == "relu":
        f = torch.where(z < 0, 0.0, z)  # the derivative at 0 is 1
    elif kind == "elu1":
        f = elu1(z)
    elif kind == "linear":
        f = z
    else:
        f = 1 + z + z * z / 2  # taylor2
    return torch.where(visible, f, 0.0)


def normalized(f: Tensor, visible: Tensor, kind: str, normalize: str) -> tuple[Tensor, Tensor]:
    """P from weights f [B, H, Sq, Sk], and the divisor of each row: the sum of its weights ("sum";
    |sum|, at least 1, where weights may be negative), or the number of visible keys ("count").
    """
    if normalize == "none":
        return f, f.new_empty(0)
    wide = torch.promote_types(f.dtype, torch.float32)  # a dtype in which 1e-8 is not 0
    if normalize == "count":
        n = visible.expand_as(f).sum(-1).to(f.dtype)
        return f / n.clamp(min=1.0)[..., None], n
    s = f.sum(-1)
    if kind == "linear":
        divisor = torch.where(s.abs() > 1, s.abs(), 1.0)  # constant up to and including 1
    else:
        divisor = s.to(wide) + 1e-8
    return (f / divisor[..., None]).to(f.dtype), s


def weighted_sum(p: Tensor, v: Tensor) -> Tensor:
    """[B, H, Sq, Sk] times [B, Sk, H, D]. A weight of 0 masks its value, which may be NaN or
    infinite.
    """
    finite = torch.isfinite(v)
    out = torch.einsum("bhij,bjhd->bihd", p, torch.where(finite, v, 0.0))
    seen, values = (p.detach() != 0).to(p.dtype), v.detach()
    odd = torch.cat([values == math.inf, values == -math.inf, values.isnan()], -1).to(p.dtype)
    up, down, nan = (torch.einsum("bhij,bjhd->bihd", seen, odd) > 0).chunk(3, -1)
    out = torch.where(up, out + math.inf, out)
    return torch.where(nan, math.nan, torch.where(down, out - math.inf, out))
