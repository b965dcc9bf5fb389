"""landmark_decode: a step of decoding over the blocks whose landmarks score highest."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._autocast import Autocast
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
from ..select.kv_block_scores import kv_block_scores
from ..select.topk_select import topk_select
from .landmark_attention import check_block

OP = "landmark_decode"


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
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """One step of decoding with :func:`landmark_attention`, over the blocks whose landmarks score
    highest.

    The newest token of each request, whose key is in the cache, sees its own block, and of the
    complete blocks before it the topk with the greatest landmark logits, for each head its own.
    The weights are those of the grouped softmax over these blocks alone.

    Args:
        q: ``[B, 1, H, D]`` float16, bfloat16 or float32 (float64 on the reference), D up to 256.
        k_cache, v_cache: ``[B, S, Hk, D]`` and ``[B, S, Hk, Dv]``, Hk a divisor of H; with
            block_table pages ``[P, page size, Hk, D]`` and ``[P, page size, Hk, Dv]``, the page
            size a power of two.
        seqlens_k: int32 ``[B]``, keys of each request, from 0 to S (pages: pages times page size).
            Keys beyond them are never read.
        block_table: int32 ``[B, pages]``, the pages of each request in order; entries beyond its
            last key may hold anything. Blocks count the request's tokens, wherever pages end.
        block: tokens of a block with its landmark, at least 2.
        topk: blocks to retrieve, at least 1. None: all, which is the last row of
            :func:`landmark_attention`.
        scale: factor of q.k; None = 1/sqrt(D).
        return_lse: also return lse.
        backend: "cpu", "cuda", "triton", "reference" or None (see :func:`tokenmill.explain`).

    Returns:
        out ``[B, 1, H, Dv]`` in the dtype of q; with return_lse also log Z, ``[B, H, 1]`` float32.
        A request without keys, or whose only key is that of a landmark, has out 0 and lse -inf.

    Raises:
        RuntimeError: naming argument, rule and value. On a GPU a length is clamped to what the
            cache holds, and a page that does not exist is read as page 0.

    Complexity: reads S / block landmarks and (topk + 1) block keys for a head, and copies no more
    of the cache than these.

    Paper: Landmark Attention (Mohtashami and Jaggi 2023), section 3.2. Positions are those with
    which keys were written to the cache.

    Example:
        >>> import torch, tokenmill as tm
        >>> k, v = (torch.randn(2, 512, 2, 32) for _ in range(2))
        >>> lengths = torch.tensor([512, 301], dtype=torch.int32)
        >>> tm.landmark_decode(torch.randn(2, 1, 4, 32), k, v, seqlens_k=lengths, topk=2).shape
        torch.Size([2, 1, 4, 32])
    """
    check_bool(OP, "return_lse", return_lse)
    for name, t in (
        ("q", q), ("k_cache", k_cache), ("v_cache", v_cache), ("seqlens_k", seqlens_k),
    ):  # fmt: skip
        check_tensor(OP, name, t)
    check_tensor(OP, "block_table", block_table, optional=True)
    block = as_int(OP, "block", block)
    check_block(OP, block)
    check_cache(OP, q, k_cache, v_cache, block_table is not None, True)
    for name, t in (("k_cache", k_cache), ("v_cache", v_cache)):
        check_dtype_of(OP, name, t, "q", q)
        check_head_dim(OP, name, t)
    check(q.shape[1] == 1, OP, "q", "must have 1 token", q.shape[1])
    factor = scale_or_default(OP, scale, q)
    if scale is not None:
        check_scale(OP, factor)
    check_lengths(OP, q, q.shape[0], seqlens_k, block_table)
    if topk is not None:
        topk = as_int(OP, "topk", topk)
        check(topk >= 1, OP, "topk", "must be at least 1", topk)
    if reads_values(seqlens_k):
        check_lengths_values(OP, k_cache, seqlens_k, block_table)
    newest = seqlens_k.long().clamp(0, capacity(k_cache, block_table)) - 1
    cache = _Cache(k_cache, v_cache, block_table, newest)
    first = (newest.clamp(min=0) // block * block)[:, None]  # of the own block
    chosen, logits = _retrieve(q, cache, first, block, topk, factor, backend)
    own = first[:, :, None].expand(-1, q.shape[2], -1)
    starts = torch.cat([own, chosen.clamp(min=0) * block], 2)
    ends = torch.minimum(starts + block - 1, newest[:, None, None] + 1)
    outs, lses = _blocks_of_keys(q, cache, starts, ends, block, factor, backend)
    lses = torch.cat([lses[:, :, :1], torch.where(chosen < 0, -torch.inf, logits)], 2)
    out, lse = merge_attention_states(
        outs.permute(2, 0, 1, 3)[:, :, None], lses.permute(2, 0, 1)[..., None], backend=backend
    )
    return (out, lse) if return_lse else out


class _Cache(NamedTuple):
    """Keys and values, dense or in pages, and the position of each request's newest key."""

    k: Tensor
    v: Tensor
    block_table: Tensor | None
    newest: Tensor  # [B], -1 without keys

    def places(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """The first two indices into k and v of positions [B, ...]. One behind the newest key is
        taken for that key."""
        of_request = (-1, *[1] * (positions.dim() - 1))
        request = torch.arange(len(positions), device=positions.device).view(of_request)
        positions = torch.minimum(positions, self.newest.view(of_request)).clamp(min=0)
        if self.block_table is None:
            return request, positions
        pages, size = self.k.shape[:2]
        page = self.block_table[request, positions // size].long()
        exists = (page >= 0) & (page < pages)  # not of a request without keys
        return page.where(exists, 0), positions % size

    def landmarks(self, count: int, block: int) -> Tensor:
        """Keys [B, count, Hk, D] of the landmarks of so many blocks."""
        if self.block_table is None:
            return self.k[:, block - 1 :: block]
        last = torch.arange(1, count + 1, device=self.k.device) * block - 1
        return self.k[self.places(last.expand(len(self.newest), -1))]


def _landmark_logits(q: Tensor, landmarks: Tensor, scale: float, backend: str | None) -> Tensor:
    """[B, H, n] of q [B, 1, H, D] and landmarks [B, n, Hk, D], at least float32."""
    if not (torch.is_grad_enabled() and (q.requires_grad or landmarks.requires_grad)):
        # The bits of a score do not depend on how many there are, as those of a product do.
        return kv_block_scores(q, landmarks, scale=scale, backend=backend)[:, :, 0]
    wide = torch.promote_types(q.dtype, torch.float32)
    kv_heads = landmarks.shape[2]
    grouped = q[:, 0].unflatten(1, (kv_heads, q.shape[2] // max(kv_heads, 1))).to(wide)
    return scale * torch.einsum("bhgd,bnhd->bhgn", grouped, landmarks.to(wide)).flatten(1, 2)


def _retrieve(
    q: Tensor, cache: _Cache, first: Tensor, block: int, topk: int | None, scale: float,
    backend: str | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Blocks [B, H, n] for each head, -1 after the last, and the logits of their landmarks."""
    batch, heads = q.shape[0], q.shape[2]
    count = capacity(cache.k, cache.block_table) // block
    if count == 0:
        return first.new_zeros((batch, heads, 0)), q.new_zeros((batch, heads, 0))
    logits = _landmark_logits(q, cache.landmarks(count, block), scale, backend)
    complete = (first // block).to(torch.int32).expand(-1, heads)
    wanted = count if topk is None else min(topk, count)
    chosen, _ = topk_select(
        logits.flatten(0, 1), wanted, lengths=complete.flatten().contiguous(), backend=backend
    )
    chosen = chosen.long().unflatten(0, (batch, heads))
    return chosen, logits.gather(2, chosen.clamp(min=0))


def _blocks_of_keys(
    q: Tensor, cache: _Cache, starts: Tensor, ends: Tensor, block: int, scale: float,
    backend: str | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention of each head to tokens starts .. ends - 1 [B, H, n] of its blocks: [B, H, n, Dv]
    and lse [B, H, n]."""
    batch, heads, parts = starts.shape
    longest = min(block - 1, capacity(cache.k, cache.block_table))
    positions = starts[..., None] + torch.arange(longest, device=q.device)
    head = torch.arange(heads, device=q.device) // max(heads // max(cache.k.shape[2], 1), 1)
    places = (*cache.places(positions), head[None, :, None, None])
    absent = positions >= ends[..., None]
    keys, values = (
        t[places].masked_fill(absent[..., None], 0).flatten(0, 2)[:, :, None]
        for t in (cache.k, cache.v)
    )
    queries = q[:, 0, :, None].expand(-1, -1, parts, -1).flatten(0, 2)[:, None, None]
    hidden = torch.zeros_like(absent, dtype=q.dtype).masked_fill(absent, -torch.inf)
    out, lse = attention(
        queries, keys, values, bias=hidden.flatten(0, 2)[:, None, None], scale=scale,
        return_lse=True, backend=backend,
    )  # fmt: skip
    return (out[:, 0, 0].unflatten(0, (batch, heads, parts)),
            lse[:, 0, 0].unflatten(0, (batch, heads, parts)))  # fmt: skip
