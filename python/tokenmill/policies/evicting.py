"""Policies that evict keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, pad

from .._check import as_int, check
from ..select.attention_column_scores import attention_column_scores
from ..select.topk_select import topk_select
from ..sparse.block_sparse_attention import block_sparse_attention
from .cache import Keys
from .chunks import rolled
from .policy import FullAttention, Policy, Rows, rows_of, span
from .rotation import Rope, by_rank, check_rope, rotated

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
            **by_rank(self.rope, self.interleaved),
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
    _ROWS: ClassVar[tuple[str, ...]] = ("_slots", "_counts", "_scores", "_budget", "_recent")

    def slots(self, tokens: int) -> int | None:
        return max(tokens, maximum(self.heavy, tokens) + max(maximum(self.recent, tokens), 1)) + 1

    def _begin(self, q: Tensor, k: Tensor, lse: Tensor | None) -> None:
        n, tokens = self.cache.lengths, q.shape[1]
        scores = attention_column_scores(
            q, k, self._for_scores(lse), causal=True, scale=self.scale, head_reduce="group_mean",
            seqlens_k=n, seqlens_q=n, backend=self.backend,
        )  # fmt: skip
        self._recent = amount(self.recent, n).clamp(min=1)[:, None]
        self._budget = amount(self.heavy, n)[:, None] + self._recent
        self._max = maximum(self.heavy, tokens) + max(maximum(self.recent, tokens), 1)
        counts = n[:, None].repeat(1, k.shape[2])
        chosen, scores, self._counts = keep_best(
            scores, counts, self._budget, self._recent, self._max, self.backend
        )
        later = torch.arange(self._max + 2, dtype=torch.int32, device=n.device)
        later = later + (n[:, None] - self._counts)[..., None]
        slots = torch.where(later < n[:, None, None], pad(chosen, (0, 2)), later)
        # the kept slots, then the next ones of the cache
        self._slots, self._scores = Shifting(slots, self._max + 1), negated(scores)
        self._share = torch.tensor(k.shape[2] / max(q.shape[2], 1), dtype=torch.float64)

    def _step(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cache, slots, scores = self.cache, self._slots, self._scores
        if cache.longest == cache.capacity:
            cache.compact(slots.row[..., : self._max], self._counts, self.backend)
            slots.row.copy_(torch.arange(self._max + 2, device=q.device))
        self._append(k, v)
        counts = self._counts + cache.one
        out, _, mass = self._attend(q, slots.first, counts, return_mass=True)
        scores.first.sub_(mass.mul_(self._share))
        moves = find_gap(scores, counts, self._budget, self._recent, self.backend)
        self._counts = torch.minimum(counts, self._budget)
        slots.close(moves)
        torch.add(slots.spare_last, moves[..., -1], out=slots.last)
        scores.close(moves)
        return out

    @property
    def kept(self) -> Tensor:
        return self._counts


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
            self._set_scores(-self._scores.row[..., : self._max])

    def _begin(self, q: Tensor, k: Tensor, lse: Tensor | None) -> None:
        n, tokens = self.cache.lengths, q.shape[1]
        self._steps = 0
        self._read = n  # tokens so far
        self._budget = amount(self.budget, n).clamp(min=1)[:, None]
        recent = amount(self.recent, self._budget).clamp(min=1)
        self._recent = torch.minimum(recent, self._budget)
        self._wanted = max(maximum(self.budget, tokens), 1)
        self._select(self._scores_of(q, k, causal=True, seqlens_k=n, seqlens_q=n))

    def _step(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cache = self.cache
        self._append(k, v)
        self._steps += 1
        self._read = self._read + 1
        out = self._attend_all(q)
        new = self._scores_of(q, cache.keys(q.dtype, cache.longest), seqlens_k=cache.lengths)
        self._reads.append(Rows(cache.lengths, cache.key_bytes))
        scores = self._scores.row[..., : cache.longest].sub_(new)
        if self.released:
            self._select(-scores)
            return out
        counts = cache.lengths[:, None].expand(scores.shape[:2])
        moves = find_gap(self._scores, counts, self._budget, self._recent, self.backend)
        self._scores.close(moves)
        keep = (self._scores.places + moves)[..., : self._max]
        cache.compact(keep, torch.minimum(counts, self._budget), self.backend)
        return out

    def _scores_of(self, q: Tensor, k: Tensor, **options: Any) -> Tensor:
        # The noise of a pair depends on its slot and on the number of keys, which a full cache
        # keeps: there only the seed changes it.
        return attention_column_scores(
            q, k, gumbel_tau=self.tau + self._steps * self.tau_step, seed=self.seed + self._steps,
            scale=self.scale, head_reduce="group_mean", backend=self.backend, **options,
        )  # fmt: skip

    def _select(self, scores: Tensor) -> None:
        """Keeps the keys with the largest scores [B, Hk, S]."""
        n = self.cache.lengths
        counts = n[:, None].repeat(1, scores.shape[1])
        budget, recent = self._budget, self._recent
        if self.released:
            full = self._read[:, None] > budget
            leaves = torch.arange(scores.shape[2], device=n.device) == n[:, None] - recent
            scores = scores.masked_fill((leaves & full)[:, None], -torch.inf)
            budget, recent = torch.where(full, budget - 1, n[:, None]), recent - 1
        maximum = min(self._wanted, self.cache.capacity)
        chosen, scores, counts = keep_best(scores, counts, budget, recent, maximum, self.backend)
        self._set_scores(scores)
        self.cache.compact(chosen, counts, self.backend)

    def _set_scores(self, scores: Tensor) -> None:
        self._max = min(self._wanted, self.cache.capacity)
        self._scores = negated(pad(scores, (0, self._max - scores.shape[2])))


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
    including the last recent[b] (both [B, 1]): int32 [B, Hk, maximum] ascending, their scores (0
    after the last), and counts.
    """
    at = torch.arange(max(scores.shape[2], maximum), device=scores.device)
    last = at[: scores.shape[2]] >= (counts - recent)[..., None]
    chosen, found = topk_select(
        scores.masked_fill(last, torch.inf).flatten(0, 1), maximum, lengths=counts.flatten(),
        order="score", backend=backend,
    )  # fmt: skip
    counts = torch.minimum(found.view(counts.shape), budget)
    unused = at[:maximum] >= counts[..., None]
    end = torch.iinfo(torch.int32).max
    chosen = chosen.view(unused.shape).masked_fill(unused, end).sort(-1).values
    chosen = chosen.masked_fill(unused, 0)
    return chosen, scores.gather(-1, chosen.long()).masked_fill(unused, 0), counts


class Shifting:
    """Rows [B, Hk, n + 1 or more] that drop one of their first n entries at a time, between two
    buffers. Views of both are kept: to make one costs as much as an addition of small tensors.
    """

    def __init__(self, row: Tensor, n: int):
        self.row, self._spare = row, row.clone()
        self.places = torch.arange(n, dtype=torch.int32, device=row.device)
        self.first, self._spare_first = self.row[..., :n], self._spare[..., :n]
        self._next, self._spare_next = self.row[..., 1 : n + 1], self._spare[..., 1 : n + 1]
        self.last, self.spare_last = self.row[..., -1], self._spare[..., -1]

    def close(self, moves: Tensor) -> None:
        """Entries i become entries i + 1 where moves[..., i] [B, Hk, n]; entries after the first n
        are those of the other buffer.
        """
        torch.where(moves, self._next, self.first, out=self._spare_first)
        self.row, self._spare = self._spare, self.row
        self.first, self._spare_first = self._spare_first, self.first
        self._next, self._spare_next = self._spare_next, self._next
        self.last, self.spare_last = self.spare_last, self.last

    def index_select(self, dim: int, index: Tensor) -> Shifting:
        return Shifting(self.row.index_select(dim, index), len(self.places))


def negated(scores: Tensor) -> Shifting:
    """Scores [B, Hk, n] for find_gap, [B, Hk, n + 3]: with the opposite sign, 0 for the newest key
    and the one after it, and +inf.
    """
    row = pad(pad(-scores, (0, 2)), (0, 1), value=torch.inf)
    return Shifting(row, scores.shape[2] + 1)


def find_gap(
    scores: Shifting, counts: Tensor, budget: Tensor, recent: Tensor, backend: str | None
) -> Tensor:
    """Where a list of counts[b, h] keys moves up by an entry, bool [B, Hk, places], when it drops
    the key with the lowest score before the last recent[b], the last one of equal scores: nowhere,
    if there are at most budget[b] keys.
    """
    # The last score is +inf, and after all places.
    searched = torch.where(counts > budget, counts - recent, scores.row.shape[2])
    at, _ = topk_select(
        scores.row.flatten(0, 1), 1, lengths=searched.flatten(), tie="high", backend=backend
    )
    return scores.places >= at.view(*counts.shape, 1)
