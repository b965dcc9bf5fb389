"""causal_conv1d: a short convolution over time, channel by channel."""

from __future__ import annotations

from typing import Any, Literal, TypedDict, overload

from torch import Tensor
from typing_extensions import Unpack

from .._call.attach import register
from .._call.autocast import Autocast
from .._call.autograd import Gradients, kept, needed_gradients
from .._call.operator import TorchOp
from .._call.run import call
from .._check import check_cu_seqlens_values
from .._lowering import take_options
from .._other_names import answered_by
from ..reference.linear import causal_conv1d as reference
from ..registry import OpSpec, Sharding, register_op
from ._conv import flops, lower_activation

OP = "causal_conv1d"
Activation = Literal["silu"]


class ConvOptions(TypedDict, total=False):
    """Keywords of :func:`causal_conv1d` other than return_final_state, which decides the type of
    the result.
    """

    activation: Activation | None
    initial_state: Tensor | None
    cu_seqlens: Tensor | None
    backend: str | None


def _run(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, **given: Any
) -> Tensor | tuple[Tensor, Tensor]:
    _, backend = take_options(causal_conv1d, given)
    out, state = call(SPEC, (x, weight, bias), given, backend)
    return (out, state) if given.get("return_final_state") else out


@overload
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    return_final_state: Literal[False] = ...,
    **options: Unpack[ConvOptions],
) -> Tensor: ...


@overload
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    return_final_state: Literal[True],
    **options: Unpack[ConvOptions],
) -> tuple[Tensor, Tensor]: ...


@answered_by(_run)
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Activation | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Depthwise causal convolution: each channel of a token sees the last W tokens.

    The short convolution in front of linear attention (Mamba, Qwen3-Next, Kimi Linear):

    .. math::
        out_{t,c} = act\Big(bias_c + \sum_{j=0}^{W-1} weight_{c,j}\; x_{t-W+1+j,\,c}\Big)

    where inputs before the sequence come from initial_state, or are 0. The taps are added in
    float32, from the oldest token to the newest, so that a sequence in one call equals the sequence
    in chunks, and in decode steps, in every bit.

    Args:
        x: ``[B, T, C]``, or packed ``[T, C]`` with cu_seqlens; float16, bfloat16 or float32
            (float64 on the reference). Any strides with a contiguous last dimension; a view
            ``transpose(1, 2)`` of channels-first ``[B, C, T]`` memory is copied.
        weight: ``[C, W]``, W from 1 to 8, in the dtype of x or float32, any strides; the last tap
            meets the token itself. A torch.nn.Conv1d with groups has ``[C, 1, W]``: ``squeeze(1)``.
        bias: ``[C]``, in the dtype of x or float32. None: 0.
        activation: None or "silu", applied before rounding to the dtype of x.
        initial_state: ``[B, C, W - 1]`` (packed: one for each sequence) in the dtype of x, any
            strides: the inputs before the first token, the newest last, as returned by a call with
            return_final_state. Of a cache with more columns, ``[B, C, W]`` in transformers, pass
            the view ``cache[..., 1:]``. None: 0.
        return_final_state: also return the last W - 1 inputs.
        cu_seqlens: int32 ``[N + 1]``, offsets of the packed sequences; each has its own state.
        backend: "cpu", "cuda", "triton", "reference" or None (see :func:`tokenmill.explain`).

    Returns:
        out, of the shape and dtype of x, contiguous; with return_final_state also the state, in the
        dtype of x. A sequence shorter than W - 1 shifts its initial state. Gradients: x, weight,
        bias, initial_state, through out and state.

    Raises:
        RuntimeError: naming argument, rule and value, before anything runs.

    Complexity: 2 W operations for each element of x, which is read and written once: bound by
    memory. The backward keeps W + 1 numbers for each channel and 256 tokens (on GPUs also one
    float32 for each element of x).

    Paper: Mamba: Linear-Time Sequence Modeling with Selective State Spaces (Gu and Dao 2023),
    section 3.4; layout of the state as in Dao-AILab/causal-conv1d.

    Example:
        >>> import torch, tokenmill as tm
        >>> x, weight = torch.randn(2, 100, 64), torch.randn(64, 4)
        >>> whole = tm.causal_conv1d(x, weight, activation="silu")
        >>> first, state = tm.causal_conv1d(
        ...     x[:, :60], weight, activation="silu", return_final_state=True)
        >>> rest = tm.causal_conv1d(x[:, 60:], weight, activation="silu", initial_state=state)
        >>> torch.equal(torch.cat([first, rest], 1), whole), state.shape
        (True, torch.Size([2, 64, 3]))
    """
    raise NotImplementedError


def lower(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: Any = None, **given: Any
) -> tuple[Any, ...]:
    activation = lower_activation(OP, activation)
    return FORWARD.lower(x, weight, bias, activation=activation, **given)


def _check_values(a: Any) -> None:
    if a.cu_seqlens is not None:
        check_cu_seqlens_values(OP, "cu_seqlens", a.cu_seqlens, a.x.shape[0])


def _fake(a: Any) -> tuple[Tensor, Tensor]:
    shape: tuple[int, ...] = (0,)
    if a.return_final_state:
        sequences = a.x.shape[0] if a.cu_seqlens is None else a.cu_seqlens.shape[0] - 1
        shape = (sequences, a.x.shape[-1], a.weight.shape[1] - 1)
    return a.x.new_empty(a.x.shape), a.x.new_empty(shape)


def _fake_backward(a: Any) -> tuple[Tensor, ...]:
    state = a.initial_state.shape if a.needs_dinitial_state else (0,)
    dbias = a.weight.new_empty(0) if a.bias is None else a.bias.new_empty(a.bias.shape)
    return (
        *(t.new_empty(t.shape) for t in (a.x, a.weight)),
        dbias,
        a.x.new_empty(state),
    )


def _backward(ops: Any, ctx: Any, dout: Tensor | None, dfinal_state: Tensor | None) -> Gradients:
    a, _ = kept(ctx)
    needed = needed_gradients(ctx)
    if dout is not None and dout.stride(-1) != 1:  # e.g. the expanded gradient of a sum
        dout = dout.contiguous()
    state = dfinal_state if a.return_final_state else None
    found = ops.causal_conv1d_backward(dout, state, needed["initial_state"], *a)
    gradients = dict(zip(("x", "weight", "bias", "initial_state"), found, strict=True))
    return {n: t for n, t in gradients.items() if n in ("x", "weight") or needed[n]}


FORWARD = register(
    TorchOp(
        OP,
        autocast=Autocast(lower=("x", "weight", "bias", "initial_state"), wide=("weight", "bias")),
        check_values=_check_values,
        fake=_fake,
        triton="linear.causal_conv1d:causal_conv1d",
        backward=_backward,
    )
)
BACKWARD = register(
    TorchOp(
        OP + "_backward",
        fake=_fake_backward,
        triton="linear.causal_conv1d:causal_conv1d_backward",
    )
)
SPEC = register_op(
    OpSpec(
        function=causal_conv1d,
        lower=lower,
        sugar=frozenset({"activation"}),
        reference=reference.causal_conv1d,
        plain=reference.causal_conv1d_plain,
        forward=FORWARD,
        copied=("x",),
        differentiable=("x", "weight", "bias", "initial_state"),
        sharding=Sharding(
            {"x": "b.c", "weight": "c.", "bias": "c", "initial_state": "bc."}, ("b.c", "bc.")
        ),
        paper="Mamba (Gu and Dao 2023)",
        flops=flops,
        backward_flops=lambda a: 3.0 * flops(a),
    )
)
