"""The Triton kernels that score, compact and fill a cache compile for GPUs: they fit, and no length
recompiles."""

from __future__ import annotations

import functools

import torch
from triton_compiler import OPERANDS, assert_fits

from tokenmill.registry import get

DTYPES = ("float32", "float16", "bfloat16")
CASES = [
    f"{dtype}:{kernels}:{head_dim}"
    for dtype in DTYPES
    for kernels, head_dims in {
        "columns": (64, 128, 256), "noise": (64,), "rows": (64, 256), "compact": (64, 256),
        "append": (64, 256),
    }.items()
    for head_dim in head_dims
]  # fmt: skip
KERNELS = {
    "rows_kernel", "columns_kernel", "exponents_kernel", "weights_kernel", "reduce_kernel",
    "sum_kernel", "move_kernel", "append_kernel",
}  # fmt: skip


def columns(dtype, d, rows=500, keys=700, noise=False):
    from tokenmill.triton_kernels.select.attention_column_scores import attention_column_scores

    q, k = torch.zeros(2, rows, 4, d, dtype=dtype), torch.zeros(2, keys, 2, d, dtype=dtype)
    options = {}
    if noise:
        lengths = torch.zeros(2, dtype=torch.int32)
        options = {"reduce": "visible_mean", "gumbel_tau": 1.5, "seed": rows}
        options |= {"seqlens_k": lengths, "seqlens_q": lengths}
    call = get("attention_column_scores").record(q, k, causal=True, **options)
    return lambda: attention_column_scores(call)


def rows(dtype, d, keys=700, skip=1, count=1):
    from tokenmill.triton_kernels.select.attention_row_scores import attention_row_scores

    q, k = torch.zeros(2, count, 8, d, dtype=dtype), torch.zeros(2, keys, 2, d, dtype=dtype)
    call = get("attention_row_scores").record(q, k, causal=True, skip=skip)
    return lambda: attention_row_scores(call)


def compact(dtype, d, length=700, entries=300):
    from tokenmill.triton_kernels.select.kv_cache_compact import kv_cache_compact

    k = torch.zeros(2, length, 2, d, dtype=dtype)
    keep, counts = torch.zeros(2, entries, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    call = get("kv_cache_compact").record(
        k, k, keep, counts, seqlens_k=counts, rerotate=torch.zeros(d // 2), compensation=True
    )
    return lambda: kv_cache_compact(call)


def append(dtype, d, pages=9, size=16, tokens=7, heads=3, table=50, scale=True):
    from tokenmill.triton_kernels.select.kv_cache_append import kv_cache_append

    k, q = (
        torch.zeros(tokens, heads, d, dtype=dtype),
        torch.zeros(tokens, 2 * heads, d, dtype=dtype),
    )
    cache = torch.zeros(pages, size, heads, d).to(torch.float8_e4m3fn)
    slots, angles = torch.zeros(tokens, dtype=torch.int32), torch.zeros(table, d // 2)
    each, every = (torch.zeros(pages, size, heads), torch.zeros(heads)) if scale else (None, None)
    call = get("kv_cache_append").record(
        cache, cache, k, k, slots, q=q, rope=(angles, angles, slots), k_scale=each, v_scale=every
    )
    return lambda: kv_cache_append(call)


def call(case, *sizes):
    dtype, kernels, head_dim = case.split(":")
    made = {"columns": columns, "rows": rows, "compact": compact, "append": append}
    made["noise"] = functools.partial(columns, noise=True)
    return made[kernels](getattr(torch, dtype), int(head_dim), *sizes)


def test_kernels_fit(programs):
    assert {p["kernel"] for p in programs} == KERNELS
    for program in programs:
        assert_fits(program)
        assert all(OPERANDS[program["case"].split(":")[0]] in p for p in program["products"])
        if program["kernel"] == "append_kernel":  # rounds each product: its bits are fixed
            assert not program["fma"]


def test_no_length_compiles_anew(compiles_once):
    compiles_once(
        {
            "float16:noise:64": ((500, 700), (16, 4096), (1001, 77)),
            "float16:rows:64": ((700, 1, 1), (4096, 16, 16), (77, 3, 7)),
            "float16:compact:64": ((700, 300), (4096, 16), (77, 1)),
            "float16:append:64": ((9, 16, 7, 4, 50), (16, 1, 1, 4, 16), (1, 3, 33, 4, 1)),
        }
    )
