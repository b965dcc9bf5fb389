"""hip_block_select: blocks of keys for block-sparse attention, by a search in a tree of blocks."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from .._autocast import Autocast
from .._check import (
    as_int,
    check,
    check_bool,
    check_device_of,
    check_dtype,
    check_dtype_of,
    check_head_dim,
    check_last_contiguous,
    check_tensor,
    check_text,
    fail,
    show,
)
from .._dispatch import call
from .._library import TorchOp, register
from ..reference.select import hip_block_select as reference
from ..registry import OpSpec, Sharding, register_op
from .rules import (
    batch_of,
    check_block_table,
    check_block_table_values,
    check_length_values,
    check_per_request,
    rows_of_request,
)

OP = "hip_block_select"

Representative = Literal["first", "middle", "last"]
Bound = Literal["sample", "minmax"]
HeadReduce = Literal["none", "group_max"]
REPRESENTATIVES = ("first", "middle", "last")
BOUNDS = ("sample", "minmax")
HEAD_REDUCES = ("none", "group_max")
MAX_BLOCK = 128  # keys of a block
MAX_BLOCKS = 2048  # of a list: a GPU has the nodes of a search in shared memory


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
    seqlens_k: Tensor | None = None,
    block_table: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    r"""HiP's tree search: the blocks of keys for each block of queries, in O(log S) steps.

    The result is a list for :func:`block_sparse_attention` (or, with one query, for
    :func:`sparse_decode_attention`), which attends beside it to the first num_sink keys and the
    last num_recent keys that a query sees. So these two kinds of keys are *kept anyway*, and a pair
    of a query and a key *counts* if the query sees the key and does not keep it anyway: query i of
    request b is at p = seqlens_k[b] - Sq + i and counts the keys num_sink to p - num_recent
    (causal, bottom-right aligned; not causal: to seqlens_k[b] - 1 - num_recent). Admissible are the
    n blocks of which the last query of the query block counts a key. With N = budget / block_k:

    1. If n <= N, all admissible blocks are selected: list, first and last keys are then all that
       any query of the query block sees.
    2. The admissible blocks are cut into N nodes, node i from floor(n i / N) to floor(n (i+1) / N).
    3. Each node of several blocks becomes two, the left one with the smaller half. A node scores
       max q·k over the keys k of *one* block, its representative, and the queries that speak for
       the query block: every stride_q-th, counted backwards from its last one. Pairs that do not
       count are left out, and so are products that are NaN: if nothing is left, the score is -inf.
       Products are float32, without a scale.
    4. The N nodes with the largest scores stay; ties go to the lower keys. Back to 3
       while a node has several blocks.

    What the list holds is N different blocks (all, if there are fewer). It is likely, not certain,
    to hold the best ones: the search finds what its representatives lead to. Smooth scores it
    finds, and keys that are alike within each first node; a single large score between
    representatives it can miss. With representative="first" the left half of a node has the node's
    score, so the largest score that was ever seen stays. bound="minmax" looks at every block
    instead and returns the N best of all, exactly: O(S) for each query block.

    start is an earlier list, of the step before in decoding or of a coarser search. Its ids become
    aligned groups of restart_span blocks (of which a group counts once), cut to the admissible
    blocks, and the search goes on from these nodes at 3: log2(restart_span) steps instead of
    log2(n / N). Ids that are not admissible or not greater than the id before are left out; a list
    without any other is searched from scratch. The list then has at most the blocks of its groups.

    Args:
        q: ``[B, Sq, H, D]`` float16, bfloat16 or float32 (float64 on the reference), any strides
            with a contiguous last dimension, D up to 256. In decoding Sq is 1, or a few tokens.
        k: ``[B, S, Hk, D]`` in the dtype of q, Hk a divisor of H (GQA); with block_table pages
            ``[pages, page_size, Hk, D]``.
        budget: keys of a list, a multiple of block_k, at most 2048 block_k.
        block_q: queries that share a list; the last block may have fewer.
        block_k: keys of a block, 1 to 128. Block i has the keys i block_k to (i + 1) block_k - 1.
        stride_q: one query of so many speaks for a query block.
        representative: the block that stands for a node: its "first", its "last", or the "middle"
            one, number floor(size / 2).
        num_sink, num_recent: sink (first) and recent (last) keys, attended to anyway.
        bound: "sample" (the search) or "minmax" (exact).
        start: (indices, counts) as this function returns them, or None.
        restart_span: blocks of a node that an id of start becomes.
        causal: a query sees no later key.
        head_reduce: "none" (a list for each query head) or "group_max" (for each key head: scores
            are maxima over its query heads).
        seqlens_k: ``[B]`` int32, keys of each request, those of its queries included. None: all.
        block_table: ``[B, P]`` int32, the pages of each request; key t is row t % page_size of page
            ``block_table[b, t // page_size]``. Entries beyond the length may be anything.
        backend: "cpu", "cuda", "triton", "reference" or None (see :func:`tokenmill.explain`).

    Returns:
        (indices, counts): int32 ``[B, H, ceil(Sq / block_q), budget / block_k]`` block numbers,
        ascending, -1 after the last, and how many there are, int32 ``[B, H, ceil(Sq / block_q)]``;
        with "group_max" Hk for H. The same bits in every run. Not differentiable.

    Raises:
        RuntimeError: naming argument, rule and value. On a GPU lengths are cut to the keys that
            there are, keys of pages that are not there count as zeros, and a float32 product with
            an infinite factor is NaN (three tf32 products make one).

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
    lowered = lower(
        q, k, budget=budget, block_q=block_q, block_k=block_k, stride_q=stride_q,
        representative=representative, num_sink=num_sink, num_recent=num_recent, bound=bound,
        start=start, restart_span=restart_span, causal=causal, head_reduce=head_reduce,
        seqlens_k=seqlens_k, block_table=block_table,
    )  # fmt: skip
    indices, counts = call(SPEC, lowered, backend)
    return indices, counts


def lower(
    q: Tensor,
    k: Tensor,
    *,
    budget: int = 512,
    block_q: int = 64,
    block_k: int = 2,
    stride_q: int = 2,
    representative: str = "middle",
    num_sink: int = 16,
    num_recent: int = 256,
    bound: str = "sample",
    start: tuple[Tensor, Tensor] | None = None,
    restart_span: int = 8,
    causal: bool = True,
    head_reduce: str = "none",
    seqlens_k: Tensor | None = None,
    block_table: Tensor | None = None,
    op: str = OP,
) -> tuple[Any, ...]:
    for name, t in (("q", q), ("k", k)):
        check_tensor(op, name, t)
    for name, option in (("seqlens_k", seqlens_k), ("block_table", block_table)):
        check_tensor(op, name, option, optional=True)
    indices, counts = None, None
    if start is not None:
        pair = isinstance(start, tuple | list) and len(start) == 2
        pair = pair and all(isinstance(t, Tensor) for t in start)
        check(pair, op, "start", "must be (indices, counts) or None", start)
        indices, counts = start
    budget, block_q, block_k, stride_q, num_sink, num_recent, restart_span = (
        as_int(op, name, number)
        for name, number in (
            ("budget", budget),
            ("block_q", block_q),
            ("block_k", block_k),
            ("stride_q", stride_q),
            ("num_sink", num_sink),
            ("num_recent", num_recent),
            ("restart_span", restart_span),
        )
    )
    for name, text in (("representative", representative), ("bound", bound),
                       ("head_reduce", head_reduce)):  # fmt: skip
        check_text(op, name, text)
    check_bool(op, "causal", causal)
    return (
        q, k, budget, block_q, block_k, stride_q, representative, num_sink, num_recent, bound,
        indices, counts, restart_span, causal, head_reduce, seqlens_k, block_table,
    )  # fmt: skip


def _check(
    q: Tensor,
    k: Tensor,
    budget: int,
    block_q: int,
    block_k: int,
    stride_q: int,
    representative: str,
    num_sink: int,
    num_recent: int,
    bound: str,
    start_indices: Tensor | None,
    start_counts: Tensor | None,
    restart_span: int,
    causal: bool,
    head_reduce: str,
    seqlens_k: Tensor | None,
    block_table: Tensor | None,
    *,
    float64: bool = False,
    op: str = OP,
) -> None:
    check(q.dim() == 4, op, "q", "must have 4 dimensions [B, S, H, D]", q.dim())
    rule = "must have 4 dimensions [B, S, H, D] or [pages, page_size, H, D]"
    check(k.dim() == 4, op, "k", rule, k.dim())
    check_dtype(op, "q", q, float64=float64)
    check_dtype_of(op, "k", k, "q", q)
    check_device_of(op, "k", k, "q", q)
    for name, t in (("q", q), ("k", k)):
        check_last_contiguous(op, name, t)
    dim = q.shape[3]
    check_head_dim(op, "q", q)
    if k.shape[3] != dim:
        fail(op, "k", f"must have the head dimension of q, {dim}", k.shape[3])
    heads, kv_heads = q.shape[2], k.shape[2]
    if heads != kv_heads and (kv_heads == 0 or heads % kv_heads != 0):
        fail(op, "k", f"number of heads must divide that of q, {heads} (GQA)", kv_heads)
    check_block_table(op, block_table, k)
    batch = batch_of(k, block_table)
    name = "k" if block_table is None else "block_table"
    if batch != q.shape[0]:
        fail(op, name, f"must have the batch size of q, {q.shape[0]}", batch)
    check(1 <= block_k <= MAX_BLOCK, op, "block_k", f"must be 1 to {MAX_BLOCK}", block_k)
    for name, size in (("block_q", block_q), ("stride_q", stride_q),
                       ("restart_span", restart_span)):  # fmt: skip
        check(1 <= size < 2**31, op, name, "must be 1 to 2^31 - 1", size)
    rule = f"must be a multiple of block_k, from 1 to {MAX_BLOCKS} times"
    blocks_ok = budget % block_k == 0 and 1 <= budget // block_k <= MAX_BLOCKS
    check(blocks_ok, op, "budget", rule, budget)
    rule = "must be 'first', 'middle' or 'last'"
    check(representative in REPRESENTATIVES, op, "representative", rule, representative)
    check(num_sink >= 0, op, "num_sink", "must not be negative", num_sink)
    check(num_recent >= 0, op, "num_recent", "must not be negative", num_recent)
    check(bound in BOUNDS, op, "bound", "must be 'sample' or 'minmax'", bound)
    rule = "must be 'none' or 'group_max'"
    check(head_reduce in HEAD_REDUCES, op, "head_reduce", rule, head_reduce)
    check_per_request(op, "seqlens_k", seqlens_k, batch, "k", k)
    shape = _list_shape(q, k, budget, block_q, block_k, head_reduce)
    for name, given, wanted in (("start_indices", start_indices, shape),
                            ("start_counts", start_counts, shape[:-1])):  # fmt: skip
        if given is None:
            continue
        check(bound == "sample", op, name, "must be None with bound 'minmax'", given)
        if list(given.shape) != wanted:
            fail(op, name, f"must have the shape of the result, {show(wanted)}", given.shape)
        check(given.dtype == torch.int32, op, name, "must be int32", given.dtype)
        check_last_contiguous(op, name, given)
        check_device_of(op, name, given, "q", q)
    if start_indices is not None and start_counts is None:
        fail(op, "start_counts", "must be given with start_indices", None)
    keys = rows_of_request(k, block_table)
    check(keys < 2**31, op, "k", "must have less than 2^31 keys of a request", keys)


def _list_shape(
    q: Tensor, k: Tensor, budget: int, block_q: int, block_k: int, head_reduce: str
) -> list[int]:
    lists = k.shape[2] if head_reduce == "group_max" else q.shape[2]
    return [q.shape[0], lists, (q.shape[1] + block_q - 1) // block_q, budget // block_k]


def _check_values(
    q: Tensor,
    k: Tensor,
    budget: int,
    block_q: int,
    block_k: int,
    stride_q: int,
    representative: str,
    num_sink: int,
    num_recent: int,
    bound: str,
    start_indices: Tensor | None,
    start_counts: Tensor | None,
    restart_span: int,
    causal: bool,
    head_reduce: str,
    seqlens_k: Tensor | None,
    block_table: Tensor | None,
) -> None:
    check_length_values(OP, "seqlens_k", seqlens_k, rows_of_request(k, block_table))
    check_block_table_values(OP, block_table, k, seqlens_k)


def _fake(
    q: Tensor,
    k: Tensor,
    budget: int,
    block_q: int,
    block_k: int,
    stride_q: int,
    representative: str,
    num_sink: int,
    num_recent: int,
    bound: str,
    start_indices: Tensor | None,
    start_counts: Tensor | None,
    restart_span: int,
    causal: bool,
    head_reduce: str,
    seqlens_k: Tensor | None,
    block_table: Tensor | None,
) -> tuple[Tensor, Tensor]:
    shape = _list_shape(q, k, budget, block_q, block_k, head_reduce)
    indices = q.new_empty(shape, dtype=torch.int32)
    return indices, q.new_empty(shape[:-1], dtype=torch.int32)


def _flops(
    q: Tensor, k: Tensor, budget: int, block_q: int, block_k: int, stride_q: int, *rest: Any
) -> float:
    """Operations of a search whose query blocks all see half the keys."""
    table = rest[-1]
    admissible = rows_of_request(k, table) / 2
    steps = math.ceil(math.log2(max(admissible / budget, 1)))
    return 4.0 * q.numel() / max(stride_q, 1) * budget * max(steps, 0)


FORWARD = register(
    TorchOp(
        OP,
        autocast=Autocast(lower=("q", "k"), cache="k", paged=True),
        check=_check,
        fake=_fake,
        check_values=_check_values,
        triton="select.hip_block_select:hip_block_select",
    )
)
SPEC = register_op(
    OpSpec(
        name=OP,
        family="select",
        function=hip_block_select,
        lower=lower,
        reference=reference.hip_block_select,
        plain=reference.hip_block_select,
        forward=FORWARD,
        backward=None,
        differentiable=(),
        sharding=Sharding(
            {
                "q k": "b.h.",
                "k@block_table": "..h.",
                "start_indices": "bh..",
                "start_counts": "bh.",
                "seqlens_k": "b",
                "block_table": "b.",
            },
            ("bh..", "bh."),
        ),
        paper="HiP Attention (Lee et al. 2024)",
        flops=_flops,
    )
)
