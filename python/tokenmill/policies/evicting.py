"""Policies that evict keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d

from .._check import as_int, check, check_tensor
from ..select.attention_column_scores import attention_column_scores
from ..select.kv_cache_compact import kv_cache_compact
from ..select.topk_select import topk_select
from .cache import KVCache
from .policy import FullAttention, Policy, rows_of, span
from .rotation import Rope, check_rope, rotated

Share = int | float


@dataclass(eq=False)
class StreamingLLM(Policy):
    r"""Attends to sink and recent tokens, rotated by their place among the keys attended to.

    With rope the policy is given queries and keys without rotary embedding, and rotates each key by
    its place among those attended to, so that no place is beyond num_sink + num_recent. Without it
    they are used as they are. A full cache is compacted; what a step sees does not depend on when.
    Pages beyond the lengths are free.

    Args:
        num_sink, num_recent: sink (first) and recent (last) tokens; the recent include the newest.
        rope: (cos, sin), float ``[positions, pairs]``, pairs up to D / 2; as many positions as the
            longest prompt has tokens, and num_sink + num_recent.
        interleaved: pairs are columns (2 i, 2 i + 1), not (i, i + pairs).

    Paper: StreamingLLM (Xiao et al. 2024), section 3.2. Prompts are read with full attention.
    """

    num_sink: int = 4
    num_recent: int = 2044
    rope: Rope | None = None
    interleaved: bool = False

    def _turned(self, x: Tensor, at: Tensor, positions: int) -> Tensor:
        if self.rope is None:
            return x
        check_rope(self._name, self.rope, x, positions, "each token of the prompt")
        return rotated(x, self.rope, at, self.interleaved)

    def _step(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cache = self.cache
        if cache.longest == cache.capacity:
            self._evict()
        self._append(k, v)
        nothing = cache.lengths.new_zeros(len(cache.lengths), 1)
        out, _ = self._attend(
            q, nothing[..., None], nothing, num_sink=self.num_sink, num_recent=self.num_recent,
            pos_mode="cache", rope=self.rope, interleaved=self.interleaved,
        )  # fmt: skip
        return out

    @property
    def kept(self) -> Tensor:
        return self.cache.lengths.clamp(max=self.num_sink + self.num_recent)

    def slots(self, tokens: int) -> int | None:
        return max(tokens, self.num_sink + self.num_recent) + 1

    def _evict(self) -> None:
        """Evicts all but what the next step, which adds a token, attends to."""
        recent = max(self.num_recent - 1, 0)
        last = torch.full_like(self.cache.lengths, recent)
        keep, counts = first_and_last(self.cache.lengths, self.num_sink, last, recent)
        self.cache.compact(keep, counts, self.backend)


@dataclass(eq=False)
class H2O(Policy):
    r"""Attends to the tokens that received the most attention so far, and to recent tokens.

    A key's score is the attention that it got from all queries that saw it, averaged over the query
    heads of its head. After each step the key with the lowest score, recent ones aside, is
    dropped. Lists name what is left, and a full cache is compacted to them.

    Args:
        heavy, recent: keys kept for their score and as the last ones: a number, or a share of the
            prompt's tokens (rounded down, but the last token stays).

    Paper: H2O (Zhang et al. 2023), section 4; the shares are those of its 20 % budget.
    """

    heavy: Share = 0.1
    recent: Share = 0.1
    _ROWS: ClassVar[tuple[str, ...]] = ("_list", "_counts", "_scores", "_budget", "_recent")

    def slots(self, tokens: int) -> int | None:
        return max(tokens, most(self.heavy, tokens) + max(most(self.recent, tokens), 1)) + 1

    def begin(
        self, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, *, lengths: Tensor | None = None
    ) -> None:
        super().begin(q, k, v, lse, lengths=lengths)
        n, tokens = self.cache.lengths, q.shape[1]
        scores = attention_column_scores(
            q, k, self._for_scores(lse), causal=True, scale=self.scale, head_reduce="group_mean",
            seqlens_k=n, seqlens_q=n, backend=self.backend,
        )  # fmt: skip
        self._recent = amount(self.recent, n).clamp(min=1)
        self._budget = amount(self.heavy, n) + self._recent
        self._most = most(self.heavy, tokens) + max(most(self.recent, tokens), 1)
        self._list = span(torch.zeros_like(n), tokens)[:, None].expand(scores.shape).contiguous()
        self._counts = n[:, None].repeat(1, k.shape[2])
        self._evict(scores)

    def _step(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cache = self.cache
        if cache.longest == cache.capacity:
            cache.compact(self._list, self._counts, self.backend)
            self._list = torch.arange(self._most, dtype=torch.int32, device=q.device).expand_as(
                self._list
            )
        newest = self._counts[..., None].long()
        self._append(k, v)
        pad = (*newest.shape[:2], 1)
        slot = (cache.lengths - 1)[:, None, None].expand(pad)
        lists = torch.cat([self._list, slot.new_zeros(pad)], -1).scatter(-1, newest, slot)
        scores = torch.cat([self._scores, self._scores.new_zeros(pad)], -1)
        out, _, mass = self._attend(q, lists, self._counts + 1, return_mass=True)
        self._list, self._counts = lists, self._counts + 1
        self._evict(scores + mass * (cache.k.shape[2] / max(q.shape[2], 1)))
        return out

    @property
    def kept(self) -> Tensor:
        return self._counts

    def _evict(self, scores: Tensor) -> None:
        chosen, self._scores, self._counts = keep_best(
            scores, self._counts, self._budget, self._recent, self._most, self.backend
        )
        self._list = self._list.gather(-1, chosen.long())


@dataclass(eq=False)
class Keyformer(Policy):
    r"""H2O with noisy scores: a softmax of logits plus Gumbel noise, at a temperature that rises a
    little with each step.

    Args:
        budget: keys kept: a number, or a share of the prompt's tokens.
        recent: of these the last ones: a number, or a share of the budget.
        tau, tau_step: temperature for the prompt, and what each step adds.
        seed: of the noise.

    Paper: Keyformer (Adnan et al. 2024), section 3; defaults of the released code, which only masks
    what it drops, and sums the scores of all requests; here each request drops its own.
    """

    budget: Share = 0.6
    recent: Share = 0.3
    tau: float = 1.0
    tau_step: float = 0.01
    seed: int = 0
    _ROWS: ClassVar[tuple[str, ...]] = ("_scores", "_budget", "_recent")
    _LEAST: ClassVar[dict[str, int]] = {"seed": -(2**63)}
    _MOST: ClassVar[dict[str, int]] = {"seed": 2**63 - 1}

    def slots(self, tokens: int) -> int | None:
        return max(tokens, most(self.budget, tokens)) + 1

    def grow(self, slots: int) -> None:
        super().grow(slots)
        if "_wanted" in vars(self):
            self._most = min(self._wanted, self.cache.capacity)

    def begin(
        self, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, *, lengths: Tensor | None = None
    ) -> None:
        super().begin(q, k, v, lse, lengths=lengths)
        n, tokens = self.cache.lengths, q.shape[1]
        self._steps = 0
        self._budget = amount(self.budget, n).clamp(min=1)
        self._recent = amount(self.recent, self._budget).clamp(min=1)
        self._wanted = max(most(self.budget, tokens), 1)
        self._most = min(self._wanted, self.cache.capacity)
        self._evict(self._scores_of(q, k, causal=True, seqlens_k=n, seqlens_q=n))

    def _step(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cache = self.cache
        self._append(k, v)
        self._steps += 1
        out = self._attend_all(q)
        new = self._scores_of(q, cache.dense(cache.k), seqlens_k=cache.lengths)
        new[..., : self._scores.shape[-1]] += self._scores
        self._evict(new)
        self._reads.append((cache.lengths, cache.key_bytes))
        return out

    def _scores_of(self, q: Tensor, k: Tensor, **options: Any) -> Tensor:
        # The cache stays as long as it is, and the noise of a place with it but for the seed.
        return attention_column_scores(
            q, k, gumbel_tau=self.tau + self._steps * self.tau_step, seed=self.seed + self._steps,
            scale=self.scale, head_reduce="group_mean", backend=self.backend, **options,
        )  # fmt: skip

    def _evict(self, scores: Tensor) -> None:
        counts = self.cache.lengths[:, None].repeat(1, scores.shape[1])
        chosen, self._scores, counts = keep_best(
            scores, counts, self._budget, self._recent, self._most, self.backend
        )
        self.cache.compact(chosen, counts, self.backend)


@dataclass(eq=False)
class SnapKV(Policy):
    r"""Attends to the keys that the end of the prompt attends to, to that end, and to new tokens.

    Only the prompt is evicted from: a key's score is the mean attention from the last window
    queries, averaged over kernel neighbours and over the query heads of its head.

    Args:
        budget: keys kept of a prompt, the window's among them.
        window: last tokens of the prompt, which choose and stay.
        kernel: neighbours averaged, odd.

    Paper: SnapKV (Li et al. 2024), section 4.
    """

    budget: int = 1024
    window: int = 64
    kernel: int = 5
    _LEAST: ClassVar[dict[str, int]] = {"kernel": 1}

    def begin(
        self, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, *, lengths: Tensor | None = None
    ) -> None:
        super().begin(q, k, v, lse, lengths=lengths)
        n, heads = self.cache.lengths, k.shape[2]
        check(self.kernel % 2 == 1, self._name, "kernel", "must be odd", self.kernel)
        scores = attention_column_scores(
            q, k, self._for_scores(lse), causal=True, scale=self.scale, reduce="mean",
            window_queries=self.window, head_reduce="group_mean", seqlens_k=n, seqlens_q=n,
            backend=self.backend,
        )  # fmt: skip
        own = span(self.window - n, q.shape[1])[:, None] >= 0
        scores = avg_pool1d(scores.masked_fill(own, 0), self.kernel, 1, self.kernel // 2)
        keep, counts = topk_select(
            scores.flatten(0, 1), self.budget, lengths=rows_of(n, heads), force_last=self.window,
            backend=self.backend,
        )  # fmt: skip
        self.cache.compact(keep.unflatten(0, (-1, heads)), counts.view(-1, heads), self.backend)

    @property
    def _at_once(self) -> bool:
        return True

    def _step(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self._append(k, v)
        return self._attend_all(q)


@dataclass(eq=False)
class RazorAttention(Policy):
    r"""Retrieval heads attend to all keys; the others to sink and recent tokens, and to one
    compensation token for the rest.

    That token's key and value are the means of the keys and values left out, and its logit gets the
    logarithm of their number. The cache is that of the retrieval heads, ``[B, S, len(retrieval),
    D]``; the others have a short dense one of the policy's own.

    Args:
        retrieval: key heads that keep everything.
        num_sink: sink (first) tokens that the others keep.
        local, share: the others keep local last tokens, or the share-th part of the prompt if that
            is more.
        slack: tokens added to the short cache before it is compacted; results do not depend on it.

    Paper: RazorAttention (Tang et al. 2024), section 3.3 and algorithm 1.
    """

    retrieval: tuple[int, ...] = ()
    num_sink: int = 4
    local: int = 4000
    share: int = 5
    slack: int = 64
    _LEAST: ClassVar[dict[str, int]] = {"share": 1}

    def begin(
        self, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, *, lengths: Tensor | None = None
    ) -> None:
        self._check_prompt(q, k)
        heads = range(k.shape[2])
        rule = f"must be a tuple of different key heads below {len(heads)}"
        several = isinstance(self.retrieval, tuple | list)
        check(several, self._name, "retrieval", rule, self.retrieval)
        self.retrieval = tuple(as_int(self._name, "retrieval", h, rule) for h in self.retrieval)
        fits = len({*self.retrieval}) == len(self.retrieval) and {*self.retrieval} <= {*heads}
        check(fits, self._name, "retrieval", rule, self.retrieval)
        others = [h for h in heads if h not in self.retrieval]
        self._heads = [
            torch.tensor(h, dtype=torch.long, device=k.device) for h in (self.retrieval, others)
        ]
        short = self.num_sink + max(self.local, k.shape[1] // self.share) + max(self.slack, 1)
        cache = KVCache.like(k[:, :, : len(others)], v[:, :, : len(others)], short)
        self._parts = (
            FullAttention(self.cache, **self._scoring),
            _Compensated(
                cache, num_sink=self.num_sink, local=self.local, share=self.share, **self._scoring
            ),
        )
        for part, own in zip(self._parts, self._heads, strict=True):
            if self.sink is not None:
                part.sink = self.sink.unflatten(0, (k.shape[2], -1))[own].flatten()
            part.begin(q, k[:, :, own], v[:, :, own], lse, lengths=lengths)

    def reorder(self, requests: Tensor) -> None:
        super().reorder(requests)
        if "_parts" in vars(self):
            self._parts[1].reorder(requests)  # the cache of the first is that of the policy

    def _step(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        for name, t in (("q", q), ("k", k), ("v", v)):
            check_tensor(self._name, name, t)
            check(t.dim() == 4, self._name, name, "must have 4 dimensions [B, 1, H, D]", t.dim())
        groups = k.shape[2] == sum(map(len, self._heads)) and q.shape[2] % max(k.shape[2], 1) == 0
        rule = "must have the key heads of the prompt, which divide the heads of q"
        check(groups, self._name, "k", rule, k.shape)
        rule = f"must have the key heads of k, {k.shape[2]}"
        check(v.shape[2] == k.shape[2], self._name, "v", rule, v.shape)
        q = q.unflatten(2, (k.shape[2], -1))  # the query heads of each key head
        out = q.new_empty(*q.shape[:4], v.shape[3])
        for part, heads in zip(self._parts, self._heads, strict=True):
            mine = part.step(q[:, :, heads].flatten(2, 3), k[:, :, heads], v[:, :, heads])
            out[:, :, heads] = mine.unflatten(2, (len(heads), q.shape[3]))
        self._reads = [read for part in self._parts for read in part._reads]
        return out.flatten(2, 3)

    @property
    def kept(self) -> Tensor:
        kept = self.cache.lengths[:, None].repeat(1, sum(len(h) for h in self._heads))
        for part, heads in zip(self._parts, self._heads, strict=True):
            kept[:, heads] = part.kept[:, None]
        return kept


@dataclass(eq=False)
class _Compensated(Policy):
    """Attends to sink and recent tokens and the mean of the rest. begin overwrites k and v."""

    num_sink: int = 4
    local: int = 4000
    share: int = 5
    _ROWS: ClassVar[tuple[str, ...]] = ("_local", "_k_sum", "_v_sum", "_dropped")

    def begin(
        self, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, *, lengths: Tensor | None = None
    ) -> None:
        tokens = k.shape[1]
        n = torch.full_like(self.cache.lengths, tokens) if lengths is None else lengths
        self._local = (n // self.share).clamp(min=self.local)
        self._width = max(self.local, tokens // self.share)
        keep, counts = first_and_last(n, self.num_sink, self._local, self._width)
        sums = kv_cache_compact(
            k, v, keep, counts, seqlens_k=n, compensation=True, backend=self.backend
        )
        self._k_sum, self._v_sum, self._dropped = sums[1], sums[2], sums[3]
        most = min(self.num_sink + self._width, tokens)
        self.cache.fill(k[:, :most], v[:, :most], counts)

    def _step(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cache = self.cache
        if cache.longest == cache.capacity:  # what goes is in the sums
            keep, counts = first_and_last(cache.lengths, self.num_sink, self._local, self._width)
            cache.compact(keep, counts, self.backend)
        self._append(k, v)
        self._drop()
        count = self._dropped[:, None, :, None].clamp(min=1)
        last = span((cache.lengths - self._local).clamp(min=0), self._width)[:, None]
        out, _ = self._attend(
            q, last, torch.minimum(cache.lengths, self._local)[:, None], num_sink=self.num_sink,
            extra_k=(self._k_sum[:, None] / count).to(q.dtype),
            extra_v=(self._v_sum[:, None] / count).to(q.dtype),
            extra_log_count=self._dropped.float().log()[..., None],
        )  # fmt: skip
        self._reads.append((self._dropped.clamp(max=1), cache.token_bytes // max(k.shape[2], 1)))
        return out

    @property
    def kept(self) -> Tensor:
        return torch.minimum(self.cache.lengths, self._local + self.num_sink)

    def _drop(self) -> None:
        """Adds the token that is no longer recent to the sums."""
        cache = self.cache
        slot = (cache.lengths - 1 - self._local).long()
        leaves = slot >= self.num_sink
        at = (cache.requests, slot.clamp(min=0))
        self._k_sum = self._k_sum + cache.k[at].float().where(leaves[:, None, None], 0)
        self._v_sum = self._v_sum + cache.v[at].float().where(leaves[:, None, None], 0)
        self._dropped = self._dropped + leaves[:, None].int()


def amount(share: Share, of: Tensor) -> Tensor:
    """A number of keys for each request, given as such or as a share."""
    return torch.full_like(of, share) if isinstance(share, int) else (of.double() * share).int()


def most(share: Share, of: int) -> int:
    return share if isinstance(share, int) else int(of * share)


def first_and_last(n: Tensor, first: int, last: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Lists and counts of the first slots and the last[b] last slots of n[b], up to width."""
    at = span(torch.zeros_like(n), first + width)
    gap = (n - last - first).clamp(min=0)[:, None]
    return torch.where(at < first, at, at + gap), torch.minimum(n, last + first)


def keep_best(
    scores: Tensor, counts: Tensor, budget: Tensor, recent: Tensor, most: int, backend: str | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Of the first counts[b, h] scores [B, Hk, S] the budget[b] largest, the last recent[b] always
    among them: int32 [B, Hk, most] ascending, their scores (0 after the last), how many."""
    at = torch.arange(max(scores.shape[2], most), device=scores.device)
    last = at[: scores.shape[2]] >= (counts - recent[:, None])[..., None]
    chosen, found = topk_select(
        scores.masked_fill(last, torch.inf).flatten(0, 1), most, lengths=counts.flatten(),
        order="score", backend=backend,
    )  # fmt: skip
    counts = torch.minimum(found.view(counts.shape), budget[:, None])
    unused = at[:most] >= counts[..., None]
    end = torch.iinfo(torch.int32).max
    chosen = chosen.view(unused.shape).masked_fill(unused, end).sort(-1).values
    chosen = chosen.masked_fill(unused, 0)
    return chosen, scores.gather(-1, chosen.long()).masked_fill(unused, 0), counts
