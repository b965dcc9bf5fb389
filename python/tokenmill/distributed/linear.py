"""linear_attention over a sequence sharded over ranks.

Each rank computes the state of its own tokens from zero, all ranks gather these states and their
decays, and each combines, in float32 and in rank order, the initial state of its tokens:

    S_0 = initial_state,    S_(r+1) = e^(sum of log_decay on r) S_r + state of r from zero

The amount of communication does not depend on the length.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .._call.autocast import Autocast
from .._check import (
    check,
    check_cu_seqlens_values,
    check_qkv,
    check_tensor,
    check_text,
    reads_values,
)
from ..linear import linear_attention as plain_linear_attention
from ..linear._state import check_decay_values
from ..linear.linear_attention import FORWARD, OUT, FeatureMap, decay_of_slopes, lower
from ._group import Group, records_gradients
from .sequence import Layout, Order, layout_of_shard

OP = "distributed.linear_attention"
LIGHTNING = "distributed.lightning_attention"
on_one: Any = plain_linear_attention  # without its overloads, which options do not match


@Autocast(lower=("q", "k", "v")).applied
def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mesh: DeviceMesh | None = None,
    group: dist.ProcessGroup | None = None,
    order: Order = "contiguous",
    length: int | None = None,
    sizes: Sequence[int] | None = None,
    log_decay: Tensor | None = None,
    feature_map: FeatureMap = "identity",
    scale: float | None = None,
    normalize: bool = False,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    chunk_size: int | None = None,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Causal linear attention over a sequence sharded over ranks.

    Each rank passes the queries, keys and values of its own tokens, as sharded by
    :func:`shard_sequence` in contiguous order, and gets their rows of
    :func:`tokenmill.linear_attention` over the whole sequence. One gather of a state per rank,
    whatever the length, provides the preceding state; states and decays are combined in float32 in
    rank order. A single rank makes the plain call.

    Args:
        q: ``[B, n, H, D]`` with the n tokens of this rank, or packed ``[n, H, D]`` with cu_seqlens.
        k, v: ``[B, n, Hk, D]`` and ``[B, n, Hk, Dv]`` (packed ``[n, Hk, ...]``), the same tokens.
        mesh, group: a one-dimensional device mesh, or a process group; None = all ranks.
        order: "contiguous". Zigzag order is refused: the state passes from token to token, and
            contiguous order already balances the work.
        length: number of tokens of the whole sequence. None: the sum of sizes, or equal shards on
            all ranks.
        sizes: number of tokens of each rank. None: the rule of :func:`shard_sequence`.
        log_decay: float32, at most 0: ``[H]``, the same on all ranks, or gates ``[B, n, H]`` or
            ``[B, n, H, D]`` (packed ``[n, ...]``) of the tokens of this rank. None: no decay.
        feature_map, scale, normalize, chunk_size, backend: as in
            :func:`tokenmill.linear_attention`, the same on all ranks.
        initial_state: float32 ``[B, H, F, Dv]`` (normalize: Dv + 1), the state before the first
            token of the whole sequence; packed: one per packed sequence. The same on all ranks.
        return_final_state: also return the state after the last token of the whole sequence
            (packed: of each packed sequence), the same on all ranks.
        cu_seqlens: int32 ``[N + 1]``, offsets of packed sequences in the whole sequence; they may
            span several ranks. The same on every rank. Read on the host.
        out: as in :func:`tokenmill.linear_attention`, for the rows of this rank.

    Returns:
        out ``[B, n, H, Dv]`` (packed ``[n, H, Dv]``) in the dtype of q; with return_final_state
        also the state, float32. Gradients of q, k, v and gates are with respect to the sum of the
        losses of all ranks; gradients of a constant log_decay and of initial_state are this rank's
        contribution, to be summed over the ranks as for any replicated parameter. Deterministic.

    Raises:
        RuntimeError: naming argument, rule and value, before anything is sent. PeerError: a
            collective failed, naming rank and group. If arguments that must agree differ between
            ranks, all ranks raise.

    Complexity: twice the operations of the rank's rows, half of them for the state that other ranks
    need (packed: only for the sequence that continues after the shard). A rank sends B H F Dv
    numbers (B Hk F Dv without decay) to every other rank, forward and backward, in one step each;
    packed with return_final_state also the states of the sequences that end on it.

    Paper: LASP-2: Rethinking Sequence Parallelism for Linear Attention (Sun et al. 2025); Mamba-2
    (Dao and Gu 2024), section 8.2.

    Example:
        >>> import torch, torch.distributed as dist, tokenmill.distributed as tmd
        >>> store = dist.HashStore()
        >>> dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        >>> x, gate = torch.randn(1, 16, 4, 32), -torch.rand(1, 16, 4)
        >>> out, state = tmd.linear_attention(x, x, x, log_decay=gate, return_final_state=True)
        >>> out.shape, state.shape
        (torch.Size([1, 16, 4, 32]), torch.Size([1, 4, 32, 32]))
        >>> dist.destroy_process_group()
    """
    options: dict[str, Any] = {
        "feature_map": feature_map,
        "scale": scale,
        "normalize": normalize,
        "chunk_size": chunk_size,
    }
    how = {**options, "log_decay": log_decay, "initial_state": initial_state}
    how |= {"return_final_state": return_final_state, "cu_seqlens": cu_seqlens}
    check_tensor(OP, "cu_seqlens", cu_seqlens, optional=True)
    check_tensor(OP, "out", out, optional=True)
    packed = cu_seqlens is not None
    check_qkv(OP, q, k, v, 3 if packed else 4, True)
    check_text(OP, "order", order)
    rule = "must be 'contiguous': the state goes from a token to the next"
    check(order == "contiguous", OP, "order", rule, order)
    ranks = Group(OP, mesh, group)
    where = layout_of_shard(ranks, "q", q.shape[-3], length, order, sizes)
    if ranks.size == 1:
        found: Tensor | tuple[Tensor, Tensor] = on_one(q, k, v, out=out, backend=backend, **how)
        return found
    lowered = lower(q, k, v, **how)
    if out is None:
        FORWARD.check(*lowered, float64=True)
    else:
        OUT.check(*lowered, out, float64=True)
    log_decay = FORWARD.record(*lowered).log_decay
    if reads_values(q):
        check_decay_values(OP, log_decay)
    ends = None
    if cu_seqlens is not None:
        ends = check_cu_seqlens_values(OP, "cu_seqlens", cu_seqlens, where.length)
    ranks.check_alike(
        tokens=where.sizes,
        heads=(q.shape[-2], k.shape[-2], q.shape[-1], v.shape[-1]),
        batch=tuple(q.shape[:-3]),
        dtype=q.dtype,
        cu_seqlens=ends,
        log_decay=None if log_decay is None else log_decay.dim(),
        initial_state=initial_state,
        return_final_state=return_final_state,
        out=out is not None,
        requires_grad=records_gradients(q, k, v, log_decay),
        **options,
    )
    options["backend"] = backend
    shard = Shard(ranks, hold(where, ends, return_final_state), q, k, v, log_decay, out, options)
    if ends is None:
        return _of_sequences(shard, initial_state, return_final_state)
    begin = where.pieces[ranks.rank][0].first
    return _of_packed(shard, [end - begin for end in ends], initial_state, return_final_state)


def lightning_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    *,
    scale: float | None = 1.0,
    **options: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`linear_attention` with a constant decay per head, as in
    :func:`tokenmill.lightning_attention`.

    Args:
        q, k, v: as in :func:`linear_attention`.
        slopes: ``[H]`` float32, nonnegative, the same on all ranks.
        scale: as in :func:`linear_attention`, but 1 by default, as in the published models.
        options: every other keyword of :func:`linear_attention` except log_decay, which is -slopes.

    Returns:
        As :func:`linear_attention`. The gradient of slopes is this rank's contribution.

    Raises:
        RuntimeError: naming argument, rule and value, before anything is sent.

    Complexity: as :func:`linear_attention`.

    Paper: Lightning Attention-2 (Qin et al. 2024); MiniMax-01 (2025).

    Example:
        >>> import torch, torch.distributed as dist
        >>> import tokenmill as tm, tokenmill.distributed as tmd
        >>> store = dist.HashStore()
        >>> dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        >>> x = torch.randn(1, 16, 4, 32)
        >>> tmd.lightning_attention(x, x, x, tm.lightning_slopes(4)).shape
        torch.Size([1, 16, 4, 32])
        >>> dist.destroy_process_group()
    """
    log_decay = decay_of_slopes(LIGHTNING, q, slopes)
    return linear_attention(q, k, v, log_decay=log_decay, scale=scale, **options)


class Held(NamedTuple):
    """The sequences on a rank. An unpacked sequence spans all ranks."""

    since: int  # rank where the sequence that continues here begins
    before: int  # tokens, at the start of the shard, of a sequence that began on an earlier rank
    behind: int  # tokens, at the end of the shard, of a sequence that continues on a later rank
    first: int  # sequences first .. end - 1 begin here
    end: int
    ended: int  # number of sequences that end here


def hold(where: Layout, ends: list[int] | None, to_the_end: bool) -> list[Held]:
    """The sequences on each rank; ends: cu_seqlens of packed sequences, starting at 0. to_the_end:
    an unpacked sequence is treated as continuing after the last rank, for its final state.
    """
    if ends is None:
        *others, last = where.sizes
        tails = [*others, last if to_the_end else 0]
        return [Held(0, n, m, 0, 0, 0) for n, m in zip(where.sizes, tails, strict=True)]
    found: list[Held] = []
    since, sequences = 0, len(ends) - 1
    for rank, (piece,) in enumerate(where.pieces):
        first, end = (bisect.bisect_left(ends, at, hi=sequences) for at in piece)
        if rank + 1 == len(where.pieces):
            end = sequences  # including empty sequences after all tokens
        before = min(ends[first], piece.end) - piece.first
        behind = piece.end - max(ends[end - 1], piece.first) if ends[end] > piece.end else 0
        ended = end - first + (before > 0) - (behind > 0)
        found.append(Held(since if before else rank, before, behind, first, end, ended))
        since = rank if end > first else since
    return found


def tied(x: Tensor, *others: Tensor | None, zeros: bool) -> Tensor:
    """x, with autograd edges to others, so that every rank takes part in the backward of the
    gather, even if it reads nothing of it or has no tokens. zeros: others get gradients of 0, so
    that the backward continues through them; otherwise they have a gradient from elsewhere.
    """
    found: Tensor = _Tied.apply(x, zeros, *others)
    return found


class _Tied(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, zeros: bool, *others: Tensor | None) -> Tensor:
        ctx.like = [None if t is None or not zeros else (t.shape, t.dtype) for t in others]
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        zeros = (like and g.new_zeros(like[0], dtype=like[1]) for like in ctx.like)
        return g, None, *zeros


class Shard(NamedTuple):
    """A call on the tokens of one rank."""

    group: Group
    plan: list[Held]  # one per rank
    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None
    out: Tensor | None
    options: dict[str, Any]

    def cut(self, t: Tensor | None, first: int, count: int, packed: bool) -> Any:
        """A range of this rank's tokens: [B, count, ...] or, packed, [count, ...]. Tensors without
        a token dimension are returned as is. For an empty range see tied().
        """
        dim = self.q.dim() - 3
        if t is None or t.dim() == 1:
            return t
        t = t if count else t.detach()
        t = t if count == t.shape[dim] else t.narrow(dim, first, count)
        return t if packed or dim == 1 else t[None]

    def run(
        self,
        first: int,
        count: int,
        initial_state: Tensor | None,
        return_final_state: bool,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Any]:
        """out and final state of a range of tokens, which is one sequence unless cu_seqlens splits
        it.
        """
        given = (self.q, self.k, self.v, self.log_decay, self.out)
        q, k, v, log_decay, out = (self.cut(t, first, count, cu_seqlens is not None) for t in given)
        found = on_one(
            q, k, v,
            log_decay=log_decay,
            initial_state=initial_state,
            return_final_state=return_final_state,
            cu_seqlens=cu_seqlens,
            out=out,
            **self.options,
        )  # fmt: skip
        out, final_state = found if return_final_state else (found, None)
        return (out if count else self.tied(out, self.q, initial_state)), final_state

    def tied(self, x: Tensor, *others: Tensor | None) -> Tensor:
        """x, with autograd edges to others, keys, values and decays, like a result of some
        tokens.
        """
        zeros = self.q.shape[-3] == 0
        return tied(x, self.k, self.v, self.log_decay, *others, zeros=zeros)


class States:
    """The states of all ranks over their trailing tokens (Held.behind), from zero, and their decay
    factors.
    """

    def __init__(self, shard: Shard) -> None:
        self.tokens = [h.behind for h in shard.plan]
        count = self.tokens[shard.group.rank]
        first = shard.q.shape[-3] - count
        given = (shard.k, shard.v, shard.log_decay)
        k, v, log_decay = (shard.cut(t, first, count, False) for t in given)
        self.constant = log_decay if log_decay is not None and log_decay.dim() == 1 else None
        # Without decay the query heads of a KV head share a state. No query reads it here.
        heads = k.shape[-2] if log_decay is None else shard.q.shape[-2]
        self.copies = shard.q.shape[-2] // heads
        queries = k.new_zeros(k.shape[-1]).expand(*k.shape[:2], heads, -1)
        _, state = on_one(
            queries, k, v, log_decay=log_decay, return_final_state=True, **shard.options
        )
        sent = [state if count else shard.tied(state)]
        if log_decay is not None and log_decay.dim() > 1:
            sent.append(log_decay.sum(1, dtype=torch.float64).to(state.dtype))
        flat = torch.cat([t.flatten() for t in sent])[None]
        together = shard.group.gather(flat, 0, [1] * shard.group.size)
        parts = together.split([t.numel() for t in sent], 1)
        # [P, B, H / copies, F, E], and for gates [P, B, H] or, per channel, [P, B, H, F]
        self.found = [part.unflatten(1, t.shape) for part, t in zip(parts, sent, strict=True)]

    def after(self, state: Tensor | None, ranks: Iterable[int]) -> Tensor:
        """The state [B, H, F, E] after the tokens of some ranks, from the state before them."""
        states, *sums = (t.unbind() for t in self.found)
        zero = self._of_heads(torch.zeros_like(states[0]))
        found = tied(zero if state is None else state, self.found[0], zeros=False)
        for rank in ranks:
            if self.tokens[rank] == 0:
                continue
            if sums:
                decay = sums[0][rank].exp()[..., None]
                found = found * (decay if decay.dim() == 4 else decay[..., None])
            elif self.constant is not None:
                found = found * (self.tokens[rank] * self.constant).exp()[:, None, None]
            found = found + self._of_heads(states[rank])
        return found

    def _of_heads(self, state: Tensor) -> Tensor:
        return state if self.copies == 1 else state.repeat_interleave(self.copies, 1)


def _of_sequences(
    shard: Shard, initial_state: Tensor | None, return_final_state: bool
) -> Tensor | tuple[Tensor, Tensor]:
    states, rank = States(shard), shard.group.rank
    start = states.after(initial_state, range(rank))
    out, _ = shard.run(0, shard.plan[rank].before, start, False)
    if not return_final_state:
        return out
    return out, states.after(start, range(rank, shard.group.size))


def _of_packed(
    shard: Shard, ends: list[int], initial_state: Tensor | None, return_final_state: bool
) -> Tensor | tuple[Tensor, Tensor]:
    """ends: offsets relative to the first token of this rank."""
    rank = shard.group.rank
    since, before, behind, first, end, ended = shard.plan[rank]
    start = initial_state
    if start is not None:
        start = start[first - 1 : first] if before else None
    start = States(shard).after(start, range(since, rank))
    start = tied(start, initial_state, zeros=True)
    # Runs even without tokens: see tied().
    out, final = shard.run(0, before, start, return_final_state)
    outs, finals = [out[0]], [final]
    if end > first:
        tokens = shard.q.shape[0]
        cu_seqlens = [min(ends[n], tokens) - before for n in range(first, end + 1)]
        out, final = shard.run(
            before,
            tokens - before,
            None if initial_state is None else initial_state[first:end],
            return_final_state,
            torch.tensor(cu_seqlens, dtype=torch.int32, device=shard.q.device),
        )
        outs.append(out)
        finals.append(final)
    if shard.out is not None:
        whole = shard.out
    else:
        whole = outs[0] if end == first else torch.cat(outs)
    if not return_final_state:
        return whole
    # If the shard ends within a sequence, that sequence continues: the last that begins here, or
    # else the one from an earlier rank.
    here = ended - (begun := max(end - first - (behind > 0), 0))
    finals = [finals[0][:here], *(t[:begun] for t in finals[1:])]
    rows = shard.tied(torch.cat(finals), shard.q, start)
    return whole, shard.group.gather(rows, 0, [h.ended for h in shard.plan])
