"""gather_tokens: rows of a sequence by index."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast, overload

from torch import Tensor

from .._call.attach import register
from .._call.autograd import Gradients
from .._call.operator import TorchOp
from .._call.run import call
from .._check import check, check_tensor, fail, show
from ..reference.tokens import gather_tokens as reference
from ..registry import OpSpec, Sharding, register_op
from ._rows import as_int32, as_rows, check_index_values, contiguous_rows

OP = "gather_tokens"


@overload
def gather_tokens(
    xs: Tensor, indices: Tensor, *, out: Tensor | None = None, backend: str | None = None
) -> Tensor: ...
@overload
def gather_tokens(
    xs: Sequence[Tensor],
    indices: Tensor,
    *,
    out: Sequence[Tensor] | None = None,
    backend: str | None = None,
) -> tuple[Tensor, ...]: ...
def gather_tokens(
    xs: Tensor | Sequence[Tensor],
    indices: Tensor,
    *,
    out: Tensor | Sequence[Tensor] | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """Gathers rows by index, from one tensor or several.

    Rows are copied bit for bit. An index of -1 gives a row of zeros; indices may repeat.

    Args:
        xs: ``[B, N, C]`` float16, bfloat16, float32, int32 or int64 (float64 on the reference), any
            strides with a contiguous last dimension; or ``[B, N]`` (scores), ``[B, N, H, D]``.
            With flat indices also packed: ``[N]``, ``[N, C]``. Or several such tensors, of any
            dtypes, gathered by one index.
        indices: ``[B, K]`` int32 or int64, -1 to N - 1. Or flat: ``[K]``, where b * N + n is token
            n of sequence b.
        out: preallocated result: shape and dtype as returned, any non-overlapping strides with a
            contiguous last dimension (the last two for ``[B, K, H, D]``); it shares no element with
            x or indices (disjoint parts of one tensor are allowed). Needs no_grad or an x without
            gradient. For several tensors, one out each.
        backend: "cpu", "cuda", "triton", "reference" or None (see :func:`tokenmill.explain`).

    Returns:
        ``[B, K, C]`` in the dtype of xs (``[B, K]``, ``[B, K, H, D]``), without B for flat indices;
        a tuple for several tensors. Differentiable in floating-point xs: the gradient of a row is
        the float32 sum of the gradients of its copies, in the order of the indices.

    Raises:
        RuntimeError: naming argument, rule and value. On a GPU an index out of range gives a row of
            zeros.

    Complexity: reads and writes B·K·C elements.

    Paper: Focus-DETR (Zheng et al. 2023), whose layers gather queries, positions and scores by the
    same index; EViT (Liang et al. 2022).

    Example:
        >>> import torch, tokenmill as tm
        >>> x = torch.arange(6.0).view(1, 3, 2)
        >>> tm.gather_tokens(x, torch.tensor([[2, -1, 0]])).tolist()
        [[[4.0, 5.0], [0.0, 0.0], [0.0, 1.0]]]
        >>> scores = torch.tensor([[0.1, 0.2, 0.3]])
        >>> [len(t[0]) for t in tm.gather_tokens((x, scores), torch.tensor([[2, 1]]))]
        [2, 2]
    """
    check_tensor(OP, "indices", indices)
    indices = as_int32(indices)
    if isinstance(xs, Tensor):
        check_tensor(OP, "out", out, optional=True)
        return _gather(xs, indices, cast("Tensor | None", out), backend)
    if not isinstance(xs, list | tuple):
        fail(OP, "x", "must be a tensor or several", xs)
    if out is None:
        return tuple(_gather(x, indices, None, backend) for x in xs)
    if not isinstance(out, list | tuple) or len(out) != len(xs):
        fail(OP, "out", f"must be {len(xs)} tensors", out)
    for o in out:
        check_tensor(OP, "out", o)
    return tuple(_gather(x, indices, o, backend) for x, o in zip(xs, out, strict=True))


def _gather(x: Tensor, indices: Tensor, out: Tensor | None, backend: str | None) -> Tensor:
    lowered = lower(x, indices)
    behind = x.shape[_leading(x, indices) :]
    if out is not None:
        wanted = (*indices.shape, *behind)
        check(out.shape == wanted, OP, "out", f"must have shape {show(wanted)}", out.shape)
        call(SPEC, lowered, None, backend, lower_out(out, FORWARD.record(*lowered)))
        return out
    rows: Tensor = call(SPEC, lowered, None, backend)[0]
    return rows if len(behind) == 1 else rows.unflatten(-1, behind) if behind else rows.squeeze(-1)


def _leading(x: Tensor, indices: Tensor) -> int:
    """Number of dimensions before the channels: one for packed tokens, else two."""
    return 1 if indices.dim() == 1 and x.dim() < 3 else 2


def lower(x: Tensor, indices: Tensor) -> tuple[Any, ...]:
    check_tensor(OP, "x", x)
    check_tensor(OP, "indices", indices)
    indices = as_int32(indices)
    leading = _leading(x, indices)
    if leading <= x.dim() <= 4:
        x = as_rows(x, leading)
        x = x[None] if leading == 1 else x
    return x, indices


def lower_out(out: Tensor, a: Any) -> Tensor:
    """The out tensor as rows, which must not need a copy."""
    leading = a.indices.dim()
    if out.dim() == leading + 2 and 0 not in out.shape:
        one = out.shape[-2] == 1 or out.shape[-1] == 1 or out.stride(-2) == out.shape[-1]
        check(one, OP, "out", "must have its last dimensions as one; strides", out.stride())
    return as_rows(out, leading) if leading <= out.dim() <= leading + 2 else out


def _check_values(a: Any) -> None:
    batch, tokens = a.x.shape[:2]
    rows = tokens if a.indices.dim() == 2 else batch * tokens
    check_index_values(OP, "indices", a.indices, rows)


def _fake(a: Any) -> Tensor:
    return a.x.new_empty((*a.indices.shape, a.x.shape[2]))


def _setup_context(ctx: Any, a: dict[str, Any], output: Tensor) -> None:
    ctx.save_for_backward(a["indices"])
    ctx.shape = a["x"].shape


def _backward(ops: Any, ctx: Any, dout: Tensor) -> Gradients:
    (indices,) = ctx.saved_tensors
    batch, tokens, channels = ctx.shape
    dout = contiguous_rows(dout)
    if indices.dim() == 1:
        dx = sum_of_copies(ops, dout[None], indices[None], batch * tokens)
        return {"x": dx.view(batch, tokens, channels)}
    return {"x": sum_of_copies(ops, dout, indices, tokens)}


def sum_of_copies(ops: Any, dout: Tensor, indices: Tensor, tokens: int) -> Tensor:
    """[B, tokens, C]: for each token the sum of the rows of dout [B, K, C] with its index in [B,
    K].
    """
    entries = indices[:, None, :, None]
    counts = entries.new_ones(entries.shape[:-1])
    offsets, rows = ops.transpose_block_list(entries, counts, tokens)
    dx: Tensor = ops.segment_reduce(dout, offsets[:, 0], rows[:, 0], None, "sum")[0]
    return dx


FORWARD = register(
    TorchOp(
        OP,
        fake=_fake,
        check_values=_check_values,
        triton="tokens.gather_tokens:gather_tokens",
        backward=_backward,
        setup_context=_setup_context,
    )
)
OUT = register(TorchOp(OP + "_out", triton="tokens.gather_tokens:gather_tokens_out"))
SPEC = register_op(
    OpSpec(
        function=gather_tokens,
        lower=lower,
        reference=reference.gather_tokens,
        forward=FORWARD,
        lower_out=lower_out,
        differentiable=("x",),
        sharding=Sharding({"x": "b.c", "indices": "b."}, ("b.c",)),
        paper="Focus-DETR (Zheng et al. 2023)",
        flops=lambda a: 0.0,
    )
)
