"""indexer_topk_select over keys sharded over ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .._call.autocast import Autocast
from .._call.choose import choose
from .._check import (
    check,
    check_cu_seqlens_values,
    check_tensor,
    reads_values,
)
from ..select.indexer_topk_select import SPEC, lower
from ..select.indexer_topk_select import indexer_topk_select as select
from ..select.rules import check_length_values, rows_of_request
from ._group import Group
from .sequence import Piece, check_starts, layout_of_shard
from .topk_select import best_of_ranks

OP = "distributed.indexer_topk_select"


@Autocast(lower=("q", "k", "weights"), cache="k", paged=True).applied
def indexer_topk_select(
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    topk: int,
    *,
    mesh: DeviceMesh | None = None,
    group: dist.ProcessGroup | None = None,
    sizes: Sequence[int] | None = None,
    causal: bool = True,
    activation: str = "relu",
    block_k: int = 1,
    num_sink: int = 0,
    num_recent: int = 0,
    seqlens_k: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    block_table: Tensor | None = None,
    k_scale: Tensor | None = None,
    return_values: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    """The topk keys that an indexer scores highest, for each query, over keys sharded over ranks by
    position.

    Rank r stores the positions after the positions of lower ranks, as in
    :func:`sparse_decode_attention`. Each rank lists the best of its own keys, one gather collects
    these candidates, and every rank selects among them. The lists equal
    :func:`tokenmill.indexer_topk_select` on all keys, on every rank, with ties by position. No key
    is sent.

    Args:
        q: ``[B, Sq, Hi, D]``, or packed ``[T, Hi, D]`` with cu_seqlens_q; the same on every rank.
        k: ``[B, n, D]``, n positions of this rank; with block_table pages of this rank, as in
            :func:`tokenmill.indexer_topk_select`.
        weights: ``[B, Sq, Hi]`` (packed ``[T, Hi]``), the same on every rank.
        topk: number of entries of a list, 1 to 65536.
        mesh, group: a one-dimensional device mesh, or a process group; None = all ranks.
        sizes: number of positions of each rank. None: equal on all ranks.
        block_k: keys of a block. Every rank with positions starts at a multiple of it.
        seqlens_k: int32 ``[B]``, total number of keys of each request over all ranks, the same on
            all.
            None: all positions.
        cu_seqlens_q: int32 ``[B + 1]``, offsets of packed queries; the same on every rank.
        block_table: int32 ``[B, P]``, the pages of this rank's positions.
        k_scale: for keys in float8_e4m3fn: ``[1]`` or one per key of this rank, ``[B, n]``, in
            pages ``[pages, page_size]``.
        causal, activation, num_sink, num_recent, return_values, backend: as in
            :func:`tokenmill.indexer_topk_select`, for the whole sequence.

    Returns:
        (indices, counts[, values]) as in :func:`tokenmill.indexer_topk_select`, with positions (or
        blocks) of the whole sequence; the same on every rank. Not differentiable. Scores are
        rounded as in a call on each rank's keys.

    Raises:
        RuntimeError: naming argument, rule and value. PeerError: a collective failed.
            If arguments that must agree differ between ranks, all ranks raise.

    Complexity: 2 Hi D operations per pair of a query and a visible key of this rank; 8 bytes for
    each of min(topk, n) candidates per query, from each rank to all.

    Paper: as :func:`tokenmill.indexer_topk_select`.

    Example:
        >>> import torch, torch.distributed as dist, tokenmill.distributed as tmd
        >>> store = dist.HashStore()
        >>> dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        >>> q, k, weights = torch.ones(1, 2, 2, 8), torch.zeros(1, 4, 8), torch.ones(1, 2, 2)
        >>> k[0, 1] = 1
        >>> tmd.indexer_topk_select(q, k, weights, 2)[0].tolist()
        [[[0, 1], [0, 1]]]
        >>> dist.destroy_process_group()
    """
    with _named():
        for name, t in (("q", q), ("k", k), ("weights", weights)):
            check_tensor(OP, name, t)
        rule = "must have 3 dimensions [B, S, D] or [pages, page_size, D]"
        check(k.dim() == 3, OP, "k", rule, k.dim())
        lowered = lower(
            q, k, weights, topk, causal=causal, activation=activation, block_k=block_k,
            num_sink=num_sink, num_recent=num_recent, seqlens_k=seqlens_k,
            cu_seqlens_q=cu_seqlens_q, block_table=block_table, k_scale=k_scale,
            return_values=return_values,
        )  # fmt: skip
        SPEC.forward.check(*lowered)
        choose(SPEC, lowered, backend, OP)
    call = SPEC.forward.record(*lowered)
    ranks = Group(OP, mesh, group)
    room = rows_of_request(k, block_table)
    where = layout_of_shard(ranks, "k", room, None, "contiguous", sizes, "positions")
    check_starts(OP, where, call.block_k, "block_k")
    rule = "must have less than 2^31 positions on all ranks"
    check(where.length < 2**31, OP, "k", rule, where.length)
    if seqlens_k is not None and reads_values(seqlens_k):
        check_length_values(OP, "seqlens_k", seqlens_k, where.length)
    if cu_seqlens_q is not None and reads_values(cu_seqlens_q):
        check_cu_seqlens_values(OP, "cu_seqlens_q", cu_seqlens_q, q.shape[0])
    values = reads_values(q)
    options = ("topk", "causal", "activation", "block_k", "num_sink", "num_recent")
    ranks.check_alike(
        sizes=where.sizes,
        q=tuple(q.shape),
        dtype=q.dtype,
        seqlens_k=seqlens_k.tolist() if values and seqlens_k is not None else None,
        cu_seqlens_q=cu_seqlens_q.tolist() if values and cu_seqlens_q is not None else None,
        return_values=return_values,
        block_table=block_table is not None,
        **{name: getattr(call, name) for name in options},
    )
    if ranks.size == 1:
        return select(
            q, k, weights, call.topk, causal=causal, activation=activation, block_k=call.block_k,
            num_sink=call.num_sink, num_recent=call.num_recent, seqlens_k=seqlens_k,
            cu_seqlens_q=cu_seqlens_q, block_table=block_table, k_scale=k_scale,
            return_values=return_values, backend=backend,
        )  # fmt: skip
    own = where.pieces[ranks.rank][0]
    positions, scores = _lists_of_this_rank(call, own, where.length, backend)
    rows = positions.shape[:-1]
    widths = [min(call.topk, -(-size // call.block_k)) for size in where.sizes]
    found = best_of_ranks(
        ranks, positions.flatten(0, -2), scores.flatten(0, -2), call.topk, widths,
        return_values=return_values, backend=backend,
    )  # fmt: skip
    return tuple(x.unflatten(0, rows) for x in found)


@contextlib.contextmanager
def _named() -> Iterator[None]:
    """Applies the rules of the operator, with this function's name in errors."""
    try:
        yield
    except RuntimeError as error:
        text = str(error).replace(f"tokenmill.{SPEC.name}:", f"tokenmill.{OP}:", 1)
        raise type(error)(text) from None


def _lists_of_this_rank(
    call: Any, own: Piece, total: int, backend: str | None
) -> tuple[Tensor, Tensor]:
    """Global ids, and scores, of the best of this rank's keys: [..., topk] each."""
    q, k, table = call.q, call.k, call.block_table
    batch = len(call.cu_seqlens_q) - 1 if call.cu_seqlens_q is not None else q.shape[0]
    if own.size == 0 or q.shape[0] == 0 or batch == 0:
        shape = (*q.shape[:-2], call.topk)
        wide = torch.promote_types(q.dtype, torch.float32)
        return q.new_full(shape, -1, dtype=torch.int32), q.new_full(shape, -torch.inf, dtype=wide)
    options: dict[str, Any] = {
        "activation": call.activation, "block_k": call.block_k, "return_values": True,
        "num_sink": max(call.num_sink - own.first, 0), "k_scale": call.k_scale, "backend": backend,
    }  # fmt: skip
    n = call.seqlens_k
    n = torch.full((batch,), total, dtype=torch.int32, device=q.device) if n is None else n
    # Keys up to the last one that is not recent, including keys of later ranks.
    end = n - min(call.num_recent, total) - own.first
    if not call.causal or (call.cu_seqlens_q is None and q.shape[1] == 1):
        found = select(
            q, k, call.weights, call.topk, causal=False, seqlens_k=end.clamp(0, own.size),
            cu_seqlens_q=call.cu_seqlens_q, block_table=table, **options,
        )  # fmt: skip
        indices, scores = found[0], found[2]
    else:
        if table is None:  # several sequences then read the pages in place
            table = torch.arange(batch, dtype=torch.int32, device=q.device)[:, None]
        indices, scores = _lists_of_queries(call, table, end, own.size, options)
    return torch.where(indices < 0, -1, indices + own.first // call.block_k), scores


def _lists_of_queries(
    call: Any, table: Tensor, end: Tensor, size: int, options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Lists of causal queries, the last of which sees the first end[b] keys. The queries of a
    request form three sequences: those with none, some, and all of this rank's keys visible.
    """
    q, rows = call.q, call.q.shape[:-2]
    starts = call.cu_seqlens_q
    if starts is None:
        starts = torch.arange(len(q) + 1, dtype=torch.int32, device=q.device) * q.shape[1]
        q = q.flatten(0, 1)
    queries = starts.diff().clamp(min=0)
    some = torch.minimum((queries - end).clamp(min=0), queries)
    every = torch.minimum((queries - end + size).clamp(min=0), queries)
    first = starts[:-1]
    cuts = torch.stack([first, first + some, first + every], 1).flatten()
    cuts = torch.cat([cuts, starts[-1:]])
    none = torch.zeros_like(end)
    partly = (end - queries + every).clamp(0, size)
    both = []
    for causal, lengths in (
        (True, (none, partly, none)),
        (False, (none, none, torch.full_like(end, size))),
    ):
        found = select(
            q, call.k, call.weights.reshape(q.shape[:-1]), call.topk, causal=causal,
            seqlens_k=torch.stack(lengths, 1).flatten(), cu_seqlens_q=cuts,
            block_table=table.repeat_interleave(3, 0), **options,
        )  # fmt: skip
        both.append((found[0], found[2]))
    token = torch.arange(len(q), dtype=torch.int32, device=q.device)
    sees_all = (torch.searchsorted(cuts, token, right=True) % 3 == 0)[:, None]
    indices, scores = (torch.where(sees_all, b, a) for a, b in zip(*both, strict=True))
    return indices.unflatten(0, rows), scores.unflatten(0, rows)
