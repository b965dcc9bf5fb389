"""Policies that keep every key and attend to a selection, in dense or paged caches."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from .._check import fail
from ..select.block_pool_keys import block_pool_keys, block_pool_keys_update
from ..select.kv_block_scores import kv_block_scores
from ..select.query_similarity_gate import query_similarity_gate
from ..select.topk_select import topk_select
from .cache import FLOAT8, Back
from .policy import HEAD_REDUCE, Keeping, Lists, Rows, rows_of, span


@dataclass(eq=False)
class TidalDecode(Keeping):
    r"""Full attention in a few layers, which select the tokens for later layers.

    Layers below first use full attention. Layer first and layer correction do too, and select the
    budget tokens with the largest logits; later layers attend to these and to the newest token.
    Create the layers of a model with :func:`stack`.

    Sparse layers make keys and values of later layers deviate from full attention. :meth:`correct`,
    called from time to time, recomputes them for the last tokens.

    Args:
        budget: number of tokens selected.
        first: the first layer that selects.
        correction: the layer that selects again.
        lists: "query": each query head has its own list. "key": the query heads of a KV head share
            a list, of the tokens with the largest logit in any of them, so that a key is read once.
        keep_newest: True: the newest token is always attended to and does not count in the budget,
            as in the released kernels. False: it competes with the others for a place in the
            budget, as in the released model code.

    Paper: TidalDecode (Yang et al. 2024), section 3; lists as in the released model code. Its
    correction layer is 9 or 13 by default, in different files; its kernels need one request and H =
    Hk.
    """

    budget: int = 256
    first: int = 2
    correction: int = 9
    lists: Lists = "query"
    keep_newest: bool = True
    _LEAST: ClassVar[dict[str, int]] = {"budget": 1, "first": -1, "correction": -1}

    def reorder(self, requests: Tensor) -> None:
        super().reorder(requests)
        vars(self).pop("_lists", None)  # recreated by the next step

    def correct(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Recomputes the last tokens of each request: full attention in every layer, replacing
        their keys and values in the cache.

        Args:
            q: ``[B, n, H, D]``, queries of the last n tokens, from a pass of the model over them.
            k, v: ``[B, n, Hk, D]`` and ``[B, n, Hk, Dv]``.

        Returns:
            ``[B, n, H, Dv]``.
        """
        self._check_prompt(q, k)
        self.cache.replace(k, v)
        self._reads = []
        return self._attend_all(q)

    def _step(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self._append(k, v)
        if self._token == 0:
            self._lists: list[tuple[Tensor, Tensor]] = []  # one entry per token of the step
        if self.layer in (self.first, self.correction):
            return self._select(q)
        if self.layer < self.first:
            return self._attend_all(q)
        before = self.previous
        if not isinstance(before, TidalDecode):
            rule = "must be the TidalDecode of the layer before (see stack)"
            fail("policies.TidalDecode", "previous", rule, type(before).__name__)
        self._lists.append(before._lists[self._token])
        return self._attend(q, *self._lists[-1], num_recent=int(self.keep_newest))[0]

    @property
    def _at_once(self) -> bool:
        return self.layer < min(self.first, self.correction)

    def _select(self, q: Tensor) -> Tensor:
        cache = self.cache
        logits = kv_block_scores(
            q, cache.k, head_reduce=HEAD_REDUCE[self.lists],
            scale=self.scale, num_recent=int(self.keep_newest), seqlens_k=cache.lengths,
            block_table=cache.block_table, backend=self.backend, k_scale=cache.k_scale,
        )  # fmt: skip
        rows = logits.shape[:2]
        indices, counts = topk_select(logits.flatten(0, 2), self.budget, backend=self.backend)
        self._lists.append((indices.unflatten(0, rows), counts.view(rows)))
        out = self._attend_all(q)
        self._reads.append(Rows(cache.lengths, cache.key_bytes))
        return out


@dataclass(eq=False)
class Quest(Keeping):
    r"""Attends to the pages with the largest logit bounds, and to the newest page.

    A box holds the minimum and maximum of each channel over the keys of a page, and gives an upper
    bound on the logits of the page. The heads of a GQA group take the largest of their bounds, and
    share a list.

    Args:
        budget: number of tokens attended to, at least 3 pages.
        page: tokens per page of the method; a power of two, independent of the page size of the
            cache.
        dense_layers: number of first layers with full attention.

    Paper: Quest (Tang et al. 2024), section 3.3; :meth:`paper` has its pages of 16. The released
    kernels need one request and H = Hk.
    """

    budget: int = 1024
    page: int = 8
    dense_layers: int = 2
    PAPER: ClassVar[dict[str, Any]] = {"page": 16}
    _LEAST: ClassVar[dict[str, int]] = {"page": 1}
    _ROWS: ClassVar[tuple[str, ...]] = ("_boxes",)

    def grow(self, slots: int) -> None:
        super().grow(slots)
        boxes = getattr(self, "_boxes", None)
        if boxes is not None:
            pages = -(-self.cache.capacity // self.page)
            more = boxes.new_zeros(boxes.shape[0], pages - boxes.shape[1], *boxes.shape[2:])
            self._boxes = torch.cat([boxes, more], 1)

    def _begin(self, q: Tensor, k: Tensor, lse: Tensor | None) -> None:
        if self.layer < self.dense_layers:
            return
        cache = self.cache
        keys, table = cache.k, cache.block_table
        if keys.dtype == FLOAT8:
            # 16 bits hold float8 numbers exactly, but not their products with a scale.
            wide = q.dtype if cache.k_scale is None else torch.promote_types(q.dtype, torch.float32)
            keys, table = cache.keys(wide, cache.capacity), None
        self._boxes = block_pool_keys(
            keys, self.page, mode="minmax", lengths=cache.lengths, block_table=table,
            backend=self.backend,
        )  # fmt: skip
        # divisor of lengths, and what rounds a quotient up in each KV head
        self._tokens = cache.lengths.new_full((), self.page)
        self._up = cache.lengths.new_full((k.shape[2],), self.page - 1)

    @property
    def _at_once(self) -> bool:
        return self.layer < self.dense_layers

    def _step(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cache, start = self.cache, self.cache.lengths
        self._append(k, v)
        if self.layer < self.dense_layers:
            return self._attend_all(q)
        self._pool(start, 1)
        bounds = kv_block_scores(
            q.to(self._boxes.dtype), self._boxes, scoring="minmax", block_k=self.page,
            head_reduce="group_max", scale=self.scale, seqlens_k=cache.lengths,
            backend=self.backend,
        )  # fmt: skip
        rows = bounds.shape[:2]
        pages = (cache.lengths[:, None] + self._up) // self._tokens  # [B, Hk]
        indices, counts = topk_select(
            bounds.flatten(0, 2), max(3, self.budget // self.page), lengths=pages.flatten(),
            force_last=1, backend=self.backend,
        )  # fmt: skip
        out, _ = self._attend(
            q, indices.view(*rows, indices.shape[1]), counts.view(rows), block_k=self.page
        )
        box = math.prod(self._boxes.shape[3:]) * self._boxes.element_size()
        self._reads.append(Rows(pages, box))
        return out

    def extend(self, q: Tensor, k: Tensor, v: Tensor, *, lengths: Tensor | None = None) -> Tensor:
        before = self.cache.lengths
        out = super().extend(q, k, v, lengths=lengths)
        if self.layer >= self.dense_layers:
            self._pool(before, q.shape[1])
        return out

    def _pool(self, start: Tensor, tokens: int) -> None:
        """Updates the boxes of the pages with tokens start[b] to at most start[b] + tokens - 1."""
        cache = self.cache
        keys, table = cache.k, cache.block_table
        if keys.dtype == FLOAT8:
            keys, table = self._decoded_pages(start, tokens)
        block_pool_keys_update(
            keys, self._boxes, self.page, start=start, mode="minmax", lengths=cache.lengths,
            block_table=table, backend=self.backend,
        )  # fmt: skip

    def _decoded_pages(self, start: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        """The keys of those pages [B * n, page, Hk, D], and a block table that leads there."""
        cache, page = self.cache, self.page
        number = (tokens + 2 * page - 2) // page  # pages that the tokens can touch
        first = start // page
        at = span(first * page, number * page).clamp(max=max(cache.capacity - 1, 0))
        keys, _ = cache.rows(at, self._boxes.dtype)
        own = number * torch.arange(len(first), dtype=torch.int32, device=first.device)
        table = span(own - first, self._boxes.shape[1]).clamp(0, max(number * len(first) - 1, 0))
        return keys.reshape(len(first) * number, page, *keys.shape[2:]), table


@dataclass(eq=False)
class RecycledAttention(Keeping):
    r"""Full attention every few steps; in between, attention to the keys with the most attention.

    A full step selects, for each KV head, the budget keys with the largest probability summed over
    its query heads; the following steps attend to these and to newer tokens. All keys stay in the
    cache for the next full step.

    Args:
        budget: number of keys selected by a full step.
        stride: number of steps between full steps; the first step is full.
        threshold: a step is full earlier, decided per request, if the cosine of its query and the
            query of the last full step, heads concatenated, is smaller. None: only by stride.

    Paper: Recycled Attention (Xu et al. 2024), section 3, with its fixed and its dynamic schedule:
    the first version of the paper. :class:`RefreshKV` is the published version.
    """

    budget: int = 4096
    stride: int = 50
    threshold: float | None = None
    _LEAST: ClassVar[dict[str, int]] = {"budget": 1, "stride": 1}
    _ROWS: ClassVar[tuple[str, ...]] = ("_list", "_counts", "_query", "_since", "_end")

    def _begin(self, q: Tensor, k: Tensor, lse: Tensor | None) -> None:
        n, heads = self.cache.lengths, k.shape[2]
        self._steps, self._longest = 0, 0  # step count, and length at the last full step
        self._since = torch.zeros_like(n)  # steps since the last full step, per request
        self._end = torch.zeros_like(n)  # length at the last full step, per request
        self._query = q.new_zeros(q.shape[0], 1, *q.shape[2:])  # zeros: similar to no query
        self._list = n.new_zeros(()).expand(q.shape[0], heads, self.budget)
        self._counts = n.new_zeros(q.shape[0], heads)

    def _step(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cache = self.cache
        self._append(k, v)
        if self.threshold is not None:
            return self._step_if_alike(q, self.threshold)
        since, self._steps = self._steps % self.stride, self._steps + 1
        if since > 0:
            newer = cache.longest - self._longest
            return self._attend(q, self._list, self._counts, num_recent=newer)[0]
        out, _, mass = self._attend(q, self._everything(), cache.lengths[:, None], return_mass=True)
        self._list, self._counts = self._best(mass, cache.lengths)
        self._longest = cache.longest
        return out

    def extend(self, q: Tensor, k: Tensor, v: Tensor, *, lengths: Tensor | None = None) -> Tensor:
        out = super().extend(q, k, v, lengths=lengths)
        if lengths is not None:  # the next step is full: requests have different numbers of tokens
            self._steps = 0
        return out

    def rewind(self, tokens: Back) -> None:
        super().rewind(tokens)
        n = self.cache.lengths
        there = span(torch.zeros_like(n), self._list.shape[2])[:, None]
        there = (there < self._counts[..., None]) & (self._list < n[:, None, None])
        self._counts = there.sum(-1, dtype=torch.int32)
        self._end = torch.minimum(self._end, n)
        self._longest = min(self._longest, self.cache.longest)
        if not isinstance(tokens, int):
            self._steps = 0

    def _everything(self) -> Tensor:
        """[B, 1, S]: a list of all keys."""
        return span(torch.zeros_like(self.cache.lengths), self.cache.capacity)[:, None]

    def _step_if_alike(self, q: Tensor, threshold: float) -> Tensor:
        cache, everything = self.cache, self._everything()
        serves = query_similarity_gate(q, self._query, threshold, backend=self.backend)
        serves = serves & (self._since < self.stride)
        kept, end, counts = self._list[..., : cache.capacity], self._end, self._counts
        kept = pad(kept, (0, cache.capacity - kept.shape[2]))
        newer = end[:, None, None] + everything - counts[..., None]
        recycled = torch.where(everything < counts[..., None], kept, newer)
        rows = torch.where(serves[:, None, None], recycled, everything)
        read = counts + (cache.lengths - end)[:, None]
        read = torch.where(serves[:, None], read, cache.lengths[:, None])
        out, _, mass = self._attend(q, rows, read, return_mass=True)
        best = self._best(mass, cache.lengths.masked_fill(serves, 0))
        self._list = torch.where(serves[:, None, None], self._list, best[0])
        self._counts = torch.where(serves[:, None], counts, best[1])
        self._end = torch.where(serves, end, cache.lengths)
        self._since = torch.where(serves, self._since + 1, 1)
        self._query = torch.where(serves[:, None, None, None], self._query, q)
        return out

    def _best(self, mass: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
        """Lists of the keys with the largest mass [B, Hk, S] among the first n[b], and counts."""
        indices, counts = topk_select(
            mass.flatten(0, 1), self.budget, lengths=rows_of(n, mass.shape[1]),
            backend=self.backend,
        )  # fmt: skip
        return indices.unflatten(0, mass.shape[:2]), counts.view(mass.shape[:2])
