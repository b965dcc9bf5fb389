"""hip_block_select: a binary search for the blocks with the largest scores.

    score(block) = max q_i . k_j over the rows i of a list, its heads, and the keys j of the block

The candidates are nodes, intervals of blocks. Each step halves them, scores one representative
block per half, and keeps the best; minmax scores all blocks.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._common import lengths_of, rows_of, sequences_of


@dataclass
class _Queries:
    """The rows that score the blocks of one list: products [keys] -> maximum per block."""

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


@dataclass
class _Request:
    """A request's queries and keys, the lists of its query blocks, and the lists to start from."""

    q: Tensor  # [queries, H, D]
    keys: Tensor  # [S, Hk, D]
    indices: Tensor  # [lists, R, wanted]
    counts: Tensor  # [lists, R]
    start: tuple[Tensor, Tensor] | None


def hip_block_select(a: Any) -> tuple[Tensor, Tensor]:
    """Lists [B, H, query blocks, budget / block_k] and counts [B, H, query blocks]; packed without
    B. Hk instead of H with "group_max".
    """
    wanted = a.budget // a.block_k
    lists = a.k.shape[-2] if a.head_reduce == "group_max" else a.q.shape[-2]
    if a.cu_seqlens_q is None:
        shape = [len(a.q), lists, -(-a.q.shape[1] // a.block_q), wanted]
    else:
        shape = [lists, len(a.q) // a.block_q + len(a.cu_seqlens_q) - 1, wanted]
    indices = a.q.new_full(shape, -1, dtype=torch.int32)
    counts = a.q.new_zeros(shape[:-1], dtype=torch.int32)
    start = None
    if a.start_indices is not None and a.start_counts is not None:
        start = a.start_indices, a.start_counts
    if a.cu_seqlens_q is None:
        keys = rows_of(a.k, a.block_table)
        batch, tokens = keys.shape[:2]
        lengths = lengths_of(a.seqlens_k, batch, tokens, a.q.device).tolist()
        queries = lengths_of(a.seqlens_q, batch, a.q.shape[1], a.q.device).tolist()
        requests = [
            _Request(
                a.q[b, : queries[b]], keys[b, : lengths[b]], indices[b], counts[b],
                None if start is None else (start[0][b], start[1][b]),
            )
            for b in range(batch)
        ]  # fmt: skip
    else:
        sequences = sequences_of(a.k, a.seqlens_k, a.cu_seqlens_q, a.cu_seqlens_k, a.block_table)
        requests = []
        for b, (first, end, keys) in enumerate(sequences):
            rows = slice(first // a.block_q + b, None)
            requests.append(
                _Request(
                    a.q[first:end], keys, indices[:, rows], counts[:, rows],
                    None if start is None else (start[0][:, rows], start[1][:, rows]),
                )
            )  # fmt: skip
    for request in requests:
        _search(request, a)
    return indices, counts


def _search(x: _Request, a: Any) -> None:
    """Writes the lists of a request."""
    device, wanted = x.q.device, a.budget // a.block_k
    wide = torch.promote_types(x.q.dtype, torch.float32)
    queries, heads = x.q.shape[:2]
    lists, kv_heads = len(x.indices), x.keys.shape[1]
    of_list = heads // lists if lists else 1  # query heads that share a list
    for h, r in itertools.product(range(lists), range(-(-queries // a.block_q))):
        last = min((r + 1) * a.block_q, queries) - 1
        i = torch.arange(last, r * a.block_q - 1, -a.stride_q, device=device)
        ends = len(x.keys) - a.num_recent + (i - queries + 1 if a.causal else 0 * i)
        end = int(ends[0])
        if end <= a.num_sink or of_list == 0:
            continue
        first, until = a.num_sink // a.block_k, -(-end // a.block_k)
        those = slice(h * of_list, (h + 1) * of_list)
        keys = x.keys[:, h * kv_heads // lists].to(wide)
        search = _Queries(x.q[i, those].to(wide), keys, ends, a.num_sink, a.block_k)
        if a.bound == "minmax" or until - first <= wanted:
            blocks = torch.arange(first, until, device=device)
            found = blocks[_best(search.score(blocks), wanted)]
        else:
            nodes = _start_nodes(first, until, wanted)
            if x.start is not None:
                ids, count = x.start[0][h, r], int(x.start[1][h, r])
                given = ids[: max(count, 0)].tolist()
                nodes = _list_nodes(given, first, until, a.restart_span) or nodes
            found = _descend(search, nodes, wanted, a.representative)
        x.indices[h, r, : len(found)] = found
        x.counts[h, r] = len(found)


Nodes = list[tuple[int, int]]  # half-open intervals of blocks, ascending


def _start_nodes(first: int, until: int, wanted: int) -> Nodes:
    n = until - first
    ends = [first + n * i // wanted for i in range(wanted + 1)]
    return list(itertools.pairwise(ends))


def _list_nodes(blocks: list[int], first: int, until: int, span: int) -> Nodes:
    """Aligned groups of `span` blocks around the blocks of a list."""
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
    """Positions of the best scores, ascending; ties go to the lower positions."""
    return scores.argsort(descending=True, stable=True)[:wanted].sort()[0]
