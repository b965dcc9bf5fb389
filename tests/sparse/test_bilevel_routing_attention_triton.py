"""The Triton kernels of bilevel_routing_attention compile for GPUs: they fit, and no map
recompiles."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from tier import daily
from triton_compiler import assert_fits, assert_multiplies

from tokenmill import registry

pytest.importorskip("triton", reason="Triton is not installed (tokenmill[triton])")

SPEC = registry.get("bilevel_routing_attention")
CASES = daily(  # dtype, head_dim, side of a region, lists
    "float16:32:2:shared",
    "float16:128:18:each",
    "bfloat16:256:8:shared",
    "float32:128:2:shared",
    full=(
        "float16:32:8:shared",
        "bfloat16:64:2:shared",
        "float16:64:5:each",
        "float32:32:2:each",
        "float32:64:18:shared",
    ),
)
KERNELS = {
    "compact_kernel",
    "bilevel_routing_kernel",
    "bilevel_routing_queries_kernel",
    "bilevel_routing_keys_kernel",
}


def record(case, batch=2, size=(56, 56), entries=4):
    """A call of bilevel_routing_attention on meta tensors."""
    dtype, dim, side, lists = case.split(":")
    side = int(side)

    def empty(*shape, dtype=torch.int32):
        return torch.empty(shape, dtype=dtype, device="meta")

    heads, kv_heads = 8, 2
    regions = -(-size[0] // side) * -(-size[1] // side)
    q = empty(batch, *size, heads, int(dim), dtype=getattr(torch, dtype))
    k = empty(batch, *size, kv_heads, int(dim), dtype=getattr(torch, dtype))
    graph = empty(batch, heads if lists == "each" else 1, regions, entries)
    return SPEC.record(q, k, k, region_size=side, region_graph=graph)


def call(case, *sizes):
    from tokenmill.triton_kernels.sparse import bilevel_routing_attention as forward
    from tokenmill.triton_kernels.sparse import bilevel_routing_attention_backward as backward

    def launch():
        a = record(case, *sizes)
        out, lse = forward.bilevel_routing_attention(a)
        backward.bilevel_routing_attention_backward(SPEC.backward.record(out, lse, out, lse, *a))

    return launch


def test_kernels_compile_without_spills_and_use_tensor_cores(programs):
    assert {p["kernel"] for p in programs} == KERNELS
    for program in programs:
        assert_fits(program)
        if program["kernel"] != "compact_kernel":
            assert_multiplies(program, program["case"].split(":")[0])


def test_no_map_compiles_anew(compiles_once):
    compiles_once({"float16:32:8:shared": ((2, (56, 56), 4), (1, (43, 50), 7), (3, (9, 7), 1))})


@given(n=st.integers(1, 2**31 - 1), x=st.integers(0, 2**31 - 1))
@example(n=1, x=2**31 - 1)
@example(n=2**31 - 1, x=2**31 - 1)
@example(n=2**30 + 1, x=2**31 - 2)
def test_quotients_by_multiplication_are_exact(n, x):
    from tokenmill.triton_kernels.sparse.regions import divisor

    by = divisor(n)
    assert 2**32 <= by < 2**63  # n does not change the type in a kernel
    factor, shift = by % 2**32, (by >> 32) - 1
    total = (x * factor >> 32) + x
    assert total < 2**32 and total >> shift == x // n
