"""merge_attention_states: merges attention results over disjoint sets of keys by their lse."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._call.attach import register
from .._call.autograd import Gradients, kept
from .._call.operator import TorchOp
from .._call.run import call
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
    out, lse = call(SPEC, (outs, lses), {}, backend)
    return out, lse


def _fake(a: Any) -> tuple[Tensor, Tensor]:
    lse_shape = (0,) if a.lses is None else a.lses.shape[1:]
    return a.outs.new_empty(a.outs.shape[1:]), a.outs.new_empty(lse_shape, dtype=torch.float32)


def _fake_backward(a: Any) -> tuple[Tensor, Tensor]:
    lses_shape = (0,) if a.lses is None else a.lses.shape
    return a.outs.new_empty(a.outs.shape), a.outs.new_empty(lses_shape, dtype=torch.float32)


def _backward(ops: Any, ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> Gradients:
    a, _ = kept(ctx)
    if dout is None:
        dout = a.outs.new_zeros(a.outs.shape[1:])
    if dout.stride(-1) != 1:
        dout = dout.contiguous()
    if dlse is not None:
        dlse = dlse.contiguous() if a.lses is not None else None
    douts, dlses = ops.merge_attention_states_backward(dout, dlse, *a)
    return {"outs": douts, "lses": dlses if a.lses is not None else None}


FORWARD = register(
    TorchOp(
        OP,
        fake=_fake,
        triton="dense.merge_attention_states:merge_attention_states",
        backward=_backward,
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
        function=merge_attention_states,
        reference=reference.merge_attention_states,
        forward=FORWARD,
        differentiable=("outs", "lses"),
        logarithms=(1,),
        sharding=Sharding(
            {"outs": ".brh. .rh.", "lses": ".bhr .hr"},
            ("brh.", "bhr"),
        ),
        paper="FlashAttention (Dao et al. 2022), LeanAttention (Sanovar et al. 2024)",
        flops=lambda a: 2.0 * a.outs.numel(),
    )
)
