"""block_pool_keys: one pooled key, or a box of bounds, per block of a cache."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

from .._call.attach import register
from .._call.operator import TorchOp
from .._call.run import call
from .._check import (
    check_text,
)
from ..reference.select import block_pool_keys as reference
from ..registry import OpSpec, Sharding, register_op
from .rules import (
    batch_of,
    check_block_table_values,
    rows_of_request,
)

OP = "block_pool_keys"
UPDATE = "block_pool_keys_update"


def block_pool_keys(
    k: Tensor,
    block: int,
    *,
    mode: str = "mean",
    lengths: Tensor | None = None,
    block_table: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""One pooled key, or a box (minimum and maximum), per block of `block` tokens.

    "mean" is summed in float32 and rounded once; maxima and minima are elements of the keys, so
    that the box of "minmax" holds every key exactly, in any dtype. A partial last block pools its
    own tokens. A block without tokens has mean 0, maximum -inf and minimum +inf. A NaN only affects
    its channel of its own block.

    Args:
        k: ``[B, S, Hk, D]`` float16, bfloat16 or float32 (float64 on the reference), any strides
            with a contiguous last dimension; with block_table ``[pages, page_size, Hk, D]``.
        block: tokens of a block.
        mode: "mean", "max", or "minmax" (the bounds of Quest).
        lengths: ``[B]`` int32, number of tokens of each request; clamped to the tokens in the
            cache, negative = none. None: all.
        block_table: ``[B, P]`` int32, the pages of each request; then S = P * page_size. Entries
            beyond the length may be anything.
        backend: "cpu", "cuda", "triton", "reference" or None (see :func:`tokenmill.explain`).

    Returns:
        ``[B, ceil(S / block), Hk, D]`` in the dtype of k, with "minmax" ``[B, ceil(S / block), Hk,
        2, D]``, minima first. Not differentiable.

    Raises:
        RuntimeError: naming argument, rule and value. On a GPU tokens of pages that do not exist
            are skipped.

    Complexity: reads each key once.

    Paper: Quest (Tang et al. 2024), section 3.3; block means as in MInference (Jiang et al. 2024)
    and BiFormer (Zhu et al. 2023).

    Example:
        >>> import torch, tokenmill as tm
        >>> k = torch.arange(5.0).view(1, 5, 1, 1)
        >>> tm.block_pool_keys(k, 2).flatten().tolist()
        [0.5, 2.5, 4.0]
        >>> tm.block_pool_keys(k, 2, mode="minmax").view(3, 2).tolist()
        [[0.0, 1.0], [2.0, 3.0], [4.0, 4.0]]
    """
    check_text(OP, "mode", mode)
    given = {"pooling": mode, "lengths": lengths, "block_table": block_table}
    return call(SPEC, (k, block), given, backend)[0]


def block_pool_keys_update(
    k: Tensor,
    pooled: Tensor,
    block: int,
    *,
    start: Tensor,
    mode: str = "mean",
    lengths: Tensor | None = None,
    block_table: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Recomputes, in place, the pooled blocks that hold tokens start to length - 1 of each
    request.

    For a cache to which tokens were appended: the result equals :func:`block_pool_keys` on the
    whole cache, and only the blocks that the new tokens touch are read and written. After tokens
    were removed, start = length - 1 corrects the last block. Other blocks are unchanged, also
    blocks beyond the length.

    Args:
        k: as in :func:`block_pool_keys`.
        pooled: its result, any non-overlapping strides with a contiguous last dimension, sharing no
            memory with another argument; updated in place.
        block, mode, lengths, block_table: as in :func:`block_pool_keys`.
        start: ``[B]`` int32, the first new token; a value at or beyond the length changes nothing,
            negative = 0.
        backend: "cpu", "cuda", "triton", "reference" or None (see :func:`tokenmill.explain`).

    Returns:
        pooled. There is no gradient: inputs that require one are refused unless under no_grad.

    Raises:
        RuntimeError: naming argument, rule and value, before anything is written. On a GPU tokens
            of pages that do not exist are skipped.

    Complexity: reads the new tokens and at most block - 1 others of each request.

    Paper: Quest (Tang et al. 2024), section 3.3.

    Example:
        >>> import torch, tokenmill as tm
        >>> k = torch.randn(1, 40, 2, 8)
        >>> start, length = torch.tensor([[30], [33]], dtype=torch.int32)
        >>> pooled = tm.block_pool_keys(k, 16, lengths=start)
        >>> _ = tm.block_pool_keys_update(k, pooled, 16, start=start, lengths=length)
        >>> torch.equal(pooled, tm.block_pool_keys(k, 16, lengths=length))
        True
    """
    check_text(UPDATE, "mode", mode)
    given = {"start": start, "pooling": mode, "lengths": lengths, "block_table": block_table}
    call(UPDATE_SPEC, (k, pooled, block), given, backend)
    return pooled


def lower(k: Tensor, block: int, *, mode: str = "mean", **given: Any) -> tuple[Any, ...]:
    check_text(OP, "mode", mode)
    return FORWARD.lower(k, block, **{"pooling": mode, **given})


def lower_update(
    k: Tensor, pooled: Tensor, block: int, *, mode: str = "mean", **given: Any
) -> tuple[Any, ...]:
    check_text(UPDATE, "mode", mode)
    return UPDATE_FORWARD.lower(k, pooled, block, **{"pooling": mode, **given})


def _fake(a: Any) -> Tensor:
    blocks = (rows_of_request(a.k, a.block_table) + a.block - 1) // a.block
    half = [2] if a.pooling == "minmax" else []
    batch = batch_of(a.k, a.block_table)
    return a.k.new_empty([batch, blocks, a.k.shape[2], *half, a.k.shape[3]])


def _check_values(op: str, a: Any) -> None:
    check_block_table_values(op, a.block_table, a.k, a.lengths)


FORWARD = register(
    TorchOp(
        OP,
        fake=_fake,
        check_values=functools.partial(_check_values, OP),
        triton="select.block_pool_keys:block_pool_keys",
    )
)
SPEC = register_op(
    OpSpec(
        function=block_pool_keys,
        lower=lower,
        sugar=frozenset({"mode"}),
        reference=reference.block_pool_keys,
        forward=FORWARD,
        sharding=Sharding(
            {"k": "b.hc", "k@block_table": "..hc~b", "lengths": "b", "block_table": "b."},
            ("b.hc b.h.c",),
        ),
        paper="Quest (Tang et al. 2024)",
        flops=lambda a: 1.0 * a.k.numel(),
    )
)

UPDATE_FORWARD = register(
    TorchOp(
        UPDATE,
        fake=lambda a: None,
        check_values=functools.partial(_check_values, UPDATE),
        triton="select.block_pool_keys:block_pool_keys_update",
    )
)
UPDATE_SPEC = register_op(
    OpSpec(
        function=block_pool_keys_update,
        lower=lower_update,
        sugar=frozenset({"mode"}),
        reference=reference.block_pool_keys_update,
        forward=UPDATE_FORWARD,
        sharding=Sharding(
            {
                "k": "b.hc",
                "k@block_table": "..hc~b",
                "pooled": "b.hc b.h.c",
                "start lengths": "b",
                "block_table": "b.",
            },
            (),
        ),
        paper="Quest (Tang et al. 2024)",
        flops=lambda a: 1.0 * a.k.shape[0] * a.block * a.k.shape[2] * a.k.shape[3],
    )
)
