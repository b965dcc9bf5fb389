"""The Triton kernels of topk_select compile for GPUs: they fit, and no length recompiles."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from triton_compiler import SHARED, assert_fits, compiled, fresh_process, resources, without_code

from tokenmill.registry import get

pytest.importorskip("triton", reason="Triton is not installed (tokenmill[triton])")

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def call(dtype, columns=5000, k=64, everything=False):
    from tokenmill.triton_kernels.select.topk_select import topk_select

    options = {}
    if everything:
        ints, table = torch.zeros(4, dtype=torch.int32), torch.zeros(4, 9, dtype=torch.int32)
        options = {"lengths": ints, "row_starts": ints, "tie": "high", "return_values": True}
        options |= {"block_table": table, "page_size": 16, "row_to_batch": ints}
    record = get("topk_select").record(torch.zeros(4, columns, dtype=dtype), k, **options)
    return lambda: topk_select(record)


def main(capability):
    """Prints the ptxas resources of each kernel."""
    found = []
    for name, dtype in DTYPES.items():
        for everything in (False, True):
            for kernel, code in compiled(int(capability), call(dtype, everything=everything)):
                found.append({"case": name, **resources(kernel, code)})
    print(json.dumps(found))


@pytest.mark.parametrize("capability", list(SHARED))
def test_kernels_fit(capability, tmp_path):
    found = json.loads(fresh_process(__file__, __file__, capability, folder=tmp_path))
    assert {p["kernel"] for p in found} == {"select_kernel", "beside_kernel"}
    for program in found:
        assert_fits(program, capability)


def test_no_length_compiles_anew(tmp_path):
    code = """
import torch
from test_topk_select_triton import call, compiled

calls = [call(torch.float32, n, k, True) for n, k in ((5000, 64), (4096, 1), (70001, 65536))]
first, *others = [[code for _, code in compiled(80, c)] for c in calls]
assert all(a is b for other in others for a, b in zip(first, other, strict=True))
"""
    without_code(__file__, code, folder=tmp_path)


if __name__ == "__main__":
    main(*sys.argv[1:])
