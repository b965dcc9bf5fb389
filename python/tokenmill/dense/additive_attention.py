"""additive_attention: scores v . tanh(q + k), and the pointers that they give."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .._autocast import Autocast
from .._check import check, check_device_of, check_dtype, check_dtype_of, check_tensor, fail

OP, POINTER = "additive_attention", "pointer_argmax"
AUTOCAST = Autocast(lower=("q", "k", "v_weight", "values"))


@AUTOCAST.applied
def additive_attention(
    q: Tensor,
    k: Tensor,
    v_weight: Tensor,
    values: Tensor | None = None,
    *,
    mask: Tensor | None = None,
) -> Tensor:
    r"""The scores of additive attention, or the values that they weigh.

    .. math::
       u_{ij} = v \cdot \tanh(q_i + k_j), \qquad out_i = \sum_j \operatorname{softmax}_j(u_i)\,
       values_j

    with q and k already projected (:math:`W_2 d_i` and :math:`W_1 e_j`). The tensor of
    T times N times A hyperbolic tangents is never in memory, neither forward nor backward: blocks
    of it follow each other, and the backward computes them again. The parts are PyTorch's on every
    device: there is no argument `backend`.

    Args:
        q: ``[B, T, A]`` float16, bfloat16, float32 or float64, T queries.
        k: ``[B, N, A]`` in the dtype of q, N inputs.
        v_weight: ``[A]`` in the dtype of q.
        values: ``[B, N, C]`` in the dtype of q. None: return the scores.
        mask: bool ``[B, N]`` or ``[B, T, N]``, True = visible. None: all.

    Returns:
        scores ``[B, T, N]``, -inf where the mask hides, or out ``[B, T, C]``, in the dtype of q; a
        query that sees nothing has out 0. Gradients: q, k, v_weight, values.

    Raises:
        RuntimeError: naming argument, rule and value, before anything runs.

    Complexity: B T N A tangents, twice that many with a backward; extra memory of a block of 2^18
    of them on a CPU and 2^25 on a GPU, or of N A, and of the scores.

    Paper: Pointer Networks (Vinyals et al. 2015), section 2.3; section 2.2 for values.

    Example:
        >>> import torch, tokenmill as tm
        >>> q, k = torch.randn(2, 5, 16), torch.randn(2, 9, 16)
        >>> tm.additive_attention(q, k, torch.randn(16)).shape
        torch.Size([2, 5, 9])
    """
    _check(OP, q, k, v_weight, mask)
    if values is not None:
        check_tensor(OP, "values", values)
        _check_alike(OP, "values", values, q)
        rule = f"must have shape [{k.shape[0]}, {k.shape[1]}, C]"
        ok = values.dim() == 3 and values.shape[:2] == k.shape[:2]
        check(ok, OP, "values", rule, values.shape)
    scores = _scores(q, k, v_weight, mask)
    if values is None:
        return scores.to(q.dtype)
    if mask is not None:  # a row of -inf alone
        seen = _rows(mask).any(-1, keepdim=True)
        weights = torch.where(seen, torch.where(seen, scores, 0.0).softmax(-1), 0.0)
    else:
        weights = scores.softmax(-1)
    return weights.to(q.dtype) @ values


def pointer_argmax(q: Tensor, k: Tensor, v_weight: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """The input that each query points to: the largest score of :func:`additive_attention`.

    Args:
        q, k, v_weight, mask: as there.

    Returns:
        int64 ``[B, T]``; of equal scores the first, never one of NaN or -inf; -1 where there is
        none. Not differentiable.

    Raises:
        RuntimeError: naming argument, rule and value.

    Paper: Pointer Networks (Vinyals et al. 2015), section 2.3.

    Example:
        >>> import torch, tokenmill as tm
        >>> q, k = torch.zeros(1, 1, 1), torch.tensor([[[0.5], [2.0], [1.0]]])
        >>> tm.pointer_argmax(q, k, torch.ones(1)).tolist()
        [[1]]
    """
    _check(POINTER, q, k, v_weight, mask)
    if k.shape[1] == 0:
        return torch.full(q.shape[:2], -1, device=q.device)
    with torch.no_grad():
        scores = _scores(q, k, v_weight, mask)
        scores = scores.masked_fill(scores.isnan(), -torch.inf)
        best, at = scores.max(-1)
        return torch.where(best == -torch.inf, -1, at)


def _scores(q: Tensor, k: Tensor, v_weight: Tensor, mask: Tensor | None) -> Tensor:
    """[B, T, N], at least float32"""
    scores: Tensor = _Scores.apply(q, k, v_weight)
    return scores if mask is None else scores.masked_fill(~_rows(mask), -torch.inf)


def _rows(mask: Tensor) -> Tensor:
    return mask[:, None] if mask.dim() == 2 else mask


# Tangents of a block: they fit the cache of a CPU, and occupy a GPU.
CPU_TANGENTS, GPU_TANGENTS = 2**18, 2**25


def _blocks(q: Tensor, k: Tensor) -> Iterator[tuple[int, slice]]:
    """(batch, queries) of each block."""
    most = CPU_TANGENTS if q.device.type == "cpu" else GPU_TANGENTS
    size = max(1, most // max(k.shape[1] * k.shape[2], 1))
    for b in range(q.shape[0]):
        for i in range(0, q.shape[1], size):
            yield b, slice(i, i + size)


class _Scores(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(q: Tensor, k: Tensor, v_weight: Tensor) -> Tensor:
        wide = torch.promote_types(q.dtype, torch.float32)
        queries, keys, v = q.to(wide), k.to(wide), v_weight.to(wide)
        parts = [
            torch.tanh(queries[b, block, None] + keys[b]) @ v for b, block in _blocks(q, k)
        ]  # [queries, N]
        shape = (*q.shape[:2], k.shape[1])
        return torch.cat(parts).reshape(shape) if parts else queries.new_zeros(shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, ...]:
        q, k, v_weight = ctx.saved_tensors
        wide = torch.promote_types(q.dtype, torch.float32)
        queries, keys, v = q.to(wide), k.to(wide), v_weight.to(wide)
        dq, dv = [], torch.zeros_like(v)
        dk = [torch.zeros_like(keys[b]) for b in range(k.shape[0])]
        for b, block in _blocks(q, k):
            e = torch.tanh(queries[b, block, None] + keys[b])  # [queries, N, A]
            of = g[b, block, :, None]
            dv = dv + (of * e).sum((0, 1))
            d = torch.where(of == 0, 0.0, of * v * (1 - e * e))  # what a mask hides adds nothing
            dq.append(d.sum(1))
            dk[b] = dk[b] + d.sum(0)
        return (
            (torch.cat(dq).reshape(q.shape) if dq else torch.zeros_like(queries)).to(q.dtype),
            (torch.stack(dk) if dk else torch.zeros_like(keys)).to(k.dtype),
            dv.to(v_weight.dtype),
        )


def _check_alike(op: str, name: str, t: Tensor, q: Tensor) -> None:
    check_dtype_of(op, name, t, "q", q)
    check_device_of(op, name, t, "q", q)


def _check(op: str, q: Tensor, k: Tensor, v_weight: Tensor, mask: Tensor | None) -> None:
    for name, t in (("q", q), ("k", k), ("v_weight", v_weight)):
        check_tensor(op, name, t)
    check_tensor(op, "mask", mask, optional=True)
    check_dtype(op, "q", q, float64=True)
    check(q.dim() == 3, op, "q", "must have 3 dimensions [B, T, A]", q.dim())
    batch, rows, width = q.shape
    for name, t in (("k", k), ("v_weight", v_weight)):
        _check_alike(op, name, t, q)
    ok = k.dim() == 3 and k.shape[0] == batch and k.shape[2] == width
    check(ok, op, "k", f"must have shape [{batch}, N, {width}]", k.shape)
    check(v_weight.shape == (width,), op, "v_weight", f"must have shape [{width}]", v_weight.shape)
    if mask is None:
        return
    check(mask.dtype == torch.bool, op, "mask", "must be bool", mask.dtype)
    keys = k.shape[1]
    if tuple(mask.shape) not in ((batch, keys), (batch, rows, keys)):
        rule = f"must have shape [{batch}, {keys}] or [{batch}, {rows}, {keys}]"
        fail(op, "mask", rule, mask.shape)
    check_device_of(op, "mask", mask, "q", q)
