"""The Triton kernels that gather, scatter, fuse and pool tokens compile for GPUs: they fit, and no
length recompiles."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from triton_compiler import SHARED, assert_fits, compiled, fresh_process, resources, without_code

from tokenmill import registry

pytest.importorskip("triton", reason="Triton is not installed (tokenmill[triton])")

KERNELS = {
    "gather_kernel",
    "places_kernel",
    "scatter_kernel",
    "copy_kernel",
    "fuse_kernel",
    "pool_kernel",
    "scales_kernel",
    "backward_kernel",
}


def call(dtype=torch.float32, tokens=600, channels=256, everything=True):
    from tokenmill.triton_kernels.tokens.gather_fuse import gather_fuse, gather_fuse_backward
    from tokenmill.triton_kernels.tokens.gather_tokens import gather_tokens
    from tokenmill.triton_kernels.tokens.local_pool import local_pool, local_pool_backward
    from tokenmill.triton_kernels.tokens.scatter_tokens import scatter_tokens

    x = torch.zeros(2, tokens, channels, dtype=dtype)
    ids = torch.zeros(2, tokens // 3, dtype=torch.int32)
    y = torch.zeros(*ids.shape, channels, dtype=dtype)
    names = ("gather_tokens", "scatter_tokens", "gather_fuse", "local_pool")
    gather, scatter, fuse, pool = map(registry.get, names)
    maps = torch.zeros(2, tokens // 6, 6, channels, dtype=dtype)
    mask = torch.zeros(maps.shape[:3], dtype=torch.bool) if everything else None

    def run():
        gather_tokens(gather.record(x, ids))
        gather_tokens(gather.record(x, ids[0]))
        scatter_tokens(scatter.record(y, ids, x if everything else tokens))
        a = fuse.record(x, ids, ids, torch.zeros(2, tokens - 1), normalize=everything)
        out, weight_sum = gather_fuse(a)
        gather_fuse_backward(fuse.backward.record(out, out, weight_sum, *a))
        for mode in ("avg", "max"):
            a = pool.record(
                maps, 3, dilation=(1, 2), mode=mode, mask=mask, count_include_pad=everything,
                subtract_input=everything,
            )  # fmt: skip
            local_pool(a)
            local_pool_backward(pool.backward.record(maps, *a))

    return run


def main(capability):
    """Prints the ptxas resources of each kernel."""
    found = []
    for dtype, everything in ((torch.bfloat16, True), (torch.float32, False)):
        for kernel, code in compiled(int(capability), call(dtype, everything=everything)):
            found.append({"case": str(dtype), **resources(kernel, code)})
    print(json.dumps(found))


@pytest.mark.parametrize("capability", list(SHARED))
def test_kernels_fit(capability, tmp_path):
    found = json.loads(fresh_process(__file__, __file__, capability, folder=tmp_path))
    assert {p["kernel"] for p in found} == KERNELS
    for program in found:
        assert_fits(program, capability)


def test_no_length_compiles_anew(tmp_path):
    code = """
from test_move_triton import call, compiled

first, *others = [
    [code for _, code in compiled(80, call(tokens=n))] for n in (6000, 70014, 2406)
]
assert all(a is b for other in others for a, b in zip(first, other, strict=True))
"""
    without_code(__file__, code, folder=tmp_path)


if __name__ == "__main__":
    main(*sys.argv[1:])
