"""hip_attention: attention to sink and recent keys, and to blocks found by HiP's search."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypedDict, overload

import torch
from torch import Tensor
from torch.nn.functional import pad
from typing_extensions import Never, Unpack

from .._call.autocast import Autocast
from .._check import (
    as_int,
    check,
    check_bool,
    check_device_of,
    check_dtype_of,
    check_longest,
    check_tensor,
    fail,
    reads_values,
    show,
)
from .._kv_cache import capacity
from .._other_names import refuse, refuses_other_names
from ..select.hip_block_select import Bound, HeadReduce, Representative, hip_block_select
from .block_sparse_attention import block_sparse_attention
from .query_blocks import QueryBlocks, pages_of_packed, pages_of_rows
from .sparse_decode_attention import sparse_decode_attention

OP = "hip_attention"
MAX_DECODE = 8  # query tokens


@dataclass
class HipLists:
    """Block lists of one layer, kept between decode steps of :func:`hip_attention`."""

    lists: tuple[Tensor, Tensor] | None = None  # as returned by hip_block_select
    age: int = 0  # tokens since the lists were computed


class HipOptions(TypedDict, total=False):
    """Keywords of :func:`hip_attention` other than return_lse, which decides the type of the
    result.
    """

    budget: int
    block_q: int
    block_k: int
    stride_q: int
    representative: Representative
    num_sink: int
    num_recent: int
    bound: Bound
    start: tuple[Tensor, Tensor] | None
    restart_span: int
    causal: bool
    head_reduce: HeadReduce
    scale: float | None
    softcap: float
    seqlens_q: Tensor | None
    seqlens_k: Tensor | None
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    max_seqlen_q: int | None
    max_seqlen_k: int | None
    block_table: Tensor | None
    lists: HipLists | None
    refresh_interval: int | None
    num_splits: int
    backend: str | None


@overload
def hip_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    return_lse: Literal[False] = ...,
    **options: Unpack[HipOptions],
) -> Tensor: ...


@overload
def hip_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    return_lse: Literal[True],
    **options: Unpack[HipOptions],
) -> tuple[Tensor, Tensor]: ...


@Autocast(lower=("q", "k", "v"), cache="k", paged=True).applied
@refuses_other_names
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
    seqlens_q: Tensor | None = None,
    seqlens_k: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    block_table: Tensor | None = None,
    lists: HipLists | None = None,
    refresh_interval: int | None = None,
    num_splits: int = 0,
    backend: str | None = None,
    **other: Never,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Softmax attention in O(S log S): to sink keys, recent keys, and blocks found by HiP.

    :func:`hip_block_select`, then :func:`block_sparse_attention` on its lists, or
    :func:`sparse_decode_attention` where the queries are the newest tokens of a cache (at most 8,
    causal) or the keys are paged. A sequence of at most num_sink + budget + num_recent keys gets
    exact attention, unless lists of an earlier step are reused.

    Requests of different lengths are padded on the right (seqlens_q and seqlens_k), or packed
    (cu_seqlens_q), with keys that are packed, paged or padded. The result of a request does not
    depend on the other requests, bit for bit (for padded requests, unless a gradient is needed).

    In decode the lists of one step can be reused by the next steps: keep a :class:`HipLists` for
    each layer and set refresh_interval, the number of tokens until a new search. Tokens appended
    meanwhile are among the last num_recent, so none of them is missed.

    Args:
        q: ``[B, Sq, H, D]`` float16, bfloat16 or float32 (float64 on the reference), D up to 256;
            packed ``[T, H, D]`` with cu_seqlens_q.
        k, v: ``[B, S, Hk, D]`` and ``[B, S, Hk, Dv]``, Hk a divisor of H; packed ``[Tk, Hk, ...]``
            with cu_seqlens_k; with block_table pages ``[pages, page_size, Hk, ...]``, page_size a
            power of two.
        budget, stride_q, representative, bound, start, restart_span, head_reduce: parameters of the
            search (:func:`hip_block_select`).
        block_q, block_k: queries that share a list, and keys of a block: powers of two up to 128.
        num_sink, num_recent: numbers of sink and recent keys, which every query attends to
            (num_recent: only with causal). num_sink is rounded up to whole blocks: a partial block
            would cost the list an entry.
        causal: a query sees no later key. False requires q and k of four dimensions.
        scale: factor of q·k in the attention; None = 1/sqrt(D).
        softcap: logits become softcap * tanh(logits / softcap); 0 = off.
        return_lse: also return lse.
        seqlens_q: ``[B]`` int32, number of queries of each request, the first rows of q. None: Sq.
            Later rows have out 0 and lse -inf.
        seqlens_k: ``[B]`` int32, number of keys of each request, including the keys of its queries.
            None: all.
        cu_seqlens_q: ``[B + 1]`` int32, offsets of packed queries.
        cu_seqlens_k: the same for packed keys. None with a packed k: cu_seqlens_q.
        max_seqlen_q, max_seqlen_k: bounds on the lengths of packed sequences; None = all tokens.
            A max_seqlen_q below block_q saves work, as for decode rows only (1).
        block_table: ``[B, P]`` int32, the pages of each request.
        lists: the lists of earlier steps, reused and updated in place (only in decode).
        refresh_interval: number of tokens for which lists are used, 1 to num_recent. None: 1.
        num_splits: as in :func:`sparse_decode_attention`. 0 = automatic in decode, else 1. With n >
            0 the bits of a decoded request do not depend on the other requests either.
        backend: "cpu", "cuda", "triton", "reference" or None (see :func:`tokenmill.explain`).

    Returns:
        out ``[B, Sq, H, Dv]`` (packed ``[T, H, Dv]``) in the dtype of q; with return_lse also lse
        ``[B, H, Sq]`` (``[H, T]``) float32, natural log. Gradients of q, k and v through the
        attention (not the choice of keys), except in decode, over pages and for packed tokens.

    Raises:
        RuntimeError: naming argument, rule and value.

    Complexity: 2 (D + Dv) (num_sink + budget + num_recent) operations per query, and the search.
    With pages or cu_seqlens extra memory for a copy of q, for the lists, for P entries of the table
    per query block, and for a copy of packed keys and values; the same with seqlens_q, plus a copy
    of k and v where a gradient is needed.

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
    if other:
        refuse(hip_attention, other)
    for name, t in (("q", q), ("k", k), ("v", v)):
        check_tensor(OP, name, t)
    for name, given in (
        ("seqlens_q", seqlens_q), ("seqlens_k", seqlens_k), ("cu_seqlens_q", cu_seqlens_q),
        ("cu_seqlens_k", cu_seqlens_k), ("block_table", block_table),
    ):  # fmt: skip
        check_tensor(OP, name, given, optional=True)
    packed = cu_seqlens_q is not None
    rule = "must have 4 dimensions [B, S, H, D]"
    rule = "must have 3 dimensions [T, H, D] (packed)" if packed else rule
    check(q.dim() == (3 if packed else 4), OP, "q", rule, q.dim())
    block_q, num_recent = as_int(OP, "block_q", block_q), as_int(OP, "num_recent", num_recent)
    block_k, num_sink = as_int(OP, "block_k", block_k), as_int(OP, "num_sink", num_sink)
    check_bool(OP, "causal", causal)
    check_bool(OP, "return_lse", return_lse)
    num_sink = whole_sinks(OP, num_sink, block_k)
    tokens = q.shape[-3]
    ragged = packed or seqlens_q is not None
    decoding = causal and not ragged and tokens <= block_q
    decoding = decoding and (block_table is not None or tokens <= MAX_DECODE)
    in_blocks = packed or (block_table is not None and not decoding)
    learning = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
    if in_blocks and not causal:
        fail(OP, "causal", "must be True with pages or packed tokens", causal)
    if packed and cu_seqlens_k is None and k.dim() == 3:
        cu_seqlens_k = cu_seqlens_q
        max_seqlen_k = max_seqlen_q if max_seqlen_k is None else max_seqlen_k
    max_q = _bound("max_seqlen_q", max_seqlen_q, cu_seqlens_q)
    max_k = _bound("max_seqlen_k", max_seqlen_k, cu_seqlens_k)
    interval = _interval(lists, refresh_interval, num_recent, decoding)
    kept = lists.lists if lists is not None and lists.age + tokens <= interval else None
    found = kept or hip_block_select(
        q, k, budget=budget, block_q=block_q, block_k=block_k, stride_q=stride_q,
        representative=representative, num_sink=num_sink, num_recent=num_recent, bound=bound,
        start=start, restart_span=restart_span, causal=causal, head_reduce=head_reduce,
        seqlens_q=seqlens_q, seqlens_k=seqlens_k, cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k, block_table=block_table, backend=backend,
    )  # fmt: skip
    if lists is not None:
        lists.age = tokens + (lists.age if kept else 0)
        lists.lists = found
    sizes: dict[str, Any] = {
        "block_k": block_k, "num_sink": num_sink, "num_recent": num_recent, "scale": scale,
        "softcap": softcap, "backend": backend,
    }  # fmt: skip
    if in_blocks or (seqlens_q is not None and causal and not learning):
        requests = _Requests(seqlens_q, seqlens_k, cu_seqlens_q, cu_seqlens_k, max_q, max_k,
                             block_table)  # fmt: skip
        out, lse = _attend_in_blocks(q, k, v, found, requests, block_q, num_splits, sizes)
    elif not decoding or tokens == 0:
        sizes |= {"block_q": block_q, "causal": causal, "return_lse": True}
        out, lse = _attend_padded(q, k, v, found, seqlens_q, seqlens_k, sizes)
    else:
        if seqlens_k is None:
            maximum = capacity(k, block_table)
            seqlens_k = torch.full((q.shape[0],), maximum, dtype=torch.int32, device=q.device)
        indices, counts = (t[:, :, 0] for t in found)
        out, lse = sparse_decode_attention(
            q, k, v, indices, counts, seqlens_k=seqlens_k, block_table=block_table,
            num_splits=num_splits, **sizes,
        )  # fmt: skip
    return (out, lse) if return_lse else out


@dataclass
class _Requests:
    seqlens_q: Tensor | None
    seqlens_k: Tensor | None
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    max_q: int | None
    max_k: int | None
    block_table: Tensor | None


def _attend_in_blocks(
    q: Tensor, k: Tensor, v: Tensor, found: tuple[Tensor, Tensor], x: _Requests, block_q: int,
    num_splits: int, sizes: dict[str, Any],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Runs each block of queries as a decode step: the newest tokens of the keys up to its end."""
    check_values_of(OP, k, v)
    indices, counts = found
    batch, table = q.shape[0], x.block_table
    if x.cu_seqlens_q is not None:
        batch = len(x.cu_seqlens_q) - 1
    rows = q if q.dim() == 3 else q.flatten(0, 1)
    if len(rows) == 0 or batch == 0:
        out = q.new_zeros(*q.shape[:-1], v.shape[-1])
        lse = torch.full_like(out[..., 0], -torch.inf, dtype=torch.float32)
        return out, lse.transpose(-1, -2)
    if x.cu_seqlens_q is not None:
        blocks = QueryBlocks.packed(x.cu_seqlens_q, len(q), x.max_q, block_q)
        indices, counts = indices.transpose(0, 1), counts.T
    else:
        blocks = QueryBlocks.padded(q, x.seqlens_q, block_q)
        indices, counts = (t.transpose(1, 2).flatten(0, 1) for t in found)
    lengths = x.seqlens_k
    if x.cu_seqlens_k is not None:
        lengths = x.cu_seqlens_k.diff()
        maximum = len(k) if x.max_k is None else min(x.max_k, len(k))
        k, v, table = pages_of_packed(k, v, x.cu_seqlens_k, maximum)
    elif table is None:
        if lengths is None:
            lengths = torch.full((batch,), k.shape[1], device=q.device)
        k, v, table = pages_of_rows(k, v)
    if lengths is None:
        lengths = torch.full((batch,), capacity(k, table), device=q.device)
    out, lse = sparse_decode_attention(
        blocks.take(rows), k, v, indices, counts.contiguous(), block_table=table[blocks.request],
        seqlens_k=blocks.keys(lengths.clamp(0, capacity(k, table))), num_splits=max(num_splits, 1),
        **sizes,
    )  # fmt: skip
    out, lse = blocks.give(out, 0.0), blocks.give(lse.transpose(1, 2), -torch.inf)
    if q.dim() == 4:
        out, lse = out.unflatten(0, q.shape[:2]), lse.unflatten(0, q.shape[:2])
    return out, lse.transpose(-1, -2).contiguous()


def _attend_padded(
    q: Tensor, k: Tensor, v: Tensor, found: tuple[Tensor, Tensor], seqlens_q: Tensor | None,
    seqlens_k: Tensor | None, sizes: dict[str, Any],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """With seqlens_q: zeroes the rows after the queries and keys of each request, and pads the keys
    so that valid queries keep their positions when all rows count as queries.
    """
    if seqlens_q is None:
        return block_sparse_attention(q, k, v, *found, seqlens_k=seqlens_k, **sizes)
    check_values_of(OP, k, v)
    rows, capacity = q.shape[1], k.shape[1]
    queries = seqlens_q.long().clamp(0, rows)
    keys = torch.full_like(queries, capacity)
    if seqlens_k is not None:
        keys = seqlens_k.long().clamp(0, capacity)
    row = torch.arange(max(rows, capacity), device=q.device)
    hidden_q = (row[:rows] >= queries[:, None])[..., None, None]
    hidden_k = (row[:capacity] >= keys[:, None])[..., None, None]
    q, k, v = q.masked_fill(hidden_q, 0), k.masked_fill(hidden_k, 0), v.masked_fill(hidden_k, 0)
    if sizes["causal"]:
        keys = (keys - queries + rows).clamp(min=0)
        k, v = (pad(t, (0, 0, 0, 0, 0, rows)) for t in (k, v))
    out, lse = block_sparse_attention(q, k, v, *found, seqlens_k=keys.int(), **sizes)
    hidden = hidden_q.squeeze(-1).transpose(1, 2)
    return out.masked_fill(hidden_q, 0), lse.masked_fill(hidden, -torch.inf)


def _bound(name: str, given: int | None, cu_seqlens: Tensor | None) -> int | None:
    """Upper bound on the lengths of packed sequences."""
    if given is None:
        return None
    if cu_seqlens is None:
        fail(OP, name, f"requires cu_seqlens_{name[-1]}", given)
    given = as_int(OP, name, given)
    check(given >= 0, OP, name, "must not be negative", given)
    if reads_values(cu_seqlens):
        check_longest(OP, name, cu_seqlens.tolist(), given)
    return given


def check_values_of(op: str, k: Tensor, v: Tensor) -> None:
    if v.shape[:-1] != k.shape[:-1]:
        rule = f"must have the shape of k up to the head dimension, {show(k.shape)}"
        fail(op, "v", rule, v.shape)
    check_dtype_of(op, "v", v, "k", k)
    check_device_of(op, "v", v, "k", k)


def whole_sinks(op: str, num_sink: int, block_k: int) -> int:
    """num_sink rounded up to whole blocks; unchanged for invalid block sizes, refused later."""
    check(num_sink >= 0, op, "num_sink", "must not be negative", num_sink)
    return -(-num_sink // block_k) * block_k if block_k >= 1 else num_sink


def _interval(
    lists: HipLists | None, refresh_interval: int | None, num_recent: int, decoding: bool
) -> int:
    """Number of tokens for which lists are used."""
    if lists is None:
        if refresh_interval is not None:
            fail(OP, "refresh_interval", "requires lists", refresh_interval)
        return 0
    check(isinstance(lists, HipLists), OP, "lists", "must be a HipLists or None", lists)
    check(decoding, OP, "lists", "are for decoding: causal, up to 8 queries", decoding)
    interval = 1 if refresh_interval is None else refresh_interval
    interval = as_int(OP, "refresh_interval", interval)
    rule = f"must be 1 to num_recent, {num_recent}"
    check(1 <= interval <= max(num_recent, 1), OP, "refresh_interval", rule, interval)
    return interval
