"""Attention with any score map, materialised: P = map(scores), out = P v.

Each function takes the lowered list of its operator. PyTorch's autograd differentiates it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

NEG_INF = float("-inf")


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kind: str,
    scale: float,
    score_bias: Tensor | None,
    score_bias_value: float,
    score_bias_neg_log_n: bool,
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
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
    *,
    upcast: bool = True,
) -> tuple[Tensor, Tensor]:
    """upcast=False keeps 16-bit inputs in 16 bits throughout: what plain PyTorch code would do, the
    baseline of the error budget."""
    if cu_seqlens_q is None:
        n = 1
    else:
        assert cu_seqlens_k is not None
        n = len(cu_seqlens_q) - 1
        ends_q, ends_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()

    def one(b: int | None, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
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
        z = scores(
            q, k, scale, softcap, bias_b, rows(alibi_slopes), rows(score_bias), constant, upcast
        )
        if kind == "sigmoid":
            p = torch.where(visible, torch.sigmoid(z), 0.0)
            lse = z.new_empty(0)
        else:
            p, lse = softmax(z, visible, sink)
        return weighted_sum(p, expand_heads(v, q.shape[2]).to(p.dtype)).to(q.dtype), lse

    wide = torch.promote_types(q.dtype, torch.float32)
    if cu_seqlens_q is None:
        out, lse = one(None, q, k, v)
        return out, lse.to(wide)
    outs, lses = [q.new_zeros(0, q.shape[1], v.shape[2])], [q.new_zeros(q.shape[1], 0, dtype=wide)]
    for b in range(n):
        rows_q, rows_k = slice(ends_q[b], ends_q[b + 1]), slice(ends_k[b], ends_k[b + 1])
        out, lse = one(b, q[None, rows_q], k[None, rows_k], v[None, rows_k])
        outs.append(out[0])
        lses.append(lse[0].to(wide) if kind == "softmax" else lse)
    packed_lse = torch.cat(lses, 1) if kind == "softmax" else q.new_empty(0, dtype=wide)
    return torch.cat(outs), packed_lse


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


def relative_position(sq: int, sk: int, device: torch.device) -> Tensor:
    """[Sq, Sk]: position of query i minus position of key j, bottom-right aligned."""
    i = torch.arange(sq, device=device)[:, None]
    return i + (sk - sq) - torch.arange(sk, device=device)


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
) -> Tensor:
    """[B, H, Sq, Sk]: scale q.k, capped, plus bias, distance penalty and score bias, in order."""
    dtype = torch.promote_types(q.dtype, torch.float32) if upcast else q.dtype
    z = torch.einsum("bihd,bjhd->bhij", q.to(dtype), expand_heads(k, q.shape[2]).to(dtype)) * scale
    if softcap > 0:
        z = softcap * torch.tanh(z / softcap)
    if bias is not None:
        # A bias of +inf is the largest finite logit: one such key takes all of a softmax row.
        z = (z + bias.to(dtype)).clamp(max=torch.finfo(dtype).max)
    if alibi_slopes is not None:
        distance = relative_position(q.shape[1], k.shape[1], q.device).abs()
        z = z - alibi_slopes.to(dtype) * distance
    if score_bias is not None:
        z = z + score_bias.to(dtype)
    return z + constant if constant != 0 else z


def softmax(z: Tensor, visible: Tensor, sink: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rows of P and their log-sum-exp. sink [H] is a logit that takes weight and has no value. A
    row without a visible key is 0, with lse -inf (with a sink: the sink)."""
    z = torch.where(visible, z, NEG_INF)
    nothing = z.new_full((*z.shape[:-1], 1), NEG_INF)
    extra = nothing if sink is None else sink.to(z.dtype)[:, None, None].expand_as(nothing)
    pivot = torch.cat([z, extra], -1).detach().amax(-1, keepdim=True)
    pivot = torch.where(pivot == NEG_INF, 0.0, pivot)
    e = torch.exp(z - pivot)
    # A sink of +inf takes everything; inf - inf must not be formed.
    everything = extra == math.inf
    relative = torch.where(everything, 0.0, extra) - torch.where(pivot == math.inf, 0.0, pivot)
    sink_weight = torch.where(everything, 1.0, torch.exp(relative))
    total = e.sum(-1, keepdim=True) + sink_weight
    empty = total == 0
    total = torch.where(empty, 1.0, total)
    lse = torch.where(empty, NEG_INF, pivot + torch.log(total))
    return e / total, lse.squeeze(-1)


def weighted_sum(p: Tensor, v: Tensor) -> Tensor:
    """[B, H, Sq, Sk] times [B, Sk, H, D]. A weight of 0 hides its value, which may be NaN or
    infinite."""
    finite = torch.isfinite(v)
    out = torch.einsum("bhij,bjhd->bihd", p, torch.where(finite, v, 0.0))
    seen, values = (p.detach() != 0).to(p.dtype), v.detach()
    odd = torch.cat([values == math.inf, values == -math.inf, values.isnan()], -1).to(p.dtype)
    up, down, nan = (torch.einsum("bhij,bjhd->bihd", seen, odd) > 0).chunk(3, -1)
    out = torch.where(up, out + math.inf, out)
    return torch.where(nan, math.nan, torch.where(down, out - math.inf, out))


def merge_attention_states(outs: Tensor, lses: Tensor | None) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(outs.dtype, torch.float32)
    if lses is None:
        return outs.to(wide).sum(0).to(outs.dtype), outs.new_empty(0, dtype=wide)
    pivot = lses.detach().amax(0)
    pivot = torch.where(pivot == NEG_INF, 0.0, pivot)
    e = torch.exp(lses - pivot)
    total = e.sum(0)
    empty = total == 0
    total = torch.where(empty, 1.0, total)
    lse = torch.where(empty, NEG_INF, pivot + torch.log(total))
    weight = (e / total).transpose(-1, -2).unsqueeze(-1)  # [n, ..., H, S] -> [n, ..., S, H, 1]
    # An empty part has weight 0, whatever its out holds.
    return (torch.where(weight == 0, 0.0, outs.to(wide)) * weight).sum(0).to(outs.dtype), lse


def attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    seqlens_k: Tensor,
    block_table: Tensor | None,
    kind: str,
    scale: float,
    score_bias: Tensor | None,
    score_bias_value: float,
    score_bias_neg_log_n: bool,
    alibi_slopes: Tensor | None,
    sink: Tensor | None,
    softcap: float,
    window_left: int,
    num_splits: int,
    schedule: str,
    *,
    upcast: bool = True,
) -> tuple[Tensor, Tensor]:
    """Each request is a causal call of attention on the keys that it has in the cache."""
    outs, lses = [], []
    for b, length in enumerate(seqlens_k.tolist()):
        k, v = (request_rows(cache, b, length, block_table) for cache in (k_cache, v_cache))
        per_head = (x if x is None or x.dim() == 1 else x[b] for x in (score_bias, alibi_slopes))
        score_bias_b, slopes = per_head
        out, lse = attention(
            q[b : b + 1],
            k[None],
            v[None],
            kind=kind,
            scale=scale,
            score_bias=score_bias_b,
            score_bias_value=score_bias_value,
            score_bias_neg_log_n=score_bias_neg_log_n,
            bias=None,
            alibi_slopes=slopes,
            sink=sink,
            softcap=softcap,
            causal=True,
            window_left=window_left,
            window_right=0,
            cu_seqlens_q=None,
            cu_seqlens_k=None,
            max_seqlen_q=None,
            max_seqlen_k=None,
            precision="accurate",
            upcast=upcast,
        )
        outs.append(out)
        lses.append(lse)
    wide = torch.promote_types(q.dtype, torch.float32)
    out = q.new_empty((0, *q.shape[1:-1], v_cache.shape[-1]))
    lse = q.new_empty((0, q.shape[2], q.shape[1]), dtype=wide)
    if kind == "sigmoid":
        return torch.cat([out, *outs]), q.new_empty(0, dtype=wide)
    return torch.cat([out, *outs]), torch.cat([lse, *lses])


def request_rows(cache: Tensor, b: int, length: int, block_table: Tensor | None) -> Tensor:
    """[length, Hk, D]: the keys or values of request b, in order."""
    if block_table is None:
        return cache[b, :length]
    size = cache.shape[1]
    pages = block_table[b, : -(-length // size)].long()
    return cache[pages].flatten(0, 1)[:length]
