"""Calls of bilevel_routing_attention for its tests."""

from __future__ import annotations

from hypothesis import strategies as st
from strategies import HEAD_DIMS

from tokenmill.registry import Sample
from tokenmill.sparse.bilevel_routing_attention_cases import bilevel_call


@st.composite
def bilevel_samples(draw, longest):
    """Draws a sample with any combination of options."""
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
    if draw(st.booleans()):  # keys of another map: the same number of regions, of other sizes
        pixels = [draw(st.integers(1, 4)) for _ in found]
        options["key_size"] = tuple(
            n * p - draw(st.integers(0, p - 1)) for n, p in zip(found, pixels, strict=True)
        )
    return Sample(str(options), bilevel_call(**options))
