"""The Triton kernels of cluster_tokens and reconstruct_tokens compile for GPUs and fit."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from triton_compiler import SHARED, assert_fits, compiled, fresh_process, resources

from tokenmill import registry

pytest.importorskip("triton", reason="Triton is not installed (tokenmill[triton])")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
KERNELS = {"measure_kernel", "update_kernel", "spread_kernel", "distance_kernel", "select_kernel",
           "mean_kernel", "gradient_kernel", "compact_kernel"}  # fmt: skip


def call(dtype, channels=192):
    from tokenmill.triton_kernels.tokens import cluster_tokens, reconstruct_tokens

    x = torch.zeros(1, 64, 64, channels, dtype=dtype)
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
    assert {p["kernel"] for p in found} == KERNELS
    for program in found:
        assert_fits(program, capability)


if __name__ == "__main__":
    main(*sys.argv[1:])
