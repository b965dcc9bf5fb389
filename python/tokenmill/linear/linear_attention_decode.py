"""linear_attention_decode: the next tokens of linear attention, at a constant cost per token."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .._call.attach import register
from .._call.autocast import Autocast
from .._call.operator import TorchOp
from .._call.run import call
from .._lowering import scale_or_default, take_options, widen_fields
from .._other_names import answered_by
from ..reference.linear import linear_attention_decode as reference
from ..registry import OpSpec, Sharding, register_op
from ._bonus import check_bonus, move_keys, with_own_tokens
from ._state import (
    check_decay_values,
    check_request_values,
    with_channels_together,
    with_heads_of_queries,
)
from .linear_attention import FeatureMap, flops

OP = "linear_attention_decode"


def _run(q: Tensor, k: Tensor, v: Tensor, state: Tensor, **given: Any) -> Tensor:
    _, backend = take_options(linear_attention_decode, given)
    bonus, indices = given.get("bonus"), given.get("state_indices")
    out: Tensor = call(SPEC, (q, k, v, state), given, backend)[0]
    if bonus is None:
        return out
    seen = with_own_tokens(out, q, k, v, bonus, scale_or_default(OP, given.get("scale"), q))
    if indices is None:
        return seen
    skipped = (indices < 0) | (indices >= state.shape[0])
    return seen.masked_fill(skipped[:, None, None, None], 0)


@answered_by(_run)
def linear_attention_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    *,
    log_decay: Tensor | None = None,
    bonus: Tensor | None = None,
    feature_map: FeatureMap = "identity",
    normalize: bool = False,
    state_indices: Tensor | None = None,
    accepted: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Decode step of :func:`linear_attention`, updating states in slots in place.

    Request b continues from the state in slot state_indices[b], which is updated in place. The
    result equals :func:`linear_attention` with the same tokens and initial_state.

    Args:
        q: ``[B, S, H, D]``, float16, bfloat16 or float32 (float64 on the reference), D up to 256.
            Any strides; q, k and v are copied only where their last dimension is not contiguous. S
            is 1, or more for several tokens.
        k, v: ``[B, S, Hk, D]`` and ``[B, S, Hk, Dv]``, Hk a divisor of H (GQA, MQA).
        state: float32 ``[slots, H, F, Dv]``, with normalize ``[slots, H, F, Dv + 1]``, as
            :func:`linear_attention` returns it; updated in place. The ``[F, Dv]`` block of a head
            is contiguous; no two elements overlap, and none is shared with another argument.
        log_decay: ``[H]``, ``[B, S, H]`` or ``[B, S, H, D]``, at most 0, as in
            :func:`linear_attention`.
        bonus: ``[H, D]``, as in :func:`linear_attention`.
        feature_map, normalize: as in :func:`linear_attention`, the same as when the state was made.
        state_indices: int32 ``[B]``, the slot of each request; -1 skips a request (padding of a
            batch): its out is 0 and no state changes. No slot twice. None: slot b for request b.
        accepted: int32 ``[B]``, 0 to S: the tokens of each request, from the first one on, that its
            state keeps; out has all S. For speculative decoding: 0 verifies a draft, and a second
            call with the tokens that were accepted brings the state up to date. None: S.
        scale: None = 1/sqrt(D), as in :func:`linear_attention`.
        backend: "cpu", "cuda", "triton", "reference" or None (see :func:`tokenmill.explain`).

    Returns:
        out ``[B, S, H, Dv]`` in the dtype of q. There is no gradient: inputs that require one are
        refused unless under no_grad.

    Raises:
        RuntimeError: naming argument, rule and value, before anything is written. On a GPU a slot
            out of range is skipped like -1, a repeated slot is undefined, and accepted is clamped.

    Complexity: 4 B S H F Dv operations; reads and writes each state once, whatever S.

    Paper: Transformers are RNNs (Katharopoulos et al. 2020), section 3.4; slots as in the serving
    of MiniMax-01 (2025).

    Example:
        >>> import torch, tokenmill as tm
        >>> q, k, v = torch.randn(3, 2, 10, 4, 16).unbind()
        >>> slopes = tm.lightning_slopes(4)
        >>> state = torch.zeros(8, 4, 16, 16)
        >>> slots = torch.tensor([5, 2], dtype=torch.int32)
        >>> steps = [tm.linear_attention_decode(
        ...     *(x[:, t:t + 1] for x in (q, k, v)), state, log_decay=-slopes,
        ...     state_indices=slots, scale=1.0) for t in range(10)]
        >>> torch.allclose(torch.cat(steps, 1), tm.lightning_attention(q, k, v, slopes), atol=1e-4)
        True
    """
    raise NotImplementedError


def lower(q: Tensor, k: Tensor, v: Tensor, state: Tensor, **given: Any) -> tuple[Any, ...]:
    bonus = given.pop("bonus", None)
    a = FORWARD.fields(q=q, k=k, v=v, state=state, **given)
    a["scale"] = scale_or_default(OP, a["scale"], q)
    widen_fields(a, q, "log_decay")
    a["log_decay"] = with_channels_together(a["log_decay"], q.dim())
    with_heads_of_queries(a)
    if bonus is not None:
        check_bonus(FORWARD, a, bonus)
        move_keys(a)
    return tuple(a.values())


def _check_values(a: Any) -> None:
    check_decay_values(OP, a.log_decay)
    check_request_values(OP, a, a.v.shape[1])


def _fake(a: Any) -> Tensor:
    return a.q.new_empty((*a.q.shape[:-1], a.v.shape[-1]))


FORWARD = register(
    TorchOp(
        OP,
        autocast=Autocast(lower=("q", "k", "v")),
        check_values=_check_values,
        fake=_fake,
        triton="linear.linear_attention_decode:linear_attention_decode",
    )
)
SPEC = register_op(
    OpSpec(
        function=linear_attention_decode,
        lower=lower,
        sugar=frozenset({"log_decay", "bonus"}),
        reference=reference.linear_attention_decode,
        forward=FORWARD,
        copied=("q", "k", "v"),
        sharding=Sharding(
            {
                "q k v": "b.h.",
                "state": "bh..",
                "state@state_indices": ".h..",
                "state_indices accepted": "b",
                "log_decay": "b.h. b.h h",
            },
            ("b.h.",),
        ),
        paper="Transformers are RNNs (Katharopoulos et al. 2020); MiniMax-01 (2025)",
        flops=flops,
    )
)
