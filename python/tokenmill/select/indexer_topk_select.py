"""indexer_topk_select: the keys with the largest indexer scores, for each query."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._call.attach import register
from .._call.autocast import Autocast
from .._call.operator import TorchOp
from .._call.run import call
from .._flops import band, known
from .._lowering import take_options
from .._other_names import answered_by
from ..reference.select import indexer_topk_select as reference
from ..registry import OpSpec, Sharding, register_op
from .rules import (
    check_block_table_values,
    check_length_values,
    check_packed_values,
    keys_of,
)

OP = "indexer_topk_select"


def _run(q: Tensor, k: Tensor, weights: Tensor, topk: int, **given: Any) -> tuple[Tensor, ...]:
    _, backend = take_options(indexer_topk_select, given)
    used = 3 if given.get("return_values") is True else 2
    return call(SPEC, (q, k, weights, topk), given, backend, used=used)[:used]


@answered_by(_run)
def indexer_topk_select(
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    topk: int,
    *,
    causal: bool = True,
    activation: str = "relu",
    block_k: int = 1,
    num_sink: int = 0,
    num_recent: int = 0,
    seqlens_k: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    block_table: Tensor | None = None,
    return_values: bool = False,
    k_scale: Tensor | None = None,
    previous: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    r"""The topk keys that an indexer scores highest, for each query: exact; the score matrix is
    never materialised.

    Query i and key j have the score :math:`s_{ij} = \sum_h w_{ih}\, act(q_{ih} \cdot k_j)`, in
    float32; all heads share one key. Of the n keys of a sequence with Sq queries, query i sees key
    j if :math:`j \le i + n - Sq` (causal, bottom-right aligned), or all of them. Its list holds the
    topk largest scores among its visible keys, excluding the first num_sink and the last num_recent
    of these. Ties go to the lower position. NaN and -inf are never selected, so a list may have
    fewer than topk entries, as it has where fewer keys are visible.

    Args:
        q: ``[B, Sq, Hi, D]``, or packed ``[T, Hi, D]`` with cu_seqlens_q; float16, bfloat16 or
            float32 (float64 on the reference), any strides with a contiguous last dimension; Hi up
            to 64, D up to 256.
        k: ``[B, Sk, D]`` in the dtype of q or in float8_e4m3fn; packed ``[Tk, D]`` with
            cu_seqlens_k; ``[pages, page_size, D]`` with block_table.
        weights: ``[B, Sq, Hi]`` (packed ``[T, Hi]``) float32 or in the dtype of q. A scale of the
            scores is folded into them.
        topk: number of entries of a list, 1 to 65536; it may exceed the number of keys.
        causal: a query sees no later key.
        activation: "relu" or "none".
        block_k: keys of a block. Above 1 lists hold ids of blocks, and topk counts blocks; the
            score of a block is the maximum over its keys that may be listed, NaN if one is NaN.
        num_sink: number of first keys excluded from the lists, because they are always attended to.
        num_recent: number of last visible keys excluded likewise (including the query's own).
        seqlens_k: int32 ``[B]``, number of keys of each request in k. None: all.
        cu_seqlens_q: int32 ``[B + 1]``, offsets of packed queries. Their keys are packed too, or
            ``[B, Sk, D]`` or pages. On a GPU, which does not check these values, a token outside
            all sequences gets an empty list.
        cu_seqlens_k: the same for packed keys. None with a packed k: cu_seqlens_q.
        block_table: int32 ``[B, P]``, the pages of each request; row t of its keys is row
            t % page_size of page ``block_table[b, t // page_size]``. Entries beyond the length may
            be anything. On a GPU, keys whose page does not exist are not listed.
        return_values: also return the scores.
        k_scale: for keys in float8_e4m3fn, float32, any strides: ``[B, Sk]`` (packed ``[Tk]``, in
            pages ``[pages, page_size]``), one per key as written by :func:`kv_cache_append`, or
            ``[1]``. Key j is k_scale_j times its code. None: 1. A key whose code or scale is not
            finite has the score NaN.
        previous: int32 ``[B, Sq, K]`` (packed ``[T, K]``), K at least 1: a hint, the lists of the
            previous step. It never changes the result. In a step of one query per request, with
            block_k = 1 and at least 16 keys for each of the topk entries, a CPU scores these keys
            first and uses the minimum of their scores as the initial threshold, which saves most
            where later keys score higher; ids that are not greater than all before them are
            skipped. Other backends ignore it.
        backend: "cpu", "cuda", "triton", "reference" or None (see :func:`tokenmill.explain`).

    Returns:
        (indices, counts[, values]): ``[B, Sq, topk]`` int32, ascending positions in the sequence
        with -1 after the last, ``[B, Sq]`` int32, and ``[B, Sq, topk]`` float32 with -inf after the
        last; packed ``[T, topk]``, ``[T]`` and ``[T, topk]``. Not differentiable.

    Raises:
        RuntimeError: naming argument, rule and value.

    Complexity: 2 Hi D operations for each pair of a query and a visible key. In addition to the
    results, memory for O(topk) candidates of each query in progress on a CPU; on GPUs for min(topk
    + 8192 per query, 2^26) scores in total, but at least the scores of 64 queries.

    Paper: DeepSeek-V3.2-Exp (DeepSeek-AI 2025), section 2.1: the lightning indexer of DeepSeek
    Sparse Attention, its index score and top-k selection.

    Example:
        >>> import torch, tokenmill as tm
        >>> q, k, weights = torch.ones(1, 4, 2, 8), torch.zeros(1, 4, 8), torch.ones(1, 4, 2)
        >>> k[0, 1] = 1
        >>> indices, counts = tm.indexer_topk_select(q, k, weights, 2)
        >>> indices.tolist(), counts.tolist()
        ([[[0, -1], [0, 1], [0, 1], [0, 1]]], [[1, 2, 2, 2]])
        >>> tm.indexer_topk_select(q, k, weights, 1, block_k=2)[0].flatten().tolist()
        [0, 0, 0, 0]
    """
    raise NotImplementedError


def lower(q: Tensor, k: Tensor, weights: Tensor, topk: int, **given: Any) -> tuple[Any, ...]:
    a = FORWARD.fields(q=q, k=k, weights=weights, topk=topk, **given)
    if a["cu_seqlens_q"] is not None and a["cu_seqlens_k"] is None and k.dim() == 2:
        a["cu_seqlens_k"] = a["cu_seqlens_q"]
    return tuple(a.values())


def _check_values(a: Any) -> None:
    check_packed_values(OP, a)
    check_length_values(OP, "seqlens_k", a.seqlens_k, keys_of(a))
    check_block_table_values(OP, a.block_table, a.k, a.seqlens_k)


def _fake(a: Any) -> tuple[Tensor, Tensor, Tensor]:
    rows = a.q.shape[:-2]
    wide = torch.promote_types(a.q.dtype, torch.float32)
    return (
        a.q.new_empty((*rows, a.topk), dtype=torch.int32),
        a.q.new_empty(rows, dtype=torch.int32),
        a.q.new_empty((*rows, a.topk) if a.return_values else (0,), dtype=wide),
    )


def _flops(a: Any) -> float:
    """Operations of the product over visible pairs."""
    starts_q, starts_k, keys = a.cu_seqlens_q, a.cu_seqlens_k, keys_of(a)
    if starts_q is None:
        queries = [a.q.shape[1]] * a.q.shape[0]
    else:
        queries = starts_q.diff().tolist() if known(starts_q) else [a.q.shape[0]]
    sizes = [keys] * len(queries)
    if starts_k is not None and known(starts_k) and len(queries) == len(starts_k) - 1:
        sizes = starts_k.diff().tolist()
    elif a.seqlens_k is not None and known(a.seqlens_k) and len(queries) == len(a.seqlens_k):
        sizes = a.seqlens_k.tolist()
    right = 0 if a.causal else -1
    pairs = sum(band(sq, sk, -1, right) for sq, sk in zip(queries, sizes, strict=True))
    return 2.0 * a.q.shape[-2] * a.q.shape[-1] * pairs


FORWARD = register(
    TorchOp(
        OP,
        autocast=Autocast(lower=("q", "k", "weights"), cache="k", paged=True, wide=("weights",)),
        fake=_fake,
        check_values=_check_values,
        triton="select.indexer_topk_select:indexer_topk_select",
    )
)
SPEC = register_op(
    OpSpec(
        function=indexer_topk_select,
        lower=lower,
        sugar=frozenset({"cu_seqlens_q"}),
        reference=reference.indexer_topk_select,
        forward=FORWARD,
        sharding=Sharding(
            {
                "q": "b...",
                "k": "b..",
                "k@block_table": "...",
                "weights": "b..",
                "previous": "b..",
                "k_scale": "b.",
                "k_scale@block_table": "..",
                "seqlens_k": "b",
                "block_table": "b.",
            },
            ("b..", "b.", "b.."),
            without=("cu_seqlens_q", "cu_seqlens_k"),
        ),
        paper="DeepSeek-V3.2-Exp (DeepSeek-AI 2025)",
        flops=_flops,
    )
)
