"""The Triton kernel of indexer_topk_select compiles for GPUs: it fits, and no length recompiles."""

from __future__ import annotations

import torch
from triton_compiler import assert_fits

from tokenmill.registry import get

CASES = [
    f"{dtype}:{layout}"
    for dtype in ("float32", "bfloat16")
    for layout in ("dense", "paged", "paged,float8")
]


def call(case, keys=1000, queries=5, heads=64):
    from tokenmill.triton_kernels.select.indexer_topk_select import indexer_topk_select

    dtype, layout = case.split(":")
    dtype, paged, float8 = getattr(torch, dtype), "paged" in layout, "float8" in layout
    ints = torch.zeros(3, dtype=torch.int32)
    k = torch.zeros(2, keys, 128, dtype=torch.float8_e4m3fn if float8 else dtype)
    table = None
    if paged:
        k, table = k.view(-1, 8, 128), torch.zeros(2, keys // 8, dtype=torch.int32)
    q = torch.zeros(queries if paged else 2, *(() if paged else (queries,)), heads, 128).to(dtype)
    record = get("indexer_topk_select").record(
        q, k, torch.zeros(q.shape[:-1]), 7, num_sink=3, num_recent=5, seqlens_k=ints[:2],
        cu_seqlens_q=ints if paged else None, block_table=table,
        k_scale=torch.ones(k.shape[:2]) if float8 else None,
    )  # fmt: skip
    return lambda: indexer_topk_select(record)


def test_kernels_fit(programs):
    scores = [program for program in programs if program["kernel"] == "score_kernel"]
    assert len(scores) == 6
    for program in scores:
        assert_fits(program)
        assert program["products"], program


def test_no_length_compiles_anew(compiles_once):
    sizes = (1000, 5), (4096, 16), (72, 17)
    compiles_once({"bfloat16:dense": sizes}, kernel="score_kernel")
