"""query_similarity_gate: whether the previous selection of keys can be reused."""

from __future__ import annotations

import torch
from torch import Tensor

from .._call.attach import register
from .._call.autocast import Autocast
from .._call.operator import TorchOp
from .._call.run import call
from ..reference.select import query_similarity_gate as reference
from ..registry import OpSpec, Sharding, register_op

OP = "query_similarity_gate"


def query_similarity_gate(
    q: Tensor, q_ref: Tensor, threshold: float = 0.9, *, backend: str | None = None
) -> Tensor:
    r"""Whether the previous selection can be reused, because the queries resemble the ones it was
    made for.

    The mean over the tokens of q and the mean of q_ref, heads concatenated, are compared by their
    cosine. The result stays on the device: a selection kernel can be predicated on it without a
    synchronisation.

    Args:
        q: ``[B, S, H, D]`` float16, bfloat16 or float32 (float64 on the reference), any strides
            with a contiguous last dimension.
        q_ref: ``[B, S', H, D]`` in the dtype of q: the queries of the selection, or their mean (S'
            = 1).
        threshold: minimum cosine at which the selection can be reused.
        backend: "cpu", "cuda", "triton", "reference" or None (see :func:`tokenmill.explain`).

    Returns:
        ``[B]`` bool, True where the cosine is at least the threshold. False for a mean of zeros or
        NaN. Not differentiable.

    Raises:
        RuntimeError: naming argument, rule and value.

    Complexity: reads q and q_ref once.

    Paper: TokenSelect (Wu et al. 2024), section 4.3.

    Example:
        >>> import torch, tokenmill as tm
        >>> q = torch.tensor([[1.0, 0.0], [1.0, 1.0]]).view(2, 1, 1, 2)
        >>> tm.query_similarity_gate(q, torch.tensor([3.0, 0.5]).expand(2, 1, 1, 2)).tolist()
        [True, False]
    """
    return call(SPEC, (q, q_ref, threshold), {}, backend)[0]


FORWARD = register(
    TorchOp(
        OP,
        autocast=Autocast(lower=("q", "q_ref")),
        fake=lambda a: a.q.new_empty((a.q.shape[0],), dtype=torch.bool),
        triton="select.query_similarity_gate:query_similarity_gate",
    )
)
SPEC = register_op(
    OpSpec(
        function=query_similarity_gate,
        reference=reference.query_similarity_gate,
        forward=FORWARD,
        sharding=Sharding({"q q_ref": "b..."}, ("b",)),
        paper="TokenSelect (Wu et al. 2024)",
        flops=lambda a: 1.0 * a.q.numel() + a.q_ref.numel(),
    )
)
