"""The Triton kernels of segment_reduce, topk_partition and mask_partition compile for GPUs: they
fit, and no length recompiles."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from triton_compiler import SHARED, assert_fits, compiled, fresh_process, resources, without_code

from tokenmill import registry

pytest.importorskip("triton", reason="Triton is not installed (tokenmill[triton])")

KERNELS = {"reduce_kernel", "backward_kernel", "partition_kernel", "count_kernel", "write_kernel"}


def call(dtype=torch.float32, reduce="mean", tokens=600, channels=256, everything=True):
    from tokenmill.triton_kernels.tokens.mask_partition import mask_partition
    from tokenmill.triton_kernels.tokens.segment_reduce import (
        segment_reduce,
        segment_reduce_backward,
    )
    from tokenmill.triton_kernels.tokens.topk_partition import topk_partition

    segments = registry.get("segment_reduce")
    x = torch.zeros(2, tokens, channels, dtype=dtype)
    offsets = torch.zeros(2, tokens // 40 + 1, dtype=torch.int32)
    perm = torch.zeros(2, tokens, dtype=torch.int32) if everything else None
    weighted = everything and reduce in ("sum", "mean")
    weight = torch.zeros(2, tokens) if weighted else None
    mask = torch.zeros(2, tokens, dtype=torch.bool)

    def run():
        a = segments.record(x, offsets, perm=perm, weight=weight, reduce=reduce)
        y, weight_sum, arg = segment_reduce(a)
        dsum = weight_sum if weighted else None
        backward = segments.backward.record(y, dsum, y, weight_sum, arg, True, *a)
        segment_reduce_backward(backward)
        k = tokens // 3
        options = {"order": "index", "largest": False}
        if everything:
            options = {"max_k": k, "valid": mask}
            k = torch.ones(2, dtype=torch.int32)
        scores = x[..., 0].contiguous()
        topk_partition(registry.get("topk_partition").record(scores, k, protect_last=1, **options))
        mask_partition(registry.get("mask_partition").record(mask))

    return run


def main(capability):
    """Prints the ptxas resources of each kernel."""
    found = []
    for reduce in ("mean", "amax"):
        for kernel, code in compiled(int(capability), call(torch.bfloat16, reduce)):
            found.append({"case": reduce, **resources(kernel, code)})
    for kernel, code in compiled(int(capability), call(everything=False)):
        found.append({"case": "plain", **resources(kernel, code)})
    print(json.dumps(found))


@pytest.mark.parametrize("capability", list(SHARED))
def test_kernels_fit(capability, tmp_path):
    found = json.loads(fresh_process(__file__, __file__, capability, folder=tmp_path))
    assert {p["kernel"] for p in found} == KERNELS
    for program in found:
        assert_fits(program, capability)


def test_no_length_compiles_anew(tmp_path):
    code = """
from test_reduce_triton import call, compiled

first, *others = [
    [code for _, code in compiled(80, call(tokens=n, channels=c))]
    for n, c in ((6000, 256), (70016, 200), (2401, 513))
]
assert all(a is b for other in others for a, b in zip(first, other, strict=True))
"""
    without_code(__file__, code, folder=tmp_path)


if __name__ == "__main__":
    main(*sys.argv[1:])
