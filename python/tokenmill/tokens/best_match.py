"""best_match: for each row of one set, the row of another with the largest product."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._call.attach import register
from .._call.autocast import Autocast
from .._call.operator import TorchOp
from .._call.run import call
from ..reference.tokens import best_match as reference
from ..registry import OpSpec, Sharding, register_op

OP = "best_match"
MAX_CHANNELS = 4096


def best_match(
    a: Tensor, b: Tensor, *, normalize: bool = False, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    r"""For each row of a, the row of b with the largest product:

    .. math::
       \mathrm{index}_i = \operatorname{argmax}_j \, a_i \cdot b_j, \qquad
       \mathrm{score}_i = \max_j \, a_i \cdot b_j

    Ties go to the first row. The product matrix is never materialised. A NaN product counts as
    -inf; a row with only such products has index 0 and score -inf.

    Args:
        a: ``[B, Na, C]`` float16, bfloat16 or float32 (float64 on the reference), any strides with
            a contiguous last dimension (``metric[:, ::2]``), C up to 4096.
        b: ``[B, Nb, C]`` in the dtype of a.
        normalize: divide the product by the Euclidean norms of the rows, in float32: every product
            of a row with norm 0 is 0, every product of a row with a norm that is not finite is NaN.
        backend: "cpu", "cuda", "triton", "reference" or None (see :func:`tokenmill.explain`).

    Returns:
        (index, score): int32 ``[B, Na]``, and float32 ``[B, Na]`` (float64 on the reference). With
        Nb = 0 they are -1 and -inf. Not differentiable. Sums are float32; where the two greatest
        products of a row differ by no more than the rounding of their sums, backends may differ. On
        a GPU a float32 product with an infinite factor is NaN, because it is computed as the sum of
        three products.

    Raises:
        RuntimeError: naming argument, rule and value.

    Complexity: 2 Na Nb C operations for each sequence; reads a once and, on a CPU, b once per few
    hundred rows of a. Extra memory does not depend on Na Nb.

    Paper: ToMe (Bolya et al. 2023), section 3.

    Example:
        >>> import torch, tokenmill as tm
        >>> metric = torch.randn(2, 197, 64)
        >>> index, score = tm.best_match(metric[:, ::2], metric[:, 1::2], normalize=True)
        >>> index.shape, bool((score.abs() <= 1.00001).all())
        (torch.Size([2, 99]), True)
    """
    index, score = call(SPEC, (a, b), {"normalize": normalize}, backend)
    return index, score


def _fake(record: Any) -> tuple[Tensor, Tensor]:
    a = record.a
    shape = a.shape[:2]
    return a.new_empty(shape, dtype=torch.int32), a.new_empty(shape, dtype=torch.float32)


def _plain(record: Any) -> tuple[Tensor, Tensor]:
    a, b = record.a, record.b
    if record.normalize:
        a, b = F.normalize(a, dim=-1), F.normalize(b, dim=-1)
    return reference.best_products(a @ b.transpose(1, 2))


def _flops(record: Any) -> float:
    return 2.0 * record.a.numel() * record.b.shape[1]


FORWARD = register(
    TorchOp(
        OP,
        autocast=Autocast(promote=("a", "b")),
        fake=_fake,
        triton="tokens.best_match:best_match",
    )
)
SPEC = register_op(
    OpSpec(
        function=best_match,
        reference=reference.best_match,
        plain=_plain,
        forward=FORWARD,
        sharding=Sharding({"a": "br.", "b": "b.."}, ("br", "br")),
        paper="ToMe (Bolya et al. 2023)",
        flops=_flops,
    )
)  # fmt: skip
