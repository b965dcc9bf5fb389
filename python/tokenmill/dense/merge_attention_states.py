"""merge_attention_states: merges attention results over disjoint sets of keys by their lse."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._call.attach import register
from .._call.operator import TorchOp
from .._call.run import call
from .._check import check, check_dtype, check_last_contiguous, check_tensor, check_wide
from ..reference.dense import merge_attention_states as reference
from ..registry import OpSpec, Sharding, register_op

OP = "merge_attention_states"


def merge_attention_states(
    outs: Tensor, lses: Tensor | None = None, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    r"""Merges partial attention results over disjoint sets of keys by their lse.

    With :math:`lse = \log \sum_i e^{lse_i}` and weights :math:`w_i = e^{lse_i - lse}`, the result
    is :math:`out = \sum_i w_i\, out_i`: exactly the attention over the union of the keys, in any
    grouping (the reduction is associative). The weights sum to 1 however large the lses are: two
    parts in which a finite mask hides every key give their mean. Without lses the parts are summed,
    which is exact for unnormalised weights (kinds other than softmax; :func:`attention` says how to
    merge weights divided by their sum).

    Args:
        outs: ``[n, B, S, H, D]`` or packed ``[n, T, H, D]``, float16, bfloat16 or float32 (float64
            on the reference), any strides with a contiguous last dimension.
        lses: ``[n, B, H, S]`` or packed ``[n, H, T]`` float32, natural log; -inf for a part without
            keys, whose out is then ignored. None: sum.
        backend: "cpu", "cuda", "triton", "reference" or None (see :func:`tokenmill.explain`).

    Returns:
        (out, lse): ``[B, S, H, D]`` in the dtype of outs, and ``[B, H, S]`` float32 (of size 0
        without lses). A row that is empty in every part has out 0 and lse -inf. Differentiable in
        outs and lses.

    Raises:
        RuntimeError: naming argument, rule and value.

    Complexity: reads n·B·S·H·D elements once; O(1) extra memory.

    Paper: the merge of FlashAttention's partial softmax (Dao et al. 2022, section 3.1), as used
    over splits of the keys by FlashDecoding and LeanAttention (Sanovar et al. 2024).

    Example:
        >>> import torch, tokenmill as tm
        >>> q, k, v = (torch.randn(1, 8, 2, 16) for _ in range(3))
        >>> parts = [tm.attention(q, k[:, s], v[:, s], return_lse=True)
        ...          for s in (slice(0, 5), slice(5, 8))]
        >>> out, lse = tm.merge_attention_states(torch.stack([o for o, _ in parts]),
        ...                                      torch.stack([l for _, l in parts]))
        >>> torch.allclose(out, tm.attention(q, k, v), atol=1e-5)
        True
    """
    out, lse = call(SPEC, lower(outs, lses), backend)
    return out, lse


def lower(outs: Tensor, lses: Tensor | None = None) -> tuple[Any, ...]:
    check_tensor(OP, "outs", outs)
    check_tensor(OP, "lses", lses, optional=True)
    return outs, lses


def _check(outs: Tensor, lses: Tensor | None, *, float64: bool = False) -> None:
    check(
        outs.dim() in (4, 5),
        OP,
        "outs",
        "must have 5 dimensions [n, B, S, H, D] or 4 [n, T, H, D]",
        outs.dim(),
    )
    check_dtype(OP, "outs", outs, float64=float64)
    check_last_contiguous(OP, "outs", outs)
    check(outs.shape[0] >= 1, OP, "outs", "must hold at least one part", outs.shape[0])
    if lses is None:
        return
    wanted = [*outs.shape[:-3], outs.shape[-2], outs.shape[-3]]
    check(
        list(lses.shape) == wanted,
        OP,
        "lses",
        f"must have shape [{', '.join(map(str, wanted))}]",
        lses.shape,
    )
    check_wide(OP, "lses", lses, outs)
    check(lses.device == outs.device, OP, "lses", "must be on the device of outs", lses.device)


def _check_backward(dout: Tensor, dlse: Tensor | None, outs: Tensor, lses: Tensor | None) -> None:
    _check(outs, lses)


def _fake(outs: Tensor, lses: Tensor | None) -> tuple[Tensor, Tensor]:
    lse_shape = (0,) if lses is None else lses.shape[1:]
    return outs.new_empty(outs.shape[1:]), outs.new_empty(lse_shape, dtype=torch.float32)


def _fake_backward(
    dout: Tensor, dlse: Tensor | None, outs: Tensor, lses: Tensor | None
) -> tuple[Tensor, Tensor]:
    lses_shape = (0,) if lses is None else lses.shape
    return outs.new_empty(outs.shape), outs.new_empty(lses_shape, dtype=torch.float32)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    ctx.save_for_backward(*inputs)
    ctx.set_materialize_grads(False)


def _backward(ops: Any, ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
    outs, lses = ctx.saved_tensors
    if dout is None:
        dout = outs.new_zeros(outs.shape[1:])
    if dout.stride(-1) != 1:
        dout = dout.contiguous()
    if dlse is not None:
        dlse = dlse.contiguous() if lses is not None else None
    douts, dlses = ops.merge_attention_states_backward(dout, dlse, outs, lses)
    return douts, (dlses if lses is not None else None)


FORWARD = register(
    TorchOp(
        OP,
        fake=_fake,
        triton="dense.merge_attention_states:merge_attention_states",
        backward=_backward,
        setup_context=_setup_context,
    )
)
BACKWARD = register(
    TorchOp(
        OP + "_backward",
        fake=_fake_backward,
        triton="dense.merge_attention_states:merge_attention_states_backward",
    )
)
SPEC = register_op(
    OpSpec(
        name=OP,
        family="dense",
        function=merge_attention_states,
        lower=lower,
        reference=reference.merge_attention_states,
        plain=reference.merge_attention_states,
        forward=FORWARD,
        backward=BACKWARD,
        differentiable=("outs", "lses"),
        logarithms=(1,),
        sharding=Sharding(
            {"outs": ".brh. .rh.", "lses": ".bhr .hr"},
            ("brh.", "bhr"),
        ),
        paper="FlashAttention (Dao et al. 2022), LeanAttention (Sanovar et al. 2024)",
        flops=lambda outs, lses: 2.0 * outs.numel(),
    )
)
