"""hip_block_select: key blocks for block-sparse attention, found by a tree search over blocks."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from .._call.attach import register
from .._call.autocast import Autocast
from .._call.operator import TorchOp
from .._call.run import call
from .._check import (
    check,
)
from .._flops import known
from .._lowering import take_options
from .._other_names import answered_by
from ..reference.select import hip_block_select as reference
from ..registry import OpSpec, Sharding, register_op
from .rules import (
    check_block_table_values,
    check_length_values,
    check_packed_values,
    keys_of,
)

OP = "hip_block_select"

Representative = Literal["first", "middle", "last"]
Bound = Literal["sample", "minmax"]
HeadReduce = Literal["none", "group_max"]


def _run(q: Tensor, k: Tensor, **given: Any) -> tuple[Tensor, ...]:
    _, backend = take_options(hip_block_select, given)
    return call(SPEC, (q, k), given, backend)


@answered_by(_run)
def hip_block_select(
    q: Tensor,
    k: Tensor,
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
    seqlens_q: Tensor | None = None,
    seqlens_k: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    block_table: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    r"""HiP's tree search: selects the key blocks of each query block in O(log S) steps.

    The result is a list for :func:`block_sparse_attention` (or, with one query, for
    :func:`sparse_decode_attention`), which in addition attends to the first num_sink keys and the
    last num_recent keys visible to a query. These two kinds of keys are *always kept*, and a pair
    of a query and a key *counts* if the key is visible and not always kept: query i of a request
    with m queries and l keys is at p = l - m + i and counts the keys num_sink to p - num_recent
    (causal, bottom-right aligned; not causal: to l - 1 - num_recent). The n blocks with a key that
    counts for the last query of the query block are admissible. With N = budget / block_k:

    1. If n <= N, all admissible blocks are selected: list, sink and recent keys then cover every
       key visible to a query of the query block.
    2. The admissible blocks are cut into N nodes, node i from floor(n i / N) to floor(n (i+1) / N).
    3. Each node of several blocks is split in two, the left one with the smaller half. A node
       scores max q·k over the keys k of *one* block, its representative, and over sampled queries
       of the query block: every stride_q-th, counted backwards from its last one. Pairs that do not
       count, and NaN products, are skipped: if nothing is left, the score is -inf. Products are
       float32, without a scale.
    4. The N nodes with the largest scores are kept; ties go to the lower keys. Repeat from 3 while
       a node has several blocks.

    The list holds N different blocks (all, if there are fewer), likely but not certainly the best
    ones, since the search follows its representatives. It finds smooth scores, and keys that are
    similar within each initial node; it can miss a single large score between representatives. With
    representative="first" the left half of a node has the node's score, so the largest score seen
    so far is kept. bound="minmax" instead visits every block and returns the exact N best: O(S) per
    query block.

    start is an earlier list, from the previous decode step or a coarser search. Its ids become
    aligned groups of restart_span blocks (each group once), clipped to the admissible blocks, and
    the search continues from these nodes at 3: log2(restart_span) steps instead of log2(n / N). Ids
    that are not admissible or not greater than the id before are skipped; a list without valid ids
    is searched from scratch. The result then has at most the blocks of these groups.

    Requests of different lengths are padded (seqlens_q, seqlens_k), packed (cu_seqlens) or, for
    keys, in pages (block_table). Query blocks begin at the first query of each request; its lists
    do not depend on the other requests, bit for bit.

    Args:
        q: ``[B, Sq, H, D]`` float16, bfloat16 or float32 (float64 on the reference), any strides
            with a contiguous last dimension, D up to 256; packed ``[T, H, D]`` with cu_seqlens_q.
            In decode Sq is 1, or a few tokens.
        k: ``[B, S, Hk, D]`` in the dtype of q, Hk a divisor of H (GQA); packed ``[Tk, Hk, D]`` with
            cu_seqlens_k; ``[pages, page_size, Hk, D]`` with block_table.
        budget: number of keys in a list, a multiple of block_k, at most 2048 block_k.
        block_q: queries that share a list; the last block may have fewer.
        block_k: keys of a block, 1 to 128. Block i has the keys i block_k to (i + 1) block_k - 1.
        stride_q: sampling stride over the queries of a query block.
        representative: the block that represents a node: its "first", its "last", or the "middle"
            block, number floor(size / 2).
        num_sink, num_recent: numbers of sink (first) and recent (last) keys, always kept.
        bound: "sample" (the search) or "minmax" (exact).
        start: (indices, counts) as returned by this function, or None.
        restart_span: size in blocks of the node made from an id of start.
        causal: a query sees no later key.
        head_reduce: "none" (a list for each query head) or "group_max" (for each KV head: scores
            are maxima over its query heads).
        seqlens_q: int32 ``[B]``, number of queries of each request, the first rows of q. None: Sq.
            Later query blocks have empty lists.
        seqlens_k: int32 ``[B]``, number of keys of each request, including the keys of its queries.
            None: all.
        cu_seqlens_q: int32 ``[B + 1]``, offsets of packed queries. Their keys are packed too, or
            ``[B, S, Hk, D]`` or pages.
        cu_seqlens_k: the same for packed keys. None with a packed k: cu_seqlens_q.
        block_table: int32 ``[B, P]``, the pages of each request; key t is row t % page_size of page
            ``block_table[b, t // page_size]``. Entries beyond the length may be anything.
        backend: "cpu", "cuda", "triton", "reference" or None (see :func:`tokenmill.explain`).

    Returns:
        (indices, counts): int32 ``[B, H, ceil(Sq / block_q), budget / block_k]`` block numbers,
        ascending, -1 after the last, and their number, int32 ``[B, H, ceil(Sq / block_q)]``; with
        "group_max" Hk instead of H. For packed queries int32 ``[H, R, budget / block_k]`` and ``[H,
        R]`` with R = T // block_q + B: query block r of sequence b has row cu_seqlens_q[b] //
        block_q + b + r, and unused rows are empty. Deterministic. Not differentiable.

    Raises:
        RuntimeError: naming argument, rule and value. On a GPU lengths are clamped to the keys that
            exist, keys of pages that do not exist are read as zeros, and a float32 product with an
            infinite factor is NaN (three tf32 products make one).

    Complexity: 4 D budget block_q / stride_q operations for each of ceil(log2(n / N)) steps of a
    query block, fewer where a score is known from a step before; O(budget) memory for each query
    block at work and, on the CPU in a prefill of 8192 tokens or more, the keys of one head for each
    thread. "minmax": 2 D S block_q / stride_q operations.

    Paper: HiP Attention (Lee et al. 2024), section 3.

    Example:
        >>> import torch, tokenmill as tm
        >>> q, k = torch.zeros(1, 64, 2, 8), torch.zeros(1, 4096, 1, 8)
        >>> q[..., 0] = 1
        >>> k[0, :, 0, 0] = -(torch.arange(4096.0) - 1000).abs()  # a peak
        >>> blocks, counts = tm.hip_block_select(q, k, budget=64)
        >>> counts[0, :, 0].tolist(), 1000 // 2 in blocks[0, 0, 0]
        ([32, 32], True)
    """
    raise NotImplementedError


def lower(
    q: Tensor,
    k: Tensor,
    *,
    start: tuple[Tensor, Tensor] | None = None,
    op: str = OP,
    **given: Any,
) -> tuple[Any, ...]:
    a = FORWARD.fields(op, q=q, k=k, **given)
    if start is not None:
        pair = isinstance(start, tuple | list) and len(start) == 2
        pair = pair and all(isinstance(t, Tensor) for t in start)
        check(pair, op, "start", "must be (indices, counts) or None", start)
        a["start_indices"], a["start_counts"] = start
    if a["cu_seqlens_q"] is not None and a["cu_seqlens_k"] is None and k.dim() == 3:
        a["cu_seqlens_k"] = a["cu_seqlens_q"]
    return tuple(a.values())


def _list_shape(a: Any) -> list[int]:
    lists, entries = a.q.shape[-2], a.budget // a.block_k
    if a.head_reduce == "group_max":
        lists = a.k.shape[-2]
    if a.cu_seqlens_q is not None:
        return [lists, a.q.shape[0] // a.block_q + a.cu_seqlens_q.shape[0] - 1, entries]
    return [a.q.shape[0], lists, -(-a.q.shape[1] // a.block_q), entries]


def _check_values(a: Any) -> None:
    check_packed_values(OP, a)
    check_length_values(OP, "seqlens_q", a.seqlens_q, a.q.shape[-3])
    check_length_values(OP, "seqlens_k", a.seqlens_k, keys_of(a))
    check_block_table_values(OP, a.block_table, a.k, a.seqlens_k)


def _fake(a: Any) -> tuple[Tensor, Tensor]:
    shape = _list_shape(a)
    indices = a.q.new_empty(shape, dtype=torch.int32)
    return indices, a.q.new_empty(shape[:-1], dtype=torch.int32)


def _flops(a: Any) -> float:
    """Operations of a search, if every query block of the longest request sees half the keys."""
    keys = keys_of(a)
    if a.cu_seqlens_k is not None and known(a.cu_seqlens_k):
        keys = int(a.cu_seqlens_k.diff().max()) if len(a.cu_seqlens_k) > 1 else 0
    steps = math.ceil(math.log2(max(keys / 2 / a.budget, 1)))
    return 4.0 * a.q.numel() / max(a.stride_q, 1) * a.budget * max(steps, 0)


FORWARD = register(
    TorchOp(
        OP,
        autocast=Autocast(lower=("q", "k"), cache="k", paged=True),
        fake=_fake,
        check_values=_check_values,
        triton="select.hip_block_select:hip_block_select",
    )
)
SPEC = register_op(
    OpSpec(
        function=hip_block_select,
        lower=lower,
        sugar=frozenset({"start", "cu_seqlens_q"}),
        reference=reference.hip_block_select,
        forward=FORWARD,
        sharding=Sharding(
            {
                "q k": "b.h.",
                "k@block_table": "..h.",
                "start_indices": "bh..",
                "start_counts": "bh.",
                "seqlens_q seqlens_k": "b",
                "block_table": "b.",
            },
            ("bh..", "bh."),
            without=("cu_seqlens_q", "cu_seqlens_k"),
        ),
        paper="HiP Attention (Lee et al. 2024)",
        flops=_flops,
    )
)
