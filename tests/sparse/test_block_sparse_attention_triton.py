"""The Triton kernels of block_sparse_attention compile for GPUs: they fit, and no length
recompiles."""

from __future__ import annotations

import torch
from tier import daily
from triton_compiler import assert_fits, assert_multiplies

from tokenmill import registry

SPEC = registry.get("block_sparse_attention")
CASES = daily(  # dtype, head_dim, block_q, block_k, options
    "float16:64:64:64:causal,ends",
    "float16:128:1:128:softcap,pages",
    "float16:128:64:64:causal,ends,packed",
    "float32:128:64:8:each",
    full=(
        "bfloat16:128:128:16:causal",
        "bfloat16:256:64:2:causal,ends",
        "float32:64:16:64:causal,ends",
    ),
)
KERNELS = {
    "compact_kernel",
    "block_sparse_kernel",
    "block_sparse_mass_kernel",
    "block_sparse_queries_kernel",
    "block_sparse_keys_kernel",
}


def record(case, batch=2, tokens=4096, entries=64):
    """A call of block_sparse_attention on meta tensors."""
    dtype, dim, block_q, block_k, options = case.split(":")
    dtype, dim, block_q, block_k = getattr(torch, dtype), int(dim), int(block_q), int(block_k)

    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    heads, kv_heads, rows = 8, 2, -(-tokens // block_q)
    lists = heads if "each" in options else kv_heads
    q = empty(batch, tokens, heads, dim, dtype=dtype)
    k = empty(batch, tokens, kv_heads, dim, dtype=dtype)
    ends, table = "ends" in options, None
    if "pages" in options:
        k = empty(batch * tokens // 16, 16, kv_heads, dim, dtype=dtype)
        table = empty(batch, tokens // 16, dtype=torch.int32)
    indices = empty(batch, lists, rows, entries, dtype=torch.int32)
    counts = empty(batch, lists, rows, dtype=torch.int32)
    cu = None
    if "packed" in options:
        cu = empty(batch + 1, dtype=torch.int32)
        q, k, indices, counts = q[0], k[0], indices[0], counts[0]
    return SPEC.record(
        q, k, k, indices, counts, block_q=block_q, block_k=block_k, causal="causal" in options,
        num_sink=4 if ends else 0, num_recent=100 if ends else 0,
        softcap=5.0 if "softcap" in options else 0.0,
        seqlens_k=empty(batch, dtype=torch.int32) if ends and cu is None else None,
        sink=empty(heads) if ends else None, return_mass=ends, block_table=table, cu_seqlens_q=cu,
    )  # fmt: skip


def call(case, *sizes):
    from tokenmill.triton_kernels.sparse import block_sparse_attention as forward
    from tokenmill.triton_kernels.sparse import block_sparse_attention_backward as backward

    def launch():
        a = record(case, *sizes)
        out, lse, _ = forward.block_sparse_attention(a)
        if a.block_table is None:  # pages support only the forward
            b = SPEC.backward.record(out, lse, out, lse, True, *a)
            backward.block_sparse_attention_backward(b)

    return launch


def test_kernels_compile_without_spills_and_use_tensor_cores(programs):
    assert {p["kernel"] for p in programs} == KERNELS
    for program in programs:
        assert_fits(program)
        if program["kernel"] != "compact_kernel":
            assert_multiplies(program, program["case"].split(":")[0])


def test_no_length_compiles_anew(compiles_once):
    compiles_once({"float16:64:64:64:causal,ends": ((2, 4096, 64), (1, 1023, 17), (3, 64, 1))})
