"""The Triton kernels of scores and pooled keys compile for GPUs: they fit, and no length
recompiles."""

from __future__ import annotations

import torch
from triton_compiler import assert_fits

from tokenmill.registry import get

SCORES = {
    "dot": {},
    "paged": {"paged": True, "causal": True, "head_reduce": "group_max"},
    "boxes": {"scoring": "minmax", "block_k": 16, "head_reduce": "group_mean"},
    "blocks": {"scoring": "max_block", "block_k": 64, "q_reduce": "max", "block_q": 16},
    "codes": {"scoring": "max_block", "block_k": 64, "paged": True, "float8": True},
    "vote": {"head_reduce": "softmax_vote", "q_reduce": "mean", "block_q": 4},
}
POOLS = {f"pool_{mode}": mode for mode in ("mean", "minmax", "max")}
DTYPES = ("float32", "float16", "bfloat16")
CASES = [f"{dtype}:{name}" for dtype in DTYPES for name in (*SCORES, "gate", *list(POOLS)[:2])]


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


def call(case, *sizes):
    dtype, name = case.split(":")
    dtype = getattr(torch, dtype)
    if name in SCORES:
        return scores(dtype, name, *sizes)
    return gate(dtype) if name == "gate" else pool(dtype, POOLS[name], *sizes)


def test_kernels_fit(programs):
    kernels = {"score_kernel", "vote_kernel", "pool_kernel", "gate_kernel"}
    assert {p["kernel"] for p in programs} == kernels
    for program in programs:
        assert_fits(program)
        if program["kernel"] == "score_kernel":
            assert program["products"], program


def test_no_length_compiles_anew(compiles_once):
    sizes = dict.fromkeys(("dot", "vote", "paged"), ((1000, 5), (4096, 16), (72, 17)))
    sizes["pool_max"] = (1000,), (4096,), (17,)
    compiles_once({f"float16:{name}": of for name, of in sizes.items()})
