"""transpose_block_list: lists of key blocks for each block of queries, seen from the keys."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..check import as_int, check, check_tensor
from ..dispatch import call
from ..edits import set_argument
from ..library import TorchOp, register
from ..reference.sparse import transpose_block_list as reference
from ..registry import Malformed, OpSpec, Sample, register_op
from .block_sparse_attention_cases import draw_lists, hostile_lists
from .rules import check_list

OP = "transpose_block_list"


def transpose_block_list(
    indices: Tensor, counts: Tensor, num_blocks: int, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Which blocks of queries list a block of keys: the lists of
    :func:`block_sparse_attention` from the side of the keys, as its gradient reads them.

    Args:
        indices: int32 ``[B, heads, rows, K]``, for each row (a block of queries) an ascending list
            of blocks of keys. An id counts if it is 0 to num_blocks - 1 and greater than every id
            before it.
        counts: int32 ``[B, heads, rows]``, entries of each list, clamped to 0 to K.
        num_blocks: blocks of keys, 0 to 2^30.
        backend: "cpu", "cuda", "triton", "reference" or None (see :func:`tokenmill.explain`).

    Returns:
        (offsets, rows): int32 ``[B, heads, num_blocks + 1]`` and ``[B, heads, rows * K]``. Block j
        is in the lists of ``rows[b, h, offsets[b, h, j] : offsets[b, h, j + 1]]``, which ascend;
        -1 after the last. Not differentiable, and the same on every run.

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
    offsets, rows = call(SPEC, lower(indices, counts, num_blocks), backend)
    return offsets, rows


def lower(indices: Tensor, counts: Tensor, num_blocks: int) -> tuple[Any, ...]:
    for name, t in (("indices", indices), ("counts", counts)):
        check_tensor(OP, name, t)
    num_blocks = as_int(OP, "num_blocks", num_blocks)
    return indices, counts, num_blocks


# csrc/sparse/transpose_block_list/host.cpp has the same rules in the same order and words.
def _check(indices: Tensor, counts: Tensor, num_blocks: int, *, float64: bool = False) -> None:
    fits = indices.dim() == 4
    check_list(OP, indices, counts, "[B, heads, rows, K]", fits, "indices", indices)
    check(0 <= num_blocks <= 2**30, OP, "num_blocks", "must be 0 to 2^30", num_blocks)


def _fake(indices: Tensor, counts: Tensor, num_blocks: int) -> tuple[Tensor, Tensor]:
    batch, heads, rows, entries = indices.shape
    return (
        indices.new_empty((batch, heads, num_blocks + 1)),
        indices.new_empty((batch, heads, rows * entries)),
    )


def _sample(
    batch: int, heads: int, rows: int, entries: int, blocks: int, hostile: Any = None
) -> Any:
    def make(dtype: torch.dtype, g: torch.Generator) -> tuple[tuple[Any, ...], dict[str, Any]]:
        indices, counts = draw_lists(batch, heads, rows, entries, blocks, g)
        if hostile:
            indices, counts = hostile(indices, counts, blocks, g)
        return (indices, counts, blocks), {}

    return make


FORWARD = register(
    TorchOp(OP, check=_check, fake=_fake, triton="sparse.transpose_block_list:transpose_block_list")
)
SPEC = register_op(
    OpSpec(
        name=OP,
        family="sparse",
        function=transpose_block_list,
        lower=lower,
        reference=reference.transpose_block_list,
        plain=reference.transpose_block_list,  # exact
        forward=FORWARD,
        backward=None,
        samples=(
            Sample("lists", _sample(2, 3, 9, 5, 12)),
            Sample("long rows", _sample(1, 2, 70, 33, 40)),
            Sample("more blocks than entries", _sample(1, 1, 4, 3, 1000)),
            Sample("not to be trusted", _sample(2, 2, 11, 8, 20, hostile_lists)),
            Sample("one block", _sample(1, 1, 300, 1, 1)),
            Sample("no entries", _sample(1, 2, 4, 0, 5)),
            Sample("no rows", _sample(2, 1, 0, 3, 5)),
            Sample("no blocks", _sample(1, 1, 3, 2, 0)),
            Sample("no heads", _sample(0, 1, 3, 2, 4)),
        ),
        # Edits of the first sample.
        malformed=(
            Malformed(
                "rank",
                "indices: must have shape [B, heads, rows, K]; got [3, 9, 5]",
                set_argument(0, lambda t: t[0]),
            ),
            Malformed(
                "shape of counts",
                "counts: must have shape [2, 3, 9]; got [2, 3, 8]",
                set_argument(1, lambda t: t[:, :, :8]),
            ),
            Malformed(
                "dtype", "indices: must be int32; got int64", set_argument(0, torch.Tensor.long)
            ),
            Malformed(
                "layout",
                "indices: must have a contiguous last dimension",
                set_argument(0, lambda t: t.transpose(2, 3).contiguous().transpose(2, 3)),
            ),
            Malformed(
                "blocks", "num_blocks: must be 0 to 2^30; got -1", set_argument(2, lambda n: -1)
            ),
        ),
        differentiable=(),
        paper="counting sort (Gustavson 1978)",
        flops=lambda *lowered: 0.0,
    )
)
