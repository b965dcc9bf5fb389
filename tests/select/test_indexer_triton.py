"""The Triton kernel of indexer_topk_select compiles for GPUs: it fits, and no length recompiles."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from triton_compiler import SHARED, assert_fits, compiled, fresh_process, resources, without_code

from tokenmill.registry import get

pytest.importorskip("triton", reason="Triton is not installed (tokenmill[triton])")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def call(dtype, keys=1000, queries=5, heads=64, paged=False, float8=False):
    from tokenmill.triton_kernels.select.indexer_topk_select import indexer_topk_select

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


def main(capability):
    """Prints the ptxas resources of each kernel."""
    found = []
    for name, dtype in DTYPES.items():
        for paged, float8 in ((False, False), (True, False), (True, True)):
            made = call(dtype, paged=paged, float8=float8)
            for kernel, code in compiled(int(capability), made):
                found.append({"case": name, **resources(kernel, code)})
    print(json.dumps(found))


@pytest.mark.parametrize("capability", list(SHARED))
def test_kernels_fit(capability, tmp_path):
    found = json.loads(fresh_process(__file__, __file__, capability, folder=tmp_path))
    scores = [program for program in found if program["kernel"] == "score_kernel"]
    assert len(scores) == 6
    for program in scores:
        assert_fits(program, capability)
        assert program["products"], program


def test_no_length_compiles_anew(tmp_path):
    code = """
import torch
from test_indexer_triton import call, compiled

calls = [call(torch.bfloat16, n, s) for n, s in ((1000, 5), (4096, 16), (72, 17))]
first, *others = [compiled(80, c)[0] for c in calls]
assert first[0].__name__ == "score_kernel" and all(first[1] is code for _, code in others)
"""
    without_code(__file__, code, folder=tmp_path)


if __name__ == "__main__":
    main(*sys.argv[1:])
