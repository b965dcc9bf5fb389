"""landmark_decode: decode, and chunks of a prompt, over the blocks with the best landmarks."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from .._call.autocast import Autocast
from .._check import (
    as_int,
    check,
    check_bool,
    check_dtype_of,
    check_head_dim,
    check_scale,
    check_tensor,
    reads_values,
)
from .._kv_cache import capacity, check_cache, check_lengths, check_lengths_values
from .._lowering import scale_or_default
from ..dense.attention import attention
from ..dense.merge_attention_states import merge_attention_states
from ..dense.terms import check_small
from ..reference.sparse.sparse_decode_attention import rotate
from ..select.kv_block_scores import kv_block_scores
from ..select.topk_select import topk_select
from .landmark_attention import landmark_attention

OP = "landmark_decode"

Share = Literal["none", "queries", "heads"]
AT_ONCE = 16  # queries whose blocks are copied at the same time


@Autocast(lower=("q",), cache="k_cache").applied
def landmark_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    seqlens_k: Tensor,
    block_table: Tensor | None = None,
    block: int = 64,
    topk: int | None = None,
    share: Share = "none",
    rope: tuple[Tensor, Tensor] | None = None,
    interleaved: bool = False,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Decode with :func:`landmark_attention`, or the next chunk of a prompt, over the blocks whose
    landmarks score highest.

    The keys of the newest Sq tokens of each request, the queries, are in the cache. The block in
    which they begin and all later keys are local: a query sees it as in :func:`landmark_attention`.
    Of the complete blocks before it sees the topk with the greatest landmark logits, chosen per
    head and query. The weights are the grouped softmax over the visible keys.

    With rope, queries and cache come without rotary embedding, and each block has a place among
    topk + 1 slots right before the local tokens. To be scored, the newest topk blocks are rotated
    to the last topk slots, and all older ones to the first. The retrieved blocks are then rotated
    to the slots in their order: the j-th to slot j (from 0), or to slot j + 1 if it is among the
    newest topk. No distance is greater than (topk + 2) block + Sq, however long the text: a model
    can read more than its training length.

    Args:
        q: ``[B, Sq, H, D]`` float16, bfloat16 or float32 (float64 on the reference), D up to 256:
            one query, or a chunk of a prompt. Query i is token seqlens_k - Sq + i.
        k_cache, v_cache: ``[B, S, Hk, D]`` and ``[B, S, Hk, Dv]``, Hk a divisor of H; with
            block_table pages ``[P, page size, Hk, D]`` and ``[P, page size, Hk, Dv]``, the page
            size a power of two.
        seqlens_k: int32 ``[B]``, keys of each request, from 0 to S (pages: pages times page size).
            Keys beyond them are never read.
        block_table: int32 ``[B, pages]``, the pages of each request in order; entries beyond its
            last key may hold anything. Blocks count the request's tokens, wherever pages end.
        block: tokens of a block, including its landmark, at least 2.
        topk: blocks to retrieve, at least 1. None: all, which gives the last rows of
            :func:`landmark_attention`.
        share: "none": each head and query retrieves its own blocks. "queries": the queries of a
            head share the blocks with the greatest probability in any of them; a chunk then copies
            Sq times less. "heads": the heads of a query share blocks likewise.
        rope: (cos, sin), float ``[positions, pairs]`` each, pairs up to D / 2, for (topk + 2) block
            + Sq - 1 positions, or for the cache capacity of a request, if it is smaller. Columns
            after the pairs are unchanged. None: no rotation.
        interleaved: pairs are columns (2 i, 2 i + 1), not (i, i + pairs).
        scale: factor of q.k; None = 1/sqrt(D).
        return_lse: also return lse.
        backend: "cpu", "cuda", "triton", "reference" or None (see :func:`tokenmill.explain`).

    Returns:
        out ``[B, Sq, H, Dv]`` in the dtype of q; with return_lse also log Z, ``[B, H, Sq]``
        float32. A query with no visible key, or only a landmark, has out 0 and lse -inf.
        Gradients of q, k_cache and v_cache, none through the choice of blocks.

    Raises:
        RuntimeError: naming argument, rule and value. On a GPU a length is clamped to what the
            cache holds, and a page that does not exist is read as page 0.

    Complexity: reads S / block landmarks, topk block keys for a head and query (share="queries":
    for a head), and block + Sq local ones; only these are copied from the cache, for at most 16
    queries at a time. The whole cache stays on the device of q.

    Paper: Landmark Attention (Mohtashami and Jaggi 2023), sections 3.2 and 3.3, as the authors
    released it (epfml/landmark-attention at d963e50).

    Example:
        >>> import torch, tokenmill as tm
        >>> k, v = (torch.randn(2, 512, 2, 32) for _ in range(2))
        >>> lengths = torch.tensor([512, 301], dtype=torch.int32)
        >>> tm.landmark_decode(torch.randn(2, 1, 4, 32), k, v, seqlens_k=lengths, topk=2).shape
        torch.Size([2, 1, 4, 32])
        >>> angles = torch.arange(320.0)[:, None] / 10000 ** (torch.arange(16) / 16)
        >>> tm.landmark_decode(torch.randn(2, 64, 4, 32), k, v, seqlens_k=lengths, topk=2,
        ...                    rope=(angles.cos(), angles.sin())).shape
        torch.Size([2, 64, 4, 32])
    """
    check_bool(OP, "return_lse", return_lse)
    check_bool(OP, "interleaved", interleaved)
    for name, t in (
        ("q", q), ("k_cache", k_cache), ("v_cache", v_cache), ("seqlens_k", seqlens_k),
    ):  # fmt: skip
        check_tensor(OP, name, t)
    check_tensor(OP, "block_table", block_table, optional=True)
    block = as_int(OP, "block", block, minimum=2, maximum=2**31 - 1)
    check_cache(OP, q, k_cache, v_cache, block_table is not None, True)
    for name, t in (("k_cache", k_cache), ("v_cache", v_cache)):
        check_dtype_of(OP, name, t, "q", q)
        check_head_dim(OP, name, t)
    factor = scale_or_default(OP, scale, q)
    if scale is not None:
        check_scale(OP, factor)
    check_lengths(OP, q, q.shape[0], seqlens_k, block_table)
    held = capacity(k_cache, block_table)
    if topk is not None:
        topk = as_int(OP, "topk", topk, minimum=1)
    ok = isinstance(share, str) and share in ("none", "queries", "heads")
    check(ok, OP, "share", "must be 'none', 'queries' or 'heads'", share)
    blocks = held // block
    topk = blocks if topk is None else min(topk, blocks)
    tables = _as_tables(q, rope, min(held, (topk + 2) * block + q.shape[1] - 1))
    if reads_values(seqlens_k):
        check_lengths_values(OP, k_cache, seqlens_k, block_table)
    if held == 0 or q.shape[1] == 0:
        batch, count, heads = q.shape[:3]
        lse = q.new_full((batch, heads, count), -torch.inf, dtype=_wide(q))
        empty = q.new_zeros((batch, count, heads, v_cache.shape[3]))
        return (empty, lse) if return_lse else empty
    lengths = seqlens_k.long().clamp(0, held)
    call = _Call(
        _Cache(k_cache, v_cache, block_table, lengths - 1), lengths - q.shape[1], held, block, topk,
        _Rope(tables[0], tables[1], interleaved) if tables else None, factor, backend,
    )  # fmt: skip
    out, lse = call.local(q)
    if topk:
        far, far_lse = call.retrieved(q, share)
        outs = torch.cat([out.transpose(1, 2)[None], far])  # [1 + topk, B, H, Sq, Dv]
        lses = torch.cat([lse[None], far_lse])
        out, lse = merge_attention_states(outs.transpose(2, 3), lses, backend=backend)
    return (out, lse) if return_lse else out


def _wide(q: Tensor) -> torch.dtype:
    return torch.promote_types(q.dtype, torch.float32)


def _as_tables(
    q: Tensor, rope: tuple[Tensor, Tensor] | None, positions: int
) -> tuple[Tensor, ...] | None:
    if rope is None:
        return None
    pair = isinstance(rope, tuple | list) and len(rope) == 2
    check(pair, OP, "rope", "must be (cos, sin)", type(rope).__name__)
    for t in rope:
        check_tensor(OP, "rope", t)
    cos, sin = (t.to(_wide(q)) for t in rope)
    positions, pairs = max(positions, 1), q.shape[3] // 2
    shape = cos.dim() == 2 and cos.shape[0] >= positions and 1 <= cos.shape[1] <= pairs
    rule = f"must have shape [positions, pairs], {positions} positions or more, 1 to {pairs} pairs"
    check(shape, OP, "rope", rule, cos.shape)
    check(sin.shape == cos.shape, OP, "rope", "must have cos and sin of one shape", sin.shape)
    for t in (cos, sin):
        check_small(OP, "rope", t, q)
    return cos, sin


class _Rope(NamedTuple):
    cos: Tensor
    sin: Tensor
    interleaved: bool

    def turn(self, x: Tensor, at: Tensor) -> Tensor:
        """x [..., D] rotated to positions at, [...] or fewer dimensions before D of size 1."""
        cos, sin = (t[at.clamp(0, len(t) - 1)] for t in (self.cos, self.sin))
        return rotate(x.to(cos.dtype), cos, sin, self.interleaved).to(x.dtype)


class _Cache(NamedTuple):
    """Keys and values, dense or paged, and the position of each request's newest key."""

    k: Tensor
    v: Tensor
    block_table: Tensor | None
    newest: Tensor  # [B], -1 for a request without keys

    def places(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """The first two indices into k and v of positions [B, ...], clamped to the newest key."""
        of_request = (-1, *[1] * (positions.dim() - 1))
        request = torch.arange(len(positions), device=positions.device).view(of_request)
        positions = torch.minimum(positions, self.newest.view(of_request)).clamp(min=0)
        if self.block_table is None:
            return request, positions
        pages, size = self.k.shape[:2]
        page = self.block_table[request, positions // size].long()
        exists = (page >= 0) & (page < pages)  # a request without keys may have none
        return page.where(exists, 0), positions % size

    def landmarks(self, count: int, block: int) -> Tensor:
        """Keys [B, count, Hk, D] of the landmarks of the first `count` blocks."""
        if self.block_table is None:
            return self.k[:, block - 1 :: block]
        last = torch.arange(1, count + 1, device=self.k.device) * block - 1
        return self.k[self.places(last.expand(len(self.newest), -1))]


class _Call(NamedTuple):
    """One call: its local tokens and its retrieved blocks."""

    cache: _Cache
    begin: Tensor  # [B], the position of the first query; negative where there are fewer keys
    held: int  # keys that a request can hold
    block: int
    topk: int  # at most held // block
    rope: _Rope | None
    scale: float
    backend: str | None

    @property
    def complete(self) -> Tensor:
        """[B], number of complete blocks before the local tokens."""
        return self.begin.clamp(min=0) // self.block

    @property
    def origin(self) -> Tensor:
        """[B], position in the tables of the first local token: after topk + 1 slots, or its
        position in the request if there are fewer blocks before it.
        """
        return self.complete.clamp(max=self.topk + 1) * self.block

    def queries(self, q: Tensor) -> Tensor:
        """q rotated to its positions among the local tokens."""
        if self.rope is None:
            return q
        first = self.origin + self.begin - self.complete * self.block
        at = first[:, None] + torch.arange(q.shape[1], device=q.device)
        return self.rope.turn(q, at[:, :, None])

    def local(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """Attention [B, Sq, H, Dv] to the block in which the queries begin and later keys, and its
        log Z [B, H, Sq].
        """
        row = torch.arange(min(self.block - 1 + q.shape[1], self.held), device=q.device)
        if q.shape[1] == 1:  # the landmark is left out
            row = row[: self.block - 1]
        first = self.complete * self.block
        positions = first[:, None] + row
        present = positions <= self.cache.newest[:, None]
        places = self.cache.places(positions)
        absent = ~present[..., None, None]
        k, v = (t[places].masked_fill(absent, 0) for t in (self.cache.k, self.cache.v))
        q = self.queries(q)
        if self.rope is not None:
            k = self.rope.turn(k, (self.origin[:, None] + row)[:, :, None])
        if q.shape[1] == 1:
            hidden = torch.zeros_like(present, dtype=q.dtype).masked_fill(~present, -torch.inf)
            out, lse = attention(
                q, k, v, bias=hidden[:, None, None], scale=self.scale, return_lse=True,
                backend=self.backend,
            )  # fmt: skip
            return out, lse
        return self._rows_of_queries(q, k, v, self.begin - first)

    def _rows_of_queries(
        self, q: Tensor, k: Tensor, v: Tensor, first: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Landmark attention of the queries, which are rows first [B] and later of the local
        keys.
        """
        batch, count = q.shape[:2]
        requests = torch.arange(batch, device=q.device)[:, None]
        source = torch.arange(k.shape[1], device=q.device) - first[:, None]
        is_query = (source >= 0) & (source < count)
        rows = q[requests, source.clamp(0, max(count - 1, 0))]
        out, lse = landmark_attention(
            rows.masked_fill(~is_query[..., None, None], 0), k, v, block=self.block,
            scale=self.scale, return_lse=True, backend=self.backend,
        )  # fmt: skip
        row = first[:, None] + torch.arange(count, device=q.device)
        absent = row < 0  # a request with fewer keys than queries
        row = row.clamp(0, max(k.shape[1] - 1, 0))
        out = out[requests, row].masked_fill(absent[..., None, None], 0)
        lse = lse.transpose(1, 2)[requests, row].masked_fill(absent[..., None], -torch.inf)
        return out, lse.transpose(1, 2)

    def retrieved(self, q: Tensor, share: Share) -> tuple[Tensor, Tensor]:
        """Attention [topk, B, H, Sq, Dv] to the tokens of each retrieved block, and the logits
        [topk, B, H, Sq] of their landmarks.
        """
        q = self.queries(q)
        with torch.no_grad():
            chosen = self._choose(q, share)
        if chosen.shape[2] == 1:
            return self._blocks(q, chosen)
        steps = range(0, q.shape[1], AT_ONCE)
        parts = [self._blocks(q[:, i : i + AT_ONCE], chosen[:, :, i : i + AT_ONCE]) for i in steps]
        outs, logits = (torch.cat(t, 3) for t in zip(*parts, strict=True))
        return outs, logits

    def _choose(self, q: Tensor, share: Share) -> Tensor:
        """Blocks [B, H, Sq, topk], or [B, H, 1, topk] if queries share them: ascending, -1 after
        the last.
        """
        count = self.held // self.block
        landmarks = self.cache.landmarks(count, self.block)
        complete = self.complete
        # the newest topk blocks on their own slots, older ones on the first slot
        if self.rope is not None:
            oldest = (complete - self.topk - 1).clamp(min=0)[:, None]
            slot = (torch.arange(count, device=q.device) - oldest).clamp(min=0)
            landmarks = self.rope.turn(landmarks, ((slot + 1) * self.block - 1)[:, :, None])
        scores = kv_block_scores(q, landmarks, scale=self.scale, backend=self.backend)
        if share != "none":
            beyond = torch.arange(count, device=q.device) >= complete[:, None, None, None]
            scores = scores.masked_fill(beyond | scores.isnan(), -torch.inf).log_softmax(3)
            scores = scores.amax(1 if share == "heads" else 2, keepdim=True)
            scores = scores.expand(-1, q.shape[2] if share == "heads" else -1, -1, -1)
        lengths = complete.to(torch.int32)[:, None].expand(-1, scores.shape[1] * scores.shape[2])
        chosen, _ = topk_select(
            scores.flatten(0, 2),
            self.topk,
            lengths=lengths.flatten().contiguous(),
            backend=self.backend,
        )
        return chosen.long().view(*scores.shape[:3], self.topk)

    def _blocks(self, q: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Attention to the tokens of the chosen blocks [B, H, Sq | 1, topk]."""
        batch, count, heads = q.shape[:3]
        sharing = count if chosen.shape[2] == 1 else 1
        token = torch.arange(self.block, device=q.device)
        absent = (chosen < 0)[..., None, None]
        group = max(heads // max(self.cache.k.shape[2], 1), 1)
        head = torch.arange(heads, device=q.device) // group
        places = self.cache.places(chosen.clamp(min=0)[..., None] * self.block + token)
        listed = (*places, head[None, :, None, None, None])
        keys, values = (t[listed].masked_fill(absent, 0) for t in (self.cache.k, self.cache.v))
        if self.rope is not None:
            keys = self.rope.turn(keys, self._slots(chosen)[..., None] * self.block + token)
        rows = q.transpose(1, 2).unflatten(2, (chosen.shape[2], sharing))
        rows = rows[:, :, :, None].expand(-1, -1, -1, self.topk, -1, -1).flatten(0, 3)[:, :, None]
        keys, values = (t.flatten(0, 3)[:, :, None] for t in (keys, values))
        last = self.block - 1
        options: dict[str, Any] = {
            "scale": self.scale, "return_lse": True, "backend": self.backend,
        }  # fmt: skip
        out, _ = attention(rows, keys[:, :last], values[:, :last], **options)
        # the lse over one key is q.k
        _, logits = attention(rows, keys[:, last:], values[:, last:], **options)
        shape = (batch, heads, chosen.shape[2], self.topk)
        out = out[:, :, 0].unflatten(0, shape).permute(3, 0, 1, 2, 4, 5).flatten(3, 4)
        logits = logits[:, 0].unflatten(0, shape).masked_fill(absent[..., 0], -torch.inf)
        return out, logits.permute(3, 0, 1, 2, 4).flatten(3, 4)

    def _slots(self, chosen: Tensor) -> Tensor:
        """Slots of the retrieved blocks, [B, H, Sq | 1, topk]."""
        complete = self.complete[:, None, None, None]
        rank = torch.arange(self.topk, device=chosen.device)
        newest = chosen >= (complete - self.topk).clamp(min=0)
        return rank + (newest & (complete > self.topk))
