"""delta_attention_decode: the next tokens of the delta rule, at a constant cost per token."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .._call.attach import register
from .._call.autocast import Autocast
from .._call.operator import TorchOp
from .._call.run import call
from .._lowering import scale_or_default, take_options, widen_fields
from .._other_names import answered_by
from ..reference.linear import delta_attention_decode as reference
from ..registry import OpSpec, Sharding, register_op
from ._state import check_decay_values, check_request_values, with_channels_together
from .delta_attention import flops

OP = "delta_attention_decode"


def _run(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, state: Tensor, **given: Any) -> Tensor:
    _, backend = take_options(delta_attention_decode, given)
    out: Tensor = call(SPEC, (q, k, v, beta, state), given, backend)[0]
    return out


@answered_by(_run)
def delta_attention_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    state: Tensor,
    *,
    log_decay: Tensor | None = None,
    scale: float | None = None,
    qk_l2norm: bool = False,
    state_indices: Tensor | None = None,
    accepted: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Decode step of :func:`delta_attention`, updating states in slots in place.

    Request b continues from the state in slot state_indices[b], which is updated in place. The
    result equals :func:`delta_attention` with the same tokens and initial_state.

    Args:
        q, k: ``[B, S, Hk, D]``, float16, bfloat16 or float32 (float64 on the reference), D up to
            256. Any strides; q, k and v are copied only where their last dimension is not
            contiguous. S is 1, or more for several tokens.
        v: ``[B, S, Hv, Dv]``, Hv a multiple of Hk, Dv up to 256.
        beta: ``[B, S, Hv]`` of any floating-point dtype, as in :func:`delta_attention`.
        state: float32 ``[slots, Hv, D, Dv]``, as :func:`delta_attention` returns it; updated in
            place. The ``[D, Dv]`` block of a head is contiguous; no two elements overlap, and none
            is shared with another argument.
        log_decay: ``[B, S, Hv]`` or ``[B, S, Hv, D]``, at most 0, as in :func:`delta_attention`.
        scale: None = 1/sqrt(D).
        qk_l2norm: divide q and k by :math:`\sqrt{|x|^2 + 10^{-6}}` first.
        state_indices: int32 ``[B]``, the slot of each request; -1 skips a request (padding of a
            batch): its out is 0 and no state changes. No slot twice. None: slot b for request b.
        accepted: int32 ``[B]``, 0 to S: the tokens of each request, from the first one on, that its
            state keeps; out has all S. For speculative decoding: 0 verifies a draft, and a second
            call with the tokens that were accepted brings the state up to date. None: S.
        backend: "cpu", "cuda", "triton", "reference" or None (see :func:`tokenmill.explain`).

    Returns:
        out ``[B, S, Hv, Dv]`` in the dtype of q. There is no gradient: inputs that require one are
        refused unless under no_grad.

    Raises:
        RuntimeError: naming argument, rule and value, before anything is written. On a GPU a slot
            out of range is skipped like -1, a repeated slot is undefined, and accepted is clamped.

    Complexity: 6 B S Hv D Dv operations; reads and writes each state once, whatever S.

    Paper: Gated Delta Networks (Yang et al. 2024), equation 10; Kimi Linear (2025).

    Example:
        >>> import torch, tokenmill as tm
        >>> q, k, v = torch.randn(3, 2, 10, 4, 16).unbind()
        >>> beta = torch.rand(2, 10, 4)
        >>> state = torch.zeros(8, 4, 16, 16)
        >>> slots = torch.tensor([5, 2], dtype=torch.int32)
        >>> steps = [tm.delta_attention_decode(
        ...     *(x[:, t:t + 1] for x in (q, k, v, beta)), state, qk_l2norm=True,
        ...     state_indices=slots) for t in range(10)]
        >>> whole = tm.delta_attention(q, k, v, beta, qk_l2norm=True)
        >>> torch.allclose(torch.cat(steps, 1), whole, atol=1e-4)
        True
    """
    raise NotImplementedError


def lower(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, state: Tensor, **given: Any
) -> tuple[Any, ...]:
    a = FORWARD.fields(q=q, k=k, v=v, beta=beta, state=state, **given)
    a["scale"] = scale_or_default(OP, a["scale"], q)
    widen_fields(a, q, "beta", "log_decay")
    a["log_decay"] = with_channels_together(a["log_decay"], v.dim())
    return tuple(a.values())


def _check_values(a: Any) -> None:
    check_decay_values(OP, a.log_decay)
    check_request_values(OP, a, a.v.shape[1])


FORWARD = register(
    TorchOp(
        OP,
        autocast=Autocast(lower=("q", "k", "v")),
        check_values=_check_values,
        fake=lambda a: a.v.new_empty(a.v.shape),
        triton="linear.delta_attention_decode:delta_attention_decode",
    )
)
SPEC = register_op(
    OpSpec(
        function=delta_attention_decode,
        lower=lower,
        reference=reference.delta_attention_decode,
        forward=FORWARD,
        copied=("q", "k", "v"),
        sharding=Sharding(
            {
                "q k v": "b.h.",
                "beta": "b.h",
                "state": "bh..",
                "state@state_indices": ".h..",
                "state_indices accepted": "b",
                "log_decay": "b.h. b.h",
            },
            ("b.h.",),
        ),
        paper="Gated Delta Networks (Yang et al. 2024); Kimi Linear (2025)",
        flops=flops,
    )
)
