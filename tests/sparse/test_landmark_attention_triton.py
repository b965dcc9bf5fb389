"""The Triton kernels of landmark_attention compile for GPUs: they fit."""

from __future__ import annotations

import torch
from triton_compiler import assert_fits, assert_multiplies

from tokenmill import registry

SPEC = registry.get("landmark_attention")
CASES = ("float16:64:50", "float32:64:512")  # dtype, head_dim, block
KERNELS = {"landmark_kernel", "landmark_queries_kernel", "landmark_keys_kernel"}


def call(case):
    from tokenmill.triton_kernels.sparse import landmark_attention as forward
    from tokenmill.triton_kernels.sparse import landmark_attention_backward as backward

    dtype, dim, block = case.split(":")

    def launch():
        q = torch.empty(2, 4096, 8, int(dim), dtype=getattr(torch, dtype), device="meta")
        k = q[:, :, :2]
        a = SPEC.record(q, k, k, block=int(block))
        out, lse = forward.landmark_attention(a)
        backward.landmark_attention_backward(SPEC.backward.record(out, lse, out, lse, *a))

    return launch


def test_kernels_compile_without_spills_and_use_tensor_cores(programs):
    assert {p["kernel"] for p in programs} == KERNELS
    for program in programs:
        assert_fits(program)
        assert_multiplies(program, program["case"].split(":")[0])
