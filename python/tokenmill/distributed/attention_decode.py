"""attention_decode over a cache sharded over ranks by position."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .. import masks
from .._call.autocast import Autocast
from .._call.run import call as run
from .._check import check, check_bool, check_tensor, check_text, reads_values
from .._kv_cache import capacity, check_cache, check_cache_scale, check_lengths
from ..dense.attention_decode import SPEC, lower
from ..dense.terms import (
    NO_WINDOW,
    Kind,
    Normalize,
    ScoreBias,
    as_window,
    check_return_lse,
)
from ..select.rules import check_length_values
from ._group import Group
from ._merge import Merge
from .sequence import Piece, layout_of_shard

OP = "distributed.attention_decode"


@Autocast(lower=("q",), cache="k_cache").applied
def attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    seqlens_k: Tensor,
    mesh: DeviceMesh | None = None,
    group: dist.ProcessGroup | None = None,
    sizes: Sequence[int] | None = None,
    block_table: Tensor | None = None,
    kind: Kind = "softmax",
    normalize: Normalize = None,
    scale: float | None = None,
    score_bias: ScoreBias = None,
    alibi_slopes: Tensor | None = None,
    sink: Tensor | None = None,
    softcap: float = 0.0,
    window: tuple[int, int] = NO_WINDOW,
    return_lse: bool = False,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Decode with a cache that is sharded over ranks by position.

    Rank r stores the positions after the positions of lower ranks: a request of n keys has its
    first keys on rank 0 and continues on rank 1. Every rank attends to its own keys; one gather of
    results and statistics follows, merged in rank order. The result equals
    :func:`tokenmill.attention_decode`, on every rank, with the same bits on every run.

    Args:
        q: ``[B, Sq, H, D]``, the same on every rank.
        k_cache, v_cache: ``[B, n, Hk, D]`` and ``[B, n, Hk, Dv]``, n positions of this rank; with
            block_table pages of this rank, as in :func:`tokenmill.attention_decode`.
        seqlens_k: int32 ``[B]``, total number of keys of each request over all ranks, the same on
            all.
        mesh, group: a one-dimensional device mesh, or a process group; None = all ranks.
        sizes: number of positions of each rank. None: equal on all ranks.
        block_table: int32 ``[B, pages]`` of this rank's positions.
        kind, normalize, scale, score_bias, alibi_slopes, sink, softcap, window: as in
            :func:`tokenmill.attention_decode`, with positions in the whole cache.
        return_lse, backend: as in :func:`tokenmill.attention_decode`.
        k_scale, v_scale: scales of this rank's cache in float8_e4m3fn: ``[1]``, ``[Hk]``, or for
            each of its tokens ``[B, n, Hk]`` (``[P, page size, Hk]``).

    Returns:
        out ``[B, Sq, H, Dv]`` in the dtype of q; with return_lse also ``[B, H, Sq]`` float32. Not
        differentiable.

    Raises:
        RuntimeError: naming argument, rule and value.
        PeerError: a collective failed.

    Complexity: each rank reads its keys once; B Sq H (Dv + 1) float32 from each rank to all.

    Paper: Flash-Decoding (Dao et al. 2023), with ranks instead of splits; A Unified View of
    Long-Sequence Models (Hu et al. 2023), section 4.

    Example:
        >>> import torch, torch.distributed as dist, tokenmill.distributed as tmd
        >>> store = dist.HashStore()
        >>> dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        >>> cache = torch.randn(2, 64, 2, 32)
        >>> lengths = torch.tensor([64, 11], dtype=torch.int32)
        >>> tmd.attention_decode(torch.randn(2, 1, 4, 32), cache, cache, seqlens_k=lengths).shape
        torch.Size([2, 1, 4, 32])
        >>> dist.destroy_process_group()
    """
    for name, t in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache), ("seqlens_k", seqlens_k)):
        check_tensor(OP, name, t)
    for name, option in (
        ("block_table", block_table),
        ("sink", sink),
        ("alibi_slopes", alibi_slopes),
        ("k_scale", k_scale),
        ("v_scale", v_scale),
    ):
        check_tensor(OP, name, option, optional=True)
    check_text(OP, "kind", kind)
    check_bool(OP, "return_lse", return_lse)
    if return_lse:
        check_return_lse(OP, kind, normalize or "none")
    check_cache(OP, q, k_cache, v_cache, block_table is not None, True)
    check_lengths(OP, q, q.shape[0], seqlens_k, block_table)
    for name, scales in (("k_scale", k_scale), ("v_scale", v_scale)):
        check_cache_scale(OP, name, scales, "k_cache", k_cache, q.dtype)
    ranks = Group(OP, mesh, group)
    room = capacity(k_cache, block_table)
    where = layout_of_shard(ranks, "k_cache", room, None, "contiguous", sizes, "positions")
    own = where.pieces[ranks.rank][0]
    if reads_values(seqlens_k):
        check_length_values(OP, "seqlens_k", seqlens_k, where.length)
    left, right = as_window(OP, window)
    check(right in (-1, 0), OP, "window", "right must be -1 or 0: no query sees a later key", right)
    ranks.check_alike(
        sizes=where.sizes, q=tuple(q.shape), dtype=q.dtype, kind=(kind, normalize), window=left,
        scale=scale, softcap=softcap, score_bias=score_bias, alibi_slopes=alibi_slopes, sink=sink,
        block_table=block_table is not None, return_lse=return_lse,
        scales=(k_scale is not None, v_scale is not None),
        seqlens_k=seqlens_k.tolist() if reads_values(seqlens_k) else None,
    )  # fmt: skip
    options: dict[str, Any] = {
        "kind": kind, "normalize": normalize, "scale": scale, "softcap": softcap,
        "block_table": block_table, "k_scale": k_scale, "v_scale": v_scale,
    }  # fmt: skip
    part = _on_this_rank(
        q, k_cache, v_cache, seqlens_k, own, left, score_bias, alibi_slopes,
        sink if ranks.rank == 0 else None, options, backend,
    )  # fmt: skip
    merge = Merge(kind, normalize, backend)
    out, statistic = merge.of_ranks(ranks, *part)
    return (out.to(q.dtype), statistic) if return_lse else out.to(q.dtype)


def _on_this_rank(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    seqlens_k: Tensor,
    own: Piece,
    left: int,
    score_bias: ScoreBias,
    alibi_slopes: Tensor | None,
    sink: Tensor | None,
    options: dict[str, Any],
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """out [B, Sq, H, Dv] and the row statistic [B, H, Sq] over the keys at this rank's positions.

    The queries of a request become heads of one query, which sees the last key on this rank; a
    range mask restricts each head to its query's visible keys.
    """
    batch, rows, heads = q.shape[:3]
    split = (k_cache.shape[2], heads // max(k_cache.shape[2], 1))

    def fold(x: Tensor) -> Tensor:
        """[B, Sq, H, ...] -> [B, H Sq, ...]."""
        return x.unflatten(2, split).movedim(1, 3).flatten(1, 3)

    def per_query(x: Tensor) -> Tensor:
        """[H] or [B, H] as [B, Sq, H]."""
        return (x if x.dim() == 1 else x[:, None]).float().expand(batch, rows, heads)

    here = (seqlens_k - own.first).clamp(0, own.size)  # number of keys of each request on this rank
    # Position of each query relative to this rank's first position, [B, Sq].
    position = (seqlens_k - own.first - rows)[:, None] + torch.arange(rows, device=q.device)
    terms = []
    if isinstance(score_bias, Tensor):
        terms.append(per_query(score_bias))
    elif score_bias == "neg_log_n":
        terms.append(-seqlens_k.clamp(min=1).log()[:, None, None])
    elif score_bias is not None:
        options["score_bias"] = score_bias
    if alibi_slopes is not None:  # the operator counts distances from the last key on this rank
        slopes = per_query(alibi_slopes)
        terms.append(-slopes * (position - here[:, None] + 1)[..., None])
        options["alibi_slopes"] = fold(slopes)
    if terms:
        options["score_bias"] = fold(
            sum(terms, q.new_zeros((batch, rows, heads), dtype=torch.float32))
        )
    if sink is not None:
        options["sink"] = sink.repeat_interleave(rows)
    if rows > 1 or left >= 0:
        begin = (position - left).clamp(min=0) if left >= 0 else torch.zeros_like(position)
        spans = [
            fold(x.int()[..., None].expand(-1, -1, heads))[..., None, None]
            for x in (begin, (position + 1).clamp(0, own.size))
        ]
        options["mask"] = masks.ranges(*spans)
    lowered = lower(fold(q)[:, None], k_cache, v_cache, seqlens_k=here, **options)
    out, statistic = run(SPEC, lowered, None, backend)
    out = out[:, 0].unflatten(1, (*split, rows)).movedim(3, 1).flatten(2, 3)
    return out, statistic[..., 0].unflatten(1, (heads, rows)) if statistic.dim() == 3 else statistic
