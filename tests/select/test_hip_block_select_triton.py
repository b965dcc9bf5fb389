"""The Triton kernel of hip_block_select compiles for GPUs: it fits, and no length recompiles."""

from __future__ import annotations

import torch
from triton_compiler import assert_fits, assert_multiplies

from tokenmill.registry import get

OPTIONS = {
    "search": {},
    "restart": {"restart": True, "head_reduce": "group_max", "budget": 4096},
    "paged": {"paged": True, "block_k": 16, "causal": False},
    "exact, packed": {"bound": "minmax", "representative": "first", "packed": True},
}
CASES = [f"{dtype}:{name}" for dtype in ("float32", "float16", "bfloat16") for name in OPTIONS]
# Known spills in bytes, docs/performance.md: by capability and case.
SPILLS = {
    (80, "float32:search"): 88,
    **{(90, case): 24 for case in CASES if case.endswith(":restart")},
}


def call(case, tokens=4096, queries=100, dim=128):
    from tokenmill.triton_kernels.select.hip_block_select import hip_block_select

    dtype, name = case.split(":")
    o, dtype = dict(OPTIONS[name]), getattr(torch, dtype)
    q = torch.zeros(2, queries, 8, dim, dtype=dtype)
    k, table = torch.zeros(2, tokens, 2, dim, dtype=dtype), None
    if o.pop("paged", False):
        k = k.view(-1, 8, *k.shape[2:])
        table = torch.zeros(2, tokens // 8, dtype=torch.int32)
    block_k, budget = o.get("block_k", 2), o.get("budget", 512)
    heads, blocks = 2 if "head_reduce" in o else 8, -(-queries // 64)
    start = None
    if o.pop("restart", False):
        counts = torch.zeros(2, heads, blocks, dtype=torch.int32)
        start = (counts[..., None].expand(-1, -1, -1, budget // block_k).contiguous(), counts)
    seqlens_k, ends = torch.zeros(2, dtype=torch.int32), None
    if o.pop("packed", False):
        q, k, seqlens_k, ends = q[0], k[0], None, torch.zeros(3, dtype=torch.int32)
    record = get("hip_block_select").record(
        q, k, **o, start=start, seqlens_k=seqlens_k, block_table=table, cu_seqlens_q=ends,
        cu_seqlens_k=ends,
    )  # fmt: skip
    return lambda: hip_block_select(record)


def test_kernel_fits(programs):
    assert [p["case"] for p in programs] == CASES
    for program in programs:
        known = SPILLS.get((program["capability"], program["case"]), 0)
        assert program["spilled"] <= known, program
        assert_fits(program | {"spilled": 0})
        assert_multiplies(program, program["case"].split(":")[0])


def test_no_length_compiles_anew(compiles_once):
    sizes = (4096, 100), (1000, 128), (72, 65)
    compiles_once({"float16:search": sizes, "float16:paged": sizes})
