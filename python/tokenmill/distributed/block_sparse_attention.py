"""block_sparse_attention over a sequence sharded over ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .._call.autocast import Autocast
from .._call.choose import choose
from .._call.run import call as run
from .._check import check, check_bool
from ..reference.sparse.transpose_block_list import listed_entries
from ..sparse.block_sparse_attention import SPEC, lower
from ._blocks import arrange
from ._group import Group, records_gradients
from .sequence import Layout, Piece, check_starts, layout_of_shard

OP = "distributed.block_sparse_attention"


@Autocast(lower=("q", "k", "v")).applied
def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    counts: Tensor,
    *,
    block_q: int,
    block_k: int,
    causal: bool = False,
    num_sink: int = 0,
    num_recent: int = 0,
    scale: float | None = None,
    softcap: float = 0.0,
    mesh: DeviceMesh | None = None,
    group: dist.ProcessGroup | None = None,
    length: int | None = None,
    sizes: Sequence[int] | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Softmax self-attention of query blocks to listed key blocks, over a sequence sharded over
    ranks.

    Each rank passes the queries, keys and values of its own tokens, as sharded by
    :func:`shard_sequence` in contiguous order, and the lists of its own queries, with block ids of
    the whole sequence. It gets their rows of :func:`tokenmill.block_sparse_attention` over the
    whole sequence. Queries are not sent; each rank receives only the key and value blocks named by
    its lists and by sink and recent keys, per KV head. A single rank makes the plain call.

    Every rank that has tokens starts at a multiple of block_q and of block_k (see ``sizes``). The
    last rank may have any number of tokens, and ranks may have none.

    Args:
        q: ``[B, n, H, D]`` with the n tokens of this rank, float16, bfloat16 or float32 (float64 on
            the reference).
        k, v: ``[B, n, Hk, D]`` and ``[B, n, Hk, Dv]`` of the same tokens, Hk a divisor of H.
        indices: int32 ``[B, 1 | Hk | H, R, K]`` with R = ceil(n / block_q): for this rank's query
            blocks, with block ids of the whole sequence. K may differ between ranks. An id counts
            if it is in range and greater than every id before it.
        counts: int32 ``[B, 1 | Hk | H, R]``, number of entries of each list, clamped to 0 to K.
        block_q, block_k: queries of a row and keys of an entry, powers of two up to 128.
        causal: a query sees no later key.
        num_sink: number of sink (first) keys of the whole sequence, always seen.
        num_recent: number of recent (last) keys, up to the query itself, likewise; only with
            causal.
        scale: factor of q.k; None = 1/sqrt(D).
        softcap: logits become softcap * tanh(logits / softcap); 0 = off.
        mesh, group: a one-dimensional device mesh, or a process group; None = all ranks.
        length: number of tokens of the whole sequence. None: the sum of sizes, or equal shards on
            all ranks.
        sizes: number of tokens of each rank. None: the rule of :func:`shard_sequence`.
        return_lse: also return lse.
        backend: as in :func:`tokenmill.block_sparse_attention`.

    Returns:
        out ``[B, n, H, Dv]`` in the dtype of q; with return_lse also lse ``[B, H, n]`` float32,
        natural log, also differentiable. Gradients of q, k and v are with respect to the sum of the
        losses of all ranks; gradients of keys and values are summed in float32 in rank order.
        Deterministic. A rank without tokens takes part in the forward and in the backward: it must
        call both.

    Raises:
        RuntimeError: naming argument, rule and value, before anything is sent. PeerError: a
            collective failed, naming rank and group. If arguments that must agree differ between
            ranks, all ranks raise.

    Complexity: the operations of the rank's rows. A rank sends the owner of each block B Hk bytes,
    a mask of the blocks it needs, and block_k (D + Dv) elements for each block, request and KV head
    that another rank needs; as many come back in the backward. The host waits for the masks.

    Paper: as :func:`tokenmill.block_sparse_attention`.

    Example:
        >>> import torch, torch.distributed as dist, tokenmill.distributed as tmd
        >>> store = dist.HashStore()
        >>> dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        >>> x = torch.randn(1, 128, 2, 16)
        >>> indices = torch.tensor([[[[0, -1], [0, 1]]]], dtype=torch.int32)
        >>> counts = torch.tensor([[[1, 2]]], dtype=torch.int32)
        >>> tmd.block_sparse_attention(x, x, x, indices, counts, block_q=64, block_k=32).shape
        torch.Size([1, 128, 2, 16])
        >>> dist.destroy_process_group()
    """
    check_bool(OP, "return_lse", return_lse)
    lowered = lower(
        q, k, v, indices, counts, block_q=block_q, block_k=block_k, causal=causal,
        num_sink=num_sink, num_recent=num_recent, scale=scale, softcap=softcap, op=OP,
    )  # fmt: skip
    ranks, where = prepare(OP, lowered, mesh, group, length, sizes, backend)
    call = SPEC.forward.record(*lowered)
    if ranks.size > 1 and where.length > 0 and q.shape[0] * q.shape[2] > 0:
        call = _on_this_rank(call, ranks, where)
    out, lse, _ = run(SPEC, tuple(call), None, backend)
    return (out, lse) if return_lse else out


def prepare(
    op: str,
    lowered: tuple[Any, ...],
    mesh: DeviceMesh | None,
    group: dist.ProcessGroup | None,
    length: int | None,
    sizes: Sequence[int] | None,
    backend: str | None,
    **alike: Any,
) -> tuple[Group, Layout]:
    """Checks a call of the operator on the tokens of this rank; `alike`: arguments that must agree
    on all ranks.
    """
    SPEC.forward.check(*lowered, float64=True, op=op)
    a = SPEC.forward.record(*lowered)
    tokens = a.q.shape[1]
    check(a.k.shape[1] == tokens, op, "k", f"must have the {tokens} tokens of q", a.k.shape[1])
    choose(SPEC, lowered, backend, op)
    ranks = Group(op, mesh, group)
    where = layout_of_shard(ranks, "q", tokens, length, "contiguous", sizes)
    check_starts(op, where, max(a.block_q, a.block_k), "block_q and block_k")
    options = ("block_q", "block_k", "causal", "num_sink", "num_recent", "scale", "softcap")
    ranks.check_alike(
        tokens=where.sizes,
        heads=(a.q.shape[2], a.k.shape[2], a.q.shape[3], a.v.shape[3]),
        batch=a.q.shape[0],
        dtype=a.q.dtype,
        requires_grad=records_gradients(a.q, a.k, a.v),
        **{name: getattr(a, name) for name in options},
        **alike,
    )
    return ranks, where


def _on_this_rank(call: Any, ranks: Group, where: Layout) -> Any:
    """The call with compact keys and values, and lists of their blocks."""
    blocks = -(-where.length // call.block_k)
    last = _last(call, where, where.pieces[ranks.rank][0])
    listed = listed_entries(call.indices, call.counts, last.end)
    needed = _needed(call, listed, last, blocks)
    loan, slot = arrange(ranks, where, call.block_k, needed, last)
    indices, counts = _renumbered(call.indices, listed, slot)
    k, v = loan.borrow(call.k, call.v)
    return call._replace(k=k, v=v, indices=indices, counts=counts)


def _last(call: Any, where: Layout, own: Piece) -> Piece:
    """Blocks that must stay at the end of the compact keys. Causal: recent keys and the rank's own
    blocks, because positions count from the end. Otherwise the last block, if it is partial.
    """
    if own.size == 0:
        return Piece(0, 0)
    if not call.causal:
        return Piece(where.length // call.block_k, -(-where.length // call.block_k))
    first = own.first // call.block_k
    recent = -(-max(call.num_recent - 1, 0) // call.block_k)  # blocks before the rank's own
    return Piece(max(first - recent, 0), -(-own.end // call.block_k))


def _needed(call: Any, listed: Tensor, last: Piece, blocks: int) -> Tensor:
    """[B, Hk, blocks]: whether this rank needs a block."""
    batch, lists = call.indices.shape[:2]
    kv_heads = call.k.shape[2]
    mask = listed.new_zeros((batch, lists, blocks + 1))
    ids = torch.where(listed, call.indices, blocks)
    mask.scatter_(-1, ids.flatten(2).long(), True)
    mask = mask[..., :blocks]
    if lists > kv_heads:  # one list per query head
        mask = mask.unflatten(1, (kv_heads, lists // kv_heads)).any(2)
    mask = mask.expand(batch, kv_heads, blocks).contiguous()
    mask[..., : min(-(-call.num_sink // call.block_k), last.end)] = True
    if call.causal:
        mask[..., last.first : last.end] = True
    return mask


def _renumbered(indices: Tensor, listed: Tensor, slot: Tensor) -> tuple[Tensor, Tensor]:
    """The lists with slots instead of block ids, without invalid entries."""
    lists, entries = indices.shape[1], indices.shape[3]
    if lists == 1:  # all KV heads need the same blocks
        slot = slot[:, :1]
    elif lists > slot.shape[1]:
        slot = slot.repeat_interleave(lists // slot.shape[1], 1)
    ids = torch.where(listed, indices, 0).flatten(2).long()
    moved = slot.gather(-1, ids).view_as(indices)
    # Slots ascend with block ids, so sorting only closes gaps.
    moved = torch.where(listed, moved, torch.iinfo(torch.int64).max).sort(-1).values
    counts = listed.sum(-1)
    there = torch.arange(entries, device=indices.device) < counts[..., None]
    return torch.where(there, moved, -1).int(), counts.int()
