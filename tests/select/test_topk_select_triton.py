"""The Triton kernels of topk_select compile for GPUs: they fit, and no length recompiles."""

from __future__ import annotations

import torch
from triton_compiler import assert_fits

from tokenmill.registry import get

CASES = [f"{t}:{k}" for t in ("float32", "float16", "bfloat16") for k in ("plain", "everything")]


def call(case, columns=5000, k=64):
    from tokenmill.triton_kernels.select.topk_select import topk_select

    dtype, how = case.split(":")
    dtype, options = getattr(torch, dtype), {}
    if how == "everything":
        ints, table = torch.zeros(4, dtype=torch.int32), torch.zeros(4, 9, dtype=torch.int32)
        options = {"lengths": ints, "row_starts": ints, "tie": "high", "return_values": True}
        options |= {"block_table": table, "page_size": 16, "row_to_batch": ints}
    record = get("topk_select").record(torch.zeros(4, columns, dtype=dtype), k, **options)
    return lambda: topk_select(record)


def test_kernels_fit(programs):
    assert {p["kernel"] for p in programs} == {"select_kernel", "beside_kernel"}
    for program in programs:
        assert_fits(program)


def test_no_length_compiles_anew(compiles_once):
    compiles_once({"float32:everything": ((5000, 64), (4096, 1), (70001, 65536))})
