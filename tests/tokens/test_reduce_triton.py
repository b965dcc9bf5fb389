"""The Triton kernels of segment_reduce, topk_partition and mask_partition compile for GPUs: they
fit, and no length recompiles."""

from __future__ import annotations

import torch
from triton_compiler import assert_fits

from tokenmill import registry

CASES = ("bfloat16:mean:everything", "bfloat16:amax:everything", "float32:mean:plain")
KERNELS = {"reduce_kernel", "backward_kernel", "partition_kernel", "count_kernel", "write_kernel"}


def call(case, tokens=600, channels=256):
    from tokenmill.triton_kernels.tokens.mask_partition import mask_partition
    from tokenmill.triton_kernels.tokens.segment_reduce import (
        segment_reduce,
        segment_reduce_backward,
    )
    from tokenmill.triton_kernels.tokens.topk_partition import topk_partition

    dtype, reduce, how = case.split(":")
    dtype, everything = getattr(torch, dtype), how == "everything"
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


def test_kernels_fit(programs):
    assert {p["kernel"] for p in programs} == KERNELS
    for program in programs:
        assert_fits(program)


def test_no_length_compiles_anew(compiles_once):
    compiles_once({"float32:mean:everything": ((6000, 256), (70016, 200), (2401, 513))})
