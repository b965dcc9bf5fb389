"""transpose_block_list: transposes lists of key blocks per query block."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .._call.attach import register
from .._call.operator import TorchOp
from .._call.run import call
from ..reference.sparse import transpose_block_list as reference
from ..registry import OpSpec, Sharding, register_op

OP = "transpose_block_list"


def transpose_block_list(
    indices: Tensor, counts: Tensor, num_blocks: int, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """For each block of keys, the blocks of queries that list it: the lists of
    :func:`block_sparse_attention` transposed, as its backward reads them.

    Args:
        indices: int32 ``[B, heads, rows, K]``, for each row (a block of queries) an ascending list
            of blocks of keys. An id counts if it is 0 to num_blocks - 1 and greater than every id
            before it.
        counts: int32 ``[B, heads, rows]``, number of entries of each list, clamped to 0 to K.
        num_blocks: number of key blocks, 0 to 2^30.
        backend: "cpu", "cuda", "triton", "reference" or None (see :func:`tokenmill.explain`).

    Returns:
        (offsets, rows): int32 ``[B, heads, num_blocks + 1]`` and ``[B, heads, rows * K]``. Block j
        is in the lists of ``rows[b, h, offsets[b, h, j] : offsets[b, h, j + 1]]``, which ascend;
        -1 after the last. Not differentiable; deterministic.

    Raises:
        RuntimeError: naming argument, rule and value.

    Complexity: linear in the entries and the blocks.

    Paper: the counting sort of a sparse matrix from rows to columns (Gustavson 1978, section 3).

    Example:
        >>> import torch, tokenmill as tm
        >>> indices = torch.tensor([[[[0, 2], [2, -1]]]], dtype=torch.int32)
        >>> counts = torch.tensor([[[2, 1]]], dtype=torch.int32)
        >>> offsets, rows = tm.transpose_block_list(indices, counts, 3)
        >>> offsets.tolist(), rows.tolist()
        ([[[0, 1, 1, 3]]], [[[0, 0, 1, -1]]])
    """
    offsets, rows = call(SPEC, (indices, counts, num_blocks), {}, backend)
    return offsets, rows


def _fake(a: Any) -> tuple[Tensor, Tensor]:
    batch, heads, rows, entries = a.indices.shape
    return (
        a.indices.new_empty((batch, heads, a.num_blocks + 1)),
        a.indices.new_empty((batch, heads, rows * entries)),
    )


FORWARD = register(
    TorchOp(OP, fake=_fake, triton="sparse.transpose_block_list:transpose_block_list")
)
SPEC = register_op(
    OpSpec(
        function=transpose_block_list,
        reference=reference.transpose_block_list,
        forward=FORWARD,
        sharding=Sharding({"indices": "bh..", "counts": "bh."}, ("bh.", "bh.")),
        paper="counting sort (Gustavson 1978)",
        flops=lambda a: 0.0,
    )
)
