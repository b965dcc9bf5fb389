"""block_sparse_attention of latent heads: each query becomes a request of sparse_decode_attention,
whose cache ends after the last key that the query sees.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokenmill._call.operator import as_record

from .sparse_decode_attention import sparse_decode_attention

# Maximum number of logits of listed keys that one mass-summing launch keeps in memory.
MAX_LOGITS = 1 << 26


class Queries(NamedTuple):
    """N queries as decode requests."""

    q: Tensor  # [N, 1, H, D]
    indices: Tensor  # [N, lists, K]
    counts: Tensor  # [N, lists]
    ends: Tensor  # [N] int32: number of keys visible to each query
    requests: Tensor  # [N] int32: request whose keys it reads
    starts: Tensor | None = None  # [N] int32: first key of the request among packed keys

    def part(self, rows: slice) -> Queries:
        parts: Any = (None if t is None else t[rows] for t in self)
        return Queries(*parts)


def latent_attention(call: Any) -> tuple[Tensor, Tensor, Tensor]:
    """out [B, Sq, H, Dv], lse [B, H, Sq] and mass in the shape of the lists; packed out [T, H, Dv],
    lse [H, T]."""
    if call.cu_seqlens_q is not None:
        return packed_attention(call)
    batch, seqlen_q, heads = call.q.shape[:3]
    queries = Queries(
        call.q.reshape(-1, 1, *call.q.shape[2:]),
        call.indices.transpose(1, 2).flatten(0, 1),
        call.counts.transpose(1, 2).flatten(0, 1),
        ends_of(call).flatten(),
        torch.arange(batch, dtype=torch.int32, device=call.q.device).repeat_interleave(seqlen_q),
    )
    parts = [slice(None)]
    if call.return_mass:
        first, step = range(0, batch * seqlen_q, seqlen_q), together(call)
        parts = [
            slice(b + i, b + min(i + step, seqlen_q))
            for b in first
            for i in range(0, seqlen_q, step)
        ]
    out, lse, mass = attend_in_parts(call, queries, parts)
    if call.return_mass:
        mass = mass.unflatten(0, (batch, seqlen_q)).transpose(1, 2)
    lse = lse.view(batch, seqlen_q, heads).transpose(1, 2).contiguous()
    return out.view(batch, seqlen_q, heads, -1), lse, mass.contiguous()


def packed_attention(call: Any) -> tuple[Tensor, Tensor, Tensor]:
    ends, ends_k, tokens = call.cu_seqlens_q, call.cu_seqlens_k, call.q.shape[0]
    at = torch.arange(tokens, dtype=torch.int32, device=ends.device)
    requests = torch.searchsorted(ends, at, right=True, out_int32=True) - 1
    requests = requests.clamp(0, len(ends) - 2)
    loose = (at < ends[requests]) | (at >= ends[requests + 1])
    if ends_k is not None:
        ends_k = ends_k.clamp(0, call.seqlen_k)
        starts = ends_k[requests]
        keys = ends_k[requests + 1] - starts
    else:
        starts, keys = None, lengths_of(call, len(ends) - 1)[requests]
    if call.causal:
        keys = keys - (ends[requests + 1] - 1 - at)
    rows = at + requests  # rows of the lists: a request has one more than it has queries
    queries = Queries(
        call.q[:, None],
        call.indices[:, rows].transpose(0, 1),
        call.counts[:, rows].T,
        torch.where(loose, 0, keys).clamp(min=0),
        requests,
        starts,
    )
    parts = [slice(None)]
    if call.return_mass:
        step = together(call)
        parts = [slice(i, i + step) for i in range(0, tokens, step)]
    out, lse, own = attend_in_parts(call, queries, parts)
    mass = own
    if call.return_mass:
        mass = own.new_zeros(call.indices.shape)
        mass[:, rows] = own.transpose(0, 1)
    lse = torch.where(loose, -torch.inf, lse[..., 0].T)
    return out[:, 0], lse, mass


def together(call: Any) -> int:
    """Queries per launch that sums mass."""
    logits = call.q.shape[-2] * call.indices.shape[-1] * call.block_k
    return max(MAX_LOGITS // max(logits, 1), 1)


def attend_in_parts(
    call: Any, queries: Queries, parts: list[slice]
) -> tuple[Tensor, Tensor, Tensor]:
    """out [N, 1, H, Dv], lse [N, H, 1] and mass [N, lists, K] over all parts."""
    results = [attend(call, queries.part(rows)) for rows in parts]
    out, lse, mass = results[0] if len(results) == 1 else map(torch.cat, zip(*results, strict=True))
    if call.return_mass and call.indices.shape[-3] == 1:
        mass = mass.sum(1, keepdim=True)  # sums over KV heads, for a list shared by all heads
    return out, lse, mass


def attend(call: Any, queries: Queries) -> tuple[Tensor, Tensor, Tensor]:
    k, v = call.k, call.v
    if queries.starts is not None:
        k, v = k[None], v[None]
    decode = as_record(
        "sparse_decode_attention", call, q=queries.q, k_cache=k, v_cache=v,
        indices=queries.indices, counts=queries.counts, seqlens_k=queries.ends,
    )  # fmt: skip
    return sparse_decode_attention(decode, queries.requests, queries.starts)


def lengths_of(call: Any, batch: int) -> Tensor:
    """Number of keys per request, [B] int32."""
    if call.seqlens_k is None:
        return call.counts.new_full((batch,), call.seqlen_k)
    return call.seqlens_k.clamp(0, call.seqlen_k)


def ends_of(call: Any) -> Tensor:
    """Number of keys visible to each query, [B, Sq] int32."""
    batch, seqlen_q = call.q.shape[:2]
    ends = lengths_of(call, batch)[:, None].expand(batch, seqlen_q)
    if call.causal:
        ends = ends + torch.arange(1 - seqlen_q, 1, dtype=torch.int32, device=ends.device)
    return ends.clamp(min=0).int()
