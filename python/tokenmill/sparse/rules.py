"""Checks shared by operators on lists of blocks. csrc/sparse/checks.h has them in the same
words.
"""

from __future__ import annotations

from torch import Tensor

from .._check import check, check_device_of, check_last_contiguous, fail, is_power_of_two, show
from .._kv_cache import check_int32

MAX_BLOCK = 128


def check_block(op: str, name: str, value: int) -> None:
    ok = is_power_of_two(value) and value <= MAX_BLOCK
    check(ok, op, name, f"must be a power of two up to {MAX_BLOCK}", value)


def check_list(
    op: str,
    indices: Tensor,
    counts: Tensor,
    shape: str,
    fits: bool,
    other: str,
    first: Tensor,
) -> None:
    """indices [B, heads, rows, K] or, packed, [heads, rows, K]; fits: whether their shapes are
    right.
    """
    check(fits, op, "indices", f"must have shape {shape}", indices.shape)
    if counts.shape != indices.shape[:-1]:
        fail(op, "counts", f"must have shape {show(indices.shape[:-1])}", counts.shape)
    for name, t in (("indices", indices), ("counts", counts)):
        check_int32(op, name, t)
        check_last_contiguous(op, name, t)
        check_device_of(op, name, t, other, first)
    entries = indices.shape[-2] * indices.shape[-1]
    check(entries < 2**31, op, "indices", "must have fewer than 2^31 entries for a head", entries)
