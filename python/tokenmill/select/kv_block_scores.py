"""kv_block_scores: scores of queries against pooled keys, boxes or tokens of a cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._call.attach import register
from .._call.autocast import Autocast
from .._call.operator import TorchOp
from .._call.run import call
from .._check import (
    as_int,
    check,
    check_bool,
    check_device_of,
    check_dtype,
    check_dtype_of,
    check_head_dim,
    check_last_contiguous,
    check_scale,
    check_tensor,
    check_text,
    fail,
)
from .._kv_cache import check_cache_dtype, check_cache_scale
from .._lowering import scale_or_default
from ..reference.select import kv_block_scores as reference
from ..registry import OpSpec, Sharding, register_op
from .rules import (
    batch_of,
    check_block_table,
    check_block_table_values,
    check_per_request,
    rows_of_request,
)

OP = "kv_block_scores"
SCORINGS = ("dot", "minmax", "max_block")
Q_REDUCES = ("none", "mean", "max")
HEAD_REDUCES = ("none", "group_max", "group_mean", "softmax_vote")


def kv_block_scores(
    q: Tensor,
    k: Tensor,
    *,
    scoring: str = "dot",
    block_k: int = 1,
    q_reduce: str = "none",
    block_q: int = 1,
    head_reduce: str = "none",
    scale: float | None = None,
    causal: bool = False,
    num_sink: int = 0,
    num_recent: int = 0,
    seqlens_k: Tensor | None = None,
    block_table: Tensor | None = None,
    backend: str | None = None,
    k_scale: Tensor | None = None,
) -> Tensor:
    r"""Scores of each row of queries against each key block: pooled keys, boxes or tokens.

    A query and a row of k give the score z, and a score is reduced in this order:

    1. With q_reduce="mean" the queries of a block_q become one: their mean in float32, rounded once
       to the dtype of q, so that its product is the mean of their products. Its position is the
       position of its last query.
    2. z = scale q·k ("dot": k has a pooled key for each block, or tokens with block_k=1), or with
       scoring="minmax" the bound :math:`scale \sum_d \max(q_d, 0) M_d + \min(q_d, 0) m_d`, which no
       key of a box exceeds (for scale > 0), or with "max_block" q·k of raw keys.
    3. z is -inf where the row is masked for the query: tokens from seqlens_k on, later than the
       query if causal (bottom-right aligned: query i is at seqlens_k - Sq + i), before num_sink,
       and the last num_recent of the remaining tokens. A row of several tokens is visible if one of
       them is. Boxes without keys (minimum above maximum) are masked too.
    4. "max_block" takes the maximum over the tokens of each block.
    5. q_reduce="max" takes the maximum over the queries of each block_q.
    6. head_reduce takes the maximum or the mean over the query heads of a KV head, or with
       "softmax_vote" the sum over all heads of the softmax of z over the visible blocks. A NaN does
       not count in this softmax, and only makes its own block NaN.

    Blocks not visible to any query of a row are -inf, and a NaN in a key makes its own block NaN.
    :func:`topk_select` selects neither. Sums and results are float32.

    Args:
        q: ``[B, Sq, H, D]`` float16, bfloat16 or float32 (float64 on the reference), any strides
            with a contiguous last dimension, D up to 256.
        k: ``[B, N, Hk, D]`` in the dtype of q or in float8_e4m3fn, Hk a divisor of H (GQA): pooled
            keys or tokens (scoring="dot"), tokens ("max_block"); ``[B, N, Hk, 2, D]`` in the dtype
            of q, minima first ("minmax"; see :func:`block_pool_keys`). With block_table ``[pages,
            page_size, ...]``.
        scoring: "dot", "minmax" or "max_block".
        block_k: tokens of a block.
        q_reduce: "none", "mean" or "max" over the queries of a row; with "none" block_q is 1.
        block_q: queries of a row; the last row may have fewer.
        head_reduce: "none", "group_max", "group_mean" or "softmax_vote".
        scale: factor of z. None = 1/sqrt(D).
        causal: a query sees no later token.
        num_sink: number of first tokens that are not scored, because they are always kept.
        num_recent: number of last visible tokens, not scored likewise.
        seqlens_k: int32 ``[B]``, number of tokens (not blocks) of each request; clamped to the
            capacity, negative = none. None: all.
        block_table: ``[B, P]`` int32, the pages of each request; row t of k is row t % page_size of
            page ``block_table[b, t // page_size]``. Entries beyond the length may be anything.
        backend: "cpu", "cuda", "triton", "reference" or None (see :func:`tokenmill.explain`).
        k_scale: scales of keys in float8_e4m3fn: float32 ``[1]``, ``[Hk]`` or, for each row, ``[B,
            N, Hk]`` (``[pages, page_size, Hk]``), any strides: keys are the stored numbers times
            their scale, in float32. None = 1.

    Returns:
        float32 (float64 on the reference) ``[B, H, ceil(Sq / block_q), Nb]``, with "group_max" and
        "group_mean" ``[B, Hk, ...]``, with "softmax_vote" ``[B, 1, ...]``. Nb = N, with "max_block"
        ceil(N / block_k). Not differentiable.

    Raises:
        RuntimeError: naming argument, rule and value. On a GPU rows of pages that do not exist are
            read as zeros.

    Complexity: 2 Sq H N D operations (twice that for "minmax"; Sq / block_q for Sq with "mean").
    Keys are read once for the query heads of a KV head. With "max_block" token scores are never
    written to memory; "softmax_vote" writes B H Nb floats per row in addition to its result, which
    is cheaper than reading the keys twice.

    Paper: Quest (Tang et al. 2024), section 3.3; TokenSelect (Wu et al. 2024), section 4.2;
    MInference (Jiang et al. 2024), section 3.2.

    Example:
        >>> import torch, tokenmill as tm
        >>> q, k = torch.randn(2, 8, 64), torch.randn(1, 1000, 2, 64)
        >>> boxes = tm.block_pool_keys(k, 16, mode="minmax")
        >>> bound = tm.kv_block_scores(q[None, :1], boxes, scoring="minmax", block_k=16)
        >>> best = tm.kv_block_scores(q[None, :1], k, scoring="max_block", block_k=16)
        >>> bound.shape, bool((bound + 1e-5 >= best).all())
        (torch.Size([1, 8, 1, 63]), True)
    """
    lowered = lower(
        q, k, scoring=scoring, block_k=block_k, q_reduce=q_reduce, block_q=block_q,
        head_reduce=head_reduce, scale=scale, causal=causal, num_sink=num_sink,
        num_recent=num_recent, seqlens_k=seqlens_k, block_table=block_table, k_scale=k_scale,
    )  # fmt: skip
    return call(SPEC, lowered, backend)[0]


def lower(
    q: Tensor,
    k: Tensor,
    *,
    scoring: str = "dot",
    block_k: int = 1,
    q_reduce: str = "none",
    block_q: int = 1,
    head_reduce: str = "none",
    scale: float | None = None,
    causal: bool = False,
    num_sink: int = 0,
    num_recent: int = 0,
    seqlens_k: Tensor | None = None,
    block_table: Tensor | None = None,
    k_scale: Tensor | None = None,
) -> tuple[Any, ...]:
    for name, t in (("q", q), ("k", k)):
        check_tensor(OP, name, t)
    for name, option in (
        ("seqlens_k", seqlens_k),
        ("block_table", block_table),
        ("k_scale", k_scale),
    ):
        check_tensor(OP, name, option, optional=True)
    block_k, block_q = as_int(OP, "block_k", block_k), as_int(OP, "block_q", block_q)
    num_sink, num_recent = as_int(OP, "num_sink", num_sink), as_int(OP, "num_recent", num_recent)
    for name, text in (("scoring", scoring), ("q_reduce", q_reduce), ("head_reduce", head_reduce)):
        check_text(OP, name, text)
    check_bool(OP, "causal", causal)
    factor = scale_or_default(OP, scale, q)
    return (
        q, k, scoring, block_k, q_reduce, block_q, head_reduce, factor, causal, num_sink,
        num_recent, seqlens_k, block_table, k_scale,
    )  # fmt: skip


def _check(
    q: Tensor,
    k: Tensor,
    scoring: str,
    block_k: int,
    q_reduce: str,
    block_q: int,
    head_reduce: str,
    scale: float,
    causal: bool,
    num_sink: int,
    num_recent: int,
    seqlens_k: Tensor | None,
    block_table: Tensor | None,
    k_scale: Tensor | None,
    *,
    float64: bool = False,
) -> None:
    rule = "must be 'dot', 'minmax' or 'max_block'"
    check(scoring in SCORINGS, OP, "scoring", rule, scoring)
    check(q.dim() == 4, OP, "q", "must have 4 dimensions [B, S, H, D]", q.dim())
    rule = "must have 4 dimensions [B, N, H, D] or [pages, page_size, H, D]"
    if scoring == "minmax":
        rule = "must have 5 dimensions [B, N, H, 2, D] or [pages, page_size, H, 2, D]"
    check(k.dim() == (5 if scoring == "minmax" else 4), OP, "k", rule, k.dim())
    check_dtype(OP, "q", q, float64=float64)
    if scoring == "minmax":
        check_dtype_of(OP, "k", k, "q", q)
    else:
        check_cache_dtype(OP, "k", k, q)
    check_device_of(OP, "k", k, "q", q)
    for name, t in (("q", q), ("k", k)):
        check_last_contiguous(OP, name, t)
    dim = q.shape[3]
    check_head_dim(OP, "q", q)
    if k.shape[-1] != dim:
        fail(OP, "k", f"must have the head dimension of q, {dim}", k.shape[-1])
    if scoring == "minmax":
        rule = "must have 2 rows for each block, minimum and maximum"
        check(k.shape[3] == 2, OP, "k", rule, k.shape[3])
    heads, kv_heads = q.shape[2], k.shape[2]
    if heads != kv_heads and (kv_heads == 0 or heads % kv_heads != 0):
        fail(OP, "k", f"number of heads must divide that of q, {heads} (GQA)", kv_heads)
    check_block_table(OP, block_table, k)
    batch = batch_of(k, block_table)
    name = "k" if block_table is None else "block_table"
    if batch != q.shape[0]:
        fail(OP, name, f"must have the batch size of q, {q.shape[0]}", batch)
    for name, size in (("block_k", block_k), ("block_q", block_q)):
        check(1 <= size < 2**31, OP, name, "must be 1 to 2^31 - 1", size)
    check(q_reduce in Q_REDUCES, OP, "q_reduce", "must be 'none', 'mean' or 'max'", q_reduce)
    if q_reduce == "none":
        check(block_q == 1, OP, "block_q", "must be 1 with q_reduce 'none'", block_q)
    rule = "must be 'none', 'group_max', 'group_mean' or 'softmax_vote'"
    check(head_reduce in HEAD_REDUCES, OP, "head_reduce", rule, head_reduce)
    check_scale(OP, scale)
    check(num_sink >= 0, OP, "num_sink", "must not be negative", num_sink)
    check(num_recent >= 0, OP, "num_recent", "must not be negative", num_recent)
    check_per_request(OP, "seqlens_k", seqlens_k, batch, "k", k)
    check_cache_scale(OP, "k_scale", k_scale, "k", k, q)


def _check_values(
    q: Tensor,
    k: Tensor,
    scoring: str,
    block_k: int,
    q_reduce: str,
    block_q: int,
    head_reduce: str,
    scale: float,
    causal: bool,
    num_sink: int,
    num_recent: int,
    seqlens_k: Tensor | None,
    block_table: Tensor | None,
    k_scale: Tensor | None,
) -> None:
    if seqlens_k is not None and scoring != "max_block":  # counts rows of k
        seqlens_k = (seqlens_k.long().clamp(min=0) + block_k - 1) // block_k
    check_block_table_values(OP, block_table, k, seqlens_k)


def _fake(
    q: Tensor,
    k: Tensor,
    scoring: str,
    block_k: int,
    q_reduce: str,
    block_q: int,
    head_reduce: str,
    scale: float,
    causal: bool,
    num_sink: int,
    num_recent: int,
    seqlens_k: Tensor | None,
    block_table: Tensor | None,
    k_scale: Tensor | None,
) -> Tensor:
    batch, queries, heads, _ = q.shape
    if head_reduce != "none":
        heads = 1 if head_reduce == "softmax_vote" else k.shape[2]
    blocks = rows_of_request(k, block_table)
    if scoring == "max_block":
        blocks = (blocks + block_k - 1) // block_k
    rows = (queries + block_q - 1) // block_q
    return q.new_empty((batch, heads, rows, blocks), dtype=torch.float32)


def _plain(q: Tensor, *lowered: Any) -> tuple[Tensor]:
    arguments: tuple[Any, ...] = (q, *lowered, q.dtype)
    return reference.kv_block_scores(*arguments)


def _flops(q: Tensor, k: Tensor, *lowered: Any) -> float:
    return 2.0 * q.shape[1] * q.shape[2] * k.numel() / max(k.shape[2], 1)


FORWARD = register(
    TorchOp(
        OP,
        autocast=Autocast(lower=("q",), cache="k"),
        fake=_fake,
        check_values=_check_values,
        triton="select.kv_block_scores:kv_block_scores",
    )
)
SPEC = register_op(
    OpSpec(
        name=OP,
        family="select",
        function=kv_block_scores,
        lower=lower,
        reference=reference.kv_block_scores,
        plain=_plain,
        forward=FORWARD,
        backward=None,
        differentiable=(),
        sharding=Sharding(
            {
                "q": "b.h.",
                "k": "b.h. b.h..",
                "k@block_table": "..h. ..h..",
                "seqlens_k": "b",
                "block_table": "b.",
                "k_scale": "h b.h",
                "k_scale@block_table": "h ..h",
            },
            ("bh..",),
        ),
        paper="Quest (Tang et al. 2024), TokenSelect (Wu et al. 2024)",
        flops=_flops,
    )
)
