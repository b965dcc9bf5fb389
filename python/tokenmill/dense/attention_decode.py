"""attention_decode: decode attention of the newest tokens of each request over its KV cache."""

from __future__ import annotations

import functools
from typing import Any, Literal, overload

import torch
from torch import Tensor

from .._autocast import Autocast
from .._check import as_int, as_number, check, check_bool, check_tensor, check_text, fail
from .._dispatch import call
from .._flops import known
from .._kv_cache import check_cache, check_lengths, check_lengths_values
from .._library import TorchOp, register
from .._lowering import scale_or_default, widen
from ..masks import Masks, lower_mask
from ..reference.dense import attention_decode as reference
from ..registry import OpSpec, Sharding, register_op
from .terms import (
    NO_WINDOW,
    Kind,
    Normalize,
    ScoreBias,
    as_window,
    check_kind,
    check_mask,
    check_return_lse,
    check_scale,
    check_terms,
    has_row_statistic,
    lower_normalize,
    lower_score_bias,
)

OP = "attention_decode"

Schedule = Literal["auto", "split", "stream_k"]
MAX_SPLITS = 1024


@overload
def attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    seqlens_k: Tensor,
    block_table: Tensor | None = ...,
    kind: Kind = ...,
    normalize: Normalize = ...,
    scale: float | None = ...,
    score_bias: ScoreBias = ...,
    mask: Masks = ...,
    alibi_slopes: Tensor | None = ...,
    sink: Tensor | None = ...,
    softcap: float = ...,
    window: tuple[int, int] = ...,
    num_splits: int = ...,
    schedule: Schedule = ...,
    return_lse: Literal[False] = ...,
    backend: str | None = ...,
) -> Tensor: ...


@overload
def attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    seqlens_k: Tensor,
    block_table: Tensor | None = ...,
    kind: Kind = ...,
    normalize: Normalize = ...,
    scale: float | None = ...,
    score_bias: ScoreBias = ...,
    mask: Masks = ...,
    alibi_slopes: Tensor | None = ...,
    sink: Tensor | None = ...,
    softcap: float = ...,
    window: tuple[int, int] = ...,
    num_splits: int = ...,
    schedule: Schedule = ...,
    return_lse: Literal[True],
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...


def attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    seqlens_k: Tensor,
    block_table: Tensor | None = None,
    kind: Kind = "softmax",
    normalize: Normalize = None,
    scale: float | None = None,
    score_bias: ScoreBias = None,
    mask: Masks = None,
    alibi_slopes: Tensor | None = None,
    sink: Tensor | None = None,
    softcap: float = 0.0,
    window: tuple[int, int] = NO_WINDOW,
    num_splits: int = 0,
    schedule: Schedule = "auto",
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Decode: attention of the newest tokens of each request over its KV cache, dense or paged.

    Request b has n = seqlens_k[b] keys, those of its Sq newest tokens included, and its queries are
    the last Sq of n positions: query i sees keys j <= n - Sq + i. The result is that of
    :func:`tokenmill.attention` with causal=True on those keys, request by request. Keys and values
    are read once for each KV head, whatever H / Hk and Sq.

    Args:
        q: ``[B, Sq, H, D]``, float16, bfloat16 or float32 (float64 on the reference), any strides
            with a contiguous last dimension, D up to 256. Sq is 1, or a few for speculative tokens.
        k_cache, v_cache: ``[B, S, Hk, D]`` and ``[B, S, Hk, Dv]``, Hk a divisor of H (GQA, MQA), Dv
            up to 256; with block_table pages ``[P, page size, Hk, D]`` and ``[P, page size, Hk,
            Dv]``, the page size a power of two. Any strides with a contiguous last dimension, so
            ``[P, Hk, page size, D]`` is passed as its transpose. The new keys must be there.
        seqlens_k: int32 ``[B]``, keys of each request, from 0 to S (pages: pages times page size).
            Keys beyond them are never read.
        block_table: int32 ``[B, pages]``, the pages of each request in order; entries beyond its
            last key may hold anything.
        kind, normalize, scale, alibi_slopes, sink, softcap: as in :func:`tokenmill.attention`.
        score_bias: a float, a tensor ``[H]`` or ``[B, H]``, or "neg_log_n": -log seqlens_k[b].
        mask: segments or ranges of :mod:`tokenmill.masks`, or both. Ids of keys are those of all
            positions that the cache has room for, in the order of the request's keys; a prefix,
            which stands in place of causal, is refused.
        window: (left, right) keys beside a query's own position; -1 = no limit. As no key is
            to the right of a query, right is -1 or 0.
        num_splits: 0 = automatic. n cuts the keys of each request into n ranges, at most one for
            each step of the kernel. With n > 0 a request's result has the same bits in any batch,
            whatever the other requests are; on the cpu backend that holds for 0 too.
        schedule: how the keys are spread over a GPU. "split" cuts each request into equally many
            ranges, "stream_k" all requests together into equally long ranges, best for unequal
            lengths; "auto" takes stream_k on the cuda backend, unless num_splits is given, and
            split on triton. The cpu backend has one schedule and takes any of these.
        return_lse: also return lse (softmax), or the row sums s (normalize="sum").
        backend: "cpu", "cuda", "triton", "reference" or None (see :func:`tokenmill.explain`).

    Returns:
        out ``[B, Sq, H, Dv]`` in the dtype of q; with return_lse also lse ``[B, H, Sq]`` float32,
        natural log, or s of that shape. A query that sees no key has out 0 and lse -inf (with a
        sink: lse = sink), s 0. NaN
        in one request stays there. The same inputs give the same bits. There is no gradient: inputs
        that require one are refused unless under no_grad.

    Raises:
        RuntimeError: naming argument, rule and value, before anything runs. On a GPU a length is
            clamped to what the cache holds, and a page that does not exist is read as page 0.

    Complexity: 2 H Sq (D + Dv) operations and (D + Dv) Hk elements read for each key of a request;
    nothing is allocated but results of ranges, which are summed in the order of the keys.

    Paper: Flash-Decoding (Dao et al. 2023); LeanAttention (Sanovar et al. 2024), section 4, for
    stream_k; PagedAttention (Kwon et al. 2023) for pages.

    Example:
        >>> import torch, tokenmill as tm
        >>> q = torch.randn(2, 1, 8, 64)
        >>> k = v = torch.randn(10, 16, 2, 64)  # 10 pages of 16 tokens
        >>> table = torch.tensor([[7, 2, 9], [0, 4, -1]], dtype=torch.int32)
        >>> lengths = torch.tensor([40, 17], dtype=torch.int32)
        >>> tm.attention_decode(q, k, v, seqlens_k=lengths, block_table=table).shape
        torch.Size([2, 1, 8, 64])
    """
    results = call(
        SPEC,
        lower(
            q,
            k_cache,
            v_cache,
            seqlens_k=seqlens_k,
            block_table=block_table,
            kind=kind,
            normalize=normalize,
            scale=scale,
            score_bias=score_bias,
            mask=mask,
            alibi_slopes=alibi_slopes,
            sink=sink,
            softcap=softcap,
            window=window,
            num_splits=num_splits,
            schedule=schedule,
            return_lse=return_lse,
        ),
        backend,
        used=2 if return_lse else 1,
    )
    return results[:2] if return_lse else results[0]


def lower(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    seqlens_k: Tensor,
    block_table: Tensor | None = None,
    kind: str = "softmax",
    normalize: str | None = None,
    scale: float | None = None,
    score_bias: ScoreBias = None,
    mask: Masks = None,
    alibi_slopes: Tensor | None = None,
    sink: Tensor | None = None,
    softcap: float = 0.0,
    window: tuple[int, int] = NO_WINDOW,
    num_splits: int = 0,
    schedule: str = "auto",
    return_lse: bool = False,
) -> tuple[Any, ...]:
    for name, t in (
        ("q", q),
        ("k_cache", k_cache),
        ("v_cache", v_cache),
        ("seqlens_k", seqlens_k),
    ):
        check_tensor(OP, name, t)
    for name, option in (
        ("block_table", block_table),
        ("alibi_slopes", alibi_slopes),
        ("sink", sink),
    ):
        if option is not None:
            check_tensor(OP, name, option, optional=True)
    check_text(OP, "kind", kind)
    check_text(OP, "schedule", schedule)
    check_bool(OP, "return_lse", return_lse)
    normalize = lower_normalize(OP, normalize)
    if return_lse:
        check_return_lse(OP, kind, normalize)
    scale = scale_or_default(OP, scale, q)
    softcap = as_number(OP, "softcap", softcap)
    left, right = as_window(OP, window)
    if right not in (-1, 0):
        fail(OP, "window", "right must be -1 or 0: no query sees a later key", right)
    num_splits = as_int(OP, "num_splits", num_splits)
    lowered_mask = lower_mask(OP, mask, q, 0, causal=True)
    return (
        q,
        k_cache,
        v_cache,
        seqlens_k,
        block_table,
        kind,
        normalize,
        scale,
        *lower_score_bias(OP, score_bias, q),
        *lowered_mask,
        None if alibi_slopes is None else widen(alibi_slopes, q),
        None if sink is None else widen(sink, q),
        softcap,
        left,
        num_splits,
        schedule,
    )


# csrc/dense/attention_decode/host.cpp has the same rules in the same order and words.
def _check(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    seqlens_k: Tensor,
    block_table: Tensor | None,
    kind: str,
    normalize: str,
    scale: float,
    score_bias: Tensor | None,
    score_bias_value: float,
    score_bias_neg_log_n: bool,
    mask_ranges: Tensor | None,
    mask_q_spans: Tensor | None,
    mask_k_spans: Tensor | None,
    alibi_slopes: Tensor | None,
    sink: Tensor | None,
    softcap: float,
    window_left: int,
    num_splits: int,
    schedule: str,
    *,
    float64: bool = False,
) -> None:
    check_cache(OP, q, k_cache, v_cache, block_table is not None, float64)
    check_kind(OP, kind, normalize)
    check_scale(OP, scale, softcap)
    check(window_left >= -1, OP, "window", "left must be >= -1 (-1 = no limit)", window_left)
    splits = f"must be 0 (automatic) to {MAX_SPLITS}"
    check(0 <= num_splits <= MAX_SPLITS, OP, "num_splits", splits, num_splits)
    schedules = "must be 'auto', 'split' or 'stream_k'"
    check(schedule in ("auto", "split", "stream_k"), OP, "schedule", schedules, schedule)
    if num_splits > 0:
        rule = f"must be 'auto' or 'split' with num_splits {num_splits}"
        check(schedule != "stream_k", OP, "schedule", rule, schedule)
    check_lengths(OP, q, seqlens_k, block_table)
    check_terms(OP, q, q.shape[0], kind, score_bias, alibi_slopes, sink)
    keys = k_cache.shape[1] * (1 if block_table is None else block_table.shape[1])
    check_mask(OP, q, q.shape[0], keys, mask_ranges, mask_q_spans, mask_k_spans)


def _check_values(
    q: Tensor, k: Tensor, v: Tensor, seqlens_k: Tensor, block_table: Tensor | None, *rest: Any
) -> None:
    check_lengths_values(OP, k, seqlens_k, block_table)


def _fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    kind, normalize = rest[2:4]
    lse = (q.shape[0], q.shape[2], q.shape[1]) if has_row_statistic(kind, normalize) else (0,)
    return q.new_empty((*q.shape[:-1], v.shape[-1])), q.new_empty(lse, dtype=torch.float32)


def flops(
    q: Tensor, k: Tensor, v: Tensor, seqlens_k: Tensor, block_table: Tensor | None, *rest: Any
) -> float:
    """Operations of the two products over the keys of each request (without a window)."""
    if known(seqlens_k):
        keys = float(seqlens_k.clamp(0).sum())
    else:
        keys = float(q.shape[0] * k.shape[1] * (1 if block_table is None else block_table.shape[1]))
    return 2.0 * q.shape[1] * q.shape[2] * keys * (q.shape[-1] + v.shape[-1])


FORWARD = register(
    TorchOp(
        OP,
        autocast=Autocast(lower=("q",), cache="k_cache"),
        check=_check,
        check_values=_check_values,
        fake=_fake,
        triton="dense.attention_decode:attention_decode",
        refuses_gradients=True,
    )
)
SPEC = register_op(
    OpSpec(
        name=OP,
        family="dense",
        function=attention_decode,
        lower=lower,
        reference=reference.attention_decode,
        plain=functools.partial(reference.attention_decode, upcast=False),
        forward=FORWARD,
        backward=None,
        differentiable=(),
        logarithms=(1,),
        sharding=Sharding(
            {
                "q k_cache v_cache": "b.h.",
                "k_cache@block_table v_cache@block_table": "..h.",
                "seqlens_k": "b",
                "block_table": "b.",
                "score_bias alibi_slopes sink": "bh",
                "mask_q_spans mask_k_spans": "b..",
                "mask_ranges": "bh...",
            },
            ("b.h.", "bh."),
        ),
        paper="Flash-Decoding (Dao et al. 2023); LeanAttention (Sanovar et al. 2024)",
        flops=flops,
    )
)
