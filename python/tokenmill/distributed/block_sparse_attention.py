"""block_sparse_attention over a sequence whose tokens lie on several ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .._autocast import Autocast
from .._check import check, check_bool
from .._dispatch import call as run
from .._dispatch import choose
from ..reference.sparse._common import listed_entries
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
    r"""Softmax self-attention of blocks of queries to listed blocks of keys, of a sequence whose
    tokens are sharded over ranks.

    Each rank has the queries, keys and values of its own tokens, as :func:`shard_sequence` cuts
    them in contiguous order, and the lists of its own queries, with blocks of the whole sequence.
    It gets their rows of :func:`tokenmill.block_sparse_attention` of the whole sequence. Queries
    stay where they are; of keys and values each rank gets the blocks that its lists, sink and
    recent keys name, for each key head its own, and no others. One rank makes the plain call.

    Every rank that has tokens starts at a multiple of block_q and of block_k: ``sizes`` says where.
    The last one may have any number of tokens, and ranks may have none.

    Args:
        q: ``[B, n, H, D]`` with the n tokens of this rank, float16, bfloat16 or float32 (float64 on
            the reference).
        k, v: ``[B, n, Hk, D]`` and ``[B, n, Hk, Dv]`` of the same tokens, Hk a divisor of H.
        indices: int32 ``[B, 1 | Hk | H, R, K]`` with R = ceil(n / block_q): of this rank's query
            blocks, ids count blocks of the whole sequence. K may differ between ranks. An id counts
            if it is that of a block and greater than every id before it.
        counts: int32 ``[B, 1 | Hk | H, R]``, entries of each list, clamped to 0 to K.
        block_q, block_k: queries of a row and keys of an entry, powers of two up to 128.
        causal: a query sees no later key.
        num_sink: sink (first) keys of the whole sequence, always seen.
        num_recent: recent (last) keys, up to the query itself, likewise; with causal alone.
        scale: factor of q.k; None = 1/sqrt(D).
        softcap: logits become softcap * tanh(logits / softcap); 0 = off.
        mesh, group: a device mesh of one dimension, or a process group; None = all ranks.
        length: tokens of the whole sequence. None: the sum of sizes, or as many on every rank.
        sizes: tokens of each rank. None: the rule of :func:`shard_sequence`.
        return_lse: also return lse.
        backend: as in :func:`tokenmill.block_sparse_attention`.

    Returns:
        out ``[B, n, H, Dv]`` in the dtype of q; with return_lse also lse ``[B, H, n]`` float32,
        natural log, itself differentiable. Gradients of q, k and v are those of the sum of the
        losses of all ranks, those of keys and values added up in float32 in the order of the ranks.
        The same bits on every run. A rank without tokens takes part in the forward and in the
        backward: it must call both.

    Raises:
        RuntimeError: naming argument, rule and value, before anything is sent. PeerError: a
            collective failed, naming rank and group. Ranks that differ in what
            they must have in common all raise.

    Complexity: the operations of the rank's rows. A rank sends the owner of each block B Hk bytes,
    which say who needs it, and block_k (D + Dv) elements for each block, request and key head that
    another rank needs; as many come back in the backward. The host waits for the bytes.

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
    out, lse, _ = run(SPEC, tuple(call), backend)
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
    """Checks a call of the operator on the tokens of this rank; `alike` is the same on all."""
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
    """Blocks that must stay at the end of the keys. Causal: those of recent keys and the rank's
    own, for positions count from the end. Otherwise the last one, if it is not whole."""
    if own.size == 0:
        return Piece(0, 0)
    if not call.causal:
        return Piece(where.length // call.block_k, -(-where.length // call.block_k))
    first = own.first // call.block_k
    recent = -(-max(call.num_recent - 1, 0) // call.block_k)  # before the rank's own
    return Piece(max(first - recent, 0), -(-own.end // call.block_k))


def _needed(call: Any, listed: Tensor, last: Piece, blocks: int) -> Tensor:
    """[B, Hk, blocks]: which of them this rank needs."""
    batch, lists = call.indices.shape[:2]
    kv_heads = call.k.shape[2]
    mask = listed.new_zeros((batch, lists, blocks + 1))
    ids = torch.where(listed, call.indices, blocks)
    mask.scatter_(-1, ids.flatten(2).long(), True)
    mask = mask[..., :blocks]
    if lists > kv_heads:  # one for each query head
        mask = mask.unflatten(1, (kv_heads, lists // kv_heads)).any(2)
    mask = mask.expand(batch, kv_heads, blocks).contiguous()
    mask[..., : min(-(-call.num_sink // call.block_k), last.end)] = True
    if call.causal:
        mask[..., last.first : last.end] = True
    return mask


def _renumbered(indices: Tensor, listed: Tensor, slot: Tensor) -> tuple[Tensor, Tensor]:
    """The lists with slots in the place of blocks, without the entries that do not count."""
    lists, entries = indices.shape[1], indices.shape[3]
    if lists == 1:  # all key heads need the same
        slot = slot[:, :1]
    elif lists > slot.shape[1]:
        slot = slot.repeat_interleave(lists // slot.shape[1], 1)
    ids = torch.where(listed, indices, 0).flatten(2).long()
    moved = slot.gather(-1, ids).view_as(indices)
    # Slots ascend where blocks do, so that sorting closes gaps alone.
    moved = torch.where(listed, moved, torch.iinfo(torch.int64).max).sort(-1).values
    counts = listed.sum(-1)
    there = torch.arange(entries, device=indices.device) < counts[..., None]
    return torch.where(there, moved, -1).int(), counts.int()
