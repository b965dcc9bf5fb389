"""sparse_decode_attention over a cache sharded over ranks by position."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .._call.autocast import Autocast
from .._call.choose import choose
from .._call.run import call as run
from .._check import check, reads_values, synchronising_checks
from ..select.rules import check_length_values
from ..sparse.sparse_decode_attention import SPEC, Positions, lower
from ._group import Group
from ._merge import Merge
from .sequence import Layout, Piece, check_starts, layout_of_shard

OP = "distributed.sparse_decode_attention"
PAGES = (64, 32, 16, 8, 4, 2, 1)  # page sizes tried for a cache without pages


@Autocast(lower=("q", "extra_k", "extra_v"), cache="k_cache").applied
def sparse_decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    indices: Tensor,
    counts: Tensor,
    *,
    block_k: int = 1,
    seqlens_k: Tensor,
    mesh: DeviceMesh | None = None,
    group: dist.ProcessGroup | None = None,
    sizes: Sequence[int] | None = None,
    block_table: Tensor | None = None,
    num_sink: int = 0,
    num_recent: int = 0,
    pos_mode: Positions = "absolute",
    rope: tuple[Tensor, Tensor] | None = None,
    interleaved: bool = False,
    extra_k: Tensor | None = None,
    extra_v: Tensor | None = None,
    extra_log_count: Tensor | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    sink: Tensor | None = None,
    num_splits: int = 0,
    return_mass: bool = False,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]:
    """Decode attention over selected, sink and recent keys of a cache sharded over ranks by
    position.

    Positions are laid out as in :func:`attention_decode`: rank r stores the positions after the
    positions of lower ranks. Lists refer to the whole cache. Every rank attends to its own listed,
    sink and recent keys; one gather of results and lse follows, merged in rank order. The result
    equals :func:`tokenmill.sparse_decode_attention`, on every rank, with the same bits on every
    run. No key is sent.

    Args:
        q: ``[B, Sq, H, D]``, the same on every rank.
        k_cache, v_cache: ``[B, n, Hk, D]`` and ``[B, n, Hk, Dv]``, n positions of this rank; with
            block_table pages of this rank, as in :func:`tokenmill.sparse_decode_attention`.
        indices: int32 ``[B, 1 | Hk | H, K]``, positions of the whole cache in blocks of block_k;
            the same on every rank.
        counts: int32 ``[B, 1 | Hk | H]``, number of entries of each list; the same on every rank.
        block_k: keys of an entry, a power of two up to 128. Every rank with positions starts at a
            multiple of it.
        seqlens_k: int32 ``[B]``, total number of keys of each request over all ranks, the same on
            all.
        mesh, group: a one-dimensional device mesh, or a process group; None = all ranks.
        sizes: number of positions of each rank. None: equal on all ranks.
        block_table: int32 ``[B, pages]`` of this rank's positions; a key on a page that does not
            exist is skipped.
        num_sink, num_recent: numbers of sink (first) and recent (last) keys of the whole cache,
            always seen.
        pos_mode: "absolute". With rope, "cache" is refused on several ranks: the rank of a key
            among the keys attended to depends on keys of other ranks.
        rope: (cos, sin), float ``[positions, pairs]`` for all positions of all ranks.
        interleaved, scale, softcap, num_splits, backend: as in
            :func:`tokenmill.sparse_decode_attention`.
        extra_k, extra_v, extra_log_count, sink: as in :func:`tokenmill.sparse_decode_attention`,
            the same on every rank; they count once.
        return_mass: also return the probability mass of each list entry. Queries are then processed
            one at a time, keys are read once per query head, and a second gather sends the mass.
        k_scale, v_scale: scales of this rank's cache in float8_e4m3fn: ``[1]``, ``[Hk]``, or for
            each of its tokens ``[B, n, Hk]`` (``[P, page size, Hk]``).

    Returns:
        (out, lse), with return_mass (out, lse, mass), as in
        :func:`tokenmill.sparse_decode_attention`. Not differentiable: inputs that require a
        gradient are refused unless under no_grad.

    Raises:
        RuntimeError: naming argument, rule and value, before anything is sent. PeerError: a
            collective failed. If arguments that must agree differ between ranks, all ranks raise.

    Complexity: each rank reads its listed keys once; B Sq H (Dv + 1) float32 from each rank to all,
    and with return_mass B K more per list.

    Paper: as :func:`tokenmill.sparse_decode_attention`; Flash-Decoding (Dao et al. 2023), with
    ranks instead of splits.

    Example:
        >>> import torch, torch.distributed as dist, tokenmill.distributed as tmd
        >>> store = dist.HashStore()
        >>> dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        >>> cache = torch.randn(2, 64, 2, 32)
        >>> lengths = torch.tensor([64, 11], dtype=torch.int32)
        >>> indices = torch.tensor([[[3, 30]], [[3, -1]]], dtype=torch.int32)
        >>> counts = torch.tensor([[2], [1]], dtype=torch.int32)
        >>> out, lse = tmd.sparse_decode_attention(
        ...     torch.randn(2, 1, 4, 32), cache, cache, indices, counts, seqlens_k=lengths)
        >>> out.shape
        torch.Size([2, 1, 4, 32])
        >>> dist.destroy_process_group()
    """
    lowered = lower(
        q, k_cache, v_cache, indices, counts, block_k=block_k, seqlens_k=seqlens_k,
        block_table=block_table, num_sink=num_sink, num_recent=num_recent, pos_mode=pos_mode,
        rope=rope, interleaved=interleaved, extra_k=extra_k, extra_v=extra_v,
        extra_log_count=extra_log_count, scale=scale, softcap=softcap, sink=sink,
        num_splits=num_splits, return_mass=return_mass, k_scale=k_scale, v_scale=v_scale, op=OP,
    )  # fmt: skip
    call = SPEC.forward.record(*lowered)
    ranks, where = _prepare(call, mesh, group, sizes, backend)
    if ranks.size == 1 or where.length == 0:
        out, lse, mass = run(SPEC, lowered, None, backend)
        return (out, lse, mass) if return_mass else (out, lse)
    return _on_all_ranks(call, ranks, where, backend)


def _prepare(
    call: Any,
    mesh: DeviceMesh | None,
    group: dist.ProcessGroup | None,
    sizes: Sequence[int] | None,
    backend: str | None,
) -> tuple[Group, Layout]:
    SPEC.forward.check(*call, float64=True, op=OP)
    choose(SPEC, tuple(call), backend, OP)
    if torch.is_grad_enabled():
        for name, value in call._asdict().items():
            wants = isinstance(value, Tensor) and value.requires_grad
            check(not wants, OP, name, "must not require a gradient, there is none", True)
    ranks = Group(OP, mesh, group)
    table, page = call.block_table, call.k_cache.shape[1]
    room = page * (1 if table is None else table.shape[1])
    where = layout_of_shard(ranks, "k_cache", room, None, "contiguous", sizes, "positions")
    check_starts(OP, where, call.block_k, "block_k")
    if ranks.size > 1 and call.cos is not None:
        rule = "must be 'absolute' on several ranks: places count the keys of the others"
        check(call.pos_mode == "absolute", OP, "pos_mode", rule, call.pos_mode)
        rule = f"must have all {where.length} positions of the cache"
        check(call.cos.shape[0] >= where.length, OP, "rope", rule, call.cos.shape[0])
    if reads_values(call.seqlens_k):
        check_length_values(OP, "seqlens_k", call.seqlens_k, where.length)
    options = [
        "block_k", "num_sink", "num_recent", "scale", "softcap", "return_mass", "pos_mode", "cos",
        "interleaved", "extra_log_count", "sink",
    ]  # fmt: skip
    values = reads_values(call.seqlens_k)
    ranks.check_alike(
        sizes=where.sizes,
        q=tuple(call.q.shape),
        dtype=call.q.dtype,
        seqlens_k=call.seqlens_k.tolist() if values else None,
        indices=tuple(call.indices.shape),
        checksum_of_indices=_checksum(call.indices) if synchronising_checks() else None,
        counts=call.counts.tolist() if values else None,
        block_table=table is not None,
        **{name: getattr(call, name) for name in options},
    )
    return ranks, where


def _checksum(x: Tensor) -> int:
    return zlib.crc32(x.cpu().contiguous().numpy().tobytes())


def _on_all_ranks(
    call: Any, ranks: Group, where: Layout, backend: str | None
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]:
    own = where.pieces[ranks.rank][0]
    merge = Merge("softmax", None, backend)
    wide = torch.promote_types(call.q.dtype, torch.float32)
    if own.size > 0 and call.q.numel() > 0:
        call = _keys_of_this_rank(call, own, where.length)
        part, of_part, mass = (
            _each_query(call, backend)
            if call.return_mass
            else run(SPEC, tuple(call), None, backend)
        )
    else:
        batch, rows, heads = call.q.shape[:3]
        part, of_part = merge.start((batch, rows, heads, call.v_cache.shape[3]), call.q)
        mass = part.new_zeros((rows, batch, heads, call.indices.shape[2]), dtype=wide)
    out, lse = merge.of_ranks(ranks, part, of_part)
    out, lse = out.to(call.q.dtype), lse.to(wide)
    if not call.return_mass:
        return out, lse
    # A query with no visible key has lse -inf, and no mass.
    share = torch.where(lse.isneginf(), 0, (of_part - lse).exp())
    mass = (mass * share.movedim(2, 0)[..., None]).sum(0)
    kv_heads = call.k_cache.shape[2]
    if call.indices.shape[1] <= kv_heads:
        mass = mass.unflatten(1, (kv_heads, mass.shape[1] // max(kv_heads, 1))).sum(2)
    return out, lse, ranks.gather(mass[None].contiguous(), 0, [1] * ranks.size).sum(0)


def _keys_of_this_rank(call: Any, own: Piece, total: int) -> Any:
    """The call with the positions of this rank as 0 to own.size - 1, and positions of later ranks
    on pages that do not exist, so that queries, recent keys and rotations keep their distances.
    """
    if own.first > 0:  # sink and extra keys count once
        call = call._replace(sink=None, extra_k=None, extra_v=None, extra_log_count=None)
    if call.cos is not None:
        call = call._replace(cos=call.cos[own.first :], sin=call.sin[own.first :])
    # Without rope only distances up to num_recent matter, so fewer extra positions are enough.
    behind = total - own.end
    if call.cos is None:
        behind = min(behind, call.num_recent + call.q.shape[1])
    lengths = (call.seqlens_k - own.first).clamp(0, own.size + behind)
    first = own.first // call.block_k
    indices = call.indices.clamp(min=-1) - first  # ids of other ranks are out of range here
    call = call._replace(
        indices=indices,
        counts=_until_last(indices, call.counts, -(-own.size // call.block_k)),
        seqlens_k=lengths,
        num_sink=max(call.num_sink - own.first, 0),
    )
    return _with_room(call, behind) if behind > 0 or call.k_cache.shape[0] == 0 else call


def _until_last(indices: Tensor, counts: Tensor, blocks: int) -> Tensor:
    """Counts truncated after the last entry whose block is on this rank."""
    entries = indices.shape[2]
    if entries == 0:
        return counts
    place = torch.arange(1, entries + 1, dtype=torch.int32, device=indices.device)
    here = (indices >= 0) & (indices < blocks)
    return counts.minimum(torch.where(here, place, 0).amax(-1))


def _with_room(call: Any, behind: int) -> Any:
    """The call with a block table that has `behind` more positions, on pages that do not exist."""
    k, v, table = call.k_cache, call.v_cache, call.block_table
    scales = [call.k_scale, call.v_scale]
    if table is None:
        k, v, table = _as_pages(k, v)
        scales = [x if x is None or x.dim() == 1 else _as_pages_of(table, x, k) for x in scales]
    elif k.shape[0] == 0:  # an operator needs at least one page
        k, v = (x.new_zeros(1, *x.shape[1:]) for x in (k, v))
        scales = [
            x if x is None or x.dim() == 1 else x.new_zeros(1, *x.shape[1:]) for x in scales
        ]  # fmt: skip
        table = torch.full_like(table, -1)
    table = F.pad(table, (0, -(-behind // k.shape[1])), value=-1)
    cos, sin = call.cos, call.sin
    lacking = 0 if cos is None else table.shape[1] * k.shape[1] - cos.shape[0]
    if lacking > 0:  # the last page is partial: its extra positions are unused
        cos, sin = (F.pad(x, (0, 0, 0, lacking)) for x in (cos, sin))
    return call._replace(
        k_cache=k, v_cache=v, block_table=table, cos=cos, sin=sin, k_scale=scales[0],
        v_scale=scales[1],
    )  # fmt: skip


def _as_pages(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A dense cache [B, n, Hk, *] as pages and their block table, without a copy where requests are
    a whole number of pages apart, equal in k and v.
    """
    batch, tokens = k.shape[:2]
    sizes = [size for size in PAGES if tokens % size == 0]
    able = [size for size in sizes if _apart(k, size) == _apart(v, size) > 0]
    if not able:
        k, v, able = k.contiguous(), v.contiguous(), sizes
    size = able[0]
    step, each = _apart(k, size), tokens // size

    requests = torch.arange(batch, dtype=torch.int32, device=k.device)
    table = requests[:, None] * step + torch.arange(each, dtype=torch.int32, device=k.device)
    count = (batch - 1) * step + each
    return _pages_in_place(k, count, size), _pages_in_place(v, count, size), table


def _as_pages_of(table: Tensor, scales: Tensor, k: Tensor) -> Tensor:
    """Scales [B, n, Hk] of a dense cache, rearranged like its pages k."""
    batch, each = table.shape
    count, size = k.shape[:2]
    if batch > 0 and _apart(scales, size) * (batch - 1) + each == count:
        return _pages_in_place(scales, count, size)
    found = scales.new_ones(count, size, scales.shape[2])
    found[table.flatten().long()] = scales.unflatten(1, (each, size)).flatten(0, 1)
    return found


def _pages_in_place(x: Tensor, count: int, size: int) -> Tensor:
    """x [B, n, ...] viewed as pages [count, size, ...], including pages between requests."""
    return x.as_strided((count, size, *x.shape[2:]), (_stride(x, size), *x.stride()[1:]))


def _stride(cache: Tensor, size: int) -> int:
    """Stride between pages. The stride of a dimension of size 1 is arbitrary."""
    return cache.stride(1) * size if cache.shape[1] > 1 else cache.stride(0)


def _apart(cache: Tensor, size: int) -> int:
    """Number of pages between requests; 0 if it is not a whole number."""
    batch, tokens = cache.shape[:2]
    if batch == 1 or tokens == 1:
        return tokens // size
    page = _stride(cache, size)
    return cache.stride(0) // page if page > 0 and cache.stride(0) % page == 0 else 0


def _each_query(call: Any, backend: str | None) -> tuple[Tensor, Tensor, Tensor]:
    """out and lse, and the mass [Sq, B, H, K] of each query and head, relative to its own lse."""
    heads, rows = call.q.shape[2], call.q.shape[1]
    of_list = heads // max(call.indices.shape[1], 1)
    call = call._replace(
        indices=call.indices.repeat_interleave(of_list, 1),
        counts=call.counts.repeat_interleave(of_list, 1),
    )
    parts = []
    for i in range(rows):
        lengths = (call.seqlens_k - (rows - 1 - i)).clamp(min=0)
        alone = call._replace(q=call.q[:, i : i + 1], seqlens_k=lengths)
        parts.append(run(SPEC, tuple(alone), None, backend))
    outs, lses, masses = zip(*parts, strict=True)
    return torch.cat(outs, 1), torch.cat(lses, 2), torch.stack(masses)
