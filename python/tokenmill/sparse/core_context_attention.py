"""core_context_attention: distant tokens through one core token for each group of them."""

from __future__ import annotations

import torch
from torch import Tensor

from .._autocast import Autocast
from .._check import as_int, check, check_bool, check_qkv, check_tensor, fail, is_power_of_two
from .._lowering import scale_or_default
from ..dense.attention import attention
from ..dense.attention_decode import attention_decode
from ..dense.merge_attention_states import merge_attention_states
from .block_sparse_attention import block_sparse_attention
from .rules import MAX_BLOCK

OP = "core_context_attention"
AUTOCAST = Autocast(lower=("q", "k", "v"))


@AUTOCAST.applied
def core_context_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: int = 16,
    window: int = 256,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Causal attention to a window of tokens, and to one core token for each group before it.

    Groups of g tokens follow each other from the first token on. The last query of a group weighs
    the tokens of its group; their weighted sums are its core:

    .. math::
       a = \operatorname{softmax}_{j \in G}(\mathrm{scale}\; \bar q_{last(G)} \cdot k_j), \qquad
       \tilde k_G = \sum_{j \in G} a_j k_j, \qquad \tilde v_G = \sum_{j \in G} a_j v_j

    with the mean :math:`\bar q` of the query heads that share a KV head. Query i, in group c, sees
    the tokens j <= i of its own group and of the window / g groups before it, and the cores of all
    groups before those, in one softmax. No token is seen twice, none is missed, and no group is
    seen as a core before it is complete.

    Args:
        q: ``[B, S, H, D]`` float16, bfloat16 or float32 (float64 on the reference), any strides
            with a contiguous last dimension, D up to 256.
        k, v: ``[B, S, Hk, D]`` and ``[B, S, Hk, Dv]``, Hk a divisor of H. Rotary embedding, if any,
            is in q and k already: a core is in the place of its tokens.
        group: tokens of a group, a power of two up to 128.
        window: tokens before the own group that are seen one by one, a multiple of group.
        scale: factor of q.k; None = 1/sqrt(D).
        return_lse: also return lse.
        backend: "cpu", "cuda", "triton", "reference" or None (see :func:`tokenmill.explain`).

    Returns:
        out ``[B, S, H, Dv]`` in the dtype of q; with return_lse also lse ``[B, H, S]`` float32,
        natural log. Gradients of q, k and v, through the cores too. For S up to window + group it
        is causal attention, and for group=1 at any S.

    Raises:
        RuntimeError: naming argument, rule and value.

    Complexity: 2 H (D + Dv) (S / g + window + g) operations for a query at most; memory linear in
    S.

    Paper: Core Context Aware attention (Chen et al. 2024), sections 3.1 and 3.2. It leaves open
    where the window begins, and grouped heads: both are as said above.

    Example:
        >>> import torch, tokenmill as tm
        >>> q, k, v = (torch.randn(1, 1000, 4, 32) for _ in range(3))
        >>> tm.core_context_attention(q, k, v, group=16, window=64).shape
        torch.Size([1, 1000, 4, 32])
    """
    check_bool(OP, "return_lse", return_lse)
    group, window = as_sizes(group, window)
    factor = _check_inputs(q, k, v, scale)
    count = _groups_left(q.shape[1], group, window)
    cores = core_tokens(q, k, v, group, factor, count) if count else None
    out, lse = _attend(q, k, v, cores, group, window, factor, backend)
    return (out, lse) if return_lse else out


def _check_inputs(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> float:
    """Checks the inputs of a whole sequence. Returns the scale."""
    for name, t in (("q", q), ("k", k), ("v", v)):
        check_tensor(OP, name, t)
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
    """Attends to the cores that the last query sees, if there are any, and to tokens."""
    groups = -(-q.shape[1] // group)
    out, lse = block_sparse_attention(
        q, k, v, *_near_groups(q, groups, window // group), block_q=group, block_k=group,
        causal=True, scale=scale, return_lse=True, backend=backend,
    )  # fmt: skip
    if cores is None:
        return out, lse
    far, far_lse = _far_groups(q, *cores, group, groups, scale, backend)
    merged = torch.stack([out, far]), torch.stack([lse, far_lse])
    return merge_attention_states(*merged, backend=backend)


def as_sizes(group: int, window: int) -> tuple[int, int]:
    group, window = as_int(OP, "group", group), as_int(OP, "window", window)
    ok = is_power_of_two(group) and group <= MAX_BLOCK
    check(ok, OP, "group", f"must be a power of two up to {MAX_BLOCK}", group)
    ok = 0 <= window < 2**31 and window % group == 0
    rule = f"must be a multiple of group, {group}, below 2^31"
    check(ok, OP, "window", rule, window)
    return group, window


def _groups_left(tokens: int, group: int, window: int) -> int:
    """Groups before the window of the last token: the cores that it sees. Tokens of each earlier
    group see one less."""
    return max(max(tokens - 1, 0) // group - window // group, 0)


def core_tokens(
    q: Tensor, k: Tensor, v: Tensor, group: int, scale: float, count: int
) -> tuple[Tensor, Tensor]:
    """Cores [B, count, Hk, D] and [B, count, Hk, Dv] of the first groups. Sums are float32."""
    wide = torch.promote_types(q.dtype, torch.float32)
    tokens = count * group
    keys, values = (t[:, :tokens].unflatten(1, (count, group)).to(wide) for t in (k, v))
    last = q[:, group - 1 : tokens : group]
    last = last.unflatten(2, (k.shape[2], -1)).mean(3, dtype=wide)  # [B, count, Hk, D]
    weights = torch.softmax(scale * torch.einsum("bchd,bcjhd->bcjh", last, keys), 2)
    return (
        torch.einsum("bcjh,bcjhd->bchd", weights, keys).to(k.dtype),
        torch.einsum("bcjh,bcjhd->bchd", weights, values).to(v.dtype),
    )


def _near_groups(q: Tensor, groups: int, near: int) -> tuple[Tensor, Tensor]:
    """Lists for each group: itself and `near` before it."""
    own = torch.arange(groups, dtype=torch.int32, device=q.device)
    first = (own - near).clamp(min=0)
    entries = torch.arange(min(near + 1, max(groups, 1)), dtype=torch.int32, device=q.device)
    indices = (first[:, None] + entries).expand(q.shape[0], 1, -1, -1)
    counts = (own - first + 1).expand(q.shape[0], 1, -1)
    return indices, counts


def _far_groups(
    q: Tensor,
    core_k: Tensor,
    core_v: Tensor,
    group: int,
    groups: int,
    scale: float,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """Attention to cores. The queries of a group see the same ones: they are heads of one query,
    which sees one core less than the next."""
    batch, length, heads = q.shape[:3]
    kv_heads, value_dim = core_v.shape[2:]
    rows = torch.nn.functional.pad(q, (0, 0, 0, 0, 0, groups * group - length))
    rows = rows.unflatten(2, (kv_heads, -1)).unflatten(1, (groups, group))
    rows = rows.transpose(2, 3).flatten(2, 4)  # [B, groups, Hk * group * heads of a KV head, D]
    out, lse = attention(
        rows, core_k, core_v, causal=True, scale=scale, return_lse=True, backend=backend
    )
    out = out.unflatten(2, (kv_heads, group, -1)).transpose(2, 3)
    lse = lse.unflatten(1, (kv_heads, group, -1)).permute(0, 1, 3, 4, 2)
    return (
        out.reshape(batch, groups * group, heads, value_dim)[:, :length],
        lse.reshape(batch, heads, groups * group)[:, :, :length],
    )


class CoreContextState:
    """The state of decoding with :func:`core_context_attention`: the cores of groups that left the
    window, and the tokens of the window and of the groups that are not complete.

    Args:
        group, window, scale, backend: as in :func:`core_context_attention`.

    Example:
        >>> import torch, tokenmill as tm
        >>> q, k, v = (torch.randn(1, 100, 4, 32) for _ in range(3))
        >>> state = tm.sparse.CoreContextState(group=16, window=32)
        >>> out = state.prefill(q[:, :99], k[:, :99], v[:, :99])
        >>> state.step(q[:, 99:], k[:, 99:], v[:, 99:]).shape
        torch.Size([1, 1, 4, 32])
        >>> state.tokens, state.cores, state.raw  # of 100: 4 cores and 36 tokens
        (100, 4, 36)
    """

    def __init__(
        self,
        *,
        group: int = 16,
        window: int = 256,
        scale: float | None = None,
        backend: str | None = None,
    ) -> None:
        self.group, self.window = as_sizes(group, window)
        self.scale, self.backend = scale, backend
        self.tokens = 0
        self._waiting: list[tuple[Tensor, Tensor]] = []  # cores of complete groups in the window

    @property
    def raw(self) -> int:
        """Tokens that are kept one by one."""
        return self.tokens - self.cores * self.group

    @property
    def cores(self) -> int:
        """Groups that left the window."""
        return _groups_left(self.tokens, self.group, self.window)

    @AUTOCAST.applied
    def prefill(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of the first tokens of all requests, at least one of them."""
        if self.tokens:
            fail(OP, "state", "must be empty; tokens", self.tokens)
        factor = _check_inputs(q, k, v, self.scale)
        check(q.shape[1] > 0, OP, "q", "must have at least 1 token", q.shape[1])
        tokens = q.shape[1]
        complete, left = tokens // self.group, _groups_left(tokens, self.group, self.window)
        made = core_tokens(q, k, v, self.group, factor, complete)
        far = made[0][:, :left], made[1][:, :left]
        seen = far if left else None
        out, _ = _attend(q, k, v, seen, self.group, self.window, factor, self.backend)
        self.tokens = tokens
        self._core = [_with_room(t, 2 * left + 64) for t in far]
        self._waiting = [
            (made[0][:, i : i + 1], made[1][:, i : i + 1]) for i in range(left, complete)
        ]
        first = left * self.group
        room = min(self.window + self.group, 2 * (tokens - first) + 64)
        self._raw = [_with_room(t[:, first:], room) for t in (k, v)]
        return out

    @AUTOCAST.applied
    def step(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of one new token of each request, ``[B, 1, H, D]``."""
        for name, t in (("q", q), ("k", k), ("v", v)):
            check_tensor(OP, name, t)
        check_qkv(OP, q, k, v, 4, True)
        check(q.shape[1] == 1, OP, "q", "must have 1 token", q.shape[1])
        if not self.tokens:
            return self.prefill(q, k, v)
        kept = self.cores
        self.tokens += 1
        if self.cores > kept:  # the first group of the window leaves it
            for cache, core in zip(self._core, self._waiting.pop(0), strict=True):
                cache[:, kept] = core[:, 0]
            for t in self._raw:
                t[:, : self.window] = t[:, self.group :].clone()
            if self.cores == self._core[0].shape[1]:
                self._core = [_with_room(t, 2 * t.shape[1]) for t in self._core]
        if self.raw > self._raw[0].shape[1]:  # the window is not full yet
            room = min(self.window + self.group, 2 * self.raw)
            self._raw = [_with_room(t, room) for t in self._raw]
        for cache, new in zip(self._raw, (k, v), strict=True):
            cache[:, self.raw - 1] = new[:, 0]
        parts = [(self._raw, self.raw)]
        if self.cores:
            parts.append((self._core, self.cores))
        found = [self._attend(q, cache, count) for cache, count in parts]
        if self.tokens % self.group == 0:
            last = slice(self.raw - self.group, self.raw)
            queries = q.expand(-1, self.group, -1, -1)  # the last one weighs the group
            factor = scale_or_default(OP, self.scale, q)
            raw_k, raw_v = (t[:, last] for t in self._raw)
            self._waiting.append(core_tokens(queries, raw_k, raw_v, self.group, factor, 1))
        if len(found) == 1:
            return found[0][0]
        outs, lses = (torch.stack(t) for t in zip(*found, strict=True))
        return merge_attention_states(outs, lses, backend=self.backend)[0]

    def _attend(self, q: Tensor, cache: list[Tensor], count: int) -> tuple[Tensor, Tensor]:
        lengths = torch.full((q.shape[0],), count, dtype=torch.int32, device=q.device)
        out, lse = attention_decode(
            q, *cache, seqlens_k=lengths, scale=self.scale, return_lse=True, backend=self.backend
        )
        return out, lse


def _with_room(t: Tensor, tokens: int) -> Tensor:
    """A copy of t [B, n, ...] with room for more tokens after it."""
    room = t.new_zeros((t.shape[0], max(tokens, t.shape[1]), *t.shape[2:]))
    room[:, : t.shape[1]] = t
    return room
