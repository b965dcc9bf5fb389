"""Blocks of queries of variable-length requests, each run as a request of sparse_decode_attention.

The block that ends at query `end` of a request with m queries and l keys holds the last queries of
the first l - m + end keys. The computation depends only on shapes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

PAGE = 64  # page size when unpaged keys are turned into pages


@dataclass
class QueryBlocks:
    """N blocks of up to block_q queries, read `width` rows at a time. The default width, block_q,
    makes a request's result independent of the other requests.
    """

    block_q: int
    width: int
    request: Tensor  # [N] request of the block
    first: Tensor  # [N] row of q with the request's first query
    end: Tensor  # [N] end of the block within the request, 0 for an empty block
    queries: Tensor  # [B] number of queries of each request
    token_block: Tensor  # [rows of q] block of the row
    token: Tensor  # [rows of q] index of the row within its request
    there: Tensor  # [rows of q] whether the row belongs to a request

    @staticmethod
    def padded(q: Tensor, seqlens_q: Tensor | None, block_q: int) -> QueryBlocks:
        """Blocks of padded queries q [B, Sq, ...]."""
        batch, rows = q.shape[:2]
        count = -(-rows // block_q)
        request = torch.arange(batch, device=q.device).repeat_interleave(count)
        block = torch.arange(count, device=q.device).repeat(batch)
        token = torch.arange(rows, device=q.device).repeat(batch)
        owner = torch.arange(batch, device=q.device).repeat_interleave(rows)
        if seqlens_q is None:
            queries = torch.full((batch,), rows, device=q.device)
        else:
            queries = seqlens_q.long().clamp(0, rows)
        return QueryBlocks._of(
            block_q, block_q, request, request * rows, block, queries,
            owner * count + token // block_q, token, token < queries[owner],
        )  # fmt: skip

    @staticmethod
    def packed(cu_seqlens_q: Tensor, tokens: int, maximum: int | None, block_q: int) -> QueryBlocks:
        """Blocks of packed queries q [tokens, ...], numbered as in hip_block_select. most: bound on
        the length of a sequence.
        """
        starts, ends = cu_seqlens_q[:-1].long(), cu_seqlens_q[1:].long()
        batch, device = len(starts), starts.device
        first_block = starts // block_q + torch.arange(batch, device=device)
        number = torch.arange(tokens // block_q + batch, device=device)
        row = torch.arange(tokens, device=device)
        last = max(batch - 1, 0)
        request = (torch.searchsorted(first_block, number, right=True) - 1).clamp(0, last)
        owner = torch.searchsorted(ends, row, right=True).clamp(0, last)
        token = row - starts[owner]
        there = (token >= 0) & (row < ends[owner])
        blocks = first_block[owner] + token // block_q
        return QueryBlocks._of(
            block_q, block_q if maximum is None else maximum, request, starts[request],
            number - first_block[request], ends - starts,
            blocks.clamp(0, max(len(number) - 1, 0)), token, there,
        )  # fmt: skip

    @staticmethod
    def _of(
        block_q: int, maximum: int, request: Tensor, first: Tensor, block: Tensor, queries: Tensor,
        token_block: Tensor, token: Tensor, there: Tensor,
    ) -> QueryBlocks:  # fmt: skip
        own = queries[request]
        begin = block * block_q
        end = torch.where((begin >= 0) & (begin < own), (begin + block_q).minimum(own), 0)
        width = max(min(block_q, maximum), 1)
        return QueryBlocks(block_q, width, request, first, end, queries, token_block, token, there)

    def take(self, rows: Tensor) -> Tensor:
        """Gathers rows [T, ...] of all requests to [N, width, ...]; unused rows hold arbitrary
        values.
        """
        steps = torch.arange(self.width, device=rows.device)
        at = self.first[:, None] + (self.end[:, None] - self.width + steps).clamp(min=0)
        return rows[at.clamp(0, len(rows) - 1)]

    def give(self, blocks: Tensor, empty: float) -> Tensor:
        """The inverse of take, [T, ...]; rows outside all requests are `empty`."""
        row = self.token - self.end[self.token_block] + self.width
        at = self.token_block * self.width + row.clamp(0, self.width - 1)
        rows = blocks.flatten(0, 1)[at]
        there = self.there.view(-1, *[1] * (rows.dim() - 1))
        return torch.where(there, rows, torch.tensor(empty, dtype=rows.dtype, device=rows.device))

    def keys(self, lengths: Tensor) -> Tensor:
        """int32 [N]: number of keys up to the end of each block, for requests of lengths [B]."""
        before = lengths.long() - self.queries
        found = (before[self.request] + self.end).clamp(min=0)
        return torch.where(self.end > 0, found, 0).int()


def pages_of_rows(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values [B, S, Hk, ...] as pages, and a block table int32 [B, P]; no copy where S is
    a multiple of 16.
    """
    batch, rows = k.shape[:2]
    size = math.gcd(rows, PAGE)
    if size < 16:
        size = PAGE
        k, v = (torch.nn.functional.pad(t, (0, 0, 0, 0, 0, -rows % size)) for t in (k, v))
    count = k.shape[1] // size
    table = torch.arange(batch * count, dtype=torch.int32, device=k.device).view(batch, count)
    return (*(t.unflatten(1, (count, size)).flatten(0, 1) for t in (k, v)), table)


def pages_of_packed(
    k: Tensor, v: Tensor, cu_seqlens_k: Tensor, longest: int
) -> tuple[Tensor, Tensor, Tensor]:
    """A copy of packed keys and values [T, Hk, ...] in which each sequence starts a new page, and a
    block table int32 [B, P].
    """
    tokens, batch = len(k), len(cu_seqlens_k) - 1
    starts = cu_seqlens_k[:-1].long()
    first_page = starts // PAGE + torch.arange(batch, device=k.device)
    count = tokens // PAGE + batch
    if tokens == 0:
        k, v = (t.new_zeros(1, *t.shape[1:]) for t in (k, v))
    page = torch.arange(count, device=k.device)
    owner = (torch.searchsorted(first_page, page, right=True) - 1).clamp(0, max(batch - 1, 0))
    row = starts[owner] + (page - first_page[owner]) * PAGE
    rows = (row[:, None] + torch.arange(PAGE, device=k.device)).clamp(0, len(k) - 1)
    table = first_page[:, None] + torch.arange(-(-longest // PAGE), device=k.device)
    return k[rows], v[rows], table.clamp(0, max(count - 1, 0)).int()
