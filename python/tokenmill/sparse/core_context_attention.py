"""core_context_attention: distant tokens represented by one core token per group."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .._call.autocast import Autocast
from .._check import (
    as_int,
    check,
    check_bool,
    check_qkv,
    fail,
    is_power_of_two,
)
from .._lowering import scale_or_default
from ..dense.attention import attention
from ..dense.attention_decode import attention_decode
from ..dense.merge_attention_states import merge_attention_states
from .block_sparse_attention import block_sparse_attention
from .query_lists import MAX_BLOCK, ordered_sum

OP = "core_context_attention"
AUTOCAST = Autocast(lower=("q", "k", "v"))

Cores = Literal["query", "kv"]


@AUTOCAST.applied
def core_context_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cores: Cores = "query",
    window: int = 1024,
    group: int = 16,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Causal attention to a window of tokens, and to one core token per group before the window.

    Tokens are cut into groups of g from the first token on. The last query of a group attends to
    the tokens of its group; the weighted sums of their keys and values are the group's core, one
    per query head:

    .. math::
       a = \operatorname{softmax}_{j \in G}(\mathrm{scale}\; q_{last(G)} \cdot k_j), \qquad
       \tilde k_G = \sum_{j \in G} a_j k_j, \qquad \tilde v_G = \sum_{j \in G} a_j v_j

    Query i (from 0) sees the cores of the first :math:`c = \max(0, \lfloor (i + 1 - window) / g
    \rfloor)` groups and the tokens c g to i, in one softmax: the last window to window + g - 1
    tokens. No token is seen twice, none is missed, and no group is seen as a core before it is
    complete.

    Args:
        q: ``[B, S, H, D]`` float16, bfloat16 or float32 (float64 on the reference), any strides
            with a contiguous last dimension, D up to 256.
        k, v: ``[B, S, Hk, D]`` and ``[B, S, Hk, Dv]``, Hk a divisor of H. Rotary embedding, if any,
            is already applied to q and k: a core needs no position of its own.
        cores: "query": each query head has its own cores, as in the released code. "kv": the query
            heads of a GQA group share cores, weighted by their mean query; a cache then has H / Hk
            times fewer cores. With H = Hk both are the same.
        window: minimum number of tokens seen individually, at least 0.
        group: tokens of a group, a power of two up to 128.
        scale: factor of q.k; None = 1/sqrt(D).
        return_lse: also return lse.
        backend: "cpu", "cuda", "triton", "reference" or None (see :func:`tokenmill.explain`).

    Returns:
        out ``[B, S, H, Dv]`` in the dtype of q; with return_lse also lse ``[B, H, S]`` float32,
        natural log. Gradients of q, k and v, through the cores too. For S < window + group it is
        causal attention, as it is for group=1 at any S.

    Raises:
        RuntimeError: naming argument, rule and value.

    Complexity: 2 H (D + Dv) (S / g + window + g) operations at most per query; memory linear in S.

    Paper: Core Context Aware attention (Chen et al. 2024), sections 3.1 and 3.2, as the authors
    released it (chenyaofo/CCA-Attention at 052cc8e). The paper's formulas pool the inputs of a
    group before their projections, and begin the window one token earlier, with the last token of
    the newest core.

    Example:
        >>> import torch, tokenmill as tm
        >>> q, k, v = (torch.randn(1, 1000, 4, 32) for _ in range(3))
        >>> tm.core_context_attention(q, k, v, window=64, group=16).shape
        torch.Size([1, 1000, 4, 32])
    """
    check_bool(OP, "return_lse", return_lse)
    group, window = as_sizes(group, window, cores)
    factor = _check_inputs(q, k, v, scale)
    count = _cores_seen(q.shape[1], group, window)
    made = core_tokens(q, k, v, group, factor, count, cores, backend) if count else None
    out, lse = _attend(q, k, v, made, group, window, factor, backend)
    return (out, lse) if return_lse else out


def _check_inputs(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> float:
    """Checks the inputs of a whole sequence and returns the scale."""
    check_qkv(OP, q, k, v, 4, True)
    check(k.shape[1] == q.shape[1], OP, "k", f"must have the length of q, {q.shape[1]}", k.shape[1])
    return scale_or_default(OP, scale, q)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cores: tuple[Tensor, Tensor] | None,
    group: int,
    window: int,
    scale: float,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """Attends to the cores visible to the last query, if there are any, and to tokens.

    Queries with the same visible cores form a row of `group` queries; the first row ends where c
    becomes 1 - near. Zero queries are prepended to complete it.
    """
    length = q.shape[1]
    before = (1 - window) % group
    near = (window - 1 + before) // group  # row r sees the cores of groups before r - near
    rows = -(-(length + before) // group)
    padded = torch.nn.functional.pad(q, (0, 0, 0, 0, before, rows * group - length - before))
    out, lse = block_sparse_attention(
        padded[:, : before + length], k, v, *_near_groups(q, rows, near, group), block_q=group,
        block_k=group, causal=True, scale=scale, return_lse=True, backend=backend,
    )  # fmt: skip
    out, lse = out[:, before:], lse[:, :, before:]
    if cores is None:
        return out, lse
    far, far_lse = (
        t.narrow(dim, before, length)
        for t, dim in zip(_far_groups(padded, *cores, group, scale, backend), (1, 2), strict=True)
    )
    merged = torch.stack([out, far]), torch.stack([lse, far_lse])
    return merge_attention_states(*merged, backend=backend)


def as_sizes(group: int, window: int, cores: Cores) -> tuple[int, int]:
    ok = isinstance(cores, str) and cores in ("query", "kv")
    check(ok, OP, "cores", "must be 'query' or 'kv'", cores)
    group, window = as_int(OP, "group", group), as_int(OP, "window", window)
    ok = is_power_of_two(group) and group <= MAX_BLOCK
    check(ok, OP, "group", f"must be a power of two up to {MAX_BLOCK}", group)
    check(0 <= window < 2**31, OP, "window", "must be 0 to 2^31 - 1", window)
    return group, window


def _cores_seen(tokens: int, group: int, window: int) -> int:
    """Number of cores visible to the last of `tokens` tokens."""
    return max(tokens - window, 0) // group


def core_tokens(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group: int,
    scale: float,
    count: int,
    cores: Cores,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """Cores [B, count, H | Hk, D] and [B, count, H | Hk, Dv] of the first groups.

    A core is the attention of its query to its group, with the keys as values too. Its bits do not
    depend on the number of groups and requests on backends whose attention has that property.
    """
    kv_heads, tokens = k.shape[2], count * group
    last = q[:, group - 1 : tokens : group].unflatten(2, (kv_heads, -1))
    if cores == "kv":
        wide = last.to(torch.promote_types(q.dtype, torch.float32))
        last = (ordered_sum(wide, 3) / wide.shape[3]).to(q.dtype).unsqueeze(3)
    queries = last.flatten(0, 1).transpose(1, 2)  # [B count, GQA group, Hk, D]
    keys, values = (t[:, :tokens].unflatten(1, (count, group)).flatten(0, 1) for t in (k, v))
    core_k, core_v = (
        attention(queries, keys, t, scale=scale, backend=backend)
        .transpose(1, 2)
        .flatten(1, 2)
        .unflatten(0, (q.shape[0], count))
        for t in (keys, values)
    )
    return core_k, core_v


def _near_groups(q: Tensor, rows: int, near: int, group: int) -> tuple[Tensor, Tensor]:
    """Lists for each row of queries: the groups seen token by token, from r - near up to the last
    key.
    """
    row = torch.arange(rows, dtype=torch.int32, device=q.device)
    first = (row - near).clamp(min=0)
    last = row.clamp(max=-(-q.shape[1] // group) - 1)
    entries = torch.arange(max(min(near + 1, rows), 1), dtype=torch.int32, device=q.device)
    indices = (first[:, None] + entries).expand(q.shape[0], 1, -1, -1)
    counts = (last - first + 1).clamp(min=0).expand(q.shape[0], 1, -1)
    return indices, counts


def _far_groups(
    q: Tensor, core_k: Tensor, core_v: Tensor, group: int, scale: float, backend: str | None
) -> tuple[Tensor, Tensor]:
    """Attention to cores. The queries of a row see the same cores, so they become heads of one
    query, which sees one core less than the next row's.
    """
    core_heads = core_v.shape[2]
    rows = q.unflatten(2, (core_heads, -1)).unflatten(1, (-1, group))
    rows = rows.transpose(2, 3)  # [B, rows, core heads, group, queries per core, D]
    out, lse = attention(
        rows.flatten(2, 4), core_k, core_v, causal=True, scale=scale, return_lse=True,
        backend=backend,
    )  # fmt: skip
    out = out.unflatten(2, (core_heads, group, -1)).transpose(2, 3)
    lse = lse.unflatten(1, (core_heads, group, -1)).permute(0, 1, 3, 4, 2)
    return out.flatten(3, 4).flatten(1, 2), lse.flatten(3, 4).flatten(1, 2)


class CoreContextState:
    """Decode state of :func:`core_context_attention`: the cores of complete groups, and the tokens
    still seen individually.

    Args:
        cores, window, group, scale, backend: as in :func:`core_context_attention`.

    Example:
        >>> import torch, tokenmill as tm
        >>> q, k, v = (torch.randn(1, 100, 4, 32) for _ in range(3))
        >>> state = tm.sparse.CoreContextState(window=32, group=16)
        >>> out = state.prefill(q[:, :99], k[:, :99], v[:, :99])
        >>> state.step(q[:, 99:], k[:, 99:], v[:, 99:]).shape
        torch.Size([1, 1, 4, 32])
        >>> state.tokens, state.cores, state.raw  # of 100: 4 cores and 36 tokens
        (100, 4, 36)
    """

    def __init__(
        self,
        *,
        cores: Cores = "query",
        window: int = 1024,
        group: int = 16,
        scale: float | None = None,
        backend: str | None = None,
    ) -> None:
        self.group, self.window = as_sizes(group, window, cores)
        self.kind: Cores = cores
        self.scale, self.backend = scale, backend
        self.tokens = 0
        self._waiting: list[tuple[Tensor, Tensor]] = []  # cores of complete groups in the window

    @property
    def raw(self) -> int:
        """Number of tokens kept individually."""
        return self.tokens - self.cores * self.group

    @property
    def cores(self) -> int:
        """Number of groups seen as cores."""
        return _cores_seen(self.tokens, self.group, self.window)

    @AUTOCAST.applied
    def prefill(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of the first tokens of all requests; at least one token."""
        if self.tokens:
            fail(OP, "state", "must be empty; tokens", self.tokens)
        factor = _check_inputs(q, k, v, self.scale)
        check(q.shape[1] > 0, OP, "q", "must have at least 1 token", q.shape[1])
        tokens = q.shape[1]
        complete, seen = tokens // self.group, _cores_seen(tokens, self.group, self.window)
        made = self._cores_of(q, k, v, factor, complete)
        far = made[0][:, :seen], made[1][:, :seen]
        out, _ = _attend(
            q, k, v, far if seen else None, self.group, self.window, factor, self.backend
        )
        self.tokens = tokens
        self._core = [_with_room(t, 2 * seen + 64) for t in far]
        self._waiting = [
            (made[0][:, i : i + 1], made[1][:, i : i + 1]) for i in range(seen, complete)
        ]
        first = seen * self.group
        room = min(self.window + self.group, 2 * (tokens - first) + 64)
        self._raw = [_with_room(t[:, first:], room) for t in (k, v)]
        return out

    @AUTOCAST.applied
    def step(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of one new token per request, ``[B, 1, H, D]``."""
        check_qkv(OP, q, k, v, 4, True)
        check(q.shape[1] == 1, OP, "q", "must have 1 token", q.shape[1])
        if not self.tokens:
            return self.prefill(q, k, v)
        self._append(k, v)
        if self.tokens % self.group == 0:
            self._waiting.append(self._core_of_the_newest(q))
        if self.raw < self._kept:
            self._move_a_core()
        parts = [(self._raw, self.raw), (self._core, self.cores)]
        found = [self._attend(q, cache, count) for cache, count in parts if count]
        if len(found) == 1:
            return found[0][0]
        outs, lses = (torch.stack(t) for t in zip(*found, strict=True))
        return merge_attention_states(outs, lses, backend=self.backend)[0]

    def _append(self, k: Tensor, v: Tensor) -> None:
        """Appends the newest token to the individual tokens."""
        self._kept = self.raw + 1
        self.tokens += 1
        if self._kept > self._raw[0].shape[1]:  # the window is not full yet
            room = min(self.window + self.group, 2 * self._kept)
            self._raw = [_with_room(t, room) for t in self._raw]
        for cache, new in zip(self._raw, (k, v), strict=True):
            cache[:, self._kept - 1] = new[:, 0]

    def _cores_of(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, count: int
    ) -> tuple[Tensor, Tensor]:
        if count == 0:
            heads = q.shape[2] if self.kind == "query" else k.shape[2]
            no_keys, no_values = (t.new_zeros((t.shape[0], 0, heads, t.shape[3])) for t in (k, v))
            return no_keys, no_values
        return core_tokens(q, k, v, self.group, scale, count, self.kind, self.backend)

    def _core_of_the_newest(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """The core of the group completed by the newest token, which has query q."""
        last = slice(self._kept - self.group, self._kept)
        keys, values = (t[:, last] for t in self._raw)
        queries = q.expand(-1, self.group, -1, -1)
        factor = scale_or_default(OP, self.scale, q)
        return self._cores_of(queries, keys, values, factor, 1)

    def _move_a_core(self) -> None:
        """Moves the oldest individually seen group to the cores."""
        if self.cores > self._core[0].shape[1]:
            self._core = [_with_room(t, 2 * t.shape[1]) for t in self._core]
        for cache, core in zip(self._core, self._waiting.pop(0), strict=True):
            cache[:, self.cores - 1] = core[:, 0]
        for t in self._raw:
            t[:, : self.raw] = t[:, self.group : self._kept].clone()

    def _attend(self, q: Tensor, cache: list[Tensor], count: int) -> tuple[Tensor, Tensor]:
        lengths = torch.full((q.shape[0],), count, dtype=torch.int32, device=q.device)
        out, lse = attention_decode(
            q, *cache, seqlens_k=lengths, scale=self.scale, return_lse=True, backend=self.backend
        )
        return out, lse


def _with_room(t: Tensor, tokens: int) -> Tensor:
    """A copy of t [B, n, ...] with capacity for `tokens` tokens."""
    room = t.new_zeros((t.shape[0], max(tokens, t.shape[1]), *t.shape[2:]))
    room[:, : t.shape[1]] = t
    return room
