"""topk_select over columns sharded over ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .._check import as_int, check, check_bool, check_tensor, check_text, reads_values
from ..select.rules import check_per_request
from ..select.topk_select import topk_select as select
from ._group import Group
from .sequence import layout_of_shard

OP = "distributed.topk_select"


def topk_select(
    scores: Tensor,
    k: int,
    *,
    mesh: DeviceMesh | None = None,
    group: dist.ProcessGroup | None = None,
    sizes: Sequence[int] | None = None,
    lengths: Tensor | None = None,
    tie: str = "low",
    order: str = "index",
    return_values: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    """The k largest scores of each row, whose columns are sharded over ranks, as positions in the
    whole row.

    Rank r has the columns after the columns of lower ranks. Each rank selects its own k, one gather
    collects them, and every rank selects among them: exactly the positions of
    :func:`tokenmill.topk_select` on the joined row, on every rank, with ties by position.

    Args:
        scores: ``[R, n]`` float16, bfloat16 or float32, the n columns of this rank.
        k: number of positions per row, 1 to 65536.
        mesh, group: a one-dimensional device mesh, or a process group; None = all ranks.
        sizes: number of columns of each rank. None: equal on all ranks.
        lengths: ``[R]`` int32, number of columns of the joined row to search, from the first; the
            same on every rank. None: all.
        tie, order, return_values, backend: as in :func:`tokenmill.topk_select`.

    Returns:
        (indices, counts[, values]) as in :func:`tokenmill.topk_select`, the same on every rank. Not
        differentiable.

    Raises:
        RuntimeError: naming argument, rule and value. PeerError: a collective failed.

    Complexity: one selection on each rank; 8 R min(k, n) bytes from each rank to all.

    Paper: as :func:`tokenmill.topk_select`.

    Example:
        >>> import torch, torch.distributed as dist, tokenmill.distributed as tmd
        >>> store = dist.HashStore()
        >>> dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        >>> tmd.topk_select(torch.tensor([[0.1, 0.9, 0.5]]), 2)[0].tolist()
        [[1, 2]]
        >>> dist.destroy_process_group()
    """
    check_tensor(OP, "scores", scores)
    check_tensor(OP, "lengths", lengths, optional=True)
    k = as_int(OP, "k", k)
    check_text(OP, "tie", tie)
    check_text(OP, "order", order)
    check_bool(OP, "return_values", return_values)
    check(scores.dim() == 2, OP, "scores", "must have 2 dimensions [R, n]", scores.dim())
    half = (torch.float16, torch.bfloat16, torch.float32)
    check(scores.dtype in half, OP, "scores", "must be float16, bfloat16 or float32", scores.dtype)
    rows, columns = scores.shape
    check_per_request(OP, "lengths", lengths, rows, "scores", scores)
    ranks = Group(OP, mesh, group)
    where = layout_of_shard(ranks, "scores", columns, None, "contiguous", sizes, "columns")
    rule = "must have fewer than 2^31 columns on all ranks"
    check(where.length < 2**31, OP, "scores", rule, where.length)
    own = where.pieces[ranks.rank][0]
    ranks.check_alike(
        sizes=where.sizes, rows=rows, k=k, dtype=scores.dtype, tie=tie, order=order,
        return_values=return_values,
        lengths=None if lengths is None or not reads_values(lengths) else lengths.tolist(),
    )  # fmt: skip
    if ranks.size == 1:
        return select(
            scores, k, lengths=lengths, tie=tie, order=order, return_values=return_values,
            backend=backend,
        )  # fmt: skip
    here = None if lengths is None else (lengths - own.first).clamp(0, columns)
    positions, _, values = select(
        scores, k, lengths=here, tie=tie, return_values=True, backend=backend
    )
    positions = torch.where(positions < 0, -1, positions + own.first)
    widths = [min(k, size) for size in where.sizes]
    return best_of_ranks(
        ranks, positions, values, k, widths, tie=tie, order=order, return_values=return_values,
        backend=backend,
    )  # fmt: skip


def best_of_ranks(
    ranks: Group,
    positions: Tensor,
    values: Tensor,
    k: int,
    widths: Sequence[int],
    *,
    tie: str = "low",
    order: str = "index",
    return_values: bool,
    backend: str | None,
) -> tuple[Tensor, ...]:
    """(indices, counts[, values]) of the k best of all ranks' candidates, given as positions and
    values ``[R, K]``, ascending on each rank and from rank to rank; rank r has at most widths[r]
    candidates.
    """
    # float32 represents any score. [R, 2 width] int32
    maximum = widths[ranks.rank]
    sent = torch.cat([positions[:, :maximum], values[:, :maximum].float().view(torch.int32)], 1)
    gathered = ranks.gather(sent.T.contiguous(), 0, [2 * width for width in widths])
    parts = gathered.split([2 * width for width in widths])
    blocks = [(part[:width], part[width:]) for part, width in zip(parts, widths, strict=True)]
    candidates = torch.cat([position for position, _ in blocks]).T.contiguous()
    floats = torch.cat([value for _, value in blocks]).T.contiguous().view(torch.float32)
    chosen, counts, *found = select(
        floats.to(values.dtype),
        k,
        tie=tie,
        order=order,
        return_values=return_values,
        backend=backend,
    )
    taken = chosen >= 0
    indices = torch.where(taken, candidates.gather(1, chosen.clamp(min=0).long()), -1)
    return indices, counts, *found
