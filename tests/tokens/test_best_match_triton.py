"""The Triton kernels of best_match compile for GPUs: they fit, and no length recompiles."""

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

from tokenmill import registry

pytest.importorskip("triton", reason="Triton is not installed (tokenmill[triton])")

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def call(dtype, rows=99, partners=98, channels=64):
    from tokenmill.triton_kernels.tokens.best_match import best_match

    a, b = (torch.zeros(2, n, channels, dtype=dtype) for n in (rows, partners))
    record = registry.get("best_match").record(a, b, normalize=True)
    return lambda: best_match(record)


def main(capability):
    """Prints the ptxas resources of each kernel."""
    found = []
    for name, dtype in DTYPES.items():
        for kernel, code in compiled(int(capability), call(dtype)):
            found.append({"case": name, **resources(kernel, code)})
    print(json.dumps(found))


@pytest.mark.parametrize("capability", list(SHARED))
def test_kernels_fit(capability, tmp_path):
    found = json.loads(fresh_process(__file__, __file__, capability, folder=tmp_path))
    assert {p["kernel"] for p in found} == {"factor_kernel", "match_kernel"}
    for program in found:
        assert_fits(program, capability)
        if program["kernel"] == "match_kernel":
            assert any(OPERANDS[program["case"]] in p for p in program["products"]), program
        if program["case"] == "float32":
            assert "tf32" not in program["precisions"], program  # too coarse


def test_no_length_compiles_anew(tmp_path):
    code = """
import torch
from test_best_match_triton import call, compiled

calls = [call(torch.float16, *sizes) for sizes in ((99, 98), (1, 4096), (640, 17))]
first, *others = [[code for _, code in compiled(80, c)] for c in calls]
assert all(set(map(id, other)) == set(map(id, first)) for other in others)
"""
    without_code(__file__, code, folder=tmp_path)


if __name__ == "__main__":
    main(*sys.argv[1:])
