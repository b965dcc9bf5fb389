"""The Triton kernels of cluster_tokens and reconstruct_tokens compile for GPUs and fit."""

from __future__ import annotations

import torch
from triton_compiler import assert_fits

from tokenmill import registry

CASES = ("float32", "bfloat16")
KERNELS = {"measure_kernel", "update_kernel", "spread_kernel", "distance_kernel", "select_kernel",
           "mean_kernel", "gradient_kernel", "compact_kernel"}  # fmt: skip


def call(dtype, channels=192):
    from tokenmill.triton_kernels.tokens import cluster_tokens, reconstruct_tokens

    x = torch.zeros(1, 64, 64, channels, dtype=getattr(torch, dtype))
    rows = x[:, :16].flatten(1, 2)
    cluster, reconstruct = map(registry.get, ("cluster_tokens", "reconstruct_tokens"))

    def run():
        for window_labels in (False, True):
            a = cluster.record(x, 32, iters=1, tau=0.01, window_labels=window_labels)
            _, _, mass, previous = cluster_tokens.cluster_tokens(a)
        centroids = x[:, ::2, ::2].contiguous()
        backward = cluster.backward.record(centroids, mass, previous, *a)
        cluster_tokens.cluster_tokens_backward(backward)
        for norm in ("l1", "l2"):
            a = reconstruct.record(rows, rows, rows, tau=0.01, norm=norm)
            out, index, weight = reconstruct_tokens.reconstruct_tokens(a)
            backward = reconstruct.backward.record(out, torch.zeros_like(index), weight, *a)
            reconstruct_tokens.reconstruct_tokens_backward(backward)

    return run


def test_kernels_fit(programs):
    assert {p["kernel"] for p in programs} == KERNELS
    for program in programs:
        assert_fits(program)
