"""Rules on arguments that a call writes. csrc/core/written.h has the same rules in the same order
and words.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._check import fail

SEARCHED = 4096  # maximum number of stride multiples searched for a pair of tensors


def check_written(op: str, name: str, t: Tensor, read: dict[str, Tensor | None]) -> None:
    """A written argument must not be a lazy negative or conjugate, must have no overlapping
    elements, and must share no element with an input. Where there are no addresses (while tracing a
    graph), the kernel checks when it runs.
    """
    if torch.compiler.is_dynamo_compiling():  # Dynamo can trace none of this
        return
    if t.is_neg() or t.is_conj():
        fail(op, name, "must not be a negative or conjugate view", t)
    address = address_of(t)
    if not address:
        return
    if not _elements_apart(t):
        rule = "must have each element at an address of its own; strides"
        fail(op, name, rule, t.stride())
    for other, x in read.items():
        begin = None if x is None else address_of(x)
        if x is not None and begin and _share_memory(t, x, begin - address):
            fail(op, name, f"must not share memory with {other}; strides", t.stride())


def address_of(t: Tensor) -> int | None:
    """The address, 0 for a tensor without elements; None for one without its own memory: meta, fake
    or another subclass, or wrapped by a transform.
    """
    if (type(t) is not Tensor and type(t) is not torch.nn.Parameter) or t.is_meta:
        return None
    try:
        return t.data_ptr()
    except RuntimeError:
        return None


def _elements_apart(t: Tensor) -> bool:
    """Whether no two indices share an address. Conservative: a layout with interleaved dimensions,
    where no stride exceeds the extent of the smaller ones, counts as overlapping.
    """
    last = 0  # offset of the last element over the dimensions so far
    for stride, size in sorted(zip(t.stride(), t.shape, strict=True)):
        if size > 1 and stride <= last:
            return False
        last += (size - 1) * stride
    return True


def _share_memory(a: Tensor, b: Tensor, apart: int) -> bool:
    """Whether an element of a may overlap one of b, which begins `apart` bytes after a.

    For every cut, strides from the cut on are multiples of their greatest common divisor; the
    extents of smaller strides are compared modulo it. This proves disjoint the parts of one tensor
    cut along any dimension, such as interleaved keys and values. Remaining cases are searched, such
    as pages with a gap between them.
    """
    steps_a, steps_b = (
        [(s * t.itemsize, n - 1) for s, n in zip(t.stride(), t.shape, strict=True) if n > 1]
        for t in (a, b)
    )

    def separate(cut: float) -> bool:
        step = math.gcd(*(stride for stride, _ in (*steps_a, *steps_b) if stride >= cut))
        span_a, span_b = (
            t.itemsize + sum(stride * count for stride, count in steps if stride < cut)
            for t, steps in ((a, steps_a), (b, steps_b))
        )
        if step == 0:
            return apart >= span_a or -apart >= span_b
        begin = apart % step
        return begin >= span_a and begin + span_b <= step

    cuts = [math.inf, *(stride for stride, _ in (*steps_a, *steps_b) if stride > 0)]
    if any(separate(cut) for cut in cuts):
        return False
    strides = sorted({s for s, _ in (*steps_a, *steps_b) if s}, reverse=True)
    dims = [
        (s, -sum(n for t, n in steps_a if t == s), sum(n for t, n in steps_b if t == s))
        for s in strides
    ]
    return _meets(dims, apart, 1 - b.itemsize, a.itemsize - 1, [SEARCHED])


def _meets(dims: list[tuple[int, int, int]], at: int, low: int, high: int, left: list[int]) -> bool:
    """Whether `at` plus a multiple of each stride lies in low .. high, or whether deciding it takes
    more than left[0] steps. dims: (stride, minimum multiple, maximum), in order of decreasing
    stride.
    """
    if not dims:
        return low <= at <= high
    (stride, minimum, maximum), *others = dims
    behind = sum(s * n for s, n, _ in others), sum(s * n for s, _, n in others)
    first = max(minimum, -((at + behind[1] - low) // stride))
    last = min(maximum, (high - at - behind[0]) // stride)
    for n in range(first, last + 1):
        left[0] -= 1
        if left[0] < 0 or _meets(others, at + n * stride, low, high, left):
            return True
    return False
