"""attention_row_scores: the attention that a few queries give to each key."""

from __future__ import annotations

import functools
import math
from typing import Any, Literal

import torch
from torch import Tensor

from ..autocast import Autocast
from ..check import as_int, check, check_bool, check_qkv, check_tensor, check_text, fail
from ..dispatch import call
from ..library import TorchOp, register
from ..lowering import scale_or_default, widen
from ..reference.select import attention_row_scores as reference
from ..registry import Malformed, OpSpec, Sample, register_op
from .rules import check_length_values, check_lse, check_per_request

OP = "attention_row_scores"
REDUCTIONS = ("none", "sum", "mean", "max")


def attention_row_scores(
    q_rows: Tensor,
    k: Tensor,
    *,
    scale: float | None = None,
    lse: Tensor | None = None,
    reduce: Literal["none", "sum", "mean", "max"] = "mean",
    skip: int = 0,
    causal: bool = False,
    lengths: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""The attention that a few queries give to each key.

    .. math::
        a_j = \frac{1}{H R} \sum_h \sum_r P_{hrj}, \qquad
        P_{hrj} = e^{scale \; q_{rh} \cdot k_j - lse_{hr}}

    with reduce="mean", always probabilities over all visible keys, those skipped among them (so the
    result of skip=1 sums to less than 1). The row of the class token chooses patches in EViT and
    VTC-CLS; the last query of a step chooses keys in TOVA and Recycled Attention.

    Args:
        q_rows: ``[B, R, H, D]``, float16, bfloat16 or float32 (float64 on the reference), any
            strides with a contiguous last dimension, D up to 256: the class token, or the last
            queries of a step. R is small: memory for H R Sk exponents is taken.
        k: ``[B, Sk, Hk, D]``, Hk a divisor of H (GQA, MQA).
        scale: factor of q.k; None = 1/sqrt(D).
        lse: float32 ``[B, H, R]`` of the forward of these rows; None: over the visible keys. A row
            whose lse is -inf gives nothing.
        reduce: over heads and rows: "mean", "sum", "max", or "none".
        skip: the first keys that have no place in the result (1 for a class token).
        causal: row r sees keys j <= r + Sk - R: the rows are the last queries.
        lengths: int32 ``[B]``, the keys of each request; others get 0. None: Sk.
        backend: "cpu", "cuda", "triton", "reference" or None (see :func:`tokenmill.explain`).

    Returns:
        float32 ``[B, Sk - skip]``, with reduce="none" ``[B, H, R, Sk - skip]``. Not differentiable.

    Raises:
        RuntimeError: naming argument, rule and value. On a GPU lengths out of range are clamped.

    Complexity: 2 B H R Sk D operations; reads k once.

    Paper: EViT (Liang et al. 2022), section 3.2; VTC-CLS (Wang et al. 2024), section 3; TOVA (Oren
    et al. 2024), section 3.

    Example:
        >>> import torch, tokenmill as tm
        >>> q, k = torch.randn(2, 4, 197, 6, 64).unbind()
        >>> scores = tm.attention_row_scores(q[:, :1], k, skip=1)  # of the class token
        >>> scores.shape, bool((scores.sum(-1) < 1).all())
        (torch.Size([4, 196]), True)
        >>> keep, _ = tm.topk_select(scores, 137)
    """
    lowered = lower(
        q_rows, k, scale=scale, lse=lse, reduce=reduce, skip=skip, causal=causal, lengths=lengths
    )
    (scores,) = call(SPEC, lowered, backend)
    return scores


def lower(
    q_rows: Tensor,
    k: Tensor,
    *,
    scale: float | None = None,
    lse: Tensor | None = None,
    reduce: str = "mean",
    skip: int = 0,
    causal: bool = False,
    lengths: Tensor | None = None,
) -> tuple[Any, ...]:
    check_tensor(OP, "q_rows", q_rows)
    check_tensor(OP, "k", k)
    for name, t in (("lse", lse), ("lengths", lengths)):
        check_tensor(OP, name, t, optional=True)
    check_bool(OP, "causal", causal)
    check_text(OP, "reduce", reduce)
    skip = as_int(OP, "skip", skip)
    return (
        q_rows, k, None if lse is None else widen(lse, q_rows),
        scale_or_default(OP, scale, q_rows), causal, reduce, skip, lengths,
    )  # fmt: skip


def _check(
    q: Tensor,
    k: Tensor,
    lse: Tensor | None,
    scale: float,
    causal: bool,
    reduce: str,
    skip: int,
    lengths: Tensor | None,
    *,
    float64: bool = False,
) -> None:
    check_qkv(OP, q, k, k, 4, float64)
    check_lse(OP, lse, q)
    check(math.isfinite(scale), OP, "scale", "must be finite", scale)
    rule = "must be 'none', 'sum', 'mean' or 'max'"
    check(reduce in REDUCTIONS, OP, "reduce", rule, reduce)
    if not 0 <= skip <= k.shape[1]:
        fail(OP, "skip", f"must be 0 to the number of keys, {k.shape[1]}", skip)
    check_per_request(OP, "lengths", lengths, q.shape[0], "k", k)


def _check_values(*lowered: Any) -> None:
    a = FORWARD.record(*lowered)
    check_length_values(OP, "lengths", a.lengths, a.k.shape[1])


def _fake(
    q: Tensor,
    k: Tensor,
    lse: Tensor | None,
    scale: float,
    causal: bool,
    reduce: str,
    skip: int,
    lengths: Tensor | None,
) -> Tensor:
    inner = (q.shape[2], q.shape[1]) if reduce == "none" else ()
    return q.new_empty((q.shape[0], *inner, k.shape[1] - skip), dtype=torch.float32)


def _sample(
    b: int = 2,
    r: int = 1,
    n: int = 50,
    h: int = 4,
    hk: int = 2,
    d: int = 32,
    with_lse: bool = False,
    lengths: tuple[int, ...] | None = None,
    **options: Any,
) -> Any:
    def make(dtype: torch.dtype, g: torch.Generator) -> tuple[tuple[Any, ...], dict[str, Any]]:
        q = torch.randn(b, r, h, d, generator=g).to(dtype)
        k = torch.randn(b, n, hk, d, generator=g).to(dtype)
        given = dict(options)
        if lengths is not None:
            given["lengths"] = torch.tensor(lengths, dtype=torch.int32)
        if with_lse:
            lse = 4 + torch.rand(b, h, r, generator=g)
            lse[..., 0, 0] = float("-inf")
            given["lse"] = lse.to(torch.promote_types(dtype, torch.float32))
        return (q, k), given

    return make


def _with_lse(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Any:
    return lambda a, k: k.update(lse=torch.zeros(shape, dtype=dtype))


FORWARD = register(
    TorchOp(
        OP,
        autocast=Autocast(lower=("q", "k")),
        check=_check,
        check_values=_check_values,
        fake=_fake,
        triton="select.attention_row_scores:attention_row_scores",
    )
)
SPEC = register_op(
    OpSpec(
        name=OP,
        family="select",
        function=attention_row_scores,
        lower=lower,
        reference=reference.attention_row_scores,
        plain=functools.partial(reference.attention_row_scores, upcast=False),
        forward=FORWARD,
        backward=None,
        samples=(
            Sample("class token", _sample(n=197, h=3, hk=3, d=64, skip=1)),
            Sample("lse", _sample(r=2, with_lse=True, reduce="sum")),
            Sample("last queries", _sample(r=5, n=40, causal=True, reduce="max")),
            Sample("each row", _sample(b=1, r=3, d=20, causal=True, reduce="none", skip=4)),
            Sample(
                "lengths",
                _sample(b=4, r=3, lengths=(50, 0, 2, 33), causal=True),
            ),
            Sample("many heads", _sample(b=1, h=20, hk=1, n=33, d=16)),
            Sample("wide heads", _sample(b=1, n=40, d=200, scale=0.05)),
            Sample("odd head", _sample(b=1, n=37, d=7, h=3, hk=3)),
            Sample("all skipped", _sample(skip=50)),
            Sample("no rows", _sample(r=0)),
            Sample("no keys", _sample(n=0)),
            Sample("no requests", _sample(b=0)),
        ),
        # Edits of the first sample: q [2, 1, 3, 64], k [2, 197, 3, 64].
        malformed=(
            Malformed(
                "rank",
                "q: must have 4 dimensions [B, S, H, D]; got 3",
                lambda a, k: a.__setitem__(0, a[0][0]),
            ),
            Malformed(
                "heads",
                "k: number of heads must divide that of q, 3 (GQA); got 2",
                lambda a, k: a.__setitem__(1, a[1][:, :, 1:]),
            ),
            Malformed("lse shape", "lse: must have shape [2, 3, 1]; got [2, 3]", _with_lse((2, 3))),
            Malformed(
                "scale",
                "scale: must be finite; got nan",
                lambda a, k: k.update(scale=float("nan")),
            ),
            Malformed(
                "reduce",
                "reduce: must be 'none', 'sum', 'mean' or 'max'; got 'min'",
                lambda a, k: k.update(reduce="min"),
            ),
            Malformed(
                "skip",
                "skip: must be 0 to the number of keys, 197; got 198",
                lambda a, k: k.update(skip=198),
            ),
            Malformed(
                "shape of lengths",
                "lengths: must have shape [2]; got [1]",
                lambda a, k: k.update(lengths=torch.zeros(1, dtype=torch.int32)),
            ),
            Malformed(
                "too long",
                "lengths: must be 0 to 197; got 198",
                lambda a, k: k.update(lengths=torch.full((2,), 198, dtype=torch.int32)),
                values=True,
            ),
        ),
        differentiable=(),
        paper="EViT (Liang et al. 2022), VTC-CLS (Wang et al. 2024), TOVA (Oren et al. 2024)",
        flops=lambda q, k, *rest: 2.0 * q.numel() * k.shape[1],
    )
)
