"""hip_attention: attention to sink and recent keys, and to blocks that HiP's search finds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, overload

import torch
from torch import Tensor

from .._autocast import Autocast
from .._check import as_int, check, check_bool, check_tensor, fail
from .._kv_cache import capacity
from ..select.hip_block_select import Bound, HeadReduce, Representative, hip_block_select
from .block_sparse_attention import block_sparse_attention
from .sparse_decode_attention import sparse_decode_attention

OP = "hip_attention"
MAX_DECODE = 8  # query tokens


@dataclass
class HipLists:
    """The lists of one layer between steps of decoding, for :func:`hip_attention`."""

    lists: tuple[Tensor, Tensor] | None = None  # as hip_block_select returns them
    age: int = 0  # tokens since they were chosen


@overload
def hip_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    budget: int = ...,
    block_q: int = ...,
    block_k: int = ...,
    stride_q: int = ...,
    representative: Representative = ...,
    num_sink: int = ...,
    num_recent: int = ...,
    bound: Bound = ...,
    start: tuple[Tensor, Tensor] | None = ...,
    restart_span: int = ...,
    causal: bool = ...,
    head_reduce: HeadReduce = ...,
    scale: float | None = ...,
    softcap: float = ...,
    return_lse: Literal[False] = ...,
    seqlens_k: Tensor | None = ...,
    block_table: Tensor | None = ...,
    lists: HipLists | None = ...,
    refresh_interval: int | None = ...,
    backend: str | None = ...,
) -> Tensor: ...


@overload
def hip_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    budget: int = ...,
    block_q: int = ...,
    block_k: int = ...,
    stride_q: int = ...,
    representative: Representative = ...,
    num_sink: int = ...,
    num_recent: int = ...,
    bound: Bound = ...,
    start: tuple[Tensor, Tensor] | None = ...,
    restart_span: int = ...,
    causal: bool = ...,
    head_reduce: HeadReduce = ...,
    scale: float | None = ...,
    softcap: float = ...,
    return_lse: Literal[True],
    seqlens_k: Tensor | None = ...,
    block_table: Tensor | None = ...,
    lists: HipLists | None = ...,
    refresh_interval: int | None = ...,
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...


@Autocast(lower=("q", "k", "v"), cache="k", paged=True).applied
def hip_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    budget: int = 512,
    block_q: int = 64,
    block_k: int = 2,
    stride_q: int = 2,
    representative: Representative = "middle",
    num_sink: int = 16,
    num_recent: int = 256,
    bound: Bound = "sample",
    start: tuple[Tensor, Tensor] | None = None,
    restart_span: int = 8,
    causal: bool = True,
    head_reduce: HeadReduce = "none",
    scale: float | None = None,
    softcap: float = 0.0,
    return_lse: bool = False,
    seqlens_k: Tensor | None = None,
    block_table: Tensor | None = None,
    lists: HipLists | None = None,
    refresh_interval: int | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Softmax attention in O(S log S): to sink keys, recent keys, and blocks that HiP finds.

    :func:`hip_block_select`, then :func:`block_sparse_attention` on its lists, or
    :func:`sparse_decode_attention` where the queries are the newest tokens of a cache (block_table
    is given, or there are at most 8 of them, causal). A sequence of at most num_sink + budget +
    num_recent keys gets exact attention, unless lists of an earlier step are reused.

    In decode the next steps can reuse the lists of one step: keep a :class:`HipLists` for each
    layer and say how many tokens may pass until a new search. Tokens that came meanwhile are among
    the last num_recent, so that none of them is missed.

    Args:
        q: ``[B, Sq, H, D]`` float16, bfloat16 or float32 (float64 on the reference), D up to 256.
        k, v: ``[B, S, Hk, D]`` and ``[B, S, Hk, Dv]``, Hk a divisor of H; with block_table pages
            ``[pages, page_size, Hk, ...]``, page_size a power of two.
        budget, stride_q, representative, bound, start, restart_span, head_reduce: of the search
            (:func:`hip_block_select`).
        block_q, block_k: queries that share a list, and keys of a block: powers of two up to 128.
        num_sink, num_recent: sink and recent keys, which every query attends to (num_recent: with
            causal alone). num_sink is rounded up to whole blocks: a block of which it held a part
            would cost the list an entry.
        causal: a query sees no later key.
        scale: factor of q·k in the attention; None = 1/sqrt(D).
        softcap: logits become softcap * tanh(logits / softcap); 0 = off.
        return_lse: also return lse.
        seqlens_k: ``[B]`` int32, keys of each request, those of its queries included. None: all.
        block_table: ``[B, P]`` int32, the pages of each request: decoding alone.
        lists: the lists of earlier steps, used again and replaced here (decoding alone).
        refresh_interval: tokens for which lists are used, 1 to num_recent. None: 1.
        backend: "cpu", "cuda", "triton", "reference" or None (see :func:`tokenmill.explain`).

    Returns:
        out ``[B, Sq, H, Dv]`` in the dtype of q; with return_lse also lse ``[B, H, Sq]`` float32,
        natural log. Gradients of q, k and v through the attention (not the choice of keys), except
        in decoding.

    Raises:
        RuntimeError: naming argument, rule and value.

    Complexity: that of its two parts: 2 (D + Dv) (num_sink + budget + num_recent) operations for a
    query, and the search.

    Paper: HiP Attention (Lee et al. 2024), sections 3 and 4; mask caching: section 4.2.

    Example:
        >>> import torch, tokenmill as tm
        >>> q, k, v = (torch.randn(1, 2048, 2, 32) for _ in range(3))
        >>> tm.hip_attention(q, k, v, budget=128, num_recent=64).shape
        torch.Size([1, 2048, 2, 32])
        >>> lists = tm.sparse.HipLists()
        >>> out = tm.hip_attention(q[:, -1:], k, v, lists=lists, refresh_interval=8)
        >>> out.shape, lists.age
        (torch.Size([1, 1, 2, 32]), 1)
    """
    for name, t in (("q", q), ("k", k), ("v", v)):
        check_tensor(OP, name, t)
    check(q.dim() == 4, OP, "q", "must have 4 dimensions [B, S, H, D]", q.dim())
    block_q, num_recent = as_int(OP, "block_q", block_q), as_int(OP, "num_recent", num_recent)
    block_k, num_sink = as_int(OP, "block_k", block_k), as_int(OP, "num_sink", num_sink)
    check_bool(OP, "causal", causal)
    check_bool(OP, "return_lse", return_lse)
    num_sink = whole_sinks(OP, num_sink, block_k)
    tokens = q.shape[1]
    decoding = causal and tokens <= block_q and (block_table is not None or tokens <= MAX_DECODE)
    if block_table is not None and not decoding:
        fail(OP, "block_table", "is for decoding: causal, up to block_q queries; q has", tokens)
    interval = _interval(lists, refresh_interval, num_recent, decoding)
    kept = lists.lists if lists is not None and lists.age + tokens <= interval else None
    found = kept or hip_block_select(
        q, k, budget=budget, block_q=block_q, block_k=block_k, stride_q=stride_q,
        representative=representative, num_sink=num_sink, num_recent=num_recent, bound=bound,
        start=start, restart_span=restart_span, causal=causal, head_reduce=head_reduce,
        seqlens_k=seqlens_k, block_table=block_table, backend=backend,
    )  # fmt: skip
    if lists is not None:
        lists.age = tokens + (lists.age if kept else 0)
        lists.lists = found
    if not decoding or tokens == 0:
        out, lse = block_sparse_attention(
            q, k, v, *found, block_q=block_q, block_k=block_k, causal=causal, num_sink=num_sink,
            num_recent=num_recent, scale=scale, softcap=softcap, seqlens_k=seqlens_k,
            return_lse=True, backend=backend,
        )  # fmt: skip
        return (out, lse) if return_lse else out
    if seqlens_k is None:
        most = capacity(k, block_table)
        seqlens_k = torch.full((q.shape[0],), most, dtype=torch.int32, device=q.device)
    indices, counts = (t[:, :, 0] for t in found)
    out, lse = sparse_decode_attention(
        q, k, v, indices, counts, block_k=block_k, seqlens_k=seqlens_k, block_table=block_table,
        num_sink=num_sink, num_recent=num_recent, scale=scale, softcap=softcap, backend=backend,
    )  # fmt: skip
    return (out, lse) if return_lse else out


def whole_sinks(op: str, num_sink: int, block_k: int) -> int:
    """num_sink rounded up to whole blocks; a block size that is refused later changes nothing."""
    check(num_sink >= 0, op, "num_sink", "must not be negative", num_sink)
    return -(-num_sink // block_k) * block_k if block_k >= 1 else num_sink


def _interval(
    lists: HipLists | None, refresh_interval: int | None, num_recent: int, decoding: bool
) -> int:
    """Tokens for which lists are used."""
    if lists is None:
        if refresh_interval is not None:
            fail(OP, "refresh_interval", "goes with lists alone", refresh_interval)
        return 0
    check(isinstance(lists, HipLists), OP, "lists", "must be a HipLists or None", lists)
    check(decoding, OP, "lists", "are for decoding: causal, up to 8 queries", decoding)
    interval = 1 if refresh_interval is None else refresh_interval
    interval = as_int(OP, "refresh_interval", interval)
    rule = f"must be 1 to num_recent, {num_recent}"
    check(1 <= interval <= max(num_recent, 1), OP, "refresh_interval", rule, interval)
    return interval
