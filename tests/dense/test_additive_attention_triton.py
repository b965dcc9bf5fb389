"""The Triton kernels of additive_attention compile for GPUs and fit their resources."""

from __future__ import annotations

import torch
from triton_compiler import assert_fits

from tokenmill.dense.additive_attention import BACKWARD, FORWARD

CASES = ("bfloat16",)


def call(dtype):
    from tokenmill.triton_kernels.dense import additive_attention as kernels

    dtype = getattr(torch, dtype)
    q, v = torch.zeros(1, 64, 128, dtype=dtype), torch.zeros(128, dtype=dtype)
    mask = torch.ones(1, 64, 64, dtype=torch.bool)
    a = FORWARD.record(q, q, v, mask)

    def launch():
        scores = kernels.additive_attention(a)
        kernels.additive_attention_backward(BACKWARD.record(scores, *a))

    return launch


def test_kernels_fit(programs):
    assert {p["kernel"] for p in programs} == {"scores_kernel", "gradients_kernel"}
    for program in programs:
        assert_fits(program)
