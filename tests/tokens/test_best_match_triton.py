"""The Triton kernels of best_match compile for GPUs: they fit, and no length recompiles."""

from __future__ import annotations

import torch
from triton_compiler import OPERANDS, assert_fits

from tokenmill import registry

CASES = ("float32", "float16", "bfloat16")


def call(dtype, rows=99, partners=98, channels=64):
    from tokenmill.triton_kernels.tokens.best_match import best_match

    a, b = (torch.zeros(2, n, channels, dtype=getattr(torch, dtype)) for n in (rows, partners))
    record = registry.get("best_match").record(a, b, normalize=True)
    return lambda: best_match(record)


def test_kernels_fit(programs):
    assert {p["kernel"] for p in programs} == {"factor_kernel", "match_kernel"}
    for program in programs:
        assert_fits(program)
        if program["kernel"] == "match_kernel":
            assert any(OPERANDS[program["case"]] in p for p in program["products"]), program
        if program["case"] == "float32":
            assert "tf32" not in program["precisions"], program  # too coarse


def test_no_length_compiles_anew(compiles_once):
    compiles_once({"float16": ((99, 98), (1, 4096), (640, 17))})
