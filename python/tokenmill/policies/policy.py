"""What all policies share, and full attention as the first of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from numbers import Integral
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor

from .._check import (
    as_int,
    as_number,
    check,
    check_bool,
    check_device_of_q,
    check_tensor,
    check_text,
)
from ..dense.attention import attention
from ..dense.attention_decode import attention_decode
from ..masks import INT32_MAX
from ..select.hip_block_select import HeadReduce
from ..sparse.sparse_decode_attention import sparse_decode_attention
from .cache import KVCache

# Each query head or each key head has a list of its own: the head_reduce of the scores for each.
Lists = Literal["query", "key"]
HEAD_REDUCE: dict[Lists, HeadReduce] = {"query": "none", "key": "group_max"}


@dataclass(eq=False)
class Policy:
    """One layer's attention over a cache, token by token.

    `prefill` (or `begin`) once, then `step` for each token. Both put the keys and values that they
    are given into the cache. Nothing in a step waits for the device.

    Args:
        cache: where the layer's keys and values go; empty.
        layer: the layer's number, from 0, for policies that treat layers differently.
        previous: the policy of the layer before, for those that pass a selection on
            (:func:`stack` sets both).
        scale: factor of the products, None = 1/sqrt(D).
        backend: of all operators, None = the best available.

    Raises:
        RuntimeError: naming argument, rule and value, here and in every method.
    """

    cache: KVCache
    layer: int = 0
    previous: Policy | None = field(default=None, repr=False)
    scale: float | None = None
    backend: str | None = None

    # The least that a whole number may be, where that is not 0.
    _LEAST: ClassVar[dict[str, int]] = {}  # of whole numbers, if not 0
    _MOST: ClassVar[dict[str, int]] = {}  # if not the largest int32, as lengths are

    def __post_init__(self) -> None:
        self._check_fields()
        self._reads: list[tuple[Tensor, int]] = []  # rows, and bytes of one
        self._list: Tensor  # selected keys [B, 1 | Hk, K], and how many
        self._counts: Tensor
        self._query: Tensor  # for which they were selected [B, 1, H, D]

    @property
    def _name(self) -> str:
        return f"policies.{type(self).__name__}"

    def _check_fields(self) -> None:
        """Numbers of NumPy become those of Python."""
        check(isinstance(self.cache, KVCache), self._name, "cache", "must be a KVCache", self.cache)
        known = self.previous is None or isinstance(self.previous, Policy)
        check(known, self._name, "previous", "must be a policy or None", self.previous)
        for entry in fields(self):
            name, value = entry.name, getattr(self, entry.name)
            whole = isinstance(value, Integral) and not isinstance(value, bool)
            if entry.type == "int" or (entry.type == "Share" and whole):
                value = as_int(self._name, name, value)
                least = self._LEAST.get(name, 0)
                check(value >= least, self._name, name, f"must be at least {least}", value)
                most = self._MOST.get(name, INT32_MAX)
                check(value <= most, self._name, name, f"must be at most {most}", value)
            elif entry.type == "Share":
                rule = "must be a number of keys or a share of them, 0 to 1"
                value = as_number(self._name, name, value, rule)
                check(0 <= value <= 1, self._name, name, rule, value)
            elif entry.type == "float" or (entry.type == "float | None" and value is not None):
                value = as_number(self._name, name, value)
            elif entry.type == "Lists":
                check_text(self._name, name, value)
                check(value in HEAD_REDUCE, self._name, name, "must be 'query' or 'key'", value)
            elif entry.type == "bool":
                check_bool(self._name, name, value)
            setattr(self, name, value)

    def prefill(self, q: Tensor, k: Tensor, v: Tensor, *, lengths: Tensor | None = None) -> Tensor:
        """Causal attention over prompts, then :meth:`begin`.

        Args:
            q: ``[B, S, H, D]``, prompts padded on the right with anything finite.
            k, v: ``[B, S, Hk, D]`` and ``[B, S, Hk, Dv]``.
            lengths: int32 ``[B]``, tokens of each prompt; None: S. Rows of the result beyond
                them mean nothing.

        Returns:
            ``[B, S, H, Dv]``.
        """
        out, lse = attention(
            q, k, v, scale=self.scale, causal=True, return_lse=True, backend=self.backend
        )
        self.begin(q, k, v, lse, lengths=lengths)
        return out

    def begin(
        self, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, *, lengths: Tensor | None = None
    ) -> None:
        """Puts prompts into the cache and selects what to keep: `prefill` for prompts whose
        attention was computed elsewhere, with its lse ``[B, H, S]``."""
        self._check_prompt(q, k)
        self.cache.fill(k, v, lengths)

    def _check_prompt(self, q: Tensor, k: Tensor) -> None:
        for name, t in (("q", q), ("k", k)):
            check_tensor(self._name, name, t)
            check(t.dim() == 4, self._name, name, "must have 4 dimensions [B, S, H, D]", t.dim())
        check_device_of_q(self._name, "k", k, q)
        rule = f"must have the tokens of q, {q.shape[1]}"
        check(k.shape[1] == q.shape[1], self._name, "k", rule, k.shape)
        rule = f"must have the head dimension of q, {q.shape[3]}"
        check(k.shape[3] == q.shape[3], self._name, "k", rule, k.shape[3])

    def step(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of one new token of each request.

        Args:
            q: ``[B, 1, H, D]``.
            k, v: ``[B, 1, Hk, D]`` and ``[B, 1, Hk, Dv]``.

        Returns:
            ``[B, 1, H, Dv]``.
        """
        raise NotImplementedError

    @property
    def kept(self) -> Tensor:
        """Keys of each request that later steps may attend to: int32 ``[B]`` or ``[B, Hk]``."""
        return self.cache.lengths

    @property
    def bytes_read(self) -> int:
        """Bytes of cache (and of what stands for keys) that the last step had to read, each once
        for all query heads that share them. Waits for the device."""
        return sum(int(rows.sum()) * size for rows, size in self._reads)

    def _append(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        check_tensor(self._name, "q", q)
        one = q.dim() == 4 and q.shape[1] == 1
        check(one, self._name, "q", "must have shape [B, 1, H, D]", q.shape)
        self.cache.append(k, v)
        self._reads = []

    def _attend_all(self, q: Tensor) -> Tensor:
        """Attends to the whole cache."""
        cache = self.cache
        self._reads.append((cache.lengths, cache.token_bytes))
        return attention_decode(
            q, cache.k, cache.v, seqlens_k=cache.lengths, block_table=cache.block_table,
            scale=self.scale, backend=self.backend,
        )  # fmt: skip

    def _attend(
        self, q: Tensor, indices: Tensor, counts: Tensor, **options: Any
    ) -> tuple[Any, ...]:
        """Attends to the keys of lists ``[B, 1 | Hk | H, K]``, and to sink and recent ones."""
        cache = self.cache
        shared = 1 if counts.shape[1] == 1 else cache.k.shape[2]  # key heads beside a list's own
        always = options.get("num_sink", 0) + options.get("num_recent", 0)
        listed = counts * options.get("block_k", 1)
        self._reads.append(
            (cache.lengths.clamp(max=min(always, cache.capacity)), cache.token_bytes)
        )
        self._reads.append((listed, cache.token_bytes // max(shared, 1)))
        return sparse_decode_attention(
            q, cache.k, cache.v, indices, counts, seqlens_k=cache.lengths,
            block_table=cache.block_table, scale=self.scale, backend=self.backend, **options,
        )  # fmt: skip


AnyPolicy = TypeVar("AnyPolicy", bound=Policy)


def stack(method: type[AnyPolicy], caches: Sequence[KVCache], **options: Any) -> list[AnyPolicy]:
    """Makes a policy for each layer of a model; each knows its number and the policy before.

    Args:
        method: the class of the policies.
        caches: one for each layer.
        options: fields of the policies, the same in all layers.

    Example:
        >>> import torch, tokenmill as tm
        >>> from tokenmill import policies
        >>> k = v = torch.zeros(1, 64, 2, 16)
        >>> layers = policies.stack(
        ...     policies.TidalDecode, [policies.KVCache(k.clone(), v.clone()) for _ in range(4)],
        ...     budget=8)
        >>> prompt = torch.randn(1, 32, 2, 16)
        >>> for layer in layers:
        ...     _ = layer.prefill(prompt, prompt, prompt)
        ...     out = layer.step(*torch.randn(3, 1, 1, 2, 16))
        >>> [layer.bytes_read for layer in layers]
        [8448, 8448, 12672, 2304]
    """
    layers: list[AnyPolicy] = []
    for layer, cache in enumerate(caches):
        previous = layers[-1] if layers else None
        layers.append(method(cache, layer=layer, previous=previous, **options))
    return layers


class Keeping(Policy):
    """A policy whose cache keeps every key, so that a chunk of tokens can see all before it."""

    def extend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of several new tokens of each request: the next chunk of prompts that are read
        in chunks.

        Args:
            q: ``[B, n, H, D]``, the last n tokens of each request.
            k, v: ``[B, n, Hk, D]`` and ``[B, n, Hk, Dv]``.

        Returns:
            ``[B, n, H, Dv]``: causal attention, each token over all before it.
        """
        self._check_prompt(q, k)
        self.cache.extend(k, v)
        self._reads = []
        return self._attend_all(q)


class FullAttention(Keeping):
    """Attends to all keys: what the other policies approximate."""

    def step(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self._append(q, k, v)
        return self._attend_all(q)


def rows_of(x: Tensor, heads: int) -> Tensor:
    """[B] -> [B * heads], for an operator that takes a row for each head."""
    return x[:, None].expand(-1, heads).reshape(-1).contiguous()


def span(start: Tensor, width: int) -> Tensor:
    """int32 [B, width]: start[b], start[b] + 1, ..."""
    return start[:, None] + torch.arange(width, dtype=torch.int32, device=start.device)
