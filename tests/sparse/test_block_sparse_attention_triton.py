"""The Triton kernels of block_sparse_attention compile for GPUs: they fit, and no length
recompiles.
As a script, it compiles them without a GPU and prints their use of resources:
python tests/sparse/test_block_sparse_attention_triton.py CAPABILITY [float16:64:64:64:causal,ends]
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


def record(dtype, dim, block_q, block_k, options, batch=2, tokens=4096, entries=64):
    """A call of block_sparse_attention on meta tensors."""

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


def kernels(capability, *call, **sizes):
    from tokenmill.triton_kernels.sparse import block_sparse_attention as forward
    from tokenmill.triton_kernels.sparse import block_sparse_attention_backward as backward

    def launch():
        a = record(*call, **sizes)
        out, lse, _ = forward.block_sparse_attention(a)
        if a.block_table is None:  # pages support only the forward
            b = SPEC.backward.record(out, lse, out, lse, True, *a)
            backward.block_sparse_attention_backward(b)

    return compiled(capability, launch)


def main(capability, *cases):
    for case in cases:
        dtype, dim, block_q, block_k, options = case.split(":")
        sizes = int(dim), int(block_q), int(block_k)
        for kernel, code in kernels(int(capability), getattr(torch, dtype), *sizes, options):
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


def test_no_length_compiles_anew(tmp_path):
    code = """
import torch
from test_block_sparse_attention_triton import kernels

call = 80, torch.float16, 64, 64, 64, "causal,ends"
names = "batch", "tokens", "entries"
sizes = (2, 4096, 64), (1, 1023, 17), (3, 64, 1)
calls = [[code for _, code in kernels(*call, **dict(zip(names, n)))] for n in sizes]
first, *others = calls
assert all(a is b for other in others for a, b in zip(first, other, strict=True))
"""
    without_code(__file__, code, folder=tmp_path)


if __name__ == "__main__":
    main(*sys.argv[1:])
