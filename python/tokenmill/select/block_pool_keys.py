"""block_pool_keys: one pooled key, or a box of bounds, for each block of a cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..check import (
    as_int,
    check,
    check_device_of,
    check_dtype,
    check_last_contiguous,
    check_tensor,
    check_text,
    fail,
    show,
)
from ..dispatch import call
from ..library import TorchOp, register
from ..reference.select import block_pool_keys as reference
from ..reference.select import block_pool_keys_update as update_reference
from ..registry import Malformed, OpSpec, Sample, register_op
from ..written import check_written
from .rules import (
    batch_of,
    check_block_table,
    check_block_table_values,
    check_per_request,
    rows_of_request,
)

OP = "block_pool_keys"
UPDATE = "block_pool_keys_update"
MODES = ("mean", "max", "minmax")


def block_pool_keys(
    k: Tensor,
    block: int,
    *,
    mode: str = "mean",
    lengths: Tensor | None = None,
    block_table: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""One pooled key, or a box (minimum and maximum), for each block of `block` tokens.

    "mean" is summed in float32 and rounded once; maxima and minima are elements of the keys, so
    that the box of "minmax" holds every key exactly, in any dtype. The last block pools the tokens
    that it has. A block without tokens has mean 0, maximum -inf and minimum +inf. A NaN makes its
    column of its own block NaN, and no other.

    Args:
        k: ``[B, S, Hk, D]`` float16, bfloat16 or float32 (float64 on the reference), any strides
            with a contiguous last dimension; with block_table ``[pages, page_size, Hk, D]``.
        block: tokens of a block.
        mode: "mean", "max", or "minmax" (the bounds of Quest).
        lengths: ``[B]`` int32, tokens of each request; clamped to those in the cache, negative =
            none. None: all.
        block_table: ``[B, P]`` int32, the pages of each request; then S = P * page_size. Entries
            beyond the length may be anything.
        backend: "cpu", "cuda", "triton", "reference" or None (see :func:`tokenmill.explain`).

    Returns:
        ``[B, ceil(S / block), Hk, D]`` in the dtype of k, with "minmax" ``[B, ceil(S / block), Hk,
        2, D]``, minima first. Not differentiable.

    Raises:
        RuntimeError: naming argument, rule and value. On a GPU tokens of pages that are not there
            are left out.

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
    lowered = lower(k, block, mode=mode, lengths=lengths, block_table=block_table)
    return call(SPEC, lowered, backend)[0]


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
    r"""Pools again, in place, the blocks that hold tokens start to length - 1 of each request.

    For a cache to which tokens were appended: the result is that of :func:`block_pool_keys` on the
    whole cache, and only the blocks that the new tokens touch are read and written. After tokens
    were taken back, start = length - 1 corrects the last block. Other blocks stay as they are, also
    those beyond the length.

    Args:
        k: as in :func:`block_pool_keys`.
        pooled: its result, any strides with a contiguous last dimension, each element at an address
            of its own and none in another argument; updated in place.
        block, mode, lengths, block_table: as in :func:`block_pool_keys`.
        start: ``[B]`` int32, the first token that is new; from the length on nothing changes,
            negative = 0.
        backend: "cpu", "cuda", "triton", "reference" or None (see :func:`tokenmill.explain`).

    Returns:
        pooled. There is no gradient: inputs that require one are refused unless under no_grad.

    Raises:
        RuntimeError: naming argument, rule and value, before anything is written. On a GPU tokens
            of pages that are not there are left out.

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
    lowered = lower_update(
        k, pooled, block, start=start, mode=mode, lengths=lengths, block_table=block_table
    )
    call(UPDATE_SPEC, lowered, backend)
    return pooled


def lower(
    k: Tensor,
    block: int,
    *,
    mode: str = "mean",
    lengths: Tensor | None = None,
    block_table: Tensor | None = None,
) -> tuple[Any, ...]:
    return k, _check_types(OP, k, block, mode, lengths, block_table), mode, lengths, block_table


def lower_update(
    k: Tensor,
    pooled: Tensor,
    block: int,
    *,
    start: Tensor,
    mode: str = "mean",
    lengths: Tensor | None = None,
    block_table: Tensor | None = None,
) -> tuple[Any, ...]:
    block = _check_types(UPDATE, k, block, mode, lengths, block_table)
    check_tensor(UPDATE, "pooled", pooled)
    check_tensor(UPDATE, "start", start)
    return (k, pooled, block, mode, start, lengths, block_table)


def _check_types(op: str, k: Any, block: Any, mode: Any, lengths: Any, block_table: Any) -> int:
    """block as an int."""
    check_tensor(op, "k", k)
    check_tensor(op, "lengths", lengths, optional=True)
    check_tensor(op, "block_table", block_table, optional=True)
    check_text(op, "mode", mode)
    return as_int(op, "block", block)


def _check(
    k: Tensor,
    block: int,
    mode: str,
    lengths: Tensor | None,
    block_table: Tensor | None,
    *,
    op: str = OP,
    float64: bool = False,
) -> None:
    rule = "must have 4 dimensions [B, S, H, D] or [pages, page_size, H, D]"
    check(k.dim() == 4, op, "k", rule, k.dim())
    check_dtype(op, "k", k, float64=float64)
    check_last_contiguous(op, "k", k)
    check(1 <= block < 2**31, op, "block", "must be 1 to 2^31 - 1", block)
    check(mode in MODES, op, "mode", "must be 'mean', 'max' or 'minmax'", mode)
    check_block_table(op, block_table, k)
    check_per_request(op, "lengths", lengths, batch_of(k, block_table), "k", k)


def _check_update(
    k: Tensor,
    pooled: Tensor,
    block: int,
    mode: str,
    start: Tensor,
    lengths: Tensor | None,
    block_table: Tensor | None,
    *,
    float64: bool = False,
) -> None:
    _check(k, block, mode, lengths, block_table, op=UPDATE, float64=float64)
    check_per_request(UPDATE, "start", start, batch_of(k, block_table), "k", k)
    wanted = _pooled_sizes(k, block, mode, block_table)
    rule = f"must have shape {show(wanted)}"
    check(list(pooled.shape) == wanted, UPDATE, "pooled", rule, pooled.shape)
    if pooled.dtype != k.dtype:
        fail(UPDATE, "pooled", f"must have the dtype of k, {show(k.dtype)}", pooled.dtype)
    check_last_contiguous(UPDATE, "pooled", pooled)
    check_device_of(UPDATE, "pooled", pooled, "k", k)
    read = {"k": k, "start": start, "lengths": lengths, "block_table": block_table}
    check_written(UPDATE, "pooled", pooled, read)


def _pooled_sizes(k: Tensor, block: int, mode: str, block_table: Tensor | None) -> list[int]:
    blocks = (rows_of_request(k, block_table) + block - 1) // block
    half = [2] if mode == "minmax" else []
    return [batch_of(k, block_table), blocks, k.shape[2], *half, k.shape[3]]


def _check_values(
    k: Tensor, block: int, mode: str, lengths: Tensor | None, block_table: Tensor | None
) -> None:
    check_block_table_values(OP, block_table, k, lengths)


def _check_update_values(
    k: Tensor,
    pooled: Tensor,
    block: int,
    mode: str,
    start: Tensor,
    lengths: Tensor | None,
    block_table: Tensor | None,
) -> None:
    check_block_table_values(UPDATE, block_table, k, lengths)


def _fake(
    k: Tensor, block: int, mode: str, lengths: Tensor | None, block_table: Tensor | None
) -> Tensor:
    return k.new_empty(_pooled_sizes(k, block, mode, block_table))


def _ints(*values: int) -> Any:
    return lambda g: torch.tensor(values, dtype=torch.int32)


def _table(*rows: list[int]) -> Any:
    return lambda g: torch.tensor(rows, dtype=torch.int32)


def _infinite(k: Tensor) -> Tensor:
    k[1, 7, 1, 2] = float("inf")
    k[1, 8, 0, 3] = -float("inf")
    return k


def _sample(shape: tuple[int, ...], block: int, change: Any = None, **options: Any) -> Any:
    def make(dtype: torch.dtype, g: torch.Generator) -> tuple[tuple[Any, ...], dict[str, Any]]:
        k = torch.randn(shape, generator=g)
        if change:
            k = change(k)
        given = {n: v(g) if callable(v) else v for n, v in options.items()}
        return (k.to(dtype), block), given

    return make


def _update_sample(shape: tuple[int, ...], block: int, **options: Any) -> Any:
    draw = _sample(shape, block, **options)

    def make(dtype: torch.dtype, g: torch.Generator) -> tuple[tuple[Any, ...], dict[str, Any]]:
        (k, _), given = draw(dtype, g)
        mode, table = given.get("mode", "mean"), given.get("block_table")
        pooled = torch.randn(_pooled_sizes(k, block, mode, table), generator=g)
        return (k, pooled.to(dtype), block), given

    return make


_PAGES = _table([4, 1, -1], [0, 3, 2])
_MALFORMED = (
    Malformed(
        "rank",
        "k: must have 4 dimensions [B, S, H, D] or [pages, page_size, H, D]; got 3",
        lambda a, k: a.__setitem__(0, a[0][0]),
    ),
    Malformed(
        "dtype",
        "k: must be float16, bfloat16 or float32; got int32",
        lambda a, k: a.__setitem__(0, a[0].int()),
    ),
    Malformed(
        "layout",
        "k: must have a contiguous last dimension",
        lambda a, k: a.__setitem__(0, a[0].transpose(1, 3)),
    ),
    Malformed("block", "block: must be 1 to 2^31 - 1; got 0", lambda a, k: a.__setitem__(-1, 0)),
    Malformed(
        "mode",
        "mode: must be 'mean', 'max' or 'minmax'; got 'sum'",
        lambda a, k: k.update(mode="sum"),
    ),
    Malformed(
        "lengths",
        "lengths: must have shape [2]; got [3]",
        lambda a, k: k.update(lengths=torch.zeros(3, dtype=torch.int32)),
    ),
    Malformed(
        "rank of the table",
        "block_table: must have 2 dimensions [B, P]; got 1",
        lambda a, k: k.update(block_table=torch.zeros(3, dtype=torch.int32)),
    ),
    Malformed(
        "dtype of the table",
        "block_table: must be int32; got int64",
        lambda a, k: k.update(block_table=torch.zeros(2, 3, dtype=torch.int64)),
    ),
)
_MISSING_PAGE = Malformed(
    "missing page",
    "block_table: must hold pages below 2 up to the length; got 2",
    lambda a, k: k.update(
        block_table=torch.tensor([[0], [2]], dtype=torch.int32), lengths=None
    ),
    values=True,
)  # fmt: skip

FORWARD = register(
    TorchOp(
        OP,
        check=_check,
        fake=_fake,
        check_values=_check_values,
        triton="select.block_pool_keys:block_pool_keys",
    )
)
SPEC = register_op(
    OpSpec(
        name=OP,
        family="select",
        function=block_pool_keys,
        lower=lower,
        reference=reference.block_pool_keys,
        plain=reference.block_pool_keys,
        forward=FORWARD,
        backward=None,
        samples=(
            Sample("mean", _sample((2, 50, 2, 16), 16)),
            Sample("lengths", _sample((4, 40, 2, 24), 8, lengths=_ints(33, 0, -2, 99))),
            Sample("minmax", _sample((2, 35, 3, 64), 16, mode="minmax")),
            Sample("max", _sample((2, 20, 1, 130), 7, mode="max", lengths=_ints(20, 9))),
            Sample("infinite", _sample((2, 12, 2, 8), 4, _infinite, mode="minmax")),
            Sample(
                "paged",
                _sample((5, 8, 2, 16), 6, mode="minmax", lengths=_ints(11, 24), block_table=_PAGES),
            ),
            Sample("pages of one token", _sample((9, 1, 2, 16), 2, block_table=_table([8, 0, 3]))),
            Sample("one block", _sample((1, 9, 2, 5), 100, mode="minmax")),
            Sample("no tokens", _sample((2, 0, 2, 8), 4)),
            Sample("no requests", _sample((0, 9, 2, 8), 4, mode="max")),
        ),
        malformed=(*_MALFORMED, _MISSING_PAGE),
        differentiable=(),
        paper="Quest (Tang et al. 2024)",
        flops=lambda k, *rest: 1.0 * k.numel(),
    )
)

UPDATE_FORWARD = register(
    TorchOp(
        UPDATE,
        check=_check_update,
        fake=lambda *args: None,
        check_values=_check_update_values,
        triton="select.block_pool_keys:block_pool_keys_update",
    )
)
UPDATE_SPEC = register_op(
    OpSpec(
        name=UPDATE,
        family="select",
        function=block_pool_keys_update,
        lower=lower_update,
        reference=update_reference.block_pool_keys_update,
        plain=update_reference.block_pool_keys_update,
        forward=UPDATE_FORWARD,
        backward=None,
        samples=(
            Sample("append", _update_sample((2, 50, 2, 16), 16, start=_ints(30, 47))),
            Sample(
                "some requests",
                _update_sample(
                    (4, 40, 2, 24),
                    8,
                    mode="max",
                    start=_ints(15, 9, -3, 40),
                    lengths=_ints(16, 9, 3, 99),
                ),
            ),
            Sample(
                "many blocks",
                _update_sample((2, 70, 1, 64), 3, mode="minmax", start=_ints(2, 33)),
            ),
            Sample(
                "paged",
                _update_sample(
                    (5, 8, 2, 16),
                    6,
                    mode="minmax",
                    start=_ints(10, 3),
                    lengths=_ints(11, 24),
                    block_table=_PAGES,
                ),
            ),
            Sample("no tokens", _update_sample((2, 0, 2, 8), 4, start=_ints(0, 0))),
        ),
        malformed=(
            *_MALFORMED,
            Malformed(
                "start",
                "start: must have shape [2]; got [1]",
                lambda a, k: k.update(start=torch.zeros(1, dtype=torch.int32)),
            ),
            Malformed(
                "shape of pooled",
                "pooled: must have shape [2, 4, 2, 16]; got [2, 4, 2, 15]",
                lambda a, k: a.__setitem__(1, a[1][..., 1:]),
            ),
            Malformed(
                "dtype of pooled",
                "pooled: must have the dtype of k, float32; got float16",
                lambda a, k: a.__setitem__(1, a[1].half()),
            ),
            Malformed(
                "expanded pooled",
                "pooled: must have each element at an address of its own; strides; got [128, 0, ",
                lambda a, k: a.__setitem__(1, a[1][:, :1].expand(-1, 4, -1, -1)),
            ),
            Malformed(
                "pooled over k",
                "pooled: must not share memory with k; strides; got [1600, 32, 16, 1]",
                lambda a, k: a.__setitem__(1, a[0][:, :4]),
            ),
        ),
        differentiable=(),
        paper="Quest (Tang et al. 2024)",
        flops=lambda k, pooled, block, *rest: 1.0 * k.shape[0] * block * k.shape[2] * k.shape[3],
    )
)
