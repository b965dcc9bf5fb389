"""hip_attention over a sequence sharded over ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .._call.autocast import Autocast
from .._call.choose import choose
from .._check import as_int, check_bool, check_tensor
from ..select.hip_block_select import SPEC as SEARCH
from ..select.hip_block_select import (
    Bound,
    HeadReduce,
    Representative,
    hip_block_select,
)
from ..select.hip_block_select import lower as lower_search
from ..sparse.block_sparse_attention import lower
from ..sparse.hip_attention import whole_sinks
from ..sparse.query_lists import check_block
from .block_sparse_attention import block_sparse_attention, prepare

OP = "distributed.hip_attention"


@Autocast(lower=("q", "k", "v")).applied
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
    mesh: DeviceMesh | None = None,
    group: dist.ProcessGroup | None = None,
    length: int | None = None,
    sizes: Sequence[int] | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""HiP's self-attention to sink keys, recent keys and blocks found by a search, over a sequence
    sharded over ranks.

    :func:`tokenmill.hip_block_select` for the rank's own queries, then
    :func:`block_sparse_attention` on their lists. The search may read any key before a query,
    depending on the keys read so far, so every rank gathers *all keys* first, without a gradient.
    Values are never gathered as a whole: of values, and of keys with a gradient, each rank receives
    only the blocks in its lists. The lists are the same as in one process.

    Every rank that has tokens starts at a multiple of block_q and of block_k.

    Args:
        q: ``[B, n, H, D]`` with the n tokens of this rank.
        k, v: ``[B, n, Hk, D]`` and ``[B, n, Hk, Dv]``, the same tokens, Hk a divisor of H.
        budget, stride_q, representative, bound, restart_span, head_reduce: parameters of the search
            (:func:`tokenmill.hip_block_select`).
        start: (indices, counts) of an earlier search for this rank's queries, or None.
        block_q, block_k: queries that share a list, and keys of a block: powers of two up to 128.
        num_sink, num_recent: numbers of sink keys of the whole sequence and of recent keys, which
            every query attends to (num_recent: only with causal). num_sink is rounded up to whole
            blocks.
        causal: a query sees no later key.
        scale: factor of q·k in the attention; None = 1/sqrt(D).
        softcap: logits become softcap * tanh(logits / softcap); 0 = off.
        mesh, group: a one-dimensional device mesh, or a process group; None = all ranks.
        length: number of tokens of the whole sequence. None: the sum of sizes, or equal shards on
            all ranks.
        sizes: number of tokens of each rank. None: the rule of :func:`shard_sequence`.
        return_lse: also return lse.
        backend: as in :func:`tokenmill.hip_attention`.

    Returns:
        out ``[B, n, H, Dv]`` in the dtype of q; with return_lse also lse ``[B, H, n]`` float32,
        natural log. Gradients of q, k and v through the attention (not the choice of keys), as in
        :func:`block_sparse_attention`. Deterministic.

    Raises:
        RuntimeError: naming argument, rule and value, before anything is sent. PeerError: a
            collective failed, naming rank and group. If arguments that must agree differ between
            ranks, all ranks raise.

    Complexity: the search and the attention of the rank's rows. A rank sends its B n Hk D key
    elements to every other rank, then the data of :func:`block_sparse_attention`; it holds the keys
    of all ranks during the search. Decode (the lists of an earlier step, a cache) is not supported:
    :func:`sparse_decode_attention` takes lists.

    Paper: HiP Attention (Lee et al. 2024), sections 3 and 4.

    Example:
        >>> import torch, torch.distributed as dist, tokenmill.distributed as tmd
        >>> store = dist.HashStore()
        >>> dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        >>> q, k, v = (torch.randn(1, 1024, 2, 32) for _ in range(3))
        >>> tmd.hip_attention(q, k, v, budget=128, num_recent=64).shape
        torch.Size([1, 1024, 2, 32])
        >>> dist.destroy_process_group()
    """
    for name, t in (("q", q), ("k", k), ("v", v)):
        check_tensor(OP, name, t)
    check_bool(OP, "return_lse", return_lse)
    block_k, num_sink = as_int(OP, "block_k", block_k), as_int(OP, "num_sink", num_sink)
    num_sink = whole_sinks(OP, num_sink, block_k)
    search: dict[str, Any] = {
        "budget": budget, "stride_q": stride_q, "representative": representative, "bound": bound,
        "restart_span": restart_span, "head_reduce": head_reduce,
    }  # fmt: skip
    both: dict[str, Any] = {
        "block_q": block_q, "block_k": block_k, "num_sink": num_sink, "num_recent": num_recent,
        "causal": causal,
    }  # fmt: skip
    lowered = lower_search(q, k, start=start, **search, **both, op=OP)
    SEARCH.forward.check(*lowered, float64=True, op=OP)
    choose(SEARCH, lowered, backend, OP)
    check_block(OP, "block_q", block_q)
    rows = -(-q.shape[1] // block_q)
    no_list = q.new_zeros((q.shape[0], 1, rows, 0), dtype=torch.int32)
    options = {**both, "scale": scale, "softcap": softcap}
    attend = lower(q, k, v, no_list, no_list.sum(-1, dtype=torch.int32), **options, op=OP)
    ranks, where = prepare(OP, attend, mesh, group, length, sizes, backend, **search)
    keys = ranks.gather(k.detach(), 1, where.sizes)
    if causal:  # queries are the last of the keys visible to the rank
        keys = keys[:, : where.pieces[ranks.rank][0].end]
    found = hip_block_select(q.detach(), keys, start=start, backend=backend, **search, **both)
    del keys
    return block_sparse_attention(
        q, k, v, *found, **options, group=ranks.group, sizes=where.sizes, return_lse=return_lse,
        backend=backend,
    )  # fmt: skip
