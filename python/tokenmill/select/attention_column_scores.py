"""attention_column_scores: the attention that each key receives."""

from __future__ import annotations

import functools
import math
from typing import Any, Literal

import torch
from torch import Tensor

from .._call.attach import register
from .._call.autocast import Autocast
from .._call.operator import TorchOp
from .._call.run import call
from .._check import (
    as_int,
    as_number,
    check,
    fail,
)
from .._lowering import scale_or_default, take_options, widen_fields
from .._other_names import answered_by
from ..reference.select import attention_column_scores as reference
from ..registry import OpSpec, Sharding, register_op
from .rules import check_length_values

OP = "attention_column_scores"


def _run(q: Tensor, k: Tensor, lse: Tensor | None = None, **given: Any) -> Tensor:
    _, backend = take_options(attention_column_scores, given)
    if lse is not None:
        given["lse"] = lse
    scores: Tensor = call(SPEC, (q, k), given, backend)[0]
    return scores


@answered_by(_run)
def attention_column_scores(
    q: Tensor,
    k: Tensor,
    lse: Tensor | None = None,
    *,
    causal: bool = False,
    reduce: Literal["sum", "mean", "visible_mean"] = "sum",
    window_queries: int | None = None,
    scale: float | None = None,
    gumbel_tau: float | None = None,
    seed: int | None = None,
    head_reduce: Literal["none", "group_mean", "group_max"] = "none",
    seqlens_k: Tensor | None = None,
    seqlens_q: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""The attention that each key receives from all queries; the weight matrix is never
    materialised.

    .. math::
        c_j = \sum_i P_{ij}, \qquad P_{ij} = e^{scale \; q_i \cdot k_j - lse_i}

    over the queries i that see key j. With gumbel_tau,
    :math:`P_{ij} = softmax_j((scale \; q_i \cdot k_j + g_{ij}) / \tau)` with Gumbel noise g. H2O,
    SnapKV, TOVA, Recycled Attention and Keyformer evict by this score.

    Args:
        q: ``[B, Sq, H, D]``, float16, bfloat16 or float32 (float64 on the reference), any strides
            with a contiguous last dimension, D up to 256.
        k: ``[B, Sk, Hk, D]``, Hk a divisor of H (GQA, MQA).
        lse: float32 ``[B, H, Sq]``, from :func:`attention` with return_lse, the same scale and
            mask; None computes it, which doubles the cost. A query whose lse is -inf is ignored.
        causal: query i sees keys j <= i + Sk - Sq (bottom-right aligned; per request with
            seqlens_k).
        reduce: "sum" over queries; "mean" divides by the number of queries, "visible_mean" by the
            number of queries that see the key (0 where there are none).
        window_queries: only the last window_queries queries count; None: all.
        scale: factor of q.k; None = 1/sqrt(D).
        gumbel_tau: temperature of the noisy softmax, positive; None: no noise. Excludes lse.
        seed: seed of the noise, 0 to 2^63 - 1; required with gumbel_tau. The noise of a pair
            depends only on seed, request, head, key and the position of the query, i + Sk - Sq: the
            next step of a growing cache has fresh noise. :func:`tokenmill.select.gumbel_noise`
            computes it.
        head_reduce: "none", or "group_mean" or "group_max" over the query heads of a GQA group.
        seqlens_k: int32 ``[B]``, number of keys of each request; later keys score 0. None: Sk.
        seqlens_q: int32 ``[B]``, number of queries of each request; None: Sq.
        backend: "cpu", "cuda", "triton", "reference" or None (see :func:`tokenmill.explain`).

    Returns:
        float32 ``[B, H, Sk]``, with head_reduce ``[B, Hk, Sk]``. Not differentiable.

    Raises:
        RuntimeError: naming argument, rule and value. On a GPU lengths out of range are clamped.

    Complexity: 2 B H Sq Sk D operations over visible pairs, twice that without lse; memory linear
    in Sq and Sk.

    Paper: Keyformer (Adnan et al. 2024), equation 8 and section 3.3; H2O (Zhang et al. 2023),
    section 4; SnapKV (Li et al. 2024), section 4.

    Example:
        >>> import torch, tokenmill as tm
        >>> q, k, v = torch.randn(3, 1, 100, 8, 64).unbind()
        >>> out, lse = tm.attention(q, k, v, causal=True, return_lse=True)
        >>> scores = tm.attention_column_scores(q, k, lse, causal=True)
        >>> scores.shape, round(scores.sum().item())
        (torch.Size([1, 8, 100]), 800)
        >>> heavy, _ = tm.topk_select(scores.flatten(0, 1), 20, force_last=10)
    """
    raise NotImplementedError


def lower(
    q: Tensor,
    k: Tensor,
    lse: Tensor | None = None,
    *,
    gumbel_tau: float | None = None,
    seed: int | None = None,
    **given: Any,
) -> tuple[Any, ...]:
    a = FORWARD.fields(q=q, k=k, lse=lse, **given)
    widen_fields(a, q, "lse")
    a["scale"] = scale_or_default(OP, a["scale"], q)
    if gumbel_tau is not None:
        a["gumbel_tau"] = tau = as_number(OP, "gumbel_tau", gumbel_tau)
        check(0 < tau < math.inf, OP, "gumbel_tau", "must be positive and finite", gumbel_tau)
        a["seed"] = as_int(OP, "seed", seed)
    elif seed is not None:
        fail(OP, "seed", "requires gumbel_tau", seed)
    return tuple(a.values())


def _check_values(a: Any) -> None:
    check_length_values(OP, "seqlens_k", a.seqlens_k, a.k.shape[1])
    check_length_values(OP, "seqlens_q", a.seqlens_q, a.q.shape[1])


def _fake(a: Any) -> Tensor:
    heads = a.q.shape[2] if a.head_reduce == "none" else a.k.shape[2]
    return a.q.new_empty((a.q.shape[0], heads, a.k.shape[1]), dtype=torch.float32)


def _flops(a: Any) -> float:
    """Operations of the products over visible pairs, for the longest requests that fit."""
    batch, rows, heads, dim = a.q.shape
    columns = a.k.shape[1]
    counted = rows if a.window_queries is None else min(rows, a.window_queries)
    pairs = float(counted * columns)
    if a.causal:
        ends = range(columns - counted + 1, columns + 1)
        pairs = float(sum(max(end, 0) for end in ends))
    return 2.0 * batch * heads * pairs * dim * (1 if a.lse is not None else 2)


FORWARD = register(
    TorchOp(
        OP,
        autocast=Autocast(lower=("q", "k")),
        check_values=_check_values,
        fake=_fake,
        triton="select.attention_column_scores:attention_column_scores",
    )
)
SPEC = register_op(
    OpSpec(
        function=attention_column_scores,
        lower=lower,
        sugar=frozenset({"lse", "gumbel_tau", "seed"}),
        reference=reference.attention_column_scores,
        plain=functools.partial(reference.attention_column_scores, upcast=False),
        forward=FORWARD,
        sharding=Sharding(
            {"q k": "b.h.", "lse": "bh.", "seqlens_k seqlens_q": "b"},
            ("bh.",),
            without=("gumbel_tau",),  # its noise depends on the global request and head
        ),
        paper="Keyformer (Adnan et al. 2024), H2O (Zhang et al. 2023), SnapKV (Li et al. 2024)",
        flops=_flops,
    )
)
