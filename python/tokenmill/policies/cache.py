"""The KV cache that a policy attends to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._call.rules import check_written
from .._check import (
    as_int,
    check,
    check_device_of,
    check_dtype,
    check_dtype_of,
    check_tensor,
    fail,
    reads_values,
    show,
    synchronising_checks,
)
from .._kv_cache import capacity, check_cache_scale, check_int32
from ..masks import INT32_MAX
from ..select.kv_cache_append import kv_cache_append
from ..select.kv_cache_compact import kv_cache_compact

NAME = "policies.KVCache"
FLOAT8 = torch.float8_e4m3fn
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
Back = int | Sequence[int] | Tensor  # number of tokens to take back, per request


class Keys:
    """Keys and values of a batch of requests, dense or paged, which are only read.

    Args:
        k, v, block_table, k_scale, v_scale: as in :class:`KVCache`.
        lengths: int32 ``[B]``, number of keys of each request.
        longest: upper bound on them.
    """

    def __init__(
        self,
        k: Tensor,
        v: Tensor,
        lengths: Tensor,
        longest: int,
        block_table: Tensor | None = None,
        *,
        k_scale: Tensor | None = None,
        v_scale: Tensor | None = None,
    ):
        self.k, self.v, self.block_table = k, v, block_table
        self.k_scale, self.v_scale = k_scale, v_scale
        self.requests = torch.arange(len(lengths), device=k.device)
        self.lengths, self.longest = lengths, longest

    @property
    def scales(self) -> dict[str, Any]:
        """Arguments of the operators that attend to the cache."""
        return {"k_scale": self.k_scale, "v_scale": self.v_scale}

    def rows(self, at: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values at positions ``[B, n]`` of each request: ``[B, n, Hk, D]``. Arbitrary
        where a page does not exist.
        """
        k, v = (
            self._read(self.k, self.k_scale, at, dtype),
            self._read(self.v, self.v_scale, at, dtype),
        )
        return k, v

    def _read(self, t: Tensor, scale: Tensor | None, at: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows [B, n, Hk, D] of k or v at positions [B, n]."""
        page, row = self._places(at.long())
        page = page.clamp(0, max(t.shape[0] - 1, 0))
        codes = t.view(torch.uint8)[page, row].view(FLOAT8) if t.dtype == FLOAT8 else t[page, row]
        if scale is not None and _of_tokens(scale):
            scale = scale[page, row]
        return _decoded(codes, scale, dtype)

    def _places(self, at: Tensor) -> tuple[Tensor, Tensor]:
        """Page (request, if dense) and row of positions [B, n]."""
        if self.block_table is None:
            return self.requests[:, None].expand_as(at), at
        size = self.k.shape[1]
        page = (at // size).clamp(max=self.block_table.shape[1] - 1)
        return self.block_table.long().gather(1, page), at % size


class KVCache(Keys):
    r"""The KV cache of one layer for a batch of requests, dense or paged.

    Lengths live on the device; an upper bound on them is known on the host, so that nothing here
    synchronises with the device.

    A cache in float8_e4m3fn is given tokens in the dtype of the model and rounds them once, as
    :func:`kv_cache_append` does; operators read it as it is. Its policies attend to a prompt that
    comes whole with its own keys and values, and to everything before a chunk or a step as it is in
    the cache.

    Args:
        k, v: ``[B, S, Hk, D]`` and ``[B, S, Hk, Dv]``, or with block_table pages ``[P, page size,
            Hk, ...]`` that no two requests share. Written in place, so no two elements may share
            memory; of the same dtype, floating-point or float8_e4m3fn (then with even D, Dv and
            strides). No gradient flows through them.
        block_table: int32 ``[B, pages]``, the pages of each request in order. Pages that tokens are
            written to must exist; a GPU only checks this with TOKENMILL_CHECK=1.
        k_scale, v_scale: of a cache in float8_e4m3fn, float32: ``[1]`` or ``[Hk]``, read; or both
            ``[B, S, Hk]`` (``[P, page size, Hk]``), a scale of each token, written with it. None:
            1, which keeps 4 significant bits of what lies between 1/64 and 448.

    Raises:
        RuntimeError: naming argument, rule and value, here and in every method.

    Example:
        >>> import torch, tokenmill as tm
        >>> cache = tm.policies.KVCache(torch.zeros(2, 8, 1, 4), torch.zeros(2, 8, 1, 4))
        >>> k = torch.randn(2, 5, 1, 4)
        >>> cache.fill(k, k, torch.tensor([5, 3], dtype=torch.int32))
        >>> cache.append(k[:, :1], k[:, :1])
        >>> cache.lengths.tolist(), cache.longest
        ([6, 4], 6)
        >>> narrow = tm.policies.KVCache.like(k, k, 8, dtype=torch.float8_e4m3fn)
        >>> narrow.token_bytes, cache.token_bytes
        (8, 32)
    """

    def __init__(
        self,
        k: Tensor,
        v: Tensor,
        block_table: Tensor | None = None,
        *,
        k_scale: Tensor | None = None,
        v_scale: Tensor | None = None,
    ):
        for name, t in (("k", k), ("v", v)):
            check_tensor(NAME, name, t)
            rule = "must have 4 dimensions [B, S, Hk, D] (in pages: [P, page size, Hk, D])"
            check(t.dim() == 4, NAME, name, rule, t.dim())
            rule = "must not require a gradient, as tokens are written into it"
            check(not t.requires_grad, NAME, name, rule, t.requires_grad)
        rule = "must be float16, bfloat16, float32 or float8_e4m3fn"
        check(k.dtype in (*FLOATS, FLOAT8), NAME, "k", rule, k.dtype)
        check_dtype_of(NAME, "v", v, "the cache", k)
        _check_like("v", v, k, k.shape[:3], "that of k up to the head dimension")
        check_written(NAME, "k", k, {"v": v})
        check_written(NAME, "v", v, {})
        check_tensor(NAME, "block_table", block_table, optional=True)
        if block_table is not None:
            check_int32(NAME, "block_table", block_table)
            check_device_of(NAME, "block_table", block_table, "the cache", k)
            check(block_table.dim() == 2, NAME, "block_table", "must have shape [B, pages]",
                  block_table.shape)  # fmt: skip
        for name, t in (("k", k), ("v", v)):
            _check_pairs(name, t)
        for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
            check_tensor(NAME, name, scale, optional=True)
            check_cache_scale(NAME, name, scale, "k", k, torch.float32)
        if _of_tokens(k_scale) != _of_tokens(v_scale):
            rule = "must have a scale of each token, as v_scale, or neither"
            fail(NAME, "k_scale", rule, None if k_scale is None else k_scale.shape)
        batch = k.shape[0] if block_table is None else block_table.shape[0]
        lengths = torch.zeros(batch, dtype=torch.int32, device=k.device)
        super().__init__(k, v, lengths, 0, block_table, k_scale=k_scale, v_scale=v_scale)
        self._number(batch)
        self.key_bytes = _row_bytes(k, k_scale)
        self.token_bytes = self.key_bytes + _row_bytes(v, v_scale)
        # An addition of a number instead of a tensor takes 2.5 us instead of 1.
        self.one = torch.ones((), dtype=torch.int32, device=k.device)

    @classmethod
    def like(
        cls,
        k: Tensor,
        v: Tensor,
        capacity: int,
        *,
        dtype: torch.dtype | None = None,
        k_scale: Tensor | None = None,
        v_scale: Tensor | None = None,
    ) -> KVCache:
        """An empty dense cache of the given capacity for keys and values like k and v; dtype None:
        theirs.
        """
        caches = (t.new_empty(t.shape[0], capacity, *t.shape[2:], dtype=dtype) for t in (k, v))
        return cls(*caches, k_scale=k_scale, v_scale=v_scale)

    @property
    def capacity(self) -> int:
        return capacity(self.k, self.block_table)

    def fill(self, k: Tensor, v: Tensor, lengths: Tensor | None = None) -> None:
        """Fills the cache with the first lengths[b] tokens of k ``[B, S, Hk, D]`` and v; None:
        all.
        """
        self._check_tokens(k, v)
        tokens = k.shape[1]
        own = self.count(tokens, lengths)
        check(tokens <= self.capacity, NAME, "k", f"must fit into {self.capacity}", tokens)
        self.lengths, self.longest = own, tokens
        if self.block_table is None and self.k.dtype != FLOAT8:
            self.k[:, :tokens], self.v[:, :tokens] = k.detach(), v.detach()
            return
        there = torch.arange(tokens, device=k.device) < self.lengths[:, None]
        self._write(self._slots(torch.zeros_like(self.lengths), tokens, there), k, v)

    def append(self, k: Tensor, v: Tensor) -> None:
        """Appends a token to each request: k ``[B, 1, Hk, D]``, v ``[B, 1, Hk, Dv]``."""
        self._check_tokens(k, v)
        check(k.shape[1] == 1, NAME, "k", "must have 1 token", k.shape[1])
        self.extend(k, v)

    def extend(self, k: Tensor, v: Tensor, lengths: Tensor | None = None) -> None:
        """Appends the first lengths[b] tokens of k ``[B, n, Hk, D]`` and v to each request; None:
        all. `longest` grows by n."""
        self.check_room(k, v)
        tokens, there = k.shape[1], None
        added = self.one if tokens == 1 else tokens
        if lengths is not None:
            added = self.count(tokens, lengths)
            if self.block_table is not None:  # dense: rows past the length are free
                there = torch.arange(tokens, device=k.device) < added[:, None]
        self._write(self._slots(self.lengths, tokens, there), k, v)
        self.lengths = self.lengths + added
        self.longest += tokens

    def check_room(self, k: Tensor, v: Tensor) -> None:
        """Raises unless k ``[B, n, Hk, D]`` and v can be appended."""
        self._check_tokens(k, v)
        longest = self.longest + k.shape[1]
        if longest > self.capacity:
            fail(NAME, "k", f"must fit into {self.capacity}", longest)

    def rewind(self, tokens: Back) -> None:
        """Removes the last tokens of each request: a number, a sequence with one number per
        request, or int32 ``[B]``. With a tensor on a GPU the host does not learn the numbers:
        `longest` is unchanged.
        """
        batch = self.lengths.shape[0]
        minimum = 0
        if isinstance(tokens, Tensor):
            back = self._checked_lengths(tokens, "tokens").clamp(min=0)
        else:
            given = [*tokens] if isinstance(tokens, tuple | list) else [tokens] * batch
            numbers = [as_int(NAME, "tokens", n) for n in given]
            rule = f"must be a number or one for each request, {batch}"
            check(len(numbers) == batch, NAME, "tokens", rule, len(numbers))
            wrong = [n for n in numbers if not 0 <= n <= self.longest]
            check(not wrong, NAME, "tokens", f"must be 0 to {self.longest}", wrong and wrong[0])
            minimum = min(numbers, default=0)
            back = torch.tensor(numbers, dtype=torch.int32, device=self.k.device)
        self.lengths = (self.lengths - back).clamp(min=0)
        self.longest -= minimum
        if reads_values(self.lengths):
            self.longest = max(self.lengths.tolist(), default=0)

    def grow(self, slots: int) -> None:
        """Grows a dense cache to a capacity in tokens per request: k and v are reallocated."""
        rule = "cannot grow in pages: give the block table more columns"
        check(self.block_table is None, NAME, "slots", rule, slots)
        more = slots - self.capacity
        if more > 0:
            self._replace_rows(
                lambda t: torch.cat([t, t.new_zeros(t.shape[0], more, *t.shape[2:])], 1)
            )
            self._number(len(self.requests))

    def reorder(self, requests: Tensor) -> None:
        """Request i becomes the former requests[i] of a dense cache: int64 ``[B']``; requests may
        repeat.
        """
        rule = "cannot be reordered in pages: reorder the block table"
        check(self.block_table is None, NAME, "requests", rule, requests.shape)
        self._replace_rows(lambda t: t.index_select(0, requests))
        self.lengths = self.lengths.index_select(0, requests)
        self._number(len(requests))

    def count(self, tokens: int, lengths: Tensor | None) -> Tensor:
        """int32 ``[B]``: number of valid tokens, out of `tokens`, of each request."""
        if lengths is None:
            return torch.full_like(self.lengths, tokens)
        return self._checked_lengths(lengths, "lengths").clamp(0, tokens)

    def clear(self) -> None:
        """Removes all tokens."""
        self.lengths, self.longest = torch.zeros_like(self.lengths), 0

    def replace(self, k: Tensor, v: Tensor) -> None:
        """Overwrites the last n tokens of each request: k ``[B, n, Hk, D]``. A GPU only checks with
        TOKENMILL_CHECK=1 that a request has n tokens.
        """
        self._check_tokens(k, v)
        tokens = k.shape[1]
        minimum = self.longest
        if self.k.device.type == "cpu" or synchronising_checks():
            minimum = int(self.lengths.min()) if len(self.lengths) else 0
        rule = f"must have no more tokens than each request, {minimum}"
        check(tokens <= minimum, NAME, "k", rule, tokens)
        first = (self.lengths - tokens).clamp(min=0)
        self._write(self._slots(first, tokens), k, v)

    def keys(self, dtype: torch.dtype, tokens: int) -> Tensor:
        """The first tokens' keys as ``[B, tokens, Hk, D]``; a copy if paged or in float8."""
        if self.block_table is None:
            scale = self.k_scale
            if scale is not None and _of_tokens(scale):
                scale = scale[:, :tokens]
            return _decoded(self.k[:, :tokens], scale, dtype)
        at = torch.arange(tokens, device=self.k.device)
        return self._read(self.k, self.k_scale, at.expand(len(self.lengths), -1), dtype)

    def compact(self, keep: Tensor, counts: Tensor, backend: str | None) -> None:
        """Keeps the slots of lists ``[B, K]`` or ``[B, Hk, K]``; see kv_cache_compact."""
        # Two float8 numbers move as one of 16 bits, a scale as a row of one column.
        moved = [(_pairs(self.k), _pairs(self.v))]
        if self.k_scale is not None and self.v_scale is not None and _of_tokens(self.k_scale):
            moved.append((self.k_scale[..., None], self.v_scale[..., None]))
        for k, v in moved:
            if self.block_table is not None and keep.dim() == 3:
                self._compact_heads(k, v, keep, counts)
            else:
                kv_cache_compact(
                    k, v, keep, counts, seqlens_k=self.lengths, block_table=self.block_table,
                    backend=backend,
                )  # fmt: skip
        self.lengths = counts if counts.dim() == 1 else counts[:, 0]
        self.longest = min(self.longest, keep.shape[-1])

    def _compact_heads(self, k: Tensor, v: Tensor, keep: Tensor, counts: Tensor) -> None:
        """Moves entry i of each head's list to slot i of k and v."""
        place = torch.arange(keep.shape[2], device=keep.device)
        for head in range(keep.shape[1]):
            page, row = self._places(keep[:, head].long().clamp(min=0))
            page = page.clamp(0, max(k.shape[0] - 1, 0))
            one = slice(head, head + 1)
            own_k, own_v = k[:, :, one], v[:, :, one]
            there = place < counts[:, head, None]
            slots = self._slots(torch.zeros_like(self.lengths), keep.shape[2], there)
            _append(own_k, own_v, slots, own_k[page, row], own_v[page, row])

    def _replace_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replaces keys, values and the scales of tokens; float8 as bytes, which torch moves on
        every device.
        """
        for name in ("k", "v", "k_scale", "v_scale"):
            t = getattr(self, name)
            if t is not None and t.dim() > 1:
                moved = change(t.view(torch.uint8) if t.dtype == FLOAT8 else t)
                setattr(self, name, moved.view(t.dtype))

    def _checked_lengths(self, lengths: Tensor, name: str) -> Tensor:
        check_tensor(NAME, name, lengths, optional=name == "lengths")
        check_int32(NAME, name, lengths)
        check_device_of(NAME, name, lengths, "the cache", self.k)
        if lengths.shape != self.lengths.shape:
            fail(NAME, name, f"must have shape {show(self.lengths.shape)}", lengths.shape)
        return lengths

    def _check_tokens(self, k: Tensor, v: Tensor) -> None:
        for name, t, like in (("k", k, self.k), ("v", v, self.v)):
            check_tensor(NAME, name, t)
            check(t.dim() == 4, NAME, name, "must have 4 dimensions [B, S, Hk, D]", t.dim())
            shape = (self.requests.shape[0], k.shape[1], *like.shape[2:])
            if like.dtype != FLOAT8:
                check_dtype_of(NAME, name, t, "the cache", like)
            _check_like(name, t, like, shape, "what the cache is for")
        check_dtype(NAME, "k", k, float64=True)
        check_dtype_of(NAME, "v", v, "k", k)

    def _number(self, batch: int) -> None:
        """Numbers the requests of a cache of new size."""
        self.requests = torch.arange(batch, device=self.k.device)
        self._first = self.requests * self.k.shape[1]  # slots, if dense
        if batch * self.k.shape[1] <= INT32_MAX:
            self._first = self._first.int()

    def _slots(self, first: Tensor, tokens: int, there: Tensor | None = None) -> Tensor:
        """[B * tokens], for kv_cache_append: slots of the tokens from position first[b] on, -1
        where `there` [B, tokens] is False. Raises if pages are missing where tokens go.
        """
        if self.block_table is None:
            slots = first + self._first
            if tokens != 1:
                slots = slots[:, None] + torch.arange(tokens, device=slots.device)
        else:
            at = first[:, None].long() + torch.arange(tokens, device=first.device)
            page, row = self._places(at)
            if reads_values(page):
                pages = self.k.shape[0]
                bad = (page < 0) | (page >= pages)
                wrong = page[bad if there is None else bad & there].tolist()
                rule = f"must name pages below {pages} where tokens go"
                check(not wrong, NAME, "block_table", rule, wrong and wrong[0])
            slots = page * self.k.shape[1] + row
        if there is not None:
            slots = torch.where(there, slots.view(there.shape), -1)
        return slots.flatten()

    def _write(self, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Writes tokens [B, n, Hk, D] into slots [B * n]."""
        _append(self.k, self.v, slots, k, v, self.k_scale, self.v_scale)


def check_reads(op: str, argument: str, dtype: torch.dtype, operator: str | None) -> None:
    """Raises for a cache in float8, if an operator of the policy does not read such caches."""
    rule = f"must be in the dtype of the model, as {operator} reads no float8 (but all policies "
    check(dtype != FLOAT8 or operator is None, op, argument, rule + "except HiP do)", dtype)


def _append(
    k_cache: Tensor, v_cache: Tensor, slots: Tensor, k: Tensor, v: Tensor,
    k_scale: Tensor | None = None, v_scale: Tensor | None = None,
) -> None:  # fmt: skip
    """Writes tokens [B, n, Hk, D] into slots [B * n]."""
    k, v = (t.detach() if t.requires_grad else t for t in (k, v))
    k, v = (t.flatten(0, 1).contiguous() for t in (k, v))
    if v.shape[2] == 0:
        kv_cache_append(k_cache, None, k, None, slots, k_scale=k_scale)
    else:
        kv_cache_append(k_cache, v_cache, k, v, slots, k_scale=k_scale, v_scale=v_scale)


def _decoded(t: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Keys or values [..., Hk, D] of a cache in dtype; the product with a scale in float32."""
    if t.dtype != FLOAT8:
        return t.to(dtype)
    t = t.to(torch.promote_types(dtype, torch.float32))
    return (t if scale is None else t * scale[..., None]).to(dtype)


def _pairs(t: Tensor) -> Tensor:
    return t.view(torch.float16) if t.dtype == FLOAT8 else t


def _of_tokens(scale: Tensor | None) -> bool:
    """Whether each token has a scale."""
    return scale is not None and scale.dim() == 3


def _row_bytes(t: Tensor, scale: Tensor | None) -> int:
    of_scale = 4 if _of_tokens(scale) else 0
    return t.shape[2] * (t.shape[3] * t.element_size() + of_scale)


def _check_pairs(name: str, t: Tensor) -> None:
    try:
        _pairs(t)
    except RuntimeError:
        rule = "must have even sizes, strides and offset in float8_e4m3fn, [sizes, strides]"
        fail(NAME, name, rule, [t.shape, t.stride()])


def _check_like(name: str, t: Tensor, like: Tensor, shape: Sequence[int], why: str) -> None:
    """Checks for the device of like, and for the leading sizes in shape."""
    check_device_of(NAME, name, t, "the cache", like)
    if t.shape[: len(shape)] != shape:
        fail(NAME, name, f"must have shape {show(shape)}, {why}", t.shape)
