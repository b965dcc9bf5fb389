"""Policies that evict keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d

from .._check import as_int, check
from ..select.attention_column_scores import attention_column_scores
from ..select.topk_select import topk_select
from ..sparse.block_sparse_attention import block_sparse_attention
from .cache import Keys
from .chunks import rolled
from .policy import FullAttention, Policy, rows_of, span
from .rotation import Rope, check_rope, rotated

Share = int | float
BLOCK = 64  # queries that share the bounds of a window with sinks
ROUNDED = 1e-6  # makes 0.57 of 100 keys, 56.99999999999999 in double, 57


@dataclass(eq=False)
class StreamingLLM(Policy):
    r"""Attends to sink and recent tokens, with RoPE by rank among the keys attended to.

    With rope the policy is given queries and keys without rotary embedding, and rotates each key by
    its rank among the keys attended to, so that no rank exceeds num_sink + num_recent. Without rope
    they are not rotated. A full cache is compacted; the result of a step does not depend on when.
    Pages beyond the lengths are free.

    Args:
        num_sink, num_recent: numbers of sink (first) and recent (last) tokens, including the
            newest. The released code cuts its cache to start_size + recent_size after a token has
            attended to it in eval_long_ppl.py, which is num_recent = recent_size + 1 here, and
            before a turn in run_streaming_llama.py, which is :meth:`make_room`.
        rope: (cos, sin), float ``[positions, pairs]``, pairs up to D / 2; at least as many
            positions as the longest prompt has tokens, and num_sink + num_recent.
        interleaved: pairs are columns (2 i, 2 i + 1), not (i, i + pairs).

    Paper: StreamingLLM (Xiao et al. 2024), section 3.2. Prompts are read with full attention, as
    in the released code. As a reader of prompts each token attends to the num_sink first and the
    num_recent last keys, at their positions in the text, in O(S (num_sink + num_recent)).
    """

    num_sink: int = 4
    num_recent: int = 2044
    rope: Rope | None = None
    interleaved: bool = False
    _READS: ClassVar[bool] = True

    @property
    def _reader(self) -> Policy:
        return self._reading(FullAttention() if self.reader is None else self.reader)

    def _attend_prompt(
        self, q: Tensor, k: Tensor, v: Tensor, count: Tensor | None, seen: Keys | None
    ) -> tuple[Tensor, Tensor | None]:
        blocks = -(-q.shape[1] // BLOCK)
        lists = q.new_zeros(q.shape[0], 1, blocks, 0, dtype=torch.int32)
        options: dict[str, Any] = {
            "block_q": BLOCK, "block_k": BLOCK, "causal": True, "num_sink": self.num_sink,
            "num_recent": self.num_recent, **self._scoring,
        }  # fmt: skip
        counts = lists.sum(-1, dtype=torch.int32)
        if seen is None:
            return block_sparse_attention(q, k, v, lists, counts, **options), None
        options |= {"seqlens_k": seen.lengths, "block_table": seen.block_table}
        if count is None:
            return block_sparse_attention(q, seen.k, seen.v, lists, counts, **options), None
        missing = q.shape[1] - count
        q = rolled(q, missing)
        out = block_sparse_attention(q, seen.k, seen.v, lists, counts, **options)
        return rolled(out, -missing), None

    def _turned(self, x: Tensor, at: Tensor, positions: int) -> Tensor:
        if self.rope is None:
            return x
        check_rope(self._name, self.rope, x, positions, "each token of the prompt")
        return rotated(x, self.rope, at, self.interleaved)

    def _step(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cache = self.cache
        if cache.longest == cache.capacity:
            self.make_room(1)
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

    def make_room(self, tokens: int) -> None:
        """Evicts all but the sink tokens and the last num_recent - tokens tokens, before a turn of
        a conversation: each of the next `tokens` tokens, of user and answer, then sees all earlier
        tokens of the turn. Without it the window slides with each token.

        Args:
            tokens: number of tokens of the turn; num_recent or more only keeps the sink tokens.
        """
        tokens = as_int(self._name, "tokens", tokens)
        check(tokens >= 0, self._name, "tokens", "must be at least 0", tokens)
        recent = max(self.num_recent - tokens, 0)
        last = torch.full_like(self.cache.lengths, recent)
        keep, counts = first_and_last(self.cache.lengths, self.num_sink, last, recent)
        self.cache.compact(keep, counts, self.backend)


@dataclass(eq=False)
class H2O(Policy):
    r"""Attends to the tokens with the most accumulated attention, and to recent tokens.

    A key's score is its total attention from all queries that saw it, averaged over the query heads
    of its KV head. After each step the key with the lowest score, excluding recent keys, is
    dropped. Lists hold the remaining keys, and a full cache is compacted to them.

    Args:
        heavy, recent: keys kept by score, and last keys kept: a number, or a fraction of the
            prompt's tokens (rounded down, but the last token is kept).

    Paper: H2O (Zhang et al. 2023), section 4; the default fractions make up its 20 % budget.
    """

    heavy: Share = 0.1
    recent: Share = 0.1
    _ROWS: ClassVar[tuple[str, ...]] = ("_list", "_counts", "_scores", "_budget", "_recent")

    def slots(self, tokens: int) -> int | None:
        return max(tokens, maximum(self.heavy, tokens) + max(maximum(self.recent, tokens), 1)) + 1

    def _begin(self, q: Tensor, k: Tensor, lse: Tensor | None) -> None:
        n, tokens = self.cache.lengths, q.shape[1]
        scores = attention_column_scores(
            q, k, self._for_scores(lse), causal=True, scale=self.scale, head_reduce="group_mean",
            seqlens_k=n, seqlens_q=n, backend=self.backend,
        )  # fmt: skip
        self._recent = amount(self.recent, n).clamp(min=1)
        self._budget = amount(self.heavy, n) + self._recent
        self._max = maximum(self.heavy, tokens) + max(maximum(self.recent, tokens), 1)
        self._list = span(torch.zeros_like(n), tokens)[:, None].expand(scores.shape).contiguous()
        self._counts = n[:, None].repeat(1, k.shape[2])
        self._evict(scores)

    def _step(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cache = self.cache
        if cache.longest == cache.capacity:
            cache.compact(self._list, self._counts, self.backend)
            self._list = torch.arange(self._max, dtype=torch.int32, device=q.device).expand_as(
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
            scores, self._counts, self._budget, self._recent, self._max, self.backend
        )
        self._list = self._list.gather(-1, chosen.long())


@dataclass(eq=False)
class Keyformer(Policy):
    r"""H2O with noisy scores: a softmax of logits plus Gumbel noise, at a temperature that rises a
    little with each step.

    Args:
        budget: keys kept: a number, or a fraction of the prompt's tokens.
        recent: last keys among them: a number, or a fraction of the budget.
        tau, tau_step: temperature for the prompt, and increment per step; the paper goes from 1 to
            2, so tau_step is 1 / new tokens.
        seed: seed of the noise.
        released: select keys like the released code: the next token counts in the budget, and a
            token that is no longer recent is dropped without being compared with older ones, so the
            selection from the prompt is kept to the end. False: a token that is no longer recent is
            kept if its score is among the best, as in the paper.

    Paper: Keyformer (Adnan et al. 2024), algorithm 1; defaults of the released code, which only
    masks dropped keys, and sums scores over all requests; here each request drops its own keys.
    """

    budget: Share = 0.6
    recent: Share = 0.3
    tau: float = 1.0
    tau_step: float = 0.01
    seed: int = 0
    released: bool = False
    _ROWS: ClassVar[tuple[str, ...]] = ("_scores", "_budget", "_recent", "_read")
    _LEAST: ClassVar[dict[str, int]] = {"seed": -(2**63)}
    _MOST: ClassVar[dict[str, int]] = {"seed": 2**63 - 1}

    def slots(self, tokens: int) -> int | None:
        return max(tokens, maximum(self.budget, tokens)) + 1

    def grow(self, slots: int) -> None:
        super().grow(slots)
        if "_wanted" in vars(self):
            self._max = min(self._wanted, self.cache.capacity)

    def _begin(self, q: Tensor, k: Tensor, lse: Tensor | None) -> None:
        n, tokens = self.cache.lengths, q.shape[1]
        self._steps = 0
        self._read = n  # tokens so far
        self._budget = amount(self.budget, n).clamp(min=1)
        self._recent = amount(self.recent, self._budget).clamp(min=1)
        self._wanted = max(maximum(self.budget, tokens), 1)
        self._max = min(self._wanted, self.cache.capacity)
        self._evict(self._scores_of(q, k, causal=True, seqlens_k=n, seqlens_q=n))

    def _step(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cache = self.cache
        self._append(k, v)
        self._steps += 1
        self._read = self._read + 1
        out = self._attend_all(q)
        new = self._scores_of(q, cache.keys(q.dtype), seqlens_k=cache.lengths)
        new[..., : self._scores.shape[-1]] += self._scores
        self._reads.append((cache.lengths, cache.key_bytes))
        self._evict(new)
        return out

    def _scores_of(self, q: Tensor, k: Tensor, **options: Any) -> Tensor:
        # The length of the cache is constant, so only the seed changes the noise at a slot.
        return attention_column_scores(
            q, k, gumbel_tau=self.tau + self._steps * self.tau_step, seed=self.seed + self._steps,
            scale=self.scale, head_reduce="group_mean", backend=self.backend, **options,
        )  # fmt: skip

    def _evict(self, scores: Tensor) -> None:
        n = self.cache.lengths
        counts = n[:, None].repeat(1, scores.shape[1])
        budget, recent = self._budget, self._recent
        if self.released:
            full = self._read > budget
            leaves = torch.arange(scores.shape[2], device=n.device) == (n - recent)[:, None]
            scores = scores.masked_fill((leaves & full[:, None])[:, None], -torch.inf)
            budget, recent = torch.where(full, budget - 1, n), recent - 1
        chosen, self._scores, counts = keep_best(
            scores, counts, budget, recent, self._max, self.backend
        )
        self.cache.compact(chosen, counts, self.backend)


@dataclass(eq=False)
class SnapKV(Policy):
    r"""Attends to the prompt keys that the end of the prompt attends to most, to that end, and to
    new tokens.

    Only prompt keys are evicted: a key's score is the mean attention from the last window queries,
    averaged over kernel neighbours and over the query heads of its KV head.

    Args:
        budget: number of keys kept of a prompt, including the window.
        window: number of last prompt tokens, whose queries select keys, and which are kept.
        kernel: number of neighbours averaged, odd.

    Paper: SnapKV (Li et al. 2024), section 4. :meth:`paper` has window and kernel of the released
    code.
    """

    budget: int = 1024
    window: int = 32
    kernel: int = 13
    PAPER: ClassVar[dict[str, Any]] = {"window": 64, "kernel": 5}
    _LEAST: ClassVar[dict[str, int]] = {"kernel": 1}

    def _begin(self, q: Tensor, k: Tensor, lse: Tensor | None) -> None:
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


def amount(share: Share, of: Tensor) -> Tensor:
    """Number of keys per request, given as a number or as a fraction, rounded down."""
    if isinstance(share, int):
        return torch.full_like(of, share)
    return (of.double() * share + ROUNDED).int()


def maximum(share: Share, of: int) -> int:
    return share if isinstance(share, int) else int(of * share + ROUNDED)


def first_and_last(n: Tensor, first: int, last: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Lists and counts of the `first` first slots and the last[b] last slots of n[b], up to
    width.
    """
    at = span(torch.zeros_like(n), first + width)
    gap = (n - last - first).clamp(min=0)[:, None]
    return torch.where(at < first, at, at + gap), torch.minimum(n, last + first)


def keep_best(
    scores: Tensor,
    counts: Tensor,
    budget: Tensor,
    recent: Tensor,
    maximum: int,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Among the first counts[b, h] scores [B, Hk, S], selects the budget[b] largest, always
    including the last recent[b]: int32 [B, Hk, most] ascending, their scores (0 after the last),
    and counts.
    """
    at = torch.arange(max(scores.shape[2], maximum), device=scores.device)
    last = at[: scores.shape[2]] >= (counts - recent[:, None])[..., None]
    chosen, found = topk_select(
        scores.masked_fill(last, torch.inf).flatten(0, 1), maximum, lengths=counts.flatten(),
        order="score", backend=backend,
    )  # fmt: skip
    counts = torch.minimum(found.view(counts.shape), budget[:, None])
    unused = at[:maximum] >= counts[..., None]
    end = torch.iinfo(torch.int32).max
    chosen = chosen.view(unused.shape).masked_fill(unused, end).sort(-1).values
    chosen = chosen.masked_fill(unused, 0)
    return chosen, scores.gather(-1, chosen.long()).masked_fill(unused, 0), counts
