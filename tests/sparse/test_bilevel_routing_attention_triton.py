"""The Triton kernels of bilevel_routing_attention compile for GPUs: they fit, and no map
recompiles.
As a script, it compiles them without a GPU and prints their use of resources:
python tests/sparse/test_bilevel_routing_attention_triton.py CAPABILITY [float16:32:8:shared ...]
"""

from __future__ import annotations

import json
import sys

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from tier import daily
from triton_compiler import (
    OPERANDS,
    SHARED,
    assert_fits,
    compiled,
    fresh_process,
    resources,
    without_code,
)

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


def record(dtype, dim, side, lists, batch=2, size=(56, 56), entries=4):
    """A call of bilevel_routing_attention on meta tensors."""

    def empty(*shape, dtype=torch.int32):
        return torch.empty(shape, dtype=dtype, device="meta")

    heads, kv_heads = 8, 2
    regions = -(-size[0] // side) * -(-size[1] // side)
    q = empty(batch, *size, heads, dim, dtype=dtype)
    k = empty(batch, *size, kv_heads, dim, dtype=dtype)
    graph = empty(batch, heads if lists == "each" else 1, regions, entries)
    return SPEC.record(q, k, k, region_size=side, region_graph=graph)


def kernels(capability, *call, **sizes):
    from tokenmill.triton_kernels.sparse import bilevel_routing_attention as forward
    from tokenmill.triton_kernels.sparse import bilevel_routing_attention_backward as backward

    def launch():
        a = record(*call, **sizes)
        out, lse = forward.bilevel_routing_attention(a)
        backward.bilevel_routing_attention_backward(SPEC.backward.record(out, lse, out, lse, *a))

    return compiled(capability, launch)


def main(capability, *cases):
    for case in cases:
        dtype, dim, side, lists = case.split(":")
        call = getattr(torch, dtype), int(dim), int(side), lists
        for kernel, code in kernels(int(capability), *call):
            print(json.dumps({"case": case, **resources(kernel, code)}), flush=True)


@pytest.mark.parametrize("capability", SHARED)
def test_kernels_compile_without_spills_and_use_tensor_cores(capability, tmp_path):
    text = fresh_process(__file__, __file__, capability, *CASES, folder=tmp_path)
    found = [json.loads(line) for line in text.splitlines()]
    assert {p["kernel"] for p in found} == KERNELS
    for program in found:
        assert_fits(program, capability)
        if program["kernel"] != "compact_kernel":
            operand = OPERANDS[program["case"].split(":")[0]]
            assert program["products"], program
            for product in program["products"]:
                assert f".f32.{operand}.{operand}" in product, program


def test_no_map_compiles_anew(tmp_path):
    """Other region sizes do not recompile either, as long as tiles are the same."""
    code = """
import torch
from test_bilevel_routing_attention_triton import kernels

calls = []
for side, *sizes in (8, 2, (56, 56), 4), (7, 1, (43, 50), 7), (8, 3, (9, 7), 1):
    call = 80, torch.float16, 32, side, "shared"
    names = dict(zip(("batch", "size", "entries"), sizes))
    calls.append([code for _, code in kernels(*call, **names)])
first, *others = calls
assert all(a is b for other in others for a, b in zip(first, other, strict=True))
"""
    without_code(__file__, code, folder=tmp_path)


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


if __name__ == "__main__":
    main(*sys.argv[1:])
