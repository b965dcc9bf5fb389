"""The Triton kernels of sparse_decode_attention compile for GPUs: they fit, and no length
recompiles.
As a script, it compiles them without a GPU and prints their use of resources:
python tests/sparse/test_sparse_decode_attention_triton.py CAPABILITY [float16:64:paged,rope,extra]
"""

from __future__ import annotations

import json
import sys

import pytest
import torch
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

SPEC = registry.get("sparse_decode_attention")
CASES = daily(  # dtype, head_dim, terms
    "bfloat16:128:paged,block,rope,extra,terms,mass",
    "bfloat16:256:rope,interleaved,several",
    "float32:128:paged,rope,terms,several",
    "bfloat16:128:paged,rope,extra,several,float8",
    "float16:128:paged,partial,place,mass",
    full=(
        "float16:64:several",
        "float32:64:partial,interleaved,extra,mass",
        "float32:128:partial,mass",
        "float16:128:partial,float8",
    ),
)


def record(dtype, dim, options, tokens=4096, entries=1024, queries=1, batch=4):
    """A call of sparse_decode_attention on meta tensors."""

    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    heads, kv_heads, page_size, extra = 32, 8, 16, tokens // 256
    queries = 4 if "several" in options else queries
    paged, integer = "paged" in options, torch.int32
    q = empty(batch, queries, heads, dim, dtype=dtype)
    pages = (batch * tokens // page_size, page_size) if paged else (batch, tokens)
    scale, cache = None, empty(*pages, kv_heads, dim, dtype=dtype)
    if "float8" in options:
        scale, cache = empty(*pages, kv_heads), cache.to(torch.float8_e4m3fn)
    pairs = dim // 4 if "partial" in options else dim // 2
    turns = "rope" in options or "partial" in options
    table = empty(tokens, pairs)
    extra_k = empty(batch, extra, kv_heads, dim, dtype=dtype) if "extra" in options else None
    terms = "terms" in options
    return SPEC.record(
        q, cache, cache, empty(batch, kv_heads, entries, dtype=integer),
        empty(batch, kv_heads, dtype=integer), seqlens_k=empty(batch, dtype=integer),
        block_table=empty(batch, tokens // page_size, dtype=integer) if paged else None,
        block_k=16 if "block" in options else 1, num_sink=4, num_recent=100,
        pos_mode="cache" if "place" in options else "absolute",
        rope=(table, table) if turns else None, interleaved="interleaved" in options,
        extra_k=extra_k, extra_v=extra_k,
        extra_log_count=empty(batch, kv_heads, extra) if extra_k is not None else None,
        softcap=5.0 if terms else 0.0, sink=empty(heads) if terms else None,
        return_mass="mass" in options, k_scale=scale, v_scale=scale,
    )  # fmt: skip


def kernels(capability, *call, **sizes):
    from tokenmill.triton_kernels.sparse.sparse_decode_attention import sparse_decode_attention

    return compiled(capability, lambda: sparse_decode_attention(record(*call, **sizes)))


def main(capability, *cases):
    for case in cases:
        dtype, dim, options = case.split(":")
        for kernel, code in kernels(int(capability), getattr(torch, dtype), int(dim), options):
            print(json.dumps({"case": case, **resources(kernel, code)}), flush=True)


@pytest.mark.parametrize("capability", SHARED)
def test_kernels_compile_without_spills_and_use_tensor_cores(capability, tmp_path):
    text = fresh_process(__file__, __file__, capability, *CASES, folder=tmp_path)
    found = [json.loads(line) for line in text.splitlines()]
    kernels = {p["kernel"].removesuffix("_kernel") for p in found}
    assert kernels == {"sparse_ranges", "merge", "mass"}
    ranges = [p["case"] for p in found if p["kernel"] == "sparse_ranges_kernel"]
    several = [c for c in CASES if "several" in c]  # a second launch recomputes NaN rows
    assert sorted(ranges) == sorted([*CASES, *several])
    for program in found:
        assert_fits(program, capability)
        if program["kernel"].startswith("sparse_ranges"):
            operands = {OPERANDS[program["case"].split(":")[0]]}
            if "float8" in program["case"]:  # float32 values
                operands.add("tf32")
            assert program["products"], program
            for product in program["products"]:
                assert any(f".f32.{operand}.{operand}" in product for operand in operands), program


def test_no_length_compiles_anew(tmp_path):
    code = """
import torch
from test_sparse_decode_attention_triton import kernels

options = "paged,rope,extra,mass"
sizes = [(4096, 1024, 2, 4), (1024, 16, 3, 1), (256, 77, 4, 5)]  # one query has its own code
names = ("tokens", "entries", "queries", "batch")
calls = [
    [code for _, code in kernels(80, torch.float16, 64, options, **dict(zip(names, n)))]
    for n in sizes
]
first, *others = calls
assert all(a is b for other in others for a, b in zip(first, other, strict=True))
"""
    without_code(__file__, code, folder=tmp_path)


if __name__ == "__main__":
    main(*sys.argv[1:])
