"""titans_memory: a linear memory written by gradient descent steps."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, Literal, TypedDict, overload

from torch import Tensor
from typing_extensions import Required, Unpack

from .._call.attach import register
from .._call.autocast import Autocast
from .._call.autograd import Gradients, kept, needed_gradients
from .._call.operator import TorchOp
from .._call.run import call
from .._check import (
    MAX_HEAD_DIM,
    check,
    check_choice,
    check_cu_seqlens_values,
    check_tensor,
)
from .._lowering import take_options, widen_fields
from .._other_names import answered_by
from ..reference.linear import titans_memory as reference
from ..registry import OpSpec, Sharding, register_op
from ._state import cotangents, with_rows_together

OP = "titans_memory"
State = tuple[Tensor, Tensor]
Loss = Literal["mse"]


class TitansOptions(TypedDict, total=False):
    """Keywords of :func:`titans_memory` other than return_final_state."""

    alpha: Required[Tensor]
    eta: Required[Tensor]
    theta: Required[Tensor]
    chunk_size: int
    loss: Loss
    initial_state: State | None
    cu_seqlens: Tensor | None
    backend: str | None


def _run(
    q: Tensor, k: Tensor, v: Tensor, *, alpha: Tensor, eta: Tensor, theta: Tensor, **given: Any
) -> Tensor | tuple[Tensor, State]:
    _, backend = take_options(titans_memory, given)
    lowered = lower(q, k, v, alpha=alpha, eta=eta, theta=theta, **given)
    out, memory, momentum = call(SPEC, lowered, None, backend)
    return (out, (memory, momentum)) if given.get("return_final_state") else out


@overload
def titans_memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    return_final_state: Literal[False] = ...,
    **options: Unpack[TitansOptions],
) -> Tensor: ...


@overload
def titans_memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    return_final_state: Literal[True],
    **options: Unpack[TitansOptions],
) -> tuple[Tensor, State]: ...


@answered_by(_run)
def titans_memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    alpha: Tensor,
    eta: Tensor,
    theta: Tensor,
    chunk_size: int = 64,
    loss: Loss = "mse",
    initial_state: State | None = None,
    return_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, State]:
    r"""The linear memory of Titans: gradient descent with momentum and forgetting, while it reads.

    Memory M and momentum S of a head are ``[D, Dv]``. For token t, with c the last token before its
    chunk,

    .. math::
        S_t = \eta_t S_{t-1} - \theta_t \nabla \ell_t(M_c), \qquad
        M_t = (1 - \alpha_t) M_{t-1} + S_t, \qquad out_t = q_t M_t

    where :math:`\ell_t(M) = \frac12 |k_t M - v_t|^2`, so :math:`\nabla \ell_t(M_c) = k_t^T (k_t M_c
    - v_t)`. A chunk has chunk_size tokens; a call, or a packed sequence, starts a new one. With
    chunk_size 1 each gradient is taken at the memory before its token; a larger chunk_size computes
    a different function, faster. Chunks are matrix products in float32 without divisions: alpha =
    1, eta = 0 and theta = 0 are exact.

    Args:
        q, k: ``[B, S, H, D]``, or packed ``[T, H, D]`` with cu_seqlens; float16, bfloat16, float32
            or float64.
        v: ``[B, S, H, Dv]`` (packed ``[T, H, Dv]``) in the dtype of q.
        alpha: ``[B, S, H]`` (packed ``[T, H]``) of any floating-point dtype, the fraction that is
            forgotten. The paper's gates are from 0 to 1; other numbers are accepted.
        eta: as alpha, the fraction of the momentum that is kept.
        theta: as alpha, the step size of a token. The tokens of a chunk step from the same memory:
            with keys of length 1, sums of theta / (1 - eta) over a chunk that are above 2 can
            diverge.
        chunk_size: tokens whose gradients are taken at the same memory, at least 1.
        loss: "mse".
        initial_state: (M, S), each float32 (float64 with float64 q) ``[B, H, D, Dv]`` (packed: one
            for each sequence), as returned by a call with return_final_state. None: 0.
        return_final_state: also return memory and momentum after the last token.
        cu_seqlens: int32 ``[N + 1]``, offsets of the packed sequences. On a GPU, which does not
            check these values, tokens before the first sequence and after the last one have out 0
            and gradients 0.
        backend: "cpu", "cuda", "triton" or "reference"; None chooses. CUDA takes a head_dim up to
            256, the others any.

    Returns:
        out ``[B, S, H, Dv]`` (packed ``[T, H, Dv]``) in the dtype of q; with return_final_state
        also (M, S) in the dtype of initial_state. An empty sequence leaves its state unchanged.
        Gradients: q, k, v, alpha, eta, theta, initial_state, through out and state.

    Raises:
        RuntimeError: naming argument, rule and value, before anything runs.

    Complexity: 2 H S (5 D Dv + n (D + Dv) / 2) operations with n = chunk_size, but at most 64, and
    2.6 times as many for the backward, which recomputes the states. It needs extra memory for them:
    on a CPU 2 D Dv numbers per thread for each chunk (or each 64 tokens of a chunk); on a GPU twice
    as many per head for each chunk (or each 32 tokens of a chunk).

    Paper: Titans: Learning to Memorize at Test Time (Behrouz et al. 2025), sections 3.1 and 3.2.
    Its :math:`\ell` has no factor of 1/2: its theta is half of the one here.

    Example:
        >>> import torch, tokenmill as tm
        >>> q, k, v = torch.nn.functional.normalize(torch.randn(3, 2, 100, 4, 16), dim=-1)
        >>> alpha, eta, theta = 0.01 * torch.ones(3, 2, 100, 4)
        >>> gates = {"alpha": alpha, "eta": eta, "theta": theta}
        >>> whole = tm.titans_memory(q, k, v, **gates, chunk_size=20)
        >>> first, state = tm.titans_memory(
        ...     *(t[:, :60] for t in (q, k, v)), **{n: g[:, :60] for n, g in gates.items()},
        ...     chunk_size=20, return_final_state=True)
        >>> rest = tm.titans_memory(
        ...     *(t[:, 60:] for t in (q, k, v)), **{n: g[:, 60:] for n, g in gates.items()},
        ...     chunk_size=20, initial_state=state)
        >>> torch.allclose(torch.cat([first, rest], 1), whole, atol=1e-5)
        True
    """
    raise NotImplementedError


def lower(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    loss: str = "mse",
    initial_state: State | None = None,
    **given: Any,
) -> tuple[Any, ...]:
    a = FORWARD.fields(q=q, k=k, v=v, **given)
    check_choice(OP, "loss", loss, "mse")
    if initial_state is not None:
        pair = isinstance(initial_state, Sequence) and len(initial_state) == 2
        pair = pair and all(isinstance(t, Tensor) for t in initial_state)
        rule = "must be a pair of tensors (M, S) or None"
        check(pair, OP, "initial_state", rule, initial_state)
        for t in initial_state:
            check_tensor(OP, "initial_state", t)
        a["initial_memory"], a["initial_momentum"] = map(with_rows_together, initial_state)
    for name in ("q", "k", "v"):
        a[name] = _last_together(a[name])
    widen_fields(a, q, "alpha", "eta", "theta")
    return tuple(a.values())


def _last_together(t: Tensor) -> Tensor:
    together = t.dim() == 0 or t.shape[-1] <= 1 or t.stride(-1) == 1
    return t if together else t.contiguous()


def _check_values(a: Any) -> None:
    if a.cu_seqlens is not None:
        check_cu_seqlens_values(OP, "cu_seqlens", a.cu_seqlens, a.q.shape[0])


def _fake(a: Any) -> tuple[Tensor, Tensor, Tensor]:
    shape: tuple[int, ...] = (0,)
    if a.return_final_state:
        sequences = a.q.shape[0] if a.cu_seqlens is None else a.cu_seqlens.shape[0] - 1
        shape = (sequences, a.q.shape[-2], a.q.shape[-1], a.v.shape[-1])
    states = (a.alpha.new_empty(shape) for _ in range(2))
    return (a.v.new_empty(a.v.shape), *states)


def _fake_backward(a: Any) -> tuple[Tensor, ...]:
    shape = (0,)
    if a.needs_dinitial_state and a.initial_memory is not None:
        shape = a.initial_memory.shape
    inputs = (a.q, a.k, a.v, a.alpha, a.eta, a.theta)
    states = (a.alpha.new_empty(shape) for _ in range(2))
    return (*(t.new_empty(t.shape) for t in inputs), *states)


def _backward(
    ops: Any, ctx: Any, dout: Tensor | None, dmemory: Tensor | None, dmomentum: Tensor | None
) -> Gradients:
    a, _ = kept(ctx)
    needed = needed_gradients(ctx)
    of_state = needed["initial_memory"] or needed["initial_momentum"]
    *found, memory, momentum = ops.titans_memory_backward(
        *cotangents(a, dout, dmemory, dmomentum), of_state, *a
    )
    names = ("q", "k", "v", "alpha", "eta", "theta")
    extra = {}
    if needed["initial_memory"]:
        extra["initial_memory"] = memory
    if needed["initial_momentum"]:
        extra["initial_momentum"] = momentum
    return dict(zip(names, found, strict=True)) | extra


def _unsupported(backend: str, a: Any) -> list[str]:
    shape = a.q.shape
    if backend == "cuda" and shape and shape[-1] > MAX_HEAD_DIM:
        return [f"its head dimensions are 1 to {MAX_HEAD_DIM}; got {shape[-1]}"]
    return []


def _flops(a: Any) -> float:
    """Operations of error, momentum, memory and query, per token."""
    return 10.0 * math.prod(a.q.shape) * a.v.shape[-1]


FORWARD = register(
    TorchOp(
        OP,
        autocast=Autocast(lower=("q", "k", "v")),
        check_values=_check_values,
        fake=_fake,
        triton="linear.titans_memory:titans_memory",
        backward=_backward,
    )
)
BACKWARD = register(
    TorchOp(
        OP + "_backward",
        fake=_fake_backward,
        triton="linear.titans_memory:titans_memory_backward",
    )
)
SPEC = register_op(
    OpSpec(
        function=titans_memory,
        lower=lower,
        reference=reference.titans_memory,
        plain=functools.partial(reference.titans_memory_by_token, upcast=False),
        forward=FORWARD,
        differentiable=(
            "q",
            "k",
            "v",
            "alpha",
            "eta",
            "theta",
            "initial_memory",
            "initial_momentum",
        ),
        sharding=Sharding(
            {
                "q k v": "b.h.",
                "alpha eta theta": "b.h",
                "initial_memory initial_momentum": "bh..",
            },
            ("b.h.", "bh..", "bh.."),
        ),
        paper="Titans: Learning to Memorize at Test Time (Behrouz et al. 2025)",
        flops=_flops,
        unsupported=_unsupported,
    )
)
