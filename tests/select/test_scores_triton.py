"""The Triton kernels of scores and pooled keys compile for GPUs: they fit, and no length
recompiles."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from triton_compiler import SHARED, assert_fits, compiled, fresh_process, resources, without_code

from tokenmill.registry import get

pytest.importorskip("triton", reason="Triton is not installed (tokenmill[triton])")

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SCORES = {
    "dot": {},
    "paged": {"paged": True, "causal": True, "head_reduce": "group_max"},
    "boxes": {"scoring": "minmax", "block_k": 16, "head_reduce": "group_mean"},
    "blocks": {"scoring": "max_block", "block_k": 64, "q_reduce": "max", "block_q": 16},
    "codes": {"scoring": "max_block", "block_k": 64, "paged": True, "float8": True},
    "vote": {"head_reduce": "softmax_vote", "q_reduce": "mean", "block_q": 4},
}


def scores(dtype, case, tokens=1000, queries=5, dim=128):
    from tokenmill.triton_kernels.select.kv_block_scores import kv_block_scores

    o = dict(SCORES[case])
    half = (2,) if case == "boxes" else ()
    k = torch.zeros(2, tokens, 2, *half, dim, dtype=dtype)
    table = None
    if o.pop("paged", False):
        k = k.view(-1, 8, *k.shape[2:])
        table = torch.zeros(2, tokens // 8, dtype=torch.int32)
    scale = None
    if o.pop("float8", False):
        k, scale = k.to(torch.float8_e4m3fn), torch.ones(k.shape[:3])
    lengths = torch.zeros(2, dtype=torch.int32)
    call = get("kv_block_scores").record(
        torch.zeros(2, queries, 8, dim, dtype=dtype), k, **o, num_sink=3, num_recent=5,
        seqlens_k=lengths, block_table=table, k_scale=scale,
    )  # fmt: skip
    return lambda: kv_block_scores(call)


def pool(dtype, mode, tokens=1000):
    from tokenmill.triton_kernels.select.block_pool_keys import block_pool_keys

    k = torch.zeros(2, tokens, 2, 128, dtype=dtype)
    lengths = torch.zeros(2, dtype=torch.int32)
    call = get("block_pool_keys").record(k, 16, mode=mode, lengths=lengths)
    return lambda: block_pool_keys(call)


def gate(dtype):
    from tokenmill.triton_kernels.select.query_similarity_gate import query_similarity_gate

    q = torch.zeros(2, 3, 8, 128, dtype=dtype)
    call = get("query_similarity_gate").record(q, q)
    return lambda: query_similarity_gate(call)


def main(capability):
    """Prints the ptxas resources of each kernel."""
    found = []
    for name, dtype in DTYPES.items():
        calls = [*(scores(dtype, case) for case in SCORES), gate(dtype)]
        calls += [pool(dtype, mode) for mode in ("mean", "minmax")]
        for call in calls:
            for kernel, code in compiled(int(capability), call):
                found.append({"case": name, **resources(kernel, code)})
    print(json.dumps(found))


@pytest.mark.parametrize("capability", list(SHARED))
def test_kernels_fit(capability, tmp_path):
    found = json.loads(fresh_process(__file__, __file__, capability, folder=tmp_path))
    assert {p["kernel"] for p in found} == {
        "score_kernel", "vote_kernel", "pool_kernel", "gate_kernel"
    }  # fmt: skip
    for program in found:
        assert_fits(program, capability)
        if program["kernel"] == "score_kernel":
            assert program["products"], program


def test_no_length_compiles_anew(tmp_path):
    code = """
import torch
from test_scores_triton import compiled, pool, scores

for case in ("dot", "vote", "paged"):
    calls = [scores(torch.float16, case, n, s) for n, s in ((1000, 5), (4096, 16), (72, 17))]
    first, *others = [[code for _, code in compiled(80, c)] for c in calls]
    assert all(a is b for other in others for a, b in zip(first, other, strict=True)), case
first, *others = [[code for _, code in compiled(80, pool(torch.float16, "max", n))]
                  for n in (1000, 4096, 17)]
assert all(a is b for other in others for a, b in zip(first, other, strict=True))
"""
    without_code(__file__, code, folder=tmp_path)


if __name__ == "__main__":
    main(*sys.argv[1:])
