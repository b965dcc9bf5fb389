"""hip_block_select: a binary search for the blocks of the largest scores.

    score(block) = max q_i . k_j over the rows i of a list, its heads, and the keys j of the block

The candidates are nodes, intervals of blocks. Each step halves them, scores one representative
block of each half, and keeps the best; minmax scores all blocks.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from ._common import lengths_of, rows_of


@dataclass
class _Queries:
    """The rows that score the blocks of one list: products [keys] -> maximum of each block."""

    rows: Tensor  # [rows, heads, D]
    keys: Tensor  # [S, D]
    ends: Tensor  # [rows]: each row counts the keys first_key .. end - 1
    first_key: int
    block_k: int

    def score(self, blocks: Tensor) -> Tensor:
        j = blocks[:, None] * self.block_k + torch.arange(self.block_k, device=blocks.device)
        counted = (j >= self.first_key)[..., None] & (j[..., None] < self.ends)
        keys = self.keys[j.clamp(max=len(self.keys) - 1)]
        products = torch.einsum("nkd,rhd->nkrh", keys, self.rows)
        counted = counted[..., None] & ~products.isnan()
        return torch.where(counted, products, -torch.inf).flatten(1).amax(1)


def hip_block_select(
    q: Tensor,
    k: Tensor,
    budget: int,
    block_q: int,
    block_k: int,
    stride_q: int,
    representative: str,
    num_sink: int,
    num_recent: int,
    bound: str,
    start_indices: Tensor | None,
    start_counts: Tensor | None,
    restart_span: int,
    causal: bool,
    head_reduce: str,
    seqlens_k: Tensor | None,
    block_table: Tensor | None,
) -> tuple[Tensor, Tensor]:
    keys = rows_of(k, block_table)
    batch, tokens, kv_heads, _ = keys.shape
    queries, heads = q.shape[1:3]
    wide = torch.promote_types(q.dtype, torch.float32)
    wanted = budget // block_k
    lists = kv_heads if head_reduce == "group_max" else heads
    of_list = heads // lists if lists else 1  # query heads that share a list
    rows = -(-queries // block_q)
    indices = q.new_full((batch, lists, rows, wanted), -1, dtype=torch.int32)
    counts = q.new_zeros((batch, lists, rows), dtype=torch.int32)
    lengths = lengths_of(seqlens_k, batch, tokens, q.device).tolist()

    for b, h, r in itertools.product(range(batch), range(lists), range(rows)):
        last = min((r + 1) * block_q, queries) - 1
        i = torch.arange(last, r * block_q - 1, -stride_q, device=q.device)
        ends = lengths[b] - num_recent + (i - queries + 1 if causal else 0 * i)
        end = int(ends[0])
        if end <= num_sink or of_list == 0:
            continue
        first, until = num_sink // block_k, -(-end // block_k)
        those = slice(h * of_list, (h + 1) * of_list)
        kv_head = h * kv_heads // lists
        search = _Queries(
            q[b, i, those].to(wide), keys[b, :, kv_head].to(wide), ends, num_sink, block_k
        )
        if bound == "minmax" or until - first <= wanted:
            blocks = torch.arange(first, until, device=q.device)
            found = blocks[_best(search.score(blocks), wanted)]
        else:
            nodes = _start_nodes(first, until, wanted)
            if start_indices is not None and start_counts is not None:
                given = start_indices[b, h, r, : max(int(start_counts[b, h, r]), 0)].tolist()
                nodes = _list_nodes(given, first, until, restart_span) or nodes
            found = _descend(search, nodes, wanted, representative)
        indices[b, h, r, : len(found)] = found
        counts[b, h, r] = len(found)
    return indices, counts


Nodes = list[tuple[int, int]]  # half-open intervals of blocks, ascending


def _start_nodes(first: int, until: int, wanted: int) -> Nodes:
    n = until - first
    ends = [first + n * i // wanted for i in range(wanted + 1)]
    return list(itertools.pairwise(ends))


def _list_nodes(blocks: list[int], first: int, until: int, span: int) -> Nodes:
    """Aligned groups of `span` blocks around those of a list."""
    nodes: Nodes = []
    before = -1
    for block in blocks:
        if block > before and first <= block < until:
            before = block
            group = block // span * span
            node = (max(group, first), min(group + span, until))
            if node not in nodes[-1:]:
                nodes.append(node)
    return nodes


def _descend(search: _Queries, nodes: Nodes, wanted: int, representative: str) -> Tensor:
    device = search.keys.device
    while max(end - begin for begin, end in nodes) > 1:
        halves: Nodes = []
        for begin, end in nodes:
            middle = begin + (end - begin) // 2
            halves += [(begin, middle), (middle, end)] if end - begin > 1 else [(begin, end)]
        probes = [_representative(begin, end, representative) for begin, end in halves]
        best = _best(search.score(torch.tensor(probes, device=device)), wanted)
        nodes = [halves[i] for i in best.tolist()]
    return torch.tensor([begin for begin, _ in nodes], device=device)


def _representative(begin: int, end: int, which: str) -> int:
    return {"first": begin, "middle": begin + (end - begin) // 2, "last": end - 1}[which]


def _best(scores: Tensor, wanted: int) -> Tensor:
    """Positions of the best scores, ascending; of equal ones the lower positions."""
    return scores.argsort(descending=True, stable=True)[:wanted].sort()[0]
