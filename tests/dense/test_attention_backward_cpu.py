"""Gradients of attention by every CPU instruction set, where blocks, parts and masks cut tiles."""

from __future__ import annotations

import pytest
import torch
from conftest import backends
from hypothesis import given, settings
from hypothesis import strategies as st

import tokenmill as tm

pytestmark = pytest.mark.skipif("cpu" not in backends(), reason="of the CPU backend")

TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
each_isa = pytest.mark.parametrize("isa", tm.testing.cpu_isas(), indirect=True)
lengths = st.sampled_from([1, 15, 31, 33, 64, 97, 129, 260, 515])
SEEN = {
    "all": {},
    "causal": {"causal": True},
    "window": {"window": (70, 5)},
    "ahead": {"window": (0, 300)},
}


def relative_error(found, want):
    return (found.double() - want).norm() / want.norm().clamp(min=0.1 * want.numel() ** 0.5)


@each_isa
@pytest.mark.parametrize("kind", ["softmax", "sigmoid", "elu1"])
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_gradients_of_tiles(kind, data, isa):
    draw = data.draw
    dtype = draw(st.sampled_from(list(TOLERANCE)))
    kv_heads, group = draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 2]))
    head_dim, value_dim = (draw(st.sampled_from([8, 40, 64, 96])) for _ in range(2))
    queries = draw(lengths)
    keys = draw(st.sampled_from([queries, queries + 37, max(1, queries - 20)]))
    options = {"kind": kind, **SEEN[draw(st.sampled_from(list(SEEN)))]}
    if kind == "softmax" and draw(st.booleans()):
        options["softcap"] = 15.0
    g = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    shapes = (
        (2, queries, kv_heads * group, head_dim),
        (2, keys, kv_heads, head_dim),
        (2, keys, kv_heads, value_dim),
        (2, queries, kv_heads * group, value_dim),
    )
    tensors = [torch.randn(shape, generator=g).to(dtype) for shape in shapes]
    if draw(st.booleans()):
        options["bias"] = torch.randn(1, 1, queries, keys, generator=g)
    results = []
    for wide, backend in ((torch.float64, "reference"), (dtype, "cpu")):
        q, k, v = (t.to(wide).requires_grad_() for t in tensors[:3])
        out = tm.attention(q, k, v, **options, backend=backend)
        results.append(torch.autograd.grad(out, (q, k, v), tensors[3].to(wide)))
    for want, found in zip(*results, strict=True):
        assert relative_error(found, want) < TOLERANCE[dtype]
