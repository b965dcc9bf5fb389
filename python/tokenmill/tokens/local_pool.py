"""local_pool: pools each token with its neighbours, channels last."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .._call.attach import register
from .._call.autograd import Gradients, keep, kept
from .._call.operator import TorchOp
from .._call.run import call
from .._check import as_int, check, check_text
from ..reference.tokens import local_pool as reference
from ..registry import OpSpec, Sharding, register_op
from ._rows import contiguous_rows

OP = "local_pool"


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
        x, kernel, dilation=dilation, mode=mode, mask=mask, count_include_pad=count_include_pad,
        subtract_input=subtract_input,
    )  # fmt: skip
    out: Tensor = call(SPEC, lowered, None, backend)[0]
    return out.squeeze(1) if x.dim() == 3 else out


def lower(
    x: Tensor,
    kernel: int | tuple[int, int],
    *,
    dilation: int | tuple[int, int] = 1,
    mode: str = "avg",
    **given: Any,
) -> tuple[Any, ...]:
    check_text(OP, "mode", mode)
    a = FORWARD.fields(x=x, pooling=mode, **given)
    line = x.dim() == 3
    a["kernel_y"], a["kernel_x"] = _pair("kernel", kernel, line)
    a["dilation_y"], a["dilation_x"] = _pair("dilation", dilation, line)
    if line:
        a["x"], mask = x.unsqueeze(1), a["mask"]
        a["mask"] = mask.unsqueeze(1) if mask is not None and mask.dim() else mask
    return tuple(a.values())


def _pair(name: str, value: Any, line: bool) -> tuple[int, int]:
    """A pair (along Y, along X). A sequence is a map of one row."""
    if isinstance(value, tuple | list) and not line:
        check(len(value) == 2, OP, name, "must be an integer or two", value)
        first, second = value
    else:
        first, second = 1 if line else value, value
    return as_int(OP, name, first), as_int(OP, name, second)


def _fake(a: Any) -> Tensor:
    return a.x.new_empty(a.x.shape)


def _setup_context(ctx: Any, a: dict[str, Any], output: Tensor) -> None:
    keep(ctx, a)
    ctx.set_materialize_grads(True)  # an undefined gradient is 0


def _backward(ops: Any, ctx: Any, dout: Tensor) -> Gradients:
    a, _ = kept(ctx)
    return {"x": ops.local_pool_backward(contiguous_rows(dout), *a)}


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
        fake=_fake,
        triton="tokens.local_pool:local_pool_backward",
    )
)
SPEC = register_op(
    OpSpec(
        function=local_pool,
        lower=lower,
        reference=reference.local_pool,
        forward=FORWARD,
        differentiable=("x",),
        sharding=Sharding({"x": "b..c", "mask": "b.."}, ("b..c",)),
        paper="PoolFormer (Yu et al. 2022)",
        flops=lambda a: 1.0 * a.x.numel() * (a.kernel_y + a.kernel_x),
    )
)
