"""Layout of the tokens of a sequence on the ranks of a group."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .._check import as_int, check, check_choice, check_tensor, fail
from ._group import Group

Order = Literal["contiguous", "zigzag"]


class Piece(NamedTuple):
    """Tokens first .. end - 1 of the sequence."""

    first: int
    end: int

    @property
    def size(self) -> int:
        return self.end - self.first


class Layout(NamedTuple):
    """The pieces of each rank, in the order in which they are stored."""

    pieces: tuple[tuple[Piece, ...], ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of tokens of each rank."""
        return tuple(sum(p.size for p in pieces) for pieces in self.pieces)

    @property
    def length(self) -> int:
        return sum(self.sizes)


def equal_pieces(length: int, count: int) -> list[Piece]:
    """`count` adjacent pieces, the first ones longer by one token, as in torch.tensor_split."""
    ends = [length // count * n + min(length % count, n) for n in range(count + 1)]
    return [Piece(*pair) for pair in itertools.pairwise(ends)]


def as_sizes(op: str, sizes: Any) -> list[int]:
    """Number of tokens of each rank, from a caller's argument."""
    try:
        return [as_int(op, "sizes", size) for size in sizes]
    except TypeError:
        fail(op, "sizes", "must be a sequence of integers", sizes)


def layout(op: str, length: int, ranks: int, order: str, sizes: Sequence[int] | None) -> Layout:
    check_choice(op, "order", order, "contiguous", "zigzag")
    if sizes is not None:
        check(order == "contiguous", op, "sizes", "must be None in zigzag order", sizes)
        counts = as_sizes(op, sizes)
        rule = f"must have one size for each of {ranks} ranks"
        check(len(counts) == ranks, op, "sizes", rule, sizes)
        check(all(n >= 0 for n in counts), op, "sizes", "must be 0 or more", sizes)
        check(sum(counts) == length, op, "sizes", f"must sum to the length {length}", sizes)
        ends = [sum(counts[:n]) for n in range(ranks + 1)]
        pairs = itertools.pairwise(ends)
        return Layout(tuple((Piece(*pair),) for pair in pairs))
    if order == "contiguous":
        return Layout(tuple((piece,) for piece in equal_pieces(length, ranks)))
    pieces = equal_pieces(length, 2 * ranks)
    return Layout(tuple((pieces[r], pieces[2 * ranks - 1 - r]) for r in range(ranks)))


def layout_of_shard(
    group: Group,
    name: str,
    tokens: int,
    length: int | None,
    order: str,
    sizes: Sequence[int] | None,
    noun: str = "tokens",
) -> Layout:
    """Layout of a sequence of which this rank has `tokens`, by the rule of
    :func:`shard_sequence`.
    """
    op = group.op
    if length is None:
        length = tokens * group.size if sizes is None else sum(as_sizes(op, sizes))
    length = as_int(op, "length", length)
    check(length >= 0, op, "length", "must be 0 or more", length)
    found = layout(op, length, group.size, order, sizes)
    expected = found.sizes[group.rank]
    if tokens != expected:
        rule = f"must have {expected} {noun} on rank {group.rank} of {group.size}, of {length}"
        fail(op, name, rule, tokens)
    return found


def check_starts(op: str, where: Layout, step: int, names: str) -> None:
    """Ranks with tokens must start at a multiple of step, the larger of the given powers of two."""
    for rank, (piece,) in enumerate(where.pieces):
        rule = f"must start each rank at a multiple of {names}, {step}; rank {rank}"
        check(piece.size == 0 or piece.first % step == 0, op, "sizes", rule, piece.first)


def shard_sequence(
    x: Tensor,
    mesh: DeviceMesh | None = None,
    dim: int = 1,
    order: Order = "contiguous",
    *,
    group: dist.ProcessGroup | None = None,
    sizes: Sequence[int] | None = None,
) -> Tensor:
    """This rank's shard of a sequence that every rank holds as a whole.

    "contiguous" order gives rank r the r-th of P adjacent parts. "zigzag" cuts 2 P parts and gives
    rank r parts r and 2 P - 1 - r, so that causal attention is balanced. If the length is not a
    multiple of P (2 P), the first parts are longer by one token: shards differ in size, or are
    empty.

    Args:
        x: any tensor with at least dim + 1 dimensions.
        mesh, group: a one-dimensional device mesh, or a process group; None = all ranks.
        dim: the token dimension, 1 for ``[B, S, H, D]``, 0 for ``[T, H, D]``.
        order: "contiguous" or "zigzag".
        sizes: number of tokens of each rank, in contiguous order. None: the rule above.

    Returns:
        The shard: in contiguous order a view, in zigzag order a copy. Differentiable.

    Raises:
        RuntimeError: naming argument, rule and value.

    Complexity: no communication.

    Example:
        >>> import torch, torch.distributed as dist, tokenmill.distributed as tmd
        >>> store = dist.HashStore()
        >>> dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        >>> tmd.shard_sequence(torch.randn(2, 10, 4, 64)).shape
        torch.Size([2, 10, 4, 64])
        >>> dist.destroy_process_group()
    """
    op = "distributed.shard_sequence"
    check_tensor(op, "x", x)
    dim = _check_dim(op, x, dim)
    ranks = Group(op, mesh, group)
    pieces = layout(op, x.shape[dim], ranks.size, order, sizes).pieces[ranks.rank]
    return take(x, dim, pieces)


def unshard_sequence(
    x: Tensor,
    mesh: DeviceMesh | None = None,
    dim: int = 1,
    order: Order = "contiguous",
    *,
    group: dist.ProcessGroup | None = None,
    length: int | None = None,
    sizes: Sequence[int] | None = None,
) -> Tensor:
    """The whole sequence, on every rank: the inverse of :func:`shard_sequence`.

    Args:
        x: the shard of this rank.
        mesh, dim, order, group, sizes: as in :func:`shard_sequence`.
        length: number of tokens of the whole sequence. None: the sum of sizes, or equal shards on
            all ranks.

    Returns:
        The joined tensor. The gradient of x sums the gradients of all ranks.

    Raises:
        RuntimeError: naming argument, rule and value.

    Complexity: one all-gather.

    Example:
        >>> import torch, torch.distributed as dist, tokenmill.distributed as tmd
        >>> store = dist.HashStore()
        >>> dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        >>> tmd.unshard_sequence(torch.randn(2, 5, 4, 64), length=5).shape
        torch.Size([2, 5, 4, 64])
        >>> dist.destroy_process_group()
    """
    op = "distributed.unshard_sequence"
    check_tensor(op, "x", x)
    dim = _check_dim(op, x, dim)
    ranks = Group(op, mesh, group)
    where = layout_of_shard(ranks, "x", x.shape[dim], length, order, sizes)
    return in_order(ranks.gather(x, dim, where.sizes), dim, where)


def _check_dim(op: str, x: Tensor, dim: int) -> int:
    dim = as_int(op, "dim", dim)
    rule = f"must be a dimension of x, which has {x.dim()}"
    check(-x.dim() <= dim < x.dim(), op, "dim", rule, dim)
    return dim % x.dim()


def take(x: Tensor, dim: int, pieces: Sequence[Piece]) -> Tensor:
    """Selects pieces of a whole sequence."""
    parts = [x.narrow(dim, piece.first, piece.size) for piece in pieces]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def in_order(x: Tensor, dim: int, where: Layout) -> Tensor:
    """Reorders a sequence from rank order to sequence order."""
    return _arrange(x, dim, where, inverse=False)


def as_held(x: Tensor, dim: int, where: Layout) -> Tensor:
    """The inverse of in_order()."""
    return _arrange(x, dim, where, inverse=True)


def _arrange(x: Tensor, dim: int, where: Layout, inverse: bool) -> Tensor:
    held = [piece for pieces in where.pieces for piece in pieces]
    ordered = sorted(held)
    if held == ordered:
        return x
    here, there = (ordered, held) if inverse else (held, ordered)
    starts, at = {}, 0
    for piece in here:
        starts[piece] = at
        at += piece.size
    # Empty pieces may coincide: they have no tokens.
    return torch.cat([x.narrow(dim, starts[piece], piece.size) for piece in there], dim)
