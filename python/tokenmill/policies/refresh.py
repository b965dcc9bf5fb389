"""RefreshKV: a small cache per request, selected again when its queries have changed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import max_pool1d, pad

from .._check import check
from ..select.kv_block_scores import kv_block_scores
from ..select.query_similarity_gate import query_similarity_gate
from ..select.topk_select import topk_select
from .cache import Back
from .chunks import of_rows
from .evicting import Share, amount, maximum
from .policy import Keeping, Rows, rows_of, span

LATER = torch.iinfo(torch.int32).max  # after every position


@dataclass(eq=False)
class RefreshKV(Keeping):
    r"""Recycled Attention as published: a partial cache selected by the prompt's last query, and
    again by each full step.

    A key's score is the largest probability that a query head of its KV head gives to it or to one
    of its kernel neighbours; the budget keys with the largest scores form the partial cache. A step
    attends to it and to its own token, which then replaces the key with the lowest score or, once
    all of these are gone, the oldest token. In every stride-th step the query, averaged over heads,
    is compared with the query of the last full step (initially the last token of the prompt): below
    the threshold the step is full and selects again. All keys stay in the cache.

    Args:
        budget: keys of the partial cache: a number, or a fraction of the prompt's tokens.
        stride: number of steps between comparisons; the first is in step stride.
        threshold: minimum cosine at which the partial cache is kept; decided per request. None:
            every stride-th step is full.
        kernel: width of the max-pooling of probabilities over neighbouring keys, odd; 1: no
            pooling.

    Paper: RefreshKV (Xu et al. 2025), section 2.2 and appendix A.1, with a budget of 1/8, stride 5
    or 10, threshold 0.85 (Llama 3.1) or 0.95 (Qwen 2), kernel 7. :class:`RecycledAttention` is its
    first version.
    """

    budget: Share = 0.125
    stride: int = 10
    threshold: float | None = 0.85
    kernel: int = 7
    _LEAST: ClassVar[dict[str, int]] = {"budget": 1, "stride": 1, "kernel": 1}
    _ROWS: ClassVar[tuple[str, ...]] = ("_ranked", "_counts", "_query", "_end", "_size")

    def _begin(self, q: Tensor, k: Tensor, lse: Tensor | None) -> None:
        check(self.kernel % 2 == 1, self._name, "kernel", "must be odd", self.kernel)
        n = self.cache.lengths
        # mean over heads, at the last full step
        self._query = q.new_zeros(q.shape[0], 1, 1, q.shape[3])
        self._end = torch.zeros_like(n)  # number of tokens at the last full step
        self._size = torch.zeros_like(n)  # number of keys in the partial cache
        # keys of the partial cache, largest score first
        self._ranked = n.new_zeros(len(n), k.shape[2], 0)
        self._counts = n.new_zeros(len(n), k.shape[2])
        self._read_prompt(q, n)

    def extend(self, q: Tensor, k: Tensor, v: Tensor, *, lengths: Tensor | None = None) -> Tensor:
        out = super().extend(q, k, v, lengths=lengths)
        self._read_prompt(q, self._count(q, k, v, lengths))
        return out

    def _read_prompt(self, q: Tensor, new: Tensor) -> None:
        """Selects with the last of new[b] queries, if there is one."""
        self._steps = 0
        wanted = amount(self.budget, self.cache.lengths).clamp(min=1)
        self._size = torch.where(new > 0, wanted, self._size)
        self._max = max(maximum(self.budget, self.cache.longest), 1, self._ranked.shape[2])
        self._ranked = pad(self._ranked, (0, self._max - self._ranked.shape[2]))
        if q.shape[1] > 0:
            self._choose(of_rows(q, (new - 1).clamp(min=0)[:, None].long()), new > 0)

    def _step(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cache = self.cache
        self._append(k, v)
        self._steps += 1
        if self._steps % self.stride > 0:
            return self._attend(q, *self._partial())[0]
        if self.threshold is None:
            out = self._attend_all(q)
            self._choose(q, torch.ones_like(cache.lengths, dtype=torch.bool))
            return out
        mean = q.float().mean(2, keepdim=True).to(q)
        serves = query_similarity_gate(mean, self._query, self.threshold, backend=self.backend)
        rows, counts = self._partial()
        width = max(rows.shape[2], cache.capacity)
        everything = span(torch.zeros_like(cache.lengths), width)[:, None]
        rows = pad(rows, (0, width - rows.shape[2]))
        out, _ = self._attend(
            q, torch.where(serves[:, None, None], rows, everything),
            torch.where(serves[:, None], counts, cache.lengths[:, None]),
        )  # fmt: skip
        self._choose(q, ~serves)
        return out

    def _partial(self) -> tuple[Tensor, Tensor]:
        """Lists [B, Hk, most + 1] of the partial cache and the newest token, and counts."""
        n, size = self.cache.lengths, self._size[:, None]
        newer = (n - 1 - self._end)[:, None]  # tokens since the full step, except the newest
        left = (self._counts - (self._counts + newer - size).clamp(min=0)).clamp(min=0)
        recent = torch.minimum(newer, size) + 1
        at = torch.arange(self._max + 1, dtype=torch.int32, device=n.device)
        ranked = pad(self._ranked, (0, 1)).masked_fill(at >= left[..., None], LATER)
        last = n[:, None, None] - recent[..., None] + at - left[..., None]
        rows = torch.where(at < left[..., None], ranked.sort(-1).values, last)
        return rows, left + recent

    def _choose(self, q: Tensor, full: Tensor) -> None:
        """Selects the partial cache by queries [B, 1, H, D], for requests where full [B] is
        True.
        """
        cache, heads = self.cache, self.cache.k.shape[2]
        n = cache.lengths.masked_fill(~full, 0)
        logits = kv_block_scores(
            q, cache.k, scale=self.scale, seqlens_k=n, block_table=cache.block_table,
            backend=self.backend, k_scale=cache.k_scale,
        )  # fmt: skip
        scores = logits[:, :, 0].softmax(-1).unflatten(1, (heads, -1)).amax(2)
        scores = max_pool1d(scores, self.kernel, 1, self.kernel // 2)
        ranked, counts = topk_select(
            scores.flatten(0, 1), self._max, lengths=rows_of(n, heads), order="score",
            backend=self.backend,
        )  # fmt: skip
        counts = torch.minimum(counts.view(-1, heads), self._size[:, None])
        mean = q.float().mean(2, keepdim=True).to(q)
        self._ranked = torch.where(full[:, None, None], ranked.view_as(self._ranked), self._ranked)
        self._counts = torch.where(full[:, None], counts, self._counts)
        self._end = torch.where(full, cache.lengths, self._end)
        self._query = torch.where(full[:, None, None, None], mean, self._query)
        self._reads.append(Rows(n, cache.key_bytes))

    def rewind(self, tokens: Back) -> None:
        super().rewind(tokens)
        n = self.cache.lengths
        at = torch.arange(self._max, device=n.device)
        there = (at < self._counts[..., None]) & (self._ranked < n[:, None, None])
        order = (~there).to(torch.uint8).sort(dim=-1, stable=True).indices
        self._ranked, self._counts = self._ranked.gather(-1, order), there.sum(-1).int()
        self._end = torch.minimum(self._end, n)
        self._steps = max(self._steps - tokens, 0) if isinstance(tokens, int) else 0
