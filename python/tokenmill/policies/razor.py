"""RazorAttention: retrieval heads keep every key, the others a short cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from .._check import as_int, check, check_choice, check_tensor
from ..select.kv_cache_compact import kv_cache_compact
from .cache import KVCache
from .evicting import first_and_last
from .policy import FullAttention, Policy, Rows, span
from .retrieval import choose_retrieval_heads

Heads = tuple[int, ...]
Compensation = Literal["counted", "single", "none"]


@dataclass(eq=False)
class RazorAttention(Policy):
    r"""Retrieval heads attend to all keys; the others to sink and recent tokens, and to one
    compensation token for the rest.

    Its key and value are the means of the evicted keys and values, and the logarithm of their
    number is added to its logit. The cache holds the retrieval heads, ``[B, S, number of retrieval
    heads, D]``; the policy allocates a short dense cache for the other heads.

    :meth:`profile` finds the retrieval heads of a model of transformers. For queries and keys of
    another model :func:`profile_repeated_tokens` scores heads and :func:`choose_retrieval_heads`
    chooses.

    Args:
        retrieval: KV heads that keep everything, e.g. (0, 3); or one tuple per layer, e.g. ((0, 3),
            (), (1,)), from which a policy takes its layer's. Required; (): none.
        num_sink: number of sink (first) tokens that the other heads keep.
        local, share: the other heads keep the last `local` tokens, or 1/share of the prompt if that
            is more.
        slack: tokens added to the short cache before it is compacted; results do not depend on it.
        compensation: "counted": one token for the n evicted tokens, with logit q.k + log n, as in
            the paper. "single": one token with logit q.k. "none": no token.

    Paper: RazorAttention (Tang et al. 2024), section 3.3 and algorithm 1. Huawei's release for
    MindSpore (golden-stick) has compensation="single" (or "none"), 256 slots in total, one of them
    for the mean (num_sink=4, local=251, a large share), and adds every generated token to them.
    Here the window slides, and tokens that leave it go into the mean.
    """

    retrieval: Heads | tuple[Heads, ...] | None = None
    num_sink: int = 4
    local: int = 4000
    share: int = 5
    slack: int = 64
    compensation: Compensation = "counted"
    _LEAST: ClassVar[dict[str, int]] = {"share": 1}

    @classmethod
    def profile(
        cls,
        model: Any,
        tokenizer: Any = None,
        *,
        tokens: int = 2500,
        repeats: int = 4,
        echo: float = 0.01,
        induction: float = 0.14,
        seed: int = 0,
        backend: str | None = None,
        **options: Any,
    ) -> RazorAttention:
        r"""A policy with the retrieval heads of a model of transformers.

        The model reads its begin token and a repeated sequence of random tokens, so that attention
        does not depend on meaning. :func:`profile_repeated_tokens` scores its heads, a KV head by
        the largest score of its query heads, and :func:`choose_retrieval_heads` takes the best over
        all layers with full attention.

        Args:
            model: a decoder of transformers 5.24 or later, without a policy.
            tokenizer: its tokenizer; special tokens are not drawn, and the begin token comes first.
                None: ids from the model's configuration.
            tokens: length of the random sequence in distinct tokens; fewer if the model has fewer
                positions or a smaller vocabulary.
            repeats: number of repetitions, at least 2.
            echo, induction: fraction of all KV heads that is kept for each score, 0 to 1.
            seed: seed of the tokens.
            backend: backend of the model's attention.
            options: further fields of the policy.

        Returns:
            A policy without a cache, whose `retrieval` holds the heads of each layer.

        Raises:
            RuntimeError: naming argument, rule and value.

        Complexity: one pass of the model over tokens * repeats + 1 tokens, with attention computed
        twice; the weight matrix is never materialised.

        Paper: RazorAttention (Tang et al. 2024), section 3.2 and table 2: 2500 tokens, 4 times, 1 %
        and 14 % of all heads. The release (golden-stick) draws ids with replacement from 10000 to
        12500, attends without a causal mask (it adds -1e-5 to masked logits), counts the begin
        token once per period as an earlier occurrence, and drops echo heads of all layers but the
        first that has one.

        Example:
            >>> import torch, tokenmill as tm
            >>> from transformers import LlamaConfig, LlamaForCausalLM
            >>> from tokenmill.integrations.transformers import apply_policy
            >>> config = LlamaConfig(
            ...     vocab_size=99, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
            ...     num_attention_heads=4, num_key_value_heads=4)
            >>> model = LlamaForCausalLM(config).eval()
            >>> policy = tm.policies.RazorAttention.profile(model, tokens=40, local=8)
            >>> len(policy.retrieval), 1 <= sum(map(len, policy.retrieval)) <= 2  # of 8 key heads
            (2, True)
            >>> with apply_policy(model, policy):
            ...     text = model.generate(torch.randint(99, (1, 30)), max_new_tokens=4,
            ...                           do_sample=False, pad_token_id=0)
        """
        from ._profile import score_heads

        scores = score_heads(
            model, tokenizer, tokens=tokens, repeats=repeats, seed=seed, backend=backend
        )
        chosen = choose_retrieval_heads(*scores, echo_part=echo, induction_part=induction)
        return cls(retrieval=chosen, **options)

    def _check_fields(self) -> None:
        super()._check_fields()
        kinds = ("counted", "single", "none")
        check_choice(self._name, "compensation", self.compensation, *kinds)
        rule = (
            "must name the key heads that keep every key, in one tuple for all layers or one for "
            "each, and () for none (RazorAttention.profile finds them)"
        )
        several = isinstance(self.retrieval, tuple | list)
        check(several, self._name, "retrieval", rule, self.retrieval)
        assert self.retrieval is not None
        of_layers = [isinstance(h, tuple | list) for h in self.retrieval]
        check(all(of_layers) or not any(of_layers), self._name, "retrieval", rule, self.retrieval)

    def heads_kept(self, layer: int | None = None) -> Heads:
        """The retrieval heads of a layer; None: the policy's own."""
        layer = self.layer if layer is None else layer
        retrieval: Any = self.retrieval
        rule = "must be a tuple of different key heads"
        if any(isinstance(h, tuple | list) for h in retrieval):
            several = f"must have heads for layer {layer}"
            check(layer < len(retrieval), self._name, "retrieval", several, len(retrieval))
            retrieval = retrieval[layer]
        heads = tuple(as_int(self._name, "retrieval", h, rule) for h in retrieval)
        fits = len({*heads}) == len(heads) and min(heads, default=0) >= 0
        check(fits, self._name, "retrieval", rule, retrieval)
        return heads

    def cache_heads(self, heads: int, layer: int) -> int:
        return len(self.heads_kept(layer))

    def begin(
        self, q: Tensor, k: Tensor, v: Tensor, lse: Tensor | None, *, lengths: Tensor | None = None
    ) -> None:
        self._check_prompt(q, k)
        heads, kept = range(k.shape[2]), self.heads_kept()
        rule = f"must be a tuple of different key heads below {len(heads)}"
        check({*kept} <= {*heads}, self._name, "retrieval", rule, kept)
        rule = f"must have the retrieval heads, {len(kept)}"
        check(self.cache.k.shape[2] == len(kept), self._name, "cache", rule, self.cache.k.shape[2])
        others = [h for h in heads if h not in kept]
        self._heads = [torch.tensor(h, dtype=torch.long, device=k.device) for h in (kept, others)]
        short = self.num_sink + max(self.local, k.shape[1] // self.share) + max(self.slack, 1)
        cache = KVCache.like(
            k[:, :, : len(others)], v[:, :, : len(others)], short, dtype=self.cache.k.dtype,
            **self._scales_of(k.shape[0], short, len(others)),
        )  # fmt: skip
        self._parts = (
            FullAttention(self.cache, **self._scoring),
            _Compensated(
                cache, num_sink=self.num_sink, local=self.local, share=self.share,
                compensation=self.compensation, **self._scoring,
            ),
        )  # fmt: skip
        for part, own in zip(self._parts, self._heads, strict=True):
            if self.sink is not None:
                part.sink = self.sink.unflatten(0, (k.shape[2], -1))[own].flatten()
            part.begin(q, k[:, :, own], v[:, :, own], lse, lengths=lengths)

    def _scales_of(self, batch: int, capacity: int, heads: int) -> dict[str, Any]:
        """Scales of the short cache, of the kind that the retrieval heads have."""
        scales = {"k_scale": self.cache.k_scale, "v_scale": self.cache.v_scale}
        for name, scale in scales.items():
            if scale is not None and scale.dim() == 3:
                scales[name] = scale.new_ones(batch, capacity, heads)
            elif scale is not None:
                rule = f"must have one {name} for all heads, or of each token"
                check(scale.shape == (1,), self._name, "cache", rule, scale.shape)
        return scales

    def reorder(self, requests: Tensor) -> None:
        super().reorder(requests)
        if "_parts" in vars(self):
            self._parts[1].reorder(requests)  # the first part shares the cache of the policy

    def _step(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        for name, t in (("q", q), ("k", k), ("v", v)):
            check_tensor(self._name, name, t)
            check(t.dim() == 4, self._name, name, "must have 4 dimensions [B, 1, H, D]", t.dim())
        groups = k.shape[2] == sum(map(len, self._heads)) and q.shape[2] % max(k.shape[2], 1) == 0
        rule = "must have the key heads of the prompt, which divide the heads of q"
        check(groups, self._name, "k", rule, k.shape)
        rule = f"must have the key heads of k, {k.shape[2]}"
        check(v.shape[2] == k.shape[2], self._name, "v", rule, v.shape)
        q = q.unflatten(2, (k.shape[2], -1))  # groups the query heads by KV head
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

    @property
    def bytes_held(self) -> int:
        """Bytes of the filled parts of both caches, and of the sums of evicted tokens."""
        return sum(part.bytes_held for part in self._parts)


@dataclass(eq=False)
class _Compensated(Policy):
    """Attends to sink and recent tokens and to the mean of the rest. begin overwrites k and v."""

    num_sink: int = 4
    local: int = 4000
    share: int = 5
    compensation: Compensation = "counted"
    _ROWS: ClassVar[tuple[str, ...]] = ("_local", "_k_sum", "_v_sum", "_dropped")

    def begin(
        self, q: Tensor, k: Tensor, v: Tensor, lse: Tensor | None, *, lengths: Tensor | None = None
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
        maximum = min(self.num_sink + self._width, tokens)
        self.cache.fill(k[:, :maximum], v[:, :maximum], counts)

    def _step(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cache = self.cache
        if cache.longest == cache.capacity:  # evicted tokens are in the sums
            keep, counts = first_and_last(cache.lengths, self.num_sink, self._local, self._width)
            cache.compact(keep, counts, self.backend)
        self._append(k, v)
        self._drop()
        last = span((cache.lengths - self._local).clamp(min=0), self._width)[:, None]
        counts = torch.minimum(cache.lengths, self._local)[:, None]
        mean = {} if self.compensation == "none" else self._mean(q)
        out, _ = self._attend(q, last, counts, num_sink=self.num_sink, **mean)
        if mean:
            size = cache.token_bytes // max(k.shape[2], 1)
            self._reads.append(Rows(self._dropped, size, most=1))
        return out

    def _mean(self, q: Tensor) -> dict[str, Tensor]:
        """The compensation token. Its logit is -inf where nothing was evicted."""
        gone = self._dropped
        count = gone[:, None, :, None].clamp(min=1)
        counted = gone if self.compensation == "counted" else gone.clamp(max=1)
        return {
            "extra_k": (self._k_sum[:, None] / count).to(q.dtype),
            "extra_v": (self._v_sum[:, None] / count).to(q.dtype),
            "extra_log_count": counted.float().log()[..., None],
        }

    @property
    def kept(self) -> Tensor:
        return torch.minimum(self.cache.lengths, self._local + self.num_sink)

    @property
    def bytes_held(self) -> int:
        sums = self._k_sum.nbytes + self._v_sum.nbytes + self._dropped.nbytes
        return super().bytes_held + (0 if self.compensation == "none" else sums)

    def _drop(self) -> None:
        """Adds the token that is no longer recent to the sums."""
        cache = self.cache
        slot = cache.lengths - 1 - self._local
        leaves = slot >= self.num_sink
        k, v = (x[:, 0] for x in cache.rows(slot.clamp(min=0)[:, None], self._k_sum.dtype))
        self._k_sum = self._k_sum + k.where(leaves[:, None, None], 0)
        self._v_sum = self._v_sum + v.where(leaves[:, None, None], 0)
        self._dropped = self._dropped + leaves[:, None].int()
