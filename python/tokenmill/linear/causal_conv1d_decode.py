"""causal_conv1d_decode: the next tokens of a short convolution, from a cache of its last inputs."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .._call.attach import register
from .._call.autocast import Autocast
from .._call.operator import TorchOp
from .._call.run import call
from .._lowering import take_options
from .._other_names import answered_by
from ..reference.linear import causal_conv1d_decode as reference
from ..registry import OpSpec, Sharding, register_op
from ._conv import flops, lower_activation
from ._state import check_request_values
from .causal_conv1d import Activation

OP = "causal_conv1d_decode"


def _run(
    x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None = None, **given: Any
) -> Tensor:
    _, backend = take_options(causal_conv1d_decode, given)
    out: Tensor = call(SPEC, (x, state, weight, bias), given, backend)[0]
    return out


@answered_by(_run)
def causal_conv1d_decode(
    x: Tensor,
    state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Activation | None = None,
    state_indices: Tensor | None = None,
    accepted: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Decode step of :func:`causal_conv1d`, updating caches in slots in place.

    Request b continues from the inputs in slot state_indices[b], into which its tokens are shifted.
    The result equals :func:`causal_conv1d` with the same tokens and initial_state, in every bit.

    Args:
        x: ``[B, C]`` or, for several tokens, ``[B, T, C]``; float16, bfloat16 or float32 (float64
            on the reference). Any strides with a contiguous last dimension; others are copied.
        state: ``[slots, C, K]`` in the dtype of x, K at least W - 1: the last K inputs of each
            channel, the newest last. Only the last W - 1 are read; all are updated in place. Any
            strides, with no two elements at one address and none shared with another argument: the
            ``[B, C, W]`` cache of a model of transformers, a view of one, and the states of
            :func:`causal_conv1d` serve as they are.
        weight: ``[C, W]``, W from 1 to 8, in the dtype of x or float32.
        bias: ``[C]``, in the dtype of x or float32. None: 0.
        activation: None or "silu".
        state_indices: int32 ``[B]``, the slot of each request; -1 skips a request (padding of a
            batch): its out is 0 and no state changes. No slot twice. None: slot b for request b.
        accepted: int32 ``[B]``, 0 to T: the tokens of each request, from the first one on, that its
            state keeps; out has all T. For speculative decoding: 0 verifies a draft, and a second
            call with the tokens that were accepted brings the state up to date. None: T.
        backend: "cpu", "cuda", "triton", "reference" or None (see :func:`tokenmill.explain`).

    Returns:
        out, of the shape and dtype of x. There is no gradient: inputs that require one are refused
        unless under no_grad.

    Raises:
        RuntimeError: naming argument, rule and value, before anything is written. On a GPU a slot
            out of range is skipped like -1, a repeated slot is undefined, and accepted is clamped.

    Complexity: 2 B T C W operations; reads and writes each state once, whatever T.

    Paper: Mamba: Linear-Time Sequence Modeling with Selective State Spaces (Gu and Dao 2023);
    slots as in Dao-AILab/causal-conv1d.

    Example:
        >>> import torch, tokenmill as tm
        >>> x, weight = torch.randn(2, 10, 64), torch.randn(64, 4)
        >>> cache = torch.zeros(5, 64, 4)
        >>> slots = torch.tensor([3, 1], dtype=torch.int32)
        >>> steps = [tm.causal_conv1d_decode(
        ...     x[:, t], cache, weight, activation="silu", state_indices=slots) for t in range(10)]
        >>> whole = tm.causal_conv1d(x, weight, activation="silu")
        >>> torch.equal(torch.stack(steps, 1), whole)
        True
        >>> torch.equal(cache[slots], x[:, -4:].transpose(1, 2))
        True
    """
    raise NotImplementedError


def lower(
    x: Tensor,
    state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Any = None,
    **given: Any,
) -> tuple[Any, ...]:
    activation = lower_activation(OP, activation)
    return FORWARD.lower(x, state, weight, bias, activation=activation, **given)


def _check_values(a: Any) -> None:
    check_request_values(OP, a, a.x.shape[1] if a.x.dim() == 3 else 1)


def _fake(a: Any) -> Tensor:
    return a.x.new_empty(a.x.shape)


FORWARD = register(
    TorchOp(
        OP,
        autocast=Autocast(lower=("x", "weight", "bias"), cache="state", wide=("weight", "bias")),
        check_values=_check_values,
        fake=_fake,
        triton="linear.causal_conv1d_decode:causal_conv1d_decode",
    )
)
SPEC = register_op(
    OpSpec(
        function=causal_conv1d_decode,
        lower=lower,
        sugar=frozenset({"activation"}),
        reference=reference.causal_conv1d_decode,
        forward=FORWARD,
        copied=("x",),
        sharding=Sharding(
            {
                "x": "b.c bc",
                "state": "bc.",
                "state@state_indices": ".c.",
                "state_indices accepted": "b",
                "weight": "c.",
                "bias": "c",
            },
            ("b.c bc",),
        ),
        paper="Mamba (Gu and Dao 2023)",
        flops=flops,
    )
)
