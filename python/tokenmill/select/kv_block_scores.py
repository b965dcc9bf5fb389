"""kv_block_scores: scores of queries against pooled keys, boxes or tokens of a cache."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from .._call.attach import register
from .._call.autocast import Autocast
from .._call.operator import TorchOp
from .._call.run import call
from .._lowering import scale_or_default, take_options
from .._other_names import answered_by
from ..reference.select import kv_block_scores as reference
from ..registry import OpSpec, Sharding, register_op
from .rules import (
    check_block_table_values,
    rows_of_request,
)

OP = "kv_block_scores"


def _run(q: Tensor, k: Tensor, **given: Any) -> Tensor:
    _, backend = take_options(kv_block_scores, given)
    scores: Tensor = call(SPEC, (q, k), given, backend)[0]
    return scores


@answered_by(_run)
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
    raise NotImplementedError


def lower(q: Tensor, k: Tensor, **given: Any) -> tuple[Any, ...]:
    a = FORWARD.fields(q=q, k=k, **given)
    a["scale"] = scale_or_default(OP, a["scale"], q)
    return tuple(a.values())


def _check_values(a: Any) -> None:
    rows = a.seqlens_k
    if rows is not None and a.scoring != "max_block":
        rows = (rows.long().clamp(min=0) + a.block_k - 1) // a.block_k
    check_block_table_values(OP, a.block_table, a.k, rows)


def _fake(a: Any) -> Tensor:
    batch, queries, heads = a.q.shape[:3]
    if a.head_reduce != "none":
        heads = 1 if a.head_reduce == "softmax_vote" else a.k.shape[2]
    blocks = rows_of_request(a.k, a.block_table)
    if a.scoring == "max_block":
        blocks = (blocks + a.block_k - 1) // a.block_k
    rows = (queries + a.block_q - 1) // a.block_q
    return a.q.new_empty((batch, heads, rows, blocks), dtype=torch.float32)


def _flops(a: Any) -> float:
    return 2.0 * a.q.shape[1] * a.q.shape[2] * a.k.numel() / max(a.k.shape[2], 1)


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
        function=kv_block_scores,
        lower=lower,
        sugar=frozenset(),
        reference=reference.kv_block_scores,
        plain=functools.partial(reference.kv_block_scores, upcast=False),
        forward=FORWARD,
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
