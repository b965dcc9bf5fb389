"""Masks for :func:`tokenmill.attention` and :func:`tokenmill.attention_decode` other than diagonal
bands, without materialising pairs: prefixes, segments and ranges of keys.

A call takes one mask, or a tuple of at most one of each class; together with causal and window, a
pair is visible if all allow it. Fully masked tiles are skipped.

    >>> import torch, tokenmill as tm
    >>> q = k = v = torch.randn(1, 6, 2, 16)
    >>> documents = torch.tensor([[0, 0, 0, 1, 1, 1]], dtype=torch.int32)
    >>> tm.attention(q, k, v, causal=True, mask=tm.masks.segments(documents)).shape
    torch.Size([1, 6, 2, 16])
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from ._check import as_int, check, check_device_of_q, check_tensor, check_text, fail, show

Rule = Literal["equal", "not_after"]
Distance = Literal["chebyshev", "manhattan"]
MAX_RANGES = 4
INT32_MIN, INT32_MAX = -(2**31), 2**31 - 1


class Prefix(NamedTuple):
    """See :func:`prefix`."""

    lengths: Tensor


class Segments(NamedTuple):
    """See :func:`segments`."""

    q_ids: Tensor
    k_ids: Tensor
    rule: Rule
    shared: int | None


class Ranges(NamedTuple):
    """See :func:`ranges`."""

    begin: Tensor
    end: Tensor


class Grid(NamedTuple):
    """See :func:`grid`."""

    width: int
    distance: Distance
    window: int | None


class Decay2d(NamedTuple):
    """See :func:`decay2d`."""

    gamma: Tensor
    grid: Grid


Mask: TypeAlias = Prefix | Segments | Ranges
MASKS = (Prefix, Segments, Ranges)  # torch 2.10 does not trace isinstance with the union
Masks: TypeAlias = Mask | tuple[Mask, ...] | None


def prefix(lengths: Tensor) -> Prefix:
    """Causal after a prefix that all queries see: query i sees key j if j <= i + Sk - Sq or j <
    lengths[b].

    Replaces causal, which must not be given too; a window still applies.

    Args:
        lengths: int32 ``[B]``, in keys; for packed calls one per sequence.

    Raises:
        RuntimeError: naming argument, rule and value.

    Paper: prefix language model: Exploring the Limits of Transfer Learning (Raffel et al. 2020),
    section 3.2.1; images before text: Croc (Xie et al. 2024).

    Example:
        >>> import torch, tokenmill as tm
        >>> x = torch.randn(2, 5, 1, 16)
        >>> mask = tm.masks.prefix(torch.tensor([3, 0], dtype=torch.int32))
        >>> tm.attention(x, x, x, mask=mask).shape
        torch.Size([2, 5, 1, 16])
    """
    _check_int32("prefix", "lengths", lengths, 1)
    return Prefix(lengths)


def segments(
    q_ids: Tensor,
    k_ids: Tensor | None = None,
    *,
    rule: Rule = "equal",
    shared: int | None = None,
) -> Segments:
    """Queries see keys of their own segment (documents, subjects), or of no later segment.

    Args:
        q_ids: int32 ``[B, Sq]`` or ``[1, Sq]`` (packed ``[Tq]``), in any order. Sorted ids let
            whole tiles be skipped.
        k_ids: likewise for keys ``[B, Sk]`` (packed ``[Tk]``); None = q_ids. For a cache, ids of
            all positions that it has room for, in the order of the request's keys.
        rule: "equal": visible if q_ids == k_ids; "not_after": if q_ids >= k_ids.
        shared: an id whose keys all queries see, and whose queries see all keys.

    Raises:
        RuntimeError: naming argument, rule and value.

    Paper: isolation: Improving Multi-Subject Consistency with Isolation and Reposition Attention
    (2024); "not_after", which is causal by cells: Beyond Next-Token: Next-X Prediction (xAR, Ren et
    al. 2025).

    Example:
        >>> import torch, tokenmill as tm
        >>> x = torch.randn(1, 4, 1, 16)
        >>> ids = torch.tensor([[0, 1, 1, 2]], dtype=torch.int32)
        >>> tm.attention(x, x, x, mask=tm.masks.segments(ids, shared=0)).shape
        torch.Size([1, 4, 1, 16])
    """
    if k_ids is None:
        k_ids = q_ids
    op = "masks.segments"
    for name, ids in (("q_ids", q_ids), ("k_ids", k_ids)):
        _check_int32("segments", name, ids, 1, 2)
    check_text(op, "rule", rule)
    check(rule in ("equal", "not_after"), op, "rule", "must be 'equal' or 'not_after'", rule)
    if shared is not None:
        shared = as_int(op, "shared", shared, "must be an integer or None")
        check(INT32_MIN <= shared <= INT32_MAX, op, "shared", "must fit int32", shared)
    return Segments(q_ids, k_ids, rule, shared)


def ranges(begin: Tensor, end: Tensor) -> Ranges:
    """Each query sees up to four ranges of keys: key j if begin <= j < end for any of them.

    Args:
        begin, end: int32 ``[B | 1, H | 1, Sq, R]`` with R from 1 to 4 (packed
            ``[1, H | 1, Tq, R]``, positions within the sequence); H counts query heads. A range
            with begin >= end is empty; ranges may overlap and reach beyond the keys.

    Raises:
        RuntimeError: naming argument, rule and value.

    Example:
        >>> import torch, tokenmill as tm
        >>> x = torch.randn(1, 4, 1, 16)
        >>> begin = torch.tensor([0, 0, 2, 2], dtype=torch.int32).view(1, 1, 4, 1)
        >>> tm.attention(x, x, x, mask=tm.masks.ranges(begin, begin + 2)).shape
        torch.Size([1, 4, 1, 16])
    """
    for name, t in (("begin", begin), ("end", end)):
        _check_int32("ranges", name, t, 4)
    if end.shape != begin.shape:
        fail("masks.ranges", "end", f"must have the shape of begin, {show(begin.shape)}", end.shape)
    return Ranges(begin, end)


def grid(width: int, distance: Distance = "chebyshev", *, window: int | None = None) -> Grid:
    """Distances for alibi_slopes between cells of a grid: token i is the cell of row i // width and
    column i % width.

    Args:
        width: cells per row, at least 1.
        distance: "chebyshev": ``max(|dy|, |dx|)``; "manhattan": ``|dy| + |dx|``.
        window: pairs farther apart are masked; None = no limit.

    Raises:
        RuntimeError: naming argument, rule and value.

    Paper: ALiBi (Press et al. 2022) on the grid of RMT (Fan et al. 2024), where slope = -log gamma.

    Example:
        >>> import torch, tokenmill as tm
        >>> x = torch.randn(1, 12, 2, 16)
        >>> slopes = torch.tensor([0.5, 0.25])
        >>> tm.attention(x, x, x, alibi_slopes=slopes, alibi_grid=tm.masks.grid(4)).shape
        torch.Size([1, 12, 2, 16])
    """
    op = "masks.grid"
    width = as_int(op, "width", width)
    check(1 <= width <= INT32_MAX, op, "width", "must be a positive int32", width)
    check_text(op, "distance", distance)
    known = distance in ("chebyshev", "manhattan")
    check(known, op, "distance", "must be 'chebyshev' or 'manhattan'", distance)
    if window is not None:
        window = as_int(op, "window", window, "must be an integer or None")
        check(window >= 0, op, "window", "must not be negative", window)
    return Grid(width, distance, window)


def decay2d(
    gamma: Tensor, width: int, distance: Distance = "chebyshev", window: int | None = None
) -> Decay2d:
    """Decay of normalised weights with the distance on a grid: weights of head h are multiplied by
    gamma_h ^ distance, and rows no longer sum to 1.

    Args:
        gamma: ``[H]`` or ``[B, H]``, from 0 to 1; 0^0 = 1. It has a gradient.
        width, distance: as in :func:`grid`.
        window: the factor of pairs farther apart is 0; None = no limit.

    Raises:
        RuntimeError: naming argument, rule and value.

    Paper: Focus on the Whole Character (CACE, 2024), where gamma_h = 1 - 2^(-5 - h).

    Example:
        >>> import torch, tokenmill as tm
        >>> x = torch.randn(1, 8 * 32, 4, 16)
        >>> gamma = 1 - 2.0 ** -(5 + torch.arange(4))
        >>> tm.attention(x, x, x, post_decay=tm.masks.decay2d(gamma, width=32)).shape
        torch.Size([1, 256, 4, 16])
    """
    check_tensor("masks.decay2d", "gamma", gamma)
    rule = "must be a floating-point tensor"
    check(gamma.is_floating_point(), "masks.decay2d", "gamma", rule, gamma.dtype)
    return Decay2d(gamma, grid(width, distance, window=window))


def _check_int32(function: str, argument: str, t: Any, *ranks: int) -> None:
    op = f"masks.{function}"
    check_tensor(op, argument, t)
    check(t.dtype == torch.int32, op, argument, "must be int32", t.dtype)
    if t.dim() not in ranks:
        rule = f"must have {' or '.join(map(str, ranks))} dimensions"
        fail(op, argument, rule, t.dim())


class Lowered(NamedTuple):
    """A tuple of masks, lowered to the fields of the schema.

    ranges: int32 ``[B | 1, H | 1, Sq, R, 2]``, (begin, end) of the keys that a query sees;
    q_spans, k_spans: int32 ``[B | 1, Sq | Sk, 2]``, first and last id; a pair is visible if the
    spans of query and key meet.
    """

    ranges: Tensor | None
    q_spans: Tensor | None
    k_spans: Tensor | None


NO_MASK = Lowered(None, None, None)


def lower_mask(
    op: str,
    mask: Masks,
    q: Tensor,
    keys: int,
    *,
    causal: bool = False,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> Lowered:
    """keys: number of keys of a sequence; for packed calls, of all sequences."""
    if mask is None:
        return NO_MASK
    by_class = _by_class(op, mask, q)
    packed = cu_seqlens_q is not None or cu_seqlens_k is not None
    if not _fits(q, packed, cu_seqlens_q, cu_seqlens_k):
        return NO_MASK  # the rules report the error
    rows = q.shape[-3]
    spans = NO_MASK
    segments: Segments | None = by_class.get(Segments)
    if segments is not None:
        spans = _spans(op, segments, packed)
    ranges: Ranges | None = by_class.get(Ranges)
    bounds = None
    if ranges is not None:
        count = ranges.begin.shape[-1]
        if not 1 <= count <= MAX_RANGES:
            fail(op, "mask", f"ranges must be 1 to {MAX_RANGES} for a query", count)
        bounds = torch.stack((ranges.begin, ranges.end), -1)
    leading: Prefix | None = by_class.get(Prefix)
    if leading is not None:
        if causal:
            fail(op, "mask", "must not be a prefix where queries are causal", "prefix")
        end = _prefix_end(op, leading, rows, keys, q, cu_seqlens_q, cu_seqlens_k)
        if bounds is None:
            bounds = torch.stack((torch.zeros_like(end), end), -1)[:, None, :, None]
        elif end.shape[-1] == bounds.shape[2]:  # otherwise the rules report an error too
            begin, old = bounds.unbind(-1)
            new = old.minimum(end[:, None, :, None])
            bounds = torch.stack((begin.expand_as(new), new), -1)
    return Lowered(bounds, spans.q_spans, spans.k_spans)


def _fits(q: Tensor, packed: bool, cu_q: Tensor | None, cu_k: Tensor | None) -> bool:
    if not packed:
        return q.dim() == 4
    if cu_q is None or cu_k is None or cu_q.dim() != 1 or cu_k.shape != cu_q.shape:
        return False
    same = cu_q.device == cu_k.device == q.device
    return q.dim() == 3 and cu_q.numel() > 0 and same


def _by_class(op: str, mask: Any, q: Tensor) -> dict[type, Any]:
    masks = (mask,) if isinstance(mask, MASKS) else mask
    rule = "must be of tokenmill.masks, or a tuple of at most one of each class"
    if not isinstance(masks, tuple | list):
        fail(op, "mask", rule, mask)
    found: dict[type, Any] = {}
    for m in masks:
        if not isinstance(m, MASKS):
            fail(op, "mask", rule, m)
        if type(m) in found:
            fail(op, "mask", rule, f"two {type(m).__name__}")
        found[type(m)] = _checked(m)
        for name, t in zip(m._fields, m, strict=True):
            if isinstance(t, Tensor):
                check_device_of_q(op, name, t, q)
    return found


def _checked(mask: Mask) -> Mask:
    """Checks the mask, as the record may have been built by hand."""
    if isinstance(mask, Prefix):
        return prefix(mask.lengths)
    if isinstance(mask, Ranges):
        return ranges(mask.begin, mask.end)
    return segments(mask.q_ids, mask.k_ids, rule=mask.rule, shared=mask.shared)


def _spans(op: str, segments: Segments, packed: bool) -> Lowered:
    rank = 1 if packed else 2
    for name, ids in (("q_ids", segments.q_ids), ("k_ids", segments.k_ids)):
        if ids.dim() != rank:
            layout = "[T] (packed)" if packed else "[B or 1, S]"
            fail(op, "mask", f"{name} of segments must be {layout}", ids.shape)
    q_ids, k_ids = (ids[None] if packed else ids for ids in segments[:2])
    first = q_ids if segments.rule == "equal" else torch.full_like(q_ids, INT32_MIN)
    q_spans, k_spans = torch.stack((first, q_ids), -1), torch.stack((k_ids, k_ids), -1)
    if segments.shared is not None:
        everything = torch.tensor([INT32_MIN, INT32_MAX], dtype=torch.int32, device=q_ids.device)
        q_spans, k_spans = (
            torch.where((ids == segments.shared)[..., None], _beside(ids, everything), spans)
            for ids, spans in ((q_ids, q_spans), (k_ids, k_spans))
        )
    return Lowered(None, q_spans, k_spans)


def _beside(of: Tensor, t: Tensor) -> Tensor:
    """t as a replicated DTensor, if `of` is a DTensor."""
    mesh = None if type(of) is Tensor else getattr(of, "device_mesh", None)
    if mesh is None:
        return t
    from torch.distributed.tensor import DTensor, Replicate

    return DTensor.from_local(t, mesh, [Replicate()] * mesh.ndim, run_check=False)


def _prefix_end(
    op: str,
    leading: Prefix,
    rows: int,
    keys: int,
    q: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
) -> Tensor:
    """[B | 1, Sq]: end of the keys visible to each query."""
    batch = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
    if list(leading.lengths.shape) != [batch]:
        fail(op, "mask", f"lengths of prefix must have shape [{batch}]", leading.lengths.shape)
    i = torch.arange(rows, device=q.device, dtype=torch.int32)
    if cu_seqlens_q is None or cu_seqlens_k is None:
        causal = _beside(leading.lengths, i + (keys - rows + 1))
        return causal.maximum(leading.lengths[:, None])
    if batch == 0:
        return torch.zeros_like(i)[None]
    b = torch.bucketize(i, cu_seqlens_q[1:], right=True).clamp(max=batch - 1)
    # i - start_q + k_length - q_length + 1, with ends = starts + lengths
    causal = i - cu_seqlens_q[1:][b] + cu_seqlens_k.diff()[b] + 1
    return causal.maximum(leading.lengths[b])[None]
