"""The Triton kernels of landmark_attention compile for GPUs: they fit.

As a script, it compiles them without a GPU and prints their use of resources:
python tests/sparse/test_landmark_attention_triton.py CAPABILITY [float16:64:64]
"""

from __future__ import annotations

import json
import sys

import pytest
import torch
from triton_compiler import OPERANDS, SHARED, assert_fits, compiled, fresh_process, resources

from tokenmill import registry

pytest.importorskip("triton", reason="Triton is not installed (tokenmill[triton])")

SPEC = registry.get("landmark_attention")
CASES = ("float16:64:50", "float32:64:512")  # dtype, head_dim, block
KERNELS = {"landmark_kernel", "landmark_queries_kernel", "landmark_keys_kernel"}


def kernels(capability, dtype, dim, block):
    from tokenmill.triton_kernels.sparse import landmark_attention as forward
    from tokenmill.triton_kernels.sparse import landmark_attention_backward as backward

    def launch():
        q = torch.empty(2, 4096, 8, dim, dtype=dtype, device="meta")
        k = q[:, :, :2]
        a = SPEC.record(q, k, k, block=block)
        out, lse = forward.landmark_attention(a)
        backward.landmark_attention_backward(SPEC.backward.record(out, lse, out, lse, *a))

    return compiled(capability, launch)


def main(capability, *cases):
    for case in cases:
        dtype, dim, block = case.split(":")
        for kernel, code in kernels(int(capability), getattr(torch, dtype), int(dim), int(block)):
            print(json.dumps({"case": case, **resources(kernel, code)}), flush=True)


@pytest.mark.parametrize("capability", SHARED)
def test_kernels_compile_without_spills_and_use_tensor_cores(capability, tmp_path):
    text = fresh_process(__file__, __file__, capability, *CASES, folder=tmp_path)
    found = [json.loads(line) for line in text.splitlines()]
    assert {p["kernel"] for p in found} == KERNELS
    for program in found:
        assert_fits(program, capability)
        operand = OPERANDS[program["case"].split(":")[0]]
        assert program["products"], program
        for product in program["products"]:
            assert f".f32.{operand}.{operand}" in product, program


if __name__ == "__main__":
    main(*sys.argv[1:])
