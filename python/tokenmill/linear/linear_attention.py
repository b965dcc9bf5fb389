"""linear_attention: attention as a recurrence over a decaying state."""

from __future__ import annotations

import functools
import math
from typing import Any, Literal, TypedDict, overload

import torch
from torch import Tensor
from typing_extensions import Unpack

from .._call.attach import register
from .._call.autocast import Autocast
from .._call.autograd import Gradients, keep, kept, needed_gradients
from .._call.operator import TorchOp
from .._call.run import call
from .._check import (
    check_cu_seqlens_values,
    check_tensor,
    fail,
    reads_values,
)
from .._lowering import scale_or_default, take_options, widen_fields
from .._other_names import answered_by
from ..reference.linear import linear_attention as reference
from ..registry import OpSpec, Sharding, register_op
from ._bonus import check_bonus, move_keys, with_own_tokens
from ._state import (
    check_decay_values,
    cotangents,
    feature_dim,
    with_channels_together,
    with_heads_of_queries,
    with_rows_together,
)

OP = "linear_attention"
FeatureMap = Literal["identity", "elu1", "relu", "silu", "taylor2"]
LIGHTNING = "lightning_attention"


class LightningOptions(TypedDict, total=False):
    """Keywords of :func:`lightning_attention` other than scale and return_final_state."""

    feature_map: FeatureMap
    normalize: bool
    initial_state: Tensor | None
    cu_seqlens: Tensor | None
    chunk_size: int | None
    out: Tensor | None
    backend: str | None


class LinearOptions(LightningOptions, total=False):
    """Keywords of :func:`linear_attention` other than return_final_state, which decides the type of
    the result.
    """

    log_decay: Tensor | None
    bonus: Tensor | None
    scale: float | None


def _run(q: Tensor, k: Tensor, v: Tensor, **given: Any) -> Tensor | tuple[Tensor, ...]:
    out, backend = take_options(linear_attention, given)
    bonus = given.get("bonus")
    if bonus is not None and out is not None:
        fail(OP, "out", "must be None with a bonus", out)
    results = call(SPEC, (q, k, v), given, backend, out)
    if bonus is not None:
        scale = scale_or_default(OP, given.get("scale"), q)
        seen = with_own_tokens(results[0], q, k, v, bonus, scale, given.get("cu_seqlens"))
        results = (seen, *results[1:])
    return results[:2] if given.get("return_final_state") else results[0]


@overload
def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    return_final_state: Literal[False] = ...,
    **options: Unpack[LinearOptions],
) -> Tensor: ...


@overload
def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    return_final_state: Literal[True],
    **options: Unpack[LinearOptions],
) -> tuple[Tensor, Tensor]: ...


@answered_by(_run)
def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor | None = None,
    bonus: Tensor | None = None,
    feature_map: FeatureMap = "identity",
    scale: float | None = None,
    normalize: bool = False,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    chunk_size: int | None = None,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Causal linear attention with decay: cost linear in the length, and a state of fixed size.

    For token t of one head, from :math:`S_{-1}` = initial_state or 0:

    .. math::
        S_t = e^{log\_decay_t}\, S_{t-1} + \phi(k_t)^T v_t, \qquad
        out_t = scale\; \phi(q_t)\, S_t

    A token sees itself with weight 1; the decay of the first token acts on initial_state. With
    normalize, :math:`z_t = \sum_s w_{ts} + 10^{-6}` over the weights :math:`w_{ts}` of the tokens
    seen, and :math:`out_t` is divided by it. The kernels are chunked: each chunk is a few matrix
    products.

    Args:
        q: ``[B, S, H, D]``, or packed ``[T, H, D]`` with cu_seqlens; float16, bfloat16 or float32
            (float64 on the reference), D up to 256. Any strides; q, k and v are copied only where
            their last dimension is not contiguous.
        k, v: ``[B, S, Hk, D]`` and ``[B, S, Hk, Dv]`` (packed ``[T, Hk, ...]``); Hk divides H;
            query head h reads head h // (H // Hk) (GQA, MQA) without copies. Dv up to 256.
        log_decay: natural logarithm of the factor on the state, at most 0; -inf forgets everything.
            ``[H]`` for a constant per head, ``[B, S, H]`` (packed ``[T, H]``) for a gate per token,
            ``[B, S, H, D]`` (packed ``[T, H, D]``) for one per row of the state, with which
            feature_map is "identity", normalize False, and k and v are repeated if they have fewer
            heads than q; in float32. None: no decay.
        bonus: ``[H, D]``, of any floating-point dtype: a token reads the state before its own
            update, and itself with its key times bonus,
            :math:`out_t = scale\; q_t (S_{t-1} + \mathrm{diag}(bonus)\, k_t^T v_t)` (RWKV-6, with
            log_decay per channel). Keys, values and decays are copied a token later for it;
            feature_map is "identity", normalize False and out None. None: as above.
        feature_map: :math:`\phi`: "identity", "elu1" (elu(x) + 1), "relu", "silu"; or "taylor2",
            weights :math:`1 + u + u^2/2` with :math:`u = scale\; q_t \cdot k_s`, for D up to 32.
        scale: None = 1/sqrt(D). With "taylor2" it is the scale inside u.
        normalize: divide by the sum of the weights; meant for maps whose weights are positive.
        initial_state: float32 ``[B, H, F, Dv]`` (packed: one for each sequence), as returned by a
            call with return_final_state. F = D; "taylor2": 1 + D + D(D+1)/2, the sums of 1,
            :math:`k_i` and :math:`k_i k_j` (i <= j) times v, which do not depend on the scale. With
            normalize ``[B, H, F, Dv + 1]``, the last column being the sum of the keys.
        return_final_state: also return the state after the last token.
        cu_seqlens: int32 ``[N + 1]``, offsets of the packed sequences; each has its own state. On a
            GPU, which does not check these values, tokens before the first sequence and after the
            last one have out 0 and gradients 0.
        chunk_size: tokens per chunk, a power of two from 16 to 256; a hint that only changes
            rounding. None: the kernel's choice.
        out: preallocated result: shape and dtype as returned, any non-overlapping strides with a
            contiguous last dimension; it shares no element with an input (disjoint parts of one
            tensor are allowed). Needs no_grad or inputs without gradient.
        backend: "cpu", "cuda", "triton", "reference" or None (see :func:`tokenmill.explain`).

    Returns:
        out ``[B, S, H, Dv]`` (packed ``[T, H, Dv]``) in the dtype of q; with return_final_state
        also the state, float32. An empty sequence leaves its state unchanged. Gradients: q, k, v,
        log_decay, bonus, initial_state, through out and state.

    Raises:
        RuntimeError: naming argument, rule and value, before anything runs.

    Complexity: about 4 H S F Dv operations per sequence, and 2 H S C (D + Dv) inside chunks; memory
    linear in S.

    Paper: Transformers are RNNs (Katharopoulos et al. 2020); decay per head: Lightning Attention-2
    (Qin et al. 2024); gates: Mamba-2 (Dao and Gu 2024), section 6, and per channel
    Gated Linear Attention Transformers (Yang et al. 2024), equation 3; bonus: Eagle and Finch
    (Peng et al. 2024), section 4; "taylor2": Simple linear attention language models balance the
    recall-throughput tradeoff (Arora et al. 2024).

    Example:
        >>> import torch, tokenmill as tm
        >>> q, k, v = torch.randn(3, 2, 100, 4, 16).unbind()
        >>> gate = torch.nn.functional.logsigmoid(torch.randn(2, 100, 4))
        >>> whole = tm.linear_attention(q, k, v, log_decay=gate)
        >>> first, state = tm.linear_attention(
        ...     *(t[:, :60] for t in (q, k, v)), log_decay=gate[:, :60], return_final_state=True)
        >>> rest = tm.linear_attention(
        ...     *(t[:, 60:] for t in (q, k, v)), log_decay=gate[:, 60:], initial_state=state)
        >>> torch.allclose(torch.cat([first, rest], 1), whole, atol=1e-4)
        True
    """
    raise NotImplementedError


@overload
def lightning_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    *,
    scale: float | None = ...,
    return_final_state: Literal[False] = ...,
    **options: Unpack[LightningOptions],
) -> Tensor: ...


@overload
def lightning_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    *,
    scale: float | None = ...,
    return_final_state: Literal[True],
    **options: Unpack[LightningOptions],
) -> tuple[Tensor, Tensor]: ...


def lightning_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    *,
    scale: float | None = 1.0,
    return_final_state: bool = False,
    **options: Unpack[LightningOptions],
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Lightning attention: :func:`linear_attention` with a constant decay per head.

    :math:`out_t = scale \sum_{s \le t} e^{-slope (t - s)} (q_t \cdot k_s)\, v_s`: a token sees
    itself with weight 1, and initial_state has decayed by :math:`e^{-slope (t + 1)}` at token t.

    Args:
        q, k, v: as in :func:`linear_attention`.
        slopes: ``[H]`` float32, nonnegative: from :func:`lightning_slopes`, or learned.
        scale: as in :func:`linear_attention`, but 1 by default, as in the published models.
        return_final_state: also return the state after the last token.
        options: every other keyword of :func:`linear_attention` except log_decay, which is -slopes.

    Returns:
        As :func:`linear_attention`. Gradients: q, k, v, slopes, initial_state.

    Raises:
        RuntimeError: naming argument, rule and value, before anything runs.

    Complexity: as :func:`linear_attention`.

    Paper: Lightning Attention-2 (Qin et al. 2024); MiniMax-01 (2025).

    Example:
        >>> import torch, tokenmill as tm
        >>> ones = torch.ones(1, 4, 1, 1)
        >>> tm.lightning_attention(ones, ones, ones, torch.tensor([2.0]).log()).flatten()
        tensor([1.0000, 1.5000, 1.7500, 1.8750])
    """
    return linear_attention(
        q,
        k,
        v,
        log_decay=decay_of_slopes(LIGHTNING, q, slopes),
        scale=scale,
        return_final_state=return_final_state,  # type: ignore[call-overload]
        **options,
    )


def decay_of_slopes(op: str, q: Tensor, slopes: Tensor) -> Tensor:
    """The log_decay [H] of lightning attention."""
    for name, t in (("q", q), ("slopes", slopes)):
        check_tensor(op, name, t)
    if slopes.dtype not in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        fail(op, "slopes", "must be float32", slopes.dtype)
    if q.dim() >= 2 and tuple(slopes.shape) != (q.shape[-2],):
        fail(op, "slopes", f"must have shape [{q.shape[-2]}]", slopes.shape)
    if reads_values(slopes):
        negative = slopes[slopes < 0]
        if negative.numel() > 0:
            fail(op, "slopes", "must not be negative; least", negative.min().item())
    return -slopes


def lower(q: Tensor, k: Tensor, v: Tensor, **given: Any) -> tuple[Any, ...]:
    bonus = given.pop("bonus", None)
    a = FORWARD.fields(q=q, k=k, v=v, **given)
    a["scale"] = scale_or_default(OP, a["scale"], q)
    widen_fields(a, q, "log_decay")
    a["log_decay"] = with_channels_together(a["log_decay"], q.dim())
    with_heads_of_queries(a)
    a["initial_state"] = with_rows_together(a["initial_state"])
    if bonus is not None:
        check_bonus(FORWARD, a, bonus)
        move_keys(a)
    return tuple(a.values())


def _check_values(a: Any) -> None:
    if a.cu_seqlens is not None:
        check_cu_seqlens_values(OP, "cu_seqlens", a.cu_seqlens, a.q.shape[0])
    check_decay_values(OP, a.log_decay)


def _fake(a: Any) -> tuple[Tensor, Tensor, Tensor]:
    q = a.q
    packed = a.cu_seqlens is not None
    state: tuple[int, ...] = (0,)
    if a.return_final_state:
        sequences = a.cu_seqlens.shape[0] - 1 if packed else q.shape[0]
        features = feature_dim(a.feature_map, q.shape[-1])
        state = (sequences, q.shape[-2], features, a.v.shape[-1] + int(a.normalize))
    normalizer: tuple[int, ...] = (0,)
    if a.normalize:
        normalizer = (q.shape[1], q.shape[0]) if packed else (q.shape[0], q.shape[2], q.shape[1])
    rest = (q.new_empty(shape, dtype=torch.float32) for shape in (state, normalizer))
    return (q.new_empty((*q.shape[:-1], a.v.shape[-1])), *rest)


def _fake_backward(a: Any) -> tuple[Tensor, ...]:
    decay_shape: tuple[int, ...] = (0,)
    if a.needs_dlog_decay and a.log_decay.dim() > 1:
        decay_shape = a.log_decay.shape
    elif a.needs_dlog_decay:
        sequences = a.q.shape[0] if a.cu_seqlens is None else a.cu_seqlens.shape[0] - 1
        decay_shape = (sequences, a.q.shape[-2])
    state_shape = a.initial_state.shape if a.needs_dinitial_state else (0,)
    return (
        *(t.new_empty(t.shape) for t in (a.q, a.k, a.v)),
        *(a.q.new_empty(shape, dtype=torch.float32) for shape in (decay_shape, state_shape)),
    )


def _setup_context(ctx: Any, a: dict[str, Any], output: tuple[Tensor, ...]) -> None:
    out, _, normalizer = output
    ctx.mark_non_differentiable(normalizer)
    keep(ctx, a, *((out, normalizer) if a["normalize"] else (None, None)))


def _backward(
    ops: Any, ctx: Any, dout: Tensor | None, dfinal_state: Tensor | None, _: Tensor | None
) -> Gradients:
    a, (out, normalizer) = kept(ctx)
    needed = needed_gradients(ctx)
    needs = needed["log_decay"], needed["initial_state"]
    dq, dk, dv, dlog_decay, dinitial_state = ops.linear_attention_backward(
        *cotangents(a, dout, dfinal_state), out, normalizer, *needs, *a
    )
    extra = {}
    if needed["log_decay"]:
        extra["log_decay"] = dlog_decay if a.log_decay.dim() > 1 else dlog_decay.sum(0)
    if needed["initial_state"]:
        extra["initial_state"] = dinitial_state
    return dict(q=dq, k=dk, v=dv, **extra)


def flops(a: Any) -> float:
    """Operations of the state update and the query, per token."""
    features = feature_dim(a.feature_map, a.q.shape[-1])
    return 4.0 * math.prod(a.q.shape[:-1]) * features * a.v.shape[-1]


FORWARD = register(
    TorchOp(
        OP,
        autocast=Autocast(lower=("q", "k", "v")),
        check_values=_check_values,
        fake=_fake,
        triton="linear.linear_attention:linear_attention",
        backward=_backward,
        setup_context=_setup_context,
    )
)
OUT = register(TorchOp(OP + "_out"))
BACKWARD = register(
    TorchOp(
        OP + "_backward",
        fake=_fake_backward,
        triton="linear.linear_attention:linear_attention_backward",
    )
)
SPEC = register_op(
    OpSpec(
        function=linear_attention,
        lower=lower,
        sugar=frozenset({"log_decay", "bonus", "initial_state"}),
        reference=reference.linear_attention,
        plain=functools.partial(reference.linear_attention_quadratic, upcast=False),
        forward=FORWARD,
        copied=("q", "k", "v"),
        differentiable=("q", "k", "v", "log_decay", "initial_state"),
        sharding=Sharding(
            {
                "q k v": "b.h.",
                "log_decay": "b.h. b.h bh h",  # [B, H]: the gradient of [H], which is summed
                "log_decay@cu_seqlens": ".h. .h h",
                "initial_state": "bh..",
            },
            ("b.h.", "bh..", "bh."),
        ),
        paper="Lightning Attention-2 (Qin et al. 2024); Based (Arora et al. 2024)",
        flops=flops,
        backward_flops=lambda a: 3.0 * flops(a),  # three recurrences
    )
)
