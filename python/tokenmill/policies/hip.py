"""HiP: key blocks found by a tree search."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .._check import check
from ..sparse.hip_attention import HipLists, hip_attention
from .cache import Keys
from .policy import HEAD_REDUCE, Keeping, Lists


@dataclass(eq=False)
class HiP(Keeping):
    r"""Attends to sink and recent tokens, and to the key blocks found by HiP's search.

    The first layers use full attention. In the others prompts, chunks and steps use
    :func:`hip_attention`: a query block of a prompt, or a step, searches for blocks by reading
    O(log S) keys. The lists of a step are reused by the next steps.

    Args:
        budget: number of listed keys, a multiple of block_k.
        block_q, block_k: prompt queries that share a list, and keys per block.
        stride_q: sampling stride over the queries of a query block.
        num_sink, num_recent: numbers of sink (first) and recent (last) tokens, always attended to.
        dense_layers: number of first layers with full attention.
        refresh_interval: number of steps that use a list, at most num_recent, so that tokens newer
            than a list are among the recent ones. Tokens that are no longer recent are not attended
            to until the next search.
        lists: "query": each query head has its own list. "key": the query heads of a KV head share
            a list, of the blocks with the largest product with any of them.

    Complexity: 2 (D + Dv) (num_sink + budget + num_recent) operations per query and head, and the
    search. Prompts and chunks of different lengths are one call, in which the result of a request
    does not depend on the others, bit for bit.

    Paper: HiP Attention (Lee et al. 2024), sections 3 and 4: three dense layers, and masks
    refreshed every 8 steps. The released code of that version shares masks in batches of equal
    lengths.
    """

    budget: int = 512
    block_q: int = 64
    block_k: int = 2
    stride_q: int = 2
    num_sink: int = 16
    num_recent: int = 256
    dense_layers: int = 3
    refresh_interval: int = 8
    lists: Lists = "query"
    NOT_FLOAT8: ClassVar[str | None] = "hip_attention"
    _READS: ClassVar[bool] = True
    _LEAST: ClassVar[dict[str, int]] = {
        "budget": 1, "block_q": 1, "block_k": 1, "stride_q": 1, "num_recent": 1,
        "refresh_interval": 1,
    }  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        rule = f"must be a multiple of block_k, {self.block_k}"
        check(self.budget % self.block_k == 0, self._name, "budget", rule, self.budget)
        rule = f"must be at most num_recent, {self.num_recent}"
        short = self.refresh_interval <= self.num_recent
        check(short, self._name, "refresh_interval", rule, self.refresh_interval)

    def reorder(self, requests: Tensor) -> None:
        super().reorder(requests)
        if (found := self._found.lists) is not None:
            indices, counts = (t.index_select(0, requests) for t in found)
            self._found.lists = indices, counts

    def extend(self, q: Tensor, k: Tensor, v: Tensor, *, lengths: Tensor | None = None) -> Tensor:
        out = super().extend(q, k, v, lengths=lengths)
        self._found = HipLists()
        return out

    def _attend_prompt(
        self, q: Tensor, k: Tensor, v: Tensor, count: Tensor | None, seen: Keys | None
    ) -> tuple[Tensor, Tensor | None]:
        if self.layer < self.dense_layers:
            return super()._attend_prompt(q, k, v, count, seen)
        if seen is None:
            return self._hip(q, k, v, count, queries=count), None
        at = (seen.lengths, seen.block_table)
        return self._hip(q, seen.k, seen.v, *at, queries=count), None

    @property
    def _at_once(self) -> bool:
        return self.layer < self.dense_layers

    def _step(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self._append(k, v)
        if self.layer < self.dense_layers:
            return self._attend_all(q)
        cache = self.cache
        at = (cache.lengths, cache.block_table)
        out = self._hip(q, cache.k, cache.v, *at, found=self._found)
        self._note_reads()
        return out

    def _store(self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None) -> None:
        self._check_prompt(q, k)
        self.cache.fill(k, v, lengths)
        self._found = HipLists()

    def _hip(
        self, q: Tensor, k: Tensor, v: Tensor, n: Tensor | None = None,
        block_table: Tensor | None = None, queries: Tensor | None = None,
        found: HipLists | None = None,
    ) -> Tensor:  # fmt: skip
        options: dict[str, Any] = {
            "budget": self.budget, "block_q": self.block_q, "block_k": self.block_k,
            "stride_q": self.stride_q, "num_sink": self.num_sink, "num_recent": self.num_recent,
            "head_reduce": HEAD_REDUCE[self.lists], "scale": self.scale, "softcap": self.softcap,
            "seqlens_q": queries, "seqlens_k": n, "block_table": block_table, "lists": found,
            "refresh_interval": None if found is None else self.refresh_interval,
            "backend": self.backend,
        }  # fmt: skip
        if self.sink is None:
            return hip_attention(q, k, v, **options)
        out, lse = hip_attention(q, k, v, return_lse=True, **options)
        # weight of the keys relative to the sink, [B, H, S]
        share = torch.sigmoid(lse - self.sink.to(lse)[:, None])
        return (out * share.transpose(1, 2)[..., None]).to(out.dtype)

    def _note_reads(self) -> None:
        """Counts the reads of a step; for the search, the keys that it visits, assuming that none
        is visited twice.
        """
        cache, lists = self.cache, self._found.lists
        assert lists is not None
        n, heads = cache.lengths, max(cache.k.shape[2], 1)
        # Clamped to the cache capacity, so that all numbers fit the dtype of lengths.
        sink, recent = (min(x, cache.capacity) for x in (self.num_sink, self.num_recent))
        first = -(-sink // self.block_k)  # first block after the sink tokens
        always = min(first * self.block_k + recent, cache.capacity)
        self._reads.append((n.clamp(max=always), cache.token_bytes))
        counts = lists[1][:, :, 0]
        self._reads.append((counts * self.block_k, cache.token_bytes // heads))
        if self._found.age > 1:
            return
        wanted = self.budget // self.block_k
        blocks = (-(-(n - recent) // self.block_k) - first).clamp(min=0)
        halvings = (blocks / wanted).clamp(min=1).log2().ceil().int()
        seen = torch.minimum(2 * wanted * halvings, blocks) * self.block_k
        self._reads.append((seen[:, None].expand(counts.shape), cache.key_bytes // heads))
