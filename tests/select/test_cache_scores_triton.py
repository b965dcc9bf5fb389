"""The Triton kernels that score, compact and fill a cache compile for GPUs: they fit, and no length
recompiles."""

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
KERNELS = {
    "rows_kernel", "columns_kernel", "exponents_kernel", "weights_kernel", "reduce_kernel",
    "sum_kernel", "move_kernel", "append_kernel",
}  # fmt: skip


def columns(dtype, d, noise=False, rows=500, keys=700):
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


def main(capability):
    """Prints the ptxas resources of each kernel."""
    found = []
    for name, dtype in DTYPES.items():
        calls = [columns(dtype, d) for d in (64, 128, 256)] + [columns(dtype, 64, True)]
        calls += [make(dtype, d) for make in (rows, compact, append) for d in (64, 256)]
        for call in calls:
            for kernel, code in compiled(int(capability), call):
                found.append({"case": name, **resources(kernel, code)})
                if kernel.__name__ == "append_kernel":  # rounds each product: its bits are fixed
                    assert "fma.rn.f32" not in code.asm["ptx"]
    print(json.dumps(found))


@pytest.mark.parametrize("capability", list(SHARED))
def test_kernels_fit(capability, tmp_path):
    found = json.loads(fresh_process(__file__, __file__, capability, folder=tmp_path))
    assert {p["kernel"] for p in found} == KERNELS
    for program in found:
        assert_fits(program, capability)
        assert all(OPERANDS[program["case"]] in p for p in program["products"])


def test_no_length_compiles_anew(tmp_path):
    code = """
import torch
from test_cache_scores_triton import append, columns, compact, compiled, rows

half = torch.float16
for calls in (
    [columns(half, 64, True, *n) for n in ((500, 700), (16, 4096), (1001, 77))],
    [rows(half, 64, *n) for n in ((700, 1, 1), (4096, 16, 16), (77, 3, 7))],
    [compact(half, 64, *n) for n in ((700, 300), (4096, 16), (77, 1))],
    [append(half, 64, *n) for n in ((9, 16, 7, 4, 50), (16, 1, 1, 4, 16), (1, 3, 33, 4, 1))],
):
    first, *others = [[code for _, code in compiled(80, c)] for c in calls]
    assert all(a is b for other in others for a, b in zip(first, other, strict=True))
"""
    without_code(__file__, code, folder=tmp_path)


if __name__ == "__main__":
    main(*sys.argv[1:])
