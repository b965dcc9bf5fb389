"""The KV cache that a policy attends to."""

from __future__ import annotations

from collections.abc import Sequence

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
from .._kv_cache import capacity, check_int32
from ..select.kv_cache_append import kv_cache_append
from ..select.kv_cache_compact import kv_cache_compact

NAME = "policies.KVCache"
Back = int | Sequence[int] | Tensor  # number of tokens to take back, per request


class KVCache:
    r"""The KV cache of one layer for a batch of requests, dense or paged.

    Lengths live on the device; an upper bound on them is known on the host, so that nothing here
    synchronises with the device.

    Args:
        k, v: ``[B, S, Hk, D]`` and ``[B, S, Hk, Dv]``, or with block_table pages ``[P, page size,
            Hk, ...]`` that no two requests share. Written in place, so no two elements may share
            memory; of the same floating-point dtype. No gradient flows through them.
        block_table: int32 ``[B, pages]``, the pages of each request in order. Pages that tokens are
            written to must exist; a GPU only checks this with TOKENMILL_CHECK=1.

    Example:
        >>> import torch, tokenmill as tm
        >>> cache = tm.policies.KVCache(torch.zeros(2, 8, 1, 4), torch.zeros(2, 8, 1, 4))
        >>> k = torch.randn(2, 5, 1, 4)
        >>> cache.fill(k, k, torch.tensor([5, 3], dtype=torch.int32))
        >>> cache.append(k[:, :1], k[:, :1])
        >>> cache.lengths.tolist(), cache.longest
        ([6, 4], 6)
    """

    def __init__(self, k: Tensor, v: Tensor, block_table: Tensor | None = None):
        for name, t in (("k", k), ("v", v)):
            check_tensor(NAME, name, t)
            rule = "must have 4 dimensions [B, S, Hk, D] (in pages: [P, page size, Hk, D])"
            check(t.dim() == 4, NAME, name, rule, t.dim())
            rule = "must not require a gradient, as tokens are written into it"
            check(not t.requires_grad, NAME, name, rule, t.requires_grad)
        check_dtype(NAME, "k", k, float64=True)
        _check_like("v", v, k, k.shape[:3], "that of k up to the head dimension")
        check_written(NAME, "k", k, {"v": v})
        check_written(NAME, "v", v, {})
        check_tensor(NAME, "block_table", block_table, optional=True)
        if block_table is not None:
            check_int32(NAME, "block_table", block_table)
            check_device_of(NAME, "block_table", block_table, "the cache", k)
            check(block_table.dim() == 2, NAME, "block_table", "must have shape [B, pages]",
                  block_table.shape)  # fmt: skip
        self.k, self.v, self.block_table = k, v, block_table
        batch = k.shape[0] if block_table is None else block_table.shape[0]
        self.requests = torch.arange(batch, device=k.device)
        self.lengths = torch.zeros(batch, dtype=torch.int32, device=k.device)
        self.longest = 0

    @classmethod
    def like(cls, k: Tensor, v: Tensor, capacity: int) -> KVCache:
        """An empty dense cache of the given capacity for keys and values like k and v."""
        return cls(*(t.new_empty(t.shape[0], capacity, *t.shape[2:]) for t in (k, v)))

    @property
    def capacity(self) -> int:
        return capacity(self.k, self.block_table)

    @property
    def key_bytes(self) -> int:
        """Bytes of the key of one token, over all heads."""
        return self.k.shape[2] * self.k.shape[3] * self.k.element_size()

    @property
    def token_bytes(self) -> int:
        """Bytes of the key and value of one token, over all heads."""
        return self.key_bytes + self.v.shape[2] * self.v.shape[3] * self.v.element_size()

    def fill(self, k: Tensor, v: Tensor, lengths: Tensor | None = None) -> None:
        """Fills the cache with the first lengths[b] tokens of k ``[B, S, Hk, D]`` and v; None:
        all.
        """
        self._check_tokens(k, v)
        tokens = k.shape[1]
        own = self.count(tokens, lengths)
        check(tokens <= self.capacity, NAME, "k", f"must fit into {self.capacity}", tokens)
        self.lengths, self.longest = own, tokens
        if self.block_table is None:
            self.k[:, :tokens], self.v[:, :tokens] = k.detach(), v.detach()
            return
        at = torch.arange(tokens, device=k.device)
        there = at < self.lengths[:, None]
        self._write(*self._slots(at.expand_as(there)), k, v, there)

    def append(self, k: Tensor, v: Tensor) -> None:
        """Appends a token to each request: k ``[B, 1, Hk, D]``, v ``[B, 1, Hk, Dv]``."""
        self._check_tokens(k, v)
        check(k.shape[1] == 1, NAME, "k", "must have 1 token", k.shape[1])
        self.extend(k, v)

    def extend(self, k: Tensor, v: Tensor, lengths: Tensor | None = None) -> None:
        """Appends the first lengths[b] tokens of k ``[B, n, Hk, D]`` and v to each request; None:
        all. `longest` grows by n."""
        self.check_room(k, v)
        added = self.count(k.shape[1], lengths)
        there = None
        # dense: rows past the length are free
        if lengths is not None and self.block_table is not None:
            there = torch.arange(k.shape[1], device=k.device) < added[:, None]
        self._write(*self._slots(self._last(0, k.shape[1])), k, v, there)
        self.lengths = self.lengths + added
        self.longest += k.shape[1]

    def check_room(self, k: Tensor, v: Tensor) -> None:
        """Raises unless k ``[B, n, Hk, D]`` and v can be appended."""
        self._check_tokens(k, v)
        longest = self.longest + k.shape[1]
        check(longest <= self.capacity, NAME, "k", f"must fit into {self.capacity}", longest)

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
            self.k, self.v = (
                torch.cat([t, t.new_zeros(t.shape[0], more, *t.shape[2:])], 1)
                for t in (self.k, self.v)
            )

    def reorder(self, requests: Tensor) -> None:
        """Request i becomes the former requests[i] of a dense cache: int64 ``[B']``; requests may
        repeat.
        """
        rule = "cannot be reordered in pages: reorder the block table"
        check(self.block_table is None, NAME, "requests", rule, requests.shape)
        self.k, self.v = self.k.index_select(0, requests), self.v.index_select(0, requests)
        self.lengths = self.lengths.index_select(0, requests)
        self.requests = torch.arange(len(requests), device=self.k.device)

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
        self._write(*self._slots(self._last(tokens, tokens)), k, v)

    def rows(self, at: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values at positions ``[B, n]`` of each request: ``[B, n, Hk, D]``. Arbitrary
        where a page does not exist.
        """
        page, row = self._slots(at.long())
        page = page.clamp(0, max(self.k.shape[0] - 1, 0))
        return self.k[page, row], self.v[page, row]

    def dense(self, t: Tensor) -> Tensor:
        """The cache's k or v as ``[B, capacity, Hk, D]``; a copy if paged."""
        if self.block_table is None:
            return t
        at = torch.arange(self.capacity, device=t.device)
        page, row = self._slots(at.expand(len(self.lengths), -1))
        return t[page.clamp(0, max(t.shape[0] - 1, 0)), row]

    def compact(self, keep: Tensor, counts: Tensor, backend: str | None) -> None:
        """Keeps the slots of lists ``[B, K]`` or ``[B, Hk, K]``; see kv_cache_compact."""
        if self.block_table is not None and keep.dim() == 3:
            self._compact_heads(keep, counts)
        else:
            kv_cache_compact(
                self.k, self.v, keep, counts, seqlens_k=self.lengths, block_table=self.block_table,
                backend=backend,
            )  # fmt: skip
        self.lengths = counts if counts.dim() == 1 else counts[:, 0]
        self.longest = min(self.longest, keep.shape[-1])

    def _compact_heads(self, keep: Tensor, counts: Tensor) -> None:
        """Moves entry i of each head's list to slot i."""
        place = torch.arange(keep.shape[2], device=keep.device)
        for head in range(keep.shape[1]):
            page, row = self._slots(keep[:, head].long().clamp(min=0))
            page = page.clamp(0, max(self.k.shape[0] - 1, 0))
            one = slice(head, head + 1)
            k, v = self.k[:, :, one], self.v[:, :, one]
            there = place < counts[:, head, None]
            target = self._slots(place.expand_as(there))
            _write_some(k, v, *target, k[page, row], v[page, row], there)

    def _checked_lengths(self, lengths: Tensor, name: str) -> Tensor:
        check_tensor(NAME, name, lengths, optional=name == "lengths")
        check_int32(NAME, name, lengths)
        check_device_of(NAME, name, lengths, "the cache", self.k)
        if lengths.shape != self.lengths.shape:
            fail(NAME, name, f"must have shape {show(self.lengths.shape)}", lengths.shape)
        return lengths

    def _check_tokens(self, k: Tensor, v: Tensor) -> None:
        batch = self.lengths.shape[0]
        for name, t, like in (("k", k, self.k), ("v", v, self.v)):
            check_tensor(NAME, name, t)
            rule = "must have 4 dimensions [B, S, Hk, D]"
            check(t.dim() == 4, NAME, name, rule, t.dim())
            wanted = [batch, k.shape[1], *like.shape[2:]]
            _check_like(name, t, like, wanted, "what the cache is for")

    def _last(self, back: int, tokens: int) -> Tensor:
        """[B, tokens]: consecutive positions, starting `back` before the end of each request."""
        first = (self.lengths - back).clamp(min=0)
        return first[:, None].long() + torch.arange(tokens, device=self.k.device)

    def _slots(self, at: Tensor) -> tuple[Tensor, Tensor]:
        """Page (request, if dense) and row of positions [B, n]."""
        if self.block_table is None:
            return self.requests[:, None].expand_as(at), at
        size = self.k.shape[1]
        page = (at // size).clamp(max=self.block_table.shape[1] - 1)
        return self.block_table.long().gather(1, page), at % size

    def _write(
        self, page: Tensor, row: Tensor, k: Tensor, v: Tensor, there: Tensor | None = None
    ) -> None:
        """Writes tokens [B, n], only where there is True."""
        if self.block_table is not None and reads_values(page):
            pages = self.k.shape[0]
            bad = (page < 0) | (page >= pages)
            wrong = page[bad if there is None else bad & there].tolist()
            rule = f"must name pages below {pages} where tokens go"
            check(not wrong, NAME, "block_table", rule, wrong and wrong[0])
        if there is None:
            self.k[page, row], self.v[page, row] = k.detach(), v.detach()
        else:
            _write_some(self.k, self.v, page, row, k, v, there)


def _write_some(
    k_cache: Tensor, v_cache: Tensor, page: Tensor, row: Tensor, k: Tensor, v: Tensor, there: Tensor
) -> None:
    """Writes rows [B, n, Hk, D] into pages where there is True, without a host synchronisation."""
    slots = torch.where(there, page * k_cache.shape[1] + row, -1).flatten()
    k, v = (t.detach().flatten(0, 1).contiguous() for t in (k, v))
    values = (v_cache, v) if v.shape[2] > 0 else (None, None)
    kv_cache_append(k_cache, values[0], k, values[1], slots)


def _check_like(name: str, t: Tensor, like: Tensor, shape: Sequence[int], why: str) -> None:
    """Checks for the dtype and device of like, and for the leading sizes in shape."""
    check_dtype_of(NAME, name, t, "the cache", like)
    check_device_of(NAME, name, t, "the cache", like)
    if list(t.shape[: len(shape)]) != list(shape):
        fail(NAME, name, f"must have shape {show(list(shape))}, {why}", t.shape)
