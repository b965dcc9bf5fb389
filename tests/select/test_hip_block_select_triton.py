"""The Triton kernel of hip_block_select compiles for GPUs: it fits, and no length recompiles."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from triton_compiler import (
    OPERANDS,
    SHARED,
    assert_fits,
    compiled,
    fresh_process,
    resources,
    without_code,
)

from tokenmill.registry import get

pytest.importorskip("triton", reason="Triton is not installed (tokenmill[triton])")

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
CASES = {
    "search": {},
    "restart": {"restart": True, "head_reduce": "group_max", "budget": 4096},
    "paged": {"paged": True, "block_k": 16, "causal": False},
    "exact, packed": {"bound": "minmax", "representative": "first", "packed": True},
}


def search(dtype, case, tokens=4096, queries=100, dim=128):
    from tokenmill.triton_kernels.select.hip_block_select import hip_block_select

    o = dict(CASES[case])
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
    call = get("hip_block_select").record(
        q, k, **o, start=start, seqlens_k=seqlens_k, block_table=table, cu_seqlens_q=ends,
        cu_seqlens_k=ends,
    )  # fmt: skip
    return lambda: hip_block_select(call)


def main(capability):
    """Prints the ptxas resources of the kernel."""
    found = []
    for name, dtype in DTYPES.items():
        for case in CASES:
            for kernel, code in compiled(int(capability), search(dtype, case)):
                found.append({"case": case, "dtype": name, **resources(kernel, code)})
    print(json.dumps(found))


# Known spills in bytes, docs/performance.md: by capability, dtype and case.
SPILLS = {(80, "float32", "search"): 88, **{(90, dtype, "restart"): 24 for dtype in DTYPES}}


@pytest.mark.parametrize("capability", list(SHARED))
def test_kernel_fits(capability, tmp_path):
    found = json.loads(fresh_process(__file__, __file__, capability, folder=tmp_path))
    assert len(found) == len(DTYPES) * len(CASES)
    for program in found:
        known = SPILLS.get((capability, program["dtype"], program["case"]), 0)
        assert program["spilled"] <= known, program
        assert_fits(program | {"spilled": 0}, capability)
        assert program["products"], program
        assert all(OPERANDS[program["dtype"]] in p for p in program["products"]), program


def test_no_length_compiles_anew(tmp_path):
    code = """
import torch
from test_hip_block_select_triton import compiled, search

for case in ("search", "paged"):
    calls = [search(torch.float16, case, n, s) for n, s in ((4096, 100), (1000, 128), (72, 65))]
    (first,), *others = [[code for _, code in compiled(80, c)] for c in calls]
    assert all(first is other for (other,) in others), case
"""
    without_code(__file__, code, folder=tmp_path)


if __name__ == "__main__":
    main(*sys.argv[1:])
