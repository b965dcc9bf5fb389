"""block_sparse_attention of latent heads: each query is a request of sparse_decode_attention, whose
cache ends behind the last key that it sees.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .sparse_decode_attention import sparse_decode_attention

# Logits of listed keys, which a launch that sums mass leaves in memory.
MOST_LOGITS = 1 << 26


def latent_attention(call: Any) -> tuple[Tensor, Tensor, Tensor]:
    """out [B, Sq, H, Dv], lse [B, H, Sq] and mass, in the shape of the lists."""
    batch, seqlen_q, heads = call.q.shape[:3]
    if not call.return_mass:
        out, lse, mass = attend(call, slice(0, batch), slice(0, seqlen_q))
        return out, lse, mass
    lists, _, entries = call.indices.shape[1:]
    together = max(MOST_LOGITS // max(heads * entries * call.block_k, 1), 1)
    requests = []
    for b in range(batch):
        parts = [
            attend(call, slice(b, b + 1), slice(i, min(i + together, seqlen_q)))
            for i in range(0, seqlen_q, together)
        ]
        outs, lses, masses = zip(*parts, strict=True)
        requests.append((torch.cat(outs, 1), torch.cat(lses, 2), torch.cat(masses, 2)))
    outs, lses, masses = zip(*requests, strict=True)
    mass = torch.cat(masses)
    if lists == 1:  # a list of all heads: the sum over those of the cache
        mass = mass.sum(1, keepdim=True)
    return torch.cat(outs), torch.cat(lses), mass


def attend(call: Any, b: slice, i: slice) -> tuple[Tensor, Tensor, Tensor]:
    """Queries i of requests b. mass [B, heads of the cache or of the lists, Sq, K]."""
    q, ends = call.q[b, i], ends_of(call)[b, i]
    indices, counts = call.indices[b, :, i].transpose(1, 2), call.counts[b, :, i].transpose(1, 2)
    k, v, table = call.k, call.v, call.block_table
    if table is None:
        k, v = k[b], v[b]
    else:
        table = table[b]
    requests, queries = q.shape[:2]
    out, lse, mass = sparse_decode_attention(
        q.reshape(-1, 1, *q.shape[2:]), k, v, indices.reshape(-1, *indices.shape[2:]),
        counts.reshape(-1, counts.shape[2]), ends.flatten(), table, call.block_k, call.num_sink,
        call.num_recent, "absolute", None, None, False, None, None, None, call.scale, call.softcap,
        call.sink, 0, call.return_mass, None, None, queries,
    )  # fmt: skip
    out = out.view(requests, queries, *out.shape[2:])
    lse = lse.view(requests, queries, -1).transpose(1, 2).contiguous()
    if call.return_mass:
        mass = mass.view(requests, queries, *mass.shape[1:]).transpose(1, 2)
    return out, lse, mass


def ends_of(call: Any) -> Tensor:
    """[B, Sq] int32: behind the last key that each query sees."""
    batch, seqlen_q = call.q.shape[:2]
    if call.lengths is None:
        ends = call.counts.new_full((batch,), call.seqlen_k)
    else:
        ends = call.lengths.clamp(0, call.seqlen_k)
    ends = ends[:, None].expand(batch, seqlen_q)
    if call.causal:
        ends = ends + torch.arange(1 - seqlen_q, 1, dtype=torch.int32, device=ends.device)
    return ends.clamp(min=0).int()
