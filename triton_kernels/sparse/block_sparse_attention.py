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

from ..common import head_of, launch, program, terms_of
from ..dense.attention import Tiles
from ..dense.attention_decode_merge import rows_of
from ..dense.kv_cache import LONG
from ..tuned import tuned
from .block_sparse_attention_mass import mass_of
from .block_sparse_latent import latent_attention
from .blocks import key_walk, query_tile, request_of, rows_from
from .listed import LIST_SIZES, Listed, Pages, Statistics, attend

# Arguments excluded from specialization: a new length does not recompile.
SIZES = [*LIST_SIZES, "halvings", "num_sink", "num_recent", "seqlen_q", "seqlen_k"]
PAGE_SIZES = ["table_stride", "page_count", "page_size", "requests"]


@triton.jit(do_not_specialize=[*SIZES, *PAGE_SIZES])
def block_sparse_kernel(
    q,
    k,
    v,
    out,
    lse,
    sink,
    table,
    table_stride,
    page_count,
    page_size,
    ends_q,
    ends_k,
    requests,
    lengths,
    ids,
    counts,
    list_heads,
    list_rows,
    entries,
    halvings,
    num_sink,
    num_recent,
    terms,
    seqlen_q,
    seqlen_k,
    row_heads,
    shared,
    tiles,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    CAUSAL: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    i_block, i_h, i_b = program(list_rows * tiles, row_heads)
    # Reversed block order: under a causal mask the last queries have most keys, so they start
    # first.
    i_block = list_rows * tiles - 1 - i_block
    i_r = i_block // tiles
    x = request_of(
        ends_q, ends_k, requests, lengths, seqlen_q, seqlen_k, list_rows, i_b, i_r, BLOCK_Q
    )
    tile = query_tile(
        x.i_r, i_block % tiles, i_h, x.length, x.queries, GROUP, CAUSAL, BLOCK_Q, BLOCK_M
    )
    if tile.first >= x.queries:
        return
    walk = key_walk(
        ids, counts, list_heads, list_rows, entries, halvings, num_sink, num_recent, i_b,
        tl.minimum(i_h, list_heads - 1), i_r, tile, x.length, BLOCK_K, BLOCK_N,
    )  # fmt: skip
    head = head_of(terms, i_b, i_h, x.length)
    if ends_q is not None:
        q, out = rows_from(q, i_b, x.q_start), rows_from(out, i_b, x.q_start)
        lse += x.q_start
        if table is None:
            k, v = rows_from(k, x.i_b, x.k_start), rows_from(v, x.i_b, x.k_start)
    statistics = Statistics(row_heads * GROUP, seqlen_q)
    b_sink = None
    if sink is not None:
        b_sink = tl.load(sink + tile.o_h)
    pages = None
    if table is not None:
        pages = Pages(table + x.i_b * table_stride, page_count, page_size)
    attend(
        q, k, v, out, lse, statistics, tile, walk, pages, b_sink, terms, head, i_b, i_h // shared,
        HEAD_DIM, VALUE_DIM, CAUSAL, BLOCK_K, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_V,
    )  # fmt: skip


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
    def packed(self) -> tuple[Any, ...]:
        """cu_seqlens_q, cu_seqlens_k and the number of packed requests."""
        return self.cu_seqlens_q, self.cu_seqlens_k, self.requests

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

    def arguments(self) -> tuple[Any, ...]:
        """Arguments common to all kernels, from num_sink to shared."""
        seqlen_k = self.seqlen_k
        return (
            min(self.num_sink, seqlen_k),
            min(self.num_recent, seqlen_k),
            terms_of(self.scale, self.softcap, 0.0, False, None, None),
            self.q.shape[-3],
            seqlen_k,
            self.listed.row_heads,
            self.listed.shared,
        )

    def options(self, tiles: Tiles) -> dict[str, Any]:
        return {
            "CAUSAL": self.causal,
            "BLOCK_Q": self.block_q,
            "BLOCK_K": self.block_k,
            **self.listed.options(tiles),
        }


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
    entries = call.indices.shape[-1]
    launch(
        block_sparse_kernel,
        listed.programs(tiles),
        call.q,
        *map(rows_of, (call.q, call.k, call.v, out)),
        lse,
        call.sink,
        *call.pages,
        *call.packed,
        call.seqlens_k,
        lists.ids,
        lists.counts,
        *call.indices.shape[-3:],
        entries.bit_length(),
        *call.arguments(),
        listed.query_tiles(tiles),
        **call.options(tiles),
    )
    return out, lse, _mass(call, lse)


def _mass(call: Call, lse: Tensor) -> Tensor:
    return mass_of(call, lse) if call.return_mass else lse.new_empty(0)
