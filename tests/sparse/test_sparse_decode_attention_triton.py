"""The Triton kernels of sparse_decode_attention compile for GPUs: they fit, and no length
recompiles."""

from __future__ import annotations

import torch
from tier import daily
from triton_compiler import assert_fits, assert_multiplies

from tokenmill import registry

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


def record(case, tokens=4096, entries=1024, queries=1, batch=4):
    """A call of sparse_decode_attention on meta tensors."""
    dtype, dim, options = case.split(":")
    dtype, dim = getattr(torch, dtype), int(dim)

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


def call(case, *sizes):
    from tokenmill.triton_kernels.sparse.sparse_decode_attention import sparse_decode_attention

    return lambda: sparse_decode_attention(record(case, *sizes))


def test_kernels_compile_without_spills_and_use_tensor_cores(programs):
    kernels = {p["kernel"].removesuffix("_kernel") for p in programs}
    assert kernels == {"sparse_ranges", "merge", "mass"}
    ranges = [p["case"] for p in programs if p["kernel"] == "sparse_ranges_kernel"]
    several = [c for c in CASES if "several" in c]  # a second launch recomputes NaN rows
    assert sorted(ranges) == sorted([*CASES, *several])
    for program in programs:
        assert_fits(program)
        if program["kernel"].startswith("sparse_ranges"):
            float32_values = ["float32"] if "float8" in program["case"] else []
            assert_multiplies(program, program["case"].split(":")[0], *float32_values)


def test_no_length_compiles_anew(compiles_once):
    # One query has its own code.
    sizes = (4096, 1024, 2, 4), (1024, 16, 3, 1), (256, 77, 4, 5)
    compiles_once({"float16:64:paged,rope,extra,mass": sizes})
