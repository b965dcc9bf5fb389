"""local_pool: pools each token with its neighbours, channels last."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._call.attach import register
from .._call.operator import TorchOp
from .._call.run import call
from .._check import (
    as_int,
    check,
    check_bool,
    check_dtype,
    check_last_contiguous,
    check_tensor,
    check_text,
)
from ..reference.tokens import local_pool as reference
from ..registry import OpSpec, Sharding, register_op
from .moving import contiguous_rows
from .rules import check_like

OP = "local_pool"
MAX_TAPS, MAX_DILATION = 255, 65535  # along one dimension


def local_pool(
    x: Tensor,
    kernel: int | tuple[int, int],
    *,
    dilation: int | tuple[int, int] = 1,
    mode: str = "avg",
    mask: Tensor | None = None,
    count_include_pad: bool = False,
    subtract_input: bool = False,
    backend: str | None = None,
) -> Tensor:
    r"""The mean or maximum of the window around each token of a sequence or a map, stride 1.

    The window of a token at (y, x) holds the tokens at :math:`(y + d_y i,\ x + d_x j)` that are on
    the map and not masked, with i and j up to half of kernel. PoolFormer's mixer is kernel (3, 3)
    with subtract_input; PoNet's local pooling is kernel 3 with "max".

    Args:
        x: ``[B, N, C]`` or a map ``[B, Y, X, C]``, float16, bfloat16 or float32 (float64 on the
            reference), any strides with a contiguous last dimension.
        kernel: odd width of the window, 1 to 255; for a map also a pair (along Y, along X).
        dilation: distance between neighbours in a window, 0 to 65535, for a map also a pair; 0
            counts the token itself once per tap of the window.
        mode: "avg" (summed in float32) or "max", where NaN wins, and the first of equal tokens in
            row-major order gets the whole gradient.
        mask: bool ``[B, N]`` or ``[B, Y, X]``. A token where it is False is in no window; its own
            window still holds its neighbours. None: all True.
        count_include_pad: divide a mean by the size of kernel, not by the number of tokens in the
            window.
        subtract_input: subtract the token itself from the result, also where it is masked.
        backend: "cpu", "cuda", "triton", "reference" or None (see :func:`tokenmill.explain`).

    Returns:
        Shape and dtype of x. A window without tokens gives 0 (minus the token, with
        subtract_input). Differentiable in x.

    Raises:
        RuntimeError: naming argument, rule and value.

    Complexity: B·N·C·(kernel_y + kernel_x) additions on the CPU; the other backends sum each window
    separately.

    Paper: PoolFormer (Yu et al. 2022), PoNet (Tan et al. 2022).

    Example:
        >>> import torch, tokenmill as tm
        >>> x = torch.tensor([[[1.0], [2.0], [6.0], [0.0]]])
        >>> tm.local_pool(x, 3).flatten().tolist()
        [1.5, 3.0, 2.6666667461395264, 3.0]
        >>> tm.local_pool(x, 3, mode="max", subtract_input=True).flatten().tolist()
        [1.0, 4.0, 0.0, 6.0]
    """
    lowered = lower(
        x,
        kernel,
        dilation=dilation,
        mode=mode,
        mask=mask,
        count_include_pad=count_include_pad,
        subtract_input=subtract_input,
    )
    out: Tensor = call(SPEC, lowered, backend)[0]
    return out.squeeze(1) if x.dim() == 3 else out


def lower(
    x: Tensor,
    kernel: int | tuple[int, int],
    *,
    dilation: int | tuple[int, int] = 1,
    mode: str = "avg",
    mask: Tensor | None = None,
    count_include_pad: bool = False,
    subtract_input: bool = False,
) -> tuple[Any, ...]:
    check_tensor(OP, "x", x)
    check_tensor(OP, "mask", mask, optional=True)
    check_text(OP, "mode", mode)
    for name, value in (
        ("count_include_pad", count_include_pad),
        ("subtract_input", subtract_input),
    ):
        check_bool(OP, name, value)
    line = x.dim() == 3
    kernels = _pair("kernel", kernel, line)
    dilations = _pair("dilation", dilation, line)
    if line:
        x = x.unsqueeze(1)
        mask = mask.unsqueeze(1) if mask is not None and mask.dim() else mask
    return x, mask, *kernels, *dilations, mode, count_include_pad, subtract_input


def _pair(name: str, value: Any, line: bool) -> tuple[int, int]:
    """A pair (along Y, along X). A sequence is a map of one row."""
    if isinstance(value, tuple | list) and not line:
        check(len(value) == 2, OP, name, "must be an integer or two", value)
        first, second = value
    else:
        first, second = 1 if line else value, value
    return as_int(OP, name, first), as_int(OP, name, second)


# The rules of csrc/tokens/local_pool/host.cpp, in the same order and words.
def _check(
    x: Tensor,
    mask: Tensor | None,
    kernel_y: int,
    kernel_x: int,
    dilation_y: int,
    dilation_x: int,
    pooling: str,
    count_include_pad: bool,
    subtract_input: bool,
    *,
    float64: bool = False,
) -> None:
    rule = "must have 4 dimensions [B, Y, X, C], or 3 [B, N, C]"
    check(x.dim() == 4, OP, "x", rule, x.dim())
    check_dtype(OP, "x", x, float64=float64)
    check_last_contiguous(OP, "x", x)
    tokens = x.shape[0] * x.shape[1] * x.shape[2]
    check(tokens < 2**31, OP, "x", "must have fewer than 2^31 tokens in all", tokens)
    if mask is not None:
        check_like(OP, "mask", mask, list(x.shape[:3]), torch.bool, "x", x)
    for kernel in (kernel_y, kernel_x):
        ok = 1 <= kernel <= MAX_TAPS and kernel % 2 == 1
        check(ok, OP, "kernel", f"must be odd, 1 to {MAX_TAPS}", kernel)
    for dilation in (dilation_y, dilation_x):
        ok = 0 <= dilation <= MAX_DILATION
        check(ok, OP, "dilation", f"must be 0 to {MAX_DILATION}", dilation)
    check(pooling in ("avg", "max"), OP, "mode", "must be 'avg' or 'max'", pooling)


def _fake(x: Tensor, *options: Any) -> Tensor:
    return x.new_empty(x.shape)


def _check_backward(dout: Tensor, x: Tensor, mask: Tensor | None, *options: Any) -> None:
    _check(x, mask, *options)
    check_like(OP, "dout", dout, list(x.shape), x.dtype, "x", x)


def _fake_backward(dout: Tensor, x: Tensor, *options: Any) -> Tensor:
    return x.new_empty(x.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, mask, *ctx.options = inputs
    ctx.save_for_backward(x, mask)


def _backward(ops: Any, ctx: Any, dout: Tensor) -> tuple[Any, ...]:
    x, mask = ctx.saved_tensors
    dx = ops.local_pool_backward(contiguous_rows(dout), x, mask, *ctx.options)
    return dx, *(None,) * (1 + len(ctx.options))


FORWARD = register(
    TorchOp(
        OP,
        fake=_fake,
        triton="tokens.local_pool:local_pool",
        backward=_backward,
        setup_context=_setup_context,
    )
)
BACKWARD = register(
    TorchOp(
        OP + "_backward",
        fake=_fake_backward,
        triton="tokens.local_pool:local_pool_backward",
    )
)
SPEC = register_op(
    OpSpec(
        name=OP,
        family="tokens",
        function=local_pool,
        lower=lower,
        reference=reference.local_pool,
        plain=reference.local_pool,
        forward=FORWARD,
        backward=BACKWARD,
        # Edits of the first sample.
        differentiable=("x",),
        sharding=Sharding({"x": "b..c", "mask": "b.."}, ("b..c",)),
        paper="PoolFormer (Yu et al. 2022)",
        flops=lambda x, mask, ky, kx, *others: 1.0 * x.numel() * (ky + kx),
    )
)
