"""bilevel_routing_attention: regions of a map attend to their routed regions (BiFormer)."""

from __future__ import annotations

import functools
import math
from typing import Any, Literal, TypedDict, overload

import torch
from torch import Tensor
from typing_extensions import Unpack

from .._call.autocast import Autocast
from .._call.run import call
from .._check import (
    as_int,
    check,
    check_bool,
    check_device_of_q,
    check_qkv,
    check_tensor,
    fail,
    is_any,
)
from .._flops import known
from .._kv_cache import check_int32
from .._lowering import scale_or_default, take_options
from .._other_names import answered_by
from ..reference.sparse import bilevel_routing_attention as reference
from ..registry import OpSpec, Sharding, register_op
from .gradients import register_pair
from .routing import route

OP = "bilevel_routing_attention"

AUTOCAST = Autocast(lower=("q", "k", "v"))


class BilevelRoutingOptions(TypedDict, total=False):
    """Keywords of :func:`bilevel_routing_attention` other than return_lse and return_graph."""

    regions: int | tuple[int, int] | None
    topk: int | None
    region_size: int | tuple[int, int] | None
    scale: float | None
    mask_padding: bool
    region_graph: Tensor | None
    backend: str | None


def _run(q: Tensor, k: Tensor, v: Tensor, **given: Any) -> Tensor | tuple[Tensor, ...]:
    _, backend = take_options(bilevel_routing_attention, given)
    lowered = lower(q, k, v, **given)
    out, lse = call(SPEC, lowered, None, backend)
    graph = (FORWARD.record(*lowered).indices,) if given.get("return_graph") else ()
    results = (out, *((lse,) if given.get("return_lse") else ()), *graph)
    return results if len(results) > 1 else out


@overload
def bilevel_routing_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    return_lse: Literal[False] = ...,
    return_graph: Literal[False] = ...,
    **options: Unpack[BilevelRoutingOptions],
) -> Tensor: ...


@overload
def bilevel_routing_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    return_lse: bool = ...,
    return_graph: bool = ...,
    **options: Unpack[BilevelRoutingOptions],
) -> Tensor | tuple[Tensor, ...]: ...


@answered_by(_run)
def bilevel_routing_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    regions: int | tuple[int, int] | None = None,
    topk: int | None = None,
    region_size: int | tuple[int, int] | None = None,
    scale: float | None = None,
    mask_padding: bool = True,
    region_graph: Tensor | None = None,
    return_lse: bool = False,
    return_graph: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, ...]:
    r"""Attention of each region of a map to the topk regions whose mean keys match its mean query.

    Maps are cut into rectangular regions; regions at the right and lower edges are smaller if the
    map is not a multiple of them. With the means :math:`\bar q_r, \bar k_r` of queries and keys
    over the pixels of region r,

    .. math::
       A_{rs} = \sum_h \bar q_{rh} \cdot \bar k_{sh}, \qquad
       S_r = \operatorname{topk}_s A_{rs}, \qquad
       o_i = \sum_{j \in \bigcup S_{r(i)}}
             \operatorname{softmax}_j(\mathrm{scale}\; q_i \cdot k_j)\, v_j

    for the query of pixel i. The choice of regions is not differentiated. Keys and values are read
    in place: nothing is gathered, and no memory beyond inputs and outputs is needed.

    Args:
        q: ``[B, Y, X, H, D]`` (channels last), float16, bfloat16 or float32 (float64 on the
            reference), any strides with a contiguous last dimension, D up to 256.
        k, v: ``[B, Yk, Xk, Hk, D]`` and ``[B, Yk, Xk, Hk, Dv]``, Hk a divisor of H. A map of
            another size is cut into the same number of regions, of ceil(Yk / number) pixels.
        regions: number of regions along Y and X (one number: both). Regions have ceil(Y / number)
            pixels; there may be fewer regions than requested.
        topk: regions that each region attends to, 1 to their number.
        region_size: pixels of a region of q along Y and X, instead of regions.
        scale: factor of q.k; None = 1/sqrt(D).
        mask_padding: the missing pixels of the smaller regions are masked. False: they are keys
            with logit 0 and value 0, as in the models published with BiFormer.
        region_graph: int32 ``[B, 1 | Hk | H, R, K]`` instead of topk: the regions that each region
            attends to, in any order; duplicates count once, and ids out of range (-1) are ignored.
        return_lse: also return lse.
        return_graph: also return the graph, ascending.
        backend: "cpu", "cuda", "triton", "reference" or None (see :func:`tokenmill.explain`).

    Returns:
        out ``[B, Y, X, H, Dv]`` in the dtype of q; with return_lse also lse ``[B, H, Y, X]``
        float32, natural log, also differentiable; with return_graph also int32 ``[B, heads, R,
        K]``, heads = 1 if it was computed (ties go to the lower region; a product of NaN or -inf is
        never chosen, -1 takes its place). A region that attends to nothing has out 0 and lse -inf.
        Gradients: q, k, v.

    Raises:
        RuntimeError: naming argument, rule and value, before anything runs.

    Complexity: 2 H (D + Dv) operations for each of the Y X topk (pixels of a region) pairs, and
    R^2 H D for the routing; backward 2.5 to 3.5 times that.

    Paper: BiFormer (Zhu et al. 2023), section 3.2. Its models use scale = 1/sqrt(H D).

    Example:
        >>> import torch, tokenmill as tm
        >>> q, k, v = (torch.randn(1, 56, 56, 2, 32) for _ in range(3))
        >>> out, graph = tm.bilevel_routing_attention(
        ...     q, k, v, regions=7, topk=4, return_graph=True)
        >>> out.shape, graph.shape
        (torch.Size([1, 56, 56, 2, 32]), torch.Size([1, 1, 49, 4]))
    """
    raise NotImplementedError


@AUTOCAST.applied  # the routing is a matrix product
def lower(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    regions: int | tuple[int, int] | None = None,
    topk: int | None = None,
    region_size: int | tuple[int, int] | None = None,
    scale: float | None = None,
    mask_padding: bool = True,
    region_graph: Tensor | None = None,
    return_lse: bool = False,
    return_graph: bool = False,
) -> tuple[Any, ...]:
    for name, t in (("q", q), ("k", k), ("v", v)):
        check_tensor(OP, name, t)
    check_tensor(OP, "region_graph", region_graph, optional=True)
    flags = (("mask_padding", mask_padding), ("return_lse", return_lse))
    for name, flag in (*flags, ("return_graph", return_graph)):
        check_bool(OP, name, flag)
    check_qkv(OP, q, k, v, 5, True)
    sizes = _region_sizes(q, k, regions, region_size)
    factor = scale_or_default(OP, scale, q)
    region_y, region_x, key_region_y, key_region_x = sizes
    number = -(-q.shape[1] // region_y) * -(-q.shape[2] // region_x)
    # The sizes must be right before the routing; the lists are only described.
    counts = q.new_empty((q.shape[0], 1, number), dtype=torch.int32)
    FORWARD.check(q, k, v, counts[..., None], counts, *sizes, factor, mask_padding, float64=True)
    if region_graph is None:
        if topk is None:
            fail(OP, "topk", "must be given, or region_graph", topk)
        topk = as_int(OP, "topk", topk)
        rule = f"must be 1 to the number of regions, {number}"
        check(1 <= topk <= number, OP, "topk", rule, topk)
        indices, counts = route(q, k, topk, (region_y, region_x), (key_region_y, key_region_x))
    else:
        check(topk is None, OP, "topk", "must not be given with region_graph", topk)
        _check_graph(region_graph, q, k, number)
        indices = region_graph.sort(-1).values
        counts = indices.new_full(indices.shape[:-1], indices.shape[-1])
    return q, k, v, indices, counts, *sizes, factor, mask_padding


def _region_sizes(
    q: Tensor, k: Tensor, regions: Any, region_size: Any
) -> tuple[int, int, int, int]:
    """Region sizes of q along Y and X, and of k."""
    if regions is None and region_size is None:
        fail(OP, "regions", "must be given, or region_size", None)
    if regions is not None:
        count = _pair("regions", regions)
        pixels = [q.shape[1], q.shape[2]]
        fits = all(n <= max(side, 1) for n, side in zip(count, pixels, strict=True))
        check(fits, OP, "regions", f"must not exceed the pixels of q, {pixels}", count)
        if region_size is not None:
            fail(OP, "region_size", "must not be given with regions", region_size)
        size = tuple(max(-(-side // n), 1) for side, n in zip(pixels, count, strict=True))
    else:
        size = _pair("region_size", region_size)
    if k.shape[1:3] == q.shape[1:3]:
        return size[0], size[1], size[0], size[1]
    rows, columns = (max(-(-q.shape[1 + i] // size[i]), 1) for i in range(2))
    return size[0], size[1], max(-(-k.shape[1] // rows), 1), max(-(-k.shape[2] // columns), 1)


def _pair(name: str, value: Any) -> tuple[int, int]:
    rule = "must be an integer or two, along Y and X"
    if isinstance(value, tuple | list):
        check(len(value) == 2, OP, name, rule, value)
        numbers = as_int(OP, name, value[0], rule), as_int(OP, name, value[1], rule)
    else:
        number = as_int(OP, name, value, rule)
        numbers = number, number
    check(min(numbers) >= 1, OP, name, "must be at least 1", numbers)
    return numbers


def _check_graph(graph: Tensor, q: Tensor, k: Tensor, regions: int) -> None:
    batch, heads, kv_heads = q.shape[0], q.shape[3], k.shape[3]
    fits = graph.dim() == 4 and graph.shape[0] == batch and graph.shape[2] == regions
    fits = fits and is_any(graph.shape[1], 1, kv_heads, heads)
    rule = f"[{batch}, heads, {regions}, K] with 1, {kv_heads} or {heads} heads"
    check(fits, OP, "region_graph", f"must have shape {rule}", graph.shape)
    check_int32(OP, "region_graph", graph)
    check_device_of_q(OP, "region_graph", graph, q)


def flops(a: Any) -> float:
    """Operations of the two products over all pairs of routed regions of the average size."""
    _, heads, regions, _ = a.indices.shape
    routed = float(a.counts.sum()) if known(a.counts) else float(a.indices.numel())
    pixels = math.prod(a.q.shape[1:3]) * math.prod(a.k.shape[1:3]) / max(regions, 1) ** 2
    return 2.0 * routed * pixels * a.q.shape[3] / max(heads, 1) * (a.q.shape[-1] + a.v.shape[-1])


def backward_flops(a: Any) -> float:
    """Operations of the five products of the backward."""
    return 2.5 * flops(a)


FORWARD, BACKWARD = register_pair(OP, AUTOCAST)
SPEC = register_op(
    OpSpec(
        function=bilevel_routing_attention,
        lower=lower,
        reference=reference.bilevel_routing_attention,
        plain=functools.partial(reference.bilevel_routing_attention, upcast=False),
        forward=FORWARD,
        differentiable=("q", "k", "v"),
        logarithms=(1,),
        sharding=Sharding(
            {"q k v": "b..h.", "indices": "bh..", "counts": "bh."},
            ("b..h.", "bh.."),
        ),
        paper="BiFormer (Zhu et al. 2023)",
        flops=flops,
        backward_flops=backward_flops,
    )
)
