"""Calls of bilevel_routing_attention for its tests, and its published formulation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from strategies import HEAD_DIMS

from tokenmill.registry import Sample
from tokenmill.sparse.bilevel_routing_cases import bilevel_call


@st.composite
def bilevel_samples(draw, longest):
    """A sample with any combination of options."""
    side = st.one_of(st.sampled_from([1, 4, 8, 14]), st.integers(1, longest))
    kv_heads, group = draw(st.sampled_from([(1, 1), (2, 1), (1, 4), (2, 3), (1, 7)]))
    heads = kv_heads * group
    size = draw(side), draw(side)
    options = {
        "size": size,
        "b": draw(st.integers(0, 2)),
        "h": heads,
        "hk": kv_heads,
        "d": draw(HEAD_DIMS),
        "dv": draw(HEAD_DIMS),
        "graphs": draw(st.sampled_from([1, kv_heads, heads])),
        "topk": draw(st.sampled_from([0, 1, 2, 4, 9])),
        "wild": draw(st.booleans()),
        "mask_padding": draw(st.booleans()),
        "scale": draw(st.sampled_from([None, 0.3])),
    }
    if draw(st.booleans()):
        options["region_size"] = draw(st.integers(1, 9)), draw(st.integers(1, 9))
        return Sample(str(options), bilevel_call(**options))
    regions = tuple(draw(st.integers(1, min(n, 5))) for n in size)
    found = [-(-n // -(-n // r)) for n, r in zip(size, regions, strict=True)]
    options["regions"] = tuple(found)
    if draw(st.booleans()):  # keys of another map: as many regions, each of some pixels
        pixels = [draw(st.integers(1, 4)) for _ in found]
        options["key_size"] = tuple(
            n * p - draw(st.integers(0, p - 1)) for n, p in zip(found, pixels, strict=True)
        )
    return Sample(str(options), bilevel_call(**options))


def gathered_attention(q, k, v, graph, region, scale):
    """BiFormer as published: q, k, v [B, Y, X, H, D] filled up with zeros, whose regions are
    gathered by graph [B, R, K]."""
    size = q.shape[1:3]
    rows, columns = (-(-n // r) for n, r in zip(size, region, strict=True))

    def regions_of(x):  # [B, H, R, pixels, D]
        x = F.pad(x, (0, 0, 0, 0, 0, columns * region[1] - size[1], 0, rows * region[0] - size[0]))
        x = x.unflatten(2, (columns, region[1])).unflatten(1, (rows, region[0]))
        return x.permute(0, 5, 1, 3, 2, 4, 6).flatten(4, 5).flatten(2, 3)

    q, k, v = map(regions_of, (q, k, v))
    at = graph.long()[:, None, :, :, None, None].expand(-1, k.shape[1], -1, -1, *k.shape[3:])

    def gather(x):
        x = x[:, :, None].expand(-1, -1, graph.shape[1], -1, -1, -1)
        return x.gather(3, at).flatten(3, 4)

    p = torch.softmax(scale * q @ gather(k).transpose(3, 4), -1)
    out = (p @ gather(v)).unflatten(3, region).unflatten(2, (rows, columns))
    out = out.permute(0, 2, 4, 3, 5, 1, 6).flatten(3, 4).flatten(1, 2)
    return out[:, : size[0], : size[1]]
