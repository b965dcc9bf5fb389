"""TokenSelect: the tokens with the most votes over all heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .._check import check
from ..dense.attention import attention
from ..select.query_similarity_gate import query_similarity_gate
from ..select.token_select import token_select
from .cache import Keys
from .policy import Keeping, Rows, span
from .rotation import Rope, by_rank, check_rope, rotated


@dataclass(eq=False)
class TokenSelect(Keeping):
    r"""Attends to sink and recent tokens, and to the k tokens with the most votes of the heads.

    A head votes with its softmax over the candidates, and all heads share one list. While a
    request's query is similar to the query of its last selection (cosine of at least threshold,
    heads concatenated), its list is reused, and no key is read to select. This applies to steps;
    each chunk selects.

    Prompts are read in chunks. The mean of a chunk's queries votes, and the chunk attends to sink,
    selected and recent tokens and, causally, to itself. A prompt of at most num_sink + k +
    num_recent tokens is read with full attention.

    With rope the policy extends models beyond their training length: it is given queries and keys
    without rotary embedding, and rotates the keys attended to by their rank in the list, so that no
    rank exceeds num_sink + k + max(num_recent, chunk). For the vote, keys are not rotated and a
    query is rotated as if all candidates were num_recent tokens away.

    Args:
        k: number of tokens selected in addition to sink and recent tokens.
        num_sink, num_recent: numbers of sink (first) and recent (last) tokens, always attended to.
            The tokens of a chunk count as recent, the newest first, and are all attended to.
        threshold: minimum cosine at which the previous selection is reused in a step; above 1:
            never.
        vote_scale: factor of the products in the votes; None = scale. The released code uses 1.
        chunk: tokens per chunk of a prompt.
        kernel_size: width of the max-pooling of votes over neighbouring tokens, odd; 1: no pooling.
        rope: (cos, sin), float ``[positions, pairs]``, pairs up to D / 2, with a position for each
            rank in a list and each distance of a vote: num_sink + k + max(num_recent, chunk) and
            num_recent + chunk, or the capacity of the cache if it is at most num_sink + k +
            num_recent. None: no rotation.
        interleaved: pairs are columns (2 i, 2 i + 1), not (i, i + pairs).

    Complexity: a prompt takes 2 H (D + Dv) S (num_sink + k + num_recent) operations, and H D S^2 /
    chunk to select; the keys that a chunk attends to are gathered once.

    Paper: TokenSelect (Wu et al. 2024), sections 4.2 and 4.3, with its chunks of 512. The released
    code uses KV head h mod Hk for head h, scores in 16 bits, one request at a time, and has the
    reuse switched off; here h // (H / Hk), float32, any number of requests. Candidates are the
    tokens before the last num_recent, as in the released code, but never tokens of the chunk
    itself.
    """

    k: int = 2048
    num_sink: int = 128
    num_recent: int = 512
    threshold: float = 0.9
    vote_scale: float | None = None
    chunk: int = 512
    kernel_size: int = 1
    rope: Rope | None = None
    interleaved: bool = False
    _READS: ClassVar[bool] = True
    _LEAST: ClassVar[dict[str, int]] = {"k": 1, "chunk": 1, "kernel_size": 1}

    def _check_fields(self) -> None:
        super()._check_fields()
        odd = self.kernel_size % 2 == 1
        check(odd, self._name, "kernel_size", "must be odd", self.kernel_size)
        rule = "must be None with rope, as it would be given keys without rotary embedding"
        free = self.rope is None or self.reader is None
        check(free, self._name, "reader", rule, type(self.reader).__name__)

    def _step(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self._append(k, v)
        serves = query_similarity_gate(q, self._query, self.threshold, backend=self.backend)
        # requests that reuse their list get length 0, so nothing is read
        asked = self.cache.lengths.masked_fill(serves, 0)
        indices, counts = self._vote(self._from_afar(q), self.cache, asked, self.num_recent)
        serves = serves[:, None, None]
        self._list = torch.where(serves, self._list, indices)
        self._counts = torch.where(serves[:, 0], self._counts, counts)
        self._query = torch.where(serves[..., None], self._query, q)
        out, _ = self._attend(
            q, self._list, self._counts, num_sink=self.num_sink, num_recent=self.num_recent,
            **by_rank(self.rope, self.interleaved),
        )  # fmt: skip
        self._reads.append(Rows(asked, self.cache.key_bytes))
        return out

    def _store(self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None) -> None:
        self._check_prompt(q, k)
        self._check_rope(q)
        self.cache.fill(k, v, lengths)
        self._query = q.new_zeros(q.shape[0], 1, *q.shape[2:])  # zeros: similar to no query
        self._list = self.cache.lengths.new_zeros(()).expand(q.shape[0], 1, self.k)
        self._counts = self.cache.lengths.new_zeros(q.shape[0], 1)

    def _check_rope(self, q: Tensor) -> None:
        if self.rope is None:
            return
        places = self.cache.capacity
        if places > self._listed:
            beside = self.num_recent, self.chunk
            places = max(self.num_sink + self.k + max(beside), sum(beside))
        check_rope(self._name, self.rope, q, places, "each place of a list")

    @property
    def _listed(self) -> int:
        """Number of tokens up to which all are attended to."""
        return self.num_sink + self.k + self.num_recent

    def _from_afar(self, q: Tensor) -> Tensor:
        """Queries [B, n, H, D] rotated for the vote."""
        if self.rope is None:
            return q
        at = self.num_recent + torch.arange(q.shape[1], device=q.device)
        at = at.clamp(max=len(self.rope[0]) - 1)  # only for a cache without candidates
        return rotated(q, self.rope, at, self.interleaved)

    def _vote(self, q: Tensor, keys: Keys, n: Tensor, num_recent: int) -> tuple[Tensor, Tensor]:
        """Lists [B, 1, k] and counts [B, 1] among the first n[b] keys."""
        indices, counts = token_select(
            q, keys.k, k=self.k, num_sink=self.num_sink, num_recent=num_recent,
            kernel_size=self.kernel_size, seqlens_k=n, block_table=keys.block_table,
            scale=self.scale if self.vote_scale is None else self.vote_scale, backend=self.backend,
            k_scale=keys.k_scale,
        )  # fmt: skip
        return indices[:, :, 0], counts[:, :, 0]

    def _attend_prompt(
        self, q: Tensor, k: Tensor, v: Tensor, count: Tensor | None, seen: Keys | None
    ) -> tuple[Tensor, Tensor | None]:
        self._check_rope(q)
        tokens = q.shape[1]
        if count is None:
            count = torch.full((q.shape[0],), tokens, dtype=torch.int32, device=q.device)
        if seen is None:
            seen = Keys(k, v, count, tokens)
        begin, before = seen.lengths - count, seen.longest - tokens  # a bound on begin
        size = self.chunk if seen.longest > self._listed else max(tokens, 1)
        outs = []
        for start in range(0, max(tokens, 1), size):
            queries, own_k, own_v = (x[:, start : start + size] for x in (q, k, v))
            outs.append(self._attend_at(queries, own_k, own_v, seen, begin + start, before + start))
        return torch.cat(outs, 1) if len(outs) > 1 else outs[0], None

    def _attend_at(
        self, q: Tensor, k: Tensor, v: Tensor, keys: Keys, begin: Tensor, before: int
    ) -> Tensor:
        """Attention of q, k, v [B, n, ...] at positions begin[b] to begin[b] + n - 1. before: upper
        bound on begin.
        """
        rows = torch.arange(q.shape[1], dtype=torch.int32, device=q.device)
        bias, places = None, rows.expand(q.shape[0], -1)
        if before > 0:
            at, count = self._before(q, keys, begin, before)
            order = span(torch.zeros_like(begin), at.shape[1])
            unused = order >= count[:, None]
            # A row without a token may hold NaN, which no bias hides.
            hidden = unused[..., None, None]
            old_k, old_v = (x.masked_fill(hidden, 0) for x in keys.rows(at, k.dtype))
            bias = torch.zeros(unused.shape, device=q.device).masked_fill(unused, -torch.inf)
            bias = torch.nn.functional.pad(bias, (0, q.shape[1]))[:, None, None]
            k, v = torch.cat([old_k, k], 1), torch.cat([old_v, v], 1)
            places = count[:, None] + rows
            order = torch.cat([order, places], 1)
        else:
            order = places
        if self.rope is not None:
            maximum = len(self.rope[0]) - 1  # rows beyond a prompt are undefined
            q = rotated(q, self.rope, places.clamp(max=maximum), self.interleaved)
            k = rotated(k, self.rope, order.clamp(max=maximum), self.interleaved)
        return attention(q, k, v, causal=True, bias=bias, **self._scoring)

    def _before(self, q: Tensor, keys: Keys, begin: Tensor, before: int) -> tuple[Tensor, Tensor]:
        """Positions before a chunk that it attends to, ascending, and their number."""
        valid = (keys.lengths - begin).clamp(0, q.shape[1])
        if before + q.shape[1] <= self._listed:
            return span(torch.zeros_like(begin), before), begin
        there = torch.minimum(begin, keys.lengths)
        old = torch.minimum((begin + valid - self.num_recent).clamp(min=0), there)
        speaks = span(torch.zeros_like(valid), q.shape[1]) < valid[:, None]
        voice = self._from_afar(q).float().masked_fill(~speaks[..., None, None], 0)
        mean = voice.sum(1, keepdim=True) / valid.clamp(min=1).view(-1, 1, 1, 1)
        chosen, _ = self._vote(mean.to(q), keys, old, 0)
        first = span(torch.zeros_like(begin), self.num_sink)
        last = span(old, self.num_recent)
        after = torch.iinfo(torch.int32).max
        at = torch.cat([
            first.masked_fill(first >= old[:, None], after),
            chosen[:, 0].masked_fill(chosen[:, 0] < 0, after),
            last.masked_fill(last >= there[:, None], after),
        ], 1).sort(1).values[:, :before]  # fmt: skip
        unused = at == after
        return at.masked_fill(unused, 0), (~unused).sum(1, dtype=torch.int32)
