"""The base class of policies, and full attention."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from numbers import Integral
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from .._check import (
    as_int,
    as_number,
    check,
    check_bool,
    check_choice,
    check_device_of_q,
    check_dtype,
    check_tensor,
    fail,
    reads_values,
    show,
)
from ..dense.attention import attention
from ..dense.attention_decode import attention_decode
from ..masks import INT32_MAX
from ..select.hip_block_select import HeadReduce
from ..sparse.sparse_decode_attention import sparse_decode_attention
from .cache import FLOAT8, Back, Keys, KVCache, check_reads
from .chunks import Waiting, attend_last, joined, rolled

# Each query head or each KV head has its own list; maps to the head_reduce of the scores.
Lists = Literal["query", "key"]
HEAD_REDUCE: dict[Lists, HeadReduce] = {"query": "none", "key": "group_max"}


class Reading(Protocol):
    """What a step reads: a number of rows, each of `size` bytes, for each request or list."""

    @property
    def size(self) -> int: ...

    def counted(self) -> Tensor: ...


class Rows(NamedTuple):
    """rows[...] rows of a cache, or where they are entries of lists, blocks of `block` rows; at
    most `most`. A step only notes them.
    """

    rows: Tensor
    size: int
    block: int = 1
    most: int = INT32_MAX

    def counted(self) -> Tensor:
        return (self.rows * self.block).clamp(max=min(self.most, INT32_MAX))


@dataclass(eq=False)
class Policy:
    """One layer's attention over a cache, token by token.

    `prefill` (or `begin`) once, then `step` for each token. Both append the given keys and values
    to the cache. A step never synchronises with the device.

    Args:
        cache: the layer's KV cache; empty. None: the policy is a description for
            :func:`tokenmill.integrations.transformers.apply_policy`, and cannot attend.
        layer: the layer's number, from 0, for policies that treat layers differently.
        previous: the policy of the previous layer, for policies that reuse its selection
            (:func:`stack` sets both).
        scale: factor of the products, None = 1/sqrt(D).
        backend: backend of all operators, None = the best available.
        softcap: logits become softcap * tanh(logits / softcap) in the attention; 0: off. The
            selection of keys uses uncapped logits.
        sink: float ``[H]``, a logit of each head that adds to the row sum and has no value; None:
            none.
        reader: the policy whose attention prompts are read with, without a cache: FullAttention,
            HiP, StreamingLLM (a window with sinks) or TokenSelect. It has the layer, scale, softcap
            and sink of this policy. None: the method's own attention, which for most is full.

    Raises:
        RuntimeError: naming argument, rule and value, here and in every method.
    """

    cache: KVCache = None  # type: ignore[assignment]  # methods check it
    layer: int = 0
    previous: Policy | None = field(default=None, repr=False)
    scale: float | None = None
    backend: str | None = None
    softcap: float = 0.0
    sink: Tensor | None = field(default=None, repr=False)
    reader: Policy | None = None

    PAPER: ClassVar[dict[str, Any]] = {}  # the paper's values of fields with other defaults
    _READS: ClassVar[bool] = False  # whether it may be a reader
    # Minimum of integer fields, where it is not 0.
    _LEAST: ClassVar[dict[str, int]] = {}
    _MOST: ClassVar[dict[str, int]] = {}  # maximum, where it is not int32's, the dtype of lengths
    NOT_FLOAT8: ClassVar[str | None] = None  # an operator that reads no cache in float8
    # attributes with one row per request
    _ROWS: ClassVar[tuple[str, ...]] = ("_list", "_counts", "_query")

    def __post_init__(self) -> None:
        self._check_fields()
        self._reads: list[Reading] = []  # of the last step
        self._waiting: Waiting | None = None  # a prompt whose last chunk is still to come
        self._token = 0  # index within a step of several tokens
        self._list: Tensor  # selected keys [B, 1 | Hk, K], and their counts
        self._counts: Tensor
        self._query: Tensor  # query [B, 1, H, D] for which they were selected

    _name: ClassVar[str] = "policies.Policy"

    def __init_subclass__(cls) -> None:
        cls._name = f"policies.{cls.__name__}"

    @classmethod
    def paper(cls: type[AnyPolicy], **options: Any) -> AnyPolicy:
        """A policy with the values of its paper where the defaults differ, because they keep more
        of a text (docs/evaluate.md).

        Example:
            >>> from tokenmill import policies
            >>> policies.SnapKV.paper(budget=512).kernel, policies.SnapKV(budget=512).kernel
            (5, 13)
        """
        return cls(**(cls.PAPER | options))

    def _check_fields(self) -> None:
        """Checks the fields, and converts NumPy numbers to Python's."""
        known = self.cache is None or isinstance(self.cache, KVCache)
        check(known, self._name, "cache", "must be a KVCache or None", self.cache)
        if self.cache is not None:
            check_reads(self._name, "cache", self.cache.k.dtype, self.NOT_FLOAT8)
        known = self.previous is None or isinstance(self.previous, Policy)
        check(known, self._name, "previous", "must be a policy or None", self.previous)
        for entry in fields(self):
            name, value = entry.name, getattr(self, entry.name)
            whole = isinstance(value, Integral) and not isinstance(value, bool)
            if entry.type == "int" or (entry.type == "Share" and whole):
                value = as_int(self._name, name, value)
                minimum = self._LEAST.get(name, 0)
                check(value >= minimum, self._name, name, f"must be at least {minimum}", value)
                maximum = self._MOST.get(name, INT32_MAX)
                check(value <= maximum, self._name, name, f"must be at most {maximum}", value)
            elif entry.type == "Share":
                rule = "must be a number of keys or a share of them, 0 to 1"
                value = as_number(self._name, name, value, rule)
                check(0 <= value <= 1, self._name, name, rule, value)
            elif entry.type == "float" or (entry.type == "float | None" and value is not None):
                value = as_number(self._name, name, value)
            elif entry.type == "Lists":
                check_choice(self._name, name, value, *HEAD_REDUCE)
            elif entry.type == "bool":
                check_bool(self._name, name, value)
            setattr(self, name, value)
        rule = "must be finite and at least 0"
        check(0 <= self.softcap < math.inf, self._name, "softcap", rule, self.softcap)
        check_tensor(self._name, "sink", self.sink, optional=True)
        if self.reader is not None:
            check_reader(self._name, "reader", self.reader)
            if self.cache is not None:
                check_float8_reader(self._name, "cache", self.cache.k.dtype, self.reader)

    @property
    def _scoring(self) -> dict[str, Any]:
        """Arguments common to every attention operator, without those that are None."""
        given = {
            "scale": self.scale, "softcap": self.softcap, "sink": self.sink,
            "backend": self.backend,
        }  # fmt: skip
        return {name: value for name, value in given.items() if value is not None}

    def prefill(
        self, q: Tensor, k: Tensor, v: Tensor, *, lengths: Tensor | None = None, more: bool = False,
        padding: str = "right",
    ) -> Tensor:  # fmt: skip
        """Attention over prompts, or over their next chunks, as `reader` says, then :meth:`begin`.

        A policy that keeps every key accepts further chunks at any time: of a prompt, or of the
        next turn. A policy that evicts makes its selection at the end of a prompt, and must know
        where it is.

        Args:
            q: ``[B, S, H, D]``, prompts padded with any finite values.
            k, v: ``[B, S, Hk, D]`` and ``[B, S, Hk, Dv]``.
            lengths: int32 ``[B]``, number of tokens of each prompt or chunk; None: S. Later rows of
                the result are undefined.
            more: further chunks of these prompts follow. Policies that evict hold the queries, keys
                and values of a prompt until its last chunk; other policies ignore it.
            padding: "right" or "left", the side of the padding.

        Returns:
            ``[B, S, H, Dv]``, padded as q.
        """
        self._check_prompt(q, k)
        check_bool(self._name, "more", more)
        check_choice(self._name, "padding", padding, "right", "left")
        count = self._count(q, k, v, lengths)
        if padding == "right" or lengths is None:
            return self._prefill(q, k, v, lengths, more)
        q, k, v = (rolled(x, count - q.shape[1]) for x in (q, k, v))
        return rolled(self._prefill(q, k, v, lengths, more), q.shape[1] - count)

    def _prefill(
        self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, more: bool
    ) -> Tensor:
        """prefill() of right-padded prompts, by a policy that evicts."""
        rule = "must be True in all chunks of a prompt but the last, as keys are evicted after it"
        check(self.cache.longest == 0, self._name, "more", rule, False)
        if more or self._waiting is not None:
            return self._read_chunk_of_prompt(q, k, v, lengths, more)
        at = torch.arange(q.shape[1], device=q.device)
        turned_q, turned_k = (self._turned(x, at, q.shape[1]) for x in (q, k))
        count = None if lengths is None else self._count(q, k, v, lengths)
        out, lse = self._reader._attend_prompt(turned_q, turned_k, v, count, None)
        self.begin(q, k, v, lse, lengths=lengths)
        return out

    @property
    def _reader(self) -> Policy:
        """The policy whose attention prompts are read with."""
        return self if self.reader is None else self._reading(self.reader)

    def _reading(self, reader: Policy) -> Policy:
        """A reader for this layer."""
        return replace(
            reader, layer=self.layer, scale=self.scale, softcap=self.softcap, sink=self.sink,
            backend=self.backend if reader.backend is None else reader.backend,
        )  # fmt: skip

    def _attend_prompt(
        self, q: Tensor, k: Tensor, v: Tensor, count: Tensor | None, seen: Keys | None
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of tokens of prompts, and its lse [B, H, S] if it is over all keys.

        q, k, v [B, S, ...]: of each request the first count[b] tokens; None: S. seen: the keys up
        to these tokens, theirs included; None: there are none before.
        """
        if seen is None:
            return attention(q, k, v, causal=True, return_lse=True, **self._scoring)
        if count is None:
            return attention_decode(
                q, seen.k, seen.v, seqlens_k=seen.lengths, block_table=seen.block_table,
                return_lse=True, **seen.scales, **self._scoring,
            )  # fmt: skip
        return attend_last(
            q, seen.k, seen.v, seen.lengths, count, block_table=seen.block_table, **seen.scales,
            **self._scoring,
        )  # fmt: skip

    def _turned(self, x: Tensor, at: Tensor, positions: int) -> Tensor:
        """Queries or keys rotated as prompts attend with them, at positions [S] or [B, S]."""
        return x

    def _read_chunk_of_prompt(
        self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, more: bool
    ) -> Tensor:
        count, tokens, capacity = self._count(q, k, v, lengths), q.shape[1], self.cache.capacity
        waiting = self._waiting or Waiting.nothing(q, k, v, count)
        for name, new, old in (("q", q, waiting.q), ("k", k, waiting.k), ("v", v, waiting.v)):
            if new.shape[2:] != old.shape[2:] or new.dtype != old.dtype:
                rule = "must have heads, columns and dtype of the chunks before, "
                fail(self._name, name, f"{rule}{show(old.shape)} of {show(old.dtype)}", new.shape)
        before = waiting.lengths
        total = before + count
        if reads_values(total):
            maximum = max(total.tolist(), default=0)
            check(maximum <= capacity, self._name, "k", f"must fit into {capacity}", maximum)
        width = min(waiting.k.shape[1] + tokens, capacity)
        total = total.clamp(max=width)
        keys, values = (
            joined(old, new, before, width) for old, new in ((waiting.k, k), (waiting.v, v))
        )
        at = torch.arange(width, device=q.device)
        own = before[:, None] + torch.arange(tokens, device=q.device)
        turned_q, turned_k = (
            self._turned(x, own.clamp(max=max(width - 1, 0)), width) for x in (q, k)
        )
        seen = None
        if self._waiting is not None:
            turned = self._turned(keys, at, width)
            seen = Keys(turned, values, total, waiting.k.shape[1] + tokens)
        out, lse = self._reader._attend_prompt(turned_q, turned_k, v, count, seen)
        queries = joined(waiting.q, q, before, width)
        if lse is not None and waiting.lse is not None:
            lse = joined(waiting.lse, lse.transpose(1, 2), before, width)
        self._waiting = Waiting(queries, keys, values, lse, total)
        if not more:
            self._waiting = None
            lse = None if lse is None else lse.transpose(1, 2).contiguous()
            self.begin(queries, keys, values, lse, lengths=total)
        return out

    def _count(self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None) -> Tensor:
        """int32 [B]: number of tokens of each request."""
        check_tensor(self._name, "v", v)
        check(v.dim() == 4, self._name, "v", "must have 4 dimensions [B, S, H, D]", v.dim())
        rule = f"must have the tokens of q, {q.shape[1]}"
        check(v.shape[1] == q.shape[1], self._name, "v", rule, v.shape)
        batch = len(self.cache.lengths)
        rule = f"must have the requests of the cache, {batch}"
        for name, t in (("q", q), ("k", k), ("v", v)):
            check(t.shape[0] == batch, self._name, name, rule, t.shape)
            check_device_of_q(self._name, name, t, q)
        return self.cache.count(q.shape[1], lengths)

    def begin(
        self, q: Tensor, k: Tensor, v: Tensor, lse: Tensor | None, *, lengths: Tensor | None = None
    ) -> None:
        """Stores prompts in the cache and selects the keys to keep: `prefill` for prompts whose
        attention was computed elsewhere. lse ``[B, H, S]``: of full attention; None: policies whose
        scores need it compute it, without a sink.
        """
        self._store(q, k, v, lengths)
        self._begin(q, k, lse)

    def _store(self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None) -> None:
        self._check_prompt(q, k)
        self.cache.fill(k, v, lengths)

    def _begin(self, q: Tensor, k: Tensor, lse: Tensor | None) -> None:
        """begin() of prompts that are in the cache."""

    def _for_scores(self, lse: Tensor | None) -> Tensor | None:
        """The lse that normalises column scores, whose logits are not capped."""
        return lse if self.softcap == 0 else None

    def _check_prompt(self, q: Tensor, k: Tensor) -> None:
        if self.cache is None:
            fail(self._name, "cache", "must be given to a policy that attends", self.cache)
        for name, t in (("q", q), ("k", k)):
            check_tensor(self._name, name, t)
            check(t.dim() == 4, self._name, name, "must have 4 dimensions [B, S, H, D]", t.dim())
            check_dtype(self._name, name, t, float64=True)
        check_device_of_q(self._name, "k", k, q)
        asked, there = q.shape, k.shape
        if there[1] != asked[1]:
            fail(self._name, "k", f"must have the tokens of q, {asked[1]}", there)
        if there[3] != asked[3]:
            fail(self._name, "k", f"must have the head dimension of q, {asked[3]}", there[3])

    def step(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of the new tokens of each request: one, or several with known keys, such as a
        draft. The result equals one step per token.

        Args:
            q: ``[B, n, H, D]``.
            k, v: ``[B, n, Hk, D]`` and ``[B, n, Hk, Dv]``.

        Returns:
            ``[B, n, H, Dv]``.
        """
        self._check_prompt(q, k)
        tokens = q.shape[1]
        check(tokens >= 1, self._name, "q", "must have at least 1 token", tokens)
        rule = "must be False in the last chunk of a prompt, before a step"
        check(self._waiting is None, self._name, "more", rule, True)
        self._token = 0
        if tokens == 1 or self._at_once:
            return self._step(q, k, v)
        self._check_step(k, v)
        self._count(q, k, v, None)
        outs, reads = [], []
        for self._token in range(tokens):
            outs.append(self._step(*(x[:, self._token : self._token + 1] for x in (q, k, v))))
            reads += self._reads
        self._reads = reads
        return torch.cat(outs, 1)

    def _check_step(self, k: Tensor, v: Tensor) -> None:
        """Raises unless the cache has room for the tokens of a step."""

    @property
    def _at_once(self) -> bool:
        """Whether _step accepts several tokens."""
        return False

    def _step(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """step() for one token."""
        raise NotImplementedError

    def rewind(self, tokens: Back) -> None:
        """Removes the last tokens of each request, such as rejected drafts.

        Args:
            tokens: a number, a sequence with one number per request, or int32 ``[B]``. With a
                tensor on a GPU the host does not learn how much room is freed.

        Raises:
            RuntimeError: for policies that evict, because evicted keys cannot be restored.
        """
        fail(self._name, "tokens", "cannot be taken back from a policy that evicts", tokens)

    def grow(self, slots: int) -> None:
        """Grows a dense cache to a capacity in tokens per request."""
        self.cache.grow(slots)

    def reorder(self, requests: Tensor) -> None:
        """Request i becomes the former requests[i], as in beam search.

        Args:
            requests: int64 ``[B']``; a request may occur several times, or never.
        """
        self.cache.reorder(requests)
        for name in self._ROWS:
            if name in vars(self):
                setattr(self, name, getattr(self, name).index_select(0, requests))
        if self._waiting is not None:
            self._waiting = self._waiting.reordered(requests)

    def slots(self, tokens: int) -> int | None:
        """Number of slots that a cache needs for a prompt of the given length and any number of
        steps; None: one per token.
        """
        return None

    def reset(self) -> None:
        """Clears all state: the next prompt is the first."""
        self.cache.clear()
        self._waiting, self._reads = None, []

    def cache_heads(self, heads: int, layer: int) -> int:
        """Number of a layer's KV heads that the cache holds."""
        return heads

    @property
    def kept(self) -> Tensor:
        """Number of keys of each request that later steps may attend to: int32 ``[B]`` or ``[B,
        Hk]``.
        """
        return self.cache.lengths

    @property
    def bytes_held(self) -> int:
        """Bytes of the keys and values in the cache, over all requests. Synchronises with the
        device.
        """
        return int(self.cache.lengths.sum()) * self.cache.token_bytes

    @property
    def bytes_read(self) -> int:
        """Bytes of cache (and of pooled keys and the like) that the last step had to read, each
        counted once for all query heads that share it. Synchronises with the device.
        """
        return sum(int(read.counted().sum()) * read.size for read in self._reads)

    def _append(self, k: Tensor, v: Tensor) -> None:
        self.cache.extend(k, v)
        self._reads = []

    def _attend_all(self, q: Tensor) -> Tensor:
        """Attends to the whole cache."""
        cache = self.cache
        self._reads.append(Rows(cache.lengths, cache.token_bytes))
        return attention_decode(
            q, cache.k, cache.v, seqlens_k=cache.lengths, block_table=cache.block_table,
            **cache.scales, **self._scoring,
        )  # fmt: skip

    def _attend(
        self, q: Tensor, indices: Tensor, counts: Tensor, **options: Any
    ) -> tuple[Any, ...]:
        """Attends to the keys of lists ``[B, 1 | Hk | H, K]``, and to sink and recent keys."""
        cache = self.cache
        # number of KV heads; 1 for a list shared by all heads
        shared = 1 if counts.shape[1] == 1 else max(cache.k.shape[2], 1)
        always = options.get("num_sink", 0) + options.get("num_recent", 0)
        self._reads.append(Rows(cache.lengths, cache.token_bytes, most=always))
        self._reads.append(Rows(counts, cache.token_bytes // shared, options.get("block_k", 1)))
        return sparse_decode_attention(
            q, cache.k, cache.v, indices, counts, seqlens_k=cache.lengths,
            block_table=cache.block_table, **cache.scales, **self._scoring, **options,
        )  # fmt: skip


AnyPolicy = TypeVar("AnyPolicy", bound=Policy)


def stack(method: type[AnyPolicy], caches: Sequence[KVCache], **options: Any) -> list[AnyPolicy]:
    """Creates a policy for each layer of a model, with its layer number and the previous policy.

    Args:
        method: the class of the policies.
        caches: one for each layer.
        options: fields of the policies, the same for all layers.

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
    """A policy whose cache keeps every key, so that a chunk of tokens can see all earlier
    tokens.
    """

    def _prefill(
        self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, more: bool
    ) -> Tensor:
        if self.cache.longest > 0:
            return self.extend(q, k, v, lengths=lengths)
        return self._first(q, k, v, lengths)

    def _first(self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None) -> Tensor:
        """prefill() into an empty cache."""
        return super()._prefill(q, k, v, lengths, False)

    def extend(self, q: Tensor, k: Tensor, v: Tensor, *, lengths: Tensor | None = None) -> Tensor:
        """Attention of several new tokens of each request: the next chunk of prompts.

        Args:
            q: ``[B, n, H, D]``, the next tokens of each request.
            k, v: ``[B, n, Hk, D]`` and ``[B, n, Hk, Dv]``.
            lengths: int32 ``[B]``, number of tokens of each chunk, the first of q; None: n. Later
                rows of the result are undefined.

        Returns:
            ``[B, n, H, Dv]``: attention of each token to tokens up to it, as in `prefill`.
        """
        self._check_prompt(q, k)
        self.cache.extend(k, v, lengths)
        return self._attend_chunk(q, k, v, lengths)

    def _attend_chunk(self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None) -> Tensor:
        """extend() of tokens that are in the cache."""
        cache = self.cache
        count = None if lengths is None else self._count(q, k, v, lengths)
        out, lse = self._reader._attend_prompt(q, k, v, count, cache)
        self._reads = [] if lse is None else [Rows(cache.lengths, cache.token_bytes)]
        return out

    def _check_step(self, k: Tensor, v: Tensor) -> None:
        self.cache.check_room(k, v)

    def rewind(self, tokens: Back) -> None:
        self.cache.rewind(tokens)


class FullAttention(Keeping):
    """Attends to all keys: the baseline that the other policies approximate."""

    _READS: ClassVar[bool] = True

    @property
    def _at_once(self) -> bool:
        return True

    def _step(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self._append(k, v)
        return self._attend_all(q)


def check_reader(name: str, argument: str, reader: Any) -> None:
    """Checks for a policy that can read the prompts of another."""
    rule = "must be FullAttention, HiP, StreamingLLM or TokenSelect, as only these read prompts"
    check(isinstance(reader, Policy), name, argument, rule, reader)
    check(reader._READS, name, argument, rule, type(reader).__name__)
    for of_policy in ("cache", "layer", "previous", "scale", "softcap", "sink", "reader"):
        value = getattr(reader, of_policy)
        number = isinstance(value, int | float)
        rule = f"must leave {of_policy} to the policy that it reads for"
        shown = value if number else type(value).__name__
        check(value is None or (number and value == 0), name, argument, rule, shown)
    rule = "must have no rope, as it is given keys as they are attended to"
    rope = getattr(reader, "rope", None)
    check(rope is None, name, argument, rule, type(rope).__name__)


def check_float8_reader(
    name: str, argument: str, dtype: torch.dtype | None, reader: Policy | None
) -> None:
    """Raises for a cache in float8, if its reader cannot attend to what is in it."""
    if reader is None or dtype != FLOAT8:
        return
    rule = "must be in the dtype of the model with a reader that is not FullAttention or "
    known = type(reader).__name__ in ("FullAttention", "TokenSelect")
    check(known, name, argument, f"{rule}TokenSelect, here {type(reader).__name__}", dtype)


def rows_of(x: Tensor, heads: int) -> Tensor:
    """[B] -> [B * heads], for an operator that takes one row per head."""
    return x[:, None].expand(-1, heads).reshape(-1).contiguous()


def span(start: Tensor, width: int) -> Tensor:
    """int32 [B, width]: start[b], start[b] + 1, ..."""
    return start[:, None] + torch.arange(width, dtype=torch.int32, device=start.device)
