"""scatter_tokens: writes rows back to the positions given by an index."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .._call.attach import register
from .._call.autocast import Autocast
from .._call.autograd import Gradients, needed_gradients
from .._call.operator import TorchOp
from .._call.run import call
from .._check import as_int, check_tensor
from ..reference.tokens import scatter_tokens as reference
from ..registry import OpSpec, Sharding, register_op
from ._rows import as_int32, as_rows, check_index_values, contiguous_rows

OP = "scatter_tokens"


def scatter_tokens(
    y: Tensor,
    indices: Tensor,
    base: Tensor | int | tuple[int, int],
    *,
    backend: str | None = None,
) -> Tensor:
    r"""Writes the rows of y to indexed positions of a copy of base: the adjoint of
    :func:`gather_tokens` where base is 0.

    Args:
        y: ``[B, K, C]`` float16, bfloat16, float32, int32 or int64 (float64 on the reference), any
            strides with a contiguous last dimension; or ``[B, K]``, ``[B, K, H, D]``. With flat
            indices ``[K, C]``, ``[K]`` or ``[K, H, D]``.
        indices: ``[B, K]`` int32 or int64, 0 to N - 1, no token twice in a sequence; -1 skips the
            row. Or flat: ``[K]``, where b * N + n is token n of sequence b.
        base: ``[B, N, C]`` in the dtype of y, not modified; with flat indices also packed ``[N,
            C]``. Or a number N: zeros for N tokens in each sequence; or a pair (B, N).
        backend: "cpu", "cuda", "triton", "reference" or None (see :func:`tokenmill.explain`).

    Returns:
        ``[B, N, C]`` in the dtype of y, packed ``[N, C]`` where base is packed, or a number with
        flat indices. Differentiable in floating-point y and base.

    Raises:
        RuntimeError: naming argument, rule and value. On a GPU an index out of range is skipped,
            and of several rows for one token one is taken.

    Complexity: per sequence, reads K rows of y and N - K of base, and writes N.

    Paper: DToP (Tang et al. 2023) and Focus-DETR (Zheng et al. 2023), which write tokens back.

    Example:
        >>> import torch, tokenmill as tm
        >>> y = torch.tensor([[[1.0], [2.0], [3.0]]])
        >>> index = torch.tensor([[3, -1, 0]])
        >>> tm.scatter_tokens(y, index, 4).flatten().tolist()
        [3.0, 0.0, 0.0, 1.0]
        >>> tm.scatter_tokens(y, index, torch.full((1, 4, 1), 9.0)).flatten().tolist()
        [3.0, 9.0, 9.0, 1.0]
    """
    out: Tensor = call(SPEC, lower(y, indices, base), None, backend)[0]
    flat = indices.dim() == 1
    behind = y.shape[1 if flat else 2 :]
    if len(behind) != 1:
        out = out.unflatten(-1, behind) if behind else out.squeeze(-1)
    packed = base.dim() == y.dim() if isinstance(base, Tensor) else not isinstance(base, tuple)
    return out[0] if flat and packed else out


def lower(y: Tensor, indices: Tensor, base: Tensor | int | tuple[int, int]) -> tuple[Any, ...]:
    check_tensor(OP, "y", y)
    check_tensor(OP, "indices", indices)
    indices = as_int32(indices)
    leading = 1 if indices.dim() == 1 else 2
    rank = y.dim()
    if leading <= rank <= leading + 2:
        y = as_rows(y, leading)
    if not isinstance(base, Tensor):
        batch = 1 if leading == 1 else y.shape[0] if rank else 0
        batch, tokens = base if isinstance(base, tuple) and len(base) == 2 else (batch, base)
        batch = as_int(OP, "batch", batch)
        tokens = as_int(OP, "base", tokens)
        return y, indices, None, batch, tokens
    check_tensor(OP, "base", base)
    if leading == 1 and base.dim() == rank:
        base = base[None]
    if rank - leading + 2 == base.dim() and 2 <= base.dim() <= 4:
        base = as_rows(base, 2)
    batch, tokens = base.shape[:2] if base.dim() > 1 else (0, 0)
    return y, indices, base, batch, tokens


def _check_values(a: Any) -> None:
    rows = a.tokens if a.indices.dim() == 2 else a.batch * a.tokens
    check_index_values(OP, "indices", a.indices, rows, repeats=False)


def _fake(a: Any) -> Tensor:
    return a.y.new_empty((a.batch, a.tokens, a.y.shape[-1]))


def _setup_context(ctx: Any, a: dict[str, Any], output: Tensor) -> None:
    ctx.save_for_backward(a["indices"])
    ctx.shape, ctx.batch, ctx.tokens = a["y"].shape, a["batch"], a["tokens"]


def _backward(ops: Any, ctx: Any, dout: Tensor) -> Gradients:
    (indices,) = ctx.saved_tensors
    dout = contiguous_rows(dout)
    needed = needed_gradients(ctx)
    dy = dbase = None
    if needed["y"]:
        dy = ops.gather_tokens(dout, indices)
    if needed["base"]:
        zeros = dout.new_zeros(ctx.shape[-1]).expand(ctx.shape)
        dbase = ops.scatter_tokens(zeros, indices, dout, ctx.batch, ctx.tokens)
    return {"y": dy, "base": dbase}


FORWARD = register(
    TorchOp(
        OP,
        autocast=Autocast(promote=("y", "base")),
        fake=_fake,
        check_values=_check_values,
        triton="tokens.scatter_tokens:scatter_tokens",
        backward=_backward,
        setup_context=_setup_context,
    )
)
SPEC = register_op(
    OpSpec(
        function=scatter_tokens,
        lower=lower,
        reference=reference.scatter_tokens,
        forward=FORWARD,
        differentiable=("y", "base"),
        sharding=Sharding(
            {"y": "b.c", "indices": "b.", "base": "b.c", "batch": "b"},
            ("b.c",),
        ),
        paper="DToP (Tang et al. 2023)",
        flops=lambda a: 0.0,
    )
)
