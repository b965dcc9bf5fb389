"""Cases of bilevel_routing_attention: the maps of BiFormer's stages and of a photograph. Peers
gather the keys and values of the routed regions, as the published code does, and attend in plain
PyTorch or with its fused attention. Both sides include the routing."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

import tokenmill as tm

from .attention import with_backward
from .case import Case, Run, place


def routed(q: Tensor, k: Tensor, region: tuple[int, int], topk: int) -> Tensor:
    """Region routing [B, R, topk] of maps [B, Y, X, H, D], by average pooling."""
    means = [
        F.avg_pool2d(
            t.detach().flatten(3).permute(0, 3, 1, 2), region, ceil_mode=True,
            count_include_pad=False,
        ).flatten(2)
        for t in (q, k)
    ]  # fmt: skip
    return (means[0].transpose(1, 2) @ means[1]).topk(topk).indices


def gathered_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    graph: Tensor,
    region: tuple[int, int],
    scale: float,
    fused: bool = False,
) -> Tensor:
    """BiFormer as published: maps [B, Y, X, H, D] are zero-padded, and regions are gathered by
    graph [B, R, K]."""
    size = q.shape[1:3]
    rows, columns = (-(-n // r) for n, r in zip(size, region, strict=True))

    def regions_of(x: Tensor) -> Tensor:  # [B, H, R, pixels, D]
        x = F.pad(x, (0, 0, 0, 0, 0, columns * region[1] - size[1], 0, rows * region[0] - size[0]))
        x = x.unflatten(2, (columns, region[1])).unflatten(1, (rows, region[0]))
        return x.permute(0, 5, 1, 3, 2, 4, 6).flatten(4, 5).flatten(2, 3)

    q, k, v = map(regions_of, (q, k, v))
    at = graph.long()[:, None, :, :, None, None].expand(-1, k.shape[1], -1, -1, *k.shape[3:])

    def gather(x: Tensor) -> Tensor:
        x = x[:, :, None].expand(-1, -1, graph.shape[1], -1, -1, -1)
        return x.gather(3, at).flatten(3, 4)

    if fused:
        q, keys, values = (t.flatten(1, 2) for t in (q, gather(k), gather(v)))
        out = F.scaled_dot_product_attention(q, keys, values, scale=scale)
        out = out.unflatten(1, (k.shape[1], -1))
    else:
        out = torch.softmax(scale * q @ gather(k).transpose(3, 4), -1) @ gather(v)
    out = out.unflatten(3, region).unflatten(2, (rows, columns))
    out = out.permute(0, 2, 4, 3, 5, 1, 6).flatten(3, 4).flatten(1, 2)
    return out[:, : size[0], : size[1]]


def _case(
    size: tuple[int, int],
    region: tuple[int, int],
    topk: int,
    heads: int,
    batch: int,
    dtype: torch.dtype,
    backward: bool,
) -> Case:
    dim = 32
    scale = (heads * dim) ** -0.5

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return tm.bilevel_routing_attention(
            q, k, v, region_size=region, topk=topk, scale=scale, mask_padding=False
        )

    def theirs(q: Tensor, k: Tensor, v: Tensor, fused: bool) -> Tensor:
        return gathered_attention(q, k, v, routed(q, k, region, topk), region, scale, fused)

    def prepare() -> tuple[Run, dict[str, Callable[[], Run]]]:
        g = torch.Generator().manual_seed(0)
        qkv = torch.randn(batch, *size, 3, heads, dim, generator=g).to(dtype)
        maps = list(place(qkv).unbind(3))

        def call(function: Callable[..., Tensor]) -> Run:
            return with_backward(function, maps) if backward else lambda: function(*maps)

        return call(ours), {
            "gather, eager": lambda: call(functools.partial(theirs, fused=False)),
            "gather, sdpa": lambda: call(functools.partial(theirs, fused=True)),
        }

    pixels = batch * size[0] * size[1]
    keys = topk * region[0] * region[1]
    element = torch.empty((), dtype=dtype).element_size()
    return Case(
        "bilevel_routing_attention",
        f"{size[0]}x{size[1]} regions {region[0]}x{region[1]} topk {topk} H={heads} B={batch}",
        dtype,
        4.0 * heads * pixels * keys * dim * (3.5 if backward else 1.0),
        float((10 if backward else 4) * pixels * heads * dim * element),
        prepare,
        "forward+backward" if backward else "forward",
    )


def cases() -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16):
        for backward in (False, True):
            yield _case((56, 56), (8, 8), 4, 2, 1, dtype, backward)
            yield _case((150, 125), (22, 18), 4, 2, 1, dtype, backward)
        yield _case((28, 28), (4, 4), 4, 4, 8, dtype, False)
        yield _case((14, 14), (2, 2), 16, 8, 8, dtype, False)
