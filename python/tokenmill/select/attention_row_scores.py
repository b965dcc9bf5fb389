"""attention_row_scores: the attention that a few queries give to each key."""

from __future__ import annotations

import functools
from typing import Any, Literal

import torch
from torch import Tensor

from .._call.attach import register
from .._call.autocast import Autocast
from .._call.operator import TorchOp
from .._call.run import call
from .._check import (
    check_tensor,
)
from .._lowering import scale_or_default, take_options, widen_fields
from .._other_names import answered_by
from ..reference.select import attention_row_scores as reference
from ..registry import OpSpec, Sharding, register_op
from .rules import check_length_values

OP = "attention_row_scores"
Reduce = Literal["none", "sum", "mean", "max", "argmax"]


def _run(q_rows: Tensor, k: Tensor, **given: Any) -> Tensor:
    _, backend = take_options(attention_row_scores, given)
    scores: Tensor = call(SPEC, (q_rows, k), given, backend)[0]
    return scores


@answered_by(_run)
def attention_row_scores(
    q_rows: Tensor,
    k: Tensor,
    *,
    scale: float | None = None,
    lse: Tensor | None = None,
    reduce: Reduce = "mean",
    skip: int = 0,
    causal: bool = False,
    seqlens_k: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""The attention that a few queries give to each key.

    .. math::
        a_j = \frac{1}{H R} \sum_h \sum_r P_{hrj}, \qquad
        P_{hrj} = e^{scale \; q_{rh} \cdot k_j - lse_{hr}}

    with reduce="mean". Probabilities are always over all visible keys, including skipped ones (so
    the result of skip=1 sums to less than 1). The row of the class token chooses patches in EViT
    and VTC-CLS; the last query of a step chooses keys in TOVA and Recycled Attention.

    Args:
        q_rows: ``[B, R, H, D]``, float16, bfloat16 or float32 (float64 on the reference), any
            strides with a contiguous last dimension, D up to 256: the class token, or the last
            queries of a step. R is small: H R Sk exponents are held in memory.
        k: ``[B, Sk, Hk, D]``, Hk a divisor of H (GQA, MQA).
        scale: factor of q.k; None = 1/sqrt(D).
        lse: float32 ``[B, H, R]`` from the forward of these rows; None: computed over the visible
            keys. A row whose lse is -inf contributes nothing.
        reduce: over heads and rows: "mean", "sum", "max", or "none". "argmax": for each head and
            row the position of the key with the largest weight, the first of equal weights; NaN
            counts as the largest.
        skip: number of first keys left out of the result (1 for a class token).
        causal: row r sees keys j <= r + Sk - R: the rows are the last queries.
        seqlens_k: int32 ``[B]``, number of keys of each request; later keys get 0. None: Sk.
        backend: "cpu", "cuda", "triton", "reference" or None (see :func:`tokenmill.explain`).

    Returns:
        float32 ``[B, Sk - skip]``, with reduce="none" ``[B, H, R, Sk - skip]``. With "argmax" int32
        ``[B, H, R]``, positions in k; -1 for a row with no visible key after the skipped ones, or
        whose lse is -inf. Not differentiable.

    Raises:
        RuntimeError: naming argument, rule and value. On a GPU lengths out of range are clamped.

    Complexity: 2 B H R Sk D operations; reads k once.

    Paper: EViT (Liang et al. 2022), section 3.2; VTC-CLS (Wang et al. 2024), section 3; TOVA (Oren
    et al. 2024), section 3; argmax: Retrieval Head Mechanistically Explains Long-Context Factuality
    (Wu et al. 2024), section 2.

    Example:
        >>> import torch, tokenmill as tm
        >>> q, k = torch.randn(2, 4, 197, 6, 64).unbind()
        >>> scores = tm.attention_row_scores(q[:, :1], k, skip=1)  # of the class token
        >>> scores.shape, bool((scores.sum(-1) < 1).all())
        (torch.Size([4, 196]), True)
        >>> keep, _ = tm.topk_select(scores, 137)
    """
    raise NotImplementedError


def lower(q_rows: Tensor, k: Tensor, **given: Any) -> tuple[Any, ...]:
    check_tensor(OP, "q_rows", q_rows)
    a = FORWARD.fields(q=q_rows, k=k, **given)
    a["scale"] = scale_or_default(OP, a["scale"], q_rows)
    widen_fields(a, q_rows, "lse")
    return tuple(a.values())


def _check_values(a: Any) -> None:
    check_length_values(OP, "seqlens_k", a.seqlens_k, a.k.shape[1])


def _fake(a: Any) -> Tensor:
    batch, rows, heads = a.q.shape[:3]
    if a.reduce == "argmax":
        return a.q.new_empty((batch, heads, rows), dtype=torch.int32)
    inner = (heads, rows) if a.reduce == "none" else ()
    return a.q.new_empty((batch, *inner, a.k.shape[1] - a.skip), dtype=torch.float32)


FORWARD = register(
    TorchOp(
        OP,
        autocast=Autocast(lower=("q", "k")),
        check_values=_check_values,
        fake=_fake,
        triton="select.attention_row_scores:attention_row_scores",
    )
)
SPEC = register_op(
    OpSpec(
        function=attention_row_scores,
        lower=lower,
        sugar=frozenset({"lse"}),
        reference=reference.attention_row_scores,
        plain=functools.partial(reference.attention_row_scores, upcast=False),
        forward=FORWARD,
        sharding=Sharding({"q k": "b.h.", "lse": "bh.", "seqlens_k": "b"}, ("bh.. bh. b.",)),
        paper="EViT (Liang et al. 2022), VTC-CLS (Wang et al. 2024), TOVA (Oren et al. 2024)",
        flops=lambda a: 2.0 * a.q.numel() * a.k.shape[1],
    )
)
