"""HiP: key blocks found by a tree search."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from .._check import check
from ..select.hip_block_select import hip_block_select
from ..sparse.hip_attention import hip_attention
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

    def extend(self, q: Tensor, k: Tensor, v: Tensor, *, lengths: Tensor | None = None) -> Tensor:
        out = super().extend(q, k, v, lengths=lengths)
        self._age = 0
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
        sizes, search = self._sizes, self._age % self.refresh_interval == 0
        if search:
            found = hip_block_select(
                q, cache.k, seqlens_k=cache.lengths, block_table=cache.block_table,
                backend=self.backend, **sizes,
            )  # fmt: skip
            self._list, self._counts = (t[:, :, 0] for t in found)
        self._age += 1
        out, _ = self._attend(
            q, self._list, self._counts, block_k=self.block_k, num_sink=sizes["num_sink"],
            num_recent=self.num_recent,
        )  # fmt: skip
        if search:
            size = cache.key_bytes // max(cache.k.shape[2], 1)
            self._reads.append(Search(cache.lengths, self._counts, sizes, size))
        return out

    def _store(self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None) -> None:
        self._check_prompt(q, k)
        self.cache.fill(k, v, lengths)
        self._age = 0  # steps since the prompt or chunk

    @property
    def _sizes(self) -> dict[str, Any]:
        """Arguments of a search; sink tokens fill whole blocks."""
        return {
            "budget": self.budget, "block_q": self.block_q, "block_k": self.block_k,
            "stride_q": self.stride_q, "num_recent": self.num_recent,
            "num_sink": -(-self.num_sink // self.block_k) * self.block_k,
            "head_reduce": HEAD_REDUCE[self.lists],
        }  # fmt: skip

    def _hip(
        self, q: Tensor, k: Tensor, v: Tensor, n: Tensor | None = None,
        block_table: Tensor | None = None, queries: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        options: dict[str, Any] = {
            "scale": self.scale, "softcap": self.softcap, "seqlens_q": queries, "seqlens_k": n,
            "block_table": block_table, "backend": self.backend, **self._sizes,
        }  # fmt: skip
        if self.sink is None:
            return hip_attention(q, k, v, **options)
        out, lse = hip_attention(q, k, v, return_lse=True, **options)
        # weight of the keys relative to the sink, [B, H, S]
        share = torch.sigmoid(lse - self.sink.to(lse)[:, None])
        return (out * share.transpose(1, 2)[..., None]).to(out.dtype)


class Search(NamedTuple):
    """The keys that a search of HiP visits, assuming that none is visited twice."""

    n: Tensor  # [B], number of keys
    lists: Tensor  # [B, heads], of the lists found
    sizes: dict[str, Any]
    size: int

    def counted(self) -> Tensor:
        block_k, wanted = self.sizes["block_k"], self.sizes["budget"] // self.sizes["block_k"]
        first = self.sizes["num_sink"] // block_k  # first block after the sink tokens
        recent = self.sizes["num_recent"] - self.n.long()
        blocks = (-(recent // block_k) - first).clamp(min=0)
        halvings = (blocks / wanted).clamp(min=1).log2().ceil().long()
        seen = torch.minimum(2 * wanted * halvings, blocks) * block_k
        return seen[:, None].expand(self.lists.shape)
