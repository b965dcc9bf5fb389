"""The Triton kernels of attention_column_scores compiled for GPUs: they fit."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from triton_compiler import OPERANDS, SHARED, assert_fits, compiled, fresh_process, resources

pytest.importorskip("triton", reason="Triton is not installed (tokenmill[triton])")

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def call(dtype, d, noise=False, rows=500, columns=700):
    from tokenmill.triton_kernels.select.column_scores import attention_column_scores

    q, k = torch.zeros(2, rows, 4, d, dtype=dtype), torch.zeros(2, columns, 2, d, dtype=dtype)
    lengths = torch.zeros(2, dtype=torch.int32) if noise else None
    return lambda: attention_column_scores(
        q, k, None, 0.1, True, "visible_mean" if noise else "sum", None, "none", lengths, lengths,
        1.5 if noise else 0.0, 5,
    )  # fmt: skip


def main(capability):
    """Prints what ptxas made of each kernel."""
    found = []
    for name, dtype in DTYPES.items():
        for d, noise in ((64, False), (64, True), (128, False), (256, False)):
            for kernel, code in compiled(int(capability), call(dtype, d, noise)):
                found.append({"case": name, "d": d, **resources(kernel, code)})
    print(json.dumps(found))


@pytest.mark.parametrize("capability", list(SHARED))
def test_kernels_fit(capability, tmp_path):
    found = json.loads(fresh_process(__file__, __file__, capability, folder=tmp_path))
    assert {p["kernel"] for p in found} == {"rows_kernel", "columns_kernel"}
    for program in found:
        assert_fits(program, capability)
        assert program["products"] and all(
            OPERANDS[program["case"]] in p for p in program["products"]
        )


def test_no_length_compiles_anew(tmp_path):
    code = """
import torch
from test_column_scores_triton import call, compiled

calls = [call(torch.float16, 64, True, *n) for n in ((500, 700), (16, 4096), (1001, 77))]
first, *others = [[code for _, code in compiled(80, c)] for c in calls]
assert all(a is b for other in others for a, b in zip(first, other, strict=True))
"""
    fresh_process(__file__, "-c", code, folder=tmp_path)


if __name__ == "__main__":
    main(*sys.argv[1:])
