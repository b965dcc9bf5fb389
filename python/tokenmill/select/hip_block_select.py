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
    check_cu_seqlens_values,
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
from .._flops import known
from .._library import TorchOp, record_of, register
from ..reference.select import hip_block_select as reference
from ..registry import OpSpec, Sharding, register_op
from .rules import (
    check_block_table_values,
    check_length_values,
    check_per_request,
    check_sequences,
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
Arguments = record_of(OP)


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
    r"""HiP's tree search: the blocks of keys for each block of queries, in O(log S) steps.

    The result is a list for :func:`block_sparse_attention` (or, with one query, for
    :func:`sparse_decode_attention`), which attends beside it to the first num_sink keys and the
    last num_recent keys that a query sees. So these two kinds of keys are *kept anyway*, and a pair
    of a query and a key *counts* if the query sees the key and does not keep it anyway: query i of
    a request with m queries and l keys is at p = l - m + i and counts the keys num_sink to
    p - num_recent (causal, bottom-right aligned; not causal: to l - 1 - num_recent). Admissible are
    the n blocks of which the last query of the query block counts a key. With N = budget / block_k:

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

    Requests of different lengths are padded (seqlens_q, seqlens_k), packed (cu_seqlens) or, of
    keys, in pages (block_table). Query blocks begin at the first query of each request, which has
    the lists that it has alone, bit for bit.

    Args:
        q: ``[B, Sq, H, D]`` float16, bfloat16 or float32 (float64 on the reference), any strides
            with a contiguous last dimension, D up to 256; packed ``[T, H, D]`` with cu_seqlens_q.
            In decoding Sq is 1, or a few tokens.
        k: ``[B, S, Hk, D]`` in the dtype of q, Hk a divisor of H (GQA); packed ``[Tk, Hk, D]`` with
            cu_seqlens_k; ``[pages, page_size, Hk, D]`` with block_table.
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
        seqlens_q: int32 ``[B]``, the queries of each request, its first rows of q. None: Sq. Query
            blocks behind them have empty lists.
        seqlens_k: int32 ``[B]``, keys of each request, those of its queries included. None: all.
        cu_seqlens_q: int32 ``[B + 1]``, where packed queries begin and end. Their keys are packed
            too, or ``[B, S, Hk, D]`` or pages.
        cu_seqlens_k: the same of packed keys. None with a packed k: cu_seqlens_q.
        block_table: int32 ``[B, P]``, the pages of each request; key t is row t % page_size of page
            ``block_table[b, t // page_size]``. Entries beyond the length may be anything.
        backend: "cpu", "cuda", "triton", "reference" or None (see :func:`tokenmill.explain`).

    Returns:
        (indices, counts): int32 ``[B, H, ceil(Sq / block_q), budget / block_k]`` block numbers,
        ascending, -1 after the last, and how many there are, int32 ``[B, H, ceil(Sq / block_q)]``;
        with "group_max" Hk for H. Of packed queries int32 ``[H, R, budget / block_k]`` and ``[H,
        R]`` with R = T // block_q + B: query block r of sequence b has row cu_seqlens_q[b] //
        block_q + b + r, and rows without one are empty. The same bits in every run. Not
        differentiable.

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
        seqlens_q=seqlens_q, seqlens_k=seqlens_k, cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k, block_table=block_table,
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
    seqlens_q: Tensor | None = None,
    seqlens_k: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    block_table: Tensor | None = None,
    op: str = OP,
) -> tuple[Any, ...]:
    for name, t in (("q", q), ("k", k)):
        check_tensor(op, name, t)
    for name, option in (("seqlens_q", seqlens_q), ("seqlens_k", seqlens_k),
                         ("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k),
                         ("block_table", block_table)):  # fmt: skip
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
    if cu_seqlens_q is not None and cu_seqlens_k is None and k.dim() == 3:
        cu_seqlens_k = cu_seqlens_q
    return (
        q, k, budget, block_q, block_k, stride_q, representative, num_sink, num_recent, bound,
        indices, counts, restart_span, causal, head_reduce, seqlens_k, block_table, seqlens_q,
        cu_seqlens_q, cu_seqlens_k,
    )  # fmt: skip


# csrc/select/hip_block_select/host.cpp has the same rules in the same order and words.
def _check(*lowered: Any, float64: bool = False, op: str = OP) -> None:
    a = Arguments(*lowered)
    _check_rows(op, a, float64)
    batch = check_sequences(
        op, a.q, a.k, a.seqlens_k, a.cu_seqlens_q, a.cu_seqlens_k, a.block_table, a.seqlens_q
    )
    check(1 <= a.block_k <= MAX_BLOCK, op, "block_k", f"must be 1 to {MAX_BLOCK}", a.block_k)
    for name, size in (("block_q", a.block_q), ("stride_q", a.stride_q),
                       ("restart_span", a.restart_span)):  # fmt: skip
        check(1 <= size < 2**31, op, name, "must be 1 to 2^31 - 1", size)
    rule = f"must be a multiple of block_k, from 1 to {MAX_BLOCKS} times"
    blocks_ok = a.budget % a.block_k == 0 and 1 <= a.budget // a.block_k <= MAX_BLOCKS
    check(blocks_ok, op, "budget", rule, a.budget)
    rule = "must be 'first', 'middle' or 'last'"
    check(a.representative in REPRESENTATIVES, op, "representative", rule, a.representative)
    check(a.num_sink >= 0, op, "num_sink", "must not be negative", a.num_sink)
    check(a.num_recent >= 0, op, "num_recent", "must not be negative", a.num_recent)
    check(a.bound in BOUNDS, op, "bound", "must be 'sample' or 'minmax'", a.bound)
    rule = "must be 'none' or 'group_max'"
    check(a.head_reduce in HEAD_REDUCES, op, "head_reduce", rule, a.head_reduce)
    check_per_request(op, "seqlens_q", a.seqlens_q, batch, "q", a.q)
    check_per_request(op, "seqlens_k", a.seqlens_k, batch, "k", a.k)
    shape = _list_shape(a)
    for name, given, wanted in (("start_indices", a.start_indices, shape),
                            ("start_counts", a.start_counts, shape[:-1])):  # fmt: skip
        if given is None:
            continue
        check(a.bound == "sample", op, name, "must be None with bound 'minmax'", given)
        if list(given.shape) != wanted:
            fail(op, name, f"must have the shape of the result, {show(wanted)}", given.shape)
        check(given.dtype == torch.int32, op, name, "must be int32", given.dtype)
        check_last_contiguous(op, name, given)
        check_device_of(op, name, given, "q", a.q)
    if a.start_indices is not None and a.start_counts is None:
        fail(op, "start_counts", "must be given with start_indices", None)
    check(_keys(a) < 2**31, op, "k", "must have less than 2^31 keys of a request", _keys(a))


def _check_rows(op: str, a: Any, float64: bool) -> None:
    packed = "must have 3 dimensions [T, H, D] (packed)"
    rule = packed if a.cu_seqlens_q is not None else "must have 4 dimensions [B, S, H, D]"
    check(a.q.dim() == (4 if a.cu_seqlens_q is None else 3), op, "q", rule, a.q.dim())
    rule = "must have 4 dimensions [B, S, H, D] or [pages, page_size, H, D]"
    rule = packed if a.cu_seqlens_k is not None else rule
    check(a.k.dim() == (4 if a.cu_seqlens_k is None else 3), op, "k", rule, a.k.dim())
    check_dtype(op, "q", a.q, float64=float64)
    check_dtype_of(op, "k", a.k, "q", a.q)
    check_device_of(op, "k", a.k, "q", a.q)
    for name, t in (("q", a.q), ("k", a.k)):
        check_last_contiguous(op, name, t)
    heads, dim = a.q.shape[-2:]
    check_head_dim(op, "q", a.q)
    if a.k.shape[-1] != dim:
        fail(op, "k", f"must have the head dimension of q, {dim}", a.k.shape[-1])
    kv_heads = a.k.shape[-2]
    if heads != kv_heads and (kv_heads == 0 or heads % kv_heads != 0):
        fail(op, "k", f"number of heads must divide that of q, {heads} (GQA)", kv_heads)


def _keys(a: Any) -> int:
    """Of a request, at most; of packed sequences all."""
    if a.cu_seqlens_k is not None:
        return int(a.k.shape[0])
    return rows_of_request(a.k, a.block_table)


def _list_shape(a: Any) -> list[int]:
    lists, entries = a.q.shape[-2], a.budget // a.block_k
    if a.head_reduce == "group_max":
        lists = a.k.shape[-2]
    if a.cu_seqlens_q is not None:
        return [lists, a.q.shape[0] // a.block_q + a.cu_seqlens_q.shape[0] - 1, entries]
    return [a.q.shape[0], lists, -(-a.q.shape[1] // a.block_q), entries]


def _check_values(*lowered: Any) -> None:
    a = Arguments(*lowered)
    if a.cu_seqlens_q is not None:
        check_cu_seqlens_values(OP, "cu_seqlens_q", a.cu_seqlens_q, a.q.shape[0])
    else:
        check_length_values(OP, "seqlens_q", a.seqlens_q, a.q.shape[1])
    if a.cu_seqlens_k is not None:
        check_cu_seqlens_values(OP, "cu_seqlens_k", a.cu_seqlens_k, a.k.shape[0])
        return
    check_length_values(OP, "seqlens_k", a.seqlens_k, _keys(a))
    check_block_table_values(OP, a.block_table, a.k, a.seqlens_k)


def _fake(*lowered: Any) -> tuple[Tensor, Tensor]:
    a = Arguments(*lowered)
    shape = _list_shape(a)
    indices = a.q.new_empty(shape, dtype=torch.int32)
    return indices, a.q.new_empty(shape[:-1], dtype=torch.int32)


def _flops(*lowered: Any) -> float:
    """Operations of a search whose query blocks all see half the keys, of the longest request."""
    a = Arguments(*lowered)
    keys = _keys(a)
    if a.cu_seqlens_k is not None and known(a.cu_seqlens_k):
        keys = int(a.cu_seqlens_k.diff().max()) if len(a.cu_seqlens_k) > 1 else 0
    steps = math.ceil(math.log2(max(keys / 2 / a.budget, 1)))
    return 4.0 * a.q.numel() / max(a.stride_q, 1) * a.budget * max(steps, 0)


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
