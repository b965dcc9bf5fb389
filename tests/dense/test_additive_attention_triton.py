"""The Triton kernels of additive_attention compile for GPUs and fit their resources."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from triton_compiler import SHARED, assert_fits, compiled, fresh_process, resources

from tokenmill.dense.additive_attention import BACKWARD, FORWARD

pytest.importorskip("triton", reason="Triton is not installed (tokenmill[triton])")


def call():
    from tokenmill.triton_kernels.dense import additive_attention as kernels

    q, v = torch.zeros(1, 64, 128, dtype=torch.bfloat16), torch.zeros(128, dtype=torch.bfloat16)
    mask = torch.ones(1, 64, 64, dtype=torch.bool)
    a = FORWARD.record(q, q, v, mask)
    scores = kernels.additive_attention(a)
    kernels.additive_attention_backward(BACKWARD.record(scores, *a))


def main(capability):
    """Prints the ptxas resources of each kernel."""
    found = [resources(kernel, code) for kernel, code in compiled(int(capability), call)]
    print(json.dumps(found))


@pytest.mark.parametrize("capability", list(SHARED))
def test_kernels_fit(capability, tmp_path):
    found = json.loads(fresh_process(__file__, __file__, capability, folder=tmp_path))
    assert {p["kernel"] for p in found} == {"scores_kernel", "gradients_kernel"}
    for program in found:
        assert_fits(program, capability)


if __name__ == "__main__":
    main(*sys.argv[1:])
