"""delta_attention: a recurrence whose state is corrected by what it would have answered."""

from __future__ import annotations

import functools
import math
from typing import Any, Literal, TypedDict, overload

from torch import Tensor
from typing_extensions import Unpack

from .._call.attach import register
from .._call.autocast import Autocast
from .._call.autograd import Gradients, kept, needed_gradients
from .._call.operator import TorchOp
from .._call.run import call
from .._check import check_cu_seqlens_values
from .._lowering import scale_or_default, take_options, widen_fields
from .._other_names import answered_by
from ..reference.linear import delta_attention as reference
from ..registry import OpSpec, Sharding, register_op
from ._state import (
    check_decay_values,
    cotangents,
    with_channels_together,
    with_rows_together,
)

OP = "delta_attention"


class DeltaOptions(TypedDict, total=False):
    """Keywords of :func:`delta_attention` other than return_final_state, which decides the type of
    the result.
    """

    log_decay: Tensor | None
    scale: float | None
    qk_l2norm: bool
    initial_state: Tensor | None
    cu_seqlens: Tensor | None
    backend: str | None


def _run(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, **given: Any
) -> Tensor | tuple[Tensor, Tensor]:
    _, backend = take_options(delta_attention, given)
    out, state = call(SPEC, lower(q, k, v, beta, **given), None, backend)
    return (out, state) if given.get("return_final_state") else out


@overload
def delta_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    *,
    return_final_state: Literal[False] = ...,
    **options: Unpack[DeltaOptions],
) -> Tensor: ...


@overload
def delta_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    *,
    return_final_state: Literal[True],
    **options: Unpack[DeltaOptions],
) -> tuple[Tensor, Tensor]: ...


@answered_by(_run)
def delta_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    *,
    log_decay: Tensor | None = None,
    scale: float | None = None,
    qk_l2norm: bool = False,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""The delta rule: a state that each token corrects, with decay per head or per channel.

    DeltaNet without log_decay, gated DeltaNet (GDN) with a decay per token and head, Kimi Delta
    Attention (KDA) with one per channel. For token t of one value head, from :math:`S_{-1}` =
    initial_state or 0:

    .. math::
        S'_t = \mathrm{diag}(e^{log\_decay_t})\, S_{t-1}, \qquad
        S_t = S'_t + \beta_t\, k_t^T (v_t - k_t S'_t), \qquad
        out_t = scale\; q_t S_t

    The state decays first, so that the correction sees the decayed state. The kernels solve for the
    corrections of a chunk of tokens at once; no factor in them exceeds 1, whatever the decay.

    Args:
        q, k: ``[B, S, Hk, D]``, or packed ``[T, Hk, D]`` with cu_seqlens; float16, bfloat16 or
            float32 (float64 on the reference), D up to 256. q, k and v are copied only where their
            last dimension is not contiguous.
        v: ``[B, S, Hv, Dv]`` (packed ``[T, Hv, Dv]``), Hv a multiple of Hk: value head h reads key
            head h // (Hv // Hk), without copies. Dv up to 256.
        beta: ``[B, S, Hv]`` (packed ``[T, Hv]``), how much of the correction is written, of any
            floating-point dtype: 0 to 1, or to 2 in models with negative eigenvalues. The
            recurrence diverges where beta times the squared length of k exceeds 2.
        log_decay: natural logarithm of the factor on the state, at most 0; -inf forgets everything.
            ``[B, S, Hv]`` for one per head or ``[B, S, Hv, D]`` for one per row of the state
            (packed ``[T, ...]``), in float32. None: no decay.
        scale: None = 1/sqrt(D).
        qk_l2norm: divide q and k by :math:`\sqrt{|x|^2 + 10^{-6}}` first.
        initial_state: float32 ``[B, Hv, D, Dv]`` (packed: one for each sequence), as returned by a
            call with return_final_state. None: 0.
        return_final_state: also return the state after the last token.
        cu_seqlens: int32 ``[N + 1]``, offsets of the packed sequences; each has its own state.
        backend: "cpu", "cuda", "triton", "reference" or None (see :func:`tokenmill.explain`).

    Returns:
        out ``[B, S, Hv, Dv]`` (packed ``[T, Hv, Dv]``) in the dtype of q; with return_final_state
        also the state, float32. An empty sequence leaves its state unchanged. Gradients: q, k, v,
        beta, log_decay, initial_state, through out and state.

    Raises:
        RuntimeError: naming argument, rule and value, before anything runs.

    Complexity: 2 Hv S (3 D Dv + C (D + Dv)) operations with chunks of C = 64 tokens (32 in CUDA,
    16 in Triton), and about three times as many for the backward, which keeps a state and C rows of
    Dv numbers for each chunk of the sequences and value heads that a thread works on; on a GPU of
    all.

    Paper: DeltaNet: Linear Transformers Are Secretly Fast Weight Programmers (Schlag et al. 2021),
    equation 24, in chunks by Parallelizing Linear Transformers with the Delta Rule (Yang et al.
    2024), section 3; Gated Delta Networks (Yang et al. 2024), equation 10; Kimi Linear (2025).

    Example:
        >>> import torch, tokenmill as tm
        >>> q, k, v = torch.randn(3, 2, 100, 4, 16).unbind()
        >>> beta = torch.rand(2, 100, 4)
        >>> gate = torch.nn.functional.logsigmoid(torch.randn(2, 100, 4))
        >>> whole = tm.delta_attention(q, k, v, beta, log_decay=gate, qk_l2norm=True)
        >>> first, state = tm.delta_attention(
        ...     *(t[:, :60] for t in (q, k, v, beta)), log_decay=gate[:, :60], qk_l2norm=True,
        ...     return_final_state=True)
        >>> rest = tm.delta_attention(
        ...     *(t[:, 60:] for t in (q, k, v, beta)), log_decay=gate[:, 60:], qk_l2norm=True,
        ...     initial_state=state)
        >>> torch.allclose(torch.cat([first, rest], 1), whole, atol=1e-4)
        True
    """
    raise NotImplementedError


def lower(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, **given: Any) -> tuple[Any, ...]:
    a = FORWARD.fields(q=q, k=k, v=v, beta=beta, **given)
    a["scale"] = scale_or_default(OP, a["scale"], q)
    widen_fields(a, q, "beta", "log_decay")
    a["log_decay"] = with_channels_together(a["log_decay"], v.dim())
    a["initial_state"] = with_rows_together(a["initial_state"])
    return tuple(a.values())


def _check_values(a: Any) -> None:
    if a.cu_seqlens is not None:
        check_cu_seqlens_values(OP, "cu_seqlens", a.cu_seqlens, a.q.shape[0])
    check_decay_values(OP, a.log_decay)


def _fake(a: Any) -> tuple[Tensor, Tensor]:
    shape: tuple[int, ...] = (0,)
    if a.return_final_state:
        sequences = a.q.shape[0] if a.cu_seqlens is None else a.cu_seqlens.shape[0] - 1
        shape = (sequences, a.v.shape[-2], a.q.shape[-1], a.v.shape[-1])
    return a.v.new_empty(a.v.shape), a.beta.new_empty(shape)


def _fake_backward(a: Any) -> tuple[Tensor, ...]:
    decay = a.log_decay.shape if a.needs_dlog_decay else (0,)
    state = a.initial_state.shape if a.needs_dinitial_state else (0,)
    return (
        *(t.new_empty(t.shape) for t in (a.q, a.k, a.v, a.beta)),
        *(a.beta.new_empty(shape) for shape in (decay, state)),
    )


def _backward(ops: Any, ctx: Any, dout: Tensor | None, dfinal_state: Tensor | None) -> Gradients:
    a, _ = kept(ctx)
    needed = needed_gradients(ctx)
    needs = needed["log_decay"], needed["initial_state"]
    found = ops.delta_attention_backward(*cotangents(a, dout, dfinal_state), *needs, *a)
    always = ("q", "k", "v", "beta")
    names = (*always, "log_decay", "initial_state")
    gradients = dict(zip(names, found, strict=True))
    return {n: t for n, t in gradients.items() if n in always or needed[n]}


def flops(a: Any) -> float:
    """Operations of the correction, the update and the query, per token."""
    return 6.0 * math.prod(a.v.shape) * a.q.shape[-1]


FORWARD = register(
    TorchOp(
        OP,
        autocast=Autocast(lower=("q", "k", "v")),
        check_values=_check_values,
        fake=_fake,
        triton="linear.delta_attention:delta_attention",
        backward=_backward,
    )
)
BACKWARD = register(
    TorchOp(
        OP + "_backward",
        fake=_fake_backward,
        triton="linear.delta_attention:delta_attention_backward",
    )
)
SPEC = register_op(
    OpSpec(
        function=delta_attention,
        lower=lower,
        reference=reference.delta_attention,
        plain=functools.partial(reference.delta_attention_chunked, upcast=False),
        forward=FORWARD,
        copied=("q", "k", "v"),
        differentiable=("q", "k", "v", "beta", "log_decay", "initial_state"),
        sharding=Sharding(
            {
                "q k v": "b.h.",
                "beta": "b.h",
                "log_decay": "b.h. b.h",
                "log_decay@cu_seqlens": ".h. .h",
                "initial_state": "bh..",
            },
            ("b.h.", "bh.."),
        ),
        paper="Gated Delta Networks (Yang et al. 2024); Kimi Linear (2025)",
        flops=flops,
        backward_flops=lambda a: 3.0 * flops(a),
    )
)
