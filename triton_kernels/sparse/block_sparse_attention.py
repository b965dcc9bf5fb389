"""block_sparse_attention: one program owns a tile of queries that share a list and streams over the
sink keys, the listed keys gathered into full tiles, and the recent keys.
Row m of a tile is query m // group of head m % group: query heads that share list and keys are
adjacent.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokenmill._call.operator import record_of
from tokenmill._kv_cache import capacity

from ..common import Terms, head_of, launch, terms_of
from ..dense.attention import Tiles
from ..dense.attention_decode_merge import rows_of
from ..dense.kv_cache import LONG
from ..tuned import tuned
from .block_sparse_attention_mass import mass_of
from .block_sparse_latent import latent_attention
from .blocks import PAGE_SIZES, Ends, Sizes, key_walk, listed_queries, rows_from
from .listed import Listed, Statistics, attend, pages_of

# Arguments excluded from specialization: a new length does not recompile.
SIZES = [*Sizes._fields, "halvings", "tiles"]


@triton.jit(do_not_specialize=[*SIZES, *PAGE_SIZES])
def block_sparse_kernel(
    q, k, v, out, lse, sink, table, table_stride, page_count, page_size, ends, ids, counts, terms,
    halvings, tiles, requests, seqlen_q, seqlen_k, num_sink, num_recent, list_heads, list_rows,
    entries, row_heads, shared, shape,
):  # fmt: skip
    sizes = Sizes(requests, seqlen_q, seqlen_k, num_sink, num_recent, list_heads, list_rows,
                  entries, row_heads, shared)  # fmt: skip
    i_b, i_h, i_r, x, tile = listed_queries(ends, sizes, tiles, shape)
    if tile.first >= x.queries:
        return
    walk = key_walk(ids, counts, halvings, sizes, i_b, i_h, i_r, tile, x.length, shape)
    head = head_of(terms, i_b, i_h, x.length)
    if ends.q is not None:
        q, out = rows_from(q, i_b, x.q_start), rows_from(out, i_b, x.q_start)
        lse += x.q_start
        if table is None:
            k, v = rows_from(k, x.i_b, x.k_start), rows_from(v, x.i_b, x.k_start)
    statistics = Statistics(row_heads * shape.GROUP, seqlen_q)
    b_sink = None
    if sink is not None:
        b_sink = tl.load(sink + tile.o_h)
    pages = pages_of(table, table_stride, page_count, page_size, x.i_b)
    i_kv = i_h // shared
    attend(q, k, v, out, lse, statistics, tile, walk, pages, b_sink, terms, head, i_b, i_kv, shape)


Arguments: Any = record_of("block_sparse_attention")


class Call(Arguments):
    """A call, and the kernel arguments derived from it."""

    @property
    def seqlen_k(self) -> int:
        if self.cu_seqlens_k is not None:
            return self.k.shape[0]
        return capacity(self.k, self.block_table)

    @property
    def lists(self) -> tuple[Tensor, Tensor]:
        """Lists [B, heads, rows, ...]; B is 1 for packed requests."""
        if self.cu_seqlens_q is None:
            return self.indices, self.counts
        return self.indices[None], self.counts[None]

    @property
    def requests(self) -> int:
        """Number of packed requests; 1 if they are not packed."""
        return 1 if self.cu_seqlens_q is None else len(self.cu_seqlens_q) - 1

    @property
    def ends(self) -> Ends:
        return Ends(self.cu_seqlens_q, self.cu_seqlens_k, self.seqlens_k)

    @property
    def pages(self) -> tuple[Any, ...]:
        """block_table, its stride, number of pages and keys per page."""
        t = self.block_table
        return (None, 0, 0, 1) if t is None else (t, t.stride(0), *self.k.shape[:2])

    @property
    def listed(self) -> Listed:
        return Listed(
            self.q,
            self.k,
            self.v,
            *self.lists,
            self.block_q,
            self.block_k,
            triton.cdiv(self.seqlen_k, self.block_k),
            self.softcap,
            self.num_sink + self.num_recent,
        )

    def key_tiles(self, block_n: int) -> int:
        """Key tiles per request, or an upper bound over all packed requests."""
        if self.cu_seqlens_k is not None:
            return self.seqlen_k // block_n + len(self.cu_seqlens_k) - 1
        return triton.cdiv(self.seqlen_k, block_n)

    def terms(self) -> Terms:
        return terms_of(self.scale, self.softcap, 0.0, False, None, None)

    def sizes(self) -> Sizes:
        seqlen_q, seqlen_k, listed = self.q.shape[-3], self.seqlen_k, self.listed
        sink, recent = min(self.num_sink, seqlen_k), min(self.num_recent, seqlen_k)
        list_heads, list_rows, entries = listed.indices.shape[1:]
        return Sizes(
            self.requests, seqlen_q, seqlen_k, sink, recent, list_heads, list_rows, entries,
            listed.row_heads, listed.shared,
        )  # fmt: skip

    def options(self, tiles: Tiles) -> dict[str, Any]:
        return self.listed.options(tiles, self.causal, self.block_q, self.block_k)


def block_sparse_attention(a: Any) -> tuple[Tensor, Tensor, Tensor]:
    call = Call._make(a)
    listed = call.listed
    latent = max(call.q.shape[-1], call.v.shape[-1]) > LONG.value
    out = call.q.new_empty((*call.q.shape[:-1], call.v.shape[-1]))
    lse = call.q.new_empty(call.q[..., 0].transpose(-1, -2).shape, dtype=torch.float32)
    if call.cu_seqlens_q is not None:  # tokens outside all requests are empty rows
        out.zero_()
        lse.fill_(-torch.inf)
    if out.numel() == 0 or call.requests == 0:
        return out, lse, _mass(call, lse)
    if latent:
        return latent_attention(call)
    plain = call.softcap == 0.0 and call.block_table is None
    width = call.v.shape[-1]
    tiles = tuned("block_sparse_attention", listed.plan().forward, call.q, width, plain)
    lists = listed.compacted()
    launch(
        block_sparse_kernel, listed.programs(tiles), call.q,
        *map(rows_of, (call.q, call.k, call.v, out)), lse, call.sink, *call.pages, call.ends,
        lists.ids, lists.counts, call.terms(), call.indices.shape[-1].bit_length(),
        listed.query_tiles(tiles), *call.sizes(), **call.options(tiles),
    )  # fmt: skip
    return out, lse, _mass(call, lse)


def _mass(call: Call, lse: Tensor) -> Tensor:
    return mass_of(call, lse) if call.return_mass else lse.new_empty(0)
